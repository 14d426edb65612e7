"""The repository as it is: everything `make check` looks at, and the files that other services read."""

import os
import re
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
        assert job["runs-on"] and job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                assert target in makefile_targets(), f"{path.name}: make {target}"
            for file in re.findall(r"\bpython3? (tools/\S+\.py)|(\.ci/\S+)", step.get("run", "")):
                assert (ROOT / (file[0] or file[1])).exists(), f"{path.name}: {file}"


def test_there_are_the_four_workflows():
    assert {p.stem for p in WORKFLOWS} == {"tests", "pages", "colab", "links"}


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
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == ["make book", "make test"]
    for stem in pairs.chapters(ROOT):
        assert f"chapters/{stem.name}.ipynb" in readme, f"README's map does not link {stem.name}"


def test_make_help_lists_every_target():
    told = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^make ([a-z-]+)", told, re.M))
    assert listed == makefile_targets()


def test_the_ci_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
