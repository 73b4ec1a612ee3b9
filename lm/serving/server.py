"""The HTTP server: addresses, keys, bodies, streams."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import importlib
import ipaddress
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from lm.config.schema import ConfigError
from lm.predict import LoadedModel
from lm.serving import openai, work
from lm.serving.work import Refused

MOST_BYTES = 512 * 1024  # of a request
_DRAINED = 16 * 1024 * 1024  # of a larger one, which is read to its end so that its sender sees the answer
_READ = {
    "/v1/completions": openai.completion,
    "/v1/chat/completions": openai.conversation,
    "/v1/embeddings": openai.embedding,
    "/v1/labels": openai.label,
}
_TEXTS = {"/v1/completions": ("text_completion", "cmpl"), "/v1/chat/completions": ("chat.completion", "chatcmpl")}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is served.

    Attributes:
      host: name or address to listen at.
      port: 0 = any that is free.
      api_key: that every request must have; '' = none.
      most_waiting: prompts and records that may wait, those of all clients together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    most_waiting: int = 256


def check_options(options: Options) -> None:
    """Raises ConfigError if the extra 'serve' is not installed, or the server would be open to others without a key."""
    try:
        for name in ("starlette", "uvicorn"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"the server needs the package {error.name}: pip install -e '.[serve]'") from None
    if not (options.api_key or _is_loopback(options.host)):
        raise ConfigError(
            f"--host={options.host} can be reached by others: set a key, by LM_API_KEY or --api_key, or use 127.0.0.1"
        )
    if not options.api_key.isascii():
        raise ConfigError("the key has other characters than ASCII, which headers of HTTP do not carry")
    if not 0 <= options.port < 1 << 16 or options.most_waiting < 1:
        raise ConfigError(
            f"expected a port from 0 to 65535 and at least 1 that may wait, got {options.port} and "
            f"{options.most_waiting}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
      url: 'http://ADDRESS:PORT'.
      model: the name that it gives the run.
      endpoints: endpoint -> why the run cannot serve it; '' = it can.
      wait: returns when the server has ended by itself.
    """

    url: str
    model: str
    endpoints: dict[str, str]
    wait: Callable[[], None]


@contextlib.contextmanager
def serving(loaded: LoadedModel, options: Options) -> Iterator[Server]:
    """Serves a run, in two threads, until the context ends: one for HTTP, one that owns the model.

    Raises:
      ConfigError: see `check_options`; the address cannot be used; there is nothing that the run can serve.
    """
    check_options(options)
    import uvicorn

    endpoints = openai.served(loaded)
    if all(endpoints.values()):
        reasons = "; ".join(f"{path}: {reason}" for path, reason in endpoints.items())
        raise ConfigError(f"nothing of this run can be served: {reasons}")
    with _listening(options) as listener:
        host, port = listener.getsockname()[:2]
        model = Path(loaded.name).name
        # No log: errors of requests are told to their clients.
        settings: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        settings |= {"lifespan": "off", "proxy_headers": False, "ws": "none", "timeout_graceful_shutdown": 5}
        worker = work.Worker(loaded, most_waiting=options.most_waiting)
        server = uvicorn.Server(uvicorn.Config(_app(loaded, worker, options, endpoints, model), **settings))
        thread = threading.Thread(target=server.run, args=([listener],), name="http")
        thread.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            yield Server(f"http://{shown}:{port}", model, endpoints, thread.join)
        finally:
            worker.close()  # first: streams that it ends let the server end
            server.should_exit = True
            thread.join()


def example(server: Server, has_key: bool) -> str:
    """A command that asks the server something."""
    path = next(path for path, why_not in server.endpoints.items() if not why_not)
    asked: dict[str, Any] = {
        "/v1/completions": {"prompt": "Once upon a time", "stream": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "stream": True},
    }.get(path, {"input": "a text"})
    key = ' -H "Authorization: Bearer $LM_API_KEY"' if has_key else ""
    return f"curl -N {server.url}{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(asked)}'"


