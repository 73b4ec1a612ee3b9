"""Weights & Biases as a tracker of a run: offline in the run's folder, unless WANDB_MODE or WANDB_DIR are set."""

import atexit
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

from lm.tracking import files
from lm.tracking.service import RunFacts, Service, Status

KNOWN = "wandb.json"


def open_service(facts: RunFacts) -> Service:
    """Starts a W&B run, or goes on with that of the run's earlier starts, whose id is in `workdir`/wandb.json.

    Offline, each start makes a folder in `workdir`/wandb, all of one id, for `wandb sync`. W&B cannot take rows back:
    those of steps that an earlier start has completed are not sent again, and its values stay. The last step of a start
    that was killed is sent again, as W&B completes a step when it gets a later one. A run that begins anew, as before
    its first checkpoint, is another run of W&B.
    """
    os.environ.setdefault("WANDB_CACHE_DIR", _cache_folder())  # otherwise in the home folder
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    known = files.read_document(facts.workdir / KNOWN) if facts.start_step else {}
    known = known or {"id": uuid.uuid4().hex[:12], "step": -1}  # the step up to which W&B has all
    sent_before, at = known["step"], known["step"]
    files.write_document(facts.workdir / KNOWN, known)
    settings = wandb.Settings(  # no console, code, git remote, statistics of the machine; the host is recorded
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    run: Any = wandb.init(
        project=facts.project,
        name=facts.name,
        id=known["id"],
        resume="allow",
        reinit="create_new",  # trials of a study train side by side in one process
        dir=os.environ.get("WANDB_DIR") or str(facts.workdir),
        mode=os.environ.get("WANDB_MODE") or "offline",  # type: ignore[arg-type]
        config={**facts.config, "environment": files.finite(facts.environment)},
        allow_val_change=True,
        settings=settings,
    )

    def log(step: int, values: Mapping[str, Any]) -> None:
        nonlocal at
        if step <= sent_before:
            return
        run.log(dict(values), step=step)
        if step > at:
            sent(at)
            at = step

    def sent(step: int) -> None:
        if step > known["step"]:
            known["step"] = step
            files.write_document(facts.workdir / KNOWN, known)

    def text(step: int, name: str, text: str) -> None:
        log(step, {f"samples/{name}": text})

    def finish(figures: Mapping[str, float], status: Status) -> None:
        run.summary.update({f"final/{name}": value for name, value in figures.items()})
        if status == "interrupted":
            run.mark_preempting()
        run.finish(exit_code=int(status != "done"))
        sent(at)

    return Service(log, text, finish)


@functools.cache
def _cache_folder() -> str:
    """Of this process, deleted at its end: W&B takes one from the environment, for all its runs."""
    folder = tempfile.mkdtemp(prefix="wandb-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
