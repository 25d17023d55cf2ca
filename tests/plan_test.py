"""Plans: collectives of the real step, topologies, memory before compiling."""

import functools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases
from jax.experimental.compilation_cache import compilation_cache

from mcpo_jax import devices, errors, main, sharding
from mcpo_jax.generation import engine
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder
from mcpo_jax.planning import collectives, programs, topology, verb
from mcpo_jax.planning import sampler as planned_sampler
from mcpo_jax.training import stage as stage_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
needs_eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight (simulated) devices")


# Llama 3.2 1B with a head of its own.
CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=128256, hidden_size=2048, num_layers=16,
    num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192,
    max_positions=8192)


@functools.cache
def train_program(fsdp, tensor):
  """The MC-PO step's gradient at 1B shapes, four chunks of the head, compiled
  for 8 devices: weights and program."""
  mesh = sharding.make_mesh(data=-1, fsdp=fsdp, tensor=tensor)
  shapes = decoder.param_shapes(CONFIG)
  placed = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  shapes = jax.tree.map(programs.place, shapes, placed)
  model = stage_lib.Model(
      CONFIG, mesh, shapes, jnp.float32, "full", 8, 1024, 0)
  stage = cases.stage("mcpo")._replace(num_slots=3, num_examples=20)
  batch = programs.make_batch(
      batch_size=5, num_slots=3, prompt_length=20, completion_length=20)
  found = programs.training_programs(
      stage, model, stage_lib.make_functions(stage, model), batch)
  return programs.size(shapes), programs.compile_program(
      "train", *found["train"], mesh)


HLO = """HloModule jit_f
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = bf16[16,4] all-gather(%x), replica_groups={{0,1},{2,3}}
  %s = f32[4,4]{1,0} reduce-scatter(%y), replica_groups=[2,2]<=[4]
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %z)
}

%to_five (carry: (s32[], f32[8,4])) -> pred[] {
  %i = s32[] get-tuple-element(%carry), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%permuting (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %k = f32[9] custom-call(%x), frontend_attributes={kernel_metadata={
"blocks":"512"
}}, metadata={op_name="a kernel's metadata has lines of its own"}
  %q = (f32[2], f32[2], u32[]{:S(2)}, u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}

%to_eight (carry: (f32[8,4], u32[])) -> pred[] {
  %i = u32[] get-tuple-element(%carry), index=1
  %m = u32[]{:T(128)} constant(8)
  ROOT %lt = pred[] compare(%i, %m), direction=LT
}, execution_thread="of another unit"

%twice_a_turn (carry: (f32[8,4], u32[])) -> (f32[8,4], u32[]) {
  %two = u32[] constant(2)
  %u = u32[]{:T(128)} get-tuple-element(%carry), index=1
  %q.2 = f32[3] collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %next = u32[]{:T(128)} add(%u, %two)
  ROOT %t = (f32[8,4]{1,0:T(8,128)}, u32[]{:T(128)}) tuple(%z, %next)
}

%begin (p: f32[9]) -> f32[18] {
  %b = f32[18] all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}
}

%go_on (p: f32[9]) -> f32[18] {
  %c = f32[18] all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %f = f32[18] fusion(%p), calls=%begin
  %h = f32[18] fusion(%f), calls=%go_on
  %w = s32[] while(%i), body=%body, b={"known_trip_count":{"n":"7"}}
  %v = s32[] while(%i), condition=%to_five, body=%permuting
  %v.2 = (f32[8,4], u32[]) while(%i), condition=%to_eight, body=%twice_a_turn
  %ags = (f32[2,4], f32[8,4]) all-gather-start(%p), replica_groups=[1,4]<=[4]
  %agd = f32[8,4]{1,0} all-gather-done(%ags)
  %rv = (f32[5,3], u32[], token[]) recv(%p), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:1}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (f32[8,4], f32[3]) all-reduce(%v), replica_groups=m['a'=2,'b'=2] {'b'}
}
"""


