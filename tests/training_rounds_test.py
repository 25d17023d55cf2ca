"""Rounds: when they are made and by whom, what they hold, what is refused."""

import functools
import json
import shutil
import threading

import disk_bucket  # noqa: F401
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax import errors, types
from mcpo_jax.training import alarms, batch, candidates
from mcpo_jax.training import rounds as rounds_lib
from mcpo_jax.training import step as step_lib
from mcpo_jax.training.candidates import Candidate

PROMPTS, STEPS, BATCH, SLOTS = 6, 3, 2, 5


def plan(**changes):
  return rounds_lib.Plan(**dict(
      num_prompts=PROMPTS, num_steps=STEPS, num_rounds=4, lag=0, replay=0,
      ema_decay=None, extrapolation=0.0) | changes)


def record(row):
  return types.CandidateSet(
      example_id=np.array([row, 9 * row], np.uint32), prompt_id=f"p{row}",
      prompt=np.arange(row + 2, dtype=np.int32), completions=[],
      completion_masks=[], candidate_ids=np.zeros(0, np.uint32),
      multiplicity=np.zeros(0, np.int32), scores=np.zeros(0, np.float32),
      preferred=-1)


def sampled(tokens, score, n=0, **changes):
  tokens = np.array(tokens, np.int32)
  return Candidate(**dict(
      tokens=tokens, mask=np.ones(len(tokens), bool), text=f"t{tokens}",
      candidate_id=4096 + n, score=score, source="policy",
      finish_reason="stop", behaviour_logp=-1.25 * len(tokens),
      raw_logps=np.full(len(tokens), -1.5, np.float32)) | changes)


class Fake:
  """Fills rounds; remembers of which weights each was made."""

  def __init__(self, tied=()):
    self.made, self.tied = {}, tied

  def __call__(self, number, weights, step):
    self.made[number] = (
        step, float(weights.policy["w"]),
        float(weights.moving["w"]) if weights.moving else None)
    sets = []
    for row in range(PROMPTS):
      scores = [0.5] * 3 if number in self.tied else [0.1, 0.9, 0.4]
      own = [sampled([number, row, n], s, n) for n, s in enumerate(scores)]
      one = candidates.pool_set(
          record(row), own, row=row, prompt=f"say {row}", policy_step=step)
      ref = np.array([-3.0, -4.0, -5.0], np.float32) - row
      sets.append(one._replace(anchors={"ref": ref}))
    return rounds_lib.Pool(sets, step, {"candidates/score": 0.5 + number})


def state_of(weight, moving=None):
  params = {"w": jnp.float32(weight)}
  return step_lib.TrainState(
      jnp.int32(0), params, (), (), (), (),
      () if moving is None else {"w": jnp.float32(moving)})


@pytest.fixture
def store(tmp_path, monkeypatch):
  """A place in an object store."""
  monkeypatch.setenv("MCPO_BUCKET", str(tmp_path / "bucket"))
  (tmp_path / "bucket").mkdir()
  return "pail://run/rounds"


def make(folder, fill, checked=None, mirror=None, **changes):
  arrange = functools.partial(
      batch.arrange, seed=3, num_slots=SLOTS, preferred="best", top_k=None)
  return rounds_lib.Rounds(
      plan(**changes), folder, fill, batch_size=BATCH, seed=3, arrange=arrange,
      check=lambda step, pool: None if checked is None else checked.append(
          (step, pool.metrics["candidates/score"])), mirror=mirror)


def walk(rounds, first, last, state=None):
  """Updates first .. last - 1; the weight at update s is 10 + s."""
  seen = []
  for step in range(first, last):
    state = state_of(10 + step, None if state is None else state.moving["w"]
                     if state.moving else None)
    state, metrics = rounds.advance(step, state)
    if step + 1 in (STEPS, 2 * STEPS):  # before a checkpoint
      rounds.settle()
    seen.append((rounds.make_batch(step), metrics))
  return seen, state


