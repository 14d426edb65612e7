"""LoRA: leave the model as it is, learn a small change beside it (Hu et al. 2021).

A linear layer computes y = W x. Its adapter adds

    y = W x + s B A x,     A [R, in],  B [out, R],  s = alpha / R   (or alpha / sqrt(R), rank-stabilised)

A starts random, B at zero: an adapted model starts exactly at its base. Only A and B are trained. They are
`nnx.LoRAParam`s, so the type is the filter: `train.fit(..., wrt=nnx.LoRAParam)`. Shapes are PEFT's, and so are the names
`lora_A` and `lora_B`, the initialisation and the file format.

    lora.inject(model, rank=8, alpha=16, target_modules=("q_proj", "v_proj"), rngs=nnx.Rngs(0))
    lora.merge(model); lora.unmerge(model)
    with lora.disabled(model): ...                                  # the base, bit for bit
    mine = lora.adapter(model); lora.set_adapter(model, other)      # adapters are states on one base
    hf.peft.save(model, "folder"); hf.peft.load(model, "folder")

Layers may be stacked (weights with a leading axis L, as in every model of this course): A, B and s then get the same
axis, so that each layer has an adapter, a rank and a scale of its own; s = 0 switches a layer off.
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

from utils import CourseError, kernels, transformer

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

    A single layer has lora_A [R, in], lora_B [out, R], scale []; a stack of L layers has [L, R, in], [L, out, R], [L].
    """

    def __init__(
        self,
        base: nnx.Module,
        *,
        rank,
        alpha,
        use_rslora=False,
        layers=None,
        dropout=0.0,
        rngs: nnx.Rngs,
    ):
        """`rank`, `alpha`, `layers`, `use_rslora` and `dropout` as in `inject`."""
        self.features, stack = features(base)
        (inputs, outputs), depth = self.features, stack or 1
        ranks, alphas = _per_layer(rank, depth, "rank"), _per_layer(alpha, depth, "alpha")
        layers = list(range(depth) if layers is None else layers)
        most = min(inputs, outputs)
        for r in ranks:
            if isinstance(r, bool) or not (isinstance(r, int) and 1 <= r <= most):
                size = f"a layer of {inputs} x {outputs}"
                raise CourseError(f"rank: expected 1 to {most} for {size}, found {r}")
        if not all(isinstance(a, int | float) and math.isfinite(a) for a in alphas):
            raise CourseError(f"alpha: expected finite numbers, found {alphas}")
        if not 0 <= dropout < 1:
            raise CourseError(f"dropout: expected a rate from 0 to below 1, found {dropout}")
        if any(not 0 <= i < depth for i in layers):
            raise CourseError(f"layers: expected numbers from 0 to {depth - 1}, found {layers}")
        self.base, self.dropout = base, dropout
        # Static, not variables: a model compiles without the path that it does not use.
        self.active, self.merged = True, False
        R = max(ranks)
        # PEFT's A: uniform in +-1/sqrt(in), which is Kaiming's with a = sqrt(5).
        A = jax.random.uniform(rngs.params(), (depth, R, inputs), jnp.float32, -1, 1) / math.sqrt(
            inputs
        )
        # A smaller rank is the largest with zeros: rows of A that are zero meet columns of B that stay zero.
        A = A * (jnp.arange(R)[None, :, None] < jnp.array(ranks)[:, None, None])
        B = jnp.zeros((depth, outputs, R))
        scale = [
            a / (math.sqrt(r) if use_rslora else r) if i in layers else 0.0
            for i, (a, r) in enumerate(zip(alphas, ranks))
        ]
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
        """s B A x, in x's dtype: two thin products, never the matrix B A. The scale goes where the numbers are fewest."""
        if self.dropout and hasattr(self, "key"):
            keep = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        down = self.scale[...].astype(x.dtype) * kernels.linear(x, self.lora_A[...])
        return kernels.linear(down, self.lora_B[...])

    def delta(self) -> Float[Array, "*L out in"]:
        """Delta W = s B A in float32, per layer of a stack."""
        A, B = self.lora_A[...], self.lora_B[...]
        return self.scale[...][..., None, None] * jnp.einsum("...or,...ri->...oi", B, A)

    def matrix(self) -> nnx.Variable:
        """The variable that `merge` changes."""
        return matrix(self.base)

    def oriented(self, delta):
        """Delta W in the layout of `matrix`: flax keeps a linear kernel as [in, out], Hugging Face as [out, in]."""
        return jnp.swapaxes(delta, -1, -2) if isinstance(self.base, nnx.Linear) else delta


