"""Qwen2.5 0.5B Instruct, aligned by MC-PO with LoRA on a free Colab T4.

Reproduces: no published run; what fits a GPU of 15 GiB.

Data: openbmb/UltraFeedback on the Hugging Face hub, about 64,000 prompts, of
which 300 updates visit 4,800.

Numbers: a T4 has no bfloat16 units, and float16 cannot hold the gradients of a
loss that is not scaled, so weights, products and adapters are float32. The
kernels for attention need a later GPU: it runs in tiles, and the log says so.
The reference is the policy without its adapters: a cache would score all 64,000
prompts for the few that are visited.

Hardware: one T4, of whose 14.6 GiB training needs about 6.5, on paper:

  1.84 GiB  494 million weights, policy and reference in one
  0.16      8.8 million weights of adapters, two gradients, two moments
  0.16      inputs of 24 layers for a stream of 2,048 tokens (remat "full")
  0.5       one layer, recomputed, with its gradients
  3.5       logits of 2,048 tokens of 151,936 words, three times in the backward
            pass of a chunk
  0.3       what else a program holds for a while

and evaluation about 7: start, aligned and the sampler's own weights, and 1.5
for the keys and values of 64 samples of at most 1,024 tokens.

At half of the 8 TFLOP/s of float32 an update of 16 prompts takes 17 s, the run
1.5 hours; no run of this config has been reported yet. Command:

  python -m mcpo_jax train --config=configs/qwen25_0p5b_ultrafeedback_t4.py \
      --workdir=runs/qwen25_0p5b_ultrafeedback_t4
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.stages = ("preference", "evaluate", "export")
  config.num_steps = 300
  config.batch_size = 16

  config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
  config.model.param_dtype = "float32"
  config.model.compute_dtype = "float32"
  config.model.remat = "full"
  config.lora.rank = 16
  config.reference.source = "lora_base"

  config.data.path = "openbmb/UltraFeedback"
  config.data.format = "ultrafeedback"
  config.data.eval_fraction = 0.01
  config.data.max_prompt_length = 512
  config.data.max_completion_length = 512
  config.data.prompt_overlength = "skip"

  config.objective.beta = 0.05
  # Ten times what all weights would take.
  config.optimizer.learning_rate = 1e-5

  config.evaluation.num_prompts = 64
  config.checkpoint.every_steps = 25
  return config