@pytest.mark.parametrize("lag, writers", [
    (0, {0: 0, 1: 3, 2: 6, 3: 9}),
    (1, {0: 0, 1: 0, 2: 3, 3: 6}),
    (2, {0: 0, 1: 0, 2: 0, 3: 3}),
])
def test_a_round_is_written_by_exactly_the_weights_of_its_lag(
    tmp_path, lag, writers):
  fill, checked = Fake(), []
  rounds = make(tmp_path, fill, checked, lag=lag)
  walk(rounds, 0, 4 * STEPS)
  rounds.close()
  assert {n: (s, w) for n, (s, w, _) in fill.made.items()} == {
      n: (step, 10.0 + step) for n, step in writers.items()}
  assert checked == [(0, 0.5), (3, 1.5), (6, 2.5), (9, 3.5)]
  for number, step in writers.items():
    pool = rounds_lib.read_pool(tmp_path / f"{number:06d}")
    assert pool.policy_step == step
    assert all(s.candidates.policy_step == step for s in pool.sets)


def test_a_round_in_the_thread_keeps_weights_that_the_trainer_gives_away(
    tmp_path):
  given_away = threading.Event()

  class Late(Fake):
    def __call__(self, number, weights, step):
      if number == 1:
        assert given_away.wait(20)
      return super().__call__(number, weights, step)

  fill = Late()
  rounds = make(tmp_path, fill, lag=1)
  state = state_of(10, 7)
  rounds.advance(0, state)
  for x in (state.params["w"], state.moving["w"]):
    x.delete()  # as a step does that is handed its state
  given_away.set()
  rounds.settle()
  rounds.close()
  assert fill.made[1] == (0, 10.0, 7.0)


def same(one, other):
  assert [s.prompt_id for s in one.sets] == [s.prompt_id for s in other.sets]
  for a, b in zip(one.sets, other.sets):
    np.testing.assert_array_equal(a.completions, b.completions)
  for name, a in one.meta._asdict().items():
    b = getattr(other.meta, name)
    for x, y in zip(*((v.values() if isinstance(v, dict) else [v])
                      for v in (a, b))):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stopped", [4, 6])  # in a round, and between two
@pytest.mark.parametrize("lost", [False, True])
def test_a_restart_makes_the_same_batches_and_no_round_twice(
    tmp_path, store, lag, stopped, lost):
  whole, _ = walk(make(tmp_path / "a", Fake(), lag=lag), 0, 12)
  mirror = store if lost else None
  first = make(tmp_path / "b", Fake(), lag=lag, mirror=mirror)
  walk(first, 0, stopped + 2)
  first.settle()
  first.close()
  if lost:
    shutil.rmtree(tmp_path / "b")
  fill = Fake()
  again, _ = walk(
      make(tmp_path / "b", fill, lag=lag, mirror=mirror), stopped, 12)
  for (one, _), (other, _) in zip(whole[stopped:], again):
    same(one, other)
  assert list(fill.made) == {
      4: {0: [2, 3], 1: [3]}, 6: {0: [3], 1: []}}[stopped][lag]


@pytest.mark.parametrize("folder", ["a", "b"])
def test_rounds_of_weights_the_restored_run_has_not_reached_are_dropped(
    tmp_path, store, folder):
  walk(make(tmp_path / "a", Fake(), mirror=store), 0, 7)
  fill = Fake()  # a checkpoint of step 4 was restored
  walk(make(tmp_path / folder, fill, mirror=store), 4, 7)
  assert list(fill.made) == [2]
  assert fill.made[2][0] == 6


def test_a_damaged_round_is_made_again_where_its_weights_are_here(tmp_path):
  walk(make(tmp_path, Fake()), 0, 7)
  path = tmp_path / "000002" / "candidates.jsonl"
  path.write_bytes(path.read_bytes().replace(b"policy", b"polity", 1))
  fill = Fake()
  walk(make(tmp_path, fill), 6, 7)
  assert list(fill.made) == [2]
  path = tmp_path / "000001" / "candidates.jsonl"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(errors.CheckpointError) as e:
    walk(make(tmp_path, Fake()), 4, 5)
  assert e.value.slug == "ckpt.missing_data" and "000001" in e.value.where