class LoRALinear(Adapter):
    """A linear layer (flax's or `transformer.Linear`) with an adapter: x [..., in] -> [..., out].

    It gives exactly the same output as the layer until B is trained.
    """

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = self.base(x)
        return y + self.lora_delta(x).astype(y.dtype) if self.active and not self.merged else y


class LoRATiedHead(Adapter):
    """An embedding table that is also the output layer, with an adapter on its use as output layer alone.

    Reading the table (the embedding) is untouched. So this adapter cannot be merged: one table would have to hold two
    different matrices.
    """

    def __call__(self, tokens):
        return self.base(tokens)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        y = self.base.attend(x)
        return y + self.lora_delta(x).astype(y.dtype) if self.active else y

    def __getattr__(self, name):  # `dtype`, `num_embeddings`: what a model asks of its embedding
        if name in ("dtype", "num_embeddings", "features_out"):
            return getattr(self.base, name)
        raise AttributeError(name)


# -------------------------------------------------------------------------------------------------- finding and injecting


def matrix(module: nnx.Module) -> nnx.Variable:
    """The weights of a linear layer or a table."""
    name = {nnx.Linear: "kernel", nnx.Embed: "embedding"}.get(type(module), "weight")
    return getattr(module, name)


def features(module: nnx.Module) -> tuple[tuple[int, int], int | None]:
    """((in, out) of a layer, how many are stacked in it or None). A table is seen as output layer: D in, V out."""
    *stack, a, b = matrix(module).shape
    return (a, b) if isinstance(module, nnx.Linear) else (b, a), stack[0] if stack else None


def _per_layer(value, depth: int, name: str) -> list:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    values = list(value) if isinstance(value, Sequence) else [value] * depth
    if len(values) != depth:
        expected = f"one number, or one for each of {depth} layers"
        raise CourseError(f"{name}: expected {expected}, found {len(values)}")
    return values


