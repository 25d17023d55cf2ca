"""A Hugging Face folder in, 20 updates, a folder transformers loads out."""

import numpy as np
import pytest
import run_cases

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers")

TRAIN = ["--config.stages=('preference','export')",
         "--config.num_steps=20", "--config.checkpoint.every_steps=10",
         "--config.evaluation.every_steps=10", "--config.log.every_steps=5",
         "--config.model.max_position_embeddings=512",
         "--config.optimizer.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A random Llama with a tokenizer of its own, and the aligned export."""
  from mcpo_jax.data import tokenizer as tokenizer_lib

  folder = tmp_path_factory.mktemp("hf")
  flags = run_cases.write_data(folder / "data")
  source = folder / "llama"
  texts = (folder / "data" / "sft.jsonl").read_text().splitlines()
  tokenizer_lib.train_tokenizer(texts, vocab_size=290, out_dir=source)
  size = tokenizer_lib.load_tokenizer(source).vocab_size
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=size + 6, hidden_size=24, intermediate_size=40,
      num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
      head_dim=10, max_position_embeddings=128, rope_theta=5e4,
      tie_word_embeddings=False)
  transformers.LlamaForCausalLM(config).save_pretrained(source)
  done = run_cases.run(
      "train", folder / "run", folder / "cache", *flags, *TRAIN,
      f"--config.model.path={source}")
  assert done.returncode == 0, done.stderr[-3000:]
  return source, folder / "run" / "export", done


def weights(folder):
  from safetensors import numpy as safetensors

  out = {}
  for file in sorted(folder.glob("*.safetensors")):
    out |= safetensors.load_file(file)
  return out


def test_every_tensor_changed_and_none_was_lost(folders):
  before, after = (weights(f) for f in folders[:2])
  assert before.keys() == after.keys()
  same = [k for k in before if np.array_equal(before[k], after[k])]
  assert not same


def test_h16_transformers_computes_our_logits_from_the_export(folders):
  import jax.numpy as jnp

  from mcpo_jax import types
  from mcpo_jax.models import decoder, hf

  export = folders[1]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      export, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(export)
  ids = tokenizer.apply_chat_template(
      [{"role": "user", "content": "colour red thing boat 3"}],
      add_generation_prompt=True, return_dict=False)
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits[0].numpy()
  config = hf.load_config(export)
  params = hf.load_params(export, config, dtype=jnp.float32)
  tokens = np.array([ids], np.int32)
  zeros = np.zeros_like(tokens)
  streams = types.Streams(
      tokens, np.arange(len(ids), dtype=np.int32)[None], zeros, zeros - 1,
      zeros > 0, zeros)
  ours = decoder.head_logits(
      params, config, decoder.hidden_states(params, config, streams))[0]
  np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_the_export_carries_template_and_stop_ids(folders):
  export = folders[1]
  tokenizer = transformers.AutoTokenizer.from_pretrained(export)
  generation = transformers.GenerationConfig.from_pretrained(export)
  stops = generation.eos_token_id
  stops = stops if isinstance(stops, list) else [stops]
  assert tokenizer.eos_token_id in stops
  assert tokenizer.chat_template
  assert "mcpo" in (export / "README.md").read_text()


def test_the_loss_of_the_first_update_is_log_two(folders):
  rows = [r for r in run_cases.metrics(folders[1].parent)
          if r["stage"] == "preference" and r.get("step") == 1]
  assert abs(rows[0]["loss"] - np.log(2)) < 1e-4
  assert "start gate" in folders[2].stderr
