"""The service in another process: real ones that are killed, and others."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import pathlib
import random
import signal
import socket
import threading

import numpy as np
import pytest
import serve_cases
import uvicorn
from serve_cases import LENGTH, STOP, TOKEN, Served, wait_for
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from mcpo_jax import errors
from mcpo_jax.generation import client, server, service
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models import hf

COMPLETIONS = "/v1/completions"
PAD = 2


def connect(url, config=None, **changes):
  return client.RemoteService(url, **dict(
      token=TOKEN, config=config, max_completion_length=LENGTH,
      stop_ids=(STOP,), pad_id=PAD, patience=30.0) | changes)


def request(num_prompts=9, **changes):
  rng = np.random.default_rng(0)
  return dict(
      prompts=[rng.integers(3, 250, rng.integers(2, 9))
               for _ in range(num_prompts)],
      prompt_ids=rng.integers(0, 2**32, (num_prompts, 2), dtype=np.uint32),
      num_samples=10, sampling=Sampling(), seed=4) | changes


def check_fake(got, asked, version=0):
  """Against what FakeEngine gives."""
  for r, ids in enumerate(asked["prompt_ids"]):
    for n in range(asked["num_samples"]):
      tokens, logps = serve_cases.sample_of(
          ids, n, asked["seed"], version, LENGTH)
      count = len(tokens)
      assert got.tokens[r, n, :count].tolist() == tokens.tolist()
      assert (got.tokens[r, n, count:] == PAD).all()
      assert got.mask[r, n].tolist() == [i < count for i in range(LENGTH)]
      assert got.behaviour_logps[r, n, :count].tolist() == logps.tolist()
      assert got.behaviour_raw_logps[r, n, :count].tolist() == (
          2 * logps).tolist()
      reason = "stop" if tokens[-1] == STOP else "length"
      assert got.finish_reason[r][n] == reason
      assert got.text[r][n] == serve_cases.tokenizer().decode(
          tokens[:-1] if reason == "stop" else tokens)
  assert got.policy_version == version


def check_equal(one, other):
  """All but a few samples are the same: in float32 the batch mates, which are
  others each time, can decide a draw between two tokens that are level."""
  same = (one.tokens == other.tokens).all(-1)
  assert same.mean() > 0.98
  for a, b in zip(one, other):
    a, b = np.array(a), np.array(b)
    if a.dtype.kind == "f":
      np.testing.assert_allclose(a[same], b[same], atol=1e-4)
    elif a.ndim:
      np.testing.assert_array_equal(a[same], b[same])
    else:
      assert a == b


@pytest.fixture(scope="module")
def served():
  one = Served(max_samples=1000)
  yield one
  one.close()


class Proxy:
  """Passes bytes on to a port, but for the next `lose` completions."""

  def __init__(self, port):
    self.port, self.lose, self.lost = port, 0, 0
    self._socket = socket.create_server(("127.0.0.1", 0))
    self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
    threading.Thread(target=self._serve, daemon=True).start()

  def _serve(self):
    with contextlib.suppress(OSError):  # closed
      while True:
        near, _ = self._socket.accept()
        threading.Thread(target=self._pass, args=(near,), daemon=True).start()

  def _pass(self, near):
    with near, contextlib.suppress(OSError):
      with socket.create_connection(("127.0.0.1", self.port)) as far:
        data = near.recv(2**16)
        lose = self.lose > 0 and data.startswith(b"POST /v1/completions")
        self.lose, self.lost = self.lose - lose, self.lost + lose
        threading.Thread(
            target=self._back, args=(far, near, lose), daemon=True).start()
        while data:
          far.sendall(data)
          data = near.recv(2**16)

  def _back(self, far, near, lose):
    with contextlib.suppress(OSError):
      while data := far.recv(2**16):
        if lose:  # the work is done, nobody hears of it
          break
        near.sendall(data)
      near.shutdown(socket.SHUT_RDWR)

  def close(self):
    self._socket.close()


# Our own server.


def test_the_result_is_that_of_the_engine_in_order(served):
  asked = request()
  check_fake(connect(served.url).generate(**asked), asked)


def test_every_setting_is_sent_and_none_of_the_server_is_taken():
  odd = Sampling(0.5, 7, 0.9, 0.1, 1.2, 3, 11, (4, 5), ("x", "y"))
  one = Served(defaults=odd)
  try:
    taken = []
    submit = one.engine.submit
    one.engine.submit = lambda r: (taken.append(r), submit(r))
    remote = connect(one.url)
    other = Sampling(2.0, 3, 0.5, 0.2, 1.5, 2, 9, (6,), ("z",))
    for how in (Sampling(), other):
      remote.generate(**request(1, sampling=how))
      wanted = how if how.max_new_tokens else how._replace(
          max_new_tokens=LENGTH)
      assert taken.pop().sampling == wanted
  finally:
    one.close()


def test_a_full_queue_is_waited_for():
  one = Served(max_samples=70)
  try:
    asked = request(12)
    check_fake(connect(one.url).generate(**asked), asked)
  finally:
    one.close()


def test_f14_a_lost_answer_is_given_again_and_sampled_once(served):
  proxy = Proxy(served.port)
  before = served.worker.counts["tokens"]
  proxy.lose = 2
  asked = request(6)
  got = connect(proxy.url).generate(**asked)
  check_fake(got, asked)
  proxy.close()
  assert proxy.lost == 2
  assert served.worker.counts["tokens"] - before == got.mask.sum()


def test_a_server_that_never_answers_is_given_up(served):
  with pytest.raises(errors.ServiceError) as e:
    connect("http://127.0.0.1:9", patience=0.5).generate(**request())
  assert e.value.slug == "service.unreachable" and e.value.exit_code == 7
  with pytest.raises(errors.ServiceError) as e:
    connect(served.url, token="x" * 20).generate(**request())
  assert e.value.slug == "request.token" and "x" * 20 not in str(e.value)


def test_refusals_and_failures_keep_their_names(served):
  with pytest.raises(errors.ServiceError) as e:
    connect(served.url).generate(**request(prompts=[np.array([5, 999])] * 9))
  assert e.value.slug == "request.prompt"
  with pytest.raises(errors.ServiceError) as e:
    connect(served.url).generate(**request(), require_version=3)
  assert (e.value.slug, e.value.got, e.value.want) == ("service.version", 0, 3)
  with pytest.raises(errors.ServiceError) as e:
    connect(served.url).update({}, 1)
  assert e.value.slug == "service.update"
  one = Served()
  one.engine.broken = True
  with pytest.raises(errors.NonFiniteError):
    connect(one.url).generate(**request())
  one.close()


class Forgetful:
  """A server that is started again with other weights, whenever told to."""

  def __init__(self):
    self.served = Served(load=lambda folder, sha256: sha256)

  def restart(self, version, sha256):
    self.served.engine.version = self.served.worker.version = version
    self.served.worker.sha256 = sha256


@pytest.mark.parametrize("version, sha256", [
    (0, "0" * 64), (3, "1" * 64), (9, "2" * 64)])
def test_f12_weights_are_pushed_again_whatever_a_server_came_back_with(
    tmp_path, version, sha256):
  """Older ones, newer ones, and others of the same version."""
  one, asked = Forgetful(), request()
  _, config = serve_cases.model_folder(tmp_path / "model")
  (tmp_path / "spool" / "1-of a killed trainer").mkdir(parents=True)
  remote = connect(one.served.url, config, spool=tmp_path / "spool")
  remote.update(serve_cases.params_of(config, 0), 3)
  assert [p.name[:2] for p in (tmp_path / "spool").iterdir()] == ["3-"]
  check_fake(remote.generate(**asked), asked, 3)
  one.restart(version, sha256)
  check_fake(remote.generate(**asked, require_version=3), asked, 3)
  assert one.served.worker.counts["updates"] == 2
  one.served.close()


def test_f12_a_server_that_never_keeps_the_weights_is_given_up(tmp_path):
  one = Forgetful()
  _, config = serve_cases.model_folder(tmp_path / "model")
  remote = connect(
      one.served.url, config, spool=tmp_path / "spool", patience=0.5)
  remote.update(serve_cases.params_of(config, 0), 3)
  submit = one.served.worker.submit

  def forget(ask, tell):
    one.restart(0, "0" * 64)
    return submit(ask, tell)

  one.served.worker.submit = forget
  with pytest.raises(errors.ServiceError) as e:
    remote.generate(**request())
  assert e.value.slug == "service.version" and e.value.want == 3
  one.served.close()


# Servers of others.


class Plain:
  """The little of vLLM's front that is used; choices as `change` has them."""

  def __init__(self, change=lambda choice: choice, owner="vllm"):
    self.bodies, self._change = [], change

    async def models(_):
      return JSONResponse({"data": [{"id": "m", "owned_by": owner}]})

    async def completions(request):
      body = await request.json()
      self.bodies.append(body)
      choices = []
      for row, prompt in enumerate(body["prompt"]):
        for n in range(body["n"]):
          ids = [prompt[0], n + 3, STOP]
          choices.append(change({
              "index": row * body["n"] + n, "text": f"{prompt[0]} {n}",
              "token_ids": ids, "finish_reason": "stop", "logprobs": {
                  "token_logprobs": [-0.5, -1.0, -n],
                  "tokens": [f"token_id:{i}" for i in ids]}}))
      return JSONResponse({"id": "c", "model": "m", "choices": choices[::-1]})

    app = Starlette(routes=[
        Route("/v1/models", models),
        Route(COMPLETIONS, completions, methods=["POST"])])
    own = server.bind("127.0.0.1", 0)
    self.url = f"http://127.0.0.1:{own.getsockname()[1]}"
    self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    self._thread = threading.Thread(
        target=self._uvicorn.run, kwargs={"sockets": [own]}, daemon=True)
    self._thread.start()
    wait_for(lambda: self._uvicorn.started)

  def close(self):
    self._uvicorn.should_exit = True
    self._thread.join(20)


