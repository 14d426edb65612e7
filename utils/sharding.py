"""Sharding: which device keeps which part of which array.

A mesh is a grid of devices with two named axes. Along `fsdp` every device keeps a part of each weight and gathers the rest
for the moment it is used; along `tp` (tensor parallel) every device keeps whole heads and whole MLP features and computes
with those alone. One table of rules, matched by the last names of a parameter's path, says which dimension of a weight
lies along which axis; the model code does not know.
"""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from utils import CourseError


@dataclasses.dataclass(frozen=True)
class Rules:
    """Per kind of weight, the mesh axis of each of its last dimensions; the leading layer axis is never split.

    Column-parallel layers (q, k, v, gate, up) split their outputs over `tp`, row-parallel ones (o, down) their inputs, so
    that a pair of them needs one sum over `tp` and nothing in between. The other dimension is `fsdp`'s.
    """

    column: P = P("tp", "fsdp")  # [out, in]
    row: P = P("fsdp", "tp")
    table: P = P("tp", "fsdp")  # embedding and output layer [V, D]
    column_bias: P = P("tp")

    def spec(self, path: str, ndim: int) -> P:
        """The PartitionSpec of a parameter, by its dotted path; replicated where no rule speaks of it."""
        *_, module, leaf = [part for part in path.split(".") if part != "base"]
        if module in ("embed_tokens", "lm_head"):
            spec = self.table
        elif module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            spec = self.column if leaf == "weight" else self.column_bias
        elif module in ("o_proj", "down_proj") and leaf == "weight":
            spec = self.row
        else:
            return P()
        return P(*[None] * (ndim - len(spec)), *spec)

    def sharding(self, mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of a parameter on `mesh`. Raises `CourseError`, naming the axis, if it does not divide."""
        spec = self.spec(path, len(shape))
        for size, axis in zip(shape, spec):
            if axis is not None and size % mesh.shape[axis]:
                raise CourseError(
                    f"{path}: {size} does not divide over {axis}={mesh.shape[axis]}: choose a mesh whose {axis} divides it"
                )
        return NamedSharding(mesh, spec)


def make_mesh(*, fsdp: int = 1, tp: int = 1, devices=None) -> Mesh:
    """A mesh of fsdp x tp devices. Raises `CourseError` when there are not as many."""
    devices = jax.devices() if devices is None else devices
    if min(fsdp, tp) < 1 or fsdp * tp > len(devices):
        raise CourseError(
            f"mesh: expected fsdp x tp of 1 to {len(devices)} (the devices here), found {fsdp} x {tp} = {fsdp * tp}"
        )
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=devices[: fsdp * tp])
