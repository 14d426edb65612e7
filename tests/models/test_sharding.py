"""A model on a mesh: the numbers of one device, to each its share. Eight simulated devices, and two processes of four."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.helpers import checkpoints
from tests.helpers.checkpoints import folder_of
from utils import CourseError, lora, losses, sharding, train
from utils.commands import hlo
from utils.course import plot
from utils.hf import peft, weights

ROOT = Path(__file__).resolve().parents[2]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS, ROWS, T = 20, 8, 16
MESHES = ((8, 1), (4, 2), (2, 2), (1, 1))


def loss_fn(model, batch, key):
    hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"])
    return losses.chunked_cross_entropy(
        model.head, hidden, batch["targets"], batch["loss_mask"], wrt=nnx.LoRAParam, chunk_size=32
    )


def batch(step: int) -> dict[str, np.ndarray]:
    """Two packed sequences in each row; about half of the tokens count, not equally many in every row."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 120, (ROWS, T + 1))
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": rng.integers(0, 2, (ROWS, T)).astype(np.float32),
        "segment_ids": np.repeat([[0] * 7 + [1] * 9], ROWS, 0),
    }


def adapted(name: str, mesh=None):
    model = weights.load(folder_of(name), dtype=jnp.float32, mesh=mesh)
    model.model.gradient_checkpointing = True
    lora.inject(model, rank=4, target_modules=ALL, rngs=nnx.Rngs(0))
    return model if mesh is None else sharding.shard(model, mesh)


