"""The stage export: a folder that transformers loads."""

import pathlib
import shutil
from typing import Any

from mcpo_jax import commit, errors, faults, hosts, sharding, storage
from mcpo_jax.models import decoder, hf
from mcpo_jax.stages import results
from mcpo_jax.training import metrics, setup


def run_export(
    run: setup.Run, writer: metrics.Writer | None,
    out: pathlib.Path | str | None = None,
) -> dict[str, Any]:
  """Writes what the last stage trained as a folder that transformers loads;
  of LoRA the merged weights, and in its folder `adapter` what PEFT loads.

  Args:
    run: that is exported.
    writer: is not used.
    out: a folder, or the URL of a place in an object store. None: the workdir's
      folder `export`, and that of checkpoint.mirror.
  """
  del writer
  if out is None:
    mirror = run.config["checkpoint"]["mirror"]
    return _export(run, run.workdir / "export", mirror and f"{mirror}/export")
  if isinstance(out, pathlib.Path):
    return _export(run, out, None)
  hosts.from_first("the place", lambda: storage.steps(out))  # it can be asked
  folder = commit.temporary_of(run.workdir / "export")
  try:
    return _export(run, folder, out) | {"export/path": out}
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _export(
    run: setup.Run, out: pathlib.Path, url: str | None
) -> dict[str, Any]:
  """Writes to a folder, and copies it to a place in a store."""
  if out.exists() and any(out.iterdir()) and not (
      out / "config.json").exists():
    raise errors.ModelDirError(
        "hf.export", "the folder holds something that is no model",
        where=str(out), want="a new folder, or an earlier export")
  last = "preference" if "preference" in run.config["stages"] else "sft"
  source = results.finished(run, last)
  config = hf.load_config(source)
  dtype = run.config["export"]["dtype"] or run.config["model"]["param_dtype"]
  params = hf.load_params(
      source, config, dtype=dtype, shardings=sharding.infer_shardings(
          decoder.param_shapes(config), decoder.PARAM_RULES, run.mesh))
  objective = run.config["objective"]
  card = "Fine-tuned on demonstrations with mcpo_jax."
  if last == "preference":
    card = (f"Aligned with mcpo_jax, objective {objective['name']}"
            f" (beta {objective.get('beta')}).")
  faults.point("export.begin")
  hf.save_params(out, params, config, tokenizer_dir=run.workdir / "tokenizer",
                 stop_ids=run.tokenizer.stop_ids, card=card)
  faults.point("export.written")
  adapter = source.with_name("adapter")
  if adapter.exists():
    commit.verify(adapter)
    commit.write_folder(
        out / "adapter",
        lambda to: shutil.copytree(adapter, to, dirs_exist_ok=True), {})

  def copy() -> None:
    for name in ("adapter", "."):
      if (out / name).exists():
        storage.replace(out / name, f"{url}/{name}".removesuffix("/."))

  if url is not None:
    hosts.from_first("the copy of the export", copy)
  return {"export/path": str(out), "export/sha256": hf.params_sha256(params)}
