"""The chapters that a pull request runs: those that its files can have changed."""

import json
import subprocess
import sys

import pytest

from tests.helpers.folders import ROOT
from tools import changed_chapters

PAGE = "# A page\n\n```{code-cell} ipython3\n:tags: [x]\n%s\n```\n"
FILES = {
    "utils/__init__.py": "",
    "utils/a.py": "from utils import b\n",
    "utils/b.py": "",
    "utils/room/c.py": "def f():\n    from utils import a\n",
    "utils/course/checks/__init__.py": "",
    "utils/course/checks/chapter_02.py": "from utils import b\n",
    "chapters/01_one.md": PAGE % "from utils.room import c",
    "chapters/02_two.md": PAGE % "%timeit 1\nimport numpy",
    "chapters/03_three.md": PAGE % "from utils import a",
    "chapters/01_one.ipynb": json.dumps({"metadata": {"course": {"provenance": {"seconds": 100}}}}),
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "changed, expected",
    [
        (["README.md"], ""),
        (["chapters/02_two.ipynb", "book/intro.md"], "02"),
        (["tests/course/wrong_answers/chapter_03.py"], "03"),
        (["utils/room/c.py"], "01"),
        (["utils/a.py"], "01 03"),
        (["utils/b.py"], "01 02 03"),
        (["utils/room/assets/words.txt"], "01 02 03"),
        (["constraints.txt"], "01 02 03"),
    ],
)
def test_what_changed_chooses_the_chapters(root, changed, expected):
    assert changed_chapters.chosen(changed, root) == expected.split()


def test_shards_take_about_equally_long(root):
    assert changed_chapters.shards(["01", "02", "03"], 2, root) == ["01", "02 03"]
    assert changed_chapters.shards(["02"], 3, root) == ["02"]
    assert changed_chapters.shards([], 3, root) == []


def test_the_patterns_name_files_that_exist():
    for pattern in changed_chapters.EVERYWHERE + changed_chapters.own_files("07"):
        assert list(ROOT.glob(pattern)), pattern


def test_the_command_without_a_base_chooses_everything():
    command = [sys.executable, "tools/changed_chapters.py", "0" * 40, "--shards", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    numbers = sorted(number for shard in json.loads(done.stdout) for number in shard.split())
    assert numbers == [path.name[:2] for path in sorted((ROOT / "chapters").glob("*.md"))]
    assert "all of them" in done.stderr
