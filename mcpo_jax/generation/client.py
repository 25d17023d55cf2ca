"""The generation service in another process, reached over HTTP.

It keeps trying while a server restarts: requests carry a key, so that an
answer that was lost is not sampled again, and every answer is held against the
version and the hash of the weights that were pushed last. A server that came
back with other weights gets those again.

Servers of vLLM and SGLang are spoken to as well, as plain OpenAI completions.
They take no addresses, so their samples are not reproduced, and no weights.
"""

import concurrent.futures
import pathlib
import re
import shutil
import threading
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import requests
from absl import logging

from mcpo_jax import errors
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.generation.worker import wrong_version
from mcpo_jax.models import hf, lora
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.patience import Patience
from mcpo_jax.types import GenerationResult, Params

_SAMPLES_PER_REQUEST = 64  # about; a lost request is sampled again
_REQUESTS_AT_ONCE = 8
_CONNECT_SECONDS = 5.0
_TRY_AGAIN = (408, 429, 502, 503, 504)
_TOKEN_ID = re.compile(r"token_id:(\d+)")


class _Pushed(NamedTuple):
  """The weights that the server must have."""

  folder: pathlib.Path
  version: int
  sha256: str


class _Served(NamedTuple):
  """What a server said of itself."""

  model: str
  own: bool  # it is one of ours
  version: int
  sha256: str


