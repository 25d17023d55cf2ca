"""From samples of a prompt to its candidate set, and what a round is like."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import commit, types
from mcpo_jax.training.rounds import PoolSet, numbers_of, to_numbers

_FILE = "samples.jsonl"

# Ids of sampled candidates begin here in round 0 and move on by as much every
# round; those of a record are its places, far below.
IDS_PER_ROUND = 1 << 12


class Candidate(NamedTuple):
  """One completion of a prompt, sampled or of the record."""

  tokens: np.ndarray  # [C] int32, the stop token included if there is one
  mask: np.ndarray  # [C] bool, True = scored
  text: str
  candidate_id: int
  score: float  # NaN where nobody gave one
  source: str  # "policy" or "data"
  finish_reason: str | None = None  # None: of the record
  behaviour_logp: float = float("nan")  # nats, of the law it was drawn from
  raw_logps: np.ndarray | None = None  # [C] nats, of the raw policy


def write_samples(
    place: pathlib.Path, prompts: list[Any], drawn: list[list[Candidate]],
    meta: dict[str, Any],
) -> None:
  """Commits the samples of each prompt, not scored yet, as one folder: JSON
  Lines, a prompt a line."""

  def write(folder):
    with open(folder / _FILE, "w") as file:
      for prompt, own in zip(prompts, drawn):
        file.write(json.dumps({
            "prompt": prompt, "completions": [c.text for c in own],
            "finish_reasons": [c.finish_reason for c in own],
            "candidate_ids": [c.candidate_id for c in own],
            "behaviour_logps": to_numbers([c.behaviour_logp for c in own]),
            "completion_tokens": [c.tokens.tolist() for c in own],
            "raw_logps": [to_numbers(c.raw_logps) for c in own],
            "dtype": str(own[0].raw_logps.dtype)}) + "\n")

  commit.write_folder(place, write, meta)


def read_samples(
    place: pathlib.Path,
) -> tuple[list[list[Candidate]], dict[str, Any]]:
  """What `write_samples` wrote, to the bit, and the meta.

  Raises:
    CheckpointError: the folder is damaged or was never committed.
  """
  meta = commit.verify(place)
  return [
      [Candidate(
          tokens=np.array(tokens, np.int32), mask=np.ones(len(tokens), bool),
          text=text, candidate_id=number, score=float("nan"), source="policy",
          finish_reason=reason, behaviour_logp=logp,
          raw_logps=numbers_of(raw, line["dtype"]))
       for tokens, text, number, reason, logp, raw in zip(
           line["completion_tokens"], line["completions"],
           line["candidate_ids"], line["finish_reasons"],
           numbers_of(line["behaviour_logps"], np.float64).tolist(),
           line["raw_logps"])]
      for line in map(
          json.loads, (place / _FILE).read_text().splitlines())], meta


def reject(
    scores: np.ndarray, keep: int, *, beta: float, rng: np.random.Generator
) -> list[int]:
  """Statistical rejection sampling: which candidates stand for samples of the
  policy that is optimal for the reward.

  In passes over those not accepted yet, candidate i is accepted with
  probability exp((score_i - best) / beta), best being the highest score among
  them, until `keep` are. A pass always accepts its best.

  Args:
    scores: [N].
    keep: how many to accept, at most N.
    beta: > 0; towards 0 only the best are accepted, large: all alike.
    rng: of the decisions.

  Returns:
    `keep` indices in the order of acceptance.

  References:
    Liu et al. 2023, https://arxiv.org/abs/2309.06657, algorithm 1.
  """
  left, accepted = list(range(len(scores))), []
  while len(accepted) < keep:
    best = max(scores[i] for i in left)
    for i in list(left):
      if len(accepted) < keep and (
          rng.random() < np.exp((scores[i] - best) / beta)):
        accepted.append(i)
        left.remove(i)
  return accepted


def merge(
    candidates: list[Candidate],
) -> tuple[list[Candidate], np.ndarray]:
  """Candidates of the same ids as one, the first of them.

  Returns:
    the K different ones in their order, and [K] int32 how often each came.
  """
  kept: dict[bytes, Candidate] = {}
  counts: dict[bytes, int] = {}
  for one in candidates:
    key = one.tokens.astype(np.int32).tobytes()
    kept.setdefault(key, one)
    counts[key] = counts.get(key, 0) + 1
  return list(kept.values()), np.array(list(counts.values()), np.int32)


def pool_set(
    record: types.CandidateSet,
    candidates: list[Candidate],
    *,
    row: int,
    prompt: Any,
    policy_step: int,
    preferred: int = -1,
) -> PoolSet:
  """The set of one prompt, without anchors.

  Args:
    record: the prompt's own set, for its ids.
    candidates: in the order of their slots, none empty.
    row: of the record, in the data.
    prompt: text or messages.
    policy_step: updates behind the weights that sampled.
    preferred: index that is preferred whatever the scores, -1: they decide.

  Returns:
    PoolSet; identical candidates are one with a multiplicity.
  """
  kept, multiplicity = merge(candidates)
  array = lambda values, dtype: np.array(values, dtype)
  return PoolSet(
      row=row, prompt=prompt, texts=[c.text for c in kept],
      sources=[c.source for c in kept],
      finish_reasons=[c.finish_reason for c in kept], anchors={},
      candidates=record._replace(
          completions=[c.tokens for c in kept],
          completion_masks=[c.mask for c in kept],
          candidate_ids=array([c.candidate_id for c in kept], np.uint32),
          multiplicity=multiplicity,
          scores=array([c.score for c in kept], np.float32),
          preferred=preferred, policy_step=policy_step,
          behaviour_logps=array([c.behaviour_logp for c in kept], np.float32),
          behaviour_raw_logps=array(
              [np.nan if c.raw_logps is None else c.raw_logps.sum()
               for c in kept], np.float32)))


def repetition(tokens: np.ndarray) -> float:
  """Share of a completion's trigrams of ids that stood in it before."""
  grams = list(zip(tokens[:-2], tokens[1:-1], tokens[2:]))
  return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def round_metrics(
    sets: list[PoolSet],
    drawn: list[list[Candidate]],
    told: list[list[Candidate]],
) -> dict[str, float]:
  """What a round is like.

  Args:
    sets: as trained on.
    drawn: the samples of each prompt, before any was dropped or merged.
    told: those that are not empty, with their scores.

  Returns:
    `candidates/*`: `score` and `score_best` of samples (NaN without a reward),
    `tied_share` of sets without a better candidate, `unique_share` of samples
    after merging, `empty_share`, `cut_share` of samples that ended at the
    longest length, `length` in tokens, `repetition` of trigrams; and
    `objective/kl`, the mean log ratio of the samples to the reference, where
    there is one.
  """
  each = [c for own in drawn for c in own]
  mean = lambda values: float(np.mean(values)) if len(values) else math.nan
  ratios = []
  for one in sets:
    if "ref" in one.anchors:
      ours = np.array(one.sources) == "policy"
      ratio = one.candidates.behaviour_raw_logps - one.anchors["ref"]
      ratios += np.repeat(
          ratio[ours], one.candidates.multiplicity[ours]).tolist()
  kl = {"objective/kl": mean(ratios)} if ratios else {}
  return kl | {
      "candidates/score": mean([c.score for own in told for c in own]),
      "candidates/score_best": mean(
          [max(c.score for c in own) for own in told if own]),
      "candidates/tied_share": mean([not s.has_contrast for s in sets]),
      "candidates/unique_share": mean([
          len({c.tokens.tobytes() for c in own}) / len(own) for own in drawn]),
      "candidates/empty_share": 1.0 - sum(map(len, told)) / len(each),
      "candidates/cut_share": mean(
          [c.finish_reason == "length" for c in each]),
      "candidates/length": mean([len(c.tokens) for c in each]),
      "candidates/repetition": mean(
          [repetition(c.tokens) for c in each]),
  }
