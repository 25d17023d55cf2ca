"""The verbs: what a run does from start to end, stage by stage."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from mcpo_jax import commit, errors, objective_names, registry, settings
from mcpo_jax.data import audit as audit_lib
from mcpo_jax.data import mismatched, packing
from mcpo_jax.data import store as store_lib
from mcpo_jax.evaluation import likelihood, preferences, samples
from mcpo_jax.generation import service as service_lib
from mcpo_jax.kernels import weights
from mcpo_jax.models import hf
from mcpo_jax.rewards import functions as rewards
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import loop, metrics, reference, setup, update
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib

# --- Verbs ------------------------------------------------------------------


def train(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Runs the stages of a config; each goes on from where it stopped."""
  setup.check_sources(config)
  load_reward(config)  # a reward that is missing is missed now, not later
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
  if config["reference"]["source"] != "cached":
    raise errors.ConfigError(
        "config.unused", "nothing would read the cache",
        where="reference.source", got=config["reference"]["source"],
        want="cached", hint="or an objective that needs a reference")
  run = setup.open_run(config, workdir)
  model, start = setup.open_model(run, find_start(run))
  stores = open_preference_stores(run)
  stores = {data.key: data for data, _ in stores.values()}
  for data in stores.values():
    open_reference(run, model, start, data)
  write_summary(workdir, {
      "score/rows": sum(len(data) for data in stores.values())})


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
    write_summary(workdir, {
        f"audit/{k.replace('.', '/')}": v
        for k, v in settings.flatten(report).items()})


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
  done = folder / "result.json"
  if done.exists():
    return json.loads(done.read_text())
  data = setup.open_store(
      run, config["sft"]["data_path"], config["sft"]["data_format"], name="sft")
  model, start = setup.open_model(run, run.model_dir)
  rows = setup.trained_rows(
      run, data, np.arange(len(data)), open_eval_store(run))
  key = setup.digest([
      data.key, len(rows), hf.params_sha256(start()), config["model"],
      config["sft"], config["seed"], config["data"]["stream_length"],
      config["data"]["num_streams"]])
  shared, target = run.cache / "starts" / key, folder / "model"
  stage = setup.stage_of(config, len(rows), supervised=True)
  if (shared / commit.MANIFEST).exists():
    logging.info("sft: the same start was trained before, in %s", shared)
    commit.verify(shared)
    shutil.rmtree(target, ignore_errors=True)
    commit.write_folder(
        target, lambda to: shutil.copytree(shared, to, dirs_exist_ok=True), {})
  else:
    make_batch = batch_lib.make_batch_fn(
        data, rows, batch_size=stage.batch_size, seed=stage.seed,
        num_slots=data.max_candidates, preferred="best", top_k=None)
    params, _ = loop.train(
        stage, model, make_batch, start, folder, writer,
        setup.schedule_of(config), meta={"stage": "sft", "key": key})
    save_model(run, target, params, model)
    commit.write_folder(
        shared, lambda to: shutil.copytree(target, to, dirs_exist_ok=True), {})
  params = hf.load_params(target, model.config)
  result = {"params/sha256": hf.params_sha256(params),
            "step": stage.num_steps}
  commit.write_file(done, json.dumps(result))
  return result


def save_model(run, folder, params, model) -> None:
  """What a stage ends with, as a Hugging Face folder with a manifest."""
  hf.save_params(folder, params, model.config,
                 tokenizer_dir=run.workdir / "tokenizer",
                 stop_ids=run.tokenizer.stop_ids)
  commit.write_manifest(folder, {})


def find_start(run: setup.Run) -> pathlib.Path | None:
  """Where the preference stage starts: sft's result, given weights, or None."""
  if "sft" not in run.config["stages"]:
    return run.model_dir
  return finished(run, "sft")


def finished(run: setup.Run, stage: str) -> pathlib.Path:
  """The verified model that a stage ended with.

  Raises:
    CheckpointError: ckpt.none, or what `commit.verify` finds.
  """
  folder = run.workdir / stage
  if not (folder / "result.json").exists():
    raise errors.CheckpointError(
        "ckpt.none", f"the {stage} stage has not finished", where=str(folder),
        hint="run `train` first")
  commit.verify(folder / "model")
  return folder / "model"


