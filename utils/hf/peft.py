"""Adapters as files: PEFT's folder, `adapter_model.safetensors` and `adapter_config.json`.

A folder holds the adapter and nothing of the base. Tensors are named as PEFT names them, one A [R,
in] and one B [out, R] per layer, whatever the stacking in memory:

    base_model.model.layers.0.self_attn.q_proj.lora_A.weight

The safetensors header also carries a fingerprint of the base: an adapter is a change *of
something*, and on another base it would run without complaint and mean nothing.
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
TENSOR = "base_model.model.{}.lora_{}.weight"  # of a module, A or B


@jax.jit
def _first(array):
    return array.reshape(-1)[:4096]  # compiled, this reads no more than it returns


def fingerprint(model: nnx.Module) -> str:
    """sha256 over names, shapes and the first 4,096 numbers of every base array, which is quick."""
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
    """The module's name in a Hugging Face model; a tied head is called `lm_head`."""
    return "lm_head" if isinstance(a, lora.LoRATiedHead) else _numbered(path, a.stack, layer)


def _numbered(path: str, stack: int | None, layer: int) -> str:
    """The path of one layer of a stack: model.layers.q_proj -> model.layers.3.q_proj."""
    return path if stack is None else path.replace("layers.", f"layers.{layer}.", 1)


def _target_modules(model: nnx.Module, adapted: set[str]) -> list[str]:
    """The shortest list that PEFT reads as these modules: their last names where all are adapted."""
    every = set()
    for path, _, _, module in lora.modules(model):
        if isinstance(module, lora.Adapter):
            every |= {_name(path, module, layer) for layer in range(module.stack or 1)}
        elif isinstance(module, lora.LINEAR):
            stack = lora.features(module)[1]
            every |= {_numbered(path, stack, layer) for layer in range(stack or 1)}
    last = {name.split(".")[-1] for name in adapted}
    exact = {name for name in every if name.split(".")[-1] in last} == adapted
    return sorted(last if exact else adapted)


def save(
    model: nnx.Module, directory: str | Path, *, base: str | None = None, overwrite: bool = False
) -> Path:
    """Write the adapter of `model` into a new folder: all of it, or nothing.

    `base` is the base model's name, for `base_model_name_or_path`. Layers switched off (scale 0)
    are left out, smaller ranks are trimmed. Scales are written as the alpha of plain alpha / r
    scaling, whatever made them. On several hosts all call it, and the first one writes. Raises
    `CourseError` when the folder exists (unless `overwrite`), while the adapter is merged, or when
    writing fails.
    """
    directory = Path(directory)
    if directory.exists():
        if not overwrite:
            what = "exists already: name another folder, or say overwrite=True to replace it"
            raise CourseError(f"{directory}: {what}")
        # What is replaced disappears: let that be an adapter, and not a folder of other things.
        paths = directory.iterdir() if directory.is_dir() else [directory]
        if others := sorted({path.name for path in paths} - {WEIGHTS, CONFIG}):
            what = f"expected an adapter's folder to replace, found {others[0]}: name another"
            raise CourseError(f"{directory}: {what}")
    adapters = lora.adapters(model)
    tensors, ranks, alphas = {}, {}, {}
    for path, a in adapters.items():
        if a.merged:
            what = "is merged into the base: call lora.unmerge(model) before saving"
            raise CourseError(f"{path}: {what}")
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
            for x, part in (("A", A[layer, :rank]), ("B", B[layer, :, :rank])):
                # A slice is not contiguous, and safetensors would write the memory as it lies.
                tensors[TENSOR.format(name, x)] = np.ascontiguousarray(part)
    if not tensors:
        what = "expected an adapter, found every layer switched off (scale 0)"
        raise CourseError(f"{directory}: {what}: there is nothing to save")
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
        "lora_dropout": float(next(iter(adapters.values())).dropout),
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


