"""The decoder against transformers on torch, family by family."""

import contextlib
import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf, scoring
from mcpo_jax.types import Streams

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,  # not 24 / 6
    rms_norm_eps=3e-5,
    initializer_range=0.2,
    max_position_embeddings=64,
    eos_token_id=5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_biased": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "linear": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="linear", rope_theta=100.0, factor=4.0
            )
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "qwen2": ("Qwen2", {"head_dim": None}),
    "qwen2_window": (
        "Qwen2",
        dict(
            head_dim=None,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    "qwen3": ("Qwen3", {}),
    "gemma2": (
        "Gemma2",
        dict(
            sliding_window=6,
            query_pre_attn_scalar=13,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            sliding_window=6,
            query_pre_attn_scalar=13,
            layer_types=[
                "sliding_attention", "full_attention", "sliding_attention"
            ],
            rope_parameters={
                "sliding_attention": dict(rope_type="default", rope_theta=50.0),
                "full_attention": dict(
                    rope_type="linear", factor=2.0, rope_theta=900.0
                ),
            },
        ),
    ),
}
MODEL_CLASS = {"Gemma3Text": "Gemma3ForCausalLM"}
LENGTH = 41  # beyond every window and the original RoPE length


def make_reference(name, folder, *, dtype=torch.float64):
  """A random torch model, saved to folder as its own library does."""
  family, extra = FAMILIES[name]
  sizes = {**SIZES, **extra}
  if sizes["head_dim"] is None:
    del sizes["head_dim"]  # Qwen2 has none of its own
  torch.manual_seed(3)
  config = getattr(transformers, f"{family}Config")(
      **sizes, attn_implementation="eager"
  )
  model = getattr(
      transformers, MODEL_CLASS.get(family, f"{family}ForCausalLM")
  )(config).to(dtype)
  with torch.no_grad():  # norms and biases start at 0 or 1: move them
    for key, parameter in model.named_parameters():
      if "norm" in key or "bias" in key:
        parameter.add_(0.3 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  return model.eval()


@contextlib.contextmanager
def true_float64(model):
  """Lifts the casts to float32 that transformers has in its code."""
  softmax = torch.nn.functional.softmax

  def keep(self, *args, **kwargs):
    narrow = torch.float32 in (*args, kwargs.get("dtype"))
    return self if narrow else to(self, *args, **kwargs)

  to = torch.Tensor.to
  with (
      mock.patch.object(torch.Tensor, "float", lambda self: self.double()),
      mock.patch.object(torch.Tensor, "to", keep),
      mock.patch.object(torch, "float", torch.float64),
      mock.patch.object(
          torch.nn.functional, "softmax",
          lambda x, dim, dtype=None, **kw: softmax(x, dim=dim),
      ),
  ):
    for module in model.modules():
      if type(module).__name__.endswith("RotaryEmbedding"):
        again = type(module)(module.config)  # now in float64
        module._buffers.update(again._buffers)
      elif "embed_scale" in module._buffers:
        module._buffers["embed_scale"] = torch.tensor(
            model.config.hidden_size**0.5, dtype=torch.float64
        )
    yield


def one_prompt(tokens):
  """A stream that is one text: every token a prompt token."""
  rows, length = tokens.shape
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  zeros = np.zeros_like(positions)
  return Streams(
      tokens=tokens.astype(np.int32),
      positions=positions,
      prompt_slot=zeros + np.arange(rows, dtype=np.int32)[:, None],
      candidate_slot=zeros - 1,
      completion_mask=zeros.astype(bool),
      source=zeros,
  )


def our_logits(params, config, tokens, dtype):
  @jax.jit
  def logits(params, streams):
    hidden = decoder.hidden_states(
        params, config, streams, compute_dtype=dtype
    )
    return decoder.head_logits(params, config, hidden)

  return np.asarray(logits(params, one_prompt(tokens)))


def tokens_of(rows=2):
  rng = np.random.default_rng(5)
  return rng.integers(0, SIZES["vocab_size"], (rows, LENGTH))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_in_float64(name, tmp_path, x64):
  model = make_reference(name, tmp_path)
  config = hf.load_config(tmp_path)
  params = hf.load_params(tmp_path, config, dtype=jnp.float64)
  tokens = tokens_of()
  with torch.no_grad(), true_float64(model):
    want = model(torch.tensor(tokens)).logits.numpy()
  assert want.dtype == np.float64
  got = our_logits(params, config, tokens, jnp.float64)
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_logps_and_exports_equal_transformers_in_float32(name, tmp_path):
  model = make_reference(name, tmp_path / "theirs", dtype=torch.float32)
  config = hf.load_config(tmp_path / "theirs")
  params = hf.load_params(tmp_path / "theirs", config)
  tokens = tokens_of()
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits
  got = our_logits(params, config, tokens, jnp.float32)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)

  hf.save_params(
      tmp_path / "ours", params, config, max_shard_bytes=20_000, stop_ids=(7,)
  )
  assert hf.load_config(tmp_path / "ours") == config
  again = hf.load_params(tmp_path / "ours", config)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  exported = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "ours", attn_implementation="eager"
  )
  assert exported.dtype == torch.float32
  assert exported.generation_config.eos_token_id == [5, 7]
  with torch.no_grad():
    assert torch.equal(exported(torch.tensor(tokens)).logits, want)


