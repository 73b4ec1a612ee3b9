"""Requests in OpenAI's form to jobs, and what these become in the form of its answers.

A parameter that is not known, or that asks for what is not done here, is refused: none that would change the answer is
ignored.
"""

import base64
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import predict
from lm.config import Config
from lm.config.schema import ConfigError, nearest
from lm.data.readers import fields
from lm.data.readers.fields import BadRecord
from lm.data.record import Record, Wanted
from lm.decoding import sampling
from lm.predict import LoadedModel
from lm.serving import work
from lm.serving.work import Refused
from lm.tasks import chat, task_of
from lm.tracking.files import finite

ROLES = ("system", "developer", "user", "assistant", "tool")
# Accepted without effect: they say who asks, or where the answer is kept.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Accepted at these values, which ask for nothing. So is null everywhere.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Parameter -> key of `generate` of the config, and the type of its value; the last three are those of vLLM.
_SAMPLING: dict[str, tuple[str, type]] = {
    "max_tokens": ("max_new_tokens", int),
    "max_completion_tokens": ("max_new_tokens", int),
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_tokens": ("min_new_tokens", int),
    "repetition_penalty": ("repetition_penalty", float),
}
_MOST_STOPS = 4
_MOST = 1e9  # of any number
_TEXTS = ("model", "stream", "stream_options", "stop", "seed", "logprobs", *_SAMPLING)
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "refusal")


class Asked(NamedTuple):
    """A request.

    Attributes:
      kind: of each job.
      given: of each job.
      prompt_ids: how many ids the prompts have.
      is_streamed: whether the answer is.
      has_usage: whether a stream ends with what was used.
      as_base64: whether embeddings are written so.
    """

    kind: list[Any]
    given: list[Any]
    prompt_ids: int = 0
    is_streamed: bool = False
    has_usage: bool = False
    as_base64: bool = False


# Requests -------------------------------------------------------------------------------------------------------------


def parse(content: bytes) -> dict[str, Any]:
    """The body of a request. Raises Refused."""
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8, lone surrogates, NaN
        raise Refused(400, f"the body is not JSON that can be used: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {_shown(body)}; expected a JSON object", "invalid_json")
    return body


def _check_parameters(body: Mapping[str, Any], known: Sequence[str], model: str) -> dict[str, Any]:
    """The known parameters that are given. Raises Refused for others."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in known or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            message = f"unknown parameter '{name}'{nearest(name, known)}; expected some of {', '.join(known)}"
            raise Refused(400, message, "unknown_parameter", name)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
            expected = " or ".join(json.dumps(one) for one in NEUTRAL[name])
            message = f"'{name}' is {_shown(value)}, which this server does not do; expected {expected}, or none"
            raise Refused(400, message, "unsupported_value", name)
    asked = _of_type(given, "model", str, model)
    if asked != model:
        raise Refused(404, f"'model' is {_shown(asked)}; this server has '{model}'", "model_not_found", "model")
    return {name: value for name, value in given.items() if name in known}


def _of_type(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A parameter. Raises Refused if it has another type."""
    value = given.get(name, default)
    fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if name in given and not fits:
        word = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "an object"}[kind]
        raise Refused(400, f"'{name}' is {_shown(value)}; expected {word}", "wrong_type", name)
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def completion(body: dict[str, Any], loaded: LoadedModel, model: str) -> Asked:
    """A request of /v1/completions: each text is a prompt in the form of the run's task; ids are taken as they are."""
    given = _check_parameters(body, ("prompt", *_TEXTS), model)
    prompts = given.get("prompt")
    if isinstance(prompts, str) or _are_ids(prompts):
        prompts = [prompts]
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(one, str) or _are_ids(one) for one in prompts)
    ):
        message = f"'prompt' is {_shown(prompts)}; expected a text, a list of ids, or a list of at least one of these"
        raise Refused(400, message, "wrong_type", "prompt")
    prompt, size = task_of(loaded.config).prompt, loaded.tokenizer.vocab_size
    assert prompt is not None
    for one in prompts:
        if not isinstance(one, str) and not all(0 <= i < size for i in one):
            raise Refused(400, f"'prompt' has ids outside of 0 to {size - 1}", "invalid_value", "prompt")
    encoded = [prompt(_clean(one, "prompt"), loaded.tokenizer) if isinstance(one, str) else one for one in prompts]
    return _texts(given, encoded, loaded, "prompt", wants_log_probs=_completion_log_probs(given))


