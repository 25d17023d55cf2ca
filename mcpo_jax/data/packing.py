"""From ragged candidate sets to fixed shapes: SetBatch and streams.

A set's prompt stands once in a stream and its candidates after it; who sees
whom is told by `prompt_slot`, `candidate_slot` and `positions` (types.Streams).
Sets are placed longest first; what is left of the streams is filled by sets
that are spread over several streams of one chunk, each with the prompt again.
Pure NumPy; no work per token in Python.
"""

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


def _spread(
    prompt: int, slots: list[int], lengths: dict[int, int], room: list[int]
) -> tuple[dict[int, list[int]], list[int]]:
  """Spreads a set over the room of a chunk's streams, `room` is used up.

  Whole into the first stream where it fits; else longest candidate first, with
  the prompt once in every stream that is used.

  Returns:
    (stream -> slots, slots that found no place).
  """
  total = prompt + sum(lengths[k] for k in slots)
  for s, free in enumerate(room):
    if total <= free:
      room[s] -= total
      return {s: list(slots)}, []
  parts: dict[int, list[int]] = {}
  rest = []
  for k in sorted(slots, key=lambda k: -lengths[k]):
    s = next((s for s in parts if room[s] >= lengths[k]), -1)
    if s < 0:
      s = max((s for s in range(len(room)) if s not in parts),
              key=room.__getitem__, default=-1)
      if s < 0 or room[s] < prompt + lengths[k]:
        rest.append(k)
        continue
      room[s] -= prompt
      parts[s] = []
    room[s] -= lengths[k]
    parts[s].append(k)
  return parts, rest


def _assign(
    wanted: list[tuple[int, int, list[int], dict[int, int]]],
    num_streams: int,
    stream_length: int,
) -> tuple[list[_Group], int]:
  """Gives every candidate a stream.

  Args:
    wanted: (row, prompt length, slots, length of each slot) of every set.
    num_streams, stream_length: of a chunk.

  Returns:
    (groups, number of chunks). A set lies in one chunk unless an empty chunk
    cannot hold it.
  """
  rooms: list[list[int]] = []
  groups: list[_Group] = []

  def put(chunk, row, parts):
    groups.extend(_Group(chunk, s, row, k) for s, k in parts.items())

  for row, prompt, slots, lengths in sorted(
      wanted, key=lambda w: (-w[1] - sum(w[3].values()), w[0])):
    total = prompt + sum(lengths.values())
    fits = sorted(range(len(rooms)), key=lambda c: max(rooms[c]) < total)
    for chunk in fits:  # those that take it whole come first
      room = list(rooms[chunk])
      parts, rest = _spread(prompt, slots, lengths, room)
      if not rest:
        rooms[chunk] = room
        put(chunk, row, parts)
        break
    else:
      rest = slots
      while rest:
        rooms.append([stream_length] * num_streams)
        parts, rest = _spread(prompt, rest, lengths, rooms[-1])
        put(len(rooms) - 1, row, parts)
  return groups, len(rooms)


def pack_streams(
    sets: list[CandidateSet],
    slots: list[list[int]],
    order: list[list[int]],
    *,
    num_streams: int,
    stream_length: int,
    pad_id: int,
) -> list[Streams]:
  """Packs chosen slots of every set into chunks of one shape.

  Args:
    sets: B sets.
    slots: for each set the slots (columns of the SetBatch) to pack.
    order: for each set the candidate index that stands in each slot.
    num_streams, stream_length: S and T of every chunk.
    pad_id: token on padding; masks never depend on it.

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
    wanted.append((b, len(one.prompt), list(chosen), lengths))
  groups, num_chunks = _assign(wanted, num_streams, stream_length)

  pieces, masks, segments = [], [], []
  used = np.zeros((num_chunks, num_streams), int)
  for group in groups:
    one = sets[group.row]
    base = (group.chunk * num_streams + group.stream) * stream_length
    start = base + int(used[group.chunk, group.stream])
    size = len(one.prompt)
    pieces.append(one.prompt)
    masks.append(np.zeros(size, bool))
    # row, slot, length, first place, first position, source of the first token
    segments.append((group.row, -1, size, start, 0, start))
    place, source = start + size, start + size - 1
    for k in group.slots:
      tokens = one.completions[order[group.row][k]]
      pieces.append(tokens)
      masks.append(one.completion_masks[order[group.row][k]])
      segments.append((group.row, k, len(tokens), place, size, source))
      place += len(tokens)
    used[group.chunk, group.stream] = place - base

  shape = (num_chunks, num_streams, stream_length)
  out = Streams(
      tokens=np.full(shape, pad_id, np.int32),
      positions=np.zeros(shape, np.int32),
      prompt_slot=np.full(shape, -1, np.int32),
      candidate_slot=np.full(shape, -1, np.int32),
      completion_mask=np.zeros(shape, bool),
      source=np.zeros(shape, np.int32))
  if segments:
    row, slot, length, first, position, source = np.array(segments).T
    begin = np.cumsum(length) - length
    within = np.arange(length.sum()) - np.repeat(begin, length)
    where = np.repeat(first, length) + within
    previous = where - 1
    previous[begin[length > 0]] = source[length > 0]
    flat = [field.reshape(-1) for field in out]
    flat[0][where] = np.concatenate(pieces)
    flat[1][where] = np.repeat(position, length) + within
    flat[2][where] = np.repeat(row, length)
    flat[3][where] = np.repeat(slot, length)
    flat[4][where] = np.concatenate(masks)
    flat[5][where] = previous % stream_length
  return [Streams(*(field[c] for field in out)) for c in range(num_chunks)]


def pad_fraction(chunks: list[Streams]) -> float:
  """Share of token slots that hold nothing."""
  total = sum(chunk.tokens.size for chunk in chunks)
  used = sum(np.count_nonzero(chunk.prompt_slot >= 0) for chunk in chunks)
  return 1.0 - used / total if total else 0.0
