"""Reward models: against transformers, as a reward, and trained from pairs."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cases

from mcpo_jax import errors, settings
from mcpo_jax.data import packing, readers, records, store
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.models import decoder, hf, reward
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.rewards import model as reward_model
from mcpo_jax.rewards.functions import score
from mcpo_jax.types import CandidateSet

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models_parity_test as parity  # noqa: E402  needs torch

PAD, EOS, VOCAB = 0, 5, parity.SIZES["vocab_size"]
NAMES = ["llama", "llama_biased", "mistral", "qwen2", "qwen3", "gemma2",
         "gemma3"]


def make_reference(name, folder, dtype, **more):
  """A random model of transformers with a head of one label, saved."""
  family, extra = parity.FAMILIES[name]
  sizes = {**parity.SIZES, **extra, "pad_token_id": PAD, "num_labels": 1} | more
  if sizes["head_dim"] is None:
    del sizes["head_dim"]
  torch.manual_seed(3)
  config = getattr(transformers, f"{family}Config")(
      **sizes, attn_implementation="eager")
  model = getattr(transformers, f"{family}ForSequenceClassification")(
      config).to(dtype)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if "norm" in key or "bias" in key:
        parameter.add_(0.3 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  return model.eval()


def make_sets():
  """Two prompts with three completions each, some ending in padding."""
  rng = np.random.default_rng(5)
  draw = lambda size: rng.integers(1, VOCAB, size)
  sets = []
  for b in range(2):
    completions = [draw(n) for n in (14, 1, 9)]
    completions[2][-2:] = EOS, PAD
    sets.append(CandidateSet(
        np.zeros(2, np.uint32), f"{b}", draw(11 + 9 * b), completions, [],
        np.arange(3, dtype=np.uint32), np.ones(3, np.int32),
        np.full(3, np.nan, np.float32), -1))
  return sets


def our_scores(params, config, sets, dtype):
  """[B, K] scores; all streams of one shape."""
  sets = [reward.mark_last(one, pad_id=PAD, end_id=EOS, tail=[])
          for one in sets]
  slots = [[0, 1, 2]] * len(sets)
  chunks = packing.pack_streams(
      sets, slots, slots, num_streams=2, stream_length=64, pad_id=7)
  out = np.full((len(sets), 3), np.nan)
  score = jax.jit(functools.partial(
      reward.token_scores, config=config, compute_dtype=dtype))
  for chunk in chunks:
    at = chunk.completion_mask
    out[chunk.prompt_slot[at], chunk.candidate_slot[at]] = np.asarray(
        score(params, streams=chunk))[at]
  return out


def their_scores(model, sets):
  """[B, K], every text on its own."""
  with torch.no_grad():
    return np.array([[
        model(torch.tensor(np.concatenate([one.prompt, c]))[None]).logits.item()
        for c in one.completions] for one in sets])


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_transformers_in_float64(name, tmp_path, x64):
  model = make_reference(name, tmp_path, torch.float64)
  config = reward.load_config(tmp_path)
  params = hf.load_params(tmp_path, config, dtype=jnp.float64)
  sets = make_sets()
  with parity.true_float64(model):
    want = their_scores(model, sets)
  got = our_scores(params, config, sets, jnp.float64)
  assert np.abs(want).max() > 0.3 and len(np.unique(want)) == want.size
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_exports_equal_transformers_in_float32(name, tmp_path):
  model = make_reference(name, tmp_path / "theirs", torch.float32)
  config = reward.load_config(tmp_path / "theirs")
  params = hf.load_params(tmp_path / "theirs", config)
  sets = make_sets()
  want = their_scores(model, sets)
  got = our_scores(params, config, sets, jnp.float32)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)

  hf.save_params(tmp_path / "ours", params, config, max_shard_bytes=20_000)
  assert reward.load_config(tmp_path / "ours") == config
  again = hf.load_params(tmp_path / "ours", config)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  assert not (tmp_path / "ours" / "generation_config.json").exists()
  assert "reward model" in (tmp_path / "ours" / "README.md").read_text()
  exported = transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / "ours", attn_implementation="eager")
  assert type(exported) is type(model) and exported.num_labels == 1
  for key, tensor in model.state_dict().items():
    assert torch.equal(exported.state_dict()[key], tensor), key


# --- as a reward --------------------------------------------------------------

# Behind the end of a turn stands a line feed, as in ChatML.
WITH_TAIL = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}{{ eos_token }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{# <|user|> <|assistant|> #}")
TALK = [{"role": "user", "content": "the red cup"},
        {"role": "assistant", "content": "a cup"},
        {"role": "user", "content": "which colour"}]
PROMPTS = ["the blue door", TALK, "the blue door", TALK, "the blue door"]
REPLIES = ["it is blue", "red", "blue <|eos|> blue", "it is", "x" * 90]


def make_folder(folder, template=tokenizer_lib.DEFAULT_CHAT_TEMPLATE,
                dtype=jnp.float32, **more):
  """A random reward model with a tokenizer of its own."""
  tokens = folder.parent / f"{folder.name} tokens"
  tokenizer_lib.train_tokenizer(
      ["the red cup is blue"], vocab_size=270, out_dir=tokens,
      chat_template=template)
  tokenizer = tokenizer_lib.load_tokenizer(tokens)
  config = ModelConfig(**{**dict(
      family="llama", vocab_size=tokenizer.vocab_size, hidden_size=16,
      intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
      head_dim=4, max_positions=256, initializer_range=0.4,
      bos_token_id=tokenizer.bos_id, eos_token_ids=(tokenizer.eos_id,),
      pad_token_id=tokenizer.pad_id, reward_head=True), **more})
  draw = np.random.default_rng(1).normal
  params = jax.tree.map(
      lambda x: jnp.asarray(0.4 * draw(size=x.shape), dtype),
      decoder.param_shapes(config))
  hf.save_params(folder, params, config, tokenizer_dir=tokens)
  (folder / "manifest.json").unlink()  # as one from elsewhere
  return folder


def transformers_scores(folder, prompts, replies):
  """As a user of transformers does it: render, tokenise, score."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, attn_implementation="eager").eval()
  out = []
  for prompt, reply in zip(prompts, replies):
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": reply}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
      out.append(model(ids["input_ids"]).logits.item())
  return out


