"""The losses that TRL has: ours beside TRL's own code on the same numbers.

Random log-probabilities of tokens go into the loss functions of TRL's trainers,
through a model that answers with them, and into ours. Compared are the loss of
every example (of the batch, where it is one for the batch) and its gradient
with respect to every token. TRL wants an environment of its own:

  python -m venv trl
  trl/bin/pip install -r requirements.txt trl==1.16.0 torch==2.13.0
  PYTHONPATH=. JAX_PLATFORMS=cpu trl/bin/python benchmarks/trl_parity.py \\
      --out=benchmarks/trl_parity.md

Exits with 1 if a loss or a gradient differs by more than 1e-6 of its size.
"""

import argparse
import collections
import importlib
import os
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from trl.experimental import cpo, orpo  # noqa: E402

from mcpo_jax import registry  # noqa: E402
from mcpo_jax.types import MISMATCHED_ID, Features, SetBatch  # noqa: E402

TOLERANCE = 1e-6
NUM_SETS = 16
MAX_LENGTH = 9
CHOSEN, REJECTED, MISMATCHED = range(3)  # axis 0 of all tokens below


class Data(NamedTuple):
  """Log-probabilities of tokens, 0 after a completion's end."""

  policy: np.ndarray  # [3, B, T]
  reference: np.ndarray  # [3, B, T]
  collision: np.ndarray  # [3, B, T] log sum_v pi(v)^2 of the policy
  mask: np.ndarray  # [3, B, T] bool


class Row(NamedTuple):
  """One line of the table."""

  label: str
  objective: str  # name in our registry
  settings: dict[str, Any]
  source: str  # TRL's name for it
  trl: Callable[[torch.Tensor, Data], list[torch.Tensor]]
  note: str = ""
  slots: int = 2
  # (our losses [B], number of tokens [3, B]) -> what TRL gives
  convert: Callable[[jax.Array, np.ndarray], jax.Array] = lambda x, _: x
  dtype: torch.dtype = torch.float64


def random_data(seed: int) -> Data:
  rng = np.random.default_rng(seed)
  shape = (3, NUM_SETS, MAX_LENGTH)
  lengths = rng.integers(1, MAX_LENGTH + 1, shape[:2])
  mask = np.arange(MAX_LENGTH) < lengths[..., None]
  reference = rng.uniform(-2.0, -0.3, shape)
  policy = np.minimum(reference + rng.normal(0.0, 0.3, shape), -0.05)
  # So that KTO's baseline, which is cut at 0, is not 0.
  policy[MISMATCHED] = np.minimum(reference[MISMATCHED] + 0.2, -0.05)
  # At least as likely to meet as the token itself: the weights of WPO stay
  # below 1, where TRL and the authors' code agree.
  collision = policy * rng.uniform(0.0, 1.0, shape)
  return Data(*(
      np.where(mask, x, 0.0) for x in (policy, reference, collision)
  ), mask)


# --- ours ---------------------------------------------------------------------


def _features_and_batch(tokens, data, slots):
  """Ours in place of TRL's forward pass; tokens [3, B, T] traced."""
  tokens, mask = tokens[:slots], data.mask[:slots]
  shared = np.minimum(*data.mask[:2].sum(axis=2))  # [B]
  prefix = mask & (np.arange(MAX_LENGTH) < shared[None, :, None])

  def total(values, where):
    return jnp.sum(jnp.where(where, values, 0.0), axis=2).T

  reference = data.reference[:slots]
  terms = {
      "collision": total(data.collision[:slots], mask),
      "prefix": total(tokens, prefix),
      "ref_prefix": total(reference, prefix),
  }
  shape = (NUM_SETS, slots)
  ids = np.tile(np.arange(slots, dtype=np.uint32), (NUM_SETS, 1))
  role = np.tile(np.array([1, -1, 0], np.int8)[:slots], (NUM_SETS, 1))
  batch = SetBatch(
      role=role,
      candidate_mask=np.ones(shape, bool),
      candidate_id=np.where(ids == MISMATCHED, MISMATCHED_ID, ids),
      multiplicity=np.ones(shape, np.int32),
      scores=-np.arange(slots) + np.zeros(shape, np.float32),
      lengths=mask.sum(axis=2).T.astype(np.int32),
      anchors={name: total(reference, mask) for name in ("ref", "prev")},
      example_id=np.zeros((NUM_SETS, 2), np.uint32),
      visit=np.zeros(NUM_SETS, np.int32),
      row=np.arange(NUM_SETS, dtype=np.int32),
  )
  return Features(total(tokens, mask), terms), batch


