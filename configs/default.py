"""Every setting, its default, its unit and its meaning.

A config is this one with a few lines changed; on the command line any field
is set by `--config.group.field=value`. None means "off" or "decided by
something else", and the comment says which.
"""

import ml_collections
from ml_collections import config_dict


def _optimizer() -> ml_collections.ConfigDict:
  """The settings of one optimizer; a stage has its own."""
  optimizer = ml_collections.ConfigDict()
  # Update rule: "adamw", "sgd", "rmsprop" or "adafactor".
  optimizer.name = "adamw"
  # Largest learning rate, reached at the end of the warm-up.
  optimizer.learning_rate = 3e-4
  # After the warm-up: "cosine" or "linear" (both down to 0), or "constant".
  optimizer.schedule = "cosine"
  # Share of the stage's steps in which the learning rate rises, in equal
  # parts: the first of n such steps has 1/n of it.
  optimizer.warmup_ratio = 0.1
  # Decoupled weight decay, on matrices only.
  optimizer.weight_decay = 0.0
  # Decay of the first moment, in [0, 1).
  optimizer.b1 = 0.9
  # Decay of the second moment, in [0, 1).
  optimizer.b2 = 0.999
  # Added to the root of the second moment.
  optimizer.eps = 1e-8
  # Gradients with a larger global norm are scaled down to it.
  optimizer.max_grad_norm = 1.0
  # Of the first moment (adamw, sgd): "float32" or "bfloat16". Second moments
  # are float32: they move by too little at a time for bfloat16.
  optimizer.moment_dtype = "float32"
  # Keep the optimizer's state in the host's memory; it comes to the devices
  # for the update alone, so it pays where activations need more room than it.
  # Needs devices that reach that memory.
  optimizer.offload = False
  # Updates in a row that may be left out because loss or gradient is not
  # finite; one more ends the run. Their batches stand in non_finite.jsonl.
  optimizer.max_skipped = 0
  return optimizer


