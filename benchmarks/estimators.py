"""Bias and spread of the estimators of grad log Z, over the candidates L.

  python benchmarks/estimators.py --out=benchmarks/estimators

A policy over 7 completions (three tokens, two steps), so that every pool of L
candidates from the reference is a vector of 7 counts, and the kernel that
trains is asked about all of them: no sampling, no error but that over
policies. Z = E_ref exp(r), r = beta (log pi - log ref).
"""

import argparse
import functools
import itertools
import math
import os
import pathlib
import platform
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's code, whatever is installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mcpo_jax.kernels import exact, mc, sets  # noqa: E402
from mcpo_jax.training import launches  # noqa: E402

BETA = 0.7
OUTCOMES = [(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)]
V = len(OUTCOMES)
CHUNK = 1 << 17  # pools of one call


class Figures(NamedTuple):
  """Of an estimator, relative to the length of grad log Z."""

  bias: float  # length of (mean - grad log Z)
  spread: float  # root of the trace of the covariance


class Kernel(NamedTuple):
  """What is drawn from a pool, and by what weight."""

  include_preferred: bool = True
  strategy: str = "mc"
  score: str = "reward"
  temperature: float = 1.0


class Estimator(NamedTuple):
  """How the gradient of r is averaged over a pool."""

  kernel: Kernel = Kernel()
  start: str = "data"  # law of the preferred completion y0; model: p itself
  num_draws: int | None = 1  # None: the weighted mean of the pool
  num_steps: int = 1  # each over L fresh candidates


WITHOUT = Kernel(include_preferred=False)
ESTIMATORS = {
    "SNIS: candidates alone, weighted": Estimator(WITHOUT, num_draws=None),
    "RNCE: y0 and candidates, weighted": Estimator(num_draws=None),
    "RNCE, y0 from the model": Estimator(start="model", num_draws=None),
    "CD: one draw": Estimator(),
    "CD: four draws": Estimator(num_draws=4),
    "CD, 4 steps": Estimator(num_steps=4),
    "CD, 16 steps": Estimator(num_steps=16),
    "CD, y0 from the model": Estimator(start="model"),
    "one draw without y0, as MC-PO": Estimator(WITHOUT),
    "the same, tau 1/3": Estimator(WITHOUT._replace(temperature=1 / 3)),
    "the same, weighed by log-prob":
        Estimator(WITHOUT._replace(score="policy_logp")),
    "largest weight": Estimator(WITHOUT._replace(strategy="max")),
    "random": Estimator(WITHOUT._replace(strategy="random")),
    "smallest weight": Estimator(WITHOUT._replace(strategy="min")),
}


@jax.jit
def log_probs(theta):
  """[9] parameters -> [V] log-probabilities of the completions."""
  first = jax.nn.log_softmax(theta[:3])
  second = jax.nn.log_softmax(theta[3:].reshape(2, 3), axis=1)
  return jnp.stack([
      first[y[0]] + (second[y[0], y[1]] if len(y) == 2 else 0.0)
      for y in OUTCOMES])


class Toy:
  """A random policy, its reference, and the law of the preferred completion."""

  def __init__(self, seed: int, scale: float = 1.5):
    rng = np.random.default_rng(seed)
    theta, ref, data = rng.normal(size=(3, 9)) * scale
    self.log_pi, self.log_ref = (
        np.asarray(log_probs(x)) for x in (theta, ref))
    self.rewards = BETA * (self.log_pi - self.log_ref)
    self.slopes = BETA * np.asarray(jax.jacfwd(log_probs)(theta))  # [V, 9]
    self.model = np.exp(exact.tilted(self.log_ref, self.rewards)[0])
    self.data = np.exp(np.asarray(log_probs(data)))


@functools.cache
def all_counts(num_candidates: int) -> np.ndarray:
  """[N, V] how often each completion is among L; every case once."""
  bars = np.array(list(itertools.combinations(
      range(num_candidates + V - 1), V - 1)))
  edges = np.pad(bars, ((0, 0), (1, 1)),
                 constant_values=((0, 0), (-1, num_candidates + V - 1)))
  return np.diff(edges, axis=1) - 1


def pool_probs(counts: np.ndarray, log_law: np.ndarray) -> np.ndarray:
  """[N] multinomial probabilities."""
  factorials = np.cumsum([0.0, *np.log(np.arange(1, counts[0].sum() + 1))])
  return np.exp(factorials[-1] - factorials[counts].sum(1) + counts @ log_law)


@functools.partial(
    jax.jit, static_argnames=("strategy", "temperature", "include_preferred"))
def _ask(scores, pools, **settings):
  """The kernel's weights [N, 1 + V], and the slot it drew [N]."""
  state, info = mc.draw(
      jax.random.key(0), None, scores, pools, num_negatives=1, replace=False,
      **settings)
  return jnp.exp(info.log_weights), state.selected[:, 0]


def pool_laws(
    toy: Toy, start: int, counts: np.ndarray, kernel: Kernel
) -> np.ndarray:
  """[N, V] law of the kernel's draw over completions, pool by pool."""
  slots = np.concatenate([[start], np.arange(V)])
  scores = {"reward": toy.rewards, "policy_logp": toy.log_pi}[kernel.score]
  laws = []
  for first in range(0, len(counts), CHUNK):
    part = counts[first:first + CHUNK]
    mask = np.pad(part > 0, ((0, 0), (1, 0)), constant_values=True)
    pools = sets.make_sets(np.full(mask.shape, np.nan), candidate_mask=mask)
    pools = pools._replace(multiplicity=np.pad(
        part, ((0, 0), (1, 0)), constant_values=1).astype(np.int32))
    weights, drawn = _ask(
        np.broadcast_to(scores[slots], mask.shape), pools,
        strategy=kernel.strategy, temperature=kernel.temperature,
        include_preferred=kernel.include_preferred)
    if kernel.strategy in ("max", "min"):
      weights = np.eye(1 + V)[np.asarray(drawn)]
    law = np.array(weights[:, 1:])
    law[:, start] += weights[:, 0]
    laws.append(law)
  return np.concatenate(laws)


