"""What `make execute` records about a run, and how a later reader sees that the record is out of date.

A record is a plain dictionary in the notebook's metadata (`course.provenance`):

    device, cores        "AMD EPYC 7B13", 2             what computed it
    python, jax, flax    "3.11.7", "0.10.2", "0.12.8"   with which versions
    profile, seconds     "cpu", 142.3                   at which size, in which time, kernel start included
    sources              ["TinyStories train: mirror"]  where its data came from
    date                 "2026-11-22"
    code                 hash of the chapter's code cells
    utils                {"utils.lora": hash, ...}      of every module of the package that was imported

`course.runs` holds further records, of the same chapter on other devices, whose outputs are not the
ones shown. Standard library only: the site's extension reads records without the notebook tools.
"""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_path(name: str, root: Path = ROOT) -> Path:
    """`utils.lora` -> utils/lora.py, `utils.hf` -> utils/hf/__init__.py."""
    base = root.joinpath(*name.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def module_hashes(names: list[str], root: Path = ROOT) -> dict[str, str]:
    """Name -> hash of a module's source, for those that exist."""
    hashes = {}
    for name in sorted(names):
        path = module_path(name, root)
        if path.is_file():
            data = path.read_bytes().replace(b"\r\n", b"\n")
            hashes[name] = hashlib.sha256(data).hexdigest()[:16]
    return hashes


def changed_modules(record: dict, root: Path = ROOT) -> list[str]:
    """The modules that are no longer what they were when the record was made."""
    then = record.get("utils") or {}
    now = module_hashes(list(then), root)
    return [name for name, value in then.items() if now.get(name) != value]


# Runs in the kernel after the last cell and prints one line of JSON. Not recorded in the notebook.
ASK_KERNEL = """
import importlib.metadata as _metadata, json as _json, os as _os, platform as _platform, sys as _sys

def _version(name):
    try:
        return _metadata.version(name)
    except _metadata.PackageNotFoundError:
        return None

def _facts():
    device, cores = None, None
    if "jax" in _sys.modules:
        found = _sys.modules["jax"].devices()
        if found[0].platform != "cpu":
            device = found[0].device_kind + (f" x {len(found)}" if len(found) > 1 else "")
    if device is None:
        cores = len(_os.sched_getaffinity(0)) if hasattr(_os, "sched_getaffinity") else _os.cpu_count()
        try:
            with open("/proc/cpuinfo") as lines:
                names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        except OSError:
            names = []
        device = (names or [""])[0] or _platform.processor() or _platform.machine()
    hub = _sys.modules.get("utils.hf.hub")
    sources = [s if isinstance(s, str) else ": ".join(map(str, s)) for s in getattr(hub, "SOURCES_USED", [])]
    modules = sorted(m for m in _sys.modules if m == "utils" or m.startswith("utils."))
    return dict(
        device=device, cores=cores, python=_platform.python_version(), jax=_version("jax"), flax=_version("flax"),
        sources=list(dict.fromkeys(sources)), modules=modules,
    )

print(_json.dumps(_facts()))
"""
