"""What a run tells the trackers that `monitor.trackers` names (TensorBoard, W&B, MLflow): one interface for all.

An opener, `open_service(facts)`, starts a tracker or goes on with what an earlier start of the run has begun, and
returns a `Service`. All of this is called in a thread of the tracker (`lm.tracking.relay`): it may wait and raise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["done", "failed", "interrupted"]


class RunFacts(NamedTuple):
    """What is known of a run when it starts.

    Attributes:
      workdir: its folder; by default trackers write nowhere else.
      name: by which people know it.
      project: of the runs that belong together; a W&B project, an MLflow experiment.
      start_step: steps done before this start.
      config: key -> value, of the whole resolved config.
      changed: those of them that differ from the defaults.
      environment: as in environment.json.
    """

    workdir: Path
    name: str
    project: str
    start_step: int
    config: Mapping[str, Any]
    changed: Mapping[str, Any]
    environment: Mapping[str, Any]


class Service(NamedTuple):
    """The functions of a tracker that is open.

    Attributes:
      scalars: takes a step and the values of a row of metrics.jsonl, 'SPLIT/METRIC' -> value; NaN and infinity as they
        are.
      text: takes a step, a name and a text that the model has generated.
      finish: takes the final figures ({} unless the run is done) and how this start has ended; called once, at the end.
    """

    scalars: Callable[[int, Mapping[str, float]], None]
    text: Callable[[int, str, str], None]
    finish: Callable[[Mapping[str, float], Status], None]
