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
def saved_inputs(num_hidden_layers, hidden_size, batch_size, seq_len, fsdp):
    return 2 * num_hidden_layers * batch_size * seq_len * hidden_size
""",
        ),
        (
            "in-float32",
            """
def saved_inputs(num_hidden_layers, hidden_size, batch_size, seq_len, fsdp):
    return 4 * num_hidden_layers * (batch_size // fsdp) * seq_len * hidden_size
""",
        ),
        (
            "one-layer",
            """
def saved_inputs(num_hidden_layers, hidden_size, batch_size, seq_len, fsdp):
    return 2 * (batch_size // fsdp) * seq_len * hidden_size
""",
        ),
        (
            "numbers-not-bytes",
            """
def saved_inputs(num_hidden_layers, hidden_size, batch_size, seq_len, fsdp):
    return num_hidden_layers * (batch_size // fsdp) * seq_len * hidden_size
""",
        ),
    ],
    "13.3": [
        (
            "half-a-head",
            """
def heads_on_a_chip(num_attention_heads, num_key_value_heads, tp):
    return num_attention_heads // tp, num_key_value_heads // tp
""",
        ),
        (
            "one-each",
            """
def heads_on_a_chip(num_attention_heads, num_key_value_heads, tp):
    return num_attention_heads // tp, max(1, num_key_value_heads // tp)
""",
        ),
        (
            "not-refused",
            """
def heads_on_a_chip(num_attention_heads, num_key_value_heads, tp):
    return num_attention_heads // tp, num_key_value_heads if num_key_value_heads % tp else num_key_value_heads // tp
""",
        ),
        (
            "crash-not-refusal",
            """
def heads_on_a_chip(num_attention_heads, num_key_value_heads, tp):
    assert num_attention_heads % tp == 0
    return num_attention_heads // tp, num_key_value_heads if num_key_value_heads % tp else num_key_value_heads // tp
""",
        ),
    ],
    "13.4": [
        (
            "one-pass",
            """
def gathered(num_hidden_layers, layer_parameters, table_parameters, tp):
    return 2 * (num_hidden_layers * layer_parameters + 2 * table_parameters) / tp
""",
        ),
        (
            "tables-twice",
            """
def gathered(num_hidden_layers, layer_parameters, table_parameters, tp):
    return 4 * (num_hidden_layers * layer_parameters + 2 * table_parameters) / tp
""",
        ),
        (
            "three-passes",
            """
def gathered(num_hidden_layers, layer_parameters, table_parameters, tp):
    return 2 * (3 * num_hidden_layers * layer_parameters + 2 * table_parameters) / tp
""",
        ),
        (
            "tp-forgotten",
            """
def gathered(num_hidden_layers, layer_parameters, table_parameters, tp):
    return 2 * (2 * num_hidden_layers * layer_parameters + 2 * table_parameters)
""",
        ),
    ],
    "13.5": [
        (
            "upside-down",
            """
def tokens_to_hide(collective_bytes, bandwidth, operations, peak):
    return (operations / peak) / (collective_bytes / bandwidth)
""",
        ),
        (
            "seconds",
            """
def tokens_to_hide(collective_bytes, bandwidth, operations, peak):
    return collective_bytes / bandwidth
""",
        ),
        (
            "bits",
            """
def tokens_to_hide(collective_bytes, bandwidth, operations, peak):
    return 8 * collective_bytes / bandwidth / (operations / peak)
""",
        ),
    ],
}
