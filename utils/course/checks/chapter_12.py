"""Checks of chapter 12: bytes on a device and sent, an adapter's specs, meshes, a device's work."""

from types import SimpleNamespace

import numpy as np

from utils.course.checks import (
    Mistake,
    call,
    exercise,
    expect,
    expect_close,
    is_close,
    normal,
)


@exercise("12.1")
def held(learner):
    sizes = {"fsdp": 4, "tp": 2}
    expect_close(
        call(learner, (64, 32), 4, (("fsdp", "tp"), None), sizes),
        1024,
        "the bytes of a [64, 32] float32 array whose rows are cut along both axes",
        unlike={
            "nothing-is-cut": (8192, "this is the whole array", "the axes that the spec names"),
            "first-axis-only": (
                2048,
                "a tuple cuts one dimension along every axis in it",
                "both sizes",
            ),
            "second-axis-only": (
                4096,
                "a tuple cuts one dimension along every axis in it",
                "both sizes",
            ),
            "numbers-not-bytes": (256, "these are numbers, not bytes", "itemsize"),
            "added-not-multiplied": (
                1365.3333,
                "the parts of two axes multiply",
                "4 rows of 2 devices are 8 parts",
            ),
        },
    )
    expect_close(
        call(learner, (64, 32), 2, (None, "tp"), sizes),
        2048,
        "the bytes of a [64, 32] bfloat16 array whose columns are cut along tp",
        unlike={
            "every-axis-cuts": (
                512,
                "fsdp is not named: along it every device has a copy",
                "the axes in the spec",
            ),
            "float32-always": (4096, "the numbers here have two bytes", "itemsize"),
        },
    )
    expect_close(
        call(learner, (16, 8, 4), 4, ("fsdp",), sizes),
        512,
        "the bytes where the spec is shorter than the shape",
    )
    expect_close(
        call(learner, (16, 8), 4, (), sizes), 512, "the bytes of an array that nothing cuts"
    )
    return "Every axis that is named divides, and no other"


@exercise("12.2")
def sent(learner):
    array_bytes, n = 1200, 4
    expect_close(
        call(learner, "all-gather", array_bytes, n),
        900,
        "the bytes that a device sends for an all-gather of 1,200 bytes over 4",
        unlike={
            "own-part-too": (
                1200,
                "a device does not send its own part to itself",
                "the number of rounds",
            ),
            "one-round": (
                300,
                "this is one round",
                "how many rounds it takes until all have everything",
            ),
            "part-not-whole": (
                3600,
                "array_bytes is the array put together, not a device's part",
                "what travels in a round",
            ),
            "twice": (
                1800,
                "this is twice too much: nothing has to be added up first",
                "an all-gather's rounds",
            ),
        },
    )
    expect_close(
        call(learner, "all-reduce", array_bytes, n),
        1800,
        "the bytes that a device sends for an all-reduce of 1,200 bytes over 4",
        unlike={
            "all-reduce-like-gather": (
                900,
                "an all-reduce is a reduce-scatter and then an all-gather",
                "both halves",
            ),
            "everybody-to-everybody": (
                3600,
                "this sends the whole array to every other device",
                "adding on the way",
            ),
        },
    )
    expect_close(
        call(learner, "reduce-scatter", array_bytes, n),
        900,
        "the bytes that a device sends for a reduce-scatter",
        unlike={
            "scatter-like-all-reduce": (
                1800,
                "a reduce-scatter is the first half alone",
                "what each device ends with",
            )
        },
    )
    expect_close(
        call(learner, "all-reduce", 1000, 1), 0, "the bytes that a device sends when it is alone"
    )
    return "An all-reduce is both of the others, one after the other"


@exercise("12.3")
def adapter_specs(learner):
    tp_in, fsdp_in, tp_out, fsdp_out = (None, "tp"), (None, "fsdp"), ("tp", None), ("fsdp", None)
    for weight, right, kernels, turned in (
        (("tp", "fsdp"), (fsdp_in, tp_out), (fsdp_out, tp_in), (tp_in, fsdp_out)),
        (("fsdp", "tp"), (tp_in, fsdp_out), (tp_out, fsdp_in), (fsdp_in, tp_out)),
    ):
        pair = call(learner, weight)
        try:
            a, b = (
                (*spec, None, None)[: max(2, len(spec))] for spec in pair
            )  # a short spec is right
        except (TypeError, ValueError) as error:
            raise Mistake(
                "wrong-type", "expected a pair of tuples", "(spec of A, spec of B)"
            ) from error
        expect(
            (a, b) != right[::-1],
            "pair-swapped",
            "this is B's spec before A's",
            "the order of the pair",
        )
        expect(
            (a, b) != kernels,
            "kernels-in-out",
            "this is for factors stored as [in, R] and [R, out]",
            "the shapes: A [R, in], B [out, R]",
        )
        expect(
            (a, b) != (weight, weight),
            "the-rank-is-cut",
            "A and B have the rank where the weight has an axis",
            "which dimension of A, and of B, the layer has too",
        )
        expect(
            (a, b) != turned,
            "ends-swapped",
            "A has the layer's inputs and B its outputs",
            "what each of them reads and writes",
        )
        whole = (None, None)
        expect(
            (a, b) != (whole, whole),
            "copied-everywhere",
            "this copies the adapter to every device",
            "the layer's axes",
        )
        expect(
            (a, b) == right,
            "wrong-values",
            f"for a weight {weight} this is A {a} and B {b}",
            "each end by itself",
        )
    return "The rank stays whole"


