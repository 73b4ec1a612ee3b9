"""lm/checkpoint/hf: LoRA in the files of peft, and model cards."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra hf: pip install -e '.[hf]'")

from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import common
from lm import losses, param_paths, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError, hf, resume
from lm.checkpoint.hf import card, export, export_adapter
from lm.config import AdapterConfig, Config, Duration, EvalConfig, EvalSetConfig, ModelConfig, schema
from lm.config.schema import ConfigError
from lm.models import transformer
from lm.tasks import TASKS
from lm.tracking import report
from tests import published as published_tokenizers
from tests import tool_modules, toys

MODELS = {"llama": toys.PLAIN_LLAMA, "gpt2": toys.GPT2, "bert": dataclasses.replace(toys.BERT, norm_eps=1e-12)}
MODELS |= {"t5": toys.PUBLISHED_T5}
MODELS["roberta"] = dataclasses.replace(MODELS["bert"], unused_positions=2, sentence_types=1)
MODELS = {name: dataclasses.replace(model, vocab_size=420, max_len=64) for name, model in MODELS.items()}
TARGETS = {"llama": r".*(query|value|down)", "gpt2": r".*(query|value|mlp/down)", "bert": r".*(key|mlp/down)"}
TARGETS["roberta"] = TARGETS["bert"]
# More layers than the encoder has, and modules whose names only differ in the stack.
TARGETS["t5"] = r"decoder/.*/(attention/query|mlp/up)|.*value"
TOKENIZERS = {"bert": "word_piece", "t5": "t5", "roberta": "roberta"}
KEEP = ((".*", "keep"),)
STEP = 3
METRICS = {"nll": 2.5, "perplexity": 12.182493960703473}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Any:
    """family -> the folder of a published model."""
    root = tmp_path_factory.mktemp("bases")
    for family, model in MODELS.items():
        cfg = transformer.resolve(model, vocab_size=420, seq_len=64)
        published_tokenizers.folder(TOKENIZERS.get(family, "byte_bpe"), root / family)
        export.export(root / family, cfg, toys.random_params(cfg, scale=0.3), vocab_size=420)
    return lambda family: root / family


def lora_run(folder: Path, out: Path, family: str, task: str = "", **changes: Any) -> Path:
    """A run as training leaves it: LoRA on a published model, all matrices of LoRA and the head moved."""
    task = task or ("masked_lm" if family == "bert" else "causal_lm")
    options: dict[str, Any] = {} if task in ("masked_lm", "causal_lm") else {"data__packing": "pad"}
    if task in ("classification", "tagging"):
        options["task__labels"] = ("a", "b", "c")
    cfg = toys.recipe(
        out.parent / "texts",
        task__name=task,
        init_from=f"hf:{folder}",
        init_rules=((".*lora_.*|head/.*", "reinit"), (".*", "keep")),
        adapter__kind="lora",
        adapter__rank=4,
        adapter__alpha=6.0,
        adapter__targets=TARGETS[family],
        optim__lr_rules=common.lora_rules(),
        **options,
    )
    cfg = dataclasses.replace(cfg, model=ModelConfig(init="bert") if "bert" in family else ModelConfig())
    planned, _, params = run_lib.init_model(cfg)
    flat = param_paths.flatten(params)
    moved = {path: leaf for path, leaf in flat.items() if "/lora_" in path or path.startswith("head/")}
    params = param_paths.unflatten(flat | toys.random_like(moved, seed=1, scale=0.3) | changes)
    info = {"tokenizer_hash": planned.tokenizer.hash, "data": {"example": 0}, "published_vocab": 420}
    run_lib.write_checkpoint(out, planned.cfg, params, planned.tokenizer, STEP, info, METRICS)
    return out


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Any:
    """(family, task) -> a run with LoRA, and the folder that it is exported to."""
    root = tmp_path_factory.mktemp("made")

    @functools.cache
    def make(family: str, task: str) -> tuple[Path, Path]:
        run, out = root / f"{family}-{task}", root / f"{family}-{task}-out"
        lora_run(base(family), run, family, task)
        tool_modules.call("hf", "export", run, out, "--adapter")
        return run, out

    return make


def logits_here(run: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of the head, or of ids, [B, L, V]; of a model for sentence embeddings the hidden states, [B, L, D]."""
    cfg, model, params, _ = run_lib.load_model(str(run))
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    if cfg.model.kind == "encoder_decoder":
        batch |= {f"input_{name}": batch[name] for name in ("segment_ids", "positions")} | {"inputs": tokens[:, ::-1]}
    out = jax.jit(model.apply)(params, batch)
    if cfg.task.name == "contrastive_pairs":
        return np.asarray(out.hidden_BxLxD)
    if out.head is not None:
        return np.asarray(out.head)
    return np.asarray(losses.logits(out.pre_logits_BxLxD, out.unembed_DxV, vocab_size=cfg.model.vocab_size))


