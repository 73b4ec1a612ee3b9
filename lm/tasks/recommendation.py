"""Recommendation: prediction of the next item (SASRec) or of masked items (BERT4Rec), and the item vocabulary."""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, TokenizerConfig
from lm.config.schema import ConfigError
from lm.data.example import Columns, Example, Row, Rows
from lm.data.record import Record
from lm.evaluation import scores
from lm.files import write_atomic
from lm.losses import ranking
from lm.tasks.base import (
    TOKEN_LOSS,
    Predictor,
    Task,
    Vocabulary,
    check_mask_token,
    has_mask_token,
    sequence_columns,
    shifted_columns,
)
from lm.tasks.language_modelling import predict_tokens
from lm.types import Apply, Batch, LossFn, LossTerms, Outputs, Params

_PAD, _BOS, _UNSEEN, _FIRST = 0, 1, 2, 3
# Share of the training rows of `masked_item` that hide only the last item, as evaluation does. The authors' code makes
# eleven samples of each user: ten with random masks and one with the last item masked (BERT4Rec, section 3.6).
_LAST_ALONE = 1 / 11
_RANKED = 10  # items of a prediction


@dataclasses.dataclass(frozen=True)
class MaskedItemOptions:
    """Options of masked item prediction."""

    name: str = "masked_item"
    mask_rate: float = 0.15  # share of the items that are hidden


@dataclasses.dataclass(frozen=True)
class ItemVocabulary:
    """Maps items to ids and back, in the place of a tokenizer. Make one with `train` or `load`.

    Id 0 is padding, 1 the start of a sequence, 2 an item outside the vocabulary; the items follow, most frequent first.
    The remaining ids up to `size` are unused.

    Attributes:
      items: item -> its number of interactions, most frequent first, ties by name.
      size: number of ids without the extra ones.
      extra_ids: number of ids after those; the first is the mask.
    """

    items: tuple[tuple[str, int], ...] = dataclasses.field(repr=False)
    size: int
    extra_ids: int = 0
    file: ClassVar[str] = "items.json"  # in a run's folder
    # As of a `lm.data.tokenizer.Tokenizer`; items have no text.
    chat_template: ClassVar[str] = ""
    added_space: ClassVar[int] = 0
    changes_text: ClassVar[str] = ""

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {item: i for i, (item, _) in enumerate(self.items, _FIRST)}

    def encode(self, item: str) -> int:
        """The id of an item; `unseen_id` if it is not in the vocabulary."""
        return self._ids.get(item, _UNSEEN)

    def piece(self, token_id: int) -> str:
        """The text shown for an id: the item, or <|name|> for a special or unused id."""
        place = int(token_id) - _FIRST
        if 0 <= place < len(self.items):
            return self.items[place][0]
        names = {_PAD: "pad", _BOS: "start", _UNSEEN: "unseen", self.size: "mask"}
        return f"<|{names.get(int(token_id), f'unused_{int(token_id)}')}|>"

    def popularity_rank(self, item: str) -> int:
        """The rank of an item by frequency, from 1; ties count against it, as in `lm.losses.ranking.target_rank`. An
        item outside the vocabulary ranks after all others."""
        token_id = self.encode(item)
        if token_id == _UNSEEN:
            return int(np.iinfo(np.int32).max)
        return int(np.searchsorted(self._falling_counts, -self.items[token_id - _FIRST][1], side="right"))

    @functools.cached_property
    def _falling_counts(self) -> np.ndarray:
        return np.array([-count for _, count in self.items])

    @functools.cached_property
    def is_control_V(self) -> np.ndarray:
        """bool [vocab_size]: ids that are not items."""
        ids = np.arange(self.vocab_size)
        return (ids < _FIRST) | (ids >= _FIRST + len(self.items))

    def token_bytes(self) -> np.ndarray:
        """int32 zeros [vocab_size]: items have no text."""
        return np.zeros(self.vocab_size, np.int32)

    @property
    def vocab_size(self) -> int:
        return self.size + self.extra_ids

    @property
    def pad_id(self) -> int:
        return _PAD

    @property
    def bos_id(self) -> int:
        return _BOS

    @property
    def unseen_id(self) -> int:
        return _UNSEEN

    @property
    def has_mask(self) -> bool:
        """Whether `mask_id` exists."""
        return self.extra_ids > 0

    @property
    def mask_id(self) -> int:
        """The id that replaces a hidden item."""
        if not self.extra_ids:
            raise ConfigError("this task hides items behind a mask, which needs 'tokenizer.extra_ids' of at least 1")
        return self.size

    @property
    def role_ids(self) -> dict[str, int]:
        """Empty: a sequence of items has no roles."""
        return {}

    @functools.cached_property
    def content(self) -> bytes:
        return json.dumps({"size": self.size, "items": self.items}).encode()

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the items, their counts and the size, hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def saved_files(self) -> dict[str, bytes]:
        """As of a `lm.data.tokenizer.Tokenizer`."""
        return {self.file: self.content}

    def save(self, path: Any) -> None:
        """Writes JSON atomically, to any path that `etils.epath` opens."""
        write_atomic(path, self.content)


