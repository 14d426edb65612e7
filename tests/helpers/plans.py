"""The recorded plans of the TPU's compiler, as tests need them."""

import importlib.util
import json

from tests.helpers.folders import ROOT
from tools import fingerprint
from utils import transformer

RESULTS = ROOT / "benchmarks" / "results" / "plans.jsonl"
ROWS = [json.loads(line) for line in RESULTS.read_text("utf8").splitlines()]


def config(row: dict) -> transformer.Config:
    fields = row["config"] | {"eos_token_id": tuple(row["config"]["eos_token_id"])}
    return transformer.Config(**fields)


def is_current(row: dict) -> bool:
    """Whether the code and the configuration of a recorded plan are still those of this package."""
    return row.get("fingerprint") == fingerprint.of(config(row), **row["setting"])


def sizes(row: dict) -> dict:
    """The arguments of `estimate.bytes_per_chip` for a row."""
    names = ("batch_size", "seq_len", "rank", "gradient_checkpointing", "tp")
    setting = row["setting"]
    return {n: setting[n] for n in names} | {"fsdp": row["fsdp"], "chip": setting["topology"]}


def recording():
    """The script that made the record, as a module."""
    spec = importlib.util.spec_from_file_location("plans", ROOT / "benchmarks" / "plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
