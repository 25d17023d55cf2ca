"""The service: blocks, versions, text, refusals, meshes."""

import functools

import jax
import numpy as np
import pytest

from mcpo_jax import errors, sharding
from mcpo_jax.generation import sampler, service
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


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
  """Services of one setting share their compiled sampler."""
  with pytest.MonkeyPatch.context() as patch:
    shared = functools.cache(sampler.make_generate_fn)
    patch.setattr(sampler, "make_generate_fn", shared)
    yield


def make(rows_per_block=6, *, params=None, dtype="float32", **settings):
  return service.GenerationService(
      CONFIG, params_of(0, dtype) if params is None else params, 3,
      max_completion_length=LENGTH, stop_ids=STOPS, pad_id=PAD,
      compute_dtype=dtype, rows_per_block=rows_per_block, **settings,
  )


def request(lengths=(4, 9, 2, 13, 6, 7, 3), **changes):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 2**32, (len(lengths), 2), dtype=np.uint32)
  return dict(
      prompts=[rng.integers(0, 32, n) for n in lengths], prompt_ids=ids,
      num_samples=2, sampling=Sampling(), seed=7,
  ) | changes


def test_results_are_the_same_whatever_the_blocks():
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


def test_an_update_changes_the_weights_and_compiles_nothing(monkeypatch):
  traces = []
  monkeypatch.setattr(
      sampler, "make_generate_fn", sampler.make_generate_fn.__wrapped__
  )
  original = decoder.prefill
  monkeypatch.setattr(
      decoder, "prefill", lambda *a: traces.append(1) or original(*a)
  )
  served = make()
  first = served.generate(**request(), require_version=3)
  served.update(params_of(1), 4)
  cooler = Sampling(temperature=0.5, top_p=0.9)
  second = served.generate(**request(sampling=cooler))
  assert (first.policy_version, second.policy_version) == (3, 4)
  assert (first.tokens != second.tokens).any() and len(traces) == 1
  with pytest.raises(errors.ServiceError) as e:
    served.generate(**request(), require_version=3)
  assert e.value.slug == "service.version"
  assert (e.value.got, e.value.want) == (4, 3)


@pytest.mark.parametrize("slug, changes", [
    ("prompts", dict(prompts=[], prompt_ids=np.zeros((0, 2)))),
    ("prompts", dict(prompts=[np.arange(3)] * 6 + [np.array([], int)])),
    ("prompts", dict(prompts=[np.arange(3)] * 6 + [np.zeros(38, int)])),
    ("prompts", dict(prompts=[np.arange(3)] * 6 + [np.array([1, 32])])),
    ("prompts", dict(prompts=[np.arange(3)] * 6 + [np.array([-1, 3])])),
    ("prompt_ids", dict(prompt_ids=np.zeros((6, 2)))),
    ("num_samples", dict(num_samples=0)),
    ("temperature", dict(sampling=Sampling(temperature=-1.0))),
    ("temperature", dict(sampling=Sampling(temperature=float("nan")))),
    ("temperature", dict(sampling=Sampling(temperature=float("inf")))),
    ("top_p", dict(sampling=Sampling(top_p=0.0))),
    ("top_p", dict(sampling=Sampling(top_p=1.1))),
    ("seed", dict(seed=-1)),
])
def test_a_request_that_cannot_be_served_is_refused(slug, changes):
  with pytest.raises(errors.ServiceError) as e:
    make().generate(**request(**changes))
  assert e.value.slug == f"request.{slug}"


def test_non_finite_weights_never_give_a_sample():
  broken = jax.tree.map(lambda x: x, params_of(0))
  broken["final_norm"]["scale"] = broken["final_norm"]["scale"] * np.nan
  with pytest.raises(errors.NonFiniteError) as e:
    make(params=broken).generate(**request())
  assert e.value.slug == "generation.non_finite" and "7" in str(e.value)


def test_a_mesh_gives_what_one_device_gives():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = decoder.param_shapes(CONFIG)
  shardings = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params_of(0), shardings)
  got = make(8, params=placed, mesh=mesh).generate(**request())
  want = make().generate(**request())
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(
      got.behaviour_logps, want.behaviour_logps, atol=1e-5
  )
