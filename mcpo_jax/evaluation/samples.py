"""Samples of a fixed prompt set, scored, and two models compared on it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import types
from mcpo_jax.evaluation import diversity, statistics
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


def summarize(samples: ScoredSamples, *, seed: int) -> dict[str, float]:
  """`score` with its interval over prompts, `mean_length`, `eos_rate`, and
  what `diversity.text_metrics` says."""
  score = statistics.mean_interval(samples.scores.mean(1), seed=seed)
  return {
      "score": score.mean,
      "score_ci95_low": score.ci95_low,
      "score_ci95_high": score.ci95_high,
      "mean_length": float(samples.lengths.mean()),
      "eos_rate": float(samples.stopped.mean()),
  } | diversity.text_metrics(samples.text)


def compare(
    before: ScoredSamples,
    after: ScoredSamples,
    prompts: Sequence[Any],
    *,
    names: tuple[str, str],
    seed: int,
    num_shown: int = 5,
) -> dict[str, Any]:
  """Two models on the same prompts, paired by prompt.

  Args:
    before: samples of the first model.
    after: samples of the second, for the same prompts in the same order.
    prompts: R prompts, shown beside the samples.
    names: of the two models, for example ("sft", "aligned").
    seed: of the bootstrap intervals.
    num_shown: prompts whose first samples are shown side by side, spread
      evenly over the set.

  Returns:
    A flat dict: `score/NAME` with `_ci95_low` and `_ci95_high`, and the other
    numbers of `summarize`, such as `mean_length/NAME`, for both names;
    `score/difference` (second minus first) with its interval;
    `score/num_prompts`; and `samples`, a list of {"prompt", NAME: text, ...}.

  Raises:
    ValueError: the two have other numbers of prompts.
  """
  summary: dict[str, Any] = {}
  for name, samples in zip(names, (before, after), strict=True):
    for key, value in summarize(samples, seed=seed).items():
      key, _, bound = key.partition("_ci95")
      summary[f"{key}/{name}" + (f"_ci95{bound}" if bound else "")] = value
  difference = statistics.paired_difference(
      before.scores.mean(1), after.scores.mean(1), seed=seed
  )
  count = len(before.scores)
  shown = np.unique(np.linspace(0, count - 1, min(num_shown, count), dtype=int))
  return summary | {
      "score/difference": difference.mean,
      "score/difference_ci95_low": difference.ci95_low,
      "score/difference_ci95_high": difference.ci95_high,
      "score/num_prompts": count,
      "samples": [
          {
              "prompt": prompts[i],
              names[0]: before.text[i][0],
              names[1]: after.text[i][0],
          }
          for i in shown
      ],
  }
