"""Which modules of the package import which, read from their syntax trees. Nothing is run.

Every import counts, also one inside a function or under `if TYPE_CHECKING`: what a file names, it
depends on. Standard library only: `tests/tools/test_house.py` and `tools/changed_chapters.py` stand
on it.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "utils"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module of the package; a package's name stands for its
    `__init__.py`."""
    files = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(source: str, known: set[str], module: str = "", is_package: bool = False) -> set[str]:
    """The modules among `known` that this Python imports. `module` is its own name, for relative
    imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                names.add(whole if whole in known else base)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names.update(word.value for word in node.args if isinstance(word, ast.Constant))
    return {name for name in names if name in known and name != module}


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    files = modules(root)
    return {
        name: imported(path.read_text("utf-8"), set(files), name, path.name == "__init__.py")
        for name, path in files.items()
    }


def reached(start: set[str], edges: dict[str, set[str]]) -> set[str]:
    """Everything that is imported when `start` is: the modules themselves, what they import, and
    the packages around."""
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in edges:
            continue
        seen.add(name)
        waiting += [*edges[name], *([name.rpartition(".")[0]] if "." in name else [])]
    return seen


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first again at the end; [] where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if loop := visit(other, [*path, name]):
                return loop
        done.add(name)
        return []

    return next((loop for name in sorted(edges) if (loop := visit(name, []))), [])
