"""Reading a compiled program: the collectives that the compiler put into it.

Its text is in XLA's own language, HLO: computations in braces, one operation a line, loops and fusions
naming the computations that they run.

    hlo.collectives(jax.jit(f).lower(x).compile().as_text())
    # {"all-gather": {"count": 28, "bytes": 1048576}, ...}
"""

import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, s64=8, u64=8, f64=8)  # others: 4


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Kind -> {count, bytes} of the collectives in a compiled program's text, on one device.

    A collective in a loop counts as often as the loop runs: the number that its condition compares
    with. Bytes are those of the result, and of the larger part where it is a pair (one that is started
    here and awaited there). The TPU's compiler writes a collective into every computation that it
    overlaps with, under one channel: it counts once. A fused reduce-scatter is written, and so counted,
    as an all-reduce of the whole array.
    """
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            body = bodies.setdefault("ENTRY" if header[1] else header[2], [])
        elif line.startswith("  "):
            body.append(line)
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    channels = set()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            parts = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][a-z0-9-]*)\(", line)
            if parts is None or parts[2].endswith(("-done", "-update")):
                continue
            kind = parts[2].removesuffix("-start")
            if kind in KINDS:
                channel = re.findall(r"channel_id=\d+", line)
                if channels.intersection(channel):
                    continue
                channels.update(channel)
                sizes = [
                    _BYTES.get(dtype, 4) * math.prod(map(int, re.findall(r"\d+", dims)))
                    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", parts[1])
                ]
                size = max(sizes) if parts[2].endswith("-start") else sum(sizes)
                counts[kind]["count"] += times
                counts[kind]["bytes"] += times * size
            elif kind == "while":
                condition = re.search(r"condition=%?([\w.-]+)", line)[1]
                text = "\n".join(bodies.get(condition, ()))
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
                body = re.search(r"body=%?([\w.-]+)", line)[1]
                visit(body, times * max(map(int, limits), default=1))
            else:
                calls = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
                for called in re.findall(calls, line):
                    visit(called, times)

    visit("ENTRY", 1)
    return {kind: counts[kind] for kind in KINDS if kind in counts}
