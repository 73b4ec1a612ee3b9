import base64
import dataclasses
import functools
import html
import json
import math
import re

import jax
import numpy as np
import pytest

from lm import config, param_paths
from lm.config import MonitorConfig, OptimConfig
from lm.config.schema import Duration
from lm.evaluation import metrics
from lm.optim import trainable
from lm.tasks import TASKS, build_config, default_config
from lm.tracking import curves, files, plots, report, tracker
from tests import toys


def config_of(task="causal_lm", **sections):
    """The config of a run, as one that was saved is read."""
    kind = {"tagging": "encoder", "classification": "encoder"}.get(task, "decoder")
    options = {"labels": ("O", "B-x")} if kind == "encoder" else {}
    built = default_config(task)
    built.task.update(options)
    built.model.kind, built.data.packing, built.train.total_steps = kind, TASKS[task].packing[0], 20
    return dataclasses.replace(build_config(built), **sections)


@pytest.fixture
def run(tmp_path):
    workdir = tmp_path / "a<b"
    with tracker.Tracker(workdir, 20, 0, True, MonitorConfig()) as m:
        for step in (0, 10, 20):
            m.log(step, "eval", {"loss": 3.0 - step / 10, "perplexity": 20.0, "bits_per_byte": 1.25})
            m.text(step, "greedy", f"sample {step} <script>alert(1)</script>")
        for step in (10, 20):
            m.log(step, "train", {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5.0})
    (workdir / "config.json").write_text(config.to_json(config_of()))
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
    assert page.count("<svg") == 6 and page.count('id="axes_') == 6  # one for each metric
    assert "<b>1,234,567</b><span>parameters</span>" in page
    assert "step <b>75.0%</b> 3.0 s" in page and 'style="width:75.000%' in page
    assert "<td>best.step<td>20" in page and "<td>data.seq_len<td>256" in page
    assert page.index("sample 20") < page.index("sample 10") < page.index("sample 0")  # the latest first
    assert f"<td>jax<td>&quot;{jax.__version__}&quot;" in page
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


def test_report_reads_well_on_a_phone_and_on_paper(run):
    page = report.write_report(run).read_text()
    assert "<meta name=viewport content='width=device-width,initial-scale=1'>" in page
    assert "@media print" in page and "details::details-content{content-visibility:visible" in page


def stages(page):
    """Title of each tile of a metric -> (value, stage) of its columns."""
    tiles = re.findall(r"<div class='tile metric[^>]*><h3>([^<]*).*?</h3><div class=stages>(.*?)</div></div>", page)
    return {title.strip(): re.findall(r"<b>([^<]*)</b><span>([^<]*)", columns) for title, columns in tiles}


def test_tiles_begin_with_the_metric_that_chooses_checkpoints_before_training_at_its_best_and_at_the_end(tmp_path):
    with tracker.Tracker(tmp_path, 20, 0, True, MonitorConfig()) as m:
        for step, f1 in ((0, 0.1), (10, 0.7), (20, 0.5)):
            m.log(step, "eval", {"loss": 3.0 - step / 10, "nll": 3.0 - step / 10, "entity_f1": f1})
    cfg = config_of("tagging", checkpoint=config.CheckpointConfig(best_metric="entity_f1"))
    (tmp_path / "config.json").write_text(config.to_json(cfg))
    expected = {
        "Entity F1": [("0.1", "before, step 0"), ("0.7", "best, step 10"), ("0.5", "last, step 20")],
        "Loss": [("3", "before, step 0"), ("2", "best, step 10"), ("1", "last, step 20")],
    }
    found = stages(report.write_report(tmp_path).read_text())  # while it runs, from the rows
    assert found == expected and list(found) == list(expected)
    rows = files.first_and_best(files.read_rows(tmp_path / "metrics.jsonl"), "entity_f1")
    report.write_summary(tmp_path, {"loss": 1.0, **rows})
    assert stages(report.write_report(tmp_path).read_text()) == expected


def panels(drawn, cfg=None, hidden=()):
    """Title -> axes of the panels of a run."""
    about = functools.partial(metrics.about, loss_unit=report.loss_unit(cfg))
    given = report.panels_of(drawn, report.metric_order(drawn, cfg, hidden), about)
    return {figure.axes[0].get_title(loc="left"): figure.axes[0] for figure in plots.draw_panels(given)}


