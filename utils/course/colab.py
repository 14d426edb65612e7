"""Install what a hosted notebook lacks, and touch nothing that is already good.

Colab and Kaggle come with JAX built for their accelerators. A plain `pip install -r` may replace
it, which costs minutes and can leave an accelerator unused. So: only requirements that the
installed packages do not meet are installed, and the packages that carry the accelerator, when they
are in range, are pinned to what is there. If a package that this kernel had already imported
changes all the same, the old code is still in memory: the notebook stops and asks for a restart.

The first cell of every chapter calls `install_missing` on Colab and Kaggle, and nowhere else.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

# Never replaced while in range. NumPy is here because half of what is preinstalled was built against it.
PINNED = re.compile(r"jax|jaxlib|flax|numpy|libtpu|jax[-_](cuda|rocm).*")


def normal(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name -> version of every package of this environment, names in lower case with dashes."""
    importlib.invalidate_caches()
    versions = {}
    for dist in importlib.metadata.distributions():
        if name := dist.metadata["Name"]:  # the first on the path is the one that is imported
            versions.setdefault(normal(name), dist.version)
    return versions


def missing(requirements: Path, have: dict[str, str]) -> list[Requirement]:
    """The lines of a requirements file that the packages in `have` do not meet."""
    lines = (line.split("#")[0].strip() for line in requirements.read_text().splitlines())
    absent = []
    for need in (Requirement(line) for line in lines if line):
        if need.marker and not need.marker.evaluate():
            continue
        version = have.get(normal(need.name))
        if version is None or not need.specifier.contains(version, prereleases=True):
            absent.append(need)
    return absent


def installer() -> list[str]:
    """The command that installs into this kernel's environment; environments made by uv have no pip
    of their own."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    subprocess.run([sys.executable, "-m", "ensurepip"], check=True, capture_output=True)
    return installer()


def install_missing(requirements: Path) -> list[str]:
    """Install what `requirements` asks for and this environment lacks. Returns what was installed.

    Raises SystemExit, which stops a notebook with one line and no stack trace, when the
    installation fails or when the kernel must be restarted.
    """
    before = installed()
    absent = missing(requirements, before)
    names = [str(need) for need in absent]
    if not names:
        return []
    print("Installing what is missing:", ", ".join(names))
    replaced = {normal(need.name) for need in absent}
    if replaced & {"jax", "jaxlib"}:  # they and their plugins only go together
        replaced |= {name for name in before if re.match("jax|libtpu", name)}
    pins = [
        f"{name}=={version}\n"
        for name, version in before.items()
        if PINNED.fullmatch(name) and name not in replaced
    ]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(pins))
        command = [*installer(), "-c", str(constraints), *names]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        why = next(
            (line for line in lines if "error" in line.lower()), (lines or ["no message"])[-1]
        )
        raise SystemExit(f"Not installed: {', '.join(names)}: {why.strip()}")
    after = installed()
    changed = {name for name in before if after.get(name) != before[name]}
    modules = importlib.metadata.packages_distributions()
    stale = sorted(
        module
        for module, names in modules.items()
        if module in sys.modules and changed & {normal(n) for n in names}
    )
    if stale:
        raise SystemExit(
            f"Installed newer versions of {', '.join(stale)}, which this kernel had already imported:"
            " restart it (Runtime → Restart session), then run from the top again"
        )
    return names
