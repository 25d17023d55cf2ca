"""One optimizer batch on the host: which sets, in which slots. A batch is a
function of (seed, step) alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from mcpo_jax import errors, types
from mcpo_jax.data import batches, packing
from mcpo_jax.kernels import address

if TYPE_CHECKING:
  from mcpo_jax.data import store


class HostBatch(NamedTuple):
  """B sets as the host holds them."""

  rows: np.ndarray  # [B] row of the store
  sets: list[types.CandidateSet]
  order: list[list[int]]  # slot -> candidate of the record
  meta: types.SetBatch  # [B, K] numpy


@jax.jit
def _preferred_noise(seed, sets):
  return address.gumbel(
      jax.random.key(seed), sets, purpose=address.DRAW_PREFERRED)


def make_batch_fn(
    data: "store.Store",
    rows: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    num_slots: int,
    preferred: str,
    top_k: int | None,
    behaviour: bool = False,
) -> Callable[[int], HostBatch]:
  """Returns step -> HostBatch over `rows` of the store, in an order of its own
  for every visit."""

  def make_batch(step: int) -> HostBatch:
    picked, visits = batches.example_indices(
        step, batch_size=batch_size, num_examples=len(rows), seed=seed)
    return collect(data, rows[picked], visits, seed=seed, num_slots=num_slots,
                   preferred=preferred, top_k=top_k, behaviour=behaviour,
                   places=picked)

  return make_batch


def collect(
    data: "store.Store",
    rows: np.ndarray,
    visits: np.ndarray,
    *,
    seed: int,
    num_slots: int,
    preferred: str,
    top_k: int | None,
    behaviour: bool = False,
    batch_size: int | None = None,
    places: np.ndarray | None = None,
) -> HostBatch:
  """The HostBatch of given rows; padded with empty rows up to `batch_size`.

  `places` are the examples' own among those trained on, None of held-out ones.

  With `behaviour` the anchor "proposal_q" holds the records' column
  `behaviour_logps`.
  """
  batch = arrange(
      [data.candidate_set(int(row)) for row in rows], rows, visits, seed=seed,
      num_slots=num_slots, preferred=preferred, top_k=top_k,
      batch_size=batch_size, places=places)
  if behaviour:
    q = np.zeros(batch.meta.role.shape, np.float32)
    for b, (row, slots) in enumerate(zip(rows, batch.order)):
      q[b, :len(slots)] = behaviour_logps(data, int(row))[slots]
    batch = batch._replace(meta=batch.meta._replace(
        anchors={"proposal_q": q}))
  return batch


def arrange(
    sets: list[types.CandidateSet],
    rows: np.ndarray,
    visits: np.ndarray,
    *,
    seed: int,
    num_slots: int,
    preferred: str,
    top_k: int | None,
    batch_size: int | None = None,
    places: np.ndarray | None = None,
) -> HostBatch:
  """The HostBatch of given sets; padded with empty rows up to `batch_size`."""
  noise = [None] * len(sets)
  if preferred == "top_k":
    plain = [list(range(len(s.completions))) for s in sets]
    drawn = np.asarray(_preferred_noise(seed, packing.make_set_batch(
        sets, visits, num_slots=num_slots, order=plain)))
    noise = [row[:len(s.completions)] for row, s in zip(drawn, sets)]
  order = [packing.order_candidates(
      s, preferred=preferred, top_k=top_k or 1, noise=n)[0]
           for s, n in zip(sets, noise)]
  meta = packing.make_set_batch(
      sets, visits, num_slots=num_slots, order=order, rows=places)
  missing = (batch_size or len(sets)) - len(sets)
  if missing:
    meta = jax.tree.map(
        lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), meta)
    meta = meta._replace(
        multiplicity=np.maximum(meta.multiplicity, 1),
        row=np.where(np.arange(batch_size) < len(sets), meta.row, -1))
  return HostBatch(np.asarray(rows), sets, order, meta)


def behaviour_logps(data: "store.Store", row: int) -> np.ndarray:
  """[K] float32 nats, log-probs of a row's candidates under the law that they
  were drawn from: the record's column of that name, in its order.

  Raises:
    DataError: data.field_missing, data.field_type, data.length_mismatch,
      data.non_finite (truncated sampling gives -inf to what it cuts off), or
      data.completion_too_long: log q is that of the whole completion.
  """
  one, values = data.candidate_set(row), data.columns(row)
  where = f"prompt_id {one.prompt_id}, behaviour_logps"
  values = values.get("behaviour_logps")
  if values is None:
    raise errors.DataError(
        "data.field_missing", "proposal.correction needs the log-prob of every "
        "candidate under the law it was drawn from", where=where,
        want="a list of log-probs in nats, one per completion")
  if not isinstance(values, list) or not all(
      v is None or type(v) in (int, float) for v in values):
    raise errors.DataError("data.field_type", "a field has the wrong type",
                           where=where, want="a list of numbers")
  if len(values) <= one.candidate_ids.max():
    raise errors.DataError(
        "data.length_mismatch", "one number per completion", where=where,
        got=len(values), want=f"at least {one.candidate_ids.max() + 1}")
  logps = np.array(values, np.float32)[one.candidate_ids]
  if not np.isfinite(logps).all():
    raise errors.DataError(
        "data.non_finite", "a log-prob is not finite", where=where,
        got=str(logps[~np.isfinite(logps)][0]),
        hint="candidates of truncated sampling (top-p, top-k) cannot be "
        "corrected")
  if data.truncated(row).any():
    raise errors.DataError(
        "data.completion_too_long", "a completion was cut, its log-prob under "
        "the law it was drawn from was not", where=where,
        hint="raise data.max_completion_length")
  return logps


def sampled_logps(batch: HostBatch, step: int) -> np.ndarray | None:
  """[B, K] float32 nats, the raw policy's log-probs as its sampler gave them.

  None unless the policy after `step` updates wrote every candidate.
  """
  logps = np.zeros(batch.meta.role.shape, np.float32)
  for b, (one, order) in enumerate(zip(batch.sets, batch.order)):
    raw = one.behaviour_raw_logps
    if one.policy_step != step or raw is None or not np.isfinite(raw).all():
      return None
    logps[b, :len(order)] = raw[order]
  return logps
