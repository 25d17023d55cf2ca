"""What a client and the server must both know."""

import os
import pathlib

from mcpo_jax import errors

VARIABLE = "MCPO_SERVE_TOKEN"


def read_token(path: str | None) -> str:
  """The text of a file with one line; None: the environment's variable.

  Raises:
    ConfigError: config.missing, config.range.
  """
  if path is None:
    token = os.environ.get(VARIABLE, "")
  else:
    file = pathlib.Path(path).expanduser()
    token = file.read_text().strip() if file.is_file() else ""
  if not token:
    raise errors.ConfigError(
        "config.missing", "the server needs a token", where="serve.token_path",
        got=path, want=f"a file with one line, or {VARIABLE} set",
        hint="python -c 'import secrets; print(secrets.token_urlsafe())'")
  if len(token) < 16 or not (token.isascii() and token.isprintable()):
    raise errors.ConfigError(
        "config.range", "the token is too weak", where="serve.token_path",
        want="16 printable ASCII characters or more")
  return token
