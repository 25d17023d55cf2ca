"""One update: score the pool, draw negatives, gradient on what was drawn.

A batch is B sets of K slots. Its tokens come in chunks of streams, all of one
shape, so that each function here is traced once whatever the batch looks like:

  score     sum over chunks of sequence log-probs -> [B, K]     no gradient
            or forward: the same, and what backward needs of each chunk
  draw      the MC kernel on [B, K]               -> [B, J] slots
            or, where a draw lasts several steps: keep it once, recall it
  features  sum over chunks of all that the objective needs -> Features [B, K]
  grads     per chunk, accumulated; either
              from_loss        the chunk holds its sets whole: loss and gradient
              from_cotangents  d loss / d features of the whole batch is known
              backward         likewise, and the forward pass was kept
  update    one optimizer update, unless something is not finite
  examine   sum over chunks of all that an evaluation reads; evaluate: its loss

`from_cotangents` makes accumulation exact for every loss, also for one that
looks at the whole batch; when the pool was scored anyway its features are
free. `from_loss` saves a forward pass when it was not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcpo_jax import sharding, types
from mcpo_jax.kernels import chains, mc, weights
from mcpo_jax.models import lora
from mcpo_jax.training import residuals


class Kernel(NamedTuple):
  """How negatives are drawn; see `mc.draw` and `chains.walk`.

  The strategy "none" draws nothing: slot 0 alone enters the loss.
  """

  strategy: str
  score: str | None = None
  temperature: float | None = None
  temperature_schedule: str | None = "constant"
  temperature_end: float | None = None
  num_negatives: int = 1
  include_preferred: bool = False
  replace: bool = False
  corrected: bool = False
  transition: str | None = "categorical"
  num_steps: int | None = 1
  block_size: int | None = None
  init: str | None = "preferred"
  repulsion: float | None = None
  custom: Callable[..., Any] | None = None  # a kernel of the user's own

  @property
  def walks(self) -> bool:
    """Whether chains walk, instead of one draw from the whole pool."""
    return self.strategy == "mc" and (
        self.transition, self.num_steps, self.block_size, self.init
    ) != ("categorical", 1, None, "preferred")

  @property
  def remembers(self) -> bool:
    """Whether an example's chains go on where its last visit left them."""
    return self.init == "persistent" or self.transition == "self_repellent"


class Objective(NamedTuple):
  """A loss with its settings bound, and what it needs of the step."""

  loss: Callable[..., Any]  # (features, batch, state) -> (loss, aux, state)
  init_state: Callable[[], Any] = lambda: ()
  init_params: Callable[[], Any] | None = None  # of learned parameters
  preferred_weight: bool = False  # reads the anchor of that name
  prefix_length: bool = False  # reads the anchor of that name
  mismatched: bool = False  # takes the slot of `types.MISMATCHED_ID` too
  progress: bool = False  # takes `progress`, the share of the stage done
  contrast: bool = True  # nothing to learn from a set without a negative
  reduce: str = "sets"  # or "tokens": what the global denominator counts


class Draws(NamedTuple):
  """What was drawn for n steps by the weights of the first of them.

  Row i belongs to the steps s with s % n == i.
  """

  drawn: types.KernelState  # [n, B, M]
  anchors: dict[str, jax.Array]  # name -> [n, B] float32, what `draw` adds
  seen: dict[str, jax.Array]  # name -> [n] float32, for logs


class Memory(NamedTuple):
  """Where the chains of N training examples stand, for kernels that go on."""

  selected: jax.Array  # [N, M] int32, slot, 0 the preferred's
  history: jax.Array  # [N, K] int32, how often each slot was drawn


class TrainState(NamedTuple):
  """All that defines the next step, beside the data and the config.

  `params` are those of the policy that are trained: all, or with LoRA the
  adapters alone. What an objective learns beside it lies among them under
  "objective".
  """

  step: jax.Array  # int32, updates done
  params: types.Params
  opt_state: Any
  objective_state: Any
  draws: Draws | tuple[()]  # () where every step draws anew
  memory: Memory | tuple[()]  # () where chains begin anew
  # Weights that follow the policy's at a distance; () where nothing needs them.
  moving: types.Params | tuple[()] = ()


