"""Nothing that is read may run: no unsafe loader is in the package, and a
poisoned file never comes to act."""

import ast
import json
import pathlib
import pickle
from collections.abc import Iterator

import models_folders
import numpy as np
import pytest

from mcpo_jax import commit, errors, user_code
from mcpo_jax.data import records, tokenizer
from mcpo_jax.training import reference

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "mcpo_jax"

MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle",
           "marshal", "shelve", "yaml", "torch"}
CALLS = {"eval", "exec", "exec_module", "run_path", "run_module", "Unpickler",
         "Environment", "Template"}
SHELLS = {"system", "popen"}  # of os
# A keyword, and the one value that it may have.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False}

# Code that its user has named by a path runs; nothing else does.
ALLOWED = {
    ("config_file.py", "exec_module"): "the config file that was typed",
    ("user_code.py", "exec"): "an objective, kernel or reward of the user's",
    ("report.py", "Environment"): "our own page, which escapes what it shows",
}


def unsafe(tree: ast.AST) -> Iterator[str]:
  """What of a syntax tree may run what it reads."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from MODULES & {a.name.split(".")[0] for a in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      yield from MODULES & {node.module.split(".")[0]}
      yield from (CALLS | SHELLS) & {a.name for a in node.names}
    elif isinstance(node, ast.Call):
      name = getattr(node.func, "attr", getattr(node.func, "id", ""))
      module = getattr(getattr(node.func, "value", None), "id", "")
      if name in CALLS or name in SHELLS and module == "os":
        yield name
      if name in ("__import__", "import_module", "getattr"):
        yield from (MODULES | CALLS | SHELLS) & {
            a.value for a in node.args if isinstance(a, ast.Constant)}
      for word in node.keywords:
        if word.arg in KEYWORDS and not (
            isinstance(word.value, ast.Constant)
            and word.value.value is KEYWORDS[word.arg]):
          yield word.arg


def test_the_package_has_no_unsafe_loader():
  found = {(path.name, what) for path in PACKAGE.rglob("*.py")
           for what in unsafe(ast.parse(path.read_text()))}
  assert found == ALLOWED.keys()


@pytest.mark.parametrize("code", [
    "import pickle", "from pickle import loads", "import torch.serialization",
    "import marshal as m", "os.popen(x)", "eval('1')", "exec(text)",
    "builtins.exec(text)",
    "os.system('ls')", "from os import system", "yaml = __import__('yaml')",
    "importlib.import_module('dill')", "getattr(builtins, 'eval')('1')",
    "subprocess.run(x, shell=True)", "subprocess.run(x, shell=flag)",
    "np.load(path, allow_pickle=True)", "jinja2.Environment()",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "def f():\n  import cloudpickle", "runpy.run_path(path)",
])
def test_each_unsafe_loader_would_be_found(code):
  assert list(unsafe(ast.parse(code)))


def test_what_is_safe_is_not_found():
  code = ("import json\nnp.load(p, allow_pickle=False)\njson.load(f)\n"
          "subprocess.run(['a'])\nliteral_eval(text)\nsandbox."
          "ImmutableSandboxedEnvironment()\nplatform.system()\nf(trust_remote_code=False)")
  assert not list(unsafe(ast.parse(code)))


# Poisoned files.


class _Payload:
  """Pickled, it touches a file when it is loaded."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def _code(canary: pathlib.Path) -> str:
  return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"


def _data_file(name):
  def load(folder, canary):
    path = folder / name
    path.write_bytes(pickle.dumps(_Payload(canary)))
    list(records.read_records(str(path)))

  return load


def _data_folder(folder, canary):
  (folder / "set").mkdir()
  (folder / "set" / "set.py").write_text(_code(canary))
  (folder / "set" / "state.json").write_text(json.dumps(
      {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "a",
       "_format_type": "torch"}))
  (folder / "set" / "data.arrow").write_bytes(pickle.dumps(_Payload(canary)))
  list(records.read_records(str(folder / "set")))


def _weights(name):
  def load(folder, canary):
    model = models_folders.export(folder)
    for path in model.glob("model*.safetensors*"):
      path.unlink()
    (model / name).write_bytes(pickle.dumps(_Payload(canary)))
    models_folders.load(model)

  return load


def _model_code(folder, canary):
  model = models_folders.export(folder)
  (model / "modeling.py").write_text(_code(canary))
  models_folders.edit_json(
      model / "config.json", model_type="own", trust_remote_code=True,
      auto_map={"AutoConfig": "modeling.A", "AutoModel": "modeling.A"})
  models_folders.load(model)


def _tokenizer_code(folder, canary):
  there = folder / "tokenizer"
  tokenizer.train_tokenizer(["a b"], vocab_size=300, out_dir=there)
  (there / "mine.py").write_text(_code(canary) + "class Mine: pass\n")
  models_folders.edit_json(
      there / "tokenizer_config.json", tokenizer_class="Mine",
      trust_remote_code=True, auto_map={"AutoTokenizer": ["mine.Mine", None]})
  tokenizer.load_tokenizer(there)


def _template(folder, canary):
  there = folder / "tokenizer"
  tokenizer.train_tokenizer(["a b"], vocab_size=300, out_dir=there)
  (there / "chat_template.jinja").write_text(
      "{{ cycler.__init__.__globals__.os.system('touch " + str(canary)
      + "') }}{% for m in messages %}{{ m.content }}{% endfor %}")
  tokenizer.load_tokenizer(there).encode_prompt("a")


def _cache(folder, canary):
  def write(shard):
    for name in ("token_logps", "sums", "starts"):
      np.save(shard / f"{name}.npy", np.array([_Payload(canary)]))

  commit.write_folder(folder / "cache" / "00000000", write, {})
  reference.ReferenceCache(folder / "cache", 1)


def _objective(folder, canary):
  """Checked, not run: of a file of the user's own only the text is read."""
  (folder / "mine.py").write_text(
      _code(canary) + "def loss(x, batch, state):\n  return x\n")
  user_code.check_kernel(f"{folder / 'mine'}:loss")


POISONED = {
    "jsonl": _data_file("x.jsonl"), "json": _data_file("x.json"),
    "parquet": _data_file("x.parquet"), "gz": _data_file("x.jsonl.gz"),
    "set": _data_folder, "bin": _weights("pytorch_model.bin"),
    "pt": _weights("model.pt"), "safetensors": _weights("model.safetensors"),
    "index": _weights("model.safetensors.index.json"),
    "model code": _model_code, "tokenizer code": _tokenizer_code,
    "template": _template, "cache": _cache, "objective": _objective,
}


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_file_does_not_act(name, tmp_path):
  canary = tmp_path / "canary"
  with pytest.raises(errors.McpoError):
    POISONED[name](tmp_path, canary)
  assert not canary.exists()


def test_the_payload_would_act(tmp_path):
  pickle.loads(pickle.dumps(_Payload(tmp_path / "canary")))
  assert (tmp_path / "canary").exists()
