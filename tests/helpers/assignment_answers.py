"""Wrong answers to the graded assignments, each with the points that it must cost, test cell by test cell.

`WRONG[assignment][grade_id of the solution cell]` is a list of (what is wrong, the code, {test cell: points lost}).
In place of the code there may be a pair (old, new): an edit of the right answer. The other parts of a submission are
right. A mistake that costs nothing would be a hole in the tests.
"""

WRONG = {
    "assignment_1": {
        "best_pair": [
            (
                "counts words, not occurrences",
                """
def best_pair(words):
    counts = {}
    for word in words:
        for pair in zip(word, word[1:]):
            counts[pair] = counts.get(pair, 0) + 1
    return max(sorted(counts.items()), key=lambda item: item[1])
""",
                {"best_pair_weighted": 1, "best_pair_repeated": 1, "best_pair_ties": 1},
            ),
            (
                "a pair that stands twice in a word counts once",
                """
def best_pair(words):
    counts = {}
    for word, times in words.items():
        for pair in set(zip(word, word[1:])):
            counts[pair] = counts.get(pair, 0) + times
    return max(sorted(counts.items()), key=lambda item: item[1])
""",
                {"best_pair_repeated": 1},
            ),
            (
                "ties go to the pair seen first",
                """
def best_pair(words):
    counts = {}
    for word, times in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] = counts.get(pair, 0) + times
    return max(counts.items(), key=lambda item: item[1])
""",
                {"best_pair_ties": 1},
            ),
        ],
        "masked_loss": [
            (
                "divides by all positions",
                """
def masked_loss(logits, targets, loss_mask):
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * loss_mask).mean()
""",
                {"masked_loss_uneven": 1},
            ),
            (
                "a mean of the rows' means",
                """
def masked_loss(logits, targets, loss_mask):
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * loss_mask
    return (nats.sum(1) / loss_mask.sum(1)).mean()
""",
                {"masked_loss_uneven": 1},
            ),
            (
                "chooses by a boolean index, which does not compile, and the logarithm of a softmax",
                """
def masked_loss(logits, targets, loss_mask):
    p = jax.nn.softmax(logits)
    nats = -jnp.log(jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0])
    return nats[loss_mask].mean()
""",
                {"masked_loss_jit": 1},
            ),
        ],
        "momentum": [
            (
                "moves with the old velocity",
                """
def momentum(params, velocity, grads, rate, beta):
    moved = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
    return moved, jax.tree.map(lambda v, g: beta * v + g, velocity, grads)
""",
                {"momentum_one": 1, "momentum_two": 1, "momentum_pure": 1},
            ),
            (
                "writes into the dictionaries, one level deep",
                """
def momentum(params, velocity, grads, rate, beta):
    for name in params:
        velocity[name] = beta * velocity[name] + grads[name]
        params[name] = params[name] - rate * velocity[name]
    return params, velocity
""",
                {"momentum_two": 1, "momentum_pure": 1},
            ),
        ],
        "attention": [
            (
                "no window",
                """
def window_attention(q, k, v, window):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
""",
                {"attention_window": 2},
            ),
            (
                "one position too many",
                """
def window_attention(q, k, v, window):
    T = q.shape[1]
    seen = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-window - 1, dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=seen)
""",
                {"attention_window": 2},
            ),
            (
                "not scaled",
                """
def window_attention(q, k, v, window):
    T = q.shape[1]
    seen = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-window, dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=1.0)
""",
                {"attention_full": 2, "attention_window": 2},
            ),
            (
                "masked after the softmax",
                """
def window_attention(q, k, v, window):
    T = q.shape[1]
    seen = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-window, dtype=bool)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0), v)
""",
                {"attention_full": 2, "attention_window": 2, "attention_average": 1},
            ),
        ],
        "bytes": [
            (
                "counts the output layer again",
                """
def training_bytes(config):
    counts = config.count_parameters()
    return 16 * (counts["total"] + config.vocab_size * config.hidden_size)
""",
                {"bytes_small": 1, "bytes_any": 2},
            ),
            (
                "one layer only",
                """
def training_bytes(config):
    c = config
    per_column = c.vocab_size + c.max_position_embeddings + 4 * c.hidden_size + 2 * c.intermediate_size + 3
    return 16 * per_column * c.hidden_size
""",
                {"bytes_any": 2},
            ),
        ],
        "make_step": [
            (
                "the optimiser's state is thrown away",
                """
def make_step(graph, tx):
    @jax.jit
    def step(params, opt_state, batch):
        def loss_of(p):
            logits = nnx.merge(graph, p)(batch["inputs"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, _ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss
    return step
""",
                {"make_step_state": 1},
            ),
            (
                "the updates are never applied",
                """
def make_step(graph, tx):
    @jax.jit
    def step(params, opt_state, batch):
        def loss_of(p):
            logits = nnx.merge(graph, p)(batch["inputs"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        optax.apply_updates(params, updates)
        return params, opt_state, loss
    return step
""",
                {"make_step_learns": 1},
            ),
        ],
    },
    "assignment_2": {
        "rank_for": [
            (
                "the share of the singular values, not of their squares",
                """
def rank_for(delta, share):
    S = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False)
    return int(np.argmax(np.cumsum(S) / S.sum() >= min(share, 0.99999))) + 1
""",
                {"rank_for_squared": 1, "rank_for_any": 1},
            ),
            (
                "one too few",
                """
def rank_for(delta, share):
    S = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(S) / S.sum() >= min(share, 0.99999)))
""",
                {"rank_for_thin": 1, "rank_for_squared": 1, "rank_for_any": 1},
            ),
            (
                "more than the share, not at least the share",
                """
def rank_for(delta, share):
    S = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(S) / S.sum(), share, side="right")) + 1
""",
                {"rank_for_any": 1},
            ),
        ],
        "adapted": [
            (
                "alpha without the rank",
                """
def adapted(x, kernels, A, B, alpha, ranks):
    return x @ kernels + alpha * (x @ A.swapaxes(1, 2)) @ B.swapaxes(1, 2)
""",
                {"adapted_value": 1, "adapted_rank": 1},
            ),
            (
                "the largest rank for every layer",
                """
def adapted(x, kernels, A, B, alpha, ranks):
    return x @ kernels + alpha / A.shape[1] * (x @ A.swapaxes(1, 2)) @ B.swapaxes(1, 2)
""",
                {"adapted_rank": 1},
            ),
            (
                "divides by a rank of zero",
                """
def adapted(x, kernels, A, B, alpha, ranks):
    scale = alpha / jnp.array(ranks, jnp.float32)[:, None, None]
    return x @ kernels + scale * ((x @ A.swapaxes(1, 2)) @ B.swapaxes(1, 2))
""",
                {"adapted_rank": 1},
            ),
        ],
        "combined": [
            (
                "A and B are added one by one",
                """
def combined(adapters, weights):
    A = sum(A for A, _, _ in adapters)
    return A, sum(w * alpha / A.shape[0] * B for (A, B, alpha), w in zip(adapters, weights))
""",
                {"combined_many": 1},
            ),
            (
                "the weight on both factors",
                """
def combined(adapters, weights):
    A = jnp.concatenate([w * A for (A, _, _), w in zip(adapters, weights)])
    return A, jnp.concatenate([w * a / A.shape[0] * B for (A, B, a), w in zip(adapters, weights)], axis=1)
""",
                {"combined_one": 1, "combined_many": 1},
            ),
        ],
        "gradients": [
            (
                "the scale is forgotten",
                """
def gradients(x, g, A, B, alpha):
    return (g @ B).T @ x, g.T @ (x @ A.T)
""",
                {"gradients_first": 1, "gradients_later": 2},
            ),
            (
                "only right while B is zero",
                """
def gradients(x, g, A, B, alpha):
    return jnp.zeros_like(A), alpha / A.shape[0] * g.T @ (x @ A.T)
""",
                {"gradients_later": 2},
            ),
        ],
        "swapped": [
            (
                "the old one stays in",
                """
def swapped(kernel, old, new):
    A, B, alpha = new
    return (kernel.astype(jnp.float32) + alpha / A.shape[0] * (B @ A).T).astype(kernel.dtype)
""",
                {"swapped_back": 1},
            ),
            (
                "added in the dtype of the kernel",
                """
def swapped(kernel, old, new):
    def delta(A, B, alpha):
        return (alpha / A.shape[0] * (B @ A).T).astype(kernel.dtype)
    return kernel - delta(*old) + delta(*new)
""",
                {"swapped_bf16": 1},
            ),
        ],
        "small": [
            (
                "half the smaller side, whatever the other is",
                """
def break_even(inside, outside):
    return min(inside, outside) // 2

def adapter_bytes(config, rank):
    return 4 * config.num_hidden_layers * rank * (5 * config.hidden_size + config.intermediate_size)
""",
                {"small_rank": 1},
            ),
            (
                "one layer",
                """
def break_even(inside, outside):
    return -(-inside * outside // (inside + outside))

def adapter_bytes(config, rank):
    return 4 * rank * (5 * config.hidden_size + config.intermediate_size)
""",
                {"small_bytes": 1},
            ),
        ],
        "adapt": [
            (
                "Python's `or` between two filters",
                """
def adapt(model, batch, steps):
    wrt = nnx.PathContains("lora_A") or nnx.PathContains("lora_B")
    graph, trainable, frozen = nnx.split(model, wrt, ...)
    tx = optax.adam(0.02)
    def loss_of(p):
        logits = nnx.merge(graph, p, frozen)(batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
    losses, state = [], tx.init(trainable)
    slope = jax.jit(jax.value_and_grad(loss_of))
    for _ in range(steps):
        loss, grads = slope(trainable)
        updates, state = tx.update(grads, state)
        trainable = optax.apply_updates(trainable, updates)
        losses.append(float(loss))
    nnx.update(model, trainable)
    return losses
""",
                {"adapt_learns": 1, "adapt_both": 2, "adapt_frozen": 1},
            ),
            (
                "the base learns too",
                """
def adapt(model, batch, steps):
    from utils import train
    class Same:
        def __next__(self):
            return batch
    history = train.fit(
        model, Same(), train.next_token_loss, optax.adam(0.02), steps=steps, log_every=1, progress=False)
    return history.loss
""",
                {"adapt_frozen": 1},
            ),
            (
                "only B learns",
                """
def adapt(model, batch, steps):
    from utils import train
    class Same:
        def __next__(self):
            return batch
    history = train.fit(
        model, Same(), train.next_token_loss, optax.adam(0.02), steps=steps, log_every=1, progress=False,
        wrt=nnx.PathContains("lora_B"))
    return history.loss
""",
                {"adapt_both": 2},
            ),
        ],
    },
    "assignment_3": {
        "header": [
            (
                "offsets from the start of the file",
                """
def header(path):
    content = Path(path).read_bytes()
    if len(content) < 8 or len(content) < 8 + struct.unpack("<Q", content[:8])[0]:
        raise CourseError("too short")
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__")
    if max(e["data_offsets"][1] for e in entries.values()) + 8 + length > len(content):
        raise CourseError("too short")
    return {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()}
""",
                {"header_bytes": 4},
            ),
            (
                "never asks how long the file is",
                """
def header(path):
    content = Path(path).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__")
    start = 8 + length
    return {n: (e["dtype"], tuple(e["shape"]), *(start + o for o in e["data_offsets"])) for n, e in entries.items()}
""",
                {"header_short": 4},
            ),
            (
                "the metadata is a tensor, too",
                """
def header(path):
    content = Path(path).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    start, layout = 8 + length, {}
    for name, e in json.loads(content[8:start]).items():
        first, last = (start + o for o in e.get("data_offsets", (0, 0)))
        layout[name] = e.get("dtype"), tuple(e.get("shape", ())), first, last
    return layout
""",
                {"header_names": 4, "header_bytes": 4, "header_short": 4},
            ),
        ],
        "config_of": [
            (
                "Llama: biases on none, and any activation",
                """
def config_of(their_config):
    N = their_config["n_heads"]
    return transformer.Config(
        "llama", their_config["vocab_size"], their_config["dim"], their_config["n_layers"], N,
        their_config.get("n_kv_heads", N),
        their_config.get("head_dim", their_config["dim"] // N), their_config["ffn_dim"], their_config["max_tokens"],
        their_config.get("rope_base", 10_000.0), their_config["norm_eps"], their_config.get("tied_head", False), False)
""",
                {"config_given": 4, "config_refused": 4},
            ),
            (
                "a head size that is always dim / n_heads",
                """
def config_of(their_config):
    if their_config.get("activation", "silu") != "silu":
        raise CourseError(f"activation {their_config['activation']}")
    N = their_config["n_heads"]
    return transformer.Config(
        "qwen2", their_config["vocab_size"], their_config["dim"], their_config["n_layers"], N,
        their_config.get("n_kv_heads", N),
        their_config["dim"] // N, their_config["ffn_dim"], their_config["max_tokens"],
        their_config.get("rope_base", 10_000.0), their_config["norm_eps"], their_config.get("tied_head", False), True)
""",
                {"config_absent": 4},
            ),
        ],
        "split_qkv": [
            (
                "all of q, then all of k, then all of v",
                """
def split_qkv(fused, config):
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return fused[:q], fused[q : q + k], fused[q + k :]
""",
                {"split_order": 8, "split_any": 8},
            ),
            (
                "a group for each query head's share of three",
                """
def split_qkv(fused, config):
    return tuple(p.reshape(-1, *fused.shape[1:]) for p in np.split(
        fused.reshape(config.num_key_value_heads, -1, config.head_dim, *fused.shape[1:]), [2, 3], axis=1))
""",
                {"split_any": 8},
            ),
        ],
        "to_halves": [
            (
                "the other way round",
                """
def to_halves(rows, head_dim):
    return np.swapaxes(rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]), 1, 2).reshape(rows.shape)
""",
                {"halves_order": 8, "halves_scores": 8},
            ),
            (
                "over all heads at once",
                """
def to_halves(rows, head_dim):
    return rows if head_dim == 2 else np.concatenate([rows[0::2], rows[1::2]])
""",
                {"halves_order": 8},
            ),
        ],
        "convert": [
            (
                "a norm's weight as it is stored",
                ('1 + take(f"{old}.norm_2', 'take(f"{old}.norm_2'),
                {"convert_logits": 8, "convert_any": 8},
            ),
            (
                "gate and up exchanged",
                (
                    '("w1", "mlp.gate_proj"), ("w3", "mlp.up_proj")',
                    '("w3", "mlp.gate_proj"), ("w1", "mlp.up_proj")',
                ),
                {"convert_logits": 8, "convert_any": 8},
            ),
            (
                "v is turned into halves, too",
                ('v_proj.{kind}"] = v', 'v_proj.{kind}"] = to_halves(v, config.head_dim)'),
                {"convert_logits": 8, "convert_any": 8},
            ),
            (
                "the bias is not reordered",
                (
                    "to_halves(q, config.head_dim)",
                    "to_halves(q, config.head_dim) if kind == 'weight' else q",
                ),
                {"convert_logits": 8, "convert_any": 8},
            ),
            (
                "a tensor that is left over is forgotten",
                ("if left:", "if False:"),
                {"convert_strict": 4},
            ),
            (
                "always tied",
                ("if not config.tie_word_embeddings:", "if False:"),
                {"convert_any": 8},
            ),
        ],
        "first_difference": [
            (
                "the mean over the state",
                """
def first_difference(their_states, our_states, tolerance):
    for i, (a, b) in enumerate(zip(their_states, our_states)):
        if not np.abs(a - b).mean() <= tolerance:
            return i
""",
                {"difference_where": 4},
            ),
            (
                "NaN is not larger than anything",
                """
def first_difference(their_states, our_states, tolerance):
    for i, (a, b) in enumerate(zip(their_states, our_states)):
        if np.any(np.abs(a - b) > tolerance):
            return i
""",
                {"difference_nan": 4},
            ),
            (
                "no absolute value",
                """
def first_difference(their_states, our_states, tolerance):
    for i, (a, b) in enumerate(zip(their_states, our_states)):
        if not np.max(b - a) <= tolerance:
            return i
""",
                {"difference_where": 4, "difference_nan": 4},
            ),
        ],
    },
    "assignment_4": {
        "conversation": [
            (
                "the mask of the inputs, not of the targets",
                ("np.array(loss_mask[1:], np.float32)", "np.array(loss_mask[:-1], np.float32)"),
                {"conversation_graded": 8},
            ),
            (
                "only the last answer",
                ('answer = message["role"] == "assistant"', "answer = message is messages[-1]"),
                {"conversation_graded": 8},
            ),
            (
                "the end is not in the mask",
                ("(len(content) + 1) + [False]", "len(content) + [False] * 2"),
                {"conversation_graded": 8},
            ),
            (
                "a cut conversation ends tidily",
                ("if not any(loss_mask):", "ids[-1] = END\n    if not any(loss_mask):"),
                {"conversation_tokens": 4, "conversation_window": 6},
            ),
            (
                "an empty mask is no error",
                ("if not any(loss_mask):", "if False:"),
                {"conversation_window": 6},
            ),
        ],
        "accumulate": [
            (
                "the mean of the parts' means",
                ('n = part["loss_mask"].sum()', "n = 1.0"),
                {"accumulate_weighted": 8},
            ),
            (
                "weighted by rows, counted or not",
                ('n = part["loss_mask"].sum()', 'n = len(part["loss_mask"])'),
                {"accumulate_weighted": 8},
            ),
            (
                "the loss is right, its gradients are a sum",
                ("lambda t: t / rows", "lambda t: t"),
                {"accumulate_equal": 4, "accumulate_weighted": 8},
            ),
            (
                "one large batch after all",
                """
def accumulate(loss_fn, params, parts):
    return jax.value_and_grad(loss_fn)(params, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
""",
                {"accumulate_apart": 6},
            ),
        ],
        "resident": [
            (
                "everything over the number of chips",
                """
def resident(config, fsdp, tp, rank, target_modules):
    c = config
    D, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sides = {"q_proj": D + q, "k_proj": D + kv, "v_proj": D + kv, "o_proj": D + q}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), D + c.intermediate_size)
    adapter = 12 * c.num_hidden_layers * rank * sum(n for name, n in sides.items() if name in target_modules)
    return 2 * c.count_parameters()["total"] // (fsdp * tp), adapter // (fsdp * tp)
""",
                {"resident_mesh": 8, "resident_adapter": 6},
            ),
            (
                "two key/value heads over four chips",
                ("tp if c.num_key_value_heads % tp == 0 else 1", "tp"),
                {"resident_mesh": 8, "resident_adapter": 6},
            ),
            (
                "an output layer although it is tied",
                ("(2 - c.tie_word_embeddings)", "2"),
                {"resident_one": 4},
            ),
            ("Adam is forgotten", ("3 * 4 * adapter", "4 * adapter"), {"resident_adapter": 6}),
            (
                "an adapter on every layer",
                (" if name in target_modules", ""),
                {"resident_adapter": 6},
            ),
        ],
        "setting": [
            (
                "the smallest tp first, whatever the parts",
                """
def setting(config, chips, memory, rows, seq_len):
    for tp in range(1, chips + 1):
        for parts in range(1, rows + 1):
            fsdp = chips // tp
            if chips % tp or rows % (parts * fsdp):
                continue
            try:
                sizes = dict(batch_size=rows // parts, seq_len=seq_len, fsdp=fsdp, tp=tp)
                peak = sum(estimate.bytes_per_chip(config, **sizes).values())
            except CourseError:
                continue
            if peak <= memory:
                return fsdp, tp, parts
""",
                {"setting_mesh": 6},
            ),
            (
                "only FSDP",
                ("for tp in range(1, chips + 1):", "for tp in (1,):"),
                {"setting_mesh": 6},
            ),
            (
                "all rows at a time",
                ("batch_size=rows // parts, seq_len", "batch_size=rows, seq_len"),
                {"setting_one": 4},
            ),
            (
                "a refused mesh ends the search",
                (
                    "            except CourseError:\n                continue\n",
                    "            except ZeroDivisionError:\n                continue\n",
                ),
                {"setting_none": 4},
            ),
        ],
        "message": [
            (
                "every cut inner dimension is summed",
                ("if inner == inside:", "if True:"),
                {"message_gather": 6},
            ),
            (
                "the message is all of W",
                ("4 * D * (F // size[columns])", "4 * D * F"),
                {"message_gather": 6},
            ),
            (
                "the sum of all of y",
                ("4 * (B // size[rows]) * (F // size[columns])", "4 * B * F"),
                {"message_sum": 6},
            ),
            (
                "an axis of size 1 cuts, too",
                ("if size[inside] == 1:", "if inside is None:"),
                {"message_none": 4},
            ),
        ],
        "judged": [
            (
                "two intervals that overlap show nothing",
                (
                    '"verdict": "better" if low > 0 else',
                    '"verdict": "better" if wilson(adapter.sum(), len(base))[0]'
                    " > wilson(base.sum(), len(base))[1] else",
                ),
                {"judged_verdict": 6},
            ),
            (
                "the larger share is better",
                ('"better" if low > 0', '"better" if adapter.mean() > base.mean()'),
                {"judged_verdict": 6},
            ),
            (
                "base less adapter",
                ("low, high = newcombe(base, adapter)", "low, high = newcombe(adapter, base)"),
                {"judged_numbers": 4, "judged_verdict": 6},
            ),
            (
                "the cut answers are left out",
                ("newcombe(base | cut, adapter)", "newcombe(base[~cut], adapter[~cut])"),
                {"judged_robust": 6},
            ),
            (
                "whatever lengths there are",
                ("if not len(base) == len(adapter) == len(cut) > 0:", "if False:"),
                {"judged_numbers": 4},
            ),
        ],
    },
}