TOKENS = np.random.default_rng(2).integers(5, 200, (2, 24)).astype(np.int32)
CASES = [("llama", "causal_lm"), ("gpt2", "causal_lm"), ("bert", "masked_lm")]
CASES += [("t5", "translation"), ("bert", "classification"), ("bert", "tagging"), ("bert", "contrastive_pairs")]
CASES += [("roberta", "classification")]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_peft_computes_what_the_run_computes_and_so_does_the_merged_export(family, task, base, made, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra peer: pip install -e '.[peer]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra peer: pip install -e '.[peer]'")
    peft = pytest.importorskip("peft", reason="needs peft")
    run, out = made(family, task)
    tool_modules.call("hf", "export", run, tmp_path / "merged")
    auto = {"causal_lm": transformers.AutoModelForCausalLM, "masked_lm": transformers.AutoModelForMaskedLM}
    auto |= {"translation": transformers.AutoModelForSeq2SeqLM}
    auto |= {"classification": transformers.AutoModelForSequenceClassification}
    auto |= {"tagging": transformers.AutoModelForTokenClassification, "contrastive_pairs": transformers.AutoModel}
    labels = {"num_labels": 3} if task in ("classification", "tagging") else {}
    there = auto[task].from_pretrained(base(family), **labels)
    adapted = peft.PeftModel.from_pretrained(there, out).eval()
    merged = auto[task].from_pretrained(tmp_path / "merged").eval()
    mine, ids = logits_here(run, TOKENS), torch.from_numpy(TOKENS).long()
    given = {"input_ids": ids.flip(1), "decoder_input_ids": ids} if family == "t5" else {"input_ids": ids}
    for model in (adapted, merged):
        with torch.no_grad():
            got = model(**given)
        theirs = (got.last_hidden_state if task == "contrastive_pairs" else got.logits).numpy()
        assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()
    adapted.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "again"))
    assert {name: x.tobytes() for name, x in first.items()} == {name: x.tobytes() for name, x in second.items()}


@pytest.mark.parametrize(
    ("family", "targets", "rslora"), [("llama", ["k_proj", "up_proj"], False), ("gpt2", ["c_attn"], True)]
)
def test_an_adapter_that_peft_has_made_computes_the_same_here(family, targets, rslora, base, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra peer: pip install -e '.[peer]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra peer: pip install -e '.[peer]'")
    peft = pytest.importorskip("peft", reason="needs peft")
    there = transformers.AutoModelForCausalLM.from_pretrained(base(family))
    fused = family == "gpt2"
    cfg = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, use_rslora=rslora, fan_in_fan_out=fused, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(there, cfg).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        theirs = adapted(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()
    adapted.save_pretrained(tmp_path / "there")
    tool_modules.call("hf", "import", tmp_path / "there", tmp_path / "run")
    mine = logits_here(tmp_path / "run", TOKENS)
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out", "--adapter")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("there", "out"))
    assert {name: x.tobytes() for name, x in one.items()} == {name: x.tobytes() for name, x in two.items()}


def contents(run: Path, out: Path) -> tuple[dict[str, Any], Any, Any]:
    """(adapter_config.json, tensors, parameters of the run by path)."""
    config = json.loads((out / "adapter_config.json").read_text())
    return config, load_file(out / "adapter_model.safetensors"), param_paths.flatten(run_lib.load_model(str(run))[2])


def test_the_adapter_of_a_llama_has_the_layout_of_peft(base, made):
    config, tensors, flat = contents(*made("llama", "causal_lm"))
    assert config == {
        "base_model_name_or_path": str(base("llama")),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    widths = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.down_proj": (24, 16)}
    shapes = {}
    for layer in range(2):
        for module, (width_in, width_out) in widths.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes |= {f"{name}.lora_A.weight": (4, width_in), f"{name}.lora_B.weight": (width_out, 4)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    down = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"{down}.lora_A.weight"], flat["decoder/layers/mlp/down/lora_a"][1].T)
    np.testing.assert_array_equal(tensors[f"{down}.lora_B.weight"], flat["decoder/layers/mlp/down/lora_b"][1].T)


def test_query_and_value_of_gpt2_are_one_module_of_twice_the_rank(made):
    """[A of query; A of value]; B of each has rows of its own, and keys have none."""
    config, tensors, flat = contents(*made("gpt2", "causal_lm"))
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (8, 12, True)
    assert config["target_modules"] == ["c_attn", "mlp.c_proj"], "attn.c_proj has no LoRA"
    name = "base_model.model.transformer.h.1.attn.c_attn"
    query, value = ({n: flat[f"decoder/layers/attention/{p}/lora_{n}"][1].T for n in "ab"} for p in ("query", "value"))
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], np.concatenate([query["a"], value["a"]]))
    rows = np.zeros((48, 8), np.float32)
    rows[:16, :4], rows[32:, 4:] = query["b"], value["b"]
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], rows)
    down, zeros = "base_model.model.transformer.h.1.mlp.c_proj", np.zeros((4, 24), np.float32)
    a, b = (flat[f"decoder/layers/mlp/down/lora_{half}"][1].T for half in "ab")
    np.testing.assert_array_equal(tensors[f"{down}.lora_A.weight"], np.concatenate([a, zeros]))
    np.testing.assert_array_equal(tensors[f"{down}.lora_B.weight"], np.concatenate([b, zeros[:, :16].T], axis=1))


