"""Planning: what a training step takes on a TPU that you do not have.

The TPU's compiler is a library, and runs on any Linux machine. From shapes alone, with no weights and no chip, it is given
the very step that `finetune` runs, and says how many bytes every chip needs, or that they do not fit. Around that: a bound
on the time of a step from two published numbers of the chip, and the messages between chips, found in the compiled program.

    python -m utils plan --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --topology v5e-8 --batch 16 --seq 2048

The compiler (libtpu, for Linux on x86-64) lives in an environment of its own: `make install-tpu` makes it.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from utils import CourseError, kernels, lora, sharding, train, transformer
from utils.commands import finetune, hlo
from utils.commands.options import Finetune

OWN_PYTHON = Path(__file__).resolve().parents[1] / ".venv-tpu" / "bin" / "python"
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per device that JAX sees: a chip, on v2 and v3 one of its two cores."""

    memory: int  # bytes
    flops: float  # peak, bfloat16, per second
    bandwidth: float  # bytes per second to and from that memory
    source: str


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    "v2": Chip(8 * GiB, 46e12 / 2, 700e9 / 2, "https://doi.org/10.1145/3360307"),  # Jouppi et al. 2020
    "v3": Chip(16 * GiB, 123e12 / 2, 900e9 / 2, _DOCS + "v3"),
    "v5e": Chip(16 * GiB, 197e12, 819e9, _DOCS + "v5e"),
    "v5p": Chip(95 * GiB, 459e12, 2765e9, _DOCS + "v5p"),
    "v6e": Chip(32 * GiB, 918e12, 1638e9, _DOCS + "v6e"),
}
# Names of slices (v2, v3 and v5p are named by their cores, two in a chip) and the topologies the compiler knows them by.
SLICES = {
    "v2-8": "v2:2x2",
    "v3-8": "v3:2x2",
    "v5e-1": "v5e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5p-8": "v5p:2x2x1",
    "v6e-1": "v6e:1x1",
    "v6e-4": "v6e:2x2",
    "v6e-8": "v6e:2x4",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler said, per chip, and what follows from the chip's published numbers."""

    topology: str
    fsdp: int
    tp: int
    batch: int
    seq: int
    fits: bool
    bytes_per_chip: dict[str, int]  # arguments, temporaries, outputs (those not written over arguments), peak
    weights_per_chip: int  # the frozen base's part of the arguments
    memory_per_chip: int
    flops: float  # of the whole step, on all chips together
    seconds: dict[str, float]  # compute, memory: each alone, at the chip's peak; bound: the larger
    collectives: dict[str, dict[str, int]]  # kind -> {count, bytes}, of one step on one chip
    rematerialised: int  # arrays that the compiler could move only by making them whole on every chip
    compile_seconds: float
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        chips, b = self.fsdp * self.tp, self.bytes_per_chip
        name = "core" if self.topology[:2] in ("v2", "v3") else "chip"
        place = f"{chips} {name}{'s' * (chips > 1)} as fsdp {self.fsdp} x tp {self.tp}"
        lines = [f"{self.topology}: {place}, batch {self.batch_size} x {self.seq_len}"]
        lines += [f"  {kind:12} {b[kind] / GiB:7.2f} GiB" for kind in ("arguments", "temporaries", "outputs")]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines += [f"  {'peak':12} {b['peak'] / GiB:7.2f} GiB of {self.memory_per_chip / GiB:.0f} per {name}: {verdict}"]
        s, tokens = self.seconds, self.batch_size * self.seq_len
        lines += [f"  a step takes at least {s['bound']:.3f} s ({tokens / s['bound']:,.0f} tokens/s at most):"]
        lines += [f"    arithmetic {s['compute']:.3f} s, weights from memory {s['memory']:.3f} s"]
        lines += [f"    assumed: {text}" for text in self.assumptions]
        if chips > 1:
            lines += [f"  messages of a step, per {name}:" if self.collectives else "  messages: not compiled so far"]
        for kind, found in self.collectives.items():
            lines.append(f"    {kind:20} {found['count']:6,} of {found['bytes'] / 1e9:8.3f} GB together")
        if self.rematerialised:
            lines.append(f"  {self.rematerialised} arrays are made whole on every {name} to be moved")
        return "\n".join(lines + [f"  compiled in {self.compile_seconds:.0f} s"])


def elsewhere(arguments: dict) -> int | None:
    """Run `python -m utils plan` with these arguments in .venv-tpu, where this environment has no compiler: its status.

    None if this environment has one itself, or there is no other.
    """
    if importlib.util.find_spec("libtpu") is not None:
        jax.config.update("jax_platforms", "cpu")  # on a TPU's own machine: plan without taking the chips
        return None
    if not OWN_PYTHON.exists():
        return None
    given = [(f"--{name}", value) for name, value in arguments.items() if value is not None]
    words = [word for name, value in given if not isinstance(value, bool) for word in (name, str(value))]
    words += ["--json"] * arguments["json"] + ["--no-remat"] * (not arguments["gradient_checkpointing"])
    command = [str(OWN_PYTHON), "-m", "utils", "plan", *words]
    root = str(OWN_PYTHON.parents[2])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, env=env).returncode


