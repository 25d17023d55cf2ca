"""The check passes the losses of the house and names what others break."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mcpo_jax
from mcpo_jax import user_code
from mcpo_jax.kernels import weights
from mcpo_jax.objectives import (
    check,
    implicit,
    pairwise,
    reference_free,
    softmax,
)

CORE = {
    "dpo": (pairwise.dpo_loss, {"beta": 0.1}),
    "rnce": (softmax.rnce_loss, {"beta": 0.1}),
    "ipo": (pairwise.ipo_loss, {"beta": 0.1, "length_average": False}),
}


@functools.cache
def _report(name):
  fn, settings = CORE[name]
  return mcpo_jax.check_objective(fn, **settings)


def my_loss(features, batch, state, *, beta=0.1):
  """Best against the mean of the rest, as a user may write it."""
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  negative = weights.negatives(batch)
  count = negative.sum(axis=1)
  rest = jnp.where(negative, rewards, 0.0).sum(axis=1) / jnp.maximum(count, 1)
  losses = jnp.where(count > 0, -jax.nn.log_sigmoid(rewards[:, 0] - rest), 0.0)
  return losses, implicit.preference_aux(rewards, features.logps, batch), state


def _failed(fn, **settings):
  report = check.check_objective(fn, **settings)
  return {p.name for p in report.properties if not p.passed}, report


@pytest.mark.parametrize("name", CORE)
def test_losses_of_the_house_pass(name):
  report = _report(name)
  assert report.ok and str(report).startswith(f"{CORE[name][0].__name__}: ok")
  told = {p.name: p.passed for p in report.properties if not p.required}
  assert told["gradient"] and told["slots"]
  assert told["shift"] and "separable" not in told


def test_a_loss_without_a_reference_changes_with_the_lengths():
  failed, report = _failed(
      reference_free.simpo_loss, beta=2.0, gamma_beta_ratio=0.5)
  assert failed == {"shift"} and report.ok


def test_a_users_loss_passes():
  failed, report = _failed(my_loss, beta=0.3)
  assert not failed and report.ok
  assert [p.name for p in report.properties if not p.required] == [
      "separable", "slots", "shift", "gradient"]


def _change(**changes):
  """`my_loss` with its losses changed by a function of (losses, inputs)."""
  def loss(features, batch, state):
    losses, aux, state = my_loss(features, batch, state)
    if "losses" in changes:
      losses = changes["losses"](losses, features, batch)
    if "aux" in changes:
      aux = changes["aux"](aux, features, batch)
    return losses, aux, changes.get("state", state)

  return loss


def _valid(values, batch):
  return jnp.where(weights.negatives(batch), values, 0.0)


@jax.custom_vjp
def _halved_gradient(x):
  return x


_halved_gradient.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))

ref = lambda batch: batch.anchors["ref"]
some = lambda batch: weights.negatives(batch).any(axis=1)
BROKEN = {
    "raises": ("shapes", _change(losses=lambda x, f, b: b.anchors["prev"])),
    "reduced": ("shapes", _change(losses=lambda x, f, b: x.mean())),
    "aux of slots": ("shapes", _change(aux=lambda x, f, b: {"a": f.logps})),
    "counts": ("shapes", _change(losses=lambda x, f, b: some(b).astype(int))),
    "state": ("shapes", _change(state=(1, 2))),
    "branches": ("jit", _change(
        losses=lambda x, f, b: x if x[0] > 0 else -x)),
    "reads masked": ("masks", _change(
        losses=lambda x, f, b: x + 1e-3 * jnp.where(
            some(b), f.logps.sum(axis=1), 0.0))),
    "reads the place": ("rows", _change(
        losses=lambda x, f, b: x * jnp.arange(1.0, 7.0))),
    "constant": ("empty", _change(losses=lambda x, f, b: x + 1.0)),
    "aux everywhere": ("empty", _change(
        aux=lambda x, f, b: {"a": jnp.ones(len(f.logps))})),
    "learns the reference": ("anchors", _change(
        losses=lambda x, f, b: x + 0.1 * _valid(
            ref(b), b).sum(axis=1) ** 2)),
    "aux flows": ("aux", _change(
        aux=lambda x, f, b: {"a": jnp.where(some(b), f.logps[:, 0], 0.0)})),
    "backwards": ("learning", _change(losses=lambda x, f, b: -x)),
    "exponential": ("extremes", _change(
        losses=lambda x, f, b: jnp.where(some(b), jnp.exp(-_valid(
            f.logps - f.logps[:, :1], b).sum(axis=1)), 0.0))),
    "batch mean": ("separable", _change(
        losses=lambda x, f, b: jnp.where(some(b), x - 0.5 * x.mean(), 0.0))),
    "first negative": ("slots", _change(
        losses=lambda x, f, b: x + 0.1 * _valid(f.logps, b)[:, 1])),
    "chosen alone": ("shift", _change(
        losses=lambda x, f, b: jnp.where(some(b), x - f.logps[:, 0], 0.0))),
    "other gradient": ("gradient", _change(
        losses=lambda x, f, b: _halved_gradient(x))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name):
  broken, loss = BROKEN[name]
  failed, report = _failed(loss)
  assert broken in failed, report
  required = {p.name for p in report.properties if p.required}
  assert report.ok == (not failed & required)
  row = next(x for x in str(report).split("\n") if f"  {broken} " in f"{x} ")
  assert row.split()[0] == ("FAIL" if broken in required else "no"), report
  assert len(row.split()) > 2  # it says what was seen
  # One fault is one finding, unless it is several.
  assert len(failed) <= 3, report


def test_declared_needs_are_given_and_undeclared_ones_are_missing():
  @mcpo_jax.objective(anchors=("prev",), terms=("kl",), pairwise=True,
                      separable=True)
  def loss(features, batch, state, *, progress):
    assert set(batch.anchors) == {"prev"} and set(features.terms) == {"kl"}
    assert features.logps.shape == (6, 2)
    return my_loss(
        features, batch._replace(anchors={"ref": batch.anchors["prev"]}),
        state, beta=progress)

  failed, report = _failed(loss)
  assert not failed
  required = {p.name for p in report.properties if p.required}
  assert "separable" in required


def test_a_declared_row_on_its_own_must_be_so():
  @mcpo_jax.objective(separable=True)
  def loss(features, batch, state):
    return BROKEN["batch mean"][1](features, batch, state)

  failed, report = _failed(loss)
  assert failed & {"separable"} and not report.ok


def test_the_sets_of_the_check_are_what_it_says():
  needs = user_code.needs_of(my_loss)
  features, batch, state = check._inputs(needs)
  np.testing.assert_array_equal(
      weights.negatives(batch).sum(axis=1), [3, 2, 1, 3, 0, 0])
  assert state == () and not features.terms