def _completion_log_probs(given: Mapping[str, Any]) -> bool:
    if _of_type(given, "logprobs", int, 0):
        message = f"'logprobs' is {given['logprobs']}; expected 0: those of the ids that were chosen, of no others"
        raise Refused(400, message, "unsupported_value", "logprobs")
    return "logprobs" in given


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def conversation(body: dict[str, Any], loaded: LoadedModel, model: str) -> Asked:
    """A request of /v1/chat/completions: the conversation is written as the run's chat template says."""
    given = _check_parameters(body, ("messages", *_TEXTS), model)
    messages = given.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            expected = f"expected an object whose 'role' is one of {', '.join(ROLES)}"
            raise Refused(400, f"'messages[{i}].role' is {_shown(role)}; {expected}", "invalid_value", "messages")
        for key in message:
            if key not in _MESSAGE_KEYS and message[key] is not None:
                found = f"unknown key 'messages[{i}].{key}'; expected some of {', '.join(_MESSAGE_KEYS)}"
                raise Refused(400, found, "unknown_parameter", "messages")
    try:
        turns = fields.normalise({"messages": messages}, {}, Wanted(fields=("messages",)))["messages"]
    except BadRecord as error:
        raise Refused(400, error.args[1], "invalid_value", "messages") from None
    ids = chat.prompt_ids(turns, loaded.tokenizer)
    wants_log_probs = _of_type(given, "logprobs", bool, False)
    return _texts(given, [ids], loaded, "messages", wants_log_probs=wants_log_probs)


def _texts(
    given: Mapping[str, Any], prompts: list[list[int]], loaded: LoadedModel, param: str, *, wants_log_probs: bool
) -> Asked:
    """The jobs that continue prompts."""
    changes = {}
    for name, (key, kind) in _SAMPLING.items():
        if name in given:
            if key in changes:
                raise Refused(400, f"both 'max_tokens' and '{name}' are given; expected one", "invalid_value", name)
            value = _of_type(given, name, kind, None)
            if abs(value) > _MOST:
                raise Refused(400, f"'{name}' is {_shown(value)}; expected less", "invalid_value", name)
            changes[key] = kind(value)
    if "stop" in given:
        changes["stop"] = _stops(given["stop"], loaded)
    try:
        cfg = sampling.changed(loaded.config, changes)
    except ConfigError as error:
        raise Refused(400, str(error), "invalid_value") from None
    positions, most = sampling.PROMPTING[cfg.model.kind].positions, cfg.generate.max_new_tokens
    for ids in prompts:
        if positions(len(ids), most) > cfg.data.seq_len:
            raise Refused(
                400,
                f"a prompt of {len(ids)} ids and {most} new ones need more than the {cfg.data.seq_len} positions that "
                "this run was trained on; expected a shorter prompt, or fewer 'max_tokens'",
                "context_length_exceeded",
                param,
            )
    seed = _of_type(given, "seed", int, None)
    if seed is not None and not 0 <= seed < 1 << 32:
        raise Refused(400, f"'seed' is {seed}; expected 0 to {(1 << 32) - 1}", "invalid_value", "seed")
    is_streamed = _of_type(given, "stream", bool, False)
    if is_streamed and wants_log_probs:
        raise Refused(
            400, "'logprobs' of a stream are not sent; ask for one of the two", "unsupported_value", "logprobs"
        )
    options = _of_type(given, "stream_options", dict, {})
    if unknown := [name for name in options if name not in ("include_usage", "include_obfuscation")]:
        raise Refused(400, f"unknown 'stream_options.{unknown[0]}'", "unknown_parameter", "stream_options")
    if options and not is_streamed:
        raise Refused(400, "'stream_options' without 'stream'", "invalid_value", "stream_options")
    drawn = [secrets.randbits(32) if seed is None else seed for _ in prompts]
    return Asked(
        [work.generate_kind(cfg, len(ids), wants_log_probs) for ids in prompts],
        [work.Prompt(ids, of_row, is_streamed) for ids, of_row in zip(prompts, drawn, strict=True)],
        sum(map(len, prompts)),
        is_streamed,
        _of_type(options, "include_usage", bool, False),
    )


