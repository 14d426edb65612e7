"""Fingerprints of recorded plans: when one differs, the record is of other code than today's.

`benchmarks/plans.py` writes them beside what the TPU's compiler said, and a test compares them.
"""

import ast
import dataclasses
import hashlib
import json
from pathlib import Path

from utils.transformer import Config

ROOT = Path(__file__).resolve().parents[1]

# Files of the code that decides the compiled step, and of some only these definitions.
SOURCES = dict.fromkeys(
    ("attention.py", "kernels/__init__.py", "kernels/precision.py", "kernels/tpu.py", "lora.py",
     "losses.py", "rope.py", "sharding.py", "stacked.py", "transformer.py"), (),
)  # fmt: skip
SOURCES |= {
    "train.py": ("make_step", "_accumulated", "optimizer"),
    "commands/finetune.py": ("loss_fn", "optimizer"),
    "commands/plan.py": ("_lowered",),
}


def of(config: Config, **settings) -> str:
    """sha256 of a configuration, settings, and the code that decides the compiled step.

    A recorded plan is old when its fingerprint is. Comments, docstrings, annotations and formatting do not count.
    """
    sha = hashlib.sha256()
    sha.update(json.dumps([dataclasses.asdict(config), settings], sort_keys=True).encode())
    for name, definitions in SOURCES.items():
        body = ast.parse((ROOT / "utils" / name).read_text("utf-8")).body
        if definitions:
            body = [node for node in body if getattr(node, "name", None) in definitions]
        sha.update(f"{name} {_code(body)}".encode())
    return sha.hexdigest()


def _code(node) -> str:
    """A syntax tree as text, without docstrings and annotations: `ast.dump`, but the same in every version of Python."""
    if isinstance(node, list):
        documents = (
            node and isinstance(node[0], ast.Expr) and isinstance(node[0].value, ast.Constant)
        )
        return f"[{', '.join(map(_code, node[1:] if documents else node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    idle = ("annotation", "returns") if isinstance(node, ast.arg | ast.FunctionDef) else ()
    fields = (
        (n, value)
        for n, value in ast.iter_fields(node)
        if value not in (None, []) and n not in idle
    )
    return f"{type(node).__name__}({', '.join(f'{n}={_code(value)}' for n, value in fields)})"
