"""`python -m utils mirror`: everything the course downloads, in one folder to set COURSE_MIRROR to.

It can be stopped and started again at any moment: a file takes its place only when it is complete,
and then enters the manifest. Files come from the hub, or from the mirror that COURSE_MIRROR names.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from utils import CourseError
from utils.commands.options import Mirror
from utils.hf import hub, mirror

logger = logging.getLogger(__name__)


def course_files(small: bool = False) -> list[tuple[str, str, str]]:
    """What a complete mirror holds, as (kind, repository, file).

    `small` leaves out what only accelerators need: 1.9 GB of stories, the 3.6 GB of R1's weights.
    """
    settings = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    model = [*settings, "model.safetensors"]
    splits = {hub.SST2: ("data/", "train", "validation"), hub.GSM8K: ("main/", "train", "test")}
    stories = ["TinyStories-valid.txt"] + ["TinyStories-train.txt"] * (not small)
    return [
        *(("tiktoken", "", name) for name in hub.GPT2_SHA256),
        *(("datasets", hub.TINYSTORIES, name) for name in stories),
        *(
            ("datasets", repo, f"{folder}{split}-00000-of-00001.parquet")
            for repo, (folder, *names) in splits.items()
            for split in names
        ),
        *(("models", hub.SMOLLM2, name) for name in model),
        *(("models", hub.R1, name) for name in (settings if small else model)),
    ]


def fill(root: Path, small: bool = False) -> list[str]:
    """Bring everything the course reads into the folder `root`; returns why the rest is missing."""
    if root.exists() and not root.is_dir():
        raise CourseError(f"{root}: expected a folder to fill, found a file: choose another name")
    root.mkdir(parents=True, exist_ok=True)
    if (current := mirror.folder()) and current.samefile(root):
        del os.environ["COURSE_MIRROR"]  # the mirror to repair is no source for the repair
    manifest = mirror.read_manifest(root) if (root / "manifest.json").exists() else {}
    missing = []
    for kind, repo, filename in course_files(small):
        name = mirror.file_name(kind, repo, filename)
        try:
            if name in manifest:
                mirror.verify(root, name, manifest[name])
                logger.info(f"kept    {name}")
                continue
        except CourseError as problem:
            logger.info(f"renewed {problem}")
        try:
            file = hub.fetch(kind, repo, filename)
        except hub.NotAvailable as reason:
            missing.append(str(reason))
            continue
        manifest[name] = copy(file.path, root / name)
        part = root / "manifest.json.part"
        part.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, root / "manifest.json")
        size = manifest[name]["bytes"]
        logger.info(f"copied  {name}, {size:,} bytes, from the {file.source}")
    return missing


def copy(source: Path, target: Path) -> dict:
    """Copy a verified file, all of it or nothing. Returns its manifest entry."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        shutil.copyfile(source, part)
        entry = {"bytes": part.stat().st_size, "sha256": mirror.sha256(part)}
        if entry["sha256"] != mirror.sha256(source):
            raise CourseError(f"{target}: the copy differs from its source: check the disk")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return entry


def run(options: Mirror) -> str:
    """Fill the folder; the line that says how to use it. Raises CourseError while files are missing."""
    try:
        missing = fill(Path(options.to), options.small)
    except OSError as error:
        raise CourseError(f"mirror: {options.to}: could not be written ({error})") from error
    if missing:
        raise CourseError(
            f"mirror: {len(missing)} files not available, run it again later: {missing[0]}"
        )
    return f"complete: export COURSE_MIRROR={options.to}"
