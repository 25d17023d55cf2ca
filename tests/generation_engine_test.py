"""The engine: slots, refills, cancelled samples, weights, few programs."""

import functools

import jax
import numpy as np
import pytest

from mcpo_jax import errors, sharding
from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.generation import sampler
from mcpo_jax.generation.sampling import GREEDY, Sampling
from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    family="llama", vocab_size=32, hidden_size=24, intermediate_size=40,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=200,
    initializer_range=0.4,
)
STOPS, LENGTH = (5, 9, 17), 12


@functools.cache
def params_of(seed, dtype="float32"):
  init = jax.jit(lambda k: decoder.init_params(k, CONFIG, dtype=dtype))
  return init(jax.random.key(seed))


def make(num_slots=4, *, dtype="float32", params=None, **settings):
  params = params_of(0, dtype) if params is None else params
  return engine_lib.Engine(
      CONFIG, ((params, 1.0),), 3, max_new_tokens=LENGTH, stop_ids=STOPS,
      compute_dtype=dtype, num_slots=num_slots, **settings,
  )


def request(number, *, length=4, samples=3, seed=7, **sampling):
  rng = np.random.default_rng(number)
  how = Sampling(**{"max_new_tokens": LENGTH} | sampling)
  return engine_lib.Request(
      number, rng.integers(0, 32, length).astype(np.int32),
      rng.integers(0, 2**32, 2, dtype=np.uint32), np.arange(samples), how,
      seed,
  )


def run(engine, requests=(), max_tokens=64):
  """{(request, sample): (tokens, reason)} of all that is told."""
  for one in requests:
    engine.submit(one)
  whole = {}
  while not engine.idle:
    for new in engine.step(max_tokens):
      place = new.request_id, new.sample
      tokens, reason = whole.get(place, ([], None))
      assert reason is None and 0 < len(new.tokens) <= max_tokens
      assert len(new.tokens) == len(new.behaviour_logps)
      whole[place] = tokens + new.tokens.tolist(), new.finish_reason
  assert engine.num_active == engine.num_waiting == 0
  return whole


MIXED = [
    dict(length=1), dict(length=70, samples=1), dict(length=9, samples=8),
    dict(temperature=0.5, top_k=5), dict(length=99, top_p=0.8, samples=2),
    dict(min_new_tokens=6, samples=5), dict(temperature=0.0),
    dict(repetition_penalty=1.3, max_new_tokens=7), dict(min_p=0.1, seed=1),
]


def test_a_sample_is_the_same_alone_and_in_any_company():
  """Lone, in slots refilled again and again, in short steps, on a mesh."""
  with jax.enable_x64(True):
    requests = [request(i, **kw) for i, kw in enumerate(MIXED)]
    together = run(make(dtype="float64"), requests)
    assert len(together) == sum(len(r.sample_indices) for r in requests)
    assert run(make(6, dtype="float64"), requests[::-1], 3) == together
    alone = make(dtype="float64")
    for i in (1, 2, 7):
      got = run(alone, [requests[i]])
      assert got == {k: v for k, v in together.items() if k in got}
    one = requests[2]._replace(sample_indices=np.array([6]))
    assert run(alone, [one])[2, 0] == together[2, 6]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert run(make(8, dtype="float64", mesh=mesh), requests) == together


def test_samples_end_where_they_should():
  requests = [request(i, **kw) for i, kw in enumerate(MIXED)]
  requests += [request(9, stop_ids=(3, 1), samples=8)]
  lengths, own = set(), False
  for (number, _), (tokens, reason) in run(make(), requests).items():
    how = requests[number].sampling
    stops = set(STOPS + how.stop_ids)
    ends = [i for i, t in enumerate(tokens) if t in stops]
    assert not ends or ends[0] >= how.min_new_tokens
    if reason == "stop":
      assert ends == [len(tokens) - 1]
      own |= tokens[-1] in how.stop_ids
    else:
      assert reason == "length" and not ends
      assert len(tokens) == how.max_new_tokens
    lengths.add(len(tokens))
  assert len(lengths) > 4 and own


def test_few_programs_are_compiled(monkeypatch):
  """However requests come; and another sampling or new weights bring none."""
  monkeypatch.setattr(
      sampler, "make_kernels", sampler.make_kernels.__wrapped__
  )
  engine = make()
  kernels = engine._kernels
  count = lambda: [f._cache_size() for f in kernels]
  run(engine, [request(0)])
  assert count() == [1, 0, 1, 1, 0]
  for i, kw in enumerate(MIXED[2:4]):
    run(engine, [request(i, **kw)])
  engine.update(((params_of(1), 1.0),), 4)
  run(engine, [request(0, samples=2), request(1, length=64, samples=2)])
  assert count() == [1, 0, 1, 1, 0]
  rng = np.random.default_rng(0)
  for _ in range(20):
    run(engine, [
        request(i, length=int(rng.integers(1, 180)),
                samples=int(rng.integers(1, 9)))
        for i in range(rng.integers(1, 6))
    ])
  # Groups of 1, 2 or 4 slots, by one or two numbers of pages; prompts of 1, 2
  # or 3 pages.
  assert count()[3] <= 4 and count()[2] <= 3 * count()[3] and count()[1] <= 2
  engine.score([np.arange(n) % 7 for n in (5, 60, 70)])
  assert count()[4] == 2  # of one page and of two


