"""lm/tracking/relay.py and the trackers: they get what the run logs, once; none slows, stops or changes the run."""

import dataclasses
import importlib.util
import json
import shutil
import struct
import threading
import time
from pathlib import Path

import pytest

from lm import lease, train
from lm.config.schema import ConfigError
from lm.tasks import build_config
from lm.tracking import relay
from lm.tracking import wandb as wandb_tracker
from lm.tracking.service import RunFacts, Service
from tests import toys

FACTS = RunFacts(
    workdir=Path(),
    name="name",
    project="project",
    start_step=0,
    config={"seed": 1, "optim.learning_rate": 0.5, "data.path": "texts", "task.metrics": ("a", "b")},
    changed={"optim.learning_rate": 0.5, "task.metrics": ("a", "b"), "model.use_bias": False},
    environment={"host": "here", "git": {"commit": "c" * 40}},
)
HANGS = threading.Event()  # never set


def facts(workdir, start_step=0):
    return FACTS._replace(workdir=workdir, start_step=start_step)


def failing(_):
    def fail(*_):
        raise OSError("no route to\nhost")

    return Service(fail, fail, fail)


def hanging(_):
    return Service(lambda *_: HANGS.wait(), lambda *_: None, lambda *_: None)


def not_starting(_):
    raise RuntimeError("login failed")


def never_starting(_):
    HANGS.wait()


def recording(calls):
    names = ("scalars", "text", "finish")
    return lambda _: Service(*(lambda *args, name=name: calls.append((name, *args)) for name in names))


@pytest.fixture
def texts(tmp_path_factory):
    return toys.write_texts(tmp_path_factory.mktemp("texts"))


# --- the relay ------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_all_calls_in_order_and_the_end(monkeypatch, tmp_path):
    calls, said = [], []
    monkeypatch.setitem(relay.OPENERS, "mlflow", recording(calls))
    with relay.opened(("mlflow", "mlflow"), facts(tmp_path), said.append) as trackers:
        for step in range(500):
            trackers.scalars(step, {"train/loss": 1.0})
        trackers.text(9, "prompt", "text")
        trackers.figures = {"loss": 2.0}
    rows = [("scalars", step, {"train/loss": 1.0}) for step in range(500)]
    assert calls == [*rows, ("text", 9, "prompt", "text"), ("finish", {"loss": 2.0}, "done")]
    assert said == []


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (train.Preempted("x"), [("finish", {}, "interrupted")]),
        (ValueError("x"), [("finish", {}, "failed")]),
        (lease.Lost("x"), []),  # the folder and the tracker's run are another's now
        (KeyboardInterrupt(), []),  # ends at once
    ],
)
def test_a_tracker_is_told_how_the_run_has_ended(monkeypatch, tmp_path, error, ends):
    calls = []
    monkeypatch.setitem(relay.OPENERS, "mlflow", recording(calls))
    with pytest.raises(type(error)), relay.opened(("mlflow",), facts(tmp_path), print):
        raise error
    for thread in threading.enumerate():  # where the end does not wait for it
        if thread.name == "tracker mlflow":
            thread.join(10)
    assert calls == ends


@pytest.mark.parametrize(
    ("opener", "first", "lost"),
    [
        (failing, "failed, the run goes on: OSError: no route to host", "1,200 of 1,200"),
        (not_starting, "failed, the run goes on: RuntimeError: login failed", "1,200 of 1,200"),
        (hanging, "does not keep up: 1,000 rows wait for it, further ones are lost", "1,200 of 1,200"),
        (never_starting, "does not keep up: 1,000 rows wait for it, further ones are lost", "1,200 of 1,200"),
    ],
)
def test_what_a_tracker_lost_is_said_once_and_counted(monkeypatch, tmp_path, opener, first, lost):
    said, calls = [], []
    monkeypatch.setattr(relay, "FINISH_SECONDS", 0.5)
    monkeypatch.setitem(relay.OPENERS, "wandb", opener)
    monkeypatch.setitem(relay.OPENERS, "mlflow", recording(calls))
    began = time.monotonic()
    with relay.opened(("wandb", "mlflow"), facts(tmp_path), said.append) as trackers:
        for step in range(1200):
            trackers.scalars(step, {"train/loss": 1.0})
            if step % 100 == 0:
                time.sleep(0.001)  # as a step takes
    assert time.monotonic() - began < 5
    assert said == [
        f"tracker wandb: {first}",
        f"tracker wandb: {lost} rows and texts were not recorded; metrics.jsonl has all rows",
    ]
    assert calls[-1] == ("finish", {}, "done"), "the other tracker is not held up"


