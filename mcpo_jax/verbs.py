"""The verbs: what a command line does from start to end."""

import json
import pathlib
import tempfile
from typing import Any

from absl import logging

from mcpo_jax import commit, errors, hosts, settings
from mcpo_jax.data import audit as audit_lib
from mcpo_jax.evaluation import report as report_lib
from mcpo_jax.stages import evaluate as evaluate_stage
from mcpo_jax.stages import export as export_stage
from mcpo_jax.stages import generate as generate_stage
from mcpo_jax.stages import pools, references, results, sampling
from mcpo_jax.stages import preference as preference_stage
from mcpo_jax.stages import reward_model as reward_model_stage
from mcpo_jax.stages import serve as serve_stage
from mcpo_jax.stages import sft as sft_stage
from mcpo_jax.training import architecture, launches, metrics, setup


def train(
    config: dict[str, Any], workdir: pathlib.Path, *, profile: bool = False
) -> dict[str, Any]:
  """Runs the stages of a config; each goes on from where it stopped.

  Returns:
    What they add to summary.json.
  """
  if not (workdir / "launches.jsonl").exists():  # where an error is noted
    setup.check_sources(config)
  sampling.check_reward(config)  # missed now if missing, not hours later
  run = setup.open_run(config, workdir, profile=profile)
  stages = {"sft": sft_stage.run_sft,
            "reward_model": reward_model_stage.run_reward_model,
            "preference": preference_stage.run_preference,
            "evaluate": evaluate_stage.run_evaluate,
            "export": export_stage.run_export}
  summary = {}
  with launches.errors_told(workdir):
    setup.check_sources(config)
    pools.check_data(run)
    writer = metrics.Writer(workdir, tensorboard=config["log"]["tensorboard"],
                            wandb=config["log"]["wandb"],
                            mirror=config["checkpoint"]["mirror"])
    for name in config["stages"]:
      logging.info("stage %s", name)
      summary |= stages[name](run, writer)
      hosts.wait_for_first(name)
      write_summary(workdir, summary)
  if "evaluate" in config["stages"]:
    write_report(run)
  return summary


def evaluate(
    config: dict[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
  """The evaluation of a trained workdir, on its own."""
  run = setup.open_run(config, workdir)
  summary = evaluate_stage.run_evaluate(run, metrics.Writer(workdir))
  write_summary(workdir, summary)
  write_report(run)
  return summary


def generate(
    config: dict[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
  """Candidates of the workdir's last stage, or of model.path."""
  results.check_weights(config, workdir)
  sampling.check_reward(config)  # missed now if missing, not after the model
  run = setup.open_run(config, workdir)
  summary = generate_stage.run_generate(run)
  write_summary(workdir, summary)
  return summary


def serve(config: dict[str, Any], workdir: pathlib.Path | None) -> None:
  """Answers requests until SIGTERM; without a workdir those of model.path."""
  with tempfile.TemporaryDirectory() as folder:
    serve_stage.run_serve(config, workdir or pathlib.Path(folder))


def export(
    config: dict[str, Any], workdir: pathlib.Path, out: pathlib.Path | str
) -> None:
  """Writes the trained weights to `out`, a folder or a URL of an object store,
  as what transformers loads."""
  run = setup.open_run(config, workdir)
  write_summary(workdir, export_stage.run_export(run, None, out))


def score(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Fills the reference cache of the training and held-out rows."""
  if config["reference"]["source"] != "cached":
    raise errors.ConfigError(
        "config.unused", "nothing would read the cache",
        where="reference.source", got=config["reference"]["source"],
        want="cached", hint="or an objective that needs a reference")
  run = setup.open_run(config, workdir)
  model, start = architecture.open_model(run, results.find_start(run))
  stores = pools.open_preference_stores(run)
  stores = {data.key: data for data, _ in stores.values()}
  for data in stores.values():
    references.open_reference(run, model, start, data)
  write_summary(workdir, {
      "score/rows": sum(len(data) for data in stores.values())})


def audit(config: dict[str, Any], workdir: pathlib.Path | None) -> None:
  """Prints the data report; with a workdir also writes it there."""
  report = audit_data(config)
  print(audit_lib.format_report(report))
  if workdir:
    workdir.mkdir(parents=True, exist_ok=True)
    write_summary(workdir, flat_audit(report))


def audit_data(config: dict[str, Any]) -> dict[str, Any]:
  """The data report of a config's training and held-out sources."""
  data = config["data"]
  return audit_lib.audit(
      setup.sources_of(config, data["path"], data["format"]),
      setup.sources_of(config, data["eval_path"], data["eval_format"])
      if data["eval_path"] else [])[0]


def flat_audit(report: dict[str, Any]) -> dict[str, Any]:
  """As the summary has it."""
  return {f"audit/{k.replace('.', '/')}": v
          for k, v in settings.flatten(report).items()}


def write_report(run: setup.Run) -> None:
  """The page of a run, with its data report, which runs of the same data
  share. The run is done: what goes wrong here is told and ends nothing."""
  stores = pools.open_preference_stores(run)
  if hosts.is_first():
    key = setup.digest(sorted(data.key for data, _ in stores.values()))
    path = run.cache / "audits" / f"{key}.json"
    try:
      if not path.exists():
        logging.info("report: reads the data through, once")
        path.parent.mkdir(exist_ok=True)
        commit.write_file(path, json.dumps(audit_data(run.config)))
      write_summary(run.workdir, flat_audit(json.loads(path.read_text())))
      out = run.workdir / "report.html"
      report_lib.write_report([run.workdir], out, pictures=False)
      logging.info("report: %s", out)
    except Exception as e:
      logging.warning("there is no report: %s: %s", type(e).__name__, e)
  hosts.wait_for_first("the report")


def write_summary(workdir: pathlib.Path, values: dict[str, Any]) -> None:
  """Adds flat keys to the workdir's summary.json."""
  if not hosts.is_first():
    return
  path = workdir / "summary.json"
  old = json.loads(path.read_text()) if path.exists() else {}
  commit.write_file(path, json.dumps(old | values, indent=1))
