"""Rewards, the rounds of on-policy candidates, the verb generate."""

from mcpo_jax import errors, registry
from mcpo_jax.config_keys import KEYS
from mcpo_jax.registry import REWARDS
from mcpo_jax.settings.values import check_value, parse_rewards


def _names(text: str | None) -> list[str]:
  """The names in a sum of rewards, as far as it can be read."""
  return [x.partition("*")[0].strip() for x in (text or "").split(",")]


def check_reward(config) -> list[errors.McpoError]:
  """The rewards and what each of them needs."""
  group, found, read = config["reward"], [], set()
  for key, text in (("reward.name", group["name"]),
                    ("online.judge", config["online"]["judge"]),
                    ("evaluation.reward", config["evaluation"]["reward"])):
    try:
      members = parse_rewards(text) if text else []
    except errors.ConfigError as e:
      e.where = key
      found.append(e)
      continue
    for name, _ in members:
      if ":" not in name and name not in REWARDS:
        found.append(errors.ConfigError(
            "config.range", "unknown reward", where=key, got=name,
            want=" | ".join(REWARDS) + " | module:function",
            hint=errors.nearest(name, REWARDS)))
        continue
      entry = REWARDS.get(name, registry.Reward(""))
      read |= {*entry.needs, *entry.takes}
      found += [errors.ConfigError(
          "config.missing", f"{name} needs it", where=f"reward.{setting}",
          hint=f"--config.reward.{setting}=VALUE")
          for setting in entry.needs if group[setting] is None]
  watched = next((f"{key}.{name}" for key, name in (
      ("online", "judge"), ("evaluation", "reward"))
      if "judge" in _names(config[key][name])), None)
  if "judge" in _names(group["name"]) and "evaluate" in (
      config["stages"] or ()):
    watched = "reward.name"
  if watched:
    found.append(errors.ConfigError(
        "config.conflict", "win rates among a model's own samples are 1/2 on "
        "average, whatever the model", where=watched, got="judge",
        want="another reward; judge is for online.enabled, and stages without "
        "evaluate"))
  for setting in ("patterns_path", "path", "url", "judge"):
    if group[setting] is not None and setting not in read:
      readers = [name for name, entry in REWARDS.items()
                 if setting in entry.needs]
      found.append(errors.ConfigError(
          "config.unused", f"only {' and '.join(readers)} reads it",
          where=f"reward.{setting}"))
  return found


