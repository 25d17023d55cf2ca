"""Names of models on the hub as local folders."""

import pathlib
import re

from mcpo_jax import errors

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def resolve_model(path: str, revision: str | None = None) -> pathlib.Path:
  """The local folder of a model.

  Args:
    path: a folder, or a name on the hub, "owner/name".
    revision: branch, tag or commit of a hub name. It is resolved to a commit
      once; the name of the folder that comes back is that commit.

  Raises:
    ModelDirError: `hf.path`, `hf.gated`, `hf.missing`, `hf.unauthorised`,
      `hf.revision`, each with the page to visit; `hf.hub` without a network.
  """
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


def resolve_config(path: str, revision: str | None = None) -> pathlib.Path:
  """The folder with a model's config.json; no weights are fetched.

  Args:
    path: a folder, or a name on the hub.
    revision: of a hub name.

  Raises:
    ModelDirError: `hf.path`, it is neither here nor can it be fetched.
  """
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
