"""Samples of a fixed prompt set, scored, and two models compared on it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import types
from mcpo_jax.evaluation import diversity, statistics, win_rates
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.generation.service import GenerationService
from mcpo_jax.rewards import functions
from mcpo_jax.types import GenerationResult


class PromptSet(NamedTuple):
  """R prompts, as the model and as the reward read them."""

  tokens: Sequence[np.ndarray]  # R arrays of ids
  prompt_ids: np.ndarray  # [R, 2] uint32
  prompts: Sequence[Any]  # R strings or lists of messages
  columns: Mapping[str, Sequence]  # further columns for the reward, R each


class ScoredSamples(NamedTuple):
  """N scored samples of each of R prompts."""

  scores: np.ndarray  # [R, N] float64
  text: list[list[str]]
  lengths: np.ndarray  # [R, N] tokens, the stop token included
  stopped: np.ndarray  # [R, N] bool, True where a stop token ended it
  tokens: np.ndarray  # [R, N, C] int32
  mask: np.ndarray  # [R, N, C] bool, True up to and including the stop token
  raw_logps: np.ndarray  # [R, N, C] of the model, as the sampler had them


def sample_and_score(
    service: GenerationService,
    reward: functions.Reward,
    prompt_set: PromptSet,
    *,
    num_samples: int,
    sampling: Sampling,
    seed: int,
) -> ScoredSamples:
  """Samples every prompt and scores the texts.

  Args:
    service: has a tokenizer.
    reward: fn(prompts, completions, **columns) -> one number per completion.
    prompt_set: R prompts.
    num_samples: N per prompt.
    sampling: how each is drawn.
    seed: equal seeds draw with the same noise, from whatever weights.

  Returns:
    ScoredSamples in the order of the prompts.

  Raises:
    ServiceError: from the service or the reward.
  """
  result = service.generate(
      prompt_set.tokens,
      prompt_ids=prompt_set.prompt_ids,
      num_samples=num_samples,
      sampling=sampling,
      seed=seed,
  )
  scores = score_texts(reward, prompt_set, result)
  return ScoredSamples(
      scores=scores,
      text=result.text,
      lengths=result.mask.sum(-1),
      stopped=np.array(result.finish_reason) == "stop",
      tokens=result.tokens,
      mask=result.mask,
      raw_logps=result.behaviour_raw_logps,
  )


def score_texts(
    reward: functions.Reward, prompt_set: PromptSet, result: GenerationResult
) -> np.ndarray:
  """Scores [R, N] float64 of the samples of R prompts.

  Raises:
    ServiceError: see `functions.score`.
  """
  num_samples = result.mask.shape[1]
  each = lambda items: [item for item in items for _ in range(num_samples)]
  return functions.score(
      reward,
      each(prompt_set.prompts),
      [text for texts in result.text for text in texts],
      **{name: each(column) for name, column in prompt_set.columns.items()}
      | {
          "finish_reasons": [r for row in result.finish_reason for r in row],
          "lengths": result.mask.sum(-1).reshape(-1).tolist(),
      },
  ).reshape(-1, num_samples)


def candidate_sets(
    prompt_set: PromptSet, samples: ScoredSamples
) -> list[types.CandidateSet]:
  """The samples of each prompt as the candidates of a set, in their order."""
  num_samples = samples.mask.shape[1]
  return [
      types.CandidateSet(
          example_id=example_id,
          prompt_id="{:08x}{:08x}".format(*example_id),
          prompt=np.asarray(prompt, np.int32),
          completions=[ids[here] for ids, here in zip(tokens, mask)],
          completion_masks=[np.ones(here.sum(), bool) for here in mask],
          candidate_ids=np.arange(num_samples, dtype=np.uint32),
          multiplicity=np.ones(num_samples, np.int32),
          scores=scores.astype(np.float32),
          preferred=-1,
      )
      for example_id, prompt, tokens, mask, scores in zip(
          prompt_set.prompt_ids,
          prompt_set.tokens,
          samples.tokens,
          samples.mask,
          samples.scores,
      )
  ]


def describe(samples: ScoredSamples, *, seed: int) -> dict[str, Any]:
  """What the samples of a model are like.

  Args:
    samples: of R prompts.
    seed: of the bootstrap intervals, which draw prompts.

  Returns:
    `score`, `length` (tokens) and `characters` of a sample, Intervals of the
    mean over prompts; `eos_rate`; and what `diversity.text_metrics` says.
  """
  characters = np.array([[len(t) for t in row] for row in samples.text])
  mean = lambda values: statistics.mean_interval(values.mean(1), seed=seed)
  return {
      "score": mean(samples.scores),
      "length": mean(samples.lengths),
      "characters": mean(characters),
      "eos_rate": float(samples.stopped.mean()),
  } | diversity.text_metrics(samples.text)


def against(
    ours: ScoredSamples, baseline: ScoredSamples, *, seed: int
) -> dict[str, Any]:
  """A model's samples beside a baseline's, for the same prompts.

  Returns:
    What `win_rates.compare` says of every sample against every one;
    `score_difference`, an Interval of means paired by prompt; `length_ratio`
    of tokens and `distinct_2_ratio`, the model's by the baseline's, NaN where
    the baseline has 0.

  Raises:
    ValueError: the two have other numbers of prompts.
  """
  ratio = lambda a, b: a / b if b else float("nan")
  return win_rates.compare(
      *win_rates.sample_pairs(
          ours.scores, baseline.scores, ours.text, baseline.text), seed=seed
  ) | {
      "score_difference": statistics.paired_difference(
          baseline.scores.mean(1), ours.scores.mean(1), seed=seed),
      "length_ratio": float(ratio(
          ours.lengths.mean(), baseline.lengths.mean())),
      "distinct_2_ratio": ratio(*(
          diversity.distinct([t for row in side.text for t in row], 2)
          for side in (ours, baseline))),
  }


def side_by_side(
    drawn: Mapping[str, ScoredSamples], prompts: Sequence[Any],
    num_shown: int = 5,
) -> list[dict[str, Any]]:
  """{"prompt", NAME: first sample, ...} of prompts spread over the set."""
  count = len(prompts)
  shown = np.unique(np.linspace(0, count - 1, min(num_shown, count), dtype=int))
  return [{"prompt": prompts[i]} | {
      name: one.text[i][0] for name, one in drawn.items()} for i in shown]
