"""Two models compared through the service, without a model."""

import numpy as np
import pytest

from mcpo_jax.evaluation import samples
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.types import GenerationResult


class FakeService:
  """Sample n of a prompt of m tokens is m + n + skill letters "a"."""

  def __init__(self, skill):
    self.skill = skill

  def generate(
      self, prompts, *, prompt_ids, num_samples, sampling, seed
  ):
    counts = np.array([
        [len(p) + n + self.skill for n in range(num_samples)] for p in prompts
    ])
    mask = np.arange(20)[None, None] < counts[..., None]
    zeros = np.zeros(mask.shape)
    return GenerationResult(
        tokens=mask.astype(np.int32), mask=mask,
        text=[["a" * c for c in row] for row in counts],
        behaviour_logps=zeros, behaviour_raw_logps=zeros,
        finish_reason=[
            ["stop" if c % 2 else "length" for c in row] for row in counts
        ],
        policy_version=0,
    )


PROMPTS = samples.PromptSet(
    tokens=[np.arange(n) for n in (3, 1, 4)],
    prompt_ids=np.arange(6, dtype=np.uint32).reshape(3, 2),
    prompts=["three", "one", "four"],
    columns={"offset": [10.0, 20.0, 30.0]},
)


def reward(prompts, completions, offset, **columns):
  """Knows which prompt and column a completion belongs to."""
  base = {"three": 3, "one": 1, "four": 4}
  return [
      len(c) - base[p] + o for p, c, o in zip(prompts, completions, offset)
  ]


def scored(skill, num_samples=2):
  return samples.sample_and_score(
      FakeService(skill), reward, PROMPTS, num_samples=num_samples,
      sampling=Sampling(), seed=0,
  )


def test_each_sample_is_scored_beside_its_own_prompt_and_columns():
  got = scored(0)
  np.testing.assert_array_equal(got.scores, [[10, 11], [20, 21], [30, 31]])
  np.testing.assert_array_equal(got.lengths, [[3, 4], [1, 2], [4, 5]])
  np.testing.assert_array_equal(got.stopped, [[1, 0], [1, 0], [0, 1]])
  assert samples.summarize(got, seed=0)["eos_rate"] == 0.5


def test_comparison_is_paired_by_prompt():
  got = samples.compare(
      scored(0), scored(2), PROMPTS.prompts, names=("sft", "aligned"), seed=0,
      num_shown=2,
  )
  assert got["score/sft"] == 20.5 and got["score/aligned"] == 22.5
  assert got["score/sft_ci95_low"] < 20.5 < got["score/sft_ci95_high"]
  # Every prompt gains exactly 2, however far the prompts lie apart.
  for name in ("", "_ci95_low", "_ci95_high"):
    assert got[f"score/difference{name}"] == 2.0
  assert got["score/num_prompts"] == 3
  assert got["mean_length/sft"] == pytest.approx(19 / 6)
  assert got["mean_length/aligned"] == pytest.approx(31 / 6)
  assert got["eos_rate/sft"] == 0.5
  # What texts are like is told of each model: 3 4 | 1 2 | 4 5 letters.
  assert got["distinct_1/sft"] == 5 / 6
  assert got["empty_rate/sft"] == got["repetition/aligned"] == 0.0
  assert got["samples"] == [
      {"prompt": "three", "sft": "aaa", "aligned": "aaaaa"},
      {"prompt": "four", "sft": "aaaa", "aligned": "aaaaaa"},
  ]


def test_other_prompt_sets_cannot_be_compared():
  few = samples.ScoredSamples(*(x[:2] for x in scored(0)))
  with pytest.raises(ValueError, match="not paired"):
    samples.compare(
        few, scored(0), PROMPTS.prompts, names=("a", "b"), seed=0
    )
