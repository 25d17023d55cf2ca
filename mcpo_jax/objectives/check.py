"""Which of the properties of an objective a loss has.

    report = mcpo_jax.check_objective(my_loss, beta=0.1)
    assert report.ok, report

The sets of the check: two full ones, one with a tied candidate, one cut short,
one without a negative, one masked all over. Pairwise losses get one negative.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import registry, user_code
from mcpo_jax.kernels import weights
from mcpo_jax.types import MISMATCHED_ID, Array, Features, SetBatch

EXTREME = 1e4  # nats
STEP = 1e-5  # of finite differences, nats
TOLERANCE = 1e-9  # of float64 where two ways must give the same
_TIED, _CUT, _ALONE, _NO_SET = 1, 2, 4, 5  # rows
_NUM_SETS = 6


class Property(NamedTuple):
  """One property, and whether an objective must have it."""

  name: str
  passed: bool
  required: bool
  detail: str  # what was seen where it fails


class Report(NamedTuple):
  """What `check_objective` found. Prints as a table."""

  function: str
  properties: tuple[Property, ...]

  @property
  def ok(self) -> bool:
    """Whether the loss has every property that is required."""
    return all(p.passed for p in self.properties if p.required)

  def __str__(self) -> str:
    words = {(True, True): "pass", (False, True): "FAIL",
             (True, False): "yes", (False, False): "no"}
    rows = [f"{self.function}: {'ok' if self.ok else 'not ok'}"]
    for p in self.properties:
      word = words[p.passed, p.required]
      rows.append(f"  {word:4}  {p.name:9}  {p.detail}".rstrip())
    return "\n".join(rows)

  __repr__ = __str__  # a notebook shows this one


class _Inputs(NamedTuple):
  """What a loss is called with."""

  features: Features
  batch: SetBatch
  state: Any


class _Outcome(NamedTuple):
  """What one evaluation of a loss tells."""

  losses: Array  # [B]
  aux: dict[str, Array]  # name -> [B]
  grad: Array  # [B, J] of the summed losses, with respect to logps
  anchors_grad: dict[str, Array]  # the same with respect to the anchors
  aux_grad: Array  # [B, J] of the summed aux, with respect to logps


class _Case(NamedTuple):
  """What every property is judged by."""

  needs: registry.Objective
  evaluate: Callable[[_Inputs], _Outcome]  # jitted
  inputs: _Inputs
  base: _Outcome  # of the inputs, in float64


def check_objective(fn: Callable[..., Any], **settings: Any) -> Report:
  """Checks a loss on small sets made for it.

  Required of every objective:

    shapes     losses [B] and aux [B] are float, the state keeps its form
    jit        the same under jit
    masks      what stands in masked slots, NaN too, changes nothing
    rows       the order of the sets does not matter
    empty      loss, gradient and aux are 0 on rows that are no set and, where
               contrast is needed, on rows without a negative
    anchors    no gradient to the anchors
    aux        no gradient through aux
    learning   a gradient step, begun where the policy equals every anchor,
               raises the chosen completion above the negatives
    extremes   finite in value and gradient at +-1e4 nats in float32, also for
               completions of one token

  Told, but not required:

    separable  a row's loss depends on no other row; required if declared
    slots      the order of the negatives does not matter
    shift      a constant added to all logps of a row changes nothing
    gradient   equals finite differences in float64; if not, the loss holds a
               part of itself constant on purpose, or its gradient is wrong

  Args:
    fn: loss(features, batch, state, **settings). Its needs are those of the
      registry or of the decorator `mcpo_jax.objective`.
    **settings: of the loss.

  Returns:
    Report. It ends with the first of shapes and jit that fails.
  """
  needs = user_code.needs_of(fn)
  if "progress" in inspect.signature(fn).parameters:
    settings = {"progress": 0.5} | settings
  loss = lambda inputs: fn(*inputs, **settings)
  evaluate = _make_evaluate(loss)
  found = []

  def note(name, problem, required=True):
    found.append(Property(name, not problem, required, problem))

  def report():
    return Report(getattr(fn, "__name__", str(fn)), tuple(found))

  inputs = _inputs(needs)
  try:
    note("shapes", _shapes(loss(_cast(inputs, np.float32)), inputs.state))
  except Exception as e:  # the loss is the user's: anything may come
    note("shapes", f"raises {type(e).__name__}: {e}")
  if not report().ok:
    return report()
  try:
    evaluate(_cast(inputs, np.float32))
  except Exception as e:
    note("jit", f"raises {type(e).__name__}: {e}")
    return report()
  with jax.enable_x64(True):
    losses, _, _ = loss(inputs)
    base = jax.tree.map(np.asarray, evaluate(inputs))
    note("jit", _differ("the loss is another", losses, base.losses))
    case = _Case(needs, evaluate, inputs, base)
    for judge in (_masks, _rows, _empty, _anchors, _aux, _learning):
      note(judge.__name__[1:], judge(case))
    note("separable", _separable(case), required=needs.separable)
    for judge in (_slots, _shift, _gradient):
      note(judge.__name__[1:], judge(case), required=False)
  note("extremes", _extremes(case))
  return report()


def _inputs(needs):
  """Random sets in float64; masked slots hold 0 in all that is float."""
  rng = np.random.default_rng(0)
  num_slots = 2 if needs.pairwise else 4
  shape = (_NUM_SETS, num_slots + needs.mismatched)
  role = np.full(shape, -1, np.int8)
  role[:, 0] = 1
  role[_ALONE, 1:] = 0
  mask = np.ones(shape, bool)
  mask[_NO_SET] = False
  if not needs.pairwise:
    role[_TIED, 2] = 0
    mask[_CUT, 2:num_slots] = False
  candidate_id = np.tile(np.arange(shape[1], dtype=np.uint32), (_NUM_SETS, 1))
  if needs.mismatched:
    role[:, -1] = 0
    candidate_id[:, -1] = MISMATCHED_ID
  hide = lambda x: np.where(mask, x, 0.0)
  lengths = np.where(mask, rng.integers(2, 9, shape), 0).astype(np.int32)
  scores = np.where(role == -1, -np.arange(shape[1]), 1.0).astype(np.float32)
  # Between -2 and -0.5 nats a token, so that means are log-probs as well.
  draw = lambda: hide(lengths * rng.uniform(-2.0, -0.5, shape))
  batch = SetBatch(
      role=role,
      candidate_mask=mask,
      candidate_id=candidate_id,
      multiplicity=rng.integers(1, 4, shape).astype(np.int32),
      scores=scores,
      lengths=lengths,
      anchors={name: draw() for name in needs.anchors},
      example_id=rng.integers(0, 2**32, (_NUM_SETS, 2), dtype=np.uint32),
      visit=np.zeros(_NUM_SETS, np.int32),
      row=rng.permutation(_NUM_SETS).astype(np.int32),
  )
  terms = {name: hide(rng.uniform(0.1, 1.0, shape)) for name in needs.terms}
  state = ()
  if needs.state:
    place = user_code.find(needs.state, where="state").place
    state = user_code.load(place)(_NUM_SETS)
  return _Inputs(Features(draw(), terms), batch, state)


def _make_evaluate(loss):
  """Jitted: _Inputs -> _Outcome."""
  @jax.jit
  def evaluate(inputs):
    def run(features, anchors):
      batch = inputs.batch._replace(anchors=anchors)
      losses, aux, _ = loss(inputs._replace(features=features, batch=batch))
      aux = {name: jnp.asarray(x, losses.dtype) for name, x in aux.items()}
      return losses, aux

    (losses, aux), pull = jax.vjp(run, inputs.features, inputs.batch.anchors)
    fill = lambda tree, value: jax.tree.map(
        lambda x: jnp.full_like(x, value), tree)
    grad, anchors_grad = pull((fill(losses, 1.0), fill(aux, 0.0)))
    aux_grad, _ = pull((fill(losses, 0.0), fill(aux, 1.0)))
    return _Outcome(losses, aux, grad.logps, anchors_grad, aux_grad.logps)

  return evaluate


def _shapes(returned, state):
  """What is wrong with what the loss returned for a float32 batch."""
  losses, aux, after = returned
  for name, x in (("losses", losses), *aux.items()):
    if jnp.shape(x) != (_NUM_SETS,):
      return f"{name}: shape {jnp.shape(x)}, want [B] = ({_NUM_SETS},)"
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
      return f"{name}: {jnp.asarray(x).dtype}, want float"
  form = lambda tree: jax.tree.map(
      lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)
  if form(after) != form(state):
    return f"state: {form(after)}, want {form(state)}"
  return ""


def _masks(case):
  mask = case.inputs.batch.candidate_mask
  hidden = lambda x: np.where(mask, x, np.nan)
  batch = case.inputs.batch
  batch = batch._replace(
      anchors={name: hidden(x) for name, x in batch.anchors.items()},
      scores=hidden(batch.scores))
  logps = case.inputs.features.logps
  got = case.evaluate(_with_logps(case.inputs, hidden(logps), batch))
  return (
      _differ("NaN there changes the loss", case.base.losses, got.losses)
      or _differ("NaN there changes the gradient", case.base.grad, got.grad)
      or _differ("NaN there changes aux", case.base.aux, got.aux)
      or _differ("their gradient is not 0", 0.0, case.base.grad * ~mask))


def _rows(case):
  rows = np.array([3, 5, 0, 4, 1, 2])
  take = lambda tree: jax.tree.map(lambda x: x[rows], tree)
  got = case.evaluate(case.inputs._replace(
      features=take(case.inputs.features), batch=take(case.inputs.batch)))
  # A loss of the whole batch may divide its sum over the rows by rank.
  return (
      _differ("the order changes the summed loss",
              case.base.losses.sum(), got.losses.sum())
      or _differ("the order changes the gradient", case.base.grad[rows],
                 got.grad))


def _empty(case):
  rows = {_NO_SET: "a row that is no set"}
  if case.needs.contrast:
    rows[_ALONE] = "a row without a negative"
  for row, name in rows.items():
    told = {"loss": case.base.losses, "gradient": case.base.grad}
    for what, x in (told | case.base.aux).items():
      problem = _differ(f"{name} has {what}, not 0, off", 0.0, x[row])
      if problem:
        return problem
  return ""


def _anchors(case):
  return next(filter(None, (
      _differ(f"gradient to {name}", 0.0, x)
      for name, x in case.base.anchors_grad.items())), "")


def _aux(case):
  return _differ("gradient through aux", 0.0, case.base.aux_grad)


def _learning(case):
  batch = case.inputs.batch
  logps = case.inputs.features.logps
  batch = batch._replace(anchors={name: logps for name in batch.anchors})
  grad = case.evaluate(_with_logps(case.inputs, logps, batch)).grad
  if case.needs.terms and not np.any(grad):
    return ""  # it compares its own terms, of which nothing is known here
  negative = weights.negatives(batch)
  count = jnp.sum(negative, axis=1)
  rejected = jnp.sum(jnp.where(negative, grad, 0.0), axis=1)
  change = -grad[:, 0] + rejected / jnp.maximum(count, 1)
  change = float(jnp.sum(jnp.where(count > 0, change, 0.0)))
  return "" if change > 0.0 else (
      "a gradient step changes chosen - rejected by "
      f"{change:.3g} times the learning rate")


def _separable(case):
  logps = case.inputs.features.logps
  rng = np.random.default_rng(1)
  for row in [*range(_ALONE)] * 3:
    # Far enough to change every rank among the rows now and then.
    moved = rng.uniform(0.0, 5.0, logps.shape) * logps
    moved[row] = logps[row]
    got = case.evaluate(_with_logps(case.inputs, moved))
    problem = (
        _differ("other rows change its loss", case.base.losses[row],
                got.losses[row])
        or _differ("other rows change its gradient", case.base.grad[row],
                   got.grad[row]))
    if problem:
      return problem
  return ""


def _slots(case):
  batch = case.inputs.batch
  last = batch.role.shape[1] - case.needs.mismatched
  slots = np.r_[0, np.roll(np.arange(1, last), 1), last:batch.role.shape[1]]
  of_sets = ("example_id", "visit", "row")
  take = lambda x: x[:, slots]
  got = case.evaluate(case.inputs._replace(
      features=jax.tree.map(take, case.inputs.features),
      batch=SetBatch(**{
          name: x if name in of_sets else jax.tree.map(take, x)
          for name, x in batch._asdict().items()})))
  return _differ("their order changes the loss", case.base.losses, got.losses)


def _shift(case):
  logps = case.inputs.features.logps
  moved = np.where(case.inputs.batch.candidate_mask, logps - 0.5, logps)
  got = case.evaluate(_with_logps(case.inputs, moved))
  return _differ("it changes the loss", case.base.losses, got.losses)


def _gradient(case):
  logps = case.inputs.features.logps

  def total(moved):
    return float(np.sum(case.evaluate(_with_logps(case.inputs, moved)).losses))

  want = np.zeros_like(logps)
  for slot in np.argwhere(case.inputs.batch.candidate_mask):
    step = np.zeros_like(logps)
    step[tuple(slot)] = STEP
    want[tuple(slot)] = (total(logps + step) - total(logps - step)) / (2 * STEP)
  return _differ("it is another than finite differences", want,
                 case.base.grad, tolerance=1e-6)


def _extremes(case):
  mask = case.inputs.batch.candidate_mask
  sign = np.where(np.arange(mask.shape[1]) == 0, 1.0, -1.0)
  sign = np.broadcast_to(sign, mask.shape)
  one_token = np.where(mask, 1, 0).astype(np.int32)
  for lengths in (case.inputs.batch.lengths, one_token):
    batch = case.inputs.batch._replace(lengths=lengths)
    for signs in (sign, -sign, -np.ones(mask.shape)):
      inputs = _with_logps(
          case.inputs, np.where(mask, EXTREME * signs, 0.0), batch)
      got = case.evaluate(_cast(inputs, np.float32))
      for name, x in (("loss", got.losses), ("gradient", got.grad),
                      *got.aux.items()):
        if not np.isfinite(x).all():
          return (f"{name} not finite at chosen {EXTREME * signs[0, 0]:g}, "
                  f"rejected {EXTREME * signs[0, 1]:g}")
  return ""


def _with_logps(inputs, logps, batch=None):
  """The same inputs with other log-probs and perhaps another batch."""
  return inputs._replace(
      features=inputs.features._replace(logps=logps),
      batch=inputs.batch if batch is None else batch)


def _cast(inputs, dtype):
  """The same inputs, what is float64 in another dtype."""
  return jax.tree.map(
      lambda x: x.astype(dtype) if x.dtype == np.float64 else x, inputs)


def _differ(message, want, got, tolerance=TOLERANCE):
  """The message with the largest difference, empty where there is none."""
  pairs = zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True)
  gap = max(float(np.max(np.abs(np.asarray(b) - a), initial=0.0))
            for a, b in pairs)
  size = max(float(np.max(np.abs(x), initial=1.0))
             for x in jax.tree.leaves(want))
  # Not `gap > ...`: NaN differs from everything.
  return "" if gap <= tolerance * size else f"{message} by {gap:.3g}"
