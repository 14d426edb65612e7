"""Loading and saving: bit for bit, each device its share, and no damaged checkpoint taken for a model."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.helpers import checkpoints
from tests.helpers.checkpoints import NAMES, folder_of, model, reference, run
from utils import CourseError, lora, sharding
from utils.course import random_checkpoint
from utils.hf import config as hf_config
from utils.hf import hub, peft, weights

ROOT = Path(__file__).resolve().parents[2]
Q = "model.layers.1.self_attn.q_proj.weight"


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("shards", ["one file", "several"])
@pytest.mark.parametrize("name", NAMES)
def test_load_then_save_is_bit_identical(name, shards, tmp_path):
    made = weights.load(folder_of(name))
    options = {} if shards == "one file" else {"shard_bytes": 30_000}
    weights.save(made, tmp_path / "out", **options)
    before, after = checkpoints.stored(folder_of(name)), checkpoints.stored(tmp_path / "out")
    assert same_bits(before, after)
    assert hf_config.read(tmp_path / "out") == hf_config.read(folder_of(name))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    if shards == "several":
        index = json.loads((tmp_path / "out" / hub.INDEX).read_text())
        assert len(files) > 4 and index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in after.values())
        assert max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < 40_000
    else:
        assert files == ["config.json", "model.safetensors"]
    again = weights.load(tmp_path / "out")
    assert same_bits(weights.tensors(made), weights.tensors(again))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_exactly_what_the_files_hold(name):
    config = hf_config.read(folder_of(name))
    table, found = weights.names(config), checkpoints.stored(folder_of(name))
    assert table.keys() == found.keys()
    path, layer = table["model.layers.2.mlp.down_proj.weight"]
    assert (path, layer) == ("model.layers.mlp.down_proj.weight", 2)
    assert table["model.norm.weight"] == ("model.norm.weight", None)


@pytest.mark.parametrize(
    "name, dtype", [("qwen2-fp16", np.float16), ("llama-bf16", ml_dtypes.bfloat16)]
)
def test_without_a_dtype_weights_stay_as_they_are_stored(name, dtype):
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(weights.load(folder_of(name))))} == {
        np.dtype(dtype)
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2-fp16", "llama-bf16"])
def test_casting_rounds_as_numpy_does(name, dtype):
    found = weights.tensors(weights.load(folder_of(name), dtype=dtype))
    for tensor, stored in checkpoints.stored(folder_of(name)).items():
        assert found[tensor].dtype == dtype
        assert found[tensor].tobytes() == stored.astype(dtype).tobytes(), tensor


def test_a_casted_model_is_saved_as_it_is(tmp_path):
    weights.save(weights.load(folder_of("qwen2-untied"), dtype=jnp.bfloat16), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {a.dtype for a in checkpoints.stored(tmp_path / "out").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_mixed_dtypes_are_kept_apart(tmp_path):
    """Norms in float32 beside matrices in bfloat16, as some checkpoints have them."""
    folder = checkpoints.copy("llama-bf16", tmp_path / "in")

    def norms(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].astype(np.float32)

    checkpoints.edit_tensors(folder, norms)
    weights.save(weights.load(folder), tmp_path / "out")
    assert same_bits(checkpoints.stored(folder), checkpoints.stored(tmp_path / "out"))


def test_a_path_may_be_text_and_the_tokenizer_goes_along(tmp_path):
    from utils.hf import chat

    made = weights.load(str(folder_of("llama-tied")))
    tok = chat.Tokenizer.from_folder(folder_of("llama-tied"))
    weights.save(made, str(tmp_path / "deep" / "out"), tokenizer=tok)
    again = chat.Tokenizer.from_folder(tmp_path / "deep" / "out")
    assert again.encode("The cat\n") == tok.encode("The cat\n")
    assert again.chat([{"role": "user", "content": "Hi"}]) == tok.chat(
        [{"role": "user", "content": "Hi"}]
    )
    assert again.stop_ids == tok.stop_ids


def test_a_tied_checkpoint_may_hold_its_table_twice(tmp_path):
    folder = checkpoints.copy("llama-tied", tmp_path / "in")
    checkpoints.edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})
    )
    assert same_bits(
        weights.tensors(weights.load(folder)), checkpoints.stored(folder_of("llama-tied"))
    )


def test_old_buffers_are_passed_over(tmp_path):
    folder = checkpoints.copy("llama-tied", tmp_path / "in")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoints.edit_tensors(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
    weights.load(folder)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("name", checkpoints.ADAPTERS)
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_made_by_peft_gives_pefts_logits(name, merged):
    made, wanted = model("qwen2-untied"), reference(name)
    peft.load(made, folder_of(name))
    if merged:
        lora.merge(made)
    found = run(made, wanted["tokens"])
    np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=2e-5)
    assert np.abs(found - reference("qwen2-untied")["logits"]).max() > 1


def test_our_adapter_folder_holds_what_pefts_does(tmp_path):
    made = model("qwen2-untied")
    peft.load(made, folder_of("peft-adapter"))
    peft.save(made, tmp_path / "adapter")
    ours, theirs = (
        load_file(d / "adapter_model.safetensors")
        for d in (tmp_path / "adapter", folder_of("peft-adapter"))
    )
    assert same_bits(ours, theirs)
    ours, theirs = (
        json.loads((d / "adapter_config.json").read_text())
        for d in (tmp_path / "adapter", folder_of("peft-adapter"))
    )
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    assert (ours["r"], ours["lora_alpha"]) == (4, 8)


def test_a_merged_model_can_be_saved_and_loaded(tmp_path):
    made = model("qwen2-untied")
    lora.merge(peft.load(made, folder_of("peft-adapter")))
    weights.save(made, tmp_path / "out")
    wanted = reference("peft-adapter")
    found = run(weights.load(tmp_path / "out"), wanted["tokens"])
    np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=2e-5)


# ----------------------------------------------------------------------------------------------------------- on a mesh


class Seen(np.ndarray):
    """An array that notes which parts of it are looked at."""

    def __getitem__(self, index):
        self.note(index, self.shape)
        return np.asarray(super().__getitem__(index))


def watch(log: list):
    """From now on, every slice read from a checkpoint is noted as (tensor, ((start, stop), ...), bytes)."""
    read = weights.Safetensors.tensor

    def noting(self, name):
        array = read(self, name).view(Seen)

        def note(index, shape):
            where = tuple(s.indices(size)[:2] for s, size in zip(index, shape))
            count = int(np.prod([stop - start for start, stop in where]))
            log.append((name, where, count * array.dtype.itemsize))

        array.note = note
        return array

    weights.Safetensors.tensor = noting


def on_eight_devices() -> None:
    log = []
    watch(log)
    assert jax.device_count() == 8
    for name, (fsdp, tp) in (
        ("qwen2-untied", (4, 2)),
        ("llama-tied", (8, 1)),
        ("llama-bf16", (4, 2)),
    ):
        log.clear()
        mesh = sharding.make_mesh(fsdp=fsdp, tp=tp)
        made = weights.load(folder_of(name), mesh=mesh)
        whole = sum(a.nbytes for a in checkpoints.stored(folder_of(name)).values())
        read = [(tensor, where) for tensor, where, _ in log]
        assert len(read) == len(set(read)), "a slice was read twice"
        assert sum(size for *_, size in log) == whole, "something was read twice, or not at all"
        per_device, split = {}, 0
        for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param)):
            array = leaf[...]
            parts = {shard.data.nbytes for shard in array.addressable_shards}
            assert len(parts) == 1
            if "weight" in path[-1] and "norm" not in path[-2]:
                assert parts == {array.nbytes // 8}, path
                split += 1
            for shard in array.addressable_shards:
                per_device[shard.device.id] = per_device.get(shard.device.id, 0) + shard.data.nbytes
        assert split >= 8 and max(per_device.values()) < whole / 8 * 1.3, (per_device, whole)
        for tensor, stored in checkpoints.stored(folder_of(name)).items():
            path, layer = weights.names(made.config)[tensor]
            found = made
            for part in path.split("."):
                found = getattr(found, part)
            found = np.asarray(found[...] if layer is None else found[...][layer])
            assert found.tobytes() == stored.tobytes(), tensor
        wanted = reference(name)
        if name != "llama-bf16":
            found = run(made, wanted["tokens"])
            np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=1e-5)
    print("good")


def on_two_hosts(rank: int, port: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    log = []
    watch(log)
    made = weights.load(folder_of("qwen2-untied"), mesh=sharding.make_mesh(fsdp=4, tp=2))
    whole = sum(a.nbytes for a in checkpoints.stored(folder_of("qwen2-untied")).values())
    held = sum(
        shard.data.nbytes
        for _, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param))
        for shard in leaf[...].addressable_shards
        if shard.replica_id == 0
    )
    print(
        json.dumps({"read": sum(size for *_, size in log), "held": held, "whole": whole}),
        flush=True,
    )
    jax.distributed.shutdown()


def python(code: str, devices: int) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"from tests.hf import test_weights as t; {code}"]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_each_device_gets_its_share_and_nothing_is_read_twice():
    process = python("t.on_eight_devices()", 8)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.strip() == "good", err[-3000:]


@pytest.mark.slow
def test_with_two_processes_neither_host_reads_the_whole():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hosts = [python(f"t.on_two_hosts({rank}, {port})", 4) for rank in range(2)]
    found = []
    for process in hosts:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        found.append(json.loads(out.strip().splitlines()[-1]))
    for host in found:
        assert host["read"] < 0.6 * host["whole"]
    assert sum(host["held"] for host in found) == found[0]["whole"]


def test_a_mesh_that_does_not_divide_is_named():
    with pytest.raises(CourseError, match="mesh: expected fsdp x tp of 1 to"):
        sharding.make_mesh(fsdp=1000)


# ----------------------------------------------------------------------------------------------------------- bad input


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, change) -> None:
    header, body = header_of(path)
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def cut(size: int):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        path.write_bytes(raw[:size])

    return damage


def file(content: bytes, name: str = "model.safetensors"):
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change, name: str = "model.safetensors"):
    return lambda folder: checkpoints.edit_tensors(folder, change, name)


def config(**changes):
    return lambda folder: checkpoints.edit_config(folder, **changes)


def poke(name: str, value: float):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 5] = value

    return tensors(change)


def index(change):
    def damage(folder: Path) -> None:
        path = folder / hub.INDEX
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0]}))


def pickle_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))


def second_shard_repeats(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name] + 1}, second)


def swap_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def outside_the_folder(folder: Path) -> None:
    shutil.move(folder / "model-00002-of-00004.safetensors", folder.parent / "other.safetensors")

    def change(content):
        for name, where in content["weight_map"].items():
            if where == "model-00002-of-00004.safetensors":
                content["weight_map"][name] = "../other.safetensors"

    index(change)(folder)


def an_adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder_of("peft-adapter"), folder)


def half_a_download(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete")


def a_folder_instead(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def rename(old: str, new: str):
    return tensors(lambda t: t.update({new: t.pop(old)}))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 326696\n"
BAD = {
    # the tensors
    "a tensor is missing": ("qwen2-untied", tensors(lambda t: t.pop(Q)), (Q, "(96, 48)")),
    "a bias is missing": (
        "qwen2-untied",
        tensors(lambda t: t.pop(Q.replace("weight", "bias"))),
        ("1.self_attn.q_proj.bias",),
    ),
    "a tensor too many": (
        "qwen2-untied",
        tensors(lambda t: t.update(extra=np.zeros(3, np.float32))),
        ("extra: no such",),
    ),
    "a layer too many": (
        "llama-tied",
        tensors(
            lambda t: t.update(
                {n.replace(".2.", ".3."): a for n, a in list(t.items()) if ".2." in n}
            )
        ),
        ("model.layers.3.",),
    ),
    "another name": ("qwen2-untied", rename(Q, Q.replace("q_proj", "wq")), ("self_attn",)),
    "another shape": (
        "qwen2-untied",
        tensors(lambda t: t.update({Q: t[Q][:80]})),
        (Q, "(96, 48)", "(80, 48)"),
    ),
    "transposed": (
        "qwen2-untied",
        tensors(lambda t: t.update({Q: t[Q].T})),
        (Q, "(48, 96)", "transposed"),
    ),
    "one dimension": (
        "qwen2-untied",
        tensors(lambda t: t.update({Q: t[Q].reshape(-1)})),
        (Q, "(4608,)"),
    ),
    "a NaN": ("qwen2-untied", poke(Q, np.nan), (Q, "not finite")),
    "an infinity": (
        "llama-tied",
        poke("model.embed_tokens.weight", -np.inf),
        ("embed_tokens", "not finite"),
    ),
    "a NaN in float16": ("qwen2-fp16", poke(Q, np.nan), (Q, "not finite")),
    "a NaN in bfloat16": ("llama-bf16", poke(Q, np.nan), (Q, "not finite")),
    "whole numbers": (
        "qwen2-untied",
        tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})),
        (Q, "I8"),
    ),
    "float64": (
        "qwen2-untied",
        tensors(lambda t: t.update({Q: t[Q].astype(np.float64)})),
        (Q, "F64"),
    ),
    "no tensor at all": (
        "qwen2-untied",
        lambda folder: save_file({}, folder / "model.safetensors"),
        ("lm_head",),
    ),
    # the file
    "an empty file": ("qwen2-untied", cut(0), ("model.safetensors", "cut short")),
    "cut within the length": ("qwen2-untied", cut(5), ("model.safetensors", "cut short")),
    "cut within the header": ("qwen2-untied", cut(600), ("model.safetensors", "cut short")),
    "cut within the body": ("qwen2-untied", cut(200_000), ("model.safetensors", "cut short")),
    "cut by one byte": ("qwen2-untied", cut(-1), ("model.safetensors", "cut short")),
    "a header that is no JSON": (
        "qwen2-untied",
        file(struct.pack("<Q", 8) + b"{{{{{{{{" + bytes(64)),
        ("model.safetensors", "damaged"),
    ),
    "a header of 2**60 bytes": (
        "qwen2-untied",
        file(struct.pack("<Q", 2**60) + b"{}"),
        ("model.safetensors", "damaged"),
    ),
    "parts that overlap": (
        "qwen2-untied",
        lambda folder: with_header(
            folder / "model.safetensors",
            lambda h: h[Q].update(data_offsets=h["lm_head.weight"]["data_offsets"]),
        ),
        ("model.safetensors", "damaged"),
    ),
    "a shape that is not its bytes": (
        "qwen2-untied",
        lambda folder: with_header(
            folder / "model.safetensors", lambda h: h[Q].update(shape=[96, 49])
        ),
        ("model.safetensors", "damaged"),
    ),
    "a pointer instead of the file": ("qwen2-untied", file(LFS), ("model.safetensors", "damaged")),
    "a page instead of the file": (
        "qwen2-untied",
        file(b"<html>404</html>" * 20),
        ("model.safetensors", "damaged"),
    ),
    "a pickle by another name": (
        "qwen2-untied",
        pickle_by_another_name,
        ("model.safetensors", "damaged"),
    ),
    "only a pickle": ("qwen2-untied", only_a_pickle, ("pytorch_model.bin", "pickle")),
    "half a download": ("qwen2-untied", half_a_download, ("model.safetensors",)),
    "a folder instead of the file": ("qwen2-untied", a_folder_instead, ("model.safetensors",)),
    "no weights": (
        "qwen2-untied",
        lambda folder: (folder / "model.safetensors").unlink(),
        ("model.safetensors", "no weights"),
    ),
    "an adapter, not a model": ("qwen2-untied", an_adapter, ("config.json",)),
    # the index
    "an absent shard": (
        "qwen2-tied-sharded",
        lambda folder: (folder / "model-00003-of-00004.safetensors").unlink(),
        ("model-00003-of-00004.safetensors",),
    ),
    "a shard cut short": (
        "llama-untied-sharded",
        lambda folder: (folder / "model-00002-of-00004.safetensors").write_bytes(bytes(100)),
        ("model-00002-of-00004.safetensors",),
    ),
    "an index that is no JSON": ("qwen2-tied-sharded", file(b"{", hub.INDEX), (hub.INDEX,)),
    "an index without a map": (
        "qwen2-tied-sharded",
        file(b"{}", hub.INDEX),
        (hub.INDEX, "weight_map"),
    ),
    "an index of numbers": (
        "qwen2-tied-sharded",
        index(lambda c: c.update(weight_map={n: 3 for n in c["weight_map"]})),
        (hub.INDEX, "no name"),
    ),
    "an index that is a list": ("qwen2-tied-sharded", file(b"[1]", hub.INDEX), (hub.INDEX,)),
    "an index that names nothing": (
        "qwen2-tied-sharded",
        index(lambda c: c.update(weight_map={})),
        ("qwen2-tied-sharded",),
    ),
    "an index that names more": (
        "qwen2-tied-sharded",
        index(lambda c: c["weight_map"].update(ghost="model-00001-of-00004.safetensors")),
        ("ghost", "index"),
    ),
    "an index that names less": (
        "qwen2-tied-sharded",
        index(lambda c: c["weight_map"].pop(Q)),
        (Q, "index"),
    ),
    "an index of pickles": (
        "qwen2-tied-sharded",
        index(lambda c: c["weight_map"].update({Q: "pytorch_model.bin"})),
        ("pytorch_model.bin",),
    ),
    "an index that leaves the folder": (
        "qwen2-tied-sharded",
        outside_the_folder,
        ("other.safetensors",),
    ),
    "a tensor in two shards": ("qwen2-tied-sharded", second_shard_repeats, ("model-0000",)),
    "shards that changed places": ("qwen2-tied-sharded", swap_shards, ("model-0000",)),
    # configuration and weights
    "no configuration": (
        "qwen2-untied",
        lambda folder: (folder / "config.json").unlink(),
        ("config.json", "none"),
    ),
    "a configuration that is no JSON": (
        "qwen2-untied",
        file(b"{'a': 1}", "config.json"),
        ("config.json", "JSON"),
    ),
    "an unknown architecture": (
        "qwen2-untied",
        config(model_type="gpt_neox"),
        ("gpt_neox", "config.json"),
    ),
    "more layers than there are": (
        "llama-tied",
        config(num_hidden_layers=4),
        ("model.layers.3.", "no such tensor"),
    ),
    "fewer layers than there are": (
        "llama-tied",
        config(num_hidden_layers=2),
        ("model.layers.2.",),
    ),
    "a larger vocabulary": (
        "llama-tied",
        config(vocab_size=151),
        ("embed_tokens", "(151, 32)", "(150, 32)"),
    ),
    "another head size": ("qwen2-untied", config(head_dim=8), ("(16,)", "(32,)")),
    "fewer key/value heads": (
        "qwen2-untied",
        config(num_key_value_heads=1),
        ("k_proj", "(16", "(32"),
    ),
    "another MLP width": ("llama-bf16", config(intermediate_size=64), ("mlp", "64", "48")),
    "untied without a head": (
        "llama-tied",
        config(tie_word_embeddings=False),
        ("lm_head.weight", "tie_word"),
    ),
    "tied with another head": (
        "llama-bf16",
        config(tie_word_embeddings=True),
        ("lm_head.weight", "tie"),
    ),
    "biases that are not expected": (
        "llama-bf16",
        config(attention_bias=False),
        ("self_attn", "bias", "no such"),
    ),
    "Llama called Qwen2": ("llama-tied", config(model_type="qwen2"), ("bias", "no such")),
}


def refused(call, *words: str) -> str:
    with pytest.raises(CourseError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_checkpoint_is_refused_by_name(case, tmp_path):
    name, damage, words = BAD[case]
    folder = checkpoints.copy(name, tmp_path / name)
    damage(folder)
    refused(lambda: weights.load(folder), *words, str(tmp_path))


def test_numbers_too_large_for_the_dtype(tmp_path):
    folder = checkpoints.copy("qwen2-untied", tmp_path / "in")
    poke(Q, 1e6)(folder)
    weights.load(folder, dtype=jnp.bfloat16)
    refused(lambda: weights.load(folder, dtype=jnp.float16), Q, "float16")


@pytest.mark.parametrize("dtype", [jnp.int8, np.float64, "float8_e4m3fn"])
def test_a_dtype_that_is_no_choice(dtype):
    refused(
        lambda: weights.load(folder_of("llama-tied"), dtype=dtype),
        "dtype: expected float32, float16 or bfloat16",
    )


def test_a_model_that_is_nowhere(tmp_path):
    refused(lambda: weights.load(tmp_path / "absent"), "absent")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_never_opened(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    refused(lambda: weights.load(tmp_path / name), name)


# ------------------------------------------------------------------------------------------------------ bad input: save


def test_save_replaces_nothing(tmp_path):
    made = model("llama-tied")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(lambda: weights.save(made, tmp_path / "out"), str(tmp_path / "out"), "name another")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    refused(lambda: weights.save(made, tmp_path / "file"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_save_into_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    weights.save(model("llama-tied"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_save_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(
        lambda: weights.save(model("llama-tied"), tmp_path / "file" / "out"), "could not be written"
    )
    refused(
        lambda: weights.save(model("llama-tied"), Path("/proc/none/out")), "could not be written"
    )


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    refused(lambda: weights.save(model("llama-tied"), tmp_path / "out"), "No space left", "out")
    assert not list(tmp_path.iterdir())


def test_a_random_checkpoint_is_whole_repeatable_and_replaces_nothing(tmp_path, monkeypatch):
    config = hf_config.read(folder_of("qwen2-untied"))
    made = random_checkpoint.save(config, tmp_path / "a", seed=1)
    arrays = load_file(made / "model.safetensors")
    assert {n: a.shape for n, a in arrays.items()} == {
        n: a.shape for n, a in weights.tensors(model("qwen2-untied")).items()
    }
    assert {a.dtype.name for a in arrays.values()} == {"bfloat16"}
    assert (arrays["model.norm.weight"] == 1).all()
    drawn = arrays["model.embed_tokens.weight"].astype(np.float32)
    assert abs(drawn.std() - 0.02) < 0.002 and abs(drawn.mean()) < 0.002
    assert same_bits(weights.tensors(weights.load(made)), arrays)
    assert same_bits(
        load_file(random_checkpoint.save(config, tmp_path / "b", seed=1) / "model.safetensors"),
        arrays,
    )
    assert not same_bits(
        load_file(random_checkpoint.save(config, tmp_path / "c", seed=2) / "model.safetensors"),
        arrays,
    )
    refused(lambda: random_checkpoint.save(config, tmp_path / "a"), "exists already")
    monkeypatch.setattr(
        random_checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000)
    )
    refused(lambda: random_checkpoint.save(config, tmp_path / "d"), "of disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_adapter_that_is_not_merged_has_no_place_in_the_files(tmp_path):
    made = lora.inject(model("llama-tied"), rank=2, rngs=nnx.Rngs(0))
    refused(lambda: weights.save(made, tmp_path / "out"), "q_proj", "lora.merge")
    assert not list(tmp_path.iterdir())


def test_an_adapter_for_another_base(tmp_path):
    refused(
        lambda: peft.load(model("llama-tied"), folder_of("peft-adapter")),
        "peft-adapter",
        "another base",
    )
