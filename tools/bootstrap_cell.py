"""The first code cell of every chapter. `make sync` writes what follows the line of dashes into each of them, with the
address and the release from pyproject.toml in place of the words between @ signs.
"""

# ------------------------------------------------------------------------------------------------------------- the cell
# Finds the course's package, `utils`. On Colab and Kaggle it first fetches the course and installs what is missing.
import os, subprocess, sys
from pathlib import Path

def ours(folder):
    file = Path(folder) / "utils" / "__init__.py"
    return file.is_file() and 'COURSE = "@NAME@"' in file.read_text(encoding="utf-8")

fork = os.environ.get("COURSE_REPOSITORY")  # a fork's address or a folder, in place of the course's own
revision = os.environ.get("COURSE_REVISION", "" if fork else "@REVISION@")
hosted = bool(fork) or "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
home = Path("@NAME@" + (f"-{revision}" if revision else "")).absolute()
if hosted and not ours(home):
    clone = ["git", "clone", "--quiet", "--depth", "1", *(["--branch", revision] if revision else [])]
    done = subprocess.run([*clone, fork or "@REPOSITORY@", str(home)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no answer").splitlines()[-1]
        raise SystemExit(f"The course could not be fetched: {reason}")
places = [home] if hosted else [Path.cwd(), *Path.cwd().parents, *filter(None, sys.path)]
root = next((str(place) for place in places if ours(place)), None)
if root is None:
    raise SystemExit("The course's package `utils` was not found: open this notebook inside a copy of @REPOSITORY@")
sys.path.insert(0, root)
import utils

if getattr(utils, "COURSE", None) != "@NAME@":
    raise SystemExit(f"Another package named utils is already imported ({utils.__file__}): restart the kernel")
if hosted:
    from utils.course.colab import install_missing

    install_missing(Path(root) / "requirements-colab.txt")