def gathered(**values):
    """Curves of an evaluation every 10 steps, and of training."""
    rows = [
        {"step": 10 * i, "split": split, "seconds": 1.0, **{name: column[i] for name, column in values.items()}}
        for i in range(len(next(iter(values.values()))))
        for split in ("train", "eval")
    ]
    return curves.gather(rows)


def test_a_metric_that_repeats_another_has_no_panel_and_one_that_differs_anywhere_has():
    same = gathered(loss=[3.0, 2.0], nll=[3.0, 2.0])
    assert report.second_names(same, "loss") == {"nll"} and report.second_names(same, "nll") == {"loss"}
    assert report.second_names(gathered(loss=[3.0, 2.0], nll=[3.0, 1.9]), "loss") == set()
    one_device = gathered(tokens_per_second=[5.0, 6.0], tokens_per_second_a_device=[5.0, 6.0])
    assert report.second_names(one_device, "loss") == {"tokens_per_second_a_device"}
    equal_by_chance = gathered(f1=[0.0, 0.0], matthews=[0.0, 0.0])
    assert report.second_names(equal_by_chance, "f1") == set()


def test_panels_begin_with_the_scores_of_the_task_and_leave_out_what_says_nothing():
    cfg = config.Config(task=toys.task("next_item"), checkpoint=config.CheckpointConfig(best_metric="ndcg_at_10"))
    names = ("weight", "input_bound", "loss", "grad_norm", "ndcg_at_10", "hr_at_10", "popularity_hr_at_10")
    found = panels(gathered(**{name: [1.0, 2.0, 3.0] for name in names}), cfg)
    assert list(found) == ["NDCG at 10", "Hit rate at 10", "Loss", "Gradient norm"]
    lines = {line.get_label(): line.get_linestyle() for line in found["Hit rate at 10"].lines}
    assert lines == {"train 3": "-", "eval 3": "-", "most popular 3": "--"}


def test_a_metric_with_any_name_is_shown_as_it_is(tmp_path):
    with tracker.Tracker(tmp_path, 5, 0, True, MonitorConfig()) as m:
        m.log(5, "eval", {"a<script>$x$_loss": 3.0})
    page = report.write_report(tmp_path).read_text()
    assert "<script" not in page and "<h3>a&lt;script&gt;$x$: Loss" in page
    assert ">a&lt;script&gt;$x$: Loss</text>" in page


def test_all_panels_have_the_same_steps_and_show_the_warmup():
    drawn = curves.gather(
        {"step": step, "split": split, "seconds": 1.0, name: 1.0}
        for split, name, steps in (("train", "loss", (10, 20)), ("eval", "f1", (0, 50)))
        for step in steps
    )
    given = report.panels_of(drawn, ["loss", "f1"])
    axes = [figure.axes[0] for figure in plots.draw_panels(given, warmup=7)]
    assert [panel.get_xlim() for panel in axes] == [(-1, 51), (-1, 51)]
    for panel in axes:
        (shaded,) = [patch for patch in panel.patches if patch.get_gid() == "warmup"]
        assert shaded.get_extents().transformed(panel.transData.inverted()).x1 == pytest.approx(7)


@pytest.mark.parametrize(
    ("warmup", "steps", "remark"),
    [
        (Duration(steps=7), 7, "shaded: the warm-up, of 7 steps"),
        (Duration(tokens=5 * 256 * 32), 5, "shaded: the warm-up, of 5 steps"),
        (Duration(epochs=0.5), 0, "not shaded: the warm-up, of 0.5 epochs"),
        (Duration(), 0, ""),
    ],
)
def test_the_warmup_is_shaded_where_the_config_tells_its_steps(warmup, steps, remark):
    data = config.DataConfig(seq_len=256, batch_size=32)
    assert report.warmup(config.Config(optim=config.OptimConfig(warmup=warmup), data=data)) == (steps, remark)


