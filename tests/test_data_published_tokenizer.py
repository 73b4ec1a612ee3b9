"""lm/data/published_tokenizer.py: the ids and offsets of transformers, and what tasks may rely on for every kind."""

import dataclasses
import io
import json
import re
import shutil
import sys
from hashlib import sha256

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config.schema import ConfigError
from lm.data import tokenizer
from tests import published
from tests.published import KINDS, MARKS, PROSE

any_text = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from((*MARKS, *PROSE[:3])), max_size=6
).map("".join)
TRAPS = "\ufeffThe cat \U0001f600 sat\r\n na\u00efve  isn't e\u0301 \ufb01 \u65e5\u672c\t12345 "


# The same as transformers ---------------------------------------------------------------------------------------------


def peer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def same_as(tok, theirs, text, has_offsets=True):
    """Asserts that ids (and offsets) are those of transformers, special tokens being text for both."""
    want = theirs(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids, offsets = tok.encode_with_offsets(text)
    assert ids == want["input_ids"]
    if has_offsets:
        assert offsets == [tuple(pair) for pair in want["offset_mapping"]]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    folder = published.folder(request.param, tmp_path_factory.mktemp("peer"))
    return request.param, published.make(request.param), peer(folder)


def test_ids_and_offsets_are_those_of_transformers(both):
    kind, tok, theirs = both

    @given(text=any_text)
    @example(text=TRAPS)
    def check(text):
        # transformers encodes the SentencePiece kinds by other code, which gives other ranges to what has no character
        # of its own, and puts no space before a text that begins with one, as SentencePiece itself does.
        if kind == "llama":
            text = text.lstrip(" \u2581")
        same_as(tok, theirs, text, has_offsets=kind in ("byte_bpe", "roberta", "word_piece"))

    if kind == "t5":  # transformers reads special tokens of its vocabulary out of any text
        for text in PROSE:
            same_as(tok, theirs, text.strip(), has_offsets=False)
    else:
        check()
    ids = tok.encode(PROSE[-1])
    assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["gpt2", "t5", "minilm", "minilm_vocab"])
def test_real_tokenizers_give_the_ids_of_transformers(name, tmp_path, shared_data):
    transformers = pytest.importorskip("transformers")
    texts = (shared_data("tinystories") / "sample.txt").read_text().split("<|endoftext|>")[:100]
    if name == "gpt2":
        for ours, theirs in (("vocab.json", "gpt2_encoder.json"), ("merges.txt", "gpt2_vocab.bpe")):
            shutil.copy(shared_data("tokenizers") / theirs, tmp_path / ours)
        want = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    elif name == "t5":
        shutil.copy(shared_data("tokenizers") / "t5_tokenizer_base.model", tmp_path / "spiece.model")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}')
        want = transformers.T5Tokenizer.from_pretrained(tmp_path)
    else:
        files = ("vocab.txt",) if name == "minilm_vocab" else ("tokenizer.json", "tokenizer_config.json")
        for file in files:
            shutil.copy(shared_data("minilm_tokenizer") / file, tmp_path / file)
        want = transformers.AutoTokenizer.from_pretrained(shared_data("minilm_tokenizer"))
    tok = tokenizer.load(tmp_path)
    for text in [*(text.strip() for text in texts), *([TRAPS] if name != "t5" else [])]:
        same_as(tok, want, text, has_offsets=name != "t5")
    if name == "t5":
        assert tok.vocab_size == len(want) == 32100
        assert tok.sentinel_ids[:2].tolist() == want.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    if name == "gpt2":
        assert tok.bos_id == tok.eos_id == tok.pad_id == 50256 and not tok.changes_text


# What tasks rely on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@example(text=TRAPS)
def test_no_text_produces_a_control_symbol_and_offsets_cover_it_in_order(kind, text):
    tok = published.make(kind, extra_ids=3)
    ids, offsets = tok.encode_with_offsets(text)
    unknown = {tok._engine.unknown}
    assert not {*np.flatnonzero(tok.is_control_V).tolist()} - unknown & {*ids}
    assert ids == tok.encode(text) == [*tok.ids(text)]
    for at, limits in enumerate(zip(*offsets, strict=True)):  # starts, then ends
        assert [*limits] == sorted(limits) and all(0 <= limit <= len(text) for limit in limits), at
    if kind in ("byte_bpe", "llama"):  # every character is in a range
        assert {i for start, end in offsets for i in range(start, end)} == {*range(len(text))}


