"""lm/corpus/ngrams.py: hashes are equal exactly where the words and n-grams of plain Python are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lm.corpus import ngrams


def words(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters, digits and U+0080-U+07FF. From U+0800 on each character is a word, except for
    U+2000-U+2FFF, which separate words."""
    found, run = [], ""
    for character in text.lower() + " ":
        joins = character.isalnum() if character < "\x80" else character < "\u0800"
        if not joins:
            found += [run] if run else []
            run = ""
            found += [character] if character >= "\u0800" and not "\u2000" <= character <= "\u2fff" else []
        else:
            run += character
    return found


TEXTS = st.lists(st.text(alphabet=st.sampled_from("aAbz09 .,\n_é\u0416ß“…—日本ไ𝒳\u0301\u00a0")), max_size=6)


@given(TEXTS)
def test_words_equal_those_of_plain_python(texts):
    hash_W, text_W = ngrams.word_hashes(texts)
    expected = [(word, i) for i, text in enumerate(texts) for word in words(text)]
    assert text_W.tolist() == [i for _, i in expected]
    pairs = set(zip((word for word, _ in expected), hash_W.tolist(), strict=True))
    assert len(pairs) == len({word for word, _ in pairs}) == len({value for _, value in pairs})


def test_hashes_do_not_depend_on_the_other_texts_or_on_batches(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join("w" * k + str(k) for k in rng.integers(1, 30, n)) for n in rng.integers(0, 200, 50)]
    hash_W, text_W = ngrams.word_hashes(texts)
    alone = [ngrams.word_hashes([text])[0] for text in texts]
    monkeypatch.setattr(ngrams, "_BATCH_BYTES", 100)  # texts of many batches, and batches of many texts
    small_hash_W, small_text_W = ngrams.word_hashes(texts)
    for found in (np.concatenate(alone), small_hash_W):
        np.testing.assert_array_equal(found, hash_W)
    np.testing.assert_array_equal(small_text_W, text_W)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=1, max_size=4), st.integers(1, 5))
def test_ngrams_do_not_cross_texts(texts, n):
    hash_W, text_W = ngrams.word_hashes([" ".join(text) for text in texts])
    hash_G, text_G = ngrams.ngrams(hash_W, text_W, n)
    expected = [(tuple(text[k : k + n]), i) for i, text in enumerate(texts) for k in range(len(text) - n + 1)]
    assert text_G.tolist() == [i for _, i in expected]
    pairs = set(zip((run for run, _ in expected), hash_G.tolist(), strict=True))
    assert len(pairs) == len({run for run, _ in pairs}) == len({value for _, value in pairs})
    assert not set(hash_G.tolist()) & set(ngrams.ngrams(hash_W, text_W, n + 1)[0].tolist())
