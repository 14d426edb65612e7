"""A LoRA training step with torch and PEFT: benchmarks/lora_step.py's peer."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import process
import torch
import transformers


def prepare(
    path, dtype: str, rank: int, target_modules: list[str], inputs, targets
) -> tuple[list, dict]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs, targets = torch.tensor(inputs), torch.tensor(targets)

    def step() -> float:
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return [step], {"versions": process.versions("torch", "transformers", "peft")}


process.serve(lambda: prepare(**json.loads(sys.argv[1])))
