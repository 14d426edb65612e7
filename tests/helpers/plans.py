"""The recorded plans of the TPU's compiler, as tests ask about them."""

import importlib.util
import json
from pathlib import Path

from utils import transformer

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "plans.jsonl").read_text("utf8").splitlines()]


def config(row: dict) -> transformer.Config:
    return transformer.Config(**row["config"] | {"eos_token_id": tuple(row["config"]["eos_token_id"])})


def asked(row: dict) -> dict:
    """What `plan.estimate` is asked for a row."""
    s = row["setting"]
    return {name: s[name] for name in ("batch", "seq", "rank", "gradient_checkpointing", "tp")} | {
        "fsdp": row["fsdp"],
        "chip": s["topology"],
    }


def recording():
    """The script that made the record, as a module."""
    spec = importlib.util.spec_from_file_location("plans", ROOT / "benchmarks" / "plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