@pytest.mark.parametrize("kind", ["byte_bpe", "llama"])
@given(text=any_text)
@example(text=TRAPS)
def test_lossless_kinds_round_trip_with_exact_byte_counts(kind, text):
    tok = published.make(kind)
    text = text.replace("\u2581", "") if kind == "llama" else text  # which Llama's decodes to a space
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.token_bytes()[ids].sum() == len(text.encode()) + tok.added_space * bool(text)


def test_kinds_that_change_text_say_so():
    changes = {kind: published.make(kind).changes_text for kind in KINDS}
    assert not changes["byte_bpe"] and changes["word_piece"] and changes["t5"]
    assert [published.make(kind).added_space for kind in KINDS] == [0, 0, 1, 1, 1]


def test_offsets_of_characters_that_take_several_ids():
    for kind in ("byte_bpe", "llama"):
        tok = published.make(kind)
        ids, offsets = tok.encode_with_offsets("a\U0001f600b")
        inside = [pair for pair in offsets if pair[1] > pair[0]]
        assert [pair for pair in inside if pair == (1, 2)] == [(1, 2)] * 4 and tok.decode(ids) == "a\U0001f600b"


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}  # as of T5 and XLM-R
LLAMA = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


def unigram(folder, pre_tokenizer=None, normalizer=None):
    """(tokenizer, that of the library) of characters, EOS and <x>, with `</s>` as a piece that any text may match."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *((character, -5.0) for character in "abcx</s>\u2581")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    made.add_special_tokens(["</s>", "<x>"])
    spec = json.loads(made.to_str()) | {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    spec["decoder"] = {**METASPACE, "prepend_scheme": "always" if pre_tokenizer or normalizer else "never"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return tokenizer.load(folder / "tokenizer.json"), tokenizers.Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize(
    "parts", [(), (METASPACE,), (METASPACE | {"prepend_scheme": "first"},), (SPLIT,), (None, LLAMA)], ids=str
)
def test_a_vocabulary_piece_that_spells_a_control_symbol_is_not_read_out_of_text(parts, tmp_path):
    """The library matches any piece of a unigram vocabulary, that of EOS too. No space is put where the text is cut."""
    tok, theirs = unigram(tmp_path, *parts)
    theirs.encode_special_tokens = True
    assert 1 in theirs.encode("a</s>b").ids
    ids, offsets = tok.encode_with_offsets("a</s>b</s>")
    assert tok.eos_id == 1 not in ids and tok.decode(ids) == "a</s>b</s>"
    assert offsets[-10:] == [(i, i + 1) for i in range(10)] and len(ids) == 10 + tok.added_space == 10 + bool(parts)
    if parts:
        assert tok.decode(tok.encode("a </s> b<x> </s>")) == "a </s> b<x> </s>"


@pytest.mark.parametrize("parts", [(METASPACE,), (SPLIT,), (None, LLAMA)], ids=str)
def test_a_rendered_text_that_goes_on_has_no_space_before_it_but_those_of_the_library_behind_symbols(parts, tmp_path):
    tok, theirs = unigram(tmp_path, *parts)
    for text in ("a b<x>c", "<x>c", " a<x> b c", "ab c"):
        first = theirs.encode(text, add_special_tokens=False)
        assert tok.encode_rendered(text) == (first.ids, first.offsets)
        ids, offsets = tok.encode_rendered(text, is_start=False)
        has_prefix = text[0] != "<" and (text[0] != " " or parts[0] is None)  # put there by the library
        assert ids == first.ids[has_prefix:] and offsets == first.offsets[has_prefix:]


def test_byte_level_tokenizers_that_put_a_space_before_a_text_put_none_inside(tmp_path):
    pytest.importorskip("tokenizers")
    spec = json.loads(dict(published.make("byte_bpe").files)["tokenizer.json"])
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tok = tokenizer.load(tmp_path)
    assert tok.decode(tok.encode_rendered("cat")[0]) == " cat" and tok.added_space == 1
    ids, offsets = tok.encode_rendered("cat<|im_end|>cat", is_start=False)
    assert tok.decode(ids) == "cat cat" and offsets[0][0] == 0 and offsets[-1][1] == 16


def test_a_document_full_of_spelled_control_symbols_is_encoded_in_time(tmp_path):
    tok, _ = unigram(tmp_path, METASPACE)
    text = "a</s>" * 20_000
    ids, offsets = tok.encode_with_offsets(text)
    assert tok.decode(ids) == text and offsets[-1] == (len(text) - 1, len(text))


def test_a_control_symbol_of_one_character_is_refused_where_a_text_has_it(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", -9.0), ("$", 0.0), ("a", -1.0)], unk_id=0))
    made.add_special_tokens(["$"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "$"}')
    tok = tokenizer.load(tmp_path)
    assert tok.encode("a") == [2]
    with pytest.raises(ConfigError, match=r"tokenizer.json has a control symbol of one character"):
        tok.encode("a$")


def test_special_ids_of_each_kind():
    for kind, names in {
        "byte_bpe": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),  # padding = EOS
        "roberta": ("<s>", "</s>", "<pad>"),
        "word_piece": ("[CLS]", "[SEP]", "[PAD]"),
        "llama": ("<s>", "</s>", "</s>"),
        "t5": ("<pad>", "</s>", "<pad>"),  # T5's decoder starts from the padding
    }.items():
        tok = published.make(kind)
        assert tuple(tok.piece(i) for i in (tok.bos_id, tok.eos_id, tok.pad_id)) == names
        assert tok.is_control_V[[tok.bos_id, tok.eos_id, tok.pad_id]].all()


def test_the_mask_and_the_sentinels_are_the_files_own_or_extra_ids():
    words = published.make("word_piece")
    assert words.piece(words.mask_id) == "[MASK]" and words.sentinel_ids.size == 0
    words = published.make("word_piece", extra_ids=2)
    assert words.sentinel_ids.tolist() == [words.vocab_size - 2, words.vocab_size - 1]
    bpe = published.make("byte_bpe", extra_ids=3)
    assert bpe.mask_id == bpe.vocab_size - 3 and bpe.sentinel_ids.tolist() == [bpe.mask_id + 1, bpe.mask_id + 2]
    assert bpe.is_control_V[-3:].all() and bpe.decode([bpe.mask_id]) == "" and bpe.piece(bpe.mask_id) == "<|mask|>"
    with pytest.raises(ConfigError, match=r"has none: set 'tokenizer.extra_ids' to at least 1"):
        _ = published.make("byte_bpe").mask_id
    t5 = published.make("t5")
    assert t5.piece(int(t5.sentinel_ids[0])) == "<extra_id_0>" and t5.sentinel_ids[0] == t5.vocab_size - 1


def test_generation_may_use_text_and_named_symbols_only():
    tok = published.make("byte_bpe", extra_ids=2)
    allowed_V = tok.may_generate([tok.eos_id], ["sentinels"])
    assert allowed_V[tok.encode(PROSE[0])].all() and allowed_V[tok.eos_id] and allowed_V[tok.vocab_size - 1]
    assert not allowed_V[tok.mask_id] and allowed_V.sum() == (~tok.is_control_V).sum() + 2
    with pytest.raises(ConfigError, match=r"'generate.symbols' has mask, .* raise 'tokenizer.extra_ids'"):
        published.make("byte_bpe").may_generate([0], ["mask"])
    with pytest.raises(ConfigError, match=r"'generate.symbols' has roles, but there is none: leave it out"):
        tok.may_generate([0], ["roles"])


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_save_keeps_the_files_byte_for_byte_and_load_gives_an_equal_tokenizer(kind, tmp_path):
    tok = published.make(kind)
    tok.save(tmp_path / "tokenizer")
    again = tokenizer.load(tmp_path / "tokenizer")
    assert again == tok and again.hash == tok.hash and hash(again) == hash(tok)
    want = published.folder(kind, tmp_path / "want")
    assert {p.name: p.read_bytes() for p in want.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "tokenizer").iterdir()
    }
    assert tokenizer.find(tmp_path) == tmp_path / "tokenizer" and tok.file == "tokenizer"


def test_the_hash_is_of_what_decides_the_ids(tmp_path):
    tok = published.make("byte_bpe")
    assert tok.with_chat_template("{{ x }}").hash == tok.hash
    assert tok.with_chat_template("{{ x }}").chat_template == "{{ x }}"
    other = tokenizer.load(published.folder("byte_bpe", tmp_path, eos_token="<|im_end|>"))
    assert other.hash != tok.hash != published.make("word_piece").hash
    assert dataclasses.replace(tok, extra_ids=1).hash == tok.hash


def with_config(kind, folder, **config):
    """The tokenizer of a folder with these keys of tokenizer_config.json."""
    folder = published.folder(kind, folder, **config)
    if kind == "byte_bpe" and "add_prefix_space" in config:  # as GPT-2's files
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
        (folder / "tokenizer.json").unlink()
    if kind == "word_piece":
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
        (folder / "tokenizer.json").unlink()
    return tokenizer.load(folder)


def added(special, i=400):
    return {"added_tokens_decoder": {str(i): {"content": "<tool>", "special": special}}}


@pytest.mark.parametrize(
    ("kind", "one", "other", "text"),
    [
        ("word_piece", {"do_lower_case": True}, {"do_lower_case": False}, "The"),
        ("word_piece", {"strip_accents": True}, {"strip_accents": False}, "na\u00efve"),
        ("word_piece", {"tokenize_chinese_chars": True}, {"tokenize_chinese_chars": False}, "a\u65e5a"),
        ("byte_bpe", {"add_prefix_space": True}, {"add_prefix_space": False}, "cat"),
        ("byte_bpe", added(True), added(False), "a <tool> b"),
        ("byte_bpe", added(False), {}, "a <tool> b"),
        ("llama", added(True), added(False), "a <tool> b"),
        ("llama", added(False), {}, "a <tool> b"),
        ("llama", {"tokenizer_class": "T5Tokenizer"}, {"tokenizer_class": "LlamaTokenizer"}, "<extra_id_0>"),
        ("t5", {"extra_ids": 5}, {"extra_ids": 6}, "<extra_id_0>"),
    ],
)
def test_options_that_change_the_ids_change_the_hash(kind, one, other, text, tmp_path):
    first, second = (with_config(kind, tmp_path / name, **config) for name, config in (("1", one), ("2", other)))
    assert first.encode(text) != second.encode(text) or first.encode_rendered(text) != second.encode_rendered(text)
    assert first.hash != second.hash
    same = with_config(kind, tmp_path / "3", **one, model_max_length=7, chat_template="{{ x }}")
    assert same.hash == first.hash


def test_options_at_their_defaults_or_that_are_not_read_leave_the_hash(tmp_path):
    words = [with_config("word_piece", tmp_path / f"w{n}", **c) for n, c in enumerate(({}, {"do_lower_case": True}))]
    assert words[0].hash == words[1].hash
    bpe = tokenizer.load(
        published.folder("byte_bpe", tmp_path / "b", do_lower_case=False, tokenizer_class="T5Tokenizer")
    )
    assert bpe.hash == published.make("byte_bpe").hash
    null = tokenizer.load(published.folder("byte_bpe", tmp_path / "n", add_prefix_space=None))
    assert null.hash == bpe.hash and null.encode("cat") == bpe.encode("cat")
    # Runs of versions before options counted have this one.
    (content,) = (sha256(content).hexdigest() for name, content in bpe.files if name == "tokenizer.json")
    specials = sorted((role, bpe.encode_rendered(text)[0][0]) for role, text in bpe.special_tokens().items())
    old = json.dumps([[["tokenizer.json", content]], specials])
    assert bpe.hash == sha256(old.encode()).hexdigest()


def test_tokens_that_only_the_config_adds_follow_the_vocabulary(tmp_path):
    added = {"400": {"content": "<|tool|>", "special": True}}
    tok = tokenizer.load(published.folder("byte_bpe", tmp_path, added_tokens_decoder=added))
    assert tok.vocab_size == 401 and tok.encode_rendered("<|tool|>")[0] == [400] and 400 not in tok.encode("<|tool|>")


@pytest.mark.parametrize("kind", ["byte_bpe", "word_piece"])
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True, "normalized": False}, {"single_word": True}])
def test_added_tokens_that_are_not_special_are_text_as_in_transformers(kind, flags, tmp_path):
    size = published.make(kind).vocab_size
    tokens = {"<tool>": False, "<|sys|>": True, "</Tool>": False}
    decoder = {str(size + n): {"content": t, "special": s, **flags} for n, (t, s) in enumerate(tokens.items())}
    folder = published.folder(kind, tmp_path, added_tokens_decoder=decoder)
    tok, theirs = tokenizer.load(folder), peer(folder)
    assert tok.is_control_V[-3:].tolist() == [False, True, False] and tok.piece(size) == "<tool>"
    for text in ("the <tool> cat</Tool>sat<tool>", "<tool>", "a  <tool>  b <|sys|> <TOOL>", "x<tool>x"):
        same_as(tok, theirs, text)
        want = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert tok.encode_rendered(text)[0] == want["input_ids"]
        ids = tok.encode(text)
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_space_behind_an_added_token_comes_back(tmp_path):
    tok = tokenizer.load(published.folder("llama", tmp_path, **added(False)))
    for text in ("a <tool> the cat", "<tool> the <tool> cat ", " <tool>  the", "<tool>\u65e5 x"):
        assert tok.decode(tok.encode(text)) == text, text


def test_the_added_space_is_found_without_the_letter_a(tmp_path):
    for prefix in (False, True):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["xyz zyx xx yy zz"] * 50),
            model_writer=model,
            vocab_size=12,
            hard_vocab_limit=False,
            add_dummy_prefix=prefix,
            minloglevel=2,
            num_threads=1,
        )
        (tmp_path / "spiece.model").write_bytes(model.getvalue())
        assert tokenizer.load(tmp_path).added_space == prefix


def test_a_contradiction_names_the_file_that_has_the_added_token(tmp_path):
    folder = published.folder("byte_bpe", tmp_path)
    (folder / "special_tokens_map.json").write_text('{"sep_token": "<|im_end|>"}')
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 7}')
    with pytest.raises(ConfigError, match=r"'tokenizer.path': added_tokens.json gives '<\|im_end\|>' the id 7, but"):
        tokenizer.load(folder)


def test_saving_leaves_no_file_of_another_tokenizer(tmp_path):
    tok = published.make("llama")
    names = {name for name, _ in tok.files}
    for stale in ("into", "into.tmp"):
        folder = published.folder("byte_bpe", tmp_path / stale)
        (folder / "chat_template.jinja").write_text("{{ x }}")
        (folder / "mine.txt").write_text("kept where it was saved into")
        tok.save(tmp_path / "into")
        assert {path.name for path in (tmp_path / "into").iterdir()} == names | (
            {"mine.txt"} if stale == "into" else set()
        )
        assert tokenizer.load(tmp_path / "into") == tok and not (tmp_path / "into.tmp").exists()
        shutil.rmtree(tmp_path / "into")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("byte_bpe", {"eos_token": "<|gone|>"}, "names the eos_token '<|gone|>', which the vocabulary of 400 lacks"),
        ("byte_bpe", {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, "the id 7, but tokenizer.json has it"),
        (
            "llama",
            {"added_tokens_decoder": {"7": {"content": "<new>"}}},
            "tokenizer_config.json gives '<new>' the id 7, which is",
        ),
        ("llama", {"tokenizer_class": "XLMRobertaTokenizer"}, "XLMRobertaTokenizer, whose ids may differ"),
    ],
)
def test_files_that_contradict_each_other_are_refused(kind, change, message, tmp_path):
    folder = published.folder(kind, tmp_path, **change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        tokenizer.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe", b'{"version": "1.0"}'])
def test_damaged_files_are_refused_by_name(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"'tokenizer.path': {tmp_path}.* cannot be read"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer; expected one of tokenizer.json, tokenizer.model"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_configs_are_refused_by_name(content, tmp_path):
    folder = published.folder("byte_bpe", tmp_path)
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"'tokenizer.path': tokenizer_config.json is (not JSON|a list)"):
        tokenizer.load(folder)


def test_a_file_alone_is_read_with_the_usual_names_of_special_tokens(tmp_path):
    folder = published.folder("word_piece", tmp_path / "whole")
    (tmp_path / "mine.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tok = tokenizer.load(tmp_path / "mine.json")
    assert [tok.piece(i) for i in (tok.bos_id, tok.eos_id, tok.mask_id)] == ["[CLS]", "[SEP]", "[MASK]"]
    assert json.loads(dict(tok.files)["tokenizer.json"])


def test_the_separator_of_pairs_is_that_of_the_template_or_of_the_class(tmp_path):
    from tokenizers import Tokenizer, processors

    spec = Tokenizer.from_str((published.folder("roberta", tmp_path) / "tokenizer.json").read_text())
    for pair, count in (("<s> $A </s> </s> $B </s>", 2), ("<s> $A </s> $B </s>", 1), ("$A $B", 1), ("$A <s> $B", 1)):
        spec.post_processor = processors.TemplateProcessing("<s> $A", pair, [("<s>", 0), ("</s>", 2)])
        (tmp_path / "tokenizer.json").write_text(spec.to_str())
        assert tokenizer.load(tmp_path).separator_ids == [2] * count
    spec.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(("</s>", 2), ("<s>", 0))]
    )
    (tmp_path / "tokenizer.json").write_text(spec.to_str())
    assert tokenizer.load(tmp_path).separator_ids == [2, 2]
    for name, count in (("XLMRobertaTokenizer", 2), ("BertTokenizerFast", 1)):
        folder = published.folder("byte_bpe", tmp_path / name, tokenizer_class=name)
        assert len(tokenizer.load(folder).separator_ids) == count


@pytest.mark.parametrize("name", ["RobertaTokenizerFast", "BertTokenizerFast"])
@pytest.mark.parametrize(("pair", "count"), [("<s> $A </s> </s> $B", 2), ("<s> $A </s> $B", 1), ("<s> $A $B", 0)])
def test_a_template_that_separates_pairs_decides_whatever_class_is_named(pair, count, name, tmp_path):
    from tokenizers import Tokenizer, processors

    folder = published.folder("roberta", tmp_path, tokenizer_class=name)
    spec = Tokenizer.from_str((folder / "tokenizer.json").read_text())
    spec.post_processor = processors.TemplateProcessing("<s> $A", pair, [("<s>", 0), ("</s>", 2)])
    (folder / "tokenizer.json").write_text(spec.to_str())
    by_class = 2 if name.startswith("Roberta") else 1
    assert tokenizer.load(folder).separator_ids == [2] * (count or by_class)


def test_the_template_of_a_bert_has_one_separator_whatever_class_is_named(tmp_path):
    folder = published.folder("word_piece", tmp_path, tokenizer_class="RobertaTokenizer")
    assert len(tokenizer.load(folder).separator_ids) == 1


def test_the_hash_says_whether_pairs_have_one_separator_or_two(tmp_path):
    folders = [
        published.folder("byte_bpe", tmp_path / name, tokenizer_class=name)
        for name in ("GPT2Tokenizer", "RobertaTokenizer", "MPNetTokenizer")
    ]
    one, two, same = map(tokenizer.load, folders)
    assert one.hash == published.make("byte_bpe").hash != two.hash == same.hash
    assert (len(one.separator_ids), len(two.separator_ids)) == (1, 2)


def test_vocabulary_and_merges_of_a_roberta_alone_have_its_special_tokens(tmp_path):
    folder = published.folder("roberta", tmp_path / "whole")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (tmp_path / "alone" / "merges.txt").write_text("\n".join(merges))
    tok, whole = tokenizer.load(tmp_path / "alone"), published.make("roberta")
    ids = ("bos_id", "eos_id", "pad_id", "mask_id", "separator_ids")
    assert [getattr(tok, name) for name in ids] == [getattr(whole, name) for name in ids]
    assert tok.encode("<s>a <mask>") == whole.encode("<s>a <mask>")
    assert tok.is_control_V.tolist() == whole.is_control_V.tolist() and tok.is_control_V.sum() == 5
    for name, count in (("BertTokenizerFast", 1), ("RobertaTokenizer", 2)):
        said = {"tokenizer_class": name, "sep_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}
        (tmp_path / "alone" / "tokenizer_config.json").write_text(json.dumps(said))
        assert tokenizer.load(tmp_path / "alone").separator_ids == [2] * count


# GGUF -----------------------------------------------------------------------------------------------------------------


def write_gguf(path, model, tokens, kinds, **fields):
    """A GGUF file with a tokenizer and nothing else."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def gguf_of(kind, path, **fields):
    """The GGUF file that a folder's tokenizer would be converted to."""
    tok = published.make(kind)
    names = [tok._engine.names[i] for i in range(tok.vocab_size)]
    ids = {f"{role}_token_id": getattr(tok, f"{role}_id") for role in ("bos", "eos", "pad")}
    if kind == "byte_bpe":
        kinds = [3 if tok.is_control_V[i] else 1 for i in range(tok.vocab_size)]
        merges = [" ".join(pair) for pair in json.loads(dict(tok.files)["tokenizer.json"])["model"]["merges"]]
        fields = {"token_merges": merges, "tokenizer_pre": "gpt-2", "chat_template": tok.chat_template} | ids | fields
        return write_gguf(path, "gpt2", names, kinds, **fields)
    sp = tok._engine._sp
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(sp.vocab_size())
    ]
    scores = [sp.get_score(i) for i in range(sp.vocab_size())]
    fields = {"token_scores": scores, "unk_token_id": sp.unk_id()} | ids | fields
    return write_gguf(path, "llama", names, kinds, **fields)