def test_collectives_of_a_program_are_counted_by_hand():
  split, *counted = collectives.count(HLO, 4)  # one gather in two places
  between = [one for one in counted if one.payload == 60]
  assert between == [collectives.Collective("all-reduce", 60, 1, ((0, 2),))]
  assert between[0].crosses(2) and between[0].traffic == 60
  counted.remove(between[0])
  assert (split.kind, split.payload) == ("all-gather", 72)
  found = {one.kind + str(one.times): one for one in counted}
  assert len(counted) == len(found)
  assert set(found) == {
      "all-gather7", "reduce-scatter7", "all-gather1", "all-reduce1",
      "collective-permute5", "collective-permute4"}
  gathered = found["all-gather7"]
  assert (gathered.payload, gathered.groups) == (128, ((0, 1),))
  assert gathered.crosses(1) and not gathered.crosses(2)
  assert gathered.traffic == 7 * 128 / 2
  scattered = found["reduce-scatter7"]
  assert (scattered.payload, scattered.group) == (2 * 64, 2)
  assert found["all-gather1"].payload == 128
  assert found["all-gather1"].traffic == 128 * 3 / 4
  reduced = found["all-reduce1"]
  assert (reduced.payload, reduced.groups) == (128 + 12, ((0, 1),))
  assert reduced.traffic == 140  # twice around half of the ring
  ring = found["collective-permute5"]  # 1 to 2 is the first to leave a slice
  assert ring.crosses(2) and not found["collective-permute4"].crosses(2)
  assert collectives.received(list(found.values())) == {
      "all-gather": 7 * 64 + 96, "reduce-scatter": 7 * 64,
      "all-reduce": 140, "collective-permute": 5 * 8 + 4 * 12}


@pytest.mark.parametrize("name, chip, slices, devices", [
    ("v5e:4x4", "v5e", 1, 16), ("2xv5e:4x4", "v5e", 2, 32),
    ("v5p:2x2x4", "v5p", 1, 16), ("tpu7x:2x2x1", "tpu7x", 1, 8),
    ("h200:8", "h200", 1, 8), ("2xh100:8", "h100", 2, 16),
])
def test_a_topology_is_read_from_its_name(name, chip, slices, devices):
  found = topology.parse(name)
  assert (found.chip, found.slices, found.num_devices) == (
      chip, slices, devices)


@pytest.mark.parametrize("name", [
    "v5e", "v5e:16", "v5litepod-16", "v5e:4x4x4", "v5p:4x4", "v9:4x4",
    "h200:2x4", "0xv5e:4x4", "v5e:0x4", "h200:", ""])
def test_an_unknown_topology_names_those_there_are(name):
  with pytest.raises(errors.ConfigError) as caught:
    topology.parse(name)
  assert caught.value.slug == "plan.topology"
  assert "v5e:4x4" in str(caught.value) and "h200:8" in str(caught.value)


LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "bos_token_id": 128000,
    "eos_token_id": 128001}


@pytest.fixture
def tpu_compiler(monkeypatch):
  """Compiles for TPUs in a process set up as that of the verb, but with the
  compiler's least effort: less than half the time, the same collectives, and
  for the 8B step up to 0.93 GiB less memory than with the usual one."""
  pytest.importorskip("libtpu", reason="needs the TPU compiler, libtpu")
  environment = dict(os.environ)
  topology.prepare(environment)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it asks but once whether it is used
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  yield
  jax.config.update("jax_exec_time_optimization_effort", 0.0)
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


