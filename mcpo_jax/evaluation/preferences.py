"""Held-out preferences: does the implicit reward order candidates right?

N sets, K candidate slots. All arrays live on the host.
"""

from typing import Any

import numpy as np

from mcpo_jax.evaluation import statistics


def preference_metrics(
    rewards: np.ndarray,
    logps: np.ndarray,
    role: np.ndarray,
    *,
    seed: int,
) -> dict[str, Any]:
  """Accuracy and margin of the implicit reward.

  A pair is the preferred candidate of a set and one of its negatives; it is
  ordered right if the preferred has the larger reward. A pair of equal rewards
  counts one half, so that a policy equal to its reference is at chance.

  Args:
    rewards: [N, K] implicit rewards, for example beta * (logps - ref_logps).
    logps: [N, K] nats a completion, of the policy.
    role: [N, K] +1 preferred (one per set), -1 negative, 0 neither or no
      candidate; what stands in the arrays there is never read.
    seed: of the bootstrap intervals, which draw sets.

  Returns:
    A flat dict: `rewards/accuracies` (share of all pairs ordered right),
    `rewards/margins` (preferred minus the mean of the set's negatives, mean
    over sets), both with `_ci95_low` and `_ci95_high`; `rewards/chosen`,
    `rewards/rejected`, `logps/chosen`, `logps/rejected` (means over sets);
    `num_pairs`, `num_sets` (sets with a preferred and a negative).
  """
  role = np.asarray(role)
  rewards = np.asarray(rewards, np.float64)
  usable = (role == 1).any(1) & (role == -1).any(1)
  role, rewards = role[usable], rewards[usable]
  logps = np.asarray(logps)[usable]
  slot = np.argmax(role == 1, axis=1)[:, None]
  negative = role == -1

  chosen = np.take_along_axis(rewards, slot, 1)
  right = np.where(
      negative, (chosen > rewards) + 0.5 * (chosen == rewards), 0.0
  )
  pairs = negative.sum(1)
  rejected = _masked_mean(rewards, negative)
  accuracy = statistics.mean_interval(right.sum(1) / pairs, pairs, seed=seed)
  margin = statistics.mean_interval(chosen[:, 0] - rejected, seed=seed)
  return {
      **_flat("rewards/accuracies", accuracy),
      **_flat("rewards/margins", margin),
      "rewards/chosen": _mean(chosen),
      "rewards/rejected": _mean(rejected),
      "logps/chosen": _mean(np.take_along_axis(logps, slot, 1)),
      "logps/rejected": _mean(_masked_mean(logps, negative)),
      "num_pairs": int(pairs.sum()),
      "num_sets": int(usable.sum()),
  }


def by_rank(
    rewards: np.ndarray, role: np.ndarray, scores: np.ndarray, *, seed: int
) -> list[dict[str, Any]]:
  """Accuracy and margin against each set's best negative, its second, ...

  Args:
    rewards, role: as of `preference_metrics`.
    scores: [N, K] external scores, higher is better, NaN where unknown. They
      rank the negatives of a set; equal scores keep the order of the slots.
      Sets with a candidate of unknown score are left out.
    seed: of the bootstrap intervals, which draw sets.

  Returns:
    Per rank, the best negative's first, over the sets that have one:
    `accuracy` and `margin` (preferred less that negative) as Intervals, and
    `num_sets`.
  """
  role, scores = np.asarray(role), np.asarray(scores, np.float64)
  negative = role == -1
  used = (role == 1).any(1) & negative.any(1) & (
      np.isfinite(scores) | ~negative).all(1)
  negative, rewards = negative[used], np.asarray(rewards, np.float64)[used]
  slot = np.argmax(role[used] == 1, axis=1)[:, None]
  keys = np.where(negative, -scores[used], np.inf)  # others sort last
  order = np.argsort(keys, axis=1, kind="stable")
  margins = np.take_along_axis(rewards, slot, 1) - np.take_along_axis(
      rewards, order, 1)
  present = np.take_along_axis(negative, order, 1)
  out = []
  for margin, here in zip(margins.T, present.T):
    margin = margin[here]
    if len(margin):
      out.append({
          "accuracy": statistics.mean_interval(
              (margin > 0) + 0.5 * (margin == 0), seed=seed),
          "margin": statistics.mean_interval(margin, seed=seed),
          "num_sets": len(margin)})
  return out


def _masked_mean(values, mask):
  """[N] mean over the slots of the mask; every row has one."""
  return np.where(mask, values, 0.0).sum(1) / mask.sum(1)


def _mean(values):
  return float(np.mean(values)) if np.size(values) else float("nan")


def _flat(name, interval):
  return {
      name: interval.mean,
      f"{name}_ci95_low": interval.ci95_low,
      f"{name}_ci95_high": interval.ci95_high,
  }