# --- Stage: preference -------------------------------------------------------


def open_preference_stores(
    run: setup.Run,
) -> dict[str, tuple[store_lib.Store, np.ndarray]]:
  """"train" and, if there is held-out data, "eval": (store, its rows)."""
  options = run.config["data"]
  data = setup.open_store(
      run, options["path"], options["format"], name="train")
  rows = np.arange(len(data))
  entry = objective_names.find_objective(
      run.config["objective"]["name"])
  if entry.contrast:
    rows = data.contrast_rows()
    if len(rows) < len(data):
      logging.info("%d rows without contrast are not used",
                   len(data) - len(rows))
  held, other = None, open_eval_store(run)
  if other is not None:
    held = other, other.contrast_rows()
  elif options["eval_fraction"]:
    held = data, np.intersect1d(data.contrast_rows(), np.flatnonzero(
        setup.held_out(data, options["eval_fraction"])))
  if held is not None and not len(held[1]):
    raise errors.DataError(
        "data.too_small", "no held-out row has a preference", got=0,
        where=f"data.eval_{'path' if other is not None else 'fraction'}",
        want="at least 1")
  rows = setup.trained_rows(run, data, rows, other)
  if entry.mismatched:
    same = held is not None and held[0] is data
    data = mismatched.with_mismatched(data, run.config["seed"])
    if held is not None:
      held = (data if same else mismatched.with_mismatched(
          held[0], run.config["seed"])), held[1]
  if options["preferred"] == "index":
    for row in rows:  # a record that names none is refused before training
      packing.order_candidates(data.candidate_set(int(row)), preferred="index")
  return {"train": (data, rows)} | ({} if held is None else {"eval": held})


def open_eval_store(run: setup.Run) -> store_lib.Store | None:
  """The store of data.eval_path, None without one."""
  data = run.config["data"]
  if not data["eval_path"]:
    return None
  return setup.open_store(
      run, data["eval_path"], data["eval_format"], name="eval")


