"""tools/serve.py: each client gets its own answer, streamed or whole; what cannot be answered is refused."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest

import lm
from lm import command_line, predict, serving
from lm.config.schema import ConfigError
from lm.decoding import sampling
from lm.serving import openai, work
from tests import tool_modules, used_runs

ROOT = Path(__file__).resolve().parents[1]
GREEDY = {"temperature": 0, "max_tokens": 12}
TEXTS, CHATS, LABELS, VECTORS = "/v1/completions", "/v1/chat/completions", "/v1/labels", "/v1/embeddings"


def load(task: str, folder: Path, **changes):
    """A run with parameters far from their start, so that answers differ."""
    loaded = lm.load(str(used_runs.make(task, folder, **changes)), batch_size=8, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), loaded.params)
    return dataclasses.replace(loaded, params=params)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A language model."""
    return load("causal_lm", tmp_path_factory.mktemp("causal_lm"), data__seq_len=64)


@pytest.fixture(scope="module")
def chatter(tmp_path_factory):
    return load("chat", tmp_path_factory.mktemp("chat"), data__seq_len=64)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load("classification", tmp_path_factory.mktemp("classification"))


@contextlib.contextmanager
def served(loaded, **options):
    with serving.serving(loaded, serving.Options(port=0, **options)) as server:
        yield server


@pytest.fixture(scope="module")
def texts(writer):
    with served(writer) as server:
        yield server


@pytest.fixture(scope="module")
def chats(chatter):
    with served(chatter) as server:
        yield server


@pytest.fixture(scope="module")
def labels(classifier):
    with served(classifier) as server:
        yield server


def send(server, path, body=None, method="POST", headers=None) -> http.client.HTTPResponse:
    """The response; its connection closes behind it."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json"} | (headers or {}))
    return connection.getresponse()


def ask(server, path, body=None, **more) -> dict:
    response = send(server, path, body, **more)
    content = response.read()
    assert response.status == 200, content
    return json.loads(content)


def refused(server, path, body=None, **more) -> tuple[int, str, str]:
    """Status, code and message of an error in OpenAI's form."""
    response = send(server, path, body, **more)
    said = json.loads(response.read())["error"]
    assert said.keys() == {"message", "type", "param", "code"}
    return response.status, said["code"], said["message"]


def stream(server, path, body) -> tuple[list[dict], bool]:
    """The parts, and whether [DONE] was the last."""
    response = send(server, path, body | {"stream": True})
    content = response.read().decode()
    assert response.status == 200, content
    assert response.getheader("content-type").startswith("text/event-stream")
    assert content.endswith("\n\n")
    lines = content.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    is_done = data[-1] == "[DONE]"
    return [json.loads(each) for each in (data[:-1] if is_done else data)], is_done


