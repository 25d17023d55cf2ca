"""One optimizer batch on the host: which sets, in which slots, with which
anchors. A batch is a function of (seed, step) alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mcpo_jax import types
from mcpo_jax.data import batches, packing, store
from mcpo_jax.kernels import address
from mcpo_jax.training import reference


class HostBatch(NamedTuple):
  """B sets as the host holds them."""

  rows: np.ndarray  # [B] row of the store
  sets: list[types.CandidateSet]
  order: list[np.ndarray]  # slot -> candidate of the record
  meta: types.SetBatch  # [B, K] numpy


@jax.jit
def _preferred_noise(seed, sets):
  return address.gumbel(
      jax.random.key(seed), sets, purpose=address.DRAW_PREFERRED)


def make_batch_fn(
    data: store.Store,
    rows: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    num_slots: int,
    preferred: str,
    top_k: int | None,
    cache: reference.ReferenceCache | None,
) -> Callable[[int], HostBatch]:
  """Returns step -> HostBatch over `rows` of the store, in an order of its own
  for every visit. `cache` fills anchors["ref"]."""

  def make_batch(step: int) -> HostBatch:
    picked, visits = batches.example_indices(
        step, batch_size=batch_size, num_examples=len(rows), seed=seed)
    return collect(data, rows[picked], visits, seed=seed, num_slots=num_slots,
                   preferred=preferred, top_k=top_k, cache=cache)

  return make_batch


def collect(
    data: store.Store,
    rows: np.ndarray,
    visits: np.ndarray,
    *,
    seed: int,
    num_slots: int,
    preferred: str,
    top_k: int | None,
    cache: reference.ReferenceCache | None,
    batch_size: int | None = None,
) -> HostBatch:
  """The HostBatch of given rows; padded with empty rows up to `batch_size`."""
  sets = [data.candidate_set(int(row)) for row in rows]
  noise = [None] * len(sets)
  if preferred == "top_k":
    plain = [np.arange(len(s.completions)) for s in sets]
    noise = _by_candidate(
        _preferred_noise(
            seed, packing.make_set_batch(
                sets, visits, num_slots=num_slots, order=plain)), sets)
  order = [packing.order_candidates(s, preferred=preferred, top_k=top_k, noise=n)
           for s, n in zip(sets, noise)]
  meta = packing.make_set_batch(sets, visits, num_slots=num_slots, order=order)
  if cache is not None:
    anchor = np.zeros(meta.role.shape, np.float32)
    for b, (row, slots) in enumerate(zip(rows, order)):
      anchor[b, :len(slots)] = cache.logps(int(row))[slots]
    meta = meta._replace(anchors={"ref": anchor})
  missing = (batch_size or len(sets)) - len(sets)
  if missing:
    meta = jax.tree.map(
        lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), meta)
    meta = meta._replace(multiplicity=np.maximum(meta.multiplicity, 1))
  return HostBatch(np.asarray(rows), sets, order, meta)


def _by_candidate(noise, sets) -> list[np.ndarray]:
  return [row[:len(s.completions)] for row, s in zip(np.asarray(noise), sets)]