@pytest.mark.parametrize("template", [
    tokenizer_lib.DEFAULT_CHAT_TEMPLATE, WITH_TAIL], ids=["plain", "tail"])
@pytest.mark.parametrize("pad", ["own", "eos"])
def test_texts_score_as_in_transformers(tmp_path, template, pad):
  more = {} if pad == "own" else {"pad_token_id": 1}  # EOS
  folder = make_folder(tmp_path / "model", template, **more)
  reply = [r.replace("<|eos|>", "") for r in REPLIES]
  got = score(reward_model.make_reward_model(str(folder)), PROMPTS, reply)
  want = transformers_scores(folder, PROMPTS, reply)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
  assert len(np.unique(got)) == len(got)


def test_a_reply_that_spells_a_control_token_does_not_end_its_turn(tmp_path):
  fn = reward_model.make_reward_model(str(make_folder(tmp_path / "model")))
  spelled, cut = fn(["a", "a"], ["blue <|eos|>", "blue "])
  assert spelled != cut
  # A batch gives what each text gives alone.
  alone = [fn([p], [r])[0] for p, r in zip(PROMPTS, REPLIES)]
  np.testing.assert_allclose(fn(PROMPTS, REPLIES), alone, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_scores_are_the_same_on_one_and_on_eight_devices(
    sound, tmp_path, monkeypatch):
  # A width that eight do not divide lies on four.
  narrow = make_folder(tmp_path / "model", hidden_size=12)
  for folder, parts in ((sound, 8), (narrow, 4)):
    weights = reward_model.load_weights(folder, reward.load_config(folder))
    for x in (weights["embed"]["embedding"],
              *(part["kernel"] for name in ("attention", "mlp")
                for part in weights["layers"][name].values())):
      shards = [shard.data.size for shard in x.addressable_shards]
      assert shards == [x.size // parts] * parts
  eight = reward_model.make_reward_model(str(sound))(PROMPTS, REPLIES)
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
  one = reward_model.make_reward_model(str(sound))(PROMPTS, REPLIES)
  np.testing.assert_allclose(eight, one, rtol=0, atol=2e-5)


def test_bfloat16_weights_stay_so_and_score_nearly_the_same(tmp_path):
  half = make_folder(tmp_path / "half", dtype=jnp.bfloat16)
  config = reward.load_config(half)
  weights = reward_model.load_weights(half, config)
  assert {x.dtype.name for x in jax.tree.leaves(weights)} == {"bfloat16"}
  hf.save_params(
      tmp_path / "full", jax.tree.map(lambda x: x.astype(jnp.float32), weights),
      config, tokenizer_dir=half)
  got, want = (
      np.array(reward_model.make_reward_model(str(folder))(PROMPTS, REPLIES))
      for folder in (half, tmp_path / "full"))
  assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def without_template(folder):
  for name in ("chat_template.jinja", "chat_template.json"):
    (folder / name).unlink(missing_ok=True)


def test_without_a_template_a_text_is_prompt_completion_and_end(tmp_path):
  folder = make_folder(tmp_path / "model")
  without_template(folder)
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  assert reward_model.tail_ids(tokenizer, where="") == []
  got = reward_model.make_reward_model(str(folder))(["the red"], [" cup"])
  ids = [*tokenizer.hf("the red")["input_ids"],
         *tokenizer.hf(" cup")["input_ids"], tokenizer.eos_id]
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, attn_implementation="eager").eval()
  with torch.no_grad():
    want = model(torch.tensor([ids])).logits.item()
  np.testing.assert_allclose(got, [want], atol=2e-5)


def edit_head(change):
  def edit(folder):
    path = folder / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

  return edit


def template_is(text):
  return lambda folder: (folder / "chat_template.jinja").write_text(text)


HEAD = "score.weight"
DEFAULT = tokenizer_lib.DEFAULT_CHAT_TEMPLATE
SPOILED = {
    "no head": (edit_head(lambda t: t.pop(HEAD)), "hf.tensor", HEAD),
    "two labels": (edit_head(lambda t: t.update(
        {HEAD: np.zeros((2, 16), "f4")})), "hf.tensor", HEAD),
    "another tensor": (edit_head(lambda t: t.update(
        x=np.zeros(2, "f4"))), "hf.tensor", "x"),
    "a head that is NaN": (edit_head(lambda t: t.update(
        {HEAD: np.full((1, 16), np.nan, "f4")})), "hf.non_finite", HEAD),
    "a head that overflows": (edit_head(lambda t: t.update(
        {HEAD: np.full((1, 16), 3e38, "f4")})), "hf.score", ""),
    "turns that do not end": (template_is(DEFAULT.replace(
        "{{ eos_token }}", "")), "hf.template", ""),
    "BOS twice": (template_is("{{ bos_token }}" + DEFAULT), "data.bos", ""),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(),
                     "hf.tokenizer", ""),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("sound") / "model")