class Inputs(NamedTuple):
  """What a batch's loss is computed from, beside the features."""

  sets: types.SetBatch  # [B, K]
  drawn: types.KernelState  # [B, M]
  objective_state: Any
  step: jax.Array  # int32, updates done


class Accumulator(NamedTuple):
  """Sums over the chunks of one batch."""

  grads: types.Params  # float32 at least
  loss: jax.Array  # [B]
  aux: dict[str, jax.Array]  # name -> [B]


class StepFunctions(NamedTuple):
  """Jitted; see the module docstring. Shapes in `make_step_functions`."""

  state_shapes: TrainState  # ShapeDtypeStructs with shardings
  init: Callable[..., TrainState]
  score: Callable[..., jax.Array]
  forward: Callable[..., tuple[jax.Array, Any]]
  draw: Callable[..., tuple[
      types.KernelState, types.SetBatch, Any, dict[str, jax.Array]]]
  keep: Callable[..., Draws]
  recall: Callable[..., tuple[
      types.KernelState, types.SetBatch, dict[str, jax.Array]]]
  features: Callable[..., types.Features]
  zeros: Callable[..., Accumulator]
  from_loss: Callable[..., tuple[Accumulator, Any]]
  cotangents: Callable[..., tuple[types.Features, Accumulator, Any]]
  from_cotangents: Callable[..., Accumulator]
  backward: Callable[..., Accumulator]
  update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  examine: Callable[..., tuple[types.Features, jax.Array]]
  evaluate: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def policy_of(params: types.Params) -> types.Params:
  """The policy's parameters, without what an objective learns beside it."""
  return {name: x for name, x in params.items() if name != "objective"}


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


def _take_mismatched(
    drawn: types.KernelState, sets: types.SetBatch
) -> types.KernelState:
  """The draw with one more column: the slot of another prompt's completion."""
  foreign = sets.candidate_mask & (sets.candidate_id == types.MISMATCHED_ID)
  slot = jnp.argmax(foreign, axis=1, keepdims=True).astype(jnp.int32)
  return drawn._replace(
      selected=jnp.concatenate([drawn.selected, slot], axis=1),
      selected_mask=jnp.concatenate(
          [drawn.selected_mask, jnp.any(foreign, axis=1, keepdims=True)],
          axis=1))


def recollect(memory: Memory, row: jax.Array) -> types.KernelState:
  """[B, M] where the chains of a batch's examples stand; row -1 (held-out
  data) begins at the preferred completion without a history."""
  known = (row >= 0)[:, None]
  selected = jnp.where(known, memory.selected[row], 0)
  return types.KernelState(
      selected, selected > 0, jnp.where(known, memory.history[row], 0))


def remember(
    memory: Memory, row: jax.Array, before: types.KernelState,
    after: types.KernelState
) -> Memory:
  """The memory after a batch. Of an example that stands in it twice, as at
  the seam of two epochs, the later draw is where the chains go on."""
  nowhere = len(memory.selected)
  counted = jnp.where(row >= 0, row, nowhere)
  again = jnp.any(jnp.triu(row[:, None] == row[None, :], 1), axis=1)
  return Memory(
      memory.selected.at[jnp.where(again, nowhere, counted)].set(
          after.selected, mode="drop"),
      memory.history.at[counted].add(
          after.history - before.history, mode="drop"))


