"""One dial for hardware: which of four sizes this machine can carry.

Every chapter states its sizes once, as a table of profile -> numbers, and asks `choose` for the row
of this machine:

    smoke   seconds, for tests                  cpu     a laptop or two cores, minutes a chapter
    colab   one accelerator of about 15 GB      large   40 GB of accelerator memory and more, all devices together

`COURSE_PROFILE` sets the dial. Unset, it is found from the accelerators' memory, without importing
jax: once jax has started, settings such as the number of simulated devices can no longer be
changed.
"""

import glob
import importlib.util
import os
import re
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

from utils import CourseError

PROFILES = ("smoke", "cpu", "colab", "large")
GB = 1e9
COLAB_FROM, LARGE_FROM = 12 * GB, 40 * GB  # total bytes of accelerator memory

# Memory of one TPU chip, and the chips one unit of the slice's name counts: "v2-8" counts cores,
# two to a chip, "v5litepod-8" counts chips. Source: Google Cloud's pages on each TPU version.
TPU_CHIP = {
    "v2": (16 * GB, 0.5),
    "v3": (32 * GB, 0.5),
    "v4": (32 * GB, 0.5),
    "v5p": (95 * GB, 0.5),
    "v5e": (16 * GB, 1),
    "v5litepod": (16 * GB, 1),
    "v6e": (32 * GB, 1),
}


def gpu_memory() -> float:
    """Bytes of memory of all NVIDIA GPUs this process may use; 0 without any."""
    if not shutil.which("nvidia-smi"):
        return 0.0
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer is no GPU
        return 0.0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = (
        None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    )
    total = 0.0
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3 or not fields[2].isdigit():  # "[N/A]" where it is the host's memory
            continue
        index, uuid, mebibytes = fields
        if allowed is None or any(
            name == index or uuid.startswith(name) for name in allowed if name
        ):
            total += int(mebibytes) * 2**20
    return total


def tpu_memory() -> float:
    """Bytes of memory of the TPU slice this host belongs to; 0 without a TPU."""
    named = re.fullmatch(r"(v\d+[a-z]*)-(\d+)", os.environ.get("TPU_ACCELERATOR_TYPE", ""))
    if named and named[1] in TPU_CHIP:
        bytes_of_chip, chips_per_unit = TPU_CHIP[named[1]]
        return max(1, int(named[2]) * chips_per_unit) * bytes_of_chip
    devices = glob.glob("/dev/accel[0-9]*")
    if not devices and importlib.util.find_spec("libtpu"):  # vfio alone may be any other device
        devices = glob.glob("/dev/vfio/[0-9]*")
    return len(devices) * 16 * GB  # no name given: count on the smallest chip


def _has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))


def detect() -> tuple[str, str]:
    """The profile this machine can carry, and the reason in words."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return "cpu", "JAX_PLATFORMS=cpu"
    tpu, gpu = tpu_memory(), gpu_memory()
    if gpu > tpu and not _has_cuda_plugin():
        return "cpu", 'jax has no CUDA plugin for the GPU here: pip install "jax[cuda12]"'
    memory, kind = max((tpu, "TPU"), (gpu, "GPU"))
    if memory == 0:
        return "cpu", "no accelerator found"
    size = "large" if memory >= LARGE_FROM else "colab" if memory >= COLAB_FROM else "cpu"
    return size, f"{memory / GB:.0f} GB of {kind} memory found"


def _current() -> tuple[str, str]:
    name = os.environ.get("COURSE_PROFILE", "")
    if not name:
        return detect()
    if name not in PROFILES:
        raise CourseError(
            f"COURSE_PROFILE: expected one of {', '.join(PROFILES)}, found {name!r}: set one of the four, or unset it"
        )
    return name, "set by COURSE_PROFILE"


def current() -> str:
    """The profile in force: `COURSE_PROFILE` if set, else what was detected.

    Raises CourseError when `COURSE_PROFILE` is none of the four.
    """
    return _current()[0]


def small() -> bool:
    """Whether the profile in force is one for a CPU: smoke or cpu."""
    return current() in ("smoke", "cpu")


def choose(sizes: dict[str, dict[str, Any]]) -> SimpleNamespace:
    """The row of `sizes` for this machine, as attributes; prints the profile, its reason and the row.

    `sizes` has one row for each of the four profiles, all with the same names. Raises CourseError
    otherwise.
    """
    name, reason = _current()
    if set(sizes) != set(PROFILES):
        raise CourseError(
            f"sizes: expected rows {', '.join(PROFILES)}, found {', '.join(sizes)}: write all four"
        )
    for other, row in sizes.items():
        if set(row) != set(sizes[name]):
            odd = ", ".join(sorted(set(row) ^ set(sizes[name])))
            raise CourseError(
                f"sizes: rows {name} and {other} differ in {odd}: give each row the same names"
            )
    row = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in sizes[name].items()
    )
    print(f"profile {name} ({reason}): {row}")
    return SimpleNamespace(**sizes[name])
