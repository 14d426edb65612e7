"""These tests run the TPU's compiler, which only .venv-tpu has: they are looked at only there."""

import importlib.util


def pytest_ignore_collect(collection_path, config):
    return True if importlib.util.find_spec("libtpu") is None else None
