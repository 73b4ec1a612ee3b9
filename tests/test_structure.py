"""The shape of the project: who may import whom, how long things may get, and what nothing may do."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm import config as config_lib
from lm.schema import keys as keys_of

ROOT = Path(__file__).resolve().parents[1]

# A module may import the modules before it, none behind it. The numbers are the floors of the house; a new module gets
# its place here. A package's __init__.py imports nothing of lm, so that it needs none.
MODULES = (
    # 0: types and trees
    "lm.types",
    "lm.schema",
    "lm.config",
    "lm.trees",
    "lm.flags",
    # 1: arrays, optimizer, data
    "lm.metrics",
    "lm.chips",
    "lm.sharding",
    "lm.rings",
    "lm.losses",
    "lm.contrast",
    "lm.ranks",
    "lm.entity_tags",
    "lm.scores",
    "lm.selection",
    "lm.optim",
    "lm.mup",
    "lm.hlo",
    "lm.traffic",
    "lm.data.tokenizer",
    "lm.data.fields",
    "lm.data.records",
    "lm.data.tables",
    "lm.data.interactions",
    "lm.data.prose",
    "lm.data.builtin",
    "lm.data.files",
    "lm.data.image_files",
    "lm.data.columnar",
    "lm.data.array_records",
    "lm.data.tfds_sets",
    "lm.data.holdout",
    "lm.data.labels",
    "lm.data.sources",
    "lm.data.examples",
    "lm.data.chats",
    "lm.data.labelled",
    "lm.data.mixtures",
    "lm.data.prompts",
    "lm.data.tagging",
    "lm.data.span_qa",
    "lm.data.items",
    "lm.data.corrupt",
    "lm.data.images",
    "lm.data.seq2seq",
    "lm.data.sentence_views",
    "lm.data.masked_pairs",
    "lm.data.augment",
    "lm.data.tasks",
    "lm.data.packing",
    "lm.data.shards",
    "lm.data.spool",
    "lm.data.ngrams",
    "lm.data.filters",
    "lm.data.dedup",
    "lm.data.decontaminate",
    "lm.data.stages",
    "lm.data.gather",
    "lm.data.jobs",
    "lm.data.data_card",
    "lm.data.prepare",
    "lm.data.order",
    "lm.data.ahead",
    "lm.data.feed",
    "lm.data.pipeline",
    # 2: models, checkpoints
    "lm.models.initialisers",
    "lm.models.layers",
    "lm.models.adapters",
    "lm.models.attention",
    "lm.models.heads",
    "lm.models.experts",
    "lm.models.blocks",
    "lm.models.transformer",
    "lm.models.encoder_decoder",
    "lm.models.vision",
    "lm.models.families",
    "lm.checkpoint",
    # 3: what is learnt, from what, and what is written about it
    "lm.scoring",
    "lm.objectives",
    "lm.transfer",
    "lm.replay",
    "lm.monitor",
    "lm.interrupt",
    "lm.report",
    # 4: one step
    "lm.step",
    # 5: loops over steps; config becomes objects
    "lm.evaluate",
    "lm.generate",
    "lm.beam",
    "lm.program",
    "lm.checks",
    "lm.resume",
    "lm.build",
    "lm.aot",
    "lm.settings",
    "lm.search",
    # 6 and 7: the run and its flags
    "lm.train",
    "lm.main",
)
PACKAGES = ("lm", "lm.data", "lm.models")
OUTSIDE = ("configs", "experiments", "tools", "tests")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    assert path.exists(), f"{path.relative_to(ROOT)} is missing"
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """lm/data/packing.py -> lm.data.packing; lm/data/__init__.py -> lm.data"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too. `from lm import trees` imports lm.trees."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in (*MODULES, *PACKAGES) or base in PACKAGES else base