def ours(row: Row, data: Data, *, whole: bool):
  """(losses [B] or, of the whole batch, [1]; gradient [3, B, T])."""
  entry = registry.OBJECTIVES[row.objective]
  loss_fn = load(entry.place)
  state = load(entry.state)(NUM_SETS) if entry.state else ()

  def total(tokens):
    features, batch = _features_and_batch(tokens, data, row.slots)
    losses, _, _ = loss_fn(features, batch, state, **row.settings)
    losses = row.convert(losses, data.mask.sum(axis=2))
    if whole:
      losses = jnp.mean(losses, keepdims=True)
    return jnp.sum(losses), losses

  grad, losses = jax.grad(total, has_aux=True)(jnp.asarray(data.policy))
  return np.asarray(losses), np.asarray(grad)


def load(place: str):
  module, function = place.split(":")
  return getattr(importlib.import_module(module), function)


# --- TRL's --------------------------------------------------------------------


class Model:
  """Answers with the log-probabilities of the rows that the prompt names.

  A sequence is one token of prompt, the number of its row in [3 * B], and then
  the completion's tokens, all of them 1 in a vocabulary of two.
  """

  training = True
  is_gradient_checkpointing = False

  def __init__(self, tokens, data):
    self.tokens = tokens.reshape(-1, MAX_LENGTH)
    flat = data.collision.reshape(-1, MAX_LENGTH)
    self.collision = torch.tensor(flat, dtype=tokens.dtype)

  def __call__(self, input_ids, **_):
    rows, width = input_ids[:, 0], input_ids.shape[1] - 1
    logps = self.tokens[rows, :width]
    other = torch.log(-torch.expm1(logps.masked_fill(logps == 0, -1.0)))
    logits = torch.stack([other, logps], dim=2)
    return types.SimpleNamespace(
        log_probs=logps,
        log_sum_sq_probs=self.collision[rows, :width],
        logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)),
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
    )


def sequences(rows: list[int], data: Data):
  """(input_ids [R, 1 + T], attention mask, completion mask) of some rows."""
  mask = torch.tensor(data.mask.reshape(-1, MAX_LENGTH))[rows].long()
  prompt = torch.tensor(rows)[:, None]
  no, yes = torch.zeros_like(prompt), torch.ones_like(prompt)
  return (
      torch.cat([prompt, mask], 1),
      torch.cat([yes, mask], 1),
      torch.cat([no, mask], 1),
  )


def bare(trainer_class, tokens, data, **attributes):
  """A trainer without anything that its loss does not read."""
  trainer = object.__new__(trainer_class)
  reference = torch.tensor(data.reference, dtype=tokens.dtype)
  vars(trainer).update({
      "accelerator": types.SimpleNamespace(
          device=torch.device("cpu"),
          gather=lambda x: x,
          gather_for_metrics=lambda x: x,
      ),
      "model": Model(tokens, data),
      "ref_model": Model(reference, data),
      "args": types.SimpleNamespace(
          gradient_checkpointing_kwargs=None,
          discopop_tau=attributes.pop("discopop_tau", None),
      ),
      "aux_loss_enabled": False,
      "is_encoder_decoder": False,
      "label_smoothing": 0.0,
      "padding_value": 0,
      "pad_token_id": 0,
      "precompute_ref_logps": False,
      "_metrics": collections.defaultdict(
          lambda: collections.defaultdict(list)
      ),
      "_total_train_tokens": 0,
      "_tp_size": 1,
  } | attributes)
  return trainer


def dpo(*loss_types: str, whole: bool = False, **attributes):
  """DPOTrainer._compute_loss, one example at a time unless `whole`."""

  def run(tokens, data):
    trainer = bare(trl.DPOTrainer, tokens, data, **({
        "loss_types": loss_types,
        "loss_weights": [1.0] * len(loss_types),
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
    } | attributes))
    losses = []
    examples = list(range(NUM_SETS))
    for group in [examples] if whole else [[b] for b in examples]:
      rows = group + [NUM_SETS + b for b in group]
      input_ids, attention_mask, completion_mask = sequences(rows, data)
      inputs = {
          "input_ids": input_ids,
          "attention_mask": attention_mask,
          "completion_mask": completion_mask,
      }
      losses.append(trainer._compute_loss(trainer.model, inputs, False))
    return losses

  return run


def one_stage(trainer_class, **attributes):
  """CPO's and ORPO's get_batch_loss_metrics, one example at a time."""

  def run(tokens, data):
    trainer = bare(trainer_class, tokens, data, **attributes)
    losses = []
    for b in range(NUM_SETS):
      batch = {}
      for name, row in (("chosen", b), ("rejected", NUM_SETS + b)):
        input_ids, attention_mask, completion_mask = sequences([row], data)
        labels = torch.where(completion_mask == 1, input_ids, -100)
        batch |= {
            f"{name}_input_ids": input_ids,
            f"{name}_attention_mask": attention_mask,
            f"{name}_labels": labels,
        }
      loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
      losses.append(loss)
    return losses

  return run


