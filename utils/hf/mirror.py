"""A mirror: everything the course downloads in one folder, for machines without a network.

It is laid out like the hub (`datasets/<repo>/<file>`, `models/<repo>/<file>`, `tiktoken/<file>`),
and its `manifest.json` gives each file's size and sha256. `python -m utils mirror --to DIR` fills
one. With `COURSE_MIRROR=DIR` set, `look_up` serves files from it and checks each against the
manifest first: a file cut short by a full disk must not become a strange loss curve.
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

from utils import unexpected


def sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, expected: str) -> bool:
    """Whether the file has this sha256; an unchanged file is read once per process."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns) == expected


@functools.cache
def _digest(path: Path, size: int, modified: int) -> str:
    return sha256(path)


def folder() -> Path | None:
    """The folder `COURSE_MIRROR` names, None when unset; CourseError when it is not a folder."""
    name = os.environ.get("COURSE_MIRROR")
    if name and not Path(name).is_dir():
        fix = "correct the path, or unset it"
        raise unexpected("COURSE_MIRROR", "a folder", f"none at {name}", fix)
    return Path(name) if name else None


def read_manifest(root: Path) -> dict[str, dict]:
    """The manifest: file -> {"bytes": int, "sha256": hex}. CourseError without a good one."""
    path = root / "manifest.json"
    again = "fill the mirror again (make mirror), or unset COURSE_MIRROR"
    if not path.is_file():
        raise unexpected(path, "the mirror's list of files", "none", again)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest.values():
            size, digest = entry["bytes"], entry["sha256"]
            if not (isinstance(size, int) and re.fullmatch("[0-9a-f]{64}", digest)):
                raise ValueError
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise unexpected(path, "file -> {bytes, sha256} in JSON", "something else", again) from None
    return manifest


def verify(root: Path, name: str, entry: dict) -> None:
    """Compare one file of a mirror with its manifest entry. Raises CourseError if they differ."""
    path, where = root / name, f"mirror file {name}"
    again = "copy it again, or fill the mirror again (make mirror)"
    size = path.stat().st_size if path.is_file() else None
    if not size or size != entry["bytes"]:
        found = "no file" if size is None else f"{size:,}"
        raise unexpected(where, f"{entry['bytes']:,} bytes", found, again)
    if not has_digest(path, entry["sha256"]):
        expected, found = entry["sha256"][:12], sha256(path)[:12]
        raise unexpected(where, f"sha256 {expected}…", f"{found}…", again)


def look_up(kind: str, repo: str, filename: str) -> Path | None:
    """The mirror's file, verified; None without a mirror, or where the mirror never had it."""
    name, root = Path(kind, repo, filename).as_posix(), folder()
    if root and name in (manifest := read_manifest(root)):
        verify(root, name, manifest[name])
        return root / name
    if root and (root / name).exists():
        raise unexpected(f"mirror file {name}", "an entry in manifest.json", "none", "make mirror")
    return None
