"""lm/tracking/run_state.py: the state of a run is told from its files; a run records how it failed."""

import pytest

from lm import lease, train
from lm.checkpoint import Diverged
from lm.preemption import Preempted
from lm.tracking import files, report, run_state
from tests import toys, trained_runs
from tests.registry_runs import write_run


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    toys.use_one_device(monkeypatch)
    monkeypatch.setattr(report, "_curves", lambda *args: "")  # pictures take a second a run


def test_the_state_is_told_by_the_lease_the_summary_and_the_failure_in_this_order(tmp_path):
    run = write_run(tmp_path / "run", is_done=False)
    assert run_state.look(run).state == "interrupted"
    files.write_document(run / run_state.FAILURE, {"error": "no"})
    assert run_state.look(run)[:2] == ("failed", "no")
    (run / "lease.1").write_text("{}")  # of another machine, as far as can be told
    assert run_state.look(run).state == "running"
    report.write_summary(run, {"loss": 1.0})
    assert run_state.look(run).state == "done" and run_state.look(run).summary["loss"] == 1.0
    (run / "lease.1").unlink()
    with lease.hold(run):
        assert run_state.look(run).state == "running"  # it goes on, and its summary is not the last word
    (run / "summary.json").write_text("{")
    found = run_state.look(run)
    assert found.state == "damaged" and "summary.json is damaged" in found.why


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        (Diverged("step 4: loss nan"), "step 4: loss nan"),
        (MemoryError("no more"), "MemoryError: no more"),
        (Preempted("stopped at step 4"), None),
        (lease.Lost("another's now"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_run_that_fails_says_why_and_one_that_was_stopped_does_not(tmp_path, error, recorded):
    with pytest.raises(type(error)), run_state.recorded_failure(tmp_path, lambda: None):
        raise error
    failure = files.read_document(tmp_path / run_state.FAILURE)
    assert failure == ({"error": recorded} if recorded else {})


def test_a_failure_is_not_written_into_a_folder_that_is_anothers_now(tmp_path):
    def lost():
        raise lease.Lost("another's now")

    with pytest.raises(Diverged), run_state.recorded_failure(tmp_path, lost):
        raise Diverged("step 4: loss nan")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_failure_of_a_run_is_gone_when_the_same_command_goes_on(tmp_path, monkeypatch):
    cfg, run = trained_runs.recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluator, "test", lambda *_: (_ for _ in ()).throw(Diverged("loss nan")))
        with pytest.raises(Diverged):
            train.train(cfg, run)
    assert run_state.look(run)[:2] == ("failed", "loss nan")
    train.train(cfg, run)
    assert run_state.look(run).state == "done" and not (run / run_state.FAILURE).exists()


@pytest.mark.parametrize(("name", "state"), [("write_summary", "failed"), ("write_report", "done")])
def test_a_failure_to_write_the_summary_or_the_report_is_recorded(tmp_path, monkeypatch, name, state):
    cfg, run = trained_runs.recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.report, name, lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
        with pytest.raises(MemoryError):
            train.train(cfg, run)
    assert files.read_document(run / run_state.FAILURE) == {"error": "MemoryError: no more"}
    assert run_state.look(run).state == state
    train.train(cfg, run)
    assert run_state.look(run).state == "done" and not (run / run_state.FAILURE).exists()
    assert (run / "report.html").exists()