def text_of_parts(parts, index=0) -> str:
    choices = [one for part in parts for one in part["choices"] if one["index"] == index]
    assert [one["finish_reason"] for one in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(one["text"] if "text" in one else one["delta"].get("content", "") for one in choices)


# Answers --------------------------------------------------------------------------------------------------------------


def test_of_32_clients_at_once_each_gets_its_own_answer_whole_or_streamed(writer, texts):
    rng = np.random.default_rng(0)
    prompts = [used_runs.sentence(rng) for _ in range(32)]
    assert len(set(prompts)) == 32
    wanted = writer.generate(prompts, temperature=0.0, max_new_tokens=12)
    assert len(set(wanted)) > 4

    def client(number: int) -> str:
        body = {"prompt": prompts[number]} | GREEDY
        if number % 2:
            parts, is_done = stream(texts, TEXTS, body)
            assert is_done
            return text_of_parts(parts)
        return ask(texts, TEXTS, body)["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert list(pool.map(client, range(32))) == wanted


@pytest.mark.parametrize("more", [{}, {"stop": [" ", "e"]}, {"stop": "a"}, {"temperature": 1.5, "max_tokens": 40}])
def test_the_parts_of_a_stream_make_the_whole_text(texts, more):
    body = {"prompt": ["the", "alpha beta", "step of"], "seed": 5} | GREEDY | more
    whole = ask(texts, TEXTS, body)
    parts, is_done = stream(texts, TEXTS, body | {"stream_options": {"include_usage": True}})
    assert is_done and parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [part for part in parts if part["choices"] and part["choices"][0]["index"] == choice["index"]]
        assert text_of_parts(own, choice["index"]) == choice["text"]
        assert own[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert len({part["id"] for part in parts}) == 1


def test_a_seed_gives_the_text_of_generate_whatever_it_is_computed_with(writer, texts):
    def client(seed: int) -> str:
        body = {"prompt": "the model", "seed": seed, "temperature": 1.0, "max_tokens": 12}
        return ask(texts, TEXTS, body)["choices"][0]["text"]

    wanted = [writer.generate(["the model"], seed=seed, temperature=1.0, max_new_tokens=12)[0] for seed in range(6)]
    assert len(set(wanted)) > 3
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(client, range(6))) == wanted
    assert client(3) == wanted[3]


def test_without_a_seed_texts_differ(texts):
    body = {"prompt": ["the"] * 4, "temperature": 1.0, "max_tokens": 12}
    assert len({one["text"] for one in ask(texts, TEXTS, body)["choices"]}) > 1


def test_an_answer_says_why_it_ends_and_what_it_used(writer, texts):
    body = {"prompt": "the model", "logprobs": 0} | GREEDY
    said = ask(texts, TEXTS, body)
    (wanted,) = writer.generate(["the model"], temperature=0.0, max_new_tokens=12, log_probs=True)
    (choice,) = said["choices"]
    assert (said["object"], said["model"], choice["text"]) == ("text_completion", texts.model, wanted.text)
    prompt = len(sampling.encode_prompt("the model", writer.tokenizer, writer.config))
    assert said["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(wanted.token_ids),
        "total_tokens": prompt + len(wanted.token_ids),
    }
    text_ids = sampling.without_stop_id(wanted.token_ids, writer.tokenizer, writer.config)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.log_probs[: len(text_ids)], abs=1e-5)
    assert choice["finish_reason"] == ("length" if len(text_ids) == 12 else "stop")
    stop = next(letter for letter in choice["text"] if letter != choice["text"][0])
    cut = ask(texts, TEXTS, body | {"stop": stop})["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (choice["text"].partition(stop)[0], "stop")
    told, whole = cut["logprobs"], choice["logprobs"]
    assert (
        told["text_offset"] == [each for each in whole["text_offset"] if each < len(cut["text"])]
        and told["text_offset"]
    )
    assert told["token_logprobs"] == pytest.approx(whole["token_logprobs"][: len(told["text_offset"])], abs=1e-5)


def test_ids_are_a_prompt_as_they_are(writer, texts):
    ids = sampling.encode_prompt("the model", writer.tokenizer, writer.config)
    by_ids = ask(texts, TEXTS, {"prompt": ids} | GREEDY)["choices"][0]["text"]
    assert by_ids == ask(texts, TEXTS, {"prompt": "the model"} | GREEDY)["choices"][0]["text"]
    both = ask(texts, TEXTS, {"prompt": [ids, ids[:2]]} | GREEDY)["choices"]
    assert both[0]["text"] == by_ids != both[1]["text"] and [one["index"] for one in both] == [0, 1]


def test_a_chat_is_written_as_in_training(chatter, chats):
    question = "alpha beta"
    (wanted,) = chatter.generate([question], temperature=0.0, max_new_tokens=12)
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": question}]}], "user": "me"} | GREEDY
    said = ask(chats, CHATS, body)
    assert (said["object"], said["choices"][0]["message"]["content"]) == ("chat.completion", wanted)
    parts, is_done = stream(chats, CHATS, body)
    assert is_done and text_of_parts(parts) == wanted and parts[0]["object"] == "chat.completion.chunk"
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    turns = [{"role": "system", "content": "gamma"}, {"role": "developer", "content": "x"}, *body["messages"]]
    more = ask(chats, CHATS, body | {"messages": turns})
    assert more["usage"]["prompt_tokens"] > said["usage"]["prompt_tokens"]


def test_labels_and_embeddings_are_those_of_the_run(classifier, labels):
    given = ["alpha pos beta", {"text": "neg gamma"}, "delta"]
    said = ask(labels, LABELS, {"input": given})["data"]
    for i, (one, wanted) in enumerate(zip(said, classifier.predict(given), strict=True)):
        assert one["index"] == i and one["prediction"] == wanted["prediction"]
        assert one["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-6)
    wanted = classifier.embed(["alpha", "beta gamma"])
    body = {"input": ["alpha", "beta gamma"], "model": labels.model}
    said = ask(labels, VECTORS, body)
    assert np.allclose([one["embedding"] for one in said["data"]], wanted, atol=1e-6)
    assert said["usage"]["prompt_tokens"] == sum(len(classifier.tokenizer.encode(x)) + 2 for x in body["input"])
    coded = ask(labels, VECTORS, body | {"encoding_format": "base64"})["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(coded), "<f4"), wanted[0], atol=1e-6)


def test_a_connection_serves_one_request_after_another(texts):
    connection = http.client.HTTPConnection(urlsplit(texts.url).netloc, timeout=120)
    connection.connect()
    first, said = connection.sock, []
    for more in ({}, {"stream": True}, {"n": 2}, {}):
        body = json.dumps({"prompt": "the model"} | GREEDY | more)
        connection.request("POST", TEXTS, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        said.append(response.read().decode())
        assert connection.sock is first
    assert json.loads(said[0])["choices"] == json.loads(said[3])["choices"] and said[1].endswith("data: [DONE]\n\n")
    connection.close()


def test_the_example_is_of_the_first_endpoint_that_is_served(chats, labels, texts):
    for server, path in ((chats, CHATS), (texts, TEXTS), (labels, VECTORS)):
        command = serving.example(server, True)
        asked = json.loads(command.rsplit("-d ", 1)[1].strip("'"))
        assert f" {server.url}{path} " in command and "Bearer $LM_API_KEY" in command
        assert stream(server, path, asked)[1] if "stream" in asked else ask(server, path, asked)


def test_the_model_is_listed(texts):
    (one,) = ask(texts, "/v1/models", method="GET")["data"]
    assert one["id"] == texts.model == "run@3"


# Parts of texts -------------------------------------------------------------------------------------------------------


class BytesOrNothing:
    """A decoder that replaces all bytes of a run of bytes that is no UTF-8, as that of `tokenizers` does."""

    def __init__(self, words):
        self.words = words

    def __getattr__(self, name):
        return getattr(self.words, name)

    def decode(self, ids):
        text, run = "", b""
        for i in [*ids, None]:
            piece = "" if i is None else self.words.piece(i)
            if piece.startswith("<0x"):
                run += bytes([int(piece[1:-1], 16)])
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            run = b""
            text += "" if i is None else self.words.decode([i])
        return text


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("stop", [(), ("lo",), ("\u00e9\u65e5", "zz"), ("ab",), ("aab", "b c")])
def test_what_was_sent_of_a_text_never_changes(writer, is_strict, stop):
    words = BytesOrNothing(writer.tokenizer) if is_strict else writer.tokenizer
    cfg = sampling.changed(writer.config, {"stop": stop})
    lead = next(i for i in range(words.vocab_size) if words.piece(i) == "<0xE6>")
    for text in ("hello \u00e9\u00e9\u65e5\u65e5 z \U0001f600!", "aaab c\u00e9 \n\n lo", "\ufffd a \u65e5"):
        for ids in (words.encode(text), [*words.encode(text), lead], [lead, *words.encode(text), lead, lead]):
            sent, most = "", ""
            for n in range(1, len(ids) + 1):
                if sampling._end(ids[:n], 0, (words.eos_id,), words, cfg)[1]:
                    ids = ids[:n]
                    break
                settled = work.settled_text(ids[:n], words, cfg)
                assert settled.startswith(sent)
                sent, most = settled, words.decode(ids[:n])
            assert work.whole_text(ids, words, cfg).startswith(sent)
            assert is_strict or stop or len(sent) >= len(most.rstrip("\ufffd"))


# Refusals -------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "alpha"}
BAD = [
    (b"{", 400, "invalid_json", "is not JSON"),
    (b'"\xff"', 400, "invalid_json", "is not JSON"),
    (b"[" * 100_000, 400, "invalid_json", "is not JSON"),
    (b'{"prompt": "\\ud800"}', 400, "invalid_json", "surrogates"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_json", ""),
    (b'{"prompt": "a", "temperature": 1e999}', 400, "invalid_json", ""),
    ([], 400, "invalid_json", "expected a JSON object"),
    ({"prompt": "a " * 500_000}, 413, "request_too_large", "more than 524,288 bytes"),
    ({"prompt": "alpha " * 5000}, 400, "context_length_exceeded", "expected a shorter prompt, or fewer"),
    ({"prompt": "a", "max_tokens": 64}, 400, "context_length_exceeded", "64 new ones need more than the 64 positions"),
    ({}, 400, "wrong_type", "'prompt' is null"),
    ({"prompt": []}, 400, "wrong_type", "'prompt' is []"),
    ({"prompt": ["a", 1]}, 400, "wrong_type", "'prompt' is"),
    ({"prompt": [1, 10**6]}, 400, "invalid_value", "'prompt' has ids outside of 0 to"),
    ({"prompt": "a\0"}, 400, "invalid_value", "NUL"),
    ({"prompt": "a", "temprature": 1}, 400, "unknown_parameter", "'temprature' (did you mean 'temperature'?)"),
    ({"prompt": "a", "n": 2}, 400, "unsupported_value", "'n' is 2"),
    ({"prompt": "a", "n": True}, 400, "unsupported_value", "'n' is true"),
    ({"prompt": "a", "echo": True}, 400, "unsupported_value", "'echo' is true"),
    ({"prompt": "a", "presence_penalty": 0.5}, 400, "unsupported_value", "'presence_penalty' is 0.5"),
    ({"prompt": "a", "logprobs": 2}, 400, "unsupported_value", "'logprobs' is 2"),
    ({"prompt": "a", "logprobs": 0, "stream": True}, 400, "unsupported_value", "'logprobs' of a stream"),
    ({"prompt": "a", "temperature": "hot"}, 400, "wrong_type", "'temperature' is \"hot\""),
    ({"prompt": "a", "temperature": -1}, 400, "invalid_value", "temperature"),
    ({"prompt": "a", "temperature": 10**400}, 400, "invalid_value", "temperature"),
    ({"prompt": "a", "top_p": 0}, 400, "invalid_value", "top_p"),
    ({"prompt": "a", "max_tokens": 0}, 400, "invalid_value", "max_new_tokens"),
    ({"prompt": "a", "max_tokens": True}, 400, "wrong_type", "'max_tokens' is true"),
    ({"prompt": "a", "max_tokens": 2.5}, 400, "wrong_type", "'max_tokens' is 2.5"),
    ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}, 400, "invalid_value", "both"),
    ({"prompt": "a", "stop": ["a"] * 5}, 400, "wrong_type", "at most 4"),
    ({"prompt": "a", "stop": ""}, 400, "invalid_value", "empty string"),
    ({"prompt": "a", "stop": "<|end|>"}, 400, "invalid_request", "a control symbol"),
    ({"prompt": "a", "stop": "<|end|>", "stream": True}, 400, "invalid_request", "a control symbol"),
    ({"prompt": "a", "seed": -1}, 400, "invalid_value", "'seed' is -1"),
    ({"prompt": "a", "stream": "yes"}, 400, "wrong_type", "'stream' is \"yes\""),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "invalid_value", "without 'stream'"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "model_not_found", "this server has 'run@3'"),
    ({"prompt": ["a"] * 300}, 400, "too_many_inputs", "at most 256 in one request"),
]


@pytest.mark.parametrize(("body", "status", "code", "message"), BAD)
def test_a_bad_request_is_refused_and_the_server_lives(texts, body, status, code, message):
    got = refused(texts, TEXTS, body)
    assert got[:2] == (status, code) and message in got[2]
    assert ask(texts, TEXTS, {"prompt": "a"} | GREEDY)["choices"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "'messages' is NoneType None"),
        ([], "'messages' is list []"),
        ("hello", "'messages' is str 'hello'"),
        (["hello"], "'messages[0].role' is \"hello\""),
        ([{"role": "robot", "content": "x"}], "'messages[0].role' is \"robot\"; expected an object whose 'role'"),
        ([{"content": "x"}], "'messages[0].role' is null"),
        ([{"role": "user"}], "expected 'content'"),
        ([{"role": "user", "content": 5}], "'messages[0].content' is int 5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "expected text"),
        ([{"role": "user", "content": "x", "name": "me"}], "unknown key 'messages[0].name'"),
        ([USER | {"content": "alpha " * 500}], "expected a shorter prompt, or fewer"),
    ],
)
def test_a_bad_conversation_is_refused(chats, messages, message):
    status, _, said = refused(chats, CHATS, {"messages": messages} | GREEDY)
    assert status == 400 and message in said


def test_the_name_of_an_id_that_ends_a_text_is_a_stop_without_effect(chatter, chats):
    """lm-evaluation-harness sends such names."""
    names = [chatter.tokenizer.piece(i) for i in sampling.stop_ids(chatter.tokenizer, chatter.config)]
    assert "<|end|>" in names
    body = {"messages": [USER]} | GREEDY
    without = ask(chats, CHATS, body | {"stop": "e"})["choices"]
    assert ask(chats, CHATS, body | {"stop": ["e", *names]})["choices"] == without
    assert "a control symbol" in refused(chats, CHATS, body | {"stop": "<|user|>"})[2]


def test_what_harms_nothing_is_accepted_and_the_rest_is_named(chats):
    more = {"user": "me", "n": 1, "logit_bias": None, "frequency_penalty": 0.0, "tools": [], "tool_choice": "auto"}
    assert ask(chats, CHATS, {"messages": [USER]} | GREEDY | more)
    for name in ("tools", "functions", "logit_bias", "response_format"):
        assert f"'{name}' is" in refused(chats, CHATS, {"messages": [USER], name: {"x": 1}})[2]


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        (LABELS, None, "'input' is null"),
        (LABELS, [], "'input' is []"),
        (LABELS, [5], "'input' is [5]"),
        (LABELS, [""], "'text' is str ''"),
        (LABELS, [{"txt": "a"}], "expected 'text'"),
        (LABELS, [{"text": "a", "other": 1}], "'input[0].other' is not read"),
        (LABELS, [{"text": "a", "instruction": "b"}], "'input[0].instruction' is not read"),
        (LABELS, [{"text": 5, "items": ["a"]}], "'input[0].items' is not read"),
        (LABELS, [{"image": "/etc/passwd"}], "what is no text"),
        (LABELS, [{"words": ["a"]}], "found 'words'; expected 'text'"),
        (VECTORS, {"text": "a"}, "'input' is"),
        (VECTORS, ["alpha " * 400], "a text is longer than the 32 ids of a row"),
    ],
)
def test_bad_inputs_are_refused_and_spoil_no_other(labels, path, given, message):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        good = [pool.submit(ask, labels, path, {"input": "alpha"}) for _ in range(3)]
        bad = [pool.submit(refused, labels, path, {"input": given}) for _ in range(3)]
        assert all(len(one.result()["data"]) == 1 for one in good)
        for one in bad:
            status, _, said = one.result()
            assert status == 400 and message in said