@exercise("12.4")
def fitting(learner):
    r1 = {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1536}
    r1 |= {"intermediate_size": 8960, "vocab_size": 151936}

    def meshes(devices, **changes):
        pairs = call(learner, SimpleNamespace(**(r1 | changes)), devices)
        try:
            return [tuple(int(n) for n in mesh) for mesh in pairs]
        except (TypeError, ValueError) as error:
            raise Mistake(
                "wrong-type", "expected a list of pairs (fsdp, tp)", "what you return"
            ) from error

    fits, right = meshes(8), [(8, 1), (4, 2), (2, 4)]
    expect(
        fits != [(tp, fsdp) for fsdp, tp in right],
        "pair-swapped",
        "these are (tp, fsdp)",
        "the order in a pair",
    )
    expect(
        (1, 8) not in fits,
        "heads-cut",
        "12 heads do not divide over tp = 8",
        "every size that tp cuts",
    )
    expect(
        fits != right[:2],
        "kv-heads-refused",
        "key/value heads that do not divide are kept whole along tp",
        "(2, 4)",
    )
    expect(
        all(fsdp * tp == 8 for fsdp, tp in fits),
        "devices-left-over",
        "a mesh here leaves devices unused",
        "fsdp x tp",
    )
    expect(
        sorted(fits, reverse=True) == right,
        "wrong-values",
        f"for R1 on 8 devices this is {fits}",
        "the four sizes",
    )
    expect(
        fits == right,
        "other-order",
        "the order should be that of growing tp",
        "the order of the list",
    )
    fits = meshes(8, hidden_size=1540)
    expect(
        fits == [(4, 2), (2, 4)],
        "width-forgotten",
        "1,540 does not divide over fsdp = 8",
        "what fsdp cuts",
    )
    fits = meshes(8, intermediate_size=8962)
    expect(
        fits == [(8, 1), (4, 2)],
        "features-forgotten",
        "8,962 features do not divide over tp = 4",
        "intermediate_size",
    )
    fits = meshes(8, vocab_size=151935)
    expect(
        fits == [(8, 1)],
        "vocabulary-forgotten",
        "151,935 rows of the table do not divide over tp",
        "vocab_size",
    )
    thirds = meshes(6, intermediate_size=9216, vocab_size=151938)
    expect(
        thirds not in ([(6, 1), (3, 2)], []),
        "powers-of-two-only",
        "12 heads divide over tp = 3 as well, where 6 devices are there",
        "which sizes of tp are tried",
    )
    right = [(6, 1), (3, 2), (2, 3), (1, 6)]
    expect(thirds == right, "wrong-values", f"on 6 devices expected {right}, found {thirds}")
    return "No head is cut"


@exercise("12.5")
def device(learner):
    import jax
    from jax.sharding import PartitionSpec as P

    from utils import sharding
    from utils.commands import hlo

    x, up, down = normal(4, 2), normal(2, 4, seed=1), normal(4, 2, seed=2)
    mesh = sharding.make_mesh(fsdp=4, tp=2)
    mapped = jax.jit(
        jax.shard_map(
            lambda *parts: call(learner, *parts),
            mesh=mesh,
            in_specs=(P("fsdp"), P(None, "tp"), P("tp")),
            out_specs=P("fsdp"),
            check_vma=False,
        )
    )
    # Computed beforehand: the parts of the devices with tp = 0 and tp = 1, half the features each.
    first = np.array(
        [[2.717576, -0.564574], [-0.445210, 0.137143], [1.338814, -0.334191], [0.097150, -0.034755]]
    )
    last = np.array(
        [
            [-0.971402, -2.351755],
            [0.073912, -0.465049],
            [-1.264573, -0.457016],
            [-0.063868, -0.046584],
        ]
    )
    y = first + last
    expect_close(
        mapped(x, up, down),
        y,
        "the rows",
        axes="[B, D]",
        rtol=1e-3,
        atol=1e-4,
        unlike={
            "half-a-sum": (
                first,
                "this is the device's own part of a sum",
                "who has the other features",
            ),
            "mean-not-sum": (
                y / 2,
                "this is half of it: the parts add up",
                "the mean of two parts",
            ),
            "rows-added-up": (
                np.tile(first.sum(0), (4, 1)),
                "this adds different rows of the batch",
                "the axis of the sum",
            ),
            "everything-added-up": (
                np.tile(y.sum(0), (4, 1)),
                "this adds different rows as well",
                "the axes of the sum",
            ),
            "summed-too-early": (
                [
                    [9.367147, -1.729646],
                    [0.250294, -0.135076],
                    [2.604165, -0.440078],
                    [0.211576, -0.045373],
                ],
                "this adds features of different devices before silu",
                "what is a sum, and what are different features",
            ),
        },
    )
    # The compiler may join what was written as two: the jaxpr has those that were written.
    written = _collectives(jax.make_jaxpr(mapped)(x, up, down).jaxpr)
    compiled = hlo.collectives(mapped.lower(x, up, down).compile().as_text())
    expect(
        len(written) == 1 and is_close(compiled.get("all-reduce", {"bytes": 0})["bytes"], 8),
        "more-than-needed",
        f"the numbers are right, with {len(written)} collectives: {', '.join(written)}",
        "one all-reduce of the result",
    )
    return "One collective, of this device's rows"


def _collectives(jaxpr) -> list[str]:
    """The collectives of a jaxpr, inner jaxprs included, by name."""
    names = []
    for equation in jaxpr.eqns:
        axes = equation.params.get("axes", equation.params.get("axis_name", ()))
        over_the_mesh = any(isinstance(axis, str) for axis in np.atleast_1d(axes).tolist())
        if over_the_mesh and equation.primitive.name != "axis_index":
            names.append(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names += _collectives(inner)
    return names
