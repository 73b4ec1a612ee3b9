"""tools/inspect_batch.py: what it shows is what a run is given."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm import config
from lm.data import feed
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
        env=os.environ | {"COLUMNS": "200"},
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
    tok = tokenizers.train(["hello\nthere"] * 9, 275, 1000)
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


def test_documents_that_see_each_other_are_shown_whole():
    tok = tokenizers.train(["hello there"] * 9, 275, 1000)
    user, end = tok.role_ids["user"], tok.end_of_turn_id
    row = {"tokens": [tok.bos_id, user, tok.bos_id], "targets": [user, end, user], "loss_weights": [0, 1, 0]}
    row |= {"segment_ids": [1, 1, 1], "positions": [0, 1, 2]}
    (shown,) = inspect_batch.read({key: np.array([x]) for key, x in row.items()} | {"example_index": [0]}, tok)
    found = [(token.id, token.role, token.weight, token.position) for token in shown.segments[0]]
    assert found == [(1, "", 0, 0), (user, "user", 0, 1), (end, "user", 1, 2), (1, "", 0, 2), (user, "user", 0, 3)]


def test_text_and_page_show_the_rows_of_the_stream(recipe, tmp_path):
    page = tmp_path / "batch.html"
    out = run("tools/inspect_batch.py", f"--config={recipe}", "--rows=2", "--example=3", f"--html={page}").stdout
    titles = re.findall(r"^example .*$", out, re.MULTILINE)
    assert [title.split(":")[0] for title in titles] == ["example 3", "example 4"]
    trained = sum(int(re.search(r"(\d+) trained", title)[1]) for title in titles)
    assert out.count("[<|end|>]") == out.count("<|assistant|>") > 0 and "[<|user|>]" not in out
    text = page.read_text()
    assert all(title in text for title in titles)
    body = text.split("</p>")[-1]
    assert trained == len(re.findall(r'class="t \w+ trained"', body)) > 0
    assert trained == len(re.findall(r'class="t assistant trained"', body))
    assert "<q" not in text and text.count("&lt;|user|&gt;") == text.count("&lt;|assistant|&gt;") > 0
    assert "http" not in text and "src=" not in text, "the page needs nothing else"


def test_colours_tell_trained_from_masked_and_the_roles_apart(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokens = [
        inspect_batch.Token("hi", 9, "user", 0.0, 0),
        inspect_batch.Token("yo", 9, "assistant", 1.0, 1),
        inspect_batch.Token("so", 9, "", 1.0, 2),
    ]
    inspect_batch.print_rows([inspect_batch.Row(0, [tokens, tokens], 0)], "")
    out = capsys.readouterr().out
    segments = ["\x1b[1;34m\u25021 \x1b[0m", "\x1b[1;33m\u25022 \x1b[0m"]
    for code in ("\x1b[2;36mhi", "\x1b[1;32myo", "\x1b[1;39mso", *segments):
        assert code in out, (code, out)


def test_the_rows_are_those_of_the_run(recipe):
    cfg = config.build(runpy.run_path(str(recipe))["get_config"]())
    tok, data = inspect_batch.load(cfg)
    ids = feed.train_row_ids(len(data.train), cfg.seed, 3, 4)
    batch = inspect_batch.batch_from(cfg, data, "train", example=3, rows=4)
    np.testing.assert_array_equal(batch["tokens"], data.train.rows["tokens"][ids])
    assert batch["example_index"].tolist() == [3, 4, 5, 6]
    valid = inspect_batch.batch_from(cfg, data, "valid", example=1, rows=2)
    np.testing.assert_array_equal(valid["tokens"], data.valid.rows["tokens"][1:3])
    assert [row.example_index for row in inspect_batch.read(valid, tok)] == [1, 2]
    with pytest.raises(SystemExit, match="an evaluation has only"):
        inspect_batch.batch_from(cfg, data, "valid", example=999, rows=2)


def test_errors_are_one_line(recipe):
    def error(*options):
        return run("tools/inspect_batch.py", *options, code=1).stderr.strip()

    assert error().startswith("error: --config=configs/NAME.py is needed")
    assert error(f"--config={recipe}", "--config.data.seq_len=0") == "error: 'data.seq_len' must be at least 1, got 0"


def test_help_imports_nothing_heavy():
    heavy = {"jax", "grain", "sentencepiece", "numpy", "rich"}
    code = f"import sys, tools.inspect_batch; print(sorted({heavy} & set(sys.modules)))"
    assert run("-c", code).stdout.strip() == "[]"
    assert "--html" in run("tools/inspect_batch.py", "--help", code=1).stdout
