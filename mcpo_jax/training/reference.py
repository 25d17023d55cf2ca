"""The reference cache: per-token log-probs of a fixed policy, on disk.

One folder per (weights, model config, compute dtype, tokenised data); rows in
store order, in shards of a fixed number of rows, each committed on its own, so
that filling resumes where it stopped and may be done ahead of training.

  <folder>/<first row, 8 digits>/token_logps.npy  [tokens] float32
                                 sums.npy         [candidates] float32
                                 starts.npy       [rows + 1, 2] int64, where a
                                                  row's candidates, tokens begin
"""

import pathlib
from collections.abc import Callable

import numpy as np
from absl import logging

from mcpo_jax import commit, errors, faults, hosts, types, watch
from mcpo_jax.training import batch as batch_lib

ROWS_PER_SHARD = 256


def score_sets(
    sets: list[types.CandidateSet],
    token_logps: Callable[[types.Streams], np.ndarray],
    pack: Callable[..., list[types.Streams]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Per-token log-probs of every candidate, in order of set, candidate, token.

  Args:
    sets: R sets.
    token_logps: streams -> [S, T] float32, 0 on tokens that are not scored.
    pack: (sets, slots, order) -> chunks of streams.

  Returns:
    tokens [all completion tokens] float32, sums [all candidates] float32, and
    starts [R + 1, 2] int64: where a set's candidates and tokens begin.
  """
  counts = [len(s.completions) for s in sets]
  lengths = [len(c) for s in sets for c in s.completions]
  token_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  candidate_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
  tokens = np.zeros(token_start[-1], np.float32)
  order = [np.arange(n) for n in counts]
  prompt_lengths = np.array([len(s.prompt) for s in sets])
  for chunk in pack(sets, [list(range(n)) for n in counts], order):
    values = token_logps(chunk)
    here = chunk.candidate_slot >= 0
    row = chunk.prompt_slot[here]
    candidate = candidate_start[row] + chunk.candidate_slot[here]
    offset = chunk.positions[here] - prompt_lengths[row]
    tokens[token_start[candidate] + offset] = values[here]
  sums = np.add.reduceat(
      np.append(tokens, 0).astype(np.float64), token_start[:-1])
  sums[np.diff(token_start) == 0] = 0  # reduceat does not know empty runs
  starts = np.stack([candidate_start, token_start[candidate_start]], axis=1)
  return tokens, sums.astype(np.float32), starts


class ReferenceCache:
  """Committed shards of one folder, memory-mapped. Row i is row i of the
  store."""

  def __init__(self, folder: pathlib.Path, num_rows: int):
    """Verifies what is there.

    Raises:
      CheckpointError: a shard's content does not match its manifest;
        ckpt.unsafe_format, it holds no plain arrays.
      DataError: data.ref_cache, a log-prob is not finite, or a shard holds
        other rows than it should.
    """
    self._folder = pathlib.Path(folder)
    self._num_rows = num_rows
    self._shards: dict[int, tuple[np.ndarray, ...]] = {}
    if hosts.apart():
      told = hosts.gather("reference log-probs", self._committed())
    else:
      told = [hosts.from_first("reference log-probs", self._committed)]
    for first, digest in told[0].items():
      # Of another run on another mesh they may differ in the last bits.
      if all(other.get(first) == digest for other in told):
        self._open(int(first))

  def _committed(self) -> dict[str, str]:
    """First row -> hash of the shards that are there, verified."""
    there = [self._folder / f"{first:08d}"
             for first in range(0, self._num_rows, ROWS_PER_SHARD)
             if (self._folder / f"{first:08d}").exists()]
    for shard in there:
      commit.verify(shard)
    return {shard.name: commit.file_sha256(shard / commit.MANIFEST)
            for shard in there}

  def _open(self, first: int) -> None:
    shard = self._folder / f"{first:08d}"
    try:
      arrays = tuple(np.load(shard / f"{name}.npy", mmap_mode="r")
                     for name in ("token_logps", "sums", "starts"))
    except ValueError as e:  # of pickled objects, which are never loaded
      raise errors.CheckpointError(
          "ckpt.unsafe_format", str(e), where=str(shard)) from None
    if not np.isfinite(arrays[1]).all():
      raise errors.DataError(
          "data.ref_cache", "a log-prob is not finite", where=str(shard),
          hint="delete the folder: it is filled anew")
    tokens, sums, starts = arrays
    rows = min(ROWS_PER_SHARD, self._num_rows - first)
    if len(starts) != rows + 1 or list(starts[-1]) != [len(sums), len(tokens)]:
      raise errors.DataError(
          "data.ref_cache", "a shard holds other rows", where=str(shard),
          got=f"{len(starts) - 1} rows", want=f"{rows} rows",
          hint="delete the folder: it is filled anew")
    self._shards[first] = arrays

  @property
  def missing(self) -> list[int]:
    """First rows of the shards still to be filled, ascending."""
    return [first for first in range(0, self._num_rows, ROWS_PER_SHARD)
            if first not in self._shards]

  def fill(
      self,
      candidate_set: Callable[[int], types.CandidateSet],
      token_logps: Callable[[types.Streams], np.ndarray],
      pack: Callable[..., list[types.Streams]],
      progress: Callable[[list[int]], list[int]] = lambda x: x,
  ) -> None:
    """Scores and commits the missing shards, one after the other."""
    for first in progress(self.missing):
      rows = range(first, min(first + ROWS_PER_SHARD, self._num_rows))
      with watch.phase("work", f"reference log-probs of {rows}"):
        tokens, sums, starts = score_sets(
            [candidate_set(i) for i in rows], token_logps, pack)
      if not np.isfinite(sums).all():
        raise errors.NonFiniteError(
            "model.non_finite", "the reference gave a log-prob that is not "
            "finite", where=f"rows {rows.start}..{rows.stop - 1}")

      def write(folder, arrays=(tokens, sums, starts)):
        for name, array in zip(("token_logps", "sums", "starts"), arrays):
          np.save(folder / f"{name}.npy", array)

      faults.point("reference.shard")
      commit.write_folder(self._folder / f"{first:08d}", write,
                          {"first_row": first, "rows": len(rows)},
                          replace=hosts.apart())
      hosts.wait_for_first("reference log-probs")
      self._open(first)

  def logps(self, row: int) -> np.ndarray:
    """[K] float32, summed over scored tokens, candidates in record order."""
    first = row - row % ROWS_PER_SHARD
    _, sums, starts = self._shards[first]
    return sums[starts[row - first, 0]:starts[row - first + 1, 0]]

  def anchor(self, batch: batch_lib.HostBatch) -> np.ndarray:
    """[B, K] float32 log-probs of a batch, 0 where there is no candidate."""
    out = np.zeros(batch.meta.role.shape, np.float32)
    for b, (row, slots) in enumerate(zip(batch.rows, batch.order)):
      out[b, :len(slots)] = self.logps(int(row))[slots]
    return out

  def token_logps(self, row: int) -> np.ndarray:
    """[tokens of all candidates of the row] float32."""
    first = row - row % ROWS_PER_SHARD
    tokens, _, starts = self._shards[first]
    return tokens[starts[row - first, 1]:starts[row - first + 1, 1]]


def check_start(
    cache: ReferenceCache,
    batch: batch_lib.HostBatch,
    token_logps: Callable[[types.Streams], np.ndarray],
    pack: Callable[..., list[types.Streams]],
    *,
    tolerance: float,
) -> float:
  """Start gate: policy and reference are the same weights, so must agree.

  Returns:
    The largest difference of a token's log-prob, in nats.

  Raises:
    CheckpointError: ckpt.reference_gate, the difference exceeds `tolerance`.
  """
  tokens, _, starts = score_sets(batch.sets, token_logps, pack)
  gaps = [np.abs(tokens[a:b] - cache.token_logps(int(row))).max(initial=0.0)
          for row, a, b in zip(batch.rows, starts[:-1, 1], starts[1:, 1])]
  gap = float(np.max(gaps))
  if not gap <= tolerance:
    raise errors.CheckpointError(
        "ckpt.reference_gate", "policy and reference are the same weights, but "
        "their log-probs differ",
        where=f"prompt_id {batch.sets[int(np.argmax(gaps))].prompt_id}",
        got=gap, want=f"<= {tolerance} nats a token",
        hint="the reference cache belongs to another code or hardware; delete "
        "it to fill it anew")
  logging.info("start gate: largest difference %.2g nats a token", gap)
  return gap
