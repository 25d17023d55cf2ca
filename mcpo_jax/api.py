"""The public interface: configs, runs and models for scripts and notebooks.

Everything here calls what the verbs call. JAX is imported with the first run or
model, after the config was checked.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_collections

from mcpo_jax import config_file, errors, objective_names, settings

if TYPE_CHECKING:
  import numpy as np

  from mcpo_jax import types
  from mcpo_jax.data import tokenizer as tokenizer_lib

Path: TypeAlias = str | os.PathLike[str]
Prompt: TypeAlias = str | list[dict[str, Any]]  # a text, or messages

# Completions are packed into streams whose length is a multiple of this: few
# shapes, few compilations.
_STREAM = 128


def load_config(
    config: Path | ml_collections.ConfigDict,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Reads a config, changes some of its keys, checks it, and fills its gaps.

      >>> config = load_config("configs/quickstart.py", {
      ...     "objective.beta": 0.05, "kernel.temperature": 0.5})
      >>> config["objective"]["beta"], config["kernel"]["strategy"]
      (0.05, 'mc')

  Args:
    config: a Python file with get_config(), from the current folder or from
      the checkout that the package lies in; or what get_config() returns.
    overrides: dotted key -> value, as `--config.key=value` has it. A path may
      be a pathlib.Path; an objective, kernel or reward may be the function
      itself, also one that was defined in a cell.

  Returns:
    The resolved config, nested.

  Raises:
    ConfigError, or an ErrorGroup of all that were found.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    config = config_file.load(os.fspath(config))
  return config_file.resolve(config, (overrides or {}).items())


def train(config: dict[str, Any], workdir: Path) -> "Run":
  """Runs the stages of a config, or goes on where they stopped.

  The same call with the same workdir resumes after an interrupt, a killed
  process or a lost runtime, and ends as if nothing had happened.

  Args:
    config: of `load_config`.
    workdir: folder for everything that the run keeps.

  Returns:
    The finished run.

  Raises:
    McpoError: what the verb `train` would end with.
    KeyboardInterrupt: after an interrupt; the last checkpoint is kept.
  """
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from mcpo_jax import verbs

  verbs.train(config, pathlib.Path(workdir))
  return Run(workdir)


def loss(name: str, **options: Any) -> Callable[..., Any]:
  """An objective by its name, with its settings.

      >>> sets = mcpo_jax.make_sets(
      ...     [[1.0, 0.2], [0.9, 0.3]], anchors={"ref": [[-2.0, -3.0]] * 2})
      >>> features = Features(logps=np.array([[-2.0, -3.0], [-1.0, -4.0]]))
      >>> losses, aux, _ = loss("dpo", beta=0.5)(features, sets, ())
      >>> [f"{x:.3f}" for x in losses]  # log 2 where nothing has changed
      ['0.693', '0.313']

  Args:
    name: `objective.name` of a config: of the registry, "my_file:my_loss", a
      mixture or a blend.
    **options: its settings; those left out have their defaults.

  Returns:
    loss(features, sets, state) -> (losses [B], aux, state).

  Raises:
    ConfigError: config.range, config.unused.
  """
  entry = objective_names.find_objective(name)
  known = entry.settings
  for key in options.keys() - known:
    raise errors.ConfigError(
        "config.unused", f"{name} does not take it", where=key,
        want=", ".join(known), hint=errors.nearest(key, known))
  return objective_names.bind(
      name, options, include_preferred=entry.include_preferred,
      corrected=False)


class Run:
  """What a workdir holds: settings, numbers, curves, texts and models."""

  def __init__(self, workdir: Path):
    """Looks at a workdir and locks nothing: the run may still be going on.

    Raises:
      CheckpointError: ckpt.none, there is no run.
    """
    self.workdir = pathlib.Path(workdir)
    saved = self.workdir / "config.json"
    if not saved.is_file():
      raise errors.CheckpointError(
          "ckpt.none", "no run lies in this workdir", where=str(workdir),
          hint="call train first")
    self.config: dict[str, Any] = settings.read_saved(saved)

  def __repr__(self) -> str:
    numbers = {key: value for key, value in self.summary.items() if key in (
        "step", "score/difference", "eval/accuracy", "eval/loss")}
    return f"Run({str(self.workdir)!r}, {numbers})"

  @property
  def summary(self) -> dict[str, Any]:
    """The flat keys of summary.json, as far as stages have finished."""
    path = self.workdir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def curve(
      self, name: str, stage: str = "preference"
  ) -> tuple["np.ndarray", "np.ndarray"]:
    """A metric over a stage, for `plt.plot(*run.curve("loss"))`.

    Args:
      name: a key of metrics.jsonl, such as "rewards/margins", "eval/accuracy".
      stage: whose lines are read.

    Returns:
      steps [N] and values [N]; NaN where the run wrote what is no number.

    Raises:
      DataError: data.field_missing, no line of the stage has it.
    """
    import numpy as np

    from mcpo_jax.training import metrics

    rows = metrics.read(self.workdir, stage)
    if not any(name in row for row in rows):
      known = sorted({key for row in rows for key in row})
      raise errors.DataError(
          "data.field_missing", f"{stage} has no such metric", got=name,
          where=str(self.workdir / "metrics.jsonl"),
          want=", ".join(known), hint=errors.nearest(name, known))
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*points)
    return np.array(steps), np.array(values, float)

  def samples(self) -> list[dict[str, Any]]:
    """Held-out prompts with a text of the start and one of the model, as the
    last evaluation wrote them: {"prompt", "start", "now", "step"}."""
    path = self.workdir / "preference" / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["step"] == rows[-1]["step"]]

  def model(self, stage: str | None = None) -> "Model":
    """The model that a stage ended with; by default the last that did.

    Raises:
      CheckpointError: ckpt.none, the stage has not finished.
    """
    from mcpo_jax.stages import results
    from mcpo_jax.training import setup

    stages = [stage] if stage else [
        name for name in results.POLICIES
        if (self.workdir / name / "result.json").exists()] or ["preference"]
    folder = results.finished_in(self.workdir / stages[0])
    tokenizer = setup.open_tokenizer(self.config, self.workdir, folder)
    return Model(folder, tokenizer, self.config["model"]["compute_dtype"])


def load_model(path: Path, *, dtype: str = "float32") -> "Model":
  """Opens a Hugging Face folder or hub name: `Model.generate`, `Model.score`.

  Args:
    path: a folder with config.json, safetensors and a tokenizer, such as an
      export; or a name on the hub.
    dtype: "float32" or "bfloat16", of weights and products.

  Raises:
    ModelDirError.
  """
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from mcpo_jax.data import tokenizer as tokenizer_lib
  from mcpo_jax.models import hf

  folder = hf.resolve_model(os.fspath(path))
  return Model(folder, tokenizer_lib.load_tokenizer(folder), dtype)


class Model:
  """Weights on all devices of this process, with their tokenizer."""

  def __init__(
      self, folder: pathlib.Path, tokenizer: "tokenizer_lib.Tokenizer",
      dtype: str,
  ):
    """See `load_model` and `Run.model`."""
    import jax
    import jax.numpy as jnp

    from mcpo_jax import sharding
    from mcpo_jax.models import hf
    from mcpo_jax.training import architecture
    from mcpo_jax.training import stage as stage_lib

    self.folder, self.tokenizer = folder, tokenizer
    config = hf.load_config(folder)
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    self._model = stage_lib.Model(
        config, mesh, architecture.placed_shapes(config, mesh, dtype),
        jnp.dtype(dtype), "none", mesh.shape["data"], _STREAM,
        tokenizer.pad_id)
    self.params: types.Params = hf.load_params(
        folder, config, shardings=self._model.param_shardings, dtype=dtype)
    self._token_logps = jax.jit(
        self._model.token_logps, out_shardings=sharding.replicated(mesh))
    self._services: dict[int, Any] = {}  # by the longest sample

  def __repr__(self) -> str:
    import jax

    size = sum(math.prod(x.shape) for x in jax.tree.leaves(self.params))
    return f"Model({str(self.folder)!r}, {size / 1e6:.1f}M weights)"

  def generate(
      self, prompts: Sequence[Prompt], *, num_samples: int = 1,
      max_new_tokens: int = 128, seed: int = 0, **sampling: Any,
  ) -> "types.GenerationResult":
    """Samples completions; `.text[i][n]` is the n-th of prompt i.

    A sample depends on its prompt, its number, the seed and the weights, and
    on nothing that is asked for beside it.

    Args:
      prompts: texts or lists of messages; a text is one user turn.
      num_samples: of each prompt.
      max_new_tokens: the longest sample.
      seed: of the draws.
      **sampling: further fields of `generation.sampling.Sampling`, such as
        temperature (0: greedy), top_p, top_k, stop.

    Returns:
      GenerationResult: text, tokens, mask, log-probs, finish_reason.
    """
    import numpy as np

    from mcpo_jax.data import store
    from mcpo_jax.generation import sampling as sampling_lib
    from mcpo_jax.generation import service

    if max_new_tokens not in self._services:
      self._services[max_new_tokens] = service.GenerationService(
          self._model.config, self.params, 0,
          max_completion_length=max_new_tokens,
          stop_ids=self.tokenizer.stop_ids, pad_id=self.tokenizer.pad_id,
          tokenizer=self.tokenizer.hf, vocab_size=self.tokenizer.vocab_size,
          compute_dtype=self._model.compute_dtype, mesh=self._model.mesh)
    return self._services[max_new_tokens].generate(
        [self.tokenizer.encode_prompt(prompt) for prompt in prompts],
        prompt_ids=np.stack([
            store.example_id(json.dumps(prompt)) for prompt in prompts]),
        num_samples=num_samples, sampling=sampling_lib.Sampling(**sampling),
        seed=seed)

  def score(
      self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]
  ) -> list["np.ndarray"]:
    """Log-probabilities of completions that are told in full.

    Args:
      prompts: R texts or lists of messages.
      completions: of each prompt, any number of texts.

    Returns:
      R arrays [K] float32, nats, summed over the tokens of the completion and
      the one that ends it.
    """
    import numpy as np

    from mcpo_jax.data import store
    from mcpo_jax.training import reference

    sets = [
        store.text_set(self.tokenizer, prompt, list(texts), f"prompts[{i}]")
        for i, (prompt, texts) in enumerate(
            zip(prompts, completions, strict=True))]
    longest = max((len(one.prompt) + len(ids) for one in sets
                   for ids in one.completions), default=1)
    if longest > self._model.config.max_positions:
      raise errors.DataError(
          "data.completion_too_long", "a prompt with its completion is longer "
          "than the model's context", where="Model.score", got=longest,
          want=f"at most {self._model.config.max_positions} tokens")
    packer = self._model._replace(
        stream_length=-(-longest // _STREAM) * _STREAM)
    _, sums, starts = reference.score_sets(
        sets, lambda chunk: np.asarray(
            self._token_logps(self.params, self._model.put(chunk))),
        packer.pack)
    return [sums[a:b] for a, b in zip(starts[:-1, 0], starts[1:, 0])]
