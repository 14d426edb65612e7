"""Where files come from: a mirror folder, then the Hugging Face hub, and else what the package builds itself.

`fetch` asks in this order and returns the first that has the file:

1. the mirror: `COURSE_MIRROR=DIR`, a folder laid out like the hub (`DIR/datasets/<repo>/<file>`) with a `manifest.json`
   of sizes and sha256. A class of thirty downloads once. A mirror that contradicts its manifest is an error, never
   skipped: silently using other data would change every number on the page.
2. the hub: revision pinned in `PINNED`, checksum verified, never a pickle (unpickling runs the file's code).

When neither has it, `NotAvailable` is raised and the caller goes on with the built-in source. `SOURCES_USED` keeps what
came from where. To fill a mirror: `python -m utils.hub --mirror DIR`.
"""

import hashlib
import json
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

from utils import CourseError


class NotAvailable(CourseError):
    """Neither the mirror nor the network has the file; the message says why. Callers use their built-in source."""


@dataclass(frozen=True)
class Found:
    """A verified file on this machine, and where it came from: "mirror" or "hub"."""

    path: Path
    source: str


@dataclass(frozen=True)
class Pin:
    """The one revision of a repository that the course reads, and the sha256 of its files where known."""

    revision: str
    sha256: dict[str, str] = field(default_factory=dict)


