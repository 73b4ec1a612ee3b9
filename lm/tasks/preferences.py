"""Direct preference optimisation on pairs of a chosen and a rejected answer (DPO, Rafailov et al. 2023)."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config
from lm.config.schema import ConfigError
from lm.data.chat_template import Message
from lm.data.example import Columns, Example
from lm.data.record import Record, Wanted
from lm.data.tokenizer import Tokenizer
from lm.tasks.base import Predictor, Task, shifted, shifted_columns, views_as_rows
from lm.tasks.chat import CHAT, Tokens, recent_turns, size, tokens_of, up_to_the_last_trained
from lm.tasks.language_modelling import log_likelihood
from lm.types import Apply, Batch, LossFnWithStart, LossTerms, Outputs, Params

ANSWERS = ("chosen", "rejected")  # in the order of a row's views
FIELDS = ("prompt", *ANSWERS)


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """Options of learning from preference pairs."""

    name: str = "preferences"
    beta: float = 0.1  # the larger, the closer the model stays to its start
    flip_rate: float = 0.0  # assumed share of pairs with swapped labels (conservative DPO, Mitchell 2023)


def check(cfg: Config) -> None:
    """Raises ConfigError if no preference could be learnt with these options."""
    if cfg.task.beta <= 0:
        raise ConfigError(f"'task.beta' must be greater than 0, got {cfg.task.beta}")
    if not 0 <= cfg.task.flip_rate < 0.5:
        raise ConfigError(
            f"'task.flip_rate' is {cfg.task.flip_rate}; expected a share in [0, 0.5): pairs with half of them swapped "
            "teach nothing"
        )


def answer_pair(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The prompt with each of its two answers, formatted as in `lm.tasks.chat.chat`; only the answers are trained on.

    Worked, <u> <a> role symbols and . the end of turn, for user 'hi', chosen 'yo', rejected 'no no':

        tokens   BOS <u> hi  .  <a> yo  0      BOS <u> hi  .  <a> no no
        targets  <u> hi  .  <a> yo  .   0      <u> hi  .  <a> no no  .
        weights   0   0  0   0  1   1   0       0   0  0   0  1  1   1

    Longer than seq_len: `data.overlong` applies to the longer answer; both keep the same prompt. Counts of pairs:
    prompts_shortened (the prompt's oldest turns were removed, see `recent_turns`), answers_cut (the last request and an
    answer are longer than a row; the answer's end was cut), pairs_truncated (data.overlong=truncate: the end was cut),
    dropped_long_prompt (the prompt leaves no room for an answer), dropped_overlong (data.overlong=drop),
    dropped_equal_answers (the answers are equal, or are after cutting), dropped_no_target (an answer has no trained
    token).

    Returns:
      One example of tokens, targets, loss_weights, segment_ids and positions [2, L], the chosen answer first.

    Raises:
      DataError: a role is unknown; the chat template cannot be used for this conversation.
    """
    prompt: list[Message] = [{**message, "weight": 0} for message in record["prompt"]]
    answers = [up_to_the_last_trained(record[field]) for field in ANSWERS]
    room = cfg.data.seq_len

    def pair(some: Sequence[Message]) -> list[Tokens]:
        return [tokens_of([*some, *answer], tokenizer, str(record["source"])) for answer in answers]

    if not all(answers):
        counts["dropped_no_target"] += 1
        return []
    both = pair(prompt)
    if max(map(size, both)) > room and cfg.data.overlong == "drop":
        counts["dropped_overlong"] += 1
        return []
    kept = prompt
    if max(map(size, both)) > room and cfg.data.overlong != "truncate":
        kept = recent_turns(prompt, lambda some: max(map(size, pair(some))), room)
        both = pair(kept)
    views = [_view(tokens, room) for tokens in both]
    if not all(view["loss_weights"].any() for view in views):
        counts["dropped_long_prompt"] += 1
        return []
    if all(np.array_equal(views[0][name], views[1][name]) for name in views[0]):
        counts["dropped_equal_answers"] += 1
        return []
    found = {
        "prompts_shortened": len(kept) < len(prompt),
        "pairs_truncated" if cfg.data.overlong == "truncate" else "answers_cut": max(map(size, both)) > room,
    }
    counts.update({name: 1 for name, is_so in found.items() if is_so})
    return [Example({name: np.stack([view[name] for view in views]) for name in views[0]})]


