"""`python -m utils mirror`: everything the course downloads, in one folder to set COURSE_MIRROR to.

It can be stopped and started again at any moment: a file takes its place only when it is complete,
and then enters the manifest. Files come from the hub, or from the mirror that COURSE_MIRROR names.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from utils import CourseError, unexpected
from utils.commands.options import Mirror
from utils.course import gpt2
from utils.hf import hub, mirror

logger = logging.getLogger(__name__)


def course_files(small: bool = False) -> list[tuple[str, str, str]]:
    """What a complete mirror holds, as (kind, repository, file).

    `small` leaves out what only accelerators need: 1.9 GB of stories, the 3.6 GB of R1's weights.
    """
    settings = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    model = [*settings, "model.safetensors"]
    stories = ["TinyStories-valid.txt"] + ["TinyStories-train.txt"] * (not small)
    part = "-00000-of-00001.parquet"
    files = {
        ("tiktoken", ""): list(gpt2.SHA256),
        ("datasets", hub.TINYSTORIES): stories,
        ("datasets", hub.SST2): [f"data/train{part}", f"data/validation{part}"],
        ("datasets", hub.GSM8K): [f"main/train{part}", f"main/test{part}"],
        ("models", hub.SMOLLM2): model,
        ("models", hub.R1): settings if small else model,
    }
    return [(kind, repo, name) for (kind, repo), names in files.items() for name in names]


def fill(root: Path, small: bool = False) -> list[str]:
    """Bring everything the course reads into the folder `root`; returns why the rest is missing."""
    if root.exists() and not root.is_dir():
        raise unexpected(root, "a folder to fill", "a file", "choose another name")
    root.mkdir(parents=True, exist_ok=True)
    if (current := mirror.folder()) and current.samefile(root):
        del os.environ["COURSE_MIRROR"]  # the mirror to repair is no source for the repair
    manifest = mirror.read_manifest(root) if (root / "manifest.json").exists() else {}
    missing = []
    for kind, repo, filename in course_files(small):
        name = Path(kind, repo, filename).as_posix()
        try:
            if name in manifest:
                mirror.verify(root, name, manifest[name])
                logger.info(f"kept    {name}")
                continue
        except CourseError as problem:
            logger.info(f"renewed {problem}")
        try:
            is_gpt2 = kind == "tiktoken"
            file = gpt2.fetch(filename) if is_gpt2 else hub.fetch(kind, repo, filename)
        except hub.NotAvailable as reason:
            missing.append(str(reason))
            continue
        manifest[name] = copy(file.path, root / name)
        part = root / "manifest.json.part"
        part.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, root / "manifest.json")
        logger.info(f"copied  {name}, {manifest[name]['bytes']:,} bytes, from the {file.source}")
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
    """Fill the folder; returns how to use it. Raises CourseError while files are missing."""
    try:
        missing = fill(Path(options.to), options.small)
    except OSError as error:
        raise CourseError(f"mirror: {options.to}: could not be written ({error})") from error
    if missing:
        reason = f"{len(missing)} files not available, run it again later: {missing[0]}"
        raise CourseError(f"mirror: {reason}")
    return f"complete: export COURSE_MIRROR={options.to}"
