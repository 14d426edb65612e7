"""What torch, transformers and peft compute: runs in .venv-peers and answers requests.

Every line of standard input is a request in JSON, {"function", "arguments", "inputs", "outputs"}:
which function of this file is called, its JSON arguments, an .npz with the arguments that are
arrays, and where an .npz with the results that are arrays goes. Every answer is a line of JSON,
{"result"} or {"error"}; a result's arrays are {"array": name in the .npz}. The process ends when
its standard input is closed. Paths are absolute. It imports nothing of the course.
"""

import functools
import json
import os
import sys
import traceback

import numpy as np
import peft
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@functools.lru_cache(maxsize=2)  # what the last tests used: SmolLM2 in float32 takes 0.5 GB
def load(folder, dtype="float32", gguf_file=None):
    """A checkpoint; `dtype` "auto" keeps the stored one."""
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, gguf_file=gguf_file
    ).eval()


def with_adapter(folder, adapter):
    """The checkpoint with an adapter: a fresh copy, since peft changes the model it is given."""
    return peft.PeftModel.from_pretrained(load.__wrapped__(folder), adapter).eval()


def forward(model, tokens, **options):
    with torch.no_grad():
        return model(torch.as_tensor(tokens).long(), **options)


# ------------------------------------------------------------------------------------------- models


def logits(folder, tokens, adapter=None, **options):
    """[B, T, V] in float32 of tokens [B, T]."""
    model = with_adapter(folder, adapter) if adapter else load(folder, **options)
    return forward(model, tokens).logits.float().numpy()


def hidden_states(folder, tokens):
    """[L+1, B, T, D]: the embedding, then each block's output, the last after the final norm."""
    return torch.stack(
        forward(load(folder), tokens, output_hidden_states=True).hidden_states
    ).numpy()


def greedy(folder, tokens, max_new_tokens):
    """The ids that `generate` appends to the one row of tokens [1, T], greedily."""
    ids = torch.as_tensor(tokens).long()
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    return (
        load(folder)
        .generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        .tolist()
    )


def checkpoint(folder, dtype="auto", gguf_file=None):
    """How transformers reads a checkpoint: settings, and the dtype and bytes of every tensor."""
    model = load(folder, dtype, gguf_file)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return {
        "dtype": str(model.config.dtype),
        "eos_token_id": model.generation_config.eos_token_id,
        "dtypes": {name: str(tensor.dtype) for name, tensor in state.items()},
        "bytes": {name: tensor.view(torch.uint8).numpy() for name, tensor in state.items()},
    }


# ----------------------------------------------------------------------------------------- adapters


def make_adapter(folder, output, tokens, options):
    """Save an adapter of `LoraConfig(**options)` with a random B; returns its logits of tokens."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(load.__wrapped__(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(output)
    return forward(model, tokens).logits.float().numpy()


# --------------------------------------------------------------------------------------- tokenizers


@functools.lru_cache
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def special_tokens(folder):
    tok = tokenizer(folder)
    return {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}


def encode(folder, texts):
    """Ids of each text."""
    return [tokenizer(folder)(text).input_ids for text in texts]


def decode(folder, rows, skip_special_tokens=True):
    """The text of each row of ids, unchanged by transformers' rules of English punctuation."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return [tokenizer(folder).decode(row, **options) for row in rows]


def chat(folder, messages, add_generation_prompt):
    """{"text", "ids"} of a conversation by the model's own template."""
    options = {"add_generation_prompt": add_generation_prompt}
    ids = tokenizer(folder).apply_chat_template(messages, tokenize=True, **options)
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids  # a BatchEncoding since transformers 5
    return {
        "text": tokenizer(folder).apply_chat_template(messages, tokenize=False, **options),
        "ids": list(ids),
    }


# ----------------------------------------------------------------------------------------- requests

FUNCTIONS = (
    logits,
    hidden_states,
    greedy,
    checkpoint,
    make_adapter,
    special_tokens,
    encode,
    decode,
    chat,
)


def without_arrays(value, arrays: dict):
    """The value for JSON: arrays move to `arrays`, their names stand where they were."""
    if isinstance(value, np.ndarray):
        arrays[name := f"array_{len(arrays)}"] = value
        return {"array": name}
    if isinstance(value, dict):
        return {key: without_arrays(item, arrays) for key, item in value.items()}
    return value


def answer(request: dict) -> dict:
    function = {function.__name__: function for function in FUNCTIONS}[request["function"]]
    with np.load(request["inputs"]) as inputs:
        arrays: dict = {}
        result = without_arrays(function(**request["arguments"], **inputs), arrays)
    np.savez(request["outputs"], **arrays)
    return {"result": result}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    print(json.dumps({"result": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
