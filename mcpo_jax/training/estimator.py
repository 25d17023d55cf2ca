"""How good the drawn negatives are: their gradient against the whole pool's.

The samples of MC-PO and CD stand for the expectation under the model in the
gradient of log Z. For a pool of K candidates that expectation is a finite sum,
so what the samples cost can be measured on the real model while it trains.
"""

import jax
import jax.numpy as jnp
import optax

from mcpo_jax import types
from mcpo_jax.objectives import softmax
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import step as step_lib
from mcpo_jax.training import update
from mcpo_jax.training.stage import Model, Reference, Stage


@jax.jit
def _pool_cotangent(logps, sets, beta):
  """d (mean RNCE loss of the whole pool) / d logps [B, K]."""
  def loss(logps):
    losses, _, _ = softmax.rnce_loss(
        types.Features(logps), sets, (), beta=beta)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(sets.candidate_mask[:, 0]), 1)

  return jax.grad(loss)(logps)


def compare_gradients(
    stage: Stage,
    model: Model,
    functions: step_lib.StepFunctions,
    state: step_lib.TrainState,
    batch: batch_lib.HostBatch,
    reference: Reference,
    *,
    num_draws: int = 4,
) -> dict[str, float]:
  """Bias and variance of the sampled gradient g against that of the pool, g*.

  g* is the gradient of ranking NCE over every negative of the batch. Nothing is
  updated; the draws of `num_draws` other seeds stand for the law of g.

  Args:
    stage, model, functions, state, reference: of the run; the objective is one
      that samples (mcpo, cd).
    batch: whose gradients are compared.
    num_draws: independent draws, at least 2.

  Returns:
    `estimator/grad_cosine`: mean cosine of g and g*; 1 is no loss at all.
    `estimator/variance`: E |g - E g|^2 / |g*|^2.
    `estimator/bias`: |E g - g*| / |g*|, with what the variance adds to it for
    so few draws taken off; 0 where that leaves nothing.
  """
  batch = update.with_anchors(batch, stage, reference)
  sets, chunks = model.put_replicated(batch.meta), model.pack_all(batch)
  values = update.score_chunks(
      model, functions, state.params, batch, sets, chunks)

  def gradient(inputs, cotangent, total):
    for chunk in chunks:
      total = functions.from_cotangents(
          state.params, model.frozen, reference.params, total,
          model.put(chunk), inputs, cotangent)
    return total.grads

  grads = []
  for i in range(num_draws):
    drawn, drawn_sets, _, _ = functions.draw(
        (stage.seed + 1 + i) % 2**32, state.step, state.memory, values.logps,
        sets)
    inputs = step_lib.Inputs(
        drawn_sets, drawn, state.objective_state, state.step)
    cotangent, total, _ = functions.cotangents(state.params, values, inputs)
    grads.append(gradient(inputs, cotangent, total))
  exact = gradient(
      inputs,
      types.Features(_pool_cotangent(
          values.logps, sets, stage.objective_settings["beta"])),
      functions.zeros(state.params, values, inputs))

  dot = optax.tree.vdot
  square = dot(exact, exact)
  mean = jax.tree.map(lambda *g: sum(g) / num_draws, *grads)
  spread = sum(dot(g, g) for g in grads) / num_draws - dot(mean, mean)
  variance = spread * num_draws / (num_draws - 1)
  off = jax.tree.map(jnp.subtract, mean, exact)
  bias = jnp.sqrt(jnp.maximum(dot(off, off) - variance / num_draws, 0.0))
  cosine = sum(
      dot(g, exact) / jnp.sqrt(dot(g, g) * square) for g in grads) / num_draws
  return {"estimator/grad_cosine": float(cosine),
          "estimator/variance": float(variance / square),
          "estimator/bias": float(bias / jnp.sqrt(square))}
