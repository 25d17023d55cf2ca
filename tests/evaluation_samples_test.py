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


def test_what_samples_are_like():
  got = samples.describe(scored(0), seed=0)
  assert got["score"].mean == 20.5
  assert got["score"].ci95_low < 20.5 < got["score"].ci95_high
  assert got["length"].mean == pytest.approx(19 / 6)
  assert got["characters"] == got["length"]  # each token is a letter here
  assert got["eos_rate"] == 0.5
  assert got["distinct_1"] == 5 / 6  # 3 4 | 1 2 | 4 5 letters
  assert got["empty_rate"] == got["repetition"] == 0.0


def test_a_comparison_is_paired_by_prompt():
  got = samples.against(scored(2), scored(0), seed=0)
  # Every prompt gains exactly 2, however far the prompts lie apart.
  assert got["score_difference"] == (2.0, 2.0, 2.0)
  assert got["length_ratio"] == pytest.approx(31 / 19)
  assert got["win_rate"] == (1.0, 1.0, 1.0)  # 2 3 against 0 1, everywhere
  near = samples.against(scored(1), scored(0), seed=0)
  assert near["win_rate"].mean == 7 / 8 and near["tie_rate"] == 1 / 4
  # A rule that pays for length alone prefers neither at the same length.
  assert near["lc_win_rate"].mean < near["win_rate"].mean
  assert near["length_gap"].mean == 1.0


def test_first_samples_are_shown_side_by_side():
  assert samples.side_by_side(
      {"sft": scored(0), "aligned": scored(2)}, PROMPTS.prompts, num_shown=2
  ) == [
      {"prompt": "three", "sft": "aaa", "aligned": "aaaaa"},
      {"prompt": "four", "sft": "aaaa", "aligned": "aaaaaa"},
  ]


def test_other_prompt_sets_cannot_be_compared():
  few = samples.ScoredSamples(*(x[:2] for x in scored(0)))
  with pytest.raises(ValueError, match="not paired"):
    samples.against(few, scored(0), seed=0)
