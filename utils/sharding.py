"""Sharding: which device keeps which part of which array.

A mesh is a grid of devices with two named axes. Along `fsdp` every device keeps a part of each
weight and of the batch, and all-gathers a weight's rest for the moment it is used. Along `tp`
(tensor parallel) it keeps whole heads and MLP features, and computes with those alone. One table of
rules says which dimension of weights, adapters and the optimiser's state lies along which axis.

    mesh = sharding.make_mesh(fsdp=4, tp=2)
    model = hf.weights.load(name, mesh=mesh); lora.inject(model, ...); sharding.shard(model, mesh)
    train.fit(model, batches, ..., mesh=mesh)

You annotate, the compiler communicates. Without a mesh, what the model calls here does nothing.
"""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from utils import CourseError, unexpected

AXES = ("fsdp", "tp")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
TABLE = ("embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Per kind of layer, the mesh axes of outputs and inputs; the axis of layers is never split.

    Column-parallel layers (q, k, v, gate, up) split their outputs over `tp`, row-parallel ones (o,
    down) their inputs: a pair of them needs one sum over `tp` and nothing in between. An adapter
    follows its layer: B [out, R] has the outputs, A [R, in] the inputs; the rank is never split.
    """

    column: P = P("tp", "fsdp")  # [out, in]
    row: P = P("fsdp", "tp")
    table: P = P("tp", "fsdp")  # embedding and output layer [V, D]

    def spec(self, path: str, ndim: int) -> P:
        """The spec of a parameter, by its path's last names; replicated where no rule has them."""
        *_, module, leaf = ["", "", *(part for part in path.split(".") if part != "base")]
        for names, rule in ((COLUMN, self.column), (ROW, self.row), (TABLE, self.table)):
            if module in names:
                out, inputs = rule
                last = {"weight": (out, inputs), "lora_A": (None, inputs), "lora_B": (out, None)}
                spec = (last | {"bias": (out,)}).get(leaf, ())
                return P(*[None] * (ndim - len(spec)), *spec)
        return P()

    def sharding(
        self, mesh: Mesh, path: str, shape: tuple[int, ...], num_key_value_heads: int | None = None
    ) -> NamedSharding:
        """The sharding of a parameter. Raises `CourseError` for an axis that does not divide it.

        Where `num_key_value_heads` does not divide over tp, k and v are replicated along tp.
        """
        spec, kv_heads = self.spec(path, len(shape)), num_key_value_heads
        of_kv = any(f".{name}." in f".{path}" for name in ("k_proj", "v_proj"))
        if of_kv and kv_heads and kv_heads % mesh.shape["tp"]:
            spec = _without(spec, "tp")
        for size, axis in zip(shape, spec):
            if axis is not None and size % (count := mesh.shape[axis]):
                what = f"{size} does not divide over {axis}={count}"
                raise CourseError(f"{path}: {what}: choose a mesh whose {axis} divides it")
        return NamedSharding(mesh, spec)


def _without(spec: P, axis: str) -> P:
    return P(*(None if name == axis else name for name in spec))


# ------------------------------------------------------------------------------------------- meshes


def make_mesh(*, fsdp: int = 1, tp: int = 1, devices=None) -> Mesh:
    """A mesh of fsdp x tp devices. Raises `CourseError` when there are not as many."""
    devices = jax.devices() if devices is None else devices
    count = fsdp * tp
    if min(fsdp, tp) < 1 or count > len(devices):
        expected = f"fsdp x tp of 1 to {len(devices)} (the devices here)"
        raise unexpected("mesh", expected, f"{fsdp} x {tp} = {count}")
    return jax.make_mesh((fsdp, tp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count])


def check(config, *, fsdp: int = 1, tp: int = 1) -> None:
    """Refuse, before anything is loaded, a mesh over which a model's sizes do not divide.

    Raises `CourseError`, naming the axis. Key/value heads need not divide (`Rules.sharding`).
    """
    for axis, count in (("fsdp", fsdp), ("tp", tp)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise unexpected(axis, "a whole number of at least 1", repr(count))
    for name in ("num_attention_heads", "intermediate_size", "vocab_size", "hidden_size"):
        size = getattr(config, name)
        axis, count = ("fsdp", fsdp) if name == "hidden_size" else ("tp", tp)
        if size % count:
            fitting = ", ".join([str(n) for n in range(1, count) if size % n == 0][-4:])
            choice = f"choose {axis} that divides it, such as {fitting}"
            raise CourseError(f"{name}: {size} does not divide over {axis}={count}: {choice}")


# ------------------------------------------------------------------------------- arrays over a mesh


def _path(keys) -> str:
    """A pytree path as dotted names; flax's variables add a last, nameless level of their own."""
    names = jax.tree_util.keystr(keys, simple=True, separator=".").split(".")
    return ".".join(name for name in names if name not in ("value", "raw_value"))


def shardings(
    tree: Any, mesh: Mesh, config=None, rules: Rules | None = None, prefix: str = ""
) -> Any:
    """The NamedSharding of every array of a pytree: a model's or an optimiser's state, gradients.

    An optimiser keeps its moments under their parameters' names, so the same rules find them.
    """
    rules, kv_heads = rules or Rules(), getattr(config, "num_key_value_heads", None)

    def of(keys, leaf):
        return rules.sharding(mesh, prefix + _path(keys), tuple(leaf.shape), kv_heads)

    return jax.tree_util.tree_map_with_path(of, tree)


def device_put(tree: Any, mesh: Mesh, config=None, rules: Rules | None = None) -> Any:
    """`jax.device_put` of a pytree by the rules. Every process calls it with equal arrays."""

    def put(leaf, sharding):
        if jax.process_count() == 1 or not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings(tree, mesh, config, rules))


def shard(model: nnx.Module, mesh: Mesh, rules: Rules | None = None) -> nnx.Module:
    """Lay a `Transformer` with its adapters out over `mesh`, in place. Checks sizes first (`check`)."""
    check(model.config, **mesh.shape)
    nnx.update(model, device_put(nnx.state(model), mesh, model.config, rules))
    return model


def shard_batch(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Arrays [B, ...], rows along `axis`, split over `fsdp` row by row and replicated along `tp`.

    With several processes each passes its own rows, and the batch is all of them together. Raises
    `CourseError` when the rows do not divide.
    """
    process, fsdp = jax.process_index(), mesh.shape["fsdp"]
    here = sum(any(device.process_index == process for device in row) for row in mesh.devices)

    def put(array):
        if (rows := array.shape[axis]) % here:
            share = "" if here == fsdp else f" ({here} of them in this process)"
            what = f"{rows} rows do not divide over fsdp={fsdp}{share}"
            raise CourseError(f"batch: {what}: choose a batch that does")
        sharding = NamedSharding(mesh, P(*[None] * axis, "fsdp"))
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(put, batch)


# --------------------------------------------------------------------------------- inside the model


def constrain(x: Array, *axes: str | None) -> Array:
    """x with a sharding constraint: `axes` name a mesh axis for each dimension, or None.

    Without a mesh (`jax.set_mesh`) it is x; an axis that does not divide its dimension is left out.
    Where the layouts that the compiler chooses for intermediate arrays disagree, it reshards whole
    arrays ("involuntary full rematerialization"): a few constraints keep it from that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divides = (axis and size % mesh.shape[axis] == 0 for size, axis in zip(x.shape, axes))
    spec = P(*(axis if fits else None for axis, fits in zip(axes, divides)))
    return jax.lax.with_sharding_constraint(x, spec)


def all_gather(params: Any, config=None, prefix: str = "") -> Any:
    """Parameters as a layer uses them: all-gathered along `fsdp`, still split along `tp`.

    In the backward pass their gradients are reduce-scattered into the parameters' layout. `prefix`
    is the name of the layer where the tree has none, such as "lm_head.".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    split = shardings(params, mesh, config, prefix=prefix)
    gathered = jax.tree.map(lambda sharding: _without(sharding.spec, "fsdp"), split)
    return jax.tree.map(jax.lax.with_sharding_constraint, params, gathered)


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes by device and kind: "base", "adapter", "optimiser"."""

    devices: dict[str, dict[str, int]]

    def of(self, kind: str) -> int:
        """Bytes of one kind on the device that holds the most of it."""
        return max(kinds.get(kind, 0) for kinds in self.devices.values())

    @property
    def largest(self) -> int:
        """Bytes of everything on the fullest device."""
        return max(sum(kinds.values()) for kinds in self.devices.values())

    @property
    def total(self) -> int:
        """Bytes over all devices, copies counted."""
        return sum(sum(kinds.values()) for kinds in self.devices.values())

    def __str__(self) -> str:
        kinds = [kind for kind in ("base", "adapter", "optimiser") if self.of(kind)]
        rows = [["device", *(f"{kind} MB" for kind in kinds), "sum MB"]]
        for device, sizes in self.devices.items():
            columns = [*(sizes.get(kind, 0) for kind in kinds), sum(sizes.values())]
            rows.append([device, *(f"{size / 1e6:,.3f}" for size in columns)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ([cell.rjust(width) for cell, width in zip(row, widths)] for row in rows)
        return "\n".join(map("  ".join, lines))


def report(model: nnx.Module, opt_state: Any = None) -> Report:
    """Bytes of a model, adapters and an optimiser's state by device. Reads shapes, not numbers."""
    devices = collections.defaultdict(collections.Counter)
    for kind, tree in {"": nnx.state(model), "optimiser": opt_state}.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            is_adapter = _path(keys).rsplit(".", 1)[-1] in ("lora_A", "lora_B", "scale")
            size = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for device in leaf.sharding.device_set:
                devices[device][kind or ("adapter" if is_adapter else "base")] += size
    ordered = sorted(devices.items(), key=lambda item: item[0].id)
    return Report({f"{device.platform}:{device.id}": dict(kinds) for device, kinds in ordered})
