"""lm/planner/candidates.py, search.py and `tools/plan.py --search`: arithmetic, choosing, resuming, what is written."""

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
from test_aot import LENGTH, ROOT, SMALL, needs_libtpu

from lm import config
from lm.config.schema import ConfigError, flatten
from lm.models.remat import REMAT_POLICIES
from lm.parallel.mesh import AXES
from lm.parallel.xla_flags import libtpu
from lm.planner import candidates as settings
from lm.planner import search, topology
from lm.planner.candidates import Candidate
from lm.planner.search import Found
from lm.tasks import build_config

GIB = topology.GIB
RECIPE = ROOT / "configs/bench/v5e16_124m.py"


def recipe(argv=()):
    """The benchmark's config, made small, as the command line of a run gives it."""
    argv = ["x", f"--config={RECIPE}", *(f"--config.{key}={value}" for key, value in SMALL.items()), *argv]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(values.read_flags_from_files(argv, force_gnu=False))
    return build_config(holder.value)


@pytest.fixture(scope="module")
def small():
    """(config, slices, settings, arithmetic of each) of the small model on 2 x 2 chips."""
    cfg, where = recipe(), topology.topology("v5e:2x2", 1)
    candidates = settings.space(cfg, where, ["--a", "--b"])
    model = settings.sizes(cfg)
    return cfg, where, candidates, [settings.guess(cfg, model, where, one) for one in candidates]


def made(remat="minimal", mesh=(1, 4, 1, 1, 1), micro=1, chunk=0, flags=""):
    return Candidate(mesh, remat, micro, chunk, flags)


ON_CHIP = tuple(policy for policy in settings.POLICIES if policy != "offload")


def test_what_a_policy_keeps_is_known_of_all_of_them_and_ever_less():
    assert tuple(settings._KEPT) == settings.POLICIES == (*ON_CHIP, "offload")
    assert {*settings.POLICIES} == {*REMAT_POLICIES}
    kept = [set(settings._KEPT[policy]) for policy in ON_CHIP]
    assert all(more >= less for more, less in itertools.pairwise(kept))
    assert settings._KEPT["offload"] == settings._KEPT["minimal"], "only elsewhere"


def test_settings_fit_the_chips_and_leave_the_batch_alone(small):
    cfg, _, candidates, _ = small
    assert len(set(candidates)) == len(candidates)
    meshes = {one.mesh for one in candidates}
    assert (1, 4, 1, 1, 1) in meshes and (1, 2, 1, 1, 2) in meshes and (1, 1, 1, 4, 1) in meshes
    for one in candidates:
        sizes = dict(zip(AXES, one.mesh, strict=True))
        assert sizes["expert"] == 1 and sizes["tensor"] <= cfg.model.num_heads
        rows = sizes["data"] * sizes["fsdp"] * one.micro_batches
        assert cfg.data.batch_size % rows == 0
        changed = settings.apply(cfg, one, 1)
        allowed = {*settings.KEYS, "mesh.dcn_data"}
        assert {key for key in config.diff(cfg, changed)} <= allowed
    assert {one.flags for one in candidates} == {"--a", "--b"}
    assert candidates[settings.own(cfg, candidates)] == made(cfg.model.remat, flags="--a")
    assert settings.own(cfg, [made("full"), made("full", micro=2)]) is None


def test_the_compilers_flags_are_searched_from_those_of_the_chip_on(small):
    model = settings.sizes(small[0])._replace(width=2048)
    large = model._replace(kernels=[settings.Kernel("up", 2, 2048, 8192, "embed", "mlp", 0)])  # 32 MiB in bfloat16
    usual = libtpu("v5e", 2048)
    first, *others = settings.flag_sets("v5e", large)
    assert first == usual and len({usual, *others}) == len(others) + 1 == 6
    assert str(made(flags=usual)) == "fsdp=4 minimal micro=1 chunk=0 windowed=24 vmem_kib=28672"
    assert all("windowed_einsum_mib=" in one and "scoped_vmem_limit_kib=" in one for one in others)
    wide = large._replace(width=4096)
    for chip in ("v5e", "v5p"):  # the usual vector memory with all else, too
        flags = [one.partition(" ") for one in settings.flag_sets(chip, wide)]
        assert {(a, libtpu(chip, 4096).partition(" ")[2]) for a, _, _ in flags} <= {(a, b) for a, _, b in flags}
    unknown = settings.flag_sets("v6e", large)
    assert unknown[0] == libtpu("v6e", 2048) and set(unknown[1:]) == {first, *others}


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_from_which_size_on_kernels_go_in_pieces_is_not_searched_where_none_is_large(small, chip):
    found = settings.flag_sets(chip, settings.sizes(small[0]))
    assert found[0] == libtpu(chip, SMALL["model.embed_dim"])
    assert len({one.partition(" ")[0] for one in found}) == 1 and len(set(found)) == len(found) >= 3


