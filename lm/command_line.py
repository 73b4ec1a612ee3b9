"""What the command lines of `lm.main` and of the tools share: the recipe flag, parsing, one-line errors.

A command defines its flags with `absl.flags` and ends in

    if __name__ == "__main__":
        command_line.run(main)

It imports JAX in `main` at the earliest (but for tools/plan.py), so that --help is answered at once. A recipe that
--config names imports JAX while flags are parsed.
"""

import contextlib
import logging as std_logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from lm.config import older
from lm.terminal import say, stop

flags.disclaim_key_flags()  # --help lists a flag defined here under the command that asked for it


def define_recipe() -> flags.FlagHolder[config_dict.ConfigDict]:
    """Defines --config=FILE.py[:ARGUMENT] and its overrides --config.KEY=VALUE; its value is None if not given."""
    return config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py, or configs/NAME.py:argument.")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command: parses the flags, then calls `main` with the program's name and the arguments that are no flags.

    Ctrl-C ends it with one line and status 130, also where what started it has Ctrl-C ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        say("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, for `run`; a misspelt --config.KEY ends in one line, no traceback.

    Returns:
      The program's name and the arguments that are no flags.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax logs every detail of every save at INFO
    logging.get_absl_logger().addFilter(_is_no_traceback_of_orbax)
    sys.excepthook = _show_traceback
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # how ml_collections refuses a key that the config lacks
        message = str(error).strip("\"'").replace("\\n", ". ").replace("\n", ". ").replace("\\'", "'")
        for arg in argv:
            given = arg.removeprefix("--config.").partition("=")[0]
            if arg.startswith("--config.") and (now := older.successor(given)):
                stop(f"error: unknown config key in {arg}: set {now} instead")
            if given.startswith("eval.sets."):
                whole = "--config.eval.sets=\"{'NAME': {'path': ...}}\""
                stop(f"error: {arg}: the recipe gives no such set or key; {whole} gives all sets at once")
        key = message.lstrip("'").split("'")[0]
        flag = next((f" in {arg}" for arg in argv if arg.startswith("--config.") and key in arg), "")
        stop(f"error: unknown config key{flag}: {message}")
    except BrokenPipeError:  # the reader of --help has seen enough
        raise SystemExit(1) from None
    except OSError as error:  # the recipe's file does not exist: the last line of the message names it
        stop(f"error: --config: {str(error).strip().splitlines()[-1].strip()}")


def _show_traceback(*error: Any) -> None:
    """Prints the traceback of an unexpected error, whose message may hold text of data."""
    say("".join(traceback.format_exception(*error)), file=sys.stderr, end="")


def _is_no_traceback_of_orbax(record: std_logging.LogRecord) -> bool:
    """Whether to log a record: each of Orbax's threads logs a traceback of an error that the save then raises."""
    return not (record.exc_info and "/orbax/checkpoint/" in record.pathname)


def is_expected(error: BaseException) -> bool:
    """Whether an error is one of our own, whose message says what is wrong: a traceback of it would not help."""
    return type(error).__module__.startswith("lm.")


def arguments(argv: list[str], *names: str) -> list[str]:
    """The positional arguments of a command. Example: ('translate.py', 'runs/a'), 'RUN' -> ['runs/a'].

    Args:
      argv: what `absl.app.run` passes to `main`.
      names: of the arguments, for messages; a last name that ends in '...' stands for one or more arguments.

    Raises:
      SystemExit: there are more or fewer arguments than names.
    """
    given = argv[1:]
    is_open = bool(names) and names[-1].endswith("...")
    if len(given) < len(names) or (len(given) > len(names) and not is_open):
        expected = " ".join(names) or "none: all options are --flag=value"
        stop(f"error: arguments: found {' '.join(given) or 'none'}, expected {expected}; see --help")
    return given


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with `error: MESSAGE` and status 1 on an error of the project's own; others keep a traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if not is_expected(error):
            raise
        stop(f"error: {error}")


def check_output(flag: str, path: str) -> None:
    """Ends the program if the file that a flag names cannot be written, before its content is computed."""
    folder = Path(path).parent
    if path and (Path(path).is_dir() or not os.access(folder, os.W_OK | os.X_OK)):
        stop(f"error: --{flag}={path}: expected a file in a folder that exists and is writable")


_GENERATE: dict[str, tuple[Callable[..., flags.FlagHolder[Any]], str]] = {
    "max_new_tokens": (flags.DEFINE_integer, "Longest text"),
    "min_new_tokens": (flags.DEFINE_integer, "Before so many tokens, none ends the text"),
    "stop": (flags.DEFINE_multi_string, "A string that ends the text, which is cut before it; '' = none"),
    "temperature": (flags.DEFINE_float, "0 = greedy decoding"),
    "top_k": (flags.DEFINE_integer, "Sample from the k most likely tokens"),
    "top_p": (flags.DEFINE_float, "Sample from the most likely tokens of total probability p"),
    "repetition_penalty": (flags.DEFINE_float, "Makes tokens that have appeared less likely; 1 = off"),
}


def define_generate(*names: str) -> Callable[[], dict[str, Any]]:
    """Defines flags for keys of `generate`; returns a function that gives the keys that were set, with their values."""
    defined = [_GENERATE[name][0](name, None, f"{_GENERATE[name][1]} (default: the run's).") for name in names]

    def given() -> dict[str, Any]:
        values = {flag.name: flag.value for flag in defined if flag.value is not None}
        return values | ({"stop": ()} if values.get("stop") == [""] else {})

    return given


def data_changes(data_format: str, rename: list[str], split: str) -> dict[str, Any]:
    """Keys of `data` from the flags --format, --rename=FIELD:EXPECTED,... and --split of tools that read a file."""
    pairs = [tuple(pair.split(":")) for pair in rename]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        stop(f"error: --rename={','.join(rename)}: expected FIELD:EXPECTED, such as 1:token,2:tag")
    given = {"format": data_format, "rename": tuple(pairs), "eval_path": split}
    return {key: value for key, value in given.items() if value}


def use_huge_pages() -> None:
    """Re-executes the program, on Linux, with malloc backed by pages of 2 MiB. Call it once, before JAX is imported.

    A training step on CPU allocates its temporaries from the kernel and returns them. With pages of 4 KiB that costs
    hundreds of thousands of page faults a step (docs/performance.md). The C library reads GLIBC_TUNABLES only when a
    program starts. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns this off; before glibc 2.35 it has no effect.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".removeprefix(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
