"""From a resolved config to the objects a run is made of."""

import hashlib
import json
import math
import os
import pathlib
import re
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax._src import compilation_cache  # its compression has no public switch

from mcpo_jax import (
    commit,
    errors,
    hosts,
    objective_names,
    registry,
    settings,
    sharding,
    storage,
    watch,
)
from mcpo_jax.data import batches, files, records
from mcpo_jax.data import store as store_lib
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.models import hf
from mcpo_jax.training import launches, loop
from mcpo_jax.training import stage as stage_lib

# What may differ between two launches into the same workdir.
_FREE = re.compile(
    r"(cache_dir|stages|log\..*|export\..*|compare\..*|generate\..*|serve\..*|"
    r"benchmark\..*|evaluation\.(models|baseline|reward)|mesh\..*|"
    r"generation\.(url|spool|token_path|patience_s)|"
    r"reward\.(url|timeout_s|patience_s)|watchdog\..*|"
    r"checkpoint\.(every_steps|keep|timeout_seconds|grace_seconds|"
    r"mirror))$")

# Part of every content key in the cache: raise it when the same input would
# give other weights or log-probs than before.
CACHE_VERSION = 3

_LOOK_SECONDS = 30  # for a file of another machine to be seen


class Run(NamedTuple):
  """One workdir at work."""

  config: dict[str, Any]  # resolved
  workdir: pathlib.Path
  cache: pathlib.Path
  mesh: jax.sharding.Mesh
  model_dir: pathlib.Path | None  # of the given weights, None: from scratch
  tokenizer: tokenizer_lib.Tokenizer
  stores: dict[Any, Any]  # what was read, so that all stages see the same
  # Of online rounds, None: the mesh samples too.
  sampler_mesh: jax.sharding.Mesh | None = None
  profile: bool = False  # whether stages write a trace
  id: str = ""  # the same at every start in this workdir

  @property
  def origin(self) -> dict[str, str]:
    """What every checkpoint must have in common with the run."""
    config = {key: value for key, value in settings.flatten(
        self.config).items() if not _FREE.match(key)}
    return {"run": self.id, "config": digest(config)}


def digest(value: Any) -> str:
  """Short content key of a JSON value."""
  text = json.dumps([CACHE_VERSION, value], sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def open_run(
    config: dict[str, Any], workdir: pathlib.Path, *, profile: bool = False
) -> Run:
  """Claims the workdir, then makes mesh and tokenizer.

  Raises:
    ConfigError, CheckpointError, ModelDirError, ResourceError.
  """
  hosts.from_first("the workdir", lambda: claim(config, workdir))
  cache = pathlib.Path(
      config["cache_dir"] or os.environ.get("MCPO_CACHE")
      or (workdir if hosts.count() > 1 else pathlib.Path.home())
      / ".cache" / "mcpo_jax")
  cache.mkdir(parents=True, exist_ok=True)
  storage.set_cache(cache)
  if hosts.count() > 1:
    find_disks(config, workdir, cache)
  if hosts.apart() and not hosts.is_first():
    claim(config, workdir)
  for part in ("data", "models", "objects", "reference", "starts"):
    commit.sweep(cache / part)
  keep_programs(cache)
  check_devices()
  mesh, sampler_mesh = open_meshes(config)
  if hosts.count() > 1:
    sharding.connect(mesh)
  say_precision(config["model"], mesh.devices.flat[0])
  if config["model"]["remat"] == "offload":
    sharding.check_host_memory(mesh, "model.remat")
  if any(group["optimizer"]["offload"]
         for group in (config, config["sft"], config["reward_model"])):
    sharding.check_host_memory(mesh, "optimizer.offload")
  check_streams(config, mesh)
  model_dir = None
  if config["model"]["path"]:
    model_dir = resolve_once(
        config, workdir, config["model"]["path"], config["model"]["revision"])
  run_id = hosts.on_disk("the config", lambda: store_config(config, workdir))
  launches.record(workdir)
  return Run(config, workdir, cache, mesh, model_dir,
             open_tokenizer(config, workdir, model_dir), {}, sampler_mesh,
             profile, run_id)


def keep_programs(cache: pathlib.Path) -> None:
  """Has compiled programs kept in the cache for later runs, unless the user's
  environment names a place for them (JAX_COMPILATION_CACHE_DIR) already.

  zlib's checksum makes JAX warn of a damaged program and compile it again.
  JAX's zstandard, which it takes where it is installed, has none: of 29 flipped
  bits 5 killed the process and one hung it.
  """
  compilation_cache.zstandard = compilation_cache.zstd = None
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache / "programs"))


