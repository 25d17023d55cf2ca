"""One update: score the pool, draw negatives, gradient on what was drawn.

A batch is B sets of K slots. Its tokens come in chunks of streams, all of one
shape, so that each function here is traced once whatever the batch looks like:

  score   sum over chunks of sequence log-probs -> [B, K]     no gradient
  draw    the MC kernel on [B, K]               -> [B, J] slots
          or, where a draw lasts several steps: keep it once, recall it
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

from mcpo_jax import sharding, types
from mcpo_jax.kernels import mc, weights


class Draws(NamedTuple):
  """What was drawn for n steps by the weights of the first of them.

  Row i belongs to the steps s with s % n == i.
  """

  drawn: types.KernelState  # [n, B, M]
  anchors: dict[str, jax.Array]  # name -> [n, B] float32, what `draw` adds
  seen: dict[str, jax.Array]  # name -> [n] float32, for logs


class TrainState(NamedTuple):
  """All that defines the next step, beside the data and the config."""

  step: jax.Array  # int32, updates done
  params: types.Params
  opt_state: Any
  objective_state: Any
  draws: Draws | tuple[()]  # () where every step draws anew


class Accumulator(NamedTuple):
  """Sums over the chunks of one batch."""

  grads: types.Params
  loss: jax.Array  # [B]
  aux: dict[str, jax.Array]  # name -> [B]


class StepFunctions(NamedTuple):
  """Jitted; see the module docstring. Shapes in `make_step_functions`."""

  state_shapes: TrainState  # ShapeDtypeStructs with shardings
  init: Callable[..., TrainState]
  score: Callable[..., jax.Array]
  draw: Callable[
      ..., tuple[types.KernelState, types.SetBatch, dict[str, jax.Array]]]
  keep: Callable[..., Draws]
  recall: Callable[
      ..., tuple[types.KernelState, types.SetBatch, dict[str, jax.Array]]]
  zeros: Callable[..., Accumulator]
  from_loss: Callable[..., tuple[Accumulator, Any]]
  cotangents: Callable[..., tuple[jax.Array, Accumulator, Any]]
  from_cotangents: Callable[..., Accumulator]
  update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  evaluate: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
  """Mean of x [B] where `where` [B]; 0 if nowhere."""
  return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)


def _with_anchors(
    sets: types.SetBatch, values: dict[str, jax.Array]
) -> types.SetBatch:
  """The sets [B, K] with further anchors, [B] the same in every slot."""
  return sets._replace(anchors=sets.anchors | {
      name: jnp.broadcast_to(x[:, None], sets.role.shape)
      for name, x in values.items()})


def make_step_functions(
    sequence_logps: Callable[..., jax.Array],
    objective: Callable[..., Any],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    strategy: str,
    score: str | None,
    temperature: float | None,
    num_negatives: int,
    include_preferred: bool,
    replace: bool,
    corrected: bool,
    preferred_weight: bool,
    refresh: int,
    batch_size: int,
    beta: float,
    reduce: str,
    param_shapes: types.Params,
    replicated: jax.sharding.Sharding,
) -> StepFunctions:
  """Builds the jitted functions of one training run.

  Args:
    sequence_logps: (params, streams, num_sets, num_slots) -> [B, K] float32,
      zero for what is not in the streams.
    objective: loss(features, batch, state) -> (loss [B], aux, state) with its
      settings bound.
    tx, schedule: optax; the schedule is only reported.
    strategy: of the kernel, or "none": slot 0 alone enters the loss.
    score, temperature: of the kernel; read by some strategies only.
    num_negatives, include_preferred, replace: of the kernel.
    corrected: the kernel weighs by `weights.proposal_correction` too.
    preferred_weight: the objective reads the anchor of that name.
    refresh: n, steps that a draw lasts; 1: nothing is stored.
    batch_size: B.
    beta: of the implicit reward, for kernel scores.
    reduce: "sets" or "tokens", what the global denominator counts.
    param_shapes: tree of ShapeDtypeStruct with shardings.
    replicated: sharding of everything that has no token axis.
  """
  whole = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  seen_names = [f"kernel/{name}" for name in types.KernelInfo._fields
                if name != "log_weights"]

  def stored(dtype, *shape):
    return jax.ShapeDtypeStruct((refresh, *shape), dtype, sharding=replicated)

  draws = ()
  if refresh > 1:
    draws = Draws(
        types.KernelState(stored(jnp.int32, batch_size, num_negatives),
                          stored(jnp.bool_, batch_size, num_negatives)),
        {"preferred_weight": stored(jnp.float32, batch_size)}
        if preferred_weight else {},
        {name: stored(jnp.float32) for name in seen_names})
  state_shapes = TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
      params=param_shapes,
      opt_state=jax.tree.map(
          lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
          jax.eval_shape(tx.init, param_shapes),
          sharding.optimizer_shardings(tx, param_shapes, whole(param_shapes))),
      objective_state=(),
      draws=draws)
  accumulator_shardings = Accumulator(
      whole(param_shapes), replicated, replicated)

  def score_chunk(params, streams, sets):
    return sequence_logps(params, streams, *sets.role.shape)

  def draw(seed, logps, sets):
    if strategy == "none":
      nothing = jnp.zeros((len(sets.role), 0), jnp.int32)
      return types.KernelState(nothing, nothing > 0), sets, {}
    scores = jnp.zeros_like(logps)
    if score is not None:
      scores = mc.kernel_scores(
          logps, sets.anchors.get("ref"), sets.lengths, score=score, beta=beta)
    drawn, info = mc.draw(
        jax.random.key(seed), None, scores, sets, strategy=strategy,
        temperature=1.0 if temperature is None else temperature,
        num_negatives=num_negatives, include_preferred=include_preferred,
        replace=replace, corrected=corrected)
    if preferred_weight:
      p_0 = weights.preferred_weight(scores, sets, temperature=temperature)
      sets = _with_anchors(sets, {"preferred_weight": p_0})
    seen = {name: _mean(getattr(info, name.removeprefix("kernel/")),
                        sets.candidate_mask[:, 0]) for name in seen_names}
    return drawn, sets, seen

  def keep(draws, row, drawn, sets, seen):
    one = Draws(drawn, {name: sets.anchors[name][:, 0]
                        for name in draws.anchors}, seen)
    return jax.tree.map(
        lambda rows, x: rows.at[row].set(x.astype(rows.dtype)), draws, one)

  def recall(draws, step, sets):
    drawn, anchors, seen = jax.tree.map(lambda x: x[step % refresh], draws)
    return drawn, _with_anchors(sets, anchors), seen

  def denominator(sets):
    first = sets.candidate_mask[:, 0]
    return jnp.sum(first if reduce == "sets"
                   else jnp.where(first, sets.lengths[:, 0], 0))

  def loss_terms(logps, sets, drawn, objective_state, present):
    taken, batch = mc.take_drawn(logps, sets, drawn, spent=strategy != "all")
    batch = batch._replace(
        candidate_mask=batch.candidate_mask & present[:, None],
        role=jnp.where(present[:, None], batch.role, 0))
    loss, aux, objective_state = objective(
        types.Features(taken), batch, objective_state)
    loss = jnp.where(present, loss, 0.0)
    total = jnp.sum(loss) / denominator(sets).astype(loss.dtype)
    aux = {name: jnp.where(present, x, 0.0) for name, x in aux.items()}
    return total, (loss, aux, objective_state)

  def zeros(params, logps, sets, drawn, objective_state):
    shapes = jax.eval_shape(loss_terms, logps, sets, drawn, objective_state,
                            sets.candidate_mask[:, 0])[1][:2]
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return Accumulator(jax.tree.map(jnp.zeros_like, params), *empty)

  def from_loss(params, total, streams, sets, drawn, objective_state,
                present):
    def f(params):
      logps = sequence_logps(params, streams, *sets.role.shape)
      return loss_terms(logps, sets, drawn, objective_state, present)

    (_, (loss, aux, new_state)), grads = jax.value_and_grad(
        f, has_aux=True)(params)
    return jax.tree.map(
        jnp.add, total, Accumulator(grads, loss, aux)), new_state

  def cotangents(params, logps, sets, drawn, objective_state):
    terms = jax.value_and_grad(loss_terms, has_aux=True)
    (_, (loss, aux, objective_state)), cotangent = terms(
        logps, sets, drawn, objective_state, sets.candidate_mask[:, 0])
    grads = jax.tree.map(jnp.zeros_like, params)
    return cotangent, Accumulator(grads, loss, aux), objective_state

  def from_cotangents(params, total, streams, cotangent):
    def f(params):
      return jnp.sum(
          cotangent * sequence_logps(params, streams, *cotangent.shape))

    grads = jax.tree.map(jnp.add, total.grads, jax.grad(f)(params))
    return total._replace(grads=grads)

  def update(state, total, sets, drawn, objective_state):
    updates, opt_state = tx.update(total.grads, state.opt_state, state.params)
    norm = optax.tree.norm(total.grads)
    loss = jnp.sum(total.loss) / denominator(sets)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        objective_state=objective_state,
        draws=state.draws)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)

    # Statistics of comparisons leave out sets whose chains drew no negative.
    shown = sets.candidate_mask[:, 0]
    if strategy != "none":
      shown &= jnp.any(drawn.selected_mask, axis=1)
    metrics = {name: _mean(x, shown) for name, x in total.aux.items()}
    metrics |= {
        "loss": loss,
        "grads/global_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "finite": finite,
        "loss_per_set": total.loss,
    }
    return new, metrics

  def evaluate(logps, sets, drawn, objective_state):
    _, (loss, aux, _) = loss_terms(
        logps, sets, drawn, objective_state, sets.candidate_mask[:, 0])
    return loss, aux

  state_shardings = whole(state_shapes)
  jit = jax.jit
  return StepFunctions(
      state_shapes=state_shapes,
      init=lambda params: TrainState(
          jax.device_put(jnp.zeros((), jnp.int32), replicated), params,
          jit(tx.init, out_shardings=state_shardings.opt_state)(params), (),
          jax.tree.map(lambda s: jax.device_put(
              jnp.zeros(s.shape, s.dtype), s.sharding), draws)),
      score=jit(score_chunk, out_shardings=replicated),
      draw=jit(draw, out_shardings=replicated),
      keep=jit(keep, donate_argnums=0, out_shardings=replicated),
      recall=jit(recall, out_shardings=replicated),
      zeros=jit(zeros, out_shardings=accumulator_shardings),
      from_loss=jit(from_loss, donate_argnums=1,
                    out_shardings=(accumulator_shardings, replicated)),
      cotangents=jit(cotangents, out_shardings=(
          replicated, accumulator_shardings, replicated)),
      from_cotangents=jit(from_cotangents, donate_argnums=1,
                          out_shardings=accumulator_shardings),
      update=jit(update, donate_argnums=0,
                 out_shardings=(state_shardings, replicated)),
      evaluate=jit(evaluate, out_shardings=replicated),
  )
