"""Schedules by hand, updates against NumPy, what decays and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
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