def _stops(value: Any, loaded: LoadedModel) -> tuple[str, ...]:
    """Without the names of the ids that end a text by themselves, such as '<|im_end|>', which some clients send."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(one, str) for one in stops):
        message = f"'stop' is {_shown(value)}; expected a string, or a list of at most {_MOST_STOPS}"
        raise Refused(400, message, "wrong_type", "stop")
    ends = {loaded.tokenizer.piece(i) for i in sampling.stop_ids(loaded.tokenizer, loaded.config)}
    return tuple(one for one in stops if one not in ends)


def _clean(text: str, param: str) -> str:
    try:
        return fields.clean(text, f"'{param}'")
    except BadRecord as error:
        raise Refused(400, error.args[1], "invalid_value", param) from None


def embedding(body: dict[str, Any], loaded: LoadedModel, model: str) -> Asked:
    """A request of /v1/embeddings."""
    given = _check_parameters(body, ("model", "input", "encoding_format"), model)
    texts = given.get("input")
    if not _is_list_of(texts, str):
        message = f"'input' is {_shown(texts)}; expected a text, or a list of at least one"
        raise Refused(400, message, "wrong_type", "input")
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        message = f"'encoding_format' is {_shown(form)}; expected float or base64"
        raise Refused(400, message, "invalid_value", "encoding_format")
    records = _records(texts, loaded)
    return Asked([work.Embed()] * len(records), records, as_base64=form == "base64")


def label(body: dict[str, Any], loaded: LoadedModel, model: str) -> Asked:
    """A request of /v1/labels: texts, or records with the fields of the run's task, see docs/formats.md."""
    given = _check_parameters(body, ("model", "input"), model)
    inputs = given.get("input")
    if not _is_list_of(inputs, str | dict):
        message = f"'input' is {_shown(inputs)}; expected a text or a record, or a list of at least one"
        raise Refused(400, message, "wrong_type", "input")
    records = _records(inputs, loaded)
    return Asked([work.Label()] * len(records), records)


def _is_list_of(value: Any, kind: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, kind) for one in values)


def _records(given: Any, loaded: LoadedModel) -> list[Record]:
    """Raises Refused or DataError."""
    whole = [one if isinstance(one, dict) else {"text": one} for one in (given if isinstance(given, list) else [given])]
    has_items = "items" in task_of(loaded.config).fields
    for i, one in enumerate(whole):
        if "image" in one or not _is_list_of(one.get("items", [""]), str):
            raise Refused(
                400, f"'input[{i}]' has what is no text; expected texts, 'items' a list of them", param="input"
            )
        if not has_items and "items" in one:
            raise Refused(400, f"'input[{i}].items' is not read", "unknown_parameter", "input")
    records = list(predict.given_records(loaded, whole))
    wanted = predict.wanted_to_predict(loaded.config)
    for i, one in enumerate(whole):
        read = {"items", "user"} if "items" in one else fields.names_read(one, wanted)
        if unread := [name for name in one if name not in read]:
            raise Refused(400, f"'input[{i}].{unread[0]}' is not read", "unknown_parameter", "input")
    return records


