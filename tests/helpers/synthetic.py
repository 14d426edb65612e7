"""A chapter in miniature, with checks and wrong answers, to test the machinery itself on."""

from pathlib import Path

EXERCISES = """
> **Exercise 99.1**, warm-up, 5 minutes. Write `bits(nats)`.

```{code-cell} ipython3
:tags: [exercise]
import numpy as np

def bits(nats: float) -> float:
    \"\"\"Nats to bits.\"\"\"
    ...

check("99.1", bits)
```

<details>
<summary>Hint</summary>

One bit is $\\ln 2$ nats.

</details>

<details>
<summary>Solution</summary>

```python
def bits(nats):
    shrunk_by_ln_two = nats / np.log(2)
    return shrunk_by_ln_two
```

A bit is smaller than a nat, so there are more of them.

</details>

> **Exercise 99.2**, core, 10 minutes. How many pairs are in a causal mask over four positions?

```{code-cell} ipython3
:tags: [exercise]
pairs = ...

check("99.2", pairs)
```

<details>
<summary>Hint</summary>

Position t sees t + 1 positions.

</details>

<details>
<summary>Solution</summary>

```python
pairs = sum(t + 1 for t in range(4))
```

</details>
"""

CHAPTER = (
    """---
jupytext:
  formats: ipynb,md:myst
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, name: python3}
---

# A small chapter

```{code-cell} ipython3
:tags: [bootstrap]
import sys
```

```{code-cell} ipython3
import matplotlib.pyplot as plt
import small_checks
from utils.course.checks import check
```

> **Predict.** What is one plus one?

```{code-cell} ipython3
:tags: [hide-output]
:mystnb: {image: {alt: "A line that rises."}}
plt.plot([1, 2])
print(1 + 1)
```
"""
    + EXERCISES
    + """
The chapter goes on with the stub.

```{code-cell} ipython3
assert bits(1.0) is None and pairs is ...
```
"""
)

CHECKS = """
from utils.course.checks import call, exercise, expect_close

@exercise("99.1")
def bits(learner):
    found = call(learner, 2.0)
    expect_close(found, 2.885390, "the bits", unlike={
        "nats-not-bits": (2.0, "this is still in nats", "one bit is ln 2 nats"),
        "multiplied": (1.386294, "bits are smaller than nats, so there must be more of them"),
    })

@exercise("99.2")
def pairs(learner):
    expect_close(learner, 10, "the number of pairs", unlike={
        "every-pair": (16, "this counts the future too", "the mask is causal"),
        "own-position-left-out": (6, "a position sees itself"),
    })
"""

WRONG = {
    "99.1": [
        ("nats-not-bits", "def bits(nats):\n    return nats"),
        ("multiplied", "def bits(nats):\n    return nats * np.log(2)"),
    ],
    "99.2": [("every-pair", "pairs = 4 * 4"), ("own-position-left-out", "pairs = 4 * 3 // 2")],
}


def write(folder: Path, chapter: str = CHAPTER) -> Path:
    """Write the chapter and its checks into a folder; returns the chapter's path."""
    (folder / "small_checks.py").write_text(CHECKS)
    path = folder / "99_small.md"
    path.write_text(chapter)
    return path
