"""Whom the server answers and how: the token, keys, streams of events."""

import asyncio
import collections
import contextlib
import dataclasses
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mcpo_jax import errors
from mcpo_jax.generation import answers, requests

# Answers that are kept for whoever asks again with the same key.
_KEPT_ANSWERS, _KEPT_BYTES = 256, 2**26


class OnceByKey:
  """One generation per idempotency key, however often it is asked for."""

  @dataclasses.dataclass
  class _Entry:
    task: asyncio.Future
    digest: bytes
    waiters: int = 0

  def __init__(self):
    self._entries: collections.OrderedDict[Any, OnceByKey._Entry] = (
        collections.OrderedDict())

  async def get(
      self,
      key: str | None,
      digest: bytes,
      make: Callable[[], Awaitable[bytes]],
      gone: asyncio.Future,
  ) -> bytes:
    """The answer of `make`, or of the request before with the same key.

    Args:
      key: None if the client named none.
      digest: of the request; another one with the same key is refused.
      make: called once; cancelled when nobody waits for it any more.
      gone: done when this client has left.

    Raises:
      ServiceError: `request.idempotency_key`; what `make` raises.
      ClientDisconnect: the client has left.
    """
    key = object() if key is None else key
    entry = self._entries.get(key)
    if entry is None:
      entry = self._entries[key] = self._Entry(
          asyncio.ensure_future(make()), digest)
    elif not hmac.compare_digest(entry.digest, digest):
      raise requests.refuse(
          "idempotency-key", "the key was used for another request",
          kind="idempotency_key")
    entry.waiters += 1
    try:
      await asyncio.wait({entry.task, gone}, return_when="FIRST_COMPLETED")
      if not entry.task.done():
        raise ClientDisconnect()
      return entry.task.result()
    finally:
      entry.waiters -= 1
      if not entry.waiters:
        entry.task.cancel()  # without effect if it is done
      self._forget(key, entry)

  def _forget(self, key: Any, entry: _Entry) -> None:
    """Drops what is not to be given again, and the oldest above the limit."""
    if not entry.waiters and not (isinstance(key, str) and _is_good(entry)):
      self._entries.pop(key, None)
    kept = {k: len(e.task.result()) for k, e in self._entries.items()
            if _is_good(e)}
    while kept and (
        len(kept) > _KEPT_ANSWERS or sum(kept.values()) > _KEPT_BYTES):
      oldest = next(iter(kept))
      del kept[oldest], self._entries[oldest]


def _is_good(entry: OnceByKey._Entry) -> bool:
  """Whether there is an answer."""
  task = entry.task
  return task.done() and not task.cancelled() and task.exception() is None


class TokenAuth:
  """Asks for the token before anything else is looked at."""

  def __init__(self, app, token: str):
    self._app, self._token = app, f"Bearer {token}".encode()

  async def __call__(self, scope, receive, send):
    if scope["type"] == "http" and not (
        scope["method"] == "GET" and scope["raw_path"] == b"/healthz"):
      given = dict(scope["headers"]).get(b"authorization", b"")
      if not hmac.compare_digest(given, self._token):
        answer = answers.refusal(errors.ServiceError(
            "request.token", "a token is needed", where="authorization"))
        answer.headers["www-authenticate"] = "Bearer"
        return await answer(scope, receive, send)
    return await self._app(scope, receive, send)


class EventStream(Response):
  """Server-sent events, until they end or the client leaves."""

  media_type = "text/event-stream"

  def __init__(self, pieces: AsyncIterator[bytes]):
    super().__init__()
    del self.headers["content-length"]
    self._pieces = pieces

  async def __call__(self, scope, receive, send):
    sending = asyncio.ensure_future(self._send(scope, receive, send))
    left = asyncio.ensure_future(gone(Request(scope, receive)))
    try:
      await asyncio.wait({sending, left}, return_when="FIRST_COMPLETED")
    finally:
      left.cancel()
      sending.cancel()  # without effect if it is done
      with contextlib.suppress(asyncio.CancelledError):
        await sending

  async def _send(self, scope, receive, send):
    begun = False

    async def send_body(body, *, more):
      await send({
          "type": "http.response.body", "body": body, "more_body": more})

    async with contextlib.aclosing(self._pieces) as pieces:
      try:
        async for piece in pieces:
          if not begun:
            begun = True
            await send({"type": "http.response.start", "status": 200,
                        "headers": self.raw_headers})
          await send_body(piece, more=True)
      except errors.McpoError as e:
        if not begun:
          return await answers.refusal(e)(scope, receive, send)
        await send_body(answers.sse({"error": answers.told(e)}), more=True)
    await send_body(b"", more=False)


async def gone(request: Request) -> None:
  """Returns when the client has left; the body was read before."""
  while (await request.receive())["type"] != "http.disconnect":
    pass
