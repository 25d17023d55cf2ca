"""FLOPs of the matrix products that a JAX function asks for on given layouts.

Loops and branches of the attention depend on the layout of the streams, so
the products in a jaxpr cannot be counted without it, and what XLA counts has
each loop's body once. `counter` turns a function into one that computes its
own FLOPs: every product becomes a number, loops and branches stay and run as
they would, and all that they do not depend on is gone. Weights and activations
are never there: a function of 8B parameters is counted in seconds.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Of primitives that stand for one call of a function.
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def counter(function: Callable, *shapes: Any) -> Callable[..., float]:
  """A function of the same arguments that returns FLOPs.

  Args:
    function: traceable.
    *shapes: its arguments, or trees of ShapeDtypeStructs like them.

  Returns:
    (*arguments) -> FLOPs, where trees of ShapeDtypeStructs are unknown values.

  Raises:
    ValueError: at its call, if a loop or branch depends on an unknown value.
  """
  closed = jax.make_jaxpr(function)(*shapes)
  programs = {}

  def count(*arguments):
    leaves = jax.tree.leaves(arguments)
    known = tuple(not isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    if known not in programs:
      programs[known] = jax.jit(lambda *values: _count(
          closed, _merge(known, values))[0])
    with jax.enable_x64(True):
      return float(programs[known](*(
          np.asarray(x, aval.dtype)
          for x, aval, is_known in zip(leaves, closed.in_avals, known)
          if is_known)))

  return count


def _merge(known, values):
  """The values at the places of True, None elsewhere."""
  values = iter(values)
  return [next(values) if is_known else None for is_known in known]


def _count(closed: ClosedJaxpr, args: list) -> tuple[Any, list]:
  """FLOPs, and the outputs; None stands for an unknown value."""
  jaxpr = closed.jaxpr
  env = dict(zip(jaxpr.constvars, closed.consts))
  env |= dict(zip(jaxpr.invars, args, strict=True))
  read = lambda x: (
      np.asarray(x.val, x.aval.dtype) if isinstance(x, Literal) else env[x])
  total = jnp.zeros((), jnp.float64)
  for eqn in jaxpr.eqns:
    inputs = [read(x) for x in eqn.invars]
    name = eqn.primitive.name
    if name == "dot_general":
      flops, outs = _product(eqn), [None]
    elif name in _LOOPS:
      flops, outs = _LOOPS[name](eqn, inputs)
    elif name == "pallas_call":
      raise ValueError("a kernel's loops are not seen from outside")
    elif body := next(filter(None, map(eqn.params.get, _BODIES)), None):
      if isinstance(body, Jaxpr):
        body = ClosedJaxpr(body, ())
      flops, outs = _count(body, inputs)
    elif any(x is None for x in inputs):
      flops, outs = 0.0, [None] * len(eqn.outvars)
    else:
      flops, outs = 0.0, eqn.primitive.bind(*inputs, **eqn.params)
      outs = outs if eqn.primitive.multiple_results else [outs]
    total += flops
    env |= dict(zip(eqn.outvars, outs, strict=True))
  return total, [read(x) for x in jaxpr.outvars]


def _product(eqn) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
      left[axis] for axis in contracted)


def _known_carry(run: Callable, carry: list) -> list[bool]:
  """Which values of a loop's carry stay known; `run` gives the next ones."""
  known, before = [x is not None for x in carry], None
  while known != before:
    before, known = known, [
        k and after for k, after in zip(known, _known_after(run, carry, known))]
  return known


def _known_after(run, carry, known):
  after = []

  def step(values):
    after[:] = [x is not None for x in run(_merge(known, values))]

  jax.eval_shape(step, _pick(known, carry))
  return after


def _pick(known, values):
  return [x for k, x in zip(known, values) if k]


def _scan(eqn, inputs):
  body, length = eqn.params["jaxpr"], eqn.params["length"]
  consts = eqn.params["num_consts"]
  split = consts + eqn.params["num_carry"]
  fixed, carry, xs = inputs[:consts], inputs[consts:split], inputs[split:]
  first = [None if x is None else x[0] for x in xs]
  size = len(carry)
  known = _known_carry(
      lambda c: _count(body, fixed + c + first)[1][:size], carry)
  seen = [x is not None for x in xs]

  def step(state, x):
    total, values = state
    flops, outs = _count(
        body, fixed + _merge(known, values) + _merge(seen, x))
    which.setdefault("ys", [y is not None for y in outs[size:]])
    return (total + flops, _pick(known, outs)), _pick(
        which["ys"], outs[size:])

  which = {}
  (total, values), ys = jax.lax.scan(
      step, (jnp.zeros((), jnp.float64), _pick(known, carry)),
      _pick(seen, xs), length=length, reverse=eqn.params["reverse"])
  return total, _merge(known, values) + _merge(which["ys"], ys)


def _while(eqn, inputs):
  params = eqn.params
  of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
  test_consts, body_consts = inputs[:of_test], inputs[of_test:][:of_body]
  carry = inputs[of_test + of_body:]
  run = lambda c: _count(params["body_jaxpr"], body_consts + c)
  known = _known_carry(lambda c: run(c)[1], carry)

  def test(state):
    _, (more,) = _count(
        params["cond_jaxpr"], test_consts + _merge(known, state[1]))
    return _certain(more)

  def step(state):
    total, values = state
    flops, outs = run(_merge(known, values))
    return total + flops, _pick(known, outs)

  total, values = jax.lax.while_loop(
      test, step, (jnp.zeros((), jnp.float64), _pick(known, carry)))
  return total, _merge(known, values)


def _cond(eqn, inputs):
  branches, index = eqn.params["branches"], _certain(inputs[0])
  known = [x is not None for x in inputs[1:]]
  alike = [True] * len(eqn.outvars)  # known whichever branch runs

  def survey(values):
    for branch in branches:
      outs = _count(branch, _merge(known, values))[1]
      alike[:] = [a and x is not None for a, x in zip(alike, outs)]

  values = _pick(known, inputs[1:])
  jax.eval_shape(survey, values)

  def run(branch):
    def body(values):
      flops, outs = _count(branch, _merge(known, values))
      return jnp.asarray(flops, jnp.float64), _pick(alike, outs)
    return body

  total, outs = jax.lax.switch(index, [run(b) for b in branches], values)
  return total, _merge(alike, outs)


def _certain(x):
  if x is None:
    raise ValueError("a loop or branch depends on an unknown value")
  return x


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def largest_array(function: Callable, *shapes: Any) -> tuple[int, ...]:
  """The shape of the largest array that a function computes; its arguments,
  and arrays of their shapes, are not looked at."""
  closed = jax.make_jaxpr(function)(*shapes)
  given = {tuple(np.shape(x)) for x in jax.tree.leaves(shapes)}
  made = {tuple(v.aval.shape) for eqn in _equations(closed.jaxpr)
          for v in eqn.outvars if hasattr(v.aval, "shape")}
  return max(made - given, key=math.prod)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
  """Of the jaxpr and all inside it."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(
        list(eqn.params.values()),
        is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))):
      if isinstance(inner, ClosedJaxpr):
        inner = inner.jaxpr
      if isinstance(inner, Jaxpr):
        yield from _equations(inner)