def check_online(config) -> list[errors.McpoError]:
  """The rounds of on-policy candidates."""
  online, reference, found = config["online"], config["reference"], []

  def refuse(slug, message, key, want, got=None):
    found.append(errors.ConfigError(
        slug, message, where=key, got=got, want=want))

  source = reference["source"]
  if not online["enabled"]:
    if source in ("previous_round", "ema"):
      refuse("config.unused", "there are no rounds offline",
             "reference.source", "cached or resident", source)
    if reference["ema_decay"] is not None:
      refuse("config.unused", "only reference.source=ema reads it",
             "reference.ema_decay", "None", reference["ema_decay"])
    return found
  generation = config["generation"]
  if generation["url"] is None:
    for key in ("spool", "token_path"):
      if generation[key] is not None:
        refuse("config.unused", "only generation.url reads it",
               f"generation.{key}", "None", generation[key])
  elif online["mixture"] or generation["num_devices"]:
    refuse("config.conflict", "a server samples from one model, on devices of "
           "its own", "generation.url", "None, or online.mixture=0 and "
           "generation.num_devices=None", generation["url"])
  if source == "cached":
    refuse("config.conflict", "fresh samples are in no cache",
           "reference.source", "resident, lora_base, previous_round or ema",
           source)
  if source == "ema" and reference["ema_decay"] is None:
    reference["ema_decay"] = 0.9
  if source != "ema" and reference["ema_decay"] is not None:
    refuse("config.unused", "only reference.source=ema reads it",
           "reference.ema_decay", "None", reference["ema_decay"])
  if source in ("previous_round", "ema") and reference["path"]:
    refuse("config.unused", "the reference is the policy's own past",
           "reference.path", "None", reference["path"])
  prompts = online["prompts_per_round"] * online["epochs_per_round"]
  if prompts % config["batch_size"]:
    refuse("config.divisible", "a round is a whole number of updates",
           "online.prompts_per_round",
           f"a multiple of batch_size = {config['batch_size']}, times "
           "online.epochs_per_round", online["prompts_per_round"])
  refresh = str(config["kernel"]["refresh"])
  if refresh == "epoch" or refresh.isdigit() and (
      prompts // config["batch_size"] % int(refresh)):
    refuse("config.divisible", "draws are made anew with every round",
           "kernel.refresh", "a divisor of the updates of a round", refresh)
  by_data = online["preferred"] == "data"
  if not by_data and config["reward"]["name"] is None:
    refuse("config.missing", "samples are preferred by a reward",
           "reward.name", "a reward, or online.preferred=data")
  if by_data and online["online_fraction"] < 1:
    refuse("config.unused", "beside the preferred completion of the data all "
           "are sampled", "online.online_fraction", "1.0",
           online["online_fraction"])
  if config["data"]["preferred"] == "index" and not by_data:
    refuse("config.conflict", "samples are preferred by their scores",
           "data.preferred", "best or top_k", "index")
  kept = online["num_candidates"] - 1 if by_data else max(1, round(
      online["num_candidates"] * online["online_fraction"]))
  rejects = online["rejection_beta"] is not None
  if rejects and (by_data or (online["num_samples"] or 0) <= kept):
    refuse("config.conflict", "rejection keeps some of many scored samples",
           "online.num_samples",
           f"more than the {kept} kept, and online.preferred=score",
           online["num_samples"])
  if not rejects and online["num_samples"] not in (None, kept):
    refuse("config.unused", "all samples are candidates without rejection",
           "online.num_samples", "None", online["num_samples"])
  if online["mixture"] and source is None:
    refuse("config.missing", "a mixture needs a reference", "online.mixture",
           "0.0, or reference.source", online["mixture"])
  if online["extrapolation"] and source == "ema":
    refuse("config.conflict", "one kind of moving weights at a time",
           "online.extrapolation", "0.0", online["extrapolation"])
  if config["proposal"]["correction"]:
    if online["online_fraction"] < 1 or rejects or by_data:
      refuse("config.conflict", "the law of every candidate must be known",
             "proposal.correction", "candidates of the policy alone", True)
    if (generation["top_k"], generation["top_p"], generation["min_p"]) != (
        0, 1.0, 0.0) or generation["stop"]:
      refuse("config.conflict", "truncated sampling gives some completions no "
             "probability", "proposal.correction", "top_k=0, top_p=1, min_p=0 "
             "and no stop texts", True)
  return found


def check_generate(config) -> list[errors.McpoError]:
  """The verb generate; fills where its prompts are and the temperatures."""
  group, found = config["generate"], []
  if group["data_path"] is None:
    group["data_path"] = config["data"]["path"]
    if group["data_format"] == "auto":
      group["data_format"] = config["data"]["format"]
    else:
      found.append(errors.ConfigError(
          "config.unused", "generate.data_path is not given",
          where="generate.data_format", got=group["data_format"],
          want="auto"))
  if group["data_format"] == "tokens":
    found.append(errors.ConfigError(
        "config.conflict", "records are text, and prompts given as ids have "
        "none", where="generate.data_format", got="tokens",
        want="a layout with text"))
  texts = group["temperatures"] or (config["generation"]["temperature"],)
  try:
    group["temperatures"] = tuple(map(float, texts))
  except (TypeError, ValueError):
    group["temperatures"] = ()
  setting = KEYS["generation.temperature"]
  wrong = [e for value in group["temperatures"] for e in check_value(
      "generate.temperatures", value, setting)]
  if len(set(group["temperatures"])) != len(texts):  # no number, or one twice
    wrong.append(errors.ConfigError(
        "config.range", "temperatures are different numbers",
        where="generate.temperatures", got=texts, want="such as 0.7,1.0"))
  found += wrong
  if not group["part"] < group["num_parts"]:
    found.append(errors.ConfigError(
        "config.range", "parts are counted from 0", where="generate.part",
        got=group["part"], want=f"below num_parts = {group['num_parts']}"))
  return found