def test_a_damaged_round_of_the_store_is_made_again(tmp_path, store):
  walk(make(tmp_path / "a", Fake(), mirror=store), 0, 7)
  path = tmp_path / "bucket/run/rounds/000002/candidates.jsonl"
  path.write_bytes(path.read_bytes().replace(b"policy", b"polity", 1))
  for folder, made in (("b", [2]), ("c", [])):
    fill = Fake()
    walk(make(tmp_path / folder, fill, mirror=store), 6, 7)
    assert list(fill.made) == made


def test_r6_a_round_of_ties_ends_the_run(tmp_path):
  with pytest.raises(errors.ServiceError) as e:
    walk(make(tmp_path, Fake(tied=(1,))), 0, 6)
  assert e.value.slug == "reward.tie" and e.value.where == "round 1"
  assert e.value.exit_code == 7


def test_replay_trains_on_the_sets_of_earlier_rounds_too(tmp_path):
  batches, _ = walk(make(tmp_path, Fake(), replay=1), 0, 9)
  rounds_of = lambda some: {
      int(s.policy_step) for b, _ in some for s in b.sets}
  assert rounds_of(batches[:3]) == {0}
  assert rounds_of(batches[3:6]) == {0, 3}
  assert rounds_of(batches[6:9]) == {3, 6}


def test_a_batch_has_its_anchors_in_the_order_of_its_slots(tmp_path):
  (one, _), *_ = walk(make(tmp_path, Fake()), 0, 1)[0]
  assert one.order == [[1, 0, 2]] * BATCH  # the score 0.9 first
  for b, row in enumerate(one.rows):
    np.testing.assert_array_equal(
        one.meta.anchors["ref"][b], [-4.0 - row, -3.0 - row, -5.0 - row, 0, 0])
  np.testing.assert_array_equal(
      one.meta.role, [[1, -1, -1, 0, 0]] * BATCH)


def test_visits_differ_between_rounds_so_that_noise_does(tmp_path):
  batches, _ = walk(make(tmp_path, Fake()), 0, 6)
  seen = [(tuple(s.example_id), int(v)) for b, _ in batches
          for s, v in zip(b.sets, b.meta.visit)]
  assert len(set(seen)) == len(seen) == 12


def test_moving_weights_follow_by_rounds(tmp_path):
  fill = Fake()
  _, state = walk(make(tmp_path, fill, ema_decay=0.75), 0, 7, state_of(0, 10))
  # At the rounds' starts the policy is 10, 13, 16.
  means = [10.0, 0.75 * 10 + 0.25 * 13]
  means.append(0.75 * means[1] + 0.25 * 16)
  assert [fill.made[n][2] for n in range(3)] == pytest.approx(means)
  assert float(state.moving["w"]) == pytest.approx(means[2])


def test_extrapolated_rounds_are_written_ahead_of_the_policy(tmp_path):
  fill = Fake()
  _, state = walk(make(tmp_path, fill, extrapolation=0.3), 0, 7,
                  state_of(0, 10))
  # 10; 13 + 0.3 (13 - 10); 16 + 0.3 (16 - 13)
  assert [fill.made[n][1] for n in range(3)] == pytest.approx(
      [10.0, 13.9, 16.9])
  assert float(state.moving["w"]) == 16.0


