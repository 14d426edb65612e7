"""The originals, in float32 unless told otherwise."""

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(folder, dtype=torch.float32, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def logits(model, tokens) -> np.ndarray:
    """[B, T, V] of tokens [B, T]."""
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens)).long()).logits.float().numpy()


def hidden_states(model, tokens) -> np.ndarray:
    """[L+1, B, T, D]."""
    with torch.no_grad():
        out = model(torch.as_tensor(np.asarray(tokens)).long(), output_hidden_states=True)
    return torch.stack(out.hidden_states).numpy()
