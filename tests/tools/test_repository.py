"""The repository as it is: everything `make check` looks at, and the files that other services read."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.helpers.folders import ROOT
from tools import check, pairs

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("function", check.CHECKS, ids=lambda f: f.__name__)
def test_make_check_finds_nothing(function):
    if function is check.ruff and os.environ.get("COURSE_UNPINNED"):
        pytest.skip("another ruff may have another taste")
    assert list(function(ROOT)) == []


def makefile_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_is_valid_and_calls_what_exists(path):
    flow = yaml.safe_load(path.read_text())
    assert flow["name"] and flow["jobs"]
    assert set(flow) <= {
        "name",
        True,
        "permissions",
        "concurrency",
        "env",
        "jobs",
        "defaults",
    }  # YAML reads `on` as True
    for job in flow["jobs"].values():
        minutes = job["timeout-minutes"]
        if isinstance(minutes, str):  # each of the lanes has its own
            assert minutes == "${{ matrix.minutes }}"
            minutes = max(lane["minutes"] for lane in job["strategy"]["matrix"]["include"])
        assert job["runs-on"] and minutes <= 90
        for lane in job.get("strategy", {}).get("matrix", {}).get("include", []):
            assert set(lane.get("make", "").split()) <= makefile_targets(), (
                f"{path.name}: make {lane['make']}"
            )
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                assert target in makefile_targets(), f"{path.name}: make {target}"
            for file in re.findall(r"\bpython3? (tools/\S+\.py)|(\.ci/\S+)", step.get("run", "")):
                assert (ROOT / (file[0] or file[1])).exists(), f"{path.name}: {file}"


def test_the_workflows_are_there_and_the_site_waits_for_the_tests():
    assert {p.stem for p in WORKFLOWS} == {"tests", "nightly", "pages", "colab", "links"}
    pages = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
    assert set(pages[True]) == {"workflow_run", "workflow_dispatch"} and pages[True][
        "workflow_run"
    ]["workflows"] == ["tests"]


def test_the_citation_names_this_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    settings = pairs.settings()
    assert citation["repository-code"] == settings.repository
    if re.match(r"v\d", settings.revision):  # an edition or a fork may follow a branch
        assert f"v{citation['version']}" == settings.revision
    assert citation["cff-version"] and citation["title"] and citation["authors"]


def test_the_readme_gives_the_two_commands_and_the_map():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```bash\n(.*?)```", readme, re.S)[1]
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "make book",
        "make test",
    ]
    for stem in pairs.chapters(ROOT):
        assert f"chapters/{stem.name}.ipynb" in readme, f"README's map does not link {stem.name}"


def test_make_help_lists_every_target():
    told = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = set(re.findall(r"^make ([a-z-]+)", told, re.M))
    assert listed == makefile_targets()


CI_TARGETS = (
    "install install-peers install-tpu test-units test-chapters test-peers test-tpu test-browser"
)


@pytest.mark.parametrize(
    "tpu, status, last",
    [
        ("true", 0, "ci: everything passed"),
        ("exit 3", 1, "ci: FAILED: the stage tpu failed with status 2"),
        ("sleep 60", 1, "ci: FAILED: the stage tpu took longer than 5 minutes and was stopped"),
    ],
)
def test_the_ci_script_stops_at_a_stage_that_fails_or_hangs(tmp_path, tpu, status, last):
    """On a folder whose targets do nothing, with minutes of one second."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    rules = [
        f"{name}:\n\t@{tpu if name == 'test-tpu' else 'true'}\n" for name in CI_TARGETS.split()
    ]
    (tmp_path / "Makefile").write_text("".join(rules))
    env = os.environ | {"CI_MINUTE": "1", "CHROMIUM": "/bin/true"}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1]) == (status, last)
    assert [line.split()[0] for line in lines[lines.index("=== seconds") + 1 : -2]][-1] == (
        "site" if not status else "tpu"
    )
    assert set(CI_TARGETS.split()) <= makefile_targets()
