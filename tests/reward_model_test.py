"""Reward models: against transformers, as a reward, and trained from pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax.data import packing
from mcpo_jax.models import hf, reward
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
  config = hf.load_config(tmp_path)
  params = reward.load_params(tmp_path, config, dtype=jnp.float64)
  sets = make_sets()
  with parity.true_float64(model):
    want = their_scores(model, sets)
  got = our_scores(params, config, sets, jnp.float64)
  assert np.abs(want).max() > 0.3 and len(np.unique(want)) == want.size
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_exports_equal_transformers_in_float32(name, tmp_path):
  model = make_reference(name, tmp_path / "theirs", torch.float32)
  config = hf.load_config(tmp_path / "theirs")
  params = reward.load_params(tmp_path / "theirs", config)
  sets = make_sets()
  want = their_scores(model, sets)
  got = our_scores(params, config, sets, jnp.float32)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)

  reward.save_params(tmp_path / "ours", params, config, tokenizer_dir=tmp_path,
                     max_shard_bytes=20_000)
  assert hf.load_config(tmp_path / "ours") == config
  again = reward.load_params(tmp_path / "ours", config)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  exported = transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / "ours", attn_implementation="eager")
  assert type(exported) is type(model) and exported.num_labels == 1
  for key, tensor in model.state_dict().items():
    assert torch.equal(exported.state_dict()[key], tensor), key