def served(loaded: LoadedModel) -> dict[str, str]:
    """Endpoint -> why the run cannot serve it; '' = it can."""
    cfg, task = loaded.config, task_of(loaded.config)
    reads_images = "image" in task.fields

    def reason(check: Callable[[Config], None]) -> str:
        try:
            check(cfg)
        except ConfigError as error:
            return str(error)
        return ""

    has_labels = task.predictor is not None and not reads_images
    is_chat = task.prompt is not None and task.prompt is chat.CHAT.prompt
    no_chat = f"task.name={task.name} does not train on conversations"
    return {
        "/v1/chat/completions": reason(sampling.check_kind) or ("" if is_chat else no_chat),
        "/v1/completions": reason(sampling.check_kind),
        "/v1/embeddings": "images cannot be sent" if reads_images else reason(predict.check_embeds),
        "/v1/labels": "" if has_labels else f"task.name={task.name} predicts no labels of texts",
    }


# Answers --------------------------------------------------------------------------------------------------------------


def usage(prompt_ids: int, made: Sequence[work.Text]) -> dict[str, int]:
    """The ids of the prompts, and those that were generated, each with the one that ended its text."""
    new = sum(len(text.made.token_ids) for text in made)
    return {"prompt_tokens": prompt_ids, "completion_tokens": new, "total_tokens": prompt_ids + new}


def choice(index: int, text: work.Text, is_chat: bool, loaded: LoadedModel, kind: work.Generate) -> dict[str, Any]:
    """A whole text as one of the choices of an answer."""
    log_probs = _log_probs(text.made, is_chat, loaded.tokenizer, kind.cfg) if kind.log_probs else None
    said: dict[str, Any] = {"text": text.made.text}
    if is_chat:
        said = {"message": {"role": "assistant", "content": text.made.text, "refusal": None}}
    return {"index": index} | said | {"logprobs": log_probs, "finish_reason": _finish_reason(text)}


def piece(index: int, text: str | None, is_chat: bool, end: work.Text | None = None) -> dict[str, Any]:
    """A part of a text as a choice of a part of an answer; None = what comes before the first."""
    said: dict[str, Any] = {"text": text or ""}
    if is_chat:
        said = {"delta": {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}}
    return {"index": index} | said | {"logprobs": None, "finish_reason": _finish_reason(end) if end else None}


def _finish_reason(text: work.Text) -> str:
    return "stop" if text.is_ended else "length"


def _log_probs(made: predict.Generated, is_chat: bool, tokenizer: Any, cfg: Config) -> dict[str, Any]:
    """Those of the ids of the text: without a stop id and those behind a cut; an id that was cut in two counts."""
    ids = list(sampling.without_stop_id(made.token_ids, tokenizer, cfg))
    offsets = [len(tokenizer.decode(ids[:n])) for n in range(len(ids))]
    end = len(sampling.text_of(ids, tokenizer, cfg))
    if end < len(tokenizer.decode(ids)):  # a stop string was found
        offsets = [offset for offset in offsets if offset < end]
        ids = ids[: len(offsets)]
    names = [tokenizer.piece(i).replace("\u2581", " ") for i in ids]
    values = made.log_probs[: len(ids)]
    if is_chat:
        each = zip(names, values, strict=True)
        return {"content": [{"token": n, "logprob": v, "bytes": None, "top_logprobs": []} for n, v in each]}
    return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


def embeddings(found: Sequence[predict.Embedded], as_base64: bool) -> dict[str, Any]:
    """The answer of /v1/embeddings, without 'model'."""

    def written(x: np.ndarray) -> Any:
        return base64.b64encode(np.asarray(x, "<f4").tobytes()).decode() if as_base64 else x.tolist()

    data = [{"object": "embedding", "index": i, "embedding": written(one.embedding)} for i, one in enumerate(found)]
    ids = sum(one.ids for one in found)
    return {"object": "list", "data": data, "usage": {"prompt_tokens": ids, "total_tokens": ids}}


def labels(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer of /v1/labels, without 'model': the predictions of docs/use.md."""
    beside = ("number", "source", "identity", "record")
    kept = [{key: value for key, value in one.items() if key not in beside} for one in found]
    return {"object": "list", "data": [{"index": i} | finite(one) for i, one in enumerate(kept)]}


def error(refused: Refused) -> dict[str, Any]:
    """An error."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    message = {"message": str(refused), "type": kind, "param": refused.param or None, "code": refused.code}
    return {"error": message}
