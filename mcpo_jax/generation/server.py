"""The generation service over HTTP, as OpenAI's clients speak it.

  POST /v1/completions, /v1/chat/completions   see requests.py
  POST /v1/weights     a version of the weights, whole or not at all
  GET  /v1/models      the name of what is served, its version and limits
  GET  /metrics        counters, as Prometheus reads them
  GET  /healthz        200 or 503; the only route without a token

Every answer tells the version of the weights it is from. A refusal is a JSON
object with `slug`, `field` and `message`. Nothing of a prompt or a completion
is ever logged.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import pathlib
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mcpo_jax import errors, faults
from mcpo_jax.data.tokenizer import Tokenizer
from mcpo_jax.generation import answers, requests, transport
from mcpo_jax.generation.worker import Event, Weights, Worker

JSON, SAFETENSORS = "application/json", "application/safetensors"

_MAX_CONNECTIONS = 4096


@dataclasses.dataclass(frozen=True)
class Options:
  """How the server is set up."""

  token: str
  max_body_bytes: int  # of JSON
  max_weights_bytes: int  # of weights that are sent
  body_seconds: float  # for a body to come in, and a second more per MiB


class Server:
  """The routes, over a worker."""

  def __init__(
      self,
      worker: Worker,
      tokenizer: Tokenizer,
      limits: requests.Limits,
      load: Callable[[pathlib.Path, str], Any],
      options: Options,
  ):
    """Starts nothing yet.

    Args:
      worker: not started; it is started and closed with the app.
      tokenizer: of the model.
      limits: of requests.
      load: (folder, sha256) -> params, on the devices; raises ModelDirError
        or ServiceError `weights.*`.
      options: of the server.
    """
    self._worker, self._tokenizer, self._limits = worker, tokenizer, limits
    self._load, self._options = load, options
    self._once = transport.OnceByKey()
    self._updating = False
    self._began = int(time.time())

  def app(self) -> Callable:
    """The ASGI application."""
    routes = [
        Route("/healthz", self.healthz, methods=["GET"]),
        Route("/metrics", self.metrics, methods=["GET"]),
        Route("/v1/models", self.models, methods=["GET"]),
        Route("/v1/completions", self.completions, methods=["POST"]),
        Route("/v1/chat/completions", self.chat, methods=["POST"]),
        Route("/v1/weights", self.weights, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes, lifespan=self._lifespan,
        exception_handlers={
            errors.McpoError: _on_refusal, HTTPException: _on_http_error,
            ClientDisconnect: _on_leaving, Exception: _on_bug})
    app.router.redirect_slashes = False
    app.add_middleware(transport.TokenAuth, token=self._options.token)
    return app

  @contextlib.asynccontextmanager
  async def _lifespan(self, app):
    del app
    self._worker.start()
    yield
    await asyncio.to_thread(self._worker.close)

  # What is told.

  async def healthz(self, request: Request) -> Response:
    del request
    healthy = self._worker.failure is None
    return JSONResponse({"status": "ok" if healthy else "unhealthy"},
                        200 if healthy else 503)

  async def models(self, request: Request) -> Response:
    del request
    worker, limits = self._worker, self._limits
    return JSONResponse({"object": "list", "data": [{
        "id": limits.model, "object": "model", "created": self._began,
        "owned_by": "mcpo_jax", "max_model_len": limits.max_positions,
        "max_tokens": limits.max_new_tokens, "max_samples": limits.max_samples,
        "policy_version": worker.version, "policy_sha256": worker.sha256}]})

  async def metrics(self, request: Request) -> Response:
    del request
    worker = self._worker
    counts = worker.counts
    rows = [
        ("samples_active", "gauge", "", worker.num_active),
        ("samples_waiting", "gauge", "", worker.num_waiting),
        ("samples_finished_total", "counter", '{reason="stop"}',
         counts["stop"]),
        ("samples_finished_total", "counter", '{reason="length"}',
         counts["length"]),
        ("samples_cancelled_total", "counter", "", counts["cancelled"]),
        ("tokens_total", "counter", "", counts["tokens"]),
        ("weight_updates_total", "counter", "", counts["updates"]),
        ("policy_version", "gauge", "", worker.version),
        ("healthy", "gauge", "", int(worker.failure is None)),
    ]
    lines = []
    for name, kind, labels, value in rows:
      header = f"# TYPE mcpo_{name} {kind}"
      if header not in lines:
        lines.append(header)
      lines.append(f"mcpo_{name}{labels} {value}")
    return PlainTextResponse("\n".join(lines) + "\n")

  # What is sampled.

  async def completions(self, request: Request) -> Response:
    return await self._complete(request, chat=False)

  async def chat(self, request: Request) -> Response:
    return await self._complete(request, chat=True)

  async def _complete(self, request: Request, *, chat: bool) -> Response:
    body = await self._read_json(request)
    # Tokenising a long prompt takes a while.
    ask = await asyncio.to_thread(
        requests.parse, requests.parse_json(body), self._tokenizer,
        self._limits, chat=chat)
    key = request.headers.get("idempotency-key")
    if ask.stream:
      if key is not None:
        raise requests.refuse(
            "stream", "an answer with an idempotency key comes whole")
      return transport.EventStream(self._stream(ask))
    digest = hashlib.sha256(request.url.path.encode() + body).digest()
    gone = asyncio.ensure_future(transport.gone(request))
    try:
      answer = await self._once.get(
          key, digest, lambda: self._whole(ask), gone)
    finally:
      gone.cancel()
    return Response(answer, media_type=JSON)

  async def _events(self, ask: requests.Ask) -> AsyncIterator[Event]:
    """What the worker tells of a job; leaving it early cancels the job."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue()

    def tell(item):
      with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(news.put_nowait, item)

    job = self._worker.submit(ask, tell)
    try:
      while (item := await news.get()) is not None:
        if isinstance(item, Exception):
          raise item.with_traceback(None)
        for event in item:
          yield event
    finally:
      self._worker.cancel(job)

  async def _whole(self, ask: requests.Ask) -> bytes:
    async with contextlib.aclosing(self._events(ask)) as events:
      answer = self._writer(ask).whole([event async for event in events])
    await asyncio.to_thread(faults.point, "gen.reply")
    return answer

  async def _stream(self, ask: requests.Ask) -> AsyncIterator[bytes]:
    writer = self._writer(ask)
    async with contextlib.aclosing(self._events(ask)) as events:
      async for event in events:
        yield writer.piece(event)
    yield writer.end(event)

  def _writer(self, ask: requests.Ask) -> answers.Writer:
    return answers.Writer(ask, self._tokenizer.hf, self._limits.model)

  # Weights.

  async def weights(self, request: Request) -> Response:
    """{"path", "sha256", "version"} of a folder, or the safetensors file
    itself with sha256 and version in the query.

    A version is taken if it is newer than what is served, or if `replaces`
    names what is served.
    """
    if self._updating:
      raise errors.ServiceError(
          "weights.busy", "another update is under way", where="version")
    self._updating = True
    try:
      if _media_type(request) == SAFETENSORS:
        push = requests.parse_push(_query(request), sent=True)
        with tempfile.TemporaryDirectory() as folder:
          with open(pathlib.Path(folder, "model.safetensors"), "wb") as file:
            async for piece in self._body(
                request, self._options.max_weights_bytes):
              await asyncio.to_thread(file.write, piece)
          await self._update(pathlib.Path(folder), push)
      else:
        push = requests.parse_push(
            requests.parse_json(await self._read_json(request)), sent=False)
        await self._update(pathlib.Path(push.path), push)
    finally:
      self._updating = False
    return JSONResponse({
        "policy_version": push.version, "policy_sha256": push.sha256})

  async def _update(self, folder: pathlib.Path, push: requests.Push) -> None:
    served = self._worker.version, self._worker.sha256
    if served == (push.version, push.sha256):
      return  # a push whose answer was lost
    if push.version <= served[0] and push.replaces != served[0]:
      raise errors.ServiceError(
          "weights.version", "the service has these or newer weights",
          where="version", got=push.version, want=f"above {served[0]}",
          hint=f"or replaces={served[0]}")
    try:
      params = await asyncio.to_thread(self._load, folder, push.sha256)
    except OSError as e:
      raise requests.refuse("path", "no weights can be read there",
                            got=e.strerror) from e
    faults.point("gen.update")
    await asyncio.wrap_future(self._worker.update(
        Weights(((params, 1.0),), push.version, push.sha256)))
    logging.info("weights: version %d after %d", push.version, served[0])

  # Bodies.

  async def _read_json(self, request: Request) -> bytes:
    if _media_type(request) != JSON:
      raise requests.refuse("content-type", "no such kind of body is read",
                            kind="media_type", want=JSON)
    return b"".join([piece async for piece in self._body(
        request, self._options.max_body_bytes)])

  async def _body(self, request: Request, limit: int) -> AsyncIterator[bytes]:
    """The pieces of a body that is neither too long nor too slow."""
    size = request.headers.get("content-length", "0")
    if int(size) > limit:
      raise _too_long(size, limit)
    began, got = time.monotonic(), 0
    pieces = request.stream()
    while True:
      seconds = self._options.body_seconds + got / 2**20
      try:
        async with asyncio.timeout(began + seconds - time.monotonic()):
          piece = await anext(pieces, None)
      except TimeoutError:
        raise requests.refuse("body", "the body came too slowly",
                              kind="timeout") from None
      if piece is None:
        return
      got += len(piece)
      if got > limit:
        raise _too_long(f"more than {limit}", limit)
      yield piece


