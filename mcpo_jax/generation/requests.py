"""What a request to the server asks for, checked field by field.

The fields are those of OpenAI's completions and chat completions that sampling
here knows, under the names that other servers give to the rest, and:

  prompt_ids        one pair of uint32 per prompt, with the seed and a sample's
                    index the address of its draws
  sample_indices    instead of n: which samples
  require_version   refuse to answer with other weights
  return_token_ids  ids of prompts and completions in the answer

Any other field is refused: an option that is ignored is an option that is
wrong. No message repeats text of a request.
"""

import collections
import hashlib
import json
import math
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import errors
from mcpo_jax.data import readers
from mcpo_jax.data.tokenizer import Tokenizer
from mcpo_jax.generation.engine import COLDEST, MAX_STOP_IDS
from mcpo_jax.generation.sampling import Sampling

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256  # texts, characters


class Ask(NamedTuple):
  """N samples of each of R prompts."""

  prompts: list[np.ndarray]  # R arrays [P] int32
  prompt_ids: np.ndarray  # [R, 2] uint32
  sample_indices: np.ndarray  # [N] int32
  sampling: Sampling  # max_new_tokens set
  seed: int
  require_version: int | None
  chat: bool
  stream: bool
  include_usage: bool  # in a last event of the stream
  logprobs: bool
  return_token_ids: bool
  echo: bool  # tell the prompt too, and its tokens' log-probs if any

  @property
  def num_samples(self) -> int:
    return len(self.prompts) * len(self.sample_indices)


class Limits(NamedTuple):
  """What the server can do."""

  max_positions: int  # tokens of a prompt with its completion
  max_new_tokens: int
  vocab_size: int
  max_samples: int  # of one request
  defaults: Sampling  # of what a request leaves out
  model: str  # its name


class Push(NamedTuple):
  """Weights that are to be served."""

  path: str | None  # their folder; None: the body is the file
  sha256: str  # see hf.params_sha256
  version: int
  replaces: int | None  # the version that they may replace though not newer


class _Field(NamedTuple):
  """One field of a body."""

  fits: Callable[[Any], bool]
  want: str


def refuse(
    field: str, message: str, *, kind: str | None = None, **more: Any
) -> errors.ServiceError:
  """The refusal of a field; its slug is request.<kind or field>."""
  return errors.ServiceError(
      f"request.{kind or field}", message, where=field, **more)


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _whole(low: int, high: int | None = None) -> _Field:
  top = "" if high is None else f" to {high}"
  return _Field(
      lambda v: _is_whole(v) and low <= v <= (v if high is None else high),
      f"a whole number, {low}{top or ' or more'}")


def _real(fits: Callable[[float], bool], want: str) -> _Field:
  def check(value):
    return (_is_whole(value) or isinstance(value, float)) and (
        math.isfinite(value) and fits(value))

  return _Field(check, want)


def _list_of(
    fits: Callable[[Any], bool], low: int = 1, high: float = math.inf
) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, list) and (
      low <= len(value) <= high and all(map(fits, value)))


_is_word = lambda value: _is_whole(value) and 0 <= value < 2**32
_is_stop = lambda value: (
    isinstance(value, str) and 0 < len(value) <= _MAX_STOP_LENGTH)
_FLAG = _Field(lambda value: isinstance(value, bool), "true or false")

_COMMON = {
    "model": _Field(lambda value: isinstance(value, str), "a name"),
    "n": _whole(1),
    "max_tokens": _whole(1),
    "min_tokens": _whole(0),
    "temperature": _real(lambda v: v == 0 or COLDEST <= v <= 100,
                         f"0, or {COLDEST:g} to 100"),
    "top_p": _real(lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "top_k": _whole(0, 2**31 - 1),
    "min_p": _real(lambda v: 0 <= v <= 1, "0 to 1"),
    "repetition_penalty": _real(lambda v: 0.01 <= v <= 100, "0.01 to 100"),
    "stop": _Field(
        lambda v: _is_stop(v) or _list_of(_is_stop, 0, _MAX_STOPS)(v),
        f"a text or at most {_MAX_STOPS}, of 1 to {_MAX_STOP_LENGTH} "
        "characters"),
    "stop_token_ids": _Field(
        _list_of(_is_whole, 0, MAX_STOP_IDS), f"at most {MAX_STOP_IDS} ids"),
    "seed": _whole(0, 2**32 - 1),
    "stream": _FLAG,
    "stream_options": _Field(
        lambda v: isinstance(v, dict) and v.keys() <= {"include_usage"}
        and all(isinstance(x, bool) for x in v.values()),
        '{"include_usage": true or false}'),
    "prompt_ids": _Field(
        _list_of(_list_of(_is_word, 2, 2)),
        "two whole numbers below 2^32 per prompt"),
    "sample_indices": _Field(
        _list_of(lambda v: _is_whole(v) and 0 <= v < 2**31),
        "whole numbers below 2^31"),
    "require_version": _whole(0),
    "return_token_ids": _FLAG,
}
_FIELDS = {
    False: _COMMON | {
        "prompt": _Field(
            lambda v: isinstance(v, str | list) and len(v) > 0,
            "a text, token ids, or a list of either"),
        "logprobs": _Field(
            lambda v: isinstance(v, bool) or _is_whole(v) and 0 <= v <= 1,
            "0 or 1: of the tokens that were drawn"),
        "echo": _FLAG,
    },
    True: _COMMON | {
        "messages": _Field(
            lambda v: isinstance(v, list) and len(v) > 0,
            "a list of messages"),
        "logprobs": _FLAG,
        "max_completion_tokens": _whole(1),
    },
}
_PUSH = {
    "path": _Field(
        lambda v: isinstance(v, str) and len(v) > 0 and v.isprintable(),
        "a folder"),
    "sha256": _Field(
        lambda v: isinstance(v, str) and len(v) == 64, "64 hex digits"),
    "version": _whole(0, 2**63 - 1),
    "replaces": _whole(0, 2**63 - 1),
}
# Our setting -> the field.
_SETTINGS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
}