def test_of_records_that_are_computed_together_only_the_bad_one_is_refused(classifier):
    """One that has the fields of another task is found to be bad where it is computed."""
    worker, told = work.Worker(classifier, most_waiting=8), [[], [], []]
    try:
        records = predict.given_records(classifier, ["alpha", {"messages": [USER]}, "beta"])
        pairs = zip(records, told, strict=True)
        worker.submit([work.Job(work.Label(), record, tell.append) for record, tell in pairs])
        until(lambda: all(told))
    finally:
        worker.close()
    (good,), (bad,), (other,) = told
    assert bad.status == 400 and "messages" in str(bad)
    assert [good["prediction"], other["prediction"]] == [
        one["prediction"] for one in classifier.predict(["alpha", "beta"])
    ]


def test_of_a_batch_that_fails_each_is_computed_alone_unless_a_part_of_it_was_sent(classifier, monkeypatch, capsys):
    compute, batches = work.Label.compute, []

    def fail_together(self, loaded, jobs, is_closed):
        batches.append(len(jobs))
        if len(jobs) > 1:
            jobs[1].add("a part")
            raise RuntimeError("broken")
        compute(self, loaded, jobs, is_closed)

    monkeypatch.setattr(work.Label, "compute", fail_together)
    worker, told = work.Worker(classifier, most_waiting=8), [[], [], []]
    try:
        records = predict.given_records(classifier, ["alpha", "beta", "gamma"])
        worker.submit([work.Job(work.Label(), one, said.append) for one, said in zip(records, told, strict=True)])
        until(lambda: told[0] and told[2] and len(told[1]) == 2)
    finally:
        worker.close()
    assert batches == [3, 1, 1] and [list(map(type, each)) for each in (told[0], told[2])] == [[dict], [dict]]
    assert told[1][0] == work.Piece("a part") and told[1][1].status == 500 and "broken" in capsys.readouterr().err


