"""What the server's answers say, as OpenAI's clients read them.

Beside their fields an answer has `policy_version` and `policy_sha256`, of the
weights that wrote all of it, and log-probs of both laws: `token_logprobs` (in a
chat `logprob`) of the one drawn from, `raw_logprobs` (`raw_logprob`) of the raw
policy, in nats. With return_token_ids a choice has `token_ids` and
`prompt_token_ids`.
"""

import json
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse, Response

from mcpo_jax import errors
from mcpo_jax.generation.requests import Ask
from mcpo_jax.generation.worker import Event

# What is not 422.
_STATUS = {
    "request.json": 400, "request.object": 400, "request.body": 400,
    "request.token": 401, "request.route": 404, "request.method": 405,
    "request.timeout": 408, "service.version": 409, "weights.version": 409,
    "weights.busy": 409, "request.size": 413, "request.media_type": 415,
    "service.full": 503, "service.stopping": 503, "service.failed": 500,
    "generation.non_finite": 500,
}


class Writer:
  """The answer to one request, whole or in pieces."""

  def __init__(self, ask: Ask, tokenizer: Any, model: str):
    """`tokenizer` of transformers, `model` the name that is told."""
    self._ask, self._tokenizer = ask, tokenizer
    kind = "text_completion"
    if ask.chat:
      kind = "chat.completion" + (".chunk" if ask.stream else "")
    self._common = {"id": uuid.uuid4().hex, "object": kind,
                    "created": int(time.time()), "model": model}
    self._begun: set[tuple[int, int]] = set()
    self._num_tokens = 0

  def whole(self, events: list[Event]) -> bytes:
    """The body of an answer, of all events in their order."""
    count = len(self._ask.sample_indices)
    parts = [[] for _ in range(self._ask.num_samples)]
    for event in events:
      parts[event.prompt * count + event.sample].append(event)
    choices = [self._choice(_joined(some)) for some in parts]
    return json.dumps(self._envelope(events[0]) | {
        "choices": choices, "usage": self._usage()}).encode()

  def piece(self, event: Event) -> bytes:
    """One event of a stream."""
    return sse(self._envelope(event) | {"choices": [self._choice(event)]})

  def end(self, last: Event) -> bytes:
    """What a stream ends with."""
    done = b"data: [DONE]\n\n"
    if not self._ask.include_usage:
      return done
    return sse(self._envelope(last) | {
        "choices": [], "usage": self._usage()}) + done

  def _envelope(self, event: Event) -> dict[str, Any]:
    return self._common | {"policy_version": event.version,
                           "policy_sha256": event.sha256}

  def _choice(self, event: Event) -> dict[str, Any]:
    """A sample, or what it has grown by."""
    ask, place = self._ask, (event.prompt, event.sample)
    begins = place not in self._begun
    self._begun.add(place)
    self._num_tokens += len(event.tokens)
    choice = {
        "index": event.prompt * len(ask.sample_indices) + event.sample,
        "finish_reason": event.finish_reason,
        "logprobs": self._logprobs(event) if ask.logprobs else None}
    if not ask.chat:
      choice["text"] = event.text
      if ask.echo:
        choice["text"] = self._tokenizer.decode(
            ask.prompts[event.prompt]) + event.text
    elif ask.stream:
      role = {"role": "assistant"} if begins else {}
      choice["delta"] = role | {"content": event.text}
    else:
      choice["message"] = {"role": "assistant", "content": event.text}
    if ask.return_token_ids:
      choice["token_ids"] = event.tokens
      if begins:
        choice["prompt_token_ids"] = ask.prompts[event.prompt].tolist()
    return choice

  def _logprobs(self, event: Event) -> dict[str, Any]:
    tokens = [self._tokenizer.decode([token]) for token in event.tokens]
    if not self._ask.chat:
      told = {"tokens": tokens, "token_logprobs": event.logps,
              "raw_logprobs": event.raw_logps, "top_logprobs": None}
      return self._with_prompt(told, event) if event.scored else told
    return {"content": [
        {"token": token, "logprob": logp, "raw_logprob": raw, "bytes": None,
         "top_logprobs": []}
        for token, logp, raw in zip(tokens, event.logps, event.raw_logps)]}

  def _with_prompt(
      self, told: dict[str, Any], event: Event
  ) -> dict[str, Any]:
    """The same of the prompt's tokens too, and the likeliest in the place of
    each; nothing is known of the first."""
    name = lambda token: self._tokenizer.decode([token])
    logps, best_logps, best = (x.tolist() for x in event.scored)
    prompt = self._ask.prompts[event.prompt]
    return {
        "tokens": [*map(name, prompt), *told["tokens"]],
        "token_logprobs": [None, *logps, *told["token_logprobs"]],
        "raw_logprobs": [None, *logps, *told["raw_logprobs"]],
        "top_logprobs": [
            None, *({name(token): logp} for token, logp in zip(
                best, best_logps)), *[None] * len(told["tokens"])]}

  def _usage(self) -> dict[str, int]:
    prompt = sum(map(len, self._ask.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": self._num_tokens,
            "total_tokens": prompt + self._num_tokens}


def _joined(parts: list[Event]) -> Event:
  """A whole sample of its events."""
  return parts[-1]._replace(
      text="".join(part.text for part in parts),
      **{name: [x for part in parts for x in getattr(part, name)]
         for name in ("tokens", "logps", "raw_logps")})


def sse(content: dict[str, Any]) -> bytes:
  """A server-sent event."""
  return b"data: " + json.dumps(content).encode() + b"\n\n"


def told(error: errors.McpoError) -> dict[str, Any]:
  """What a refusal says."""
  told = {"slug": error.slug, "field": error.where, "message": error.message,
          "got": error.got, "want": error.want, "hint": error.hint or None}
  return {name: value if isinstance(value, int | float) else str(value)
          for name, value in told.items() if value is not None}


def refusal(error: errors.McpoError) -> Response:
  """A refusal as an answer, with its status."""
  headers = {"retry-after": "1"} if error.slug == "service.full" else None
  return JSONResponse(
      told(error), _STATUS.get(error.slug, 422), headers=headers)
