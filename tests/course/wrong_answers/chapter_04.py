"""Wrong answers to the exercises of chapter 4, each with the name under which its check must recognise it."""

WRONG = {
    "4.1": [
        (
            "nats-not-bits",
            """
def bits_per_character(nats_per_token, tokens, characters):
    return nats_per_token * tokens / characters
""",
        ),
        (
            "per-token",
            """
def bits_per_character(nats_per_token, tokens, characters):
    return nats_per_token / np.log(2)
""",
        ),
        (
            "multiplied-by-ln-2",
            """
def bits_per_character(nats_per_token, tokens, characters):
    return nats_per_token * tokens * np.log(2) / characters
""",
        ),
        (
            "ratio-upside-down",
            """
def bits_per_character(nats_per_token, tokens, characters):
    return nats_per_token / np.log(2) * characters / tokens
""",
        ),
    ],
    "4.2": [
        (
            "cosine-from-step-zero",
            """
def learning_rate(step, peak, warmup_steps, steps, end=0.05):
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (end + (1 - end) * (1 + np.cos(np.pi * step / steps)) / 2)
""",
        ),
        (
            "falls-to-zero",
            """
def learning_rate(step, peak, warmup_steps, steps, end=0.05):
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (1 + np.cos(np.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2
""",
        ),
        (
            "rises-again",
            """
def learning_rate(step, peak, warmup_steps, steps, end=0.05):
    if step < warmup_steps:
        return peak * step / warmup_steps
    x = (step - warmup_steps) / (steps - warmup_steps)
    return peak * (end + (1 - end) * (1 + np.cos(2 * np.pi * x)) / 2)
""",
        ),
        (
            "no-warmup",
            """
def learning_rate(step, peak, warmup_steps, steps, end=0.05):
    x = max(0, step - warmup_steps) / (steps - warmup_steps)
    return peak * (end + (1 - end) * (1 + np.cos(np.pi * x)) / 2)
""",
        ),
        (
            "end-added-too-late",
            """
def learning_rate(step, peak, warmup_steps, steps, end=0.05):
    if step < warmup_steps:
        return peak * step / warmup_steps
    x = (step - warmup_steps) / (steps - warmup_steps)
    return max(peak * end, peak * (1 + np.cos(np.pi * x)) / 2)
""",
        ),
    ],
    "4.3": [
        (
            "each-array-alone",
            """
def clip_gradients(grads, max_grad_norm):
    return {name: g * min(1.0, max_grad_norm / np.sqrt((g**2).sum())) for name, g in grads.items()}
""",
        ),
        (
            "small-ones-blown-up",
            """
def clip_gradients(grads, max_grad_norm):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {name: g * max_grad_norm / norm for name, g in grads.items()}
""",
        ),
        (
            "norms-added",
            """
def clip_gradients(grads, max_grad_norm):
    norm = sum(np.linalg.norm(g) for g in grads.values())
    return {name: g * min(1.0, max_grad_norm / norm) for name, g in grads.items()}
""",
        ),
        (
            "square-root-forgotten",
            """
def clip_gradients(grads, max_grad_norm):
    norm = sum((g**2).sum() for g in grads.values())
    return {name: g * min(1.0, max_grad_norm / norm) for name, g in grads.items()}
""",
        ),
    ],
    "4.4": [
        (
            "drops-the-one-that-crosses",
            """
def nucleus(p, top_p):
    order = np.argsort(-p)
    keep = order[np.cumsum(p[order]) <= top_p]
    out = np.zeros_like(p)
    out[keep] = p[keep]
    return out / out.sum()
""",
        ),
        (
            "not-summing-to-one",
            """
def nucleus(p, top_p):
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    out = np.zeros_like(p)
    keep = order[before < top_p]
    out[keep] = p[keep]
    return out
""",
        ),
        (
            "order-of-tokens-lost",
            """
def nucleus(p, top_p):
    p = np.sort(p)[::-1]
    out = np.where(np.cumsum(p) - p < top_p, p, 0)
    return out / out.sum()
""",
        ),
        (
            "not-sorted",
            """
def nucleus(p, top_p):
    out = np.where(np.cumsum(p) - p < top_p, p, 0)
    return out / out.sum()
""",
        ),
    ],
}