def test_an_encoder_decoder_gives_no_more_ids_than_it_was_trained_on(writer):
    """Its prompt takes no positions of what it writes, and relative positions end nowhere."""
    model = dataclasses.replace(writer.config.model, kind="encoder_decoder", position="relative")
    other = dataclasses.replace(writer, config=dataclasses.replace(writer.config, model=model))
    long, short = other.config.data.seq_len, {"wants_log_probs": False}
    assert openai._texts({"max_tokens": long - 1}, [[5] * long], other, "prompt", **short).prompt_ids == long
    for most, prompt in ((long, [5]), (10**6, [5]), (1, [5] * (long + 1))):
        with pytest.raises(work.Refused, match=f"more than the {long} positions") as error:
            openai._texts({"max_tokens": most}, [prompt], other, "prompt", **short)
        assert error.value.code == "context_length_exceeded"


def test_an_endpoint_that_the_task_cannot_serve_says_what_it_can(texts, labels, chats):
    status, code, said = refused(labels, TEXTS, {"prompt": "a"})
    assert (status, code) == (400, "unsupported_endpoint") and f"it serves {VECTORS}, {LABELS}" in said
    assert "does not train on conversations; it serves /v1/completions" in refused(texts, CHATS, {"messages": []})[2]
    assert "predicts no labels" in refused(texts, LABELS, {"input": "a"})[2]
    assert not chats.endpoints[CHATS]