def test_the_head_of_a_bert_is_in_modules_to_save(made):
    """The names of MLPs end as those of the attention's output, so that each layer is named."""
    config, tensors, flat = contents(*made("bert", "classification"))
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert config["target_modules"] == [*(f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)), "key"]
    np.testing.assert_array_equal(tensors["base_model.model.classifier.weight"], flat["head/classifier/kernel"].T)
    np.testing.assert_array_equal(tensors["base_model.model.bert.pooler.dense.bias"], flat["head/pooler/bias"])


def test_a_model_for_sentence_embeddings_has_no_prefix_and_no_head(made, tmp_path):
    """As AutoModel has it; it is read again."""
    run, out = made("bert", "contrastive_pairs")
    config, tensors, flat = contents(run, out)
    assert config["task_type"] == "FEATURE_EXTRACTION" and config["modules_to_save"] is None
    assert config["target_modules"] == [*(f"encoder.layer.{i}.output.dense" for i in (0, 1)), "key"]
    key = tensors["base_model.model.encoder.layer.1.attention.self.key.lora_A.weight"]
    np.testing.assert_array_equal(key, flat["encoder/layers/attention/key/lora_a"][1].T)
    assert len(tensors) == 8
    tool_modules.call("hf", "import", out, tmp_path / "back", "--task=contrastive_pairs")
    back = param_paths.flatten(run_lib.load_model(str(tmp_path / "back"))[2])
    for path in flat:
        assert path.startswith("head/") or np.array_equal(back[path], flat[path]), path