def trained(name: str, mesh=None, rows: slice = slice(None), steps: int = STEPS):
    """(losses of so many LoRA steps, model, the optimiser's state)."""
    model = adapted(name, mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    graph, learnt, rest = nnx.split(model, nnx.LoRAParam, ...)
    carry = (learnt, tx.init(learnt), jnp.array(True))
    if mesh is not None:
        carry = sharding.device_put(carry, mesh, model.config)
    layout = [(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(carry)]
    step, found = train.make_step(graph, loss_fn, tx), []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for i in range(steps):
            mine = {key: array[rows] for key, array in batch(i).items()}
            if mesh is not None:
                mine = sharding.shard_batch(mine, mesh)
                assert mine["inputs"].shape == (ROWS, T) and mine["inputs"].sharding.spec == P(
                    "fsdp"
                )
            carry, loss, _ = step(carry, rest, mine, jax.random.key(i))
            found.append(float(loss))
    for leaf, (before, ndim) in zip(jax.tree.leaves(carry), layout):
        assert mesh is None or leaf.sharding.is_equivalent_to(before, ndim), (
            "a step moved what it trains"
        )
    nnx.update(model, carry[0])
    return found, model, carry[1]


# ------------------------------------------------------------------------------- in processes with devices of their own


def on_eight_devices() -> None:
    assert jax.device_count() == 8
    name, saved = "qwen2-untied", {}
    base, model, _ = trained(name)
    saved["base"] = base
    with tempfile.TemporaryDirectory() as folder:
        for fsdp, tp in MESHES:
            saved[f"{fsdp}x{tp}"], model, state = trained(
                name, sharding.make_mesh(fsdp=fsdp, tp=tp)
            )
            if (fsdp, tp) == (4, 2):
                table = sharding.report(model, state)
                saved["report"] = {
                    kind: table.of(kind) for kind in ("base", "adapter", "optimiser")
                }
                saved["totals"] = [table.total, table.largest, len(str(table).splitlines())]
                peft.save(model, Path(folder) / "adapter")
                kept = lora.adapter(model)
        # The adapter that (4, 2) saved continues on (2, 2).
        mesh = sharding.make_mesh(fsdp=2, tp=2)
        again = weights.load(folder_of(name), dtype=jnp.float32, mesh=mesh)
        peft.load(again, Path(folder) / "adapter")
        sharding.shard(again, mesh)
        for path, state in lora.adapter(again).items():
            for key, array in state.items():
                np.testing.assert_array_equal(array, kept[path][key])
    # 4 query heads over tp=4 share 2 key/value heads: these are whole on every device.
    saved["kv base"], _, _ = trained("llama-bf16", steps=5)
    saved["kv 2x4"], model, _ = trained("llama-bf16", sharding.make_mesh(fsdp=2, tp=4), steps=5)
    attention = model.model.layers.self_attn
    saved["kv"] = [
        str(attention.k_proj.base.weight.sharding.spec),
        str(attention.q_proj.base.weight.sharding.spec),
    ]
    saved["fsdp"] = {}
    for fsdp in (1, 2, 4, 8):
        table = sharding.report(adapted(name, sharding.make_mesh(fsdp=fsdp)))
        saved["fsdp"][fsdp] = [table.of("base"), len(table.devices)]
    mesh = sharding.make_mesh(fsdp=4, tp=2)
    saved["messages"] = messages(mesh)
    place = sharding.Rules().sharding(mesh, "q_proj.weight", (3, 8, 12))
    leaf = jax.ShapeDtypeStruct((3, 8, 12), jnp.float32, sharding=place)
    saved["parts"] = [[*where, *devices] for where, devices in plot.parts(leaf).items()]
    _, axes = plot.sharding(leaf)
    saved["labels"] = sorted(text.get_text() for text in axes.texts)
    with pytest.raises(CourseError) as error:
        sharding.shard_batch({"inputs": np.zeros((6, 3))}, mesh)
    saved["error"] = str(error.value)
    print(json.dumps(saved))


def messages(mesh) -> dict:
    """Of a loop of five row-parallel products: each device multiplies its part, and the parts are summed."""

    def f(x, ws):
        return jax.lax.scan(lambda x, w: (sharding.constrain(x @ w, None, "fsdp"), None), x, ws)[0]

    def on(shape, *spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(*spec))
        )

    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(on((2, 8), None, "fsdp"), on((5, 8, 8), None, "fsdp")).compile()
    return hlo.collectives(compiled.as_text())


def on_two_hosts(rank: int, port: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    found, *_ = trained(
        "qwen2-untied", sharding.make_mesh(fsdp=4, tp=2), slice(4 * rank, 4 * rank + 4)
    )
    try:
        sharding.shard_batch({"inputs": np.zeros((3, 3))}, sharding.make_mesh(fsdp=4, tp=2))
    except CourseError as error:
        print(json.dumps([found, str(error)]), flush=True)
    jax.distributed.shutdown()


def python(code: str, devices: int) -> subprocess.Popen:
    # Unoptimised, the programs compile in half the time, and these run for milliseconds.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
    }
    command = [sys.executable, "-c", f"from tests.models import test_sharding as t; {code}"]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def said(process: subprocess.Popen):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def eight() -> dict:
    return said(python("t.on_eight_devices()", 8))


# -------------------------------------------------------------------------------------------------------- the promises


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("mesh", [f"{fsdp}x{tp}" for fsdp, tp in MESHES])
def test_sharded_equals_unsharded(eight, mesh):
    assert eight["base"][-1] < eight["base"][0] - 0.5, (
        "it must learn something, or equal losses say nothing"
    )
    np.testing.assert_allclose(eight[mesh], eight["base"], rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.serial
def test_two_processes_equal_one(eight):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hosts = [python(f"t.on_two_hosts({rank}, {port})", 4) for rank in range(2)]
    for found, error in [said(process) for process in hosts]:
        np.testing.assert_allclose(found, eight["base"], rtol=1e-5, atol=0)
        assert error.startswith(
            "batch: 3 rows do not divide over fsdp=4 (2 of them in this process)"
        )


@pytest.mark.slow
@pytest.mark.serial
def test_key_value_heads_that_do_not_divide_are_whole_along_tp(eight):
    np.testing.assert_allclose(eight["kv 2x4"], eight["kv base"], rtol=1e-5, atol=0)
    assert eight["kv"] == [str(P(None, None, "fsdp")), str(P(None, "tp", "fsdp"))]


@pytest.mark.slow
@pytest.mark.serial
def test_fsdp_divides_the_bytes_of_the_base(eight):
    model = checkpoints.model("qwen2-untied")
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    norms = sum(leaf[...].nbytes for path, leaf in leaves if "norm" in path[-2])
    biases = sum(leaf[...].nbytes for path, leaf in leaves if path[-1] == "bias")
    whole = sum(leaf[...].nbytes for _, leaf in leaves)
    for fsdp, (base, devices) in eight["fsdp"].items():
        assert devices == int(fsdp)
        assert (
            base == (whole - norms - biases) / int(fsdp) + norms + biases
        )  # biases of column layers are tp's


@pytest.mark.slow
@pytest.mark.serial
def test_the_report_counts_what_each_device_holds(eight):
    found = eight["report"]
    model = adapted("qwen2-untied")
    ends = [leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
    assert (
        sum(leaf[...].nbytes for leaf in ends) / 8
        < found["adapter"]
        < sum(leaf[...].nbytes for leaf in ends) / 2
    )
    scales = len(ALL) * 3 * 4
    assert found["optimiser"] == 2 * (found["adapter"] - scales) + 4  # two moments and a count
    total, largest, lines = eight["totals"]
    assert largest == sum(found.values()) and total == 8 * largest and lines == 9


@pytest.mark.slow
@pytest.mark.serial
def test_the_picture_shows_every_device_once(eight):
    assert sorted(device for *_, device in eight["parts"]) == list(range(8))
    assert all(
        end - start == 4 and right - left == 3 for start, end, left, right, _ in eight["parts"]
    )
    assert eight["labels"] == [str(i) for i in range(8)]


@pytest.mark.slow
@pytest.mark.serial
def test_messages_are_found_in_a_real_program(eight):
    assert sum(found["count"] for found in eight["messages"].values()) == 5, eight["messages"]


@pytest.mark.slow
@pytest.mark.serial
def test_rows_that_do_not_divide_are_named(eight):
    assert eight["error"] == "batch: 6 rows do not divide over fsdp=4: choose a batch that does"


# ------------------------------------------------------------------------------------------------- rules and refusals


@pytest.mark.parametrize(
    "path, ndim, wanted",
    [
        ("model.layers.self_attn.q_proj.weight", 3, P(None, "tp", "fsdp")),
        ("model.layers.self_attn.q_proj.base.weight", 3, P(None, "tp", "fsdp")),
        ("model.layers.self_attn.q_proj.bias", 2, P(None, "tp")),
        ("model.layers.self_attn.q_proj.lora_A", 3, P(None, None, "fsdp")),
        ("model.layers.self_attn.q_proj.lora_B", 3, P(None, "tp", None)),
        ("model.layers.mlp.down_proj.weight", 3, P(None, "fsdp", "tp")),
        ("model.layers.mlp.down_proj.lora_A", 3, P(None, None, "tp")),
        ("model.layers.mlp.down_proj.lora_B", 3, P(None, "fsdp", None)),
        ("1.0.mu.model.layers.mlp.down_proj.lora_B", 3, P(None, "fsdp", None)),
        ("lm_head.lora_A", 2, P(None, "fsdp")),
        ("model.embed_tokens.weight", 2, P("tp", "fsdp")),
        ("model.layers.self_attn.q_proj.scale", 1, P(None)),
        ("model.norm.weight", 1, P()),
        ("count", 0, P()),
    ],
)
def test_the_rules(path, ndim, wanted):
    assert sharding.Rules().spec(path, ndim) == wanted


R1 = SimpleNamespace(
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    hidden_size=1536,
)


@pytest.mark.parametrize(
    "mesh, message",
    [
        (
            dict(tp=8),
            "num_attention_heads: 12 does not divide over tp=8: choose tp that divides it, such as 2, 3, 4, 6",
        ),
        (dict(tp=3), "intermediate_size: 8960 does not divide over tp=3: .*"),
        (dict(fsdp=5), "hidden_size: 1536 does not divide over fsdp=5: .*"),
        (dict(fsdp=0), "fsdp: expected a whole number of at least 1, found 0"),
        (dict(tp=2.0), "tp: expected a whole number of at least 1, found 2.0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_by_its_axis(mesh, message):
    with pytest.raises(CourseError, match=f"^{message}$"):
        sharding.check(R1, **mesh)


def test_r1_goes_over_the_meshes_it_is_planned_for():
    for fsdp, tp in ((8, 1), (4, 2), (2, 4), (1, 4), (1, 1)):
        sharding.check(R1, fsdp=fsdp, tp=tp)


def test_a_refused_model_is_left_as_it_was():
    model = checkpoints.model("qwen2-untied")
    model.config = dataclasses.replace(model.config, hidden_size=7)
    before = model.lm_head.weight[...].sharding
    with pytest.raises(CourseError, match="hidden_size: 7 does not divide over fsdp=8"):
        sharding.shard(model, SimpleNamespace(shape={"fsdp": 8, "tp": 1}))
    assert model.lm_head.weight[...].sharding == before


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "fsdp", "tp") is x
    tree = {"q_proj": {"weight": x}}
    assert sharding.all_gather(tree) is tree
