"""tools/inspect_batch.py: it shows the rows that a run reads."""

import base64
import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lm import config, input_pipeline
from lm.data import loader
from lm.data import tokenizer as tokenizers
from lm.tasks import TASKS, build_config, default_config
from tests import tool_modules, toys

inspect_batch = tool_modules.load("inspect_batch")
ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
from lm.tasks import default_config

def get_config():
    c = default_config("chat")
    c.data.format, c.data.path, c.data.eval_fraction = "jsonl", "{data}", 0.4
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


def test_each_token_has_its_role_weight_position_and_segment():
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


def test_documents_that_attend_to_each_other_are_one_segment():
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


def test_trained_and_masked_tokens_and_roles_have_different_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokens = [
        inspect_batch.Token("hi", 9, "user", 0.0, 0),
        inspect_batch.Token("yo", 9, "assistant", 1.0, 1),
        inspect_batch.Token("so", 9, "", 1.0, 2),
    ]
    inspect_batch.print_rows([inspect_batch.Row(0, [tokens, tokens], 0)], "", "")
    out = capsys.readouterr().out
    segments = ["\x1b[1;34m\u25021 \x1b[0m", "\x1b[1;33m\u25022 \x1b[0m"]
    for code in ("\x1b[2;36mhi", "\x1b[1;32myo", "\x1b[1;39mso", *segments):
        assert code in out, (code, out)


def test_the_rows_are_those_of_the_run(recipe):
    cfg = build_config(runpy.run_path(str(recipe))["get_config"]())
    tok, data = inspect_batch.load(cfg)
    ids = loader.train_row_ids(len(data.train), cfg.seed, 3, 4)
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


IMAGES = {"image_classification": 1, "masked_autoencoding": 2, "contrastive_images": 2}  # pictures shown of a row
ITEMS = ("next_item", "masked_item")
# What a file of each task holds, n from 0: with an escape sequence and markup in its texts.
SEES = "bees\x1b[2J see {n} <b>"
RECORDS = {
    "chat": {"messages": [{"role": "user", "content": SEES}, {"role": "assistant", "content": "yes"}]},
    "preferences": {"prompt": SEES, "chosen": "yes", "rejected": "<no>"},
    "tagging": {"words": ["bees", "see\x1b[2J", "red", "{n}"], "tags": ["N", "<V>", "N", "N"]},
    "entities": {"text": SEES, "entities": [{"start": 0, "end": 4, "label": "X"}]},
    "span_qa": {
        "question": "who?\x1b[2J",
        "context": SEES,
        "answers": [{"text": "see", "answer_start": SEES.index("see")}],
    },
    "multitask": {"text": SEES, "label": "good/<no>"},
    "regression": {"text": SEES, "text_pair": "red {n}", "label": "1.5"},
    "prompting": {"text": SEES, "label": "<no>"},
    "classification": {"text": SEES, "text_pair": "red {n}", "label": "<no>"},
    "masked_lm_pairs": {"text": "Bees see\x1b[2J red. Bees see {n}. They do. So it is {n}."},
    "next_item": {"user": "u", "items": []},
}
# More of the config, and what the terminal shows of a task; what is no task of text has its own test.
SHOWN = {
    "causal_lm": ({}, r"\[<0x1B>\]"),
    "chat": ({}, r"<\|user\|> .*<\|assistant\|> \[y\].*\[<\|end\|>\]"),
    "preferences": (
        {},
        r"1 chosen: <s> <\|user\|> .*\[y\].*\[<\|end\|>\]\s*│2 rejected: .*\[o\] \[>\] \[<\|end\|>\]",
    ),
    "prefix_lm": ({}, r"<s>/prefix .*\[</s>\]"),
    "masked_lm": ({}, r"\[<\|mask\|>/.+?\]"),
    "masked_lm_pairs": ({}, r"(A and B as in the document|B of another document), 2 segments"),
    "span_corruption": ({}, r"encoder: .*<\|extra_1\|>.*</s>\s*│2 decoder: <s> \[<\|extra_1\|>\]"),
    "translation": ({}, r"encoder: .*<0x1B>.*\s*│2 decoder: <s> .*\[</s>\]"),
    "contrastive_sentences": ({"model__dropout": 0.1}, r"view 1: <s>"),
    "contrastive_pairs": ({}, r"view 1: <s> (.|\n)*view 2: <s>"),
    "contrastive_triples": ({}, r"view 3: <s>"),
    "classification": ({"task__labels": ("yes", "<no>")}, r"label <no>, 2 segments"),
    "regression": ({}, r"label 1.5, 2 segments"),
    "multitask": ({"task__labels": ("good/yes", "good/<no>", "n/")}, r"good: <no>, 1 segments"),
    "prompting": (
        {"task__labels": ("yes", "<no>"), "task__templates": ("{text} is {label}",)},
        r"label <no>, (.|\n)*│1 yes: <s>(.|\n)*│2 <no>: <s>",
    ),
    "tagging": ({"task__labels": ("N", "<V>")}, r"\[b/N\].*/<V>\]"),
    "entities": ({"task__labels": ("O", "B-X", "I-X")}, r"\[b/B-X\].*/O\]"),
    "span_qa": ({}, r"answer 'see', 2 segments(.|\n)*s/answer ee/answer ▁ "),
    "next_item": ({}, r"<\|start\|> .*\[i\d+\]"),
    "masked_item": ({}, r"\[<\|mask\|>/i\d+\]"),
    "image_classification": ({"task__labels": ("a", "b")}, r"example 0: image 8 x 8 x 3, label [ab]\n"),
    "masked_autoencoding": ({}, r"example 0: image 8 x 8 x 3, 2 of 4 patches hidden\n"),
    "contrastive_images": ({"data__augment": (("flip", 0.5),)}, r"example 0: image 8 x 8 x 3\n"),
}