@pytest.fixture
def plain():
  made = []

  def make(*args):
    made.append(Plain(*args))
    return made[-1]

  yield make
  for one in made:
    one.close()


def without(*path):
  def change(choice):
    node = choice
    for name in path[:-1]:
      node = node[name]
    del node[path[-1]]
    return choice

  return change


@pytest.mark.parametrize("change", [lambda c: c, without("token_ids")])
def test_a_plain_server_is_read_by_its_token_ids(plain, change):
  one, asked = plain(change), request()
  got = connect(one.url).generate(**asked)
  for r, prompt in enumerate(asked["prompts"]):
    for n in range(10):
      assert got.tokens[r, n, :4].tolist() == [prompt[0], n + 3, STOP, PAD]
      assert got.text[r][n] == f"{prompt[0]} {n}"
      assert got.behaviour_logps[r, n, :4].tolist() == [-0.5, -1, -n, 0]
  np.testing.assert_array_equal(got.behaviour_logps, got.behaviour_raw_logps)
  assert got.policy_version == -1 and got.mask.sum() == 9 * 10 * 3
  for body in one.bodies:
    assert not body.keys() & {"prompt_ids", "require_version"}
    assert body["stop_token_ids"] == [STOP] and body["top_k"] == -1


def test_log_probs_of_an_unknown_law_are_not_claimed(plain):
  got = connect(plain().url).generate(
      **request(sampling=Sampling(temperature=0.7)))
  for logps in (got.behaviour_logps, got.behaviour_raw_logps):
    assert np.isnan(logps[got.mask]).all() and not logps[~got.mask].any()