def compile_for(
    topology: str,
    config: transformer.Config,
    *,
    batch: int,
    seq: int,
    rank: int = 16,
    targets: tuple[str, ...] = lora.ALL_LINEAR,
    fsdp: int | None = None,
    tp: int = 1,
    accumulate: int = 1,
    remat: bool = True,
    dtype="bfloat16",
    chunk: int = 1024,
) -> Plan:
    """Compile `finetune`'s training step for a slice (v5e-8) or topology (v5e:2x4) of TPUs. Nothing is allocated.

    `batch` rows are an update's, on all chips and in all of `accumulate` parts together; `fsdp` is by default what `tp`
    leaves. Raises `CourseError` for a topology that is not known, a mesh that does not divide, or where there is no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CourseError(
            "plan: needs libtpu, the TPU's compiler (a wheel for Linux on x86-64), found none in this environment: "
            "run `make install-tpu` and then .venv-tpu/bin/python"
        )
    sizes = {"batch": batch, "seq": seq, "rank": rank, "chunk": chunk, "gradient_accumulation_steps": accumulate}
    sizes |= {"tp": tp, "fsdp": 1 if fsdp is None else fsdp}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CourseError(f"{name}: expected a whole number of at least 1, found {value!r}")
    if seq > config.max_position_embeddings:
        raise CourseError(f"seq: expected at most {config.max_position_embeddings} (the model's context), found {seq}")
    with _stderr() as said:
        devices = _devices(topology)
        fsdp = fsdp or max(1, len(devices) // tp)
        sharding.check(config, fsdp=fsdp, tp=tp)
        if fsdp * tp != len(devices):
            raise CourseError(f"mesh: expected fsdp x tp = {len(devices)} ({topology}), found {fsdp} x {tp}")
        if batch % (accumulate * fsdp):
            parts = f"fsdp={fsdp}" + f" in {accumulate} parts" * (accumulate > 1)
            raise CourseError(
                f"batch: {batch} rows do not divide over {parts}: choose a multiple of {accumulate * fsdp}"
            )
        mesh = sharding.make_mesh(fsdp=fsdp, tp=tp, devices=devices)
        lowered, weights, arguments, adapter = _lowered(
            mesh, config, batch, seq, rank, targets, accumulate, remat, dtype, chunk
        )
        started, text, sizes = time.perf_counter(), "", {}
        try:
            compiled = lowered.compile()
            text, m = compiled.as_text(), compiled.memory_analysis()
            outputs = m.output_size_in_bytes - m.alias_size_in_bytes
            sizes = {"arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes, "outputs": outputs}
        except jax.errors.JaxRuntimeError as error:
            # "Used 20.1G of 15.75G hbm", or of "HLO temporaries (382.11G)" alone
            used = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])\b", str(error))
            if used is None:
                reason = " ".join(str(error).split())[:200]
                raise CourseError(f"plan: the compiler refused the program ({reason}): try other sizes") from error
            found = int(float(used[2]) * 1024 ** ("KMGT".index(used[3]) + 1))
            temporaries = found - arguments * (used[1] == "Used ")
            sizes = {"arguments": arguments, "temporaries": temporaries, "outputs": 0}
        seconds = time.perf_counter() - started
    sizes["peak"] = sum(sizes.values())
    chip = CHIPS[topology.split(":")[0].split("-")[0]]
    flops = step_flops(config, batch_size=batch, seq_len=seq, adapter=adapter, gradient_checkpointing=remat)
    return Plan(
        SLICES.get(topology, topology), fsdp, tp, batch, seq,
        fits=bool(text) and sizes["peak"] <= chip.memory,
        bytes_per_chip=sizes,
        weights_per_chip=weights,
        memory_per_chip=chip.memory,
        flops=flops,
        **_bound(chip, config, flops, batch, seq, fsdp, tp, accumulate, remat, chunk),
        collectives=hlo.collectives(text),
        rematerialised=said[0].lower().count("involuntary full rematerialization"),
        compile_seconds=seconds,
    )  # fmt: skip


def _devices(topology: str) -> list:
    """The abstract devices of a slice. Raises `CourseError` for one that is not known here, or not to the compiler."""
    from jax.experimental import topologies

    name = SLICES.get(topology, topology)
    if name.split(":")[0] not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", name):
        raise CourseError(
            f"topology: expected one of {', '.join(SLICES)}, or such as v5e:2x4 of {', '.join(CHIPS)}, found {topology!r}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network which TPU this machine is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so several may plan at a time
    single = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(map(int, name.split(":")[1].split("x"))) == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **single).devices)
    except Exception as error:  # the compiler's own, of several types
        reason = " ".join(str(error).split())[:150]
        raise CourseError(f"topology: {name} is not one that the compiler has ({reason}): choose another") from None


def _lowered(mesh, config, batch, seq, rank, targets, accumulate, remat, dtype, chunk):
    """(the lowered step, bytes on a chip of the base and of all arguments, numbers in the adapter)."""

    def make():
        model = transformer.Transformer(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        return lora.inject(model, rank=rank, target_modules=targets, rngs=nnx.Rngs(0))

    def spread(tree):
        places = sharding.shardings(tree, mesh, config)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

    shape, rows = (batch, seq), NamedSharding(mesh, P("fsdp"))
    if accumulate > 1:
        shape, rows = (accumulate, batch // accumulate, seq), NamedSharding(mesh, P(None, "fsdp"))
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
    arrays = {name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in dtypes.items()}
    with kernels.compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = nnx.eval_shape(make)
        model.model.gradient_checkpointing = remat
        graph, learnt, rest = nnx.split(model, nnx.LoRAParam, ...)
        tx = finetune.optimizer(Finetune(model="", data="", output=""), steps=1000)
        carry = spread((learnt, jax.eval_shape(tx.init, learnt), jax.ShapeDtypeStruct((), bool)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        base = spread(rest)
        lowered = train.make_step(graph, finetune.loss_fn(chunk), tx, accumulate).lower(carry, base, arrays, key)

    def on_a_chip(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return lowered, on_a_chip(base), on_a_chip((carry, base, arrays)), sum(x.size for x in jax.tree.leaves(learnt))


@contextlib.contextmanager
def _stderr():
    """What compilers write to the standard error meanwhile, in the one place of the list that is yielded."""
    said = [""]
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said[0] = file.read().decode(errors="replace")


# ------------------------------------------------------------------------------------------------------------- estimates


def step_flops(config: transformer.Config, *, batch: int, seq: int, adapter: int, remat: bool) -> float:
    """Floating-point operations of one LoRA step, counted from the sizes: a multiply-add is two.

    The frozen weights are multiplied in the forward pass and once in the backward pass (they get no gradient of their own),
    and once more with `remat`; attention's two products twice in the backward pass; the output layer never again.
    """
    counts, again = transformer.count_parameters(config), int(remat)
    blocks = 2 * (counts["attention"] + counts["mlp"]) * (2 + again)
    scores = 2 * config.num_hidden_layers * 2 * seq * config.num_attention_heads * config.head_dim * (3 + again)
    head = 2 * config.vocab_size * config.hidden_size * 2
    return float(batch * seq * (blocks + scores + head + 2 * adapter * (3 + again)))


def estimate(
    config: transformer.Config,
    *,
    batch: int,
    seq: int,
    rank: int = 16,
    fsdp: int = 1,
    tp: int = 1,
    remat: bool = True,
    chunk: int = 1024,
    chip: str = "",
) -> dict[str, int]:
    """Bytes on each chip during `finetune`'s step on a base in bfloat16, by what they are for, without a compiler.

    "weights", "adapter" (Adam's two means with it), "saved" (what the layers keep for the backward pass), and the larger of
    two moments: "head" and "logits" (the loss: the output layer, gathered, and a chunk's logits), or "gathered" and "layer"
    (one layer on its way back: its weights, gathered, and its arrays). Their sum is the peak: within 15% of the compiler's
    on every plan of benchmarks/results/plans.jsonl. Chapter 13 derives each term. `chip` is a slice's name: a v6e's compiler
    joins more. Raises `CourseError` for sizes that do not divide.
    """
    c = config
    sharding.check(c, fsdp=fsdp, tp=tp)
    if batch % fsdp:
        raise CourseError(f"batch: {batch} rows do not divide over fsdp={fsdp}: choose a multiple of {fsdp}")
    D, F, q, kv = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    kv_tp = 1 if c.num_key_value_heads % tp else tp  # heads that do not divide are whole on every chip
    # outputs, inputs, and into how many parts tp cuts the outputs (column) or the inputs (row)
    column = [(q, D, tp), (kv, D, kv_tp), (kv, D, kv_tp), (F, D, tp), (F, D, tp)]
    row = [(D, q, tp), (D, F, tp)]
    matrices = sum(o * i // (n * fsdp) for o, i, n in column + row)
    biases = c.attention_bias * (q // tp + 2 * kv // kv_tp) + c.o_proj_bias * D // fsdp + c.mlp_bias * (2 * F // tp + D // fsdp)
    table = c.vocab_size * D // tp  # embedding or output layer, gathered
    numbers = c.num_hidden_layers * (matrices + biases + 2 * D) + D + (2 - c.tie_word_embeddings) * table // fsdp
    adapter = c.num_hidden_layers * rank * sum(o // n + i // fsdp for o, i, n in column)
    adapter += c.num_hidden_layers * rank * sum(o // fsdp + i // n for o, i, n in row)

    rows = batch // fsdp
    tokens = rows * seq
    scores, mlp = rows * (c.num_attention_heads // tp) * seq * seq, tokens * F // tp
    in_chunk = rows * max(1, min(chunk, batch * seq) // batch)
    block = 2 * matrices * fsdp if fsdp > 1 else 0  # a layer's weights, gathered, in bfloat16
    kept = 2 * tokens * D  # a layer's input; without remat everything that its way back asks for, gathered weights too
    if not remat:
        kept = 6 * scores + 12 * mlp + 14 * tokens * D + 2 * tokens * (q // tp + 2 * kv // kv_tp) + block
    head = 2 * table if fsdp > 1 else 0
    # A softmax on its way back: its value and its gradient, each in float32 and in bfloat16.
    loss = max(head, 12 * in_chunk * c.vocab_size // tp) + 2 * adapter
    # With one row or one key/value head on a chip, and on a v6e, the softmax of attention is joined to the products around
    # it, and has no array in float32.
    joined = rows == 1 or c.num_key_value_heads <= tp or chip.startswith("v6e")
    layer = (4 if joined else 8) * scores + 7 * 2 * mlp + 16 * 2 * tokens * D + 6 * adapter
    moments = {"head": head, "logits": loss}, {"gathered": block, "layer": layer}
    always = {"weights": 2 * numbers, "adapter": 12 * adapter, "saved": c.num_hidden_layers * kept}
    return always | max(moments, key=lambda moment: sum(moment.values()))


def _bound(chip: Chip, config, flops, batch, seq, fsdp, tp, accumulate, remat, chunk) -> dict:
    """`seconds` and `assumptions` of a plan: the roofline of Williams et al. (2009) for the step as a whole."""
    counts = transformer.count_parameters(config)
    rows = batch // accumulate
    chunks = accumulate * -(-seq // max(1, min(chunk, rows * seq) // rows))
    passes = accumulate * (2 + remat)
    read = 2 * (counts["attention"] + counts["mlp"]) * passes + 2 * config.vocab_size * config.hidden_size * 2 * chunks
    seconds = {"compute": flops / (fsdp * tp * chip.flops), "memory": read / tp / chip.bandwidth}
    return {
        "seconds": seconds | {"bound": max(seconds.values())},
        "assumptions": (
            f"{chip.flops / 1e12:g} TFLOP/s in bfloat16 and {chip.bandwidth / 1e9:g} GB/s ({chip.source})",
            f"{flops:.3g} operations, at the peak",
            f"{read / tp / 1e9:.1f} GB of weights read, each block's {passes} times, the output layer's {2 * chunks}; "
            "activations and messages not counted",
        ),
    }