def test_a_start_that_flattens_all_the_rest_is_cut_off_and_its_value_is_told():
    def limits(values):
        drawn = curves.gather({"step": i, "split": "eval", "seconds": 1.0, "loss": x} for i, x in enumerate(values))
        panel = panels(drawn)["Loss"]
        return panel.get_ylim(), [text.get_text() for text in panel.texts if "starts" in text.get_text()]

    (low, high), remark = limits([60.0, *6 * [2.2], 2.1, 2.0])
    assert 1.9 < low < 2.0 and 2.2 < high < 2.4 and remark == ["↑ starts at 60"]
    (low, high), remark = limits([0.01, *6 * [2.0], 2.1, 2.2])
    assert low > 1.9 and remark == ["↓ starts at 0.01"]
    (low, high), remark = limits([60.0, 2.2, 2.1, 2.0])  # of so few points the start is much of what there is to see
    assert low < 2.0 and high > 60 and not remark
    (low, high), remark = limits([3.0, 2.0, 1.0])
    assert high > 3 and not remark
    (low, high), remark = limits([60.0, 2.0, 2.0, 2.0])  # all the rest is the same: there is no scale for it
    assert high > 60 and not remark


def test_config_is_shown_as_its_differences_from_the_defaults_of_the_task_folded(run):
    cfg = config_of("classification", seed=7)
    (run / "config.json").write_text(config.to_json(cfg))
    page = report.write_report(run).read_text()
    part = page.partition("<summary>Config: ")[2].partition("</details>")[0]
    assert "keys differ from the defaults of classification" in part
    assert "<td>seed<td>7<td><i>0</i>" in part and "data.seq_len" not in part
    assert page.count("<details class=part><summary>") == 4 and "<details class=part open" not in page


def test_a_config_that_cannot_be_read_is_told_and_shown_as_it_is(run):
    (run / "config.json").write_text('{"model": {"wings": 2}}')
    page = report.write_report(run).read_text()
    assert "config.json cannot be read: unknown config key" in page and "<td>model.wings<td>2" in page


def test_numbers_beyond_floats_in_files_without_checksum_are_no_traceback(run):
    (run / "summary.json").write_text(json.dumps({"steps": 10**400, "goodput": {"step": 10**400, "eval": 1.0}}))
    saved = json.loads((run / "config.json").read_text())
    saved["optim"]["learning_rate"] = 10**400
    (run / "config.json").write_text(json.dumps(saved))
    page = report.write_report(run).read_text()
    assert "'optim.learning_rate' must be float, got int" in html.unescape(page) and "eval <b>100.0%</b>" in page


def test_data_counts_and_commit_are_shown(run):
    report.write_summary(run, {"records": {"train": {"documents": 41}}, "tokens": 5})
    git = {"commit": "c0ffee", "dirty": True}
    files.write_document(run / "environment.json", {"host": "<h>", "git": git, "packages": {"numpy": "1"}})
    cfg = config_of(data=config.DataConfig(path="books<x>.txt"))
    (run / "config.json").write_text(config.to_json(cfg))
    page = report.write_report(run).read_text()
    for cell in (
        "<td>data.path<td>&quot;books&lt;x&gt;.txt&quot;",
        "<td>records.train.documents<td>41",
        "<td>git.commit<td>&quot;c0ffee&quot;",
        "<td>host<td>&quot;&lt;h&gt;&quot;",
    ):
        assert cell in page, cell
    assert "numpy" not in page


def write_scores(folder, **changes):
    """What tools/evaluate.py writes."""
    table = {"labels": ["a<b", "c"], "confusion": [[3, 1], [0, 2]]}
    content = {
        "run": "runs/x@3",
        "data": "new<.tsv",
        "records": 6,
        "interval": "95% bootstrap",
        "metrics": {"accuracy": {"value": 0.8333, "unit": "", "interval": [0.5, 1.0]}},
        "tables": {"": table},
        "worst": [{"loss": 2.5, "source": "new.tsv:3", "record": {"text": "<script>bad"}, "prediction": "c"}],
    }
    place = folder / "evaluations" / "new@3"
    place.mkdir(parents=True)
    (place / "scores.json").write_text(json.dumps(content | changes))
    return place / "scores.json"


