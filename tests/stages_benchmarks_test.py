"""What a model is asked, turn by turn, with a sampler that repeats it."""

import types

import numpy as np
import pytest

from mcpo_jax import errors
from mcpo_jax.evaluation import benchmarks as formats
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.stages import benchmarks


class Tokenizer:
  """A letter is a token; roles are shown."""

  def encode_prompt(self, messages, *, where):
    text = "".join(f"{m['role'][0]}:{m['content']}|" for m in messages)
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


class Service:
  """Answers with the length of what it is asked."""

  def __init__(self):
    self.asked = []

  def generate(self, prompts, *, prompt_ids, num_samples, sampling, seed):
    assert num_samples == 1 and seed == 3
    texts = [bytes(p.astype(np.uint8)).decode() for p in prompts]
    self.asked += [(text, sampling, tuple(map(int, address)))
                   for text, address in zip(texts, prompt_ids)]
    lengths = np.array([len(t) % 5 + 1 for t in texts])
    return types.SimpleNamespace(
        text=[[f"<{len(t)}>"] for t in texts],
        mask=np.arange(9)[None, None] < lengths[:, None, None],
        finish_reason=[["length" if "long" in t.split("u:")[-1] else "stop"]
                       for t in texts])


def make_model(positions=60):
  return types.SimpleNamespace(
      run=types.SimpleNamespace(tokenizer=Tokenizer()),
      model=types.SimpleNamespace(
          config=types.SimpleNamespace(max_positions=positions)))


def question(key, *turns, category="math"):
  return formats.Question(key, category, turns, {})


BUNDLE = {
    "sampling": Sampling(temperature=0.25)._asdict() | {"stop": ["###"]},
    "temperatures": {"math": 0.0, "writing": 0.75},
    "max_new_tokens": 40, "seed": 3}
for name in ("max_new_tokens", "stop_ids"):
  del BUNDLE["sampling"][name]


def test_later_turns_see_the_answers_before():
  service = Service()
  said = benchmarks.answer_part(service, make_model(), [
      question(1, "one", "two"), question(2, "longer", category="writing"),
      question(3, "x", category="other")], BUNDLE)
  assert [text for text, _, _ in service.asked] == [
      "u:one|", "u:longer|", "u:x|", "u:one|a:<6>|u:two|"]
  assert [a.turns for a in said] == [("<6>", "<18>"), ("<9>",), ("<4>",)]
  assert [a.cut for a in said] == [False, True, False]
  assert [a.num_tokens for a in said] == [18 % 5 + 1, 9 % 5 + 1, 4 % 5 + 1]
  laws = [law for _, law, _ in service.asked]
  assert [law.temperature for law in laws] == [0.0, 0.75, 0.25, 0.0]
  assert {law.stop for law in laws} == {("###",)}
  assert [law.max_new_tokens for law in laws] == [40, 40, 40, 40]
  # An answer ends where the context does: 27 tokens less those before it.
  shorter = Service()
  benchmarks.answer_part(
      shorter, make_model(27), [question(1, "one", "two")], BUNDLE)
  assert [law.max_new_tokens for _, law, _ in shorter.asked] == [21, 9]


def test_an_answer_is_cut_if_one_of_its_turns_is():
  [said] = benchmarks.answer_part(
      Service(), make_model(), [question(1, "longer", "two")], BUNDLE)
  assert said.cut


def test_draws_belong_to_a_question_and_a_turn_wherever_it_stands():
  both, alone = Service(), Service()
  benchmarks.answer_part(
      both, make_model(), [question(1, "a", "b"), question(2, "a")], BUNDLE)
  benchmarks.answer_part(alone, make_model(), [question(2, "a")], BUNDLE)
  addresses = [address for _, _, address in both.asked]
  assert len(set(addresses)) == 3
  assert alone.asked[0][2] in addresses
  assert all(0 <= word < 2**32 for pair in addresses for word in pair)


def test_a_question_that_fills_the_context_is_refused_by_its_key():
  with pytest.raises(errors.DataError) as e:
    benchmarks.answer_part(
        Service(), make_model(6), [question("q-7", "one")], BUNDLE)
  assert e.value.slug == "data.prompt_too_long" and "q-7" in e.value.where


def test_a_change_of_the_code_is_another_hash(tmp_path, monkeypatch):
  monkeypatch.setattr(benchmarks.mcpo_jax, "__file__",
                      str(tmp_path / "__init__.py"))
  hashes = set()
  for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b/c.py", "")):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    hashes.add(benchmarks.code_sha256())
  (tmp_path / "notes.txt").write_text("no code")
  assert len(hashes | {benchmarks.code_sha256()}) == 3
