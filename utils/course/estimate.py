"""The memory of a LoRA step by formula, without a compiler: what chapter 13 derives term by term.

`python -m utils plan` asks the TPU's compiler, and is exact; this says where the bytes come from.
"""

from utils import CourseError, sharding
from utils.transformer import Config


def bytes_per_chip(
    config: Config, *, batch_size: int, seq_len: int, rank: int = 16, fsdp: int = 1, tp: int = 1,
    gradient_checkpointing: bool = True, loss_chunk_size: int = 1024, chip: str = "",
) -> dict[str, int]:  # fmt: skip
    """Bytes on each chip during `finetune`'s step on a bfloat16 base, by purpose, without a compiler.

    "weights", "adapter" (Adam's two moments with it), "saved" (what the layers keep for the backward
    pass), and the larger of two moments in time: "head" and "logits" (the loss: the output layer,
    all-gathered, and a chunk's logits), or "gathered" and "layer" (one layer in the backward pass: its
    weights, all-gathered, and its arrays). Their sum is the peak: within 15% of the compiler's on every
    plan of benchmarks/results/plans.jsonl. Chapter 13 derives each term. `chip` is a slice's name: a
    v6e's compiler fuses more. Raises `CourseError` for sizes that do not divide.
    """
    c = config
    sharding.check(c, fsdp=fsdp, tp=tp)
    if batch_size % fsdp:
        what = f"{batch_size} rows do not divide over fsdp={fsdp}: choose a multiple of {fsdp}"
        raise CourseError(f"batch_size: {what}")
    D, F, L, V = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    q, kv = heads * c.head_dim, kv_heads * c.head_dim
    kv_tp = 1 if kv_heads % tp else tp  # heads that do not divide are replicated
    # outputs, inputs, and into how many parts tp cuts the outputs (column) or the inputs (row)
    column = [(q, D, tp), (kv, D, kv_tp), (kv, D, kv_tp), (F, D, tp), (F, D, tp)]
    row = [(D, q, tp), (D, F, tp)]
    matrices = sum(o * i // (n * fsdp) for o, i, n in column + row)
    biases = c.attention_bias * (q // tp + 2 * kv // kv_tp) + c.o_proj_bias * D // fsdp
    biases += c.mlp_bias * (2 * F // tp + D // fsdp)
    table = V * D // tp  # embedding or output layer, all-gathered
    tables = (2 - c.tie_word_embeddings) * table // fsdp
    parameters = L * (matrices + biases + 2 * D) + D + tables
    adapter = L * rank * sum(o // n + i // fsdp for o, i, n in column)
    adapter += L * rank * sum(o // fsdp + i // n for o, i, n in row)

    rows = batch_size // fsdp
    tokens = rows * seq_len
    scores, mlp = rows * (heads // tp) * seq_len * seq_len, tokens * F // tp
    in_chunk = rows * max(1, min(loss_chunk_size, batch_size * seq_len) // batch_size)
    block = 2 * matrices * fsdp if fsdp > 1 else 0  # a layer's weights, all-gathered, in bfloat16
    kept = 2 * tokens * D  # a layer's input; or all that its backward pass needs, weights included
    if not gradient_checkpointing:
        kept = 6 * scores + 12 * mlp + 14 * tokens * D
        kept += 2 * tokens * (q // tp + 2 * kv // kv_tp) + block
    head = 2 * table if fsdp > 1 else 0
    # In the backward pass a softmax has its value and its gradient, each in float32 and in bfloat16.
    loss = max(head, 12 * in_chunk * V // tp) + 2 * adapter
    # With one row or one key/value head on a chip, and on a v6e, attention's softmax is fused with the
    # products around it, and has no array in float32.
    fused = rows == 1 or kv_heads <= tp or chip.startswith("v6e")
    layer = (4 if fused else 8) * scores + 7 * 2 * mlp + 16 * 2 * tokens * D + 6 * adapter
    moments = {"head": head, "logits": loss}, {"gathered": block, "layer": layer}
    always = {"weights": 2 * parameters, "adapter": 12 * adapter, "saved": L * kept}
    return always | max(moments, key=lambda moment: sum(moment.values()))