def _view(tokens: Tokens, length: int) -> dict[str, np.ndarray]:
    """Columns of one conversation, [length], cut at the end if it is longer."""
    columns = shifted(tokens.ids[: 1 + length], tokens.trained[: 1 + length])
    used = len(columns["tokens"])
    columns |= {"segment_ids": np.ones(used, np.int32), "positions": np.arange(used, dtype=np.int32)}
    return {name: np.pad(column, (0, length - used)) for name, column in columns.items()}


def _columns(cfg: Config) -> Columns:
    return {name: ((len(ANSWERS), *shape), dtype) for name, (shape, dtype) in shifted_columns(cfg).items()}


def _texts(record: Record) -> Iterator[str]:
    return (message["content"] for field in FIELDS for message in record[field])


def preference_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFnWithStart:
    """-log sigmoid(r(chosen) - r(rejected)) with the implicit reward r = beta * (log p - log p_start), where p is the
    likelihood of an answer, the product over its tokens (Rafailov et al. 2023, equation 7).

    With e = `task.flip_rate`, the loss is (1 - e) times that plus e times the same with the answers swapped. The
    reference log p_start is computed without dropout and without gradient.
    """

    def of_answers(params: Params, rows: Batch, rng: jax.Array | None) -> jax.Array:
        likelihood_R = log_likelihood(apply(params, rows, rng=rng), rows, cfg, tokenizer)
        return likelihood_R.reshape(-1, len(ANSWERS))

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None, start: Params) -> LossTerms:
        rows, weights_B = views_as_rows(batch, len(ANSWERS)), batch["row_weights"]
        reference_Bx2 = of_answers(jax.lax.stop_gradient(start), rows, None)
        reward_Bx2 = cfg.task.beta * (of_answers(params, rows, rng) - reference_Bx2)
        # The chosen answer is class 0 of two: label smoothing gives each class half of the smoothed weight.
        is_first_B = jnp.zeros(weights_B.shape, jnp.int32)
        terms = losses.class_cross_entropy(reward_Bx2, is_first_B, weights_B, label_smoothing=2 * cfg.task.flip_rate)
        reward_Bx2 = jnp.where(weights_B[:, None] != 0, reward_Bx2, 0)
        margin_B = reward_Bx2[:, 0] - reward_Bx2[:, 1]
        found = {
            "accuracy": margin_B > 0,  # equal rewards count as wrong; at the start all are equal, up to rounding
            "reward_margin": margin_B,
            "chosen_reward": reward_Bx2[:, 0],
            "rejected_reward": reward_Bx2[:, 1],
        }
        sums = {name: ((weights_B * value_B).sum(), terms.weight) for name, value_B in found.items()}
        return terms._replace(metrics=terms.metrics | sums, outputs={})

    return loss_fn


def answer_likelihoods(apply: Apply, cfg: Config, tokenizer: Any) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """'log_likelihood', float32 [B, 2]: of each answer, summed over its tokens, under the trained model alone."""

    def outputs(params: Params, batch: Batch) -> dict[str, jax.Array]:
        rows = views_as_rows(batch, len(ANSWERS))
        return {"log_likelihood": log_likelihood(apply(params, rows), rows, cfg, tokenizer).reshape(-1, len(ANSWERS))}

    return outputs


def _likelier(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    first, second = map(float, outputs["log_likelihood"][0])
    said = ANSWERS[int(second > first)]
    return {"prediction": said, "log_likelihood": dict(zip(ANSWERS, (first, second), strict=True))}


PREFERENCES = Task(
    name="preferences",
    models=("decoder",),
    fields=FIELDS,
    examples=answer_pair,
    columns=_columns,
    texts=_texts,
    loss=preference_loss,
    loss_unit="nats per pair",
    legend="The model learns to make the trained tokens of the first answer likelier than those of the second.",
    options=PreferenceOptions,
    check=check,
    wanted=lambda cfg: Wanted(cfg.task.name, fields=ANSWERS),
    overlong=CHAT.overlong,
    needs_start=True,
    view_names=lambda cfg: ANSWERS,
    prompt=CHAT.prompt,
    check_tokenizer=CHAT.check_tokenizer,
    predictor=Predictor((), answer_pair, _columns, answer_likelihoods, _likelier),
    ends=CHAT.ends,
)
