"""Llama 3 8B, aligned by MC-PO on Nectar.

Reproduces: the offline setting of arXiv 2502.04567, in which a Llama 3 8B after
SFT is aligned on Nectar's ranked answers (7 per prompt). Learning rate, batch
size and beta are the usual ones for models of this size; no run of this config
has been reported yet.

Data: berkeley-nest/Nectar on the Hugging Face hub, about 183,000 prompts.
Hardware: 8 devices of 80 GB (weights, gradients and AdamW moments in float32
are 128 GB, sharded over all of them). Command, on one host:

  python -m mcpo_jax train --config=configs/llama3_8b_nectar_mcpo.py \
      --workdir=runs/llama3_8b_nectar_mcpo
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.stages = ("preference", "evaluate", "export")
  config.num_epochs = 1.0
  config.batch_size = 128

  config.model.path = "princeton-nlp/Llama-3-Base-8B-SFT"
  config.model.compute_dtype = "bfloat16"
  config.model.remat = "full"
  config.mesh.data = 1
  config.mesh.fsdp = -1

  config.data.path = "berkeley-nest/Nectar"
  config.data.format = "nectar"
  config.data.eval_fraction = 0.005
  config.data.max_prompt_length = 1024
  config.data.max_completion_length = 1024
  config.data.prompt_overlength = "skip"
  config.data.stream_length = 4096

  config.objective.beta = 0.01
  config.optimizer.learning_rate = 6e-7

  config.evaluation.num_prompts = 512
  config.export.dtype = "bfloat16"
  config.log.candidates_every_steps = 100
  return config
