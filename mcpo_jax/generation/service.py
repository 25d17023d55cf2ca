"""The generation service: prompts in, completions with their log-probs out.

It holds one version of the weights, hands requests to the engine and turns ids
into text. Text is made here and nowhere below.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mcpo_jax import errors
from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.generation import sampler, text
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import GenerationResult, Params

# Tokens decoded before stop strings are looked for: few, for what a sample
# draws after one is thrown away.
_LOOK_EVERY = 8


class GenerationService:
  """Samples completions from the weights it was given last."""

  def __init__(
      self,
      config: ModelConfig,
      models: Params | engine_lib.Models,
      version: int,
      *,
      max_completion_length: int,
      stop_ids: Sequence[int],
      pad_id: int,
      tokenizer: Any = None,
      vocab_size: int | None = None,
      compute_dtype: Any = jnp.float32,
      num_slots: int = engine_lib.NUM_SLOTS,
      mesh: Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: of the model.
      models: see update.
      version: of these weights, for example the policy step.
      max_completion_length: C.
      stop_ids: tokens that end a completion.
      pad_id: what stands after the end.
      tokenizer: makes the text; see text.TextStream. None gives results
        without text.
      vocab_size: ids of the tokenizer; see sampler.make_kernels.
      compute_dtype: of products, activations and the cache.
      num_slots: sequences decoded together, about.
      mesh: from sharding.make_mesh; prompts are split over "data" and "fsdp".
        It may be of other devices than those the weights come from.
    """
    self._pad_id, self._tokenizer = pad_id, tokenizer
    self._stop_ids, self._length = tuple(stop_ids), max_completion_length
    self._dtype = jnp.promote_types(compute_dtype, jnp.float32)
    self._engine = engine_lib.Engine(
        config, _models(models), version,
        max_new_tokens=max_completion_length, stop_ids=stop_ids,
        vocab_size=vocab_size, compute_dtype=compute_dtype,
        num_slots=num_slots, mesh=mesh,
    )
    self._version = version

  def update(self, models: Params | engine_lib.Models, version: int) -> None:
    """Serves these weights from the next request on.

    They are copied, onto the service's own devices: the caller may change,
    donate or delete its own at once.

    Args:
      models: weights, or a tuple of (weights, factor): then tokens are drawn
        from the law whose log-probabilities are the sum of theirs times the
        factors, and the raw policy is the first. A negative factor
        extrapolates. Another number of models than before compiles anew.
      version: of the weights.
    """
    self._engine.update(_models(models), version)
    self._version = version

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

    Args:
      prompts: R arrays of token ids, as long as they are.
      prompt_ids: [R, 2] uint32. With the seed and the index of the sample they
        address the draws: a sample is the same whatever else is asked for.
      num_samples: N >= 1.
      sampling: how each is drawn.
      seed: in [0, 2^32).
      require_version: refuse to answer with other weights.

    Returns:
      GenerationResult in the order of the prompts. A completion that ends with
      a stop string has the tokens up to the one that completed it.

    Raises:
      ServiceError: `service.version` if the weights are not those required;
        `request.*` for a request that cannot be served.
      NonFiniteError: `generation.non_finite`, the model gave NaN or infinity.
    """
    if require_version is not None and require_version != self._version:
      raise errors.ServiceError(
          "service.version",
          "the service has other weights than required",
          where="require_version",
          got=self._version,
          want=require_version,
      )
    self._check(prompts, prompt_ids, num_samples, sampling)
    if sampling.max_new_tokens is None:
      sampling = sampling._replace(max_new_tokens=self._length)
    requests = [
        engine_lib.Request(
            i, np.asarray(prompt, np.int32), np.asarray(prompt_id, np.uint32),
            np.arange(num_samples, dtype=np.int32), sampling, seed,
        )
        for i, (prompt, prompt_id) in enumerate(zip(prompts, prompt_ids))
    ]
    # A restarted run must get the bits that an undisturbed one would have got.
    self._engine.reset()
    for request in requests:
      self._engine.check(request)
    try:
      for request in requests:
        self._engine.submit(request)
      return self._collect(len(prompts), num_samples, sampling.stop)
    finally:  # nothing of it stays, whatever went wrong
      for request in requests:
        self._engine.cancel(request.request_id)

  def _collect(self, num_prompts, num_samples, stop) -> GenerationResult:
    """Steps until all is drawn."""
    shape = (num_prompts, num_samples, self._length)
    tokens = np.full(shape, self._pad_id, np.int32)
    behaviour, raw = (np.zeros(shape, self._dtype) for _ in range(2))
    lengths = np.zeros(shape[:2], np.int32)
    reasons = [[None] * num_samples for _ in range(num_prompts)]
    make = lambda: text.TextStream(self._tokenizer, stop, self._stop_ids)
    streams = [[make() for _ in row] for row in reasons]
    while not self._engine.idle:
      for new in self._engine.step(_LOOK_EVERY if stop else sampler.STRETCH):
        row = new.request_id, new.sample
        number, reason = len(new.tokens), new.finish_reason
        if self._tokenizer is not None:
          stream = streams[new.request_id][new.sample]
          stream.push(new.tokens)
          if stream.stopped:
            number = stream.num_tokens - lengths[row]
            if reason is None:
              self._engine.cancel(*row)
            reason = "stop"
        here = slice(lengths[row], lengths[row] + number)
        tokens[row][here] = new.tokens[:number]
        behaviour[row][here] = new.behaviour_logps[:number]
        raw[row][here] = new.behaviour_raw_logps[:number]
        lengths[row] += number
        reasons[new.request_id][new.sample] = reason
    texts = None
    if self._tokenizer is not None:
      texts = [[stream.text + stream.finish() for stream in r] for r in streams]
    return GenerationResult(
        tokens=tokens,
        mask=np.arange(self._length) < lengths[..., None],
        text=texts,
        behaviour_logps=behaviour,
        behaviour_raw_logps=raw,
        finish_reason=reasons,
        policy_version=self._version,
    )

  def _check(self, prompts, prompt_ids, num_samples, sampling):
    """What the engine cannot see in single requests."""
    for field, value, right, want in (
        ("prompts", len(prompts), len(prompts) > 0, "at least 1"),
        ("prompt_ids", np.shape(prompt_ids),
         np.shape(prompt_ids) == (len(prompts), 2), (len(prompts), 2)),
        ("num_samples", num_samples, num_samples >= 1, "at least 1"),
        ("stop", sampling.stop, self._tokenizer is not None
         or not sampling.stop, "none: the service has no tokenizer"),
        ("stop", sampling.stop, all(sampling.stop), "no empty text"),
    ):
      if not right:
        raise errors.ServiceError(
            f"request.{field}", f"{field} cannot be served", where=field,
            got=value, want=want,
        )


def _models(models: Params | engine_lib.Models) -> engine_lib.Models:
  return models if isinstance(models, tuple) else ((models, 1.0),)
