"""A mirror: one folder with everything the course downloads, for a class, a plane, or a machine without a network.

It is laid out like the hub (`datasets/<repo>/<file>`, `models/<repo>/<file>`, `tiktoken/<file>`) and has a
`manifest.json` that gives each file's size and sha256. With `COURSE_MIRROR=DIR` set, `look_up` serves files from it
and checks each against the manifest first: a file cut short by a full disk must not become a strange loss curve.

`fill` makes one, from the hub or from another mirror (`make mirror`, or `python -m utils.hub --mirror DIR`). It can be
stopped and started again at any moment: a file takes its place only when complete, and then enters the manifest.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from utils import CourseError

_verified: set[tuple] = set()


def sha256(path: Path) -> str:
    """The file's sha256 in hex, read in pieces (the largest file is 1.9 GB)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def has_digest(path: Path, expected: str) -> bool:
    """Whether the file has this sha256; an unchanged file is read once per process."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns, expected)
    if key not in _verified:
        if sha256(path) != expected:
            return False
        _verified.add(key)
    return True


def folder() -> Path | None:
    """The folder `COURSE_MIRROR` names, None when unset; CourseError when it is not a folder."""
    name = os.environ.get("COURSE_MIRROR", "")
    if not name:
        return None
    if not Path(name).is_dir():
        raise CourseError(f"COURSE_MIRROR: expected a folder, found none at {name}: correct the path, or unset it")
    return Path(name)


def read_manifest(root: Path) -> dict[str, dict]:
    """`manifest.json` of a mirror: file -> {"bytes": int, "sha256": hex}. CourseError when it is missing or broken."""
    path = root / "manifest.json"
    again = "fill the mirror again (make mirror), or unset COURSE_MIRROR"
    if not path.is_file():
        raise CourseError(f"{path}: expected the mirror's list of files, found none: {again}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = all(
            isinstance(entry["bytes"], int) and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
            for entry in manifest.values()
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise CourseError(f"{path}: expected file -> {{bytes, sha256}} in JSON, found something else: {again}")
    return manifest


def verify(root: Path, name: str, entry: dict) -> None:
    """Compare one file of a mirror with its manifest entry. Raises CourseError at the first difference."""
    path, again = root / name, "copy it again, or fill the mirror again (make mirror)"
    if not path.is_file():
        raise CourseError(f"mirror file {name}: expected {entry['bytes']:,} bytes, found no file: {again}")
    size = path.stat().st_size
    if size != entry["bytes"] or size == 0:
        raise CourseError(f"mirror file {name}: expected {entry['bytes']:,} bytes, found {size:,}: {again}")
    if not has_digest(path, entry["sha256"]):
        found = sha256(path)
        raise CourseError(f"mirror file {name}: expected sha256 {entry['sha256'][:12]}…, found {found[:12]}…: {again}")


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
        raise CourseError(f"mirror file {name}: expected an entry in manifest.json, found none: make mirror")
    return None


# ------------------------------------------------------------------------------------------------------- filling one


def _write_manifest(root: Path, manifest: dict[str, dict]) -> None:
    part = root / "manifest.json.part"
    part.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, root / "manifest.json")


def _put(source: Path, target: Path) -> dict:
    """Copy a verified file to its place, all of it or nothing. Returns its manifest entry."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        shutil.copyfile(source, part)
        entry = {"bytes": part.stat().st_size, "sha256": sha256(part)}
        if entry["sha256"] != sha256(source):
            raise CourseError(f"{target}: the copy differs from its source: is the disk sound? Run it again")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return entry


def fill(root: Path, small: bool = False) -> list[str]:
    """Bring everything the course reads into the folder `root`; returns why the rest could not be had.

    `small` leaves out what only the profiles colab and large read: 1.9 GB of stories, the 3.6 GB of R1's weights.
    """
    from utils.hf import hub  # which itself looks into mirrors

    if root.exists() and not root.is_dir():
        raise CourseError(f"{root}: expected a folder to fill, found a file: choose another name")
    root.mkdir(parents=True, exist_ok=True)
    if (current := folder()) and current.samefile(root):
        del os.environ["COURSE_MIRROR"]  # the mirror to repair is no source for the repair
    manifest = read_manifest(root) if (root / "manifest.json").exists() else {}
    missing = []
    for kind, repo, filename in hub.course_files(small):
        name = file_name(kind, repo, filename)
        try:
            if name in manifest:
                verify(root, name, manifest[name])
                print(f"kept    {name}")
                continue
        except CourseError as problem:
            print(f"renewed {problem}")
        try:
            found = hub.fetch(kind, repo, filename)
        except hub.NotAvailable as reason:
            missing.append(str(reason))
            continue
        manifest[name] = _put(found.path, root / name)
        _write_manifest(root, manifest)
        print(f"copied  {name}, {manifest[name]['bytes']:,} bytes, from the {found.source}")
    return missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.hub", description="Fill a mirror for COURSE_MIRROR.")
    parser.add_argument("--mirror", type=Path, required=True, metavar="DIR", help="the folder to fill")
    parser.add_argument("--small", action="store_true", help="only what the profiles smoke and cpu read (about 300 MB)")
    arguments = parser.parse_args(arguments)
    try:
        missing = fill(arguments.mirror, arguments.small)
    except (CourseError, OSError) as problem:
        print(f"mirror: {problem}", file=sys.stderr)
        return 2
    if missing:
        print(
            f"mirror: {len(missing)} files not available, run it again later: {missing[0]}",
            file=sys.stderr,
        )
        return 2
    print(f"complete: export COURSE_MIRROR={arguments.mirror}")
    return 0