@pytest.mark.parametrize("kind", ["byte_bpe", "llama"])
def test_the_tokenizer_of_a_gguf_file_is_that_of_the_folder(kind, tmp_path):
    tok = tokenizer.load(gguf_of(kind, tmp_path / "model.gguf"))
    want = published.make(kind)
    for text in (*PROSE[:9], *MARKS, TRAPS):
        assert tok.encode_with_offsets(text) == want.encode_with_offsets(text)
        assert tok.encode_rendered(text) == want.encode_rendered(text)
    same = ("bos_id", "eos_id", "pad_id", "chat_template", "control_names", "vocab_size", "added_space")
    assert [getattr(tok, name) for name in same] == [getattr(want, name) for name in same]
    tok.save(tmp_path / "tokenizer")
    assert tokenizer.load(tmp_path / "tokenizer") == tok


def test_gguf_files_that_cut_text_in_another_way_or_are_damaged_are_refused(tmp_path):
    other = gguf_of("byte_bpe", tmp_path / "other.gguf", tokenizer_pre="exotic")
    with pytest.raises(ConfigError, match=r"cuts text as 'exotic'; expected one of default, gpt-2, smollm"):
        tokenizer.load(other)
    content = other.read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("empty", b""), ("noise", b"x" * 99)):
        (tmp_path / f"{name}.gguf").write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"'tokenizer.path': {tmp_path}/{name}.gguf is no GGUF file"):
            tokenizer.load(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("gpt2", {}, r"cannot be read \(KeyError: 'tokenizer.ggml.merges'\)"),
        ("gpt2", {"token_merges": ["a b"], "eos_token_id": 7}, r"cannot be read \(IndexError"),
        ("llama", {"eos_token_id": 2}, r"cannot be read \(KeyError: 'tokenizer.ggml.scores'\)"),
    ],
)
def test_gguf_files_that_lack_a_part_are_refused_by_name(model, fields, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model, ["a", "b", "</s>"], [1, 1, 3], **fields)
    with pytest.raises(ConfigError, match=f"'tokenizer.path': {path} {message}"):
        tokenizer.load(path)


