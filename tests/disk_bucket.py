"""A bucket of whole objects for several processes: pail://runs/one is
MCPO_BUCKET/runs/one. Whoever imports this can open it. A file that MCPO_READS
names gets a line of each read: the object's name, the bytes."""

import os
import pathlib
import uuid

import fsspec
from fsspec.implementations import local


class Bucket(local.LocalFileSystem):
  """Objects are put whole, read, listed and deleted; there is nothing else."""

  protocol = "pail"

  def _refuse(self, *args, **kwargs):
    raise NotImplementedError("not in a bucket")

  mv = rename = move = cp_file = copy = touch = truncate = open = _refuse

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix("pail://")
    root = os.environ["MCPO_BUCKET"]
    return path if path.startswith(root) else f"{root}/{path}".rstrip("/")

  def pipe_file(self, path, value, mode="overwrite", **kwargs):
    path = pathlib.Path(self._strip_protocol(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(os.environ["MCPO_BUCKET"], f".{uuid.uuid4().hex}")
    part.write_bytes(value)
    try:
      if mode == "create":
        os.link(part, path)
      else:
        os.replace(part, path)
    finally:
      part.unlink(missing_ok=True)

  def put_file(self, lpath, rpath, **kwargs):
    self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

  def cat_file(self, path, start=None, end=None, **kwargs):
    path = self._strip_protocol(path)
    with open(path, "rb") as file:
      file.seek(start or 0)
      content = file.read(None if end is None else end - (start or 0))
    if "MCPO_READS" in os.environ:
      with open(os.environ["MCPO_READS"], "a") as log:
        log.write(f"{os.path.basename(path)} {len(content)}\n")
    return content

  def get_file(self, rpath, lpath, **kwargs):
    pathlib.Path(lpath).write_bytes(self.cat_file(rpath))


fsspec.register_implementation("pail", Bucket, clobber=True)
