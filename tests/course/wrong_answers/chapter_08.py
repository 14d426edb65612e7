"""Wrong answers to the exercises of chapter 8, each with the name under which its check must recognise it."""

WRONG = {
    "8.1": [
        (
            "bytes-not-numbers",
            """
def count(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return sum(e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name != "__metadata__")
""",
        ),
        (
            "all-two-bytes",
            """
def count(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return (len(raw) - 8 - length) // 2
""",
        ),
        (
            "scalar-lost",
            """
def count(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    total = 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if entry.get("shape"):
            total += math_prod(entry["shape"])
    return total

def math_prod(shape):
    out = 1
    for n in shape:
        out *= n
    return out
""",
        ),
        (
            "sums-the-shape",
            """
def count(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return sum(sum(e.get("shape", [])) for e in json.loads(raw[8 : 8 + length]).values())
""",
        ),
        (
            "counts-the-metadata",
            """
def count(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return sum(int(np.prod(entry["shape"])) for entry in header.values())
""",
        ),
    ],
    "8.2": [
        (
            "row-is-text",
            """
def place(name):
    parts = name.split(".")
    if "layers" not in parts:
        return name, None
    i = parts.index("layers") + 1
    return ".".join(parts[:i] + parts[i + 1 :]), parts[i]
""",
        ),
        (
            "number-left-in-the-path",
            """
def place(name):
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return name, numbers[0] if numbers else None
""",
        ),
        (
            "one-digit-only",
            """
def place(name):
    import re
    found = re.search(r"layers[.]([0-9]*)([0-9])[.]", name)
    if not found:
        return name, None
    return re.sub(r"layers[.][0-9]+[.]", "layers.", name), int(found[2])
""",
        ),
        (
            "row-for-everything",
            """
def place(name):
    parts = [part for part in name.split(".") if not part.isdigit()]
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return ".".join(parts), numbers[0] if numbers else 0
""",
        ),
        (
            "pair-turned-round",
            """
def place(name):
    parts = name.split(".")
    return (None, name) if "layers" not in parts else (int(parts[2]), ".".join(parts[:2] + parts[3:]))
""",
        ),
    ],
    "8.3": [
        (
            "permuted-again",
            """
def undo(weight, heads):
    pairs = weight.reshape(heads, 2, -1, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
""",
        ),
        (
            "across-heads",
            """
def undo(weight, heads):
    return np.concatenate([weight[0::2], weight[1::2]])
""",
        ),
        (
            "halves-swapped",
            """
def undo(weight, heads):
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])[:, :, ::-1]
    return pairs.swapaxes(1, 2).reshape(weight.shape)
""",
        ),
        (
            "heads-of-8-only",
            """
def undo(weight, heads):
    return weight.reshape(heads, 8, -1)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(weight.shape)
""",
        ),
        (
            "changes-its-input",
            """
def undo(weight, heads):
    for head in weight.reshape(heads, -1, weight.shape[-1]):
        head[:] = np.concatenate([head[0::2], head[1::2]])
    return weight
""",
        ),
    ],
    "8.4": [
        ("another-rotation-bug", 'culprit = "interleaved"'),
        ("the-rotation-overlooked", 'culprit = "eps_value"'),
        ("unknown-name", 'culprit = "rope"'),
    ],
    "8.5": [
        (
            "place-not-scaled",
            """
def piece(shape, spec, mesh, where):
    steps = [n // mesh.get(axis, 1) for n, axis in zip(shape, spec)]
    return tuple(slice(where.get(axis, 0), where.get(axis, 0) + step) for step, axis in zip(steps, spec))
""",
        ),
        (
            "first-piece-for-all",
            """
def piece(shape, spec, mesh, where):
    return tuple(slice(0, n // mesh.get(axis, 1)) for n, axis in zip(shape, spec))
""",
        ),
        (
            "nothing-cut",
            """
def piece(shape, spec, mesh, where):
    return tuple(slice(0, n) for n in shape)
""",
        ),
        (
            "wrong-size",
            """
def piece(shape, spec, mesh, where):
    sizes = list(mesh.values())
    steps = [n if axis is None else n // sizes[i % 2] for i, (n, axis) in enumerate(zip(shape, spec))]
    return tuple(slice(0, step) for step in steps)
""",
        ),
        (
            "wrong-end",
            """
def piece(shape, spec, mesh, where):
    steps = [n // mesh.get(axis, 1) for n, axis in zip(shape, spec)]
    places = [where.get(axis, 0) for axis in spec]
    return tuple(slice(place * step, (place + 1) * step - 1) for step, place in zip(steps, places))
""",
        ),
        (
            "counted-from-the-end",
            """
def piece(shape, spec, mesh, where):
    steps = [n // mesh.get(axis, 1) for n, axis in zip(shape, spec)]
    places = [where.get(axis, 0) for axis in spec]
    return tuple(slice(n - (p + 1) * step, n - p * step) for n, step, p in zip(shape, steps, places))
""",
        ),
    ],
    "8.6": [
        (
            "overflow-passed",
            """
def to_float16(array):
    wide = array.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ValueError("not finite")
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    return half, int(((half == 0) & (wide != 0)).sum())
""",
        ),
        (
            "clipped",
            """
def to_float16(array):
    wide = array.astype(np.float32)
    half = np.clip(wide, -65504, 65504).astype(np.float16)
    return half, int(((half == 0) & (wide != 0)).sum())
""",
        ),
        (
            "zeros-counted-too",
            """
def to_float16(array):
    wide = array.astype(np.float32)
    half = wide.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("overflow or not finite")
    return half, int((half == 0).sum())
""",
        ),
        (
            "infinity-blamed-on-the-cast",
            """
def to_float16(array):
    wide = array.astype(np.float32)
    if np.isnan(wide).any():
        raise ValueError("not finite")
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if np.isinf(half).any():
        raise ValueError("overflow")
    return half, int(((half == 0) & (wide != 0)).sum())
""",
        ),
        (
            "one-message-for-both",
            """
def to_float16(array):
    wide = array.astype(np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("overflow or not finite")
    return half, int(((half == 0) & (wide != 0)).sum())
""",
        ),
        (
            "small-numbers-counted",
            """
def to_float16(array):
    wide = array.astype(np.float32)
    small = (np.abs(wide) < np.finfo(np.float16).tiny) & (wide != 0)
    return wide.astype(np.float16), int(small.sum())
""",
        ),
    ],
}
