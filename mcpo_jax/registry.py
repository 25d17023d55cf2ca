"""What can be named in a config: objectives and what each of them needs.

An objective is a function `loss(features, batch, state, **settings) ->
(loss [B], aux, state)`. One line here says where it lives and what it needs;
nobody else pays for a need. This module imports neither JAX nor anything of
ours, so that a wrong name is refused before JAX is imported.
"""

from typing import Any, NamedTuple


class Setting(NamedTuple):
  """Default and range of one number, flag or word."""

  default: Any = None
  low: float | None = None
  high: float | None = None
  open_low: bool = False  # True: the low end itself is refused
  open_high: bool = False  # True: the high end itself is refused
  choices: tuple[Any, ...] | None = None
  optional: bool = False  # True: may be None in a config
  slug: str = "config.range"


class Objective(NamedTuple):
  """Where an objective lives and what it needs."""

  place: str  # "module:function"
  settings: dict[str, Setting]
  anchors: tuple[str, ...] = ("ref",)  # names in SetBatch.anchors
  terms: tuple[str, ...] = ()  # names in Features.terms, see `scoring.TERMS`
  contrast: bool = True  # skips sets without a negative
  scores: bool = False  # every candidate needs an external score
  strategy: str = "mc"  # kernel strategy unless the config names one
  strategies: tuple[str, ...] | None = None  # None: any but "none", "pool"
  pairwise: bool = False  # exactly one negative
  per_token: bool = False  # its reward is a mean over tokens
  replace: bool = False  # draws with replacement
  include_preferred: bool = False  # the preferred is in the candidate set
  mismatched: bool = False  # one more slot: another prompt's completion
  separable: bool = True  # loss[b] depends on set b alone
  state: str = ""  # "module:function", num_examples -> first state
  parameters: str = ""  # "module:function", of parameters that it learns
  progress: bool = False  # takes `progress`, updates done / num_steps
  reduce: str = "sets"  # the step divides by the global count of these
  members: tuple[tuple[float, str], ...] = ()  # of a mixture: (weight, name)


_POSITIVE = Setting(low=0.0, open_low=True)
_FLAG = Setting(choices=(True, False))


def _above_zero(default: float) -> Setting:
  return _POSITIVE._replace(default=default)


def _at_least_zero(default: float) -> Setting:
  return Setting(default, 0.0)


def _share(default: float) -> Setting:
  """In [0, 1]."""
  return Setting(default, 0.0, 1.0)


BETA = _above_zero(0.1)
SMOOTHING = Setting(0.0, 0.0, 0.5, open_high=True)


def _pair(function: str, module: str = "pairwise", **more: Any) -> Objective:
  """A loss on slot 0 and one negative."""
  settings = more.pop("settings", {})
  return Objective(
      f"mcpo_jax.objectives.{module}:{function}",
      {"beta": BETA} | settings,
      strategy="fixed_worst",
      pairwise=True,
      **more,
  )


def _free(function: str, settings: dict, **more: Any) -> Objective:
  """A pairwise loss without a reference."""
  return Objective(
      f"mcpo_jax.objectives.reference_free:{function}",
      settings,
      anchors=(),
      strategy="fixed_worst",
      pairwise=True,
      **more,
  )


def _list(
    function: str, settings: dict, *, anchors=("ref",), scores=True, **more: Any
) -> Objective:
  """A loss on the whole pool, ties included."""
  return Objective(
      f"mcpo_jax.objectives.listwise:{function}",
      settings,
      anchors=anchors,
      scores=scores,
      strategy="pool",
      strategies=("pool",),
      **more,
  )


CORE = {
    "mcpo": Objective("mcpo_jax.objectives.softmax:rnce_loss", {"beta": BETA}),
    "rnce": Objective(
        "mcpo_jax.objectives.softmax:rnce_loss",
        {"beta": BETA},
        strategy="all",
        strategies=("all",),
    ),
    "cd": Objective(
        "mcpo_jax.objectives.softmax:cd_loss",
        {"beta": BETA},
        strategies=("mc",),
        replace=True,
        include_preferred=True,
    ),
    "sft": Objective(
        "mcpo_jax.objectives.supervised:sft_loss",
        {},
        anchors=(),
        contrast=False,
        strategy="none",
        strategies=("none",),
        reduce="tokens",
    ),
    "bradley_terry": Objective(
        "mcpo_jax.objectives.bradley_terry:bradley_terry_loss",
        {},
        anchors=(),
        strategy="random",
        strategies=("random", "all"),
    ),
}