@pytest.fixture(scope="module")
def few_words():
    return tokenizers.train(["bees see red who? yes <no>"] * 9, 282, 1000)


def data_of(task, folder, c):
    """Writes what `task` reads, and says so in the config."""
    c.data.format = "jsonl"
    if task in IMAGES:
        c.data.format, c.task.image_shape = "images", (8, 8, 3)
        for n in range(24):
            path = folder / "ab"[n % 2] / f"{n}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
        return folder
    if task in ITEMS:
        c.data.format = "interactions"
        rows = [f"u{user},i{(user * 7 + t) % 9},{t}" for user in range(24) for t in range(6)]
        (folder / "chosen.csv").write_text("user,item,time\n" + "\n".join(rows) + "\n")
        return folder / "chosen.csv"
    record = RECORDS.get(task, {"text": SEES, "text_pair": "red {n}", "negative": "no"})
    text = json.dumps(record)
    if task == "translation":
        c.data.format = "parallel"
        for side in ("en", "de"):
            (folder / f"data.{side}").write_text("".join(f"bees\x1b[2J see {n}\n" for n in range(24)))
        return f"{folder}/data.{{en,de}}"
    other = text.replace("<no>", "yes").replace('"1.5"', '"2.5"')  # one label alone teaches nothing
    lines = [(other if n % 4 == 0 else text).replace("{n}", str(n)) for n in range(24)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_shown(task, tmp_path, few_words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    changes, expected = SHOWN[task]
    c = default_config(task)
    c.data.seq_len, c.data.eval_fraction, c.train.total_steps = 64, 0.3, 1
    c.model.kind = TASKS[task].models[-1]  # of a classifier, the encoder
    c.model.position = "sincos" if task in IMAGES else "learned"
    c.data.path, c.data.packing, c.tokenizer.extra_ids, c.tokenizer.vocab_size = "", "pad", 9, 32
    c.data.path = str(data_of(task, tmp_path, c))
    if "mask_rate" in c.task:
        c.task.mask_rate = 0.5 if task in IMAGES else 0.2
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    cfg = build_config(c)
    found = input_pipeline.load(cfg.data, TASKS[task].wanted(cfg))
    words = few_words
    if task in ITEMS:
        texts = [item for record in found[0].train for item in record["items"]]
        words = TASKS[task].vocabulary.train(texts, cfg.tokenizer)
    words = None if task in IMAGES else dataclasses.replace(words, extra_ids=9)
    data = input_pipeline.build(cfg, words, *found)
    for split in ("train", "valid"):
        batch = inspect_batch.batch_from(cfg, data, split, example=0, rows=3)
        rows = list(inspect_batch.read(batch, words, cfg))
        assert [row.example_index for row in rows] == [0, 1, 2]
        inspect_batch.print_rows(rows, "", TASKS[task].legend)
        out = capsys.readouterr().out
        assert re.search(expected, out), out
        assert "\x1b" not in out
        page = inspect_batch.to_html(rows, "", TASKS[task].legend)
        assert "\x1b" not in page and "<b>" not in page and "<no>" not in page and "<V>" not in page
        assert "http" not in page and not re.search('src="(?!data:)', page), "the page needs nothing else"
        notes = [token.note for row in rows for segment in row.segments for token in segment if token.note]
        assert page.count("<rt>") == len(notes)
        pictures = IMAGES.get(task, 0)
        assert page.count("<img") == 3 * pictures


def test_hidden_patches_are_grey_in_the_pictures():
    rng = np.random.default_rng(0)
    image = rng.integers(128, 256, (8, 8, 3)).astype(np.uint8)
    cfg = config.Config(task=toys.task("masked_autoencoding"))
    row = {"images": image, "visible_patches": np.array([3, 0]), "masked_patches": np.array([1, 2])}
    whole, seen = inspect_batch.pictures_of(row, cfg)
    png = base64.b64decode(inspect_batch.data_url(whole.pixels).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), image)
    is_grey = seen.pixels == 127
    assert np.all(is_grey[:4, 4:]) and np.all(is_grey[4:, :4]) and is_grey.sum() == is_grey.size / 2
    np.testing.assert_array_equal(seen.pixels[~is_grey], image[~is_grey])


def test_lines_of_the_page_break_between_words_only(few_words):
    text = "bees see\nwho? "
    ids = [few_words.bos_id, *few_words.encode(text), few_words.eos_id]
    row = {"tokens": ids, "segment_ids": [1] * len(ids), "positions": range(len(ids)), "labels": 1}
    batch = {key: np.array([x], np.int32) for key, x in row.items()} | {"example_index": [0]}
    cfg = config.Config(task=toys.task("classification", labels=("a", "b")))
    (shown,) = inspect_batch.read(batch, few_words, cfg)
    assert inspect_batch.title(shown) == f"example 0: label b, 1 segments, {len(ids)} tokens, 0 padding"
    whole = ["".join(token.text for token in word) for word in inspect_batch.words(shown.segments[0])]
    assert whole == ["<s>", "bees", "\u2581see<0x0A>", "who?", "\u2581", "</s>"]
    page = inspect_batch.to_html([shown], "", "")
    assert page.count('class="w"') == len(whole)
    assert re.search(r"\.w {[^}]*white-space: pre", page) and "overflow-wrap: anywhere" not in page
