"""lm/registry/comparison.py: the curves of runs on one page."""

import json
import re
import time

import numpy as np
import pytest

from lm.config.schema import ConfigError
from lm.evaluation import flops, metrics
from lm.registry import comparison
from lm.tasks import task_config
from lm.tracking import curves, files, plots
from tests import tool_modules
from tests.registry_runs import config_of, write_run


def read(folder, axis="step"):
    return comparison.read(folder, axis, 1000)[0]


def lines_of(folder, axis):
    """(split, metric) -> points of the only line of its panel."""
    run = read(folder, axis)
    panels = comparison.panels_of([run], axis, (), ["#000000"])
    drawn = [figure.axes[0] for figure in plots.draw_panels(panels)]
    return {axes.get_title(loc="left"): axes.lines[0].get_xydata().tolist() for axes in drawn}


def test_curves_are_over_steps_tokens_flops_or_seconds(tmp_path):
    run = write_run(tmp_path / "run", losses=(3.0, 2.5, 2.0))
    cfg = config_of()
    tokens = cfg.data.batch_size * cfg.data.seq_len
    a_token = flops.train_flops_per_token(cfg.model, cfg.data.seq_len, cfg.model.vocab_size)
    for axis, scale in {"step": 1, "tokens": tokens, "flops": tokens * a_token, "seconds": 0.5}.items():
        lines = lines_of(run, axis)
        assert lines["eval: Loss"] == [[0, 3], [10 * scale, 2.5], [20 * scale, 2]]
        assert lines["train: Loss"] == [[10 * scale, 3], [20 * scale, 2.5]]


def test_the_page_needs_no_other_file_escapes_text_and_names_what_differs(tmp_path, capsys):
    one = write_run(tmp_path / "a<b", losses=(3.0, 2.0), optim__learning_rate=0.5)
    two = write_run(tmp_path / "two", losses=(3.0, 1.0), is_done=False)
    tool_modules.call("runs", "compare", one, two, f"--out={tmp_path / 'page.html'}")
    page = (tmp_path / "page.html").read_text()
    assert "src=" not in page and 'href="http' not in page and "url(http" not in page
    assert "a&lt;b" in page and "a<b" not in page
    header, *rows = re.findall(r"<tr.*?(?=<tr|</table>)", page.partition("<table>")[2])
    names = re.findall(r"<th>([^<]*)", header)
    assert "optim.learning_rate" in names and "seed" not in names
    cells = [dict(zip(names, re.findall(r"<td>(?:<i [^>]*></i>)?([^<]*)", row), strict=True)) for row in rows]
    assert cells[0]["optim.learning_rate"] == "0.5"
    assert [(cell["state"], cell["best.loss"]) for cell in cells] == [("done", "2"), ("interrupted", "1")]
    for number in (0, 1):  # the row and the lines of a run find each other
        assert f"data-run={number}>" in page and f'<g id="run{number}.0">' in page


def test_the_report_of_several_runs_is_the_page_that_compares_them(tmp_path, capsys):
    one, two = (write_run(tmp_path / name, losses=(3.0, last)) for name, last in (("one", 2.0), ("two", 1.0)))
    tool_modules.call("report", one, two, f"--out={tmp_path}")
    assert "runs.html: 2 runs" in capsys.readouterr().out
    written = (tmp_path / "runs.html").read_text()
    assert written == comparison.page([read(one), read(two)], "step")
    assert "<meta name=viewport" in written
    with pytest.raises(SystemExit):
        tool_modules.call("report", one, tmp_path / "nothing", f"--out={tmp_path}")
    out, err = capsys.readouterr()
    assert "runs.html: 1 runs" in out and f"{tmp_path / 'nothing'}: expected a run" in err
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "study.py").write_text("")
    with pytest.raises(SystemExit, match="is a study: give it alone"):
        tool_modules.call("report", one, tmp_path / "nothing", f"--out={tmp_path}")


def test_long_names_of_runs_stand_below_each_other_in_the_legend():
    curve = curves.Curve()
    curve.extend(np.arange(3.0), np.arange(3.0))
    for label, columns in (("short", 2), ("a" * 28, 1)):
        lines = [plots.Line(curve, "#000", label)] * 4
        (figure,) = plots.draw_panels([plots.Panel("loss", metrics.about("loss"), lines)])
        assert figure.axes[0].get_legend()._ncols == columns
        figure.draw_without_rendering()
        box = figure.axes[0].get_legend().get_window_extent()
        assert box.x0 > 0 and box.y1 < figure.bbox.y1 - 10 and box.x1 <= figure.bbox.x1


