"""Small tokenizers of the kinds that published models have, trained on a few sentences."""

import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lm.data import tokenizer

PROSE = [f"def add_{i}(x):\n    return x + {i}\n\n\tThe sum of {i} and x isn't {i}, naïve or not.\n" for i in range(99)]
PROSE += ["The cat sat on the mat, and one two three said hello and bye now.", "Who sat where? It is so."] * 20
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# byte-level BPE as GPT-2 and SmolLM2 and as RoBERTa, WordPiece as BERT, SentencePiece as Llama (lossless, dummy prefix)
# and as T5. Beside them `folder` has 'xlm_roberta', Unigram whose tokenizer_config.json says nothing, as the published.
KINDS = ("byte_bpe", "roberta", "word_piece", "llama", "t5")
MARKS = ("<|im_end|>", "[MASK]", "</s>", "<pad>", "<unk>", "<0x41>", "<extra_id_0>", "\u2581", "\ufeff", "\r\n", "  ")


def folder(kind: str, into: Path, **config: Any) -> Path:
    """Writes the files of a tokenizer as a published model's folder has them; `config`: of tokenizer_config.json."""
    into.mkdir(parents=True, exist_ok=True)
    files, own = _made(kind)
    for name, content in files.items():
        (into / name).write_bytes(content)
    (into / "tokenizer_config.json").write_text(json.dumps(own | config))
    return into


@functools.cache
def make(kind: str, extra_ids: int = 0) -> Any:
    """The tokenizer of a kind."""
    import dataclasses

    with tempfile.TemporaryDirectory() as scratch:
        return dataclasses.replace(tokenizer.load(folder(kind, Path(scratch))), extra_ids=extra_ids)


@functools.cache
def _made(kind: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    if kind in ("llama", "t5"):
        return _sentencepiece(kind)
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "xlm_roberta":
        names = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        pieces = [(name, -8.0) for name in dict.fromkeys(" ".join(PROSE).replace(" ", "\u2581"))]
        made = Tokenizer(models.Unigram([*names, *pieces, ("\u2581the", -2.0), ("at", -3.0)], unk_id=3))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        made.add_special_tokens([*(name for name, _ in names), AddedToken("<mask>", lstrip=True, special=True)])
        pair = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)])
        made.post_processor = pair
        return {"tokenizer.json": made.to_str().encode()}, {}
    if kind in ("byte_bpe", "roberta"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        specials: list[Any] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        if kind == "roberta":
            specials = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
            made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
        own = {"bos_token": specials[0], "eos_token": specials[0], "pad_token": specials[0], "chat_template": CHATML}
        if kind == "roberta":
            own = {f"{role}_token": f"<{role}>" for role in ("unk", "pad", "mask")}
            own |= {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials)
        own = {f"{name[1:-1].lower()}_token": name for name in specials}
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        made.enable_truncation(8)  # as files of sentence encoders have it: must not cut texts
        made.enable_padding(length=8)
    made.train_from_iterator(PROSE, trainer)
    return {"tokenizer.json": made.to_str().encode()}, {"tokenizer_class": "PreTrainedTokenizerFast", **own}


def _sentencepiece(kind: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    model = io.BytesIO()
    options: dict[str, Any] = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if kind == "llama":
        options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
        options |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE),
        model_writer=model,
        vocab_size=400 if kind == "llama" else 150,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    if kind == "t5":
        own = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        return {"spiece.model": model.getvalue()}, own | {"extra_ids": 100}
    own = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer.model": model.getvalue()}, own
