"""Small copies of the repository's skeleton, for tests of the tools."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

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
    (folder / "utils").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "utils" / "__init__.py", folder / "utils")
    shutil.copy(ROOT / "utils" / "hosted.py", folder / "utils")
    (folder / "requirements-colab.txt").write_text("packaging>=20\n")
    stem = folder / "chapters" / name
    stem.with_suffix(".md").write_text(page)
    return stem