def test_a_hub_cache_gives_the_name_of_the_base(base, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--owner--tiny-llama"
    shutil.copytree(base("llama"), cached / "snapshots" / "123")
    run = lora_run(cached, tmp_path / "run", "llama")
    tool_modules.call("hf", "export", run, tmp_path / "out", "--adapter")
    config, _, _ = contents(run, tmp_path / "out")
    assert config["base_model_name_or_path"] == "owner/tiny-llama"
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "owner/tiny-llama"\nbase_model_relation: "adapter"\n' in text
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hf.open_model(tmp_path / "out").base_path == cached / "snapshots" / "123"
    tool_modules.call("hf", "export", run, tmp_path / "two", "--adapter", "--base=owner/tiny-llama")
    assert contents(run, tmp_path / "two")[0] == config
    with pytest.raises(SystemExit, match=r"--base is the model that LoRA belongs to; it needs --adapter"):
        tool_modules.call("hf", "export", run, tmp_path / "three", f"--base={cached}")
    cached.rename(tmp_path / "hub" / "models--gpt2")
    assert export_adapter.base_of("gpt2", False) == "gpt2"
    shutil.rmtree(tmp_path / "hub")
    for start in ("gpt2", "owner/name"):
        assert export_adapter.base_of(start, False) == start, "the cache is gone, the name is not"
    assert export_adapter.base_of("/home/me/base", False) == export_adapter.base_of("owner/name", True) == ""


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_base_in_a_relative_folder_has_no_name_on_a_hub(has_adapter, base, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base("llama"), "out/base")
    start = "out/base"
    if has_adapter:
        start = str(shutil.copytree(made("llama", "causal_lm")[1], tmp_path / "adapter"))
        change(tmp_path / "adapter", base_model_name_or_path="out/base")
    assert export_adapter.base_of(start, has_adapter) == str(tmp_path / "out" / "base")


def test_a_run_that_is_more_than_its_base_and_lora_is_no_adapter(base, made, tmp_path):
    scale = np.full(16, 1.5, np.float32)
    run = lora_run(base("llama"), tmp_path / "trained", "llama", **{"decoder/final_norm/scale": scale})
    with pytest.raises(SystemExit, match=r"'decoder/final_norm/scale' is not what it is in .*\(1 of 12 parameters"):
        tool_modules.call("hf", "export", run, tmp_path / "out", "--adapter")
    run, _ = made("llama", "causal_lm")
    with pytest.raises(SystemExit, match=r"gpt2 is not the base of this run \(model\.num_kv_heads is 2, there 4"):
        tool_modules.call("hf", "export", run, tmp_path / "out", "--adapter", f"--base={base('gpt2')}")
    tool_modules.call("hf", "import", base("llama"), tmp_path / "plain")
    with pytest.raises(SystemExit, match=r"'adapter\.kind' is none: only lora can be written as an adapter"):
        tool_modules.call("hf", "export", tmp_path / "plain", tmp_path / "out", "--adapter")
    tool_modules.call("merge_adapters", "merge", run, tmp_path / "merged")
    with pytest.raises(SystemExit, match=r"does not say which published model it started from; name it with --base"):
        tool_modules.call("hf", "export", tmp_path / "merged", tmp_path / "out", "--adapter")
    assert not (tmp_path / "out").exists()


def test_a_card_says_what_the_run_knows_and_no_more(base, made, tmp_path):
    run, out = made("llama", "causal_lm")
    text = (out / "README.md").read_text()
    assert text.startswith(
        '---\nlibrary_name: "peft"\npipeline_tag: "text-generation"\n---\n\n# llama-causal_lm-out\n\n'
    )
    assert "LoRA of rank 4 for a `llama` of 17,360 parameters, trained for 3 steps of the task `causal_lm`." in text
    assert "Base model: `llama`." in text and "- `data.path`: `'texts'`" in text
    assert "adapter.rank = 4\n" in text and "optim.b1" not in text and "init_from = 'hf:llama'\n" in text
    assert "| metric | here |\n|---|---|\n| nll | 2.5 |\n| perplexity | 12.182 |\n" in text
    assert str(out.parent) not in text and "## Training" not in text and "## Versions" not in text

    run = shutil.copytree(run, tmp_path / "run")
    report.write_summary(run, {"before": {"nll": 4.0}, "steps": 3, "tokens": 6144, "device_kind": "cpu"})
    tool_modules.call("hf", "export", run, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: "transformers"\n') and "A `llama` of 17,360 parameters" in text
    assert "| metric | before training | here |\n|---|---|---|\n| nll | 4 | 2.5 |\n| perplexity |  | 12.182 |" in text
    assert "- positions read: 6,144\n" in text and f"- jax {jax.__version__}\n" in text

    tool_modules.call("hf", "import", base("llama"), tmp_path / "plain")
    tool_modules.call("hf", "export", tmp_path / "plain", tmp_path / "plain-out")
    text = (tmp_path / "plain-out" / "README.md").read_text()
    assert "A `llama` of 17,360 parameters, not trained any further." in text and "## Data" not in text


def test_the_card_of_a_merged_run_names_the_base_of_its_adapter_or_nothing(base, made, tmp_path):
    _, out = made("llama", "causal_lm")
    adapter, hub = shutil.copytree(out, tmp_path / "o" / "adapter"), tmp_path / "hub" / "models--owner--llama"
    shutil.copytree(base("llama"), hub / "snapshots" / "1")
    there = {
        "named": (f"{adapter},{hub}", 'base_model: "owner/llama"\n'),
        "bare": (str(adapter), "Base model: `llama`.\n"),
    }
    for name, (start, line) in there.items():
        command = ["hf", "import", adapter, tmp_path / name, *([f"--base={hub}"] if name == "named" else [])]
        tool_modules.call(*command)
        assert run_lib.load_model(str(tmp_path / name))[0].init_from == f"hf:{start}"
        tool_modules.call("hf", "export", tmp_path / name, tmp_path / f"{name}-out")
        assert line in (tmp_path / f"{name}-out" / "README.md").read_text()
    change(adapter, base_model_name_or_path="owner/far")
    assert export_adapter.base_of(str(adapter), True) == "owner/far"
    change(adapter, base_model_name_or_path="~nosuchuser/`x`")
    assert export_adapter.base_of(str(adapter), True) == ""
    shutil.rmtree(adapter)
    tool_modules.call("hf", "export", tmp_path / "bare", tmp_path / "gone")
    assert "base" not in (tmp_path / "gone" / "README.md").read_text().lower().partition("## config")[0]
    tool_modules.call("hf", "export", tmp_path / "named", tmp_path / "gone-too")
    assert 'base_model: "owner/llama"\n' in (tmp_path / "gone-too" / "README.md").read_text()


def card_of(base: str = "", **changes: Any) -> str:
    cfg = toys.recipe(Path("/home/me/texts"), **changes)
    options: dict[str, Any] = {"metrics": {}, "summary": {}, "is_adapter": False, "head": None}
    return card.card("a", cfg, model_type="gpt2", parameters=1, base=base, step=2, **options)


def test_a_card_cuts_absolute_paths_and_nothing_else(tmp_path):
    text = card_of(
        init_from="hf:out,/home/me/secret/smol",
        tokenizer__path="~/secret/words",
        data__mixture=((0.0, "/home/me/secret/web", 0.5), (0.0, "books", 0.5)),
        data__path="",
        generate__prompts=("/help me / now", "hf:a,/b"),
    )
    assert "init_from = 'hf:out,smol'\n" in text and "tokenizer.path = 'words'\n" in text
    assert "data.mixture = ((0.0, 'web', 0.5), (0.0, 'books', 0.5))\n" in text and "secret" not in text
    assert "generate.prompts = ('/help me / now', 'hf:a,/b')\n" in text
    assert "init_from = 'hf:smol'\n" in card_of(init_from="hf:/home/me/smol")
    assert 'base_model: "gpt2"\n' in card_of("gpt2") and "base_model" not in card_of("/home/me/gpt2")


# Keys that hold text, or tuples with some, but no path.
TEXTS = {
    *("init_rules", "data.encoding", "data.separator", "data.rename", "data.augment", "adapter.targets"),
    *("optim.decay_rules", "optim.lr_rules", "optim.unfreeze_rules", "generate.prompts", "generate.stop"),
    *("eval.sets.one.split", "eval.sets.one.rename", "eval.sets.one.separator", "eval.sets.one.encoding"),
    *("checkpoint.best_metric", "monitor.project", "monitor.run_name"),
}
OF_TASKS = {"name", "labels", "templates"}


def texts_of(section: Any, prefix: str = "") -> set[str]:
    """Keys of a config's fields whose type lets them hold any text."""
    out = set()
    for name, hint in get_type_hints(type(section)).items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if key == "eval.sets":
            out |= texts_of(dict(value)["one"], f"{key}.one.")
        elif dataclasses.is_dataclass(value):
            out |= texts_of(value, f"{key}.")
        elif "str" in re.findall(r"\w+", re.sub(r"Literal\[[^]]*\]", "", str(hint).replace("<class 'str'>", "str"))):
            out.add(key)
    return out


def with_paths(section: Any, path: str) -> Any:
    """A section of a config with this path in all fields that hold some."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.metadata.get("is_path"):
            changes[field.name] = path if isinstance(value, str) else ((0.0, path, 1.0),)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_paths(value, path)
        elif field.name == "sets":
            changes[field.name] = tuple((name, with_paths(each, path)) for name, each in value)
    return dataclasses.replace(section, **changes)


def test_a_card_has_no_private_path_of_any_key():
    """Each key that may hold text is known to be a path or none: a new one must be put on either side."""
    cfg = Config(eval=EvalConfig(sets=(("one", EvalSetConfig()),)))
    paths = {*schema.path_keys(cfg)}
    texts = {key for key in texts_of(cfg) if not key.endswith("task.name")}
    assert texts == TEXTS | paths and not TEXTS & paths
    for name, task in TASKS.items():
        assert texts_of(task.options()) <= OF_TASKS, name
    options: dict[str, Any] = {"metrics": {}, "summary": {}, "is_adapter": False, "head": None}
    cfg = with_paths(cfg, "/home/me/secret/last")
    text = card.card("a", cfg, model_type="gpt2", parameters=1, base="", step=2, **options)
    assert "secret" not in text and all(f"\n{key} = " in text for key in paths)


def test_a_card_names_the_evaluation_sets_and_what_is_set_of_them():
    task = dataclasses.replace(TASKS["classification"].options(), name="classification", labels=("a", "b"))
    one = EvalSetConfig(path="/home/me/dev.txt", encoding="cp1252")
    other = EvalSetConfig(path="b.jsonl", format="jsonl", task=task)
    cfg = Config(eval=EvalConfig(sets=(("one", one), ("other", other))))
    options: dict[str, Any] = {"metrics": {}, "summary": {}, "is_adapter": False, "head": None}
    text = card.card("a", cfg, model_type="gpt2", parameters=1, base="", step=2, **options)
    assert "- `eval.sets.one.path`: `'dev.txt'`\n- `eval.sets.other.path`: `'b.jsonl'`\n" in text
    shown = [line for line in text.splitlines() if line.startswith("eval.sets.")]
    assert shown == [
        "eval.sets.one.path = 'dev.txt'",
        "eval.sets.one.encoding = 'cp1252'",
        "eval.sets.other.path = 'b.jsonl'",
        "eval.sets.other.format = 'jsonl'",
        "eval.sets.other.task.name = 'classification'",
        "eval.sets.other.task.labels = ('a', 'b')",
    ]


# Folders that are read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *[("llama", "causal_lm"), ("bert", "classification"), ("t5", "translation")],
        *[("roberta", "classification"), ("roberta", "tagging")],
    ],
)
def test_an_adapter_is_read_as_it_was_and_exported_as_the_same_bytes(family, task, made, tmp_path):
    run, one = made(family, task)
    cfg = run_lib.load_model(str(run))[0]
    planned, _, params = run_lib.init_model(
        dataclasses.replace(cfg, init_from=f"hf:{one}", init_rules=KEEP, adapter=AdapterConfig())
    )
    there = param_paths.flatten(run_lib.load_model(str(run))[2])
    for path, leaf in param_paths.flatten(params).items():
        np.testing.assert_array_equal(leaf, there[path], err_msg=path)
    own = planned.cfg.adapter
    assert (own.kind, own.rank, own.alpha) == ("lora", 4, 6.0)
    run_lib.write_checkpoint(
        tmp_path / "again",
        planned.cfg,
        params,
        planned.tokenizer,
        STEP,
        {"tokenizer_hash": planned.tokenizer.hash, "data": {"example": 0}, "published_vocab": 420},
    )
    tool_modules.call("hf", "export", tmp_path / "again", tmp_path / "two", "--adapter")
    two = tmp_path / "two"
    assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
    first, second = (safe_open(folder / "adapter_model.safetensors", "numpy") for folder in (one, two))
    assert first.metadata() == second.metadata() and list(first.keys()) == list(second.keys())
    for name in first.keys():  # noqa: SIM118 (it is no dict)
        assert first.get_tensor(name).tobytes() == second.get_tensor(name).tobytes(), name


def test_import_of_an_adapter_makes_a_run_that_computes_the_same(base, made, tmp_path, capsys):
    """Also of a folder that was moved, on a base that was moved."""
    run, out = made("llama", "causal_lm")
    shutil.copytree(out, tmp_path / "out")
    moved = shutil.copytree(base("llama"), tmp_path / "moved")
    change(tmp_path / "out", base_model_name_or_path="owner/name")
    with pytest.raises(SystemExit, match=r"the base of .*out, 'owner/name', is not on this machine"):
        tool_modules.call("hf", "import", tmp_path / "out", tmp_path / "back")
    tool_modules.call("hf", "import", tmp_path / "out", tmp_path / "back", f"--base={moved}")
    said = capsys.readouterr().out
    assert "adapter.* from " in said and "LoRA of rank 4, alpha 6, on decoder/layers/attention/query|" in said
    np.testing.assert_array_equal(logits_here(tmp_path / "back", TOKENS), logits_here(run, TOKENS))
    tool_modules.call("hf", "export", tmp_path / "back", tmp_path / "two", "--adapter")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "two"))
    assert {name: x.tobytes() for name, x in one.items()} == {name: x.tobytes() for name, x in two.items()}
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)


@pytest.mark.slow
def test_a_run_from_an_adapter_trains_it_and_resumes_without_the_folder(made, tmp_path):
    run, out = made("llama", "causal_lm")
    shutil.copytree(out, tmp_path / "out")
    toys.write_texts(tmp_path / "texts")
    cfg = toys.recipe(tmp_path / "texts", init_from=f"hf:{tmp_path / 'out'}", optim__lr_rules=common.lora_rules())
    train_cfg = dataclasses.replace(cfg.train, total=Duration(steps=2))
    saves = dataclasses.replace(cfg.checkpoint, every=Duration(steps=1))
    cfg = dataclasses.replace(cfg, model=ModelConfig(), init_rules=KEEP, train=train_cfg, checkpoint=saves)
    train.train(cfg, tmp_path / "more")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "more" / "checkpoints" / "2")
    for name in ("summary.json", "report.html"):
        (tmp_path / "more" / name).unlink()
    train.train(cfg, tmp_path / "more")
    saved, params = run_lib.load_model(str(tmp_path / "more"))[::2]
    assert saved.adapter.rank == 4
    flat, before = param_paths.flatten(params), param_paths.flatten(run_lib.load_model(str(run))[2])
    changed = {path for path, leaf in flat.items() if np.any(np.asarray(leaf) != np.asarray(before[path]))}
    assert changed == {path for path in flat if "/lora_" in path}


def resumed(run: Path, start: str, **changes: Any) -> Any:
    """The config of a resumed run that says nothing of the adapter but `changes`."""
    cfg = run_lib.load_model(str(run))[0]
    cfg = dataclasses.replace(cfg, init_from=start, model=ModelConfig(), adapter=AdapterConfig(**changes))
    return run_lib.plan(cfg, run).cfg


def test_a_resumed_run_takes_the_adapter_of_a_published_one_and_no_other(base, made, tmp_path):
    run, out = made("llama", "causal_lm")
    own = run_lib.load_model(str(run))[0]
    dropped = resumed(run, own.init_from, kind="lora", alpha=6.0, targets=TARGETS["llama"])
    assert dropped.adapter.rank == AdapterConfig().rank != own.adapter.rank
    with pytest.raises(ConfigError, match=rf"adapter\.rank: 4 -> {dropped.adapter.rank}\n"):
        resume.refuse_changes(own, dropped, run)
    tool_modules.call("hf", "import", out, tmp_path / "back")
    back = run_lib.load_model(str(tmp_path / "back"))[0]
    assert back.adapter.rank == 4 and resumed(tmp_path / "back", f"hf:{out}").adapter == back.adapter
    with pytest.raises(
        ConfigError, match=r"adapter of .*back/checkpoints/0 is another one:\n  adapter.rank: 32 here, 4"
    ):
        resumed(tmp_path / "back", f"hf:{out}", rank=32)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "of peft"])
def test_an_adapter_of_gpt2_is_three_here(shared, made, tmp_path):
    """peft's own has one A for query, key and value; exported again it is the same."""
    shutil.copytree(made("gpt2", "causal_lm")[1], tmp_path / "out")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(weights)
    if shared:
        tensors = {name: toys.random_like(tensor, seed=len(name), scale=0.3) for name, tensor in tensors.items()}
        save_file(tensors, weights)
    tool_modules.call("hf", "import", tmp_path / "out", tmp_path / "back")
    tool_modules.call("hf", "export", tmp_path / "back", tmp_path / "two", "--adapter")
    again = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert {name: x.tobytes() for name, x in again.items()} == {name: x.tobytes() for name, x in tensors.items()}
    flat = param_paths.flatten(run_lib.load_model(str(tmp_path / "back"))[2])
    a, b = (tensors[f"base_model.model.transformer.h.1.attn.c_attn.lora_{half}.weight"] for half in "AB")
    for part, name in enumerate(("query", "key", "value")):
        mine = flat[f"decoder/layers/attention/{name}/lora_a"][1] @ flat[f"decoder/layers/attention/{name}/lora_b"][1]
        np.testing.assert_allclose(mine.T, b[16 * part : 16 * (part + 1)] @ a, atol=1e-6)


def change(folder: Path, **values: Any) -> None:
    """Sets keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made("llama", "causal_lm")[1], tmp_path / "copy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported is 'LORA'"),
        ({"bias": "all"}, "bias is 'all'; supported is 'none'"),
        ({"use_dora": True}, "use_dora is True, not supported"),
        ({"layers_to_transform": [1]}, r"layers_to_transform is \[1\], not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; supported is True"),
        ({"of_next_year": 2}, "of_next_year is 2, not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is .* ranks differ by module"),
        ({"r": "8"}, "r is '8'; expected a whole number"),
        ({"r": 10**400, "use_rslora": True}, "r is 10*; expected a whole number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10*; expected a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a number above 0"),
        ({"r": 8}, r"lora_A.weight' has shape \[4, \d+\]; the sizes in adapter_config.json need \[8, \d+\]"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, r"no tensor '.*0\.self_attn\.k_proj\.lora_A"),
        ({"target_modules": ["layers.1.self_attn.k_proj"]}, r"no tensor '.*1\.self_attn\.k_proj\.lora_A"),
        ({"modules_to_save": ["lm_head"]}, r"no tensor 'base_model\.model\.lm_head\.weight', but its modules_to_save"),
        ({"base_model_name_or_path": "~nosuchuser/x"}, "'~nosuchuser/x', is not on this machine"),
        ({"base_model_name_or_path": "x" * 5000}, "'x*', is not on this machine"),
        ({"base_model_name_or_path": "a\0b"}, "is not on this machine"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path; name it as .*copy,BASE"),
    ],
)
def test_an_adapter_that_asks_for_something_else_is_refused(values, message, folder):
    hf.open_model(folder)
    change(folder, **values)
    with pytest.raises(CheckpointError, match=f"copy.*{message}"):
        hf.open_model(folder)


def test_rank_stabilised_lora_is_divided_by_the_root_of_its_rank(folder):
    change(folder, use_rslora=True)
    assert hf.open_model(folder).adapter.alpha == 6.0 * 2.0


DOWN = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), f"no tensor '{DOWN}'"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :2]}), rf"'{DOWN}' has shape \[16, 2\]"),
        (lambda tensors: tensors.update({DOWN[:-7]: tensors[DOWN]}), f"'{DOWN[:-7]}' is no tensor of a llama"),
        (lambda tensors: tensors.update({"model.norm.weight": np.ones(16)}), "'model.norm.weight' is no tensor of a"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora_B" in name], r"no tensor '.*lora_B"),
    ],
)
def test_wrong_tensors_of_an_adapter_are_refused_by_name(spoil, message, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"copy.*{message}"):
        hf.open_model(folder)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("classifier.weight", r"no tensor 'base_model\.model\.classifier\.weight'"),
        ("classifier.", r"no tensor 'base_model\.model\.classifier\.weight'"),
        ("", r"no tensor 'base_model\.model\..*key\.lora_A"),
    ],
)
def test_tensors_without_the_prefix_of_peft_are_refused(cut, message, made, tmp_path):
    weights = shutil.copytree(made("bert", "classification")[1], tmp_path / "copy") / "adapter_model.safetensors"
    prefix = "base_model.model."
    tensors = load_file(weights).items()
    save_file({name.removeprefix(prefix) if name.startswith(prefix + cut) else name: x for name, x in tensors}, weights)
    with pytest.raises(CheckpointError, match=f"copy/adapter_model.safetensors.*{message}"):
        hf.open_model(weights.parent)


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": 1.5}', '{"a": "1"}', "[]", "3", "{", "[" * 100_000])
def test_fingerprints_that_are_none_are_refused(text, folder):
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"lm_base_fingerprints": text})
    with pytest.raises(CheckpointError, match=r"copy/adapter_model\.safetensors: its metadata .* is no JSON of"):
        hf.open_model(folder)


@pytest.mark.parametrize(
    ("less", "why"),
    [
        (["classifier.weight", "classifier.bias"], "classifier.weight', but its modules_to_save name the module"),
        (["classifier.bias"], "classifier.bias', but it has others of this module"),
        (["bert.pooler.dense.weight"], "bert.pooler.dense.weight', but it has others of this module"),
    ],
)
def test_a_head_that_an_adapter_has_in_part_or_only_names_is_refused(less, why, made, tmp_path):
    """peft adds the names classifier and score to those of any model; a BERT has no score."""
    folder = shutil.copytree(made("bert", "classification")[1], tmp_path / "copy")
    change(folder, modules_to_save=["classifier", "score", "pooler"])
    hf.open_model(folder)
    weights = folder / "adapter_model.safetensors"
    gone = {f"base_model.model.{name}" for name in less}
    save_file({name: x for name, x in load_file(weights).items() if name not in gone}, weights)
    with pytest.raises(
        CheckpointError, match=rf"copy/adapter_model\.safetensors has no tensor 'base_model\.model\.{why}"
    ):
        hf.open_model(folder)


def test_a_head_without_axes_is_refused(made, tmp_path):
    folder = shutil.copytree(made("bert", "classification")[1], tmp_path / "copy")
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.classifier.bias": np.float32(1)[...]}, weights)
    cfg = run_lib.load_model(str(made("bert", "classification")[0]))[0]
    cfg = dataclasses.replace(cfg, init_from=f"hf:{folder}", init_rules=KEEP, adapter=AdapterConfig())
    with pytest.raises(ConfigError, match="head/classifier/bias"):
        run_lib.plan(cfg, None)


@pytest.mark.parametrize("names", [("vocab.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",)])
def test_the_tokenizer_is_that_of_the_adapter_if_its_files_are_whole(names, base, folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for name in names:
        (folder / name).write_text("")
    own = names != ("vocab.json",)
    assert hf.open_model(folder).tokenizer_path == (folder if own else base("llama"))


def test_damaged_pickled_and_ambiguous_folders_are_refused(folder):
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-10], b"", b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is no safetensors file, or damaged"):
            hf.open_model(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"found adapter_model\.bin, which are not read: loading them may execute"
    ):
        hf.open_model(folder)
    weights.symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link to /etc/passwd, outside of"):
        hf.open_model(folder)
    weights.unlink()
    weights.write_bytes(whole)
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"has both adapter_config\.json and the weights of a whole model"):
        hf.open_model(folder)


def test_another_base_is_refused_by_shape_or_by_fingerprint(base, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has no LoRA of any module of a gpt2"):
        hf.open_model(f"{folder},{base('gpt2')}")
    narrow = transformer.resolve(dataclasses.replace(MODELS["llama"], mlp_dim=32), vocab_size=420, seq_len=64)
    export.export(tmp_path / "narrow", narrow, toys.random_params(narrow), vocab_size=420)
    with pytest.raises(CheckpointError, match=r"down_proj.lora_A.weight' has shape \[4, 24\].*need \[4, 32\]"):
        hf.open_model(f"{folder},{tmp_path / 'narrow'}")
    other = shutil.copytree(base("llama"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(SystemExit, match=r"other is not the base of .*copy: 'decoder/final_norm/scale' differs \(1 of"):
        tool_modules.call("hf", "import", folder, tmp_path / "run", f"--base={other}")


def test_a_config_that_contradicts_the_adapter_is_refused(base, folder):
    cfg = toys.recipe(folder, init_from=f"hf:{folder}", adapter__kind="lora", adapter__rank=16, adapter__alpha=3.0)
    cfg = dataclasses.replace(cfg, model=ModelConfig())
    with pytest.raises(ConfigError, match=r"adapter.rank: 16 here, 4 there\n  adapter.alpha: 3.0 here, 6.0 there"):
        run_lib.plan(cfg, None)
    with pytest.raises(SystemExit, match="is an adapter; verify compares whole models, such as"):
        tool_modules.call("hf", "verify", folder)
