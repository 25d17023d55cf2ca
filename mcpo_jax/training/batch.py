"""One optimizer batch on the host: which sets, in which slots. A batch is a
function of (seed, step) alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from mcpo_jax import types
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
) -> Callable[[int], HostBatch]:
  """Returns step -> HostBatch over `rows` of the store, in an order of its own
  for every visit."""

  def make_batch(step: int) -> HostBatch:
    picked, visits = batches.example_indices(
        step, batch_size=batch_size, num_examples=len(rows), seed=seed)
    return collect(data, rows[picked], visits, seed=seed, num_slots=num_slots,
                   preferred=preferred, top_k=top_k)

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
    batch_size: int | None = None,
) -> HostBatch:
  """The HostBatch of given rows; padded with empty rows up to `batch_size`."""
  sets = [data.candidate_set(int(row)) for row in rows]
  noise = [None] * len(sets)
  if preferred == "top_k":
    plain = [list(range(len(s.completions))) for s in sets]
    drawn = np.asarray(_preferred_noise(seed, packing.make_set_batch(
        sets, visits, num_slots=num_slots, order=plain)))
    noise = [row[:len(s.completions)] for row, s in zip(drawn, sets)]
  order = [packing.order_candidates(
      s, preferred=preferred, top_k=top_k or 1, noise=n)[0]
           for s, n in zip(sets, noise)]
  meta = packing.make_set_batch(sets, visits, num_slots=num_slots, order=order)
  missing = (batch_size or len(sets)) - len(sets)
  if missing:
    meta = jax.tree.map(
        lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), meta)
    meta = meta._replace(multiplicity=np.maximum(meta.multiplicity, 1))
  return HostBatch(np.asarray(rows), sets, order, meta)