def read(directory: str | Path) -> tuple[dict, dict[str, np.ndarray], dict[str, str]]:
    """(configuration, tensors by name, metadata) of an adapter folder.

    Raises `CourseError` for one that is missing, damaged, or more than LoRA.
    """
    config_file, weights_file = Path(directory) / CONFIG, Path(directory) / WEIGHTS
    try:
        config = json.loads(config_file.read_text())
        with safe_open(weights_file, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except FileNotFoundError:
        what = f"expected {CONFIG} and {WEIGHTS}, found one or both missing"
        raise CourseError(f"{directory}: {what}") from None
    except ValueError as error:  # not JSON, or not even text
        raise CourseError(f"{config_file}: not JSON ({error}): copy the folder again") from None
    except (SafetensorError, OSError) as error:
        what = f"damaged or cut short ({error}): copy the folder again"
        raise CourseError(f"{weights_file}: {what}") from None
    is_lora = isinstance(config, dict) and config.get("peft_type") == "LORA"
    if not is_lora or not isinstance(config.get("r"), int):
        what = "expected peft_type LORA and a rank r, found another kind of adapter"
        raise CourseError(f"{config_file}: {what}")
    if not isinstance(alpha := config.get("lora_alpha"), int | float):
        raise CourseError(f"{config_file}: expected a number lora_alpha, found {alpha!r}")
    if not tensors:
        raise CourseError(f"{weights_file}: expected tensors, found none: was it saved completely?")
    for name in ("use_dora", "modules_to_save"):
        if config.get(name):
            what = f"expected no {name}, found {config[name]}: this adapter is more than LoRA"
            raise CourseError(f"{config_file}: {what}")
    return config, tensors, metadata


def load(model: nnx.Module, directory: str | Path, *, check_base: bool = True) -> nnx.Module:
    """Put a saved adapter on `model`, in place; a model without adapters gets those it needs injected.

    Raises `CourseError`, the model unchanged, for a damaged folder, tensors that fit no layer,
    another rank or other targets than those the model already has, or another base
    (`check_base=False` for one you know to be equivalent).
    """
    config, tensors, metadata = read(directory)
    kind = type(model).__name__
    modules = list(lora.modules(model))
    adapters = {path: module for path, *_, module in modules if isinstance(module, lora.Adapter)}
    for path, module in adapters.items():  # first: a merged model's weights are another base's
        if module.merged:
            what = "an adapter is merged into the base: call lora.unmerge(model) first"
            raise CourseError(f"{path}: {what}")
    expected = metadata.get("base_fingerprint")
    if check_base and expected is not None and expected != fingerprint(model):
        raise CourseError(
            f"{directory}: was made for another base than this {kind}: load that base first "
            "(check_base=False if you know that they are equal)"
        )
    state, left, tied = {}, dict(tensors), []
    for path, _, attribute, module in modules:
        is_tied = isinstance(module, lora.LoRATiedHead)
        if isinstance(module, lora.Adapter):
            sizes, stack = module.features, module.stack
        elif adapters or not isinstance(module, (*lora.LINEAR, *lora.TABLE)):
            continue
        else:
            sizes, stack = lora.features(module)
            if isinstance(module, lora.TABLE):
                if attribute != "embed_tokens" or hasattr(model, "lm_head"):
                    continue
                is_tied = True
        layers = {}
        for layer in range(stack or 1):
            name = "lm_head" if is_tied else _numbered(path, stack, layer)
            if (triple := _take(left, name, config, sizes, directory)) is not None:
                layers[layer] = triple
        if layers:
            state[path] = _stacked(layers, stack, *sizes)
            tied += [path] * is_tied
    if left:
        raise CourseError(f"{directory}: {sorted(left)[0]}: fits no layer of this {kind}")
    for path in state.keys() & adapters.keys():
        rank = state[path]["lora_A"].shape[-2]
        if rank != adapters[path].rank:
            what = f"expected rank {adapters[path].rank}, found {rank} in {directory}"
            raise CourseError(f"{path}: {what}: load into a fresh base")
    if not adapters:
        targets = ["lm_head" if path in tied else path for path in state]
        dropout = config.get("lora_dropout", 0.0)
        options = {"target_modules": targets, "dropout": dropout, "rngs": nnx.Rngs(0)}
        lora.inject(model, rank=1, alpha=1, **options)
    lora.set_adapter(model, state)
    return model


def _take(tensors: dict, name: str, config: dict, sizes: tuple[int, int], directory):
    """(A, B, scale) of one layer, taken out of `tensors`; None where it has no adapter."""
    where, (inside, outside) = f"{directory}: base_model.model.{name}", sizes
    A, B = (tensors.pop(TENSOR.format(name, x), None) for x in "AB")
    if A is None and B is None:
        return None
    if A is None or B is None:
        raise CourseError(f"{where}: expected lora_A and lora_B, found only one of them")
    A, B = np.asarray(A, np.float32), np.asarray(B, np.float32)
    if A.shape != (len(A), inside) or B.shape != (outside, len(A)):
        raise CourseError(
            f"{where}: expected A [R, {inside}] and B [{outside}, R], found {A.shape} and {B.shape}:"
            " was it made for another base?"
        )
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise CourseError(f"{where}: holds NaN or infinity: its training had diverged")
    rank = _of_pattern(config, "rank_pattern", name, config["r"])
    if rank != len(A):
        raise CourseError(f"{where}: {CONFIG} says rank {rank}, the tensor has rank {len(A)}")
    alpha = _of_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    return A, B, np.float32(alpha / (np.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(config: dict, which: str, name: str, default):
    """PEFT's rule: a key is a regular expression for the end of a name, and the first match counts."""
    for pattern, value in (config.get(which) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            what = f"{pattern!r} is not a regular expression ({error})"
            raise CourseError(f"{CONFIG}: {which}: {what}") from None
    return default


def _stacked(layers: dict[int, tuple], stack: int | None, inside: int, outside: int) -> dict:
    """Layers one by one -> one stack; layers that have no adapter get zeros and scale 0."""
    depth, rank = stack or 1, max(len(A) for A, _, _ in layers.values())
    out = {
        "lora_A": np.zeros((depth, rank, inside), np.float32),
        "lora_B": np.zeros((depth, outside, rank), np.float32),
        "scale": np.zeros(depth, np.float32),
    }
    for layer, (A, B, scale) in layers.items():
        out["lora_A"][layer, : len(A)], out["lora_B"][layer, :, : len(A)] = A, B
        out["scale"][layer] = scale
    return {n: jnp.asarray(array[0] if stack is None else array) for n, array in out.items()}
