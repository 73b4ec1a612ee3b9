"""lm/planner/train_compile.py and tools/plan.py: plans of a small model by the real TPU compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm.config.schema import ConfigError
from lm.planner import topology, train_compile

ROOT = Path(__file__).resolve().parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install -e '.[tpu]'"
)
LAYERS, WIDTH, INNER, VOCAB, LENGTH = 3, 256, 512, 1024, 256
CHIPS, ROWS = 4, 8
RECIPE = "configs/bench/v5e16_124m.py"
SMALL = {
    "model.num_layers": LAYERS,
    "model.embed_dim": WIDTH,
    "model.num_heads": 2,
    "model.mlp_dim": INNER,
    "tokenizer.vocab_size": VOCAB,
    "model.vocab_size": VOCAB,
    "data.seq_len": LENGTH,
    "data.batch_size": ROWS,
    "mesh.fsdp": CHIPS,
}

SENTENCES = """
from configs.bench import v5e16_124m
from lm.tasks import task_config

def get_config():
    c = v5e16_124m.get_config()
    c.task = task_config("classification", labels=("0", "1"))
    return c
"""


def plan(tmp_path, *arguments, recipe=RECIPE, code=0, seconds=300, **changes):
    """(figures, program, output) of tools/plan.py on a benchmark recipe, made small."""
    files = [tmp_path / "plan.json", tmp_path / "program.txt"]
    keys = [f"--config.{key}={value}" for key, value in (SMALL | changes).items()]
    command = [sys.executable, "tools/plan.py", f"--config={recipe}", "--topology=v5e:2x2"]
    command += [*keys, *arguments, f"--json={files[0]}", f"--dump_hlo={files[1]}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=seconds)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(files[0].read_text()) if files[0].exists() else {}
    return figures, files[1].read_text() if files[1].exists() else "", done.stdout + done.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The plan of the small model itself."""
    return plan(tmp_path_factory.mktemp("plan"), "--tokens=1e9", "--dollars_per_chip_hour=2")


@needs_libtpu
def test_a_plan_agrees_with_arithmetic(small):
    found, program, said = small
    kernels = 4 * WIDTH**2 + 3 * WIDTH * INNER
    parameters = LAYERS * (kernels + 2 * WIDTH) + 2 * VOCAB * WIDTH + WIDTH
    assert found["parameters"] == found["trained_parameters"] == parameters
    assert found["chips"] == CHIPS and found["tokens_per_step"] == ROWS * LENGTH
    tokens = ROWS * LENGTH / CHIPS
    products = 6 * (LAYERS * kernels + VOCAB * WIDTH) * tokens
    # No matmul is recomputed; the rest is attention, forward and backward, whose single block is not halved.
    attention = 6 * LAYERS * 2 * tokens * LENGTH * WIDTH
    assert found["hlo_flops"] == pytest.approx(products + attention, rel=0.01)
    # Sharded over the chips: float32 parameters and two moments; norms are too small and replicated.
    sharded = 4 * (LAYERS * kernels + 2 * VOCAB * WIDTH) / CHIPS
    assert found["state_parameters"] == pytest.approx(sharded, rel=0.01)
    assert found["state_optimizer"] == pytest.approx(2 * sharded, rel=0.01)
    assert found["largest_replicated"]["bytes"] < 2**20
    assert found["fits"] and found["hbm_peak"] > found["hbm_arguments"]
    assert "splash" in program and "estimated MFU" in said and "$" in said


@needs_libtpu
def test_weights_are_gathered_in_bfloat16_and_optimizer_state_is_not_gathered(small):
    found, _, _ = small
    gathers = {name: row for name, row in found["collectives"].items() if name.startswith("all-gather")}
    weights = 2 * (LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER) + 2 * VOCAB * WIDTH)
    in_bfloat16 = sum(row["bytes"] for name, row in gathers.items() if " bf16 " in name)
    assert weights <= in_bfloat16 <= 2.2 * weights  # once forward and once backward
    assert sum(row["bytes"] for name, row in gathers.items() if " f32 " in name) < 0.02 * weights


