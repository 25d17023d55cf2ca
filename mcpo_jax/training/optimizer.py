"""The optax chain and its schedule, from plain numbers."""

import re

import jax
import optax

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
) -> optax.GradientTransformation:
  """Clip by global norm; adamw, sgd (momentum b1), rmsprop or adafactor."""
  if name == "adamw":
    rule = optax.adamw(schedule, b1=b1, b2=b2, eps=eps,
                       weight_decay=weight_decay, mask=decay_mask)
  elif name == "sgd":
    rule = optax.sgd(schedule, momentum=b1)
  elif name == "rmsprop":
    rule = optax.rmsprop(schedule, decay=b2, eps=eps)
  else:
    rule = optax.adafactor(schedule, weight_decay_rate=weight_decay or None,
                           weight_decay_mask=decay_mask)
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)
