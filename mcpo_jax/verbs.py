"""The verbs: what a run does from start to end, stage by stage."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from mcpo_jax import commit, errors
from mcpo_jax.data import audit as audit_lib
from mcpo_jax.data import batches
from mcpo_jax.data import store as store_lib
from mcpo_jax.evaluation import preferences, samples
from mcpo_jax.generation import service as service_lib
from mcpo_jax.models import hf
from mcpo_jax.rewards import functions as rewards
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import loop, metrics, reference, setup

# --- Verbs ------------------------------------------------------------------


def train(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Runs the stages of a config; each goes on from where it stopped."""
  setup.check_sources(config)
  run = setup.open_run(config, workdir)
  writer = metrics.Writer(workdir, tensorboard=config["log"]["tensorboard"],
                          wandb=config["log"]["wandb"])
  stages = {"sft": run_sft, "preference": run_preference,
            "evaluate": run_evaluate, "export": run_export}
  summary = {}
  for name in config["stages"]:
    logging.info("stage %s", name)
    summary |= stages[name](run, writer)
    write_summary(workdir, summary)
  print(json.dumps(summary, indent=1))


def evaluate(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """The evaluation of a trained workdir, on its own."""
  run = setup.open_run(config, workdir)
  summary = run_evaluate(run, metrics.Writer(workdir))
  write_summary(workdir, summary)
  print(json.dumps(summary, indent=1))


def export(
    config: dict[str, Any], workdir: pathlib.Path, out: pathlib.Path
) -> None:
  """Writes the trained weights to `out` as a folder transformers loads."""
  run = setup.open_run(config, workdir)
  write_summary(workdir, run_export(run, None, out))


def score(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Fills the reference cache of the training and held-out rows."""
  run = setup.open_run(config, workdir)
  start_dir = find_start(run)
  model, start = setup.open_model(run, start_dir)
  stores = open_preference_stores(run)
  for data in {data.key: data for data, _ in stores.values()}.values():
    open_reference(run, model, start, data)
    logging.info("reference log-probs of %d rows are in the cache", len(data))


def audit(config: dict[str, Any], workdir: pathlib.Path | None) -> None:
  """Prints the data report; with a workdir also writes it there."""
  data = config["data"]
  report, text = audit_lib.audit(
      setup.sources_of(config, data["path"], data["format"]),
      setup.sources_of(config, data["eval_path"], data["eval_format"])
      if data["eval_path"] else [])
  print(text)
  if workdir:
    workdir.mkdir(parents=True, exist_ok=True)
    write_summary(workdir, {"audit": report})


def write_summary(workdir: pathlib.Path, values: dict[str, Any]) -> None:
  """Adds flat keys to the workdir's summary.json."""
  path = workdir / "summary.json"
  old = json.loads(path.read_text()) if path.exists() else {}
  commit.write_file(path, json.dumps(old | values, indent=1))


# --- Stage: sft ---------------------------------------------------------------


def run_sft(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Imitates sft.data_path; the result lies in <workdir>/sft/model and, for
  other runs with the same settings and data, in the cache."""
  config, folder = run.config, run.workdir / "sft"
  target = folder / "model"
  if target.exists():
    return {}
  data = setup.open_store(
      run, config["sft"]["data_path"], config["sft"]["data_format"])
  key = setup.digest([
      data.key, config["model"], config["sft"], config["seed"],
      config["data"]["eval_fraction"],
      str(run.model_dir)])
  shared = run.cache / "starts" / key
  if shared.exists():
    commit.verify(shared)
    logging.info("sft: the same start was trained before, in %s", shared)
    commit.write_folder(
        target, lambda to: shutil.copytree(shared, to, dirs_exist_ok=True), {})
    return {}
  rows = np.flatnonzero(~setup.held_out(data, config["data"]["eval_fraction"]))
  model, start = setup.open_model(run, run.model_dir)
  stage = setup.stage_of(config, len(rows), supervised=True)
  make_batch = batch_lib.make_batch_fn(
      data, rows, batch_size=stage.batch_size, seed=stage.seed,
      num_slots=data.max_candidates, preferred="best", top_k=None)
  params, _ = loop.train(
      stage, model, make_batch, start, folder, writer,
      setup.schedule_of(config), meta={"stage": "sft", "key": key})
  hf.save_params(target, params, model.config,
                 tokenizer_dir=run.workdir / "tokenizer")
  commit.write_folder(
      shared, lambda to: shutil.copytree(target, to, dirs_exist_ok=True), {})
  return {}


def find_start(run: setup.Run) -> pathlib.Path | None:
  """Where the preference stage starts: sft's result, given weights, or None."""
  if "sft" not in run.config["stages"]:
    return run.model_dir
  target = run.workdir / "sft" / "model"
  if not target.exists():
    raise errors.CheckpointError(
        "ckpt.none", "the sft stage has not finished", where=str(target),
        hint="run `train` first")
  return target


# --- Stage: preference -------------------------------------------------------


def open_preference_stores(
    run: setup.Run,
) -> dict[str, tuple[store_lib.Store, np.ndarray]]:
  """"train" and, if there is held-out data, "eval": (store, its rows)."""
  options = run.config["data"]
  data = setup.open_store(run, options["path"], options["format"])
  rows = np.arange(len(data))
  if setup.settings.OBJECTIVES[run.config["objective"]["name"]].contrast:
    rows = data.contrast_rows()
    if len(rows) < len(data):
      logging.info("%d rows without contrast are not used",
                   len(data) - len(rows))
  out = {}
  if options["eval_path"]:
    other = setup.open_store(run, options["eval_path"], options["eval_format"])
    out["eval"] = other, other.contrast_rows()
  elif options["eval_fraction"]:
    held = setup.held_out(data, options["eval_fraction"])
    out["eval"] = data, np.intersect1d(
        np.flatnonzero(held), data.contrast_rows())
    rows = rows[~held[rows]]
  out["train"] = data, rows
  return out


def open_reference(
    run: setup.Run, model: loop.Model, start, data: store_lib.Store
) -> reference.ReferenceCache:
  """The filled cache of a store."""
  params, model = reference_params(run, model, start)
  key = setup.digest([str(model.config), hf.params_sha256(params),
                      str(model.compute_dtype), data.key])
  cache = reference.ReferenceCache(run.cache / "reference" / key, len(data))
  if cache.missing:
    cache.fill(data.candidate_set, host_token_logps(model, params), model.pack,
               lambda shards: tqdm(shards, desc="reference", unit="shard"))
  return cache


def reference_params(run: setup.Run, model: loop.Model, start):
  """Weights and model of the reference: of reference.path, or the start."""
  path = run.config["reference"]["path"]
  if path is None:
    return start(), model
  other, load = setup.open_model(run, hf.resolve_model(path, None))
  return load(), other


def host_token_logps(model: loop.Model, params):
  """streams -> [S, T] on the host, with fixed weights."""
  function = jax.jit(model.token_logps)
  return lambda chunk: np.asarray(function(params, model.put(chunk)))


def run_preference(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Aligns the start on the candidate sets of data.path."""
  config, folder = run.config, run.workdir / "preference"
  done = folder / "result.json"
  if done.exists():
    return json.loads(done.read_text())
  model, start = setup.open_model(run, find_start(run))
  stores = open_preference_stores(run)
  data, rows = stores["train"]
  stage = setup.stage_of(config, len(rows), supervised=False)
  stage = stage._replace(
      refresh=loop.refresh_steps(
          config["kernel"]["refresh"], len(rows), stage.batch_size),
      corrected=config["proposal"]["correction"])
  if stage.corrected:
    for store, used in stores.values():
      for row in used:
        batch_lib.behaviour_logps(store, int(row))
  batches.plan(len(rows), batch_size=stage.batch_size)
  num_slots = max(d.max_candidates for d, _ in stores.values())
  options = {"seed": stage.seed, "num_slots": num_slots,
             "preferred": config["data"]["preferred"],
             "top_k": config["data"]["top_k"], "behaviour": stage.corrected}
  make_batch = batch_lib.make_batch_fn(
      data, rows, batch_size=stage.batch_size, **options)
  anchors = make_anchors(run, model, start, stores, make_batch)

  evaluate = None
  if "eval" in stores:
    evaluate = make_evaluate(
        run, stage, model, start, *stores["eval"], options, anchors.get("eval"))
  params, step = loop.train(
      stage, model, make_batch, start, folder, writer,
      setup.schedule_of(config),
      meta={"stage": "preference", "data": data.key,
            "model": str(model.config), "objective": stage.objective},
      reference_logps=anchors.get("train"), evaluate=evaluate,
      expect_start=config["reference"]["source"] is not None
      and config["reference"]["path"] is None)
  hf.save_params(folder / "model", params, model.config,
                 tokenizer_dir=run.workdir / "tokenizer")
  result = {"params/sha256": hf.params_sha256(params), "step": step}
  commit.write_file(done, json.dumps(result))
  return result


def make_anchors(run, model, start, stores, make_batch) -> dict[str, Any]:
  """"train" and "eval": HostBatch -> [B, K] reference log-probs, gated.

  Empty if neither the objective nor the kernel reads a reference.
  """
  source = run.config["reference"]["source"]
  if source is None:
    return {}
  if source == "resident":
    params, other = reference_params(run, model, start)
    sequence_logps = jax.jit(other.sequence_logps, static_argnums=(2, 3))

    def resident(batch):
      shape, out = batch.meta.role.shape, 0.0
      everything = [list(range(len(o))) for o in batch.order]
      for chunk in other.pack(batch.sets, everything, batch.order):
        out = out + sequence_logps(params, other.put(chunk), *shape)
      return np.asarray(out)

    return {name: resident for name in stores}
  caches = {name: open_reference(run, model, start, data)
            for name, (data, _) in stores.items()}
  if run.config["reference"]["path"] is None:
    tolerance = 1e-5 if model.compute_dtype == np.float32 else 2e-2
    reference.check_start(
        caches["train"], make_batch(0), host_token_logps(model, start()),
        model.pack, tolerance=tolerance)
  return {name: cache.anchor for name, cache in caches.items()}


def make_evaluate(run, stage, model, start, data, rows, options, anchor):
  """(functions, state) -> metrics on the first held-out prompts.

  Each call also appends samples of `evaluation.num_display` prompts, beside
  those of the start, to preference/samples.jsonl.
  """
  options_of = run.config["evaluation"]
  rows = rows[:options_of["num_prompts"] or len(rows)]
  held = []
  for first in range(0, len(rows), stage.batch_size):
    some = rows[first:first + stage.batch_size]
    held.append(batch_lib.collect(
        data, some, np.zeros(len(some), np.int32), batch_size=stage.batch_size,
        **options))
  shown = prompt_set(data, rows[:options_of["num_display"]])
  service = make_service(run, model, start())
  greedy = {"num_samples": 1, "temperature": 0.0, "top_p": 1.0,
            "seed": stage.seed, "prompt_ids": shown.prompt_ids}
  before = service.generate(shown.tokens, **greedy).text

  def evaluate(functions, state):
    out = loop.score_held_out(stage, model, functions, state, held, anchor)
    values = preferences.preference_metrics(
        out.logps, out.ref_logps, out.role, out.scores,
        beta=stage.objective_settings.get("beta", 1.0), seed=stage.seed)
    service.update(state.params, int(state.step))
    now = service.generate(shown.tokens, **greedy).text
    with open(run.workdir / "preference" / "samples.jsonl", "a") as file:
      for prompt, (old,), (new,) in zip(shown.prompts, before, now):
        file.write(json.dumps({"step": int(state.step), "prompt": prompt,
                               "start": old, "now": new}) + "\n")
    return {f"eval/{k}": v for k, v in values.items() if np.ndim(v) == 0} | {
        "eval/loss": out.loss,
        "eval/accuracy": values["rewards/accuracies"],
        "eval/margin": values["rewards/margins"]}

  return evaluate


# --- Stage: evaluate ----------------------------------------------------------


def prompt_set(data: store_lib.Store, rows: np.ndarray) -> samples.PromptSet:
  """The prompts of some rows, with the columns that all of them have."""
  sets = [data.candidate_set(int(i)) for i in rows]
  columns = [data.columns(int(i)) for i in rows]
  shared = set.intersection(*(set(c) for c in columns)) - {
      "prompt", "prompt_id", "where"}
  return samples.PromptSet(
      tokens=[s.prompt for s in sets],
      prompt_ids=np.stack([s.example_id for s in sets]),
      prompts=[c["prompt"] for c in columns],
      columns={name: [c[name] for c in columns] for name in sorted(shared)})


def make_service(
    run: setup.Run, model: loop.Model, params
) -> service_lib.GenerationService:
  """The sampler of this run's architecture and tokenizer."""
  length = (run.config["generation"]["max_new_tokens"]
            or run.config["data"]["max_completion_length"])
  return service_lib.GenerationService(
      model.config, params, 0, max_completion_length=length,
      stop_ids=run.tokenizer.stop_ids, pad_id=run.tokenizer.pad_id,
      tokenizer=run.tokenizer.hf, vocab_size=run.tokenizer.vocab_size,
      compute_dtype=model.compute_dtype, mesh=run.mesh)


def run_evaluate(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Samples of held-out prompts, scored by the reward: aligned against start.

  Both models draw with the same noise; the interval is over prompts.
  """
  done = run.workdir / "evaluate" / "result.json"
  if done.exists():
    return json.loads(done.read_text())
  stores = open_preference_stores(run)
  if "eval" not in stores or run.config["reward"]["name"] is None:
    logging.warning("evaluate: needs data.eval_path or data.eval_fraction, and "
                    "reward.name; nothing done")
    return {}
  data, rows = stores["eval"]
  prompts = prompt_set(data, rows[:run.config["evaluation"]["num_prompts"]])
  reward = rewards.load_reward(
      run.config["reward"]["name"],
      patterns_path=run.config["reward"]["patterns_path"])
  options, seed = run.config["generation"], run.config["seed"]
  names = ("sft" if "sft" in run.config["stages"] else "start", "aligned")

  model, start = setup.open_model(run, find_start(run))
  service = make_service(run, model, start())
  laws = {"": (options["num_samples"], options["temperature"],
               options["top_p"]), "greedy/": (1, 0.0, 1.0)}

  def sample(law):
    num, temperature, top_p = laws[law]
    return samples.sample_and_score(
        service, reward, prompts, num_samples=num, temperature=temperature,
        top_p=top_p, seed=seed)

  before = {law: sample(law) for law in laws}
  service.update(find_aligned(run, model), 1)
  summary, shown = {}, {}
  for law in laws:
    compared = samples.compare(
        before[law], sample(law), prompts.prompts, names=names, seed=seed)
    shown[law or "sampled/"] = compared.pop("samples")
    summary |= {law + name: value for name, value in compared.items()}
  done.parent.mkdir(exist_ok=True)
  commit.write_file(done.with_name("samples.json"), json.dumps(shown, indent=1))
  commit.write_file(done, json.dumps(summary, indent=1))
  writer.write("evaluate", 0, {
      k: v for k, v in summary.items() if isinstance(v, int | float)})
  for row in shown["sampled/"]:
    print("", row["prompt"] if isinstance(row["prompt"], str)
          else row["prompt"][-1]["content"],
          *(f"  {name + ':':9} {row[name]}" for name in names), sep="\n")
  return summary


def find_aligned(run: setup.Run, model: loop.Model):
  """The weights that the preference stage ended with."""
  folder = run.workdir / "preference" / "model"
  if not folder.exists():
    raise errors.CheckpointError(
        "ckpt.none", "the preference stage has not finished",
        where=str(folder), hint="run `train` first")
  return hf.load_params(folder, model.config, shardings=model.param_shardings,
                        dtype=run.config["model"]["param_dtype"])


# --- Stage: export -----------------------------------------------------------


def run_export(
    run: setup.Run, writer: metrics.Writer | None,
    out: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Writes what the last stage trained as a folder that transformers loads."""
  del writer
  out = out or run.workdir / "export"
  source = run.workdir / (
      "preference" if "preference" in run.config["stages"] else "sft") / "model"
  if not source.exists():
    raise errors.CheckpointError(
        "ckpt.none", "nothing was trained here yet", where=str(source),
        hint="run `train` first")
  config = hf.load_config(source)
  dtype = run.config["export"]["dtype"] or run.config["model"]["param_dtype"]
  params = hf.load_params(source, config, dtype=dtype)
  objective = run.config["objective"]
  hf.save_params(
      out, params, config, tokenizer_dir=run.workdir / "tokenizer",
      stop_ids=run.tokenizer.stop_ids,
      card=f"Aligned with mcpo_jax, objective {objective['name']}"
      f" (beta {objective.get('beta')}).")
  return {"export/path": str(out), "export/sha256": hf.params_sha256(params)}
