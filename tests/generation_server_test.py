"""The HTTP front: answers, refusals, versions, cancellation, load."""

import concurrent.futures
import contextlib
import functools
import hashlib
import hmac
import http.client
import json
import random
import socket
import threading

import numpy as np
import pytest
import request_cases
import serve_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import LENGTH, POSITIONS, Served, answer_of, send, wait_for

from mcpo_jax.generation import requests, transport, worker
from mcpo_jax.generation.sampling import Sampling

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ADDRESS = {"prompt": [7, 8, 9], "prompt_ids": [[5, 6]], "seed": 11}


@pytest.fixture(scope="module")
def served():
  one = Served()
  yield one
  one.close()


@pytest.fixture
def own():
  """Makes servers of a test's own."""
  made = []

  def make(*args, **changes):
    made.append(Served(*args, **changes))
    return made[-1]

  yield make
  for one in made:
    one.close()


def expected(index, *, version=0, limit=LENGTH):
  return serve_cases.sample_of([5, 6], index, 11, version, limit)


def texts(tokens):
  return serve_cases.tokenizer().decode(tokens)


# Answers.


def test_a_completion_has_ids_both_log_probs_and_the_version(served):
  status, got, _ = served.ask(COMPLETIONS, ADDRESS | {
      "n": 3, "logprobs": 1, "return_token_ids": True})
  assert status == 200
  assert got["object"] == "text_completion" and got["model"] == "policy"
  assert got["policy_version"] == 0 and got["policy_sha256"] == "0" * 64
  total = 0
  for i, choice in enumerate(got["choices"]):
    tokens, logps = expected(i)
    stopped = tokens[-1] == serve_cases.STOP
    assert choice["index"] == i and choice["token_ids"] == tokens.tolist()
    assert choice["prompt_token_ids"] == [7, 8, 9]
    assert choice["finish_reason"] == ("stop" if stopped else "length")
    assert choice["text"] == texts(tokens[:-1] if stopped else tokens)
    told = choice["logprobs"]
    assert np.float32(told["token_logprobs"]).tolist() == logps.tolist()
    assert np.float32(told["raw_logprobs"]).tolist() == (2 * logps).tolist()
    assert len(told["tokens"]) == len(tokens)
    total += len(tokens)
  assert got["usage"] == {"prompt_tokens": 3, "completion_tokens": total,
                          "total_tokens": 3 + total}


def test_prompts_are_texts_or_ids_alone_or_in_lists(served):
  tok = serve_cases.tokenizer()
  ids = tok.hf("the cup")["input_ids"]
  common = {"seed": 3, "max_tokens": 4, "return_token_ids": True}
  one, two, three, four = (
      served.ask(COMPLETIONS, common | {"prompt": prompt})[1]["choices"]
      for prompt in ("the cup", ["the cup", "is"], ids, [ids, [9]]))
  assert one == three and two[:1] == one == four[:1]
  assert [c["index"] for c in two] == [0, 1] and len(four) == 2
  assert one[0]["prompt_token_ids"] == ids
  same = served.ask(COMPLETIONS, common | {"prompt": [[9], [9]]})[1]["choices"]
  assert same[0]["token_ids"] != same[1]["token_ids"]


def test_sample_indices_pick_samples(served):
  _, got, _ = served.ask(COMPLETIONS, ADDRESS | {
      "sample_indices": [4, 1], "return_token_ids": True})
  assert [c["token_ids"] for c in got["choices"]] == [
      expected(i)[0].tolist() for i in (4, 1)]