def plan(folder, name, *overrides):
  """The 8B MC-PO config of this repository, its shape without weights."""
  (folder / "config.json").write_text(json.dumps(LLAMA_8B))
  config = main.read_config(main.parse([
      "plan", f"--config={ROOT / 'configs' / 'llama3_8b_nectar_mcpo.py'}",
      f"--config.model.path={folder}",
      *(f"--config.{text}" for text in overrides)]))
  verb.plan(config, name, 1.2, folder)
  return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name, overrides, slug, numbers", [
    # 8 B parameters with AdamW and gradients in float32 are 128 GB.
    ("v5e:2x2", ["data.num_streams=4"], "plan.memory", ["15.75", "devices"]),
    ("v5e:4x4", ["data.num_streams=8"], "config.divisible", ["got 8", "= 16"]),
    ("v5e:4x4", ["mesh.fsdp=3"], "config.mesh", ["fsdp=3", "16 devices"]),
    ("v5e:4x4", ["mesh.fsdp=1", "mesh.tensor=16", "mesh.data=1"],
     "config.divisible", ["got 16", "8 key-value heads"]),
    ("v5p:3x5x7", ["data.num_streams=105"], "plan.topology", ["v5p:3x5x7"]),
])
def test_what_cannot_be_is_said_before_compiling(
    tmp_path, monkeypatch, tpu_compiler, name, overrides, slug, numbers):
  monkeypatch.setattr(
      programs, "compile_program", lambda *_: pytest.fail("compiled"))
  with pytest.raises(errors.McpoError) as caught:
    plan(tmp_path, name, *overrides)
  assert caught.value.slug == slug
  assert all(number in str(caught.value) for number in numbers)


TINY = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}


def test_a_step_that_needs_too_much_is_refused_with_what_fits_instead(
    tmp_path, monkeypatch):
  """Compiled for simulated devices, whose memory is what the test says."""
  (tmp_path / "config.json").write_text(json.dumps(TINY))
  monkeypatch.setattr(topology, "open_devices", lambda _: jax.devices()[:2])

  def planned(memory, streams):
    monkeypatch.setitem(devices.DEVICES, "h100", devices.DEVICES[
        "h100"]._replace(memory=memory))
    config = main.read_config(main.parse([
        "plan", f"--config={ROOT / 'configs' / 'llama3_8b_nectar_mcpo.py'}",
        f"--config.model.path={tmp_path}", "--config.batch_size=6",
        "--config.data.stream_length=32768",
        "--config.data.max_prompt_length=32",
        "--config.data.max_completion_length=32",
        "--config.data.eval_fraction=0.0",
        f"--config.data.num_streams={streams}"]))
    verb.plan(config, "h100:2", None, tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    return max(found[f"plan/{part}/peak_bytes"] for part in ("score", "train"))

  limit = planned(2**30, 2)
  with pytest.raises(errors.ResourceError) as caught:
    planned(limit, 4)
  assert caught.value.slug == "plan.memory"
  told = str(caught.value)
  assert "the function score does not fit a device of h100:2" in told
  assert "fits with --config.data.num_streams=2 --config.model.remat=full" in (
      told)
  with pytest.raises(errors.ResourceError, match="no smaller chunk fits"):
    planned(limit - 1, 2)


def test_what_the_tpu_compiler_finds_too_large_comes_back_as_not_fitting(
    tpu_compiler):
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=(
      topology.open_devices(topology.parse("v5e:1x1"))))
  x = programs.place(jax.ShapeDtypeStruct((2**15, 2**15), np.float32),
                     sharding.replicated(mesh))
  product = jax.jit(lambda x: (x @ x, x.T @ x, x @ x.T, x.T @ x.T))
  program = programs.compile_program("product", product, (x,), mesh)
  assert not program.fits
  # The argument, four products, and one transposed.
  assert program.peak == pytest.approx(6 * 2**32, rel=0.01)


def test_the_8b_step_fits_sixteen_chips_of_v5e(
    tmp_path, tpu_compiler, capsys):
  # Without held-out prompts nothing is sampled.
  found = plan(
      tmp_path, "v5e:4x4", "data.num_streams=16", "data.stream_length=2048",
      "data.max_prompt_length=512", "data.eval_fraction=0.0")
  told = capsys.readouterr().out
  peaks = {name: float(peak) for name, peak in re.findall(
      r"(\w+) .*, peak ([\d.]+) GiB of 15.75 GiB", told)}
  assert set(peaks) == {"score", "train", "update"}
  # Weights, AdamW and gradients in float32 are 16 bytes of each parameter.
  assert 16 * 8.03e9 / 16 / 2**30 < min(peaks.values())
  assert peaks["train"] == max(peaks.values()) < 15.75 - 1
  assert "at 1.2 a chip-hour" in told
  # In bfloat16 a pass gathers 15 of 16 parts of every weight, training two
  # times, and scatters the gradients. A ring of permutes sends 17 parts; the
  # rest is the embeddings of a chunk, added up over the devices.
  part = 2 * found["plan/params"] / 16
  assert 15 < found["plan/score/received_bytes"] / part < 17
  assert 3 * 15 < found["plan/train/received_bytes"] / part < 3 * 17


