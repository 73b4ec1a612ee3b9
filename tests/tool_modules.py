"""Runs tools in the process of the tests, each with its own flags, although two may define a flag of the same name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from absl import flags
from absl.testing import flagsaver

from lm import command_line

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """The module tools/NAME.py, for its functions that read no flags. Processes that these start find it by name."""
    with flagsaver.flagsaver():  # afterwards the flags that the module has defined are removed
        module = sys.modules[f"tools.{name}"] = _execute(name)
        return module


def call(name: str, *arguments: object) -> None:
    """Runs `python tools/NAME.py ARGUMENTS...`; the end of the program is a SystemExit."""
    argv = [f"{name}.py", *map(str, arguments)]
    with flagsaver.flagsaver(), mock.patch.object(sys, "argv", argv):
        module = _execute(name)
        try:
            module.main(command_line.parse(argv))
        finally:
            flags.FLAGS.unparse_flags()


def _execute(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools.{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
