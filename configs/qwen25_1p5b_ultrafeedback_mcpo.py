"""Qwen2.5 1.5B Instruct, aligned by MC-PO on UltraFeedback.

Reproduces: no published run; the smallest full-size config, for one device.

Data: openbmb/UltraFeedback on the Hugging Face hub, about 64,000 prompts.
Hardware: one device of 80 GB, or several. Command:

  python -m mcpo_jax train --config=configs/qwen25_1p5b_ultrafeedback_mcpo.py \
      --workdir=runs/qwen25_1p5b_ultrafeedback_mcpo
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = default.get_config()
  config.stages = ("preference", "evaluate", "export")
  config.num_epochs = 1.0
  config.batch_size = 64

  config.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
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

  config.objective.beta = 0.05
  config.optimizer.learning_rate = 1e-6

  config.evaluation.num_prompts = 512
  config.export.dtype = "bfloat16"
  config.log.candidates_every_steps = 100
  return config