def get_config() -> ml_collections.ConfigDict:
  """Returns the locked default config."""
  config = ml_collections.ConfigDict()
  # Seed of every random draw: weights, data order, kernel, sampling.
  config.seed = 0
  # What to run, in this order, of "sft", "reward_model", "preference",
  # "evaluate", "export".
  config.stages = ("sft", "preference", "evaluate", "export")
  # Updates of the preference stage. Exactly one of num_steps and num_epochs.
  config.num_steps = config_dict.placeholder(int)
  # Passes over data.path in the preference stage. None: num_steps decides.
  config.num_epochs = config_dict.placeholder(float)
  # Prompts per update, over all devices and hosts.
  config.batch_size = 16
  # Folder of the tokenised data and the reference log-probs, which runs share.
  # None: the environment's MCPO_CACHE, or else ~/.cache/mcpo_jax, and with
  # several processes the workdir's own .cache/mcpo_jax.
  config.cache_dir = config_dict.placeholder(str)

  # --- Tokenizer --------------------------------------------------------------
  tokenizer = config.tokenizer = ml_collections.ConfigDict()
  # Folder, hub name or place in an object store of a Hugging Face tokenizer.
  # None: the one of model.path, or without model.path a byte-level BPE trained
  # on the data.
  tokenizer.path = config_dict.placeholder(str)
  # Tokens of a BPE that is trained here. Without effect on one that is loaded.
  tokenizer.vocab_size = 800
  # Jinja text, or a file with it, instead of the tokenizer's own template.
  # None: the tokenizer's own.
  tokenizer.chat_template = config_dict.placeholder(str)
  # JSON object of further variables of the template,
  # such as '{"enable_thinking": false}'. None: no further variables.
  tokenizer.chat_template_kwargs = config_dict.placeholder(str)
  # What a template is told is today (YYYY-MM-DD), so that runs do not drift.
  tokenizer.date = "2026-01-01"
  # BOS before a prompt, if the tokenizer puts one before plain text: "auto" (a
  # template that leaves it out is an error), "add" (put there all the same) or
  # "none" (whatever the template does).
  tokenizer.bos = "auto"

  # --- Proposal: the law the candidates were drawn from -----------------------
  proposal = config.proposal = ml_collections.ConfigDict()
  # Add log mu - log q to every candidate: mu is the reference, q the law of the
  # records' column `behaviour_logps` (nats, one per completion, no -inf).
  proposal.correction = False

  # --- Model ------------------------------------------------------------------
  model = config.model = ml_collections.ConfigDict()
  # Folder, hub name or place in an object store (gs://bucket/model, read there
  # and never copied to a disk) of Hugging Face weights; the architecture comes
  # from there. None: random weights of the shape given below.
  model.path = config_dict.placeholder(str)
  # Branch, tag or commit of a hub name; resolved once to a commit hash.
  # None: the main branch.
  model.revision = config_dict.placeholder(str)
  # Folder, or place in an object store, of LoRA adapters in PEFT's format,
  # trained on model.path: what is sampled from, and where training goes on
  # from. None: model.path alone.
  model.adapter_path = config_dict.placeholder(str)
  # Architecture without model.path: "llama", "mistral", "qwen2", "qwen3",
  # "gemma2" or "gemma3_text".
  model.family = "llama"
  # Width of the residual stream.
  model.hidden_size = 128
  # Decoder layers.
  model.num_layers = 3
  # Query heads.
  model.num_heads = 4
  # Key and value heads; divides num_heads.
  model.num_kv_heads = 2
  # Width of a head. None: hidden_size / num_heads.
  model.head_dim = config_dict.placeholder(int)
  # Width of the gated feed-forward layer.
  model.intermediate_size = 384
  # Longest sequence, in tokens.
  model.max_position_embeddings = 512
  # Base of the rotary frequencies.
  model.rope_theta = 10000.0
  # One matrix for the input embedding and the output head.
  model.tie_embeddings = True
  # Of the weights: "float32", or "bfloat16" beside a float32 copy in the
  # optimizer's state, to which updates are added.
  model.param_dtype = "float32"
  # Of the matrix products; log-probs and losses are float32 either way.
  model.compute_dtype = "float32"
  # Recompute in the backward pass: "none", "dots" (all but matrix products and
  # attention), "offload" (all but products, which wait in the host's memory) or
  # "full" (whole layers).
  model.remat = "dots"

  # --- LoRA: the preference stage trains adapters beside frozen weights -------
  # The stages sft and reward_model train all weights. Adapters are float32.
  lora = config.lora = ml_collections.ConfigDict()
  # Of the adapters. None: those of model.adapter_path, or else none, and all
  # weights are trained.
  lora.rank = config_dict.placeholder(int)
  # A projection adds alpha / rank times its adapter. None: twice the rank.
  lora.alpha = config_dict.placeholder(float)
  # Which projections have one, of "q_proj", "k_proj", "v_proj", "o_proj",
  # "gate_proj", "up_proj" and "down_proj". Empty: all.
  lora.targets = ()

  # --- Data of the preference stage -------------------------------------------
  data = config.data = ml_collections.ConfigDict()
  # Training records: a file (.jsonl, .jsonl.gz, .parquet) or a pattern, both
  # also in an object store (gs://bucket/*.jsonl, fetched once into the cache),
  # the folder or hub name of a `datasets` set, or "embedded:quickstart/train";
  # or several with commas between, each taken *weight times:
  # "a.jsonl*2.5,b.jsonl" takes rows of a two or three times, of b once.
  # Required.
  data.path = config_dict.placeholder(str)
  # Records of prompts that are never trained on, named as in path.
  # None: eval_fraction of path.
  data.eval_path = config_dict.placeholder(str)
  # Without eval_path: share of the prompts of path, and of sft.data_path, that
  # is held out. A hash of the prompt decides, so that both files hold out the
  # same prompts, and no stage trains on a row of a held-out prompt (a BPE that
  # is trained here does see their text).
  data.eval_fraction = 0.0
  # Layout of path: "native", "pairs", "nectar", "ultrafeedback",
  # "generated_responses", "nemo", "hh", "unpaired", "sft", "tokens", "prompts"
  # (alone, for samples) or "auto" (each row by its columns).
  data.format = "auto"
  # Layout of eval_path, likewise.
  data.eval_format = "auto"
  # Branch, tag or commit of a hub name in path and eval_path. None: main.
  data.revision = config_dict.placeholder(str)
  # Which candidate is the preferred one: "best" by score, "top_k" (drawn among
  # the top_k best at every visit), or "index" (the record's own).
  data.preferred = "best"
  # Size of the draw if preferred is "top_k". None: without effect.
  data.top_k = config_dict.placeholder(int)
  # Prompt tokens, template included.
  data.max_prompt_length = 128
  # Completion tokens, EOS included.
  data.max_completion_length = 256
  # A longer prompt: "error", "skip" (counted), "left" or "right" (cut there).
  data.prompt_overlength = "error"
  # A longer completion: "error", "skip" (counted) or "truncate" (no EOS then).
  data.completion_overlength = "truncate"
  # Reasoning before the answer: "keep", "strip" or "mask" (seen, not scored).
  data.think = "keep"
  # Set bad rows aside in quarantine.jsonl instead of stopping at them.
  data.quarantine = False
  # Whether quarantine.jsonl also holds the text of those rows.
  data.quarantine_text = False
  # Share of quarantined rows above which the run stops all the same.
  data.max_quarantined_share = 0.001
  # Token slots of one packed stream; holds a longest prompt and completion.
  data.stream_length = 2048
  # Streams of one chunk, over all devices. A batch is cut into as many chunks
  # of num_streams x stream_length as it needs, and what is left into chunks of
  # a half, a fourth or an eighth of that length (while multiples of 128).
  # None: one for each of the mesh's data x fsdp parts.
  data.num_streams = config_dict.placeholder(int)

  # --- Objective --------------------------------------------------------------
  objective = config.objective = ml_collections.ConfigDict()
  # The loss, by its name in mcpo_jax/registry.py; several with weights
  # ("dpo*1.0,sft*0.1"), one blended into another over the stage
  # ("sft->mcpo"), or a function of your own ("my_file:my_loss").
  objective.name = "mcpo"
  # For all that follow: None is the objective's own default, and setting one
  # that the objective does not take is an error.
  # Reward scale, in reward per nat of log ratio. None: as said above.
  objective.beta = config_dict.placeholder(float)
  # Probability that a label is flipped, in [0, 0.5). None: as said above.
  objective.label_smoothing = config_dict.placeholder(float)
  # Divide log-probs by the completion's length. None: as said above.
  objective.length_average = config_dict.placeholder(bool)
  # Target margin as a share of beta (simpo, alphapo). None: as said above.
  objective.gamma_beta_ratio = config_dict.placeholder(float)
  # Which form of a loss that has several: rso, reward_rpo, pointwise, sppo.
  # None: as said above.
  objective.form = config_dict.placeholder(str)
  # Weight of the chosen one's negative log-likelihood. None: as said above.
  objective.sft_weight = config_dict.placeholder(float)
  # External score to reward (reward_rpo). None: as said above.
  objective.reward_scale = config_dict.placeholder(float)
  # External scores / this, then softmax (exo_reward, infonca, nca).
  # None: as said above.
  objective.reward_temperature = config_dict.placeholder(float)
  # On a chosen one less likely than under the reference (dpop).
  # None: as said above.
  objective.penalty = config_dict.placeholder(float)
  # Reward per token of length difference (r_dpo). None: as said above.
  objective.length_weight = config_dict.placeholder(float)
  # Of f_dpo: "reverse_kl", "forward_kl", "js" or "alpha".
  # None: as said above.
  objective.divergence = config_dict.placeholder(str)
  # Of f_dpo, alphapo, tdpo2, ra_dpo2 and pmpo; each says what it weighs.
  # None: as said above.
  objective.alpha = config_dict.placeholder(float)
  # Of mirror_po: "log" or "tsallis". None: as said above.
  objective.potential = config_dict.placeholder(str)
  # Order of the Tsallis potential (mirror_po). None: as said above.
  objective.q = config_dict.placeholder(float)
  # Temperature of a loss (discopop, dft, dft2). None: as said above.
  objective.tau = config_dict.placeholder(float)
  # Of slic_hf, in nats. None: as said above.
  objective.margin = config_dict.placeholder(float)
  # Weight of the odds ratio (orpo, asft). None: as said above.
  objective.odds_weight = config_dict.placeholder(float)
  # rrhf divides log-probs by length to this power. None: as said above.
  objective.length_power = config_dict.placeholder(float)
  # Weight of good completions (kto). None: as said above.
  objective.desirable_weight = config_dict.placeholder(float)
  # Weight of bad completions (kto). None: as said above.
  objective.undesirable_weight = config_dict.placeholder(float)
  # Share of the newest value in a moving average (bco, compositional, dft,
  # dft2). None: as said above.
  objective.moving_rate = config_dict.placeholder(float)
  # Share of the reference against the policy of the round before (inpo).
  # None: as said above.
  objective.ratio = config_dict.placeholder(float)
  # Weight of the tokens past the shorter one's length (ld_dpo).
  # None: as said above.
  objective.tail_weight = config_dict.placeholder(float)
  # Quantile above which a token counts as risk (ra_dpo1, ra_dpo2).
  # None: as said above.
  objective.confidence = config_dict.placeholder(float)
  # Weight of the size of learned masks (sparse_po). None: as said above.
  objective.mask_penalty = config_dict.placeholder(float)
  # One learned mask for rewards and divergence (sparse_po).
  # None: as said above.
  objective.shared_mask = config_dict.placeholder(bool)

  # --- Monte Carlo kernel: which candidates become negatives ------------------
  kernel = config.kernel = ml_collections.ConfigDict()
  # "mc" (by weight), "max", "min", "random", "fixed_worst" (lowest score of
  # the data), "all" (every negative), "pool" (ties too, for listwise losses)
  # or a function of your own ("my_file:my_kernel"). None: the objective's own.
  kernel.strategy = config_dict.placeholder(str)
  # Of all that follow down to repulsion, setting one that the strategy does not
  # read is an error.
  # What weights a candidate: "reward" (beta times log ratio) or "policy_logp",
  # either also with "_per_token". None: "reward".
  kernel.score = config_dict.placeholder(str)
  # Let the preferred completion be drawn too. None: the objective's own.
  kernel.include_preferred = config_dict.placeholder(bool)
  # Weights are softmax(score / temperature). Towards 0: max, large: random.
  # None: 1.
  kernel.temperature = config_dict.placeholder(float)
  # How it moves to temperature_end over the stage: "constant", "linear" or
  # "geometric". None: "constant".
  kernel.temperature_schedule = config_dict.placeholder(str)
  # Temperature of the last update. None: the schedule is constant.
  kernel.temperature_end = config_dict.placeholder(float)
  # One step of a chain: "categorical" (among all), "metropolis" or "barker"
  # (accept one candidate or stay), or "self_repellent" (categorical, what was
  # drawn often weighs less). None: "categorical".
  kernel.transition = config_dict.placeholder(str)
  # Steps of a chain, each over a block of candidates of its own. None: 1.
  kernel.num_steps = config_dict.placeholder(int)
  # Candidates of a step; num_steps * block_size at most the pool's.
  # None: all, for one step.
  kernel.block_size = config_dict.placeholder(int)
  # Where chains start: at the "preferred" completion, where they stood at the
  # example's last visit ("persistent"), or drawn by weight ("model", a
  # diagnostic). None: "preferred".
  kernel.init = config_dict.placeholder(str)
  # Strength of self_repellent. None: 1 for self_repellent, else not used.
  kernel.repulsion = config_dict.placeholder(float)
  # Negatives per prompt and update.
  kernel.num_negatives = 1
  # How often the negatives are drawn anew: "step", "epoch", or every so many
  # steps ("20"): drawn then by the weights of the first of them, and stored.
  kernel.refresh = "step"
  # How the pool gets the scores that negatives are drawn by: "separate" (a pass
  # without gradient), "together" (one pass, whose activations are kept for the
  # gradient), "sampler" (online: the log-probs that came with the samples, for
  # the first update after them) or "auto" (whichever costs fewest FLOPs and
  # fits).
  kernel.scoring = "auto"

  # --- Reference: the fixed policy that the reward is measured from -----------
  reference = config.reference = ml_collections.ConfigDict()
  # "cached" (log-probs on disk; offline only), "resident" (weights in memory)
  # or "lora_base" (the policy without its adapters, no further weights); online
  # also "previous_round" (the weights that wrote the candidates) or "ema" (a
  # moving average over rounds, with LoRA of the adapters).
  # None: "cached", which scores each candidate once, if the objective needs a
  # reference; online or where it needs the weights "lora_base", if training
  # starts from the base, or else "resident".
  reference.source = config_dict.placeholder(str)
  # Share of the old average at every round (ema). None: 0.9.
  reference.ema_decay = config_dict.placeholder(float)
  # Its weights, as model.path. None: those the preference stage starts from.
  reference.path = config_dict.placeholder(str)

  # --- Optimizer of the preference stage --------------------------------------
  config.optimizer = _optimizer()

  # --- Supervised stage: the start of the preference stage --------------------
  sft = config.sft = ml_collections.ConfigDict()
  # Records to imitate, as data.path. Required by the stage.
  sft.data_path = config_dict.placeholder(str)
  # Layout of data_path, as data.format.
  sft.data_format = "auto"
  # Updates of the stage.
  sft.num_steps = 900
  # Completions per update, over all devices and hosts.
  sft.batch_size = 32
  # Its own optimizer, with the fields of config.optimizer.
  sft.optimizer = _optimizer()

  # --- Reward model: a stage that learns scores from preferences --------------
  reward_model = config.reward_model = ml_collections.ConfigDict()
  # Records with preferences, as data.path. Required by the stage; what it
  # trains lies in <workdir>/reward_model/model, for reward.path.
  reward_model.data_path = config_dict.placeholder(str)
  # Layout of data_path, as data.format.
  reward_model.data_format = "auto"
  # Share of its prompts that is held out for its accuracy, by the same hash as
  # data.eval_fraction; prompts that are held out there are not trained on.
  reward_model.eval_fraction = 0.1
  # Updates of the stage, from what sft ends with, or else from the model.
  reward_model.num_steps = 900
  # Prompts per update, each with one negative; over all devices and hosts.
  reward_model.batch_size = 32
  # Its own optimizer, with the fields of config.optimizer.
  reward_model.optimizer = _optimizer()

  # --- Mesh: devices along each axis; one of them may be -1 (all that is left)
  mesh = config.mesh = ml_collections.ConfigDict()
  # Replicas of the weights; streams are split over data and fsdp.
  mesh.data = -1
  # Shards of weights and optimizer state.
  mesh.fsdp = 1
  # Parts of each stream's tokens, for long sequences; each has a part of the
  # shards too.
  mesh.context = 1
  # Shards of heads, feed-forward width and vocabulary.
  mesh.tensor = 1

  # --- Generation: how completions are sampled --------------------------------
  generation = config.generation = ml_collections.ConfigDict()
  # Of the softmax over tokens; 0 is greedy.
  generation.temperature = 1.0
  # Sample among the likeliest tokens that hold this share of probability.
  generation.top_p = 1.0
  # Sample among the k likeliest tokens. 0: all.
  generation.top_k = 0
  # Sample among tokens at least this share as likely as the likeliest.
  generation.min_p = 0.0
  # Above 1 makes tokens of the prompt and of the completion so far less likely.
  generation.repetition_penalty = 1.0
  # No stop token before this many tokens.
  generation.min_new_tokens = 0
  # Texts that end a sample and are left out of it.
  generation.stop = ()
  # Longest sample, in tokens. None: data.max_completion_length.
  generation.max_new_tokens = config_dict.placeholder(int)
  # Samples per prompt.
  generation.num_samples = 1
  # Devices, the last ones, that sample for online rounds and nothing else; the
  # mesh is made of the others. None: the mesh samples too.
  generation.num_devices = config_dict.placeholder(int)
  # Shards of heads and feed-forward width on devices of its own.
  generation.tensor = 1
  # A server of the verb `serve` that samples for online rounds and is handed
  # every round's weights, such as "http://127.0.0.1:8000". None: this process
  # samples.
  generation.url = config_dict.placeholder(str)
  # Folder for those weights, which the server sees under the same name.
  # None: in the workdir.
  generation.spool = config_dict.placeholder(str)
  # File with the server's token. None: MCPO_SERVE_TOKEN of the environment.
  generation.token_path = config_dict.placeholder(str)
  # Seconds without an answer after which the run gives the server up, what is
  # done kept. A server that restarts must have its weights loaded by then.
  generation.patience_s = 300.0

  # --- Generate: the verb that writes candidates to JSON Lines ----------------
  generate = config.generate = ml_collections.ConfigDict()
  # Prompts to sample for, named as in data.path; completions that the records
  # have are not used. None: data.path.
  generate.data_path = config_dict.placeholder(str)
  # Layout of data_path, as data.format; also "prompts": `prompt` alone.
  generate.data_format = "auto"
  # generation.num_samples candidates of every prompt are drawn at each of
  # these. Empty: at generation.temperature.
  generate.temperatures = ()
  # Prompts that are sampled, scored and committed together: what a killed run
  # does again at most.
  generate.prompts_per_shard = 64
  # Processes that share the prompts, each with a workdir of its own; the files
  # of all parts, one after the other, are the file of one process.
  generate.num_parts = 1
  # Which of the parts this process makes, from 0.
  generate.part = 0

  # --- Reward: scores sampled texts -------------------------------------------
  reward = config.reward = ml_collections.ConfigDict()
  # "slot_coverage", "exact_match" (final answers against the column `answer`),
  # "length" (tokens), "nearest_candidate" (the score of the known completion of
  # its prompt that a sample is most like), "candidate_margin" (likeness to the
  # closest good one minus that to the closest bad one), "reward_model",
  # "remote", "judge" (win rates against the other samples of a prompt), a
  # function of your own ("module:function"), or a weighted sum
  # ("exact_match,length*-0.01"). None: samples are not scored.
  reward.name = config_dict.placeholder(str)
  # Pattern file of "slot_coverage". None: not used.
  reward.patterns_path = config_dict.placeholder(str)
  # Sequence-classification folder of "reward_model", as model.path; scored
  # completions of "nearest_candidate" and "candidate_margin", as data.path.
  # None: not used.
  reward.path = config_dict.placeholder(str)
  # Where "remote" posts samples to. None: not used.
  reward.url = config_dict.placeholder(str)
  # Of "judge", who tells the better of two: "module:function" or a URL.
  # None: not used.
  reward.judge = config_dict.placeholder(str)
  # Seconds for one answer of a URL.
  reward.timeout_s = 30.0
  # Seconds that a URL without an answer is asked again before the run ends,
  # its samples kept. One that answers wrongly is asked four times.
  reward.patience_s = 300.0
  # Taken from the score of samples that were cut off at their longest length.
  reward.missing_eos_penalty = 0.0
  # Taken from the score for every token of a sample.
  reward.length_penalty = 0.0
  # What is scored of a model that thinks first: its "answer", its "thinking"
  # or "both".
  reward.thinking = "answer"

  # --- Online: candidates are sampled from the policy while it trains ---------
  online = config.online = ml_collections.ConfigDict()
  # OnMC-PO: a round samples candidates for prompts of data.path, scores them
  # by `reward`, prefers the best, and trains on the sets as offline.
  online.enabled = False
  # Prompts of a round.
  online.prompts_per_round = 64
  # Those that are sampled together; a run that is stopped in a round keeps the
  # parts that are done.
  online.prompts_per_part = 256
  # Times that a round's sets are trained on.
  online.epochs_per_round = 1
  # Candidates of a prompt, the preferred one included.
  online.num_candidates = 8
  # Samples of a prompt, of which rejection keeps some. None: as many as there
  # are sampled candidates.
  online.num_samples = config_dict.placeholder(int)
  # Share of the candidates that is sampled; the others come from the record,
  # scored anew by `reward`.
  online.online_fraction = 1.0
  # What is preferred: the best by "score", or the preferred completion of the
  # "data" (SPIN), which then is the one candidate that is not sampled.
  online.preferred = "score"
  # Rounds between the weights that sample and those that train: 0 samples and
  # trains in turn, 1 samples the next round while one is trained on.
  online.policy_lag = 0
  # Earlier rounds whose sets are trained on again.
  online.replay_rounds = 0
  # Share of the reference in the log-probs sampled from (Nash-MD, IPO-MD).
  online.mixture = 0.0
  # Sample by weights ahead of the policy by this many times its last round's
  # change (accelerated preference optimization).
  online.extrapolation = 0.0
  # Keep samples by statistical rejection (RSO) with this temperature of the
  # reward. None: keep all.
  online.rejection_beta = config_dict.placeholder(float)
  # A second reward that is only watched, by a name as reward.name.
  # None: there is none.
  online.judge = config_dict.placeholder(str)
  # On an alarm "warn" or "stop". The limits follow.
  online.alarm = "warn"
  # Nats from the reference, of a sample.
  online.max_kl = 50.0
  # Mean implicit reward of preferred completions below 0.
  online.max_chosen_drop = 2.0
  # Length of samples against the first round, either way.
  online.max_length_ratio = 2.0
  # Share of sets without a better candidate.
  online.max_tied_share = 0.9
  # Share of a sample's trigrams of tokens that it had before.
  online.max_repetition = 0.5
  # Nats of a token, between sampler and trainer.
  online.max_logp_gap = 0.1

  # --- Evaluation -------------------------------------------------------------
  evaluation = config.evaluation = ml_collections.ConfigDict()
  # Updates between two evaluations inside the preference stage.
  evaluation.every_steps = 100
  # Held-out prompts of an evaluation, the first ones. None: all.
  evaluation.num_prompts = config_dict.placeholder(int)
  # Prompts whose samples are written beside those of the start.
  evaluation.num_display = 4
  # Evaluations without a better one after which the stage ends. None: never.
  evaluation.patience = config_dict.placeholder(int)
  # Updates between two comparisons of the drawn negatives' gradient with that
  # of the whole pool (estimator/*), which costs several gradients of the pool.
  # None: never.
  evaluation.estimator_every_steps = config_dict.placeholder(int)

  # Further models beside the start and the aligned one, each "NAME=WHERE" or
  # WHERE alone: the workdir of another run, a folder or hub name of Hugging
  # Face weights, "step:N" (a checkpoint of this run) or "step:*" (all that are
  # kept, for reward against KL). Read by the verb and stage evaluate alone, as
  # the next two.
  evaluation.models = ()
  # Name of the model that the others are to win against. None: the start.
  evaluation.baseline = config_dict.placeholder(str)
  # What scores samples, named as reward.name. None: reward.name.
  evaluation.reward = config_dict.placeholder(str)

  # --- Benchmark: answers for a judge elsewhere, and what the judge said ------
  benchmark = config.benchmark = ml_collections.ConfigDict()
  # Whose questions the models of an evaluation answer: "alpaca_eval",
  # "arena_hard_v0.1", "arena_hard_v2.0", "mt_bench" or "gsm8k". None: none's.
  benchmark.name = config_dict.placeholder(str)
  # File of the questions as the benchmark ships them. Required with a name.
  benchmark.questions_path = config_dict.placeholder(str)
  # What its judge wrote about these answers: a file, or a pattern for several
  # models. None: not judged yet.
  benchmark.judgments_path = config_dict.placeholder(str)
  # Answers of the baseline that its judge compared with, as the benchmark ships
  # them, or a pattern for several: for win rates at equal lengths where
  # judgments do not hold both texts (Arena-Hard, MT-Bench). None: without.
  benchmark.baseline_path = config_dict.placeholder(str)
  # Of the answers. None: generation.temperature, for mt_bench its own of each
  # category.
  benchmark.temperature = config_dict.placeholder(float)
  # Longest answer, in tokens. None: generation.max_new_tokens.
  benchmark.max_new_tokens = config_dict.placeholder(int)

  # --- Checkpoints ------------------------------------------------------------
  checkpoint = config.checkpoint = ml_collections.ConfigDict()
  # Updates between two saves; the last update is always saved.
  checkpoint.every_steps = 100
  # Newest checkpoints that stay on disk, at least 2.
  checkpoint.keep = 3
  # Also keep the one that evaluated best, and export that one.
  checkpoint.keep_best = False
  # A save that takes longer ends the run: the storage hangs.
  checkpoint.timeout_seconds = 1800.0
  # Place of this run in an object store, gs://bucket/run, that has every
  # checkpoint, online round and export too, and metrics.jsonl: a fresh workdir,
  # on another machine, goes on from there. Hosts that share no disk need it.
  # gs:// needs gcsfs, s3:// needs s3fs. None: checkpoints lie in the workdir.
  checkpoint.mirror = config_dict.placeholder(str)
  # Told to stop, a run has so long to save before it is ended.
  checkpoint.grace_seconds = 25.0

  # --- Watchdog: what takes longer ends the run, which says where it stands ---
  # None: nothing does.
  watchdog = config.watchdog = ml_collections.ConfigDict()
  # Of the first update, which compiles the programs.
  watchdog.compile_seconds = 7200.0
  # Of every other update.
  watchdog.step_seconds = 1800.0
  # Of a round of candidates, an evaluation, a part of the reference log-probs,
  # and of what the others wait for the first process to do.
  watchdog.work_seconds = 21600.0

  # --- Export -----------------------------------------------------------------
  export = config.export = ml_collections.ConfigDict()
  # Of the exported weights: "float32" or "bfloat16". None: model.param_dtype.
  export.dtype = config_dict.placeholder(str)

  # --- Logs: metrics.jsonl always; the others need their extra installed ------
  log = config.log = ml_collections.ConfigDict()
  # Updates between two lines.
  log.every_steps = 10
  # Updates between two whose candidates, weights and draws are kept for
  # candidates.html; a row of it is about as large as the texts.
  log.candidates_every_steps = 1
  # Write TensorBoard events to the workdir too.
  log.tensorboard = False
  # Send to Weights & Biases too.
  log.wandb = False

  # --- Serve: the verb that answers requests over HTTP ------------------------
  serve = config.serve = ml_collections.ConfigDict()
  # Address to listen at: this machine alone unless `public` is set.
  serve.host = "127.0.0.1"
  # TCP port. 0: any free one, told in the log.
  serve.port = 8000
  # Allow an address that others can reach. Nothing is encrypted.
  serve.public = False
  # File with the token that clients send, in one line.
  # None: the environment's MCPO_SERVE_TOKEN. One of the two is needed.
  serve.token_path = config_dict.placeholder(str)
  # What clients call the model.
  serve.model_name = "policy"
  # Samples that are decoded together, about.
  serve.num_slots = 64
  # Samples that may be under way or waiting; further requests get a 503.
  serve.max_samples = 4096
  # Tokens decoded between two looks at what has come in: fewer answer sooner
  # and free the slots of a client that left, more decode faster.
  serve.tokens_per_step = 8
  # Longest body of a request, in MiB; weights may be as long as they are.
  serve.max_body_mib = 8
  # Seconds a body may take to come in, and one more for each MiB.
  serve.body_seconds = 30.0
  # Seconds that requests under way have to end in after SIGTERM.
  serve.grace_seconds = 25

  # --- Compare: a table of settings beside each other, over seeds -------------
  compare = config.compare = ml_collections.ConfigDict()
  # One run per row and seed: "NAME | key=value key=value", with settings that
  # differ from this config; and optional parts "| seeds=0,1,2" (instead of
  # compare.seeds) and "| grid: key=value,value" (trials, chosen on half of the
  # held-out prompts and reported on the other half).
  compare.rows = ()
  # Row that the others are tested against. None: the first.
  compare.reference = config_dict.placeholder(str)
  # Seeds of every row that names none.
  compare.seeds = (0, 1, 2)
  # Runs at a time, each on its share of the cores.
  compare.jobs = 1
  # What is compared: a number of the runs' summary.json.
  compare.metric = "score/aligned"
  # Minutes after which no further run begins. None: no limit.
  compare.minutes = config_dict.placeholder(int)

  config.lock()
  return config