def open_reference(
    run: setup.Run, model: stage_lib.Model, start, data: store_lib.Store
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


def reference_params(run: setup.Run, model: stage_lib.Model, start):
  """Weights and model of the reference: of reference.path, or the start."""
  path = run.config["reference"]["path"]
  if path is None:
    return start(), model
  other, load = setup.open_model(
      run, setup.resolve_once(run.workdir, path, None))
  return load(), other


def host_token_logps(model: stage_lib.Model, params):
  """streams -> [S, T] on the host, with fixed weights."""
  function = jax.jit(model.token_logps)
  return lambda chunk: np.asarray(function(params, model.put(chunk)))


def host_sequence_logps(model: stage_lib.Model, params):
  """batch -> [B, K] on the host, with fixed weights."""
  function = jax.jit(model.sequence_logps, static_argnums=(2, 3))

  def logps(batch):
    return np.asarray(sum(
        function(params, model.put(chunk), *batch.meta.role.shape)
        for chunk in model.pack_all(batch)))

  return logps


def run_preference(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Aligns the start on the candidate sets of data.path."""
  config, folder = run.config, run.workdir / "preference"
  done = folder / "result.json"
  if done.exists():
    return json.loads(done.read_text())
  model, start = setup.open_model(run, find_start(run))
  stores = open_preference_stores(run)
  data, rows = stores["train"]
  num_slots = max(d.max_candidates for d, _ in stores.values())
  stage = setup.stage_of(
      config, len(rows), supervised=False, num_slots=num_slots)
  check_pools(config, stores)
  if stage.corrected:
    for store, used in stores.values():
      for row in used:
        batch_lib.behaviour_logps(store, int(row))
  options = {"seed": stage.seed, "num_slots": num_slots,
             "preferred": config["data"]["preferred"],
             "top_k": config["data"]["top_k"], "behaviour": stage.corrected}
  make_batch = batch_lib.make_batch_fn(
      data, rows, batch_size=stage.batch_size, **options)
  references = make_references(run, model, start, stores, make_batch)

  evaluate = None
  if "eval" in stores:
    evaluate = make_evaluate(
        run, stage, model, start, *stores["eval"], options, references["eval"])
  params, step = loop.train(
      stage, model, make_batch, start, folder, writer,
      setup.schedule_of(config),
      meta={"stage": "preference", "data": data.key,
            "model": str(model.config), "start": hf.params_sha256(start()),
            "objective": stage.objective,
            "objective_source": objective_names.source_hashes(stage.objective)},
      reference=references["train"], evaluate=evaluate,
      expect_start=config["reference"]["source"] is not None
      and config["reference"]["path"] is None)
  save_model(run, folder / "model", params, model)
  result = {"params/sha256": hf.params_sha256(params), "step": step}
  commit.write_file(done, json.dumps(result))
  return result


def check_pools(config, stores) -> None:
  """What the objective and the kernel need of every set, before any training.

  Raises:
    DataError: data.field_missing, a score that the objective reads is unknown.
    ConfigError: config.range, no set has candidates enough for the chains.
  """
  entry = objective_names.find_objective(config["objective"]["name"])
  kernel = config["kernel"]
  steps = (kernel["num_steps"] or 1) * (kernel["block_size"] or 1)
  negatives = []
  for data, rows in stores.values():
    for row in rows if entry.scores or steps > 1 else []:
      one = data.candidate_set(int(row))
      own = one.candidate_ids != weights.MISMATCHED_ID
      if entry.scores and np.isnan(one.scores[own]).any():
        raise errors.DataError(
            "data.field_missing", "the objective reads the score of every "
            "completion", where=f"prompt_id {one.prompt_id}, scores",
            hint=f"objective.name={config['objective']['name']} needs scores")
      negatives.append(own.sum() - 1)
  if negatives and steps > max(negatives):
    raise errors.ConfigError(
        "config.range", "num_steps * block_size is more than any set has "
        "candidates", where="kernel.block_size", got=steps,
        want=f"at most {max(negatives)}")
  if negatives and steps > 1:
    logging.info("%d of %d sets have fewer candidates than the %d of a chain",
                 np.sum(np.array(negatives) < steps), len(negatives), steps)


def make_references(
    run, model, start, stores, make_batch
) -> dict[str, stage_lib.Reference]:
  """For "train" and "eval" what the policy is compared with, gated.

  Nothing if neither the objective nor the kernel reads a reference.
  """
  source = run.config["reference"]["source"]
  if source is None:
    return dict.fromkeys(("train", "eval"), stage_lib.NO_REFERENCE)
  if source == "resident":
    params, other = reference_params(run, model, start)
    resident = host_sequence_logps(other, params)
    needs_weights = registry.FULL_DISTRIBUTION & set(
        objective_names.find_objective(run.config["objective"]["name"]).terms)
    return {name: stage_lib.Reference(resident, params if needs_weights else ())
            for name in stores}
  caches = {name: open_reference(run, model, start, data)
            for name, (data, _) in stores.items()}
  if run.config["reference"]["path"] is None:
    tolerance = 1e-5 if model.compute_dtype == np.float32 else 2e-2
    reference.check_start(
        caches["train"], make_batch(0), host_token_logps(model, start()),
        model.pack, tolerance=tolerance)
  return {name: stage_lib.Reference(cache.anchor)
          for name, cache in caches.items()}


def make_evaluate(run, stage, model, start, data, rows, options, reference):
  """(functions, state) -> metrics on the first held-out prompts.

  Each call also writes samples of `evaluation.num_display` prompts, beside
  those of the start, to preference/samples.jsonl.
  """
  limits = run.config["evaluation"]
  rows = rows[:limits["num_prompts"] or len(rows)]
  held = []
  for first in range(0, len(rows), stage.batch_size):
    some = rows[first:first + stage.batch_size]
    held.append(batch_lib.collect(
        data, some, np.zeros(len(some), np.int32), batch_size=stage.batch_size,
        **options))
  shown = prompt_set(data, rows[:limits["num_display"]])
  params = start()
  service = make_service(run, model, params)
  # The start's log-probs are known already where it is the reference.
  start_is_reference = (run.config["reference"]["source"] is not None
                        and run.config["reference"]["path"] is None)
  logps = (reference.logps if start_is_reference
           else host_sequence_logps(model, params))
  start_logps = np.concatenate(
      [logps(batch)[batch.meta.candidate_mask[:, 0]] for batch in held])
  greedy = {"num_samples": 1, "temperature": 0.0, "top_p": 1.0,
            "seed": stage.seed, "prompt_ids": shown.prompt_ids}
  before = service.generate(shown.tokens, **greedy).text
  path = run.workdir / "preference" / "samples.jsonl"

  def evaluate(functions, state):
    out = update.score_held_out(stage, model, functions, state, held, reference)
    per_token = np.ones_like(out.logps)
    if stage.entry.per_token or (
        stage.objective == "ipo" and stage.objective_settings["length_average"]
    ):
      per_token = np.maximum(out.lengths, 1)
    ratios = (out.logps - out.ref_logps) / per_token
    rewards = stage_lib.first_setting(stage, "beta", 1.0) * ratios
    values = preferences.preference_metrics(
        rewards, out.logps, out.role, out.scores, seed=stage.seed)
    step = int(state.step)
    values |= likelihood.likelihood_metrics(
        out.logps, start_logps, rewards, out.role, out.lengths, products=out.products, topk_mass=out.topk_mass,
        topk_entropy=out.topk_entropy)
    if step == 0 and start_is_reference:  # all margins are 0, but for rounding
      values["likelihood/length_correlation"] = np.nan
    service.update(step_lib.policy_of(state.params), step)
    now = service.generate(shown.tokens, **greedy).text
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [x for x in lines if json.loads(x)["step"] < step] + [
        json.dumps({"step": step, "prompt": prompt, "start": old, "now": new})
        for prompt, (old,), (new,) in zip(shown.prompts, before, now)]
    commit.write_file(path, "\n".join(lines) + "\n")
    return {f"eval/{k}": v for k, v in values.items() if np.ndim(v) == 0} | {
        "eval/loss": out.loss,
        "eval/accuracy": values["rewards/accuracies"],
        "eval/margin": values["rewards/margins"]}

  return evaluate


# --- Stage: evaluate ----------------------------------------------------------


def load_reward(config: dict[str, Any]) -> rewards.Reward | None:
  """The reward of a config, None without one."""
  options = config["reward"]
  if options["name"] is None:
    return None
  return rewards.load_reward(
      options["name"], patterns_path=options["patterns_path"])


def prompt_set(data: store_lib.Store, rows: np.ndarray) -> samples.PromptSet:
  """The prompts of some rows, with the columns that all of them have."""
  sets = [data.candidate_set(int(i)) for i in rows]
  columns = [data.columns(int(i)) for i in rows]
  shared = set.intersection(*(set(c) for c in columns)) - {
      "prompt", "prompt_id", "where", "prompts", "completions", "reward"}
  return samples.PromptSet(
      tokens=[s.prompt for s in sets],
      prompt_ids=np.stack([s.example_id for s in sets]),
      prompts=[c["prompt"] for c in columns],
      columns={name: [c[name] for c in columns] for name in sorted(shared)})


def make_service(
    run: setup.Run, model: stage_lib.Model, params
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
  """Held-out loss, accuracy, margin and likelihoods; with a reward also
  samples of held-out prompts, aligned against start, and their KL.

  Both models draw with the same noise; the interval is over prompts.
  """
  done = run.workdir / "evaluate" / "result.json"
  if done.exists():
    return json.loads(done.read_text())
  finished(run, "preference")
  stores = open_preference_stores(run)
  if "eval" not in stores:
    logging.warning("evaluate: there is no held-out data; set "
                    "data.eval_path or data.eval_fraction")
    return {}
  summary = held_out_metrics(run)
  reward = load_reward(run.config)
  if reward is None:
    logging.warning("evaluate: no reward.name, so samples are not scored")
    return summary
  data, rows = stores["eval"]
  prompts = prompt_set(data, rows[:run.config["evaluation"]["num_prompts"]])
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
  aligned = hf.load_params(
      finished(run, "preference"), model.config,
      shardings=model.param_shardings,
      dtype=run.config["model"]["param_dtype"])
  service.update(aligned, 1)
  shown, per_prompt = {}, {}
  for law in laws:
    after = sample(law)
    compared = samples.compare(
        before[law], after, prompts.prompts, names=names, seed=seed)
    if not law:
      summary |= sampled_kl(model, aligned, start, prompts, after, seed=seed)
    shown[law or "sampled/"] = compared.pop("samples")
    summary |= {law + name: value for name, value in compared.items()}
    per_prompt[law.rstrip("/") or "sampled"] = {
        "prompt_ids": [f"{a:08x}{b:08x}" for a, b in prompts.prompt_ids],
        "start": before[law].scores.mean(1).tolist(),
        "aligned": after.scores.mean(1).tolist()}
  done.parent.mkdir(exist_ok=True)
  commit.write_file(done.with_name("scores.json"), json.dumps(per_prompt))
  commit.write_file(done.with_name("samples.json"), json.dumps(shown, indent=1))
  commit.write_file(done, json.dumps(summary, indent=1))
  writer.write("evaluate", 0, {
      k: v for k, v in summary.items() if isinstance(v, int | float)})
  for row in shown["sampled/"]:
    print("", row["prompt"] if isinstance(row["prompt"], str)
          else row["prompt"][-1]["content"],
          *(f"  {name + ':':9} {row[name]}" for name in names), sep="\n")
  return summary


def sampled_kl(
    model: stage_lib.Model, aligned, start, prompts: samples.PromptSet,
    drawn: samples.ScoredSamples, *, seed: int,
) -> dict[str, float]:
  """How far the aligned model is from the start, on samples of its own."""
  sets = samples.candidate_sets(prompts, drawn)
  longest = drawn.mask.shape[-1] + max(len(s.prompt) for s in sets)
  model = model._replace(stream_length=max(model.stream_length, longest))
  token_logps = jax.jit(model.token_logps)

  def score(params):
    tokens, _, _ = reference.score_sets(
        sets, lambda chunk: np.asarray(token_logps(params, model.put(chunk))),
        model.pack)
    logps = np.zeros(drawn.mask.shape, np.float32)
    logps[drawn.mask] = tokens
    return logps

  return likelihood.kl_metrics(
      score(aligned), score(start()), drawn.raw_logps, drawn.mask, seed=seed)


def held_out_metrics(run: setup.Run) -> dict[str, float]:
  """Loss, accuracy, margin and likelihoods on held-out rows of the weights
  that the preference stage ended with, as its last evaluation wrote them."""
  result = json.loads((run.workdir / "preference/result.json").read_text())
  rows = [json.loads(line) for line in (
      run.workdir / "metrics.jsonl").read_text().splitlines()]
  rows = [r for r in rows if r["stage"] == "preference"
          and r["step"] == result["step"] and "eval/loss" in r]
  return {k: v for k, v in rows[-1].items() if k.startswith("eval/")}


# --- Stage: export -----------------------------------------------------------


def run_export(
    run: setup.Run, writer: metrics.Writer | None,
    out: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Writes what the last stage trained as a folder that transformers loads."""
  del writer
  out = out or run.workdir / "export"
  if out.exists() and any(out.iterdir()) and not (
      out / "config.json").exists():
    raise errors.ModelDirError(
        "hf.export", "the folder holds something that is no model",
        where=str(out), want="a new folder, or an earlier export")
  last = "preference" if "preference" in run.config["stages"] else "sft"
  source = finished(run, last)
  config = hf.load_config(source)
  dtype = run.config["export"]["dtype"] or run.config["model"]["param_dtype"]
  params = hf.load_params(source, config, dtype=dtype)
  objective = run.config["objective"]
  card = "Fine-tuned on demonstrations with mcpo_jax."
  if last == "preference":
    card = (f"Aligned with mcpo_jax, objective {objective['name']}"
            f" (beta {objective.get('beta')}).")
  hf.save_params(out, params, config, tokenizer_dir=run.workdir / "tokenizer",
                 stop_ids=run.tokenizer.stop_ids, card=card)
  return {"export/path": str(out), "export/sha256": hf.params_sha256(params)}