def kto(loss_type: str, **attributes):
  """KTOTrainer._compute_loss: the chosen desirable, the rejected not."""

  def run(tokens, data):
    trainer = bare(
        trl.KTOTrainer, tokens, data, loss_type=loss_type,
        calculate_KL=loss_type == "kto", **attributes,
    )
    batch = {}
    rows = list(range(2 * NUM_SETS))
    # Every example has another prompt's completion beside it.
    other = [MISMATCHED * NUM_SETS + row % NUM_SETS for row in rows]
    for prefix, rows_of in (("", rows), ("KL_", other)):
      input_ids, attention_mask, completion_mask = sequences(rows_of, data)
      batch |= {
          f"{prefix}input_ids": input_ids,
          f"{prefix}attention_mask": attention_mask,
          f"{prefix}completion_mask": completion_mask,
      }
    batch["label"] = torch.arange(2 * NUM_SETS) < NUM_SETS
    return [trainer._compute_loss(trainer.model, batch, False)]

  return run


# --- the table ----------------------------------------------------------------


def rows(data: Data) -> list[Row]:
  """What TRL has and ours that should equal it."""
  tokens = data.mask.sum(axis=2)  # [3, B]
  beta = 0.3
  smooth = {"beta": beta, "label_smoothing": 0.1}

  def pair(
      name, loss_type=None, *, label=None, source=None, settings=None, note="",
      dtype=torch.float64, **attributes,
  ):
    """A loss of DPOTrainer; both sides get the same beta and smoothing."""
    loss_type = loss_type or name
    settings = {"beta": beta} | (settings or {})
    for key in ("beta", "label_smoothing"):
      if key in settings:
        attributes[key] = settings[key]
    return Row(
        label or name, name, settings, f"DPO `{source or loss_type}`",
        dpo(loss_type, **attributes), note, dtype=dtype,
    )

  def f_dpo(divergence, source, **more):
    return pair(
        "f_dpo", "sigmoid", label=f"f_dpo, {divergence}",
        source=f"sigmoid, {source}", f_divergence_type=source,
        settings={"divergence": divergence, "alpha": 0.3}, **more,
    )

  def free(name, settings, source, *, note="", **attributes):
    """A loss of CPOTrainer."""
    attributes = {"alpha": 0.0, "cpo_alpha": 0.0} | attributes
    return Row(
        name, name, settings, f"CPO `{source}`",
        one_stage(cpo.CPOTrainer, **attributes), note,
    )

  return [
      pair("dpo", "sigmoid", settings={"label_smoothing": 0.0}),
      pair("dpo", "aot", settings=smooth, label="dpo, smoothed",
           note="of one pair, where nothing is to be sorted"),
      pair("rnce", "sigmoid", note="one negative"),
      pair("robust_dpo", "robust", settings=smooth),
      pair("ipo", settings={"length_average": True},
           note="TRL has the mean over tokens only; ours the sum as well"),
      pair("hinge"),
      pair("rso", "sigmoid", label="rso, sigmoid",
           settings={"form": "sigmoid"}),
      pair("rso", "hinge", label="rso, hinge", settings={"form": "hinge"}),
      pair("exo_pair", settings={"label_smoothing": 1e-3}),
      pair("nca_pair"),
      pair("sppo", "sppo_hard", settings={"form": "hard"}, label="sppo, hard",
           note="the reference in the place of the round before"),
      pair("spin", "sigmoid",
           note="the reference in the place of the round before"),
      pair("aot", settings=smooth, whole=True, note="loss of the batch"),
      pair("aot_unpaired", settings=smooth, whole=True,
           note="loss of the batch"),
      pair("apo_zero"),
      pair("apo_down"),
      pair("discopop", settings={"tau": 0.05}, discopop_tau=0.05),
      pair("sigmoid_norm"),
      f_dpo("reverse_kl", "reverse_kl"),
      f_dpo("forward_kl", "forward_kl"),
      f_dpo("js", "js_divergence"),
      f_dpo("alpha", "alpha_divergence", f_alpha_divergence_coef=0.7,
            dtype=torch.float32,
            note="alpha 0.3 of the paper is 0.7 of TRL; TRL computes it in "
            "float32"),
      pair("ld_dpo", "sigmoid", settings={"tail_weight": 0.4}, ld_alpha=0.4,
           source="sigmoid, ld_alpha"),
      pair("wpo", "sigmoid", use_weighting=True,
           source="sigmoid, use_weighting",
           note="weights below 1; ours, as the authors', is clamped there, "
           "TRL's is not"),
      Row("rpo", "rpo",
          {"beta": beta, "sft_weight": 0.5, "length_average": True},
          "DPO `sigmoid` + 0.5 `sft`",
          dpo("sigmoid", "sft", beta=beta, loss_weights=[1.0, 0.5]),
          "TRL's mean is over the tokens of the batch, here one example"),
      Row("sft", "sft", {}, "DPO `sft`", dpo("sft", beta=beta),
          "per token, as the step divides it; TRL's mean is over the tokens "
          "of the batch, here one example",
          convert=lambda losses, n: losses / n[CHOSEN]),
      Row("bco", "bco", {"beta": beta, "moving_rate": 0.0}, "DPO `bco_pair`",
          dpo("bco_pair", beta=beta),
          "delta held at 0, which is all TRL has; ours is the mean over the "
          "two completions, TRL's the sum",
          convert=lambda losses, _: 2.0 * losses),
      Row("kto", "kto",
          {"beta": beta, "desirable_weight": 1.2, "undesirable_weight": 0.7},
          "KTO `kto`",
          kto("kto", beta=beta, desirable_weight=1.2, undesirable_weight=0.7),
          "loss of the batch, pairs taken apart", slots=3),
      Row("kto without mismatched completions", "kto",
          {"beta": beta, "desirable_weight": 1.0, "undesirable_weight": 1.0},
          "KTO `apo_zero_unpaired`",
          kto("apo_zero_unpaired", beta=beta, desirable_weight=1.0,
              undesirable_weight=1.0),
          "loss of the batch, pairs taken apart"),
      free("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.4}, "simpo",
           loss_type="simpo", beta=2.0, simpo_gamma=0.8,
           note="TRL's gamma is beta times our ratio"),
      free("alphapo", {"beta": 2.5, "alpha": 0.25, "gamma_beta_ratio": 0.04},
           "simpo, alpha", loss_type="simpo", beta=2.5, simpo_gamma=0.1,
           alpha=0.25),
      free("cpo", {"beta": beta, "sft_weight": 0.5 / tokens[CHOSEN]},
           "sigmoid", loss_type="sigmoid", beta=beta, cpo_alpha=0.5,
           note="ours sums the NLL over tokens, as the paper: its weight is "
           "divided by their number here"),
      free("slic_hf", {"margin": 1.0, "sft_weight": 0.5 / tokens[CHOSEN]},
           "hinge", loss_type="hinge", beta=1.0, cpo_alpha=0.5,
           note="beta 1; the NLL as in cpo"),
      Row("orpo", "orpo", {"odds_weight": 0.3}, "ORPO",
          one_stage(orpo.ORPOTrainer, beta=0.3),
          "odds in float32 in TRL; its NLL is over the prompt as well, of "
          "which one token has nothing to predict"),
  ]