def test_a_gguf_file_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    path = gguf_of("byte_bpe", tmp_path / "model.gguf")
    for missing in ("tokenizers", "gguf"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ConfigError, match=f"'tokenizer.path': {path} needs {missing}: pip install"):
            tokenizer.load(path)


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "smollm"])
def test_the_ways_of_cutting_text_are_those_of_transformers_models(kind):
    """The numbers in one, three or all digits, contractions, and spaces before words and line breaks."""
    tokenizers = pytest.importorskip("tokenizers")
    from lm.data import published_tokenizer

    letters = [published_tokenizer._byte_alphabet()[byte] for byte in range(256)]
    made = published_tokenizer._byte_level({letter: i for i, letter in enumerate(letters)}, [], [], kind)
    cut = tokenizers.Tokenizer.from_str(made).pre_tokenizer.pre_tokenize_str("It'S 12345\n\n  so")
    want = {
        "llama-bpe": ["It", "'S", "\u0120", "123", "45", "\u010a\u010a", "\u0120", "\u0120so"],
        "qwen2": ["It", "'S", "\u0120", "1", "2", "3", "4", "5", "\u010a\u010a", "\u0120", "\u0120so"],
        "smollm": ["It", "'", "S", "\u0120", "1", "2", "3", "4", "5", "\u010a\u010a\u0120", "\u0120so"],
    }
    assert [piece for piece, _ in cut] == want[kind]