@needs_libtpu
def test_gradients_of_layers_are_reduced_by_asynchronous_rings(small):
    """A kernel's four parts take three steps each, half in each direction; so does the float32 output projection."""
    found, _, _ = small
    sent = {name: row for name, row in found["collectives"].items() if name.startswith("collective-permute")}
    sizes = {"bf16": 2 * LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER), "f32": 4 * WIDTH * VOCAB}
    assert {f"collective-permute {dtype} over fsdp async" for dtype in sizes} == sent.keys()
    for dtype, size in sizes.items():
        each = sent[f"collective-permute {dtype} over fsdp async"]["bytes"]
        assert each == pytest.approx(size * (CHIPS - 1) / CHIPS), dtype
    assert not any(name.startswith("all-reduce bf16") for name in found["collectives"])


@pytest.mark.slow
@needs_libtpu
def test_with_lora_only_adapters_have_moments_and_an_evaluation_step_has_no_optimizer(tmp_path):
    """LoRA under context parallelism: the attention kernel has a device's own queries and all keys."""
    changes = {"adapter.kind": "lora", "adapter.rank": 4, "data.seq_len": 2 * LENGTH, "data.batch_size": ROWS // 2}
    changes |= {"mesh.fsdp": 2, "mesh.context": 2}
    rules = "--config.optim.lr_rules=((r'.*/lora_.*', 1.0), (r'.*', 0.0))"
    found, program, _ = plan(tmp_path, rules, **changes)
    per_layer = 2 * 4 * (WIDTH + WIDTH)  # A and B of query and value
    assert found["trained_parameters"] == LAYERS * per_layer
    assert found["state_optimizer"] < 3 * 4 * LAYERS * per_layer
    queries, keys = (f"bf16[2,2,{length},128]" for length in (LENGTH, 2 * LENGTH))
    kernels = [line for line in program.splitlines() if "splash" in line and "tpu_custom_call" in line]
    assert kernels and all(queries in line and keys in line for line in kernels)
    evaluated, _, _ = plan(tmp_path, "--evaluation")
    assert evaluated["hlo_flops"] < found["hlo_flops"] / 1.8
    # The evaluation step takes only the parameters; the moments stay in memory beside it.
    assert evaluated["state_optimizer"] > evaluated["hbm_arguments"] > evaluated["state_parameters"]
    assert evaluated["hbm_peak"] > evaluated["state_optimizer"] + evaluated["hbm_arguments"]


@pytest.mark.slow
@needs_libtpu
def test_a_missing_init_from_is_left_out_and_a_task_without_token_prediction_has_no_mfu(tmp_path):
    """Fine-tuning of a run that does not exist yet, with a damaged result in the cache."""
    recipe, cache = tmp_path / "sentences.py", tmp_path / "cache"
    recipe.write_text(SENTENCES)
    changes = {"data.format": "table", "data.separator": "", "data.packing": "pad", "model.pool": "last"}
    changes |= {"init_from": "runs/not/yet"}
    found, _, said = plan(tmp_path, f"--cache={cache}", recipe=recipe, **changes)
    assert "no checkpoint under 'runs/not/yet/checkpoints'" in said and "vocabulary of tokenizer.vocab_size=1,0" in said
    assert found["fits"] and found["model_flops"] is None and "estimated_mfu" not in found and "MFU" not in said
    (kept,) = cache.iterdir()
    kept.write_text('{"fits": tr')
    (tmp_path / "program.txt").unlink()
    again = [f"--config.{key}={value}" for key, value in (SMALL | changes).items()]
    command = [sys.executable, "tools/plan.py", f"--config={recipe}", "--topology=v5e:2x2", *again]
    done = subprocess.run([*command, f"--cache={cache}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{kept} is damaged: compiling again" in done.stderr and json.loads(kept.read_text())["fits"]


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--slices=2"], "mesh.dcn_data=1: expected 2, the number of slices"),
        (["--topology=v5e:4x4x4"], "--topology=v5e:4x4x4: expected one of v5e:AxB, v5p:AxBxC, v6e:AxB"),
        (
            ["--json=/not/there/a.json"],
            "--json=/not/there/a.json: expected a file in a folder that exists",
        ),
        (["--dump_hlo=."], "--dump_hlo=.: expected a file in a folder that exists"),
        (["--dollars_per_chip_hour=1"], "--dollars_per_chip_hour needs --tokens"),
        (["--search", "--tokens=1e9"], "--tokens has no effect with --search"),
        (["--config=configs/not_there.py"], "No such file or directory: 'configs/not_there.py'"),
    ],
    ids=str,
)
def test_wrong_flags_are_refused_before_compiling(arguments, why):
    small = [f"--config.{key}={value}" for key, value in SMALL.items()]
    command = [sys.executable, "tools/plan.py", f"--config={RECIPE}", *small, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and why in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


@needs_libtpu
def test_a_step_that_does_not_fit_exits_with_3_and_lists_its_largest_arrays(tmp_path):
    found, _, said = plan(tmp_path, code=3, **{"data.batch_size": 4 * 16_384, "model.remat": "none"})
    assert found["fits"] is False and "does not fit" in said and "largest" in said
    assert found["hbm_needed"] > 16 * topology.GIB
    assert f"{4 * 16_384}, {LENGTH}" in found["why"]


def analysis(**sizes):
    """A result of `compiled.memory_analysis()`, in bytes; 0 for sizes not given."""
    parts = ("argument", "output", "alias", "temp")
    names = [f"{host}{part}_size_in_bytes" for host in ("", "host_") for part in parts]
    return SimpleNamespace(
        **dict.fromkeys([*names, "peak_memory_in_bytes"], 0) | {f"{k}_in_bytes": v for k, v in sizes.items()}
    )


def test_host_memory_is_separate_from_the_chips():
    """The peak of an offloaded step is of both memories together; the chip's is bounded by what is allocated on it."""
    chip = {"argument_size": 5, "output_size": 4, "alias_size": 3, "temp_size": 20}
    assert train_compile.memory(analysis(**chip, peak_memory=22)) == {
        "arguments": 5,
        "temporaries": 20,
        "peak": 22,
        "host": 0,
    }
    host = {"host_temp_size": 80, "host_argument_size": 2, "host_output_size": 7, "host_alias_size": 6}
    found = train_compile.memory(analysis(**chip, **host, peak_memory=100))
    assert found == {"arguments": 5, "temporaries": 20, "peak": 5 + 1 + 20, "host": 80 + 2 + 1}
    assert train_compile.memory(analysis(**chip, **host, peak_memory=24))["peak"] == 24


@pytest.mark.parametrize(
    ("compiled", "is_possible"), [(100.0, True), (99.0, True), (97.0, False), (20.0, False), (180.0, True)]
)
def test_compiled_flops_below_the_needed_flops_are_an_error(compiled, is_possible):
    """100 FLOPs are needed with attention's causal half, and 110 in full; only what the mask hides may be missing."""
    lowered = SimpleNamespace(needed_flops=100.0, model_flops=110.0)
    if is_possible:
        train_compile.check_ratio(lowered, compiled)
    else:
        with pytest.raises(
            train_compile.ImpossibleRatio, match=f"{compiled:.4g} FLOPs .* fewer than the 100 .* cannot be above 1"
        ):
            train_compile.check_ratio(lowered, compiled)
    train_compile.check_ratio(SimpleNamespace(needed_flops=None), compiled)


def test_the_largest_buffers_are_parsed_from_the_compilers_report():
    """The report has the form in which XLA lists allocations."""
    report = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.
Used 17.32G of 15.75G hbm. Exceeded hbm capacity by 1.57G.

  1. Size: 2.06G
     Operator: op_name="jit(train_step)/layers/mlp/up" source_file="x.py"
     Shape: bf16[24,4,2048,5632]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 2.06G
"""
    message = train_compile._explain_refusal(report, "")
    assert "needs 17.32G of the chip's 15.75G" in message
    assert "2.06G  bf16[24,4,2048,5632]  jit(train_step)/layers/mlp/up" in message


def test_the_memory_needed_is_parsed_from_both_forms_of_the_error():
    used = "Ran out of memory in memory space hbm. Used 17.32G of 15.75G hbm. Exceeded"
    temporaries = "the total memory required for HLO temporaries (29.03G) exceeds available HBM (15.75G)."
    assert train_compile._needed_bytes(used, 2.0**30) == pytest.approx(17.32 * 2**30)
    assert train_compile._needed_bytes(temporaries, 2.0**30) == pytest.approx(30.03 * 2**30)
    assert train_compile._needed_bytes("something else", 2.0**30) == 0


def step_flops(layers, width, heads, kv_heads, inner, vocab, length, experts, choices):
    """FLOPs of one position of a training step with remat 'full', by hand: each matmul of a layer runs forward,
    recomputed, and twice backward. Splash attention skips the blocks of 512 above the diagonal; its backward pass has
    four products, its forward pass two."""
    head = width // heads
    projections = 2 * width * head * (2 * heads + 2 * kv_heads)
    experts_mlp = choices * 3 * 2 * width * inner + 2 * width * experts
    blocks = max(length // 512, 1)
    product = 2 * heads * head * length * (blocks + 1) / (2 * blocks)
    forward, backward = projections + experts_mlp + 2 * product, 2 * (projections + experts_mlp) + 4 * product
    return layers * (forward + forward + backward) + 3 * 2 * width * vocab


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("expert", [1, 2])
def test_experts_count_with_the_rows_that_are_routed_to_them(tmp_path, expert):
    """Also under expert parallelism, where devices have buffers for each other's rows."""
    changes = {
        "model.num_experts": 8,
        "model.experts_per_token": 2,
        "model.remat": "full",
        "mesh.fsdp": CHIPS // expert,
        "mesh.expert": expert,
    }
    found, program, said = plan(tmp_path, **changes, **{"train.micro_batches": 2})
    by_hand = step_flops(LAYERS, WIDTH, 2, 2, INNER, VOCAB, LENGTH, 8, 2) * ROWS * LENGTH / CHIPS
    assert found["hlo_flops"] == pytest.approx(by_hand, rel=0.02)
    assert "gmm" in program and found["not_counted"] == {} and 0.7 < found["model_over_hlo_flops"] < 0.8
    assert sum(found["estimated_ms"][name] for name in ("matmul", "kernel")) > by_hand / 197e12 * 1e3
    assert found["estimated_mfu_causal"] < found["estimated_mfu"] and "attention's causal half" in said
    rate = found["tokens_per_step"] / CHIPS / found["estimated_step_ms"] * 1e3
    assert found["estimated_tokens_per_second_a_chip"] == pytest.approx(rate, rel=0.01)


@pytest.mark.slow
@needs_libtpu
def test_offloaded_activations_are_in_host_memory(tmp_path):
    """Results of all matmuls of a layer but the last, in bfloat16, and the attention kernel's log-sum-exp."""
    found, _, said = plan(tmp_path, **{"model.remat": "offload", "data.seq_len": 1024})
    tokens = ROWS * 1024 / CHIPS
    kept = LAYERS * tokens * 2 * (5 * WIDTH + 2 * INNER)
    assert kept <= found["host_memory"] < 1.05 * kept
    for way in ("to_host", "from_host"):
        assert kept <= found["host_copies"][way] < 1.05 * kept
    assert found["fits"] and found["hbm_peak"] <= found["hbm_arguments"] + 1.1 * found["hbm_temporaries"]
    copied = 1e3 * sum(found["host_copies"].values()) / topology.CHIPS["v5e"].host_bandwidth
    assert found["estimated_ms"]["host"] + found["estimated_ms"]["host_hidden"] == pytest.approx(copied, rel=0.01)
    assert "host memory, a chip's share" in said and "of 64.00 GiB" in said


@pytest.mark.slow
@needs_libtpu
def test_mixtral_on_a_mesh_that_splits_the_axes_of_the_slice(tmp_path):
    """Eight layers of Mixtral 8x7B on fsdp=16 x expert=4 and 8x8 chips: their FLOPs agree with arithmetic."""
    changes = {"num_layers": 8, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 14336}
    sizes = {f"model.{key}": value for key, value in changes.items()} | {"model.vocab_size": 32_000}
    sizes |= {"tokenizer.vocab_size": 32_000, "data.seq_len": 4096, "data.batch_size": 64, "loss.chunk_len": 512}
    # One row a chip: with four, the buffers for the rows of the chips of an expert axis do not fit.
    sizes |= {
        "model.num_experts": 8,
        "model.experts_per_token": 2,
        "model.remat": "full",
        "mesh.fsdp": 16,
        "mesh.expert": 4,
    }
    found, _, _ = plan(tmp_path, "--topology=v6e:8x8", seconds=3000, **sizes)
    by_hand = step_flops(8, 4096, 32, 8, 14336, 32_000, 4096, 8, 2) * 4096
    assert found["hlo_flops"] == pytest.approx(by_hand, rel=0.02)
    assert sum(found["estimated_ms"][name] for name in ("matmul", "kernel")) > by_hand / 918e12 * 1e3
    assert found["mesh"]["fsdp"] == 16 and found["mesh"]["expert"] == 4


@pytest.mark.slow
@needs_libtpu
def test_only_a_chips_shard_of_the_gradients_crosses_between_slices(tmp_path):
    """Hierarchical reduction: reduce-scatter inside a slice, then all-reduce of the shards between slices."""
    found, _, _ = plan(tmp_path, "--slices=2", **{"mesh.dcn_data": 2, "data.batch_size": 2 * ROWS})
    across = {name: row["bytes"] for name, row in found["collectives"].items() if "over dcn_data (2)" in name}
    layers = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER) / CHIPS
    assert sum(size for name, size in across.items() if " bf16 " in name) == pytest.approx(2 * layers, rel=0.01)
    # Gradients of the embedding and the output projection, in float32; shards narrower than 128 are padded.
    rest = 4 * 2 * VOCAB * WIDTH / CHIPS
    assert rest <= sum(size for name, size in across.items() if " f32 " in name) < 1.6 * rest
    assert found["chips"] == 2 * CHIPS and found["estimated_ms"]["between"] > 0
    assert found["mesh"]["dcn_data"] == 2
    assert all("over fsdp" in name for name in found["collectives"].keys() - across)
    assert found["host_bytes_to_save"] == pytest.approx(4 * 3 * found["parameters"], rel=0.01), "each array once"


@pytest.mark.parametrize("name", ["v5e", "v9:4x4", "v5e:4", "v5e:4x", "v5e:4x0", "v5e:4x4x4", "v5p:4x4", ""])
def test_a_malformed_topology_is_refused(name):
    with pytest.raises(ConfigError, match="expected one of v5e:AxB, v5p:AxBxC, v6e:AxB"):
        topology.parse(name, 1)


def test_only_axes_of_the_full_length_wrap_around():
    assert [topology.parse(f"v5e:{shape}", 1).links for shape in ("1x1", "2x2", "4x4", "4x16", "16x16")] == [
        1,
        2,
        2,
        3,
        4,
    ]


def test_a_missing_compiler_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\.\[tpu\]"):
        train_compile.prepare("")
