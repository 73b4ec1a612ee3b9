"""tools/inspect_batch.py: what it shows is what a run is given."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.data import tokenizer as tokenizers
from tools import inspect_batch

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
from lm import config

def get_config():
    c = config.defaults()
    c.data.format, c.data.path, c.data.task, c.data.eval_fraction = "jsonl", "{data}", "chat", 0.2
    c.data.seq_len = 64
    c.tokenizer.vocab_size = 300
    c.train.total_steps = 1
    return c
"""


def run(*arguments, code=0):
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        cwd=ROOT,
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def recipe(tmp_path):
    turns = '{{"messages": [{{"role": "user", "content": "<q{0}>"}}, {{"role": "assistant", "content": "a{0} b"}}]}}\n'
    (tmp_path / "data.jsonl").write_text("".join(turns.format(i) for i in range(60)))
    (tmp_path / "recipe.py").write_text(RECIPE.format(data=tmp_path / "data.jsonl"))
    return tmp_path / "recipe.py"


def test_reading_a_row_gives_each_token_its_role_weight_position_and_segment():
    tok = tokenizers.train(["hello there\n"] * 9, 275, 1000)
    user, assistant, end = tok.role_ids["user"], tok.role_ids["assistant"], tok.end_of_turn_id
    (hi,) = tok.encode("h")
    (newline,) = tok.encode("\n")
    batch = {
        "tokens": [tok.bos_id, user, hi, assistant, hi, tok.bos_id, 0],
        "targets": [user, hi, assistant, hi, end, newline, 0],
        "loss_weights": [0, 0, 0, 1, 0.5, 1, 0],
        "segment_ids": [1, 1, 1, 1, 1, 2, 0],
        "positions": [0, 1, 2, 3, 4, 0, 0],
    }
    batch = {key: np.stack([row, np.zeros(7)]) for key, row in batch.items()} | {"example_index": np.array([8, 9])}
    batch = {key: x.astype(np.float32 if key == "loss_weights" else np.int32) for key, x in batch.items()}
    (row,) = inspect_batch.read(batch, tok)  # a row of padding alone is not shown
    assert (row.example_index, row.padding) == (8, 1)
    first, second = row.segments
    assert [token.id for token in first] == [tok.bos_id, user, hi, assistant, hi, end]
    assert [token.weight for token in first] == [0, 0, 0, 0, 1, 0.5]
    assert [token.role for token in first] == ["", "user", "user", "assistant", "assistant", "assistant"]
    assert [token.position for token in first] == [0, 1, 2, 3, 4, 5]
    assert [(token.text, token.role, token.weight) for token in second] == [("<s>", "", 0), ("\u23ce", "", 1)]
    assert inspect_batch.title(row) == "example 8: 2 segments, 3 trained, 1 padding"


def test_text_and_page_show_the_same_batch(recipe, tmp_path):
    page = tmp_path / "batch.html"
    common = ("tools/inspect_batch.py", f"--config={recipe}", "--rows=2")
    out = run(*common, "--example=3", f"--html={page}").stdout
    titles = re.findall(r"^example .*$", out, re.MULTILINE)
    assert [title.split(":")[0] for title in titles] == ["example 3", "example 4"]
    trained = [int(re.search(r"(\d+) trained", title)[1]) for title in titles]
    assert out.count("[<|end|>]") == out.count("<|assistant|>") > 0 and "[<|user|>]" not in out
    text = page.read_text()
    for title in titles:
        assert title in text
    body = text.split("</p>")[-1]
    assert sum(trained) == len(re.findall(r'class="t \w+ trained"', body))
    assert len(re.findall(r'class="t assistant trained"', body)) == sum(trained)
    assert "<q" not in text and "http" not in text and text.count("&lt;") > 4  # content is escaped, nothing is fetched
    assert "valid: documents" in run(*common, "--split=valid").stdout


def test_errors_are_one_line(recipe):
    def error(*options):
        return run("tools/inspect_batch.py", *options, code=1).stderr.strip()

    assert (
        error() == "error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them"
    )
    assert error(f"--config={recipe}", "--config.data.task=text").startswith("error: ")
    assert "set data.task=chat" in error(f"--config={recipe}", "--config.data.task=text")


def test_help_imports_nothing_heavy():
    heavy = {"jax", "grain", "sentencepiece", "numpy", "rich"}
    code = f"import sys, tools.inspect_batch; print(sorted({heavy} & set(sys.modules)))"
    assert run("-c", code).stdout.strip() == "[]"
    assert "--html" in run("tools/inspect_batch.py", "--help", code=1).stdout