def dotted(node: ast.expr) -> str:
    """The source of a chain of names, 'cfg.optim.name'; '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


# --- floors ------------------------------------------------------------------------------------------------------


def floor_breaches(name: str, tree: ast.Module, *, is_package: bool) -> list[str]:
    """What the module `name` imports and may not, one sentence each."""
    if not is_package and name not in MODULES:
        return [f"{name} has no place in MODULES of tests/test_structure.py: give it one"]
    allowed = () if is_package else MODULES[: MODULES.index(name)]
    out = []
    for line, target in imports(tree, name if is_package else name.rpartition(".")[0]):
        top = target.partition(".")[0]
        if top in OUTSIDE:
            out.append(f"{name}:{line} imports {target}: nothing in lm imports {top}")
        elif top == "lm" and target != "lm" and target not in allowed:
            out.append(f"{name}:{line} imports {target}, which does not stand before it in MODULES")
    return out


def test_modules_import_lower_floors_only():
    files = python_files("lm")
    breaches = [
        breach
        for path in files
        for breach in floor_breaches(module_name(path), parse(path), is_package=path.name == "__init__.py")
    ]
    assert not breaches, "\n".join(breaches)


def test_every_place_in_the_list_is_taken():
    names = {module_name(path) for path in python_files("lm") if path.name != "__init__.py"}
    assert [name for name in MODULES if name not in names] == [], "in MODULES, but no such file"


@pytest.mark.parametrize(
    ("name", "source", "breach"),
    [
        ("lm.trees", "from lm.config import ConfigError", None),
        ("lm.trees", "import lm\nimport jax", None),
        ("lm.config", "from lm import trees", "lm.config:1 imports lm.trees"),
        ("lm.config", "from lm.trees import flatten as f", "lm.config:1 imports lm.trees"),
        ("lm.config", "def f():\n    import lm.train", "lm.config:2 imports lm.train"),
        ("lm.data.sources", "from .packing import pack", "lm.data.sources:1 imports lm.data.packing"),
        ("lm.data.sources", "from .. import train", "lm.data.sources:1 imports lm.train"),
        ("lm.data.sources", "from lm import data", "lm.data.sources:1 imports lm.data,"),
        ("lm.train", "from configs import common", "lm.train:1 imports configs: nothing in lm"),
        ("lm.train", "import tools.chat", "lm.train:1 imports tools.chat: nothing in lm"),
        ("lm.utils", "", "lm.utils has no place in MODULES"),
    ],
)
def test_a_breach_is_seen(name, source, breach):
    found = floor_breaches(name, ast.parse(source), is_package=False)
    assert len(found) == (breach is not None)
    assert breach is None or found[0].startswith(breach)


# --- keys -------------------------------------------------------------------------------------------------------


def config_reads() -> set[tuple[str, str]]:
    """(name it is read from, attribute) of every attribute read in lm/ outside config.py."""
    return {
        (dotted(node.value).rpartition(".")[2].lstrip("_"), node.attr)
        for path in python_files("lm")
        if path != ROOT / "lm" / "config.py"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_config_key_is_read():
    reads = config_reads()
    dead = []
    for key in keys_of(config_lib.Config):
        section, _, name = key.rpartition(".")
        if not reads & {(owner, name) for owner in (section, "cfg", "config", f"{section}_cfg")}:
            dead.append(key)
    assert not dead, f"keys that nothing in lm/ reads (as cfg.{{section}}.{{key}} or cfg.{{key}}): {dead}"


def test_defaults_live_in_config_only():
    """No cfg.get(key, default) and no getattr(cfg, key, default) outside config.py."""
    sections = {key.rpartition(".")[0] for key in keys_of(config_lib.Config)} - {""}
    owners = {"cfg", "config", *sections}
    found = []
    for path in python_files("lm"):
        if path == ROOT / "lm" / "config.py":
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
    assert not found, f"the default of a config key belongs in lm/config.py: {found}"


# --- what nothing may do -----------------------------------------------------------------------------------------

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def executes(tree: ast.Module) -> list[str]:
    """What would run code out of a file."""
    out = [f"{line}: {target}" for line, target in imports(tree, "") if target.partition(".")[0] in FORBIDDEN_IMPORTS]
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


# --- the way of a batch ------------------------------------------------------------------------------------------


def calls(path: Path, *, inside: str | None = None) -> set[str]:
    """Dotted names called in a module, or in its functions of one name; also those handed to another call."""
    tree: ast.AST = parse(path)
    roots = [tree]
    if inside is not None:
        roots = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == inside]
    found = set()
    for node in (n for root in roots for n in ast.walk(root) if isinstance(n, ast.Call)):
        found |= {dotted(node.func), *map(dotted, node.args)}
    return found - {""}


def test_the_way_of_a_batch_is_five_hops():
    """train -> step.train_step -> objectives.X -> ModelFns.apply -> losses.X, each calling the next; no other way."""
    lm = ROOT / "lm"
    assert "train_step" in calls(lm / "train.py")
    assert "loss_fn" in calls(lm / "step.py", inside="train_step")
    assert "loss_fn" in calls(lm / "step.py", inside="eval_step"), "evaluation uses the same loss as training"
    names = {node.name for node in parse(lm / "objectives.py").body if isinstance(node, ast.FunctionDef)}
    for name, objective in importlib.import_module("lm.objectives").OBJECTIVES.items():
        called = calls(lm / "objectives.py", inside=objective.loss.__name__)
        for _ in names:  # also through functions that objectives share
            called = called.union(*(calls(lm / "objectives.py", inside=other) for other in called & names))
        assert "apply" in called, f"objective {name} does not call apply"
        assert any(target.startswith(("losses.", "contrast.")) for target in called), (
            f"objective {name} calls nothing of lm.losses"
        )


def test_there_is_no_other_way_of_a_batch():
    files = {path.relative_to(ROOT / "lm").as_posix(): path for path in python_files("lm")}

    def users(function: str) -> list[str]:
        return [name for name, path in files.items() if calls(path) & {function, function.partition(".")[2]}]

    modules = ["losses.py", "contrast.py"]
    losses = [
        node.name
        for name in modules
        for node in parse(files[name]).body
        if isinstance(node, ast.FunctionDef) and node.returns and dotted(node.returns) == "LossTerms"
    ]
    assert "token_cross_entropy" in losses
    for loss in losses:
        assert set(users(f"losses.{loss}")) <= {"objectives.py", *modules}, "only an objective computes a loss"
    # program binds the loss and the optimizer to the step, train runs it
    assert users("step.train_step") == ["program.py", "train.py"]
    assert set(users("step.eval_step")) <= {"program.py", "checks.py", "evaluate.py", "train.py"}