def test_a_tracker_that_recovers_gets_the_later_rows(monkeypatch, tmp_path):
    got, said = [], []

    def scalars(step, _):
        if step < 3:
            raise ConnectionError("down")
        got.append(step)

    monkeypatch.setitem(relay.OPENERS, "mlflow", lambda _: Service(scalars, scalars, lambda *_: None))
    with relay.opened(("mlflow",), facts(tmp_path), said.append) as trackers:
        for step in range(6):
            trackers.scalars(step, {})
    assert got == [3, 4, 5] and said[-1].startswith("tracker mlflow: 3 of 6 rows")


def test_a_console_that_cannot_be_written_does_not_stop_the_run(monkeypatch, tmp_path):
    def say(_):
        raise OSError("closed")

    monkeypatch.setitem(relay.OPENERS, "mlflow", not_starting)
    with relay.opened(("mlflow",), facts(tmp_path), say) as trackers:
        trackers.scalars(1, {})


# --- config ---------------------------------------------------------------------------------------------------------


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(monkeypatch, tmp_path, texts):
    with pytest.raises(ConfigError, match=r"'monitor.trackers\[0\]' must be one of tensorboard, wandb, mlflow; got 'w"):
        build_config({"monitor": {"trackers": ("wandbb",)}, "train": {"total_steps": 1}})
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("mlflow", "wandb") else relay.__spec__
    )
    cfg = toys.recipe(texts, monitor__trackers=("wandb",))
    with pytest.raises(ConfigError, match=r"names wandb, but wandb is not installed: pip install -e '.\[wandb\]'"):
        train.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_named_as_a_package_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(relay.NEEDED, "wandb", ("a_tracker",))
    with pytest.raises(ConfigError, match="a_tracker is not installed"):
        relay.check_installed(("wandb",))


# --- whole runs -----------------------------------------------------------------------------------------------------