def _media_type(request: Request) -> str:
  return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _query(request: Request) -> dict[str, Any]:
  """Fields of a query, numbers as numbers."""
  return {name: int(value) if value.isdecimal() and len(value) < 20 else value
          for name, value in request.query_params.items()}


def _too_long(size: str, limit: int) -> errors.ServiceError:
  return requests.refuse("body", "the body is too long", kind="size",
                         got=f"{size} bytes", want=f"at most {limit}")


async def _on_refusal(request: Request, error: errors.McpoError) -> Response:
  del request
  return answers.refusal(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
  del request
  slugs = {404: "request.route", 405: "request.method"}
  return answers.refusal(errors.ServiceError(
      slugs.get(error.status_code, "request.body"), error.detail,
      where="path"))


async def _on_leaving(request: Request, error: ClientDisconnect) -> Response:
  del request, error
  return Response(status_code=499)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
  """What the log tells in full."""
  del request
  return answers.refusal(errors.ServiceError(
      "service.failed", f"the server raised {type(error).__name__}"))


class _Uvicorn(uvicorn.Server):
  """Ends with exit code 0 on SIGTERM, where uvicorn dies of it at last."""

  @contextlib.contextmanager
  def capture_signals(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self.handle_exit)
    yield


def bind(host: str, port: int) -> socket.socket:
  """A socket that takes no connection yet; port 0 is any free one.

  Raises:
    ResourceError: `serve.port`.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  own = socket.socket(family)
  own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    own.bind((host, port))
  except OSError as e:
    own.close()
    raise errors.ResourceError(
        "serve.port", f"cannot be bound: {e.strerror}",
        where=f"serve.host {host}, serve.port {port}") from e
  return own


def run(app: Callable, own: socket.socket, *, grace_seconds: int) -> None:
  """Serves until SIGTERM or SIGINT; then answers what runs for at most
  grace_seconds, and takes nothing new."""
  host, port = own.getsockname()[:2]
  logging.info("serving on http://%s:%d",
               f"[{host}]" if ":" in host else host, port)
  config = uvicorn.Config(
      app, http="h11", ws="none", lifespan="on", log_config=None,
      log_level="warning", access_log=False, server_header=False,
      limit_concurrency=_MAX_CONNECTIONS,
      timeout_graceful_shutdown=grace_seconds)
  _Uvicorn(config).run(sockets=[own])
