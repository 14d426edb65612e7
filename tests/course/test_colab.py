"""Installing what a hosted notebook lacks: only that, and never over a good jax. Wheels are made here, no network."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.folders import ROOT, wheel
from utils.course import colab


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A package index in a folder: versions of a stand-in for jax, `helper` content with it, `greedy` not."""
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("0.6.0", "0.7.2", "0.10.2"):
        wheel(folder, "jax", version)
    wheel(folder, "helper", "1.0", ["jax>=0.7"])
    wheel(folder, "greedy", "1.0", ["jax>=0.10"])
    return folder


@pytest.fixture(scope="module", params=["uv", "pip"])
def kernel(request, tmp_path_factory, wheels):
    """An environment with `packaging` in which the course's code runs. Returns run(jax's version, requirements)."""
    tmp_path = tmp_path_factory.mktemp("kernel")
    uv = shutil.which("uv")
    if request.param == "uv" and not uv:
        pytest.skip("uv is not installed")
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "venv", *(["--without-pip"] if request.param == "uv" else []), venv],
        check=True,
    )
    import packaging

    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    shutil.copytree(os.path.dirname(packaging.__file__), os.path.join(site, "packaging"))
    (tmp_path / "utils" / "course").mkdir(parents=True)
    for name in ("__init__.py", "course/__init__.py", "course/colab.py"):
        shutil.copy(ROOT / "utils" / name, tmp_path / "utils" / name)

    def run(jax, needs, before=""):
        for name in os.listdir(site):  # what the test before this one left
            if name.startswith(("jax", "helper", "greedy")):
                path = os.path.join(site, name)
                (shutil.rmtree if os.path.isdir(path) else os.remove)(path)
        if jax:
            with zipfile.ZipFile(wheels / f"jax-{jax}-py3-none-any.whl") as z:
                z.extractall(site)
            with open(os.path.join(site, f"jax-{jax}.dist-info", "INSTALLER"), "w") as f:
                f.write("pip\n")
        (tmp_path / "needs.txt").write_text(needs)
        code = (
            f"{before}\nfrom pathlib import Path\nfrom utils.course import colab\n"
            "colab.install_missing(Path('needs.txt'))\n"
            "print({k: v for k, v in colab.installed().items() if k in ('jax', 'helper', 'greedy')})"
        )
        env = {
            k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "PYTHONPATH"))
        }
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
        env |= {
            "UV_NO_CONFIG": "1",
            "UV_NO_INDEX": "1",
            "UV_OFFLINE": "1",
            "UV_FIND_LINKS": str(wheels),
            "UV_CACHE_DIR": str(tmp_path / "uv-cache"),  # in its own, uv would find the real jax
        }
        if request.param == "pip":
            env["PATH"] = os.defpath
        return subprocess.run(
            [python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    return run


def test_nothing_missing_installs_nothing(kernel):
    done = kernel("0.7.2", "jax>=0.7.2\n# a comment\n")
    assert done.stdout.strip() == "{'jax': '0.7.2'}", done


def test_what_is_missing_is_installed_and_a_good_jax_stays(kernel):
    done = kernel("0.7.2", "jax>=0.7.2\nhelper\n")
    assert "Installing what is missing: helper\n" in done.stdout, done
    assert "'jax': '0.7.2'" in done.stdout and "'helper': '1.0'" in done.stdout


def test_a_package_that_would_replace_a_good_jax_is_refused(kernel):
    done = kernel("0.7.2", "jax>=0.7.2\ngreedy\n")
    assert done.returncode == 1 and "Not installed: greedy" in done.stderr, done
    assert "Traceback" not in done.stderr


def test_a_jax_out_of_range_is_replaced(kernel):
    done = kernel("0.6.0", "jax>=0.7.2\n")
    assert done.returncode == 0 and "'jax': '0.10.2'" in done.stdout, done


def test_replacing_what_is_already_imported_asks_for_a_restart(kernel):
    done = kernel("0.6.0", "jax>=0.7.2\n", before="import jax")
    assert done.returncode == 1 and "jax" in done.stderr and "restart" in done.stderr, done
    assert "Traceback" not in done.stderr


def test_the_course_s_own_requirements_are_met_here():
    assert colab.missing(ROOT / "requirements-colab.txt", colab.installed()) == []
