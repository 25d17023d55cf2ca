"""Mesh, sharding rules as data, and arrays that span hosts.

A rule table is a list of (regular expression, PartitionSpec). The first
expression that is found in a parameter's path, "layers/mlp/up_proj/kernel",
decides. Rules are applied to ShapeDtypeStructs, so nothing is allocated.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mcpo_jax import errors, hosts

AXES = ("data", "fsdp", "context", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))
STREAM_SPEC = PartitionSpec(("data", "fsdp"), "context")
HOST_MEMORY = "pinned_host"  # JAX's name of the memory kind

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with axes "data", "fsdp", "context", "tensor" of Auto type.

  Args:
    data: size of the axis that only splits the batch.
    fsdp: size of the axis that splits the batch and the weights.
    tensor: size of the axis that splits heads and hidden units. One of the
      four may be -1: whatever number of devices is left.
    context: size of the axis that splits the tokens of a stream and, with
      fsdp, the weights.
    devices: the devices to use; all of them by default.

  Where the devices are several slices, with a slow network between them, the
  data axis spans the slices as far as it goes, and the fsdp axis the rest.

  Raises:
    ConfigError: `config.mesh`, if the sizes do not multiply to the number of
      devices, or the slices do not divide data times fsdp.
    ResourceError: `device.mixed`, the devices are of several kinds.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(AXES, (data, fsdp, context, tensor)))
  shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
  unknown = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(unknown) > 1 or any(
      size < 1 for size in sizes.values() if size != -1
  ):
    raise errors.ConfigError(
        "config.mesh",
        "mesh sizes are whole numbers above 0, and at most one is -1",
        where="config.mesh",
        got=shown,
    )
  if unknown and len(devices) % known == 0:
    sizes[unknown[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise errors.ConfigError(
        "config.mesh",
        f"the mesh {shown} does not fit the {len(devices)} devices",
        where="config.mesh",
        got=known,
        want=f"{'a divisor of ' if unknown else ''}{len(devices)} devices",
        hint="set one axis to -1 to take what is left",
    )
  return Mesh(
      arrange_devices(sizes, devices),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
  )


def arrange_devices(
    sizes: dict[str, int], devices: Sequence[jax.Device]
) -> np.ndarray:
  """The devices as an array of those sizes, neighbours near each other.

  Args:
    sizes: of all of AXES; their product is the number of devices.
    devices: see make_mesh.

  Raises:
    ConfigError, ResourceError: see make_mesh.
  """
  kinds = collections.Counter(d.device_kind for d in devices)
  if len(kinds) > 1:
    raise errors.ResourceError(
        "device.mixed",
        "a mesh is of devices of one kind",
        where="config.mesh",
        got=", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items())),
        hint="start the run on hosts that are alike",
    )
  slices = collections.Counter(
      getattr(d, "slice_index", 0) or 0 for d in devices)
  number = len(slices)
  if number == 1:
    return mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
  outer = dict.fromkeys(AXES, 1)
  outer["data"] = math.gcd(sizes["data"], number)
  outer["fsdp"] = number // outer["data"]
  if sizes["fsdp"] % outer["fsdp"] or len(set(slices.values())) > 1:
    shown = ", ".join(f"{n} devices" for n in slices.values())
    raise errors.ConfigError(
        "config.mesh",
        f"the {number} slices ({shown}) do not divide the mesh axes"
        f" data={sizes['data']} x fsdp={sizes['fsdp']}",
        where="config.mesh.data",
        got=sizes["data"],
        want=f"a multiple of {number}, in slices of one size",
    )
  return mesh_utils.create_hybrid_device_mesh(
      tuple(sizes[name] // outer[name] for name in AXES),
      tuple(outer.values()),
      devices,
      allow_split_physical_axes=True,
  )


def connect(mesh: Mesh) -> None:
  """Has the processes of a mesh find each other, group by group.

  The first message of a group waits no longer than half a minute for all of it
  to come (gloo, jax 0.10.2), later ones as long as it takes; here all come at
  once.
  """
  axes = [name for name in AXES if mesh.shape[name] > 1]
  groups = [group for n in range(1, len(axes) + 1)
            for group in itertools.combinations(axes, n)]
  one = put_global(np.ones((), np.int32), replicated(mesh))

  @jax.jit
  @functools.partial(
      jax.shard_map, mesh=mesh, in_specs=PartitionSpec(),
      out_specs=PartitionSpec(), check_vma=False)
  def total(x):
    return [jax.lax.psum(x, group) for group in groups]

  program = total.lower(one).compile()
  hosts.meet("the mesh")
  jax.block_until_ready(program(one))
  multihost_utils.sync_global_devices("the mesh")


def path_name(path: tuple) -> str:
  """A pytree path as "layers/mlp/up_proj/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def infer_shardings(shapes: Any, rules: Rules, mesh: Mesh) -> Any:
  """The sharding of every array of a tree, by its path.

  Args:
    shapes: tree of ShapeDtypeStructs or arrays.
    rules: list of (regular expression, PartitionSpec); the first match holds.
    mesh: from make_mesh.

  Returns:
    A tree of NamedShardings of the same structure.

  Raises:
    ConfigError: `config.sharding_rule` for a path that no rule matches;
      `config.divisible` for a dimension that its mesh axes do not divide.
  """

  def one(path, shape):
    name = path_name(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        _check_divisible(name, shape.shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise errors.ConfigError(
        "config.sharding_rule",
        "no sharding rule matches a parameter",
        where=name,
        got=tuple(shape.shape),
    )

  return jax.tree_util.tree_map_with_path(one, shapes)


def _check_divisible(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
  if len(spec) > len(shape):
    raise errors.ConfigError(
        "config.sharding_rule",
        f"the rule {spec} has more entries than the array has axes",
        where=name,
        got=tuple(shape),
    )
  for axis, names in enumerate(spec):
    names = (names,) if isinstance(names, str) else tuple(names or ())
    parts = math.prod(mesh.shape[n] for n in names)
    if shape[axis] % parts:
      raise errors.ConfigError(
          "config.divisible",
          f"axis {axis} of size {shape[axis]} is not divisible by the mesh"
          f" axes {' x '.join(f'{n}={mesh.shape[n]}' for n in names)}",
          where=name,
          got=shape[axis],
          want=f"a multiple of {parts}",
          hint="change config.mesh",
      )


def optimizer_shardings(
    tx: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
  """Shardings of tx.init(params): moments as their parameter, else replicated.

  jit(tx.init) without them puts every moment whole on one device. What is no
  longer of the parameter's shape, as adafactor's factors, is small.

  Args:
    tx: the optimizer.
    params: tree of arrays or ShapeDtypeStructs.
    shardings: tree of NamedShardings of the same structure.
  """
  whole = replicated(jax.tree.leaves(shardings)[0].mesh)
  return optax.tree_map_params(
      tx,
      lambda x, param, sharding: (
          sharding if x.shape == param.shape else whole
      ),
      jax.eval_shape(tx.init, params),
      params,
      shardings,
      transform_non_params=lambda _: whole,
  )


def check_host_memory(mesh: Mesh, where: str) -> None:
  """Refuses what is to lie in the hosts' memory where devices do not reach it.

  Args:
    mesh: from make_mesh.
    where: the setting that asks for it.

  Raises:
    ResourceError: device.
  """
  device = mesh.local_devices[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if HOST_MEMORY not in kinds:
    raise errors.ResourceError(
        "device",
        "these devices cannot keep arrays in the memory of their host",
        where=where,
        got=f"{device.device_kind} with {', '.join(kinds)}",
        want=HOST_MEMORY,
        hint="model.remat=full and optimizer.name=adafactor save memory too",
    )


def on_host(shapes: Any) -> Any:
  """ShapeDtypeStructs in the memory of their devices' hosts; scalars stay."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST_MEMORY)
      )
      if x.shape
      else x,
      shapes,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 over "data" and "fsdp"."""
  return NamedSharding(mesh, BATCH_SPEC)


def stream_sharding(mesh: Mesh) -> NamedSharding:
  """Streams: axis 0 (S) over "data" and "fsdp", axis 1 (T) over "context"."""
  return NamedSharding(mesh, STREAM_SPEC)


def axis_size(name: str) -> int:
  """The size of an axis of the mesh in context; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def replicated(mesh: Mesh) -> NamedSharding:
  """Metadata of sets, scalars: the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def put_global(tree: Any, sharding: NamedSharding) -> Any:
  """Host arrays, equal on all hosts, as global arrays.

  Every process hands over the whole array and uploads only its own shards.

  Args:
    tree: tree of numpy arrays.
    sharding: one for all arrays of the tree.

  Raises:
    ConfigError: `config.divisible`, if an axis cannot be split evenly.
  """

  def one(path, array):
    array = np.asarray(array)
    _check_divisible(
        path_name(path), array.shape, sharding.spec, sharding.mesh
    )
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )

  return jax.tree_util.tree_map_with_path(one, tree)


def tracing_on(mesh: Mesh) -> Any:
  """A context for the body of a jitted function: `constrain` pins to the mesh.

  Unlike `jax.set_mesh` it stands inside the function, so that nobody who calls
  it can forget the mesh.
  """
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def traced_devices() -> tuple[str, int]:
  """(kind, number) of the devices that a function is being traced for.

  Of the mesh in context, which may be of devices that are not here; without
  one all devices of this process. The kind of a CPU is "cpu".
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.devices()[0].device_kind, jax.device_count()
  return mesh.abstract_device.device_kind, mesh.size


def axes_that_split(size: int) -> tuple[str, ...]:
  """The axes of the mesh in context over which an array axis of this size is
  split: as many as divide it together, those that split weights first."""
  mesh, axes = jax.sharding.get_abstract_mesh(), ()
  for axis in ("tensor", "fsdp", "context", "data"):
    more = (*axes, axis)
    if not mesh.empty and not size % math.prod(mesh.shape[a] for a in more):
      axes = more
  return axes


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
  """Pins x to a spec of the mesh in context; without a mesh, x unchanged."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