PAIRWISE = {
    "dpo": _pair("dpo_loss", settings={"label_smoothing": SMOOTHING}),
    "robust_dpo": _pair(
        "robust_dpo_loss",
        settings={"label_smoothing": SMOOTHING._replace(default=0.1)},
    ),
    "ipo": _pair(
        "ipo_loss", settings={"length_average": _FLAG._replace(default=False)}
    ),
    "hinge": _pair("hinge_loss"),
    "rso": _pair(
        "rso_loss",
        settings={
            "beta": _above_zero(0.05),
            "form": Setting("sigmoid", choices=("sigmoid", "hinge")),
        },
    ),
    "exo_pair": _pair(
        "exo_pair_loss",
        settings={
            "label_smoothing": SMOOTHING._replace(
                default=1e-3, open_low=True
            )
        },
    ),
    "nca_pair": _pair(
        "nca_pair_loss", "levels", settings={"beta": _above_zero(0.01)}
    ),
    "aot": _pair(
        "aot_loss",
        "transport",
        settings={"beta": _above_zero(0.01), "label_smoothing": SMOOTHING},
        separable=False,
    ),
    "aot_unpaired": _pair(
        "aot_unpaired_loss",
        "transport",
        settings={"beta": _above_zero(0.01), "label_smoothing": SMOOTHING},
        separable=False,
    ),
    "apo_zero": _pair("apo_zero_loss", "levels"),
    "apo_down": _pair("apo_down_loss", "levels"),
    "rpo": _pair(
        "rpo_loss",
        "levels",
        settings={
            "sft_weight": _at_least_zero(1.0),
            "length_average": _FLAG._replace(default=True),
        },
    ),
    "reward_rpo": _pair(
        "reward_rpo_loss",
        settings={
            "reward_scale": _above_zero(1.0),
            "form": Setting(
                "backward", choices=("backward", "forward", "squared")
            ),
        },
        scores=True,
    ),
    "dpop": _pair(
        "dpop_loss", "levels", settings={"penalty": _at_least_zero(50.0)}
    ),
    "r_dpo": _pair("r_dpo_loss", settings={"length_weight": Setting(0.05)}),
    "sigmoid_norm": _pair(
        "sigmoid_norm_loss",
        settings={"beta": _above_zero(5.0)},
        per_token=True,
    ),
    "f_dpo": _pair(
        "f_dpo_loss",
        settings={
            "divergence": Setting(
                "forward_kl",
                choices=("reverse_kl", "forward_kl", "js", "alpha"),
            ),
            "alpha": Setting(0.5, 0.0, 1.0, open_low=True, open_high=True),
        },
    ),
    "cal_dpo": _pair(
        "cal_dpo_loss", "levels", settings={"beta": _above_zero(0.001)}
    ),
    "mirror_po": _pair(
        "mirror_po_loss",
        settings={
            "potential": Setting("log", choices=("log", "tsallis")),
            "q": Setting(0.5, 0.0, 1.0, open_low=True, open_high=True),
        },
    ),
}

DISCOVERED = {
    "discopop": _pair(
        "discopop_loss",
        "discovered",
        settings={"beta": _above_zero(0.05), "tau": _above_zero(0.05)},
    ),
    "dbaql": _pair("dbaql_loss", "discovered", separable=False),
    "aql": _pair("aql_loss", "discovered", separable=False),
    "aqfl": _pair("aqfl_loss", "discovered", separable=False),
    "padll": _pair("padll_loss", "discovered"),
    "cell": _pair("cell_loss", "discovered"),
    "pfl": _pair("pfl_loss", "discovered"),
}

