"""A mirror: everything the course downloads in one folder, for machines without a network.

It is laid out like the hub (`datasets/<repo>/<file>`, `models/<repo>/<file>`, `tiktoken/<file>`)
and has a `manifest.json` that gives each file's size and sha256. With `COURSE_MIRROR=DIR` set,
`look_up` serves files from it and checks each against the manifest first: a file cut short by a
full disk must not become a strange loss curve.

`python -m utils mirror --to DIR` (`make mirror`) fills one.
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

from utils import CourseError


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
    name = os.environ.get("COURSE_MIRROR", "")
    if not name:
        return None
    if not Path(name).is_dir():
        raise CourseError(
            f"COURSE_MIRROR: expected a folder, found none at {name}: correct the path, or unset it"
        )
    return Path(name)


def read_manifest(root: Path) -> dict[str, dict]:
    """`manifest.json` of a mirror: file -> {"bytes": int, "sha256": hex}; CourseError without one."""
    path = root / "manifest.json"
    again = "fill the mirror again (make mirror), or unset COURSE_MIRROR"
    if not path.is_file():
        raise CourseError(f"{path}: expected the mirror's list of files, found none: {again}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest.values():
            size, digest = entry["bytes"], entry["sha256"]
            if not (isinstance(size, int) and re.fullmatch("[0-9a-f]{64}", digest)):
                raise ValueError
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        what = "expected file -> {bytes, sha256} in JSON, found something else"
        raise CourseError(f"{path}: {what}: {again}") from None
    return manifest


def verify(root: Path, name: str, entry: dict) -> None:
    """Compare one file of a mirror with its manifest entry. Raises CourseError if they differ."""
    path, again = root / name, "copy it again, or fill the mirror again (make mirror)"
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"] or size == 0:
        actual = "no file" if size is None else f"{size:,}"
        raise CourseError(
            f"mirror file {name}: expected {entry['bytes']:,} bytes, found {actual}: {again}"
        )
    if not has_digest(path, entry["sha256"]):
        expected, actual = entry["sha256"][:12], sha256(path)[:12]
        raise CourseError(
            f"mirror file {name}: expected sha256 {expected}…, found {actual}…: {again}"
        )


def file_name(kind: str, repo: str, filename: str) -> str:
    """The name of a file in a mirror and in its manifest."""
    return "/".join(part for part in (kind, repo, filename) if part)


def look_up(kind: str, repo: str, filename: str) -> Path | None:
    """The mirror's file, verified; None without a mirror, or where the mirror never had the file."""
    root = folder()
    if root is None:
        return None
    name, manifest = file_name(kind, repo, filename), read_manifest(root)
    if name in manifest:
        verify(root, name, manifest[name])
        return root / name
    if (root / name).exists():
        what = "expected an entry in manifest.json, found none: make mirror"
        raise CourseError(f"mirror file {name}: {what}")
    return None
