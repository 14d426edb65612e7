"""LoRA: leave the model as it is, learn a small change beside it (Hu et al. 2021).

A linear layer computes y = W x. Its adapter adds

    y = W x + s B A x,    A [R, in],  B [out, R],  s = alpha / R  (alpha / sqrt(R): rank-stabilised)

A starts random, B at zero: an adapted model starts exactly at its base. Only A and B are trained:
they are `nnx.LoRAParam`s, so the type is the filter: `train.fit(..., wrt=nnx.LoRAParam)`. Shapes,
the names `lora_A` and `lora_B`, initialisation and file format are PEFT's.

    lora.inject(model, rank=8, alpha=16, target_modules=("q_proj", "v_proj"), rngs=nnx.Rngs(0))
    lora.merge(model); lora.unmerge(model)
    with lora.disabled(model): ...                                  # the base, bit for bit
    mine = lora.adapter(model); lora.set_adapter(model, other)      # adapters are states
    hf.peft.save(model, "folder"); hf.peft.load(model, "folder")

Layers may be stacked (weights with a leading axis L, as in every model of this course): A, B and s
get the same axis, so each layer has an adapter, a rank and a scale of its own; s = 0 is off.
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from utils import CourseError, kernels, transformer, unexpected

LINEAR = (nnx.Linear, transformer.Linear)
TABLE = (nnx.Embed, transformer.Embed)
State = dict[str, dict[str, np.ndarray]]  # adapted path -> lora_A, lora_B, scale
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Scale(nnx.Variable):
    """s, one per layer of a stack: part of the adapter, never trained."""


class DropoutKey(nnx.Variable):
    """One random key per layer of a stack, present while `dropout` is active."""


class Original(nnx.Variable):
    """The original weights of a merged layer, where `merge(keep=True)` was asked for."""


class Adapter(nnx.Module):
    """What all adapted layers share: `base`, the layer as it was, and A, B and s beside it.

    A single layer has lora_A [R, in], lora_B [out, R], scale []; a stack of L layers has
    [L, R, in], [L, out, R], [L]. Options are those of `inject`.
    """

    def __init__(self, base, *, rank, alpha, use_rslora=False, layers=None, dropout=0.0, rngs):
        self.features, stack = features(base)
        (inputs, outputs), depth = self.features, stack or 1
        ranks, alphas = _per_layer(rank, depth, "rank"), _per_layer(alpha, depth, "alpha")
        layers = list(range(depth) if layers is None else layers)
        most = min(inputs, outputs)
        for r in ranks:
            if isinstance(r, bool) or not (isinstance(r, int) and 1 <= r <= most):
                raise unexpected("rank", f"1 to {most} for a layer of {inputs} x {outputs}", r)
        if not all(isinstance(a, int | float) and math.isfinite(a) for a in alphas):
            raise unexpected("alpha", "finite numbers", alphas)
        if not 0 <= dropout < 1:
            raise unexpected("dropout", "a rate from 0 to below 1", dropout)
        if any(not 0 <= i < depth for i in layers):
            raise unexpected("layers", f"numbers from 0 to {depth - 1}", layers)
        self.base, self.dropout = base, dropout
        # Static, not variables: a model compiles without the path that it does not use.
        self.active, self.merged = True, False
        # PEFT's A: uniform in +-1/sqrt(in), which is Kaiming's with a = sqrt(5). A smaller rank is
        # the largest with zeros: rows of A that are zero meet columns of B that stay zero.
        R = max(ranks)
        A = jax.random.uniform(rngs.params(), (depth, R, inputs), jnp.float32, -1, 1)
        used = jnp.arange(R)[None, :, None] < jnp.array(ranks)[:, None, None]
        A, B = A / math.sqrt(inputs) * used, jnp.zeros((depth, outputs, R))
        roots = [math.sqrt(r) if use_rslora else r for r in ranks]
        scale = [a / root if i in layers else 0.0 for i, (a, root) in enumerate(zip(alphas, roots))]
        first = 0 if stack is None else slice(None)
        self.lora_A, self.lora_B = nnx.LoRAParam(A[first]), nnx.LoRAParam(B[first])
        self.scale = Scale(jnp.array(scale, jnp.float32)[first])

    @property
    def rank(self) -> int:
        """The largest rank of the stack."""
        return self.lora_A.shape[-2]

    @property
    def stack(self) -> int | None:
        """How many layers are stacked here; None for a single layer."""
        return self.lora_A.shape[0] if self.lora_A.ndim == 3 else None

    def lora_delta(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """s B A x in x's dtype: two thin products, never B A; s goes where numbers are fewest."""
        if self.dropout and hasattr(self, "key"):
            keep = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        down = self.scale[...].astype(x.dtype) * kernels.linear(x, self.lora_A[...])
        return kernels.linear(down, self.lora_B[...])

    def delta(self) -> Float[Array, "*L out in"]:
        """Delta W = s B A in float32, per layer of a stack."""
        A, B = self.lora_A[...], self.lora_B[...]
        return self.scale[...][..., None, None] * jnp.einsum("...or,...ri->...oi", B, A)


