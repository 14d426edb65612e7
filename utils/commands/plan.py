"""Planning: what a training step takes on a TPU that you do not have.

The TPU's compiler is a library, and runs on any Linux machine. From shapes alone, with no weights and no
chip, it compiles the very step that `finetune` runs, and says how many bytes every chip needs, or that
they do not fit. Around that: a bound on the time of a step from two published numbers of the chip, and
the collectives between chips, read from the compiled program.

    python -m utils plan --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
        --topology v5e-8 --batch-size 16 --seq-len 2048

The compiler (libtpu, for Linux on x86-64) lives in an environment of its own: `make install-tpu`.
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
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from utils import CourseError, kernels, lora, sharding, train, unexpected
from utils.commands import finetune, hlo, options
from utils.hf import config as hf_config
from utils.transformer import Config, Transformer

ROOT = Path(__file__).resolve().parents[2]
TPU_PYTHON = ROOT / ".venv-tpu" / "bin" / "python"
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
    "v2": Chip(8 * GiB, 46e12 / 2, 700e9 / 2, "https://doi.org/10.1145/3360307"),
    "v3": Chip(16 * GiB, 123e12 / 2, 900e9 / 2, _DOCS + "v3"),
    "v5e": Chip(16 * GiB, 197e12, 819e9, _DOCS + "v5e"),
    "v5p": Chip(95 * GiB, 459e12, 2765e9, _DOCS + "v5p"),
    "v6e": Chip(32 * GiB, 918e12, 1638e9, _DOCS + "v6e"),
}
# Slices (named by cores for v2, v3 and v5p, two in a chip), and what the compiler calls their topology.
SLICES = {
    "v2-8": "v2:2x2", "v3-8": "v3:2x2", "v5e-1": "v5e:1x1", "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4",
    "v5p-8": "v5p:2x2x1", "v6e-1": "v6e:1x1", "v6e-4": "v6e:2x2", "v6e-8": "v6e:2x4",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler reports, per chip, and what follows from the chip's published numbers."""

    topology: str
    fsdp: int
    tp: int
    batch_size: int
    seq_len: int
    fits: bool
    bytes_per_chip: dict[str, int]  # arguments, temporaries, outputs (not donated), peak: their sum
    weights_per_chip: int  # the frozen base's part of the arguments
    memory_per_chip: int
    flops: float  # of the whole step, on all chips together
    seconds: dict[str, float]  # compute, memory: each alone, at the chip's peak; bound: the larger
    collectives: dict[str, dict[str, int]]  # kind -> {count, bytes}, of one step on one chip
    rematerialised: int  # arrays that every chip must replicate to reshard them
    compile_seconds: float
    assumptions: tuple[str, ...]

    def summary(self) -> dict:
        """Everything, by name."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        chips, b, s = self.fsdp * self.tp, self.bytes_per_chip, self.seconds
        name = "core" if self.topology[:2] in ("v2", "v3") else "chip"
        mesh = f"{chips} {name}{'s' * (chips > 1)} as fsdp {self.fsdp} x tp {self.tp}"
        lines = [f"{self.topology}: {mesh}, batch {self.batch_size} x {self.seq_len}"]
        for kind in ("arguments", "temporaries", "outputs"):
            lines.append(f"  {kind:12} {b[kind] / GiB:7.2f} GiB")
        memory = f"{self.memory_per_chip / GiB:.0f} per {name}"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(f"  {'peak':12} {b['peak'] / GiB:7.2f} GiB of {memory}: {verdict}")
        speed = f"{self.batch_size * self.seq_len / s['bound']:,.0f} tokens/s at most"
        lines.append(f"  a step takes at least {s['bound']:.3f} s ({speed}):")
        parts = f"arithmetic {s['compute']:.3f} s, weights from memory {s['memory']:.3f} s"
        lines += [f"    {parts}", *(f"    assumed: {text}" for text in self.assumptions)]
        if chips > 1:
            compiled = f"of a step, per {name}:" if self.collectives else "not compiled so far"
            lines.append(f"  collectives {compiled}")
        for kind, total in self.collectives.items():
            size = f"{total['bytes'] / 1e9:8.3f} GB together"
            lines.append(f"    {kind:20} {total['count']:6,} of {size}")
        if self.rematerialised:
            why = f"replicated on every {name} to be resharded (involuntary full rematerialization)"
            lines.append(f"  {self.rematerialised} arrays are {why}")
        return "\n".join([*lines, f"  compiled in {self.compile_seconds:.0f} s"])


def run(chosen: options.Plan) -> Plan | None:
    """Plan here, or, None then, by the same command in the environment that has the compiler."""
    config = hf_config.read(chosen.model)
    if importlib.util.find_spec("libtpu") is None and TPU_PYTHON.exists():
        if status := _in_tpu_environment(chosen):
            raise SystemExit(status)
        return None
    # On a TPU's own machine: plan without taking the chips.
    jax.config.update("jax_platforms", "cpu")
    sizes = {name: value for name, value in vars(chosen).items() if name not in ("model", "json")}
    return compile_for(sizes.pop("topology"), config, **sizes)


def _in_tpu_environment(chosen: options.Plan) -> int:
    """The status of `python -m utils plan` with these options in .venv-tpu."""
    words = []
    for name, value in vars(chosen).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    return subprocess.run([str(TPU_PYTHON), "-m", "utils", "plan", *words], env=env).returncode


# ------------------------------------------------------------------------------------------ the compiler


def compile_for(
    topology: str, config: Config, *, batch_size: int, seq_len: int, rank: int = 16,
    target_modules: tuple[str, ...] = lora.ALL_LINEAR, fsdp: int | None = None, tp: int = 1,
    gradient_accumulation_steps: int = 1, gradient_checkpointing: bool = True, dtype="bfloat16",
    loss_chunk_size: int = 1024,
) -> Plan:  # fmt: skip
    """Compile `finetune`'s step for a slice (v5e-8) or topology (v5e:2x4). Nothing is allocated.

    `batch_size` is an update's, on all chips and in all accumulation steps together; `fsdp` is by
    default what `tp` leaves. Raises `CourseError` for a topology that is not known, a mesh that does not
    divide, or where there is no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        what = "the TPU's compiler (a wheel for Linux on x86-64), found none in this environment"
        how = "run `make install-tpu` and then .venv-tpu/bin/python"
        raise CourseError(f"plan: needs libtpu, {what}: {how}")
    steps = gradient_accumulation_steps
    sizes = dict(batch_size=batch_size, seq_len=seq_len, loss_chunk_size=loss_chunk_size)
    whole = sizes | dict(rank=rank, gradient_accumulation_steps=steps, tp=tp)
    for name, value in (whole | ({} if fsdp is None else dict(fsdp=fsdp))).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise unexpected(name, "a whole number of at least 1", repr(value))
    if seq_len > (most := config.max_position_embeddings):
        raise unexpected("seq_len", f"at most {most}, the model's max_position_embeddings", seq_len)
    sizes |= dict(accumulation_steps=steps, gradient_checkpointing=gradient_checkpointing)
    with _captured_stderr() as messages:
        devices = _devices(topology)
        fsdp = fsdp or max(1, len(devices) // tp)
        sharding.check(config, fsdp=fsdp, tp=tp)
        if fsdp * tp != len(devices):
            raise unexpected("mesh", f"fsdp x tp = {len(devices)} ({topology})", f"{fsdp} x {tp}")
        if batch_size % (steps * fsdp):
            parts = f"fsdp={fsdp}" + f" in {steps} accumulation steps" * (steps > 1)
            what = f"{batch_size} rows do not divide over {parts}"
            raise CourseError(f"batch_size: {what}: choose a multiple of {steps * fsdp}")
        mesh = sharding.make_mesh(fsdp=fsdp, tp=tp, devices=devices)
        model = mesh, config, rank, target_modules, dtype
        lowered, weights, arguments, adapter = _lowered(*model, **sizes)
        started, text = time.perf_counter(), ""
        try:
            compiled = lowered.compile()
            text, m = compiled.as_text(), compiled.memory_analysis()
            arguments, temporaries = m.argument_size_in_bytes, m.temp_size_in_bytes
            outputs = m.output_size_in_bytes - m.alias_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            # "Used 20.1G of 15.75G hbm", or of "HLO temporaries (382.11G)" alone
            used = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])\b", str(error))
            if used is None:
                what = f"the compiler refused the program ({' '.join(str(error).split())[:200]})"
                raise CourseError(f"plan: {what}: try other sizes") from error
            size = int(float(used[2]) * 1024 ** ("KMGT".index(used[3]) + 1))
            temporaries, outputs = size - arguments * (used[1] == "Used "), 0
        seconds = time.perf_counter() - started
    memory = dict(arguments=arguments, temporaries=temporaries, outputs=outputs)
    memory["peak"] = sum(memory.values())
    chip = CHIPS[topology.split(":")[0].split("-")[0]]
    counted = dict(batch_size=batch_size, seq_len=seq_len, adapter=adapter)
    flops = step_flops(config, **counted, gradient_checkpointing=gradient_checkpointing)
    return Plan(
        SLICES.get(topology, topology), fsdp, tp, batch_size, seq_len,
        fits=bool(text) and memory["peak"] <= chip.memory,
        bytes_per_chip=memory,
        weights_per_chip=weights,
        memory_per_chip=chip.memory,
        flops=flops,
        **_bound(chip, config, flops, fsdp, tp, **sizes),
        collectives=hlo.collectives(text),
        rematerialised=messages[0].lower().count("involuntary full rematerialization"),
        compile_seconds=seconds,
    )  # fmt: skip


