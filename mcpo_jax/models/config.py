"""What a decoder is, as a frozen value, and its two layouts on disk.

`from_hf` reads the dictionary of a config.json, in the old layout (rope_theta,
rope_scaling, torch_dtype) or the new one (rope_parameters, dtype). `to_hf`
writes the old one, which transformers 4 and 5 both read. A feature that the
decoder does not have is refused by name, never ignored.
"""

import dataclasses
import math
import re
from typing import Any

from mcpo_jax import errors

NO_WINDOW = 2**30  # a window wider than any stream


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. Hashable, so that it can be a static argument of jit."""

  family: str  # the model_type of config.json
  vocab_size: int  # rows of the embedding table
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int = 2048
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  rope_scaling: tuple[tuple[str, Any], ...] = ()  # sorted items, () = none
  local_rope_theta: float | None = None  # of layers with a window, if other
  sliding_window: int | None = None
  local_layers: tuple[bool, ...] = ()  # which have the window; () = none
  qkv_bias: bool = False
  out_bias: bool = False  # on the output projection of attention
  mlp_bias: bool = False
  qk_norm: bool = False  # RMSNorm on each head's queries and keys
  norm_offset: bool = False  # norms multiply by 1 + w
  post_norms: bool = False  # norms also after attention and MLP
  embedding_scale: bool = False  # embeddings times sqrt(hidden_size)
  query_scalar: float | None = None  # scores / sqrt of it; head_dim if None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  activation: str = "silu"  # or "gelu_tanh"
  tied_head: bool = False
  reward_head: bool = False  # a head of one number, not the language head
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int | None = None

  @property
  def attention_scale(self) -> float:
    return (self.query_scalar or self.head_dim) ** -0.5

  @property
  def windows(self) -> tuple[int, ...]:
    """The window of each layer."""
    local = self.local_layers or (False,) * self.num_layers
    return tuple(
        self.sliding_window if is_local else NO_WINDOW for is_local in local
    )


# What a family is, whatever its config.json says, and what it takes for a key
# that is absent.
_GEMMA = dict(
    norm_offset=True,
    post_norms=True,
    embedding_scale=True,
)
_TRAITS = {
    "llama": {},
    "mistral": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True),
    "gemma2": _GEMMA,
    "gemma3_text": dict(_GEMMA, qk_norm=True),
}
_GEMMA_DEFAULTS = dict(
    tie_word_embeddings=True,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    hidden_activation="gelu_pytorch_tanh",
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
)
_DEFAULTS = {
    "llama": dict(bos_token_id=1, eos_token_id=2),
    "mistral": dict(
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=4096,
        max_position_embeddings=131072,
    ),
    "qwen2": dict(max_position_embeddings=32768),
    "qwen3": dict(head_dim=128, max_position_embeddings=32768),
    "gemma2": dict(
        _GEMMA_DEFAULTS,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=8192,
    ),
    "gemma3_text": dict(
        _GEMMA_DEFAULTS,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        sliding_window_pattern=6,
        max_position_embeddings=131072,
    ),
}
FAMILIES = tuple(_TRAITS)

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Keys that a reader handles, by family; the first row is common to all.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_KEYS = {
    "all": {
        *_SIZES,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "initializer_range",
        "layer_types",
        "hidden_act",
        "attention_dropout",  # only dropout 0 is taken
        "attn_implementation",
    },
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers"},
    "qwen3": {
        "attention_bias",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
    },
    "gemma2": {
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "hidden_activation",
        "query_pre_attn_scalar",
        "sliding_window",
    },
    "gemma3_text": {
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "hidden_activation",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",  # beside layer_types, which hold
    },
}
_MOST = 2**31 - 1
# What the value of a key must be, if it is not null.
_WHOLE = {*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings",
          "sliding_window", "sliding_window_pattern", "max_window_layers"}
_REAL = {"rms_norm_eps", "rope_theta", "rope_local_base_freq",
         "initializer_range", "attn_logit_softcapping",
         "final_logit_softcapping", "query_pre_attn_scalar"}
_TABLES = {"rope_scaling", "rope_parameters", "quantization_config"}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
_FEATURE = re.compile(
    r"rope|rotary|window|cap|bias|scal|norm|attn|attention|expert|moe|layer"
    r"|head|act$|activation|dropout|adapter|mlp|ffn|multiplier"
)


def from_hf(raw: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
  """The configuration that a config.json describes.

  Args:
    raw: its dictionary.
    where: its path, for messages.

  Raises:
    ModelDirError: `hf.config` for a family or size that is missing;
      `hf.feature` for a setting that the decoder does not have; `hf.dtype` for
      quantised weights.
  """
  family = raw.get("model_type")
  if not isinstance(family, str) or family not in _TRAITS:
    raise errors.ModelDirError(
        "hf.config",
        "the model_type is not supported",
        where=where,
        got=family,
        want=f"one of {', '.join(FAMILIES)}",
    )
  _check_values(raw, where)
  if raw.get("quantization_config"):
    method = raw["quantization_config"].get("quant_method")
    raise errors.ModelDirError(
        "hf.dtype",
        "the weights are quantised",
        where=f"{where}: quantization_config",
        got=method,
        want="float32, float16 or bfloat16 weights",
    )
  known = _KEYS["all"] | _KEYS[family]
  for key, value in raw.items():
    if key not in known and value and _FEATURE.search(key):
      raise _feature(where, key, value)
  missing = [key for key in _SIZES if not isinstance(raw.get(key), int)]
  if missing:
    raise errors.ModelDirError(
        "hf.config", "a size is missing", where=where, got=missing
    )

  get = {**_DEFAULTS[family], **raw}.get
  for key in ("attention_dropout", "use_bidirectional_attention"):
    if get(key):
      raise _feature(where, key, get(key))
  key = "hidden_activation" if "gemma" in family else "hidden_act"
  activation = get(key) or "silu"
  if activation not in _ACTIVATIONS:
    raise _feature(where, key, activation)

  layers = raw["num_hidden_layers"]
  local_layers = _local_layers(family, get, layers, where)
  heads = raw["num_attention_heads"]
  kv_heads = get("num_key_value_heads") or heads
  head_dim = get("head_dim") or raw["hidden_size"] // heads
  if heads % kv_heads or not head_dim:
    raise errors.ModelDirError(
        "hf.config", "the heads do not divide", where=where,
        got=f"hidden_size {raw['hidden_size']}, {heads} heads, {kv_heads} of "
        "keys and values")
  bias = bool(get("attention_bias"))
  eos = get("eos_token_id")
  traits = dict(_TRAITS[family])
  return ModelConfig(
      family=family,
      vocab_size=raw["vocab_size"],
      hidden_size=raw["hidden_size"],
      intermediate_size=raw["intermediate_size"],
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      max_positions=get("max_position_embeddings") or 2048,
      rms_norm_eps=get("rms_norm_eps") or 1e-6,
      sliding_window=get("sliding_window") if any(local_layers) else None,
      local_layers=local_layers if any(local_layers) else (),
      qkv_bias=traits.pop("qkv_bias", bias),
      out_bias=bias,
      mlp_bias=bool(get("mlp_bias")),
      query_scalar=get("query_pre_attn_scalar"),
      attention_softcap=get("attn_logit_softcapping"),
      final_softcap=get("final_logit_softcapping"),
      activation=_ACTIVATIONS[activation],
      tied_head=bool(get("tie_word_embeddings")),
      initializer_range=get("initializer_range") or 0.02,
      bos_token_id=get("bos_token_id"),
      eos_token_ids=tuple(eos if isinstance(eos, list) else [eos])
      if eos is not None
      else (),
      pad_token_id=get("pad_token_id"),
      **_rope(get, where),
      **traits,
  )


def to_hf(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
  """The dictionary of a config.json, in the layout that every reader takes.

  Args:
    config: the decoder.
    dtype: name of the dtype of the weights beside it.
  """
  family = config.family
  keys = _KEYS["all"] | _KEYS[family]
  architecture = {
      "llama": "Llama",
      "mistral": "Mistral",
      "qwen2": "Qwen2",
      "qwen3": "Qwen3",
      "gemma2": "Gemma2",
      # The plain name, with a head of labels, is of images and text.
      "gemma3_text": "Gemma3Text" if config.reward_head else "Gemma3",
  }[family]
  head, labels = "ForCausalLM", {}
  if config.reward_head:
    head = "ForSequenceClassification"
    labels = dict(id2label={"0": "score"}, label2id={"score": 0})
  activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  local = config.local_layers or (False,) * config.num_layers
  eos = config.eos_token_ids
  values = dict(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      max_position_embeddings=config.max_positions,
      rms_norm_eps=config.rms_norm_eps,
      rope_theta=config.rope_theta,
      rope_scaling=dict(config.rope_scaling) or None,
      rope_local_base_freq=config.local_rope_theta,
      tie_word_embeddings=config.tied_head,
      initializer_range=config.initializer_range,
      attention_dropout=0.0,
      attention_bias=config.out_bias,
      mlp_bias=config.mlp_bias,
      hidden_act=activation[config.activation],
      hidden_activation=activation[config.activation],
      query_pre_attn_scalar=config.query_scalar,
      attn_logit_softcapping=config.attention_softcap,
      final_logit_softcapping=config.final_softcap,
      sliding_window=config.sliding_window,
      use_sliding_window=any(local),
      max_window_layers=local.index(True) if any(local) else len(local),
  )
  if family in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
    values["layer_types"] = [
        "sliding_attention" if is_local else "full_attention"
        for is_local in local
    ]
  if family == "gemma3_text" and False in local:
    values["sliding_window_pattern"] = local.index(False) + 1
  return {
      "architectures": [f"{architecture}{head}"],
      "model_type": family,
      **labels,
      **{key: value for key, value in values.items() if key in keys},
      "bos_token_id": config.bos_token_id,
      "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
      "pad_token_id": config.pad_token_id,
      "torch_dtype": dtype,
  }


def _feature(where: str, key: str, value: Any) -> errors.ModelDirError:
  return errors.ModelDirError(
      "hf.feature",
      f"the decoder does not have {key} = {value!r}",
      where=f"{where}: {key}",
      got=value,
  )


def _check_values(raw: dict[str, Any], where: str) -> None:
  """Refuses what no model can have, before anything is made of it.

  Raises:
    ModelDirError: `hf.config`.
  """
  whole = lambda x, low=1: type(x) is int and low <= x <= _MOST
  real = lambda x: type(x) in (int, float) and 0 < x < math.inf
  plain = lambda x: isinstance(x, dict) and all(
      v is None or isinstance(v, (str, bool)) or type(v) in (int, float)
      and abs(v) < math.inf or plain(v) for v in x.values())
  for key, value in raw.items():
    want = None
    if value is None:
      continue
    if key in _WHOLE and not whole(value, int(key != "max_window_layers")):
      want = f"a whole number above 0, at most {_MOST}"
    elif key == "num_hidden_layers" and value > 10_000:
      want = "at most 10000"
    elif key in _REAL and not real(value):
      want = "a finite number above 0"
    elif key in _TABLES and not plain(value):
      want = "a table of texts and finite numbers"
    elif key in _IDS and not all(whole(i, -1) for i in (
        value if key == "eos_token_id" and isinstance(value, list)
        else [value])):
      want = "a token id"
    elif key == "layer_types" and not (isinstance(value, list) and all(
        isinstance(kind, str) for kind in value)):
      want = "a list of names"
    elif key in ("hidden_act", "hidden_activation") and not isinstance(
        value, str):
      want = "a name"
    if want:
      raise errors.ModelDirError(
          "hf.config", "a value makes no sense", where=f"{where}: {key}",
          got=value if isinstance(value, (int, float)) else type(
              value).__name__, want=want)


def _local_layers(family, get, layers, where) -> tuple[bool, ...]:
  """Which layers have the sliding window."""
  window = get("sliding_window")
  if family == "mistral":
    local = [window is not None] * layers
  elif family in ("qwen2", "qwen3"):
    on = get("use_sliding_window") and window is not None
    first = get("max_window_layers")
    local = [bool(on) and i >= (28 if first is None else first)
             for i in range(layers)]
  elif family == "gemma2":
    local = [i % 2 == 0 for i in range(layers)]
  elif family == "gemma3_text":
    pattern = get("sliding_window_pattern") or 6
    local = [(i + 1) % pattern != 0 for i in range(layers)]
  else:
    local = [False] * layers
  kinds = get("layer_types")
  if kinds is None:
    return tuple(local)
  given = [kind == "sliding_attention" for kind in kinds]
  unknown = set(kinds) - {"sliding_attention", "full_attention"}
  fixed = family in ("llama", "mistral") and given != local
  off = any(given) and family in ("qwen2", "qwen3") and not get(
      "use_sliding_window"
  )
  if unknown or fixed or off or len(kinds) != layers:
    raise _feature(where, "layer_types", kinds)
  return tuple(given)


def _rope(get, where) -> dict[str, Any]:
  """rope_theta, rope_scaling and local_rope_theta from either layout."""
  theta = get("rope_theta") or 10_000.0
  local_theta = get("rope_local_base_freq")
  scaling = get("rope_scaling") or {}
  new = get("rope_parameters") or {}
  parts = ("full_attention", "sliding_attention")
  if any(not isinstance(new.get(part) or {}, dict) for part in parts):
    raise _feature(where, "rope_parameters", new)
  if "full_attention" in new or "sliding_attention" in new:
    local = dict(new.get("sliding_attention") or {})
    new = new.get("full_attention") or {}
    local_theta = local.pop("rope_theta", local_theta)
    if local.pop("rope_type", "default") != "default" or local:
      raise _feature(where, "rope_parameters", local)
  scaling = dict(scaling or new)
  theta = scaling.pop("rope_theta", None) or theta
  kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
  scaling.pop("type", None)
  for name, value in (("rope_theta", theta), ("local", local_theta),
                      *scaling.items()):
    if value is not None and type(value) not in (int, float):
      raise _feature(where, f"rope_parameters.{name}", value)
  if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
    raise _feature(where, "partial_rotary_factor", "other than 1")
  if kind == "default":
    if scaling:
      raise _feature(where, "rope_scaling", scaling)
    return dict(rope_theta=float(theta), local_rope_theta=local_theta)
  if not isinstance(kind, str) or kind not in _ROPE_KEYS:
    raise _feature(where, "rope_type", kind)
  if kind == "llama3":
    scaling.setdefault(
        "original_max_position_embeddings", get("max_position_embeddings")
    )
  if set(scaling) - {"original_max_position_embeddings"} != set(
      _ROPE_KEYS[kind]
  ) - {"original_max_position_embeddings"}:
    raise _feature(where, f"rope_type {kind}", scaling)
  items = {"rope_type": kind} | {key: scaling[key] for key in _ROPE_KEYS[kind]}
  return dict(
      rope_theta=float(theta),
      rope_scaling=tuple(sorted(items.items())),
      local_rope_theta=local_theta,
  )
