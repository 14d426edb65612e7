"""Weights: from a Hugging Face folder into the model, and back, bit for bit.

A safetensors file is a JSON header (name -> dtype, shape, byte range) and then the bytes. The
header is read first and compared with the model's own list of names and shapes: one table, `names`,
for both directions, and nothing is loaded unless it agrees to the last tensor. The bytes are then
read through a memory map, tensor by tensor, each device's slice alone, and cast on the way into the
stacked array they belong to. At no moment is there a second copy of the model in memory.

    model = weights.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=jnp.bfloat16)
    weights.save(model, "folder", tokenizer=tok)      # transformers loads it

Never a pickle: unpickling runs the file's code. GGUF files (llama.cpp's) are read by `gguf.py`.
"""

import functools
import json
import math
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils import CourseError, checkpoints, lora, sharding, unexpected
from utils.hf import config as hf_config
from utils.hf import gguf, hub
from utils.transformer import Config, Transformer

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
DTYPES = {"F32": FLOAT32, "F16": FLOAT16, "BF16": np.dtype(ml_dtypes.bfloat16)}
# Buffers of old checkpoints that nobody reads: RoPE's frequencies follow from the configuration.
IGNORED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


def _abstract(config: Config, param_dtype=FLOAT32) -> Transformer:
    """The model with shapes in place of arrays; nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(config, param_dtype=param_dtype, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=8)
def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model as path -> shape."""
    flat = nnx.to_flat_state(nnx.state(_abstract(config), nnx.Param))
    return {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in flat}


def names(config: Config) -> dict[str, tuple[str, int | None]]:
    """The one table: a tensor's name on the hub -> (the parameter's path here, its layer or None)."""
    table = {}
    for path in _shapes(config):
        if ".layers." in path:
            for i in range(config.num_hidden_layers):
                table[path.replace(".layers.", f".layers.{i}.")] = path, i
        else:
            table[path] = path, None
    return table


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model's files: name on the hub -> shape."""
    shapes, table = _shapes(config), names(config).items()
    return {name: shapes[path][layer is not None :] for name, (path, layer) in table}


# ----------------------------------------------------------------------------------------- reading


class Safetensors:
    """A Hugging Face folder, of one file or several: names and shapes now, bytes later."""

    def __init__(self, directory: Path):
        self.path = directory
        self.where = {}  # name -> (file, dtype, shape, offset of its first byte)
        index = directory / hub.INDEX
        listed = hub.weight_map(directory) if index.exists() else {}
        for file in sorted(set(listed.values())) if index.exists() else ["model.safetensors"]:
            path = directory / file
            if Path(file).suffix != ".safetensors":
                raise unexpected(index, "safetensors files", file, "not loaded")
            if not path.is_file():
                raise CourseError(f"{path}: named by {hub.INDEX}, not found: download it again")
            header = _header(path)
            indexed = {name for name, at in listed.items() if at == file}
            for name in sorted(indexed ^ header.keys()) if index.exists() else ():
                place = hub.INDEX if name in indexed else file
                found, fix = f"in {place} alone", "download it again"
                raise unexpected(f"{path}: {name}", "in index and file", found, fix)
            self.where |= header

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape, _) in self.where.items()}

    def dtype(self, name: str) -> np.dtype:
        return self.where[name][1]

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a view of the file: bytes come from the disk when they are looked at."""
        path, dtype, shape, offset = self.where[name]
        return np.ndarray(shape, dtype, np.memmap(path, mode="r"), offset)


def _header(path: Path) -> dict[str, tuple]:
    """name -> (file, dtype, shape, offset). The library checks lengths and overlaps first."""
    try:
        with safe_open(path, "numpy"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CourseError(f"{path}: damaged or cut short ({error}): download it again") from None
    header.pop("__metadata__", None)
    where = {}
    for name, entry in header.items():
        code, start = entry["dtype"], 8 + length + entry["data_offsets"][0]
        if code not in DTYPES:
            raise unexpected(f"{path}: {name}", ", ".join(DTYPES), code, "not supported here")
        where[name] = path, DTYPES[code], tuple(entry["shape"]), start
    return where


def _compare(checkpoint: Safetensors | gguf.Checkpoint, config: Config) -> None:
    """Strict: a tensor that is missing, too many or of another shape is an error that names it."""
    stored, expected = checkpoint.shapes(), tensor_shapes(config)

    def refuse(name: str, what: str) -> None:
        raise CourseError(f"{checkpoint.path}: {name}: {what}")

    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in stored:  # some tied checkpoints store the table twice
        if table not in stored or not _same_bits(*map(checkpoint.tensor, (head, table))):
            what = "config.json says tied to embed_tokens, found another matrix"
            refuse(head, f"{what}: is tie_word_embeddings wrong?")
        del stored[head]
    for name in sorted(expected.keys() | stored.keys()):
        if name not in expected:
            if not name.endswith(IGNORED):
                refuse(name, f"no such tensor in this {config.model_type} model")
        elif name not in stored:
            hint = ": is tie_word_embeddings wrong?" if name == head else ""
            refuse(name, f"expected {expected[name]}, found no such tensor{hint}")
        elif stored[name] != expected[name]:
            turned = stored[name] == expected[name][::-1]
            hint = ": is this checkpoint already transposed?" if turned else ""
            refuse(name, f"expected {expected[name]}, found {stored[name]}{hint}")


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b))


def _all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, which have all exponent bits set. In small pieces."""
    inf = int(_bits(np.array(np.inf, array.dtype))[()])
    unsigned = (1 << 8 * array.dtype.itemsize - 1) - 1
    flat, piece = _bits(array).reshape(-1), 1 << 18
    pieces = (flat[i : i + piece] & unsigned for i in range(0, flat.size, piece))
    return all(int(numbers.max()) < inf for numbers in pieces)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, and aligned to 64 bytes: JAX's CPU backend takes such memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _reader(checkpoint, stack: list[str], shape: tuple[int, ...], dtype: np.dtype):
    """The callback that gives JAX one device's part of a parameter, cast and checked.

    `stack` names the tensors of its layers, or the one that it is. Replicas share what was read.
    """
    parts: dict[tuple, np.ndarray] = {}
    stacked = len(shape) > len(checkpoint.shapes()[stack[0]])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(size)[:2] for s, size in zip(index, shape))
        if key in parts:
            return parts[key]
        out = _empty(tuple(stop - start for start, stop in key), dtype)
        layers = range(*key[0]) if stacked else [0]
        for row, layer in zip(out if stacked else out[None], layers):
            values = checkpoint.tensor(stack[layer])[index[1:] if stacked else index]
            with np.errstate(over="ignore"):  # too large a number becomes infinity
                np.copyto(row, values, casting="unsafe")
            if not _all_finite(row):
                too_large = _all_finite(np.ascontiguousarray(values))
                what = f"does not fit into {dtype}" if too_large else "is not finite"
                raise CourseError(f"{checkpoint.path}: {stack[layer]}: holds a number that {what}")
        parts[key] = out
        return out

    return part