REFERENCE_FREE = {
    "simpo": _free(
        "simpo_loss",
        {"beta": _above_zero(2.0), "gamma_beta_ratio": _at_least_zero(0.5)},
        per_token=True,
    ),
    "alphapo": _free(
        "alphapo_loss",
        {
            "beta": _above_zero(2.5),
            "alpha": Setting(0.25, -10.0, 10.0),
            "gamma_beta_ratio": _at_least_zero(0.04),
        },
        per_token=True,
    ),
    "slic_hf": _free(
        "slic_hf_loss",
        {"margin": _at_least_zero(1.0), "sft_weight": _at_least_zero(0.1)},
    ),
    "cpo": _free(
        "cpo_loss", {"beta": BETA, "sft_weight": _at_least_zero(1.0)}
    ),
    "orpo": _free(
        "orpo_loss", {"odds_weight": _at_least_zero(0.1)}, per_token=True
    ),
    "asft": _free(
        "asft_loss",
        {"beta": _above_zero(1.0), "odds_weight": _at_least_zero(1.0)},
        per_token=True,
    ),
}

LISTWISE = {
    "exo_reward": _list(
        "exo_reward_loss",
        {"beta": _above_zero(0.5), "reward_temperature": _above_zero(0.5)},
    ),
    "infonca": _list(
        "infonca_loss",
        {"beta": _above_zero(0.01), "reward_temperature": _above_zero(0.01)},
    ),
    "nca": _list(
        "nca_loss",
        {"beta": _above_zero(0.01), "reward_temperature": _above_zero(0.01)},
    ),
    "plackett_luce": _list("plackett_luce_loss", {"beta": _above_zero(0.05)}),
    "lipo": _list("lipo_loss", {"beta": _above_zero(0.05)}),
    "all_pairs": _list("all_pairs_loss", {"beta": BETA}),
    "best_vs_rest": _list("best_vs_rest_loss", {"beta": BETA}, scores=False),
    "pointwise": _list(
        "pointwise_loss",
        {
            "beta": BETA,
            "form": Setting("mse", choices=("mse", "sigmoid")),
        },
        contrast=False,
    ),
    "rrhf": _list(
        "rrhf_loss",
        {"sft_weight": _at_least_zero(1.0), "length_power": _share(1.0)},
        anchors=(),
        per_token=True,
    ),
}

UNPAIRED = {
    "kto": Objective(
        "mcpo_jax.objectives.unpaired:kto_loss",
        {
            "beta": BETA,
            "desirable_weight": _at_least_zero(1.0),
            "undesirable_weight": _at_least_zero(1.0),
        },
        contrast=False,
        strategy="fixed_worst",
        mismatched=True,
        separable=False,
    ),
    "bco": Objective(
        "mcpo_jax.objectives.unpaired:bco_loss",
        {"beta": BETA, "moving_rate": _share(0.1)},
        contrast=False,
        strategy="fixed_worst",
        separable=False,
        state="mcpo_jax.objectives.unpaired:bco_state",
    ),
}

# Estimates of log Z that move with every visit of a prompt.
MOVING = {
    "compositional": Objective(
        "mcpo_jax.objectives.moving:compositional_loss",
        {"beta": BETA, "moving_rate": _share(0.85)},
        strategy="all",
        strategies=("all", "random"),
        separable=False,
        state="mcpo_jax.objectives.moving:log_z_state",
    ),
    "dft": Objective(
        "mcpo_jax.objectives.moving:dft_loss",
        {"tau": _above_zero(1.0), "moving_rate": _share(0.85)},
        strategy="all",
        strategies=("all", "random"),
        separable=False,
        state="mcpo_jax.objectives.moving:log_z_state",
    ),
    "dft2": Objective(
        "mcpo_jax.objectives.moving:dft2_loss",
        {"tau": _above_zero(0.3), "moving_rate": _share(0.9)},
        anchors=(),
        strategy="all",
        strategies=("all", "random"),
        separable=False,
        per_token=True,
        state="mcpo_jax.objectives.moving:log_z_state",
    ),
}

# Written for several rounds. "prev" is the policy of the round before; in the
# first round, and so offline, that is the reference.
ROUNDS = {
    "sppo": _pair(
        "sppo_loss",
        "rounds",
        settings={
            "beta": _above_zero(0.001),
            "form": Setting("hard", choices=("hard", "win_rate")),
        },
        anchors=("prev",),
    ),
    "inpo": _pair(
        "inpo_loss",
        "rounds",
        settings={
            "beta": _above_zero(0.0075),
            "ratio": _share(1 / 3),
        },
        anchors=("ref", "prev"),
    ),
    "dno": _pair("dno_loss", "rounds", anchors=("prev",), scores=True),
    "spin": _pair("spin_loss", "rounds", anchors=("prev",)),
}

