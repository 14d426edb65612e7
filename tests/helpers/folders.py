"""The repository's folders, and small copies of its skeleton for tests of the tools."""

import shutil
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One cache of compiled programs for the tests and for every process that they start.
COMPILE_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "_build" / "jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}

PAGE = """---
jupytext:
  formats: ipynb,md:myst
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, name: python3}
---

# A page

Some text with a [link](#second).

```{code-cell} ipython3
:tags: [bootstrap, hide-input]
```

## Second

```{code-cell} ipython3
x = 20 + 1
print("x is", x)
```

Between.

```{code-cell} ipython3
:mystnb: {image: {alt: "Nothing much, and a colon: here."}}
print("y is", 2 * x)
```

The end.
"""


def course(folder: Path, page: str = PAGE, name: str = "01_page") -> Path:
    """A folder with pyproject.toml, `utils` as an almost empty package, and one chapter. Returns
    the chapter's stem."""
    (folder / "chapters").mkdir(parents=True)
    (folder / "utils" / "course").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "utils" / "__init__.py", folder / "utils")
    shutil.copy(ROOT / "utils" / "course" / "colab.py", folder / "utils" / "course")
    (folder / "requirements-colab.txt").write_text("packaging>=20\n")
    stem = folder / "chapters" / name
    stem.with_suffix(".md").write_text(page)
    return stem


def wheel(folder: Path, name: str, version: str, requires=()) -> Path:
    """The smallest wheel that pip accepts: one module with a version."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    meta += "".join(f"Requires-Dist: {r}\n" for r in requires)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        z.writestr(f"{info}/METADATA", meta)
        z.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr(f"{info}/top_level.txt", f"{name}\n")
        names = z.namelist()
        z.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in [*names, f"{info}/RECORD"]))
    return path