class RemoteService:
  """Samples completions from a server; see service.GenerationService."""

  def __init__(
      self,
      url: str,
      *,
      token: str,
      config: ModelConfig,
      max_completion_length: int,
      stop_ids: Sequence[int],
      pad_id: int,
      spool: pathlib.Path | None = None,
      patience: float,
  ):
    """Connects to nothing yet.

    Args:
      url: of the server, without a path.
      token: that it asks for.
      config: of the model.
      max_completion_length: C.
      stop_ids: tokens that end a completion.
      pad_id: what stands after the end.
      spool: folder of this client alone, which the server sees under the same
        name, for weights on their way. None: there will be no update.
      patience: seconds without an answer after which it gives up.
    """
    self._url, self._config = url.rstrip("/"), config
    self._length, self._pad_id = max_completion_length, pad_id
    self._stop_ids, self._spool = tuple(stop_ids), spool
    self._patience, self._token = patience, token
    self._pushed: _Pushed | None = None
    self._pushing = threading.Lock()

  def update(self, params: Params, version: int) -> None:
    """Serves these weights from the next request on.

    Returns when the server has them. They are written to the spool folder,
    where the newest stay for a server that comes back without them.

    Raises:
      ServiceError: `service.update`, the server takes none; `weights.*` or
        `hf.*`, it refused them; `service.unreachable`.
    """
    if (self._spool is None or isinstance(params, tuple)
        or not self._served().own):
      raise errors.ServiceError(
          "service.update", "no weights can be handed to this server",
          where=self._url, want="one model, a spool folder and a server of "
          "`python -m mcpo_jax serve`")
    params = lora.merge(params)
    sha256 = hf.params_sha256(params)
    folder = pathlib.Path(self._spool).resolve() / f"{version}-{sha256[:16]}"
    if not folder.exists():
      hf.save_params(folder, params, self._config)
    self._pushed = _Pushed(folder, version, sha256)
    self._push()
    for other in folder.parent.iterdir():  # of before, or of a killed trainer
      if other != folder:
        shutil.rmtree(other, ignore_errors=True)

  def generate(
      self,
      prompts: Sequence[np.ndarray],
      *,
      prompt_ids: np.ndarray,
      num_samples: int,
      sampling: Sampling,
      seed: int,
      require_version: int | None = None,
  ) -> GenerationResult:
    """Draws num_samples completions of every prompt.

    Arguments and result are those of service.GenerationService.generate. From
    a server that is not ours, a sample does not depend on `prompt_ids`,
    `policy_version` is -1, and the log-probs are NaN unless temperature 1
    without penalties, truncation or a least length makes both kinds one: an
    answer does not say of which law it tells.

    Raises:
      ServiceError: `service.unreachable` after `patience` seconds without an
        answer; `service.version`, there are other weights than required;
        `service.answer`, the answer lacks something; what the server refuses.
      NonFiniteError: `generation.non_finite`, as the server found.
    """
    served = self._served()
    if self._pushed is not None:
      if require_version not in (None, self._pushed.version):
        raise wrong_version(self._pushed.version, require_version)
      require_version = self._pushed.version
    if require_version is not None and not served.own:
      raise wrong_version(None, require_version)
    if sampling.max_new_tokens is None:
      sampling = sampling._replace(max_new_tokens=self._length)
    body = {"model": served.model, "n": num_samples, "seed": seed,
            "logprobs": 1, "return_token_ids": True,
            **self._settings(sampling, served)}
    if require_version is not None:
      body["require_version"] = require_version
    rows = max(1, _SAMPLES_PER_REQUEST // num_samples)
    bodies = []
    for first in range(0, len(prompts), rows):
      some = slice(first, first + rows)
      bodies.append(body | {
          "prompt": [np.asarray(p).tolist() for p in prompts[some]]})
      if served.own:
        bodies[-1]["prompt_ids"] = np.asarray(prompt_ids[some]).tolist()
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
      answers = list(pool.map(self._complete, bodies))
    versions = {answer.get("policy_version", -1) for answer in answers}
    if len(versions) > 1:
      raise wrong_version(sorted(versions), require_version)
    plain = served.own or sampling == Sampling(
        max_new_tokens=sampling.max_new_tokens, stop=sampling.stop,
        stop_ids=sampling.stop_ids)
    return self._result(
        [c for answer in answers for c in answer["choices"]], len(prompts),
        num_samples, versions.pop(), plain)

  # One request.

  def _settings(self, sampling: Sampling, served: _Served) -> dict[str, Any]:
    """All of them, for servers have defaults of their own."""
    settings = {
        "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens, "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_ids)}
    if not served.own:
      settings |= {
          "top_k": sampling.top_k or -1, "return_tokens_as_token_ids": True,
          "stop_token_ids": [*self._stop_ids, *sampling.stop_ids]}
    return settings

  def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, from the weights that were pushed last."""
    key, patience = uuid.uuid4().hex, None
    while True:
      pushed = self._pushed
      try:
        answer = self._call("POST", "/v1/completions", body, key)
        if pushed is None or answer["policy_sha256"] == pushed.sha256:
          return self._checked(answer, body)
        key, got = uuid.uuid4().hex, answer["policy_sha256"]
      except errors.ServiceError as e:
        if e.slug != "service.version" or pushed is None:
          raise
        got = e.got
      patience = patience or Patience(self._patience)
      if not patience.wait(self._url, "it came back with other weights"):
        raise wrong_version(got, pushed.version)
      logging.warning("the server has other weights; it gets version %d again",
                      pushed.version)
      self._push()

  def _checked(self, answer, body) -> dict[str, Any]:
    count = len(body["prompt"]) * body["n"]
    choices = sorted(answer.get("choices", ()), key=lambda c: c["index"])
    if [c["index"] for c in choices] != list(range(count)):
      raise self._lacking("one choice for each sample")
    return answer | {"choices": choices}

  # Weights.

  def _served(self) -> _Served:
    models = self._call("GET", "/v1/models").get("data")
    if not models:
      raise self._lacking("a model in /v1/models")
    model = models[0]
    return _Served(
        model["id"], model.get("owned_by") == "mcpo_jax",
        model.get("policy_version", -1), model.get("policy_sha256", ""))

  def _push(self) -> None:
    """Brings the server to the pushed weights, whatever it has."""
    patience = Patience(self._patience)
    with self._pushing:
      pushed = self._pushed
      while True:
        served = self._served()
        if (served.version, served.sha256) == pushed[1:]:
          return
        try:
          self._call("POST", "/v1/weights", {
              "path": str(pushed.folder), "sha256": pushed.sha256,
              "version": pushed.version, "replaces": served.version})
        except errors.ServiceError as e:
          # Another update came between, perhaps this one: its answer was lost.
          if e.slug not in ("weights.busy", "weights.version") or (
              not patience.wait(self._url, e.message)):
            raise

  # HTTP.

  def _call(
      self, method: str, path: str, body: Any = None, key: str | None = None
  ) -> dict[str, Any]:
    """The JSON of an answer, after as many attempts as patience allows."""
    headers = {"authorization": f"Bearer {self._token}"}
    if key is not None:
      headers["idempotency-key"] = key
    patience = Patience(self._patience)
    while True:
      least = 0.0
      try:
        with requests.Session() as session:
          session.trust_env = False  # no proxy, no other credentials
          answer = session.request(
              method, self._url + path, json=body, headers=headers,
              timeout=(_CONNECT_SECONDS, self._patience),
              allow_redirects=False)
          content = _object_of(answer)
      except requests.RequestException as e:
        why = type(e).__name__
      else:
        why = f"status {answer.status_code}"
        if answer.status_code == 200 and content is not None:
          return content
        if answer.status_code not in (200, *_TRY_AGAIN):
          raise self._refusal(answer.status_code, content or {})
        after = answer.headers.get("retry-after", "")
        least = float(after) if after.isdecimal() else 0.0
      if not patience.wait(self._url, why, least=least):
        raise errors.ServiceError(
            "service.unreachable", "the generation service does not answer",
            where=self._url + path, got=why,
            want=f"an answer within {self._patience:g} s",
            hint="start it; what was done so far is kept")

  def _refusal(self, status: int, told: dict[str, Any]) -> errors.McpoError:
    """What the server says, as an error of this process."""
    if told.get("slug") == "generation.non_finite":
      return errors.NonFiniteError(
          told["slug"], told["message"], where=self._url)
    return errors.ServiceError(
        told.get("slug", "service.answer"),
        told.get("message", f"the server answered {status}"),
        where=f"{self._url} {told.get('field', '')}".strip(),
        got=told.get("got"), want=told.get("want"))

  # The result.

  def _result(self, choices, num_prompts, num_samples, version, plain):
    shape = num_prompts * num_samples, self._length
    tokens = np.full(shape, self._pad_id, np.int32)
    mask = np.zeros(shape, bool)
    logps, raw = np.zeros(shape), np.zeros(shape)
    for row, choice in enumerate(choices):
      ids, told = self._ids(choice), choice.get("logprobs") or {}
      drawn = told.get("token_logprobs")
      if drawn is None or not len(drawn) == len(ids) <= self._length:
        raise self._lacking("logprobs.token_logprobs, one per token")
      if choice["finish_reason"] not in ("stop", "length"):
        raise self._lacking("finish_reason stop or length")
      count = len(ids)
      tokens[row, :count], mask[row, :count] = ids, True
      logps[row, :count] = drawn if plain else np.nan
      raw[row, :count] = told.get("raw_logprobs", drawn) if plain else np.nan
    shape = num_prompts, num_samples
    grid = lambda values: [list(values[i * num_samples:(i + 1) * num_samples])
                           for i in range(num_prompts)]
    return GenerationResult(
        tokens=tokens.reshape(*shape, -1), mask=mask.reshape(*shape, -1),
        text=grid([choice["text"] for choice in choices]),
        behaviour_logps=logps.astype(np.float32).reshape(*shape, -1),
        behaviour_raw_logps=raw.astype(np.float32).reshape(*shape, -1),
        finish_reason=grid([choice["finish_reason"] for choice in choices]),
        policy_version=version)

  def _ids(self, choice: dict[str, Any]) -> list[int]:
    """The token ids of a choice, never of its text tokenised again."""
    if choice.get("token_ids") is not None:
      return choice["token_ids"]
    words = (choice.get("logprobs") or {}).get("tokens")
    found = [_TOKEN_ID.fullmatch(word) for word in words or [""]]
    if words is None or None in found:
      raise self._lacking(
          "choices[].token_ids, or token_id:N in logprobs.tokens")
    return [int(match[1]) for match in found]

  def _lacking(self, want: str) -> errors.ServiceError:
    return errors.ServiceError(
        "service.answer", "the server's answer lacks what is needed",
        where=self._url, want=want)


def _object_of(answer: requests.Response) -> dict[str, Any] | None:
  """The JSON object of an answer, None if it is none, cut off perhaps."""
  try:
    content = answer.json()
  except requests.JSONDecodeError:
    return None
  return content if isinstance(content, dict) else None
