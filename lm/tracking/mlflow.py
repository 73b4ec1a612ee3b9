"""MLflow as a tracker of a run: a SQLite file in the run's folder, unless MLFLOW_TRACKING_URI names another store."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping

from lm.tracking import files
from lm.tracking.files import RunFileError
from lm.tracking.service import RunFacts, Service, Status

KNOWN = "mlflow.json"
_ENDS = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_PARAM_CHARACTERS, _PARAMS_A_CALL = 6000, 100  # MLflow's limits


def open_service(facts: RunFacts) -> Service:
    """Starts an MLflow run, or goes on with that of the run's earlier starts, whose id is in `workdir`/mlflow.json.

    MLflow cannot take values back: a metric of a step at which the store has a value is not written again. What the
    config was at the first start are its parameters, which it does not let change. A run that begins anew, as before
    its first checkpoint, is another run of MLflow.

    Raises:
      RunFileError: the run's folder was moved or copied since; MLflow would write its texts to the old place.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    store = os.environ.get("MLFLOW_TRACKING_URI")
    folder = facts.workdir.absolute() / "mlflow"
    if not store:
        with files.access(folder, "writing to"):
            folder.mkdir(exist_ok=True)
    client = MlflowClient(tracking_uri=store or f"sqlite:///{folder}/mlflow.db")
    known = files.read_document(facts.workdir / KNOWN) if facts.start_step else {}
    run_id, last = known.get("run_id"), dict[str, int]()
    if run_id:
        there = client.get_run(run_id).info.artifact_uri
        if not store and not there.removeprefix("file://").startswith(f"{folder}/"):
            raise RunFileError(f"{folder} keeps texts at {there}: delete it and {facts.workdir / KNOWN} to begin anew")
        client.update_run(run_id, status="RUNNING")
        for key in client.get_run(run_id).data.metrics:
            last[key] = max(metric.step for metric in client.get_metric_history(run_id, key))
    else:
        found = client.get_experiment_by_name(facts.project)
        place = None if store else str(folder / "artifacts")
        experiment = found.experiment_id if found else client.create_experiment(facts.project, artifact_location=place)
        run_id = client.create_run(experiment, run_name=facts.name).info.run_id
        files.write_document(facts.workdir / KNOWN, {"run_id": run_id})
        params = [Param(_name(key), str(value)[:_PARAM_CHARACTERS]) for key, value in facts.config.items()]
        for start in range(0, len(params), _PARAMS_A_CALL):
            client.log_batch(run_id, params=params[start : start + _PARAMS_A_CALL])
    client.log_dict(run_id, dict(facts.environment), "environment.json")

    def scalars(step: int, values: Mapping[str, float]) -> None:
        new = {_name(key): value for key, value in values.items() if step > last.get(_name(key), -1)}
        now = int(1000 * time.time())
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in new.items()])

    def text(step: int, name: str, text: str) -> None:
        # Of another alphabet, or longer, names may look alike.
        unlike = hashlib.sha256(name.encode()).hexdigest()[:8]
        path = f"samples/{step:08}/{re.sub(r'[^-.A-Za-z0-9]+', '_', name)[:60]}-{unlike}.txt"
        client.log_text(run_id, f"{name}\n\n{text}", path)

    def finish(figures: Mapping[str, float], status: Status) -> None:
        scalars(int(figures.get("steps", 0)), {f"final/{name}": value for name, value in figures.items()})
        client.set_terminated(run_id, _ENDS[status])

    return Service(scalars, text, finish)


def _name(key: str) -> str:
    """A key with the characters that MLflow allows. Example: 'eval/hits@10' -> 'eval/hits_10'."""
    return re.sub(r"[^-.\w /:]", "_", key)