@pytest.mark.parametrize("change", [
    lambda c: without("logprobs", "tokens")(without("token_ids")(c)),
    without("logprobs", "token_logprobs"),
    lambda c: c | {"finish_reason": "abort"},
    lambda c: c | {"index": 0},
    lambda c: c | {"token_ids": [3]},
])
def test_an_answer_that_lacks_something_is_refused(plain, change):
  with pytest.raises(errors.ServiceError) as e:
    connect(plain(change).url).generate(**request())
  assert e.value.slug == "service.answer" and e.value.want


def test_a_plain_server_takes_no_weights_and_no_version(plain, tmp_path):
  remote = connect(plain().url, spool=tmp_path)
  with pytest.raises(errors.ServiceError) as e:
    remote.update({}, 1)
  assert e.value.slug == "service.update"
  with pytest.raises(errors.ServiceError) as e:
    remote.generate(**request(), require_version=1)
  assert e.value.slug == "service.version"


# Real processes. The last test kills the one that the others use.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return serve_cases.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def process(model, tmp_path_factory):
  one = serve_cases.Process(
      tmp_path_factory.mktemp("serve"), f"--config.model.path={model[0]}",
      **{"serve.max_samples": 2000})
  yield one
  one.kill()


def direct(config, seed, version):
  tok = serve_cases.tokenizer()
  return service.GenerationService(
      config, serve_cases.params_of(config, seed), version,
      max_completion_length=LENGTH, stop_ids=tok.stop_ids, pad_id=PAD,
      tokenizer=tok.hf, vocab_size=tok.vocab_size, num_slots=16)


