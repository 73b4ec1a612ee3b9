"""lm/planner/candidates.py, search.py, run_search.py: arithmetic, choices, resuming and output of a search."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags
from ml_collections import config_flags
from test_planner_train_compile import LENGTH, ROOT, SMALL, needs_libtpu

from lm import config
from lm.config.schema import ConfigError, flatten
from lm.models.remat import REMAT_POLICIES
from lm.parallel.mesh import AXES
from lm.parallel.xla_flags import libtpu
from lm.planner import candidates as candidates_lib
from lm.planner import search, topology
from lm.planner.candidates import Candidate
from lm.planner.search import Result
from lm.tasks import build_config

GIB = topology.GIB
RECIPE = ROOT / "configs/bench/v5e16_124m.py"


def recipe(argv=()):
    """A benchmark recipe, made small, as parsed from a command line."""
    argv = ["x", f"--config={RECIPE}", *(f"--config.{key}={value}" for key, value in SMALL.items()), *argv]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(values.read_flags_from_files(argv, force_gnu=False))
    return build_config(holder.value)


@pytest.fixture(scope="module")
def small():
    """(config, slices, candidates, guesses) of the small model on 2 x 2 chips."""
    cfg, slices = recipe(), topology.parse("v5e:2x2", 1)
    candidates = candidates_lib.search_space(cfg, slices, ["--a", "--b"])
    model = candidates_lib.model_sizes(cfg)
    return cfg, slices, candidates, [candidates_lib.guess(cfg, model, slices, setting) for setting in candidates]


def candidate(remat="minimal", mesh=(1, 4, 1, 1, 1), micro=1, chunk=0, flags=""):
    return Candidate(mesh, remat, micro, chunk, flags)


ON_CHIP = tuple(policy for policy in candidates_lib.POLICIES if policy != "offload")


def test_every_remat_policy_is_known_and_each_saves_less_than_the_one_before():
    assert tuple(candidates_lib._SAVED) == candidates_lib.POLICIES == (*ON_CHIP, "offload")
    assert {*candidates_lib.POLICIES} == {*REMAT_POLICIES}
    kept = [set(candidates_lib._SAVED[policy]) for policy in ON_CHIP]
    assert all(more >= less for more, less in itertools.pairwise(kept))
    assert candidates_lib._SAVED["offload"] == candidates_lib._SAVED["minimal"]


def test_candidates_fit_the_chips_and_keep_the_batch(small):
    cfg, _, candidates, _ = small
    assert len(set(candidates)) == len(candidates)
    meshes = {setting.mesh for setting in candidates}
    assert (1, 4, 1, 1, 1) in meshes and (1, 2, 1, 1, 2) in meshes and (1, 1, 1, 4, 1) in meshes
    for setting in candidates:
        sizes = dict(zip(AXES, setting.mesh, strict=True))
        assert sizes["expert"] == 1 and sizes["tensor"] <= cfg.model.num_heads
        rows = sizes["data"] * sizes["fsdp"] * setting.micro_batches
        assert cfg.data.batch_size % rows == 0
        changed = candidates_lib.apply(cfg, setting, 1)
        allowed = {*candidates_lib.KEYS, "mesh.dcn_data"}
        assert {key for key in config.diff(cfg, changed)} <= allowed
    assert {setting.flags for setting in candidates} == {"--a", "--b"}
    assert candidates[candidates_lib.index_of_config(cfg, candidates)] == candidate(cfg.model.remat, flags="--a")
    assert candidates_lib.index_of_config(cfg, [candidate("full"), candidate("full", micro=2)]) is None


def test_the_usual_compiler_flags_are_tried_first(small):
    model = candidates_lib.model_sizes(small[0])._replace(width=2048)
    large = model._replace(
        kernels=[candidates_lib.Kernel("up", 2, 2048, 8192, "embed", "mlp", 0)]
    )  # 32 MiB in bfloat16
    usual = libtpu("v5e", 2048)
    first, *others = candidates_lib.flag_sets("v5e", large)
    assert first == usual and len({usual, *others}) == len(others) + 1 == 6
    assert str(candidate(flags=usual)) == "fsdp=4 minimal micro=1 chunk=0 windowed=24 vmem_kib=28672"
    assert all("windowed_einsum_mib=" in each and "scoped_vmem_limit_kib=" in each for each in others)
    wide = large._replace(width=4096)
    for chip in ("v5e", "v5p"):  # the usual vector memory is combined with every threshold
        flags = [setting.partition(" ") for setting in candidates_lib.flag_sets(chip, wide)]
        assert {(a, libtpu(chip, 4096).partition(" ")[2]) for a, _, _ in flags} <= {(a, b) for a, _, b in flags}
    unknown = candidates_lib.flag_sets("v6e", large)
    assert unknown[0] == libtpu("v6e", 2048) and set(unknown[1:]) == {first, *others}


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_the_windowed_einsum_threshold_is_not_searched_without_large_kernels(small, chip):
    found = candidates_lib.flag_sets(chip, candidates_lib.model_sizes(small[0]))
    assert found[0] == libtpu(chip, SMALL["model.embed_dim"])
    assert len({setting.partition(" ")[0] for setting in found}) == 1 and len(set(found)) == len(found) >= 3


def test_the_guess_for_experts_agrees_with_a_count_by_hand():
    """Each position is multiplied by its chosen experts; devices that share experts buffer each other's rows."""
    cfg, slices = (
        recipe(["--config.model.num_experts=8", "--config.model.experts_per_token=2"]),
        topology.parse("v5e:2x2", 1),
    )
    dense = candidates_lib.model_sizes(recipe([f"--config.model.mlp_dim={2 * SMALL['model.mlp_dim']}"]))
    model, layers = candidates_lib.model_sizes(cfg), SMALL["model.num_layers"]
    width, inner = SMALL["model.embed_dim"], SMALL["model.mlp_dim"]
    for expert in (1, 2):
        mesh = (1, 4 // expert, expert, 1, 1)
        minimal, full = (
            candidates_lib.guess(cfg, model, slices, candidate(remat, mesh=mesh)) for remat in ("minimal", "full")
        )
        tokens = cfg.data.batch_size * LENGTH / 4
        assert minimal.at_least - full.at_least == 2 * tokens * layers * (5 * width + 2 * 2 * expert * inner)
    # Like a dense model of twice the width, plus the weights and moments of the six other experts.
    bare = {"state_bytes": 0.0, "item": 0, "vocab": 0}
    times = [
        candidates_lib.guess(cfg, each._replace(**bare), slices, candidate(mesh=(1, 1, 1, 1, 4))).ms
        for each in (model, dense)
    ]
    router = (
        6
        * layers
        * width
        * 8
        * cfg.data.batch_size
        * LENGTH
        / (candidates_lib.MATMUL_EFFICIENCY * slices.chip.peak_flops)
    )
    more = 8 * layers * 3 * 6 * width * inner / 4 / slices.chip.hbm_bandwidth  # read and written
    assert times[0] - times[1] == pytest.approx(1e3 * (router + more), rel=0.1)


def test_offloaded_activations_take_no_memory_of_the_chip_and_are_copied(small):
    """Everything that 'minimal' saves but the layers' inputs is copied both ways; only the time beyond the computation
    is waited for. With too little host memory the candidate cannot fit."""
    cfg, slices, candidates, _ = small
    assert any(setting.remat == "offload" for setting in candidates)
    model = candidates_lib.model_sizes(cfg)
    kept = LENGTH * SMALL["data.batch_size"] / 4 * SMALL["model.num_layers"] * 2
    kept *= 5 * SMALL["model.embed_dim"] + 2 * SMALL["model.mlp_dim"]

    def guess(remat, bandwidth=1e30, memory=1e30):
        chip = slices.chip._replace(host_bandwidth=bandwidth, host_bytes=memory)
        return candidates_lib.guess(cfg, model, slices._replace(chip=chip), candidate(remat))

    minimal, offload, full = guess("minimal"), guess("offload"), guess("full")
    assert offload.at_least == full.at_least == minimal.at_least - kept
    assert offload.ms == pytest.approx(minimal.ms)
    slow = kept / 1e-3  # a millisecond each way
    assert 0 < guess("offload", slow).ms - minimal.ms < 2
    assert guess("offload", slow / 1e6).ms - minimal.ms == pytest.approx(2e6, rel=1e-3)
    assert math.isinf(guess("offload", memory=kept - 1).at_least) and guess("offload", memory=kept) == offload
    pinned = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="offload"))
    assert {setting.remat for setting in candidates_lib.search_space(pinned, slices, [""], ["model.remat"])} == {
        "offload"
    }


