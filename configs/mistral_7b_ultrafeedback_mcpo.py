"""Mistral 7B, aligned by MC-PO on UltraFeedback.

Reproduces: the Mistral-Base setting that is common in preference optimization
(SFT on UltraChat, then UltraFeedback), with all 4 scored answers of a prompt
instead of one pair. No run of this config has been reported yet.

Data: openbmb/UltraFeedback on the Hugging Face hub, about 64,000 prompts.
Hardware: 8 devices of 80 GB. Command, on one host:

  python -m mcpo_jax train --config=configs/mistral_7b_ultrafeedback_mcpo.py \
      --workdir=runs/mistral_7b_ultrafeedback_mcpo
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.stages = ("preference", "evaluate", "export")
  config.num_epochs = 1.0
  config.batch_size = 128

  config.model.path = "alignment-handbook/zephyr-7b-sft-full"
  config.model.compute_dtype = "bfloat16"
  config.model.remat = "full"
  config.mesh.data = 1
  config.mesh.fsdp = -1

  config.data.path = "openbmb/UltraFeedback"
  config.data.format = "ultrafeedback"
  config.data.eval_fraction = 0.01
  config.data.max_prompt_length = 1024
  config.data.max_completion_length = 1024
  config.data.prompt_overlength = "skip"
  config.data.stream_length = 4096

  config.objective.beta = 0.01
  config.optimizer.learning_rate = 5e-7

  config.evaluation.num_prompts = 512
  config.export.dtype = "bfloat16"
  config.log.candidates_every_steps = 100
  return config
