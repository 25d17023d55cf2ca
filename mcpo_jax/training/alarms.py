"""What goes wrong in online runs, by name, with its likely cause.

Every alarm is a comparison of numbers that stand in metrics.jsonl anyway, so
that a reader of the file sees what the alarm saw.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from mcpo_jax import errors


class Alarm(NamedTuple):
  """One finding."""

  name: str
  got: float
  limit: float
  cause: str


class Limits(NamedTuple):
  """Above which an alarm begins."""

  max_kl: float  # nats, of a sample
  max_chosen_drop: float  # of rewards/chosen below 0
  max_length_ratio: float  # to the first round, either way
  max_tied_share: float  # of sets
  max_repetition: float  # share of a sample's trigrams
  max_logp_gap: float  # nats a token


def find_alarms(
    rounds: Sequence[dict[str, Any]],
    updates: Sequence[dict[str, Any]],
    limits: Limits,
) -> list[Alarm]:
  """Looks at a run at the start of a round.

  Args:
    rounds: metrics of every round so far, the newest last; NaN where nothing
      is known, which never alarms.
    updates: logged metrics of the updates of the round before, likewise.
    limits: where alarms begin.

  Returns:
    The alarms, in the order of this function.
  """
  first, now = rounds[0], rounds[-1]
  found = []

  def above(name, value, limit, cause):
    if value is not None and value > limit:
      found.append(Alarm(name, value, limit, cause))

  if "judge/mean" in now:
    gain = now["candidates/score"] - first["candidates/score"]
    noise = 2 * (now["judge/sem"] ** 2 + first["judge/sem"] ** 2) ** 0.5
    if gain > 0:
      above("reward_hacking", first["judge/mean"] - now["judge/mean"], noise,
            "the reward rises while the held-out judge falls: the policy "
            "learns what only this reward likes; stop earlier, raise "
            "objective.beta or mend the reward")
  above("kl", now.get("objective/kl"), limits.max_kl,
        "the policy left its reference; lower the learning rate, raise "
        "objective.beta or shorten the run")
  chosen = [row.get("rewards/chosen", math.nan) for row in updates]
  chosen = [reward for reward in chosen if math.isfinite(reward)]
  if chosen:
    above("chosen_falls", -sum(chosen) / len(chosen), limits.max_chosen_drop,
          "preferred completions become less likely than under the reference: "
          "only the margin is learned; add sft with a weight to the objective, "
          "or train fewer updates on a round")
  if first["candidates/length"]:
    ratio = now["candidates/length"] / first["candidates/length"]
    above("length", max(ratio, 1 / max(ratio, 1e-9)), limits.max_length_ratio,
          "samples became longer or shorter than at the start: the reward "
          "reads length; set reward.length_penalty or normalise by length")
  above("tied", now["candidates/tied_share"], limits.max_tied_share,
        "the reward rarely tells candidates apart: raise "
        "generation.temperature or online.num_candidates, or take a finer "
        "reward")
  above("repetition", now["candidates/repetition"], limits.max_repetition,
        "samples repeat themselves: the policy degenerates; lower the learning "
        "rate, or look at what the reward gives repeated text")
  above("logp_gap", now.get("generate/logp_gap"), limits.max_logp_gap,
        "sampler and trainer give the same tokens other log-probs: look at "
        "dtypes, at a stale version of the weights, at the template")
  return found


def tell(alarms: Sequence[Alarm], *, step: int, stop: bool) -> None:
  """Warns of alarms, or ends the run.

  Raises:
    ServiceError: `alarm.NAME` of the first one, if `stop`.
  """
  for alarm in alarms:
    logging.warning("alarm %s at step %d: %.4g is above %.4g; %s", alarm.name,
                    step, alarm.got, alarm.limit, alarm.cause)
  if alarms and stop:
    first = alarms[0]
    raise errors.ServiceError(
        f"alarm.{first.name}", first.cause, where=f"step {step}",
        got=first.got, want=f"<= {first.limit:g}",
        hint="online.alarm=warn goes on")