def test_pinned_keys_keep_their_values_and_an_empty_search_space_is_an_error(small):
    cfg, slices, _, _ = small
    found = candidates_lib.search_space(
        cfg, slices, [""], ["mesh.fsdp", "model.remat", "loss.chunk_len", "train.micro_batches"]
    )
    assert {setting.mesh for setting in found} == {(1, 4, 1, 1, 1)} and {setting.remat for setting in found} == {
        cfg.model.remat
    }
    assert len(found) == 1
    odd = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=3, seq_len=255))
    with pytest.raises(ConfigError, match="divides"):
        candidates_lib.search_space(odd, slices, [""], ["mesh.tensor"])
    with pytest.raises(ConfigError, match="dcn_data"):
        candidates_lib.search_space(cfg, topology.parse("v5e:2x2", 2), [""])


def test_the_memory_bound_agrees_with_a_count_by_hand(small):
    cfg, _, candidates, guesses = small
    by_setting = dict(zip(candidates, guesses, strict=True))
    layers, width, inner = (SMALL[f"model.{key}"] for key in ("num_layers", "embed_dim", "mlp_dim"))
    norms = (2 * layers + 1) * width
    split = layers * (4 * width**2 + 3 * width * inner) + 2 * SMALL["model.vocab_size"] * width
    tokens = cfg.data.batch_size * LENGTH / 4
    # Float32 parameters and two moments, sharded over 4 chips, norms replicated; in bfloat16 the input of each layer,
    # and for 'minimal' queries, keys, values, the attention kernel's result, its projection and both halves of the MLP.
    full = by_setting[candidate("full", flags="--a")].at_least
    assert full == pytest.approx(12 * (split / 4 + norms) + 2 * tokens * layers * width, rel=1e-6)
    minimal = by_setting[candidate("minimal", flags="--a")].at_least
    assert minimal - full == pytest.approx(2 * tokens * layers * (5 * width + 2 * inner))
    # Two micro-batches: half of the activations, and a float32 accumulator of gradients.
    halved = by_setting[candidate("minimal", micro=2, flags="--a")].at_least
    state = full - 2 * tokens * layers * width
    assert halved == pytest.approx(state + (minimal - state) / 2 + state / 3)
    # Tensor parallelism over 2 of the 4: queries and the MLP are sharded, the input of a layer is not.
    tensor = by_setting[candidate("full", mesh=(1, 2, 1, 1, 2), flags="--a")].at_least
    assert tensor - state == pytest.approx(2 * (2 * tokens) * layers * width, rel=0.01)