def rows_of(workdir):
    timed = ("seconds", "tokens_per_second", "tokens_per_second_a_device", "input_bound", "mfu", "mfu_causal", "crc32")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_trackers_that_fail_and_hang_change_nothing_of_a_run(monkeypatch, tmp_path, texts, capsys):
    cfg = toys.recipe(texts, train__total_steps=3, generate__prompts=("the run",))
    without = dataclasses.replace(cfg, monitor=dataclasses.replace(cfg.monitor, trackers=()))
    usual = train.train(without, tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()
    monkeypatch.setattr(relay, "FINISH_SECONDS", 0.5)
    monkeypatch.setattr(relay, "NEEDED", {})
    calls = []
    for name, opener in (("tensorboard", failing), ("wandb", hanging), ("mlflow", recording(calls))):
        monkeypatch.setitem(relay.OPENERS, name, opener)
    monitor = dataclasses.replace(cfg.monitor, trackers=("tensorboard", "wandb", "mlflow"))
    capsys.readouterr()
    began = time.monotonic()
    summary = train.train(dataclasses.replace(cfg, monitor=monitor), tmp_path / "run")
    assert time.monotonic() - began < 60
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "without") and summary["loss"] == usual["loss"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracker ")]
    assert [line.split(":")[0] for line in said].count("tracker tensorboard") == 2
    assert sum("rows and texts were not recorded" in line for line in said) == 2
    logged = [call[1] for call in calls if call[0] == "scalars"]
    assert logged == [row["step"] for row in rows_of(tmp_path / "run")]
    _, figures, status = calls[-1]
    assert status == "done" and figures["loss"] == summary["loss"] and "best.loss" in figures


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def events_of(path):
    """The events of a file: records of TFRecord framing: length uint64, crc uint32, message, crc uint32."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_tensorboard_has_scalars_texts_the_configs_changes_and_the_final_figures(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    with relay.opened(("tensorboard",), facts(tmp_path, start_step=5), print) as trackers:
        trackers.scalars(10, {"eval/loss": 2.5})
        trackers.text(10, "prompt", "# not a title\nb")
        trackers.figures = {"loss": 2.25, "steps": 12.0, "broken": float("nan")}
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = list(events_of(path))
    # TensorBoard forgets events of this and later steps in older files.
    assert [event.step for event in events if event.HasField("session_log")] == [6]
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    assert values["eval/loss"][0] == 10 and values["eval/loss"][1].simple_value == 2.5
    assert values["prompt/text_summary"][1].tensor.string_val == [b"    # not a title\n    b"]
    assert values["final/loss"][0] == 12 and values["final/loss"][1].simple_value == 2.25
    plugin = {
        tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for tag, (_, value) in values.items()
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    assert len(plugin) == 3
    given = plugin["_hparams_/session_start_info"].session_start_info.hparams
    assert given["optim.learning_rate"].number_value == 0.5 and given["task.metrics"].string_value == "('a', 'b')"
    assert given["model.use_bias"].HasField("bool_value") and not given["model.use_bias"].bool_value
    experiment = plugin["_hparams_/experiment"].experiment
    assert {info.name for info in experiment.hparam_infos} == set(FACTS.changed)
    assert {info.name.tag for info in experiment.metric_infos} == {"final/loss", "final/steps"}
    assert plugin["_hparams_/session_end_info"].session_end_info.status == 1  # STATUS_SUCCESS


def test_tensorboard_goes_on_in_a_new_file_after_a_failed_write(tmp_path):
    from lm.tracking import tensorboard
    from lm.tracking.files import RunFileError

    service = tensorboard.open_service(facts(tmp_path))
    events = service.scalars.__self__
    service.scalars(1, {"eval/loss": 1.0})
    events._writer.close()
    events._writer.write_event = lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(RunFileError, match="No space left on device; free disk space"):
        service.scalars(2, {"eval/loss": 2.0})
    service.scalars(3, {"eval/loss": 3.0})
    service.finish({}, "interrupted")
    found = [event for path in (tmp_path / "tensorboard").iterdir() for event in events_of(path)]
    assert sorted(event.step for event in found for value in event.summary.value if value.tag == "eval/loss") == [1, 3]
    assert [event.step for event in found if event.HasField("session_log")] == [0], "older events are not hidden"


# --- W&B and MLflow -------------------------------------------------------------------------------------------------


def two_starts(name, workdir, said):
    """A run of 6 rows that was killed after its third, of which it had saved step 1."""
    for start, steps in ((0, (0, 1, 2)), (1, (2, 3, 4))):
        with relay.opened((name,), facts(workdir, start), said.append) as trackers:
            for step in steps:
                trackers.scalars(step, {"train/loss": 10.0 * start + step, "train/hits@10": float("nan")})
                trackers.scalars(step, {"eval/loss": 0.5})
                trackers.text(step, "the prompt", f"text {step}")
            trackers.figures = {"loss": 0.25, "steps": 4.0} if start else {}


@pytest.fixture
def unset(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(relay, "FINISH_SECONDS", 60.0)  # the first import and a new database take seconds


def test_mlflow_has_one_run_with_each_value_once(tmp_path, unset):
    for package in relay.NEEDED["mlflow"]:
        pytest.importorskip(package)
    from mlflow import MlflowClient

    said = []
    two_starts("mlflow", tmp_path, said)
    assert said == []
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("project")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14)]
    assert len(client.get_metric_history(run.info.run_id, "train/hits_10")) == 5
    assert run.info.status == "FINISHED" and run.info.run_name == "name" and run.data.metrics["final/loss"] == 0.25
    assert run.data.params["optim.learning_rate"] == "0.5" and run.data.params["task.metrics"] == "('a', 'b')"
    artifacts = tmp_path / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    (sample,) = (artifacts / "samples" / "00000004").iterdir()
    assert sample.name.startswith("the_prompt-") and sample.read_text() == "the prompt\n\ntext 4"
    assert json.loads((artifacts / "environment.json").read_text()) == FACTS.environment


def test_mlflow_keeps_samples_whose_prompts_look_alike_and_refuses_a_folder_that_was_moved(tmp_path, unset):
    for package in relay.NEEDED["mlflow"]:
        pytest.importorskip(package)
    run, said = tmp_path / "run", []
    run.mkdir()
    with relay.opened(("mlflow",), facts(run), said.append) as trackers:
        for name in ("你好", "Привет", "a" * 100, "a" * 101):
            trackers.text(1, name, "text")
    assert len([*run.glob("mlflow/artifacts/*/artifacts/samples/00000001/*")]) == 4 and not said
    before = sorted(run.rglob("*"))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with relay.opened(("mlflow",), facts(copy, 1), said.append) as trackers:
        trackers.text(2, "name", "text")
    assert "delete it and" in said[0] and str(copy) in said[0] and "1 of 1 rows and texts were not recorded" in said[1]
    assert sorted(run.rglob("*")) == before


def wandb_records(path):
    """The records of an offline run: after 7 bytes blocks of 32 KiB, as in LevelDB's logs."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])  # 1: whole; 2, 3, 4: a part
        record, at = (b"" if kind in (1, 2) else record) + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield record


def test_wandb_is_offline_in_the_runs_folder_with_each_step_once(tmp_path, unset, monkeypatch):
    wandb = pytest.importorskip("wandb")
    if not hasattr(wandb, "init"):
        pytest.skip("wandb is a folder, not the package")
    from wandb.proto import wandb_internal_pb2

    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir(), run.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    said = []
    two_starts("wandb", run, said)
    assert said == [] and list(home.rglob("*")) == [] and not (run / "wandb" / "cache").exists()
    starts, ids = [], set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        rows = []
        for record in map(wandb_internal_pb2.Record.FromString, wandb_records(path)):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert not record.run.git.remote_url
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if items:
                rows.append((record.history.step.num, json.loads(items.get("train/loss", "null"))))
        starts.append(rows)
    assert starts == [[(0, 0.0), (1, 1.0), (2, 2.0)], [(3, 13.0), (4, 14.0)]]
    assert ids == {json.loads((run / "wandb.json").read_text())["id"]}


def test_the_last_step_of_a_killed_start_is_sent_to_wandb_again_and_a_new_beginning_is_another_run(
    tmp_path, unset, monkeypatch
):
    if not hasattr(pytest.importorskip("wandb"), "init"):
        pytest.skip("wandb is a folder, not the package")
    killed = wandb_tracker.open_service(facts(tmp_path))
    for step in (1, 2):
        killed.scalars(step, {"train/loss": 1.0})
    kept = (tmp_path / "wandb.json").read_bytes()
    known = json.loads(kept)
    assert known["step"] == 1, "W&B completes step 2 when it gets a later one"
    killed.finish({}, "done")  # W&B takes an id once in a process
    (tmp_path / "wandb.json").write_bytes(kept)
    resumed = wandb_tracker.open_service(facts(tmp_path, 1))
    resumed.scalars(2, {"train/loss": 2.0})
    resumed.finish({}, "interrupted")
    found = json.loads((tmp_path / "wandb.json").read_text())
    assert (found["id"], found["step"]) == (known["id"], 2)
    anew = wandb_tracker.open_service(facts(tmp_path, 0))
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] != known["id"]
    anew.finish({}, "done")
