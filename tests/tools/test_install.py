"""`make install`: an environment made once, and again when the requirements change."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.folders import ROOT, wheel
from tools import install

needs_uv = pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")


@pytest.fixture
def folder(tmp_path):
    """Requirement files that need no network."""
    for version in ("1.0", "2.0"):
        wheel(tmp_path / "wheels", "helper", version)
    wheel(tmp_path / "wheels", "other", "1.0")
    (tmp_path / "requirements.txt").write_text("-r more.txt\nhelper\n")
    (tmp_path / "more.txt").write_text("other\n")
    (tmp_path / "constraints.txt").write_text("helper==1.0\n")
    return tmp_path


def run(folder, *flags, uv=True, python=sys.executable):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "PYTHONPATH"))}
    wheels = str(folder / "wheels")
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "PIP_CONFIG_FILE": os.devnull}
    env["UV_CACHE_DIR"] = str(folder / "uv-cache")
    env |= {"UV_NO_CONFIG": "1", "UV_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_FIND_LINKS": wheels}
    if not uv:
        env["PATH"] = os.defpath
    command = [python, str(ROOT / "tools" / "install.py"), "--venv", str(folder / "venv")]
    command += ["--requirements", str(folder / "requirements.txt")]
    command += ["--constraints", str(folder / "constraints.txt"), *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def helper(folder):
    python = folder / "venv" / "bin" / "python"
    code = "import helper, other; print(helper.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("uv", [pytest.param(True, marks=needs_uv), False], ids=["uv", "pip"])
def test_install_once_and_again_when_something_changed(folder, uv):
    done = run(folder, uv=uv)
    assert done.returncode == 0, done.stderr
    assert helper(folder) == "1.0"  # the constraint held
    again = run(folder, uv=uv)
    assert again.returncode == 0 and again.stdout == ""
    (folder / "constraints.txt").write_text("helper==2.0\n")
    assert run(folder, uv=uv).returncode == 0
    assert helper(folder) == "2.0"


@needs_uv
def test_an_environment_made_by_uv_is_used_without_uv(folder):
    assert run(folder).returncode == 0
    (folder / "constraints.txt").write_text("helper==2.0\n")
    done = run(folder, uv=False)
    assert done.returncode == 0, done.stderr
    assert helper(folder) == "2.0"


def test_a_failed_installation_is_tried_again(folder):
    assert run(folder).returncode == 0
    (folder / "more.txt").write_text("other\nnot-to-be-had\n")
    done = run(folder)
    assert done.returncode == 2
    assert (
        "install: the packages were not installed" in done.stderr and "Traceback" not in done.stderr
    )
    (folder / "more.txt").write_text("other\n")
    assert run(folder).stdout, "what a failed installation left must not pass for the earlier one"
    assert helper(folder) == "1.0"


def test_a_missing_file_is_named(folder):
    (folder / "constraints.txt").unlink()
    done = run(folder)
    assert (
        done.returncode == 2 and "no such file" in done.stderr and "constraints.txt" in done.stderr
    )


def test_an_old_python_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit) as end:
        install.main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert (
        "3.9 is too old" in message
        and "PYTHON=python3.12" in message
        and len(message.splitlines()) == 1
    )


def test_install_py_can_be_read_by_an_old_python():
    import ast

    ast.parse((ROOT / "tools" / "install.py").read_text(), feature_version=(3, 7))


# ---------------------------------------------------------------------------- the requirement files


def lines(name):
    text = (ROOT / name).read_text()
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


def pins(name):
    return {canonicalize_name(r.name): r for r in map(Requirement, lines(name))}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-colab.txt"])
def test_constraints_pin_every_requirement_within_its_range(name):
    pinned = pins(name)
    needs = [
        Requirement(r)
        for f in ("requirements.txt", "requirements-colab.txt")
        for r in lines(f)
        if r[0] != "-"
    ]
    for need in needs:
        pin = pinned.get(canonicalize_name(need.name))
        assert pin is not None, f"{need.name} is not in {name}: run `make constraints`"
        version = str(pin.specifier).removeprefix("==")
        assert need.specifier.contains(version, prereleases=True), f"{need} and {pin} in {name}"


def test_this_environment_is_one_of_the_tested_sets_or_says_so():
    """CI's two unpinned jobs set COURSE_UNPINNED; elsewhere the tests run on what the constraints
    name."""
    if os.environ.get("COURSE_UNPINNED"):
        pytest.skip("an unpinned environment was asked for")
    import importlib.metadata

    for name in ("constraints.txt", "constraints-colab.txt"):
        if all(
            importlib.metadata.version(p) == str(pins(name)[p].specifier).removeprefix("==")
            for p in ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "jupyter-book")
        ):
            return
    pytest.fail(
        "the installed packages are neither constraints.txt nor constraints-colab.txt: run `make install`"
    )


def test_the_colab_requirements_drag_no_notebook_or_site_packages():
    names = {canonicalize_name(Requirement(r).name) for r in lines("requirements-colab.txt")}
    assert not names & {
        "sphinx",
        "notebook",
        "jupyter-book",
        "jupyterlab",
        "ipykernel",
        "ipython",
        "torch",
    }


def test_colab_s_own_versions_are_the_floor():
    pinned, floors = pins("constraints-colab.txt"), pins("requirements-colab.txt")
    for name in ("jax", "flax"):
        version = str(pinned[name].specifier).removeprefix("==")
        assert str(floors[name].specifier) == f">={version}"


def test_the_address_has_one_home():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["course"]
    assert settings["repository"].startswith("https://github.com/")
    import utils

    assert settings["name"] == utils.COURSE
    if settings["revision"].startswith("v"):  # an edition or a fork may follow a branch
        assert settings["revision"] == f"v{utils.__version__}"
