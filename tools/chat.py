"""Talk to a run that generates text: a chat model answers with its history; others continue what they are given.

python tools/chat.py --workdir=runs/quickstart/sft [--temperature=0.8] [--top_p=0.9] [--prompt="one question"]
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Loads the run's newest (or best, or a given) checkpoint and answers until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run's folder; DIR@best or DIR@STEP for another checkpoint")
    parser.add_argument("--prompt", help="answer this and end, instead of reading from the terminal")
    parser.add_argument("--temperature", type=float, help="0 = always the most likely (default: the run's)")
    parser.add_argument("--top_k", type=int, help="draw from the k most likely ids (default: the run's)")
    parser.add_argument("--top_p", type=float, help="draw from the most likely ids that reach p (default: the run's)")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    args = parser.parse_args()

    from lm.checkpoint import CheckpointError
    from lm.config import schema

    try:
        talk(args)
    except (CheckpointError, schema.ConfigError) as error:
        sys.exit(f"error: {error}")


def talk(args: argparse.Namespace) -> None:
    """Reads lines, prints answers."""
    import jax

    from lm import run as run_lib
    from lm import tasks
    from lm.config import schema
    from lm.decoding import sampling
    from lm.tasks import chat
    from lm.tracking import tracker

    cfg, model, params, words = run_lib.load_model(args.workdir)
    keys = ("temperature", "top_k", "top_p", "max_new_tokens")
    chosen = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    values = schema.to_dict(cfg)
    cfg = tasks.build_config(values | {"generate": values["generate"] | chosen})
    room = sampling.prompt_room(cfg)
    if room < 2:
        raise schema.ConfigError(
            f"--max_new_tokens={cfg.generate.max_new_tokens} leaves no room for a prompt in the {cfg.data.seq_len} "
            "positions that this run was trained on"
        )
    key = jax.random.key(args.seed)
    is_chat = cfg.task.name == "chat"
    turns: list[chat.Turn] = []
    print(f"{'chat' if is_chat else 'text continuation'} model, {args.workdir}; end with Ctrl-D", file=sys.stderr)
    for turn, line in enumerate([args.prompt] if args.prompt else lines()):
        if is_chat:
            asked = [*turns, chat.encode({"role": "user", "content": line}, words, "the question")]
            try:
                turns = chat.recent_prompt(asked, words, room)
            except schema.ConfigError as error:
                if args.prompt:
                    raise
                print(f"({error}; not asked)", file=sys.stderr)
                continue
            if left_out := len(asked) - len(turns):
                print(f"(the oldest {left_out} turns of the conversation no longer fit)", file=sys.stderr)
            ids = chat.prompt_ids(turns, words)
        else:
            ids = fit(sampling.encode_prompt(line, words, cfg), room)
        made = sampling.generate(model, params, [ids], jax.random.fold_in(key, turn), cfg, words)[0]
        answer = words.decode(made)
        if is_chat:
            turns.append(chat.encode({"role": "assistant", "content": answer}, words, "the answer"))
        print(tracker.visible(answer), flush=True)


def fit(ids: list[int], room: int) -> list[int]:
    """Drops the oldest ids, but not the first (BOS), where there are more than `room`."""
    if len(ids) > room:
        print(f"(only the last {room - 1} ids of the text fit)", file=sys.stderr)
        return [ids[0], *ids[-(room - 1) :]]
    return ids


def lines() -> Any:
    """What is typed, without empty lines."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
