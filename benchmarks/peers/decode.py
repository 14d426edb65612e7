"""`transformers.generate`, greedily, as many tokens for every row: benchmarks/decode.py's peer."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import process
import torch
import transformers

transformers.logging.set_verbosity_error()


def prepare(path: str, dtype: str, rows: list[list[int]], max_new_tokens: int) -> tuple[list, dict]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype)
    ).eval()
    tok = transformers.AutoTokenizer.from_pretrained(path)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def run(count: int):
        options = {
            "max_new_tokens": count,
            "min_new_tokens": count,
            "do_sample": False,
            "pad_token_id": 0,
        }

        def generate() -> list[str]:
            return tok.batch_decode(
                model.generate(ids, attention_mask=mask, **options)[:, longest:]
            )

        return generate

    return [run(1), run(1 + max_new_tokens)], {
        "versions": process.versions("torch", "transformers")
    }


process.serve(lambda: prepare(**json.loads(sys.argv[1])))
