"""tools/chat.py: a single prompt, a conversation, and errors in one line."""

import dataclasses
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lm import run as run_lib
from lm import train
from lm.decoding import sampling
from tests import tool_modules, toys

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is 2 and 2?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A chat model trained for two steps."""
    folder = tmp_path_factory.mktemp("chat")
    cfg = toys.recipe(
        toys.write_chats(folder / "chats.jsonl"),
        train__total_steps=2,
        optim__warmup_steps=0,
        model__num_layers=1,
        data__seq_len=48,
        generate__max_new_tokens=8,
        model__dropout=0.0,
        optim__ema_decay=0.0,
        eval__at_start=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        train.train(cfg, folder / "run")
    return folder / "run"


@pytest.fixture
def talk(monkeypatch, capsys):
    """(*arguments, typed=lines) -> (exit status or message, standard output, standard error)."""

    def call(*arguments, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = 0
        try:
            tool_modules.call("chat", *arguments)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


@functools.cache
def loaded(run: Path):
    return run_lib.load_model(str(run))


def greedy(run, *, turns, new: int = 8) -> str:
    """The model's answer to a conversation, computed with `lm.decoding.sampling` directly."""
    cfg, model, params, words = loaded(run)
    ids = [words.bos_id]
    for number, text in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        ids += [words.role_ids[role], *words.encode(text), words.end_of_turn_id]
    prompt = [*ids, words.role_ids["assistant"]]
    chosen = {"temperature": 0.0, "max_new_tokens": new}
    cfg = dataclasses.replace(cfg, generate=dataclasses.replace(cfg.generate, **chosen))
    (made,) = sampling.sample(model, params, [prompt], jax.random.key(0), cfg, words)
    return sampling.text_of(made.ids, words, cfg)


def test_a_prompt_is_answered_and_the_program_exits(run):
    result = subprocess.run(
        [sys.executable, "tools/chat.py", f"--workdir={run}", f"--prompt={QUESTION}", "--temperature=0"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == greedy(run, turns=[QUESTION]) + "\n"
    assert f"chat model, {run}" in result.stderr and "Traceback" not in result.stderr


def test_an_answer_depends_on_the_conversation_so_far(run, talk):
    arguments = (f"--workdir={run}", "--temperature=0", "--max_new_tokens=2")
    status, out, _ = talk(*arguments, typed=f"{QUESTION}\n\nand 3?\n")
    first = greedy(run, turns=[QUESTION], new=2)
    second = greedy(run, turns=[QUESTION, first, "and 3?"], new=2)
    assert (status, out) == (0, f"{first}\n{second}\n")


def test_a_conversation_longer_than_the_model_loses_its_oldest_turns(run, talk):
    arguments = (f"--workdir={run}", "--temperature=0", "--max_new_tokens=2")
    *_, words = loaded(run)
    long = "a long, long question"
    assert 46 / 2 - 2 < len(words.encode(long)) + 2 < 35  # one of them fits, two do not
    status, out, err = talk(*arguments, typed=f"{long}\n{long}\n{long * 9}\n3?\n")
    first = greedy(run, turns=[long], new=2)
    last = greedy(run, turns=[long, first, "3?"], new=2)
    assert (status, out) == (0, f"{first}\n{first}\n{last}\n")
    assert err.count("(the oldest 2 turns of the conversation no longer fit)") == 1
    assert err.count("ids with its marks, but there is room for 46; not asked)") == 1


def test_an_answer_is_cut_before_a_stop_string(run, talk):
    whole = greedy(run, turns=[QUESTION])
    string = whole[2:4]
    assert string in whole
    arguments = (f"--workdir={run}", f"--prompt={QUESTION}", "--temperature=0")
    _, out, _ = talk(*arguments, "--stop=no such text", f"--stop={string}")
    assert out == whole.partition(string)[0] + "\n" != whole + "\n"
    _, out, _ = talk(*arguments, "--repetition_penalty=3")
    assert out != whole + "\n"


def test_an_answer_by_one_beam_is_the_greedy_one(run, talk):
    _, out, _ = talk(f"--workdir={run}", f"--prompt={QUESTION}", "--beams=1")
    assert out == greedy(run, turns=[QUESTION]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={run}er"], "no checkpoint under '{run}er/checkpoints': expected the --workdir of a finished run"),
        (["--workdir={run}@7"], "'{run}@7': expected latest, best or one of the steps 2"),
        (["--workdir={run}", "--top_p=0"], "'generate.top_p' must be in (0, 1], got 0.0"),
        (["--workdir={run}", "--temperature=-1"], "'generate.temperature' must not be negative, got -1.0"),
        (["--workdir={run}", "--max_new_tokens=0"], "'generate.max_new_tokens' must be at least 1, got 0"),
        (
            ["--workdir={run}", "--max_new_tokens=47"],
            "--max_new_tokens=47 leaves no room for a prompt in the 48 positions",
        ),
        (["--workdir={run}", "--max_new_tokens=44"], "the question has "),
        (["--workdir={run}", "--min_new_tokens=9"], "'generate.min_new_tokens' (9) is above"),
        (["--workdir={run}", "--stop=<|end|>"], "'generate.stop' has '<|end|>', a control symbol"),
        (["--workdir={run}", "--beams=2", "--top_k=3"], "'top_k' is of sampling and has no effect on a search with 2"),
    ],
)
def test_an_error_is_one_line(run, talk, arguments, message):
    status, out, err = talk(*[text.format(run=run) for text in arguments], f"--prompt={QUESTION}")
    assert isinstance(status, str) and status.startswith("error: " + message.format(run=run))
    assert "\n" not in status and out == "" and "Traceback" not in err
