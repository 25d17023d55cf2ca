"""Names of models on the hub, and places in object stores, as local folders."""

import fnmatch
import hashlib
import json
import os
import pathlib
import re
import shutil

from mcpo_jax import commit, errors, storage

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_HUB_FILES = (*_SMALL_FILES, "*.safetensors")
# Of a folder whose weights stay in an object store: {"url": where, "files":
# {name: [bytes, version]}}.
ORIGIN = "mcpo_origin.json"


def resolve_model(path: str, revision: str | None = None) -> pathlib.Path:
  """The local folder of a model.

  Args:
    path: a folder, a name on the hub, "owner/name", or a place in an object
      store, whose weights are not fetched: shards.Shards reads them there.
    revision: branch, tag or commit of a hub name. It is resolved to a commit
      once; the name of the folder that comes back is that commit. For a store
      it is the name of the folder that came back before.

  Raises:
    ModelDirError: `hf.path`, `hf.gated`, `hf.missing`, `hf.unauthorised`,
      `hf.revision`, each with the page to visit; `hf.hub` without a network;
      `hf.changed`, what the store has is not what it had.
    CheckpointError: the store has not what the manifest there says.
    ResourceError: ckpt.store.
  """
  if storage.is_url(path):
    return _from_store(path.rstrip("/"), revision)
  folder = pathlib.Path(path).expanduser()
  if folder.is_dir():
    return folder
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(path)):
    raise errors.ModelDirError(
        "hf.path", "there is no such folder", where=str(path),
        want="a folder or a hub name such as owner/name",
    )
  import huggingface_hub as hub  # slow, and needed for hub names only
  import huggingface_hub.errors as hub_errors

  page = f"https://huggingface.co/{path}"

  def refuse(slug, message, visit):
    return errors.ModelDirError(
        slug, message, where=str(path), got=revision, hint=f"visit {visit}"
    )

  try:
    sha = hub.HfApi().repo_info(path, revision=revision, timeout=10).sha
    return pathlib.Path(
        hub.snapshot_download(
            path, revision=sha, allow_patterns=list(_HUB_FILES)
        )
    )
  except hub_errors.GatedRepoError:
    raise refuse(
        "hf.gated", "the repository asks for its terms to be accepted", page
    ) from None
  except hub_errors.RevisionNotFoundError:
    raise refuse(
        "hf.revision", "the repository has no such revision", f"{page}/commits"
    ) from None
  except hub_errors.HfHubHTTPError as error:
    status = error.response.status_code
    if status in (401, 403):
      raise refuse(
          "hf.unauthorised",
          "the repository is private or does not exist, and no valid token"
          " was sent; set HF_TOKEN",
          "https://huggingface.co/settings/tokens",
      ) from None
    if isinstance(error, hub_errors.RepositoryNotFoundError):
      raise refuse(
          "hf.missing", "there is no such repository (or folder)", page
      ) from None
    raise refuse("hf.hub", f"the hub answered {status}", page) from None
  except OSError as error:  # no network, or offline mode
    reason = type(error).__name__
  except Exception as error:
    # Errors of the HTTP client, which is another one in each hub version.
    if "Connect" not in type(error).__name__ and "Timeout" not in type(
        error
    ).__name__:
      raise
    reason = type(error).__name__
  try:
    return pathlib.Path(
        hub.snapshot_download(path, revision=revision, local_files_only=True)
    )
  except OSError:
    raise refuse(
        "hf.hub",
        f"the hub cannot be reached ({reason}) and the model is not in the"
        " local cache; give a local folder, or check the network and"
        " HF_HUB_OFFLINE",
        page,
    ) from None


def _from_store(url: str, known: str | None) -> pathlib.Path:
  """The folder of the small files of a place in a store, as it is now."""
  found = {
      one.url.rpartition("/")[2]: one for one in storage.find(f"{url}/*")}
  if not found:
    raise errors.ModelDirError(
        "hf.path", "nothing lies there", where=url,
        want="a place with config.json and safetensors")
  origin = json.dumps({"url": url, "files": {
      name: [one.bytes, one.version] for name, one in found.items()}})
  digest = hashlib.sha256(origin.encode()).hexdigest()[:24]
  name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', url)[-100:]}-{digest}"
  if known not in (None, name):
    raise errors.ModelDirError(
        "hf.changed", "the model is not the one that the run began with",
        where=url, got=name, want=known,
        hint="a fresh --workdir takes the new one")
  folder = storage.cache() / "models" / name
  if folder.is_dir():
    return folder
  temporary = commit.temporary_of(folder)
  try:
    temporary.mkdir(parents=True)
    known_files = _check_manifest(url, temporary, found)
    small = [name for name in found if name != commit.MANIFEST and any(
        fnmatch.fnmatch(name, pattern) for pattern in _SMALL_FILES)]
    storage.get_files(url, temporary, {
        name: known_files[name] for name in small if name in known_files})
    for name in small:
      if name not in known_files:
        storage.fetch(found[name], temporary / name)
    (temporary / ORIGIN).write_text(origin)
    for path in (*temporary.iterdir(), temporary):
      commit.sync(path)
    try:
      os.rename(temporary, folder)
    except OSError:
      if not folder.is_dir():  # else another process was faster
        raise
  except OSError as e:
    raise commit.storage_error(e, folder) from e
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def _check_manifest(
    url: str, folder: pathlib.Path, found: dict[str, storage.Found]
) -> dict[str, dict]:
  """The files of a manifest beside a model, if there is one; their sizes are
  those that it says."""
  if commit.MANIFEST not in found:
    return {}
  files = storage.get_manifest(url, folder)["files"]
  (folder / commit.MANIFEST).unlink()  # the weights that it names stay there
  for name, entry in files.items():
    size = found[name].bytes if name in found else None
    if size != entry["bytes"] and not name.endswith(".md"):
      raise errors.CheckpointError(
          "ckpt.missing_data", "a file is missing or cut",
          where=f"{url}/{name}", got=size, want=f"{entry['bytes']} bytes")
  return files


def resolve_config(path: str, revision: str | None = None) -> pathlib.Path:
  """The folder with a model's config.json; no weights are fetched.

  Args:
    path: a folder, a name on the hub, or a place in an object store.
    revision: of a hub name.

  Raises:
    ModelDirError: `hf.path`, it is neither here nor can it be fetched.
  """
  if storage.is_url(path):
    return resolve_model(path)
  folder = pathlib.Path(path).expanduser()
  if folder.is_dir():
    return folder
  import huggingface_hub as hub  # slow, and needed for hub names only

  try:
    return pathlib.Path(
        hub.hf_hub_download(path, "config.json", revision=revision)
    ).parent
  except Exception as error:  # of the network, the hub, or no name at all
    raise errors.ModelDirError(
        "hf.path", "config.json of the model is not here and cannot be fetched"
        f" ({type(error).__name__})", where=str(path), got=revision,
        hint="put the model's config.json, no weights, into a folder and give"
        " --config.model.path=FOLDER",
    ) from None