TINYSTORIES = "roneneldan/TinyStories"
PINNED = {
    ("datasets", TINYSTORIES): Pin(
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        {
            "TinyStories-train.txt": "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
            "TinyStories-valid.txt": "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        },
    ),
}

# tiktoken downloads GPT-2's two files from here, and looks for them in its cache under the sha1 of their address.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_FILES = {hashlib.sha1((GPT2_URL + name).encode()).hexdigest(): name for name in GPT2_SHA256}

SOURCES_USED: list[tuple[str, str]] = []
PROBE_SECONDS = 4.0
_verified: set[tuple] = set()
_reachable: dict[str, bool] = {}


def used(what: str, source: str) -> None:
    """Remember, and print in one line, which source served `what`."""
    if (what, source) not in SOURCES_USED:
        SOURCES_USED.append((what, source))
    print(f"{what}: {source}")


def sha256(path: Path) -> str:
    """The file's sha256 in hex, read in pieces (the largest file is 1.9 GB)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _has_digest(path: Path, expected: str) -> bool:
    """Whether the file has this sha256; an unchanged file is read once per process."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns, expected)
    if key not in _verified:
        if sha256(path) != expected:
            return False
        _verified.add(key)
    return True


# ---------------------------------------------------------------------------------------------------------- the mirror


def mirror_folder() -> Path | None:
    """The folder `COURSE_MIRROR` names, None when unset; CourseError when it is not a folder."""
    name = os.environ.get("COURSE_MIRROR", "")
    if not name:
        return None
    if not Path(name).is_dir():
        raise CourseError(
            f"COURSE_MIRROR: expected a folder, found none at {name}: correct the path, or unset it"
        )
    return Path(name)


def read_manifest(folder: Path) -> dict[str, dict]:
    """`manifest.json` of a mirror: relative path -> {"bytes": int, "sha256": hex}. CourseError when missing or broken."""
    path = folder / "manifest.json"
    fill = "fill the mirror again (make mirror), or unset COURSE_MIRROR"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = all(
            isinstance(entry["bytes"], int) and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
            for entry in manifest.values()
        )
    except FileNotFoundError:
        raise CourseError(
            f"{path}: expected the mirror's list of files, found none: {fill}"
        ) from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise CourseError(
            f"{path}: expected path -> {{bytes, sha256}} in JSON, found something else: {fill}"
        )
    return manifest


def verify(path: Path, name: str, entry: dict) -> None:
    """Compare a mirror's file with its manifest entry. Raises CourseError on the first difference."""
    again = "copy it again or fill the mirror again (make mirror)"
    if not path.is_file():
        raise CourseError(
            f"mirror file {name}: expected {entry['bytes']:,} bytes, found no file: {again}"
        )
    if (size := path.stat().st_size) != entry["bytes"] or size == 0:
        raise CourseError(
            f"mirror file {name}: expected {entry['bytes']:,} bytes, found {size:,}: {again}"
        )
    if not _has_digest(path, entry["sha256"]):
        found = sha256(path)
        raise CourseError(
            f"mirror file {name}: expected sha256 {entry['sha256'][:12]}…, found {found[:12]}…: {again}"
        )


def from_mirror(kind: str, repo: str, filename: str) -> Found | None:
    """The mirror's file, verified; None without a mirror or when the mirror never had the file."""
    folder = mirror_folder()
    if folder is None:
        return None
    name = "/".join(part for part in (kind, repo, filename) if part)
    manifest = read_manifest(folder)
    if name not in manifest:
        if (folder / name).exists():
            raise CourseError(
                f"mirror file {name}: not in manifest.json: fill the mirror again (make mirror)"
            )
        return None
    verify(folder / name, name, manifest[name])
    return Found(folder / name, "mirror")


# ------------------------------------------------------------------------------------------------------------- the hub


def reachable(url: str) -> bool:
    """Whether a server answers there: asked once per process, within a few seconds, never when HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if url not in _reachable:
        answered = []

        def ask() -> None:
            try:
                urllib.request.urlopen(
                    urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS
                ).close()
                answered.append(True)
            except urllib.error.HTTPError:  # an answer, if not a kind one
                answered.append(True)
            except (OSError, ValueError):
                pass

        # In a thread, because a name server that does not answer is waited for longer than any timeout given here.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS + 1)
        _reachable[url] = bool(answered)
    return _reachable[url]


def from_hub(kind: str, repo: str, filename: str) -> Found:
    """The hub's file at the pinned revision, from the hub's cache on this machine where it is already there.

    Raises NotAvailable when the hub cannot be reached or does not have it, CourseError for a pickle or a wrong checksum.
    """
    if (kind, repo) not in PINNED:
        raise NotAvailable(
            f"{kind}/{repo}: the course pins no revision of it, so it is not taken from the hub"
        )
    if kind == "models" and re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", filename):
        raise CourseError(
            f"{repo}/{filename}: expected safetensors, found a pickle, which may run code: not loaded"
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    pin = PINNED[kind, repo]
    where = dict(
        repo_type=kind.removesuffix("s"),
        revision=pin.revision,
        cache_dir=os.environ.get("HF_HUB_CACHE"),
    )
    cached = try_to_load_from_cache(repo, filename, **where)
    if isinstance(cached, str):
        path = Path(cached)
    else:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if not reachable(endpoint):
            raise NotAvailable(f"{repo}/{filename}: no answer from {endpoint}")
        try:
            path = Path(hf_hub_download(repo, filename, endpoint=endpoint, **where))
        except (
            Exception
        ) as error:  # each version of huggingface_hub and of its HTTP library has its own errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotAvailable(
                f"{repo}/{filename}: the hub did not deliver it ({reason})"
            ) from error
    blob = path.resolve().name  # the hub's cache names a large file by its sha256
    expected = pin.sha256.get(filename) or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    if expected and not _has_digest(path, expected):
        found = sha256(path)
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CourseError(
            f"{repo}/{filename} from the hub: expected sha256 {expected[:12]}…, found {found[:12]}…:"
            " the file was removed, run again or set COURSE_MIRROR"
        )
    return Found(path, "hub")


def fetch(kind: str, repo: str, filename: str) -> Found:
    """One file, from the mirror or else from the hub. `kind` is "datasets", "models" or "tiktoken".

    Raises NotAvailable when neither has it, CourseError when one has it wrong.
    """
    return from_mirror(kind, repo, filename) or from_hub(kind, repo, filename)


# ---------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer(name: str) -> tiktoken.Encoding:
    """A tokenizer by name: "stories2048", kept in the package, or "gpt2", from the mirror or the network.

    Raises NotAvailable when "gpt2" is in neither, CourseError for another name.
    """
    if name == "stories2048":
        from utils import tokenizer as own

        path = Path(__file__).parent / "assets" / "stories2048.tiktoken"
        return own.encoding(own.load(path), name)
    if name != "gpt2":
        raise CourseError(f"tokenizer: expected stories2048 or gpt2, found {name!r}")
    files = [from_mirror("tiktoken", "", cached) for cached in GPT2_FILES]
    if all(files):
        for found, original in zip(files, GPT2_FILES.values()):
            # Before tiktoken looks: it deletes a file of its cache that has another checksum.
            if not _has_digest(found.path, GPT2_SHA256[original]):
                raise CourseError(
                    f"mirror file tiktoken/{found.path.name}: is not GPT-2's {original}: make mirror"
                )
        previous = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(files[0].path.parent)
        try:
            encoding = tiktoken.get_encoding("gpt2")
        finally:
            if previous is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = previous
        used("tokenizer gpt2", "mirror")
        return encoding
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not (cache and all((Path(cache) / cached).is_file() for cached in GPT2_FILES)):
        if not reachable(GPT2_URL):
            raise NotAvailable(
                "tokenizer gpt2: in no mirror, and no answer from OpenAI's file server"
            )
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotAvailable(f"tokenizer gpt2: not delivered ({reason})") from error
    used("tokenizer gpt2", "OpenAI's file server, through tiktoken")
    return encoding
