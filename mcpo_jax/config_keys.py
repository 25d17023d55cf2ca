"""What each dotted config key may hold, as tables.

What objectives take stands in `registry`; `settings` checks a config against
all of it. This module imports no JAX.
"""

from mcpo_jax import registry
from mcpo_jax.registry import OBJECTIVES, SCORES, Setting

STAGES = ("sft", "reward_model", "preference", "evaluate", "export")

FORMATS = ("auto", "native", "pairs", "nectar", "ultrafeedback",
           "generated_responses", "nemo", "hh", "unpaired", "sft", "tokens",
           "prompts")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
               "down_proj")
BENCHMARKS = ("alpaca_eval", "arena_hard_v0.1", "arena_hard_v2.0", "mt_bench",
              "gsm8k")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")

_ANY = Setting()  # text, or checked elsewhere
_POSITIVE = Setting(low=0.0, open_low=True)
_COUNT = Setting(low=1, high=2**31 - 1)
_FLAG = Setting(choices=(True, False))
_FORMAT = Setting(choices=FORMATS)
_DTYPE = Setting(choices=("float32", "bfloat16"))
_AXIS = Setting(low=-1)


def or_none(setting: Setting = _ANY) -> Setting:
  """The same, and None is allowed."""
  return setting._replace(optional=True)


_OPTIMIZER = {
    "name": Setting(choices=("adamw", "sgd", "rmsprop", "adafactor")),
    "learning_rate": _POSITIVE,
    "schedule": Setting(choices=("cosine", "linear", "constant")),
    "warmup_ratio": Setting(low=0.0, high=1.0),
    "weight_decay": Setting(low=0.0),
    "b1": Setting(low=0.0, high=0.999999),
    "b2": Setting(low=0.0, high=0.999999),
    "eps": _POSITIVE,
    "max_grad_norm": _POSITIVE,
    "moment_dtype": _DTYPE,
    "offload": _FLAG,
    "max_skipped": Setting(low=0),
}

# Kernel keys that only some strategies read: default and range, readers.
KERNEL = {
    "temperature": (_POSITIVE._replace(default=1.0), ("mc",)),
    "temperature_schedule": (
        Setting("constant", choices=("constant", "linear", "geometric")),
        ("mc",)),
    "temperature_end": (_POSITIVE._replace(optional=True), ("mc",)),
    "score": (Setting("reward", choices=SCORES), ("mc", "max", "min")),
    "include_preferred": (_FLAG, ("mc", "random")),
    "transition": (
        Setting("categorical", choices=registry.TRANSITIONS), ("mc",)),
    "num_steps": (_COUNT._replace(default=1), ("mc",)),
    "block_size": (_COUNT._replace(optional=True), ("mc",)),
    "init": (Setting("preferred", choices=registry.INITS), ("mc",)),
    "repulsion": (_POSITIVE._replace(optional=True), ("mc",)),
}

# Those that a kernel of the user's own reads.
OWN_KERNEL = ("temperature", "temperature_schedule", "temperature_end",
               "score", "include_preferred")

# Names that are no keys -> the key that is meant. A key of ours that is renamed
# stands here for one version; what TRL calls otherwise stays.
OTHER_NAMES = {
    "beta": "objective.beta",
    "loss_type": "objective.name",
    "label_smoothing": "objective.label_smoothing",
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_ratio",
    "max_steps": "num_steps",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "data.max_completion_length",
    "max_new_tokens": "generation.max_new_tokens",
    "num_generations": "online.num_candidates",
    "model_name_or_path": "model.path",
    "ref_model": "reference.path",
    "output_dir": "--workdir",
    "logging_steps": "log.every_steps",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "evaluation.every_steps",
}