def _listening(options: Options) -> socket.socket:
    """Raises ConfigError if the address cannot be used."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen at {options.host}:{options.port}: {error}; choose another --port") from None


# Requests -------------------------------------------------------------------------------------------------------------


def _app(loaded: LoadedModel, worker: work.Worker, options: Options, endpoints: dict[str, str], model: str) -> Any:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    started = int(time.time())

    def refusal(refused: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if refused.status == 503 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
        return JSONResponse(openai.error(refused), refused.status, headers)

    async def models(request: Request) -> Any:
        one = {"id": model, "object": "model", "created": started, "owned_by": "lm"}
        return JSONResponse({"object": "list", "data": [one]})

    async def answer(request: Request) -> Any:
        path = request.url.path
        if reason := endpoints[path]:
            can = ", ".join(name for name, why_not in endpoints.items() if not why_not)
            raise Refused(400, f"this run does not serve {path}: {reason}; it serves {can}", "unsupported_endpoint")
        body = openai.parse(await _body(request))
        asked = await run_in_threadpool(_READ[path], body, loaded, model)
        events = _events(asked, worker, request.receive)
        if not asked.is_streamed:
            async with contextlib.aclosing(events):
                return JSONResponse(await whole(events, asked, path))
        first = await anext(events)  # an error before it has a status of its own
        return functools.partial(stream, first, events, asked, path)

    async def whole(events: AsyncIterator[tuple[int, Any]], asked: openai.Asked, path: str) -> dict[str, Any]:
        found = {i: event async for i, event in events}
        ordered = [found[i] for i in range(len(found))]
        if path == "/v1/embeddings":
            return openai.embeddings(ordered, asked.as_base64) | {"model": model}
        if path == "/v1/labels":
            return openai.labels(ordered) | {"model": model}
        is_chat = path == "/v1/chat/completions"
        each = enumerate(zip(ordered, asked.kind, strict=True))
        choices = [openai.choice(i, text, is_chat, loaded, kind) for i, (text, kind) in each]
        return head(path) | {"choices": choices, "usage": openai.usage(asked.prompt_ids, ordered)}

    def head(path: str, is_part: bool = False) -> dict[str, Any]:
        name, prefix = _TEXTS[path]
        is_part = is_part and path == "/v1/chat/completions"
        said = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": f"{name}.chunk" if is_part else name}
        return said | {"created": int(time.time()), "model": model}

    async def stream(first: Any, events: Any, asked: openai.Asked, path: str, _: Any, __: Any, send: Any) -> None:
        """Texts as server-sent events. One that ends without [DONE] has an error as its last."""
        is_chat = path == "/v1/chat/completions"
        same = head(path, is_part=True)

        async def tell(said: Any, is_last: bool = False) -> None:
            text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, allow_nan=False)
            content = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": content, "more_body": not is_last})

        async def tell_part(*choices: dict[str, Any], **more: Any) -> None:
            await tell(same | {"choices": list(choices)} | more)

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        made: list[work.Text] = []
        try:
            async with contextlib.aclosing(events):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                for i in range(len(asked.given) if is_chat else 0):
                    await tell_part(openai.piece(i, None, is_chat))
                event = first
                while event is not None:
                    i, said = event
                    if isinstance(said, work.Piece):
                        await tell_part(openai.piece(i, said.text, is_chat))
                    else:
                        made.append(said)
                        await tell_part(openai.piece(i, "", is_chat, said))
                    event = await anext(events, None)
            if asked.has_usage:
                await tell_part(usage=openai.usage(asked.prompt_ids, made))
            await tell("[DONE]", is_last=True)
        except _Gone:
            return
        except Exception as error:
            await tell(openai.error(work.as_refusal(error)), is_last=True)

    async def checked(request: Request) -> Any:
        _check_access(request, options)
        return await (models(request) if request.url.path == "/v1/models" else answer(request))

    async def endpoint(request: Request) -> Any:
        try:
            return await checked(request)
        except _Gone:
            return JSONResponse({}, 499)  # nobody reads it
        except Exception as error:
            return refusal(work.as_refusal(error))

    async def no_such_path(request: Request, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        wanted = ", ".join(f"POST {path}" for path in _READ)
        message = f"{request.method} {request.url.path}: expected GET /v1/models, {wanted}"
        return refusal(Refused(error.status_code, message, "not_found"))

    routes = [Route(path, endpoint, methods=["POST"]) for path in _READ]
    routes.append(Route("/v1/models", endpoint, methods=["GET"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: no_such_path})


def _check_access(request: Any, options: Options) -> None:
    """Raises Refused for a wrong key; without a key, for what a page in a browser on this machine could send."""
    if options.api_key:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {options.api_key}".encode()):
            raise Refused(
                401, "expected the server's key, in the header 'Authorization: Bearer KEY'", "invalid_api_key"
            )
    elif not _is_loopback(request.url.hostname or ""):
        raise Refused(
            403, f"the header 'Host' names {request.url.hostname}, but this server is of localhost", "forbidden"
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json":
        raise Refused(
            415, f"the header 'Content-Type' is '{kind}'; expected application/json", "unsupported_media_type"
        )


async def _body(request: Any) -> bytes:
    """Raises Refused if it is too large."""
    content, size = bytearray(), 0
    async for some in request.stream():
        size += len(some)
        if size <= MOST_BYTES:
            content += some
        elif size > _DRAINED:
            break
    if size > MOST_BYTES:
        raise Refused(413, f"the body has more than {MOST_BYTES:,} bytes, the most that is read", "request_too_large")
    return bytes(content)


class _Gone(Exception):
    """The client has closed its connection."""


async def _events(
    asked: openai.Asked, worker: work.Worker, receive: Callable[[], Awaitable[Any]]
) -> AsyncGenerator[tuple[int, Any], None]:
    """Yields (number of the job, what is told of it) until all of them are done. A job that nobody waits for is
    cancelled.

    Raises:
      Refused: as a job is, or as all are because too many wait.
      _Gone: the client is.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

    def tell(index: int) -> Callable[[Any], None]:
        def from_worker(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(told.put_nowait, (index, event))

        return from_worker

    pairs = zip(asked.kind, asked.given, strict=True)
    jobs = [work.Job(kind, given, tell(i)) for i, (kind, given) in enumerate(pairs)]
    worker.submit(jobs)
    gone = asyncio.ensure_future(receive())  # behind the body, there is nothing but the end of the connection
    left = len(jobs)
    try:
        while left:
            event = asyncio.ensure_future(told.get())
            try:
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not event.done():
                    event.cancel()
            if not event.done():
                raise _Gone
            index, said = event.result()
            if isinstance(said, Refused):
                raise said
            left -= not isinstance(said, work.Piece)
            yield index, said
    finally:
        gone.cancel()
        worker.cancel(jobs)