def test_scores_of_a_test_set_are_shown_with_its_confusion_matrix_and_worst_errors(run):
    write_scores(run)
    page = report.write_report(run).read_text()
    assert "<td>accuracy<td>0.8333 <i></i><td>0.5 to 1" in page
    cells = re.findall(r"<tr><th>([^<]*)((?:<td style=[^>]*>[\d,]+)+)", page)
    assert [(label, re.findall(r">(\d+)", row)) for label, row in cells] == [("a&lt;b", ["3", "1"]), ("c", ["0", "2"])]
    assert "&lt;script&gt;bad" in page and "<script" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [1]},
        {"tables": {"": {"labels": ["a"], "confusion": [[1, 2], [3]]}}},
        {"tables": {"": {"labels": ["a"], "confusion": [["<script>"]]}}},
        {"worst": {"a": 1}},
        {"records": "<script>"},
        {"run": None},
        {"metrics": {"accuracy": {"value": {"a": object}, "unit": 3}}},
    ],
)
def test_damaged_scores_are_one_line_of_the_page(run, changes):
    """The rest of it is there: a run that is done does not fail because of them."""
    changes = json.loads(json.dumps(changes, default=str))
    path = write_scores(run, **changes)
    page = report.write_report(run).read_text()
    assert (
        f"<p class=none>{html.escape(str(path))} is damaged" in page
        and "<script>" not in page
        and "<h2>Curves</h2>" in page
    )


@pytest.mark.parametrize("name", ["environment.json", "trial.json"])
def test_a_damaged_file_about_the_start_is_one_line_of_the_page(name, run):
    (run / name).write_text("{")
    page = report.write_report(run).read_text()
    assert f"<p class=none>{html.escape(str(run / name))} is damaged" in page and "<h2>Curves</h2>" in page


def test_the_confusion_matrix_of_the_last_validation_is_shown(run):
    tables = {"": {"labels": ["a<b", "c"], "confusion": [[3, 1], [0, 2]]}}
    report.write_summary(run, {"steps": 20, "confusion": {"step": 20, "tables": tables}})
    page = report.write_report(run).read_text()
    assert "Classes at the validation of step 20" in page and "<tr><th>a&lt;b<td" in page
    assert "<td>confusion" not in page  # not among the figures again
    tables[""]["labels"].append("d")
    report.write_summary(run, {"confusion": {"step": 20, "tables": tables}})
    with pytest.raises(files.RunFileError, match=r"summary.json is damaged: 'confusion'"):
        report.write_report(run)


def test_a_picture_of_reconstructions_in_the_folder_is_in_the_page(run):
    picture = b"\x89PNG\r\n\x1a\n123"
    (run / "reconstructions.png").write_bytes(picture)
    assert f"base64,{base64.b64encode(picture).decode()}'" in report.write_report(run).read_text()
    (run / "reconstructions.png").write_bytes(b"<script>")
    page = report.write_report(run).read_text()
    assert "reconstructions.png is damaged: expected a PNG" in page and "<script>" not in page


def test_samples_are_a_prompt_and_its_continuation_with_control_characters_escaped(tmp_path):
    with tracker.Tracker(tmp_path, 20, 0, True, MonitorConfig()) as m:
        m.text(5, "Once <b>", "upon\x1b[2J a time")
    page = report.write_report(tmp_path).read_text()
    assert "<pre class=prompt>Once &lt;b&gt;</pre><pre>upon\\x1b[2J a time</pre>" in page


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
    found = panels(drawn, config.Config())
    assert list(found) == [
        "Loss", "Bits per byte", "Perplexity", "Learning rate", "Gradient norm", "Tokens per second",
    ]  # fmt: skip
    points = {line.get_label(): line.get_xydata().tolist() for line in found["Loss"].lines}
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
    monkeypatch.setattr(report, "_curves", lambda *args: "")
    with tracker.Tracker(tmp_path, 5, 0, True, MonitorConfig()) as m:
        m.log(5, "eval", {"loss": 3.0, "web_loss": 2.0})
    cfg = config.Config(task=toys.task(task), train=config.TrainConfig(total=Duration(steps=5)))
    (tmp_path / "config.json").write_text(config.to_json(cfg))
    report.write_summary(tmp_path, {"loss": 3.0, "before": {"loss": 4.0}})
    page = report.write_report(tmp_path).read_text()
    assert f"<h3>Loss <i>{unit}</i></h3>" in page and ("3", "last, step 5") in stages(page)["Loss"]
    assert f"<td>loss<td>3 <i>{unit}</i>" in page and f"<td>before.loss<td>4 <i>{unit}</i>" in page
    assert unit.startswith("nats per token") or "nats per token" not in page
    drawn = curves.gather(files.read_rows(tmp_path / "metrics.jsonl"))
    units = {
        title: [text.get_text() for text in panel.texts if text.get_gid() == "unit"]
        for title, panel in panels(drawn, cfg).items()
    }
    assert units == {"Loss": [unit], "web: Loss": [unit]}