def test_arithmetic_of_experts_by_hand():
    """A position's products are those of the experts it goes through; its devices have room for each other's."""
    cfg, where = recipe(["--config.model.experts=(8, 2)"]), topology.topology("v5e:2x2", 1)
    dense = settings.sizes(recipe([f"--config.model.mlp_dim={2 * SMALL['model.mlp_dim']}"]))
    model, layers = settings.sizes(cfg), SMALL["model.num_layers"]
    width, inner = SMALL["model.embed_dim"], SMALL["model.mlp_dim"]
    for expert in (1, 2):
        mesh = (1, 4 // expert, expert, 1, 1)
        minimal, full = (settings.guess(cfg, model, where, made(remat, mesh=mesh)) for remat in ("minimal", "full"))
        tokens = cfg.data.batch_size * LENGTH / 4
        assert minimal.at_least - full.at_least == 2 * tokens * layers * (5 * width + 2 * 2 * expert * inner)
    # As if it were dense and twice as wide, but for the six experts more whose weights and moments are there.
    bare = {"state_bytes": 0.0, "item": 0, "vocab": 0}
    times = [
        settings.guess(cfg, each._replace(**bare), where, made(mesh=(1, 1, 1, 1, 4))).ms for each in (model, dense)
    ]
    router = (
        6 * layers * width * 8 * cfg.data.batch_size * LENGTH / (settings.MATMUL_EFFICIENCY * where.chip.peak_flops)
    )
    more = 8 * layers * 3 * 6 * width * inner / 4 / where.chip.hbm_bandwidth  # read and written
    assert times[0] - times[1] == pytest.approx(1e3 * (router + more), rel=0.1)


def test_what_lies_with_the_host_takes_none_of_the_chip_and_is_copied(small):
    """As much as 'minimal' keeps but the layers' inputs, both ways; what takes longer than the computation is waited
    for. A host that has too little memory holds nothing."""
    cfg, where, candidates, _ = small
    assert any(one.remat == "offload" for one in candidates)
    model = settings.sizes(cfg)
    kept = LENGTH * SMALL["data.batch_size"] / 4 * SMALL["model.num_layers"] * 2
    kept *= 5 * SMALL["model.embed_dim"] + 2 * SMALL["model.mlp_dim"]

    def guess(remat, bandwidth=1e30, memory=1e30):
        chip = where.chip._replace(host_bandwidth=bandwidth, host_bytes=memory)
        return settings.guess(cfg, model, where._replace(chip=chip), made(remat))

    minimal, offload, full = guess("minimal"), guess("offload"), guess("full")
    assert offload.at_least == full.at_least == minimal.at_least - kept
    assert offload.ms == pytest.approx(minimal.ms)
    slow = kept / 1e-3  # a millisecond each way
    assert 0 < guess("offload", slow).ms - minimal.ms < 2
    assert guess("offload", slow / 1e6).ms - minimal.ms == pytest.approx(2e6, rel=1e-3)
    assert math.isinf(guess("offload", memory=kept - 1).at_least) and guess("offload", memory=kept) == offload
    pinned = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="offload"))
    assert {one.remat for one in settings.space(pinned, where, [""], ["model.remat"])} == {"offload"}


def test_what_is_pinned_stays_and_what_cannot_be_is_refused(small):
    cfg, where, _, _ = small
    found = settings.space(cfg, where, [""], ["mesh.fsdp", "model.remat", "loss.chunk_len", "train.micro_batches"])
    assert {one.mesh for one in found} == {(1, 4, 1, 1, 1)} and {one.remat for one in found} == {cfg.model.remat}
    assert len(found) == 1
    odd = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=3, seq_len=255))
    with pytest.raises(ConfigError, match="divides"):
        settings.space(odd, where, [""], ["mesh.tensor"])
    with pytest.raises(ConfigError, match="dcn_data"):
        settings.space(cfg, topology.topology("v5e:2x2", 2), [""])


