"""What no file of the project may do: leave a config key unread, hide a default, run code out of a file.

Who may import whom is in pyproject.toml (import-linter).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm import config as config_lib
from lm.config.schema import keys as keys_of
from lm.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[1]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    assert path.exists(), f"{path.relative_to(ROOT)} is missing"
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def dotted(node: ast.expr) -> str:
    """The source of a chain of names, 'cfg.optim.name'; '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


# --- keys -------------------------------------------------------------------------------------------------------


def config_reads() -> set[tuple[str, str]]:
    """(name it is read from, attribute) of every attribute read in lm/ and tools/ outside the config."""
    return {
        (dotted(node.value).rpartition(".")[2].lstrip("_"), node.attr)
        for path in python_files("lm", "tools")
        if path != ROOT / "lm" / "config" / "sections.py"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def all_keys() -> set[str]:
    """The keys of a config, and the options of all tasks."""
    options = {f"task.{key}" for task in TASKS.values() for key in keys_of(task.options)}
    return options | set(keys_of(config_lib.Config))


def test_every_config_key_is_read():
    reads = config_reads()
    dead = []
    for key in all_keys():
        path, _, name = key.rpartition(".")
        section = path.rpartition(".")[2]
        if not reads & {(owner, name) for owner in (section, "cfg", "config", f"{section}_cfg")}:
            dead.append(key)
    assert not dead, f"keys that nothing in lm/ or tools/ reads (as cfg.{{section}}.{{key}} or cfg.{{key}}): {dead}"


def test_defaults_live_in_config_only():
    """No cfg.get(key, default) and no getattr(cfg, key, default) outside the config."""
    sections = {key.rpartition(".")[0].rpartition(".")[2] for key in all_keys()} - {""}
    owners = {"cfg", "config", *sections}
    found = []
    for path in python_files("lm"):
        if path == ROOT / "lm" / "config" / "sections.py":
            continue
        for node in (n for n in ast.walk(parse(path)) if isinstance(n, ast.Call)):
            called = dotted(node.func)
            if called.endswith(".get"):
                owner = called.rpartition(".")[0].rpartition(".")[2]
            elif called == "getattr" and len(node.args) == 3:
                owner = dotted(node.args[0]).rpartition(".")[2]
            else:
                continue
            if owner in owners:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"the default of a config key belongs in lm/config/sections.py: {found}"


# --- what nothing may do -----------------------------------------------------------------------------------------

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def executes(tree: ast.Module) -> list[str]:
    """What would run code out of a file."""
    out = [f"{line}: {target}" for line, target in imports(tree) if target.partition(".")[0] in FORBIDDEN_IMPORTS]
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if dotted(node.func) in ("eval", "exec", "builtins.eval", "builtins.exec"):
            out.append(f"{node.lineno}: {dotted(node.func)}()")
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                out.append(f"{node.lineno}: allow_pickle")
    return out


def test_loading_executes_nothing():
    found = [
        f"{path.relative_to(ROOT)}:{what}" for path in python_files("lm", "tools") for what in executes(parse(path))
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("eval('1')", 1),
        ("exec(text)", 1),
        ("np.load(f, allow_pickle=True)", 1),
        ("np.load(f, allow_pickle=False)", 0),
        ("model.eval()\nre.compile('x')", 0),
    ],
)
def test_what_executes_is_seen(source, count):
    assert len(executes(ast.parse(source))) == count
