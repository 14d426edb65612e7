"""Make `.venv` and install everything the course needs into it. `make install` runs this.

It uses `uv` when it is there and Python's own `venv` and `pip` when it is not, so a bare Debian
with python3, make and git is enough. What was installed is remembered as a stamp, the hash of the
requirement files, the constraints and the Python version: with nothing changed a second call
returns at once. The stamp is written last, so an installation that was interrupted is done again.

This file runs before anything is installed, on whatever Python the user has: standard library only,
and its syntax must be readable by an old Python 3, so that the refusal below is what the user sees.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
TESTED = ((3, 11), (3, 12), (3, 13))
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def stop(message):
    """End with one clear line and status 2."""
    sys.stderr.write("install: " + message + "\n")
    sys.exit(2)


def requirement_files(path):
    """The file and those it includes with `-r`, in order."""
    files = [path]
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("-r "):
                files += requirement_files(os.path.join(os.path.dirname(path), line[3:].strip()))
    return files


def digest(files, python):
    """A hash that changes when a file's content or the Python version does."""
    total = hashlib.sha256(python.encode())
    for path in files:
        with open(path, "rb") as f:
            total.update(f.read().replace(b"\r\n", b"\n") + b"\0")
    return total.hexdigest()


def venv_python(venv):
    """The environment's interpreter."""
    return os.path.join(venv, "bin", "python")


def version_of(python):
    """'3.12' for an interpreter, None when it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError:
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


def create(venv, uv):
    """A fresh environment on the Python that runs this, with pip in it where that is possible."""
    commands = [[sys.executable, "-m", "venv", "--clear", venv]]
    if uv:  # where Debian's python3-venv is not installed
        commands.append([uv, "venv", "--quiet", "--clear", "--python", sys.executable, venv])
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0:
            return
    output = done.stdout.decode(errors="replace")
    if "ensurepip" in output or "No module named venv" in output:
        stop(
            "this Python cannot make environments: on Debian or Ubuntu run "
            "`apt-get install python3-venv`, then call make again"
        )
    stop("%s failed: %s" % (" ".join(command), " ".join(output.split())[-300:]))


def torch_index(files):
    """torch's own index, where torch is required and the index answers: builds without CUDA."""
    text = ""
    for path in files:
        with open(path, encoding="utf-8") as f:
            text += "\n" + f.read()
    if "\ntorch" not in text:
        return None
    try:
        urllib.request.urlopen(TORCH_INDEX + "/torch/", timeout=10).close()
    except OSError:
        return None
    return TORCH_INDEX


def install(venv, requirements, constraints, uv):
    """Install the requirements; an installer's own messages are shown when it fails."""
    packages = ["-r", requirements] + (["-c", constraints] if constraints else [])
    index = torch_index(requirement_files(requirements))
    env = dict(os.environ)
    if uv:
        command = [uv, "pip", "install", "--quiet", "--python", venv_python(venv)] + packages
        if index:  # uv takes only torch's packages from there
            env.setdefault("UV_TORCH_BACKEND", "cpu")
    else:
        command = [venv_python(venv), "-m", "pip", "install", "--quiet"] + packages
        command += ["--disable-pip-version-check", "--no-input"]
        command += ["--extra-index-url", index] if index else []
    if subprocess.run(command, env=env).returncode != 0:
        stop("the packages were not installed (messages above); `make install` tries again")


def main():
    """Parse the flags and bring the environment up to date."""
    if sys.version_info < OLDEST:
        stop(
            "Python %d.%d is too old, the course needs 3.11, 3.12 or 3.13: "
            "try `make install PYTHON=python3.12`" % sys.version_info[:2]
        )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"))
    parser.add_argument("--requirements", default=os.path.join(ROOT, "requirements.txt"))
    parser.add_argument("--constraints", default=os.path.join(ROOT, "constraints.txt"))
    parser.add_argument(
        "--this-python", action="store_true", help="remake a venv of another Python"
    )
    args = parser.parse_args()
    if args.constraints in ("", "none"):
        args.constraints = None
    for path in filter(None, (args.requirements, args.constraints)):
        if not os.path.isfile(path):
            stop("no such file: " + path)

    here = "%d.%d" % sys.version_info[:2]
    there = version_of(venv_python(args.venv))
    # An environment of another supported Python stays as it is unless a Python was asked for by
    # name.
    keep = there is not None and (there == here or not args.this_python)
    keep = keep and tuple(map(int, there.split("."))) >= OLDEST
    python = there if keep else here
    if tuple(map(int, python.split("."))) not in TESTED:
        sys.stderr.write("install: note: Python %s was not tested with these packages\n" % python)

    files = requirement_files(args.requirements) + ([args.constraints] if args.constraints else [])
    current = digest(files, python)
    # One stamp for each file of requirements: what is installed on top leaves the first valid.
    extra = os.path.basename(args.requirements)[:-4].replace("requirements", "", 1)
    stamp = os.path.join(args.venv, ".installed" + extra)
    if keep and os.path.isfile(stamp):
        with open(stamp, encoding="utf-8") as f:
            if f.read().strip() == current:
                return
    uv = shutil.which("uv")
    started = time.time()
    print(
        "Installing into %s (Python %s, %s)" % (args.venv, python, "uv" if uv else "pip"),
        flush=True,
    )
    if not keep:
        create(args.venv, uv)
    if os.path.isfile(stamp):
        os.remove(stamp)
    if (
        not uv
        and subprocess.run(
            [venv_python(args.venv), "-m", "pip", "--version"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ).returncode
    ):
        create(args.venv, None)  # made by uv earlier, and so without pip
    install(args.venv, args.requirements, args.constraints, uv)
    with open(stamp + ".new", "w", encoding="utf-8") as f:
        f.write(current + "\n")
    os.replace(stamp + ".new", stamp)
    print("Installed in %.0f s" % (time.time() - started), flush=True)


if __name__ == "__main__":
    main()