def test_other_paths_methods_and_kinds_of_content_are_refused(texts):
    assert refused(texts, "/v1/edits", {})[:2] == (404, "not_found")
    assert refused(texts, TEXTS, method="GET")[0] == 405
    assert refused(texts, TEXTS, {"prompt": "a"}, headers={"Content-Type": "text/plain"})[0] == 415
    response = send(texts, TEXTS, {"prompt": "a"} | GREEDY, headers={"Origin": "http://evil.example"})
    assert response.getheader("access-control-allow-origin") is None
    assert refused(texts, TEXTS, {"prompt": "a"}, headers={"Host": "evil.example"})[:2] == (403, "forbidden")


def test_a_key_is_asked_of_every_request(writer):
    with served(writer, api_key="sesame") as server:
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
            assert refused(server, "/v1/models", method="GET", headers=headers)[:2] == (401, "invalid_api_key")
            assert refused(server, TEXTS, {"prompt": "a"}, headers=headers)[0] == 401
        key = {"Authorization": "Bearer sesame", "Host": "behind.a.proxy"}
        assert ask(server, TEXTS, {"prompt": "a"} | GREEDY, headers=key)


def test_an_open_address_needs_a_key(writer):
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="set a key"):
            serving.check_options(serving.Options(host=host))
        serving.check_options(serving.Options(host=host, api_key="sesame"))
    for host in ("127.0.0.1", "localhost", "::1"):
        serving.check_options(serving.Options(host=host))
    with pytest.raises(ConfigError, match="ASCII"):
        serving.check_options(serving.Options(api_key="s\u00e9same"))


