"""lm/data/loader.py on prepared shards: one order of examples, however many hosts and threads, wherever it goes on."""

import dataclasses
import itertools
import shutil
import threading
from collections import Counter

import numpy as np
import pytest

from configs import common
from lm import config, input_pipeline, train
from lm.config.schema import ConfigError
from lm.data import loader, prefetch, sampler, shards, tokenizer
from lm.data.readers import registry
from lm.data.record import DataError
from lm.tasks import build_config, default_config
from tests import toys

ROWS = {"web": 37, "books": 11, "code": 5}
BATCH, LENGTH, TOTAL = 8, 16, 400


def write_source(folder, number, rows, valid=2):
    """Rows of whole documents whose first token says which row of which source they are."""
    folder.mkdir(parents=True)
    parts = {}
    for part, count in (("train", rows), ("valid", valid)):
        tokens = np.random.default_rng(number).integers(3, 99, (count, LENGTH))
        tokens[:, 0] = 1000 * (number + 1) + np.arange(count)
        cut = LENGTH // 2 + np.arange(count) % 3
        segments = 1 + (np.arange(LENGTH) >= cut[:, None])
        targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=2)
        targets[np.arange(count), cut - 1] = 2
        table = {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_weights": np.ones(tokens.shape)}
        table["positions"] = np.arange(LENGTH) - np.where(segments == 2, cut[:, None], 0)
        pieces = np.array_split(np.arange(count), 3 if part == "train" else 1)
        parts[part] = [
            shards.write(
                folder, f"{part}-{i}", {key: x[rows] for key, x in table.items()}, {"documents": 2 * len(rows)}
            )
            for i, rows in enumerate(pieces)
        ]
    about = {"parts": parts, "layout": {"length": LENGTH, "shifted": True}, "settings": {"packing": "best_fit"}}
    shards.write_index(folder, about)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for number, (name, rows) in enumerate(ROWS.items()):
        write_source(root / name, number, rows)
    return root


def alone(folder, seq_len=LENGTH):
    data_config = config.DataConfig(format="prepared", path=str(folder), seq_len=seq_len)
    cfg = dataclasses.replace(config.Config(), data=data_config)
    return input_pipeline.build(cfg, None, *input_pipeline.load(cfg.data))


def mixed(folders, stages=((0.0, (6, 3, 1)), (0.5, (2, 2, 4)), (0.9, (0, 0, 1))), task="causal_lm", **data):
    given = [(at, str(folders / name), w) for at, ws in stages for name, w in zip(ROWS, ws, strict=True) if w]
    data_config = config.DataConfig(format="prepared", mixture=tuple(given), seq_len=LENGTH, **data)
    cfg = config.Config(task=toys.task(task), data=data_config)
    return input_pipeline.build(cfg, None, *input_pipeline.load(cfg.data))


def take(data, count, start=0, local_rows=None, threads=1, batch=BATCH, **more):
    made = loader.train_batches(
        data,
        batch_size=batch,
        start_example=start,
        local_rows=np.arange(batch) if local_rows is None else local_rows,
        seed=5,
        **{"total_examples": TOTAL} | more,
        threads=threads,
    )
    found = list(itertools.islice(made, count))
    made.close()
    return {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], strict=True)


