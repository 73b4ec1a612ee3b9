"""Every recipe gives its command and can be built; made small, it computes on eight devices what it does on one."""

import dataclasses
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lm import config, input_pipeline, predict
from lm import run as run_lib
from lm.benchmark import training as training_benchmark
from lm.checkpoint import init_from
from lm.config import MeshConfig
from lm.config.schema import ConfigError
from lm.corpus import pipeline as prepare
from lm.data import tokenizer
from lm.decoding import sampling
from lm.evaluation import evaluate, metrics
from lm.parallel.mesh import make_mesh
from lm.planner import topology, train_compile
from lm.tasks import build_config, default_config, task_of
from tests import tool_modules, toys

ROOT = Path(__file__).resolve().parents[1]
inspect_batch, make_interactions, mix_tasks, show_reconstructions, translate = map(
    tool_modules.load, ("inspect_batch", "make_interactions", "mix_tasks", "show_reconstructions", "translate")
)
ALL = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "configs").rglob("*.py")
    if path.stem not in ("common", "__init__")
)
RECIPES = [recipe for recipe in ALL if "." not in recipe]  # those that are to be run, not only compiled
COMPUTED = [recipe for recipe in RECIPES if recipe != "quickstart_chat"]  # which is chat_lora on other data
STEPS = 2


def test_there_are_recipes():
    assert {"quickstart_pretrain", "quickstart_sft", "tinystories", "gsm8k_sft"} <= set(RECIPES)
    assert "bench.v5e16_7b" in ALL


@pytest.mark.parametrize("recipe", ALL)
def test_every_recipe_builds(recipe):
    module = importlib.import_module(f"configs.{recipe}")
    assert re.search("lm.main .*--config=configs/", module.__doc__ or ""), "a recipe's docstring gives its command"
    assert isinstance(build_config(module.get_config()), config.Config)


@pytest.fixture
def world(small_world, monkeypatch):
    """Where recipes find their data by the paths that they have; what tools write of it, and a tokenizer, are there."""
    monkeypatch.chdir(small_world)
    monkeypatch.delenv("LM_SHARED_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", "../tensorflow_datasets")
    # Each by itself: the world is the session's, and the pages of the docs make the first two in it as well.
    if not Path("runs/interactions.csv").exists():
        make_interactions.write(Path("runs/interactions.csv"), make_interactions.make(users=48, items=60, seed=0))
    if not Path("runs/glue_mix_data").exists():
        mix_tasks.mix(Path("runs/glue_mix_data"), ["sst2", "cola", "rte", "stsb"])
    if not Path("small.model").exists():
        tokenizer.train([Path("../shared/data/tinystories/sample.txt").read_text()], 400, 50_000).save("small.model")
    return small_world


def small(recipe: str) -> config.Config:
    """The recipe from scratch, with dropout. All have one optimizer and one tokenizer, so that those that compute the
    same are compiled once."""
    c = importlib.import_module(f"configs.{recipe}").get_config()
    toys.shrink(c)
    c.init_from, c.data.replay = "", 0.0
    c.tokenizer.path = "" if c.data.format == "interactions" else "small.model"
    c.init_rules = default_config().init_rules
    c.model.dropout = 0.1
    c.optim.learning_rate, c.optim.schedule = 1e-2, "constant"
    c.optim.warmup_steps = c.optim.decay_steps = 0
    c.optim.b2, c.optim.weight_decay = 0.95, 0.1
    # Adam divides by the gradient's size: where that is rounding noise its direction is too. eps keeps it out.
    c.optim.eps = 1e-3
    return build_config(c)


def figures(
    cfg: config.Config, workdir: Path, mesh_cfg: MeshConfig, params: Any = None
) -> tuple[dict[str, float], Any]:
    """All metrics of an evaluation, then loss, weight and gradient norm of each step; and the parameters at the start,
    which are `params` where they are given."""
    planned = run_lib.plan(cfg, None)
    mesh = make_mesh(mesh_cfg, jax.devices()[: 8 if params else 1])
    run = run_lib.prepare(planned, mesh, lambda _: None)
    with jax.set_mesh(mesh):
        if params is None:
            params, _ = init_from.initialize(run.program.model, run.program.abstract_state.params, cfg.seed, None, {})
            params = jax.device_get(params)
        placed = jax.device_put(params, run.program.state_shardings.params)
        row_ids, batches = run_lib.eval_rows(run, run.data.valid)
        place = run_lib.placer(mesh, cfg.data.batch_size)
        eval_step = run.program.eval_step
        if task_of(cfg).needs_start:  # against itself every reward is rounding noise around 0
            eval_step = functools.partial(eval_step, start=jax.tree.map(lambda x: 0.9 * x, placed))
        sums, outputs = evaluate.evaluate(eval_step, placed, place, batches, len(row_ids))
        found = metrics.finalize(sums, task_of(cfg).has_perplexity)
        if scores := task_of(run.cfg).scores:
            found |= scores(outputs, [run.data.valid.meta[i] for i in row_ids], run.cfg)
        state = jax.jit(run.program.init_state, out_shardings=run.program.state_shardings)(placed)
        batches = run_lib.train_batches(run)
        for step in range(STEPS):
            state, made = run.program.train_step(state, place(next(batches)))
            found |= {f"{name} of step {step}": float(made[name]) for name in ("loss", "grad_norm", "weight")}
        batches.close()
    return found, params


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMPUTED)
def test_a_recipe_computes_on_the_mesh_2x2x2_what_it_does_on_one_device(recipe, world, tmp_path):
    cfg = small(recipe)
    one, params = figures(cfg, tmp_path / "one", MeshConfig(data=1))
    many, _ = figures(cfg, tmp_path / "many", MeshConfig(data=2, fsdp=2, tensor=2), params)
    assert one["grad_norm of step 0"] > 0
    assert one["loss of step 0"] != one["loss of step 1"]
    assert many == pytest.approx(one, rel=2e-5)


