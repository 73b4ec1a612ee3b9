"""EleutherAI's lm-evaluation-harness (Gao et al. 2021) on a trained run: how likely texts are, and what it continues.

A context begins with BOS, as the rows of training do; the class for `transformers` does so with add_bos_token.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import input_pipeline, losses, predict
from lm import run as run_lib
from lm.config.schema import ConfigError
from lm.decoding import sampling
from lm.files import write_atomic
from lm.parallel import sharding
from lm.predict import LoadedModel
from lm.tracking.files import finite
from lm.types import Batch, Params

_LENGTHS = 64  # rows are padded to multiples of it, so that few programs are compiled
_NEW = 256  # ids of a text whose task names no number, as in the harness
_NEW_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is set counts
_SETTINGS = ("until", *_NEW_NAMES, "do_sample", "temperature", "top_p", "top_k")


class Scored(NamedTuple):
    """log P of a continuation given its context, in nats; whether each id of it is the most likely one, or tied."""

    log_prob: float
    is_greedy: bool


def check(loaded: LoadedModel) -> None:
    """Raises ConfigError if the harness is not installed, or the run is no decoder that predicts tokens."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the evaluation harness needs the package {error.name}: pip install -e '.[harness]'"
        ) from None
    cfg = loaded.config
    if cfg.model.kind != "decoder":
        raise ConfigError(
            f"the harness scores texts by a decoder, and 'model.kind' of {loaded.name} is {cfg.model.kind}"
        )
    sampling.check_kind(cfg)


