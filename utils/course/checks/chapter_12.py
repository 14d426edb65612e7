"""Checks of chapter 12: bytes on a device and on the wire, where an adapter lies, which meshes fit, a device's program."""

from types import SimpleNamespace

import numpy as np

from utils.course.checks import Mistake, array, call, exercise, expect, expect_close, is_close, normal


@exercise("12.1")
def held(learner):
    sizes = {"fsdp": 4, "tp": 2}
    found = call(learner, (64, 32), 4, (("fsdp", "tp"), None), sizes)
    expect_close(
        found,
        1024,
        "the bytes of a [64, 32] float32 array whose rows are cut along both axes",
        unlike={
            "nothing-is-cut": (8192, "this is the whole array", "the axes that the spec names"),
            "first-axis-only": (2048, "a tuple cuts one dimension along every axis in it", "both sizes"),
            "second-axis-only": (4096, "a tuple cuts one dimension along every axis in it", "both sizes"),
            "numbers-not-bytes": (256, "these are numbers, not bytes", "itemsize"),
            "added-not-multiplied": (8192 / 6, "the parts of two axes multiply", "4 rows of 2 devices are 8 parts"),
        },
    )
    expect_close(
        call(learner, (64, 32), 2, (None, "tp"), sizes),
        2048,
        "the bytes of a [64, 32] bfloat16 array whose columns are cut along tp",
        unlike={
            "every-axis-cuts": (512, "fsdp is not named: along it every device has a copy", "the axes in the spec"),
            "float32-always": (4096, "the numbers here have two bytes", "itemsize"),
        },
    )
    expect_close(
        call(learner, (16, 8, 4), 4, ("fsdp",), sizes), 512, "the bytes where the spec is shorter than the shape"
    )
    expect_close(call(learner, (16, 8), 4, (), sizes), 512, "the bytes of an array that nothing cuts")
    return "Every axis that is named divides, and no other"


@exercise("12.2")
def sent(learner):
    whole, n = 1200, 4
    found = call(learner, "all-gather", whole, n)
    expect_close(
        found,
        900,
        "the bytes that a device sends for an all-gather of 1,200 bytes over 4",
        unlike={
            "own-part-too": (1200, "a device does not send its own part to itself", "the number of rounds"),
            "one-round": (300, "this is one round", "how many rounds it takes until all have everything"),
            "part-not-whole": (3600, "whole is the array put together, not a device's part", "what travels in a round"),
            "twice": (1800, "this is twice too much: nothing has to be added up first", "an all-gather's rounds"),
        },
    )
    expect_close(
        call(learner, "all-reduce", whole, n),
        1800,
        "the bytes that a device sends for an all-reduce of 1,200 bytes over 4",
        unlike={
            "all-reduce-like-gather": (900, "an all-reduce is a reduce-scatter and then an all-gather", "both halves"),
            "everybody-to-everybody": (3600, "this sends the whole array to every other device", "adding on the way"),
        },
    )
    expect_close(
        call(learner, "reduce-scatter", whole, n),
        900,
        "the bytes that a device sends for a reduce-scatter",
        unlike={
            "scatter-like-all-reduce": (1800, "a reduce-scatter is the first half alone", "what each device ends with")
        },
    )
    expect_close(call(learner, "all-reduce", 1000, 1), 0, "the bytes that a device sends when it is alone")
    return "An all-reduce is both of the others, one after the other"


@exercise("12.3")
def adapter_specs(learner):
    for weight in (("tp", "fsdp"), ("fsdp", "tp")):
        found = call(learner, weight)
        try:
            a, b = (tuple(spec) for spec in found)
        except (TypeError, ValueError) as error:
            raise Mistake("wrong-type", "expected a pair of tuples", "(spec of A, spec of B)") from error
        out, inside = weight
        right = ((None, inside), (out, None))
        expect((a, b) != right[::-1], "pair-swapped", "this is B's spec before A's", "the order of the pair")
        expect(
            (a, b) != ((inside, None), (None, out)),
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
            (a, b) != ((None, out), (inside, None)),
            "ends-swapped",
            "A has the layer's inputs and B its outputs",
            "what each of them reads and writes",
        )
        whole = (None, None)
        expect(
            (a, b) != (whole, whole), "copied-everywhere", "this copies the adapter to every device", "the layer's axes"
        )
        expect((a, b) == right, "wrong-values", f"for a weight {weight} this is A {a} and B {b}", "each end by itself")
    return "The rank stays whole"