def open_meshes(
    config: dict[str, Any],
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh | None]:
  """The mesh that trains, and the one that does nothing but sample for online
  rounds, if there is one.

  Raises:
    ConfigError: config.mesh.
  """
  devices, own = jax.devices(), config["generation"]["num_devices"]
  for key in ("num_devices", "url"):
    if hosts.count() > 1 and config["generation"][key] is not None:
      raise errors.ConfigError(
          "hosts.generation", "several processes sample on the mesh that "
          "trains", where=f"generation.{key}", got=config["generation"][key],
          want=None)
  if own is None:
    return sharding.make_mesh(**config["mesh"]), None
  if own >= len(devices):
    raise errors.ConfigError(
        "config.mesh", "no device is left to train on",
        where="generation.num_devices", got=own,
        want=f"below {len(devices)}, the devices there are")
  return (
      sharding.make_mesh(**config["mesh"], devices=devices[:-own]),
      sharding.make_mesh(
          data=-1, fsdp=1, tensor=config["generation"]["tensor"],
          devices=devices[-own:]))


def resolve_once(
    config: dict[str, Any], workdir: pathlib.Path, path: str,
    revision: str | None,
) -> pathlib.Path:
  """The folder of a model; of a hub name always the commit of the first time,
  of an object store what lay there then.

  The commit stands in <workdir>/revisions.json, and with a mirror in the store,
  so that a restart takes the same weights though the branch has moved.
  """
  stored, mirror = workdir / "revisions.json", config["checkpoint"]["mirror"]
  name = f"{path}@{revision or 'main'}"

  def resolve() -> tuple[str, bool]:
    text = stored.read_text() if stored.exists() else mirror and (
        storage.get_file(f"{mirror}/revisions.json"))
    commits = json.loads(text or "{}")
    folder = hf.resolve_model(path, commits.get(name, revision))
    local = pathlib.Path(path).expanduser().is_dir()
    if not local and name not in commits:
      text = json.dumps(commits | {name: folder.name})
      commit.write_file(stored, text)
      if mirror:
        storage.put(f"{mirror}/revisions.json", text.encode())
    return str(folder), local

  folder, local = hosts.from_first("a model", resolve)
  if local or hosts.is_first():
    return pathlib.Path(folder)
  return hf.resolve_model(path, pathlib.Path(folder).name)


