"""Wrong answers to the exercises of chapter 9, each with the name under which its check must recognise it."""

WRONG = {
    "9.1": [
        (
            "keys-without-values",
            """
def kv_bytes(config, batch_size, tokens, itemsize):
    return config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch_size * tokens * itemsize
""",
        ),
        (
            "query-heads",
            """
def kv_bytes(config, batch_size, tokens, itemsize):
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * batch_size * tokens * itemsize
""",
        ),
        (
            "model-width",
            """
def kv_bytes(config, batch_size, tokens, itemsize):
    return 2 * config.num_hidden_layers * config.hidden_size * batch_size * tokens * itemsize
""",
        ),
        (
            "numbers-not-bytes",
            """
def kv_bytes(config, batch_size, tokens, itemsize):
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch_size * tokens
""",
        ),
    ],
    "9.2": [
        (
            "cache-left-out",
            """
def tokens_per_second(read_bytes, cache_bytes, batch_size, bandwidth):
    return batch_size * bandwidth / read_bytes
""",
        ),
        (
            "cache-once",
            """
def tokens_per_second(read_bytes, cache_bytes, batch_size, bandwidth):
    return batch_size * bandwidth / (read_bytes + cache_bytes)
""",
        ),
        (
            "weights-for-each-row",
            """
def tokens_per_second(read_bytes, cache_bytes, batch_size, bandwidth):
    return batch_size * bandwidth / (batch_size * (read_bytes + cache_bytes))
""",
        ),
        (
            "steps-not-tokens",
            """
def tokens_per_second(read_bytes, cache_bytes, batch_size, bandwidth):
    return bandwidth / (read_bytes + batch_size * cache_bytes)
""",
        ),
    ],
    "9.3": [
        (
            "divides-negative-logits",
            """
def penalised(logits, ids, penalty):
    out = np.array(logits)
    out[list(set(ids))] /= penalty
    return out
""",
        ),
        (
            "once-per-occurrence",
            """
def penalised(logits, ids, penalty):
    out = np.array(logits)
    for token in ids:
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out
""",
        ),
        (
            "changes-its-input",
            """
def penalised(logits, ids, penalty):
    for token in set(ids):
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    return logits
""",
        ),
        (
            "subtracts",
            """
def penalised(logits, ids, penalty):
    out = np.array(logits)
    out[list(set(ids))] -= penalty
    return out
""",
        ),
    ],
    "9.4": [
        (
            "half-a-stop-sent",
            """
def cut(held, stop):
    before, found, _ = held.partition(stop)
    return before, "", bool(found)
""",
        ),
        (
            "holds-too-much",
            """
def cut(held, stop):
    if stop in held:
        return held[: held.index(stop)], "", True
    keep = len(stop) - 1
    return held[: len(held) - keep], held[len(held) - keep :], False
""",
        ),
        (
            "stop-string-sent",
            """
def cut(held, stop):
    if stop in held:
        return held[: held.index(stop) + len(stop)], "", True
    return held, "", False
""",
        ),
        (
            "misses-the-stop",
            """
def cut(held, stop):
    if held.endswith(stop):
        return held[: -len(stop)], "", True
    return held, "", False
""",
        ),
    ],
    "9.5": [
        (
            "one-too-far",
            """
def read_positions(lengths, generated):
    return lengths + generated

def min_cache_length(lengths, new):
    return int(max(lengths)) + new
""",
        ),
        (
            "the-longest-for-all",
            """
def read_positions(lengths, generated):
    return np.full(len(lengths), max(lengths) + generated - 1)

def min_cache_length(lengths, new):
    return int(max(lengths)) + new - 1
""",
        ),
        (
            "slot-for-the-last",
            """
def read_positions(lengths, generated):
    return lengths - 1 + generated

def min_cache_length(lengths, new):
    return int(max(lengths)) + new
""",
        ),
        (
            "one-too-early",
            """
def read_positions(lengths, generated):
    return lengths + generated - 2

def min_cache_length(lengths, new):
    return int(max(lengths)) + new - 1
""",
        ),
    ],
    "9.6": [
        (
            "throws-the-correction-away",
            """
def accepted(draft, choices):
    out = []
    for guess, choice in zip(draft, choices):
        if guess != choice:
            break
        out.append(guess)
    return out
""",
        ),
        (
            "accepts-after-a-mistake",
            """
def accepted(draft, choices):
    return [choice for guess, choice in zip(draft, choices) if guess == choice]
""",
        ),
        (
            "forgets-the-last-choice",
            """
def accepted(draft, choices):
    out = []
    for guess, choice in zip(draft, choices):
        out.append(choice)
        if guess != choice:
            break
    return out
""",
        ),
        (
            "keeps-the-wrong-draft",
            """
def accepted(draft, choices):
    out = []
    for guess, choice in zip(draft, choices):
        out.append(guess)
        if guess != choice:
            return out
    return out + [choices[-1]]
""",
        ),
    ],
}
