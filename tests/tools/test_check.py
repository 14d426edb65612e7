"""`make check` finds what it promises to find: each fault is put into a good folder, and named."""

import subprocess

import nbformat
import pytest

from tests.helpers.folders import PAGE, course
from tools import check, sync

EXERCISE = """
> **Exercise 1.1**, core, 5 minutes. Do it.

```{code-cell} ipython3
:tags: [exercise]
def f(): ...
check("1.1", f)
```

<details>
<summary>Hint</summary>

Think.

</details>

<details>
<summary>Solution</summary>

```python
def f(): return 1
```

</details>
"""


@pytest.fixture
def root(tmp_path):
    course(
        tmp_path, PAGE.replace("The end.", EXERCISE + "\nThe end, [above](01_page.ipynb#second).")
    )
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    assert sync.main(["--root", str(tmp_path)]) == 0
    return tmp_path


def problems(root, function):
    check.anchors.cache_clear()
    return "\n".join(function(root))


def edit(root, old, new, name="chapters/01_page.md", synced=True):
    path = root / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    if synced:
        assert sync.main(["--root", str(root)]) == 0


def change(root, edit_notebook):
    path = root / "chapters" / "01_page.ipynb"
    nb = nbformat.read(path, as_version=4)
    edit_notebook(nb)
    nbformat.write(nb, path)


def test_a_good_folder_has_no_problems_but_its_missing_outputs(root):
    for function in check.CHECKS:
        if function is not check.outputs_current:
            assert problems(root, function) == "", function.__name__
    assert "no recorded outputs" in problems(root, check.outputs_current)


def test_unused_imports_and_bad_format(root):
    (root / "utils" / "bad.py").write_text("import os\nx = {  'a':1 }\n")
    printed = problems(root, check.ruff)
    assert "bad.py:1:8: F401" in printed and "ruff format" in printed


def test_a_pair_out_of_step(root):
    edit(root, "Between.", "Edited.", synced=False)
    assert "not in step" in problems(root, check.in_step)


def test_a_conflict(root):
    edit(root, "Between.", "Edited.", synced=False)
    change(root, lambda nb: nb.cells[-1].update(source="There."))
    assert "both changed" in problems(root, check.in_step)


def test_a_bootstrap_cell_that_was_edited_or_moved(root):
    edit(root, "Finds the course's package", "Finds my package", synced=False)
    assert "bootstrap cell differs" in problems(root, check.in_step)
    edit(root, "# A page\n", "# A page\n\n```{code-cell} ipython3\n0\n```\n")
    assert "first code cell is not the bootstrap" in problems(root, check.in_step)


def test_another_address(root):
    (root / "README.md").write_text("git clone https://github.com/somebody/else\n")
    assert "README.md" in problems(root, check.in_step)


@pytest.mark.parametrize(
    "fence",
    ["```{note}\nx\n```", ":::{tip}\nx\n:::", "````{exercise}\nx\n````", "~~~{figure} x\n~~~"],
)
def test_a_raw_directive(root, fence):
    edit(root, "Between.", fence)
    printed = problems(root, check.directives)
    assert "shows as code in Colab" in printed and "01_page.md:" in printed


def test_a_directive_shown_as_an_example_is_none(root):
    edit(root, "Between.", "````text\n```{note}\nx\n```\n````")
    assert problems(root, check.directives) == ""


def test_outputs_of_other_code(root):
    def record(nb):
        nb.metadata["course"]["provenance"] = {"code": check.pairs.code_hash(nb)}

    change(root, record)
    assert problems(root, check.outputs_current) == ""
    edit(root, "Between.", "Text may change.")
    assert problems(root, check.outputs_current) == ""
    edit(root, "x = 20 + 1", "x = 20 + 2")
    assert "code changed" in problems(root, check.outputs_current)


def test_a_page_older_than_the_package(root):
    def record(nb):
        nb.metadata["course"]["provenance"] = {"utils": {"utils": "0" * 16}}

    change(root, record)
    assert "older than the package (utils changed since)" in problems(
        root, check.older_than_package
    )


def test_a_figure_without_words(root):
    def draw(nb):
        cell = next(c for c in nb.cells if "20 + 1" in c.source)
        cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": "aGk="})]

    change(root, draw)
    assert "without alt text" in problems(root, check.figures)
    edit(root, "Between.", "![](https://example.org/x.png)")
    assert "has no alt text" in problems(root, check.figures)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("<summary>Hint</summary>", "<summary>Help</summary>", "has no hint"),
        ("<summary>Solution</summary>", "<summary>Answer</summary>", "has no solution"),
        ('check("1.1", f)', "f()", "its last line is not check"),
    ],
)
def test_an_exercise_that_lacks_a_part(root, old, new, words):
    edit(root, old, new)
    assert words in problems(root, check.exercises)


def test_an_edition_without_solutions_needs_none(root):
    edit(root, "<summary>Solution</summary>", "<summary>Answer</summary>")
    (root / ".student-edition.json").write_text("{}")
    assert problems(root, check.exercises) == ""


@pytest.mark.parametrize(
    "link, words",
    [
        ("[a](02_next.ipynb)", "no such file"),
        ("[a](01_page.ipynb#third)", "no such heading"),
        ("[a](#third)", "no such heading"),
        ("[a](../book/none.md)", "no such file"),
        ("[a](01_page.md)", "link to the .ipynb"),
        ('<a href="../book/none.md">a</a>', "no such file"),
    ],
)
def test_a_link_that_leads_nowhere(root, link, words):
    edit(root, "Between.", link)
    printed = problems(root, check.links)
    assert words in printed and "01_page.md:" in printed


def test_links_that_lead_somewhere_or_are_code(root):
    edit(
        root,
        "Between.",
        "[a](01_page.ipynb#second) `[b](none.md)` [c](https://example.org) [d](#a-page)",
    )
    assert problems(root, check.links) == ""


def test_anchors_are_those_of_github_and_myst():
    assert (
        check.slug("Where it breaks: sixty steps, and nothing")
        == "where-it-breaks-sixty-steps-and-nothing"
    )
    assert check.slug("`jit`, and *tracing*") == "jit-and-tracing"


def test_a_path_of_one_machine(root):
    edit(root, "Between.", "Open /home/somebody/course now.")
    printed = problems(root, check.machine_paths)
    assert "/home/somebody" in printed and "01_page.md" in printed and "01_page.ipynb" in printed


def test_the_command_counts_problems_and_says_so(root, capsys):
    assert check.main(["--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "1 problems" in out