class LoRALinear(Adapter):
    """A linear layer (flax's or `transformer.Linear`) with an adapter: x [..., in] -> [..., out].

    It gives exactly the same output as the layer until B is trained.
    """

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = self.base(x)
        return y + self.lora_delta(x).astype(y.dtype) if self.active and not self.merged else y


class LoRATiedHead(Adapter):
    """An embedding table that is also the output layer, with an adapter on the output layer alone.

    The embedding is untouched, so this cannot be merged: one table would have to hold two matrices.
    """

    def __call__(self, tokens):
        return self.base(tokens)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        y = self.base.attend(x)
        return y + self.lora_delta(x).astype(y.dtype) if self.active else y

    def __getattr__(self, name):  # `dtype`, `num_embeddings`: what a model asks of its embedding
        if name in ("dtype", "num_embeddings"):
            return getattr(self.base, name)
        raise AttributeError(name)


# -------------------------------------------------------------------------- finding and injecting


def matrix(module: nnx.Module) -> nnx.Variable:
    """The weights of a linear layer or a table."""
    name = {nnx.Linear: "kernel", nnx.Embed: "embedding"}.get(type(module), "weight")
    return getattr(module, name)


def features(module: nnx.Module) -> tuple[tuple[int, int], int | None]:
    """((in, out), how many layers are stacked or None); a table is an output layer: D in, V out."""
    *stack, a, b = matrix(module).shape
    return (a, b) if isinstance(module, nnx.Linear) else (b, a), stack[0] if stack else None


def _per_layer(value, depth: int, name: str) -> list:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    values = list(value) if isinstance(value, Sequence) else [value] * depth
    if len(values) != depth:
        raise unexpected(name, f"one number, or one for each of {depth} layers", len(values))
    return values


def modules(model: nnx.Module, prefix="") -> Iterator[tuple[str, nnx.Module, str, nnx.Module]]:
    """(dotted path, parent, attribute name, module) of all submodules, none inside an `Adapter`."""
    for name, value in list(vars(model).items()):
        if isinstance(value, nnx.Module):
            path = f"{prefix}{name}"
            yield path, model, name, value
            if not isinstance(value, Adapter):
                yield from modules(value, f"{path}.")


def adapters(model: nnx.Module) -> dict[str, Adapter]:
    """The adapted layers of a model by dotted path. Raises `CourseError` when there are none."""
    adapted = {path: module for path, _, _, module in modules(model) if isinstance(module, Adapter)}
    if not adapted:
        name = type(model).__name__
        raise CourseError(f"{name}: has no adapter: call lora.inject(model, ...) first")
    return adapted


def matches(path: str, target_modules: str | Sequence[str]) -> bool:
    """PEFT's rule: names match the end of a path by parts; one string is a regex for all of it."""
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, path) is not None
        except re.error as error:
            what = f"{target_modules!r} is not a regular expression ({error})"
            raise CourseError(f"target_modules: {what}") from None
    return any(path == target or path.endswith(f".{target}") for target in target_modules)


