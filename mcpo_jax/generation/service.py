"""The generation service: prompts in, completions with their log-probs out.

It holds one version of the weights, puts requests into blocks of a fixed
number of rows and a small ladder of prompt lengths, so that few programs are
compiled, and turns ids into text. Text is made here and nowhere below.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mcpo_jax import errors, sharding
from mcpo_jax.generation import sampler
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import GenerationResult, Params

_SHORTEST = 16  # the ladder of prompt lengths: 16, 32, 64, ...


class GenerationService:
  """Samples completions from the weights it was given last."""

  def __init__(
      self,
      config: ModelConfig,
      params: Params,
      version: int,
      *,
      max_completion_length: int,
      stop_ids: Sequence[int],
      pad_id: int,
      tokenizer: Any = None,
      vocab_size: int | None = None,
      compute_dtype: Any = jnp.float32,
      rows_per_block: int = 64,
      mesh: Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: of the model.
      params: weights, on the mesh if there is one. Read, never changed.
      version: of these weights, for example the policy step.
      max_completion_length: C.
      stop_ids: tokens that end a completion.
      pad_id: what stands after the end.
      tokenizer: makes the text: decode(ids, skip_special_tokens=True). None
        gives results without text.
      vocab_size: ids of the tokenizer; see sampler.make_generate_fn.
      compute_dtype: of products, activations and the cache.
      rows_per_block: sequences decoded together, about; the number of prompts
        in a block is always a multiple of the mesh's batch axes.
      mesh: from sharding.make_mesh; prompts are split over "data" and "fsdp".
    """
    self._config, self._pad_id, self._mesh = config, pad_id, mesh
    self._max_completion_length = max_completion_length
    self._tokenizer = tokenizer
    self._num_tokens = vocab_size or config.vocab_size
    self._rows_per_block = rows_per_block
    self._generate = sampler.make_generate_fn(
        config,
        max_completion_length=max_completion_length,
        stop_ids=stop_ids,
        pad_id=pad_id,
        compute_dtype=compute_dtype,
        vocab_size=vocab_size,
        mesh=mesh,
    )
    self._stop_ids = np.array(sorted(set(stop_ids)), np.int32)
    self.update(params, version)

  def update(self, params: Params, version: int) -> None:
    """Serves these weights from the next request on."""
    self._params, self._version = params, version

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
      GenerationResult in the order of the prompts.

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
    prompt_ids = np.asarray(prompt_ids, np.uint32)
    temperature, top_p = sampling.temperature, sampling.top_p
    self._check(prompts, prompt_ids, num_samples, temperature, top_p, seed)

    num_prompts, samples = self._block_shape(num_samples)
    shape = (len(prompts), num_samples, self._max_completion_length)
    out = None
    lengths = np.array([len(p) for p in prompts])
    # Prompts of like length share a block; a short block is filled up with
    # copies of its first row, which end when that row ends.
    by_length = np.argsort(lengths, kind="stable")
    for start in range(0, len(prompts), num_prompts):
      rows = by_length[start : start + num_prompts]
      fill = np.repeat(rows[:1], num_prompts - len(rows))
      block = np.concatenate([rows, fill])
      for first in range(0, num_samples, samples):
        last = min(first + samples, num_samples)
        indices = np.minimum(np.arange(first, first + samples), last - 1)
        got = self._run(
            [prompts[r] for r in block], prompt_ids[block], indices,
            temperature, top_p, seed,
        )
        if out is None:
          out = sampler.Samples(*(np.zeros(shape, x.dtype) for x in got))
        for whole, part in zip(out, got):
          whole[rows, first:last] = part[: len(rows), : last - first]

    finite = [np.isfinite(x).all(axis=(1, 2)) for x in out[2:]]
    if not np.all(finite):
      raise errors.NonFiniteError(
          "generation.non_finite",
          "the model gave log-probabilities that are not finite",
          where=f"weights of version {self._version}",
          got=f"{int((~np.logical_and(*finite)).sum())} prompts",
      )
    return self._result(out)

  def _result(self, out: sampler.Samples) -> GenerationResult:
    ends = np.isin(out.tokens, self._stop_ids) & out.mask
    stopped = ends.any(-1)
    text = None
    if self._tokenizer is not None:
      text = [
          [
              self._tokenizer.decode(
                  ids[mask & ~end].tolist(), skip_special_tokens=True
              )
              for ids, mask, end in zip(*row)
          ]
          for row in zip(out.tokens, out.mask, ends)
      ]
    return GenerationResult(
        tokens=out.tokens,
        mask=out.mask,
        text=text,
        behaviour_logps=out.behaviour_logps,
        behaviour_raw_logps=out.behaviour_raw_logps,
        finish_reason=[
            ["stop" if s else "length" for s in row] for row in stopped
        ],
        policy_version=self._version,
    )

  def _block_shape(self, num_samples: int) -> tuple[int, int]:
    """Prompts of a block, and samples of each prompt decoded at a time."""
    parts = 1
    if self._mesh is not None:
      parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    samples = min(num_samples, max(1, self._rows_per_block // parts))
    return parts * max(1, self._rows_per_block // (samples * parts)), samples

  def _run(self, prompts, prompt_ids, indices, temperature, top_p, seed):
    """One block: samples of the given indices, as numpy arrays."""
    longest = max(len(p) for p in prompts)
    width = max(_SHORTEST, 2 ** math.ceil(math.log2(longest)))
    tokens = np.full((len(prompts), width), self._pad_id, np.int32)
    for row, prompt in zip(tokens, prompts):
      row[: len(prompt)] = prompt
    arrays = (
        tokens,
        np.array([len(p) for p in prompts], np.int32),
        prompt_ids,
        np.tile(indices.astype(np.int32), (len(prompts), 1)),
    )
    make_key, context = jax.random.key, contextlib.nullcontext()
    if self._mesh is not None:
      context = jax.set_mesh(self._mesh)
      arrays = sharding.put_global(arrays, sharding.batch_sharding(self._mesh))
      make_key = jax.jit(
          jax.random.key, out_shardings=sharding.replicated(self._mesh)
      )
    with context:
      out = self._generate(
          ((self._params, np.float32(1.0)),),
          make_key(np.uint32(seed)),
          *arrays,
          temperature=np.float32(temperature),
          top_p=np.float32(top_p),
      )
    return sampler.Samples(*(np.asarray(x) for x in out))

  def _check(self, prompts, prompt_ids, num_samples, temperature, top_p, seed):
    """Refuses what cannot be served, before anything is compiled."""

    def refuse(field, message, **kw):
      return errors.ServiceError(f"request.{field}", message, where=field, **kw)

    if len(prompts) == 0:
      raise refuse("prompts", "there is no prompt")
    if prompt_ids.shape != (len(prompts), 2):
      raise refuse(
          "prompt_ids", "one id of two words per prompt is needed",
          got=prompt_ids.shape, want=(len(prompts), 2),
      )
    limit = self._config.max_positions - self._max_completion_length
    for i, prompt in enumerate(prompts):
      if not 1 <= len(prompt) <= limit:
        raise refuse(
            "prompts",
            f"prompt {i} does not fit the context beside its completion",
            got=f"{len(prompt)} tokens",
            want=f"1 to {limit}: {self._config.max_positions} positions less"
            f" {self._max_completion_length} of the completion",
        )
      if np.min(prompt) < 0 or np.max(prompt) >= self._num_tokens:
        raise refuse(
            "prompts", f"prompt {i} has a token id outside the vocabulary",
            want=f"0 to {self._num_tokens - 1}",
        )
    for field, value, right, want in (
        ("num_samples", num_samples, num_samples >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("seed", seed, 0 <= seed < 2**32, "0 to 2^32 - 1"),
    ):
      if not right:
        raise refuse(
            field, f"{field} is out of range", got=value, want=want
        )