def test_a_slot_that_ends_goes_to_the_next_sample():
  engine = make(2)
  for one in (request(0, samples=5), request(1, samples=2)):
    engine.submit(one)
  assert (engine.num_active, engine.num_waiting) == (0, 7)
  seen = []
  while not engine.idle:
    told = {(new.request_id, new.sample) for new in engine.step(4)}
    assert 1 <= len(told) <= 2
    assert len(told) + engine.num_waiting + len(set(seen) - told) == 7
    seen += told
  assert len(set(seen)) == 7


def test_a_step_does_not_wait_where_nobody_waits():
  short, long = request(0, samples=1, max_new_tokens=1), request(1, samples=1)
  stops = dict(min_new_tokens=LENGTH)
  long = long._replace(sampling=long.sampling._replace(**stops))
  engine = make(2)
  for one in (short, long):
    engine.submit(one)
  told = engine.step(64)
  assert sorted(len(new.tokens) for new in told) == [1, LENGTH]
  for one in (short, long, request(2)):
    engine.submit(one)
  told = engine.step(64)
  assert [len(new.tokens) for new in told] == [1, 1]


def test_cancelled_samples_free_their_slots_and_change_no_other():
  requests = [request(i, samples=3, min_new_tokens=8) for i in range(3)]
  want = run(make(), requests)
  engine = make()
  for one in requests:
    engine.submit(one)
  engine.step(2)
  before = engine.num_active
  engine.cancel(0, 1)
  engine.cancel(1)
  engine.cancel(2, 2)
  assert engine.num_active + engine.num_waiting < 9 - 3 and before > 2
  got = run(engine)
  assert set(got) <= {(0, 0), (0, 2), (2, 0), (2, 1)}
  for place, (tokens, reason) in got.items():
    whole, why = want[place]
    assert whole[-len(tokens):] == tokens and reason == why
  # A request may have that id again.
  assert run(engine, [requests[1]]) == {
      place: one for place, one in want.items() if place[0] == 1
  }


def test_weights_change_between_samples_alone():
  engine, one = make(), request(0)
  before = run(engine, [one])
  engine.submit(one)
  engine.step(1)
  with pytest.raises(errors.ServiceError) as e:
    engine.update(((params_of(1), 1.0),), 4)
  assert e.value.slug == "service.busy"
  assert {v.version for v in engine.step(1)} == {3}
  run(engine)
  mine = jax.tree.map(lambda x: x + 0, params_of(1))
  engine.update(((mine, 1.0),), 4)
  for x in jax.tree.leaves(mine):
    x.delete()  # as a step that donates its weights does
  after = run(engine, [one])
  assert after != before == run(make(), [one])
  assert after == run(make(params=params_of(1)), [one])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_never_give_a_token(value):
  broken = jax.tree.map(lambda x: x, params_of(0))
  broken["final_norm"] = {"scale": broken["final_norm"]["scale"] * value}
  engine = make(params=broken)
  for how in (dict(), GREEDY._asdict(), dict(top_p=0.9)):
    how = dict(how, max_new_tokens=LENGTH)
    with pytest.raises(errors.NonFiniteError) as e:
      run(engine, [request(0, **how)])
    assert e.value.slug == "generation.non_finite" and engine.idle
  engine.update(((params_of(0), 1.0),), 4)
  assert run(engine, [request(0)]) == run(make(), [request(0)])


@pytest.mark.parametrize("field, changes", [
    ("prompt", dict(length=0)),
    ("prompt", dict(length=189)),
    ("max_new_tokens", dict(max_new_tokens=0)),
    ("max_new_tokens", dict(max_new_tokens=13)),
    ("sample_indices", dict(samples=0)),
    ("temperature", dict(temperature=-1.0)),
    ("temperature", dict(temperature=1e-30)),
    ("temperature", dict(temperature=float("nan"))),
    ("temperature", dict(temperature=float("inf"))),
    ("top_k", dict(top_k=-5)),
    ("top_p", dict(top_p=0.0)),
    ("top_p", dict(top_p=1.1)),
    ("min_p", dict(min_p=-0.1)),
    ("repetition_penalty", dict(repetition_penalty=0.0)),
    ("min_new_tokens", dict(min_new_tokens=13)),
    ("stop_ids", dict(stop_ids=(32,))),
    ("stop_ids", dict(stop_ids=tuple(range(17)))),
    ("seed", dict(seed=-1)),
    ("seed", dict(seed=2**32)),
])
def test_what_can_not_be_served_is_refused(field, changes):
  engine = make()
  with pytest.raises(errors.ServiceError) as e:
    engine.submit(request(0, **changes))
  assert e.value.slug == f"request.{field}" and engine.idle


@pytest.mark.parametrize("field, changes", [
    ("prompt", dict(prompt=np.array([1, 32]))),
    ("prompt", dict(prompt=np.array([-1, 3]))),
    ("prompt_id", dict(prompt_id=np.zeros(3))),
    ("request_id", dict(request_id=1)),
])
def test_what_is_no_request_is_refused(field, changes):
  engine = make()
  engine.submit(request(1))
  with pytest.raises(errors.ServiceError) as e:
    engine.submit(request(0)._replace(**changes))
  assert e.value.slug == f"request.{field}" and engine.num_waiting == 3
