"""Weights: from a Hugging Face folder into the model, and back, bit for bit.

A safetensors file is a JSON header (name -> dtype, shape, byte range) and then the bytes. The header is read first and
compared with the model's own list of names and shapes: one table, `names`, for both directions, and nothing is loaded
unless it agrees to the last tensor. The bytes are then read through a memory map, tensor by tensor, each device's slice
alone, cast on the way into the stacked array it belongs to. At no moment is there a second copy of the model in memory.

    model = weights.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=jnp.bfloat16)
    weights.save(model, "folder", tokenizer=tok)      # transformers loads it

Never a pickle: unpickling runs the file's code. GGUF files (llama.cpp's) are read through `utils/gguf.py`.
"""

import functools
import json
import math
import os
import shutil
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils import CourseError, checkpoints, sharding
from utils.hf import hub
from utils.transformer import Config, Transformer

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INDEX = "model.safetensors.index.json"
# Buffers that old checkpoints carry and nobody reads: the RoPE frequencies follow from the configuration.
IGNORED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


@functools.lru_cache(maxsize=8)
def _abstract(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model as path -> shape; nothing is allocated."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def names(config: Config) -> dict[str, tuple[str, int | None]]:
    """The one table: each tensor's name on the hub -> (the parameter's path here, its layer in the stack or None)."""
    table = {}
    for path in _abstract(config):
        if ".layers." in path:
            for i in range(config.num_hidden_layers):
                table[path.replace(".layers.", f".layers.{i}.")] = path, i
        else:
            table[path] = path, None
    return table


class Safetensors:
    """The tensors of a Hugging Face folder, in one file or in several with an index: names and shapes now, bytes later."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = Config.from_hf(directory)
        self.where = {}  # name -> (file, dtype, shape, offset of its first byte)
        index = directory / INDEX
        if index.exists():
            try:
                listed = json.loads(index.read_text())["weight_map"]
                files = sorted(set(listed.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CourseError(
                    f"{index}: expected weight_map: name -> file, found something else ({error})"
                ) from None
        else:
            listed, files = None, ["model.safetensors"]
        for name in files:
            path = directory / name
            if Path(name).suffix != ".safetensors":
                raise CourseError(f"{index}: expected safetensors files, found {name}: not loaded")
            if not path.is_file():
                raise CourseError(_missing_file(directory, path, listed is not None))
            found = _header(path)
            if listed is not None:
                named = {tensor for tensor, file in listed.items() if file == name}
                for tensor in sorted(named ^ found.keys()):
                    place = INDEX if tensor in named else name
                    raise CourseError(
                        f"{path}: {tensor}: expected in index and file, found in {place} alone: download it again"
                    )
            self.where |= found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape, _) in self.where.items()}

    def dtype(self, name: str) -> np.dtype:
        return self.where[name][1]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a view of the file: bytes come from the disk when, and where, they are looked at."""
        path, dtype, shape, offset = self.where[name]
        return np.ndarray(shape, dtype, _mapped(path), offset)


def _missing_file(directory: Path, path: Path, indexed: bool) -> str:
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if indexed:
        return f"{path}: named by {INDEX}, but not there: download the folder again"
    if pickles:
        return f"{directory}: expected safetensors, found {pickles[0]}, a pickle, which may run code: not loaded"
    return f"{path}: not found: expected model.safetensors or {INDEX} in {directory}"


def _mapped(path: Path) -> np.memmap:
    return np.memmap(path, mode="r")


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
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CourseError(
                f"{path}: {name}: expected {', '.join(DTYPES)}, found {entry['dtype']}: not supported here"
            )
    return {
        name: (path, DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
    }


class Gguf:
    """The tensors of a GGUF file under the same methods; quantised ones are dequantised as they are read."""

    def __init__(self, path: Path):
        from utils.hf import gguf

        self.directory, self.file = path, gguf.read(path)
        self.config = Config.from_hf(self.file.config)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.file.shape(name)) for name in self.file.names()}

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        return self.file.tensor(name)