def test_order_of_examples_is_independent_of_hosts_threads_and_start(folders):
    data = mixed(folders)
    whole = take(data, TOTAL // BATCH)
    assert whole["example_index"].tolist() == list(range(TOTAL))
    for hosts, threads in itertools.product((1, 2, 4), (0, 1, 2)):
        parts = [take(data, TOTAL // BATCH, 0, np.arange(h, BATCH, hosts), threads) for h in range(hosts)]
        by_index = np.argsort(np.concatenate([part["example_index"] for part in parts]))
        assert_equal({key: np.concatenate([part[key] for part in parts])[by_index] for key in whole}, whole)
    rng = np.random.default_rng(0)
    for start, hosts, threads in zip(
        rng.integers(0, TOTAL - BATCH, 20), rng.choice([1, 2, 4], 20), rng.integers(0, 3, 20), strict=True
    ):
        count = min(6, (TOTAL - start) // BATCH)
        parts = [take(data, count, int(start), np.arange(h, BATCH, hosts), int(threads)) for h in range(hosts)]
        by_index = np.argsort(np.concatenate([part["example_index"] for part in parts]))
        resumed = {key: np.concatenate([part[key] for part in parts])[by_index] for key in whole}
        assert_equal(resumed, {key: x[start : start + count * BATCH] for key, x in whole.items()})


def ids_of(batches):
    """Global ids of examples: source and row, as the first token of each says."""
    return batches["tokens"][:, 0].tolist()


@pytest.mark.parametrize(("hosts", "workers"), list(itertools.product((1, 2, 4), (0, 1, 2))))
def test_a_run_resumed_20_times_sees_the_examples_of_an_uninterrupted_run(folders, hosts, workers):
    """Every start has another number of hosts and workers than the one before, and of rows in a batch; the first has
    those of the parameters. A kill loses what was made ahead."""
    data = mixed(folders)
    whole = ids_of(take(data, TOTAL // BATCH))
    rng = np.random.default_rng(hosts * 3 + workers)
    example, found = 0, []
    for kill in range(21):
        batch = int(rng.choice([4, 8])) if kill else BATCH
        count = int(rng.integers(1, 4)) if kill < 20 else (TOTAL - example) // batch
        parts = [take(data, count, example, np.arange(h, batch, hosts), workers, batch) for h in range(hosts)]
        by_index = np.argsort(np.concatenate([part["example_index"] for part in parts]))
        found += np.concatenate([part["tokens"][:, 0] for part in parts])[by_index].tolist()
        example += count * batch
        hosts, workers = int(rng.choice([1, 2, 4])), int(rng.integers(3))
    assert len(found) > TOTAL - 8 and found == whole[: len(found)]


def test_each_source_continues_where_it_stopped_when_mixture_or_run_length_change(folders):
    """Nothing is lost, repeated or reordered in a source; a source that is new begins at its beginning."""
    old, new = mixed(folders, stages=((0.0, (6, 3, 0.5)),)), mixed(folders, stages=((0.0, (1, 2, 3)), (0.5, (1, 0, 0))))
    taken = {name: used["examples"] for name, used in loader.consumed(old, 96, TOTAL).items()}
    del taken["code"]
    offsets = loader.offsets(new, taken, 96, 1000)
    after = loader.consumed(new, 96, 1000, offsets)
    assert {name: used["examples"] for name, used in after.items()} == {**taken, "code": 0}
    again = {name: used["examples"] for name, used in loader.consumed(new, 496, 1000, offsets).items()}
    assert loader.offsets(new, again, 496, 1000) == offsets
    before = np.array(ids_of(take(old, 12)))
    behind = np.array(ids_of(take(new, 50, 96, total_examples=1000, offsets=offsets)))
    for number, name in enumerate(ROWS):
        only = alone(folders / name)
        seen = [*(before if name != "code" else []), *behind]
        given = [i for i in seen if i // 1000 == number + 1]
        rows = sampler.epochs(len(only.train), 5, number)(np.arange(len(given)))
        assert [i % 1000 for i in given] == rows.tolist()


def test_temperature_of_a_mixture():
    sizes = {"web": 900, "books": 90, "code": 10}
    assert common.mixture(sizes) == ((0.0, "web", 0.9), (0.0, "books", 0.09), (0.0, "code", 0.01))
    assert common.mixture({"web": 9e12, "code": 1e12}, 2.0, 0.5) == ((0.5, "web", 0.75), (0.5, "code", 0.25))
    assert [weight for _, _, weight in common.mixture(sizes, 1e9)] == pytest.approx([1 / 3] * 3)
    for wrong in ((sizes, 0.0), ({"web": 0}, 1.0), ({}, 1.0)):
        with pytest.raises(ConfigError, match="must be above 0"):
            common.mixture(*wrong)


def test_offsets_are_zero_if_nothing_changed(folders):
    data = mixed(folders)
    for example in (0, 8, 200, 399):
        taken = {name: used["examples"] for name, used in loader.consumed(data, example, TOTAL).items()}
        assert loader.offsets(data, taken, example, TOTAL) == (0, 0, 0)


def test_a_source_that_hangs_is_an_error_that_names_the_examples(folders, monkeypatch):
    monkeypatch.setattr(prefetch, "HUNG_SECONDS", 0.5)
    monkeypatch.setattr(prefetch, "_POLL_SECONDS", 0.1)
    data, never = mixed(folders), threading.Event()
    web = data.sources["web"]
    _, _, meta, stored, columns, _ = tuple.__iter__(web.train)
    hangs = loader.Part(web.train.size, lambda ids: never.wait(), meta, stored, columns)
    data = data._replace(sources={**data.sources, "web": web._replace(train=hangs)})
    with pytest.raises(
        prefetch.InputError, match=r"(?s)hangs: thread .input-0. .* making the batch of examples 0 to 7;"
    ):
        take(data, 1)
    never.set()


def test_every_row_is_used_once_per_epoch_and_sources_keep_their_shares(folders):
    data = mixed(folders)
    source, row = np.divmod(take(data, TOTAL // BATCH)["tokens"][:, 0], 1000)
    for stage, (start, end) in {0: (0, 200), 1: (200, 360), 2: (360, 400)}.items():
        weights = np.array([(6, 3, 1), (2, 2, 4), (0, 0, 1)][stage])
        found = np.bincount(source[start:end], minlength=4)[1:]
        assert (found == (end - start) * weights / weights.sum()).all()
    for number, (name, rows) in enumerate(ROWS.items(), 1):
        turns = row[source == number]
        for first in range(0, len(turns) - rows, rows):
            assert sorted(turns[first : first + rows]) == list(range(rows)), name
    assert loader.consumed(data, 250, TOTAL)["books"] == {"examples": 60 + 12, "epochs": 72 / 11}
    assert Counter(source[:250] - 1) == {
        i: u["examples"] for i, u in enumerate(loader.consumed(data, 250, TOTAL).values())
    }
    assert data.epoch_examples == 62  # 37 rows that are 6 of 10


def test_a_run_may_start_at_any_example(folders):
    far = take(mixed(folders, stages=((0.0, (6, 3, 1)),)), 2, start=10**9)
    assert far["example_index"].tolist() == list(range(10**9, 10**9 + 2 * BATCH))
    assert Counter(far["tokens"][:, 0] // 1000)[1] in (9, 10)


def test_invalid_mixtures_and_unsuitable_prepared_data_are_refused(folders, tmp_path):
    write_source(tmp_path / "web", 0, 4)
    paths = [str(folders / "web"), str(tmp_path / "web")]
    for names, says in ((paths, "different names"), ([str(tmp_path / "replay"), paths[0]], "none of them 'replay'")):
        cfg = config.DataConfig(format="prepared", mixture=tuple((0.0, path, 1.0) for path in names))
        with pytest.raises(ConfigError, match=f"'data.mixture': its paths must end in .*{says}"):
            input_pipeline.load(cfg)
    with pytest.raises(ConfigError, match="its rows have 16 positions, this run needs 32"):
        alone(folders / "web", seq_len=32)
    words = tokenizer.train(["one two three " * 9], 285, 1000)
    found = shards.open_folder(str(folders / "web"))
    other = found._replace(about=found.about | {"tokenizer_hash": "of another one"})
    one = dataclasses.replace(config.Config(), data=config.DataConfig(format="prepared", path="web", seq_len=LENGTH))
    with pytest.raises(ConfigError, match="rows were made with tokenizer of another o, but this run has"):
        input_pipeline.build(one, words, other)
    with pytest.raises(ConfigError, match=r"'data\.packing' was best_fit when it was prepared, and is concat now"):
        mixed(folders, packing="concat")
    for unread in ({"max_records": 3}, {"rename": (("a", "b"),)}):
        with pytest.raises(ConfigError, match=rf"'data\.{next(iter(unread))}' is .* prepared data does not read it"):
            mixed(folders, **unread)
    with pytest.raises(ConfigError, match=r"expected .* for task\.name=masked_lm; prepare"):
        mixed(folders, task="masked_lm")
    empty = tmp_path / "none"
    write_source(empty, 0, 4, valid=0)
    with pytest.raises(DataError, match="none: no valid rows"):
        input_pipeline.build(
            dataclasses.replace(
                config.Config(), data=config.DataConfig(format="prepared", path=str(empty), seq_len=16)
            ),
            None,
            shards.open_folder(str(empty)),
        )
    for changes, says in (
        ({"path": "x"}, r"'data\.path' \('x'\)"),
        ({"mixture": ((0.1, "a", 1.0),)}, "must begin at 0"),
        ({"mixture": ((0.0, "a", 0.0),)}, "weights above 0"),
        ({"curriculum": config.Duration(steps=1)}, "orders one source"),
    ):
        given = {"mixture": ((0.0, "a", 1.0),), "format": "prepared", "packing": "pad"} | changes
        recipe = default_config()
        recipe.train.total_steps = 1
        built = config.schema.to_dict(dataclasses.replace(config.Config(), data=config.DataConfig(**given)))
        with pytest.raises(ConfigError, match=says):
            build_config(built | {"train": recipe.train.to_dict()})


def prepare(cfg, folder):
    """The rows of a run of this config, and a prepared folder of them."""
    split = registry.load(cfg.data)
    words = tokenizer.train([record["text"] for record in split.train], cfg.tokenizer.vocab_size, 10**6)
    data = input_pipeline.build(cfg, words, split)
    folder.mkdir()
    words.save(folder / "tokenizer.model")
    parts = {
        half: [shards.write(folder, half, {k: x.astype(part.stored[k][1]) for k, x in part.rows.items()}, {})]
        for half, part in (("train", data.train), ("valid", data.valid))
    }
    about = {"parts": parts, "layout": {"length": cfg.data.seq_len, "shifted": True}}
    shards.write_index(folder, about | {"settings": {"packing": cfg.data.packing}})
    return data


def test_prepared_rows_train_like_packed_text_and_a_mixture_reports_each_source(tmp_path):
    """The second source holds the same rows: all three figures of an evaluation are one number."""
    on_text = prepare(toys.recipe(toys.write_texts(tmp_path / "texts")), tmp_path / "web")
    on_rows = alone(tmp_path / "web", seq_len=32)
    assert_equal(take(on_rows, 30), take(on_text, 30))
    for half in ("train", "valid"):
        assert len(getattr(on_rows, half)) == len(getattr(on_text, half))
    shutil.copytree(tmp_path / "web", tmp_path / "more")
    mixture = tuple((0.0, str(tmp_path / name), 1.0) for name in ("web", "more"))
    changes = {"data__format": "prepared", "data__path": "", "data__mixture": mixture, "train__total_steps": 3}
    cfg = toys.recipe(tmp_path / "web", **changes, checkpoint__best_metric="web_loss")
    summary = train.train(cfg, tmp_path / "run")
    assert summary["loss"] == summary["web_loss"] == summary["more_loss"] < summary["before"]["loss"]
    assert summary["sources"]["web"]["examples"] == summary["sources"]["more"]["examples"] == 24
    wrong = dataclasses.replace(cfg.checkpoint, best_metric="wb_loss")
    with pytest.raises(ConfigError, match=r"no metric 'wb_loss' \(did you mean 'web_loss'\?\)"):
        train.train(dataclasses.replace(cfg, checkpoint=wrong), tmp_path / "other")
    (tmp_path / "more" / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"no .*more/tokenizer\.model: the prepared data cannot be read"):
        train.train(cfg, tmp_path / "other")