def test_a_port_that_is_taken_is_an_error(writer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serving.serving(writer, serving.Options(port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match="choose another --port"), server:
            pass


# What waits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
    """(a condition that texts wait for, prompts of each batch that was begun)."""
    go, begun, compute = threading.Event(), [], work.Generate.compute

    def held_compute(self, loaded, jobs, is_closed):
        begun.append([job.given.ids for job in jobs])
        assert go.wait(60)
        compute(self, loaded, jobs, is_closed)

    def noted(name: str, calls: list) -> None:
        given = getattr(work.Worker, name)

        def call(self, jobs):
            given(self, jobs)
            calls.append(jobs)

        monkeypatch.setattr(work.Worker, name, call)

    noted("submit", submitted := [])
    noted("cancel", cancelled := [])
    monkeypatch.setattr(work.Generate, "compute", held_compute)
    yield go, begun, submitted, cancelled
    go.set()


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_when_too_many_wait_others_are_told_to_come_again(writer, held):
    go, begun, submitted, _ = held
    with served(writer, most_waiting=3) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, server, TEXTS, {"prompt": "a"} | GREEDY)
        until(lambda: begun)
        waiting = pool.submit(ask, server, TEXTS, {"prompt": ["a", "b", "the"]} | GREEDY)
        until(lambda: len(submitted) == 2)
        response = send(server, TEXTS, {"prompt": "model", "max_tokens": 1})
        status, retry, said = response.status, response.getheader("retry-after"), json.loads(response.read())
        assert (status, retry, said["error"]["code"]) == (503, "1", "queue_full")
        go.set()
        assert len(first.result()["choices"]) == 1 and len(waiting.result()["choices"]) == 3
        assert [len(one) for one in begun] == [1, 3]  # what waited together is one batch
        assert ask(server, TEXTS, {"prompt": "a"} | GREEDY)


def test_what_nobody_waits_for_any_more_is_not_computed(writer, held):
    go, begun, submitted, cancelled = held
    with served(writer) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, server, TEXTS, {"prompt": "a"} | GREEDY)
        until(lambda: begun)
        netloc = urlsplit(server.url).netloc
        leaving = http.client.HTTPConnection(netloc, timeout=60)
        leaving.request("POST", TEXTS, json.dumps({"prompt": "gone"} | GREEDY), {"Content-Type": "application/json"})
        until(lambda: len(submitted) == 2)
        leaving.close()
        until(lambda: cancelled)
        staying = pool.submit(ask, server, TEXTS, {"prompt": "the"} | GREEDY)
        until(lambda: len(submitted) == 3)
        go.set()
        assert first.result() and staying.result()
    gone = sampling.encode_prompt("gone", writer.tokenizer, writer.config)
    assert gone not in [ids for batch in begun for ids in batch] and len(begun) == 2


