"""Adapters as files: PEFT's folder, `adapter_model.safetensors` and `adapter_config.json`.

A folder holds the adapter and nothing of the base. Tensors are named as PEFT names them, one A [R, in] and one B [out, R]
per layer, whatever the stacking in memory:

    base_model.model.layers.0.self_attn.q_proj.lora_A.weight

The safetensors header also carries a fingerprint of the base: an adapter is a change *of something*, and on another base it
would run without complaint and mean nothing.
"""

import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils import CourseError, checkpoints, lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@jax.jit
def _first(array):
    return array.reshape(-1)[:4096]  # compiled, this reads no more than it returns


def fingerprint(model: nnx.Module) -> str:
    """sha256 over names, shapes and the first 4,096 numbers of every base array: quick, also for large models."""
    sha = hashlib.sha256()
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    rows = {".".join(str(part) for part in path if part != "base"): leaf for path, leaf in flat}
    for name in sorted(rows):
        if name.split(".")[-1] not in ("lora_A", "lora_B"):
            array = rows[name][...]
            sha.update(f"{name}{array.shape}{array.dtype}".encode())
            sha.update(checkpoints.gathered(_first(array)).tobytes())
    return sha.hexdigest()


def _name(path: str, a: lora.Adapter, layer: int) -> str:
    """The module's name in a Hugging Face model: the layer's number after `layers`, the tied head as `lm_head`."""
    if isinstance(a, lora.LoRATiedHead):
        return "lm_head"
    return _numbered(path, None if a.stack is None else layer)


def _numbered(path: str, layer: int | None) -> str:
    """A path with the number of one layer of the stack: model.layers.q_proj -> model.layers.3.q_proj."""
    return path if layer is None else path.replace("layers.", f"layers.{layer}.", 1)


def _target_modules(model: nnx.Module, adapted: set[str]) -> list[str]:
    """The shortest list that PEFT reads as these modules: last names, where every module of that name is adapted."""
    every = set()
    for path, _, _, module in lora.modules(model):
        if isinstance(module, lora.Adapter):
            every |= {_name(path, module, layer) for layer in range(module.stack or 1)}
        elif isinstance(module, lora.LINEAR):
            stack = lora.features(module)[1]
            every |= {_numbered(path, None if stack is None else layer) for layer in range(stack or 1)}
    last = {name.split(".")[-1] for name in adapted}
    exact = {name for name in every if name.split(".")[-1] in last} == adapted
    return sorted(last if exact else adapted)


