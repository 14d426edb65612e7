"""Pairs of .md and .ipynb: an edit on either side reaches the other, a conflict stops."""

import json
import os

import nbformat
import pytest

from tests.helpers.folders import PAGE, course
from tools import pairs, sync


@pytest.fixture
def stem(tmp_path):
    stem = course(tmp_path)
    assert run(stem) == 0
    return stem


def run(stem, *flags):
    return sync.main(["--root", str(stem.parents[1]), *flags])


def md(stem):
    return stem.with_suffix(".md").read_text()


def nb(stem):
    return nbformat.read(stem.with_suffix(".ipynb"), as_version=4)


def edit_md(stem, old, new):
    assert old in md(stem)
    stem.with_suffix(".md").write_text(md(stem).replace(old, new))


def edit_nb(stem, change):
    notebook = nb(stem)
    change(notebook)
    nbformat.write(notebook, stem.with_suffix(".ipynb"))


def record_outputs(stem):
    """As if the notebook had been run: every code cell prints its number."""

    def change(notebook):
        for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
            cell.outputs = [nbformat.v4.new_output("stream", text=f"output {number}\n")]
            cell.execution_count = number + 1
        notebook.metadata["course"]["provenance"] = {"device": "a test"}

    edit_nb(stem, change)


def outputs(stem):
    return [
        c.outputs[0].text if c.outputs else None for c in nb(stem).cells if c.cell_type == "code"
    ]


def snapshot(stem):
    return [stem.with_suffix(s).read_bytes() for s in (".md", ".ipynb")]


def test_the_first_sync_makes_the_notebook_and_stamps_the_bootstrap_cell(stem):
    settings = pairs.settings(stem.parents[1])
    cell = next(c for c in nb(stem).cells if pairs.has_tag(c, "bootstrap"))
    assert cell.source == sync.bootstrap_source(settings)
    assert settings.repository in cell.source and settings.revision in cell.source
    assert "@" not in cell.source
    assert sync.bootstrap_source(settings) in md(stem)
    assert nb(stem).metadata["course"]["synced"] == pairs.content_hash(nb(stem))


def test_a_second_sync_changes_nothing(stem, capsys):
    before = snapshot(stem)
    capsys.readouterr()
    assert run(stem) == 0 and run(stem, "--check") == 0
    assert snapshot(stem) == before
    assert capsys.readouterr().out == ""


def test_the_rest_of_the_md_stays_as_its_author_wrote_it(stem):
    settings = pairs.settings(stem.parents[1])
    stamped = PAGE.replace(
        ":tags: [bootstrap, hide-input]\n",
        ":tags: [bootstrap, hide-input]\n" + sync.bootstrap_source(settings) + "\n",
    )
    assert md(stem) == stamped


def test_an_edit_of_text_in_the_md_keeps_every_output(stem):
    record_outputs(stem)
    edit_md(stem, "Between.", "Between, edited.")
    assert run(stem, "--check") == 1
    assert run(stem) == 0
    assert outputs(stem) == ["output 0\n", "output 1\n", "output 2\n"]
    assert any(c.source == "Between, edited." for c in nb(stem).cells)
    assert nb(stem).metadata["course"]["provenance"] == {"device": "a test"}


def test_an_edit_of_code_drops_that_cell_s_output_alone_and_keeps_all_ids(stem):
    record_outputs(stem)
    ids = [c.id for c in nb(stem).cells]
    edit_md(stem, "x = 20 + 1", "x = 20 + 2")
    assert run(stem) == 0
    assert outputs(stem) == ["output 0\n", None, "output 2\n"]
    assert [c.id for c in nb(stem).cells] == ids


def test_a_cell_put_in_the_middle_moves_no_output(stem):
    record_outputs(stem)
    ids = {c.source: c.id for c in nb(stem).cells}
    edit_md(stem, "Between.", "Between.\n\n```{code-cell} ipython3\nz = 3\n```\n\nMore.")
    assert run(stem) == 0
    assert outputs(stem) == ["output 0\n", "output 1\n", None, "output 2\n"]
    assert all(c.id == ids[c.source] for c in nb(stem).cells if c.source in ids)
    assert len({c.id for c in nb(stem).cells}) == len(nb(stem).cells)


