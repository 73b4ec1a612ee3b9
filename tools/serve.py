"""Serves a trained run by HTTP, in OpenAI's form, to try it: completions, chats, embeddings, labels.

    python tools/serve.py --run=runs/gsm8k_sft@best

It listens on this machine alone unless --host says otherwise, which needs a key: LM_API_KEY or --api_key. Ctrl-C ends
it. docs/serving.md shows clients.
"""

import os

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUN = flags.DEFINE_string("run", None, "The run's folder; RUN@best or RUN@STEP for another checkpoint.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Name or address to listen at.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 = any that is free.")
_API_KEY = flags.DEFINE_string("api_key", None, "Key that clients must have (default: $LM_API_KEY, if it is set).")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prompts or records computed together.", lower_bound=1)
_MOST_WAITING = flags.DEFINE_integer("most_waiting", 256, "Prompts and records that may wait; others get status 503.")


def main(argv: list[str]) -> None:
    """Loads the run and serves it until Ctrl-C."""
    command_line.arguments(argv)
    if _RUN.value is None:
        stop("error: --run=RUN is needed; --help explains it")
    with command_line.one_line_errors():
        serve(_RUN.value)


def serve(run: str) -> None:
    """Serves a run, and says how it is asked."""
    from lm import compilation_cache, predict, serving

    key = os.environ.get("LM_API_KEY", "") if _API_KEY.value is None else _API_KEY.value
    options = serving.Options(_HOST.value, _PORT.value, key, _MOST_WAITING.value)
    serving.check_options(options)  # before a model is loaded
    compilation_cache.use("auto")
    loaded = predict.load(run, batch_size=_BATCH_SIZE.value)
    with serving.serving(loaded, options) as server:
        say(f"{server.model} at {server.url}/v1; Ctrl-C ends it")
        for path, why_not in server.endpoints.items():
            say(f"  {path}: {why_not or 'yes'}")
        say(f"for example: {serving.example(server, bool(key))}")
        server.wait()


if __name__ == "__main__":
    command_line.run(main)