def test_a_pool_reads_back_to_the_bit(tmp_path):
  rng = np.random.default_rng(0)
  own = [sampled(rng.integers(0, 99, n + 2), rng.random(), n,
                 behaviour_logp=float(rng.normal())) for n in range(3)]
  own.append(sampled([7, 8], float("nan"), source="data", candidate_id=2,
                     finish_reason=None, raw_logps=None,
                     behaviour_logp=float("nan")))
  one = candidates.pool_set(record(4), own, row=4, prompt=[
      {"role": "user", "content": "é\u2028\n"}], policy_step=11)
  one = one._replace(anchors={"ref": rng.normal(size=4).astype(np.float32)})
  rounds_lib.write_pool(
      tmp_path / "000000", rounds_lib.Pool([one], 11, {"x": 0.1}))
  pool = rounds_lib.read_pool(tmp_path / "000000")
  assert pool.metrics == {"x": 0.1} and pool.policy_step == 11
  (back,) = pool.sets
  for name, a in one.candidates._asdict().items():
    b = getattr(back.candidates, name)
    for x, y in zip(*((v if isinstance(v, list) else [v]) for v in (a, b))):
      np.testing.assert_array_equal(x, y)
      assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
  np.testing.assert_array_equal(back.anchors["ref"], one.anchors["ref"])
  assert back[2:6] == one[2:6] and back.row == 4
  line = json.loads((tmp_path / "000000/candidates.jsonl").read_text())
  assert line["sources"] == ["policy"] * 3 + ["data"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samples_read_back_to_the_bit(tmp_path, dtype):
  rng = np.random.default_rng(0)
  drawn = [[sampled(
      rng.integers(0, 99, n + p), float("nan"), n, text=f"é\u2028\n{n}",
      behaviour_logp=float(dtype(rng.normal())),
      raw_logps=rng.normal(size=n + p).astype(dtype))
            for n in range(3)] for p in range(2)]
  drawn[1][2] = drawn[1][2]._replace(  # of a server of another make
      behaviour_logp=float("nan"), raw_logps=np.full(3, np.nan, dtype))
  place = rounds_lib.samples_of(rounds_lib.place_of(tmp_path, 2))
  prompts = ["say", [{"role": "user", "content": "é"}]]
  candidates.write_samples(place, prompts, drawn, {"seconds": 0.1})
  back, meta = candidates.read_samples(place)
  assert meta == {"seconds": 0.1}
  for one, other in zip(sum(drawn, []), sum(back, []), strict=True):
    for name, a, b in zip(Candidate._fields, one, other):
      np.testing.assert_array_equal(a, b, err_msg=name)
      assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
  lines = (place / "samples.jsonl").read_text().splitlines()
  assert json.loads(lines[1])["prompt"] == prompts[1]


@pytest.mark.parametrize("lag", [0, 1])
def test_f11_a_round_that_is_not_scored_keeps_its_samples(tmp_path, lag):
  """Nothing is trained on, the error says where they lie, and they go when
  the round is there."""
  place = rounds_lib.samples_of(tmp_path / "000001")

  class Away(Fake):
    def __call__(self, number, weights, step):
      if number == 1:
        candidates.write_samples(
            place, ["say"], [[sampled([1], float("nan"))]],
            {"policy_step": step})
        raise errors.ServiceError("reward.unreachable", "nobody is there")
      return super().__call__(number, weights, step)

  rounds = make(tmp_path, Away(), lag=lag)
  with pytest.raises(errors.ServiceError) as e:
    walk(rounds, 0, 4)
  assert e.value.slug == "reward.unreachable"
  assert str(place) in str(e.value) and "the same line" in str(e.value)
  assert not (tmp_path / "000001").exists()
  assert rounds_lib.is_there(place)
  if lag:  # a checkpoint would lack the weights that write them
    with pytest.raises(errors.ServiceError):
      rounds.settle()
  rounds.close()
  walk(make(tmp_path, Fake(), lag=lag), 0, 4)
  assert (tmp_path / "000001").exists() and not place.exists()


def test_samples_of_weights_that_are_not_reached_or_damaged_are_dropped(
    tmp_path):
  walk(make(tmp_path, Fake()), 0, 4)
  place = rounds_lib.samples_of(tmp_path / "000002")
  write = lambda step: candidates.write_samples(
      place, ["say"], [[sampled([1], float("nan"))]], {"policy_step": step})
  write(6)
  make(tmp_path, Fake()).advance(4, state_of(14))
  assert not place.exists()
  write(4)
  make(tmp_path, Fake()).advance(4, state_of(14))
  assert rounds_lib.is_there(place)
  (place / "samples.jsonl").write_text("")
  assert not rounds_lib.is_there(place) and not place.exists()


def test_equal_samples_become_one_with_a_count():
  own = [sampled([1, 2], 0.3, 0), sampled([4], 0.8, 1), sampled([1, 2], 0.3, 2),
         sampled([1, 2, 3], 0.1, 3), sampled([1, 2], 0.3, 4)]
  one = candidates.pool_set(record(1), own, row=1, prompt="", policy_step=0)
  np.testing.assert_array_equal(one.candidates.multiplicity, [3, 1, 1])
  np.testing.assert_array_equal(
      one.candidates.candidate_ids, [4096, 4097, 4099])
  np.testing.assert_allclose(
      one.candidates.behaviour_raw_logps, [-3.0, -1.5, -4.5])
  assert one.has_contrast
  tied = candidates.pool_set(
      record(1), own[:1] + own[2:3], row=1, prompt="", policy_step=0)
  assert not tied.has_contrast  # one text, whatever its count
  assert not candidates.pool_set(
      record(1), [], row=1, prompt="", policy_step=0).has_contrast
  spin = [own[0]._replace(score=float("nan")),
          own[1]._replace(score=float("nan"))]
  assert candidates.pool_set(record(1), spin, row=1, prompt="", policy_step=0,
                             preferred=0).has_contrast


def test_rejection_accepts_by_the_odds_against_the_best():
  scores, beta = np.array([1.0, 0.2, 0.8, -1.0]), 0.5
  rng = np.random.default_rng(0)
  draws = [candidates.reject(scores, 1, beta=beta, rng=rng)
           for _ in range(20000)]
  # In a first pass in the order of the indices the best, 0, is always taken.
  assert {d[0] for d in draws} == {0}
  flipped = [candidates.reject(scores[::-1], 1, beta=beta, rng=rng)[0]
             for _ in range(20000)]
  odds = np.exp((scores[::-1] - 1.0) / beta)
  want = odds * np.cumprod([1.0, *(1.0 - odds[:-1])])
  got = np.bincount(flipped, minlength=4) / 20000
  np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / 20000))
  assert sorted(candidates.reject(scores, 4, beta=beta, rng=rng)) == [
      0, 1, 2, 3]
  assert candidates.reject(scores, 2, beta=1e-3, rng=rng) == [0, 2]