def test_an_edit_in_the_notebook_comes_back_to_the_md(stem):
    record_outputs(stem)

    def change(notebook):
        next(c for c in notebook.cells if c.source == "Between.").source = "Edited in JupyterLab."
        next(c for c in notebook.cells if "20 + 1" in c.source).source = 'x = 23\nprint("x is", x)'

    edit_nb(stem, change)
    before = md(stem)
    assert run(stem) == 0
    expected = before.replace("Between.", "Edited in JupyterLab.").replace("x = 20 + 1", "x = 23")
    assert md(stem) == expected  # and the author's way of writing the options is still there
    assert run(stem, "--check") == 0


def test_cells_added_in_jupyterlab_reach_the_md_with_their_tags(stem):
    def change(notebook):
        new = [
            nbformat.v4.new_markdown_cell("One."),
            nbformat.v4.new_markdown_cell("Two."),
            nbformat.v4.new_code_cell(
                "1 + 1", metadata={"tags": ["hide-output"], "editable": True}
            ),
            nbformat.v4.new_code_cell(""),
        ]
        notebook.cells += new

    edit_nb(stem, change)
    assert run(stem) == 0
    assert md(stem).endswith(
        "The end.\n\n+++\n\nOne.\n\n+++\n\nTwo.\n\n```{code-cell} ipython3\n:tags: [hide-output]\n1 + 1\n```\n\n"
        "```{code-cell} ipython3\n\n```\n"
    ) or md(stem).endswith("1 + 1\n```\n\n```{code-cell} ipython3\n```\n"), md(stem)[-300:]
    assert pairs.content_hash(pairs.read_md(stem.with_suffix(".md"))) == pairs.content_hash(
        nb(stem)
    )


def test_a_conflict_stops_names_the_file_and_writes_nothing(stem, capsys):
    edit_md(stem, "Between.", "Edited here.")
    edit_nb(stem, lambda n: n.cells[-1].update(source="Edited there."))
    before = snapshot(stem)
    assert run(stem) == 2
    message = capsys.readouterr().err
    assert "01_page" in message and "both changed" in message and "--take" in message
    assert snapshot(stem) == before


@pytest.mark.parametrize("side, kept", [("md", "Edited here."), ("ipynb", "Edited there.")])
def test_a_conflict_is_settled_by_taking_a_side(stem, side, kept):
    edit_md(stem, "Between.", "Edited here.")
    edit_nb(stem, lambda n: n.cells[-1].update(source="Edited there."))
    assert run(stem, "--take", side) == 0
    assert kept in md(stem) and any(kept == c.source for c in nb(stem).cells)
    assert run(stem, "--check") == 0


def test_the_same_edit_on_both_sides_is_no_conflict(stem):
    edit_md(stem, "Between.", "Same.")
    edit_nb(
        stem, lambda n: next(c for c in n.cells if c.source == "Between.").update(source="Same.")
    )
    assert run(stem) == 0
    assert run(stem, "--check") == 0


@pytest.mark.parametrize("newer", [".md", ".ipynb"])
def test_file_times_decide_nothing(stem, newer):
    edit_md(stem, "Between.", "Edited here.")
    for suffix in (".md", ".ipynb"):
        os.utime(stem.with_suffix(suffix), (2e9 if suffix == newer else 1e9,) * 2)
    assert run(stem) == 0
    assert "Edited here." in md(stem) and any(c.source == "Edited here." for c in nb(stem).cells)


def test_a_lost_side_is_made_again_from_the_other(stem):
    before = md(stem)
    stem.with_suffix(".md").unlink()
    assert run(stem) == 0
    assert pairs.content(pairs.parse_md(before)) == pairs.content(
        pairs.read_md(stem.with_suffix(".md"))
    )


@pytest.mark.parametrize("text", ["", '{"cells": [', "<<<<<<< HEAD\n{}\n", "[]"])
def test_a_broken_notebook_is_named_and_left_alone(stem, capsys, text):
    stem.with_suffix(".ipynb").write_text(text)
    before = snapshot(stem)
    assert run(stem) == 2
    assert "01_page.ipynb" in capsys.readouterr().err
    assert snapshot(stem) == before


def test_bad_yaml_in_a_cell_s_options_is_named(stem, capsys):
    edit_md(stem, ":mystnb: {image: {alt:", ":mystnb: {image: [alt:")
    assert run(stem) == 2
    assert "01_page.md" in capsys.readouterr().err