def train(items: Iterable[str], cfg: TokenizerConfig) -> ItemVocabulary:
    """The vocabulary of all these items, of exactly `tokenizer.vocab_size` ids.

    Raises:
      ConfigError: there are more items than ids.
    """
    counts = Counter(items)
    needed = len(counts) + _FIRST
    if needed > cfg.vocab_size:
        raise ConfigError(
            f"'tokenizer.vocab_size' is {cfg.vocab_size:,}, but the training data has {len(counts):,} items; set it to "
            f"at least {needed}"
        )
    return ItemVocabulary(tuple(sorted(counts.items(), key=lambda one: (-one[1], one[0]))), cfg.vocab_size)


def load(path: Any) -> ItemVocabulary:
    """Reads what `ItemVocabulary.save` wrote, from any path that `etils.epath` opens.

    Raises:
      ConfigError: the file does not exist or is not a vocabulary of items.
    """
    from etils import epath

    path = epath.Path(path)
    if not path.is_file():
        raise ConfigError(f"'tokenizer.path': no file {path}; give a vocabulary of items, or '' to make one")
    try:
        content = json.loads(path.read_bytes())
        pairs, size = [(str(item), int(count)) for item, count in content["items"]], int(content["size"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ConfigError(f"'tokenizer.path': {path} is not a vocabulary of items ({error!r})") from None
    if pairs != sorted(dict(pairs).items(), key=lambda one: (-one[1], one[0])) or size < len(pairs) + _FIRST:
        raise ConfigError(f"'tokenizer.path': {path} is damaged: its items are not distinct, in order and within size")
    return ItemVocabulary(tuple(pairs), size)


def next_items(record: Record, vocabulary: ItemVocabulary, cfg: Config, counts: Counter[str]) -> list[Example]:
    """Predicts each item from those before it; for a held-out user, only the target (Kang and McAuley 2018).

    Worked, ^ the start, items a b c and, held out, target d:

        tokens        ^ a b      tokens        ^ a b c
        targets       a b c      targets       a b c d
        loss_weights  1 1 1      loss_weights  0 0 0 1

    Longer than seq_len: the oldest items are cut, counted as 'history_cut'.
    """
    ids = _newest([vocabulary.bos_id, *_ids(record, vocabulary, counts)], cfg.data.seq_len + 1, counts)
    weights = np.ones(len(ids) - 1, np.float32)
    if "target" in record:
        weights[:-1] = 0
    columns = {"tokens": np.array(ids[:-1], np.int32), "targets": np.array(ids[1:], np.int32), "loss_weights": weights}
    return [Example(columns, _popularity(record, vocabulary))]


def hidden_items(record: Record, vocabulary: ItemVocabulary, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The items, followed by the target of a held-out user; nothing is hidden yet. Cut as in `next_items`."""
    ids = _newest(_ids(record, vocabulary, counts), cfg.data.seq_len, counts)
    if not ids:
        counts["dropped_empty"] += 1
        return []
    held_out = np.array("target" in record, np.int32)
    columns = {"tokens": np.array(ids, np.int32), "held_out": held_out}
    return [Example(columns, _popularity(record, vocabulary))]


def mask_items(row: Row, rng: np.random.Generator, vocabulary: ItemVocabulary, cfg: Config) -> Row:
    """Masks items, to be predicted from all others (BERT4Rec, Sun et al. 2019).

    In training, masks round(task.mask_rate * n) of n items, at least one, but in one row of eleven only the last item;
    for a held-out user, only the last item. Worked, _ the mask:

        tokens        a _ c    targets  a b c    loss_weights  0 1 0

    Args:
      row: tokens and segment_ids, int [L]; held_out, int [].
      rng: generator of this row.
      vocabulary: its `mask_id`.
      cfg: `task.mask_rate`.

    Returns:
      The row with tokens and targets int32 [L], loss_weights float32 [L].
    """
    tokens_L = row["tokens"].astype(np.int32)
    n = int(np.count_nonzero(row["segment_ids"]))
    last_alone = rng.random() < _LAST_ALONE
    if row["held_out"] or last_alone:
        chosen = np.array([n - 1])
    else:
        chosen = rng.permutation(n)[: max(1, round(cfg.task.mask_rate * n))]
    hidden_L, weights_L = tokens_L.copy(), np.zeros(len(tokens_L), np.float32)
    hidden_L[chosen], weights_L[chosen] = vocabulary.mask_id, 1.0
    return row | {"tokens": hidden_L, "targets": tokens_L, "loss_weights": weights_L}


def _ids(record: Record, vocabulary: ItemVocabulary, counts: Counter[str]) -> list[int]:
    """Ids of the items, and of the target if there is one. Items outside the vocabulary are left out of the history; a
    target outside it becomes `unseen_id`, which no model can predict, so that it counts as a miss."""
    ids = [vocabulary.encode(item) for item in record["items"]]
    known = [i for i in ids if i != vocabulary.unseen_id]
    counts["items_unseen"] += len(ids) - len(known)
    if "target" in record:
        known.append(vocabulary.encode(record["target"]))
        counts["targets_unseen"] += known[-1] == vocabulary.unseen_id
    return known


def _newest(ids: list[int], limit: int, counts: Counter[str]) -> list[int]:
    counts["history_cut"] += len(ids) > limit
    return ids[-limit:]


def _popularity(record: Record, vocabulary: ItemVocabulary) -> int | None:
    return vocabulary.popularity_rank(record["target"]) if "target" in record else None


def history(record: Record, vocabulary: ItemVocabulary, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The row of `next_items` for a held-out user, without the target; the last position predicts it."""
    ids = _ids({"items": record["items"]}, vocabulary, counts)
    return [_row([vocabulary.bos_id, *ids], cfg, counts)]


def history_and_mask(record: Record, vocabulary: ItemVocabulary, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The row of `hidden_items` for a held-out user, with the mask in the place of the target."""
    ids = _ids({"items": record["items"]}, vocabulary, counts)
    return [_row([*ids, vocabulary.mask_id], cfg, counts)]


def _row(ids: list[int], cfg: Config, counts: Counter[str]) -> Example:
    return Example({"tokens": np.array(_newest(ids, cfg.data.seq_len, counts), np.int32)})


def _history_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len)


def best_items(apply: Apply, cfg: Config, vocabulary: Any) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """'ids' int32 and 'scores' float32 [B, 10]: the items with the largest logits at the last position, best first."""
    is_item_V = jnp.asarray(~vocabulary.is_control_V)
    count = min(_RANKED, int((~vocabulary.is_control_V).sum()))

    def outputs(params: Params, batch: Batch) -> dict[str, jax.Array]:
        out = apply(params, batch)
        is_last_BxL = jnp.arange(batch["tokens"].shape[1])[None] == batch["segment_ids"].sum(axis=1)[:, None] - 1
        last_BxD = jnp.where(is_last_BxL[..., None], out.pre_logits_BxLxD, 0).sum(axis=1)
        logits_BxV = losses.logits(
            last_BxD, out.unembed_DxV, vocab_size=vocabulary.vocab_size, softcap=cfg.model.logit_softcap
        )[:, : vocabulary.vocab_size]
        scores_BxK, ids_BxK = jax.lax.top_k(jnp.where(is_item_V[None], logits_BxV, losses.MASKED_LOGIT), count)
        return {"ids": ids_BxK, "scores": scores_BxK}

    return outputs


def ranked_items(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, vocabulary: Any) -> dict[str, Any]:
    """The best items, best first, and their logits. Items of the history are ranked too."""
    del meta, record, cfg
    return {
        "prediction": [vocabulary.piece(i) for i in outputs["ids"][0]],
        "scores": [float(value) for value in outputs["scores"][0]],
    }


def _items(record: Record) -> Iterator[str]:
    return iter(record["items"])


def _stored(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len) | {"held_out": ((), np.int32)}


def _lacks(rows: Rows, cfg: Config) -> str:
    found = np.unique(rows["tokens"])
    if len(found[found >= _FIRST]) < 2:
        return "all rows are of one item, so that there is nothing to choose from; expected two or more"
    return ""


def item_loss(apply: Apply, cfg: Config, vocabulary: Any) -> LossFn:
    """Cross-entropy over all items; a target outside the vocabulary has no loss.

    Outputs:
      rank: rank of the target of the row's last prediction among all items, see `ranking.target_rank`. Items of the
        history are ranked too: a user may choose one again.
    """
    is_item_V = jnp.asarray(~vocabulary.is_control_V)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        out = apply(params, batch, rng=rng)
        targets_BxL, weights_BxL = batch["targets"], batch["loss_weights"]
        known = batch | {"loss_weights": jnp.where(is_item_V[targets_BxL], weights_BxL, 0)}
        terms = predict_tokens(out, known, cfg, vocabulary)
        softcap = cfg.model.logit_softcap
        rank_B = ranking.target_rank(
            out.pre_logits_BxLxD, out.unembed_DxV, targets_BxL, weights_BxL, is_item_V, softcap=softcap
        )
        return terms._replace(outputs={"rank": rank_B})

    return loss_fn


def rank_scores(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Hit rate and NDCG at 10 of the model, and of always recommending the most popular items."""
    del cfg
    by_popularity = scores.ranking(np.array(meta))
    return scores.ranking(outputs["rank"]) | {f"popularity_{name}": value for name, value in by_popularity.items()}


def rank_score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `rank_scores`."""
    return ("hr_at_10", "ndcg_at_10", "popularity_hr_at_10", "popularity_ndcg_at_10")


NEXT_ITEM = Task(
    name="next_item",
    models=("decoder",),
    fields=("items",),
    examples=next_items,
    columns=shifted_columns,
    texts=_items,
    loss=item_loss,
    loss_unit="nats per item",
    least_len=1,
    balances_experts=True,
    vocabulary=Vocabulary(lambda folder: folder / ItemVocabulary.file, train, load),
    lacks=_lacks,
    scores=rank_scores,
    score_names=rank_score_names,
    predictor=Predictor(("target",), history, _history_columns, best_items, ranked_items),
    loss_options=TOKEN_LOSS,
)
MASKED_ITEM = NEXT_ITEM._replace(
    name="masked_item",
    models=("encoder",),
    examples=hidden_items,
    columns=_stored,
    loss_unit="nats per hidden item",
    legend="A token is trained when the model learns to predict the original item, shown with it.",
    options=MaskedItemOptions,
    least_len=2,
    check=check_mask_token,
    check_tokenizer=has_mask_token,
    transform=mask_items,
    predictor=Predictor(("target",), history_and_mask, _history_columns, best_items, ranked_items),
    batch_columns=shifted_columns,
)