def test_a_candidate_that_saves_more_than_one_that_does_not_fit_is_ruled_out():
    assert candidates_lib.needs_no_less_memory(
        candidate("none"), candidate("attention")
    ) and candidates_lib.needs_no_less_memory(candidate(), candidate())
    assert not candidates_lib.needs_no_less_memory(candidate("full"), candidate("attention"))
    assert candidates_lib.needs_no_less_memory(
        candidate(chunk=0), candidate(chunk=128)
    ) and not candidates_lib.needs_no_less_memory(candidate(chunk=64), candidate(chunk=128))
    assert candidates_lib.needs_no_less_memory(candidate("offload", chunk=0), candidate("offload", chunk=64))
    assert not candidates_lib.needs_no_less_memory(
        candidate("none"), candidate("offload")
    ) and not candidates_lib.needs_no_less_memory(candidate("offload"), candidate())
    for other in (candidate(mesh=(4, 1, 1, 1, 1)), candidate(flags="--x"), candidate(micro=2)):
        assert not candidates_lib.needs_no_less_memory(candidate("none"), other)


def test_the_next_candidate_is_the_most_promising_one_that_may_fit():
    candidates = [candidate(remat, flags=flag) for remat in ON_CHIP for flag in ("--a", "--b")]
    guesses = [
        candidates_lib.Guess(peak, peak, ms)
        for peak, ms in zip((20, 12, 8, 6, 4), (100.0, 101.0, 110.0, 120.0, 130.0), strict=True)
        for _ in range(2)
    ]
    number = {setting: i for i, setting in enumerate(candidates)}

    def choose(**known):
        found = {number[candidate(name.split("_")[0], flags=f"--{name[-1]}")]: each for name, each in known.items()}
        chosen = search.choose(candidates, guesses, 16.0, found)
        return chosen if chosen is None else (candidates[chosen].remat, candidates[chosen].flags)

    assert choose() == ("minimal", "--a"), "by arithmetic 'none' cannot fit"
    assert choose(minimal_a=None) != ("minimal", "--a"), "a candidate that is being compiled is not chosen again"
    slow = Result(300.0, 12.0, True)
    assert choose(minimal_a=slow)[1] == "--b", "flags that were slow are expected to be slow in other candidates"
    too_large = Result(None, 19.0, False)
    assert choose(minimal_a=too_large)[0] != "minimal", (
        "a setting that was too large is expected to be too large with other flags"
    )
    assert choose(minimal_a=Result(None, 0.0, False), minimal_b=Result(None, 0.0, False))[0] == "attention"
    everything = {f"{remat}_{flag}": Result(None, 99.0, False) for remat in ON_CHIP for flag in "ab"}
    assert choose(**everything) is None