KEYS: dict[str, Setting] = {
    "seed": Setting(low=0, high=2**32 - 1),
    "stages": _ANY,
    "num_steps": or_none(_COUNT),
    "num_epochs": or_none(_POSITIVE),
    "batch_size": _COUNT,
    "cache_dir": or_none(),
    "tokenizer.path": or_none(),
    "tokenizer.vocab_size": Setting(low=260),
    "tokenizer.chat_template": or_none(),
    "tokenizer.chat_template_kwargs": or_none(),
    "tokenizer.date": _ANY,
    "tokenizer.bos": Setting(choices=("auto", "add", "none")),
    "proposal.correction": _FLAG,
    "model.path": or_none(),
    "model.revision": or_none(),
    "model.adapter_path": or_none(),
    "model.family": Setting(choices=FAMILIES),
    "model.hidden_size": _COUNT,
    "model.num_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.num_kv_heads": _COUNT,
    "model.head_dim": or_none(Setting(low=2)),
    "model.intermediate_size": _COUNT,
    "model.max_position_embeddings": _COUNT,
    "model.rope_theta": _POSITIVE,
    "model.tie_embeddings": _FLAG,
    "model.param_dtype": _DTYPE,
    "model.compute_dtype": _DTYPE,
    "model.remat": Setting(choices=("none", "dots", "offload", "full")),
    "lora.rank": or_none(_COUNT),
    "lora.alpha": or_none(_POSITIVE),
    "lora.targets": _ANY,
    "data.path": or_none(),
    "data.eval_path": or_none(),
    "data.eval_fraction": Setting(low=0.0, high=0.9),
    "data.format": _FORMAT,
    "data.eval_format": _FORMAT,
    "data.revision": or_none(),
    "data.preferred": Setting(choices=("best", "top_k", "index")),
    "data.top_k": or_none(Setting(low=2)),
    "data.max_prompt_length": _COUNT,
    "data.max_completion_length": _COUNT,
    "data.prompt_overlength": Setting(
        choices=("error", "skip", "left", "right")),
    "data.completion_overlength": Setting(
        choices=("error", "skip", "truncate")),
    "data.think": Setting(choices=("keep", "strip", "mask")),
    "data.quarantine": _FLAG,
    "data.quarantine_text": _FLAG,
    "data.max_quarantined_share": Setting(low=0.0, high=1.0),
    "data.stream_length": Setting(low=8),
    "data.num_streams": or_none(_COUNT),
    "objective.name": _ANY,
    "kernel.strategy": or_none(),
    "kernel.num_negatives": _COUNT,
    "kernel.refresh": _ANY,
    "kernel.scoring": Setting(
        choices=("auto", "separate", "together", "sampler")),
    "reference.source": or_none(Setting(
        choices=("cached", "resident", "lora_base", "previous_round",
                 "ema"))),
    "reference.ema_decay": or_none(Setting(low=0.0, high=1.0, open_high=True)),
    "reference.path": or_none(),
    "sft.data_path": or_none(),
    "sft.data_format": _FORMAT,
    "sft.num_steps": _COUNT,
    "sft.batch_size": _COUNT,
    "reward_model.data_path": or_none(),
    "reward_model.data_format": _FORMAT,
    "reward_model.eval_fraction": Setting(low=0.0, high=0.9),
    "reward_model.num_steps": _COUNT,
    "reward_model.batch_size": _COUNT,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.context": _AXIS,
    "mesh.tensor": _AXIS,
    "generation.temperature": Setting(low=0.0, high=100.0),
    "generation.top_p": Setting(low=0.0, high=1.0, open_low=True),
    "generation.top_k": Setting(low=0),
    "generation.min_p": Setting(low=0.0, high=1.0),
    "generation.repetition_penalty": _POSITIVE,
    "generation.min_new_tokens": Setting(low=0),
    "generation.max_new_tokens": or_none(_COUNT),
    "generation.stop": _ANY,
    "generation.num_samples": _COUNT,
    "generation.num_devices": or_none(_COUNT),
    "generation.tensor": _COUNT,
    "generation.url": or_none(),
    "generation.spool": or_none(),
    "generation.token_path": or_none(),
    "generation.patience_s": _POSITIVE,
    "reward.name": or_none(),
    "reward.patterns_path": or_none(),
    "reward.path": or_none(),
    "reward.url": or_none(),
    "reward.judge": or_none(),
    "reward.timeout_s": _POSITIVE,
    "reward.patience_s": _POSITIVE,
    "reward.missing_eos_penalty": Setting(low=0.0),
    "reward.length_penalty": Setting(low=0.0),
    "reward.thinking": Setting(choices=("answer", "thinking", "both")),
    "online.enabled": _FLAG,
    "online.prompts_per_round": _COUNT,
    "online.prompts_per_part": _COUNT,
    "online.epochs_per_round": _COUNT,
    "online.num_candidates": Setting(low=2, high=4095),
    "online.num_samples": or_none(Setting(low=1, high=4095)),
    "online.online_fraction": Setting(low=0.0, high=1.0, open_low=True),
    "online.preferred": Setting(choices=("score", "data")),
    "online.policy_lag": Setting(low=0),
    "online.replay_rounds": Setting(low=0),
    "online.mixture": Setting(low=0.0, high=1.0),
    "online.extrapolation": Setting(low=0.0, high=10.0),
    "online.rejection_beta": or_none(_POSITIVE),
    "online.judge": or_none(),
    "online.alarm": Setting(choices=("warn", "stop")),
    "online.max_kl": _POSITIVE,
    "online.max_chosen_drop": Setting(low=0.0),
    "online.max_length_ratio": Setting(low=1.0),
    "online.max_tied_share": Setting(low=0.0, high=1.0),
    "online.max_repetition": Setting(low=0.0, high=1.0),
    "online.max_logp_gap": _POSITIVE,
    "generate.data_path": or_none(),
    "generate.data_format": _FORMAT,
    "generate.temperatures": _ANY,
    "generate.prompts_per_shard": _COUNT,
    "generate.num_parts": _COUNT,
    "generate.part": Setting(low=0),
    "evaluation.every_steps": _COUNT,
    "evaluation.num_prompts": or_none(_COUNT),
    "evaluation.num_display": _COUNT,
    "evaluation.patience": or_none(_COUNT),
    "evaluation.estimator_every_steps": or_none(_COUNT),
    "evaluation.models": _ANY,
    "evaluation.baseline": or_none(),
    "evaluation.reward": or_none(),
    "benchmark.name": or_none(Setting(choices=BENCHMARKS)),
    "benchmark.questions_path": or_none(),
    "benchmark.judgments_path": or_none(),
    "benchmark.baseline_path": or_none(),
    "benchmark.temperature": or_none(Setting(low=0.0, high=100.0)),
    "benchmark.max_new_tokens": or_none(_COUNT),
    "checkpoint.every_steps": Setting(low=1, slug="config.retention"),
    "checkpoint.keep": Setting(low=2, slug="config.retention"),
    "checkpoint.keep_best": _FLAG,
    "checkpoint.timeout_seconds": _POSITIVE,
    "checkpoint.mirror": or_none(),
    "checkpoint.grace_seconds": _POSITIVE,
    **{f"watchdog.{kind}_seconds": or_none(_POSITIVE)
       for kind in ("compile", "step", "work")},
    "export.dtype": or_none(_DTYPE),
    "log.every_steps": _COUNT,
    "log.candidates_every_steps": _COUNT,
    "log.tensorboard": _FLAG,
    "log.wandb": _FLAG,
    "serve.host": _ANY,
    "serve.port": Setting(low=0, high=65535),
    "serve.public": _FLAG,
    "serve.token_path": or_none(),
    "serve.model_name": _ANY,
    "serve.num_slots": _COUNT,
    "serve.max_samples": _COUNT,
    "serve.tokens_per_step": _COUNT,
    "serve.max_body_mib": _COUNT,
    "serve.body_seconds": _POSITIVE,
    "serve.grace_seconds": Setting(low=0, high=3600),
    "compare.rows": _ANY,
    "compare.reference": or_none(),
    "compare.seeds": _ANY,
    "compare.jobs": _COUNT,
    "compare.metric": _ANY,
    "compare.minutes": or_none(_COUNT._replace(low=0)),
} | {
    f"{group}optimizer.{name}": setting
    for group in ("", "sft.", "reward_model.")
    for name, setting in _OPTIMIZER.items()
} | {  # checked by those that read them
    key: or_none()
    for key in (*(f"kernel.{name}" for name in KERNEL), *(
        f"objective.{name}" for objective in OBJECTIVES.values()
        for name in objective.settings))
}
