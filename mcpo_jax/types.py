"""What two rooms share: named tuples only, no functions.

Shape letters, the same in every docstring of the project:

  B  sets (prompts) of one optimizer batch      K  candidate slots of a set
  J  slots that enter the loss (1 + negatives)  M  drawn negatives
  S  streams of one chunk                       T  token slots of a stream
  P  prompt tokens    C  completion tokens      V  vocabulary    D  width

Masks are True where there is something. Log-probabilities are in nats, summed
over the completion tokens that `completion_mask` marks (EOS included).
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # jax.Array or numpy.ndarray
Params = Any  # nested dict of arrays

# Candidate id of another prompt's completion that a set carries along (KTO).
# Its role is 0: it is no negative and no kernel draws it.
MISMATCHED_ID = np.uint32(2**32 - 1)


class CandidateSet(NamedTuple):
  """One prompt and its candidates as token ids. Host side, ragged."""

  example_id: np.ndarray  # [2] uint32, hash of the prompt id
  prompt_id: str
  prompt: np.ndarray  # [P] int32
  completions: list[np.ndarray]  # K arrays [C_k] int32, EOS included if not cut
  completion_masks: list[np.ndarray]  # K arrays [C_k] bool, True = scored
  candidate_ids: np.ndarray  # [K] uint32, stable: the order in the record
  multiplicity: np.ndarray  # [K] int32, how often the same ids occurred
  scores: np.ndarray  # [K] float32, higher is better; NaN where unknown
  preferred: int  # index given by the record, -1 where scores decide
  policy_step: int = -1  # of the weights that wrote it, -1 offline
  behaviour_logps: np.ndarray | None = None  # [K] of the law drawn from
  behaviour_raw_logps: np.ndarray | None = None  # [K] of the raw policy


class Streams(NamedTuple):
  """Token streams of fixed capacity. Candidates of a set share its prompt.

  Token i sees token j of the same stream if both have the same `prompt_slot`,
  j is a prompt token or has the same `candidate_slot`, and
  positions[j] <= positions[i]. A key always stands before its query.
  """

  tokens: Array  # [S, T] int32
  positions: Array  # [S, T] int32, 0 at the first prompt token
  prompt_slot: Array  # [S, T] int32, row b of the SetBatch; -1 on padding
  candidate_slot: Array  # [S, T] int32, column k; -1 on prompt and padding
  completion_mask: Array  # [S, T] bool, True on tokens that are scored
  source: Array  # [S, T] int32, the slot whose hidden state predicts this one


class SetBatch(NamedTuple):
  """Per-set metadata. The preferred completion stands in slot 0."""

  role: Array  # [B, K] int8: +1 preferred, -1 negative, 0 neither
  candidate_mask: Array  # [B, K] bool; a row of False is no set at all
  candidate_id: Array  # [B, K] uint32
  multiplicity: Array  # [B, K] int32, >= 1
  scores: Array  # [B, K] float32, NaN where unknown
  lengths: Array  # [B, K] int32, scored completion tokens, 0 where masked
  anchors: dict[str, Array]  # name -> [B, K] float32 logps, e.g. "ref"
  example_id: Array  # [B, 2] uint32
  visit: Array  # [B] int32, how often the example was seen before
  row: Array  # [B] int32, index of the example's own state; -1: it has none


class Features(NamedTuple):
  """What a model gives an objective. The gradient flows through all of it."""

  logps: Array  # [B, J] float32
  # name -> [B, J] float32, further sums over a candidate's tokens for the
  # objectives that ask for them (`registry.Objective.terms`); 0 where masked.
  terms: dict[str, Array] = {}


class KernelState(NamedTuple):
  """What a kernel carries from step to step: where its chains stand."""

  selected: Array  # [B, M] int32, slot of each chain, 0 the preferred's
  selected_mask: Array  # [B, M] bool, False: this chain has no negative
  # [B, K] int32, how often each slot was drawn at earlier visits, for kernels
  # that weigh by history; () for all others.
  history: Array | tuple[()] = ()


class KernelInfo(NamedTuple):
  """What one kernel call saw. For logs and tests, never fed back."""

  log_weights: Array  # [B, K] normalised; -inf outside the candidate set
  ess: Array  # [B] effective sample size, 1 .. number of candidates
  entropy: Array  # [B] nats
  max_weight: Array  # [B]
  negative_rank: Array  # [B] mean rank by kernel score of the drawn, 0 = top
  negative_score_rank: Array  # [B] the same by external score, unknown last
  argmax_share: Array  # [B] share of the drawn that no other outweighs
  stayed: Array  # [B] share of chains that drew the preferred completion


class GenerationResult(NamedTuple):
  """Sampled completions. N samples of each of the R prompts, row-major."""

  tokens: np.ndarray  # [R, N, C] int32, pad after the end
  mask: np.ndarray  # [R, N, C] bool, True up to and including EOS
  text: list[list[str]] | None
  behaviour_logps: np.ndarray  # [R, N, C] of the law that was drawn from
  behaviour_raw_logps: np.ndarray  # [R, N, C] of the raw policy
  finish_reason: list[list[str]]  # "stop" or "length"
  policy_version: int
