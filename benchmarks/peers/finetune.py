"""Updates of a training loop with torch and PEFT, batches padded: benchmarks/finetune.py's peer."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import process
import torch
import transformers


def prepare(
    path, examples: str, batch_size: int, rank: int, alpha: float, eos_token_id: int
) -> tuple[list, dict]:
    """`examples` is a JSON file of [token ids, how many of them are the prompt]."""
    examples = json.loads(Path(examples).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0)
    rng = np.random.default_rng(0)

    def step() -> int:
        """One update; returns how many tokens of examples it saw."""
        chosen = [examples[i] for i in rng.integers(0, len(examples), batch_size)]
        longest = max(len(ids) for ids, _ in chosen)
        input_ids = np.full((batch_size, longest), eos_token_id)
        labels, mask = (
            np.full((batch_size, longest), -100),
            np.zeros((batch_size, longest), np.int64),
        )
        for row, (ids, prompt) in enumerate(chosen):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
            labels[row, prompt : len(ids)] = ids[prompt:]
        input_ids, mask, labels = map(torch.as_tensor, (input_ids, mask, labels))
        model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(ids) - 1 for ids, _ in chosen)

    return [step], {"versions": process.versions("torch", "transformers", "peft")}


process.serve(lambda: prepare(**json.loads(sys.argv[1])))