def parse_json(body: bytes) -> dict[str, Any]:
  """The object of a body.

  Raises:
    ServiceError: `request.json`, `request.object`.
  """

  def constant(name):
    raise ValueError(f"{name} is no JSON")

  def different(pairs):
    if len(found := dict(pairs)) < len(pairs):
      raise ValueError("one of the two would be ignored")
    return found

  try:
    value = json.loads(
        body, parse_constant=constant, object_pairs_hook=different)
  except (ValueError, RecursionError):
    raise refuse("body", "the body is no JSON, or has one name twice",
                 kind="json") from None
  if not isinstance(value, dict):
    raise refuse("body", "the body is no JSON object", kind="object")
  return value


def _check_fields(body: dict[str, Any], fields: dict[str, _Field]) -> None:
  """Refuses unknown fields and values that do not fit; null is not given.

  Raises:
    ServiceError: `request.unknown_field`, `request.<field>`.
  """
  for name, value in body.items():
    if name not in fields:
      raise refuse(name[:64], "no such field", kind="unknown_field",
                   hint=errors.nearest(name[:64], fields))
    if value is not None and not fields[name].fits(value):
      shown = isinstance(value, bool | int | float) and abs(value) < 1e30
      raise refuse(name, f"{name} does not fit", want=fields[name].want,
                   got=value if shown else None)


def parse_push(fields: dict[str, Any], *, sent: bool) -> Push:
  """Which weights are meant; `sent`: they are the body, and have no path.

  Raises:
    ServiceError: `request.<field>`, `request.unknown_field`.
  """
  wanted = ("sha256", "version") if sent else ("path", "sha256", "version")
  _check_fields(fields, {name: field for name, field in _PUSH.items()
                         if name in (*wanted, "replaces")})
  for name in wanted:
    if fields.get(name) is None:
      raise refuse(name, f"{name} is missing", want=_PUSH[name].want)
  return Push(fields.get("path"), fields["sha256"], fields["version"],
              fields.get("replaces"))


def parse(
    body: dict[str, Any], tokenizer: Tokenizer, limits: Limits, *, chat: bool
) -> Ask:
  """What a body asks for.

  Args:
    body: the JSON object.
    tokenizer: of the model that is served.
    limits: of the server.
    chat: it has messages instead of a prompt.

  Raises:
    ServiceError: `request.<field>` and `request.unknown_field`; for prompts
      that do not fit the context `request.max_tokens`.
  """
  _check_fields(body, _FIELDS[chat])
  given = {name: value for name, value in body.items() if value is not None}
  if given.get("model", limits.model) != limits.model:
    raise refuse("model", "no such model is served", want=limits.model)
  if chat:
    prompts = [_encode_messages(given, tokenizer)]
  else:
    prompts = _encode_prompts(given, tokenizer, limits.vocab_size)
  count = len(prompts) * max(
      given.get("n", 1), len(given.get("sample_indices", ())))
  if count > limits.max_samples:
    raise refuse("n", "more samples than the server takes at a time",
                 got=count, want=f"at most {limits.max_samples}")
  logprobs, echo = given.get("logprobs", False), given.get("echo", False)
  if echo and given.get("stream"):
    raise refuse("echo", "an answer that tells the prompt comes whole")
  return Ask(
      prompts=prompts,
      prompt_ids=_prompt_ids(given, prompts),
      sample_indices=_indices(given),
      sampling=_sampling(given, prompts, limits),
      seed=given.get("seed", secrets.randbits(32)),
      require_version=given.get("require_version"),
      chat=chat,
      stream=given.get("stream", False),
      include_usage=given.get("stream_options", {}).get("include_usage", False),
      logprobs=logprobs is not False,
      return_token_ids=given.get("return_token_ids", False),
      echo=echo,
  )