def _devices(topology: str) -> list:
    """The abstract devices of a slice. Raises `CourseError` for one that the compiler does not have."""
    name = SLICES.get(topology, topology)
    if name.split(":")[0] not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", name):
        expected = f"one of {', '.join(SLICES)}, or such as v5e:2x4 of {', '.join(CHIPS)}"
        raise unexpected("topology", expected, repr(topology))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network which TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken: several may plan
    settings = {}
    if math.prod(map(int, name.split(":")[1].split("x"))) == 1:
        settings = {"chips_per_host_bounds": [1, 1, 1]}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
        return list(description.devices)
    except Exception as error:  # the compiler's own, of several types
        reason = " ".join(str(error).split())[:150]
        what = f"{name} is not one that the compiler has ({reason}): choose another"
        raise CourseError(f"topology: {what}") from None


def _lowered(
    mesh, config, rank, target_modules, dtype, *, batch_size, seq_len, accumulation_steps,
    gradient_checkpointing, loss_chunk_size,
):  # fmt: skip
    """(lowered step, bytes on a chip of the base and of all arguments, parameters of the adapter)."""

    def make():
        model = Transformer(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        return lora.inject(model, rank=rank, target_modules=target_modules, rngs=nnx.Rngs(0))

    def sharded(tree):
        def abstract(x, s):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

        return jax.tree.map(abstract, tree, sharding.shardings(tree, mesh, config))

    shape, rows = (batch_size, seq_len), NamedSharding(mesh, P("fsdp"))
    if accumulation_steps > 1:
        shape = (accumulation_steps, batch_size // accumulation_steps, seq_len)
        rows = NamedSharding(mesh, P(None, "fsdp"))
    dtypes = dict.fromkeys(("inputs", "targets", "segment_ids"), jnp.int32)
    dtypes |= {"loss_mask": jnp.float32}
    batch = {n: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for n, kind in dtypes.items()}
    with kernels.compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = nnx.eval_shape(make)
        model.model.gradient_checkpointing = gradient_checkpointing
        graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
        tx = finetune.optimizer(options.Finetune(model="", data="", output=""), steps=1000)
        opt_state = jax.eval_shape(tx.init, trainable)
        carry = sharded((trainable, opt_state, jax.ShapeDtypeStruct((), bool)))
        key, base = jax.eval_shape(lambda: jax.random.key(0)), sharded(frozen)
        step = train.make_step(graph, finetune.loss_fn(loss_chunk_size), tx, accumulation_steps)
        lowered = step.lower(carry, base, batch, key)

    def on_a_chip(tree):
        shapes = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

    parameters = sum(x.size for x in jax.tree.leaves(trainable))
    return lowered, on_a_chip(base), on_a_chip((carry, base, batch)), parameters


@contextlib.contextmanager
def _captured_stderr():
    """Yields a list whose one text is, afterwards, what compilers wrote to standard error."""
    text = [""]
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            text[0] = file.read().decode(errors="replace")


def step_flops(
    config: Config, *, batch_size: int, seq_len: int, adapter: int, gradient_checkpointing: bool
) -> float:
    """Floating-point operations of one LoRA step, counted from the sizes: a multiply-add is two.

    Frozen weights, which get no gradient, are multiplied once in each pass and once more with
    `gradient_checkpointing` (not the output layer), attention's two products twice in the backward pass.
    """
    c, again = config, int(gradient_checkpointing)
    counts = c.count_parameters()
    blocks = 2 * (counts["attention"] + counts["mlp"]) * (2 + again)
    products = 2 * 2 * seq_len * c.num_attention_heads * c.head_dim  # of attention, in a layer
    scores = c.num_hidden_layers * products * (3 + again)
    head = 2 * c.vocab_size * c.hidden_size * 2
    return float(batch_size * seq_len * (blocks + scores + head + 2 * adapter * (3 + again)))


def _bound(
    chip: Chip, config, flops, fsdp, tp, *, batch_size, seq_len, accumulation_steps,
    gradient_checkpointing, loss_chunk_size,
) -> dict:  # fmt: skip
    """`seconds` and `assumptions` of a plan: the roofline (Williams et al. 2009) of the whole step."""
    counts = config.count_parameters()
    rows = batch_size // accumulation_steps
    columns = max(1, min(loss_chunk_size, rows * seq_len) // rows)
    heads = 2 * accumulation_steps * -(-seq_len // columns)  # times that the output layer is read
    passes = accumulation_steps * (2 + gradient_checkpointing)
    read = 2 * (counts["attention"] + counts["mlp"]) * passes
    read += 2 * config.vocab_size * config.hidden_size * heads
    seconds = {"compute": flops / (fsdp * tp * chip.flops), "memory": read / tp / chip.bandwidth}
    peak = f"{chip.flops / 1e12:g} TFLOP/s in bfloat16 and {chip.bandwidth / 1e9:g} GB/s"
    reads = f"{read / tp / 1e9:.1f} GB of weights read, each block's {passes} times"
    return {
        "seconds": seconds | {"bound": max(seconds.values())},
        "assumptions": (
            f"{peak} ({chip.source})",
            f"{flops:.3g} operations, at the peak",
            f"{reads}, the output layer's {heads}; activations and collectives not counted",
        ),
    }