BAD = [{"n": 0}, {"prompt": []}, {"prompt": [999]}, {"temperature": -1},
       {"max_tokens": 10**9}, {"what": 1}, {"require_version": 5}]


def ask_as_a_client(port, i, kind, body):
  """The ids of each sample; None of a client that leaves or asks badly."""
  if kind == "bad":
    body = body | BAD[i % len(BAD)]
  with contextlib.closing(http.client.HTTPConnection(
      "127.0.0.1", port, timeout=120)) as connection:
    serve_cases.send(connection, COMPLETIONS, body | {
        "stream": kind == "stream"})
    if kind == "leaves":
      return None
    status, got, _ = serve_cases.answer_of(connection)
  if kind == "bad":
    assert status in (409, 422) and got["slug"]
    return None
  assert status == 200
  choices = got["choices"] if kind == "good" else [
      c for e in serve_cases.events_of(got) for c in e["choices"]]
  found = [[] for _ in range(body["n"])]
  for choice in choices:
    found[choice["index"]] += choice["token_ids"]
  return found


@pytest.mark.skipif(
    not pathlib.Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_a_process_listens_to_this_machine_alone(process):
  """All of its sockets, not only the one that is served."""
  assert serve_cases.listening(process.process.pid) == {
      ("127.0.0.1", process.port)}


def test_200_clients_get_what_the_service_gives(model, process):
  rng = random.Random(0)
  kinds, bodies = [], []
  for i in range(200):
    kinds.append(rng.choice(["good", "good", "stream", "leaves", "bad"]))
    bodies.append({
        "prompt": [[rng.randrange(3, 250) for _ in range(rng.randint(1, 30))]],
        "prompt_ids": [[i, 7]], "seed": 5, "n": rng.randint(1, 3),
        "max_tokens": rng.choice([4, 12, LENGTH]), "return_token_ids": True})
  with concurrent.futures.ThreadPoolExecutor(200) as pool:
    got = list(pool.map(
        ask_as_a_client, [process.port] * 200, range(200), kinds, bodies))
  want = direct(model[1], 0, 0).generate(
      [np.array(body["prompt"][0]) for body in bodies],
      prompt_ids=np.array([body["prompt_ids"][0] for body in bodies]),
      num_samples=3, seed=5, sampling=Sampling())
  same = []
  for row, (found, body) in enumerate(zip(got, bodies)):
    for n, ids in enumerate(found or ()):
      whole = want.tokens[row, n][want.mask[row, n]]
      same.append(ids == whole[: body["max_tokens"]].tolist())
  assert len(same) > 100 and np.mean(same) > 0.98  # see check_equal
  wait_for(lambda: not sum(process.metrics()[f"mcpo_samples_{name}"]
                           for name in ("active", "waiting")))
  assert process.metrics()["mcpo_healthy"] == 1


@pytest.mark.nightly
def test_a_killed_server_comes_back_and_the_answer_is_the_same(
    model, process, tmp_path):
  folder, config = model
  remote = connect(
      process.url, config, spool=tmp_path / "spool", patience=240.0)
  remote.update(serve_cases.params_of(config, 1), 7)
  asked = request(40, num_samples=16)
  want = direct(config, 1, 7).generate(**asked)
  before = process.metrics()["mcpo_tokens_total"]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    got = pool.submit(remote.generate, **asked, require_version=7)
    wait_for(lambda: process.metrics()["mcpo_tokens_total"] > before + 50)
    assert process.kill() == -signal.SIGKILL and not got.done()
    # What comes back serves a workdir, and so other weights.
    workdir = serve_cases.trained(tmp_path / "run", folder, 3)
    two = serve_cases.Process(
        tmp_path, f"--workdir={workdir}", f"--config.tokenizer.path={folder}",
        port=process.port)
    check_equal(got.result(), want)
  assert "version 7 after 3" in two.log.read_text()
  assert two.metrics()["mcpo_weight_updates_total"] == 1

  # A trainer that begins anew brings an older version, and any weights.
  anew = connect(two.url, config, spool=tmp_path / "other")
  anew.update(serve_cases.params_of(config, 0), 2)
  asked = request(3, sampling=Sampling(0.8, 40, 0.95, stop=("e",)))
  check_equal(anew.generate(**asked), direct(config, 0, 2).generate(**asked))
  with pytest.raises(errors.ServiceError) as e:
    anew.generate(**asked, require_version=7)
  assert e.value.slug == "service.version"
  assert len(list((tmp_path / "spool").iterdir())) == 1

  check_weights(two, config, tmp_path)
  check_end(two)
  for text in ("QUOKKA", TOKEN):
    assert text not in two.log.read_text()


def check_weights(process, config, tmp_path):
  """What is not whole is refused, and the weights before go on."""
  serving = process.ask("/v1/models")[1]["data"][0]
  params = serve_cases.params_of(config, 3)
  hf.save_params(tmp_path / "new", params, config)
  sha = hf.params_sha256(params)
  file = tmp_path / "new" / "model.safetensors"
  whole = file.read_bytes()

  def slug(**changes):
    return process.ask("/v1/weights", {
        "path": str(tmp_path / "new"), "version": 9, "sha256": sha} | changes)[
            1]["slug"]

  assert slug(sha256="0" * 64) == "weights.hash"
  assert slug(path=str(tmp_path / "none")) == "hf.shard_missing"
  file.write_bytes(whole[:-5])
  assert slug() == "hf.safetensors"
  serve_cases.edit_weights(file, whole, lambda tensors: tensors.popitem())
  assert slug() == "hf.tensor"
  hf.save_params(tmp_path / "odd", params, dataclasses.replace(
      config, rope_theta=20_000.0))
  assert slug(path=str(tmp_path / "odd")) == "weights.config"
  assert process.ask("/v1/models")[1]["data"][0] == serving
  got = process.ask(f"/v1/weights?version=9&sha256={sha}", whole,
                    content_type="application/safetensors")
  assert got[0] == 200 and got[1]["policy_version"] == 9

  # Finite weights whose logits are not: no token, until others come.
  scale = params["final_norm"]["scale"] * 1e38
  remote = connect(process.url, config, spool=tmp_path / "spool")
  remote.update(params | {"final_norm": {"scale": scale}}, 10)
  with pytest.raises(errors.NonFiniteError):
    remote.generate(**request(2))
  assert process.ask("/healthz")[0] == 503
  remote.update(params, 11)
  assert process.ask("/healthz")[0] == 200


def check_end(process):
  """SIGTERM lets what runs end."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    last = pool.submit(
        process.ask, COMPLETIONS, {"prompt": "QUOKKA", "n": 30})
    wait_for(lambda: process.metrics()["mcpo_samples_active"])
    assert process.kill(signal.SIGTERM) == 0
    assert last.result()[0] == 200
