"""Training an encoder-decoder on two files, and translating with it."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import sacrebleu

from lm import run as run_lib
from lm import train
from lm.decoding import sampling
from tests import tool_modules, toys

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
LEXICON = {"a": "ein", "dog": "Hund", "cat": "Kater", "and": "und", "sees": "sieht", "red": "roter", "big": "großer"}


def write_side(path: Path, rows: int, words: dict[str, str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [" ".join(words[w] for w in rng.choice(list(words), int(rng.integers(2, 6)))) for _ in range(rows)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained until it has begun to translate; beside it 'test.en' and 'test.de'."""
    folder = tmp_path_factory.mktemp("translate")
    for name, rows in (("train", 200), ("test", 5)):
        write_side(folder / f"{name}.en", rows, {word: word for word in LEXICON}, rows)
        write_side(folder / f"{name}.de", rows, LEXICON, rows)
    cfg = toys.recipe(
        folder / "train.{en,de}",
        **{"data__format": "parallel", "task__name": "translation", "data__packing": "pad", "data__seq_len": 16},
        **{"model__kind": "encoder_decoder", "model__position": "relative"},
        **{
            "model__init": "fan_in",
            "model__embed_dim": 32,
            "model__dropout": 0.0,
            "optim__learning_rate": 1e-2,
            "optim__ema_decay": 0.0,
        },
        **{"train__total_steps": 100, "monitor__log_every_steps": 50, "eval__at_start": False},
        **{"generate__prompts": ("a dog",), "generate__max_new_tokens": 12, "generate__temperature": 0.0},
    )
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        summary = train.train(cfg, folder / "run")
    return folder, summary


@pytest.fixture
def translate(capsys):
    def call(*arguments):
        tool_modules.call("translate", *arguments)
        return capsys.readouterr().out

    return call


def test_one_beam_equals_greedy_generation_and_is_scored(run, translate):
    folder, _ = run
    out = translate(folder / "run", f"--path={folder}/test.{{en,de}}", "--beams=1", "--batch_size=2")
    cfg, model, params, words = run_lib.load_model(str(folder / "run"))
    sources = (folder / "test.en").read_text().splitlines()
    prompts = [sampling.encode_prompt(text, words, cfg) for text in sources]
    made = sampling.sample(model, params, prompts, jax.random.key(0), cfg, words)
    written = (folder / "run" / "translations.txt").read_text(encoding="utf-8").splitlines()
    assert written == [" ".join(words.decode(each.ids).split()) for each in made]
    bleu = sacrebleu.corpus_bleu(written, [(folder / "test.de").read_text(encoding="utf-8").splitlines()]).score
    assert float(re.search(r"BLEU ([\d.]+)", out)[1]) == pytest.approx(bleu, abs=0.01)
    assert "\nBLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in out and "\nchrF nrefs:1|" in out
    as_words = translate(folder / "run", f"--path={folder}/test.{{en,de}}", "--limit=2", "--bleu_tokenizer=char")
    assert "|tok:char|" in as_words


def test_a_trained_model_translates(run, translate):
    """The language has seven words, translated one by one; an untrained model scores near 0."""
    folder, _ = run
    out = translate(folder / "run", f"--path={folder}/test.{{en,de}}", "--beams=3", "--limit=4", f"--out={folder}/out")
    assert float(re.search(r"chrF ([\d.]+)", out)[1]) > 40
    assert len((folder / "out").read_text().splitlines()) == 4


def test_an_error_is_one_line(run, translate):
    folder, _ = run
    with pytest.raises(SystemExit, match=r"error: data path .*expected the two sides once in braces"):
        translate(folder / "run", f"--path={folder}/test.en")
    with pytest.raises(SystemExit, match=r"error: 'task\.bleu_tokenizer' words: sacrebleu has 13a, char"):
        translate(folder / "run", f"--path={folder}/test.{{en,de}}", "--bleu_tokenizer=words")
