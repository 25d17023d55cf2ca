"""Servers for tests: in this process without a model, and as a process."""

import contextlib
import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
import run_cases
import safetensors.numpy
import uvicorn

from mcpo_jax import commit, errors
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.generation import requests, server, worker
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models import decoder, hf
from mcpo_jax.models.config import ModelConfig

TOKEN = "a token that only the tests know"
LENGTH, POSITIONS, STOP = 24, 64, 1


@functools.cache
def tokenizer():
  folder = tempfile.mkdtemp(prefix="serve_cases")
  tokenizer_lib.train_tokenizer(
      ["the cup is red", "the door is blue"], vocab_size=300, out_dir=folder)
  return tokenizer_lib.load_tokenizer(folder)


@functools.cache
def _letters():
  return np.array(tokenizer().hf.convert_tokens_to_ids(
      list(string.ascii_lowercase)), np.int32)


def sample_of(prompt_id, index, seed, version, limit):
  """(tokens, logps) of a sample, by its address alone."""
  address = f"{list(map(int, prompt_id))} {index} {seed} {version}".encode()
  words = np.frombuffer(
      hashlib.sha256(address).digest() * LENGTH, np.uint8)[:limit]
  tokens = _letters()[words % 26]
  ends = np.flatnonzero(words < 20)  # about one in twelve is a stop token
  if len(ends):
    tokens = tokens[: ends[0] + 1]
    tokens[-1] = STOP
  return tokens, -(1 + tokens).astype(np.float32) / 7


class FakeEngine:
  """Keeps the contract of engine.Engine with samples out of a hash."""

  def __init__(self, num_slots=4):
    self.num_slots = num_slots
    self.version, self.models = 0, ()
    self.waiting, self.active = [], []
    self.go = threading.Event()  # a test may hold it in mid-step
    self.go.set()
    self.cancelled, self.broken = [], False

  def update(self, models, version):
    assert self.idle
    self.models, self.version = models, version

  def submit(self, request):
    if 299 in request.prompt:
      raise errors.ServiceError("request.prompt", "refused by the engine")
    self.waiting += [
        [request, place, 0] for place in range(len(request.sample_indices))]

  def cancel(self, request_id, sample=None):
    if not any(slot[0].request_id == request_id
               for slot in self.waiting + self.active):
      raise KeyError(request_id)

    def keep(slot):
      mine = slot[0].request_id == request_id and sample in (None, slot[1])
      if mine:
        self.cancelled.append((request_id, slot[1]))
      return not mine

    self.waiting = [slot for slot in self.waiting if keep(slot)]
    self.active = [slot for slot in self.active if keep(slot)]

  def step(self, max_tokens):
    self.go.wait(60)
    if self.broken:
      self.waiting, self.active = [], []
      raise errors.NonFiniteError("generation.non_finite", "NaN")
    while self.waiting and len(self.active) < self.num_slots:
      self.active.append(self.waiting.pop(0))
    news, on = [], []
    for slot in self.active:
      request, place, at = slot
      tokens, logps = sample_of(
          request.prompt_id, request.sample_indices[place], request.seed,
          self.version, request.sampling.max_new_tokens)
      end = min(at + max_tokens, len(tokens))
      done = end == len(tokens)
      reason = "stop" if tokens[-1] == STOP else "length"
      news.append(engine_lib.Progress(
          request.request_id, place, tokens[at:end], logps[at:end],
          2 * logps[at:end], reason if done else None, self.version))
      slot[2] = end
      if not done:
        on.append(slot)
    self.active = on
    return news

  @property
  def idle(self):
    return not self.waiting and not self.active

  @property
  def num_active(self):
    return len(self.active)

  @property
  def num_waiting(self):
    return len(self.waiting)


def load(folder, sha256):
  """Weights are a folder's text here."""
  text = (pathlib.Path(folder) / "model.safetensors").read_text()
  if hashlib.sha256(text.encode()).hexdigest() != sha256:
    raise errors.ServiceError("weights.hash", "other weights", where="sha256")
  return text