def make_step_functions(
    features: Callable[..., types.Features],
    sequence_logps: Callable[..., jax.Array],
    held_out_values: Callable[..., tuple[types.Features, jax.Array]],
    objective: Objective,
    kernel: Kernel,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    num_steps: int,
    refresh: int,
    batch_size: int,
    num_examples: int,
    num_slots: int,
    beta: float,
    param_shapes: types.Params,
    moving: bool,
    replicated: jax.sharding.Sharding,
    offload: bool = False,
) -> StepFunctions:
  """Builds the jitted functions of one training run.

  Args:
    features: (params, reference, streams, sets) -> Features [B, K], zero for
      what is not in the streams; here and below of all parameters.
    sequence_logps: (params, streams, num_sets, num_slots) -> [B, K] float32,
      their log-probs alone.
    held_out_values: (params, streams, sets) -> Features [B, K] and hidden sums
      [B, K, D], for evaluations.
    objective: the loss and its needs.
    kernel: how negatives are drawn.
    tx, schedule: optax; the schedule is only reported.
    num_steps: of the stage.
    refresh: n, steps that a draw lasts; 1: nothing is stored.
    batch_size: B.
    num_examples: N, training examples, of kernels and losses with a memory.
    num_slots: K.
    beta: of the implicit reward, for kernel scores.
    param_shapes: tree of ShapeDtypeStruct with shardings, of what is trained.
    moving: whether the state carries moving weights, at first the policy's.
    replicated: sharding of everything that has no token axis.
    offload: keep the optimizer's state in the hosts' memory; it comes to the
      devices for `update` alone, when no activations are there.
  """
  whole = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  on_all = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      tree)
  info_names = [name for name in types.KernelInfo._fields
                if name != "log_weights"]
  seen_names = [f"kernel/{name}" for name in info_names] + (
      [] if kernel.temperature is None else ["kernel/temperature"])

  def stored(dtype, *shape):
    return jax.ShapeDtypeStruct((refresh, *shape), dtype, sharding=replicated)

  draws = ()
  if refresh > 1:
    columns = kernel.num_negatives + objective.mismatched
    draws = Draws(
        types.KernelState(stored(jnp.int32, batch_size, columns),
                          stored(jnp.bool_, batch_size, columns)),
        {"preferred_weight": stored(jnp.float32, batch_size)}
        if objective.preferred_weight else {},
        {name: stored(jnp.float32) for name in seen_names})
  memory = ()
  if kernel.remembers:
    memory = on_all(jax.eval_shape(lambda: Memory(
        jnp.zeros((num_examples, kernel.num_negatives), jnp.int32),
        jnp.zeros((num_examples, num_slots), jnp.int32))))
  if objective.init_params is not None:
    param_shapes = param_shapes | {
        "objective": on_all(jax.eval_shape(objective.init_params))}
  opt_shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(tx.init, param_shapes),
      sharding.optimizer_shardings(tx, param_shapes, whole(param_shapes)))
  state_shapes = TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
      params=param_shapes,
      opt_state=sharding.on_host(opt_shapes) if offload else opt_shapes,
      objective_state=on_all(jax.eval_shape(objective.init_state)),
      draws=draws,
      memory=memory,
      moving=param_shapes if moving else ())
  accumulator_shardings = Accumulator(
      whole(param_shapes), replicated, replicated)

  def init(params):
    if objective.init_params is not None:
      params = params | {"objective": jax.jit(
          objective.init_params, out_shardings=replicated)()}
    zeros = lambda tree: jax.tree.map(lambda s: sharding.put_global(
        np.zeros(s.shape, s.dtype), s.sharding), tree)
    return TrainState(
        step=zeros(state_shapes.step),
        params=params,
        opt_state=jax.jit(
            tx.init, out_shardings=whole(state_shapes.opt_state))(params),
        objective_state=jax.jit(
            objective.init_state, out_shardings=replicated)(),
        draws=zeros(draws),
        memory=zeros(memory),
        moving=jax.tree.map(jnp.copy, params) if moving else ())

  def score_chunk(params, streams, sets):
    return sequence_logps(params, streams, *sets.role.shape)

  def forward(params, frozen, streams, sets):
    return residuals.forward(
        lambda params: score_chunk(lora.join(params, frozen), streams, sets),
        params, frozen)

  def draw(seed, step, memory, logps, sets):
    if kernel.strategy == "none":
      nothing = jnp.zeros((len(sets.role), 0), jnp.int32)
      return types.KernelState(nothing, nothing > 0), sets, memory, {}
    scores = jnp.zeros_like(logps)
    if kernel.score is not None:
      scores = mc.kernel_scores(
          logps, sets.anchors.get("ref"), sets.lengths, score=kernel.score,
          beta=beta)
    temperature = 1.0
    if kernel.temperature is not None:
      temperature = weights.temperature_at(
          step, start=kernel.temperature, end=kernel.temperature_end,
          num_steps=num_steps, schedule=kernel.temperature_schedule)
    settings = {
        "temperature": temperature, "num_negatives": kernel.num_negatives,
        "include_preferred": kernel.include_preferred}
    key = jax.random.key(seed)
    if kernel.custom is not None:
      drawn, info = kernel.custom(key, None, scores, sets, **settings)
    elif kernel.walks:
      standing = recollect(memory, sets.row) if memory else None
      drawn, info = chains.walk(
          key, standing, scores, sets, **settings,
          transition=kernel.transition, num_steps=kernel.num_steps,
          block_size=kernel.block_size, init=kernel.init,
          repulsion=kernel.repulsion, corrected=kernel.corrected)
      if memory:
        memory = remember(memory, sets.row, standing, drawn)
    else:
      drawn, info = mc.draw(
          key, None, scores, sets, **settings, strategy=kernel.strategy,
          replace=kernel.replace, corrected=kernel.corrected)
    drawn = drawn._replace(history=())
    if objective.preferred_weight:
      p_0 = weights.preferred_weight(scores, sets, temperature=temperature)
      sets = _with_anchors(sets, {"preferred_weight": p_0})
    seen = {f"kernel/{name}": _mean(
        getattr(info, name), sets.candidate_mask[:, 0]) for name in info_names}
    if kernel.temperature is not None:
      seen["kernel/temperature"] = jnp.asarray(temperature, jnp.float32)
    if refresh == 1:
      seen["kernel/log_weights"] = info.log_weights
    if objective.mismatched:
      drawn = _take_mismatched(drawn, sets)
    return drawn, sets, memory, seen

  def keep(draws, row, drawn, sets, seen):
    one = Draws(drawn, {name: sets.anchors[name][:, 0]
                        for name in draws.anchors}, seen)
    return jax.tree.map(
        lambda rows, x: rows.at[row].set(x.astype(rows.dtype)), draws, one)

  def recall(draws, step, sets):
    drawn, anchors, seen = jax.tree.map(lambda x: x[step % refresh], draws)
    return drawn, _with_anchors(sets, anchors), seen

  def with_prefix(inputs):
    """The sets, and where the objective reads it the length of the shorter
    one of each pair as the anchor "prefix_length"."""
    if not objective.prefix_length:
      return inputs.sets
    lengths = jnp.take_along_axis(
        inputs.sets.lengths, inputs.drawn.selected[:, :1], axis=1)
    shared = jnp.minimum(inputs.sets.lengths[:, 0], lengths[:, 0])
    return _with_anchors(inputs.sets, {"prefix_length": shared})

  def chunk_features(params, reference, streams, inputs):
    return features(params, reference, streams, with_prefix(inputs))

  def denominator(sets):
    first = sets.candidate_mask[:, 0]
    return jnp.sum(first if objective.reduce == "sets"
                   else jnp.where(first, sets.lengths[:, 0], 0))

  def loss_terms(values, inputs, present):
    sets = with_prefix(inputs)
    taken, batch = mc.take_drawn(
        values, sets, inputs.drawn,
        spent=kernel.strategy not in ("all", "pool"))
    batch = batch._replace(
        candidate_mask=batch.candidate_mask & present[:, None],
        role=jnp.where(present[:, None], batch.role, 0))
    settings = {}
    if objective.progress:
      settings["progress"] = jnp.minimum(inputs.step / num_steps, 1.0)
    loss, aux, objective_state = objective.loss(
        taken, batch, inputs.objective_state, **settings)
    loss = jnp.where(present, loss, 0.0)
    total = jnp.sum(loss) / denominator(sets).astype(loss.dtype)
    aux = {name: jnp.where(present, x, 0.0) for name, x in aux.items()}
    return total, (loss, aux, objective_state)

  def no_grads(params):
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        params)

  def zeros(params, values, inputs):
    shapes = jax.eval_shape(
        loss_terms, values, inputs, inputs.sets.candidate_mask[:, 0])[1][:2]
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return Accumulator(no_grads(params), *empty)

  def from_loss(params, frozen, reference, total, streams, inputs, present):
    def f(params):
      values = chunk_features(
          lora.join(params, frozen), reference, streams, inputs)
      return loss_terms(values, inputs, present)

    (_, (loss, aux, new_state)), grads = jax.value_and_grad(
        f, has_aux=True)(params)
    return jax.tree.map(
        jnp.add, total, Accumulator(grads, loss, aux)), new_state

  def cotangents(params, values, inputs):
    terms = jax.value_and_grad(loss_terms, has_aux=True)
    (_, (loss, aux, objective_state)), cotangent = terms(
        values, inputs, inputs.sets.candidate_mask[:, 0])
    return (cotangent, Accumulator(no_grads(params), loss, aux),
            objective_state)

  def from_cotangents(
      params, frozen, reference, total, streams, inputs, cotangent):
    def f(params):
      values = chunk_features(
          lora.join(params, frozen), reference, streams, inputs)
      return sum(jax.tree.leaves(jax.tree.map(
          lambda c, x: jnp.sum(c * x), cotangent, values)))

    grads = jax.tree.map(jnp.add, total.grads, jax.grad(f)(params))
    return total._replace(grads=grads)

  def backward(params, frozen, total, kept, cotangent):
    grads = residuals.backward(params, frozen, kept, cotangent.logps)
    return total._replace(grads=jax.tree.map(jnp.add, total.grads, grads))

  def update(state, total, inputs, memory):
    if offload:
      state = state._replace(
          opt_state=jax.device_put(state.opt_state, whole(opt_shapes)))
    updates, opt_state = tx.update(total.grads, state.opt_state, state.params)
    norm = optax.tree.norm(total.grads)
    loss = jnp.sum(total.loss) / denominator(inputs.sets)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        objective_state=inputs.objective_state,
        draws=state.draws,
        memory=memory,
        moving=state.moving)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    new = new._replace(step=state.step + 1)  # its batch is over

    # Statistics of comparisons leave out sets whose chains drew no negative.
    shown = inputs.sets.candidate_mask[:, 0]
    if objective.contrast:
      shown &= jnp.any(inputs.drawn.selected_mask, axis=1)
    metrics = {name: _mean(x, shown) for name, x in total.aux.items()}
    metrics |= {
        "loss": loss,
        "grads/global_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "finite": finite,
        "loss_per_set": total.loss,
    }
    return new, metrics

  def evaluate(values, inputs):
    _, (loss, aux, _) = loss_terms(
        values, inputs, inputs.sets.candidate_mask[:, 0])
    return loss, aux

  state_shardings = whole(state_shapes)
  jit = jax.jit
  return StepFunctions(
      state_shapes=state_shapes,
      init=init,
      score=jit(score_chunk, out_shardings=replicated),
      forward=jit(forward, out_shardings=(replicated, None)),
      draw=jit(draw, out_shardings=replicated),
      keep=jit(keep, donate_argnums=0, out_shardings=replicated),
      recall=jit(recall, out_shardings=replicated),
      features=jit(chunk_features, out_shardings=replicated),
      zeros=jit(zeros, out_shardings=accumulator_shardings),
      from_loss=jit(from_loss, donate_argnums=3,
                    out_shardings=(accumulator_shardings, replicated)),
      cotangents=jit(cotangents, out_shardings=(
          replicated, accumulator_shardings, replicated)),
      from_cotangents=jit(from_cotangents, donate_argnums=3,
                          out_shardings=accumulator_shardings),
      backward=jit(backward, donate_argnums=2,
                   out_shardings=accumulator_shardings),
      update=jit(update, donate_argnums=0,
                 out_shardings=(state_shardings, replicated)),
      examine=jit(held_out_values, out_shardings=replicated),
      evaluate=jit(evaluate, out_shardings=replicated),
  )