def modules(
    model: nnx.Module, prefix: str = ""
) -> Iterator[tuple[str, nnx.Module, str, nnx.Module]]:
    """Every submodule, as (dotted path, parent, attribute name, module); the inside of an adapted layer is not entered."""
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
    """PEFT's rule: names match the end of a path, part by part; a single string is a regular expression for all of it."""
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, path) is not None
        except re.error as error:
            raise CourseError(
                f"target_modules: {target_modules!r} is not a regular expression ({error})"
            ) from None
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
    """Put an adapter on every linear layer whose path matches `target_modules`; changes `model` in place and returns it.

    `rank` and `alpha` are numbers, or one number per layer of the stack; `layers` switches the adapter on in those layers
    only. "lm_head" as a target means the output layer, also where it is the embedding table. Raises `CourseError`, the
    model unchanged, for a target that matches nothing, a rank that does not fit, or a model that already has adapters.
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
        raise CourseError(
            "target_modules: expected at least one name, found none: nothing would be adapted"
        )
    chosen: dict[str, list] = {}
    for pattern in patterns:
        rule = pattern if isinstance(target_modules, str) else [pattern]
        hits = {path: rest for path, rest in linear.items() if matches(path, rule)}
        if not hits and pattern == "lm_head":
            hits = tied
        if not hits and any(matches(path, rule) for path in tied):
            raise CourseError(
                f"target_modules: {pattern} is also the output layer of this model, and an adapter would change both: "
                "target lm_head for the output layer alone"
            )
        if not hits:
            closest = _closest(pattern, linear)
            raise CourseError(f"target_modules: {pattern!r} matches no linear layer; {closest}")
        chosen |= hits
    options = dict(rank=rank, alpha=alpha, layers=layers, use_rslora=use_rslora, dropout=dropout)
    replacements = []
    for path, (parent, name, module) in chosen.items():
        kind = LoRATiedHead if isinstance(module, TABLE) else LoRALinear
        try:
            replacements.append((parent, name, kind(module, **options, rngs=rngs)))
        except CourseError as error:
            raise CourseError(f"{path}: {error}") from None
    # Only now, so that an error above leaves the model as it was.
    for parent, name, new in replacements:
        setattr(parent, name, new)
    return model


def _closest(pattern: str, candidates) -> str:
    names = sorted({path.split(".")[-1] for path in candidates} | set(candidates))
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:6]
    return "closest: " + ", ".join(close)


def _not_merged(model: nnx.Module, action: str) -> dict[str, Adapter]:
    """The adapters of a model in which none is merged; `CourseError` otherwise."""
    adapted = adapters(model)
    if any(a.merged for a in adapted.values()):
        what = "the adapter is merged into the weights: call lora.unmerge(model) first"
        raise CourseError(f"{action}: {what}")
    return adapted


@contextlib.contextmanager
def disabled(model: nnx.Module):
    """Inside, the model is its base, bit for bit. Refused while merged: the base is not there to go back to."""
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
    """Inside, adapters drop inputs at their rate, with masks drawn from `key`: pass another key at every step.

    A random state kept *in* the model would be split off and dropped by a pure training step, which would then repeat one
    mask for ever. Use it inside the loss function.
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
    """Add s B A to the weights, so that inference costs what the base costs. In place; undone by `unmerge`.

    The sum is made in float32 and rounded to the weights' dtype. Subtracting again gives back the base up to that
    rounding: about 1e-7 of a weight in float32, but 1 part in 256 in bfloat16, so `keep=True` keeps a copy of the
    original weights, and `unmerge` then restores every bit. Refused for a tied head and for weights that are not floats.
    """
    adapted = adapters(model)
    for path, a in adapted.items():
        dtype, why = a.matrix().dtype, ""
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
        weight = a.matrix()
        if keep:
            a.original = Original(weight[...])
        weight[...] = _add(weight[...], a.oriented(a.delta()))
        a.merged = True
    return model


def unmerge(model: nnx.Module) -> nnx.Module:
    """Undo `merge`: exact to the bit after `merge(keep=True)`, otherwise up to the rounding of the weights' dtype."""
    adapted = adapters(model)
    for path, a in adapted.items():
        if not a.merged:
            why = "is not merged; subtracting the change would damage the base"
            raise CourseError(f"{path}: unmerge: {why}")
    for a in adapted.values():
        weight = a.matrix()
        if hasattr(a, "original"):
            weight[...] = a.original[...]
            del a.original
        else:
            weight[...] = _add(weight[...], -a.oriented(a.delta()))
        a.merged = False
    return model


def _add(weight, delta):
    return (weight.astype(jnp.float32) + delta).astype(weight.dtype)


def adapter(model: nnx.Module) -> State:
    """A copy of the adapter: for each adapted path, lora_A, lora_B and scale."""
    return {
        path: {name: np.array(getattr(a, name)[...]) for name in ("lora_A", "lora_B", "scale")}
        for path, a in adapters(model).items()
    }


