"""Where files come from: a mirror folder, then the Hugging Face hub, and else what the package builds itself.

`fetch` asks in this order and returns the first that has the file:

1. the mirror that `COURSE_MIRROR` names (see `utils/mirror.py`). A mirror that contradicts its manifest is an error and
   is never skipped: to go on with other data would change every number on the page without a word.
2. the hub: one revision per repository, pinned in `PINNED`; checksum verified; safetensors, never a pickle, because
   unpickling runs the file's code.

When neither has it, `NotAvailable` is raised and the caller goes on with its built-in source. `used` prints which
source it was, in one line, and `SOURCES_USED` keeps the list for a run's provenance. `model` and `tokenizer` do the
same for whole models (see `utils/models.py`).
"""

import hashlib
import os
import re
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken

from utils import CourseError
from utils.hf import mirror

if TYPE_CHECKING:
    from utils.hf import chat


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

# tiktoken downloads GPT-2's two files from here, and looks for them in its cache under the sha1 of their address.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    hashlib.sha1((GPT2_URL + name).encode()).hexdigest(): digest
    for name, digest in (
        ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    )
}

SOURCES_USED: list[tuple[str, str]] = []
PROBE_SECONDS = 4.0
_answers: dict[str, bool] = {}


def course_files(small: bool = False) -> list[tuple[str, str, str]]:
    """What a complete mirror holds, as (kind, repository, file); `small` is what the profiles smoke and cpu read."""
    stories = ["TinyStories-valid.txt"] if small else ["TinyStories-valid.txt", "TinyStories-train.txt"]
    settings = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    return [
        *(("tiktoken", "", name) for name in GPT2_SHA256),
        *(("datasets", TINYSTORIES, name) for name in stories),
        *(("datasets", SST2, f"data/{split}-00000-of-00001.parquet") for split in ("train", "validation")),
        *(("datasets", GSM8K, f"main/{split}-00000-of-00001.parquet") for split in ("train", "test")),
        *(("models", SMOLLM2, name) for name in (*settings, "model.safetensors")),
        *(("models", R1, name) for name in (settings if small else (*settings, "model.safetensors"))),
    ]


def used(what: str, source: str) -> None:
    """Remember, and print in one line, which source served `what`."""
    if (what, source) not in SOURCES_USED:
        SOURCES_USED.append((what, source))
    print(f"{what}: {source}")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unreachable(url: str) -> str | None:
    """Why not to ask this server, None when it answers.

    Asked once per process and given a few seconds, so that a machine without a network does not wait at every file.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    if url not in _answers:
        answered = threading.Event()

        def ask() -> None:
            try:
                request = urllib.request.Request(url, method="HEAD")
                urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
                answered.set()
            except urllib.error.HTTPError as answer:
                if answer.code < 500:  # a server that is ill would be asked again and again for half a minute
                    answered.set()
            except (OSError, ValueError):
                pass

        # In a thread: looking up a name can take longer than any timeout that can be given to it.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS + 1)
        _answers[url] = answered.is_set()
    return None if _answers[url] else f"no answer from {url}"


def is_pickle(filename: str) -> bool:
    """Whether the file's name is that of a pickle, as PyTorch writes them."""
    return re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", filename) is not None


def verify_blob(path: Path, name: str, expected: str | None) -> None:
    """Compare a file in the hub's cache with its checksum; a wrong one is removed, and CourseError raised."""
    blob = path.resolve().name  # the hub's cache calls a large file by its sha256
    expected = expected or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    if expected and not mirror.has_digest(path, expected):
        found = mirror.sha256(path)
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CourseError(
            f"{name} from the hub: expected sha256 {expected[:12]}…, found {found[:12]}…:"
            " the file was removed, run it again or set COURSE_MIRROR"
        )


def from_mirror(kind: str, repo: str, filename: str) -> Found | None:
    """The file in the mirror, verified; None without a mirror, or where the mirror never had it."""
    path = mirror.look_up(kind, repo, filename)
    return Found(path, "mirror") if path else None