# What a run of a recipe is for: tool -> the recipes whose runs it takes. The others are refused, in one line.
TAKES = {
    "chat": {
        *(
            "chat_lora",
            "continue_pubmedqa",
            "gpt2_tinystories",
            "dpo_instructions",
            "gsm8k_sft",
            "multi30k_translation",
            "quickstart_chat",
            "quickstart_pretrain",
            "quickstart_sft",
        ),
        *("reviews_clm", "t5_tinystories", "tinystories", "wikipedia_clm"),
    },
    "translate": {"multi30k_translation"},
    "show_reconstructions": {"mae_cifar10"},
}
WITH_LORA = {"chat_lora", "quickstart_chat"}  # whose runs tools/merge_adapters.py takes
CHECKS = {"chat": sampling.check_kind, "translate": translate.check, "show_reconstructions": show_reconstructions.check}


@pytest.mark.parametrize("tool", TAKES)
def test_a_tool_says_which_runs_it_is_for(tool):
    assert TAKES[tool] < set(RECIPES)
    for recipe in RECIPES:
        cfg = build_config(importlib.import_module(f"configs.{recipe}").get_config())
        if recipe in TAKES[tool]:
            CHECKS[tool](cfg)
            continue
        with pytest.raises(ConfigError, match=cfg.task.name) as error:
            CHECKS[tool](cfg)
        assert "\n" not in str(error.value)


def started(cfg: config.Config) -> tuple[Any, ...]:
    """What `run_lib.load_model` gives of a run, of one that has learnt nothing."""
    planned, model, params = run_lib.init_model(cfg)
    words = planned.tokenizer or run_lib.tokenizer_for(planned, input_pipeline.load(cfg.data, task_of(cfg).wanted(cfg)))
    return planned.cfg, model, params, words


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMPUTED)
def test_every_tool_takes_a_recipe_or_refuses_it_in_one_line(recipe, world, tmp_path, monkeypatch, capsys):
    cfg = small(recipe)
    words, data = inspect_batch.load(cfg)
    for split in ("train", "valid"):
        rows = list(inspect_batch.read(inspect_batch.batch_from(cfg, data, split, example=0, rows=2), words, cfg))
        assert len(rows) == 2
        inspect_batch.print_rows(rows, "")
        assert "example 0: " in capsys.readouterr().out
        inspect_batch.to_html(rows, "")

    toys.use_one_device(monkeypatch)
    monkeypatch.setattr(training_benchmark, "matmul_flops", lambda product: 1e12)  # takes seconds
    training_benchmark.show(training_benchmark.measure(cfg, rounds=1, seconds=0.0))
    monkeypatch.setattr(train_compile, "devices", lambda _: jax.devices()[:1])
    whole = dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, path=""))
    assert train_compile.lower_step(whole, topology.parse("v5e:1x1", 1)).tokens > 0

    of_text = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_records=0))
    try:
        prepare.plan(of_text, tmp_path / "prepared")
    except ConfigError as refused:
        assert re.fullmatch(r"'(task\.name|data\.format)' is [^\n]+; data is prepared (for|from) [^\n]+", str(refused))

    run = started(cfg)
    monkeypatch.setattr(run_lib, "load_model", lambda name: run)
    saved = SimpleNamespace(step=0, info={"arrays": {}}, metrics={}, path=Path("run/checkpoints/0"))
    monkeypatch.setattr(predict, "_start", lambda *_: None)
    monkeypatch.setattr(run_lib, "load_checkpoint", lambda name: (saved, run))
    out, sides = tmp_path / "out.png", "../shared/data/multi30k/test_2016_flickr.{en,de}.gz"
    for tool, *arguments in (
        ("chat", "--workdir=run", "--prompt=so", "--max_new_tokens=2"),
        ("translate", "run", f"--path={sides}", "--limit=2", "--max_new_tokens=2", "--beams=2", f"--out={out}"),
        ("show_reconstructions", "run", str(out), "--rows=2"),
        ("merge_adapters", "merge", "run", str(out)),
    ):
        if recipe in TAKES.get(tool, WITH_LORA):
            tool_modules.call(tool, *arguments)
            continue
        with pytest.raises(SystemExit) as error:
            tool_modules.call(tool, *arguments)
        assert re.fullmatch(r"error: [^\n]+", error.value.code)