def _compare(checkpoint, table: dict) -> None:
    """Strict: the first tensor that is missing, too many or of another shape is an error that names it."""
    config, found = checkpoint.config, checkpoint.shapes()
    shapes = _abstract(config)
    if config.tie_word_embeddings and "lm_head.weight" in found:  # some tied checkpoints store the table twice
        twice = (checkpoint.read(name) for name in ("lm_head.weight", "model.embed_tokens.weight") if name in found)
        if not _same_bits(*twice):
            raise CourseError(
                f"{checkpoint.directory}: lm_head.weight: config.json says tied to embed_tokens, found another matrix: "
                "is tie_word_embeddings wrong?"
            )
        del found["lm_head.weight"]
    for name in sorted(table.keys() | found.keys()):
        if name not in table:
            if not name.endswith(IGNORED):
                raise CourseError(f"{checkpoint.directory}: {name}: no such tensor in this {config.model_type} model")
            continue
        path, layer = table[name]
        expected = shapes[path] if layer is None else shapes[path][1:]
        if name not in found:
            hint = ": is tie_word_embeddings wrong?" if name == "lm_head.weight" else ""
            raise CourseError(f"{checkpoint.directory}: {name}: expected {expected}, found no such tensor{hint}")
        if found[name] != expected:
            hint = ": is this checkpoint already transposed?" if found[name] == expected[::-1] else ""
            raise CourseError(f"{checkpoint.directory}: {name}: expected {expected}, found {found[name]}{hint}")


def _same_bits(a: np.ndarray, b: np.ndarray | None = None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite: their exponent bits are all ones. In pieces that stay in the CPU's cache."""
    inf, unsigned = int(_bits(np.array(np.inf, array.dtype))[()]), (1 << 8 * array.dtype.itemsize - 1) - 1
    flat, piece = _bits(array).reshape(-1), 1 << 18
    return all(int((flat[i : i + piece] & unsigned).max()) < inf for i in range(0, flat.size, piece))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that begins at a multiple of 64 bytes, which JAX's CPU backend takes over without a copy."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _reader(checkpoint, tensors: list[str], shape: tuple[int, ...], dtype: np.dtype):
    """The callback that gives JAX one device's part of a parameter, cast and checked; replicas share what was read."""
    done: dict[tuple, np.ndarray] = {}
    stacked = len(shape) > len(checkpoint.shapes()[tensors[0]])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(size)[:2] for s, size in zip(index, shape))
        if key not in done:
            out = _empty(tuple(stop - start for start, stop in key), dtype)
            chosen = range(*key[0]) if stacked else [0]
            for row, layer in zip(out if stacked else out[None], chosen):
                found = checkpoint.read(tensors[layer])[index[1:] if stacked else index]
                with np.errstate(over="ignore"):  # too large a number becomes infinity, and is found below
                    np.copyto(row, found, casting="unsafe")
                if not _all_finite(row):
                    what = (
                        "does not fit into " + str(dtype)
                        if _all_finite(np.ascontiguousarray(found))
                        else "is not finite"
                    )
                    raise CourseError(f"{checkpoint.directory}: {tensors[layer]}: holds a number that {what}")
            done[key] = out
        return done[key]

    return part