def difference(a: np.ndarray, b: np.ndarray) -> float:
  """Largest difference, relative where the values are above 1."""
  return float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b))))


def compare(row: Row, data: Data) -> tuple[float, float] | None:
  """(difference of the losses, of the gradients); None if ours is missing."""
  try:
    load(registry.OBJECTIVES[row.objective].place)
  except (ImportError, AttributeError):
    return None
  tokens = torch.tensor(data.policy, dtype=row.dtype, requires_grad=True)
  losses = torch.stack(row.trl(tokens, data))
  losses.sum().backward()
  theirs, their_grad = losses.detach().numpy(), tokens.grad.numpy()
  mine, grad = ours(row, data, whole=len(theirs) == 1)
  # TRL reads the padding of a sequence as well; it is masked in ours.
  return difference(mine, theirs), difference(
      grad, np.where(data.mask, their_grad, 0.0)
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  torch.set_default_dtype(torch.float64)
  jax.config.update("jax_enable_x64", True)
  data = random_data(0)
  lines, differences = [], []
  for row in rows(data):
    found = compare(row, data)
    cells = ["not built"] * 2 if found is None else [f"{x:.0e}" for x in found]
    differences.extend(found or ())
    lines.append(
        f"| {row.label} | {row.source} | {' | '.join(cells)} | {row.note} |"
    )
  worst = np.max(differences)  # NaN if one is
  text = f"""# Losses against TRL's own code

Command: `PYTHONPATH=. JAX_PLATFORMS=cpu trl/bin/python \
benchmarks/trl_parity.py --out=benchmarks/trl_parity.md`

trl {trl.__version__}, torch {torch.__version__}, jax {jax.__version__}, \
float64 on CPU; {NUM_SETS} pairs of 1 to {MAX_LENGTH} tokens. Largest \
difference between ours and TRL's, over examples and, for the gradient, over \
tokens; relative where the value is above 1. Largest of all: {worst:.0e}, \
allowed {TOLERANCE:.0e}.

| objective | in TRL | loss | gradient | remarks |
|---|---|---|---|---|
{chr(10).join(lines)}
"""
  if args.out:
    args.out.write_text(text)
  sys.stdout.write(text)
  return int(not worst <= TOLERANCE)


if __name__ == "__main__":
  sys.exit(main())