def test_text_that_markdown_cannot_hold_is_refused(stem, capsys):
    edit_nb(stem, lambda n: n.cells[-1].update(source="Two\n\n+++\n\ncells in one."))
    before = snapshot(stem)
    assert run(stem) == 2
    assert "cannot be written as Markdown" in capsys.readouterr().err
    assert snapshot(stem) == before


def test_what_editors_write_is_not_content(stem):
    def change(notebook):
        notebook.cells[-1].metadata.update(editable=True, slideshow={"slide_type": ""})
        notebook.metadata["widgets"] = {}
        notebook.metadata["language_info"]["version"] = "3.99"

    edit_nb(stem, change)
    before = md(stem)
    assert run(stem) == 0
    assert md(stem) == before


def test_hide_output_is_folded_in_jupyterlab_too(stem):
    edit_md(stem, "```{code-cell} ipython3\nx", "```{code-cell} ipython3\n:tags: [hide-output]\nx")
    assert run(stem) == 0
    cell = next(c for c in nb(stem).cells if c.source.startswith("x ="))
    assert (
        cell.metadata["jupyter"] == {"outputs_hidden": True} and cell.metadata["collapsed"] is True
    )
    assert "outputs_hidden" not in md(stem)


def test_a_new_release_stamps_both_sides_and_keeps_the_outputs(stem):
    record_outputs(stem)
    assert run(stem) == 0
    code = pairs.code_hash(nb(stem))
    project = stem.parents[1] / "pyproject.toml"
    project.write_text(project.read_text().replace('revision = "', 'revision = "v9.9-'))
    assert run(stem, "--check") == 1
    assert run(stem) == 0
    assert "v9.9-" in md(stem) and "v9.9-" in json.dumps(nb(stem))
    assert outputs(stem) == ["output 0\n", "output 1\n", "output 2\n"]
    assert pairs.code_hash(nb(stem)) == code


def test_the_address_is_stamped_outside_the_notebooks(stem):
    root = stem.parents[1]
    (root / "_config.yml").write_text(
        'repository:\n  url: "https://github.com/old/name"\n  branch: "v0"\n'
    )
    (root / "README.md").write_text(
        "[Colab](https://colab.research.google.com/github/old/name/blob/v0/chapters/01_page.ipynb)\n"
        "git clone https://github.com/old/name\n[jax](https://github.com/jax-ml/jax)\n"
    )
    assert run(stem, "--check") == 1
    assert run(stem) == 0
    settings = pairs.settings(root)
    owner = settings.repository.removeprefix("https://github.com/")
    config, readme = (root / "_config.yml").read_text(), (root / "README.md").read_text()
    assert f'url: "{settings.repository}"' in config and f'branch: "{settings.revision}"' in config
    assert f"github/{owner}/blob/{settings.revision}/chapters/01_page.ipynb" in readme
    assert f"git clone {settings.repository}\n" in readme
    assert "https://github.com/jax-ml/jax" in readme and "old" not in readme + config


def test_the_map_in_the_readme_shows_links_and_recorded_minutes(stem):
    readme = stem.parents[1] / "README.md"
    row = (
        "| 01 Page | x | 90 min | at most 3 min | not recorded yet |\n| 02 Next | x | 1 | 2 | 3 |\n"
    )
    readme.write_text(f"<!-- chapters: begin -->\n{row}<!-- chapters: end -->\n")

    def change(notebook):
        notebook.metadata["course"]["provenance"] = {
            "profile": "cpu",
            "seconds": 94.6,
            "device": "A CPU",
        }
        notebook.metadata["course"]["runs"] = [
            {"profile": "large", "seconds": 41.2, "device": "A GPU"}
        ]

    edit_nb(stem, change)
    assert run(stem) == 0
    assert readme.read_text().splitlines()[1:3] == [
        "| 01 [Page](chapters/01_page.ipynb) | x | 90 min | 1 min 35 s | 41 s (A GPU, `large`) |",
        "| 02 Next | x | 1 | 2 | 3 |",
    ]
    before = readme.read_text()
    assert run(stem) == 0 and readme.read_text() == before


def test_two_people_get_the_same_notebook_from_the_same_text(tmp_path):
    first, second = course(tmp_path / "a"), course(tmp_path / "b")
    assert run(first) == 0 and run(second) == 0
    assert snapshot(first) == snapshot(second)


def test_an_unknown_chapter_is_refused(stem, capsys):
    assert run(stem, "77") == 2
    assert "77" in capsys.readouterr().err
