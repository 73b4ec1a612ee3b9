import functools
import json
import math

import jax
import numpy as np
import pytest

from lm import config, param_paths
from lm.config import MonitorConfig, OptimConfig
from lm.config.schema import Duration
from lm.optim import trainable
from lm.tasks import TASKS, base
from lm.tracking import curves, files, report, tracker
from tests import toys


@pytest.fixture
def run(tmp_path):
    workdir = tmp_path / "a<b"
    with tracker.Tracker(workdir, 20, 0, True, MonitorConfig()) as m:
        for step in (0, 10, 20):
            m.log(step, "eval", {"loss": 3.0 - step / 10, "perplexity": 20.0, "bits_per_byte": 1.25})
            m.text(step, "greedy", f"sample {step} <script>alert(1)</script>")
        for step in (10, 20):
            m.log(step, "train", {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5.0})
    (workdir / "config.json").write_text(config.to_json(config.Config()))
    goodput = {**dict.fromkeys(tracker.BUCKETS, 0.0), "step": 3.0, "other": 1.0}
    report.write_summary(workdir, {"parameters": 1234567, "goodput": goodput, "best": {"step": 20}})
    return workdir


def test_summary_is_json_with_versions_and_lists_values_that_were_not_finite(tmp_path):
    summary = {"loss": math.nan, "steps": 5, "best": {"loss": np.float32(np.inf), "step": np.int32(4)}, "none": None}
    report.write_summary(tmp_path, summary)
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    out = json.loads(text)
    del out["crc32"]
    assert out.pop("versions") == report.versions()
    expected = {"loss": None, "steps": 5, "best": {"loss": None, "step": 4}, "none": None}
    assert out == {**expected, "not_finite": ["loss", "best.loss"]}


def test_summary_is_replaced_atomically(tmp_path, monkeypatch):
    report.write_summary(tmp_path, {"steps": 1})
    with pytest.raises(TypeError):
        report.write_summary(tmp_path, {"steps": object()})
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_versions_list_the_packages_that_results_depend_on():
    versions = report.versions()
    assert list(versions) == ["python", "jax", "flax", "optax", "orbax", "grain", "lm"]
    assert versions["jax"] == jax.__version__


def test_parameter_table_shows_every_leaf_and_exact_totals():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, np.float32)  # noqa: E731
    params = {
        "embed": {"embedding": shape(1024, 256)},
        "decoder": {
            "layers": {
                "mlp": {
                    "up": {"kernel": shape(4, 256, 1024), "bias": shape(4, 1024)},
                    "down": {"kernel": shape(4, 1024, 256)},
                }
            },
            "final_norm": {"scale": shape(256)},
        },
    }
    cfg = OptimConfig(
        lr_rules=(
            (r".*/[23]/.*kernel", 0.5),
            (r".*/[01]/.*kernel", 0.0),
            (r".*/3/.*", 0.25),
            ("decoder/.*", 1.0),
            (".*", 0.0),
        ),
        decay_rules=((".*/3/.*kernel", True), (".*/down/.*", True), (".*/0/.*bias", True), (".*", False)),
        unfreeze_rules=((r".*/2/.*kernel", 0.5), (".*", 0.0)),
    )
    table = report.parameter_table(
        params,
        selection=trainable.resolve(cfg, params, total_steps=3000),
        learning_rate=1e-3,
        scales=dict.fromkeys(param_paths.flatten(params), 1.0) | {"decoder/final_norm/scale": 0.5},
        origin={
            path: "runs/a[b]@best" if path.startswith("decoder") else "scratch" for path in param_paths.flatten(params)
        },
    )
    lines = [" ".join(line.split()) for line in table.splitlines() if "─" not in line and line.strip()]
    assert lines == [
        "parameter shape dtype size trained decayed peak lr from",
        "decoder/final_norm/scale 256 float32 256 yes no 0.0005 runs/a[b]@best",
        "decoder/layers/mlp/down/kernel 4 x 1024 x 256 float32 1,048,576 layers 2-3 of 4 yes "
        "0.0005, all from step 1,500 runs/a[b]@best",
        "decoder/layers/mlp/up/bias 4 x 1024 float32 4,096 yes layer 0 of 4 0.00025 to 0.001 runs/a[b]@best",
        "decoder/layers/mlp/up/kernel 4 x 256 x 1024 float32 1,048,576 layers 2-3 of 4 layer 3 of 4 "
        "0.0005, all from step 1,500 runs/a[b]@best",
        "embed/embedding 1024 x 256 float32 262,144 frozen - - scratch",
        "total (9.0 MiB) 2,363,648",
        "trained 1,052,928",
        "frozen 1,310,720",
    ]
    assert "\n\n embed/embedding" in table  # groups are separated


