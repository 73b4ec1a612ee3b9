"""`python -m lm.main --config=configs/NAME.py --workdir=DIR [--config.a.b=v]`: start or resume a run."""

import errno
import os
import re
import signal
import sys
import threading

from absl import flags

from lm import command_line, lease, preemption
from lm.parallel import xla_flags
from lm.terminal import say, stop

_CONFIG = command_line.define_recipe()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder. The same command again resumes the run in it.")
_PRINT = flags.DEFINE_bool("print_config", False, "Print the resolved config and the parameter table; do not train.")
_ACCEPT = flags.DEFINE_bool("accept_changed_data", False, "Resume although the data or the seed has changed.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes; found automatically on a TPU pod.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where it is not found automatically.")
_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes there are, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", -1, "Which one this is, from 0, with --coordinator.")

# Of the disk, or of who may write to it: not faults of the program. Errors of the run's own files say more.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
_EXIT_SECONDS = 20.0  # see `end_soon`

# How XLA's error of a collective begins or what it names when a process that takes part is gone. Other errors of XLA,
# such as RESOURCE_EXHAUSTED, would come again after a restart.
_LOST_HOST = re.compile(
    r"(?!RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|NOT_FOUND|.*out of memory)"
    r"(UNAVAILABLE:|ABORTED:|DEADLINE_EXCEEDED:|CANCELLED:|"
    r".*(gloo|nccl|megascale).*(connection|closed|reset|refused|remote process|network|timed? ?out)|.*heartbeat)",
    re.IGNORECASE | re.DOTALL,
)
_LOST_HOST_STATUS = 128 + signal.SIGABRT  # as JAX's coordination service ends a process in the same case


def main(argv: list[str]) -> None:
    """Starts or resumes the run that the flags name; an expected error becomes one message and an exit status."""
    if len(argv) > 1:
        stop(f"error: unexpected argument {argv[1]!r}; all options are --flag=value")
    if _CONFIG.value is None or (_WORKDIR.value is None and not _PRINT.value):
        stop("error: --config=configs/NAME.py and --workdir=DIR are needed; --help explains them")
    try:
        from lm import tasks, train  # import JAX
        from lm.parallel import mesh

        cfg = tasks.build_config(_CONFIG.value)
        xla_flags.set_libtpu(cfg.model.embed_dim)

        if _PRINT.value:
            say(train.describe(cfg, _WORKDIR.value or "."))
            return
        if _DISTRIBUTED.value or _COORDINATOR.value:
            mesh.initialize_processes(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train.train(cfg, _WORKDIR.value or "", _ACCEPT.value)
    except preemption.Stopped as stopped:  # it has said why
        end_soon(stopped.exit_status, preemption.UNWIND_SECONDS)
        sys.exit(stopped.exit_status)
    except Exception as error:
        status = getattr(error, "exit_status", 1)
        if _DISTRIBUTED.value or _COORDINATOR.value:
            if is_lost_host(error):
                say(f"error: another process of the run was lost: {error}", file=sys.stderr)
                sys.stdout.flush()
                os._exit(_LOST_HOST_STATUS)  # at exit JAX would wait for that process
            end_soon(status, _EXIT_SECONDS)
        is_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        if not (is_disk or command_line.is_expected(error)):
            raise
        say(error if isinstance(error, preemption.Preempted) else f"error: {error}", file=sys.stderr)
        if isinstance(error, lease.Lost):
            os._exit(status)  # at once: no thread may go on writing, and no other process is waited for
        sys.exit(status)


def is_lost_host(error: BaseException | None) -> bool:
    """Whether an error of one of several processes, or what caused it, says that another one is gone."""
    while error and not (type(error).__name__ == "JaxRuntimeError" and _LOST_HOST.match(str(error))):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None


def end_soon(status: int, seconds: float) -> None:
    """Ends the process with `status` after some seconds, if it does not end by itself before.

    At exit JAX waits minutes for the other processes, which wait for this one in a step if it alone has failed, and
    then aborts all of them: the status of an error would be that of a lost host, and the run be restarted in vain.
    """
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    command_line.use_huge_pages()
    command_line.run(main)
