"""What the marks in pyproject.toml promise, tried on a file of small tests."""

import re
import subprocess
import sys

from tests.helpers.folders import ROOT

TESTS = """
import time, pytest

def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass

def test_quick(): pass
def test_busy(): busy(0.8)
def test_waits_a_little(): time.sleep(0.6)
def test_waits_long(): time.sleep(1.7)

@pytest.fixture
def costly(): busy(0.8)
def test_setup_counts(costly): pass

@pytest.mark.slow
def test_says_so(): busy(0.8)

@pytest.mark.chapter(3)
def test_three(): busy(0.8)  # a test that runs a page is slow by itself
@pytest.mark.chapter(12)
def test_twelve(): pass

@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_kills(kills): pass
"""


def outcomes(folder, *flags):
    """Test -> how it ended, of the tests above with these flags."""
    (folder / "test_small.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.conftest", "-c", "pyproject.toml"]
    command += ["-o", "slow_after=0.5", "-o", f"cache_dir={folder}/cache", *flags, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = re.findall(r"::test_(\S+) (PASSED|FAILED)", done.stdout)
    assert lines, done.stdout + done.stderr
    return dict(lines)


def test_marks(tmp_path):
    failed = {"busy", "waits_long", "setup_counts"}
    passed = {"quick", "waits_a_little", "says_so", "three", "twelve", "kills[2]"}
    expected = dict.fromkeys(failed, "FAILED") | dict.fromkeys(passed, "PASSED")
    assert outcomes(tmp_path) == expected


def test_the_long_proofs_are_asked_for(tmp_path):
    assert outcomes(tmp_path, "-m", "long") == {"kills[10]": "PASSED"}


def test_a_chapter_can_be_chosen(tmp_path):
    assert outcomes(tmp_path, "-m", "chapter", "--chapter", "03 07") == {"three": "PASSED"}
