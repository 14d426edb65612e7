"""Sharding: which device keeps which part of which array.

A mesh is a grid of devices with two named axes. Along `fsdp` every device keeps a part of each weight and all-gathers
the rest for the moment it is used; the batch is split along it too. Along `tp` (tensor parallel) every device keeps
whole heads and whole MLP features and computes with those alone. One table of rules, matched by the last names of a
parameter's path, says which dimension lies along which axis: for weights, adapters and the optimiser's state alike.

    mesh = sharding.make_mesh(fsdp=4, tp=2)
    model = hf.weights.load(name, mesh=mesh); lora.inject(model, ...); sharding.shard(model, mesh)
    train.fit(model, batches, ..., mesh=mesh)

You annotate, the compiler communicates. Without a mesh every function of this module that the model calls does nothing.
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

from utils import CourseError

AXES = ("fsdp", "tp")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
TABLE = ("embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Per kind of layer, the mesh axis of its outputs and of its inputs; the leading layer axis is never split.

    Column-parallel layers (q, k, v, gate, up) split their outputs over `tp`, row-parallel ones (o, down) their inputs, so
    that a pair of them needs one sum over `tp` and nothing in between. The other dimension is `fsdp`'s. An adapter follows
    its layer: B [out, R] has the outputs, A [R, in] the inputs; the rank is never split.
    """

    column: P = P("tp", "fsdp")  # [out, in]
    row: P = P("fsdp", "tp")
    table: P = P("tp", "fsdp")  # embedding and output layer [V, D]

    def spec(self, path: str, ndim: int) -> P:
        """The PartitionSpec of a parameter, by its dotted path; replicated where no rule speaks of it."""
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
        """The sharding of a parameter on `mesh`. Raises `CourseError`, naming the axis, if it does not divide.

        Where `num_key_value_heads` does not divide over tp, k and v are replicated along tp.
        """
        spec, kv_heads = self.spec(path, len(shape)), num_key_value_heads
        of_kv = any(f".{name}." in f".{path}" for name in ("k_proj", "v_proj"))
        if of_kv and kv_heads and kv_heads % mesh.shape["tp"]:
            spec = _without(spec, "tp")
        for size, axis in zip(shape, spec):
            count = mesh.shape[axis] if axis is not None else 1
            if size % count:
                raise CourseError(
                    f"{path}: {size} does not divide over {axis}={count}: choose a mesh whose {axis} divides it"
                )
        return NamedSharding(mesh, spec)


def _without(spec: P, axis: str) -> P:
    return P(*(None if name == axis else name for name in spec))


# --------------------------------------------------------------------------------------------------------------- meshes


def make_mesh(*, fsdp: int = 1, tp: int = 1, devices=None) -> Mesh:
    """A mesh of fsdp x tp devices. Raises `CourseError` when there are not as many."""
    devices = jax.devices() if devices is None else devices
    if min(fsdp, tp) < 1 or fsdp * tp > len(devices):
        raise CourseError(
            f"mesh: expected fsdp x tp of 1 to {len(devices)} (the devices here), found {fsdp} x {tp} = {fsdp * tp}"
        )
    return jax.make_mesh(
        (fsdp, tp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[: fsdp * tp]
    )


def check(config, *, fsdp: int = 1, tp: int = 1) -> None:
    """Refuse, before anything is loaded, a mesh over which a model's sizes do not divide; the message names the axis.

    Key/value heads need not divide: then they are replicated along `tp`.
    """
    for axis, count in (("fsdp", fsdp), ("tp", tp)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise CourseError(f"{axis}: expected a whole number of at least 1, found {count!r}")
    c = config
    tp_sizes = {
        name: getattr(c, name)
        for name in ("num_attention_heads", "intermediate_size", "vocab_size")
    }
    for name, size in (tp_sizes | {"hidden_size": c.hidden_size}).items():
        axis, count = ("fsdp", fsdp) if name == "hidden_size" else ("tp", tp)
        if size % count:
            fitting = [n for n in range(1, count) if size % n == 0][-4:]
            raise CourseError(
                f"{name}: {size} does not divide over {axis}={count}: choose {axis} that divides it, such as "
                f"{', '.join(map(str, fitting))}"
            )


# ------------------------------------------------------------------------------------------------- arrays over a mesh


def _path(keys) -> str:
    """A pytree path as dotted names; flax's variables add a last, nameless level of their own."""
    names = [
        str(next(getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)))
        for key in keys
    ]
    return ".".join(name for name in names if name not in ("value", "raw_value"))


def shardings(
    tree: Any, mesh: Mesh, config=None, rules: Rules | None = None, prefix: str = ""
) -> Any:
    """The NamedSharding of every array of a pytree: a model's state, its gradients, an optimiser's state.

    An optimiser keeps its moments under the names of the parameters they belong to, so the same rules find them.
    """
    rules, kv_heads = rules or Rules(), getattr(config, "num_key_value_heads", None)
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: rules.sharding(mesh, prefix + _path(keys), tuple(leaf.shape), kv_heads),
        tree,
    )