def test_without_a_compiler_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(topology, "_installed", lambda module: False)
  for name, extra in (("v5e:4x4", "mcpo_jax[tpu]"), ("h200:8", "plan-gpu")):
    with pytest.raises(errors.ResourceError) as caught:
      topology.open_devices(topology.parse(name))
    assert caught.value.slug == "plan.compiler" and extra in str(caught.value)


@needs_eight
def test_fully_sharded_training_sends_the_weights_three_times_and_no_more():
  """Gathered forward and backward, gradients scattered. XLA:CPU writes a
  scattered sum as a whole one, of which each device keeps its part."""
  weights, program = train_program(8, 1)
  size = lambda kind: sum(one.times * one.payload for one in program.collectives
                          if kind in one.kind)
  assert size("all-gather") > 1.3 * weights
  assert size("") <= 1.1 * 3 * weights


@needs_eight
@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (2, 2)])
def test_logits_stay_split_over_the_vocabulary(fsdp, tensor):
  _, program = train_program(fsdp, tensor)
  assert f"f32[2048,{CONFIG.vocab_size // 8}]" in program.text
  wide = [line for line in program.text.splitlines()
          if re.search(r" (all-gather|all-reduce)(-start)?\(", line)
          and re.search(rf"= f32\[.*\b{CONFIG.vocab_size}\b.*\]", line)]
  assert not wide


# --- the sampler --------------------------------------------------------------


@needs_eight
def test_the_sampler_that_is_planned_is_the_one_that_runs():
  """Shapes and places of the weights, the cache and the slots are those of an
  engine with a full queue."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  config = config_lib.ModelConfig(
      family="llama", vocab_size=48, hidden_size=16, num_layers=3, num_heads=4,
      num_kv_heads=2, head_dim=8, intermediate_size=24, max_positions=256)
  shapes = decoder.param_shapes(config)
  placed = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  model = stage_lib.Model(
      config, mesh, jax.tree.map(programs.place, shapes, placed), jnp.float32,
      "full", 8, 64, 0)
  planned, cache, slots = planned_sampler.sampling_programs(
      model, samples=3, prompts=30, num_slots=24, prompt_length=70,
      completion_length=40)

  own = engine.Engine(
      config, ((decoder.init_params(jax.random.key(0), config), 1.0),), 0,
      max_new_tokens=40, stop_ids=[1], num_slots=24, mesh=mesh)
  for i in range(30):
    own.submit(engine.Request(
        i, np.full(70, 2, np.int32), np.array([0, i], np.uint32), np.arange(3),
        Sampling(max_new_tokens=40, min_new_tokens=40), 0))
  for number in (20, 19):  # the second stretch needs the longest cache
    own.step(number)
  assert own.num_active == slots
  assert sum(x.addressable_shards[0].data.nbytes
             for x in jax.tree.leaves(own._memory.caches)) == cache

  (params,), weights, memory, held, *_ = planned["decode"][1]
  short = lambda tree: [
      (x.shape, x.dtype, x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(tree)]
  deep = planned_sampler.DEPTH
  cut = own._memory._replace(caches=tuple(
      decoder.Cache(*(layers[:deep] for layers in c))
      for c in own._memory.caches))
  assert short(memory) == short(cut)
  real = own._models[0]
  assert short(params) == short(real | {"layers": real["layers"][:deep]})
  assert [x.shape for x in jax.tree.leaves(held)] == [
      x.shape for x in jax.tree.leaves(own._slots)]
  for name, found in planned.items():
    assert programs.compile_program(name, *found, mesh).fits
