"""lm/registry/details.py: a run in detail, and the differences between runs."""

import shutil

import pytest

from lm.study import runs as study_runs
from lm.study.definition import Trial
from lm.tracking import files, run_state
from tests import tool_modules, toys, trained_runs
from tests.registry_runs import config_of, write_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints at steps 2, 4 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        return trained_runs.trained(tmp_path_factory.mktemp("whole"))


def shown(capsys, *arguments, status=0):
    """What a command prints; checks its status."""
    try:
        tool_modules.call("runs", *arguments)
    except SystemExit as end:
        assert end.code == status
    else:
        assert status == 0
    return capsys.readouterr()


def section(text, title):
    """The lines below a title, up to the next empty one, each as its words."""
    assert f"\n{title}\n" in text, text
    return [line.split() for line in text.partition(f"\n{title}\n")[2].partition("\n\n")[0].splitlines()]


def test_a_run_is_shown_with_its_config_data_metrics_checkpoints_and_versions(whole, capsys):
    out = shown(capsys, "show", whole).out
    assert "state:  done" in out and "steps:  6" in out
    config = {line[0]: line[1:] for line in section(out, "Config")}
    assert config["checkpoint.keep_latest"] == ["4", "2"] and "seed" not in config
    assert section(out, "Data")[0] == ["data.format", "text"]
    metrics = {line[0]: line[1:] for line in section(out, "Metrics")}
    summary = files.read_document(whole / "summary.json")
    expected = [f"{value:.5g}" for value in (summary["before"]["nll"], summary["nll"], summary["best"]["nll"])]
    assert metrics["nll"] == expected
    checkpoints = section(out, "Checkpoints")
    assert [line[0] for line in checkpoints[1:]] == ["2", "4", "6"]
    best = str(summary["best"]["step"])
    assert [line[0] for line in checkpoints if any(word.startswith("best") for word in line)] == [best]
    versions = section(out, "Versions")
    started = files.read_document(whole / "environment.json")
    assert versions[0] == ["started", started["began"], "on", started["host"]]
    assert "latest" in checkpoints[-1] and versions[-1][0] == "python"


def test_a_damaged_checkpoint_and_a_damaged_file_are_named_and_the_rest_is_shown(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{")
    (run / "summary.json").write_text("[]")
    out, err = shown(capsys, "show", run, status=1)
    assert "4" in [line[0] for line in section(out, "Checkpoints")] and "is damaged" in out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "summary.json is damaged: expected a JSON object" in line and section(out, "Config")


def test_a_trial_that_failed_is_shown_with_its_error_its_commit_and_the_end_of_its_log(tmp_path, capsys):
    cfg = config_of()
    run = write_run(tmp_path / "run", is_done=False)
    study_runs.write_record(run, Trial("lora", 0, "x.py", {}, cfg, "abc"), "0123abcd")
    files.write_document(run / run_state.FAILURE, {"error": "step 7: loss nan", "status": 1})
    (run / run_state.LOG).write_text("".join(f"line {i}\n" for i in range(5000)) + "error: \x1b[2Jstep 7: loss nan\n")
    out = shown(capsys, "show", run).out
    assert "arm:    lora" in out and "failed: step 7: loss nan" in out and "commit 0123abcd" in out
    log = section(out, "Last lines of log.txt")
    assert len(log) == 12 and log[-1] == ["error:", "\\x1b[2Jstep", "7:", "loss", "nan"]


def test_differences_are_the_keys_that_differ_and_all_figures_side_by_side(tmp_path, capsys):
    one = write_run(tmp_path / "one", losses=(3.0, 2.0), seed=1)
    two = write_run(tmp_path / "two", losses=(3.0, 2.25), seed=1, optim__learning_rate=0.5)
    three = write_run(tmp_path / "three", is_done=False, task="classification")
    out = shown(capsys, "diff", one, two).out
    config, figures = out.split("\n\n")
    assert [line.split()[0] for line in config.splitlines()] == ["config", "optim.learning_rate"]
    assert config.splitlines()[1].split()[2] == "0.5"
    assert ["loss", "2", "2.25"] in [line.split() for line in figures.splitlines()]
    assert ["best.accuracy", "0.5", "0.44444"] in [line.split() for line in figures.splitlines()]
    out = shown(capsys, "diff", one, two, three).out
    assert "task.name" in out and ["loss", "2", "2.25", "2"] in [line.split() for line in out.splitlines()]
    assert shown(capsys, "diff", one, one).out.startswith("the configs are the same")


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    write_run(tmp_path / "one")
    with pytest.raises(
        SystemExit, match=r"expected the folder of a run, with config\.json or metrics\.jsonl; there are 1"
    ):
        tool_modules.call("runs", "show", tmp_path)
    with pytest.raises(SystemExit, match="expected two runs or more"):
        tool_modules.call("runs", "diff", tmp_path / "one")
    with pytest.raises(SystemExit, match="no command 'sho'; expected one of list, show"):
        tool_modules.call("runs", "sho", tmp_path / "one")