@functools.cache
def one_step(
    toy: Toy, num_candidates: int, kernel: Kernel
) -> tuple[np.ndarray, np.ndarray]:
  """Over all pools: [V, V] law of the draw from each y0, and [V] the mean
  squared length of the pool's weighted gradient."""
  counts = all_counts(num_candidates)
  chance = pool_probs(counts, toy.log_ref)
  matrix, squares = np.zeros((V, V)), np.zeros(V)
  for start in range(V if kernel.include_preferred else 1):
    law = pool_laws(toy, start, counts, kernel)
    matrix[start] = chance @ law
    squares[start] = chance @ np.sum((law @ toy.slopes)**2, axis=1)
  if not kernel.include_preferred:  # y0 is not looked at
    matrix[:], squares[:] = matrix[0], squares[0]
  return matrix, squares


def measure(toy: Toy, num_candidates: int, estimator: Estimator) -> Figures:
  """Exact bias and spread of one estimator."""
  matrix, squares = one_step(toy, num_candidates, estimator.kernel)
  before = getattr(toy, estimator.start) @ np.linalg.matrix_power(
      matrix, estimator.num_steps - 1)
  mean = before @ matrix @ toy.slopes
  square = before @ squares  # of the weighted mean
  if estimator.num_draws:
    one = before @ matrix @ np.sum(toy.slopes**2, axis=1)
    square += (one - square) / estimator.num_draws
  right = toy.model @ toy.slopes
  length = np.linalg.norm(right)
  return Figures(
      float(np.linalg.norm(mean - right) / length),
      float(math.sqrt(max(square - mean @ mean, 0.0)) / length))


def table(
    found: dict[str, list[list[Figures]]], sizes: list[int], which: str
) -> list[str]:
  """Rows of estimators, columns of L, mean over policies ± standard error."""
  lines = ["| estimator | " + " | ".join(f"L = {n}" for n in sizes) + " |",
           "|---" * (1 + len(sizes)) + "|"]
  for name, columns in found.items():
    cells = []
    for figures in columns:
      values = np.array([getattr(f, which) for f in figures])
      error = values.std(ddof=1) / math.sqrt(len(values))
      cells.append("0" if values.max() < 1e-9
                   else f"{values.mean():.3f} ± {error:.3f}")
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return [*lines, ""]


def draw_figure(found, sizes: list[int], path: pathlib.Path) -> None:
  """Bias and spread over L."""
  import matplotlib
  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  shown = [name for name in found
           if "from the model" not in name and name != "CD: four draws"]
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
  for axis, which in zip(axes, Figures._fields):
    for color, name in enumerate(shown):
      axis.plot(
          sizes, [np.mean([getattr(f, which) for f in column])
                  for column in found[name]],
          marker="o", color=f"C{color}", label=name,
          linestyle="--" if color >= 10 else "-")
    axis.set_xscale("log")
    axis.set_xticks(sizes, list(map(str, sizes)))
    axis.minorticks_off()
    axis.set(xlabel="candidates L",
             title=f"{which}, over the length of grad log Z")
  axes[0].set_yscale("log")
  figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8,
                loc="outside right center")
  figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
  """Writes OUT.md and OUT.png."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--sizes", default="1,2,4,8,16")
  parser.add_argument("--policies", type=int, default=20)
  args = parser.parse_args(argv)
  jax.config.update("jax_enable_x64", True)
  sizes = [int(word) for word in args.sizes.split(",")]
  toys = [Toy(seed) for seed in range(args.policies)]
  found = {name: [[measure(toy, n, estimator) for toy in toys] for n in sizes]
           for name, estimator in ESTIMATORS.items()}
  command = " ".join(["python benchmarks/estimators.py",
                      *(argv or sys.argv[1:])])
  distance = [float(exact.total_variation(t.data, t.model)) for t in toys]
  lines = [
      "# Bias and spread of the estimators of grad log Z", "",
      f"Command: `{command}`. Commit {launches.commit_of_code()}, jax "
      f"{jax.__version__}, float64, {platform.machine()}, {os.cpu_count()} "
      "cores.", "",
      f"Policies over {V} completions, seeds 0 to {len(toys) - 1}: normal "
      "logits of scale 1.5 for policy, reference and the law of the preferred "
      f"completion y0, which is {np.mean(distance):.2f} from the model in "
      f"total variation on average; beta = {BETA}. L candidates come from "
      "the reference; all pools are enumerated through the kernel that "
      "trains, so that a policy's figures are exact. Both figures are over "
      "the length of grad log Z; ± is the standard error over policies.", "",
      f"![bias and spread]({args.out.name}.png)", "",
      "## Bias: length of (mean − grad log Z)", "",
      *table(found, sizes, "bias"),
      "## Spread: root of the summed variances", "",
      *table(found, sizes, "spread")]
  args.out.with_suffix(".md").write_text("\n".join(lines))
  draw_figure(found, sizes, args.out.with_suffix(".png"))
  print("\n".join(lines))


if __name__ == "__main__":
  main()
