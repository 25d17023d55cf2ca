"""Qwen2.5 1.5B, aligned by DPO on UltraFeedback.

Reproduces: the baseline beside configs/qwen25_1p5b_ultrafeedback_mcpo.py.
Everything is equal but the objective, which compares the best answer of a
prompt with the one of the lowest score.

Data: openbmb/UltraFeedback on the Hugging Face hub.
Hardware: one device of 80 GB. Command:

  python -m mcpo_jax train --config=configs/qwen25_1p5b_ultrafeedback_dpo.py \
      --workdir=runs/qwen25_1p5b_ultrafeedback_dpo
"""

import ml_collections

from configs import qwen25_1p5b_ultrafeedback_mcpo


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked config."""
  config = qwen25_1p5b_ultrafeedback_mcpo.get_config()
  config.objective.name = "dpo"
  return config