@pytest.mark.parametrize("tokens, share", [
    ([1, 2, 3, 4], 0.0), ([5, 5, 5, 5, 5], 2 / 3), ([1, 2], 0.0), ([], 0.0),
    ([1, 2, 3, 1, 2, 3], 0.25),
])
def test_repetition_counts_trigrams_seen_before(tokens, share):
  assert candidates.repetition(np.array(tokens, int)) == pytest.approx(share)


def test_what_a_round_is_like_by_hand():
  # Prompt 1 drew one text twice and an empty one; prompt 2 two level ones.
  one = [sampled([5, 5, 5, 5], 0.2), sampled([1], float("nan"), 1, text=" "),
         sampled([5, 5, 5, 5], 0.2, 2), sampled([7, 8], 0.8, 3)]
  two = [sampled([3, 4], 0.5), sampled([4, 3, 9], 0.5, 1,
                                       finish_reason="length")]
  told = [[one[0], one[2], one[3]], two]
  record_text = sampled([6], 0.9, source="data", candidate_id=0,
                        raw_logps=None, finish_reason=None)
  sets = [candidates.pool_set(record(1), [*told[0], record_text], row=1,
                              prompt="", policy_step=0),
          candidates.pool_set(record(2), two, row=2, prompt="", policy_step=0)]
  # Raw log-probs are -1.5 a token: -6 (twice), -3, and -3, -4.5.
  refs = [[-7.0, -5.0, -99.0], [-3.5, -4.5]]
  sets = [s._replace(anchors={"ref": np.array(r, np.float32)})
          for s, r in zip(sets, refs)]
  got = candidates.round_metrics(sets, [one, two], told)
  assert got == pytest.approx({
      "objective/kl": (1 + 1 + 2 + 0.5 + 0) / 5,
      "candidates/score": (0.2 + 0.2 + 0.8 + 0.5 + 0.5) / 5,
      "candidates/score_best": (0.8 + 0.5) / 2,
      "candidates/tied_share": 1 / 2,
      "candidates/unique_share": (3 / 4 + 2 / 2) / 2,
      "candidates/empty_share": 1 / 6,
      "candidates/cut_share": 1 / 6,
      "candidates/length": (4 + 1 + 4 + 2 + 2 + 3) / 6,
      "candidates/repetition": (0.5 + 0.5) / 6,
  })