def test_token_logps_equal_transformers(tmp_path):
  model = make_reference("gemma2", tmp_path, dtype=torch.float32)
  config = hf.load_config(tmp_path)
  params = hf.load_params(tmp_path, config)
  tokens = tokens_of()
  streams = one_prompt(tokens)
  streams = streams._replace(
      source=np.maximum(streams.positions - 1, 0),
      completion_mask=streams.positions > 0,
  )
  got = jax.jit(scoring.token_logps, static_argnums=1)(params, config, streams)
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.log_softmax(-1).numpy()
  want = np.take_along_axis(want[:, :-1], tokens[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(got[:, 1:], want, rtol=0, atol=2e-5)
  assert (got[:, 0] == 0).all()


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama", dict(rms_norm_eps=1e-6)),
        ("llama", dict(rope_theta=9_000.0)),
        ("llama", dict(activation="gelu_tanh")),
        ("llama3", dict(rope_scaling=())),
        ("linear", dict(rope_scaling=())),
        ("mistral", dict(local_layers=())),
        ("mistral", dict(sliding_window=8)),
        ("qwen2_window", dict(local_layers=(True, True, True))),
        ("qwen3", dict(qk_norm=False)),
        ("gemma2", dict(attention_softcap=None)),
        ("gemma2", dict(final_softcap=None)),
        ("gemma2", dict(local_layers=(False, True, False))),
        ("gemma2", dict(query_scalar=None)),
        ("gemma2", dict(embedding_scale=False)),
        ("gemma2", dict(norm_offset=False)),
        ("gemma2", dict(post_norms=False)),
        ("gemma3", dict(local_rope_theta=None)),
        ("gemma3", dict(qk_norm=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_feature_matters(name, change, tmp_path):
  model = make_reference(name, tmp_path, dtype=torch.float32)
  config = hf.load_config(tmp_path)
  params = hf.load_params(tmp_path, config)
  tokens = tokens_of(1)
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  got = our_logits(
      params, dataclasses.replace(config, **change), tokens, jnp.float32
  )
  assert np.abs(got - want).max() > 1e-4


@pytest.mark.parametrize("name", ["llama_biased", "qwen2"])
def test_biases_matter(name, tmp_path):
  make_reference(name, tmp_path, dtype=torch.float32)
  config = hf.load_config(tmp_path)
  params = hf.load_params(tmp_path, config)
  without = jax.tree_util.tree_map_with_path(
      lambda path, x: 0 * x if path[-1].key == "bias" else x, params
  )
  tokens = tokens_of(1)
  got = [our_logits(p, config, tokens, jnp.float32) for p in (params, without)]
  assert np.abs(got[0] - got[1]).max() > 1e-3


def test_the_old_layout_of_config_json_reads_the_same():
  new = config_lib.from_hf(
      dict(model_type="llama", **SIZES, dtype="float32", rope_parameters=LLAMA3)
  )
  scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
  old = config_lib.from_hf(
      dict(
          model_type="llama", **SIZES, torch_dtype="float32",
          rope_theta=500.0, rope_scaling=scaling,
      )
  )
  assert new == old
  assert math.isclose(old.rope_theta, 500.0)
