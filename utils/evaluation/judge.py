"""The process that compares answers for `answers.py`: pairs as JSON lines in, true or false out.

It imports math-verify and nothing of this package, and may use 4 GB of memory.
"""

import contextlib
import json
import logging
import sys

from math_verify import parse, verify


def same(answer: str, reference: str) -> bool:
    """Whether math-verify takes the two for the same. What it cannot read, or compute, is not."""
    try:
        boxed = (rf"$\boxed{{{text}}}$" for text in (reference, answer))
        gold, target = (parse(text, parsing_timeout=None) for text in boxed)
        return bool(verify(gold, target, timeout_seconds=None))
    except Exception:
        return False


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # math-verify reports what it cannot read
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))  # huge numbers stay within
    for line in sys.stdin:
        print(json.dumps(same(*json.loads(line))), flush=True)
