"""From ragged candidate sets to fixed shapes: SetBatch and streams.

A set's prompt stands once in a stream and its candidates after it; who sees
whom is told by `prompt_slot`, `candidate_slot` and `positions` (types.Streams).
A batch is cut into chunks of a few lengths, as few and as short as hold it.
Sets are placed longest first; what is left of the streams is filled by sets
that are spread over several of them, each with the prompt again.
Pure NumPy; no work per token in Python.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mcpo_jax import errors
from mcpo_jax.types import MISMATCHED_ID, CandidateSet, SetBatch, Streams


def roles(candidate_set: CandidateSet, preferred: int) -> np.ndarray:
  """What each candidate is to the preferred one.

  Args:
    candidate_set: K candidates.
    preferred: index of the preferred one.

  Returns:
    [K] int8: +1 the preferred, -1 strictly below it (or every other one where
    the preferred has no score), 0 level with it, above it, unknown, or written
    for another prompt.
  """
  scores = candidate_set.scores
  if np.isnan(scores[preferred]):
    role = np.full(len(scores), -1, np.int8)
  else:
    role = np.where(scores < scores[preferred], -1, 0).astype(np.int8)
  role[candidate_set.candidate_ids == MISMATCHED_ID] = 0
  role[preferred] = 1
  return role


def order_candidates(
    candidate_set: CandidateSet,
    *,
    preferred: str,
    top_k: int = 1,
    noise: np.ndarray | None = None,
) -> tuple[list[int], np.ndarray]:
  """Puts the preferred candidate first and keeps the others in order.

  Args:
    candidate_set: K candidates.
    preferred: "best", one of the highest score: of equals the lowest candidate
      id, or the one of most noise; "top_k", the one of most noise among the k
      best; "index", the one that the record names. Without any score "best"
      is "index".
    top_k: for "top_k".
    noise: [K] addressed noise, or None.

  Returns:
    order: K candidate indices, the preferred first.
    role: [K] int8 in that order, see `roles`.

  Raises:
    DataError: data.field_missing if the record does not say what is asked.
    ConfigError: config.range for an unknown `preferred`.
  """
  scores = candidate_set.scores
  count = len(scores)
  known = ~np.isnan(scores)
  tie = candidate_set.candidate_ids.astype(np.float64)
  if noise is not None:
    tie = -np.asarray(noise, np.float64)
  if preferred not in ("best", "top_k", "index"):
    raise errors.ConfigError(
        "config.range", "no such way to prefer", where="data.preferred",
        got=preferred, want="best, top_k or index")
  if preferred == "index" or not known.any():
    first = candidate_set.preferred
    if first < 0:
      raise errors.DataError(
          "data.field_missing", "the record names no preferred completion",
          where=f"prompt_id {candidate_set.prompt_id}, preferred",
          hint="set data.preferred to best where there are scores")
  else:
    ranked = np.lexsort((tie, np.where(known, -scores, np.inf)))
    first = int(ranked[0])
    if preferred == "top_k":
      best = ranked[: min(top_k, int(known.sum()))]
      first = int(best[np.lexsort((best, tie[best]))[0]])
  order = [first, *(k for k in range(count) if k != first)]
  return order, roles(candidate_set, first)[order]


def make_set_batch(
    sets: list[CandidateSet],
    visits: np.ndarray,
    *,
    num_slots: int,
    order: list[list[int]],
    rows: np.ndarray | None = None,
) -> SetBatch:
  """Per-set metadata of one batch.

  Args:
    sets: B sets.
    visits: [B] how often each example was seen before.
    num_slots: K, columns of the batch.
    order: for each set the candidate indices that stand in slots 0, 1, ...;
      the preferred first. It may leave candidates out.
    rows: [B] index of each example's own state; None: it has none.

  Returns:
    SetBatch of NumPy arrays [B, K], without anchors.

  Raises:
    ConfigError: config.range if a set has more candidates than slots.
  """
  shape = (len(sets), num_slots)
  role = np.zeros(shape, np.int8)
  mask = np.zeros(shape, bool)
  ids = np.zeros(shape, np.uint32)
  multiplicity = np.ones(shape, np.int32)
  scores = np.full(shape, np.nan, np.float32)
  lengths = np.zeros(shape, np.int32)
  for b, (one, chosen) in enumerate(zip(sets, order, strict=True)):
    if len(chosen) > num_slots:
      raise errors.ConfigError(
          "config.range", "a set has more candidates than slots",
          where=f"prompt_id {one.prompt_id}", got=len(chosen),
          want=f"at most {num_slots}")
    here = np.s_[b, : len(chosen)]
    role[here] = roles(one, chosen[0])[chosen]
    mask[here] = True
    ids[here] = one.candidate_ids[chosen]
    multiplicity[here] = one.multiplicity[chosen]
    scores[here] = one.scores[chosen]
    lengths[here] = [np.count_nonzero(one.completion_masks[k]) for k in chosen]
  return SetBatch(
      role=role, candidate_mask=mask, candidate_id=ids,
      multiplicity=multiplicity, scores=scores, lengths=lengths, anchors={},
      example_id=np.array([s.example_id for s in sets], np.uint32).reshape(
          -1, 2),
      visit=np.asarray(visits, np.int32),
      row=np.full(len(sets), -1, np.int32) if rows is None else np.asarray(
          rows, np.int32))


class _Group(NamedTuple):
  """A prompt and some of its candidates in one stream."""

  chunk: int
  stream: int
  row: int
  slots: list[int]


class _Wanted(NamedTuple):
  """What of a set is to be packed."""

  row: int
  prompt: int  # tokens
  lengths: dict[int, int]  # slot -> tokens

  @property
  def total(self) -> int:
    return self.prompt + sum(self.lengths.values())


def chunk_lengths(stream_length: int) -> tuple[int, ...]:
  """The stream lengths of a run's chunks, the longest first.

  It is halved up to three times, as long as kernels that take 128 tokens at a
  time can fill it.
  """
  halves = [stream_length]
  while len(halves) < 4 and halves[-1] % 256 == 0:
    halves.append(halves[-1] // 2)
  return tuple(halves)


def _chunks_for(
    tokens: int, num_streams: int, lengths: tuple[int, ...]
) -> Iterator[list[int]]:
  """Stream lengths of chunks that have room for `tokens`, in rising size: any
  number of the longest, and each shorter one at most once."""
  most = lengths[0] // lengths[-1]  # units of the shortest
  units = -(-tokens // (num_streams * lengths[-1]))
  while True:
    full, rest = divmod(units, most)
    yield [lengths[0]] * full + [
        x for x in lengths[1:] if rest & x // lengths[-1]]
    units += 1 + units // 64


def _spread(
    one: _Wanted, free: np.ndarray, streams: np.ndarray
) -> dict[int, list[int]] | None:
  """Spreads a set over some streams, with its prompt once in each it uses.

  Args:
    one: the set.
    free: [streams of all chunks] tokens; what is used is taken off.
    streams: indices of those that may be used.

  Returns:
    stream -> slots; None if they cannot hold it, `free` is unchanged then.
  """
  left = free[streams].tolist()
  parts: dict[int, list[int]] = {}
  for k in sorted(one.lengths, key=lambda k: -one.lengths[k]):
    size = one.lengths[k]
    s = next((s for s in parts if left[s] >= size), -1)
    if s < 0:
      s = max((s for s in range(len(left)) if s not in parts),
              key=left.__getitem__, default=-1)
      if s < 0 or left[s] < one.prompt + size:
        return None
      left[s] -= one.prompt
      parts[s] = []
    left[s] -= size
    parts[s].append(k)
  free[streams] = left
  return {int(streams[s]): slots for s, slots in parts.items()}


def _place(
    wanted: list[_Wanted], chunks: list[int], num_streams: int, whole: bool
) -> list[_Group] | None:
  """Gives every candidate a stream of the chunks; None if one finds no place.

  A set goes whole into the fullest stream that takes it, else into one chunk,
  else over all chunks: with `whole` only if no empty chunk could hold it.
  """
  free = np.repeat(chunks, num_streams)
  of_chunk = np.arange(len(free)).reshape(-1, num_streams)
  groups = []
  for one in wanted:
    fits = np.where(free >= one.total, free, np.iinfo(free.dtype).max)
    best = int(fits.argmin())
    if free[best] >= one.total:
      free[best] -= one.total
      parts = {best: list(one.lengths)}
    else:
      where = [c for c in of_chunk if free[c].sum() >= one.total]
      if not whole or _spread(
          one, np.full(num_streams, chunks[0]), of_chunk[0]) is None:
        where.append(of_chunk.reshape(-1))
      tries = (_spread(one, free, streams) for streams in where)
      parts = next((p for p in tries if p is not None), None)
      if parts is None:
        return None
    groups += [_Group(*divmod(s, num_streams), one.row, slots)
               for s, slots in parts.items()]
  return groups


def pack_streams(
    sets: list[CandidateSet],
    slots: list[list[int]],
    order: list[list[int]],
    *,
    num_streams: int,
    stream_length: int,
    pad_id: int,
    whole: bool = False,
) -> list[Streams]:
  """Packs chosen slots of every set into chunks of few shapes.

  Args:
    sets: B sets.
    slots: for each set the slots (columns of the SetBatch) to pack.
    order: for each set the candidate index that stands in each slot.
    num_streams: S of every chunk.
    stream_length: the largest T of a chunk; see `chunk_lengths`.
    pad_id: token on padding; masks never depend on it.
    whole: a set lies in one chunk unless an empty one cannot hold it.

  Returns:
    Chunks [S, T]; row b of `sets` is `prompt_slot` b.

  Raises:
    ConfigError: config.length if a prompt with one completion is longer than a
      stream.
  """
  wanted = []
  for b, (one, chosen) in enumerate(zip(sets, slots, strict=True)):
    lengths = {k: len(one.completions[order[b][k]]) for k in chosen}
    if not lengths:
      continue
    longest = len(one.prompt) + max(lengths.values())
    if longest > stream_length:
      raise errors.ConfigError(
          "config.length", "a prompt with its completion is longer than a "
          "stream", where=f"prompt_id {one.prompt_id}", got=longest,
          want=f"at most {stream_length}",
          hint="raise the stream length, or lower data.max_prompt_length or "
          "data.max_completion_length")
    wanted.append(_Wanted(b, len(one.prompt), lengths))
  wanted.sort(key=lambda w: (-w.total, w.row))
  total, few = sum(one.total for one in wanted), chunk_lengths(stream_length)
  for chunks in _chunks_for(total, num_streams, few):
    groups = _place(wanted, chunks, num_streams, whole)
    if groups is not None:
      break

  # The chunks one behind the other: where each stream begins, and its length.
  length_of = np.repeat(np.array(chunks, int), num_streams)
  start_of = np.cumsum(length_of) - length_of
  pieces, masks, segments = [], [], []
  used = start_of.copy()
  for group in groups:
    one = sets[group.row]
    stream = group.chunk * num_streams + group.stream
    start, size = int(used[stream]), len(one.prompt)
    pieces.append(one.prompt)
    masks.append(np.zeros(size, bool))
    # row, slot, length, first place, first position, source of the first token,
    # all places counted from the first stream's beginning; and the stream
    segments.append((group.row, -1, size, start, 0, start, stream))
    place, source = start + size, start + size - 1
    for k in group.slots:
      tokens = one.completions[order[group.row][k]]
      pieces.append(tokens)
      masks.append(one.completion_masks[order[group.row][k]])
      segments.append((group.row, k, len(tokens), place, size, source, stream))
      place += len(tokens)
    used[stream] = place

  size = int(length_of.sum())
  out = Streams(
      tokens=np.full(size, pad_id, np.int32),
      positions=np.zeros(size, np.int32),
      prompt_slot=np.full(size, -1, np.int32),
      candidate_slot=np.full(size, -1, np.int32),
      completion_mask=np.zeros(size, bool),
      source=np.zeros(size, np.int32))
  if segments:
    row, slot, length, first, position, source, stream = np.array(segments).T
    begin = np.cumsum(length) - length
    within = np.arange(length.sum()) - np.repeat(begin, length)
    where = np.repeat(first, length) + within
    previous = where - 1
    previous[begin[length > 0]] = source[length > 0]
    out.tokens[where] = np.concatenate(pieces)
    out.positions[where] = np.repeat(position, length) + within
    out.prompt_slot[where] = np.repeat(row, length)
    out.candidate_slot[where] = np.repeat(slot, length)
    out.completion_mask[where] = np.concatenate(masks)
    out.source[where] = previous - np.repeat(start_of[stream], length)
  ends = itertools.accumulate(num_streams * n for n in chunks)
  return [
      Streams(*(x[end - num_streams * n:end].reshape(num_streams, n)
                for x in out))
      for n, end in zip(chunks, ends)]


def pad_fraction(chunks: list[Streams]) -> float:
  """Share of token slots that hold nothing."""
  total = sum(chunk.tokens.size for chunk in chunks)
  used = sum(np.count_nonzero(chunk.prompt_slot >= 0) for chunk in chunks)
  return 1.0 - used / total if total else 0.0
