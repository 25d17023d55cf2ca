"""Packing: whom a token sees, what fits where, roles and ties."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcpo_jax import errors
from mcpo_jax.data import packing
from mcpo_jax.types import CandidateSet

B, S, T = 5, 3, 32


def make_set(seed, num_candidates=4, prompt=6, longest=9, scores=None,
             preferred=-1):
  rng = np.random.default_rng(seed)
  completions = [rng.integers(1, 99, n).astype(np.int32)
                 for n in rng.integers(1, longest + 1, num_candidates)]
  masks = [np.ones(len(c), bool) for c in completions]
  masks[0][0] = len(masks[0]) == 1
  if scores is None:
    scores = rng.integers(0, 3, num_candidates)
  return CandidateSet(
      np.array([seed, 7], np.uint32), f"p{seed}",
      rng.integers(1, 99, prompt).astype(np.int32), completions, masks,
      np.arange(num_candidates, dtype=np.uint32) + 10,
      np.ones(num_candidates, np.int32), np.array(scores, np.float32),
      preferred)


def pack(sets, order=None, slots=None, num_streams=S, stream_length=T):
  order = order or [list(range(len(s.completions))) for s in sets]
  slots = slots or [list(range(len(o))) for o in order]
  return packing.pack_streams(
      sets, slots, order, num_streams=num_streams, stream_length=stream_length,
      pad_id=0), order, slots


def visible(stream):
  """[T, T] bool by the rule of types.Streams, written out."""
  size = len(stream["tokens"])
  out = np.zeros((size, size), bool)
  for i in range(size):
    for j in range(size):
      out[i, j] = (
          stream["prompt_slot"][i] >= 0
          and stream["prompt_slot"][i] == stream["prompt_slot"][j]
          and stream["candidate_slot"][j] in (-1, stream["candidate_slot"][i])
          and stream["positions"][j] <= stream["positions"][i])
  return out


def streams_of(chunks):
  for chunk in chunks:
    for s in range(len(chunk.tokens)):
      yield {name: field[s] for name, field in chunk._asdict().items()}


def check_whole(sets, order, slots, chunks):
  """Every chosen candidate stands once, after its prompt, and sees it all."""
  found = set()
  for stream in streams_of(chunks):
    seen = visible(stream)
    for b, k in {(b, k) for b, k in zip(
        stream["prompt_slot"].tolist(), stream["candidate_slot"].tolist())
        if k >= 0}:
      assert (b, k) not in found
      found.add((b, k))
      one, index = sets[b], order[b][k]
      here = np.flatnonzero(
          (stream["prompt_slot"] == b) & (stream["candidate_slot"] == k))
      np.testing.assert_array_equal(
          stream["tokens"][here], one.completions[index])
      np.testing.assert_array_equal(
          stream["completion_mask"][here], one.completion_masks[index])
      keys = np.flatnonzero(seen[here[-1]])
      np.testing.assert_array_equal(
          stream["tokens"][keys],
          np.concatenate([one.prompt, one.completions[index]]))
      np.testing.assert_array_equal(
          stream["positions"][keys], np.arange(len(keys)))
      assert (keys <= here[-1]).all()
      # each token is predicted from the one before it in this order
      before = keys[-len(here) - 1 : -1]
      np.testing.assert_array_equal(stream["source"][here], before)
  assert found == {(b, k) for b, chosen in enumerate(slots) for k in chosen}


def test_a_small_chunk_by_hand():
  one = CandidateSet(
      np.zeros(2, np.uint32), "p", np.array([11, 12], np.int32),
      [np.array([21, 22, 23], np.int32), np.array([31], np.int32)],
      [np.ones(3, bool), np.ones(1, bool)], np.arange(2, dtype=np.uint32),
      np.ones(2, np.int32), np.array([0.0, 1.0], np.float32), -1)
  [chunk], _, _ = pack([one], order=[[1, 0]], num_streams=2, stream_length=8)
  assert chunk.tokens.tolist() == [[11, 12, 31, 21, 22, 23, 0, 0], [0] * 8]
  assert chunk.positions[0].tolist() == [0, 1, 2, 2, 3, 4, 0, 0]
  assert chunk.prompt_slot[0].tolist() == [0] * 6 + [-1, -1]
  assert chunk.candidate_slot[0].tolist() == [-1, -1, 0, 1, 1, 1, -1, -1]
  assert chunk.source[0, 2:6].tolist() == [1, 1, 3, 4]
  assert chunk.completion_mask[0].tolist() == [False] * 2 + [True] * 4 + (
      [False] * 2)
  assert packing.pad_fraction([chunk]) == 10 / 16


def test_every_candidate_sees_its_prompt_and_itself_only():
  sets = [make_set(i, num_candidates=2 + i) for i in range(B)]
  chunks, order, slots = pack(sets)
  check_whole(sets, order, slots, chunks)


def test_only_the_chosen_slots_are_packed():
  sets = [make_set(i) for i in range(B)]
  order = [[2, 0, 3, 1]] * B
  slots = [[0, 2], [0], [], [0, 1, 3], [3]]
  chunks, _, _ = pack(sets, order, slots)
  check_whole(sets, order, slots, chunks)


def test_a_set_too_large_for_a_stream_continues_with_its_prompt():
  sets = [make_set(0, num_candidates=7, prompt=8, longest=12), make_set(1)]
  chunks, order, slots = pack(sets, num_streams=4)
  check_whole(sets, order, slots, chunks)
  assert len(chunks) == 1  # all its streams lie together
  starts = sum(int(((s["prompt_slot"] == 0) & (s["positions"] == 0)
                    & (s["candidate_slot"] < 0)).sum())
               for s in streams_of(chunks))
  assert starts > 1


def test_a_set_too_large_for_a_chunk_spills_over():
  sets = [make_set(3, num_candidates=19, prompt=8, longest=12)]
  chunks, order, slots = pack(sets, num_streams=2)
  assert len(chunks) > 1
  check_whole(sets, order, slots, chunks)


def test_chunks_have_one_shape_and_padding_belongs_to_nobody():
  chunks, _, _ = pack([make_set(i, num_candidates=6) for i in range(B)])
  for chunk in chunks:
    assert {field.shape for field in chunk} == {(S, T)}
    empty = chunk.prompt_slot < 0
    assert (chunk.candidate_slot[empty] == -1).all()
    assert not chunk.completion_mask[empty].any()
    assert ((chunk.source >= 0) & (chunk.source < T)).all()


def test_a_pad_id_that_occurs_in_the_text_changes_no_mask():
  sets = [make_set(i) for i in range(B)]
  order = [list(range(4))] * B
  pads = [packing.pack_streams(
      sets, order, order, num_streams=S, stream_length=T, pad_id=p)
      for p in (0, int(sets[0].prompt[0]))]
  for a, b in zip(*pads):
    for name in ("positions", "prompt_slot", "candidate_slot", "source",
                 "completion_mask"):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_completion_longer_than_a_stream_is_a_config_error():
  with pytest.raises(errors.ConfigError) as e:
    pack([make_set(0, prompt=30, longest=9)])
  assert e.value.slug == "config.length"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12),
                          st.integers(1, 20)), min_size=1, max_size=7),
       st.integers(1, 4))
def test_any_mixture_is_packed_whole(shapes, num_streams):
  sets = [make_set(i, num_candidates=k, prompt=p, longest=c)
          for i, (k, p, c) in enumerate(shapes)]
  chunks, order, slots = pack(sets, num_streams=num_streams)
  check_whole(sets, order, slots, chunks)


def lognormal_sets(rng, number, num_candidates):
  """Prompts of 200 and completions of 231 tokens on average, 512 at most."""
  draw = lambda mean, low, size: np.clip(np.round(rng.lognormal(
      np.log(mean) - 0.7**2 / 2, 0.7, size)), low, 512).astype(int)
  zeros = lambda n: np.zeros(n, np.int32)
  return [
      CandidateSet(
          np.zeros(2, np.uint32), "p", zeros(p), list(map(zeros, cs)),
          [np.ones(c, bool) for c in cs],
          np.arange(num_candidates, dtype=np.uint32),
          np.ones(num_candidates, np.int32), np.zeros(num_candidates), 0)
      for p, cs in zip(draw(200, 8, number),
                       draw(250, 4, (number, num_candidates)))]


@pytest.mark.parametrize("batch, candidates, num_streams, most", [
    (4, 2, 1, 0.15), (4, 9, 1, 0.15), (48, 2, 1, 0.05), (16, 17, 2, 0.05)])
def test_few_shapes_hold_little_padding(batch, candidates, num_streams, most):
  rng, shapes, pads = np.random.default_rng(batch), set(), []
  for _ in range(20):
    sets = lognormal_sets(rng, batch, candidates)
    chunks, _, _ = pack(sets, num_streams=num_streams, stream_length=2048)
    shapes |= {chunk.tokens.shape for chunk in chunks}
    slots = sum(chunk.tokens.size for chunk in chunks)
    pads.append((packing.pad_fraction(chunks) * slots, slots))
  assert len(shapes) <= 4
  padding, slots = np.sum(pads, axis=0)
  assert padding / slots <= most


def test_a_whole_set_stays_in_one_chunk_and_is_cut_only_if_it_must_be():
  rng = np.random.default_rng(3)
  sets = lognormal_sets(rng, 12, 5)
  for whole in (True, False):
    order = [list(range(5))] * 12
    chunks = packing.pack_streams(
        sets, order, order, num_streams=2, stream_length=2048, pad_id=0,
        whole=whole)
    homes = sum(np.isin(np.arange(12), chunk.prompt_slot) for chunk in chunks)
    assert homes.min() == 1 and (homes.max() == 1) == whole
  order = [list(range(40))]
  chunks = packing.pack_streams(
      lognormal_sets(rng, 1, 40), order, order, num_streams=2,
      stream_length=2048, pad_id=0, whole=True)
  assert len(chunks) > 1


def test_chunks_of_several_lengths_hold_every_candidate():
  sets = [make_set(i, num_candidates=6, prompt=9, longest=30) for i in range(7)]
  chunks, order, slots = pack(sets, num_streams=1, stream_length=1024)
  assert len({chunk.tokens.shape for chunk in chunks}) > 1
  check_whole(sets, order, slots, chunks)


def test_packing_is_tight_and_quick():
  sets = [make_set(i, num_candidates=8, prompt=20 + i, longest=60)
          for i in range(16)]
  pack(sets, num_streams=8, stream_length=512)
  start = time.process_time()  # others may use the machine
  for _ in range(10):
    chunks, _, _ = pack(sets, num_streams=4, stream_length=256)
  assert (time.process_time() - start) / 10 < 0.02
  used = sum(len(s.prompt) + sum(map(len, s.completions)) for s in sets)
  assert len(chunks) <= 1 + used * 1.25 // (4 * 256)


# Order and roles.


def test_the_best_comes_first_and_of_equals_the_lowest_id():
  one = make_set(0, scores=[0.5, 2, 1, 2])
  order, role = packing.order_candidates(one, preferred="best")
  assert order == [1, 0, 2, 3]
  assert role.tolist() == [1, -1, -1, 0]  # the tied one is no negative


def test_noise_decides_between_equals_only():
  one = make_set(0, scores=[0.5, 2, 1, 2])
  order, _ = packing.order_candidates(
      one, preferred="best", noise=np.array([9.0, 0.0, 9.0, 1.0]))
  assert order == [3, 0, 1, 2]


def test_top_k_is_drawn_by_noise_and_those_above_are_no_negatives():
  one = make_set(0, scores=[0, 3, 1, 2])
  draw = lambda noise: packing.order_candidates(
      one, preferred="top_k", top_k=3, noise=np.array(noise))
  order, role = draw([9.0, 0.0, 5.0, 1.0])
  assert order == [2, 0, 1, 3]
  assert role.tolist() == [1, -1, 0, 0]
  assert draw([9.0, 6.0, 5.0, 1.0])[0][0] == 1


def test_with_an_index_only_all_others_are_negatives():
  one = make_set(0, scores=[np.nan] * 4, preferred=2)
  for preferred in ("index", "best"):
    order, role = packing.order_candidates(one, preferred=preferred)
    assert order == [2, 0, 1, 3]
    assert role.tolist() == [1, -1, -1, -1]


def test_an_index_with_scores_keeps_ties_out():
  one = make_set(0, scores=[1, 0, 1, 2], preferred=0)
  order, role = packing.order_candidates(one, preferred="index")
  assert order == [0, 1, 2, 3]
  assert role.tolist() == [1, -1, 0, 0]


def test_asking_for_an_index_that_is_not_there_is_an_error():
  with pytest.raises(errors.DataError):
    packing.order_candidates(make_set(0), preferred="index")
  with pytest.raises(errors.ConfigError):
    packing.order_candidates(make_set(0), preferred="worst")


def test_set_batch_holds_metadata_by_slot():
  sets = [make_set(i, num_candidates=3 + i % 2) for i in range(B)]
  sets[1] = sets[1]._replace(multiplicity=np.array([1, 3, 2, 1], np.int32))
  order = [packing.order_candidates(s, preferred="best")[0] for s in sets]
  visits = np.arange(B)
  batch = packing.make_set_batch(sets, visits, num_slots=6, order=order)
  assert {f.shape for f in batch[:6]} == {(B, 6)}
  for b, (one, chosen) in enumerate(zip(sets, order)):
    k = len(chosen)
    assert batch.candidate_mask[b].tolist() == [True] * k + [False] * (6 - k)
    assert batch.role[b, 0] == 1 and not batch.role[b, k:].any()
    np.testing.assert_array_equal(
        batch.candidate_id[b, :k], one.candidate_ids[chosen])
    np.testing.assert_array_equal(batch.scores[b, :k], one.scores[chosen])
    np.testing.assert_array_equal(
        batch.multiplicity[b, :k], one.multiplicity[chosen])
    assert batch.lengths[b, :k].tolist() == [
        int(one.completion_masks[i].sum()) for i in chosen]
    worse = one.scores[chosen] < one.scores[chosen[0]]
    np.testing.assert_array_equal(batch.role[b, :k] == -1, worse)
  assert np.isnan(batch.scores[~batch.candidate_mask]).all()
  assert (batch.multiplicity >= 1).all()
  np.testing.assert_array_equal(batch.visit, visits)
  np.testing.assert_array_equal(batch.example_id[:, 0], np.arange(B))
  assert batch.anchors == {}


def test_more_candidates_than_slots_are_refused():
  make = lambda num_slots: packing.make_set_batch(
      [make_set(0)], [0], num_slots=num_slots, order=[[0, 1, 2, 3]])
  assert make(4).candidate_mask.all()
  with pytest.raises(errors.ConfigError):
    make(3)
