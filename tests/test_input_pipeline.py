"""lm/input_pipeline.py: the stream is a pure function of an index, whatever the hosts and wherever it starts."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from lm import config, input_pipeline
from lm.checkpoint import resume
from lm.config import schema
from lm.data import loader, tokenizer
from lm.data.readers import registry
from lm.data.record import DataError
from tests import toys

TEXTS = [f"document {i} says hello {'and again ' * (i % 7)}now.\n" for i in range(60)]
TOK = tokenizer.train(TEXTS, 330, 100_000)
BATCH = 8


def records(texts):
    return [{"text": text, "source": f"f:{i}"} for i, text in enumerate(texts)]


def make_split(train=tuple(TEXTS[:50]), valid=tuple(TEXTS[50:])):
    return registry.Split(records(train), records(valid), "fingerprint", "")


def make_config(seed=0, task="causal_lm", **data):
    return config.Config(seed=seed, task=toys.task(task), data=config.DataConfig(**({"seq_len": 32} | data)))


DATA = input_pipeline.build(make_config(), TOK, make_split())
NUM_ROWS = len(DATA.train)


def take(count, *, start=0, local_rows=None, seed=0, data=DATA):
    local_rows = np.arange(BATCH) if local_rows is None else local_rows
    stream = loader.train_batches(data, batch_size=BATCH, start_example=start, local_rows=local_rows, seed=seed)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


def pairs(batches):
    used = [batch["segment_ids"] > 0 for batch in batches]
    columns = [np.concatenate([b[k][u] for b, u in zip(batches, used, strict=True)]) for k in ("tokens", "targets")]
    return Counter(zip(*(column.tolist() for column in columns), strict=True))


def test_each_epoch_is_another_permutation_and_each_seed_another_stream():
    epochs = loader.train_row_ids(50, 0, 0, 150).reshape(3, 50)
    assert (np.sort(epochs) == np.arange(50)).all()
    other_seed = loader.train_row_ids(50, 1, 0, 150).reshape(3, 50)
    orders = [tuple(order) for order in (*epochs, *other_seed)]
    assert len(set(orders)) == 6 and tuple(range(50)) not in orders
    assert loader.train_row_ids(50, 0, 37, 60).tolist() == epochs.ravel()[37:97].tolist()
    assert loader.train_row_ids(50, 0, 50 * 10**12, 50).tolist() != epochs[0].tolist()


def test_the_order_is_the_same_on_every_version_and_machine():
    """A change here makes runs that are under way resume on other data."""
    assert loader.train_row_ids(7, 0, 0, 14).tolist() == [3, 6, 2, 0, 4, 1, 5, 6, 5, 0, 4, 3, 1, 2]
    assert loader.train_row_ids(1, -1, 0, 3).tolist() == [0, 0, 0]


def test_batches_hold_the_rows_of_their_indices_in_the_declared_dtypes():
    first, second = take(2)
    ids = loader.train_row_ids(NUM_ROWS, 0, 0, 2 * BATCH)
    for batch, rows in ((first, ids[:BATCH]), (second, ids[BATCH:])):
        for key, (_, dtype) in DATA.valid.columns.items():
            assert batch[key].dtype == dtype
            np.testing.assert_array_equal(batch[key], DATA.train.rows[key][rows])
    assert first["example_index"].dtype == np.int32
    assert second["example_index"].tolist() == list(range(BATCH, 2 * BATCH))
    start = 2**31 - 2
    assert take(1, start=start)[0]["example_index"][:4].tolist() == [2**31 - 2, 2**31 - 1, 0, 1]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_the_batch_of_one_host(hosts):
    whole = take(5, start=3)
    local = np.random.default_rng(0).permutation(BATCH).reshape(hosts, -1)
    parts = [take(5, start=3, local_rows=rows) for rows in local]
    together = [{key: np.concatenate([p[i][key] for p in parts]) for key in whole[0]} for i in range(5)]
    assert_equal([{key: x[np.argsort(local.ravel())] for key, x in batch.items()} for batch in together], whole)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_resumed_run_gets_the_batches_of_an_uninterrupted_one(steps):
    assert_equal(take(4, start=steps * BATCH), take(steps + 4)[steps:])


def test_an_epoch_holds_every_row_once():
    batches = take(-(-2 * NUM_ROWS // BATCH))
    index = np.concatenate([b["example_index"] for b in batches])
    tokens = np.concatenate([b["tokens"] for b in batches])
    assert index.tolist() == list(range(len(index)))
    for epoch in range(2):
        rows = tokens[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]
        assert sorted(rows.tolist()) == sorted(DATA.train.rows["tokens"].tolist())


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_evaluation_holds_every_row_once_and_pads_without_weight(batch_size):
    def run(local_rows):
        return list(
            loader.eval_batches(DATA.valid, batch_size=batch_size, local_rows=local_rows, max_tokens=0, seq_len=32)
        )

    batches, num_rows = run(np.arange(batch_size)), len(DATA.valid)
    assert len(batches) == -(-num_rows // batch_size)
    joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    for key, (_, dtype) in DATA.valid.columns.items():
        assert joined[key].dtype == dtype and {b[key].shape for b in batches} == {(batch_size, 32)}
        np.testing.assert_array_equal(joined[key][:num_rows], DATA.valid.rows[key])
        assert not joined[key][num_rows:].any()
    assert joined["example_index"].tolist() == list(range(len(batches) * batch_size))
    for rows in np.array_split(np.arange(batch_size), 2):
        assert_equal(run(rows), [{key: x[rows] for key, x in batch.items()} for batch in batches])


@pytest.mark.parametrize("max_tokens,rows", [(1, 1), (32, 1), (33, 2), (64, 2), (10**9, 0)])
def test_evaluation_stops_at_its_budget(max_tokens, rows):
    batches = loader.eval_batches(DATA.valid, batch_size=3, local_rows=np.arange(3), max_tokens=max_tokens, seq_len=32)
    used = np.concatenate([b["tokens"][b["segment_ids"].any(1)] for b in batches])
    assert len(used) == (rows or len(DATA.valid))
    assert len(np.unique(used, axis=0)) == len(used)


def test_the_report_counts_what_the_batches_hold():
    for half, texts in (("train", TEXTS[:50]), ("valid", TEXTS[50:])):
        rows, report = getattr(DATA, half).rows, DATA.report[half]
        ids = sum(len(TOK.encode(text)) + 1 for text in texts)
        assert report["documents"] == len(texts) and report["rows"] == len(rows["tokens"])
        assert report["tokens"] == report["targets"] == ids
        assert report["bytes"] == sum(len(text.encode()) for text in texts)
        assert report["fill"] == pytest.approx(ids / (32 * len(rows["tokens"])))


def test_reported_bytes_are_those_of_the_answers():
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "na\u00efve \u2581 now"}]
    chats = [{"messages": turns, "source": "f:1"}] * 3
    report = input_pipeline.build(
        make_config(task="chat", seq_len=64), TOK, registry.Split(chats, chats, "", "")
    ).report
    assert report["train"]["bytes"] == 3 * len("na\u00efve \u2581 now".encode())
    assert 0 < report["train"]["targets"] < report["train"]["tokens"]


def test_packing_changes_neither_pairs_nor_counts():
    reports, found = [], []
    for mode in ("pad", "best_fit", "concat"):
        data = input_pipeline.build(make_config(packing=mode), TOK, make_split())
        reports.append({key: data.report["train"][key] for key in ("documents", "tokens", "targets", "bytes")})
        rows = loader.eval_batches(data.train, batch_size=4, local_rows=np.arange(4), max_tokens=0, seq_len=32)
        found.append(pairs(list(rows)))
    assert reports[0] == reports[1] == reports[2] and found[0] == found[1] == found[2]


@pytest.mark.parametrize("half", ["train", "valid"])
def test_data_without_a_target_is_refused_with_its_counts(half):
    def chat(*turns):
        messages = [{"role": role, "content": "hello"} for role in turns]
        return [{"messages": messages, "source": "f:1"}, {"messages": messages, "source": "f:2"}]

    halves = {"train": chat("user", "assistant"), "valid": chat("user", "assistant")} | {half: chat("system", "user")}
    split = registry.Split(halves["train"], halves["valid"], "", "")
    with pytest.raises(DataError, match=f"the {half} data has no target.*documents 2, dropped_no_target 2"):
        input_pipeline.build(make_config(task="chat"), TOK, split)
    halves[half] = []
    with pytest.raises(DataError, match=f"the {half} data has no target.*no documents"):
        input_pipeline.build(make_config(task="chat"), TOK, registry.Split(halves["train"], halves["valid"], "", ""))


def test_fingerprint_changes_with_everything_that_decides_the_stream():
    other_tokenizer = tokenizer.SentencePiece(TOK.model)
    other_tokenizer.__dict__["hash"] = "another tokenizer that gives the same ids"
    changed = [
        input_pipeline.build(make_config(), other_tokenizer, make_split()),
        input_pipeline.build(make_config(), TOK, dataclasses.replace(make_split(), fingerprint="other")),
        input_pipeline.build(make_config(), TOK, make_split(train=tuple(reversed(TEXTS[:50])))),
        input_pipeline.build(make_config(seed=1), TOK, make_split()),
        input_pipeline.build(make_config(seq_len=33), TOK, make_split()),
        input_pipeline.build(make_config(packing="pad"), TOK, make_split()),
        input_pipeline.build(make_config(mask_documents=False), TOK, make_split()),
    ]
    assert len({DATA.fingerprint, *(data.fingerprint for data in changed)}) == len(changed) + 1
    assert input_pipeline.build(make_config(batch_size=4), TOK, make_split()).fingerprint == DATA.fingerprint


def test_real_chat_data_packs_whole(shared_data):
    data = config.DataConfig(
        format="jsonl",
        path=str(shared_data("gsm8k") / "train.jsonl"),
        rename=(("question", "prompt"), ("answer", "response")),
        max_records=300,
    )
    cfg = config.Config(task=toys.task("chat"), data=data)
    split = registry.load(data)
    tok = tokenizer.train(TEXTS, 330, 100_000)
    built = input_pipeline.build(cfg, tok, split)
    report = built.report["train"]
    answers = [m["content"] for r in split.train for m in r["messages"] if m["role"] == "assistant"]
    assert report["documents"] == report["examples"] + report["dropped_long_prompt"] == 300
    lost = sum(len(answer.encode()) for answer in answers) - report["bytes"]
    assert lost > 0 and 0 < report["answer_cut"] < report["examples"]
    assert report["targets"] >= report["examples"]
    roomy = dataclasses.replace(cfg, data=dataclasses.replace(data, seq_len=2048))
    report = input_pipeline.build(roomy, tok, split).report["train"]
    assert report["documents"] == report["examples"] == 300 and not {"answer_cut", "chats_shortened"} & set(report)
    assert report["bytes"] == sum(len(answer.encode()) for answer in answers)


def marked(name, count):
    return records([f"{name} {i} says {'and again ' * (i * 5 % 9)}now.\n" for i in range(count)])


def replay_data(share=0.3, **data):
    """Own rows and replayed ones, all told apart by their tokens."""
    own, other = (registry.Split(marked(n, 23), marked(n + " held", 5), n, "") for n in ("own", "other"))
    cfg = make_config(packing="pad", seq_len=48, replay=share, **data)
    return input_pipeline.build(cfg, TOK, own, replayed=other)


def texts_of(batches):
    return [TOK.decode(row[row > 0]) for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("share", [0.3, 0.29, 0.5, 0.9])
def test_replayed_rows_have_their_share_and_each_stream_its_epochs(share):
    data = replay_data(share)
    rows = texts_of(take(40, data=data))
    is_other = [text.startswith("other") for text in rows]
    assert [sum(is_other[:n]) for n in range(len(rows))] == [n * round(100 * share) // 100 for n in range(len(rows))]
    orders = {}
    for name in ("own", "other"):
        stream = [text for text in rows if text.startswith(name)]
        orders[name] = [int(text.split()[1]) for text in stream[:23]]
        for start in range(0, len(stream) - 22, 23):
            assert len(set(stream[start : start + 23])) == 23
        assert stream[:23] != stream[23:46]
    assert orders["own"] != orders["other"]
    own_left = -(-data.epoch_examples * 100 // 100) - data.epoch_examples * round(100 * share) // 100
    assert own_left >= 23 > own_left - 2  # an epoch is one turn of each own row


@pytest.mark.parametrize("curriculum", [{}, {"curriculum": schema.Duration(steps=9)}])
def test_replay_and_curriculum_resume_anywhere_on_any_number_of_hosts(curriculum):
    data = replay_data(**curriculum)
    whole = take(20, data=data)
    assert np.concatenate([b["example_index"] for b in whole]).tolist() == list(range(20 * BATCH))
    assert data.easy_first == (144 - 43 if curriculum else 0)  # 9 steps of 16, of which 43.2 are replayed
    for start in np.random.default_rng(1).integers(0, 14 * BATCH, 4):
        resumed = take(3, data=data, start=start)
        flat = {key: np.concatenate([b[key] for b in whole])[start : start + 3 * BATCH] for key in whole[0]}
        assert_equal([{key: np.concatenate([b[key] for b in resumed]) for key in flat}], [flat])
    parts = [take(20, data=data, local_rows=np.arange(i, BATCH, 2)) for i in range(2)]
    for i, part in enumerate(parts):
        assert_equal(part, [{key: x[i::2] for key, x in batch.items()} for batch in whole])


def test_a_curriculum_begins_with_short_rows_and_ends_in_epochs():
    cfg = make_config(packing="pad", seq_len=48, batch_size=BATCH, curriculum=schema.Duration(examples=90))
    data = input_pipeline.build(cfg, TOK, registry.Split(marked("own", 40), marked("held", 5), "", ""))
    assert data.easy_first == 12 * BATCH  # 90 examples are 11.25 steps
    rows = np.concatenate([(b["segment_ids"] > 0).sum(axis=1) for b in take(30, data=data)])
    ranked = np.sort((data.train.rows["segment_ids"] > 0).sum(axis=1))
    for g in range(96):
        share = np.sqrt(0.0001 + 0.9999 * g / 96)
        assert rows[g] <= ranked[int(np.ceil(share * 40)) - 1]
    assert rows[0] == ranked[0] and rows[:96].max() > np.median(ranked)
    texts = texts_of(take(30, data=data))
    assert len(set(texts[96 : 96 + 40])) == len(set(texts[136 : 136 + 40])) == 40
    other = input_pipeline.build(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, curriculum=schema.Duration(steps=13))),
        TOK,
        registry.Split(marked("own", 40), marked("held", 5), "", ""),
    )
    assert other.fingerprint != data.fingerprint


def curriculum_data(batch_size, begun=None, documents=40, replay=0.0, **data):
    """Rows under a curriculum of 9 steps, as a run of this batch size has them, begun or not."""
    length = data or {"curriculum": schema.Duration(steps=9)}
    cfg = make_config(packing="pad", seq_len=48, batch_size=batch_size, replay=replay, **length)
    own = registry.Split(marked("own", documents), marked("held", 5), "", "")
    replayed = registry.Split(marked("other", 23), marked("other held", 5), "", "") if replay else None
    return cfg, input_pipeline.build(cfg, TOK, own, replayed=replayed, begun=begun)


@pytest.mark.parametrize("knows_its_length", [True, False], ids=["this version", "an older version"])
@pytest.mark.parametrize("replay", [0.0, 0.3])
def test_a_curriculum_keeps_its_examples_when_the_batch_size_changes(replay, knows_its_length):
    """So each example of the stream has the row it would have had, and the data counts as the same."""
    cfg, data = curriculum_data(BATCH, replay=replay)
    info = {"config": schema.to_dict(cfg), "data": resume.data_info(data, 40, {})}
    if not knows_its_length:
        del info["data"]["easy_first"]
    for batch_size in (BATCH // 2, BATCH, 3 * BATCH):
        _, again = curriculum_data(batch_size, info, replay=replay)
        assert (again.easy_first, again.fingerprint) == (data.easy_first, data.fingerprint)
        assert_equal(take(20, data=again), take(20, data=data))
    assert curriculum_data(3 * BATCH, replay=replay)[1].easy_first > 2 * data.easy_first


def test_a_curriculum_does_not_begin_again_with_accepted_data():
    """Its length in epochs is one of more examples now, but those that have been drawn stay what they were."""
    cfg, data = curriculum_data(BATCH, curriculum=schema.Duration(epochs=1.0))
    info = {"config": schema.to_dict(cfg), "data": resume.data_info(data, 40, {})}
    _, more = curriculum_data(BATCH, info, documents=400, curriculum=schema.Duration(epochs=1.0))
    assert more.easy_first == data.easy_first == 40 and more.fingerprint != data.fingerprint


def test_replayed_rows_decide_the_fingerprint_and_are_counted():
    prints = {replay_data().fingerprint, replay_data(0.31).fingerprint}
    own = registry.Split(marked("own", 23), marked("own held", 5), "own", "")
    another = registry.Split(marked("another", 23), marked("another held", 5), "another", "")
    prints.add(
        input_pipeline.build(make_config(packing="pad", seq_len=48, replay=0.3), TOK, own, replayed=another).fingerprint
    )
    assert len(prints) == 3
    data = replay_data()
    assert data.report["replay_train"]["documents"] == 23 and data.report["replay_valid"]["documents"] == 5
    valid = data.rows_of("valid")
    assert list(valid) == ["", "replay"] and len(valid["replay"]) == 5
    with pytest.raises(ValueError, match=r"data\.replay is 0\.3"):
        input_pipeline.build(make_config(replay=0.3), TOK, own)
    empty = registry.Split(records(["", ""]), records([""]), "", "")
    with pytest.raises(DataError, match=r"'data\.replay': the train data has no target"):
        input_pipeline.build(make_config(replay=0.3), TOK, own, replayed=empty)
