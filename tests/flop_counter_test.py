"""The counter of FLOPs against products counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flop_counter

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 2 * 8 * 16 * 16  # FLOPs of X @ W


def count(function, *args):
  """Products of the size of X @ W."""
  return flop_counter.counter(function, *args)(*args) / ONE


def layers(x, w):
  twice = jax.checkpoint(lambda x: jnp.tanh(x @ w) @ w)
  return jax.lax.scan(lambda x, _: (twice(x), None), x, None, length=5)[0].sum()


def test_a_scan_counts_every_turn_and_its_gradient_what_is_recomputed():
  assert count(layers, X, W) == 10
  # Backward: 20 products, and of the recomputed forward pass the first of each
  # pair; the second is needed by nothing.
  assert count(jax.grad(layers, (0, 1)), X, W) == 35


def test_loops_and_branches_run_as_the_given_values_say():
  def odd_twice(x, w, n):
    step = lambda i, x: jax.lax.cond(
        i % 2 == 0, lambda: x @ w, lambda: x @ w @ w)
    return jax.lax.fori_loop(0, n, step, x)

  assert count(odd_twice, X, W, 3) == 1 + 2 + 1
  assert count(odd_twice, X, W, 7) == 4 + 2 * 3


def test_a_loop_inside_a_map_has_its_own_length_at_each_turn():
  def each(x, w, lengths):
    run = lambda n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)
    return jax.lax.map(run, lengths)

  assert count(each, X, W, jnp.array([3, 0, 1])) == 4


def test_what_depends_on_weights_is_refused():
  branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)
  with pytest.raises(ValueError, match="unknown value"):
    count(branch, X, W)


def test_the_largest_array_is_found_inside_loops():
  def wide(x, w):
    return jax.lax.map(lambda row: jnp.exp(row[:, None] + w[:1, :7]).sum(), x)

  assert flop_counter.largest_array(wide, X, W) == (16, 7)