def test_arithmetic_of_the_state_and_of_what_is_kept_by_hand(small):
    cfg, _, candidates, guesses = small
    by_setting = dict(zip(candidates, guesses, strict=True))
    layers, width, inner = (SMALL[f"model.{key}"] for key in ("num_layers", "embed_dim", "mlp_dim"))
    norms = (2 * layers + 1) * width
    split = layers * (4 * width**2 + 3 * width * inner) + 2 * SMALL["model.vocab_size"] * width
    tokens = cfg.data.batch_size * LENGTH / 4
    # Float32 parameters and two moments over 4 chips, those of norms whole; in bfloat16 of each layer what it was
    # given, and for 'minimal' queries, keys, values, the kernel's result, its projection and both halves of the MLP.
    full = by_setting[made("full", flags="--a")].at_least
    assert full == pytest.approx(12 * (split / 4 + norms) + 2 * tokens * layers * width, rel=1e-6)
    minimal = by_setting[made("minimal", flags="--a")].at_least
    assert minimal - full == pytest.approx(2 * tokens * layers * (5 * width + 2 * inner))
    # Two micro-batches hold half of it, and a float32 sum of gradients.
    halved = by_setting[made("minimal", micro=2, flags="--a")].at_least
    state = full - 2 * tokens * layers * width
    assert halved == pytest.approx(state + (minimal - state) / 2 + state / 3)
    # Tensor parallel over 2 of the 4: queries and the MLP are split, what a layer is given is not.
    tensor = by_setting[made("full", mesh=(1, 2, 1, 1, 2), flags="--a")].at_least
    assert tensor - state == pytest.approx(2 * (2 * tokens) * layers * width, rel=0.01)


def test_what_keeps_more_of_the_same_does_not_fit_either():
    assert settings.keeps_more(made("none"), made("attention")) and settings.keeps_more(made(), made())
    assert not settings.keeps_more(made("full"), made("attention"))
    assert settings.keeps_more(made(chunk=0), made(chunk=128)) and not settings.keeps_more(
        made(chunk=64), made(chunk=128)
    )
    assert settings.keeps_more(made("offload", chunk=0), made("offload", chunk=64))
    assert not settings.keeps_more(made("none"), made("offload")) and not settings.keeps_more(made("offload"), made())
    for other in (made(mesh=(4, 1, 1, 1, 1)), made(flags="--x"), made(micro=2)):
        assert not settings.keeps_more(made("none"), other)


def test_the_next_is_the_one_that_may_be_fastest_and_may_fit():
    candidates = [made(remat, flags=flag) for remat in ON_CHIP for flag in ("--a", "--b")]
    guesses = [
        settings.Guess(peak, peak, ms)
        for peak, ms in zip((20, 12, 8, 6, 4), (100.0, 101.0, 110.0, 120.0, 130.0), strict=True)
        for _ in range(2)
    ]
    number = {one: i for i, one in enumerate(candidates)}

    def choose(**known):
        found = {number[made(name.split("_")[0], flags=f"--{name[-1]}")]: each for name, each in known.items()}
        chosen = search.choose(candidates, guesses, 16.0, found)
        return chosen if chosen is None else (candidates[chosen].remat, candidates[chosen].flags)

    assert choose() == ("minimal", "--a"), "'none' cannot fit, by arithmetic"
    assert choose(minimal_a=None) != ("minimal", "--a"), "one that is being compiled is not chosen again"
    slow = Found(300.0, 12.0, True)
    assert choose(minimal_a=slow)[1] == "--b", "flags that turn out slow are slow elsewhere too"
    too_large = Found(None, 19.0, False)
    assert choose(minimal_a=too_large)[0] != "minimal", "what is measured as too large is too large with other flags"
    assert choose(minimal_a=Found(None, 0.0, False), minimal_b=Found(None, 0.0, False))[0] == "attention"
    everything = {f"{remat}_{flag}": Found(None, 99.0, False) for remat in ON_CHIP for flag in "ab"}
    assert choose(**everything) is None


