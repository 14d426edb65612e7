"""Wrong answers to the exercises of chapter 11, each with the name under which its check must recognise it."""

WRONG = {
    "11.1": [
        (
            "inputs-not-targets",
            """
def conversation_mask(roles):
    return np.array([role in ("answer", "end") for role in roles[:-1]], np.float32)
""",
        ),
        (
            "end-never-learned",
            """
def conversation_mask(roles):
    return np.array([role == "answer" for role in roles[1:]], np.float32)
""",
        ),
        (
            "one-entry-too-many",
            """
def conversation_mask(roles):
    return np.array([role in ("answer", "end") for role in roles], np.float32)
""",
        ),
        (
            "last-answer-only",
            """
def conversation_mask(roles):
    last = max(i for i, role in enumerate(roles) if role == "user")
    return np.array([i > last and role in ("answer", "end") for i, role in enumerate(roles)][1:], np.float32)
""",
        ),
        (
            "user-in-the-loss",
            """
def conversation_mask(roles):
    return np.array([role != "template" for role in roles[1:]], np.float32)
""",
        ),
    ],
    "11.2": [
        (
            "mean-of-means",
            """
def combined(means, counts):
    return float(np.mean(means))
""",
        ),
        (
            "sum-not-mean",
            """
def combined(means, counts):
    return float(np.dot(means, counts))
""",
        ),
        (
            "mean-of-nonempty-means",
            """
def combined(means, counts):
    return float(np.mean([m for m, n in zip(means, counts) if n]))
""",
        ),
    ],
    "11.3": [
        (
            "keeps-the-end",
            """
def cut(ids, prompt, max_seq_length):
    kept = ids if len(ids) <= max_seq_length + 1 else [*ids[:max_seq_length], ids[-1]]
    return kept if len(kept) > prompt + 1 else None
""",
        ),
        (
            "one-token-too-few",
            """
def cut(ids, prompt, max_seq_length):
    return ids[:max_seq_length] if max_seq_length > prompt else None
""",
        ),
        (
            "no-completion-left",
            """
def cut(ids, prompt, max_seq_length):
    return ids[: max_seq_length + 1]
""",
        ),
        (
            "front-cut-off",
            """
def cut(ids, prompt, max_seq_length):
    return ids[:-1][-(max_seq_length + 1):] if len(ids) > max_seq_length + 1 else ids
""",
        ),
        (
            "skips-what-can-be-cut",
            """
def cut(ids, prompt, max_seq_length):
    return ids if len(ids) <= max_seq_length + 1 else None
""",
        ),
        (
            "skips-the-last-chance",
            """
def cut(ids, prompt, max_seq_length):
    return ids[: max_seq_length + 1] if max_seq_length > prompt else None
""",
        ),
    ],
    "11.4": [
        (
            "prompt-counted",
            """
def by_example(nats, segment_ids, loss_mask):
    return [float(nats[segment_ids == n].mean()) for n in range(1, segment_ids.max() + 1)]
""",
        ),
        (
            "padding-as-an-example",
            """
def by_example(nats, segment_ids, loss_mask):
    return [float(np.mean(nats[segment_ids == n])) for n in np.unique(segment_ids)]
""",
        ),
        (
            "divided-by-all-positions",
            """
def by_example(nats, segment_ids, loss_mask):
    return [float((nats * loss_mask)[segment_ids == n].mean()) for n in range(1, segment_ids.max() + 1)]
""",
        ),
        (
            "sum-not-mean",
            """
def by_example(nats, segment_ids, loss_mask):
    return [float((nats * loss_mask)[segment_ids == n].sum()) for n in range(1, segment_ids.max() + 1)]
""",
        ),
    ],
    "11.5": [
        (
            "whole-logits",
            """
def loss_in_chunks(hidden, table, targets, loss_mask, chunk_size):
    nats = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, targets)
    return (loss_mask * nats).sum() / loss_mask.sum()
""",
        ),
        (
            "mean-of-means",
            """
def loss_in_chunks(hidden, table, targets, loss_mask, chunk_size):
    means = []
    for at in range(0, len(targets), chunk_size):
        s = slice(at, at + chunk_size)
        nats = optax.softmax_cross_entropy_with_integer_labels(hidden[s] @ table.T, targets[s])
        means.append((loss_mask[s] * nats).sum() / loss_mask[s].sum())
    return jnp.mean(jnp.array(means))
""",
        ),
        (
            "last-chunk-half-lost",
            """
def loss_in_chunks(hidden, table, targets, loss_mask, chunk_size):
    total = 0.0
    for at in range(0, len(targets) - chunk_size + 1, chunk_size):
        s = slice(at, at + chunk_size)
        nats = optax.softmax_cross_entropy_with_integer_labels(hidden[s] @ table.T, targets[s])
        total += (loss_mask[s] * nats).sum()
    return total / loss_mask.sum()
""",
        ),
        (
            "mask-forgotten",
            """
def loss_in_chunks(hidden, table, targets, loss_mask, chunk_size):
    total = 0.0
    for at in range(0, len(targets), chunk_size):
        s = slice(at, at + chunk_size)
        total += optax.softmax_cross_entropy_with_integer_labels(hidden[s] @ table.T, targets[s]).sum()
    return total / len(targets)
""",
        ),
        (
            "divided-by-all-positions",
            """
def loss_in_chunks(hidden, table, targets, loss_mask, chunk_size):
    total = 0.0
    for at in range(0, len(targets), chunk_size):
        s = slice(at, at + chunk_size)
        total += (loss_mask[s] * optax.softmax_cross_entropy_with_integer_labels(hidden[s] @ table.T, targets[s])).sum()
    return total / len(targets)
""",
        ),
    ],
    "11.6": [
        (
            "nothing-assumed",
            """
def worst_case(base, adapter, cut):
    return newcombe(base, adapter)[0]
""",
        ),
        (
            "wrong-way-round",
            """
def worst_case(base, adapter, cut):
    return newcombe(adapter, base | cut)[0]
""",
        ),
        (
            "upper-end",
            """
def worst_case(base, adapter, cut):
    return newcombe(base | cut, adapter)[1]
""",
        ),
        (
            "no-interval",
            """
def worst_case(base, adapter, cut):
    return float(adapter.mean() - (base | cut).mean())
""",
        ),
        (
            "cut-counts-as-wrong",
            """
def worst_case(base, adapter, cut):
    return newcombe(base & ~cut, adapter)[0]
""",
        ),
        (
            "both-favoured",
            """
def worst_case(base, adapter, cut):
    return newcombe(base | cut, adapter | cut)[0]
""",
        ),
    ],
}