def load(
    source: str | Path, *, dtype=None, mesh: Mesh | None = None, rules: sharding.Rules | None = None
) -> Transformer:
    """The model in a Hugging Face folder or repository, or in a GGUF file, with its weights.

    `dtype` casts on the way (default: each tensor as it is stored; GGUF: float32). With a `mesh`
    each device gets, and each host reads, its own slices only. Raises `CourseError` that names the
    tensor for a checkpoint that is not exactly this model.
    """
    path = hub.model(source)
    if path.suffix == ".gguf":
        checkpoint = gguf.read(path)
        config = hf_config.read(checkpoint.config)
    else:
        config = hf_config.read(path)
        checkpoint = Safetensors(path)
    _compare(checkpoint, config)
    if dtype is not None and np.dtype(dtype) not in DTYPES.values():
        raise unexpected("dtype", "float32, float16 or bfloat16", np.dtype(dtype))
    stacks: dict[str, list[str]] = {}
    for name, (parameter, _) in names(config).items():  # layers come in order
        stacks.setdefault(parameter, []).append(name)
    arrays = {}
    for parameter, shape in _shapes(config).items():
        where = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            rules = rules or sharding.Rules()
            where = rules.sharding(mesh, parameter, shape, config.num_key_value_heads)
        stored = functools.reduce(np.promote_types, map(checkpoint.dtype, stacks[parameter]))
        cast = np.dtype(stored if dtype is None else dtype)
        read = _reader(checkpoint, stacks[parameter], shape, cast)
        arrays[parameter] = jax.make_array_from_callback(shape, where, read)
    model = _abstract(config, arrays["model.embed_tokens.weight"].dtype)
    graph, state = nnx.split(model)
    pure = jax.tree_util.tree_map_with_path(
        lambda keys, _: arrays[".".join(str(key.key) for key in keys)], nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


# ----------------------------------------------------------------------------------------- writing


def tensors(model: Transformer) -> dict[str, np.ndarray]:
    """Every tensor of a model under its name on the hub, on a CPU as views of the model's own arrays.

    Raises `CourseError` for an adapter that is not merged: it has no place in a base model's files.
    """
    for path, _, _, module in lora.modules(model):
        if isinstance(module, lora.Adapter) and not module.merged:
            what = "has an adapter: call lora.merge(model) first, or save it with hf.peft.save"
            raise CourseError(f"{path}: {what}")
    flat = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] not in ("lora_A", "lora_B"):
            flat[".".join(str(part) for part in path if part != "base")] = np.asarray(leaf[...])
    table = names(model.config).items()
    return {name: flat[path][... if layer is None else layer] for name, (path, layer) in table}


def save(
    model: Transformer, directory: str | Path, *, tokenizer=None, shard_bytes: float = 5e9
) -> Path:
    """Write a Hugging Face folder that transformers and `load` read back bit for bit, or nothing.

    Weights go into one file, or into several of at most `shard_bytes` with an index; `tokenizer`
    (from `hub.tokenizer`) goes beside them. Raises `CourseError` when the folder holds something
    already, or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise unexpected(directory, "a new or an empty folder", "something in it", "name another")
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors(model).items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    n = len(shards)
    files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    files = files if n > 1 else ["model.safetensors"]
    with checkpoints.atomic_dir(directory) as temporary:
        for file, shard in zip(files, shards):
            save_file(shard, temporary / file, metadata={"format": "pt"})
            (temporary / file).chmod(0o644)  # safetensors makes them for their owner alone
        if n > 1:
            size = sum(a.nbytes for shard in shards for a in shard.values())
            weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(temporary / hub.INDEX, index)
        write_config(temporary, model.config, model.param_dtype)
        if tokenizer is not None:
            tokenizer.save(temporary)
    return directory


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_config(directory: Path, config: Config, dtype) -> None:
    _write_json(directory / "config.json", hf_config.to_dict(config) | {"torch_dtype": str(dtype)})
