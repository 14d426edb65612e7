"""The repository's folders, and small copies of its skeleton for tests of the tools."""

import shutil
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
    """A folder with pyproject.toml, `utils` as an almost empty package, and one chapter. Returns the chapter's stem."""
    (folder / "chapters").mkdir(parents=True)
    (folder / "utils" / "course").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "utils" / "__init__.py", folder / "utils")
    shutil.copy(ROOT / "utils" / "course" / "colab.py", folder / "utils" / "course")
    (folder / "requirements-colab.txt").write_text("packaging>=20\n")
    stem = folder / "chapters" / name
    stem.with_suffix(".md").write_text(page)
    return stem
