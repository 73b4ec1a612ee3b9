"""tools/kills.py: kills at every moment of a write change nothing, and the tool notices when they do."""

import os

import pytest

from tests import tool_modules

kills = tool_modules.load("kills")


@pytest.mark.parametrize(
    ("event", "path", "kind"),
    [
        ("os.mkdir", "checkpoints/3.orbax-checkpoint-tmp", "checkpoint"),
        ("open", "checkpoints/3.orbax-checkpoint-tmp/tokenizer.model", "checkpoint"),
        ("os.rename", "checkpoints/3.orbax-checkpoint-tmp/state", "checkpoint"),
        ("os.rename", "checkpoints/3", "commit"),
        ("os.rename", "checkpoints/1.deleted", "retention"),
        ("os.remove", "checkpoints/1.deleted/state/_METADATA", "retention"),
        ("open", ".metrics.jsonl.host-12.tmp", "metrics"),
        ("os.rename", "summary.json", "summary"),
        ("open", ".saved.json.host-12.tmp", "saved step"),
        ("open", "lease.1", "lease"),
        ("open", "tensorboard/events", ""),
        ("open", "../elsewhere", ""),
    ],
)
def test_file_operations_are_told_apart(event, path, kind, tmp_path):
    assert kills.kind_of(event, os.path.normpath(tmp_path / path), tmp_path) == kind


def test_a_doubled_row_and_a_changed_bit_are_differences():
    usual = {"rows": [{"step": 1, "loss": 2.0}], "state": {"a": b"\0\1"}, "files": ["summary.json"]}
    assert kills.difference(usual | {"info": {"seconds": 3}}, usual) == ""
    assert "rows: 2 for 1" in kills.difference(usual | {"rows": usual["rows"] * 2}, usual)
    assert "state" in kills.difference(usual | {"state": {"a": b"\0\0"}}, usual)
    assert "files" in kills.difference(usual | {"files": ["summary.json", ".summary.json.h-1.tmp"]}, usual)


@pytest.mark.slow
def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    done = kills.kill_runs(tmp_path, count=6, seed=1)
    assert done.total() == 6 and done["any time"] < 6
