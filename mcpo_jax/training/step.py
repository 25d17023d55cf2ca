"""One update: score the pool, draw negatives, gradient on what was drawn.

A batch is B sets of K slots. Its tokens come in chunks of streams, all of one
shape, so that each function here is traced once whatever the batch looks like:

  score   sum over chunks of sequence log-probs -> [B, K]     no gradient
  draw    the MC kernel on [B, K]                -> [B, M] slots
  grads   per chunk, accumulated; either
            from_loss        the chunk holds its sets whole: loss and gradient
            from_cotangents  d loss / d logps of the whole batch is known
  update  one optimizer update, unless something is not finite

`from_cotangents` makes accumulation exact for every loss, also for one that
looks at the whole batch; when the pool was scored anyway its features are
free. `from_loss` saves a forward pass when it was not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mcpo_jax import types
from mcpo_jax.kernels import mc


class TrainState(NamedTuple):
  """All that defines the next step, beside the data and the config."""

  step: jax.Array  # int32, updates done
  params: types.Params
  opt_state: Any
  objective_state: Any


class Accumulator(NamedTuple):
  """Sums over the chunks of one batch."""

  grads: types.Params
  loss: jax.Array  # [B]
  aux: dict[str, jax.Array]  # name -> [B]
  logps: jax.Array  # [B, J]


class Selection(NamedTuple):
  """The slots of each set that enter the loss; slot 0 comes first."""

  slots: jax.Array  # [B, J] int32
  mask: jax.Array  # [B, J] bool
  drawn: jax.Array  # bool: the multiplicity was spent in the draw


class StepFunctions(NamedTuple):
  """Jitted; see the module docstring."""

  score: Callable[..., jax.Array]
  draw: Callable[..., Any]
  zeros: Callable[..., Accumulator]
  from_loss: Callable[..., Accumulator]
  cotangents: Callable[..., tuple[jax.Array, Accumulator]]
  from_cotangents: Callable[..., Accumulator]
  update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def select_slots(
    sets: types.SetBatch, selection: Selection
) -> types.SetBatch:
  """The metadata of the selected slots: every [B, K] field becomes [B, J]."""
  def take(x):
    return jnp.take_along_axis(x, selection.slots, axis=1)

  mask = take(sets.candidate_mask) & selection.mask
  multiplicity = jnp.where(selection.drawn, 1, take(sets.multiplicity))
  return types.SetBatch(
      role=jnp.where(mask, take(sets.role), 0),
      candidate_mask=mask,
      candidate_id=take(sets.candidate_id),
      multiplicity=multiplicity,
      scores=take(sets.scores),
      lengths=jnp.where(mask, take(sets.lengths), 0),
      anchors={name: take(x) for name, x in sets.anchors.items()},
      example_id=sets.example_id,
      visit=sets.visit,
  )


def make_step_functions(
    sequence_logps: Callable[..., jax.Array],
    objective: Callable[..., Any],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    draw_settings: dict[str, Any],
    score_settings: dict[str, Any],
    reduce: str,
    state_shardings: TrainState,
    replicated: jax.sharding.Sharding,
) -> StepFunctions:
  """Builds the jitted functions of one training run.

  Args:
    sequence_logps: (params, streams, num_sets, num_slots) -> [B, K] float32,
      zero for what is not in the streams.
    objective: loss(features, batch, state) -> (loss [B], aux, state) with its
      settings bound.
    tx, schedule: optax; the schedule is only reported.
    draw_settings: keyword arguments of kernels.mc.draw.
    score_settings: keyword arguments of kernels.mc.kernel_scores.
    reduce: "sets" or "tokens", what the global denominator counts.
    state_shardings: a TrainState of shardings.
    replicated: sharding of everything that has no token axis.
  """
  param_shardings = state_shardings.params
  accumulator_shardings = Accumulator(
      param_shardings, replicated, replicated, replicated)

  def score(params, streams, sets):
    return sequence_logps(params, streams, *sets.role.shape)

  def draw(seed, logps, sets, temperature):
    key = jax.random.key(seed)
    scores = mc.kernel_scores(
        logps, sets.anchors.get("ref"), sets.lengths, **score_settings)
    state, info = mc.draw(key, None, scores, sets, temperature=temperature,
                          **draw_settings)
    # p_0 over the pool, for the CD surrogate without the preferred.
    pool = jnp.where(sets.candidate_mask & (sets.role != 0), scores, -jnp.inf)
    weight = jax.nn.softmax(
        pool + jnp.log(sets.multiplicity.astype(pool.dtype)), axis=1)[:, :1]
    weight = jnp.where(sets.candidate_mask[:, :1], weight, 0.0)
    return state, info, jnp.broadcast_to(weight, logps.shape)

  def denominator(sets):
    first = sets.candidate_mask[:, 0]
    return jnp.sum(first if reduce == "sets"
                   else jnp.where(first, sets.lengths[:, 0], 0))

  def loss_terms(logps, sets, selection, objective_state, present):
    batch = select_slots(sets, selection)
    batch = batch._replace(
        candidate_mask=batch.candidate_mask & present[:, None],
        role=jnp.where(present[:, None], batch.role, 0))
    features = types.Features(
        logps=jnp.take_along_axis(logps, selection.slots, axis=1))
    loss, aux, objective_state = objective(features, batch, objective_state)
    loss = jnp.where(present, loss, 0.0)
    total = jnp.sum(loss) / denominator(sets).astype(loss.dtype)
    aux = {name: jnp.where(present, x, 0.0) for name, x in aux.items()}
    shown = jnp.where(batch.candidate_mask, features.logps, 0.0)
    return total, (loss, aux, shown, objective_state)

  def zeros(params, sets, selection, objective_state):
    shapes = jax.eval_shape(
        loss_terms, jnp.zeros(sets.role.shape), sets, selection,
        objective_state, sets.candidate_mask[:, 0])[1]
    loss, aux, shown, _ = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return Accumulator(jax.tree.map(jnp.zeros_like, params), loss, aux, shown)

  def from_loss(params, total, streams, sets, selection, objective_state,
                present):
    def f(params):
      logps = sequence_logps(params, streams, *sets.role.shape)
      return loss_terms(logps, sets, selection, objective_state, present)

    (_, (loss, aux, shown, _)), grads = jax.value_and_grad(
        f, has_aux=True)(params)
    return jax.tree.map(
        jnp.add, total, Accumulator(grads, loss, aux, shown))

  def cotangents(params, logps, sets, selection, objective_state):
    present = sets.candidate_mask[:, 0]
    (_, (loss, aux, shown, objective_state)), cotangent = jax.value_and_grad(
        loss_terms, has_aux=True)(
            logps, sets, selection, objective_state, present)
    grads = jax.tree.map(jnp.zeros_like, params)
    return cotangent, Accumulator(grads, loss, aux, shown), objective_state

  def from_cotangents(params, total, streams, cotangent):
    def f(params):
      logps = sequence_logps(params, streams, *cotangent.shape)
      return jnp.sum(cotangent * logps)

    grads = jax.tree.map(jnp.add, total.grads, jax.grad(f)(params))
    return total._replace(grads=grads)

  def update(state, total, sets, selection, objective_state):
    updates, opt_state = tx.update(total.grads, state.opt_state, state.params)
    norm = optax.global_norm(total.grads)
    loss = jnp.sum(total.loss) / denominator(sets)
    # Statistics of comparisons leave out sets whose chains drew no negative.
    shown = sets.candidate_mask[:, 0] & (
        jnp.any(selection.mask[:, 1:], axis=1) | (selection.mask.shape[1] == 1))
    count = jnp.maximum(jnp.sum(shown), 1)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        objective_state=objective_state)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics = {
        name: jnp.sum(jnp.where(shown, x, 0)) / count
        for name, x in total.aux.items()}
    metrics |= {
        "loss": loss,
        "grads/global_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "logps/chosen": jnp.sum(jnp.where(shown, total.logps[:, 0], 0)) / count,
        "finite": finite,
        "loss_per_set": total.loss,
    }
    return new, metrics

  jit = jax.jit
  return StepFunctions(
      score=jit(score, out_shardings=replicated),
      draw=jit(draw, out_shardings=replicated),
      zeros=jit(zeros, out_shardings=accumulator_shardings),
      from_loss=jit(from_loss, donate_argnums=1,
                    out_shardings=accumulator_shardings),
      cotangents=jit(cotangents, out_shardings=(
          replicated, accumulator_shardings, replicated)),
      from_cotangents=jit(from_cotangents, donate_argnums=1,
                          out_shardings=accumulator_shardings),
      update=jit(update, donate_argnums=(0, 1),
                 out_shardings=(state_shardings, replicated)),
  )
