"""Wrong answers to the exercises of chapter 13, each with the name under which its check must recognise it."""

WRONG = {
    "13.1": [
        (
            "one-chip",
            """
def largest_batch(memory, fixed, per_row, fsdp):
    return int((memory - fixed) // per_row)
""",
        ),
        (
            "does-not-divide",
            """
def largest_batch(memory, fixed, per_row, fsdp):
    return int(fsdp * (memory - fixed) / per_row)
""",
        ),
        (
            "rounded-up",
            """
def largest_batch(memory, fixed, per_row, fsdp):
    return fsdp * math.ceil((memory - fixed) / per_row)
""",
        ),
        (
            "nothing-else-there",
            """
def largest_batch(memory, fixed, per_row, fsdp):
    return fsdp * int(memory // per_row)
""",
        ),
    ],
    "13.2": [
        (
            "whole-batch",
            """
def saved_inputs(layers, width, batch, seq, fsdp):
    return 2 * layers * batch * seq * width
""",
        ),
        (
            "in-float32",
            """
def saved_inputs(layers, width, batch, seq, fsdp):
    return 4 * layers * (batch // fsdp) * seq * width
""",
        ),
        (
            "one-layer",
            """
def saved_inputs(layers, width, batch, seq, fsdp):
    return 2 * (batch // fsdp) * seq * width
""",
        ),
        (
            "numbers-not-bytes",
            """
def saved_inputs(layers, width, batch, seq, fsdp):
    return layers * (batch // fsdp) * seq * width
""",
        ),
    ],
    "13.3": [
        (
            "half-a-head",
            """
def heads_on_a_chip(heads, kv_heads, tp):
    return heads // tp, kv_heads // tp
""",
        ),
        (
            "one-each",
            """
def heads_on_a_chip(heads, kv_heads, tp):
    return heads // tp, max(1, kv_heads // tp)
""",
        ),
        (
            "not-refused",
            """
def heads_on_a_chip(heads, kv_heads, tp):
    return heads // tp, kv_heads if kv_heads % tp else kv_heads // tp
""",
        ),
        (
            "crash-not-refusal",
            """
def heads_on_a_chip(heads, kv_heads, tp):
    assert heads % tp == 0
    return heads // tp, kv_heads if kv_heads % tp else kv_heads // tp
""",
        ),
    ],
    "13.4": [
        (
            "one-pass",
            """
def gathered(layers, layer_numbers, table_numbers, tp):
    return 2 * (layers * layer_numbers + 2 * table_numbers) / tp
""",
        ),
        (
            "tables-twice",
            """
def gathered(layers, layer_numbers, table_numbers, tp):
    return 4 * (layers * layer_numbers + 2 * table_numbers) / tp
""",
        ),
        (
            "three-passes",
            """
def gathered(layers, layer_numbers, table_numbers, tp):
    return 2 * (3 * layers * layer_numbers + 2 * table_numbers) / tp
""",
        ),
        (
            "tp-forgotten",
            """
def gathered(layers, layer_numbers, table_numbers, tp):
    return 2 * (2 * layers * layer_numbers + 2 * table_numbers)
""",
        ),
    ],
    "13.5": [
        (
            "upside-down",
            """
def tokens_to_hide(message_bytes, bandwidth, operations, peak):
    return (operations / peak) / (message_bytes / bandwidth)
""",
        ),
        (
            "seconds",
            """
def tokens_to_hide(message_bytes, bandwidth, operations, peak):
    return message_bytes / bandwidth
""",
        ),
        (
            "bits",
            """
def tokens_to_hide(message_bytes, bandwidth, operations, peak):
    return 8 * message_bytes / bandwidth / (operations / peak)
""",
        ),
    ],
}
