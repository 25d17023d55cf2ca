"""Where the time of a decoding step goes, in milliseconds of CPU time.

  python benchmarks/decode_parts.py --model=fx/small/model

The step of 8 prompts with 8 samples each, prompts of 256 tokens, 64 own tokens:
as it is, with attention that gives its queries back, and with the hidden states
for logits; what they lack is the difference. Beside it the products with the
weights alone, and the speed of one large product: what this core can do at
best. The engine's own program on one core: `taskset -c 0`, and the settings of
launch/run_local.sh.
"""

import argparse
import pathlib
import sys
import time
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's code, whatever is installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from mcpo_jax.generation import sampling  # noqa: E402
from mcpo_jax.models import attention, decoder, hf  # noqa: E402

GROUPS, SLOTS, PROMPT, OWN = 8, 8, 256, 64
STEPS = 16  # of one call
ROUNDS = 7


def milliseconds(function, *args, count: int = 1) -> float:
  """CPU time of the fastest of some calls, over `count`."""
  compiled, best = jax.jit(function), float("inf")
  jax.block_until_ready(compiled(*args))
  for _ in range(ROUNDS):
    start = time.process_time()
    jax.block_until_ready(compiled(*args))
    best = min(best, time.process_time() - start)
  return 1e3 * best / count


def steps(config, params, cache, tokens):
  """Some steps, each after the one before."""
  owners = jnp.repeat(jnp.arange(GROUPS), PROMPT // decoder.PAGE)[None]
  starts = jnp.tile(
      decoder.PAGE * jnp.arange(PROMPT // decoder.PAGE), GROUPS)[None]
  pages = decoder.Pages(owners, starts)
  lengths = jnp.full(GROUPS, PROMPT)

  def one(i, carry):
    cache, tokens = carry
    out, cache = decoder.decode_step(
        params, config, cache, pages, tokens, lengths,
        jnp.full(tokens.shape, OWN), OWN + i)
    # The next step needs this one, and all of it.
    return cache, jnp.where(jnp.isnan(out).any(-1), 1, tokens)

  return jax.lax.fori_loop(0, STEPS, one, (cache, tokens))


def products(config, params, x):
  """All products of a step with weights, and no more that matters."""
  linear = lambda x, weights: x @ weights["kernel"]
  for layer in params["layers"]:
    heads = layer["attention"]
    q, k, v = (linear(x, heads[f"{name}_proj"]) for name in "qkv")
    x = linear(q, heads["o_proj"]) + 0 * (k.sum() + v.sum())
    mlp = layer["mlp"]
    x = linear(linear(x, mlp["gate_proj"]) + linear(x, mlp["up_proj"]),
               mlp["down_proj"])
  return decoder.head_logits(params, config, x)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", type=pathlib.Path, required=True)
  args = parser.parse_args()
  config = hf.load_config(args.model)
  params = decoder.unstack_layers(
      hf.load_params(args.model, config), jnp.float32)
  cache = decoder.init_cache(
      config, groups=GROUPS, slots=SLOTS, own_length=2 * OWN, parts=1,
      pages=GROUPS * PROMPT // decoder.PAGE)
  tokens = jnp.ones((GROUPS, SLOTS), jnp.int32)
  rows = GROUPS * SLOTS

  def step():
    return milliseconds(
        lambda *x: steps(config, *x), params, cache, tokens, count=STEPS)

  whole = step()
  with mock.patch.object(attention, "attend_cache", lambda q, *_, **__: q):
    no_attention = step()
  with mock.patch.object(decoder, "head_logits", lambda params, config, x: x):
    no_head = step()
  x = jax.random.normal(jax.random.key(0), (rows, config.hidden_size))
  weights = milliseconds(
      lambda *x: products(config, *x), params, x)
  zeros = jnp.zeros(rows, jnp.int32)
  asked = sampling.Rows(
      temperature=jnp.ones(rows), top_k=zeros, top_p=jnp.ones(rows),
      min_p=jnp.zeros(rows), repetition_penalty=jnp.ones(rows),
      stop_ids=zeros[:, None] - 1, may_stop=zeros == 0,
      keys=jax.random.split(jax.random.key(1), rows), positions=zeros)
  logits = jax.random.normal(jax.random.key(2), (rows, config.vocab_size))
  draw = milliseconds(sampling.draw, logits, asked)
  square = jnp.ones((2048, 2048))
  large = 2 * 2048**3 / milliseconds(jnp.matmul, square, square) / 1e6
  kernels = sum(
      leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      if path[-1].key == "kernel" or config.tied_head and (
          path[-1].key == "embedding"))
  flops = 2 * rows * kernels
  for name, ms in (
      ("decode_step", whole), ("  attention and cache", whole - no_attention),
      ("  head", whole - no_head), ("draw", draw),
      ("products with weights alone", weights),
      ("the same at the speed of a large product", flops / large / 1e6)):
    print(f"{name:42s} {ms:7.2f} ms")
  print(f"a large product: {large:.0f} GFLOP/s; products with weights: "
        f"{flops / weights / 1e6:.0f}")


if __name__ == "__main__":
  main()
