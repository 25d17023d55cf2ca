"""Rewards over HTTP: JSON out, scores back, with bounded patience."""

import json
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

import requests

from mcpo_jax import errors
from mcpo_jax.rewards.functions import Reward

ATTEMPTS = 4
_FIRST_PAUSE = 0.5  # seconds, doubled at every attempt


def post(url: str, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
  """Sends a request until it is answered.

  Network errors, time-outs, 429 and 5xx are tried again after a pause that
  doubles and jitters; everything else is final.

  Args:
    url: where to.
    body: of JSON values. The header Idempotency-Key stays the same, so that a
      server may answer a repeated request from memory.
    timeout_s: seconds for one attempt.

  Returns:
    The reply, a JSON object.

  Raises:
    ServiceError: `reward.unreachable` after the last attempt; `reward.failed`
      for another status or a body that is no JSON object.
  """
  key, reason = uuid.uuid4().hex, ""
  for attempt in range(ATTEMPTS):
    if attempt:
      time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1) * (0.5 + random.random()))
    try:
      reply = requests.post(
          url, json=body, timeout=timeout_s, headers={"Idempotency-Key": key})
    except requests.RequestException as e:
      reason = type(e).__name__
      continue
    if reply.status_code == 429 or reply.status_code >= 500:
      reason = f"status {reply.status_code}"
      continue
    try:
      value = json.loads(reply.content)
    except ValueError:
      value = None
    if reply.status_code != 200 or not isinstance(value, dict):
      raise errors.ServiceError(
          "reward.failed", "the reward server does not answer as agreed",
          where=url, got=f"status {reply.status_code}",
          want="status 200 and a JSON object")
    return value
  raise errors.ServiceError(
      "reward.unreachable", "the reward server did not answer", where=url,
      got=reason, want=f"an answer within {timeout_s} s, {ATTEMPTS} attempts")


def ask(
    url: str, fields: dict[str, Sequence], count: int, *, timeout_s: float
) -> list[Any]:
  """Posts {"ids": [...], **fields} and puts {"ids", "scores"} in order.

  Raises:
    ServiceError: as `post`; `reward.order` if other ids come back.
  """
  ids = list(range(count))
  reply = post(url, {"ids": ids, **fields}, timeout_s=timeout_s)
  echoed, scores = reply.get("ids"), reply.get("scores")
  if not isinstance(scores, list) or len(scores) != count:
    raise errors.ServiceError(
        "reward.length", "the reply has another length than the request",
        where=url, got=len(scores) if isinstance(scores, list) else scores,
        want=count)
  if not isinstance(echoed, list) or sorted(map(str, echoed)) != sorted(
      map(str, ids)):
    raise errors.ServiceError(
        "reward.order", "the reply does not say which score is whose",
        where=url, got=str(echoed)[:80], want="the ids of the request")
  by_id = {str(i): s for i, s in zip(echoed, scores)}
  return [by_id[str(i)] for i in ids]


def make_remote(url: str, timeout_s: float) -> Reward:
  """A scorer behind a URL.

  It is posted {"ids", "prompts", "completions", "columns"} and replies
  {"ids", "scores"}, in any order.
  """

  def remote(prompts, completions, **columns):
    return ask(
        url, {"prompts": list(prompts), "completions": list(completions),
              "columns": {k: list(v) for k, v in columns.items()}},
        len(completions), timeout_s=timeout_s)

  return remote
