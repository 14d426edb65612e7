"""The course's package, a house of rooms: what the chapters build, and then import.

Ground floor, in reading order: `minigpt`, `train`, `checkpoints` (Part I); `lora` (II); `transformer`
with `rope`, `attention`, `kv_cache` and `stacked`, `generate` (III); `losses`, `sharding` (IV).

    kernels/     one platform's kernels and layouts, behind `attention` and one `linear`
    hf/          other people's formats: the hub, configurations, weights, GGUF, PEFT, chat templates
    data/        text and its tokens: stories, packing, tokenizers, problems, examples to fine-tune on
    evaluation/  bits per character, exact match, intervals
    commands/    `python -m utils --help`: generate, finetune, evaluate, plan
    course/      what the course alone needs: profiles, plots, checks, built-in texts, a mirror, Colab

A room may use the ground floor and the rooms named before it. Only pages and tests use the last two.

`utils` is a common name. By `COURSE` a notebook's first cell knows that it imported this package and not
another one of the same name.
"""

COURSE = "lora-in-jax"
__version__ = "0.1.0"


class CourseError(ValueError):
    """Bad input. The message is one line: what was expected, what was found, what to do."""


def unexpected(where: object, expected: object, found: object, fix: str = "") -> CourseError:
    """The error for most bad input: "batch_size: expected at least 1, found 0: choose a larger one"."""
    return CourseError(f"{where}: expected {expected}, found {found}" + f": {fix}" * bool(fix))


def first_line(error: Exception) -> str:
    """The first line of another library's message, to put into one of ours; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
