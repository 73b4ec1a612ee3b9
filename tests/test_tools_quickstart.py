"""tools/quickstart.py: what it prints of runs that are done."""

import json

from lm.tracking import files
from tests import tool_modules


def test_answers_are_shown_beside_those_before_also_where_these_are_missing(tmp_path, capsys):
    """A run that was killed between its first evaluation and the file of samples has none of step 0."""
    summary = {"steps": 20, "before": {"nll": 3.8}, "nll": 2.9, "trained_parameters": 10, "parameters": 1000}
    files.write_document(tmp_path / "summary.json", summary)
    rows = [
        {"step": 0, "name": "first?", "text": "early"},
        {"step": 20, "name": "first?", "text": "late"},
        {"step": 20, "name": "second?", "text": "only"},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool_modules.load("quickstart").show_answers(tmp_path, 5.0)
    out = capsys.readouterr().out
    first, second = (next(line for line in out.splitlines() if name in line) for name in ("first?", "second?"))
    assert "early" in first and "late" in first and "only" in second
    out = " ".join(out.split())  # lines are broken at the width of the terminal
    assert "3.800 before, 2.900 after" in out and "10 of 1,000 parameters" in out
