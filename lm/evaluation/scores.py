"""Scores over all held-out rows, where possible by maintained libraries. Arrays or texts in, name -> value out."""

import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm.config.schema import ConfigError


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries of two arrays of the same shape; 0 for empty ones."""
    return float(np.mean(labels == predictions)) if labels.size else 0.0


def classification(labels_R: np.ndarray, predictions_R: np.ndarray, num_classes: int) -> dict[str, float]:
    """'f1' and 'matthews' (Matthews correlation), both 0 where undefined.

    F1 is that of class 1 if there are two classes, else the macro average over the classes that occur in the labels or
    the predictions (scikit-learn's default).

    Args:
      labels_R, predictions_R: int [R], in [0, num_classes).
      num_classes: of the head.
    """
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (labels_R, predictions_R), 1)
    hits, actual, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    occurs_C = actual + said > 0
    f1_C = 2 * hits / np.maximum(actual + said, 1)
    f1 = f1_C[1] if num_classes == 2 else f1_C[occurs_C].mean() if occurs_C.any() else 0.0
    total = confusion.sum()
    # Gorodkin (2004): the correlation of one-hot labels and predictions.
    spread = np.sqrt((total**2 - (actual**2).sum()) * (total**2 - (said**2).sum()))
    matthews = (hits.sum() * total - actual @ said) / spread if spread else 0.0
    return {"f1": float(f1), "matthews": float(matthews)}


def regression(labels_R: np.ndarray, predictions_R: np.ndarray) -> dict[str, float]:
    """'pearson' and 'spearman' correlation; 0 for constant arrays and for fewer than two rows."""
    from scipy import stats

    if len(labels_R) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = {
            "pearson": stats.pearsonr(labels_R, predictions_R),
            "spearman": stats.spearmanr(labels_R, predictions_R),
        }
    return {name: float(np.nan_to_num(result.statistic)) for name, result in found.items()}


def entities(expected: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """'entity_precision', 'entity_recall' and 'entity_f1' over all entities, by exact span and type; 0 where undefined.

    Counted as by conlleval (seqeval's default) for every scheme: an I- or E- tag that does not continue an entity of
    its type begins one.

    Args:
      expected, predicted: tags of each sentence, in the letters of IOBES, see `lm.evaluation.entity_tags.read`.

    Raises:
      ConfigError: seqeval is not installed.
    """
    seqeval = _library("seqeval.metrics.sequence_labeling")
    values = seqeval.precision_recall_fscore_support(expected, predicted, average="micro", zero_division=0)
    return dict(zip(("entity_precision", "entity_recall", "entity_f1"), map(float, values), strict=False))


def strict_entities(expected: list[list[str]], predicted: list[list[str]], scheme: str) -> dict[str, float]:
    """'entity_f1_strict': only entities whose tags follow the scheme count (seqeval's strict mode).

    Args:
      expected, predicted: as `entities`.
      scheme: 'IOB1', 'IOB2' or 'IOBES'.

    Raises:
      ConfigError: seqeval is not installed.
    """
    of_scheme = getattr(_library("seqeval.scheme"), scheme)
    _, _, f1, _ = _library("seqeval.metrics.v1").precision_recall_fscore_support(
        expected, predicted, average="micro", zero_division=0, scheme=of_scheme
    )
    return {"entity_f1_strict": float(f1)}


def ranking(ranks_R: np.ndarray, at: int = 10) -> dict[str, float]:
    """Hit rate and NDCG at a cutoff, for one right answer per row: 'hr_at_10' and 'ndcg_at_10'; 0 without rows.

    The hit rate is the share of rows whose right answer is among the first ten; NDCG weights each such row with
    1 / log2(1 + rank).

    Args:
      ranks_R: int [R], the rank of the right answer, from 1.
      at: the cutoff.
    """
    hits_R = ranks_R <= at
    gains_R = np.where(hits_R, 1 / np.log2(1 + ranks_R.astype(np.float64)), 0)
    both = {f"hr_at_{at}": hits_R, f"ndcg_at_{at}": gains_R}
    return {name: float(values.mean()) if values.size else 0.0 for name, values in both.items()}


def answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """'exact_match' and word 'f1' of answers, from 0 to 1, as by the script of SQuAD v1.1 (Rajpurkar et al. 2016).

    Args:
      predictions: a text for each question.
      references: the accepted answers to each question; the best match counts.
    """
    best = [
        np.max([(_normal(said) == _normal(text), _overlap_f1(said, text)) for text in texts], axis=0)
        for said, texts in zip(predictions, references, strict=True)
    ]
    exact_match, f1 = np.mean(best, axis=0) if best else (0.0, 0.0)
    return {"exact_match": float(exact_match), "f1": float(f1)}


def answers_or_none(
    predictions: Sequence[str], references: Sequence[Sequence[str]], margins_Q: np.ndarray, threshold: float
) -> dict[str, float]:
    """Scores of answers to questions that may have none, from 0 to 1, as by the script of SQuAD v2.0
    (Rajpurkar et al. 2018).

    'exact_match' and 'f1' over all questions; 'HasAns_exact', 'HasAns_f1', 'NoAns_exact' and 'NoAns_f1' over those with
    and without an answer (missing if there are none); 'best_exact' and 'best_f1' at the thresholds that maximise them,
    'best_exact_thresh' and 'best_f1_thresh', which are chosen on the same answers.

    Args:
      predictions: the best text for each question, whether or not it is given as the answer.
      references: the accepted answers to each question; empty if it has no answer, so that to abstain is right.
      margins_Q: float64, the score of no answer minus that of the best text.
      threshold: the model abstains where the margin is above it.
    """
    has_answer_Q = np.array([bool(texts) for texts in references])
    accepted = [[text for text in texts if _normal(text)] or [""] for texts in references]
    of_text_Qx2 = np.array(
        [
            np.max([(_normal(said) == _normal(text), _overlap_f1_or_empty(said, text)) for text in texts], axis=0)
            for said, texts in zip(predictions, accepted, strict=True)
        ],
        np.float64,
    )
    is_none_Q = margins_Q > threshold
    given_Qx2 = np.where(is_none_Q[:, None], ~has_answer_Q[:, None], of_text_Qx2)
    found = dict(zip(("exact_match", "f1"), map(float, given_Qx2.mean(axis=0)), strict=True))
    for name, chosen_Q in (("HasAns", has_answer_Q), ("NoAns", ~has_answer_Q)):
        if chosen_Q.any():
            exact, f1 = given_Qx2[chosen_Q].mean(axis=0)
            found |= {f"{name}_exact": float(exact), f"{name}_f1": float(f1)}
    for name, of_text_Q in (("exact", of_text_Qx2[:, 0]), ("f1", of_text_Qx2[:, 1])):
        # As in the published script, any text at all to a question without an answer is wrong here.
        gain_Q = np.where(has_answer_Q, of_text_Q, [-float(bool(said)) for said in predictions])
        nothing = float((~has_answer_Q).sum())
        best, threshold_for_it = _best_threshold(gain_Q, margins_Q, nothing)
        found |= {f"best_{name}": best / len(predictions), f"best_{name}_thresh": threshold_for_it}
    return found


def _best_threshold(gain_Q: np.ndarray, margins_Q: np.ndarray, nothing: float) -> tuple[float, float]:
    """The best total over all thresholds on the margins, and the smallest threshold that reaches it.

    If abstaining always is best, the threshold is 0, as in the published script, even if 0 does not reach that total.

    Args:
      gain_Q: what the answer to each question adds to the total.
      margins_Q: a question is answered if its margin is at most the threshold.
      nothing: the total if no question is answered.
    """
    order_Q = np.argsort(margins_Q, kind="stable")
    sorted_Q = margins_Q[order_Q]
    total_Q = nothing + np.cumsum(gain_Q[order_Q])
    # No threshold separates equal margins.
    is_threshold_Q = np.isfinite(sorted_Q) & np.append(sorted_Q[1:] != sorted_Q[:-1], True)
    total_Q = np.where(is_threshold_Q, total_Q, -np.inf)
    best = int(np.argmax(total_Q))
    if total_Q[best] > nothing:
        return float(total_Q[best]), float(sorted_Q[best])
    return nothing, 0.0


def _normal(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, English articles and extra white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap_f1(said: str, text: str) -> float:
    said_words, words = _normal(said).split(), _normal(text).split()
    common = sum((Counter(said_words) & Counter(words)).values())
    return 2 * common / (len(said_words) + len(words)) if common else 0.0


def _overlap_f1_or_empty(said: str, text: str) -> float:
    """`_overlap_f1` as in SQuAD v2.0: two texts without words match."""
    return _overlap_f1(said, text) if _normal(said) and _normal(text) else float(_normal(said) == _normal(text))


def translation(predictions: Sequence[str], references: Sequence[str], tokenizer: str = "13a") -> dict[str, float]:
    """Corpus 'bleu' and 'chrf', from 0 to 100, by sacrebleu (Post 2018); 0 without sentences.

    Args:
      predictions, references: a text for each sentence.
      tokenizer: of BLEU, see `bleu_tokenizer`; everything else is sacrebleu's default.

    Raises:
      ConfigError: sacrebleu, or a package that this tokenizer needs, is not installed.
    """
    bleu, chrf = _translation_metrics(tokenizer)
    if not predictions:
        return {"bleu": 0.0, "chrf": 0.0}
    both = list(predictions), [list(references)]
    return {"bleu": float(bleu.corpus_score(*both).score), "chrf": float(chrf.corpus_score(*both).score)}


def translation_scorer(
    predictions: Sequence[str], references: Sequence[str], tokenizer: str = "13a"
) -> Callable[[np.ndarray], dict[str, float]]:
    """A function: chosen sentences, int64 [n] -> `translation` of these, from counts that are made once.

    Raises:
      ConfigError: as `translation`; or sacrebleu has changed so that the counts no longer give its corpus scores.
    """
    if len(predictions) != len(references):  # sacrebleu takes as many as the shorter list has
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    named = dict(zip(("bleu", "chrf"), _translation_metrics(tokenizer), strict=True))
    counts_of = {
        name: np.array(metric._extract_corpus_statistics(list(predictions), [list(references)]))
        for name, metric in named.items()
    }

    def score(chosen: np.ndarray) -> dict[str, float]:
        sums = {name: counts[chosen].sum(axis=0).tolist() for name, counts in counts_of.items()}
        return {name: float(metric._compute_score_from_stats(sums[name]).score) for name, metric in named.items()}

    whole, expected = score(np.arange(len(predictions))), translation(predictions, references, tokenizer)
    if any(abs(whole[name] - expected[name]) > 1e-9 for name in named):
        raise ConfigError(f"sacrebleu's counts give {whole}, its corpus scores are {expected}: install another version")
    return score


def translation_signatures(tokenizer: str = "13a") -> dict[str, str]:
    """sacrebleu's signatures of 'bleu' and 'chrf' as `translation` computes them, to publish with the scores."""
    names = "bleu", "chrf"
    signatures = {}
    for name, metric in zip(names, _translation_metrics(tokenizer), strict=True):
        metric.corpus_score(["a"], [["a"]])  # the signature has the number of references
        signatures[name] = str(metric.get_signature())
    return signatures


# Target languages whose words are not separated by spaces -> sacrebleu's tokenizer; Korean by its recommendation.
_BLEU_TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "chi", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
}
# Thai to Tibetan, Burmese, Khmer; Hangul; kana and ideographs.
_NO_SPACES = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def bleu_tokenizer(name: str, language: str, references: Sequence[str]) -> str:
    """The tokenizer of BLEU: `name` or, if that is 'auto', sacrebleu's for the language, mostly 13a.

    Args:
      name: `task.bleu_tokenizer` of translation.
      language: a code such as 'ja', 'zh-CN', 'kor_Hang'; anything else counts as unknown.
      references: their script is checked if the language is unknown.

    Raises:
      ConfigError: `name` is 'auto', the language unknown, and the script has no spaces between words, so that 13a would
        count a sentence as one word.
    """
    if name != "auto":
        return name
    codes = re.split("[-_./]", language.lower())
    if known := next((_BLEU_TOKENIZERS[code] for code in codes if code in _BLEU_TOKENIZERS), None):
        return known
    letters = sum(character.isalpha() for text in references for character in text)
    unspaced = sum(len(_NO_SPACES.findall(text)) for text in references)
    if 2 * unspaced > letters:
        raise ConfigError(
            f"BLEU: the references (language '{language}') are in a script without spaces between words, or Korean; "
            "set 'task.bleu_tokenizer' to one that fits: zh, ja-mecab, ko-mecab, flores200 or char"
        )
    return "13a"


def _translation_metrics(tokenizer: str) -> tuple[Any, Any]:
    """sacrebleu's BLEU and chrF."""
    sacrebleu = _library("sacrebleu")
    if tokenizer not in (known := sorted(sacrebleu.BLEU.TOKENIZERS)):
        raise ConfigError(f"'task.bleu_tokenizer' {tokenizer}: sacrebleu has {', '.join(known)}")
    try:
        return sacrebleu.BLEU(tokenize=tokenizer), sacrebleu.CHRF()
    except (Exception, SystemExit) as error:  # the tokenizers raise all kinds of errors
        extra = {"ja-mecab": "ja", "ko-mecab": "ko"}.get(tokenizer)
        if extra:
            needed = f"pip install 'sacrebleu[{extra}]'"
            raise ConfigError(f"BLEU's tokenizer {tokenizer} needs more packages: {needed}") from None
        spm = importlib.import_module("sacrebleu.tokenizers.tokenizer_spm")
        if tokenizer not in spm.SPM_MODELS:
            raise
        url = spm.SPM_MODELS[tokenizer]["url"]
        place = f"{spm.SACREBLEU_DIR}/models/{url.rpartition('/')[2]}"
        raise ConfigError(
            f"BLEU's tokenizer {tokenizer} needs its SentencePiece model at {place} ({type(error).__name__}: {error}); "
            f"sacrebleu downloads it from {url}; without a network, put it there (SACREBLEU names the folder)"
        ) from None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(f"this score needs the package {package} ({error}): pip install -e '.[scores]'") from None


def views(first_RxP: np.ndarray, second_RxP: np.ndarray) -> dict[str, float]:
    """Alignment and uniformity of embeddings on the unit sphere (Wang and Isola 2020, section 4.1). Less is better.

    Args:
      first_RxP, second_RxP: a vector for each view of a row; normalised here.

    Returns:
      'alignment': mean squared distance between the two views of a row; 'uniformity': logarithm of the mean of
      exp(-2 distance^2) over all pairs of rows, between their first views; 0 for one row.
    """
    first_RxP, second_RxP = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in (first_RxP, second_RxP)
    )
    rows, total = len(first_RxP), -float(_gaussian_kernel(np.square(first_RxP).sum(axis=1)).sum(dtype=np.float64))
    for start in range(0, rows, 1024):  # not all pairs fit in memory at once
        cosine = first_RxP[start : start + 1024] @ first_RxP.T
        total += float(_gaussian_kernel(cosine).sum(dtype=np.float64))
    pairs = rows * (rows - 1)
    return {
        "alignment": float(np.square(first_RxP - second_RxP).sum(axis=1).mean()),
        "uniformity": float(np.log(total / pairs)) if pairs else 0.0,
    }


def _gaussian_kernel(cosine: np.ndarray) -> np.ndarray:
    """exp(-2 distance^2) of two unit vectors, by their cosine."""
    return np.exp(4 * (cosine - 1))
