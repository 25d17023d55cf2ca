"""Adapters and merged weights against PEFT and transformers on torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax import errors, sharding
from mcpo_jax.models import hf, lora, peft

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

import models_parity_test as parity  # noqa: E402  it needs torch too

TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"),
           "gemma2": tuple(name for _, name in lora.projections())}


@pytest.fixture(scope="module", params=TARGETS)
def base(request, tmp_path_factory):
  """A torch model of another library, the same of ours, and its folder."""
  folder = tmp_path_factory.mktemp(request.param)
  model = parity.make_reference(request.param, folder, dtype=torch.float32)
  config = hf.load_config(folder)
  return request.param, folder, model, config, hf.load_params(folder, config)


def logits_of(model):
  with torch.no_grad():
    return model(torch.tensor(parity.tokens_of())).logits.numpy()


def one_device():
  return sharding.make_mesh(
      data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def test_peft_computes_our_logits_from_what_we_wrote(base, tmp_path):
  name, folder, model, config, params = base
  adapters = lora.init_adapters(
      jax.random.key(1), params, rank=3, targets=TARGETS[name])
  adapters = jax.tree.map(
      lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), adapters)
  policy = lora.join(
      params, lora.join(adapters, lora.scales(adapters, 7 / 3)))
  peft.save_adapters(tmp_path / "a", policy, config, base=str(folder))
  with_ours = theirs.PeftModel.from_pretrained(
      parity.make_reference(name, tmp_path / "again", dtype=torch.float32),
      tmp_path / "a").eval()
  expected = logits_of(with_ours)
  assert np.abs(expected - logits_of(model)).max() > 0.1
  ours = parity.our_logits(policy, config, parity.tokens_of(), jnp.float32)
  np.testing.assert_allclose(ours, expected, atol=1e-5)

  # The merged export, in transformers, without PEFT.
  hf.save_params(tmp_path / "merged", lora.merge(policy), config)
  merged = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "merged", dtype=torch.float32,
      attn_implementation="eager").eval()
  np.testing.assert_allclose(logits_of(merged), expected, atol=2e-5)

  # Back, to the bit.
  again = peft.Adapters(tmp_path / "a").load(
      config, one_device(), dtype=jnp.float32)
  want = lora.join(adapters, lora.scales(adapters, 7 / 3))
  assert jax.tree.structure(again) == jax.tree.structure(want)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), again, want)


def test_what_peft_wrote_is_read_with_its_own_settings(base, tmp_path):
  name, folder, _, config, params = base
  torch.manual_seed(1)
  model = theirs.get_peft_model(
      parity.make_reference(name, tmp_path / "again", dtype=torch.float32),
      theirs.LoraConfig(
          r=2, lora_alpha=5, lora_dropout=0.1, init_lora_weights=False,
          target_modules=list(TARGETS[name]), task_type="CAUSAL_LM"))
  model.save_pretrained(tmp_path / "a")
  read = peft.Adapters(tmp_path / "a")
  assert (read.rank, read.alpha) == (2, 5)
  policy = lora.join(
      params, read.load(config, one_device(), dtype=jnp.float32))
  ours = parity.our_logits(policy, config, parity.tokens_of(), jnp.float32)
  expected = logits_of(model.eval())
  start = parity.our_logits(params, config, parity.tokens_of(), jnp.float32)
  assert np.abs(expected - start).max() > 0.1
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [
    dict(use_rslora=True), dict(use_dora=True), dict(rank_pattern={"q": 4}),
    dict(modules_to_save=["lm_head"]), dict(init_lora_weights="pissa"),
    dict(bias="all")])
def test_another_function_than_plain_lora_is_refused(tmp_path, changes):
  settings = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
  theirs.LoraConfig(**settings).save_pretrained(tmp_path)
  assert peft.Adapters(tmp_path).targets == ["q_proj"]
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(errors.ModelDirError) as caught:
    peft.Adapters(tmp_path)
  assert caught.value.slug == "peft.feature"
  assert next(iter(changes)) in str(caught.value)
