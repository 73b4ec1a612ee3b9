"""lm/data/tokenizer.py: nothing is lost, nothing is injected, and the same texts give the same model."""

import io
import random

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config.schema import ConfigError
from lm.data import tokenizer as tokenizers

MARKS = ("<|user|>", "<|end|>", "<s>", "</s>", "<pad>", "<unk>", "<0x41>", "\u2581", "\u2585", "\ufeff", "\r\n", "  ")
PROSE = [f"def add_{i}(x):\n    return x + {i}\n\n\tThe sum of {i} and x, naïve or not.\n" for i in range(200)]
HOSTILE = [text + " ".join(MARKS) for text in PROSE for _ in range(3)]
CORPORA = {"prose": PROSE, "hostile": HOSTILE}
TOKENIZERS = {name: tokenizers.train(texts, 500, 1_000_000) for name, texts in CORPORA.items()}

any_text = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from((*MARKS, *PROSE)), max_size=6
).map("".join)


def controls(tok):
    return {tok.pad_id, tok.bos_id, tok.eos_id, tok.end_of_turn_id, *tok.role_ids.values()}


@pytest.mark.parametrize("name", CORPORA)
@given(text=any_text)
def test_any_unicode_round_trips_without_control_symbols_and_with_exact_byte_counts(name, text):
    tok = TOKENIZERS[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not controls(tok) & set(ids)
    assert tok.token_bytes()[ids].sum() == len(text.encode())


def characters_of(tok, text):
    """Brute force: the ranges from the spelling of each piece alone, byte by byte through the text."""
    characters = [i for i, character in enumerate(text) for _ in character.encode()]
    ranges, at = [], 0
    for token_id in tok.encode(text):
        size = len(tok.piece(token_id).replace("\u2581", " ").encode())
        size = 1 if tok.piece(token_id).startswith("<0x") and len(tok.piece(token_id)) == 6 else size
        ranges.append((characters[at], characters[at + size - 1] + 1))
        at += size
    return ranges


@pytest.mark.parametrize("name", CORPORA)
@given(text=any_text)
@example(text="a\u2581é\U0001f600\u2581 b")
def test_offsets_are_the_characters_that_each_id_stands_for(name, text):
    tok = TOKENIZERS[name]
    ids, offsets = tok.encode_with_offsets(text)
    assert ids == tok.encode(text)
    assert offsets == characters_of(tok, text)
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        if "\ufffd" not in tok.decode([token_id]):  # a whole piece, no byte of a longer character
            assert tok.decode([token_id]) == text[start:end]


@pytest.mark.parametrize("name", CORPORA)
@given(text=any_text, long=st.sampled_from([1, 2, 5, 20]))
@example(text="a  b   c" * 9 + "\U0001f600\U0001f600 e\u0301xx" * 5, long=1)
def test_a_long_text_has_the_ids_of_the_whole_though_it_is_cut(name, text, long):
    tok, whole = TOKENIZERS[name], []
    for number, part in enumerate(text.split("\u2581")):
        whole += tok._space_ids * (number > 0) + tok._sp.encode(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_LONG", long)
        assert tok.encode(text) == whole


def test_long_text_is_cut_only_where_no_piece_can_span_the_cut(monkeypatch):
    monkeypatch.setattr(tokenizers, "_LONG", 40)
    text = "".join(PROSE)
    parts = list(TOKENIZERS["prose"]._cut(text))
    assert "".join(parts) == text and len(parts) > 20 and max(map(len, parts)) < 100
    for options in ({"model_type": "unigram"}, {"model_type": "bpe", "normalization_rule_name": "nfkc"}):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PROSE),
            model_writer=(model := io.BytesIO()),
            vocab_size=320,
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
        assert list(tokenizers.SentencePiece(model.getvalue())._cut(text)) == [text]


def test_offsets_of_characters_that_have_no_piece():
    tok = TOKENIZERS["prose"]
    text = "x\u2581\U0001f600y"
    ids, offsets = tok.encode_with_offsets(text)
    assert offsets == [(0, 1), *[(1, 2)] * 3, *[(2, 3)] * 4, (3, 4)] and tok.decode(ids) == text
    assert tok.encode_with_offsets("") == ([], [])


@pytest.mark.parametrize("text", [*MARKS, "a\u2581b", "\u2581" * 3, "\0", " a ", "e\u0301\ufb01\u2460"])
def test_marks_round_trip(text):
    for tok in TOKENIZERS.values():
        assert tok.decode(tok.encode(text)) == text
        assert not controls(tok) & set(tok.encode(text))


def test_control_symbols_are_distinct_and_decode_to_nothing():
    tok = TOKENIZERS["hostile"]
    assert len(controls(tok)) == 7 and tuple(tok.role_ids) == tokenizers.ROLES
    assert [*tok.role_ids.values(), tok.end_of_turn_id] == [4, 5, 6, 7]
    assert tok.piece(tok.role_ids["user"]) == "<|user|>" and tok.piece(tok.end_of_turn_id) == "<|end|>"
    assert tok.decode([tok.bos_id, tok.role_ids["user"], *tok.encode(" hi"), tok.end_of_turn_id]) == " hi"
    assert tok.token_bytes()[sorted(controls(tok))].sum() == 0


def test_the_same_texts_give_the_same_bytes():
    again = tokenizers.train(iter(PROSE), 500, 1_000_000)
    assert again == TOKENIZERS["prose"] and again.hash == TOKENIZERS["prose"].hash
    assert again.hash != TOKENIZERS["hostile"].hash
    assert again.vocab_size == 500


@pytest.mark.parametrize("document", ["xyzzy plugh " * 2000, "xyzzy" * 2000, "xyzzy \u2585 plugh " * 50])
def test_no_part_of_the_training_text_is_skipped(document):
    """SentencePiece drops, in silence, a sentence of more than 4192 bytes and one that holds U+2585."""
    tok = tokenizers.train([document], 277, 1_000_000)
    assert len(tok.encode("xyzzy")) < 5


def test_max_bytes_limits_what_is_read_and_sees_a_sorted_corpus_evenly():
    texts = ["alpha beta é"] * 500 + ["omega zulu é"] * 500
    sample = list(tokenizers._sample(texts, 1001))
    assert 1001 - 3 <= sum(len(text.encode()) for text in sample) <= 1001
    assert sample == list(tokenizers._sample(texts, 1001))
    pieces = tokenizers.train(texts, 300, 1001)
    assert {"alpha", "omega"} <= {pieces.piece(i) for i in range(300)}
    assert list(tokenizers._sample(texts, 10**6)) == texts


def test_a_vocabulary_too_large_names_the_key_and_the_largest_size():
    with pytest.raises(ConfigError, match=r"'tokenizer.vocab_size' is 9,999, .* at most \d+") as error:
        tokenizers.train(PROSE, 9999, 1_000_000)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert tokenizers.train(PROSE, largest, 1_000_000).vocab_size == largest
    with pytest.raises(ConfigError, match="vocab_size"):
        tokenizers.train(PROSE, largest + 1, 1_000_000)


def test_a_vocabulary_too_small_names_the_key_and_the_size_needed():
    with pytest.raises(ConfigError, match=r"'tokenizer.vocab_size' is 264, .* to at least \d+") as error:
        tokenizers.train(PROSE, 264, 1_000_000)
    least = int(str(error.value).split("at least ")[1])
    assert tokenizers.train(PROSE, least, 1_000_000).vocab_size == least


@pytest.mark.parametrize("texts", [[], [""], ["\u2585"]])
def test_missing_text_is_an_error(texts):
    with pytest.raises(ConfigError, match="no text to train a tokenizer on"):
        tokenizers.train(texts, 500, 1_000_000)


def test_save_and_load(tmp_path):
    TOKENIZERS["prose"].save(tmp_path / "tokenizer.model")
    loaded = tokenizers.load(tmp_path / "tokenizer.model")
    assert loaded == TOKENIZERS["prose"] and loaded.encode(PROSE[3]) == TOKENIZERS["prose"].encode(PROSE[3])


def trained_elsewhere(path, **options):
    """Writes a model that `tokenizers.train` does not give."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_writer=model, vocab_size=420, model_type="bpe", minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


def damaged(model, rng):
    """A model with a few bits, bytes or ranges changed, added, lost or doubled."""
    content, at, count = bytearray(model), rng.randrange(len(model)), rng.choice([1, 4, 16, 64])
    match rng.randrange(7):
        case 0 | 1:
            for _ in range(count):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 2:
            content[at : at + count] = bytes(len(content[at : at + count]))
        case 3:
            del content[at:]
        case 4:
            content[at : at + count] = rng.randbytes(len(content[at : at + count]))
        case 5:
            content[at:at] = rng.randbytes(count)
        case _:
            del content[at : at + count]
    return bytes(content)


def test_damaged_models_are_refused_in_one_line_or_differ_by_their_hash_and_can_be_used(tmp_path):
    path, model = tmp_path / "a.model", TOKENIZERS["prose"].model
    # The last two ended in an UnicodeDecodeError and an IndexError.
    seeds = [damaged(model, random.Random(seed)) for seed in range(60)]
    bad_utf8 = model.replace(b"\x0a\x09<|user|>", b"\x0a\x09<|\xff\xfeer|>")
    no_unknown = model.replace(b"\x0a\x05<unk>", b"\x0a\x05<uuu>").replace(b"<|system|>", b"<|zystem|>")
    refused = 0
    for content in (b"", b"\0", b"\n" * 99, model[:-1], bad_utf8, no_unknown, *seeds):
        path.write_bytes(content)
        try:
            loaded = tokenizers.load(path)
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert (loaded.hash == TOKENIZERS["prose"].hash) == (content == model)
        loaded.encode_with_offsets(PROSE[0])
        loaded.may_generate([loaded.eos_id])
        loaded.decode(range(loaded.vocab_size))
    assert refused >= 50


def test_unsuitable_models_are_refused(tmp_path):
    def foreign(name, **options):
        return trained_elsewhere(tmp_path / name, **options)

    (tmp_path / "noise.model").write_bytes(b"not a model")
    symbols = [f"<|{name}|>" for name in (*tokenizers.ROLES, "end")]
    for path, message in [
        (tmp_path / "absent.model", "no file .*absent.model"),
        (tmp_path / "noise.model", "noise.model is not a SentencePiece model"),
        (foreign("lossy", byte_fallback=True, control_symbols=symbols, pad_id=3), "loses text"),
    ]:
        with pytest.raises(ConfigError, match=f"'tokenizer.path': .*{message}"):
            tokenizers.load(path)