def landscape(one):
    """A made-up machine: flags --b are 1.5 times as fast, tensor parallelism is slower than arithmetic says."""
    ms = {"none": 100, "minimal": 102, "attention": 108, "qkv": 115, "full": 130, "offload": 140}[one.remat] * (
        1 + 0.05 * one.mesh[4]
    )
    ms *= (1.5 if one.flags == "--a" else 1.0) * (1 + 0.02 * (one.micro_batches - 1)) * (1 + (one.chunk_len > 0) / 50)
    peak = (
        {"none": 20, "minimal": 12, "attention": 8, "qkv": 6, "full": 4, "offload": 5}[one.remat]
        / one.micro_batches
        * GIB
    )
    return Found(ms, peak, True) if peak <= 16 * GIB else Found(None, peak, False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_finds_the_best_and_goes_the_same_way_again(small, workers):
    _, where, candidates, guesses = small
    capacity = where.chip.hbm_bytes
    fitting = [landscape(one) for one in candidates]
    best = min(each.ms for each in fitting if each.fits)
    orders, seen, lock = [], {}, threading.Lock()

    def measure(one):
        time.sleep(0.003 * (len(one.remat) % 3))  # who starts first does not end first
        with lock:
            seen[one] = seen.get(one, 0) + 1
        return landscape(one)

    for _ in range(2):
        notes: list[int] = []
        found = search.run(
            candidates,
            guesses,
            capacity,
            measure,
            compiles=20,
            workers=workers,
            note=lambda *said, notes=notes: notes.append(said[0]),
        )
        orders.append(list(found))
        assert len(found) == 20 and notes == [*range(1, 21)]
        assert found[search.frontier(found)[0]].ms <= 1.02 * best
    assert orders[0] == orders[1] and set(seen.values()) == {2}


def test_the_frontier_of_memory_against_time():
    found = {
        0: Found(10.0, 8.0, True),
        1: Found(12.0, 9.0, True),  # slower and larger than 0
        2: Found(11.0, 7.0, True),
        3: Found(None, 99.0, False),
        4: Found(20.0, 2.0, True),
        5: Found(20.0, 3.0, True),
    }
    assert search.frontier(found) == [0, 2, 4]
    assert search.frontier({3: found[3]}) == []


def test_the_file_of_the_winner_sets_it(small, tmp_path):
    cfg, _, _, _ = small
    one = made("attention", mesh=(1, 2, 1, 1, 2), micro=2, chunk=64, flags="--xla_x=1")
    path = tmp_path / "winner.flags"
    path.write_text(search.flag_file(one, Found(12.3, 4 * GIB, True), usual_flags=""))
    assert recipe([f"--flagfile={path}"]) == settings.apply(cfg, one, 1)
    assert "LIBTPU_INIT_ARGS='--xla_x=1'" in path.read_text()
    assert "LIBTPU" not in search.flag_file(one, Found(1.0, 1.0, True), usual_flags="--xla_x=1")


def test_results_are_read_back():
    assert search.read({"fits": True, "estimated_step_ms": 3.0, "hbm_peak": 5}) == Found(3.0, 5.0, True)
    unfit = search.read({"fits": False, "hbm_needed": 7.0, "why": "it needs 7G\n  largest"})
    assert unfit == Found(None, 7.0, False, note="it needs 7G")
    assert not search.read({"fits": False, "hbm_peak": 17}).fits
    host = {"fits": True, "estimated_step_ms": 3.0, "hbm_peak": 5, "host_memory": 7, "host_capacity": 8}
    assert search.read(host) == Found(3.0, 5.0, True, host=7.0)
    too_much = search.read(host | {"fits": False, "host_memory": 9 * GIB, "host_capacity": 8 * GIB})
    assert not too_much.fits and too_much.peak == 0 and "9.0 GiB of the host's memory" in too_much.note


@pytest.mark.slow
@needs_libtpu
def test_a_search_that_is_killed_goes_on_and_arithmetic_is_below_what_is_compiled(tmp_path):
    """Two real compilations, in which what is kept of the layers is most of the memory; keys come from a file, too."""
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
    assert {each["parameters"] for each in results} == {sum(size for size, _ in settings.sizes(recipe()).parameters)}
    assert len(results) == 3, "two, and that of the recipe"
    assert first.stat().st_mtime_ns == before, "it is not compiled again"
    assert "[2/2]" in done.stdout and "min left" in done.stdout and "(the recipe)" in done.stdout
    assert "python -m lm.main --config=configs/bench/v5e16_124m.py --config." in done.stdout.splitlines()[-1]
    assert "--workdir=DIR" in done.stdout.splitlines()[-1]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    where = topology.topology("v5e:2x2", 1)
    winner = recipe(
        [f"--config.{key}={value}" for key, value in pinned.items()] + [f"--flagfile={tmp_path}/cache/winner.flags"]
    )
    cfg = recipe([f"--config.{key}={value}" for key, value in pinned.items()])
    changed = {key for key, (old, new) in config.diff(cfg, winner).items() if old != new}
    assert changed <= {"model.remat"}
    compiled = dict(re.findall(r"\[\d/2\].* ([\d.]+) GiB.* (none|minimal|attention|qkv|full|offload) ", done.stdout))
    model = settings.sizes(cfg)
    assert len(compiled) == 2
    for peak, remat in compiled.items():
        guess = settings.guess(cfg, model, where, made(remat, chunk=32))
        assert guess.at_least <= float(peak) * GIB, "or a setting would be left out that fits"
    assert dict(flatten(config.to_dict(winner)))["model.remat"] in {*compiled.values(), cfg.model.remat}
