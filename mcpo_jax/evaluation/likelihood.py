"""What becomes of likelihoods: drift, displacement, length, peaks, KL.

A loss of differences can fall while the preferred completions themselves lose
probability, or while only length is learned; these numbers show it.

N sets, K candidate slots. All arrays live on the host.
"""

from typing import Any

import numpy as np

from mcpo_jax.evaluation import statistics


def displacement(
    products: np.ndarray, lengths: np.ndarray, role: np.ndarray
) -> np.ndarray:
  """The CHES score of every pair, normalised by length.

  With S+ and S- the sums over the scored tokens of the preferred completion
  and of one negative of the last hidden state (after the final norm) that
  predicts each token: <S+, S-> / (|y+| |y-|) - <S+, S+> / |y+|^2, |y| the
  number of these tokens. The higher, the more alike the model finds the two,
  and the more a push away from the negative lowers the preferred one as well;
  a negative with the hidden states of the preferred has 0.

  Args:
    products: [N, K] <S+, S>, S of each slot; see `scoring.hidden_sums`.
    lengths: [N, K] scored tokens.
    role: [N, K] +1 preferred, -1 negative, 0 neither.

  Returns:
    [N, K] float64, NaN where there is no pair.

  References:
    Razin et al. 2024, https://arxiv.org/abs/2410.08847
  """
  pairs, slot = _pairs(role)
  lengths = np.maximum(lengths, 1)
  per_token = products / lengths / np.take_along_axis(lengths, slot, axis=1)
  scores = per_token - np.take_along_axis(per_token, slot, axis=1)
  return np.where(pairs, scores, np.nan)


def length_correlation(
    rewards: np.ndarray, lengths: np.ndarray, role: np.ndarray
) -> float:
  """Does the implicit reward follow length? Pearson's r over all pairs.

  Args:
    rewards: [N, K] implicit rewards.
    lengths: [N, K] scored tokens.
    role: [N, K] +1 preferred, -1 negative, 0 neither.

  Returns:
    The correlation of margin and difference of lengths, each of the preferred
    less the negative; NaN if one of them is the same for all pairs.
  """
  pairs, slot = _pairs(role)
  gaps = [
      (np.take_along_axis(values, slot, axis=1) - values)[pairs]
      for values in (np.asarray(rewards, np.float64), lengths)
  ]
  if not all(np.size(gap) and np.ptp(gap) for gap in gaps):
    return float("nan")
  return float(np.corrcoef(*gaps)[0, 1])


def likelihood_metrics(
    logps: np.ndarray,
    start_logps: np.ndarray,
    rewards: np.ndarray,
    role: np.ndarray,
    lengths: np.ndarray,
    *,
    products: np.ndarray,
    topk_mass: np.ndarray,
    topk_entropy: np.ndarray,
) -> dict[str, float]:
  """The numbers of an evaluation, over the sets that have a negative.

  Args:
    logps: [N, K] nats, of the policy.
    start_logps: [N, K] nats, of the weights before the first step.
    rewards: [N, K] implicit rewards.
    role: [N, K] +1 preferred, -1 negative, 0 neither or no candidate; what
      stands in the arrays there is never read.
    lengths: [N, K] scored tokens.
    products: [N, K] as of `displacement`.
    topk_mass: [N] summed over the scored tokens of the preferred.
    topk_entropy: [N] likewise.

  Returns:
    A flat dict, NaN where nothing is there to average:
    `likelihood/chosen_drift`: logps - start_logps of the preferred, mean over
      sets; `likelihood/rejected_drift`: the same of the mean negative.
    `likelihood/chosen_drift_per_token`, `likelihood/rejected_drift_per_token`:
      the same with each completion's drift divided by its length.
    `likelihood/displacement`: mean over pairs.
    `likelihood/length_correlation`: see the function.
    `likelihood/topk_mass`, `likelihood/topk_entropy`: mean over all scored
      tokens of preferred completions.

  References:
    Shi et al. 2024 (topk), https://arxiv.org/abs/2410.11677
  """
  pairs, slot = _pairs(role)
  usable = pairs.any(axis=1)
  chosen = np.arange(role.shape[1])[None] == slot
  drift = np.asarray(logps, np.float64) - start_logps
  out = {}
  for name, where in (("chosen", chosen), ("rejected", pairs)):
    for suffix, values in (
        ("", drift), ("_per_token", drift / np.maximum(lengths, 1))
    ):
      out[f"likelihood/{name}_drift{suffix}"] = _mean(
          _row_means(values[usable], where[usable])
      )
  tokens = lengths[chosen][usable].sum()
  per_token = lambda sums: (
      float(np.sum(sums[usable], dtype=np.float64) / tokens)
      if tokens
      else float("nan")
  )
  return out | {
      "likelihood/displacement": _mean(
          displacement(products, lengths, role)[pairs]
      ),
      "likelihood/length_correlation": length_correlation(
          rewards, lengths, role
      ),
      "likelihood/topk_mass": per_token(topk_mass),
      "likelihood/topk_entropy": per_token(topk_entropy),
  }


def kl_metrics(
    logps: np.ndarray,
    ref_logps: np.ndarray,
    sampler_logps: np.ndarray,
    mask: np.ndarray,
    *,
    seed: int,
) -> dict[str, Any]:
  """KL(policy || reference) on samples of the policy.

  The mean of log policy - log reference is without bias where the samples are
  of the policy itself (temperature 1, top-p 1). Of another law it is the mean
  under that law, which may be negative. Completions that were cut count as far
  as they go.

  Args:
    logps: [R, N, C] nats of each token, of the policy, scored anew.
    ref_logps: [R, N, C] of the reference.
    sampler_logps: [R, N, C] of the policy, as the sampler had them.
    mask: [R, N, C] bool, True on tokens of the N samples of R prompts.
    seed: of the bootstrap interval, which draws prompts.

  Returns:
    `kl`: nats a completion, mean over samples, then over prompts, an Interval;
    `kl_per_token`: the same sum over the number of tokens; `logp_gap`: mean
    |sampler - scored anew| of a token.
  """
  gaps = np.where(mask, np.asarray(logps, np.float64) - ref_logps, 0.0)
  off = np.where(mask, np.abs(np.asarray(logps) - sampler_logps), 0.0)
  return {
      "kl": statistics.mean_interval(
          gaps.sum(axis=2).mean(axis=1), seed=seed),
      "kl_per_token": float(gaps.sum() / mask.sum()),
      "logp_gap": float(off.sum() / mask.sum()),
  }


def _pairs(role):
  """[N, K] bool, True on negatives of sets with a preferred one, whose slot
  [N, 1] comes second."""
  role = np.asarray(role)
  slot = np.argmax(role == 1, axis=1)[:, None]
  return (role == -1) & (role == 1).any(axis=1, keepdims=True), slot


def _row_means(values, where):
  """[N] mean of each row over `where`, which is True somewhere."""
  return np.where(where, values, 0.0).sum(axis=1) / where.sum(axis=1)


def _mean(values):
  return float(np.mean(values)) if np.size(values) else float("nan")