CALM = {"candidates/score": 0.5, "candidates/length": 20.0,
        "candidates/tied_share": 0.1, "candidates/repetition": 0.1,
        "objective/kl": 3.0, "generate/logp_gap": 1e-6, "judge/mean": 0.7,
        "judge/sem": 0.01}
LIMITS = alarms.Limits(10.0, 1.0, 2.0, 0.9, 0.5, 1e-2)


@pytest.mark.parametrize("name, now, updates", [
    ("reward_hacking", {"candidates/score": 0.6, "judge/mean": 0.65}, []),
    ("kl", {"objective/kl": 10.1}, []),
    ("chosen_falls", {}, [{"rewards/chosen": -1.5}, {"rewards/chosen": -0.7}]),
    ("length", {"candidates/length": 41.0}, []),
    ("length", {"candidates/length": 9.0}, []),
    ("tied", {"candidates/tied_share": 0.95}, []),
    ("repetition", {"candidates/repetition": 0.6}, []),
    ("logp_gap", {"generate/logp_gap": 0.02}, []),
])
def test_each_alarm_has_a_name_and_a_cause(name, now, updates):
  assert not alarms.find_alarms([CALM, CALM], [{"rewards/chosen": 0.2}], LIMITS)
  (found,) = alarms.find_alarms([CALM, CALM | now], updates, LIMITS)
  assert found.name == name and found.got > found.limit and found.cause
  alarms.tell([found], step=7, stop=False)
  with pytest.raises(errors.ServiceError) as e:
    alarms.tell([found], step=7, stop=True)
  assert e.value.slug == f"alarm.{name}" and e.value.where == "step 7"
  silent = alarms.Limits(*[1e9] * 6)
  quiet = alarms.find_alarms([CALM, CALM | now], updates, silent)
  assert [a.name for a in quiet] == (
      ["reward_hacking"] if name == "reward_hacking" else [])


def test_what_is_not_known_never_alarms():
  nan = float("nan")
  unknown = CALM | {"candidates/score": nan, "objective/kl": nan}
  falls = unknown | {"judge/mean": 0.1}
  updates = [{"rewards/chosen": nan}, {"rewards/chosen": 0.1}]
  assert not alarms.find_alarms([unknown, falls], updates, LIMITS)
  updates.append({"rewards/chosen": -3.0})  # mean of the known: -1.45
  (found,) = alarms.find_alarms([unknown, falls], updates, LIMITS)
  assert found.name == "chosen_falls" and found.got == pytest.approx(1.45)


def test_a_judge_that_falls_within_its_noise_is_no_alarm():
  now = CALM | {"candidates/score": 0.6, "judge/mean": 0.68}
  assert not alarms.find_alarms([CALM, now], [], LIMITS)
  falls = CALM | {"candidates/score": 0.4, "judge/mean": 0.2}
  assert not alarms.find_alarms([CALM, falls], [], LIMITS)