def test_the_loss_of_a_set_has_the_unit_of_its_task(tmp_path):
    one = task_config("prompting", labels=("a", "b"), templates=("{text} {label}",)).to_dict()
    made = {"format": "jsonl", "path": "x"}
    sets = {"texts": {**made, "format": "text"}, "classes": {**made, "task": one}}
    runs = [write_run(tmp_path / "run", eval__sets=sets), write_run(tmp_path / "other")]
    for run in runs:
        rows = files.RowFile(run / "metrics.jsonl")
        for step in (30, 40):
            rows.append({"step": step, "split": "eval", "seconds": 1.0, "texts/loss": 2.0, "classes/loss": 1.0})
        rows.close()
    for shown, unit in ((runs[:1], "nats per example"), (runs, "")):  # the other run does not say what 'classes' is
        drawn = comparison.panels_of(
            [read(run) for run in shown], "step", ["texts/loss", "classes/loss"], ["#000"] * len(shown)
        )
        units = {panel.about.title: panel.about.unit for panel in drawn}
        assert units == {"eval: texts: Loss": "nats per token", "eval: classes: Loss": unit}


def test_metrics_that_are_named_are_drawn_and_others_refused(tmp_path):
    run = write_run(tmp_path / "run")
    panels = comparison.panels_of([read(run)], "step", ["accuracy"], ["#000000"])
    assert [panel.about.title for panel in panels] == ["eval: Accuracy"]
    with pytest.raises(ConfigError, match=r"no run has 'acc'; there are accuracy, grad_norm, loss, nll"):
        comparison.write([run], tmp_path / "page.html", wanted=["acc"])


def test_a_run_that_cannot_be_compared_is_one_line_and_the_others_are_drawn(tmp_path, capsys):
    good = write_run(tmp_path / "good")
    torn = write_run(tmp_path / "torn")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write("{no json}\n")
    resized = write_run(tmp_path / "resized", summary={"tokens": 12345})
    bare = write_run(tmp_path / "bare")
    (bare / "config.json").unlink()
    unread = write_run(tmp_path / "unread")
    (unread / "config.json").write_text('{"model": 1, "train": {}, "data": {}, "task": {"name": "causal_lm"}}')
    with pytest.raises(SystemExit, match="1"):
        arguments = [good, torn, resized, bare, unread, f"--out={tmp_path / 'page.html'}", "--x=tokens"]
        tool_modules.call("runs", "compare", *arguments)
    out, err = capsys.readouterr()
    assert "page.html: 1 runs" in out
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    expected = (
        *("metrics.jsonl:6: expected a JSON object", "its batch size has changed", "no config.json"),
        f"{unread}: its config cannot be read: ",
    )
    for error, what in zip(errors, expected, strict=True):
        assert what in error


def test_a_trial_that_has_no_config_yet_is_compared_by_the_one_that_it_was_given(tmp_path):
    run = write_run(tmp_path / "run", optim__learning_rate=0.5)
    whole = {axis: read(run, axis) for axis in ("step", "tokens", "flops")}
    files.write_document(run / "trial.json", {"arm": "", "config": json.loads((run / "config.json").read_text())})
    (run / "config.json").unlink()
    for axis, expected in whole.items():
        found = read(run, axis)
        assert (found.settings, found.scale) == (expected.settings, expected.scale)
    assert found.settings["optim.learning_rate"] == 0.5 and found.loss_unit("") == whole["step"].loss_unit("") != ""


@pytest.mark.slow
def test_two_hundred_runs_of_a_thousand_rows_are_compared_within_ten_seconds(tmp_path):
    """CPU seconds, as other tests may run beside it."""
    rng = np.random.default_rng(0)
    for number in range(200):
        folder = write_run(tmp_path / "runs" / f"run{number}", optim__learning_rate=(number + 1) / 1000)
        rows = []
        for step in range(1, 1001):
            split = "eval" if step % 20 == 0 else "train"
            figures = {"loss": 3 - step / 1000 + rng.normal() / 10, "grad_norm": 1.0, "learning_rate": 1e-3}
            rows.append(files.sealed({"step": step, "split": split, "seconds": step / 10, **figures}))
        (folder / "metrics.jsonl").write_bytes(b"".join(rows))
    start = time.process_time()
    shown, wrong = comparison.write(sorted((tmp_path / "runs").iterdir()), tmp_path / "page.html")
    seconds = time.process_time() - start
    size = (tmp_path / "page.html").stat().st_size
    print(json.dumps({"seconds": seconds, "bytes": size}))
    assert len(shown) == 200 and not wrong and size < 10e6
    assert seconds < 10