def set_adapter(model: nnx.Module, state: State) -> State:
    """Put another adapter (from `adapter` or `add_weighted_adapter`) on the same base; returns the one that was there.

    Ranks may differ, target modules may not. Raises `CourseError`, the model unchanged, when paths or shapes do not fit.
    """
    adapted = _not_merged(model, "set_adapter")
    if difference := sorted(adapted.keys() ^ state.keys()):
        where = "the model only" if difference[0] in adapted else "the adapter only"
        what = f"{difference[0]} is in {where}: was this adapter made with other target_modules?"
        raise CourseError(f"set_adapter: {what}")
    for path, a in adapted.items():
        (*stack, rank, _), inputs = state[path]["lora_A"].shape, a.lora_A.shape[-1]
        stack, outputs = a.lora_A.shape[:-2], a.lora_B.shape[-2]
        shapes = ((*stack, rank, inputs), (*stack, outputs, rank), stack)
        for name, expected in zip(("lora_A", "lora_B", "scale"), shapes):
            if (shape := state[path][name].shape) != expected:
                what = f"expected {expected}, found {shape}: made for another base?"
                raise CourseError(f"{path}.{name}: {what}")
    before = adapter(model)
    for path, a in adapted.items():
        a.lora_A = nnx.LoRAParam(jnp.asarray(state[path]["lora_A"]))
        a.lora_B = nnx.LoRAParam(jnp.asarray(state[path]["lora_B"]))
        a.scale = Scale(jnp.asarray(state[path]["scale"]))
    return before


def stacked(state: State) -> State:
    """An adapter (from `adapter`) of unrolled layers, `layers.0.`, `layers.1.`, ..., as one for the stacked model."""
    layers: dict[str, dict[int, dict]] = {}
    for path, arrays in state.items():
        number = re.search(r"\blayers\.(\d+)\.", path)
        if number is None:
            layers[path] = {-1: arrays}
        else:
            stack_path = path.replace(number[0], "layers.")
            layers.setdefault(stack_path, {})[int(number[1])] = arrays
    # In the order of the numbers: in that of their text, layer 10 comes before layer 2.
    return {
        path: by_number.get(-1)
        or {
            name: np.stack([by_number[i][name] for i in sorted(by_number)]) for name in by_number[0]
        }
        for path, by_number in layers.items()
    }


def add_weighted_adapter(*weighted: tuple[State, float]) -> State:
    """The weighted sum of adapters with the same target modules, as one adapter whose rank is the sum of theirs.

    sum_i w_i s_i B_i A_i is one product: the A_i stacked on top of each other, the w_i s_i B_i side by side.
    """

    def fail(expected: str, found: str):
        raise CourseError(f"add_weighted_adapter: expected {expected}, found {found}")

    def sizes(arrays):
        return arrays["lora_A"].shape[-1], arrays["lora_B"].shape[-2], arrays["scale"].shape

    if not weighted:
        fail("at least one pair (adapter, weight)", "none")
    first = weighted[0][0]
    for state, _ in weighted:
        if state.keys() != first.keys():
            fail("adapters with the same target modules", "different ones")
        for path, arrays in first.items():
            if sizes(state[path]) != sizes(arrays):
                what = f"adapters of one base (in, out, layers {sizes(arrays)})"
                fail(what, f"{sizes(state[path])} at {path}")

    def scaled_B(arrays, weight):
        return weight * arrays["scale"][..., None, None] * arrays["lora_B"]

    return {
        path: {
            "lora_A": np.concatenate([state[path]["lora_A"] for state, _ in weighted], axis=-2),
            "lora_B": np.concatenate([scaled_B(state[path], w) for state, w in weighted], axis=-1),
            "scale": np.ones_like(arrays["scale"]),
        }
        for path, arrays in first.items()
    }


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
        """What the unmerged adapter adds to one token's forward pass: a multiply-add for each of its numbers."""
        return 2 * self.adapter


def count(model: nnx.Module) -> Counts:
    """Parameters of the adapter and of the base, from shapes. Layers switched off, and zero padding, count too."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    small = sum(
        math.prod(leaf.shape)
        for _, leaf in flat
        if isinstance(leaf, nnx.LoRAParam) or _is_lora(leaf)
    )
    return Counts(adapter=small, base=sum(math.prod(leaf.shape) for _, leaf in flat) - small)


def _is_lora(
    leaf,
) -> bool:  # flax before 0.12 hands out VariableState, which carries the type in `type`
    return isinstance(getattr(leaf, "type", None), type) and issubclass(leaf.type, nnx.LoRAParam)


def parameters(features: tuple[int, int], rank: int) -> int:
    """How many numbers an adapter of this rank has on one layer: R (in + out)."""
    return rank * (features[0] + features[1])
