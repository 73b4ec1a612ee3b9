"""lm/registry/listing.py: runs are found, filtered, sorted; what is none, or damaged, is one line beside the rest."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from lm import lease, tasks
from lm.config.schema import ConfigError
from lm.registry import listing
from lm.tracking import files, run_state
from tests import tool_modules
from tests.registry_runs import age, write_run
from tests.test_terminal import IN_ROOT, ROOT


@pytest.fixture
def runs(tmp_path):
    """Runs of all states, below two folders."""
    root = tmp_path / "runs"
    write_run(root / "good", losses=(3.0, 1.5, 1.75), optim__learning_rate=0.01)
    write_run(root / "study" / "run10", losses=(3.0, 2.0), is_done=False, optim__name="lion")
    write_run(root / "study" / "run9", task="classification", data__path="x", checkpoint__best_metric="accuracy")
    failed = write_run(root / "study" / "failed", losses=(3.0,), is_done=False)
    files.write_document(failed / run_state.FAILURE, {"error": "step 7: loss nan"})
    return root


def listed(root, *conditions, sort="name"):
    made = [listing.condition(text) for text in conditions]
    keys = {each.key for each in made} | {sort.removeprefix("-")}
    entries, notes = listing.find(root, keys - set(listing.COLUMNS))
    assert notes == []
    values = listing.Values(entries)
    for key in keys:
        values.check(key)
    return [entry.name for entry in listing.arrange(listing.select(entries, made, values), sort, values)]


def test_the_table_has_state_steps_best_metric_age_and_size(runs, capsys):
    age(runs / "good", 3)
    tool_modules.call("runs", "list", runs)
    out, err = capsys.readouterr()
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert lines[0] == ["name", "task", "state", "steps", "best", "age", "size"]
    assert [line[:5] for line in lines[1:]] == [
        ["good", "causal_lm", "done", "20", "loss 1.5 @10"],
        ["study/failed", "causal_lm", "failed", "0/20", lines[2][4]],
        ["study/run9", "classification", "done", "20", "accuracy 0.5 @20"],
        ["study/run10", "causal_lm", "interrupted", "10/20", "loss 2 @10"],
    ]
    assert lines[1][5] == "3 d" and lines[1][6].endswith("kB") and "4 of 4 runs" in err
    assert len({line.find("interrupted") for line in out.splitlines()[1:] if "interrupted" in line}) == 1


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ("state=done", ["good", "study/run9"]),
        ("state!=done", ["study/failed", "study/run10"]),
        ("name=study/*", ["study/failed", "study/run9", "study/run10"]),
        ("best.loss<1.6", ["good"]),
        ("best.loss <= 2", ["good", "study/run9", "study/run10"]),
        ("loss>=2", ["study/failed", "study/run9", "study/run10"]),
        ("optim.learning_rate=1e-2", ["good"]),
        ("optim.name=lio?", ["study/run10"]),
        ("task=classification", ["study/run9"]),
        ("data.mask_documents=true", ["good", "study/failed", "study/run9", "study/run10"]),
        ("steps>10", ["good", "study/run9"]),
        ("size>1GB", []),
        ("age<1h", ["good", "study/failed", "study/run9", "study/run10"]),
        ("versions.jax=*", ["good", "study/run9"]),
    ],
)
def test_conditions_compare_columns_keys_of_the_config_and_figures(runs, condition, names):
    assert listed(runs, condition) == names


def test_a_run_that_is_not_done_has_the_first_and_the_best_evaluation_under_the_keys_of_a_summary(runs):
    assert listed(runs, "before.loss=3") == ["good", "study/failed", "study/run9", "study/run10"]
    assert listed(runs, "best.step=10") == ["good", "study/run10"]
    figures = listing.figures_of(listing.find(runs / "study" / "run10").entries[0])
    seconds = {"before": 0.0, "best": 5.0}
    assert {name: figures[name]["seconds"] for name in seconds} == seconds and "split" not in figures["before"]


def test_several_conditions_hold_together_and_a_run_without_a_value_fulfils_none(runs):
    assert listed(runs, "state=done", "best.loss<1.6") == ["good"]
    assert listed(runs, "versions.jax!=0") == ["good", "study/run9"]  # those that are not done have no summary


def test_the_best_of_each_metric_is_first_whether_more_or_less_of_it_is_better(runs):
    write_run(runs / "sure", losses=(3.0, 1.25), checkpoint__best_metric="accuracy")
    assert listed(runs, sort="best")[:3] == ["sure", "study/run9", "good"]
    assert listed(runs, sort="-best") == ["study/run10", "good", "study/run9", "sure", "study/failed"]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("name", ["good", "study/failed", "study/run9", "study/run10"]),
        ("-name", ["study/run10", "study/run9", "study/failed", "good"]),
        ("best", ["study/run9", "good", "study/run10", "study/failed"]),
        ("-loss", ["study/failed", "study/run9", "study/run10", "good"]),
        ("optim.name", ["good", "study/failed", "study/run9", "study/run10"]),
    ],
)
def test_runs_are_sorted_by_any_key_and_those_without_a_value_are_last(runs, key, names):
    assert listed(runs, sort=key) == names


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("optim.learning_rat=1", r"no run has 'optim.learning_rat' \(did you mean 'optim.learning_rate'\?\)"),
        ("los<1", r"no run has 'los' \(did you mean 'loss'\?\)"),
        ("state=finished", r"no state 'finished'; there are done, running, interrupted, failed, damaged"),
        ("loss<low", r"'<' compares numbers, and 'low' is none"),
        ("loss", r"expected KEY=VALUE"),
    ],
)
def test_a_wrong_condition_is_refused_with_what_there_is(runs, condition, message):
    with pytest.raises(ConfigError, match=message):
        listed(runs, condition)


@pytest.mark.parametrize("flag", ["--columns=name,versions.jax", "--sort=versions.jax", "--where=versions.jax!=1"])
def test_a_key_that_only_other_runs_have_is_empty_and_one_that_none_has_is_refused(runs, capsys, flag):
    """Whichever flag names it: runs that are not done have no summary."""
    tool_modules.call("runs", "list", runs, "--where=state=interrupted", flag)
    out, err = capsys.readouterr()
    is_condition = flag.startswith("--where")
    assert f"{0 if is_condition else 1} of 4 runs" in err and ("study/run10" in out) != is_condition
    for state in ("interrupted", "running"):  # of the latter there is none
        with pytest.raises(SystemExit, match=r"no run has 'versions.jaxx' \(did you mean 'versions.jax'\?\)"):
            tool_modules.call("runs", "list", runs, f"--where=state={state}", flag.replace("jax", "jaxx"))


def test_a_key_that_is_newer_than_a_run_has_its_default(runs):
    path = runs / "good" / "config.json"
    text = path.read_text()
    default = re.search(r'"clip_norm": ([0-9.]+)', text)[1]
    path.write_text(re.sub(r'\n *"clip_norm": [^\n]*', "", text))
    assert '"clip_norm"' not in path.read_text() and "good" in listed(runs, f"optim.clip_norm={default}")


def test_a_key_that_there_is_not_is_refused_without_building_the_config_of_each_run(runs, monkeypatch):
    built = []
    build = tasks.build_saved_config
    monkeypatch.setattr(tasks, "build_saved_config", lambda saved: built.append(saved) or build(saved))
    with pytest.raises(ConfigError, match=r"did you mean 'optim\.learning_rate'"):
        listed(runs, "optim.learning_rat>0")
    assert not built
    sets = {"mine": {"format": "text", "path": "x"}}
    path = write_run(runs / "sets", eval__sets=sets) / "config.json"
    content = json.loads(path.read_text())
    content["eval"]["sets"]["mine"].pop("encoding")
    path.write_text(json.dumps(content))
    assert listed(runs, "eval.sets.mine.encoding=*") == ["sets"]  # a section whose name the defaults do not have


def test_what_is_damaged_or_foreign_is_one_line_each_and_the_rest_is_listed(runs, capsys):
    write_run(runs / "bad_summary")
    (runs / "bad_summary" / "summary.json").write_text("{not json")
    bad = write_run(runs / "bad_row", is_done=False) / "metrics.jsonl"
    bad.write_text(bad.read_text().replace('"split": "eval", "step": 10', '"split": "eval", "step": 11'))
    write_run(runs / "bad_config")
    (runs / "bad_config" / "config.json").write_bytes(b"\xff\x00")
    (runs / "published").mkdir()
    (runs / "published" / "config.json").write_text('{"model_type": "llama"}')
    (runs / "notes" / "deeper").mkdir(parents=True)
    (runs / "notes" / "deeper" / "todo.txt").write_text("-")
    (runs / "loop").symlink_to(runs)
    (runs / "broken").symlink_to(runs / "nowhere")
    tool_modules.call("runs", "list", runs)
    out, err = capsys.readouterr()
    states = {line.split()[0]: line.split()[2] for line in out.splitlines() if line.split()[2:]}
    assert [states[name] for name in ("good", "study/run9", "study/run10", "study/failed")] == [
        *("done", "done", "interrupted", "failed")
    ]
    assert states["bad_summary"] == states["bad_row"] == "damaged"
    assert sum(line.startswith("bad_") for line in out.splitlines()) == 3
    notes = err.splitlines()
    for name, what in {
        "bad_summary/summary.json": "is damaged: expected a JSON object",
        "bad_row/metrics.jsonl:3": "its checksum does not match",
        "bad_config/config.json": "is damaged",
        "published": "has no run: its config.json is not that of a run",
        "notes": "has no run: no config.json",
        "loop": "is a link, which is not followed",
        "broken": "is a link, which is not followed",
    }.items():
        (line,) = [note for note in notes if f"{runs / name}" in note]
        assert what in line
    assert len(notes) == 8 and notes[-1] == "7 of 7 runs"


def test_a_run_that_is_being_written_is_running_and_its_torn_line_is_left_out(runs):
    with lease.hold(runs / "study" / "run10"):
        with (runs / "study" / "run10" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 20, "split": "eval", "seconds": 9')
        found = listing.find(runs)
        (entry,) = [entry for entry in found.entries if entry.name == "study/run10"]
        assert (entry.state, entry.steps, entry.best, found.notes) == ("running", 10, 2.0, [])
    (entry,) = [entry for entry in listing.find(runs).entries if entry.name == "study/run10"]
    assert entry.state == "interrupted"


def test_names_cannot_control_the_terminal_or_break_the_table(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a\x1b[2J\nb\tc")
    tool_modules.call("runs", "list", tmp_path / "runs")
    out = capsys.readouterr().out
    assert "a\\x1b[2J\\nb\\tc" in out and len(out.splitlines()) == 2


def test_a_slow_file_system_is_read_by_several_threads_with_the_same_result(tmp_path, monkeypatch):
    for number in range(8):
        write_run(tmp_path / "runs" / f"run{number}", losses=(3.0, 2.0 + number))
    expected, threads = listing.find(tmp_path / "runs", ["loss"]), set()

    def slow(path):
        time.sleep(0.01)
        threads.add(threading.get_ident())
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(listing.os, "scandir", slow)
    monkeypatch.setattr(listing, "_PROBED", 2)
    assert listing.find(tmp_path / "runs", ["loss"]) == expected and len(threads) > 2


def test_a_url_and_a_folder_that_is_not_there_are_refused(tmp_path, monkeypatch):
    for name, message in (("gs://bucket/runs", "give the mounted one"), (tmp_path / "no", "there is no such folder")):
        with pytest.raises(SystemExit, match=message):
            tool_modules.call("runs", "list", name)


# Runs a command; prints its status, CPU seconds and peak memory. A process of its own, as the peak of a child includes
# the memory that its parent had when it started it.
_MEASURE = """
import json, os, subprocess, sys
_, status, used = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print(json.dumps([status, used.ru_utime + used.ru_stime, used.ru_maxrss]), file=sys.stderr)
"""


@pytest.mark.slow
def test_ten_thousand_runs_are_listed_filtered_and_sorted_within_two_seconds_and_one_gigabyte(tmp_path):
    """CPU seconds of the whole command; on a slow or busy machine, nine times those of parsing the configs alone."""
    kinds = [
        write_run(tmp_path / "kinds" / str(i), losses=(3.0, 2.0 + i / 10), optim__learning_rate=(i + 1) / 1000)
        for i in range(10)
    ]
    for kind in kinds:
        (kind / "checkpoints" / "20").mkdir(parents=True)
        (kind / "checkpoints" / "20" / "state").write_bytes(b"x" * 1000)
    for number in range(10_000):
        kind, folder = kinds[number % 10], tmp_path / "runs" / f"study{number % 7}" / f"run{number}"
        (folder / "checkpoints" / "20").mkdir(parents=True)
        for name in ("config.json", "metrics.jsonl", "summary.json", "checkpoints/20/state"):
            os.link(kind / name, folder / name)
    command = [sys.executable, "tools/runs.py", "list", str(tmp_path / "runs"), "--sort=best"]
    command += ["--where=best.loss<2.55", "--where=optim.learning_rate>0.0015", "--where=state=done"]
    text, seconds, parsing, peaks = (kinds[0] / "config.json").read_bytes(), [], [], []
    for _ in range(3):
        began = time.monotonic()
        measured = [sys.executable, "-c", _MEASURE, *command]
        done = subprocess.run(measured, capture_output=True, text=True, cwd=ROOT, env=IN_ROOT, check=True)
        wall = time.monotonic() - began
        status, cpu, peak = json.loads(done.stderr.splitlines()[-1])
        assert status == 0
        seconds.append(cpu)
        peaks.append(peak * (1 if sys.platform == "darwin" else 1024))
        start = time.process_time()
        for _ in range(10_000):
            json.loads(text)
        parsing.append(time.process_time() - start)
        print(f"{cpu:.2f} s of CPU, {wall:.2f} s by the clock, {peaks[-1] / 1e6:.0f} MB; parsing {parsing[-1]:.2f} s")
    assert len(done.stdout.splitlines()) == 1 + 5 * 1000 and "5,000 of 10,000 runs" in done.stderr
    assert min(seconds) < max(2, 9 * min(parsing)) and max(peaks) < 2**30
