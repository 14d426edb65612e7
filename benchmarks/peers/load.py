"""Load a checkpoint with transformers once and print seconds and memory: benchmarks/load.py's
peer."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import process
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
Model = (
    transformers.AutoModelForCausalLM
)  # the lazy import happens here and not while it is measured


def main(folder: str, dtype: str | None) -> None:
    def load():
        model = Model.from_pretrained(folder, dtype=getattr(torch, dtype) if dtype else "auto")
        # from_pretrained may leave weights as views of the file: look at every page of them
        for parameter in model.parameters():
            parameter.detach().view(torch.uint8).view(-1)[::4096].sum()
        return model

    process.measure_load(load)


main(**json.loads(sys.argv[1]))