_CONFIDENCE = Setting(0.95, 0.0, 1.0, open_high=True)

# Settings of a term or of learned parameters stand with the loss's own.
TOKEN_LEVEL = {
    "wpo": _pair(
        "wpo_loss",
        "token_level",
        settings={"beta": _above_zero(0.01)},
        terms=("collision",),
    ),
    "ld_dpo": _pair(
        "ld_dpo_loss",
        "token_level",
        settings={"tail_weight": _share(0.5)},
        terms=("prefix", "ref_prefix"),
    ),
    "tdpo1": _pair("tdpo1_loss", "token_level", terms=("kl",)),
    "tdpo2": _pair(
        "tdpo2_loss",
        "token_level",
        settings={"alpha": _at_least_zero(0.5)},
        terms=("kl",),
    ),
    "ra_dpo1": _pair(
        "ra_dpo1_loss",
        "token_level",
        settings={"confidence": _CONFIDENCE},
        terms=("risk",),
    ),
    "ra_dpo2": _pair(
        "ra_dpo2_loss",
        "token_level",
        settings={"alpha": _at_least_zero(0.5), "confidence": _CONFIDENCE},
        terms=("risk",),
    ),
    "sparse_po": _pair(
        "sparse_po_loss",
        "token_level",
        settings={
            "mask_penalty": _at_least_zero(0.0),
            "shared_mask": _FLAG._replace(default=False),
        },
        anchors=(),
        terms=("masked_ratio", "masked_kl", "mask_size"),
        parameters="mcpo_jax.objectives.token_level:sparse_po_parameters",
    ),
    "pmpo": Objective(
        "mcpo_jax.objectives.token_level:pmpo_loss",
        {"beta": _above_zero(0.5), "alpha": _share(0.5)},
        anchors=(),
        terms=("kl",),
        scores=True,
        strategy="pool",
        strategies=("pool",),
    ),
}

OBJECTIVES: dict[str, Objective] = (
    CORE | PAIRWISE | DISCOVERED | REFERENCE_FREE | LISTWISE | UNPAIRED
    | MOVING | ROUNDS | TOKEN_LEVEL
)

# Terms that are computed with the reference, so that its weights must be
# resident: a cache holds the log-probs of the completions alone.
REFERENCE_TERMS = frozenset(
    ("kl", "risk", "masked_ratio", "masked_kl", "mask_size", "ref_prefix"))

# Kernel strategy -> does it need the current policy's scores of the pool?
STRATEGIES = {
    "mc": True,
    "max": True,
    "min": True,
    "random": False,
    "fixed_worst": False,
    "all": False,  # every negative
    "pool": False,  # every candidate in its slot, ties included
    "none": False,
}
SCORES = ("reward", "policy_logp", "reward_per_token", "policy_logp_per_token")
TRANSITIONS = ("categorical", "metropolis", "barker", "self_repellent")
INITS = ("preferred", "persistent", "model")


class Reward(NamedTuple):
  """A reward that the project brings along."""

  place: str  # "module:factory"
  needs: tuple[str, ...] = ()  # keys of the config's group reward
  takes: tuple[str, ...] = ()


REWARDS = {
    "slot_coverage": Reward(
        "mcpo_jax.rewards.slot_coverage:make_slot_coverage",
        needs=("patterns_path",)),
    "exact_match": Reward("mcpo_jax.rewards.answers:make_exact_match"),
    "length": Reward("mcpo_jax.rewards.answers:make_length"),
    "nearest_candidate": Reward(
        "mcpo_jax.rewards.known_candidates:make_nearest_candidate",
        needs=("path",)),
    "candidate_margin": Reward(
        "mcpo_jax.rewards.known_candidates:make_candidate_margin",
        needs=("path",)),
    "reward_model": Reward(
        "mcpo_jax.rewards.model:make_reward_model", needs=("path",)),
    "remote": Reward(
        "mcpo_jax.rewards.remote:make_remote", needs=("url",),
        takes=("timeout_s", "patience_s")),
    "judge": Reward(
        "mcpo_jax.rewards.judge:make_judge", needs=("judge",),
        takes=("timeout_s", "patience_s")),
}