def save_adapter(model: nnx.Module, directory: str | Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Write the adapter of `model` into a new folder: all of it, or nothing.

    `base` is the base model's name, for `base_model_name_or_path`. Layers switched off (scale 0) are left out, smaller
    ranks are trimmed. Scales are written as the alpha of plain alpha / r scaling, whatever made them. On several hosts
    all call it, and the first one writes. Raises `CourseError` when the folder exists (unless `overwrite`), while the
    adapter is merged, or when writing fails.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise CourseError(f"{directory}: exists already: name another folder, or say overwrite=True to replace it")
    if directory.exists():
        # What is replaced disappears: let that be an adapter, and not somebody's folder of other things.
        names = {p.name for p in directory.iterdir()} if directory.is_dir() else {directory.name}
        if others := sorted(names - {WEIGHTS, CONFIG}):
            raise CourseError(f"{directory}: expected an adapter's folder to replace, found {others[0]}: name another")
    found = lora.adapters(model)
    tensors, ranks, alphas = {}, {}, {}
    for path, a in found.items():
        if a.merged:
            raise CourseError(f"{path}: is merged into the base: call lora.unmerge(model) before saving")
        arrays = checkpoints.gathered([getattr(a, n)[...] for n in ("lora_A", "lora_B", "scale")])
        A, B, scale = (np.array(array, np.float32) for array in arrays)
        if a.stack is None:
            A, B, scale = A[None], B[None], scale[None]
        for layer in range(len(A)):
            if scale[layer] == 0:
                continue
            used = np.flatnonzero(A[layer].any(axis=1) | B[layer].any(axis=0))
            rank = int(used[-1]) + 1 if used.size else 1
            name = _name(path, a, layer)
            ranks[name], alphas[name] = rank, float(scale[layer]) * rank
            # Slices are not contiguous, and safetensors would write the memory as it lies.
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(A[layer, :rank])
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(B[layer, :, :rank])
    if not tensors:
        raise CourseError("save_adapter: every layer is switched off (scale 0): there is nothing to save")
    rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(model, set(ranks)),
        "lora_dropout": float(next(iter(found.values())).dropout),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    metadata = {"format": "pt", "base_fingerprint": fingerprint(model)}
    if jax.process_index():
        return directory
    with checkpoints.atomic_dir(directory) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return directory


def read_adapter(directory: str | Path) -> tuple[dict, dict[str, np.ndarray], dict[str, str]]:
    """(configuration, tensors by name, metadata) of an adapter folder. Raises `CourseError` for one that is damaged."""
    directory = Path(directory)
    try:
        config = json.loads((directory / CONFIG).read_text())
        with safe_open(directory / WEIGHTS, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise CourseError(f"{directory}: expected {CONFIG} and {WEIGHTS}, found one or both missing") from None
    except ValueError as error:  # not JSON, or not even text
        raise CourseError(f"{directory / CONFIG}: not JSON ({error}): copy the folder again") from None
    except (SafetensorError, OSError) as error:
        raise CourseError(f"{directory / WEIGHTS}: damaged or cut short ({error}): copy the folder again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise CourseError(f"{directory / CONFIG}: expected peft_type LORA and a rank r, found another kind of adapter")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise CourseError(f"{directory / CONFIG}: expected a number lora_alpha, found {config.get('lora_alpha')!r}")
    if not tensors:
        raise CourseError(f"{directory / WEIGHTS}: holds no tensor: was the adapter saved before it was whole?")
    for name in ("use_dora", "modules_to_save"):
        if config.get(name):
            raise CourseError(
                f"{directory / CONFIG}: {name} is set: this adapter is more than LoRA, which is all we read"
            )
    return config, tensors, metadata


def load_adapter(model: nnx.Module, directory: str | Path, *, check_base: bool = True) -> nnx.Module:
    """Put a saved adapter on `model`, which gets the layers it needs injected if it has none; in place.

    Raises `CourseError`, the model unchanged, for a damaged folder, tensors that fit no layer, another rank or other
    targets than those the model already has, or another base (`check_base=False` for one you know to be equivalent).
    """
    config, tensors, metadata = read_adapter(directory)
    for path, _, _, module in lora.modules(model):  # first: a merged model is another base in its numbers, too
        if isinstance(module, lora.Adapter) and module.merged:
            raise CourseError(f"{path}: an adapter is merged into the base: call lora.unmerge(model) first")
    wanted = metadata.get("base_fingerprint")
    if check_base and wanted is not None and wanted != fingerprint(model):
        raise CourseError(
            f"{directory}: was made for another base than this {type(model).__name__}: load that base first "
            "(check_base=False if you know that they are equal)"
        )
    fresh = not any(isinstance(module, lora.Adapter) for *_, module in lora.modules(model))
    layers = {}  # path of a possible adapter -> (features, stack, tied)
    for path, _, name, module in lora.modules(model):
        if isinstance(module, lora.Adapter):
            layers[path] = (module.features, module.stack, isinstance(module, lora.LoRATiedHead))
        elif fresh and isinstance(module, lora.LINEAR):
            layers[path] = (*lora.features(module), False)
        elif fresh and isinstance(module, lora.TABLE) and name == "embed_tokens" and not hasattr(model, "lm_head"):
            layers[path] = (*lora.features(module), True)
    state, left = {}, dict(tensors)
    for path, ((inside, outside), stack, tied) in layers.items():
        pairs = []
        for layer in range(stack or 1):
            part = "lm_head" if tied else _numbered(path, None if stack is None else layer)
            name = f"base_model.model.{part}"
            pair = left.pop(f"{name}.lora_A.weight", None), left.pop(f"{name}.lora_B.weight", None)
            if (pair[0] is None) != (pair[1] is None):
                raise CourseError(f"{directory}: {name}: expected lora_A and lora_B, found only one of them")
            if pair[0] is not None:
                A, B = (np.asarray(x, np.float32) for x in pair)
                if A.shape != (len(A), inside) or B.shape != (outside, len(A)):
                    raise CourseError(
                        f"{directory}: {name}: expected A [R, {inside}] and B [{outside}, R], found {A.shape} and "
                        f"{B.shape}: was it made for another base?"
                    )
                if not (np.isfinite(A).all() and np.isfinite(B).all()):
                    raise CourseError(f"{directory}: {name}: holds NaN or infinity: its training had diverged")
                short = name.removeprefix("base_model.model.")
                rank = _of_pattern(config, "rank_pattern", short, config["r"])
                if rank != len(A):
                    raise CourseError(f"{directory}: {name}: {CONFIG} says rank {rank}, the tensor has rank {len(A)}")
                alpha = _of_pattern(config, "alpha_pattern", short, config["lora_alpha"])
                scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
                pairs.append((layer, A, B, np.float32(scale)))
        if pairs:
            state[path] = _stacked(pairs, stack, inside, outside)
    if left:
        raise CourseError(f"{directory}: {sorted(left)[0]}: fits no layer of this {type(model).__name__}")
    if not fresh:
        for path, a in lora.adapters(model).items():
            if path in state and state[path]["lora_A"].shape[-2] != a.rank:
                found = state[path]["lora_A"].shape[-2]
                raise CourseError(
                    f"{path}: expected rank {a.rank}, found {found} in {directory}: load into a fresh base"
                )
    else:
        names = ["lm_head" if layers[path][2] else path for path in state]
        lora.inject(model, rank=1, alpha=1, target_modules=names, dropout=config.get("lora_dropout", 0.0), rngs=nnx.Rngs(0))
    lora.set_adapter(model, state)
    return model


def _of_pattern(config: dict, which: str, name: str, default):
    """PEFT's rule: a key is a regular expression for the end of a module's name, and the first one that matches counts."""
    for pattern, value in (config.get(which) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise CourseError(f"{CONFIG}: {which}: {pattern!r} is not a regular expression ({error})") from None
    return default


def _stacked(pairs, stack, inside: int, outside: int) -> dict[str, np.ndarray]:
    """Layers one by one -> one stack; layers that have no adapter get zeros and scale 0."""
    depth, rank = stack or 1, max(len(A) for _, A, _, _ in pairs)
    out = {
        "lora_A": np.zeros((depth, rank, inside), np.float32),
        "lora_B": np.zeros((depth, outside, rank), np.float32),
        "scale": np.zeros(depth, np.float32),
    }
    for layer, A, B, scale in pairs:
        out["lora_A"][layer, : len(A)], out["lora_B"][layer, :, : len(A)], out["scale"][layer] = A, B, scale
    return {name: jnp.asarray(array[0] if stack is None else array) for name, array in out.items()}
