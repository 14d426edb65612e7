"""Adapters as files: PEFT's folder, `adapter_model.safetensors` and `adapter_config.json`.

Tensors are named as PEFT names them, one A [R, in] and one B [out, R] per layer, whatever the
stacking in memory:

    base_model.model.layers.0.self_attn.q_proj.lora_A.weight

The safetensors header also carries a fingerprint of the base: on another base an adapter would run
without complaint and mean nothing.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils import CourseError, checkpoints, lora, unexpected

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TENSOR = "base_model.model.{}.lora_{}.weight"  # of a module, A or B
# What PEFT's configuration says of plain LoRA, whatever the adapter.
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False}
PLAIN |= {"modules_to_save": None, "use_dora": False, "use_rslora": False, "inference_mode": True}


@jax.jit
def _first(array):
    return array.reshape(-1)[:4096]  # compiled, this reads no more than it returns


def fingerprint(model: nnx.Module) -> str:
    """sha256 over names, shapes and the first 4,096 numbers of every base array, which is quick."""
    sha = hashlib.sha256()
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    rows = {".".join(str(part) for part in path if part != "base"): leaf for path, leaf in flat}
    for name in sorted(rows):
        if not name.endswith(("lora_A", "lora_B")):
            array = rows[name][...]
            sha.update(f"{name}{array.shape}{array.dtype}".encode())
            sha.update(checkpoints.gathered(_first(array)).tobytes())
    return sha.hexdigest()


def _places(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, nnx.Module, list[str]]]:
    """(path, module, its base, PEFT's names of its layers) of all that has or can have an adapter.

    The layers of model.layers.q_proj are model.layers.0.q_proj, ...; a tied head is `lm_head`.
    """
    for path, _, attribute, module in lora.modules(model):
        base = module.base if isinstance(module, lora.Adapter) else module
        is_table = isinstance(base, lora.TABLE)
        is_head = is_table and attribute == "embed_tokens" and not hasattr(model, "lm_head")
        if is_head or isinstance(module, (lora.Adapter, *lora.LINEAR)):
            depth = lora.features(base)[1] or 0
            numbered = [path.replace("layers.", f"layers.{i}.", 1) for i in range(depth)]
            yield path, module, base, numbered or ["lm_head" if is_table else path]


def save(model: nnx.Module, directory, *, base: str | None = None, overwrite=False) -> Path:
    """Write the adapter of `model` into a new folder: all of it, or nothing.

    `base` is the base model's name, for `base_model_name_or_path`. Layers switched off (scale 0)
    are left out, smaller ranks trimmed, and scales written as alpha / r, whatever made them. All
    hosts call it, the first one writes. Raises `CourseError` when the folder exists (unless
    `overwrite`), while the adapter is merged, or when writing fails.
    """
    directory = Path(directory)
    if directory.exists():
        if not overwrite:
            what = "exists already: name another folder, or say overwrite=True to replace it"
            raise CourseError(f"{directory}: {what}")
        # What is replaced disappears: let that be an adapter, and not a folder of other things.
        paths = directory.iterdir() if directory.is_dir() else [directory]
        if others := sorted({path.name for path in paths} - {WEIGHTS, CONFIG}):
            raise unexpected(directory, "an adapter's folder to replace", others[0], "name another")
    adapters = lora.adapters(model)
    names = {path: names for path, *_, names in _places(model)}
    tensors, ranks, alphas = {}, {}, {}
    for path, a in adapters.items():
        if a.merged:
            what = "is merged into the base: call lora.unmerge(model) before saving"
            raise CourseError(f"{path}: {what}")
        arrays = checkpoints.gathered([getattr(a, n)[...] for n in ("lora_A", "lora_B", "scale")])
        arrays = [np.array(array, np.float32) for array in arrays]
        for name, (A, B, scale) in zip(names[path], zip(*arrays) if a.stack else [arrays]):
            if scale == 0:
                continue
            used = np.flatnonzero(A.any(axis=1) | B.any(axis=0))
            ranks[name] = rank = int(used[-1]) + 1 if used.size else 1
            alphas[name] = float(scale) * rank
            # A slice is not contiguous, and safetensors would write the memory as it lies.
            tensors[TENSOR.format(name, "A")] = np.ascontiguousarray(A[:rank])
            tensors[TENSOR.format(name, "B")] = np.ascontiguousarray(B[:, :rank])
    if not tensors:
        found = "every layer switched off (scale 0)"
        raise unexpected(directory, "an adapter", found, "there is nothing to save")
    rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    # The shortest list that PEFT reads as these modules: their last names where all are adapted.
    last = {name.split(".")[-1] for name in ranks}
    every = {name for of_path in names.values() for name in of_path if name.split(".")[-1] in last}
    config = PLAIN | {
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(last if every == ranks.keys() else ranks),
        "lora_dropout": float(next(iter(adapters.values())).dropout),
    }
    metadata = {"format": "pt", "base_fingerprint": fingerprint(model)}
    if jax.process_index():
        return directory
    with checkpoints.atomic_dir(directory) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return directory


def read(directory: str | Path) -> tuple[dict, dict[str, np.ndarray], dict[str, str]]:
    """(configuration, tensors by name, metadata) of an adapter folder.

    Raises `CourseError` for one that is missing, damaged, or more than LoRA.
    """
    config_file, weights_file = Path(directory) / CONFIG, Path(directory) / WEIGHTS
    try:
        config = json.loads(config_file.read_text())
        with safe_open(weights_file, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise unexpected(directory, f"{CONFIG} and {WEIGHTS}", "one or both missing") from None
    except ValueError as error:  # not JSON, or not even text
        raise CourseError(f"{config_file}: not JSON ({error}): copy the folder again") from None
    except (SafetensorError, OSError) as error:
        what = f"damaged or cut short ({error}): copy the folder again"
        raise CourseError(f"{weights_file}: {what}") from None
    is_lora = isinstance(config, dict) and config.get("peft_type") == "LORA"
    if not is_lora or not isinstance(config.get("r"), int):
        raise unexpected(config_file, "peft_type LORA and a rank r", "another kind of adapter")
    if not isinstance(alpha := config.get("lora_alpha"), int | float):
        raise unexpected(config_file, "a number lora_alpha", repr(alpha))
    if not tensors:
        raise unexpected(weights_file, "tensors", "none", "was it saved completely?")
    for name in ("use_dora", "modules_to_save"):
        if found := config.get(name):
            raise unexpected(config_file, f"no {name}", found, "this adapter is more than LoRA")
    return config, tensors, metadata


def load(model: nnx.Module, directory: str | Path, *, check_base: bool = True) -> nnx.Module:
    """Put a saved adapter on `model`, in place; where it has none, what is needed is injected.

    Raises `CourseError`, the model unchanged, for a damaged folder, tensors that fit no layer,
    another rank or other targets than those the model already has, or another base
    (`check_base=False` for one you know to be equivalent).
    """
    config, tensors, metadata = read(directory)
    kind = type(model).__name__
    places = list(_places(model))
    adapters = {path: a for path, a, *_ in places if isinstance(a, lora.Adapter)}
    for path, a in adapters.items():  # first: a merged model's weights are another base's
        if a.merged:
            what = "an adapter is merged into the base: call lora.unmerge(model) first"
            raise CourseError(f"{path}: {what}")
    expected = metadata.get("base_fingerprint")
    if check_base and expected is not None and expected != fingerprint(model):
        what = f"was made for another base than this {kind}: load that base first"
        how = "(check_base=False if you know that they are equal)"
        raise CourseError(f"{directory}: {what} {how}")
    state, targets, left = {}, [], dict(tensors)
    for path, _, base, names in places:
        if adapters and path not in adapters:
            continue
        sizes, stack = lora.features(base)
        taken = [_take(left, name, config, sizes, directory) for name in names]
        if any(taken):
            state[path] = _stacked(taken, stack, *sizes)
            targets.append("lm_head" if names == ["lm_head"] else path)
    if left:
        raise CourseError(f"{directory}: {sorted(left)[0]}: fits no layer of this {kind}")
    for path in state.keys() & adapters.keys():
        expected, rank = adapters[path].rank, state[path]["lora_A"].shape[-2]
        if rank != expected:
            found = f"{rank} in {directory}"
            raise unexpected(path, f"rank {expected}", found, "load into a fresh base")
    if not adapters:
        options = dict(rank=1, alpha=1, dropout=config.get("lora_dropout", 0.0))
        lora.inject(model, target_modules=targets, rngs=nnx.Rngs(0), **options)
    lora.set_adapter(model, state)
    return model


def _take(tensors: dict, name: str, config: dict, sizes: tuple[int, int], directory):
    """(A, B, scale) of one layer, taken out of `tensors`; None where it has no adapter."""
    where = f"{directory}: base_model.model.{name}"
    inside, outside = sizes
    A, B = (tensors.pop(TENSOR.format(name, x), None) for x in "AB")
    if A is None and B is None:
        return None
    if A is None or B is None:
        raise unexpected(where, "lora_A and lora_B", "only one of them")
    A, B = np.asarray(A, np.float32), np.asarray(B, np.float32)
    if A.shape != (len(A), inside) or B.shape != (outside, len(A)):
        expected, found = f"A [R, {inside}] and B [{outside}, R]", f"{A.shape} and {B.shape}"
        raise unexpected(where, expected, found, "was it made for another base?")
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise CourseError(f"{where}: holds NaN or infinity: its training had diverged")
    rank = _of_pattern(config, "rank_pattern", name, config["r"])
    if rank != len(A):
        raise CourseError(f"{where}: {CONFIG} says rank {rank}, the tensor has rank {len(A)}")
    alpha = _of_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    return A, B, np.float32(alpha / (np.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(config: dict, which: str, name: str, default):
    """PEFT's rule: a key is a regular expression for the end of a name; the first match counts."""
    for pattern, value in (config.get(which) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            what = f"{pattern!r} is not a regular expression ({error})"
            raise CourseError(f"{CONFIG}: {which}: {what}") from None
    return default


def _stacked(layers: list[tuple | None], stack: int | None, inside: int, outside: int) -> dict:
    """Layers one by one -> one stack; layers that have no adapter get zeros and scale 0."""
    depth, rank = len(layers), max(len(layer[0]) for layer in layers if layer)
    out = {
        "lora_A": np.zeros((depth, rank, inside), np.float32),
        "lora_B": np.zeros((depth, outside, rank), np.float32),
        "scale": np.zeros(depth, np.float32),
    }
    for i, layer in enumerate(layers):
        if layer:
            A, B, out["scale"][i] = layer
            out["lora_A"][i, : len(A)], out["lora_B"][i, :, : len(A)] = A, B
    return {n: jnp.asarray(array[0] if stack is None else array) for n, array in out.items()}