def test_report_has_curves_figures_samples_and_config(run):
    page = report.write_report(run).read_text()
    assert page.count("<svg") == 1 and page.count('id="axes_') == 6  # a panel for each metric
    assert "<b>1,234,567</b><span>parameters</span>" in page
    assert "<b>1</b><span>eval loss</span>" in page  # the last evaluation: 3 - 20/10
    assert "step <b>75.0%</b> 3.0 s" in page and 'style="width:75.000%' in page
    assert "<td>best.step<td>20" in page and "<td>data.seq_len<td>256" in page
    assert page.index("sample 20") < page.index("sample 10") < page.index("sample 0")  # the latest first
    assert f"jax {jax.__version__}" in page
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


def test_report_is_self_contained_and_escapes_text(run):
    page = report.write_report(run).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<h1>a&lt;b</h1>" in page
    assert "src=" not in page and 'href="http' not in page and "url(http" not in page


def test_report_is_deterministic(run):
    first = report.write_report(run).read_bytes()
    assert report.write_report(run).read_bytes() == first


def test_curves_have_the_points_of_each_split(run):
    drawn = curves.gather(files.read_rows(run / "metrics.jsonl"))
    about = functools.partial(base.about, TASKS["causal_lm"], config.Config())
    panels = {panel.get_title(loc="left"): panel for panel in report.draw_curves(drawn, about).axes}
    assert list(panels) == [
        "Loss", "Bits per byte", "Learning rate", "Gradient norm", "Tokens per second", "Perplexity",
    ]  # fmt: skip
    points = {line.get_label(): line.get_xydata().tolist() for line in panels["Loss"].lines}
    assert points == {"train 2": [[10, 2], [20, 2]], "eval 1": [[0, 3], [10, 2], [20, 1]]}


def test_report_of_a_run_that_has_just_started(tmp_path):
    page = report.write_report(tmp_path).read_text()
    assert "not started" in page and "No rows in metrics.jsonl yet." in page and "no summary.json yet" in page
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "seconds": 2.0, "loss": 3.5}\n{"step": 2, "sp'
    )
    page = report.write_report(tmp_path).read_text()
    assert "1 steps in 2 s" in page and page.count('id="axes_') == 1


@pytest.mark.parametrize(
    ("task", "unit"),
    [
        ("causal_lm", "nats per token"),
        ("masked_autoencoding", "squared error per hidden patch"),
        ("classification", "nats per example"),
        ("tagging", "nats per word"),
        ("regression", "squared error per example"),
    ],
)
def test_the_report_gives_the_unit_of_the_loss(tmp_path, monkeypatch, task, unit):
    monkeypatch.setattr(report, "_curves", lambda drawn, about: "")  # they take a second
    with tracker.Tracker(tmp_path, 5, 0, True, MonitorConfig()) as m:
        m.log(5, "eval", {"loss": 3.0, "web_loss": 2.0})
    cfg = config.Config(task=toys.task(task), train=config.TrainConfig(total=Duration(steps=5)))
    (tmp_path / "config.json").write_text(config.to_json(cfg))
    report.write_summary(tmp_path, {"loss": 3.0, "before": {"loss": 4.0}})
    page = report.write_report(tmp_path).read_text()
    assert f"<b>3</b><span>eval loss</span><i>{unit}</i>" in page
    assert f"<td>loss<td>3 <i>{unit}</i>" in page and f"<td>before.loss<td>4 <i>{unit}</i>" in page
    assert unit.startswith("nats per token") or "nats per token" not in page
    about = functools.partial(base.about, TASKS[task], cfg)
    drawn = curves.gather(files.read_rows(tmp_path / "metrics.jsonl"))
    panels = report.draw_curves(drawn, about).axes
    assert [(panel.get_title(loc="left"), panel.get_ylabel()) for panel in panels] == [
        ("Loss", unit),
        ("web: Loss", unit),
    ]