def test_a_client_that_leaves_a_stream_stops_no_other(writer, texts):
    body = {"prompt": "the model", "temperature": 1.0, "seed": 1, "max_tokens": 40, "min_tokens": 40}
    wanted = ask(texts, TEXTS, body)["choices"][0]["text"]

    def leave() -> None:
        response = send(texts, TEXTS, body | {"stream": True})
        response.read(20)
        response.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave) for _ in range(4)]
        staying = [pool.submit(stream, texts, TEXTS, body) for _ in range(4)]
        assert all(text_of_parts(one.result()[0]) == wanted and one.result()[1] for one in staying)
        assert all(one.result() is None for one in leaving)


def test_an_error_of_the_server_is_told_and_shown(texts, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("broken \x1b[2J")

    with monkeypatch.context() as patch:
        patch.setattr(work.Generate, "compute", fail)
        assert refused(texts, TEXTS, {"prompt": "a"})[:2] == (500, "internal_error")
    err = capsys.readouterr().err
    assert "RuntimeError: broken" in err and "\x1b" not in err
    assert ask(texts, TEXTS, {"prompt": "a"} | GREEDY)


def test_a_stream_that_fails_ends_with_the_error_and_without_done(texts, monkeypatch, capsys):
    settled, calls = work.settled_text, []

    def fail_later(*given):
        calls.append(given)
        if len(calls) > 1:
            raise RuntimeError("broken")
        return settled(*given)

    with monkeypatch.context() as patch:
        patch.setattr(work, "settled_text", fail_later)
        parts, is_done = stream(texts, TEXTS, {"prompt": "the", "min_tokens": 12} | GREEDY)
    assert not is_done and parts[-1]["error"]["code"] == "internal_error" and parts[0]["choices"]
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_a_server_that_stops_tells_those_who_wait(writer, held):
    go, begun, submitted, _ = held
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        with served(writer) as server:
            waiting = [
                pool.submit(refused, server, TEXTS, {"prompt": "a"} | GREEDY | more) for more in ({}, {"stop": "x"})
            ]
            until(lambda: begun and len(submitted) == 2)
            threading.Timer(0.5, go.set).start()
        assert [one.result()[:2] for one in waiting] == [(503, "stopping")] * 2


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_ctrl_c(writer):
    run = writer.name.partition("@")[0]
    command = [sys.executable, "-u", "tools/serve.py", f"--run={run}", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, **pipes) as process:
        try:
            first = process.stdout.readline()
            url = first.split(" at ")[1].split("/v1;")[0]
            lines = [process.stdout.readline() for _ in range(5)]
            assert lines[-1].startswith(f"for example: curl -N {url}{TEXTS} "), lines
            asked = json.loads(lines[-1].rsplit("-d ", 1)[1].strip().strip("'"))
            server = serving.Server(url, "", {}, lambda: None)
            parts, is_done = stream(server, TEXTS, asked)
            assert is_done and parts
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --run=RUN is needed"),
        (["--run=nowhere"], "error: no checkpoint under 'nowhere/checkpoints'"),
        (["--run=nowhere", "--host=0.0.0.0"], "error: --host=0.0.0.0 can be reached by others: set a key"),
        (["--run=nowhere", "--port=70000"], "error: expected a port from 0 to 65535"),
    ],
)
def test_an_error_of_the_command_is_one_line(arguments, message, monkeypatch):
    monkeypatch.delenv("LM_API_KEY", raising=False)
    with pytest.raises(SystemExit) as stopped:
        tool_modules.call("serve", *arguments)
    assert str(stopped.value).startswith(message) and "\n" not in str(stopped.value)


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"needs the package uvicorn: pip install -e '.\[serve\]'"):
        serving.check_options(serving.Options())
    assert command_line.is_expected(work.Refused(400, ""))
