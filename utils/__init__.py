"""The course's package: small modules with one job each, the same ones the chapters build and then import.

Read them in this order: `profile` (how large everything is on this machine), `hub` and `mirror` (where files come
from), `stories`, `reviews` and `data` (text), `tokenizer`, `minigpt`, `train`, `losses`, `evaluate`, `lora` and
`peft_format`; then real models: `transformer`, `weights`, `gguf`, `models`, `chat`, `sharding`, `hlo`,
`generate`, `problems`, `sft`, `checkpoints`, `finetune`, `plan`; `plot`.
`python -m utils --help` is the command line.

`utils` is a common name. `COURSE` is the mark by which a notebook's first cell knows that the package it imported is
this one and not another package of the same name.
"""

COURSE = "lora-in-jax"
__version__ = "0.1.0"


class CourseError(ValueError):
    """Bad input. The message is one line: what was expected, what was found, what to do."""
