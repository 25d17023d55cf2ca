"""The optax chain and its schedule, from plain numbers.

Bytes of optimizer state for a parameter of P bytes: adamw 2 P, or 1.5 P with
its first moment in bfloat16; sgd and rmsprop P; adafactor next to nothing. With
bfloat16 parameters a float32 master copy comes on top. There is no optimizer of
8-bit state: neither optax nor its contrib has one.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mcpo_jax import types

_NO_DECAY = re.compile(r"norm|bias|scale")


def make_schedule(
    *, schedule: str, learning_rate: float, warmup_ratio: float, num_steps: int
) -> optax.Schedule:
  """Linear warm-up, then constant, linear or cosine decay to 0.

  Update i (counted from 0) uses schedule(i). With `warmup` updates of warm-up
  the first has learning_rate / warmup, never 0.
  """
  warmup = round(warmup_ratio * num_steps)
  rest = max(num_steps - warmup, 1)
  if schedule == "constant":
    tail = optax.constant_schedule(learning_rate)
  elif schedule == "linear":
    tail = optax.linear_schedule(learning_rate, 0.0, rest)
  else:
    tail = optax.cosine_decay_schedule(learning_rate, rest)
  if not warmup:
    return tail
  head = optax.linear_schedule(
      learning_rate / warmup, learning_rate, max(warmup - 1, 1))
  return optax.join_schedules([head, tail], [warmup])


def decay_mask(params):
  """True where weight decay applies: everything but norms and biases."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not _NO_DECAY.search(jax.tree_util.keystr(path)), params)


def make_optimizer(
    *,
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    max_grad_norm: float,
    moment_dtype: str = "float32",
) -> optax.GradientTransformation:
  """Clip by global norm; adamw, sgd (momentum b1), rmsprop or adafactor.

  `moment_dtype` is that of the first moment (adamw, sgd), which moves by a
  share 1 - b1 of itself at an update. A second moment stays in float32: at
  b2 = 0.999 it moves by a thousandth, and numbers of bfloat16 stand four to
  eight thousandths apart. Rounded to them it would never fall again.
  """
  dtype = None if moment_dtype == "float32" else moment_dtype  # at least
  if name == "adamw":
    rule = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, mu_dtype=dtype,
                       weight_decay=weight_decay, mask=decay_mask)
  elif name == "sgd":
    rule = optax.sgd(schedule, momentum=b1, accumulator_dtype=dtype)
  elif name == "rmsprop":
    rule = optax.rmsprop(schedule, decay=b2, eps=eps)
  else:
    rule = optax.adafactor(schedule, weight_decay_rate=weight_decay or None,
                           weight_decay_mask=decay_mask)
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)


class MasterState(NamedTuple):
  """State of `with_master`."""

  params: types.Params  # in float32
  inner: Any


def with_master(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """`tx` on a float32 copy of the parameters, kept in its state.

  The parameters are the copy rounded to their own dtype, so updates that are
  too small to show there still add up. Updates come in float32.
  """
  # Always a copy: of what is float32 already, too, since the parameters and
  # the state are given away together.
  wide = lambda tree: jax.tree.map(
      lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), tree)

  def init(params):
    master = wide(params)
    return MasterState(master, tx.init(master))

  def update(grads, state, params):
    updates, inner = tx.update(wide(grads), state.inner, state.params)
    master = optax.apply_updates(state.params, updates)
    return (jax.tree.map(jnp.subtract, master, wide(params)),
            MasterState(master, inner))

  return optax.GradientTransformation(init, update)
