"""Llama 3 8B, aligned by MC-PO with LoRA on Nectar, on one device.

As llama3_8b_nectar_mcpo.py, but of the model's weights, which lie in bfloat16,
none is trained: adapters of rank 16 are, in float32. No run of this config has
been reported yet.

Hardware: one device of 80 GB, of which training needs about 22, on paper: 16.1
GB of weights, 0.8 of adapters with gradients and moments, 1.1 of the inputs of
32 layers for one stream of 4,096 tokens, 3.2 of logits of a chunk in the
backward pass, and 0.7 of one layer that is recomputed. Evaluation holds the
weights three times: start, aligned, and the sampler's own. Command:

  python -m mcpo_jax train --config=configs/llama3_8b_nectar_mcpo_lora.py \
      --workdir=runs/llama3_8b_nectar_mcpo_lora
"""

import ml_collections

from configs import llama3_8b_nectar_mcpo


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = llama3_8b_nectar_mcpo.get_config()
  config.model.param_dtype = "bfloat16"
  config.lora.rank = 16
  # Ten times what all weights take.
  config.optimizer.learning_rate = 6e-6
  return config
