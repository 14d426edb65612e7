"""The house of `utils/`: which room may use which, no circle, and how large it may be."""

import re

import pytest

from tests.helpers.folders import ROOT
from tools import imports

# From the ground up: a module may import from its own layer and from those before it. So nobody but
# pages and tests imports `course`, and nobody but they, `__main__` and `course` imports the
# commands. (`__main__` starts one command that is the course's own, `mirror`, by its name.)
LAYERS = ("kernels", "ground floor", "hf", "data", "evaluation", "commands", "course")
MOST_LINES = {"ground floor": 2900, "transformer.py": 350, "without course": 7000}
# On the ground floor, `__init__` and `__main__` among them: room for deepseek, quantize and grpo.
MOST_FILES = 17

FILES = imports.modules()
EDGES = imports.graph()


def layer(module: str) -> str:
    parts = module.split(".")
    is_room = len(parts) > 2 or FILES[module].name == "__init__.py"
    return parts[1] if len(parts) > 1 and is_room else "ground floor"


def lines(path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_every_module_is_in_a_known_room():
    assert len(FILES) > 20 and {layer(name) for name in FILES} == set(LAYERS)


def test_no_import_runs_in_a_circle():
    assert " -> ".join(imports.circle(EDGES)) == ""


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_imported_from_a_room_above(name):
    own = layer(name)
    allowed = set(LAYERS[: LAYERS.index(own) + 1])
    if name == "utils.__main__":
        allowed.add("commands")
    others = EDGES[name] - {"utils"}  # the course's name and its error, for every room
    above = {other: layer(other) for other in others if layer(other) not in allowed}
    assert not above, f"{name}, in {own}, imports {above}"


def test_nothing_imports_the_command_line():
    assert not [name for name, others in EDGES.items() if "utils.__main__" in others]
    assert EDGES["utils"] == set(), "utils/__init__.py is imported by every room"


def test_the_ground_floor_is_small():
    files = [path for path in FILES.values() if path.parent == ROOT / "utils"]
    assert len(files) <= MOST_FILES, sorted(path.name for path in files)
    assert sum(map(lines, files)) <= MOST_LINES["ground floor"]


def test_the_package_is_small():
    files = [path for name, path in FILES.items() if layer(name) != "course"]
    assert sum(map(lines, files)) <= MOST_LINES["without course"]


def test_the_models_file_holds_the_model_alone():
    text = (ROOT / "utils" / "transformer.py").read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES["transformer.py"]
    words = re.compile(r"(?i)(?<![a-z])(cpu|tpu|gpu|platform)s?(?![a-z])")
    assert [line for line in text.splitlines() if words.search(line)] == []


# ---------------------------------------------------------------------------------- reading imports


def package(folder, **files):
    """A package with these files; `room_a` is `room/a.py`. Returns its graph."""
    for name, text in files.items():
        path = folder / "utils" / f"{name.replace('room_', 'room/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports.graph(folder)


def test_every_kind_of_import_is_seen(tmp_path):
    package(
        tmp_path,
        __init__="",
        a="import numpy\nimport utils.b\nfrom utils import c, CourseError\n"
        "from utils.room import d as e\n",
        b="def f():\n    from utils.c import g\n",
        c="import importlib\nh = importlib.import_module('utils.room.d')\n",
        room_d="from .. import b\nfrom . import e\nfrom .e import x\n",
        room_e="",
    )
    edges = imports.graph(tmp_path)
    assert edges == {
        "utils": set(),
        "utils.a": {"utils", "utils.b", "utils.c", "utils.room.d"},
        "utils.b": {"utils.c"},
        "utils.c": {"utils.room.d"},
        "utils.room.d": {"utils.b", "utils.room.e"},
        "utils.room.e": set(),
    }
    assert imports.circle(edges) == ["utils.b", "utils.c", "utils.room.d", "utils.b"]
    assert imports.reached({"utils.c"}, edges) == set(edges) - {"utils.a"}


def test_without_a_circle_there_is_none(tmp_path):
    edges = package(tmp_path, a="from utils import b, c", b="from utils import c", c="")
    assert imports.circle(edges) == []