def claim(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Locks the workdir and compares the config with the one it holds.

  Raises:
    CheckpointError: ckpt.locked, ResourceError: ckpt.path,
    ConfigError: config.other_run with the difference, config.version.
  """
  if "://" in str(workdir) or ":/" in str(workdir):
    raise errors.ResourceError(
        "ckpt.path", "object stores are not supported as a workdir",
        where=str(workdir), want="a folder",
        hint="a folder of this machine, and the bucket as checkpoint.mirror")
  commit.lock(workdir)
  commit.sweep(workdir)

  path = workdir / "config.json"
  if path.exists():
    old = settings.flatten(settings.read_saved(path))
    new = settings.flatten(json.loads(json.dumps(config)))
    changed = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
               for k in sorted(old.keys() | new.keys())
               if old.get(k) != new.get(k) and not _FREE.match(k)]
    if changed:
      raise errors.ConfigError(
          "config.other_run", "the workdir holds a run of another config",
          where=str(path), got="; ".join(changed[:20]),
          hint="use a fresh --workdir, or the config of that run")


def find_disks(
    config: dict[str, Any], workdir: pathlib.Path, cache: pathlib.Path
) -> None:
  """Finds out whether all processes see the same folders, or each its own.

  Raises:
    ResourceError: hosts.shared, some share what others do not, or what lies on
      disks of their own has no place in a store where it meets.
    ConfigError: hosts.disks, a setting needs what lies on all disks together.
  """
  folders = [workdir.resolve(), cache.resolve()]
  own, machine = os.urandom(8).hex(), socket.gethostname()
  mirror = config["checkpoint"]["mirror"]
  for folder in folders if hosts.is_first() else ():
    commit.write_file(folder / ".shared", own)
  want, where = hosts.from_first("the disks", lambda: [own, machine])

  def read(folder: pathlib.Path) -> str | None:
    path = folder / ".shared"
    return path.read_text() if path.exists() else None

  # Network file systems remember for a while that there was no file.
  deadline = time.monotonic() + (0 if machine == where else _LOOK_SECONDS)
  while ([read(folder) for folder in folders] != [want, want]
         and time.monotonic() < deadline):
    time.sleep(0.1)
  shared = [read(folder) == want for folder in folders]
  hosts.meet("the disks")
  for folder in folders if mirror and not any(shared) else ():
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".shared").write_text(own)
  hosts.meet("the disks")
  alone = [read(folder) == own for folder in folders]
  told = hosts.gather("the disks", [
      f"{workdir} and {cache} on {machine}", shared, alone])
  hosts.set_apart(not all(all(seen) for _, seen, _ in told))
  if not hosts.apart():
    return
  mixed = [place for place, seen, alone in told[1:]
           if any(seen) or not all(alone)] or [
               place for place, _, alone in told[:1] if not all(alone)]
  if mixed or not mirror:
    raise errors.ResourceError(
        "hosts.shared", "not the folders that the first process has",
        where=(mixed or [told[1][0]])[0],
        want="a workdir and a cache that all processes share, or both of its "
        "own for each of them",
        hint="with folders of its own for each, checkpoint.mirror names the "
        "place in a store where checkpoints meet")
  steps = [one for one in config["evaluation"]["models"] if "step:" in one]
  if steps:
    raise errors.ConfigError(
        "hosts.disks", "no process has a whole checkpoint where each has a "
        "disk of its own", where="evaluation.models", got=steps,
        hint="evaluate them in one process")
  logging.info("each of %d processes has a disk of its own; checkpoints meet in"
               " %s", hosts.count(), mirror)


def store_config(config: dict[str, Any], workdir: pathlib.Path) -> str:
  """Keeps the resolved config in the workdir, as JSON; gives the run's id."""
  path, run_id = workdir / "config.json", uuid.uuid4().hex
  fresh, mirror = not path.exists(), config["checkpoint"]["mirror"]
  if not fresh:
    run_id = json.loads(path.read_text())["run"]
  if mirror:
    claim_it = lambda: storage.claim(mirror, run_id, fresh=fresh)
    first = hosts.from_first("the run", claim_it)
    run_id = first if hosts.is_first() else claim_it()
  commit.write_file(path, json.dumps(
      {"version": settings.CONFIG_VERSION, "run": run_id, "config": config},
      indent=1, sort_keys=True))
  return run_id


def check_devices() -> None:
  """Says which devices are used, and when an accelerator lies idle.

  Raises:
    ResourceError: device, if the kind that was asked for is not there;
      hosts.join, the devices are those of several processes that have not
      found each other.
  """
  try:
    devices = jax.devices()
  except RuntimeError as e:
    raise errors.ResourceError(
        "device", str(e).split("\n")[0], where="JAX_PLATFORMS",
        got=os.environ.get("JAX_PLATFORMS"),
        hint="unset JAX_PLATFORMS to take what there is") from e
  if jax.process_count() != hosts.count():
    raise errors.ResourceError(
        "hosts.join", "the devices are those of several processes",
        where="MCPO_COORDINATOR", got=jax.process_count(), want=hosts.count(),
        hint="MCPO_COORDINATOR=auto")
  logging.info("jax %s on %d %s device(s) of %d process(es)", jax.__version__,
               len(devices), devices[0].platform, hosts.count())
  if devices[0].platform == "cpu" and os.environ.get(
      "JAX_PLATFORMS", "") != "cpu":
    for what, node, extra in (("GPU", "/dev/nvidia0", "cuda"),
                              ("TPU", "/dev/accel0", "tpu"),
                              ("TPU", "/dev/vfio/0", "tpu")):
      if os.path.exists(node):
        logging.warning(
            "this machine has a %s, but jax sees only the CPU: "
            "pip install 'mcpo_jax[%s]'", what, extra)


def say_precision(options: dict[str, Any], device: jax.Device) -> None:
  """Says in the log what is computed in, and warns where that is slow.

  Args:
    options: config.model.
    device: one of those that compute.
  """
  capability = getattr(device, "compute_capability", None)  # of NVIDIA GPUs
  logging.info("%s: products in %s, weights in %s", device.device_kind,
               options["compute_dtype"], options["param_dtype"])
  if options["compute_dtype"] == "bfloat16" and (
      capability is not None and float(capability) < 8.0):
    logging.warning(
        "%s has no bfloat16 units: model.compute_dtype=float32 is faster, and "
        "float16 cannot hold the gradients", device.device_kind)


def open_tokenizer(config, workdir, model_dir) -> tokenizer_lib.Tokenizer:
  """The model's, the configured one, or one trained on the training text."""
  options = config["tokenizer"]
  path = options["path"]
  if path is None or (model_dir and path == config["model"]["path"]):
    path = model_dir
  elif storage.is_url(path):
    path = resolve_once(config, workdir, path, None)
  own = workdir / "tokenizer"
  with hosts.first_goes_ahead("the tokenizer"):
    if path is None and not own.exists():
      commit.write_folder(
          own, lambda folder: tokenizer_lib.train_tokenizer(
              training_texts(config), vocab_size=options["vocab_size"],
              out_dir=folder, chat_template=options["chat_template"]), {})
    tokenizer = tokenizer_lib.load_tokenizer(
        str(path or own), chat_template=options["chat_template"],
        chat_template_kwargs=json.loads(
            options["chat_template_kwargs"] or "{}"),
        date=options["date"], bos=options["bos"],
        think=config["data"]["think"])
    if not own.exists():  # what exports carry
      commit.write_folder(own, tokenizer.save, {})
  return tokenizer


def training_sources(config: dict[str, Any]) -> list[tuple[str, str]]:
  """(path, format) of what each stage trains on, in the stages' order."""
  groups = [config[stage] for stage in ("sft", "reward_model")
            if stage in config["stages"]]
  data = config["data"]
  named = [(group["data_path"], group["data_format"]) for group in groups]
  return [pair for pair in [*named, (data["path"], data["format"])] if pair[0]]


def training_texts(config: dict[str, Any]) -> Iterator[str]:
  """Prompts and completions of the first stage that trains."""
  path, format = training_sources(config)[0]
  for source, _ in settings.parse_sources(path):
    yield from store_lib.training_texts(source, format)


def sources_of(
    config: dict[str, Any], path: str, format: str
) -> list[store_lib.Source]:
  """What a path of the config names, as stores and the audit take it."""
  return [(source, format, weight, config["data"]["revision"])
          for source, weight in settings.parse_sources(path)]


def check_sources(config: dict[str, Any]) -> None:
  """Looks for the files of every stage before the first one begins.

  Raises:
    DataError: data.no_files, data.unreadable. ResourceError: ckpt.store.
  """
  texts = [path for path, _ in training_sources(config)]
  for text in filter(None, [*texts, config["data"]["eval_path"]]):
    for path, _ in settings.parse_sources(text):
      if storage.is_url(path):
        files.find(path)
      elif not (path.startswith(records.EMBEDDED) or files.is_hub_name(path)):
        files.expand(path)


def open_store(
    run: Run, path: str, format: str, *, name: str, prompts_only: bool = False
) -> store_lib.Store:
  """The tokenised rows of a path's sources, made once and kept in the cache.

  They are read once in a run: a file that changes meanwhile changes nothing.

  Bad rows that were set aside are listed in quarantine_<name>.jsonl. With
  `prompts_only` a row may be a prompt and nothing else.
  """
  data, key = run.config["data"], (path, format, name, prompts_only)
  if key in run.stores:
    return run.stores[key]
  with watch.phase("work", f"the data of {name}"), hosts.first_goes_ahead(
      f"the data of {name}"):
    store = store_lib.build_store(
        sources_of(run.config, path, format), run.tokenizer,
        max_prompt_length=data["max_prompt_length"],
        max_completion_length=data["max_completion_length"],
        prompt_overlength=data["prompt_overlength"],
        completion_overlength=data["completion_overlength"],
        think=data["think"],
        quarantine_path=(run.workdir / f"quarantine_{name}.jsonl"
                         if data["quarantine"] else None),
        quarantine_text=data["quarantine_text"],
        max_quarantined_share=data["max_quarantined_share"],
        prompts_only=prompts_only, cache_dir=run.cache / "data")
  hosts.check_same("hosts.data", f"the data of {name}", {path: store.key},
                   hint="give all of them the same files")
  run.stores[key] = store
  return store


def held_out(data: store_lib.Store, fraction: float) -> np.ndarray:
  """[N] bool, True on rows held out by a hash of their prompt: every file
  that has the prompt holds it out."""
  return data.prompt_hashes.astype(np.float64) < fraction * 2.0**64


def trained_rows(
    run: Run, data: store_lib.Store, rows: np.ndarray,
    eval_store: store_lib.Store | None,
) -> np.ndarray:
  """`rows` without the prompts of the held-out data, counted in the log.

  Raises:
    DataError: data.too_small, none are left.
  """
  held = held_out(data, run.config["data"]["eval_fraction"])
  if eval_store is not None:
    held |= np.isin(data.prompt_hashes, eval_store.prompt_hashes)
  left = rows[~held[rows]]
  if len(left) < len(rows):
    logging.info("%d rows of held-out prompts are not trained on",
                 len(rows) - len(left))
  if not len(left):
    raise errors.DataError(
        "data.too_small", "no row is left to train on", where="data", got=0,
        want="at least 1", hint="rows without contrast and rows of held-out "
        "prompts do not count")
  return left


def check_streams(config: dict[str, Any], mesh: jax.sharding.Mesh) -> int:
  """Streams of a chunk. Refuses one that the mesh cannot split.

  Raises:
    ConfigError: config.divisible.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  num_streams = config["data"]["num_streams"] or parts
  if num_streams % parts:
    raise errors.ConfigError(
        "config.divisible", "the streams of a chunk are split over the data "
        "and fsdp axes", where="data.num_streams", got=num_streams,
        want=f"a multiple of data x fsdp = {parts}")
  block, length = 128 * mesh.shape["context"], config["data"]["stream_length"]
  if mesh.shape["context"] > 1 and length % block:
    raise errors.ConfigError(
        "config.divisible", "the tokens of a stream are split over the context "
        "axis, 128 side by side at least", where="data.stream_length",
        got=length, want=f"a multiple of 128 x context = {block}")
  return num_streams


def schedule_of(run: Run) -> loop.Schedule:
  """When to log, save and evaluate."""
  config = run.config
  checkpoint, evaluation = config["checkpoint"], config["evaluation"]
  return loop.Schedule(
      log_every=config["log"]["every_steps"],
      save_every=checkpoint["every_steps"], keep=checkpoint["keep"],
      evaluate_every=evaluation["every_steps"],
      patience=evaluation["patience"], keep_best=checkpoint["keep_best"],
      save_seconds=checkpoint["timeout_seconds"], mirror=checkpoint["mirror"],
      estimate_every=evaluation["estimator_every_steps"],
      show_every=config["log"]["candidates_every_steps"],
      profile=run.workdir / "profile" if run.profile else None)


def stage_of(
    config: dict[str, Any], num_examples: int, *, supervised: bool,
    num_slots: int = 0,
) -> stage_lib.Stage:
  """The plain settings of the preference stage, or of the sft stage."""
  if supervised:
    group = config["sft"]
    return stage_lib.Stage(
        "sft", "sft", registry.OBJECTIVES["sft"], {}, {"strategy": "none"},
        group["optimizer"], group["num_steps"], group["batch_size"],
        config["seed"])
  batches.plan(num_examples, batch_size=config["batch_size"])
  objective = dict(config["objective"])
  name = objective.pop("name")
  num_steps = config["num_steps"] or math.ceil(
      num_examples * config["num_epochs"] / config["batch_size"])
  logging.info("%d examples, %d updates of %d prompts = %.2f epochs",
               num_examples, num_steps, config["batch_size"],
               num_steps * config["batch_size"] / num_examples)
  return stage_lib.Stage(
      "preference", name, objective_names.find_objective(name), objective,
      config["kernel"],
      config["optimizer"], num_steps, config["batch_size"], config["seed"],
      refresh=stage_lib.refresh_steps(
          config["kernel"]["refresh"], num_examples, config["batch_size"]),
      corrected=config["proposal"]["correction"],
      num_examples=num_examples, num_slots=num_slots,
      scoring=config["kernel"]["scoring"],
      # Weights ahead of the policy write the candidates of extrapolation.
      on_policy=config["online"]["enabled"]
      and not config["online"]["extrapolation"],
      moving=config["online"]["enabled"] and (
          config["reference"]["source"] == "ema"
          or config["online"]["extrapolation"] > 0))
