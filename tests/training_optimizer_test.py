"""Schedules by hand, updates against NumPy, what decays and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mcpo_jax.training import optimizer

RULE = {"name": "adamw", "weight_decay": 0.1, "b1": 0.8, "b2": 0.9,
        "eps": 1e-6, "max_grad_norm": 1e9}


def schedule(name, **kw):
  return optimizer.make_schedule(
      schedule=name, **{"learning_rate": 0.5, "warmup_ratio": 0.4,
                        "num_steps": 10} | kw)


@pytest.mark.parametrize("name,last", [
    ("constant", 0.5), ("linear", 0.5 / 6), ("cosine", 0.25 * (1 + np.cos(
        np.pi * 5 / 6)))])
def test_warm_up_then_decay(name, last):
  rates = [float(schedule(name)(i)) for i in range(10)]
  np.testing.assert_allclose(rates[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-6)
  np.testing.assert_allclose(rates[4], 0.5, rtol=1e-6)
  np.testing.assert_allclose(rates[9], last, rtol=1e-5)


def test_without_warm_up_the_first_update_has_the_full_rate():
  assert float(schedule("linear", warmup_ratio=0.0)(0)) == 0.5


def test_adamw_equals_numpy_for_five_updates(x64):
  tx = optimizer.make_optimizer(schedule=lambda count: 0.3, **RULE)
  rng = np.random.default_rng(0)
  w = rng.normal(size=(2, 3))
  params = {"mlp": {"kernel": jnp.array(w)}}
  state, m, v = tx.init(params), 0.0, 0.0
  for t in range(1, 6):
    g = rng.normal(size=(2, 3))
    updates, state = tx.update({"mlp": {"kernel": jnp.array(g)}}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
    w = w - 0.3 * (step + 0.1 * w)
    np.testing.assert_allclose(params["mlp"]["kernel"], w, rtol=1e-12)


def test_norms_and_biases_do_not_decay():
  params = {"layers": {"mlp_norm": {"scale": 1.0}, "attention": {
      "q_proj": {"kernel": 1.0, "bias": 1.0}}}, "embed": {"embedding": 1.0}}
  assert optimizer.decay_mask(params) == {
      "layers": {"mlp_norm": {"scale": False}, "attention": {
          "q_proj": {"kernel": True, "bias": False}}},
      "embed": {"embedding": True}}


def test_gradients_are_clipped_by_their_global_norm():
  tx = optimizer.make_optimizer(
      schedule=lambda _: 1.0, **RULE | {"name": "sgd", "b1": 0.0,
                                        "max_grad_norm": 2.5})
  params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["a"], [-1.5, 0.0], rtol=1e-6)
  np.testing.assert_allclose(updates["b"], [-2.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "adafactor"])
def test_every_rule_lowers_a_quadratic(name):
  tx = optimizer.make_optimizer(
      schedule=lambda _: 0.05, **RULE | {"name": name, "weight_decay": 0.0})
  params = {"kernel": jnp.full((3, 2), 2.0)}
  loss = lambda p: jnp.sum((p["kernel"] - 1.0) ** 2)
  state, first = tx.init(params), loss(params)
  for _ in range(10):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    params = jax.tree.map(jnp.add, params, updates)
  assert loss(params) < first


def steps_of(tx, params, grads):
  """The parameters and the state after every gradient."""
  state, out = tx.init(params), []
  for g in grads:
    updates, state = tx.update({"kernel": g}, state, params)
    params = optax.apply_updates(params, updates)
    out.append((params["kernel"], state))
  return out


def test_bfloat16_parameters_follow_their_float32_copy():
  """300 updates of 1e-5 of a weight near 1: none of them shows in bfloat16."""
  rule = RULE | {"name": "sgd", "b1": 0.0}
  plain = optimizer.make_optimizer(schedule=lambda _: 1.0, **rule)
  start = jnp.array([1.0, -0.75, 1e-3, 0.0], jnp.bfloat16)
  grads = [jnp.full(4, 1e-5, jnp.bfloat16)] * 300
  lost = steps_of(plain, {"kernel": start}, grads)[-1][0]
  wide = steps_of(plain, {"kernel": start.astype(jnp.float32)}, grads)
  half = steps_of(optimizer.with_master(plain), {"kernel": start}, grads)
  assert lost[0] == 1.0
  for (params, state), (want, _) in zip(half, wide):
    assert params.dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.params["kernel"], want)
    np.testing.assert_array_equal(params, want.astype(jnp.bfloat16))
  np.testing.assert_allclose(
      want, np.float32(start) - 3e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_first_moment_in_bfloat16_costs_half_and_changes_little(name):
  rng = np.random.default_rng(0)
  start = {"kernel": jnp.array(rng.normal(size=(5, 3)), jnp.float32)}
  grads = [jnp.array(rng.normal(size=(5, 3)), jnp.float32) for _ in range(40)]
  make = lambda **more: optimizer.make_optimizer(
      schedule=lambda _: 1e-2, **RULE | {"name": name, **more})
  wide = steps_of(make(), start, grads)[-1]
  half = steps_of(make(moment_dtype="bfloat16"), start, grads)[-1]
  np.testing.assert_allclose(half[0], wide[0], atol=5e-3)
  assert (half[0] != wide[0]).any()
  kinds = sorted(x.dtype.name for x in jax.tree.leaves(half[1]) if x.ndim)
  assert kinds == ["bfloat16"] + ["float32"] * (name == "adamw")


def test_a_second_moment_in_bfloat16_would_never_fall():
  """Why there is no setting for it."""
  moment = jnp.array(1.0, jnp.bfloat16)
  for _ in range(100):
    moment = (0.999 * moment.astype(jnp.float32)).astype(jnp.bfloat16)
  assert moment == 1.0 and 0.999**100 < 0.91
