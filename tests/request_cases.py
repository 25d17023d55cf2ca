"""HTTP requests made up at random, for the parser and for a server.

The generators take a `random.Random`: that of hypothesis, which finds the
smallest request that fails, or one with a seed, which is 50 times as fast.
"""

import contextlib
import json
import pathlib
import random
import re
import socket

import serve_cases
from serve_cases import LENGTH, POSITIONS, TOKEN

from mcpo_jax import errors
from mcpo_jax.generation import requests
from mcpo_jax.generation.sampling import Sampling

LIMITS = requests.Limits(POSITIONS, LENGTH, 300, 64, Sampling(), "policy")
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/weights",
         "/v1/models", "/metrics", "/healthz")
_FIELDS = {
    "/v1/completions": sorted(requests._FIELDS[False]),
    "/v1/chat/completions": sorted(requests._FIELDS[True]),
    "/v1/weights": ["path", "sha256", "version", "replaces"],
}
_VALUES = (
    None, True, False, 0, 1, 2, 7, 299, 300, -1, 2**31, 2**32, 2**63, 10**40,
    0.5, -0.0, 1e-30, 1e308, "", "a", "the cup", "user", "assistant", "tool",
    "\ud800", "\ufdd0", "<|eos|>", "policy", "/nowhere", "0" * 64, "x" * 300)
_KEYS = ("role", "content", "tool_calls", "include_usage", "a")


def value(rng: random.Random, depth: int = 3):
  """Any JSON, with what a request might hold more often than not."""
  kind = rng.randrange(8) if depth else 0
  if kind == 6:
    return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
  if kind == 7:
    return {rng.choice(_KEYS): value(rng, depth - 1)
            for _ in range(rng.randrange(4))}
  return rng.choice(_VALUES)


def body(rng: random.Random, path: str) -> bytes:
  """Of a request to a path: JSON, sometimes changed in places, or noise."""
  if rng.randrange(12) == 0:
    return bytes(rng.randrange(256) for _ in range(rng.randrange(30)))
  names = _FIELDS.get(path, _KEYS)
  made = {rng.choice(names): value(rng) for _ in range(rng.randrange(4))}
  if rng.randrange(2):
    made["messages" if "chat" in path else "prompt"] = rng.choice(
        [[{"role": "user", "content": "a"}]] if "chat" in path else
        ["a cup", [7, 8], [[7], [8, 9]]])
  if path == "/v1/weights" and rng.randrange(2):
    made = {"path": rng.choice(("/nowhere", "\0", "\ud800", "a\nb", "x" * 999)),
            "sha256": "0" * 64, "version": 3} | made
  if rng.randrange(20) == 0:
    made["best_of"] = 2
  data = bytearray(json.dumps(made).encode())
  for _ in range(rng.choice((0, 0, 0, 1, 3))):
    at = rng.randrange(len(data) + 1)
    data[at:at + rng.randrange(3)] = bytes(
        rng.randrange(256) for _ in range(rng.randrange(3)))
  return bytes(data)


def check_body(made: bytes, path: str) -> str | None:
  """The parser understands a body or refuses it; the slug of the refusal.

  Anything else that it raises is a fault of the parser.
  """
  try:
    fields = requests.parse_json(made)
    if path == "/v1/weights":
      push = requests.parse_push(fields, sent=False)
      with contextlib.suppress(OSError):
        pathlib.Path(push.path).stat()
      return None
    ask = requests.parse(
        fields, serve_cases.tokenizer(), LIMITS, chat="chat" in path)
  except errors.ServiceError as e:
    assert e.slug.startswith("request.") and isinstance(e.where, str)
    return e.slug
  assert 0 < ask.num_samples <= LIMITS.max_samples
  assert 0 < ask.sampling.max_new_tokens <= LENGTH
  for prompt in ask.prompts:
    assert 0 < len(prompt) <= POSITIONS - ask.sampling.max_new_tokens
    assert 0 <= prompt.min() and prompt.max() < LIMITS.vocab_size
  return None


def message(rng: random.Random) -> bytes:
  """The bytes of an HTTP request, from a good one to noise."""
  often = lambda good, *others: (
      rng.choice(others) if rng.randrange(4) == 0 else good)
  if rng.randrange(20) == 0:
    return bytes(rng.randrange(256) for _ in range(40)) + b"\r\n\r\n"
  path = rng.choice(PATHS)
  content = body(rng, path)
  size = b"%d" % len(content)
  path += often("", "/", "?", "?version=1", "%2f", "/../models", "#a",
                "?version=\u0665&sha256=" + "0" * 64, "?a=b&a=c")
  method = often("POST", "GET", "PUT", "OPTIONS", "HEAD", "DELETE", "post")
  lines = [
      f"{method} {path} HTTP/1.1".encode(), b"host: a", b"connection: close",
      b"authorization: Bearer " + often(TOKEN, "", "x", TOKEN[:-1]).encode(),
      b"content-type: " + often(
          b"application/json", b"application/json; charset=utf-8",
          b"APPLICATION/JSON", b"text/plain", b"application/safetensors", b"",
          b"application/x-yaml", b"\xff"),
      b"content-length: " + often(
          size, b"0", b"-1", b"+1", b"1e3", b"", b"9" * 20, size + b", 1",
          size + b"0")]
  for _ in range(rng.choice((0, 0, 1, 2))):
    lines.append(rng.choice((
        b"idempotency-key: k", b"idempotency-key: " + b"k" * 300,
        b"transfer-encoding: chunked", b"expect: 100-continue",
        b"content-encoding: gzip", b"authorization: Basic a",
        b"content-type: text/plain", b"x: " + b"y" * 3000, b"\xff: \xff",
        b"upgrade: websocket")))
  if rng.randrange(10) == 0:
    del lines[rng.randrange(1, len(lines))]
  return b"\r\n".join(lines) + b"\r\n\r\n" + content


def status_of(port: int, sent: bytes) -> int | None:
  """The status of the answer; None where there is none, to a request that
  never came to its end."""
  told = b""
  with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
    one.sendall(sent)
    one.shutdown(socket.SHUT_WR)
    try:
      while more := one.recv(2**16):
        told += more
    except ConnectionResetError:
      pass
  found = [int(x) for x in re.findall(rb"HTTP/1\.1 (\d{3})", told)]
  return next((status for status in found if status != 100), None)
