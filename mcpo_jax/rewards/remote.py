"""Rewards over HTTP: JSON out, scores back, with bounded patience."""

import json
import uuid
from typing import Any

import requests

from mcpo_jax import errors
from mcpo_jax.patience import Patience
from mcpo_jax.rewards import functions


def ask(
    url: str,
    fields: dict[str, Any],
    count: int,
    *,
    timeout_s: float,
    patience_s: float,
) -> list[float]:
  """Posts {"ids": [...], **fields}; puts {"ids", "scores"} in order.

  Network errors, time-outs, 429 and 5xx are tried again for patience_s, a reply
  that is not as agreed functions.ATTEMPTS times; another status is final. The
  header Idempotency-Key stays the same, so that a server may answer a repeated
  request from memory.

  Args:
    url: where to.
    fields: of JSON values.
    count: of the scores.
    timeout_s: seconds for one attempt.
    patience_s: seconds after which no further attempt is made.

  Returns:
    `count` finite numbers.

  Raises:
    DataError: data.non_finite, the fields are no JSON.
    ServiceError: after the last attempt `reward.unreachable`, or what was
      wrong with the reply: `reward.failed`, `reward.length`, `reward.order`,
      `reward.none`, `reward.type`, `reward.non_finite`.
  """
  ids = list(range(count))
  try:
    body = json.dumps({"ids": ids, **fields}, allow_nan=False).encode()
  except ValueError as e:
    raise errors.DataError(
        "data.non_finite", f"a request cannot be written as JSON: {e}",
        where=url) from e
  headers = {"Content-Type": "application/json",
             "Idempotency-Key": uuid.uuid4().hex}
  patience, wrong = Patience(patience_s), 0
  while True:
    try:
      reply = requests.post(
          url, data=body, timeout=timeout_s, headers=headers)
    except requests.RequestException as e:
      failure = errors.ServiceError(
          "reward.unreachable", "the reward server did not answer", where=url,
          got=type(e).__name__,
          want=f"an answer within {timeout_s:g} s, for {patience_s:g} s")
    else:
      if reply.status_code == 200:
        try:
          return _in_order(reply.content, ids, url)
        except errors.ServiceError as e:
          failure, wrong = e, wrong + 1
      else:
        failure = errors.ServiceError(
            "reward.failed", "the reward server does not answer as agreed",
            where=url, got=f"status {reply.status_code}", want="status 200")
        if reply.status_code < 500 and reply.status_code != 429:
          raise failure
    if wrong == functions.ATTEMPTS or not patience.wait(url, failure.message):
      raise failure


def _in_order(content: bytes, ids: list[int], url: str) -> list[float]:
  """The scores of a reply, in the order of the ids."""
  try:
    reply = json.loads(content)
    echoed, scores = reply.get("ids"), reply.get("scores")
  except (ValueError, AttributeError):
    raise errors.ServiceError(
        "reward.failed", "the reply is no JSON object", where=url) from None
  if not isinstance(scores, list) or len(scores) != len(ids):
    raise errors.ServiceError(
        "reward.length", "the reply has another length than the request",
        where=url, got=len(scores) if isinstance(scores, list) else None,
        want=len(ids))
  if not isinstance(echoed, list) or sorted(map(str, echoed)) != sorted(
      map(str, ids)):
    raise errors.ServiceError(
        "reward.order", "the reply does not say which score is whose",
        where=url, got=str(echoed)[:80], want="the ids of the request")
  by_id = {str(i): s for i, s in zip(echoed, scores)}
  return functions.score(
      lambda prompts, completions: [by_id[str(i)] for i in ids], ids, ids
  ).tolist()


def make_remote(
    url: str, timeout_s: float, patience_s: float
) -> functions.Reward:
  """A scorer behind a URL; see `ask`.

  It is posted {"ids", "prompts", "completions", "columns"} and replies
  {"ids", "scores"}, in any order.
  """

  def remote(prompts, completions, **columns):
    return ask(
        url, {"prompts": list(prompts), "completions": list(completions),
              "columns": {k: list(v) for k, v in columns.items()}},
        len(completions), timeout_s=timeout_s, patience_s=patience_s)

  return remote