def _encode_messages(given, tokenizer) -> np.ndarray:
  messages = given.get("messages")
  if messages is None:
    raise refuse("messages", "there are no messages")
  try:
    readers.check_messages(messages, "", "messages", last=("user", "tool"))
    return tokenizer.encode_prompt(messages, where="messages")
  except errors.DataError as e:
    raise refuse("messages", e.message, want=e.want) from None
  except (TypeError, UnicodeError):  # half of a surrogate pair
    raise refuse("messages", "a text cannot be encoded as UTF-8") from None


def _encode_prompts(given, tokenizer, vocab_size) -> list[np.ndarray]:
  """Texts are taken as they are, control tokens and all; BOS is put before
  where the tokenizer does so."""
  prompt = given.get("prompt")
  if prompt is None:
    raise refuse("prompt", "there is no prompt")
  if isinstance(prompt, str) or all(map(_is_whole, prompt)):
    prompt = [prompt]
  prompts = []
  for i, one in enumerate(prompt):
    if isinstance(one, str):
      try:
        one = tokenizer.hf.backend_tokenizer.encode(one).ids
      except (TypeError, UnicodeError):  # half of a surrogate pair
        raise refuse(
            "prompt", f"prompt {i} cannot be encoded as UTF-8") from None
    if not isinstance(one, list) or not all(map(_is_whole, one)):
      raise refuse("prompt", f"prompt {i} is neither a text nor token ids")
    if not one:
      raise refuse("prompt", f"prompt {i} is empty")
    if min(one) < 0 or max(one) >= vocab_size:
      raise refuse("prompt", f"prompt {i} has a token id outside the "
                   "vocabulary", want=f"0 to {vocab_size - 1}")
    prompts.append(np.array(one, np.int32))
  return prompts


def _indices(given) -> np.ndarray:
  if "sample_indices" not in given:
    return np.arange(given.get("n", 1), dtype=np.int32)
  indices = given["sample_indices"]
  if given.get("n", len(indices)) != len(indices) or len(
      set(indices)) != len(indices):
    raise refuse("sample_indices", "indices are n different ones",
                 got=len(set(indices)), want=given.get("n"))
  return np.array(indices, np.int32)


def _prompt_ids(given, prompts) -> np.ndarray:
  """The address of each prompt; without one a hash of its tokens and of how
  often they stood before in this request."""
  if "prompt_ids" in given:
    if len(given["prompt_ids"]) != len(prompts):
      raise refuse("prompt_ids", "one pair per prompt is needed",
                   got=len(given["prompt_ids"]), want=len(prompts))
    return np.array(given["prompt_ids"], np.uint32)
  seen, ids = collections.Counter(), []
  for prompt in prompts:
    digest = hashlib.sha256(prompt.tobytes())
    digest.update(b"%d" % seen[prompt.tobytes()])
    seen[prompt.tobytes()] += 1
    ids.append(np.frombuffer(digest.digest()[:8], ">u4"))
  return np.stack(ids).astype(np.uint32)


def _sampling(given, prompts, limits) -> Sampling:
  longest = max(map(len, prompts))
  field = "max_completion_tokens"
  if field not in given:
    field = "max_tokens"
  most = min(limits.max_new_tokens, limits.max_positions - longest)
  wanted = given.get(field, max(most, 1))
  if longest + wanted > limits.max_positions:
    raise refuse(
        field, "the prompt does not fit the context beside its completion",
        kind="max_tokens", got=f"{longest} + {wanted} tokens",
        want=f"at most {limits.max_positions}")
  if wanted > limits.max_new_tokens:
    raise refuse(field, "longer than the server's completions",
                 kind="max_tokens", got=wanted,
                 want=f"at most {limits.max_new_tokens}")
  stop = given.get("stop", limits.defaults.stop)
  stop_ids = given.get("stop_token_ids", ())
  if stop_ids and not 0 <= min(stop_ids) <= max(stop_ids) < limits.vocab_size:
    raise refuse("stop_token_ids", "a token id is outside the vocabulary",
                 want=f"0 to {limits.vocab_size - 1}")
  changed = {
      setting: given[name] for setting, name in _SETTINGS.items()
      if name in given
  }
  sampling = limits.defaults._replace(
      max_new_tokens=wanted, stop=(stop,) if isinstance(stop, str) else
      tuple(stop), stop_ids=tuple(stop_ids), **changed)
  if sampling.min_new_tokens > wanted:
    raise refuse("min_tokens", "more than max_tokens",
                 got=sampling.min_new_tokens, want=f"at most {wanted}")
  return sampling