def from_hub(kind: str, repo: str, filename: str) -> Found:
    """The file on the hub, or in the hub's cache on this machine.

    Raises NotAvailable when it cannot be had, CourseError for a pickle or a wrong checksum.
    """
    if is_pickle(filename):
        raise CourseError(f"{repo}/{filename}: expected safetensors, found a pickle, which may run code: not loaded")
    if (kind, repo) not in PINNED:
        raise NotAvailable(f"{repo}/{filename}: the course pins no revision of it on the hub")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    pin = PINNED[kind, repo]
    where = {
        "repo_type": kind.removesuffix("s"),
        "revision": pin.revision,
        "cache_dir": os.environ.get("HF_HUB_CACHE"),
    }
    cached = try_to_load_from_cache(repo, filename, **where)
    if isinstance(cached, str):
        path = Path(cached)
    else:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if reason := unreachable(endpoint):
            raise NotAvailable(f"{repo}/{filename}: {reason}")
        try:
            path = Path(hf_hub_download(repo, filename, endpoint=endpoint, **where))
        except Exception as error:  # its kinds differ between versions of huggingface_hub
            raise NotAvailable(f"{repo}/{filename}: not delivered, {first_line(error)}") from error
    verify_blob(path, f"{repo}/{filename}", pin.sha256.get(filename))
    return Found(path, "hub")


def fetch(kind: str, repo: str, filename: str) -> Found:
    """One file, from the mirror or else from the network. `kind` is "datasets", "models" or "tiktoken".

    Raises NotAvailable when neither has it, CourseError when one has it wrong.
    """
    from_network = _from_tiktoken if kind == "tiktoken" else from_hub
    return from_mirror(kind, repo, filename) or from_network(kind, repo, filename)


def _from_tiktoken(kind: str, repo: str, filename: str) -> Found:
    """A file of GPT-2's tokenizer, out of the cache where tiktoken keeps what it has downloaded."""
    cache = (
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    )
    path = Path(cache) / filename
    if filename in GPT2_SHA256 and not (path.is_file() and mirror.has_digest(path, GPT2_SHA256[filename])):
        if reason := unreachable(GPT2_URL):
            raise NotAvailable(f"tokenizer gpt2: {reason}")
        try:
            tiktoken.registry.ENCODINGS.pop("gpt2", None)  # it would not look at its files again
            tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise NotAvailable(f"tokenizer gpt2: not delivered, {first_line(error)}") from error
    if not path.is_file():
        raise NotAvailable(f"tiktoken/{filename}: not among tiktoken's files")
    return Found(path, "hub")


def model(path_or_repo: str | Path, weights: bool = True) -> Path:
    """A model's folder of Hugging Face files, or its `.gguf` file, on this machine: see `utils/models.py`.

    Without `weights`, at least settings and tokenizer. Raises NotAvailable when no source has it, CourseError when one
    has it wrong or a path leads nowhere.
    """
    from utils.hf import hub  # which itself looks in here

    return hub.model(path_or_repo, weights)


def tokenizer(name: str | Path) -> "tiktoken.Encoding | chat.Tokenizer":
    """A tokenizer by name: "stories2048", kept in the package; "gpt2", from the mirror or the network; a model's own.

    Raises NotAvailable when it is in no source, CourseError for any other name.
    """
    if name == "stories2048":
        from utils.data import tokenizer as own

        return own.encoding(own.load(Path(__file__).parent / "assets" / "stories2048.tiktoken"), name)
    if name != "gpt2":
        if "/" not in str(name) and not Path(name).exists():
            raise CourseError(
                f"tokenizer: expected stories2048, gpt2, a model's path or its repository (owner/name), found {name!r}"
            )
        from utils.hf import chat, gguf

        path = model(name, weights=False)
        if path.is_file():
            return chat.Tokenizer(gguf.read(path).tokenizer_files(), str(name))
        return chat.Tokenizer.from_folder(path)
    found = [from_mirror("tiktoken", "", filename) for filename in GPT2_SHA256]
    if not all(found):  # both from one place: tiktoken looks into one folder
        found = [_from_tiktoken("tiktoken", "", filename) for filename in GPT2_SHA256]
    for file in found:
        # tiktoken deletes a file of its cache that has another checksum than it expects: look before it does.
        if not mirror.has_digest(file.path, GPT2_SHA256[file.path.name]):
            raise CourseError(f"{file.source} file tiktoken/{file.path.name}: is not GPT-2's: fill the mirror again")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(found[0].path.parent)
    try:
        encoding = tiktoken.get_encoding("gpt2")
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    used(
        "tokenizer gpt2",
        "mirror" if found[0].source == "mirror" else "OpenAI's file server, through tiktoken",
    )
    return encoding


if __name__ == "__main__":
    raise SystemExit(mirror.main())
