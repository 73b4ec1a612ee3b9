"""Chats with a run in the terminal: a chat model answers in a conversation, other models continue the text.

python tools/chat.py --workdir=runs/quickstart/sft [--temperature=0.8] [--top_p=0.9] [--prompt="one question"]
"""

import sys
from collections.abc import Iterator

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; DIR@best or DIR@STEP for another checkpoint.")
_PROMPT = flags.DEFINE_string("prompt", "", "Answer this and exit, instead of reading from the terminal.")
_GENERATE = command_line.define_generate(
    *("temperature", "top_k", "top_p", "max_new_tokens", "min_new_tokens", "stop", "repetition_penalty")
)
_BEAMS = flags.DEFINE_integer("beams", 0, "Beam size of beam search; 0 = sampling.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")


def main(argv: list[str]) -> None:
    """Loads the run's newest checkpoint (or the one asked for) and answers until the input ends."""
    command_line.arguments(argv)
    if _WORKDIR.value is None:
        stop("error: --workdir=DIR is needed; --help explains it")
    with command_line.one_line_errors():
        talk(_WORKDIR.value)


def talk(workdir: str) -> None:
    """Answers --prompt, or each line of the input."""
    import jax

    from lm import run as run_lib
    from lm import tasks
    from lm.config import schema
    from lm.decoding import beam_search, sampling
    from lm.tasks import chat

    cfg, model, params, tokenizer = run_lib.load_model(workdir)
    changes, beams = _GENERATE(), _BEAMS.value
    cfg = sampling.changed(cfg, changes)
    sampling.check_options(cfg, changes, beams=beams)
    room = sampling.prompt_room(cfg)
    if room < 2:
        raise schema.ConfigError(
            f"--max_new_tokens={cfg.generate.max_new_tokens} leaves no room for a prompt in the {cfg.data.seq_len} "
            "positions that this run was trained on"
        )
    key = jax.random.key(_SEED.value)
    is_chat = tasks.task_of(cfg).prompt is chat.CHAT.prompt
    turns: list[chat.Message] = []
    say(f"{'chat' if is_chat else 'text continuation'} model, {workdir}; end with Ctrl-D", file=sys.stderr)
    for number, line in enumerate([_PROMPT.value] if _PROMPT.value else typed_lines()):
        if is_chat:
            conversation = [*turns, {"role": "user", "content": line}]
            try:
                turns = chat.recent_prompt(conversation, tokenizer, room)
            except schema.ConfigError as error:
                if _PROMPT.value:
                    raise
                say(f"({error}; not asked)", file=sys.stderr)
                continue
            if left_out := len(conversation) - len(turns):
                say(f"(the oldest {left_out} turns of the conversation no longer fit)", file=sys.stderr)
            ids = chat.prompt_ids(turns, tokenizer)
        else:
            ids = truncate(sampling.encode_prompt(line, tokenizer, cfg), room)
        if beams:
            ((made,),) = beam_search.search(model, params, [ids], cfg, tokenizer, beams=beams)
        else:
            (made,) = sampling.sample(model, params, [ids], jax.random.fold_in(key, number), cfg, tokenizer)
        answer = sampling.text_of(made.ids, tokenizer, cfg)
        if is_chat:
            turns.append({"role": "assistant", "content": answer})
        say(answer)


def truncate(ids: list[int], room: int) -> list[int]:
    """The first id (BOS) and the last `room` - 1 ids, where there are more than `room`."""
    if len(ids) > room:
        say(f"(only the last {room - 1} ids of the text fit)", file=sys.stderr)
        return [ids[0], *ids[-(room - 1) :]]
    return ids


def typed_lines() -> Iterator[str]:
    """Lines of the input, without empty ones."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


if __name__ == "__main__":
    command_line.run(main)
