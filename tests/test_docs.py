"""Every command in docs/tasks and docs/data.md, run in its order on a little data, gives what its page says."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from lm import config, predict, train
from lm.config import MeshConfig, schema
from lm.data import tokenizer
from lm.data.readers import fields
from lm.models import registry, transformer
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS, build_config, language_modelling
from lm.tracking import report
from tests import tool_modules, toys

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # how ml_collections reads recipes
PAGES = sorted((ROOT / "docs" / "tasks").glob("*.md"))


class Block(NamedTuple):
    """Commands that stand together, and the names that the page has behind 'Gives' (metrics) or 'Writes' (files)."""

    commands: list[list[str]]
    gives: list[str]
    writes: list[str]


def blocks(text: str) -> list[Block]:
    """The commands of a page. A 'Gives' or 'Writes' is that of the block right before it; its first sentence counts."""
    found: list[Block] = []
    is_next = False
    for paragraph in re.split(r"\n\n+", text.replace("\\\n", " ")):
        commands = [line for line in paragraph.splitlines() if re.match(r"    python (-m lm\.main|tools/)", line)]
        if commands:
            found.append(Block([shlex.split(line)[1:] for line in commands], [], []))
        elif is_next and (match := re.match(r"(Gives|Writes) ", paragraph)):
            names = re.findall(r"`([^`\s]+)`", re.split(r"\.\s", paragraph)[0])
            getattr(found[-1], match[1].lower()).extend(names)
            assert names, paragraph
        is_next = bool(commands)
    return found


@pytest.fixture(scope="module")
def ran():
    """Folder of a run -> the command that made it: pages share the runs that they start from."""
    return {}


@pytest.fixture
def run(small_world, ran, monkeypatch):
    """Runs a command in `small_world`; a run that is there is taken as it is, if the same command made it."""
    monkeypatch.chdir(small_world)
    monkeypatch.delenv("LM_SHARED_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", "../tensorflow_datasets")
    toys.use_one_device(monkeypatch)
    monkeypatch.setattr(report, "write_report", lambda folder: folder / "report.html")  # pictures take a second a run

    def call(arguments: list[str], made: set[str]) -> dict[str, float]:
        """The summary of a run; {} for a tool. `made` are the folders of runs that the page has made so far."""
        if arguments[0] != "-m":
            tool_modules.call(Path(arguments[0]).stem, *arguments[1:])
            return {}
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        whole = [arg.replace("--config=configs/", f"--config={ROOT}/configs/") for arg in arguments[1:]]
        monkeypatch.setattr(sys, "argv", whole)  # where config_flags looks for --config.a.b
        assert values(whole) == ["lm.main"], "arguments that are no flags"
        workdir, recipe = Path(values.workdir), values.config
        toys.shrink(recipe)
        cfg = build_config(recipe)
        started_from = {cfg.init_from, str(Path(cfg.tokenizer.path).parent) if cfg.tokenizer.path else ""} - {""}
        assert started_from <= made, "the page does not make the run that this one starts from"
        made.add(str(workdir))
        if workdir not in ran:
            train.train(cfg, workdir)
        assert ran.setdefault(workdir, arguments) == arguments, f"{workdir}: two commands for one folder"
        return json.loads((workdir / "summary.json").read_text())

    return call


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_give_what_it_says(page, run):
    found, made = blocks(page.read_text()), set()
    assert any(block.gives for block in found)
    for block in found:
        for command in block.commands:
            summary = run(command, made)
            missing = [name for name in block.gives if name not in summary]
            assert not missing, f"{shlex.join(command)} has {', '.join(sorted(summary))}"
        for name in block.writes:
            assert Path(name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_records_of_a_page_can_be_read(page):
    """The fields that a page shows are those of the record that is read: none is lost."""
    for line in re.findall(r"(?m)^    (\{.*\})$", page.read_text()):
        shown = json.loads(line)
        record = fields.normalise(shown, {})
        assert record.keys() in (shown.keys(), {"messages"}, {"prompt", "chosen", "rejected"})


def test_the_list_of_pages_is_whole():
    listed = re.findall(r"\]\(tasks/(\w+)\.md\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(listed) == [page.stem for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_a_page_names_keys_and_files_that_there_are(page):
    keys = {"eval.sets", *(key for key, _ in config.flatten(config.to_dict(config.Config())))}
    keys |= {key.rpartition(".")[0] for key in keys if key.count(".") > 1}
    keys |= {f"task.{key}" for task in TASKS.values() for key in schema.keys(task.options)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    text = page.read_text()
    for name in re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", text):
        if name.partition(".")[0] in sections and not name.endswith(".py"):
            assert name in keys, f"{name} is no key of the config"
    for name in re.findall(r"`((?:configs|tools|lm|tests)/[\w/]+\.py)(?::\w+)?`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / name).exists(), name


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    words = tokenizer.train(["once upon a time there was a cat. " * 20], 300, 100_000)
    cfg = config.Config(model=transformer.resolve(toys.GPT2, vocab_size=words.vocab_size, seq_len=128))
    model = registry.MODELS["decoder"](cfg, None, jax.numpy.float32)
    one_device = make_mesh(MeshConfig(), jax.devices()[:1])
    params = model.init(jax.random.key(0))
    loaded = predict.LoadedModel("runs/tinystories@8", "", cfg, cfg, model, params, None, words, 1, one_device)
    monkeypatch.setattr(predict, "load", lambda name: loaded)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_example_of_a_task_learns_the_second_half_alone():
    page = (ROOT / "docs" / "add_a_task.md").read_text()
    code = re.search(r"\n( +def second_half_loss.*?options=SecondHalfOptions\)\n)", page, flags=re.DOTALL)[1]
    names = dict(vars(language_modelling)) | {"dataclasses": dataclasses}
    exec(textwrap.dedent(code), names)
    task = names["SECOND_HALF"]
    cfg, model, params = toys.decoder(toys.GPT2, 12)
    batch, words = toys.batch(8, 12), SimpleNamespace(vocab_size=toys.VOCAB)
    terms = task.loss(model.apply, config.Config(model=cfg, task=task.options()), words)(params, batch, None)
    batch["loss_weights"][:, :6] = 0
    expected = toys.token_loss(model.apply, config.Config(model=cfg), words)(params, batch, None)
    assert terms.weight == batch["loss_weights"].sum() > 0
    assert terms.sum == pytest.approx(float(expected.sum), rel=1e-6)


@pytest.mark.slow
def test_the_commands_of_preparing_data_give_what_the_page_says(run, small_world):
    """docs/data.md: the tool with its own process and a small recipe, then a run on what it wrote."""
    found = [
        block for block in blocks((ROOT / "docs" / "data.md").read_text()) if "--config=..." not in block.commands[0]
    ]
    (prepare,), (train_on_it,) = (block.commands for block in found)
    small = small_world / "tinystories_small.py"
    small.write_text(
        "from configs import tinystories\nfrom tests import toys\n\n\ndef get_config():\n"
        "    c = tinystories.get_config()\n    toys.shrink(c)\n    c.data.max_records = 0\n    return c\n"
    )
    arguments = [str(ROOT / prepare[0]), *(arg.replace("configs/tinystories.py", str(small)) for arg in prepare[1:])]
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing = [name for name in found[0].writes if not Path(name).exists()]
    assert found[0].writes and not missing
    summary = run(train_on_it, set())
    assert found[1].gives and [name for name in found[1].gives if name not in summary] == []