class Served:
  """A server on a free loopback port, in a thread."""

  def __init__(self, engine=None, load=load, **changes):
    self.engine = engine or FakeEngine()
    options = dict(token=TOKEN, max_body_bytes=20_000, body_seconds=20.0,
                   max_weights_bytes=50_000)
    limits = dict(
        max_positions=POSITIONS, max_new_tokens=LENGTH, vocab_size=300,
        max_samples=64, defaults=Sampling(), model="policy")
    options |= {k: v for k, v in changes.items() if k in options}
    limits |= {k: v for k, v in changes.items() if k in limits}
    self.worker = worker.Worker(
        self.engine, tokenizer().hf, 0, "0" * 64,
        max_samples=limits["max_samples"], tokens_per_step=3,
        num_slots=self.engine.num_slots)
    self.front = server.Server(
        self.worker, tokenizer(), requests.Limits(**limits), load,
        server.Options(**options))
    self.app = self.front.app()
    own = server.bind("127.0.0.1", 0)
    self.port = own.getsockname()[1]
    self._uvicorn = uvicorn.Server(uvicorn.Config(
        self.app, http="h11", ws="none", lifespan="on", log_config=None,
        log_level="critical", access_log=False, timeout_graceful_shutdown=2))
    self._thread = threading.Thread(
        target=self._uvicorn.run, kwargs={"sockets": [own]}, daemon=True)
    self._thread.start()
    wait_for(lambda: self._uvicorn.started)

  def close(self):
    self.engine.go.set()
    self._uvicorn.should_exit = True
    self._thread.join(20)
    assert not self._thread.is_alive()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.port}"

  def ask(self, path, body=None, method=None, **headers):
    """(status, parsed body, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
    with contextlib.closing(connection):
      send(connection, path, body, method, **headers)
      return answer_of(connection)

  def metrics(self):
    _, text, _ = self.ask("/metrics")
    return {name: float(value) for name, value in (
        line.split(" ") for line in text.splitlines() if line[0] != "#")}


def send(connection, path, body=None, method=None, **headers):
  """Sends a request with the token, unless `authorization` says otherwise."""
  headers = {k.replace("_", "-"): v for k, v in headers.items()}
  headers = {"authorization": f"Bearer {TOKEN}"} | headers
  if isinstance(body, dict):
    body = json.dumps(body)
    headers = {"content-type": "application/json"} | headers
  headers = {k: v for k, v in headers.items() if v is not None}
  connection.request(
      method or ("GET" if body is None else "POST"), path, body, headers)


def answer_of(connection):
  answer = connection.getresponse()
  text = answer.read().decode()
  kind = answer.headers.get("content-type", "")
  parsed = json.loads(text) if kind.startswith("application/json") else text
  return answer.status, parsed, answer.headers


def events_of(text):
  """The objects of server-sent events."""
  lines = [line for line in text.split("\n\n") if line]
  assert lines.pop() == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def wait_for(ready, seconds=60.0):
  end = time.monotonic() + seconds
  while not ready():
    assert time.monotonic() < end, "never came"
    time.sleep(0.005)


def listening(pid):
  """{(host, port)} of the TCP sockets on which a process listens."""
  proc, found = pathlib.Path("/proc", str(pid)), set()
  mine = {os.readlink(place) for place in (proc / "fd").iterdir()}
  for name in ("tcp", "tcp6"):
    for line in (proc / "net" / name).read_text().splitlines()[1:]:
      words = line.split()
      host, port = words[1].split(":")
      if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
        address = bytes.fromhex(host)[::-1]  # right for four bytes
        found.add((".".join(map(str, address)), int(port, 16)))
  return found


def model_folder(folder):
  """A model for `python -m mcpo_jax serve`, with its tokenizer."""
  tok, own = tokenizer(), folder / "tokenizer"
  tok.save(own)
  config = ModelConfig(
      family="llama", vocab_size=tok.vocab_size, hidden_size=16,
      intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
      head_dim=4, max_positions=POSITIONS, initializer_range=0.5,
      bos_token_id=tok.bos_id, eos_token_ids=(tok.eos_id,),
      pad_token_id=tok.pad_id)
  hf.save_params(folder / "model", params_of(config, 0), config,
                 tokenizer_dir=own)
  return folder / "model", config


def trained(workdir, model, step):
  """A workdir whose stage sft ended with this model after `step` updates."""
  place = workdir / "sft"
  shutil.copytree(model, place / "model")
  (place / "model" / "manifest.json").unlink()
  commit.write_manifest(place / "model", {})
  (place / "result.json").write_text(json.dumps({"step": step}))
  return workdir


def edit_weights(path, content, change):
  """Writes a safetensors file after change(tensors)."""
  tensors = safetensors.numpy.load(content)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


@functools.cache
def params_of(config, seed):
  init = jax.jit(lambda key: decoder.init_params(key, config))
  return init(jax.random.key(seed))


class Process:
  """A server as its own process, with its real command line."""

  def __init__(self, folder, *words, port=0, fault="", **changes):
    """`words` say what is served; the log and the cache lie in `folder`."""
    flags = {"serve.port": port,
             "serve.num_slots": 16, "data.max_prompt_length": 40,
             "data.max_completion_length": LENGTH} | changes
    self.log = folder / "serve.log"
    with open(self.log, "a") as log:
      began = log.tell()
      self.process = subprocess.Popen(
          [sys.executable, "-m", "mcpo_jax", "serve",
           "--config=configs/serve.py", *words,
           *(f"--config.{key}={value}" for key, value in flags.items())],
          env=run_cases.environment(
              folder, MCPO_SERVE_TOKEN=TOKEN, MCPO_FAULT=fault),
          cwd=run_cases.ROOT, stdout=log, stderr=log)
    ready = lambda: re.search(
        "serving on http://127.0.0.1:([0-9]+)", self.log.read_text()[began:])
    wait_for(lambda: ready() or self.process.poll() is not None, 240)
    assert ready(), self.log.read_text()[-3000:]
    self.port = int(ready()[1])
    wait_for(self._answers)

  def _answers(self):
    with contextlib.suppress(OSError):
      socket.create_connection(("127.0.0.1", self.port)).close()
      return True

  def kill(self, number=signal.SIGKILL):
    """Sends a signal; the exit code."""
    self.process.send_signal(number)
    return self.process.wait(30)

  url, ask, metrics = Served.url, Served.ask, Served.metrics
