"""Real data and models in tests: used wherever they are to be had."""

import os
from pathlib import Path

import pytest

from utils.hf import hub


def or_skip(get, kind: str, repo: str):
    """What `get()` returns. Skipped only where neither a mirror nor the hub has `repo`, with the
    reason that was given.

    A mirror's folder is looked into here, past the code under test: what it holds must be found, or
    the test fails.
    """
    try:
        return get()
    except hub.NotAvailable as reason:
        root = os.environ.get("COURSE_MIRROR")
        if root and (Path(root) / kind / repo).is_dir():
            raise
        pytest.skip(str(reason))