@exercise("12.4")
def fitting(learner):
    def sizes(**changes):
        r1 = dict(num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, vocab_size=151936, hidden_size=1536)
        return SimpleNamespace(**(r1 | changes))

    def meshes(config, devices):
        found = call(learner, config, devices)
        try:
            return [tuple(int(n) for n in mesh) for mesh in found]
        except (TypeError, ValueError) as error:
            raise Mistake("wrong-type", "expected a list of pairs (fsdp, tp)", "what you return") from error

    found, right = meshes(sizes(), 8), [(8, 1), (4, 2), (2, 4)]
    expect(found != [(tp, fsdp) for fsdp, tp in right], "pair-swapped", "these are (tp, fsdp)", "the order in a pair")
    expect((1, 8) not in found, "heads-cut", "12 heads do not divide over tp = 8", "every size that tp cuts")
    expect(
        found != right[:2], "kv-heads-refused", "key/value heads that do not divide are kept whole along tp", "(2, 4)"
    )
    expect(
        all(fsdp * tp == 8 for fsdp, tp in found), "devices-left-over", "a mesh here leaves devices unused", "fsdp x tp"
    )
    expect(
        sorted(found, reverse=True) == right, "wrong-values", f"for R1 on 8 devices this is {found}", "the four sizes"
    )
    expect(found == right, "other-order", "the order should be that of growing tp", "the order of the list")
    found = meshes(sizes(hidden_size=1540), 8)
    expect(found == [(4, 2), (2, 4)], "width-forgotten", "1,540 does not divide over fsdp = 8", "what fsdp cuts")
    found = meshes(sizes(intermediate_size=8962), 8)
    expect(found == [(8, 1), (4, 2)], "features-forgotten", "8,962 features do not divide over tp = 4", "intermediate_size")
    found = meshes(sizes(vocab_size=151935), 8)
    expect(found == [(8, 1)], "vocabulary-forgotten", "151,935 rows of the table do not divide over tp", "vocab_size")
    return "No head is cut"


@exercise("12.5")
def device(learner):
    import jax
    from jax.sharding import PartitionSpec as P

    from utils import sharding
    from utils.commands import hlo

    x, up, down = normal(8, 6), normal(6, 10, seed=1), normal(10, 6, seed=2)
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
    found = array(mapped(x, up, down), "the result")
    features = x @ up
    features = features / (1 + np.exp(-features))
    first, last = features[:, :5] @ down[:5], features[:, 5:] @ down[5:]
    y = first + last
    rows = y.reshape(4, 2, 6).sum(0)
    partial = first.reshape(4, 2, 6).sum(0)
    mixed = x @ up[:, :5] + x @ up[:, 5:]
    expect_close(
        found,
        y,
        "the rows",
        axes="[B, D]",
        rtol=1e-3,
        atol=1e-4,
        unlike={
            "half-a-sum": (first, "this is the device's own part of a sum", "who has the other features"),
            "mean-not-sum": (y / 2, "this is half of it: the parts add up", "the mean of two parts"),
            "rows-added-up": (np.tile(partial, (4, 1)), "this adds different rows of the batch", "the axis of the sum"),
            "everything-added-up": (np.tile(rows, (4, 1)), "this adds different rows as well", "the axes of the sum"),
            "summed-too-early": (
                _silu(mixed) @ down[:5],
                "this adds features of different devices before silu",
                "what is a sum, and what are different features",
            ),
        },
    )
    said = hlo.collectives(mapped.lower(x, up, down).compile().as_text())
    count = sum(one["count"] for one in said.values())
    expect(
        count == 1 and is_close(said.get("all-reduce", {"bytes": 0})["bytes"], 2 * 6 * 4),
        "more-than-needed",
        f"the numbers are right, with {count} messages: {', '.join(said)}",
        "one all-reduce of the result",
    )
    return "One message, of this device's rows"


def _silu(x):
    return x / (1 + np.exp(-x))