def device_put(tree: Any, mesh: Mesh, config=None, rules: Rules | None = None) -> Any:
    """`jax.device_put` of a pytree by the rules. Every process calls it with equal arrays."""

    def put(leaf, sharding):
        if jax.process_count() == 1 or not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings(tree, mesh, config, rules))


def shard(model: nnx.Module, mesh: Mesh, rules: Rules | None = None) -> nnx.Module:
    """Lay a `Transformer`, its adapters included, out over `mesh`: in place, and returned.

    Raises `CourseError` that names the axis, the model unchanged, for sizes that do not divide.
    """
    check(model.config, **mesh.shape)
    nnx.update(model, device_put(nnx.state(model), mesh, model.config, rules))
    return model


def shard_batch(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Arrays [B, ...] split over `fsdp`, row by row, and replicated along `tp`; `axis` is that of the rows.

    With several processes each passes its own rows, and the batch is all of them together. Raises `CourseError` when the
    rows do not divide.
    """
    here = {
        row
        for (row, _), device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    }

    def put(array):
        rows = array.shape[axis]
        if rows % len(here):
            of = (
                "" if len(here) == mesh.shape["fsdp"] else f" ({len(here)} of them in this process)"
            )
            raise CourseError(
                f"batch: {rows} rows do not divide over fsdp={mesh.shape['fsdp']}{of}: choose a batch that does"
            )
        sharding = NamedSharding(mesh, P(*[None] * axis, "fsdp"))
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(put, batch)


# ------------------------------------------------------------------------------------------------------ inside the model


def constrain(x: Array, *axes: str | None) -> Array:
    """x with a sharding constraint: `axes` name a mesh axis for each dimension, or None.

    Without a mesh (`jax.set_mesh`) it is x; an axis that does not divide its dimension is left out. The compiler would
    choose a layout for every intermediate array, and where two of its choices disagree it reshards whole arrays
    ("involuntary full rematerialization"): a few constraints keep it from that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divides = (axis and size % mesh.shape[axis] == 0 for size, axis in zip(x.shape, axes))
    spec = P(*(axis if fits else None for axis, fits in zip(axes, divides)))
    return jax.lax.with_sharding_constraint(x, spec)


def all_gather(params: Any, config=None, prefix: str = "") -> Any:
    """Parameters as a layer uses them: all-gathered along `fsdp`, still split along `tp`.

    In the backward pass their gradients are reduce-scattered, into the layout the parameters have. `prefix` is the
    name of the layer where the tree has none, such as "lm_head.".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    split = shardings(params, mesh, config, prefix=prefix)
    gathered = jax.tree.map(lambda sharding: _without(sharding.spec, "fsdp"), split)
    return jax.tree.map(jax.lax.with_sharding_constraint, params, gathered)


# ------------------------------------------------------------------------------------------------------- what lies where


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
        used = {kind for sizes in self.devices.values() for kind in sizes}
        kinds = [kind for kind in ("base", "adapter", "optimiser") if kind in used]
        rows = [["device", *(f"{kind} MB" for kind in kinds), "sum MB"]]
        for device, sizes in self.devices.items():
            columns = [*(sizes.get(kind, 0) for kind in kinds), sum(sizes.values())]
            rows.append([device, *(f"{size / 1e6:,.3f}" for size in columns)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ([cell.rjust(width) for cell, width in zip(row, widths)] for row in rows)
        return "\n".join(map("  ".join, lines))


def report(model: nnx.Module, opt_state: Any = None) -> Report:
    """How many bytes of a model, its adapters and its optimiser's state each device holds. Reads shapes, not numbers."""
    devices = collections.defaultdict(collections.Counter)
    trees = {"": nnx.state(model), "optimiser": opt_state}
    for kind, tree in trees.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            is_adapter = _path(keys).rsplit(".", 1)[-1] in ("lora_A", "lora_B", "scale")
            size = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for device in leaf.sharding.device_set:
                devices[device][kind or ("adapter" if is_adapter else "base")] += size
    ordered = sorted(devices.items(), key=lambda item: item[0].id)
    return Report({f"{device.platform}:{device.id}": dict(kinds) for device, kinds in ordered})


def parts(array: Array | jax.ShapeDtypeStruct) -> dict[tuple[int, int, int, int], list[int]]:
    """(first row, end row, first column, end column) of a matrix, or of the last two dimensions -> the devices' numbers."""
    devices_of = collections.defaultdict(list)
    for device, index in array.sharding.devices_indices_map(tuple(array.shape)).items():
        ends = [(0, 1), *(s.indices(size)[:2] for s, size in zip(index, array.shape))][-2:]
        devices_of[(*ends[0], *ends[1])].append(device.id)
    return {place: sorted(devices) for place, devices in sorted(devices_of.items())}
