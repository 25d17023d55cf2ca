"""The service: versions, text, refusals, meshes."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest

from mcpo_jax import errors, sharding
from mcpo_jax.generation import service
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    family="llama", vocab_size=32, hidden_size=24, intermediate_size=40,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=48,
    initializer_range=0.4,
)
STOPS, PAD, LENGTH = (5, 9, 17), 0, 11


class Letters:
  """Ids 0..31 as letters; the stop ids are special."""

  def decode(self, ids, skip_special_tokens):
    assert skip_special_tokens
    return "".join(chr(ord("A") + i) for i in ids if i not in STOPS[:2])


@functools.cache
def params_of(seed, dtype="float32"):
  init = jax.jit(lambda k: decoder.init_params(k, CONFIG, dtype=dtype))
  return init(jax.random.key(seed))


def make(num_slots=6, *, models=None, dtype="float32", **settings):
  return service.GenerationService(
      CONFIG, params_of(0, dtype) if models is None else models, 3,
      max_completion_length=LENGTH, stop_ids=STOPS, pad_id=PAD,
      compute_dtype=dtype, num_slots=num_slots, **settings,
  )


def request(lengths=(4, 9, 2, 13, 6, 7, 3), **changes):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 2**32, (len(lengths), 2), dtype=np.uint32)
  return dict(
      prompts=[rng.integers(0, 32, n) for n in lengths], prompt_ids=ids,
      num_samples=2, sampling=Sampling(), seed=7,
  ) | changes


def test_results_are_the_same_whatever_the_slots():
  with jax.enable_x64(True):
    whole = make(8, dtype="float64").generate(**request())
    single = make(1, dtype="float64")  # one sample at a time
    apart = single.generate(**request())
    np.testing.assert_array_equal(whole.tokens, apart.tokens)
    np.testing.assert_array_equal(whole.mask, apart.mask)
    np.testing.assert_allclose(
        whole.behaviour_logps, apart.behaviour_logps, atol=1e-12
    )
    assert whole.tokens.shape == (7, 2, LENGTH)
    first = single.generate(**request(num_samples=1))
    np.testing.assert_array_equal(first.tokens, whole.tokens[:, :1])


def test_a_prompt_gives_the_same_alone_and_in_another_order():
  served, whole = make(), request()
  together = served.generate(**whole)
  order = [5, 2]
  some = served.generate(
      **whole | dict(
          prompts=[whole["prompts"][i] for i in order],
          prompt_ids=whole["prompt_ids"][order],
      )
  )
  np.testing.assert_array_equal(some.tokens, together.tokens[order])
  other = served.generate(**whole | dict(seed=8))
  assert (other.tokens != together.tokens).any((1, 2)).all()


def test_finish_reason_and_text_follow_the_mask():
  got = make(tokenizer=Letters()).generate(**request())
  reasons = {"stop": 0, "length": 0}
  for tokens, masks, texts, finishes in zip(
      got.tokens, got.mask, got.text, got.finish_reason
  ):
    for ids, mask, text, reason in zip(tokens, masks, texts, finishes):
      reasons[reason] += 1
      length = mask.sum()
      assert mask[:length].all() and (ids[length:] == PAD).all()
      assert (ids[length - 1] in STOPS) == (reason == "stop")
      told = ids[: length - (reason == "stop")]
      assert text == Letters().decode(told, True)
      assert not np.isin(told, STOPS).any()
  assert min(reasons.values()) > 0
  assert got.policy_version == 3 and make().generate(**request()).text is None


def test_a_stop_string_ends_a_sample_and_is_left_out():
  whole = make(tokenizer=Letters()).generate(**request())
  long = [text for texts in whole.text for text in texts if len(text) > 4]
  stop = (long[0][2:4], long[1][1:2])
  got = make(tokenizer=Letters()).generate(
      **request(sampling=Sampling(stop=stop))
  )
  cut = 0
  for r, n in np.ndindex(got.mask.shape[:2]):
    text, length = whole.text[r][n], whole.mask[r, n].sum()
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if found:
      cut += 1
      # All tokens here are one letter, but for stop tokens, which end it.
      length, start = min(found)
      assert got.text[r][n] == text[:start]
      assert got.finish_reason[r][n] == "stop"
    else:
      assert got.text[r][n] == text
      assert got.finish_reason[r][n] == whole.finish_reason[r][n]
    assert got.mask[r, n].sum() == length
    for name, empty in (
        ("tokens", PAD), ("behaviour_logps", 0), ("behaviour_raw_logps", 0),
    ):
      one, other = (getattr(x, name)[r, n] for x in (got, whole))
      np.testing.assert_allclose(one[:length], other[:length], atol=1e-5)
      assert (one[length:] == empty).all()
  assert 1 < cut < got.mask.shape[0] * 2


def test_what_goes_wrong_on_the_way_leaves_nothing_behind(monkeypatch):
  served = make(tokenizer=Letters())
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Letters, "decode", mock.Mock(side_effect=KeyboardInterrupt))
    served.generate(**request())
  served.update(params_of(0), 4)
  assert served.generate(**request()).text == make(
      tokenizer=Letters()).generate(**request()).text


def test_a_request_may_want_fewer_tokens():
  whole = make().generate(**request())
  got = make().generate(**request(sampling=Sampling(max_new_tokens=3)))
  assert got.tokens.shape == whole.tokens.shape and not got.mask[..., 3:].any()
  np.testing.assert_array_equal(got.tokens[..., :3], whole.tokens[..., :3])


def test_an_update_changes_the_weights():
  served = make()
  first = served.generate(**request(), require_version=3)
  served.update(params_of(1), 4)
  cooler = Sampling(temperature=0.5, top_p=0.9)
  second = served.generate(**request(sampling=cooler))
  assert (first.policy_version, second.policy_version) == (3, 4)
  assert (first.tokens != second.tokens).any()
  with pytest.raises(errors.ServiceError) as e:
    served.generate(**request(), require_version=3)
  assert e.value.slug == "service.version"
  assert (e.value.got, e.value.want) == (4, 3)
  # Two models, then one again.
  both = (params_of(0), 0.5), (params_of(1), 0.5)
  served.update(both, 5)
  mixed = served.generate(**request(), require_version=5)
  gaps = np.abs(mixed.behaviour_logps - mixed.behaviour_raw_logps)
  assert (gaps[mixed.mask] > 1e-3).all()
  served.update(params_of(0), 6)
  again = served.generate(**request())
  np.testing.assert_array_equal(again.tokens, first.tokens)


@pytest.mark.parametrize("slug, changes", [
    ("prompts", dict(prompts=[], prompt_ids=np.zeros((0, 2)))),
    ("prompt", dict(prompts=[np.arange(3)] * 6 + [np.array([], int)])),
    ("prompt", dict(prompts=[np.arange(3)] * 6 + [np.zeros(38, int)])),
    ("prompt", dict(prompts=[np.arange(3)] * 6 + [np.array([1, 32])])),
    ("prompt_ids", dict(prompt_ids=np.zeros((6, 2)))),
    ("num_samples", dict(num_samples=0)),
    ("temperature", dict(sampling=Sampling(temperature=-1.0))),
    ("max_new_tokens", dict(sampling=Sampling(max_new_tokens=12))),
    ("stop", dict(sampling=Sampling(stop=("a",)))),
    ("seed", dict(seed=-1)),
])
def test_a_request_that_cannot_be_served_is_refused(slug, changes):
  served = make()
  with pytest.raises(errors.ServiceError) as e:
    served.generate(**request(**changes))
  assert e.value.slug == f"request.{slug}"
  assert served.generate(**request()).mask.any()  # nothing of it is left


def test_non_finite_weights_never_give_a_sample():
  broken = jax.tree.map(lambda x: x, params_of(0))
  broken["final_norm"]["scale"] = broken["final_norm"]["scale"] * np.nan
  with pytest.raises(errors.NonFiniteError) as e:
    make(models=broken).generate(**request())
  assert e.value.slug == "generation.non_finite"


def placed(params, mesh):
  shapes = decoder.param_shapes(CONFIG)
  shardings = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  return jax.device_put(jax.tree.map(np.array, params), shardings)


def test_a_mesh_gives_what_one_device_gives():
  """Weights come from the mesh itself, and from one of other devices."""
  devices = jax.devices()
  axes = dict(data=2, fsdp=2, tensor=2)
  whole = sharding.make_mesh(**axes)
  trainer = sharding.make_mesh(data=1, fsdp=4, tensor=1, devices=devices[:4])
  beside = sharding.make_mesh(data=2, fsdp=1, tensor=2, devices=devices[4:])
  want, moved = (
      make(models=params_of(seed)).generate(**request()) for seed in (0, 1)
  )
  for source, mesh in ((whole, whole), (trainer, beside)):
    served = make(8, models=placed(params_of(0), source), mesh=mesh)
    got = served.generate(**request())
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(
        got.behaviour_logps, want.behaviour_logps, atol=1e-5
    )
    weights = placed(params_of(1), source)
    served.update(weights, 4)
    jax.tree.map(lambda x: x.delete(), weights)  # the trainer donates them
    got = served.generate(**request(), require_version=4)
    np.testing.assert_array_equal(got.tokens, moved.tokens)