def inject(
    model: nnx.Module,
    *,
    rank: int | Sequence[int] = 8,
    alpha: float | Sequence[float] = 16,
    target_modules: str | Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] | None = None,
    use_rslora: bool = False,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Put an adapter on every linear layer whose path `matches` `target_modules`, in place.

    `rank` and `alpha` are one number, or one per layer of the stack; only `layers` are switched on.
    The target "lm_head" is the output layer, also where that is the embedding table. Raises
    `CourseError`, the model unchanged, for a target that matches nothing, a rank that does not fit,
    or a model that already has adapters.
    """
    everything = list(modules(model))
    if any(isinstance(module, Adapter) for *_, module in everything):
        what = "change them with lora.set_adapter, or inject into a fresh base"
        raise CourseError(f"{type(model).__name__}: already has adapters: {what}")
    linear = {path: rest for path, *rest in everything if isinstance(rest[-1], LINEAR)}
    tied = {path: rest for path, *rest in everything if isinstance(rest[-1], TABLE)}
    tied = {path: rest for path, rest in tied.items() if rest[1] == "embed_tokens"}
    if any(path.split(".")[-1] == "lm_head" for path in linear):
        tied = {}
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not patterns:
        raise unexpected("target_modules", "at least one name", "none", "nothing would be adapted")
    chosen: dict[str, list] = {}
    for pattern in patterns:
        rule = pattern if isinstance(target_modules, str) else [pattern]
        hits = {path: rest for path, rest in linear.items() if matches(path, rule)}
        if not hits and pattern == "lm_head":
            hits = tied
        if not hits and any(matches(path, rule) for path in tied):
            why = "is also the output layer of this model, and an adapter would change both"
            how = "target lm_head for the output layer alone"
            raise CourseError(f"target_modules: {pattern} {why}: {how}")
        if not hits:
            names = sorted({path.split(".")[-1] for path in linear} | linear.keys())
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:6]
            what = f"{pattern!r} matches no linear layer; closest: {', '.join(close)}"
            raise CourseError(f"target_modules: {what}")
        chosen |= hits
    options = dict(rank=rank, alpha=alpha, layers=layers, use_rslora=use_rslora, dropout=dropout)
    replacements = []
    for path, (parent, name, module) in chosen.items():
        kind = LoRATiedHead if isinstance(module, TABLE) else LoRALinear
        try:
            replacements.append((parent, name, kind(module, **options, rngs=rngs)))
        except CourseError as error:
            raise CourseError(f"{path}: {error}") from None
    for parent, name, new in replacements:  # only now: an error above leaves the model as it was
        setattr(parent, name, new)
    return model


def _not_merged(model: nnx.Module, action: str) -> dict[str, Adapter]:
    """The adapters of a model in which none is merged; `CourseError` otherwise."""
    adapted = adapters(model)
    if any(a.merged for a in adapted.values()):
        what = "the adapter is merged into the weights: call lora.unmerge(model) first"
        raise CourseError(f"{action}: {what}")
    return adapted


@contextlib.contextmanager
def disabled(model: nnx.Module):
    """Inside, the model is its base, bit for bit. Refused while merged: the base is not there."""
    adapted = _not_merged(model, "disabled").values()
    before = [a.active for a in adapted]
    try:
        for a in adapted:
            a.active = False
        yield model
    finally:
        for a, active in zip(adapted, before):
            a.active = active


@contextlib.contextmanager
def dropout(model: nnx.Module, key: Array):
    """Inside, adapters drop inputs at their rate. Use it in the loss, with a new `key` every step.

    A pure training step would drop a random state kept *in* the model and repeat one mask for ever.
    """
    adapted = adapters(model)
    try:
        for i, a in enumerate(adapted.values()):
            one = jax.random.fold_in(key, i)
            a.key = DropoutKey(one if a.stack is None else jax.random.split(one, a.stack))
        yield model
    finally:
        for a in adapted.values():
            del a.key


def merge(model: nnx.Module, *, keep: bool = False) -> nnx.Module:
    """Add s B A to the weights, in place: inference then costs what the base costs.

    The sum is rounded to the weights' dtype, and `unmerge` restores them up to that rounding: about
    1e-7 of a weight in float32, but 1 part in 256 in bfloat16. With `keep=True` a copy is kept, and
    every bit restored. Refused for a tied head and for weights that are not floats.
    """
    adapted = adapters(model)
    for path, a in adapted.items():
        dtype, why = matrix(a.base).dtype, ""
        if isinstance(a, LoRATiedHead):
            why = "the table is also the embedding; keep this adapter unmerged"
        elif a.merged:
            why = "is merged already; merging twice would add the change twice"
        elif not jnp.issubdtype(dtype, jnp.floating):
            why = f"the base is quantised ({dtype}) and cannot take the change: "
            why += "dequantise it first, or keep the adapter unmerged"
        if why:
            raise CourseError(f"{path}: merge: {why}")
    for a in adapted.values():
        if keep:
            a.original = Original(matrix(a.base)[...])
        _change(a, +1)
        a.merged = True
    return model


def unmerge(model: nnx.Module) -> nnx.Module:
    """Undo `merge`: to the bit after `merge(keep=True)`, otherwise up to rounding."""
    adapted = adapters(model)
    for path, a in adapted.items():
        if not a.merged:
            why = "is not merged; subtracting the change would damage the base"
            raise CourseError(f"{path}: unmerge: {why}")
    for a in adapted.values():
        if hasattr(a, "original"):
            matrix(a.base)[...] = a.original[...]
            del a.original
        else:
            _change(a, -1)
        a.merged = False
    return model


def _change(a: Adapter, sign: int) -> None:
    """W + sign Delta W, summed in float32. Flax keeps a linear W as [in, out], others [out, in]."""
    weight, delta = matrix(a.base), sign * a.delta()
    delta = jnp.swapaxes(delta, -1, -2) if isinstance(a.base, nnx.Linear) else delta
    weight[...] = (weight[...].astype(jnp.float32) + delta).astype(weight.dtype)


def adapter(model: nnx.Module) -> State:
    """A copy of the adapter: for each adapted path, lora_A, lora_B and scale."""
    return {
        path: {name: np.array(getattr(a, name)[...]) for name in ("lora_A", "lora_B", "scale")}
        for path, a in adapters(model).items()
    }


def set_adapter(model: nnx.Module, state: State) -> State:
    """Put another adapter (from `adapter` or `add_weighted_adapter`) on the base; returns the old.

    Ranks may differ, target modules may not. Raises `CourseError`, the model unchanged, when paths
    or shapes do not fit.
    """
    adapted = _not_merged(model, "set_adapter")
    if difference := sorted(adapted.keys() ^ state.keys()):
        where = "the model only" if difference[0] in adapted else "the adapter only"
        what = f"{difference[0]} is in {where}: was this adapter made with other target_modules?"
        raise CourseError(f"set_adapter: {what}")
    for path, a in adapted.items():
        stack, (inputs, outputs) = a.lora_A.shape[:-2], a.features
        rank = state[path]["lora_A"].shape[-2]
        shapes = ((*stack, rank, inputs), (*stack, outputs, rank), stack)
        for name, expected in zip(("lora_A", "lora_B", "scale"), shapes):
            if (shape := state[path][name].shape) != expected:
                raise unexpected(f"{path}.{name}", expected, shape, "made for another base?")
    before = adapter(model)
    for path, a in adapted.items():
        a.lora_A = nnx.LoRAParam(jnp.asarray(state[path]["lora_A"]))
        a.lora_B = nnx.LoRAParam(jnp.asarray(state[path]["lora_B"]))
        a.scale = Scale(jnp.asarray(state[path]["scale"]))
    return before


def stacked(state: State) -> State:
    """An adapter of unrolled layers (`layers.0.`, `layers.1.`, ...) as one for a stacked model."""
    out, unrolled = {}, {}
    for path, arrays in state.items():
        if number := re.search(r"\blayers\.(\d+)\.", path):
            layers = unrolled.setdefault(path.replace(number[0], "layers."), {})
            layers[int(number[1])] = arrays
        else:
            out[path] = arrays
    for path, layers in unrolled.items():
        rows = [layers[i] for i in sorted(layers)]  # as text, layer 10 would come before layer 2
        out[path] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return out


def add_weighted_adapter(*weighted: tuple[State, float]) -> State:
    """The weighted sum of adapters with the same target modules; its rank is the sum of theirs.

    sum_i w_i s_i B_i A_i is one product: the A_i on top of each other, w_i s_i B_i side by side.
    """

    def sizes(arrays):
        return arrays["lora_A"].shape[-1], arrays["lora_B"].shape[-2], arrays["scale"].shape

    where = "add_weighted_adapter"
    if not weighted:
        raise unexpected(where, "at least one pair (adapter, weight)", "none")
    first = weighted[0][0]
    for state, _ in weighted:
        if state.keys() != first.keys():
            raise unexpected(where, "adapters with the same target modules", "different ones")
        for path, arrays in first.items():
            if sizes(state[path]) != sizes(arrays):
                expected = f"adapters of one base (in, out, layers {sizes(arrays)})"
                raise unexpected(where, expected, f"{sizes(state[path])} at {path}")
    out = {}
    for path, arrays in first.items():
        parts = [(state[path], weight) for state, weight in weighted]
        scaled = [w * part["scale"][..., None, None] * part["lora_B"] for part, w in parts]
        out[path] = {
            "lora_A": np.concatenate([part["lora_A"] for part, _ in parts], axis=-2),
            "lora_B": np.concatenate(scaled, axis=-1),
            "scale": np.ones_like(arrays["scale"]),
        }
    return out


@dataclasses.dataclass(frozen=True)
class Counts:
    """What an adapter costs. Bytes are float32; Adam keeps two numbers per trained one."""

    adapter: int
    base: int

    @property
    def share(self) -> float:
        """Trained parameters over those of the base."""
        return self.adapter / self.base

    @property
    def adapter_bytes(self) -> int:
        return 4 * self.adapter

    @property
    def optimizer_bytes(self) -> int:
        return 8 * self.adapter

    @property
    def flops_per_token(self) -> int:
        """What it adds to a token's forward pass, unmerged: a multiply-add for each number."""
        return 2 * self.adapter


def count(model: nnx.Module) -> Counts:
    """Parameters of adapter and base, from shapes: what is switched off or padding counts too."""

    def size(kind) -> int:
        flat = nnx.to_flat_state(nnx.state(model, kind))
        return sum(math.prod(leaf.shape) for _, leaf in flat)

    small = size(nnx.LoRAParam)
    return Counts(adapter=small, base=size(nnx.Param) - small)


def parameters(features: tuple[int, int], rank: int) -> int:
    """How many numbers an adapter of this rank has on one layer: R (in + out)."""
    return rank * (features[0] + features[1])
