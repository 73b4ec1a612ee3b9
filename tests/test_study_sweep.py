"""A sweep runs what is not done, resumes what was killed, lists what failed, and goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent import futures

import pytest

from lm import lease, train
from lm.config import ConfigError, schema
from lm.models import transformer
from lm.study import product, recorded, runs, seeds, sweep
from lm.tasks import build_config
from lm.tracking import files
from tests import tool_modules, toys
from tests.study_runs import RECIPE, make_study, write_run

SAID: list[str] = []


def run_all(study, root, trials=None, retry_failed=False):
    SAID.clear()
    how = {"environment": os.environ, "retry_failed": retry_failed, "say": SAID.append, "at_once": 1}
    return sweep.run_all(study, trials or sweep.select(study, []), root, **how)


@pytest.fixture
def quick(monkeypatch):
    """Runs are replaced by a script that appends to started.txt, and ends as CASES[seed] says, or is done."""
    cases = {}
    script = """
        import json, os, signal, sys
        from pathlib import Path
        from lm.tracking import files
        folder = Path(sys.argv[1])
        config = json.loads((folder / "trial.json").read_text())["config"]
        seed = config["seed"]
        with (folder / "started.txt").open("a") as file:
            file.write("x")
        case = json.loads(sys.argv[2]).get(str(seed))
        if case == "fails":
            sys.exit("error: 'data.path': no such file\\nmore")
        if case == "raises":
            raise KeyError("surprise")
        if case == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(case, int):
            sys.exit(case)
        files.write_document(folder / "config.json", config)
        files.write_document(folder / "summary.json", {"loss": float(seed), "seconds": 2.0})
    """
    script = textwrap.dedent(script)
    monkeypatch.setattr(sweep, "command", lambda folder: [sys.executable, "-c", script, str(folder), json.dumps(cases)])
    monkeypatch.setenv("PYTHONPATH", str(tool_modules.ROOT))
    return cases


def starts(root, study):
    return [len(path.read_text()) if (path := root / key / "started.txt").exists() else 0 for key in study.runs]


def test_a_trial_that_is_done_is_not_run_again(tmp_path, quick):
    study = make_study(seeds(3))
    write_run(tmp_path, study.trials[1], {"loss": 9.0})
    ended = run_all(study, tmp_path)
    assert [each.state for each in ended.values()] == ["done"] * 3 and starts(tmp_path, study) == [1, 0, 1]
    assert ended[study.trials[1].hash].summary["loss"] == 9.0
    run_all(study, tmp_path)
    assert starts(tmp_path, study) == [1, 0, 1] and SAID == []


def test_one_that_fails_is_listed_with_its_error_and_does_not_stop_the_others(tmp_path, quick):
    study = make_study(seeds(4))
    quick |= {0: "fails", 2: "raises"}
    ended = run_all(study, tmp_path)
    assert [each.state for each in ended.values()] == ["failed", "done", "failed", "done"]
    first, _, third, _ = ended.values()
    assert first.why == "'data.path': no such file" and third.why == "KeyError: 'surprise'"
    assert "failed: 'data.path': no such file" in SAID[1]
    run_all(study, tmp_path)
    assert starts(tmp_path, study) == [1, 1, 1, 1]  # not again by itself
    quick |= {0: "raises"}  # its log has the first error too
    assert run_all(study, tmp_path, study.trials[:1], retry_failed=True)[study.trials[0].hash].why == third.why
    quick.clear()
    assert {each.state for each in run_all(study, tmp_path, retry_failed=True).values()} == {"done"}
    assert starts(tmp_path, study) == [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("case", "says"),
    [("killed", "was killed by SIGKILL; the same command resumes it"), (75, "was stopped"), (143, "was stopped")],
)
def test_one_that_is_killed_is_resumed_by_the_same_command(tmp_path, quick, case, says):
    study = make_study(seeds(2))
    quick |= {0: case}
    assert [each.state for each in run_all(study, tmp_path).values()] == ["interrupted", "done"]
    assert says in SAID[1]
    quick.clear()
    assert {each.state for each in run_all(study, tmp_path).values()} == {"done"}
    assert starts(tmp_path, study) == [2, 1] and "resumes in" in SAID[0]


def test_one_that_another_process_runs_is_left_to_it(tmp_path, quick):
    study = make_study(seeds(2))
    with lease.hold(tmp_path / study.trials[0].hash):
        runs.write_record(tmp_path / study.trials[0].hash, study.trials[0], "abc123")
        assert [each.state for each in run_all(study, tmp_path).values()] == ["running", "done"]
    assert starts(tmp_path, study) == [0, 1]
    quick |= {0: lease.Held.exit_status}  # another was faster
    assert "is run by another process" in (run_all(study, tmp_path) and SAID[1])


def test_one_whose_machine_was_restarted_is_resumed(tmp_path, quick):
    study = make_study(seeds(1))
    folder = tmp_path / study.trials[0].hash
    with lease.hold(folder):
        runs.write_record(folder, study.trials[0], "abc123")
        text = (folder / "lease.1").read_text()
    (folder / "lease.1").write_text(json.dumps(json.loads(text) | {"machine": "another boot"}))
    assert runs.look(folder).state == "running"  # as far as can be told at once; the run itself finds out
    assert [each.state for each in run_all(study, tmp_path).values()] == ["done"]
    assert starts(tmp_path, study) == [1]


def test_one_that_another_sweep_has_tried_again_meanwhile_is_not_tried_once_more(tmp_path, quick, monkeypatch):
    study = make_study(seeds(2))
    quick |= {0: "fails", 1: "fails"}
    run_all(study, tmp_path)
    one = sweep.run_one

    def run_one(trial, folder, environment):
        monkeypatch.setattr(sweep, "run_one", one)
        one(study.trials[1], tmp_path / study.trials[1].hash, environment)  # by the other sweep
        return one(trial, folder, environment)

    monkeypatch.setattr(sweep, "run_one", run_one)
    run_all(study, tmp_path, retry_failed=True)
    assert starts(tmp_path, study) == [2, 2] and SAID[-1] == "[2/2] all, seed 1: failed, by another process"


def test_one_that_another_process_has_finished_meanwhile_is_not_started(tmp_path, quick, monkeypatch):
    study = make_study(seeds(2))
    one = sweep.run_one

    def run_one(trial, *rest):
        write_run(tmp_path, study.trials[1], {"loss": 9.0})
        return one(trial, *rest)

    monkeypatch.setattr(sweep, "run_one", run_one)
    assert [each.state for each in run_all(study, tmp_path).values()] == ["done"] * 2
    assert starts(tmp_path, study) == [1, 0] and SAID[-1] == "[2/2] all, seed 1: done, by another process"


HOLDS = """
    import json, os, signal, sys, time
    from pathlib import Path
    from lm import lease
    from lm.tracking import files
    folder = Path(sys.argv[1])
    try:
        with lease.hold(folder):
            if (folder / "summary.json").exists():
                sys.exit()
            if int(folder.name, 16) % 2 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
            with (folder / "finished.txt").open("a") as file:
                file.write("x")
            config = json.loads((folder / "trial.json").read_text())["config"]
            files.write_document(folder / "config.json", config)
            files.write_document(folder / "summary.json", {"loss": 1.0, "seconds": 2.0})
    except lease.Held:
        sys.exit(lease.Held.exit_status)
