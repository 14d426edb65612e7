"""GPT-2's tokenizer, from the mirror or through tiktoken, which downloads its two files and keeps them."""

import os
import tempfile
from pathlib import Path

import tiktoken

from utils import CourseError, first_line
from utils.hf import hub, mirror

# tiktoken caches encoder.json and vocab.bpe under the sha1 of their addresses: name -> sha256.
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SHA256 = {
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def tokenizer() -> tiktoken.Encoding:
    """GPT-2's 50,257 tokens. Raises `hub.NotAvailable` when no source has them."""
    files = [hub.from_mirror("tiktoken", "", name) for name in SHA256]
    if not all(files):  # both from one place: tiktoken looks into one folder
        files = [download(name) for name in SHA256]
    for file in files:
        # tiktoken deletes a file of its cache that has another checksum than it expects: look before.
        if not mirror.has_digest(file.path, SHA256[file.path.name]):
            where = f"{file.source} file tiktoken/{file.path.name}"
            raise CourseError(f"{where}: is not GPT-2's: fill the mirror again")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(files[0].path.parent)
    try:
        tok = tiktoken.get_encoding("gpt2")
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        os.environ |= {} if before is None else {"TIKTOKEN_CACHE_DIR": before}
    in_mirror = files[0].source == "mirror"
    hub.used("tokenizer gpt2", "mirror" if in_mirror else "OpenAI's file server, through tiktoken")
    return tok


def fetch(name: str) -> hub.File:
    """One of the two files, from the mirror or else through tiktoken."""
    return hub.from_mirror("tiktoken", "", name) or download(name)


def download(name: str) -> hub.File:
    """One of the two files, out of the cache where tiktoken keeps what it has downloaded."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = Path(cache or Path(tempfile.gettempdir()) / "data-gym-cache") / name
    digest = SHA256.get(name)
    if digest and not (path.is_file() and mirror.has_digest(path, digest)):
        if reason := hub.unreachable(URL):
            raise hub.NotAvailable(f"tokenizer gpt2: {reason}")
        try:
            tiktoken.registry.ENCODINGS.pop("gpt2", None)  # it would not look at its files again
            tiktoken.get_encoding("gpt2")
        except Exception as error:
            reason = f"not delivered, {first_line(error)}"
            raise hub.NotAvailable(f"tokenizer gpt2: {reason}") from error
    if not path.is_file():
        raise hub.NotAvailable(f"tiktoken/{name}: not among tiktoken's files")
    return hub.File(path, "hub")