def test_a_chat_goes_through_the_template(served):
  messages = [{"role": "user", "content": "the cup"}]
  status, got, _ = served.ask(CHAT, {
      "messages": messages, "seed": 1, "n": 2, "logprobs": True,
      "max_completion_tokens": 5, "return_token_ids": True})
  assert status == 200 and got["object"] == "chat.completion"
  ids = serve_cases.tokenizer().encode_prompt(messages).tolist()
  for choice in got["choices"]:
    assert choice["prompt_token_ids"] == ids
    assert choice["message"]["role"] == "assistant"
    content = choice["logprobs"]["content"]
    assert len(content) == len(choice["token_ids"]) <= 5
    assert all(c["raw_logprob"] == 2 * c["logprob"] for c in content)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_holds_what_the_whole_answer_holds(served, path):
  body = {"seed": 5, "n": 3, "prompt_ids": [[1, 2]], "return_token_ids": True}
  body |= {"prompt": "a cup"} if path == COMPLETIONS else {
      "messages": [{"role": "user", "content": "a cup"}]}
  whole = served.ask(path, body)[1]
  status, text, headers = served.ask(path, body | {
      "stream": True, "stream_options": {"include_usage": True}})
  assert status == 200
  assert headers["content-type"].startswith("text/event-stream")
  *events, last = serve_cases.events_of(text)
  assert last["usage"] == whole["usage"] and not last["choices"]
  assert len(events) > 5
  for choice in whole["choices"]:
    parts = [c for e in events for c in e["choices"]
             if c["index"] == choice["index"]]
    assert sum((p["token_ids"] for p in parts), []) == choice["token_ids"]
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert [p["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 1)
    if path == COMPLETIONS:
      assert "".join(p["text"] for p in parts) == choice["text"]
    else:
      assert parts[0]["delta"]["role"] == "assistant"
      said = "".join(p["delta"]["content"] for p in parts)
      assert said == choice["message"]["content"]


def test_a_stop_string_ends_a_sample_and_frees_its_slot(served):
  index = next(i for i in range(50) if len(expected(i)[0]) == LENGTH)
  tokens, logps = expected(index)
  whole = texts(tokens)
  stop = whole[5:7]
  count = whole.index(stop) + 2
  before = len(served.engine.cancelled)
  _, got, _ = served.ask(COMPLETIONS, ADDRESS | {
      "sample_indices": [index], "stop": ["never", stop], "logprobs": 0,
      "return_token_ids": True})
  [choice] = got["choices"]
  assert choice["token_ids"] == tokens[:count].tolist()
  assert choice["text"] == whole[: whole.index(stop)]
  assert choice["finish_reason"] == "stop"
  assert len(choice["logprobs"]["token_logprobs"]) == count
  assert len(served.engine.cancelled) == before + 1


def test_g7_temperature_0_is_taken_and_g14_a_length_ends_a_sample(own):
  served, taken = own(), []
  submit = served.engine.submit
  served.engine.submit = lambda request: (taken.append(request),
                                          submit(request))
  got = served.ask(COMPLETIONS, ADDRESS | {"temperature": 0, "max_tokens": 1})
  assert got[1]["choices"][0]["finish_reason"] == "length"
  assert taken[0].sampling == Sampling(temperature=0, max_new_tokens=1)


def test_models_and_health_and_metrics_say_what_they_may(served):
  _, got, _ = served.ask("/v1/models")
  [model] = got["data"]
  assert model["id"] == "policy" and model["owned_by"] == "mcpo_jax"
  assert model["max_model_len"] == POSITIONS and model["policy_version"] == 0
  status, got, _ = served.ask("/healthz", authorization=None)
  assert (status, got) == (200, {"status": "ok"})
  metrics = served.metrics()
  assert metrics["mcpo_tokens_total"] > 0 and metrics["mcpo_healthy"] == 1


# Refusals: table G.

G = [
    ("G3", {"temprature": 1}, "unknown_field", "temprature"),
    ("G3", {"best_of": 2}, "unknown_field", "best_of"),
    ("G4", {"prompt": []}, "prompt", "prompt"),
    ("G4", {"prompt": ""}, "prompt", "prompt"),
    ("G4", {"prompt": [[]]}, "prompt", "prompt"),
    ("G4", {"prompt": ["a", ""]}, "prompt", "prompt"),
    ("G4", {"prompt": None}, "prompt", "prompt"),
    ("G4", {"prompt": 3}, "prompt", "prompt"),
    ("G4", {"prompt": {"a": 1}}, "prompt", "prompt"),
    ("G4", {"prompt": [7, "a"]}, "prompt", "prompt"),
    ("G4", {"prompt": [[7], 8]}, "prompt", "prompt"),
    ("G4", {"prompt": [7.0]}, "prompt", "prompt"),
    ("G4", {"prompt": [True]}, "prompt", "prompt"),
    ("G4", {"prompt": "\ud800"}, "prompt", "prompt"),
    ("G5", {"prompt": [7] * POSITIONS}, "max_tokens", "max_tokens"),
    ("G5", {"prompt": [7] * 60, "max_tokens": 5}, "max_tokens", "max_tokens"),
    ("G6", {"max_tokens": 0}, "max_tokens", "max_tokens"),
    ("G6", {"max_tokens": -1}, "max_tokens", "max_tokens"),
    ("G6", {"max_tokens": LENGTH + 1}, "max_tokens", "max_tokens"),
    ("G6", {"max_tokens": 10**9}, "max_tokens", "max_tokens"),
    ("G6", {"max_tokens": 2.5}, "max_tokens", "max_tokens"),
    ("G6", {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens"),
    ("G6", {"n": 0}, "n", "n"), ("G6", {"n": 10**6}, "n", "n"),
    ("G6", {"n": 10**30}, "n", "n"), ("G6", {"n": True}, "n", "n"),
    ("G6", {"n": "2"}, "n", "n"),
    ("G6", {"temperature": -1}, "temperature", "temperature"),
    ("G6", {"temperature": 1e-30}, "temperature", "temperature"),
    ("G6", {"temperature": 1e400}, "json", "body"),
    ("G6", {"temperature": float("nan")}, "json", "body"),
    ("G6", {"temperature": "1"}, "temperature", "temperature"),
    ("G6", {"temperature": 101}, "temperature", "temperature"),
    ("G6", {"top_p": 0}, "top_p", "top_p"),
    ("G6", {"top_p": 1.1}, "top_p", "top_p"),
    ("G6", {"top_k": -5}, "top_k", "top_k"),
    ("G6", {"min_p": 2}, "min_p", "min_p"),
    ("G6", {"repetition_penalty": 0}, "repetition_penalty",
     "repetition_penalty"),
    ("G6", {"seed": 1.5}, "seed", "seed"), ("G6", {"seed": -1}, "seed", "seed"),
    ("G6", {"seed": 2**32}, "seed", "seed"),
    ("G8", {"prompt": [300]}, "prompt", "prompt"),
    ("G8", {"prompt": [-1]}, "prompt", "prompt"),
    ("G8", {"prompt": [10**40]}, "prompt", "prompt"),
    ("G8", {"prompt": [299]}, "prompt", ""),
    ("G8", {"stop_token_ids": [300]}, "stop_token_ids", "stop_token_ids"),
    ("G8", {"stop_token_ids": list(range(99))}, "stop_token_ids",
     "stop_token_ids"),
    ("G8", {"stop": [""]}, "stop", "stop"),
    ("G8", {"stop": ""}, "stop", "stop"),
    ("G8", {"stop": ["a"] * 99}, "stop", "stop"),
    ("G8", {"stop": "a" * 999}, "stop", "stop"),
    ("G9", {"require_version": 7}, "version", "require_version"),
    ("address", {"prompt_ids": [[1, 2], [3, 4]]}, "prompt_ids", "prompt_ids"),
    ("address", {"prompt_ids": [[1, 2**32]]}, "prompt_ids", "prompt_ids"),
    ("address", {"prompt_ids": [[1]]}, "prompt_ids", "prompt_ids"),
    ("address", {"sample_indices": [1, 1]}, "sample_indices",
     "sample_indices"),
    ("address", {"sample_indices": [1, 2], "n": 3}, "sample_indices",
     "sample_indices"),
    ("address", {"sample_indices": [-1]}, "sample_indices", "sample_indices"),
    ("other", {"model": "gpt"}, "model", "model"),
    ("other", {"logprobs": 5}, "logprobs", "logprobs"),
    ("other", {"stream": "yes"}, "stream", "stream"),
    ("other", {"stream_options": {"a": 1}}, "stream_options",
     "stream_options"),
]


@pytest.mark.parametrize("row", G, ids=lambda row: f"{row[0]} {row[1]}"[:40])
def test_a_bad_request_is_refused_by_its_field(served, row):
  name, change, slug, field = row
  status, got, _ = served.ask(COMPLETIONS, {"prompt": [7, 8]} | change)
  kind = "service" if name == "G9" else "request"
  assert (got["slug"], got["field"]) == (f"{kind}.{slug}", field)
  assert got["message"]
  assert status == {"json": 400, "version": 409}.get(slug, 422)
  if name == "G9":
    assert (got["got"], got["want"]) == (0, 7)
  if name == "G5":
    assert str(POSITIONS) in got["want"]


@pytest.mark.parametrize("messages", [
    None, [], "a", ["a"], [{"role": "owl", "content": "QUOKKA"}],
    [{"role": "user", "content": 3}], [{"role": "user", "content": " "}],
    [{"role": "assistant", "content": "QUOKKA"}],
    [{"role": "user", "content": "QUOKKA"}] * 2,
    [{"role": "user", "content": "QUOKKA \ud800"}],
    [{"role": "user", "content": "QUOKKA \ufdd0"}],
])
def test_bad_messages_are_refused_and_not_repeated(served, messages):
  status, got, _ = served.ask(CHAT, {"messages": messages})
  assert status == 422 and got["slug"] == "request.messages"
  assert "QUOKKA" not in json.dumps(got)


# See `request_cases`: a randomness that hypothesis can shrink.
rngs = functools.partial(st.randoms, use_true_random=False)


@settings(max_examples=200, deadline=None)
@given(rng=rngs(), path=st.sampled_from([COMPLETIONS, CHAT, "/v1/weights"]))
def test_whatever_is_asked_is_understood_or_refused(rng, path):
  request_cases.check_body(request_cases.body(rng, path), path)


@settings(max_examples=200, deadline=None)
@given(rng=rngs())
def test_whatever_is_sent_is_answered_or_refused(fuzzed, rng):
  """500 would be a fault of the server."""
  sent = request_cases.message(rng)
  status = request_cases.status_of(fuzzed.port, sent)
  assert status in (None, 200) or 400 <= status < 500, sent


@pytest.fixture(scope="module")
def fuzzed():
  one = Served()
  yield one
  assert one.ask(COMPLETIONS, ADDRESS)[0] == 200
  wait_for(lambda: not one.worker._taken)
  one.close()


@pytest.mark.parametrize("body, headers, status, slug", [
    ("{", {}, 400, "request.json"),
    ("[" * 100_000, {}, 413, "request.size"),
    ("[" * 15_000, {}, 400, "request.json"),
    ("[1]", {}, 400, "request.object"),
    ('{"n": ' + "9" * 5000 + "}", {}, 400, "request.json"),
    (b'{"prompt": "\xff"}', {}, 400, "request.json"),
    ('{"n": 1, "n": 2, "prompt": "a"}', {}, 400, "request.json"),
    ("a: 1", {"content_type": "application/yaml"}, 415, "request.media_type"),
    (b"\x80\x04.", {"content_type": "application/octet-stream"}, 415,
     "request.media_type"),
    ("{}", {"content_type": None}, 415, "request.media_type"),
    (" " * 20_001 + "{}", {}, 413, "request.size"),
    (iter([b" " * 9_000] * 3), {}, 413, "request.size"),
])
def test_g2_g17_a_bad_body_is_refused(served, body, headers, status, slug):
  for path in (COMPLETIONS, "/v1/weights"):
    if isinstance(body, str | bytes) or path == COMPLETIONS:
      got = served.ask(path, body, "POST", **{
          "content_type": "application/json"} | headers)
      assert (got[0], got[1]["slug"]) == (status, slug)


def test_g2_a_slow_body_is_refused(own):
  served = own(body_seconds=0.2)
  with socket.create_connection(("127.0.0.1", served.port)) as one:
    one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: "
                b"application/json\r\ncontent-length: 9\r\nauthorization: "
                b"Bearer " + serve_cases.TOKEN.encode() + b"\r\n\r\n{")
    assert one.recv(99).startswith(b"HTTP/1.1 408 ")


# The token, on every route and on every trick.


def raw_status(served, line, token=None):
  with socket.create_connection(("127.0.0.1", served.port)) as one:
    head = f"{line} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    if token is not None:
      head += f"authorization: {token}\r\n"
    one.sendall(head.encode("latin-1") + b"\r\n")
    return int(one.recv(99).split()[1])


def test_g1_g16_every_route_but_health_needs_the_token(served):
  routes = [(route.path, method) for route in served.app.routes
            for method in route.methods]
  assert len(routes) > 6
  for path, method in routes:
    variants = [f"{method} {path}", f"OPTIONS {path}", f"{method} /{path}",
                f"{method} {path}/", f"{method} {path.replace('e', '%65')}",
                f"{method} {path}?a=b", f"{method} {path.upper()}",
                f"{method} /./{path}", f"TRACE {path}"]
    for line in variants:
      open_ = line in ("GET /healthz", "GET /healthz?a=b")
      assert raw_status(served, line) == (200 if open_ else 401), line
  for line in ("GET /", "GET /docs", "GET /v1", "OPTIONS *", "GET //healthz"):
    assert raw_status(served, line) == 401, line


@pytest.mark.parametrize("token", [
    "", "Bearer", "Bearer ", "Bearer wrong", serve_cases.TOKEN,
    f"Bearer {serve_cases.TOKEN}x", f"Bearer {serve_cases.TOKEN[:-1]}",
    f"Basic {serve_cases.TOKEN}", "Bearer \xff\xfe"])
def test_g1_a_wrong_token_gets_no_hint(served, token):
  assert raw_status(served, "GET /v1/models", token) == 401
  status, got, headers = served.ask("/v1/models", authorization="Bearer x")
  missing = served.ask("/v1/models", authorization=None)
  assert status == 401 and got == missing[1]
  assert headers["www-authenticate"] == "Bearer"


def test_g1_the_token_is_compared_in_constant_time(served, monkeypatch):
  """By one call for a right, a wrong, a short and no token alike."""
  compared, real = [], hmac.compare_digest
  monkeypatch.setattr(transport.hmac, "compare_digest", lambda a, b: (
      compared.append(len(a)), real(a, b))[1])
  for token, status in ((f"Bearer {serve_cases.TOKEN}", 200), ("Bearer x", 401),
                        ("B", 401), (None, 401)):
    assert served.ask("/v1/models", authorization=token)[0] == status
  assert compared == [len("Bearer ") + len(serve_cases.TOKEN), 8, 1, 0]


def test_health_says_nothing_of_the_model_or_of_paths(served):
  assert served.ask("/healthz", authorization=None)[1] == {"status": "ok"}


def test_unknown_paths_and_methods_are_refused_with_a_slug(served):
  status, got, _ = served.ask("/v1/nothing")
  assert (status, got["slug"]) == (404, "request.route")
  status, got, _ = served.ask(COMPLETIONS, method="GET")
  assert status == 405 and got["slug"] == "request.method"
  assert served.ask(COMPLETIONS + "/", ADDRESS)[0] == 404


# Cancellation, the queue, failures.


def test_g11_a_client_that_leaves_frees_its_slots(own):
  served = own()
  for stream in (False, True):
    served.engine.go.clear()
    before = served.metrics()["mcpo_samples_cancelled_total"]
    with contextlib.closing(http.client.HTTPConnection(
        "127.0.0.1", served.port)) as one:
      send(one, COMPLETIONS, ADDRESS | {"n": 6, "stream": stream})
      wait_for(lambda: served.engine.waiting)
    wait_for(lambda: not served.worker._inbox.empty())
    served.engine.go.set()  # the step that runs ends, and no other begins
    wait_for(lambda: served.engine.idle)
    wait_for(lambda b=before: served.metrics()[
        "mcpo_samples_cancelled_total"] > b)
  metrics = served.metrics()
  assert metrics["mcpo_samples_active"] == 0 == metrics["mcpo_samples_waiting"]
  assert not served.worker._jobs and not served.worker._taken


def test_g12_a_full_queue_says_come_back(own):
  served = own(max_samples=6)
  served.engine.go.clear()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(served.ask, COMPLETIONS, ADDRESS | {"n": 5})
    wait_for(lambda: served.worker._taken == 5)
    status, got, headers = served.ask(COMPLETIONS, ADDRESS | {"n": 2})
    assert (status, got["slug"]) == (503, "service.full")
    assert headers["retry-after"] == "1"
    one = pool.submit(served.ask, COMPLETIONS, ADDRESS)
    wait_for(lambda: served.worker._taken == 6)
    served.engine.go.set()
    assert first.result()[0] == one.result()[0] == 200
  assert served.ask(COMPLETIONS, ADDRESS | {"n": 7})[1]["slug"] == "request.n"


def test_g13_a_model_that_fails_gives_no_token_until_it_is_replaced(
    own, tmp_path):
  served = own()
  served.engine.broken = True
  for stream in (False, True):
    status, got, _ = served.ask(COMPLETIONS, ADDRESS | {"stream": stream})
    assert (status, got["slug"]) == (500, "generation.non_finite")
  assert served.ask("/healthz")[:2] == (503, {"status": "unhealthy"})
  assert served.engine.idle and not served.worker._taken
  served.engine.broken = False
  assert served.ask(COMPLETIONS, ADDRESS)[0] == 500
  assert served.ask("/v1/weights", weights(tmp_path, 1))[0] == 200
  assert served.ask("/healthz")[0] == 200
  assert served.ask(COMPLETIONS, ADDRESS)[0] == 200


def test_a_stream_that_fails_midway_says_so(own):
  served = own()
  step, done = served.engine.step, []

  def breaking(max_tokens):
    done.append(max_tokens)
    served.engine.broken = len(done) > 2
    return step(max_tokens)

  served.engine.step = breaking
  status, text, _ = served.ask(COMPLETIONS, ADDRESS | {"stream": True, "n": 9})
  *pieces, last = text.strip().split("\n\n")
  assert status == 200 and len(pieces) >= 2
  error = json.loads(last.removeprefix("data: "))["error"]
  assert error["slug"] == "generation.non_finite"


def test_a_failing_engine_is_told_to_all_and_the_server_stays(own):
  served = own()
  served.engine.step = lambda n: 1 / 0
  status, got, _ = served.ask(COMPLETIONS, ADDRESS)
  assert (status, got["slug"]) == (500, "service.failed")
  assert served.ask("/healthz")[0] == 503


# Idempotency.


def test_g15_a_key_gives_one_generation_and_the_same_answer(own):
  served = own()
  served.engine.go.clear()
  body = {"prompt": "the cup", "n": 2}  # no seed: two would differ
  with concurrent.futures.ThreadPoolExecutor() as pool:
    asked = [pool.submit(served.ask, COMPLETIONS, body, idempotency_key="k")
             for _ in range(3)]
    wait_for(lambda: any(e.waiters == 3 for e in (
        served.front._once._entries.values())))
    served.engine.go.set()
    answers = [a.result()[1] for a in asked]
  answers.append(served.ask(COMPLETIONS, body, idempotency_key="k")[1])
  assert all(a == answers[0] for a in answers)
  metrics = served.metrics()
  assert sum(metrics[f'mcpo_samples_finished_total{{reason="{r}"}}']
             for r in ("stop", "length")) == 2
  status, got, _ = served.ask(
      COMPLETIONS, body | {"n": 1}, idempotency_key="k")
  assert (status, got["slug"]) == (422, "request.idempotency_key")
  status, got, _ = served.ask(
      COMPLETIONS, body | {"stream": True}, idempotency_key="k")
  assert (status, got["slug"]) == (422, "request.stream")


def test_g15_errors_are_not_kept_and_memory_is_bounded(own, monkeypatch):
  served = own()
  served.engine.broken = True
  assert served.ask(COMPLETIONS, ADDRESS, idempotency_key="a")[0] == 500
  entries = served.front._once._entries
  assert not entries
  served.engine.broken, served.worker.failure = False, None
  monkeypatch.setattr(transport, "_KEPT_ANSWERS", 3)
  for i in range(9):
    assert served.ask(COMPLETIONS, ADDRESS, idempotency_key=str(i))[0] == 200
  assert list(entries) == ["6", "7", "8"]
  monkeypatch.setattr(transport, "_KEPT_BYTES", 10)
  served.ask(COMPLETIONS, ADDRESS, idempotency_key="x")
  assert not entries


# Weights.


def weights(folder, version, text=None, **more):
  """A body that names a folder with weights of this text."""
  text = text or f"weights {version}"
  (folder / "model.safetensors").write_text(text)
  return {"path": str(folder), "version": version,
          "sha256": hashlib.sha256(text.encode()).hexdigest()} | more


def test_g10_weights_are_replaced_whole_or_not_at_all(own, tmp_path):
  served = own()
  good = weights(tmp_path, 3)
  status, got, _ = served.ask("/v1/weights", good)
  assert (status, got["policy_version"]) == (200, 3)
  assert served.engine.models == (("weights 3", 1.0),)
  for body, status, slug in (
      (weights(tmp_path, 2), 409, "weights.version"),
      (weights(tmp_path, 3, "other"), 409, "weights.version"),
      (weights(tmp_path, 2, replaces=1), 409, "weights.version"),
      (weights(tmp_path, 4) | {"sha256": "0" * 64}, 422, "weights.hash"),
      (weights(tmp_path, 4) | {"sha256": None}, 422, "request.sha256"),
      (weights(tmp_path, 4) | {"version": "4"}, 422, "request.version"),
      (weights(tmp_path, 4, dtype="f4"), 422, "request.unknown_field"),
      (weights(tmp_path, 4) | {"path": "/a\0"}, 422, "request.path"),
      (weights(tmp_path, 4) | {"path": "\ud800"}, 422, "request.path"),
      (weights(tmp_path, 4) | {"path": "/" + "x" * 999}, 422, "request.path"),
  ):
    got = served.ask("/v1/weights", body)
    assert (got[0], got[1]["slug"]) == (status, slug)
  assert served.engine.version == 3 and served.worker.sha256 == good["sha256"]
  assert served.ask("/v1/weights", good)[0] == 200  # the same ones again
  assert served.metrics()["mcpo_weight_updates_total"] == 1
  for version in (2, 4):  # G9: an older one, a newer one
    status, got, _ = served.ask(
        COMPLETIONS, ADDRESS | {"require_version": version})
    assert (status, got["slug"]) == (409, "service.version")
    assert (got["got"], got["want"]) == (3, version)
  assert served.ask(COMPLETIONS, ADDRESS | {"require_version": 3})[0] == 200
  older = weights(tmp_path, 1, replaces=3)
  assert served.ask("/v1/weights", older)[0] == 200
  assert served.ask("/v1/models")[1]["data"][0]["policy_version"] == 1


def test_g10_weights_may_come_as_a_file(own):
  served = own()
  digest = hashlib.sha256(b"bytes").hexdigest()
  place = f"/v1/weights?version=2&sha256={digest}"
  kind = {"content_type": "application/safetensors"}
  assert served.ask(place, b"bytes", **kind)[0] == 200
  assert served.engine.models == (("bytes", 1.0),)
  got = served.ask(place, b"bytes", content_type="application/octet-stream")
  assert got[0] == 415
  got = served.ask("/v1/weights?version=3", b"bytes", **kind)
  assert got[1]["slug"] == "request.sha256"
  got = served.ask(place.replace("=2", "=4"), b" " * 50_001, **kind)
  assert got[0] == 413 and served.engine.version == 2


def test_f13_half_a_file_of_a_trainer_that_died_blocks_nobody(own, tmp_path):
  served = own()
  with socket.create_connection(("127.0.0.1", served.port)) as one:
    one.sendall(b"POST /v1/weights?version=2&sha256=" + b"0" * 64
                + b" HTTP/1.1\r\nhost: a\r\ncontent-length: 40000\r\n"
                b"content-type: application/safetensors\r\n"
                b"authorization: Bearer " + serve_cases.TOKEN.encode()
                + b"\r\n\r\n" + b" " * 20_000)
    wait_for(lambda: served.front._updating)
    busy = served.ask("/v1/weights", weights(tmp_path, 1))
    assert (busy[0], busy[1]["slug"]) == (409, "weights.busy")
  wait_for(lambda: not served.front._updating)
  assert served.ask("/v1/weights", weights(tmp_path, 1))[0] == 200
  assert served.engine.version == 1


def test_weights_wait_for_what_runs_and_come_before_what_waits(own, tmp_path):
  served = own()
  served.engine.go.clear()
  body = ADDRESS | {"n": 6, "return_token_ids": True}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(served.ask, COMPLETIONS, body)
    wait_for(lambda: served.engine.waiting)
    update = pool.submit(served.ask, "/v1/weights", weights(tmp_path, 1))
    wait_for(lambda: not served.worker._inbox.empty())
    busy = served.ask("/v1/weights", weights(tmp_path, 2))
    assert (busy[0], busy[1]["slug"]) == (409, "weights.busy")
    old = pool.submit(served.ask, COMPLETIONS, body | {"require_version": 0})
    second = pool.submit(served.ask, COMPLETIONS, body)
    wait_for(lambda: served.worker._taken == 18)
    served.engine.go.set()
    answers = first.result()[1], second.result()[1]
    assert update.result()[0] == 200 and old.result()[0] == 409
  for version, answer in enumerate(answers):
    assert answer.get("policy_version") == version, answer
    assert [c["token_ids"] for c in answer["choices"]] == [
        expected(i, version=version)[0].tolist() for i in range(6)]


# Load.


def test_200_clients_at_once_leave_no_slot_behind(own):
  served = own(serve_cases.FakeEngine(num_slots=16), max_samples=10_000)
  rng = random.Random(0)

  def one(i):
    rows = rng.randint(1, 3)
    ids = [[i, r] for r in range(rows)]
    body = {"prompt": [[7, 3 + r] for r in range(rows)], "prompt_ids": ids,
            "seed": i, "n": rng.randint(1, 4), "return_token_ids": True,
            "max_tokens": rng.randint(1, LENGTH)}
    kind = rng.choice(["good", "good", "stream", "leaves", "bad"])
    with contextlib.closing(http.client.HTTPConnection(
        "127.0.0.1", served.port, timeout=60)) as connection:
      if kind == "leaves":
        send(connection, COMPLETIONS, body | {"stream": rng.random() < 0.5})
        return kind
      if kind == "bad":
        send(connection, COMPLETIONS, {"prompt": [7]} | rng.choice(G)[1])
        status, got, _ = answer_of(connection)
        assert status in (400, 409, 422) and got["slug"]
        return kind
      send(connection, COMPLETIONS, body | {"stream": kind == "stream"})
      status, got, _ = answer_of(connection)
      assert status == 200
      choices = got["choices"] if kind == "good" else [
          c for e in serve_cases.events_of(got) for c in e["choices"]]
      found = {}
      for c in choices:
        found.setdefault(c["index"], []).extend(c["token_ids"])
      wanted = [serve_cases.sample_of(x, k, i, 0, body["max_tokens"])[0]
                for x in ids for k in range(body["n"])]
      assert found == {j: t.tolist() for j, t in enumerate(wanted)}
      return kind

  with concurrent.futures.ThreadPoolExecutor(200) as pool:
    kinds = list(pool.map(one, range(200)))
  assert {kinds.count(k) > 10 for k in set(kinds)} == {True}
  wait_for(lambda: not served.worker._taken)
  wait_for(lambda: served.engine.idle and not served.worker._jobs)
  metrics = served.metrics()
  assert metrics["mcpo_samples_active"] == 0 == metrics["mcpo_samples_waiting"]
  assert not served.front._once._entries


def test_a_worker_that_closes_tells_everyone(own):
  engine = serve_cases.FakeEngine()
  one = worker.Worker(engine, serve_cases.tokenizer().hf,
                      0, "", max_samples=9, tokens_per_step=2, num_slots=4)
  told = []
  ask = requests.parse({"prompt": [7], "n": 8}, serve_cases.tokenizer(),
                       requests.Limits(9, 4, 300, 9, Sampling(), "m"),
                       chat=False)
  one.start()
  engine.go.clear()
  one.submit(ask, told.append)
  wait_for(lambda: engine.waiting)
  threading.Timer(0.1, engine.go.set).start()
  one.close()
  assert told[-1].slug == "service.stopping" and not one._taken