def landscape(setting):
    """A synthetic objective: --b is 1.5 times as fast, tensor parallelism is slower than arithmetic says."""
    ms = {"none": 100, "minimal": 102, "attention": 108, "qkv": 115, "full": 130, "offload": 140}[setting.remat] * (
        1 + 0.05 * setting.mesh[4]
    )
    ms *= (
        (1.5 if setting.flags == "--a" else 1.0)
        * (1 + 0.02 * (setting.micro_batches - 1))
        * (1 + (setting.chunk_len > 0) / 50)
    )
    peak = (
        {"none": 20, "minimal": 12, "attention": 8, "qkv": 6, "full": 4, "offload": 5}[setting.remat]
        / setting.micro_batches
        * GIB
    )
    return Result(ms, peak, True) if peak <= 16 * GIB else Result(None, peak, False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_finds_the_best_setting_and_is_reproducible(small, workers):
    _, slices, candidates, guesses = small
    capacity = slices.chip.hbm_bytes
    fitting = [landscape(setting) for setting in candidates]
    best = min(each.ms for each in fitting if each.fits)
    orders, seen, lock = [], {}, threading.Lock()

    def measure(setting):
        time.sleep(0.003 * (len(setting.remat) % 3))  # measurements do not finish in the order in which they start
        with lock:
            seen[setting] = seen.get(setting, 0) + 1
        return landscape(setting)

    for _ in range(2):
        notes: list[int] = []
        found = search.run(
            candidates,
            guesses,
            capacity,
            measure,
            compiles=20,
            workers=workers,
            progress=lambda *arguments, notes=notes: notes.append(arguments[0]),
        )
        orders.append(list(found))
        assert len(found) == 20 and notes == [*range(1, 21)]
        assert found[search.pareto_frontier(found)[0]].ms <= 1.02 * best
    assert orders[0] == orders[1] and set(seen.values()) == {2}


def test_the_pareto_frontier_of_memory_and_time():
    found = {
        0: Result(10.0, 8.0, True),
        1: Result(12.0, 9.0, True),  # slower and larger than 0
        2: Result(11.0, 7.0, True),
        3: Result(None, 99.0, False),
        4: Result(20.0, 2.0, True),
        5: Result(20.0, 3.0, True),
    }
    assert search.pareto_frontier(found) == [0, 2, 4]
    assert search.pareto_frontier({3: found[3]}) == []


def test_the_flag_file_of_the_winner_sets_it(small, tmp_path):
    cfg, _, _, _ = small
    setting = candidate("attention", mesh=(1, 2, 1, 1, 2), micro=2, chunk=64, flags="--xla_x=1")
    path = tmp_path / "winner.flags"
    path.write_text(search.flag_file(setting, Result(12.3, 4 * GIB, True), usual_flags=""))
    assert recipe([f"--flagfile={path}"]) == candidates_lib.apply(cfg, setting, 1)
    assert "LIBTPU_INIT_ARGS='--xla_x=1'" in path.read_text()
    assert "LIBTPU" not in search.flag_file(setting, Result(1.0, 1.0, True), usual_flags="--xla_x=1")


def test_results_are_parsed_from_the_plans_json():
    assert search.parse_result({"fits": True, "estimated_step_ms": 3.0, "hbm_peak": 5}) == Result(3.0, 5.0, True)
    unfit = search.parse_result({"fits": False, "hbm_needed": 7.0, "why": "it needs 7G\n  largest"})
    assert unfit == Result(None, 7.0, False, note="it needs 7G")
    assert not search.parse_result({"fits": False, "hbm_peak": 17}).fits
    host = {"fits": True, "estimated_step_ms": 3.0, "hbm_peak": 5, "host_memory": 7, "host_capacity": 8}
    assert search.parse_result(host) == Result(3.0, 5.0, True, host=7.0)
    too_large_for_host = search.parse_result(host | {"fits": False, "host_memory": 9 * GIB, "host_capacity": 8 * GIB})
    assert not too_large_for_host.fits and too_large_for_host.peak == 0
    assert "9.0 GiB of the host's memory" in too_large_for_host.note


@pytest.mark.slow
@needs_libtpu
def test_a_killed_search_resumes_and_the_memory_bound_holds_for_compiled_steps(tmp_path):
    """Two real compilations in which activations dominate the memory; some config keys come from a flag file."""
    pinned = SMALL | {"data.batch_size": 512, "mesh.data": 1, "mesh.context": 1, "mesh.tensor": 1, "loss.chunk_len": 32}
    pinned |= {"mesh.expert": 1, "train.micro_batches": 1}
    in_file = tmp_path / "small.flags"
    in_file.write_text("".join(f"--config.{key}={value}\n" for key, value in SMALL.items()))
    command = [sys.executable, "tools/plan.py", "--config", str(RECIPE.relative_to(ROOT)), f"--flagfile={in_file}"]
    command += [f"--config.{key}={value}" for key, value in pinned.items() if value != SMALL.get(key)]
    command += ["--topology=v5e:2x2", "--search", "--compiles=2"]
    command += ["--workers=1", "--libtpu_flags=", f"--cache={tmp_path}/cache", f"--plot={tmp_path}/plot.png"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    killed = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 400
    while not (first := [*tmp_path.glob("cache/*.json")]) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    (first,) = first
    before = first.stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("cache/*.json")]
    assert {each["parameters"] for each in results} == {
        sum(size for size, _ in candidates_lib.model_sizes(recipe()).parameters)
    }
    assert len(results) == 3, "two candidates and the recipe's own setting"
    assert first.stat().st_mtime_ns == before, "the cached result is not compiled again"
    assert "[2/2]" in done.stdout and "min left" in done.stdout and "(the recipe)" in done.stdout
    assert "python -m lm.main --config=configs/bench/v5e16_124m.py --config." in done.stdout.splitlines()[-1]
    assert "--workdir=DIR" in done.stdout.splitlines()[-1]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    slices = topology.parse("v5e:2x2", 1)
    winner = recipe(
        [f"--config.{key}={value}" for key, value in pinned.items()] + [f"--flagfile={tmp_path}/cache/winner.flags"]
    )
    cfg = recipe([f"--config.{key}={value}" for key, value in pinned.items()])
    changed = {key for key, (old, new) in config.diff(cfg, winner).items() if old != new}
    assert changed <= {"model.remat"}
    compiled = dict(re.findall(r"\[\d/2\].* ([\d.]+) GiB.* (none|minimal|attention|qkv|full|offload) ", done.stdout))
    model = candidates_lib.model_sizes(cfg)
    assert len(compiled) == 2
    for peak, remat in compiled.items():
        guess = candidates_lib.guess(cfg, model, slices, candidate(remat, chunk=32))
        assert guess.at_least <= float(peak) * GIB, "otherwise a setting that fits would be left out"
    assert dict(flatten(config.to_dict(winner)))["model.remat"] in {*compiled.values(), cfg.model.remat}