def score(
    loaded: LoadedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], counts: Counter[str]
) -> Iterator[tuple[int, Scored]]:
    """Yields (number of the pair, its score), longest rows first, so that what does not fit into memory shows at once.

    Rows of about the same length are computed together, and padding is a segment of its own: no score depends on what
    else is scored.

    Args:
      loaded: a decoder.
      pairs: (ids of the context, at least one; ids of the continuation). What exceeds the positions of the model is
        cut from the start of the context, and counted.
      counts: 'context_cut' is increased.

    Raises:
      ConfigError: a continuation has no ids, or more than the model has positions.
    """
    most, rows = loaded.config.model.max_len, loaded.batch_size
    for number, (_, continuation) in enumerate(pairs):
        if not continuation:
            raise ConfigError(
                f"continuation {number} has no ids of its own: the tokenizer joins it with the end of its context, or "
                "it is empty; separate them by the task's 'target_delimiter', which is a space by default"
            )
        if len(continuation) > most:
            raise ConfigError(f"continuation {number} has {len(continuation)} ids; the model has {most} positions")
    whole = [([*context, *continuation], len(continuation)) for context, continuation in pairs]
    counts["context_cut"] += sum(len(ids) - 1 > most for ids, _ in whole)
    whole = [(ids[-most - 1 :], n) for ids, n in whole]
    order = sorted(range(len(whole)), key=lambda i: -len(whole[i][0]))
    run_step = jax.jit(_step(loaded))
    with jax.set_mesh(loaded.mesh):
        place = run_lib.placer(loaded.mesh, rows)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            length = min(most, -(-(len(whole[chosen[0]][0]) - 1) // _LENGTHS) * _LENGTHS)
            batch = _batch([whole[i] for i in chosen], rows, max(length, 1))
            log_probs_B, is_greedy_B = jax.device_get(run_step(loaded.everywhere["params"], place(batch)))
            for i, log_prob, is_greedy in zip(chosen, log_probs_B, is_greedy_B, strict=False):
                yield i, Scored(float(log_prob), bool(is_greedy))


def _batch(some: Sequence[tuple[Sequence[int], int]], rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of ids without the last, and the last n ids of each as targets; [B, L]."""
    shape = (rows, length)
    names = ("tokens", "targets", "segment_ids", "loss_weights")
    batch = {name: np.zeros(shape, np.float32 if name == "loss_weights" else np.int32) for name in names}
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    for row, (ids, n) in enumerate(some):
        end = len(ids) - 1
        batch["tokens"][row, :end], batch["targets"][row, :end] = ids[:-1], ids[1:]
        batch["segment_ids"][row, :end] = 1
        batch["loss_weights"][row, end - n : end] = 1
    return batch


def _step(loaded: LoadedModel) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """(log P of the targets, whether all are the most likely ids) of each row: float32 [B], bool [B]."""
    cfg, size = loaded.config, loaded.tokenizer.vocab_size

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        out = loaded.model.apply(params, batch)

        def one(hidden_LxD: jax.Array, targets_L: jax.Array, weights_L: jax.Array) -> tuple[jax.Array, jax.Array]:
            options = {"vocab_size": size, "softcap": cfg.model.logit_softcap, "chunk_len": cfg.loss.chunk_len}
            row = (hidden_LxD[None], out.unembed_DxV, targets_L[None], weights_L[None])
            terms = losses.token_cross_entropy(*row, **options)
            correct, weight = terms.metrics["accuracy"]
            return -terms.sum, correct == weight

        log_probs_B, is_greedy_B = jax.vmap(one)(out.pre_logits_BxLxD, batch["targets"], batch["loss_weights"])
        # Replicated: every process reads all of them.
        return sharding.constrain(log_probs_B, None), sharding.constrain(is_greedy_B, None)

    return step


def continuations(
    loaded: LoadedModel, contexts: Sequence[Sequence[int]], settings: Mapping[str, Any], counts: Counter[str]
) -> list[str]:
    """The text that follows each context, up to one of the strings 'until'.

    Args:
      loaded: a decoder.
      contexts: ids, at least one each. What leaves no room for the new ids is cut from the start, and counted.
      settings: of the harness: 'until', 'max_gen_toks' or another of its names, 'do_sample', 'temperature', 'top_p',
        'top_k'; None stands for the default.
      counts: 'context_cut' is increased.

    Raises:
      ConfigError: an unknown setting, or more new ids than the model has positions.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.get("num_beams") == 1:  # no beam search
        del settings["num_beams"]
    if unknown := sorted(settings.keys() - set(_SETTINGS)):
        raise ConfigError(f"unknown setting of generation '{unknown[0]}'; expected some of {', '.join(_SETTINGS)}")
    tokenizer, new = loaded.tokenizer, int(next((settings[name] for name in _NEW_NAMES if name in settings), _NEW))
    until = settings.get("until") or ()
    # A control symbol is in no text, and those that end a text end it anyway.
    controls = {tokenizer.piece(int(i)) for i in np.flatnonzero(tokenizer.is_control_V)}
    stop = tuple(one for one in ([until] if isinstance(until, str) else until) if one and one not in controls)
    is_drawn = settings.get("do_sample", float(settings.get("temperature", 0.0)) > 0)
    changes = {
        "max_new_tokens": new,
        "min_new_tokens": 0,
        "stop": stop,
        "temperature": float(settings.get("temperature", 1.0)) if is_drawn else 0.0,
        "top_p": float(settings.get("top_p", 1.0)),
        "top_k": int(settings.get("top_k", 0)),
        "repetition_penalty": 1.0,
    }
    cfg = sampling.changed(loaded.config, changes)
    if (room := cfg.model.max_len - new) < 1:
        raise ConfigError(f"{new} new ids (max_gen_toks) leave no room for a context in {cfg.model.max_len} positions")
    counts["context_cut"] += sum(len(ids) > room for ids in contexts)
    of_run = dataclasses.replace(loaded, config=cfg)
    made = predict.continued(of_run, [list(ids[-room:]) for ids in contexts], beams=0)
    return [one.text for (one,) in made]


def model(loaded: LoadedModel, counts: Counter[str]) -> Any:
    """The run as a model of the harness, which asks for a subclass of its own class."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    tokenizer = loaded.tokenizer

    class Run(TemplateLM):  # type: ignore[misc]
        eot_token_id = tokenizer.eos_id
        prefix_token_id = tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [*([tokenizer.bos_id] if add_special_tokens is not False else []), *tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            found = score(loaded, [(context, continuation) for _, context, continuation in requests], counts)
            scored = dict(input_pipeline.progress(found, "scoring", len(requests)))
            return [tuple(scored[i]) for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            most, pairs, owners = loaded.config.model.max_len, [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, most, 1)
                for pair in map(utils.make_disjoint_window, windows):
                    pairs.append(pair)
                    owners.append(number)
            totals = [0.0] * len(requests)
            for i, scored in input_pipeline.progress(score(loaded, pairs, counts), "scoring", len(pairs)):
                totals[owners[i]] += scored.log_prob
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts: dict[int, str] = {}
            alike: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
            for settings, numbers in alike.items():
                contexts = [self.tok_encode(requests[i].args[0]) for i in numbers]
                texts |= zip(numbers, continuations(loaded, contexts, json.loads(settings), counts), strict=True)
            return [texts[i] for i in range(len(requests))]

    return Run()


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    include_path: str = "",
    shots: int | None = None,
    limit: int = 0,
) -> tuple[dict[str, Any], str]:
    """(what the harness found, with what was cut, its table).

    Args:
      loaded: a decoder.
      tasks: names.
      include_path: folder of further tasks as YAML; they may name code, which the harness executes.
      shots: examples in a prompt; None = as the tasks say.
      limit: of examples of each task, for a trial; 0 = all.

    Raises:
      ConfigError: as `check`, or an unknown task.
    """
    check(loaded)
    from lm_eval import evaluator, utils
    from lm_eval.tasks import TaskManager

    counts = Counter[str](context_cut=0)
    manager = TaskManager(include_path=include_path or None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ConfigError(f"the harness has no task '{unknown[0]}'; `lm_eval ls tasks` lists them")
    found = evaluator.simple_evaluate(
        model(loaded, counts), tasks=list(tasks), num_fewshot=shots, limit=limit or None, task_manager=manager
    )
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    out = {"run": loaded.name, "checkpoint": loaded.fingerprint, "counts": dict(counts)}
    return out | {key: found[key] for key in kept if key in found}, utils.make_table(found)


def write(found: Mapping[str, Any], out: Path) -> None:
    """Writes what `evaluate` found as JSON."""
    write_atomic(out, json.dumps(finite(json.loads(json.dumps(found, default=str))), indent=1) + "\n")