def load(
    source: str | Path, *, dtype=None, mesh: Mesh | None = None, rules: sharding.Rules | None = None
) -> Transformer:
    """The model in a Hugging Face folder or repository, or in a GGUF file, with its weights.

    `dtype` casts on the way (default: each as it is stored; GGUF: float32). With a `mesh` each device gets, and each host
    reads, its own slices only. Raises `CourseError` that names the tensor for a checkpoint that is not exactly this model.
    """
    path = hub.model(source)
    checkpoint = Gguf(path) if path.suffix == ".gguf" else Safetensors(path)
    table = names(checkpoint.config)
    _compare(checkpoint, table)
    if dtype is not None and np.dtype(dtype) not in DTYPES.values():
        raise CourseError(f"dtype: expected float32, float16 or bfloat16, found {np.dtype(dtype)}")
    tensors: dict[str, list[str]] = {}
    for name, (parameter, _) in table.items():  # layers come in order
        tensors.setdefault(parameter, []).append(name)
    arrays = {}
    for parameter, shape in _abstract(checkpoint.config).items():
        place = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            place = (rules or sharding.Rules()).sharding(mesh, parameter, shape, checkpoint.config.num_key_value_heads)
        stored = functools.reduce(np.promote_types, (checkpoint.dtype(name) for name in tensors[parameter]))
        read = _reader(checkpoint, tensors[parameter], shape, np.dtype(stored if dtype is None else dtype))
        arrays[parameter] = jax.make_array_from_callback(shape, place, read)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(checkpoint.config, rngs=nnx.Rngs(0))))
    pure = jax.tree_util.tree_map_with_path(
        lambda keys, _: arrays[".".join(str(key.key) for key in keys)], nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


def tensors(model: Transformer) -> dict[str, np.ndarray]:
    """Every tensor of a model under its name on the hub, as views of the model's own arrays where they lie on the CPU.

    Raises `CourseError` for an adapter that is not merged: it has no place in a base model's files.
    """
    from utils import lora

    for path, _, _, module in lora.modules(model):
        if isinstance(module, lora.Adapter) and not module.merged:
            raise CourseError(
                f"{path}: has an adapter: call lora.merge(model) first, or save it with lora.save_adapter"
            )
    flat = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] not in ("lora_A", "lora_B"):
            flat[".".join(str(part) for part in path if part != "base")] = np.asarray(leaf[...])
    return {
        name: flat[path] if layer is None else flat[path][layer] for name, (path, layer) in names(model.config).items()
    }


def save(model: Transformer, directory: str | Path, *, tokenizer=None, shard_bytes: float = 5e9) -> Path:
    """Write a Hugging Face folder that `transformers` and `load` read back bit for bit: all of it, or nothing.

    Weights go into one file, or into several of at most `shard_bytes` with an index; `tokenizer` (from `hub.tokenizer`)
    goes beside them. Raises `CourseError` when the folder holds something already, or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CourseError(f"{directory}: expected a new or an empty folder, found something in it: name another")
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors(model).items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    config = model.config.to_hf() | {"torch_dtype": str(model.dtype)}
    index = {
        "metadata": {"total_size": sum(a.nbytes for shard in shards for a in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
    }
    with checkpoints.atomic_dir(directory) as temporary:
        for file, shard in zip(files, shards):
            save_file(shard, temporary / file, metadata={"format": "pt"})
            (temporary / file).chmod(0o644)  # safetensors makes files that only their owner may read
        if len(shards) > 1:
            (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
    return directory


def save_random(config: Config, directory: str | Path, *, dtype="bfloat16", seed: int = 0) -> Path:
    """Write a checkpoint of `config`'s full size with random numbers: to try loading, memory and speed without the real one.

    Written tensor by tensor; norms are 1, everything else repeats one block of numbers drawn from N(0, 0.02). Raises
    `CourseError` when the folder exists or the disk is too small.
    """
    directory, dtype = Path(directory), np.dtype(dtype)
    if directory.exists():
        raise CourseError(f"{directory}: exists already: name another folder")
    shapes = _abstract(config)
    shapes = {
        name: shapes[path] if layer is None else shapes[path][1:] for name, (path, layer) in names(config).items()
    }
    code = next(code for code, found in DTYPES.items() if found == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0  # as `save` writes it
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    block = (0.02 * np.random.default_rng(seed).standard_normal((1 << 22) + 7, np.float32)).astype(dtype)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if shutil.disk_usage(temporary).free < end:
            raise CourseError(f"{directory}: needs {end / 1e9:.1f} GB of disk: make room, or name another folder")
        with open(temporary / "model.safetensors", "wb") as file:
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shapes.items():
                left = math.prod(shape)
                if name.endswith("norm.weight"):
                    file.write(np.ones(left, dtype).tobytes())
                    continue
                while left > 0:
                    piece = block[:left]
                    file.write(piece.tobytes())
                    left -= piece.size
        (temporary / "config.json").write_text(
            json.dumps(config.to_hf() | {"torch_dtype": str(dtype)}, indent=1) + "\n"
        )
        os.replace(temporary, directory)
    except OSError as error:
        raise CourseError(f"{directory}: could not be written ({error}): make room, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