"""


SWEEPS = """
    import os, sys
    from pathlib import Path
    from lm.study import seeds, sweep
    from tests.study_runs import make_study
    sweep.command = lambda folder: [sys.executable, "-c", sys.argv[2], str(folder)]
    study, ended = make_study(seeds(12)), {}
    for _ in range(30):
        if not ended or any(each.state != "done" for each in ended.values()):
            how = {"environment": os.environ, "retry_failed": False, "say": print, "at_once": 1}
            ended = sweep.run_all(study, sweep.select(study, []), Path(sys.argv[1]), **how)
"""


def test_several_sweeps_at_once_finish_each_trial_once_though_runs_are_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tool_modules.ROOT))
    command = [sys.executable, "-c", textwrap.dedent(SWEEPS), str(tmp_path), textwrap.dedent(HOLDS)]
    sweeps = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [each.communicate()[0] for each in sweeps]
    assert [each.returncode for each in sweeps] == [0] * 3 and "was killed by SIGKILL" in "".join(said)
    study = make_study(seeds(12))
    outcomes, remarks = runs.find(study, tmp_path)
    assert [each.state for each in outcomes.values()] == ["done"] * 12 and not remarks
    assert [(tmp_path / key / "finished.txt").read_text() for key in study.runs] == ["x"] * 12


def test_a_sweep_that_is_stopped_stops_its_run_and_waits_for_it(tmp_path, monkeypatch):
    script = """
        import signal, sys, time
        from pathlib import Path
        folder = Path(sys.argv[1])
        def stop(*_):
            time.sleep(0.2)
            (folder / "saved").touch()
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        (folder / "ready").touch()
        time.sleep(60)
    """
    script = textwrap.dedent(script)
    monkeypatch.setattr(sweep, "command", lambda folder: [sys.executable, "-c", script, str(folder)])
    study = make_study(seeds(2))
    folder = tmp_path / study.trials[0].hash

    def press_ctrl_c():
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with futures.ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(press_ctrl_c)
        run_all(study, tmp_path)
    assert (folder / "saved").exists()
    assert [each.state for each in runs.find(study, tmp_path)[0].values()] == ["interrupted", "missing"]


def test_a_damaged_run_is_neither_run_nor_taken_for_done(tmp_path, quick):
    study = make_study(seeds(2))
    folder = write_run(tmp_path, study.trials[0], {"loss": 9.0})
    (folder / "summary.json").write_text("{")
    ended = run_all(study, tmp_path)
    assert ended[study.trials[0].hash].state == "damaged" and starts(tmp_path, study) == [0, 1]


def test_two_arms_with_one_config_share_its_run(tmp_path, quick):
    study = make_study(product([{"arm": "a"}, {"arm": "b", "model.mlp_dim": 512}], seeds(2)))
    assert len(study.trials) == 4 and len(run_all(study, tmp_path)) == 2 and starts(tmp_path, study) == [1, 1]


def test_progress_says_how_many_are_left_and_how_long_they_take(tmp_path, quick):
    study = make_study(seeds(3))
    write_run(tmp_path, study.trials[0], {"loss": 9.0})  # took 12.5 s
    run_all(study, tmp_path)
    assert SAID[0].startswith("[1/2] all, seed 1: starts in ") and SAID[0].endswith("; 2 left, about 0:00:25")
    assert "[2/2] all, seed 2: done after 0:00:" in SAID[3]


def test_the_pace_of_an_arm_is_its_own():
    study = make_study(product([{"arm": "a"}, {"arm": "b", "model.mlp_dim": 8}], seeds(2)))
    pace = sweep.Pace()
    assert (
        pace.estimate(study.trials) is None
        and pace.in_words(study.trials) == "4 left, the first will tell how long they take"
    )
    pace.add(study.trials[0], 10.0)
    assert pace.estimate(study.trials) == 40.0
    pace.add(study.trials[2], 100.0)
    assert pace.estimate(study.trials) == 220.0 and runs.duration(3725.4) == "1:02:05"


def test_only_chooses_by_arm_trial_or_hash():
    study = make_study(product([{"arm": "lora 4"}, {"arm": "lora 8", "seed": 9}, {"arm": "head", "model.mlp_dim": 8}]))
    arms = lambda *patterns: [trial.arm for trial in sweep.select(study, patterns)]  # noqa: E731
    assert arms() == ["lora 4", "lora 8", "head"] and arms("lora*") == ["lora 4", "lora 8"]
    assert arms("head", "*, seed 9") == ["lora 8", "head"] and arms(study.trials[2].hash) == ["head"]
    with pytest.raises(ConfigError, match="--only=loro: no trial fits; arms are lora 4; lora 8; head"):
        arms("loro")


def test_flops_are_those_of_the_model_and_the_tokens():
    (trial,) = make_study([{"tokenizer.vocab_size": 512, "train.total_steps": 7}]).trials
    c = trial.config
    matrices = 4 * (4 * 192 * 192 + 3 * 192 * 512) + 192 * 512
    a_token = 6 * matrices + 12 * 4 * 192 * 256
    assert sweep.train_flops(c) == a_token * 7 * 8 * 256
    (epochs,) = make_study([{"train.total_steps": 0, "train.total_epochs": 1.0}]).trials
    assert sweep.train_flops(epochs.config) is None


def test_a_trial_that_cannot_run_is_refused_before_any_does():
    trials = make_study([{"arm": "a"}, {"arm": "b", "init_from": "runs/no_such_run"}]).trials
    with pytest.raises(ConfigError, match=r"b, seed 0: .*runs/no_such_run"):
        sweep.plan(trials)


# --- with real runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A recipe's file: a run of 12 steps, which saves each of them."""
    texts = toys.write_texts(tmp_path / "texts")
    changes = {"data.path": str(texts), "data.eval_fraction": 0.1, "data.seq_len": 32, "model.num_layers": 1}
    changes |= {"data.format": "text", "data.packing": "concat", "tokenizer.vocab_size": 300, "model.embed_dim": 16}
    changes |= {"model.num_heads": 2, "model.mlp_dim": 32, "train.total_steps": 12, "optim.warmup_steps": 1}
    changes |= {"checkpoint.every_steps": 1, "monitor.log_every_steps": 1, "generate.prompts": ()}
    return [changes]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_figures_of_an_undisturbed_one(tmp_path, small):
    study = make_study(product(small, seeds(1)))
    (trial,) = study.trials
    folder = tmp_path / "runs" / trial.hash
    folder.mkdir(parents=True)
    runs.write_record(folder, trial, "abc123")
    process = subprocess.Popen(sweep.command(folder), cwd=tool_modules.ROOT, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while not list(folder.glob("checkpoints/[3-9]")) and time.monotonic() - began < 120:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert runs.find(study, tmp_path / "runs")[0][trial.hash].state == "interrupted"
    ended = run_all(study, tmp_path / "runs")
    assert ended[trial.hash].state == "done" and "resumes in" in SAID[0]
    assert "resuming from" in (folder / "log.txt").read_text()
    undisturbed = train.train(trial.config, tmp_path / "undisturbed")
    assert ended[trial.hash].summary["loss"] == pytest.approx(undisturbed["loss"], rel=1e-6)
    steps = [row["step"] for row in files.read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    assert steps == list(range(1, 13))


def test_a_trial_may_leave_the_layers_of_its_decoder_open(tmp_path):
    (trial,) = make_study(
        [{"task.name": "span_corruption", "model.kind": "encoder_decoder", "tokenizer.extra_ids": 8}]
    ).trials
    runs.write_record(tmp_path, trial, "abc123")
    assert trial.config.model.decoder_layers == 0 and runs.read_record(tmp_path / "trial.json").config == trial.config
    ran = dataclasses.replace(trial.config, model=transformer.resolve(trial.config.model, vocab_size=2056, seq_len=256))
    files.write_document(tmp_path / "config.json", schema.to_dict(ran))
    assert ran.model.decoder_layers and runs.difference_from(tmp_path, trial.config) == ""


def test_the_recorded_recipe_is_the_config_of_the_trial(tmp_path):
    (trial,) = make_study([{"optim.lr_rules": ((r"head/.*", 1.0), (".*", 0.5)), "seed": 3}]).trials
    runs.write_record(tmp_path, trial, "abc123")
    runs.write_record(tmp_path, trial, "def456")
    assert build_config(recorded.get_config(str(tmp_path / "trial.json"))) == trial.config
    assert runs.read_record(tmp_path / "trial.json").commits == ("abc123", "def456")
    with pytest.raises(ConfigError, match=r"expected the file of a trial"):
        recorded.get_config()


STUDY = f'''"""Which seed?"""
from lm.study import Table, arms, product, seeds
RECIPE = "{RECIPE}"
TABLES = (Table("loss", baseline="a"),)
def trials():
    return product(arms({{"a": {{}}, "b": {{"model.mlp_dim": 8}}}}), seeds(2))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tool_modules.ROOT)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "study.py").write_text(STUDY)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "experiment"
    signal.signal(signal.SIGTERM, handler)


def test_dry_run_shows_the_trials_and_their_flops_and_runs_none(tmp_path, folder, quick, capsys):
    tool_modules.call("sweep", folder, "--dry_run", f"--runs={tmp_path / 'runs'}", "--only=b*")
    out = capsys.readouterr().out
    assert "b, seed 1" in out and "a, seed 0" not in out and "2 trials in" in out and "FLOPs" in out
    assert not (tmp_path / "runs").exists()


def test_sweep_then_report(tmp_path, folder, quick, capsys):
    quick |= {1: "fails"}
    where = f"--runs={tmp_path / 'runs'}"
    with pytest.raises(SystemExit, match="2 of 4 trials are not done, 2 of them by an error"):
        tool_modules.call("sweep", folder, where, "--at_once=1")
    out = capsys.readouterr()
    assert "failed: a, seed 1: 'data.path': no such file" in out.err and "[4/4] b, seed 1" in out.out
    quick.clear()
    tool_modules.call("sweep", folder, where, "--at_once=1", "--retry_failed")
    assert "all 4 trials are done" in capsys.readouterr().out


def test_a_typo_ends_the_sweep_in_one_line_before_anything_runs(tmp_path, folder, quick):
    (folder / "study.py").write_text(STUDY.replace("model.mlp_dim", "model.mlp_dims"))
    with pytest.raises(SystemExit, match=r"error: trial 3 of 4.*model.mlp_dims.*did you mean 'mlp_dim'"):
        tool_modules.call("sweep", folder, f"--runs={tmp_path / 'runs'}")
    assert not (tmp_path / "runs").exists()


def test_report_tells_what_is_wrong_after_all_the_rest(tmp_path, folder, quick, capsys):
    where = f"--runs={tmp_path / 'runs'}"
    tool_modules.call("sweep", folder, where, "--at_once=1")
    tool_modules.call("report", folder, where, f"--out={tmp_path / 'out'}")
    out = capsys.readouterr().out
    assert "| a | 2 | 0.50 ± 0.71 |" in out and (tmp_path / "out" / "report.html").exists()
    (folder / "study.py").write_text(STUDY.replace('"loss"', '"nll"'))
    with pytest.raises(SystemExit, match="1 errors"):
        tool_modules.call("report", folder, where)
    out = capsys.readouterr()
    assert "no run has a metric 'nll'" in out.err and "4 of 4 runs are done" in out.out


def test_report_of_a_run_writes_its_page_again(tmp_path, capsys):
    run = write_run(tmp_path, make_study(seeds(1)).trials[0], {"loss": 1.0})
    tool_modules.call("report", run)
    assert (run / "report.html").exists() and "report.html" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"expected the folder of a study, with study\.py, or of a run"):
        tool_modules.call("report", tmp_path / "nothing")
