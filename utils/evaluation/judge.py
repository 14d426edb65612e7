"""The process that compares answers for `answers.py`: pairs as JSON lines in, true or false out.

It imports math-verify and nothing of this package, and may use 4 GB of memory.
"""

import json
import logging
import sys

try:
    import resource  # not on Windows
except ImportError:
    resource = None

from math_verify import parse, verify


def same(answer: str, reference: str) -> bool:
    """Whether math-verify takes the two for the same. What it cannot read, or compute, is not."""
    try:
        gold, target = (
            parse(rf"$\boxed{{{text}}}$", parsing_timeout=None) for text in (reference, answer)
        )
        return bool(verify(gold, target, timeout_seconds=None))
    except (Exception, RecursionError, MemoryError):
        return False


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # math-verify reports what it cannot read
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))  # huge numbers stay within
    except (AttributeError, OSError, ValueError):
        pass
    for line in sys.stdin:
        print(json.dumps(same(*json.loads(line))), flush=True)