@pytest.mark.parametrize("name", SPOILED)
def test_a_folder_that_cannot_score_is_refused_at_load(name, sound, tmp_path):
  spoil, slug, where = SPOILED[name]
  folder = shutil.copytree(sound, tmp_path / "model")
  spoil(folder)
  with pytest.raises(errors.McpoError) as e:
    reward_model.make_reward_model(str(folder))
  assert e.value.slug == slug and where in e.value.where


def test_a_text_beyond_the_context_is_refused_not_cut(sound):
  fn = reward_model.make_reward_model(str(sound))
  with pytest.raises(errors.DataError) as e:
    fn(["a"], ["a b " * 200])
  assert e.value.slug == "data.completion_too_long"


# --- trained ------------------------------------------------------------------


def train(base, *flags, **extra):
  """The stage alone, on the tiny data."""
  data = run_cases.write_data(base.parent / "data", rows=60)
  return run_cases.run(
      "train", base / "run", base / "cache", *data,
      "--config.stages=reward_model", "--config.reward_model.data_path="
      f"{base.parent / 'data' / 'kwise.jsonl'}",
      "--config.reward_model.num_steps=12",
      "--config.reward_model.batch_size=16",
      "--config.reward_model.eval_fraction=0.3",
      "--config.reward_model.optimizer.learning_rate=0.03", *flags, **extra)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("trained")
  done = train(folder / "whole")
  assert done.returncode == 0, done.stderr[-3000:]
  return folder


def held_out_rows(folder):
  """Those below 0.3 by the hash of their prompt."""
  rows = list(records.read_records(str(folder / "data" / "kwise.jsonl")))
  hashes = [store._uint64(readers.hash_id(row.prompt)) for row in rows]
  return [row for row, h in zip(rows, hashes) if h < 0.3 * 2**64]


def test_what_was_trained_scores_held_out_texts_as_the_stage_said(trained):
  folder = trained / "whole" / "run" / "reward_model" / "model"
  rows = held_out_rows(trained)
  prompts = [row.prompt for row in rows for _ in row.completions]
  replies = [c for row in rows for c in row.completions]
  scores = score(
      reward_model.make_reward_model(str(folder)), prompts, replies)
  want = transformers_scores(folder, prompts, replies)
  np.testing.assert_allclose(scores, want, rtol=0, atol=2e-5)
  scores = scores.reshape(len(rows), 4)  # the first one is the right one
  summary = run_cases.summary(trained / "whole" / "run")
  assert summary["reward_model/num_pairs"] == 3 * len(rows) > 20
  accuracy = np.mean(scores[:, :1] > scores[:, 1:])
  assert summary["reward_model/accuracy"] == pytest.approx(accuracy)
  low, high = (summary[f"reward_model/accuracy_ci95_{end}"]
               for end in ("low", "high"))
  assert low <= accuracy <= high
  losses = [row["loss"] for row in run_cases.metrics(trained / "whole" / "run")
            if "loss" in row]
  assert losses[0] == pytest.approx(np.log(2), abs=0.02)
  assert losses[-1] < losses[0]


def test_a_killed_run_goes_on_to_the_same_weights(trained):
  killed = train(trained / "killed", MCPO_FAULT="step.before@8")
  assert killed.returncode == -9
  again = train(trained / "killed")
  assert again.returncode == 0, again.stderr[-3000:]
  assert "reward_model resumes at step" in again.stderr
  assert (run_cases.summary(trained / "killed" / "run")
          == run_cases.summary(trained / "whole" / "run"))


def test_the_stage_needs_its_data():
  import configs.default

  config = configs.default.get_config()
  config.stages = ("reward_model",)
  with pytest.raises(errors.ConfigError) as e:
    settings.resolve(config.to_dict())
  assert e.value.where == "reward_model.data_path"
