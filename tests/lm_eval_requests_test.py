"""lm_eval's local-completions against the server: its requests, its reading.

The bodies are those that lm_eval 0.4 sends for log-likelihoods and for texts,
and the answers are read as it reads them (the slice from the end of the
context to the token before the last), with a real model behind the server.
"""

import jax
import models_streams
import numpy as np
import pytest
import serve_cases
from serve_cases import LENGTH, POSITIONS, Served

from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.models import decoder
from mcpo_jax.models.config import ModelConfig

COMPLETIONS = "/v1/completions"
CONFIG = ModelConfig(
    family="llama", vocab_size=300, hidden_size=16, intermediate_size=24,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    max_positions=POSITIONS, initializer_range=0.5, bos_token_id=0,
    eos_token_ids=(1,), pad_token_id=2)


class Engine(engine_lib.Engine):
  """A real one, with what `Served` wants of its own."""

  num_slots = 4

  def __init__(self):
    super().__init__(
        CONFIG, ((serve_cases.params_of(CONFIG, 0), 1.0),), 0,
        max_new_tokens=LENGTH, stop_ids=(1,), vocab_size=300, num_slots=4)
    self.go = serve_cases.threading.Event()


@pytest.fixture(scope="module")
def served():
  one = Served(Engine())
  yield one
  one.close()


@jax.jit
def forward(params, streams):
  hidden = decoder.hidden_states(params, CONFIG, streams)
  return decoder.head_logits(params, CONFIG, hidden)[0]


def laws(tokens):
  """[P, V] log-softmax after each token, of the stacked weights."""
  streams = models_streams.pack([(tokens[:1], [tokens[1:]])], POSITIONS)
  logits = np.asarray(forward(serve_cases.params_of(CONFIG, 0), streams))
  logits = logits[:len(tokens)].astype(np.float64)
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def loglikelihood_body(prompts):
  return {"model": "policy", "prompt": prompts, "temperature": 0,
          "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def parse_logprobs(answer, context_lengths):
  """(log-likelihood, is_greedy) of each continuation, as lm_eval has it."""
  out = []
  choices = sorted(answer["choices"], key=lambda c: c["index"])
  for choice, start in zip(choices, context_lengths, strict=True):
    told = choice["logprobs"]["token_logprobs"][start:-1]
    best = choice["logprobs"]["top_logprobs"][start:-1]
    out.append((sum(told), all(
        own == max(top.values()) for own, top in zip(told, best))))
  return out


def test_loglikelihoods_are_those_of_the_model(served):
  rng = np.random.default_rng(0)
  # One fills most of the context; both are padded differently.
  rows = [rng.integers(3, 300, n) for n in (7, POSITIONS - 1)]
  greedy = rows[0][:3].tolist()
  for _ in range(4):
    greedy.append(int(laws(np.array(greedy))[-1].argmax()))
  rows, starts = [*rows, np.array(greedy)], [4, 30, 3]
  status, answer, _ = served.ask(COMPLETIONS, loglikelihood_body(
      [row.tolist() for row in rows]))
  assert status == 200, answer
  got = parse_logprobs(answer, starts)
  for row, start, (logp, is_greedy) in zip(rows, starts, got):
    law = laws(row)[start - 1:-1]
    own = law[np.arange(len(law)), row[start:]]
    assert logp == pytest.approx(own.sum(), abs=1e-4)
    assert is_greedy == (law.argmax(1) == row[start:]).all()
  assert [g for _, g in got] == [False, False, True]


def test_the_prompt_is_told_token_by_token(served):
  text = "the cup is"
  ids = serve_cases.tokenizer().hf.backend_tokenizer.encode(text).ids
  _, answer, _ = served.ask(COMPLETIONS, loglikelihood_body([text]))
  [choice] = answer["choices"]
  assert choice["text"].startswith(text)
  told = choice["logprobs"]
  assert "".join(told["tokens"]) == choice["text"]
  assert {len(told[name]) for name in (
      "tokens", "token_logprobs", "raw_logprobs", "top_logprobs")} == {
          len(ids) + 1}
  assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
  best = laws(np.array(ids))[:-1].max(axis=1)
  np.testing.assert_allclose(
      [max(top.values()) for top in told["top_logprobs"][1:-1]], best,
      atol=1e-5)


def test_texts_are_generated_until_a_stop(served):
  body = {"prompt": [[5, 6, 7], [9, 8, 7, 6]], "model": "policy",
          "max_tokens": LENGTH, "temperature": 0, "stop": ["\n\n"],
          "seed": 1234}
  status, answer, _ = served.ask(COMPLETIONS, body)
  assert status == 200
  assert [c["index"] for c in answer["choices"]] == [0, 1]
  assert all(isinstance(c["text"], str) for c in answer["choices"])
  # Without log-probs an echo is text alone.
  _, echoed, _ = served.ask(COMPLETIONS, body | {"echo": True})
  for one, other, ids in zip(
      echoed["choices"], answer["choices"], body["prompt"]):
    assert one["logprobs"] is None
    assert one["text"] == serve_cases.tokenizer().hf.decode(ids) + other["text"]


@pytest.mark.parametrize("change, field", [
    ({"stream": True}, "echo"), ({"echo": 1}, "echo"),
    ({"prompt": [[5] * POSITIONS]}, "max_tokens")])
def test_what_cannot_be_told_is_refused(served, change, field):
  status, answer, _ = served.ask(
      COMPLETIONS, loglikelihood_body([[5, 6]]) | change)
  assert status == 422 and answer["field"] == field


def test_a_model_without_numbers_answers_with_an_error(served):
  broken = Served(Engine())
  try:
    nan = jax.tree.map(
        lambda x: x * np.nan, serve_cases.params_of(CONFIG, 0))
    broken.engine.update(((nan, 1.0),), 1)
    status, answer, _ = broken.ask(
        COMPLETIONS, loglikelihood_body([[5, 6, 7]]))
    assert status == 500 and answer["slug"] == "generation.non_finite"
    assert broken.metrics()["mcpo_samples_waiting"] == 0
  finally:
    broken.close()


def test_a_prompt_of_one_token_has_nothing_to_score():
  engine = Engine()
  [one, other] = engine.score([np.array([5, 6, 7]), np.array([8])])
  assert one.logps.shape == (2,) and other.logps.shape == (0,)
  assert (one.best_logps >= one.logps).all() and engine.idle
