"""Build one chapter alone and look at it.

    python tests/browser/preview.py chapters/04_training.ipynb            # prints the address of the page
    python tests/browser/preview.py chapters/04_training.ipynb --shots    # and pictures at 390 and 1440 px
    python tests/browser/preview.py --site _build/html book/intro.html    # pictures of a page of a built site

The chapter is built in a temporary copy of the book, so that it need not be in _toc.yml yet.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import FLAGS, ROOT, find_chromium, served  # noqa: E402


def build(notebook: Path) -> tuple[Path, str]:
    """Build a book of one chapter. Returns the site's folder and the page's path in it."""
    folder = Path(tempfile.gettempdir()) / f"course-preview-{os.getuid()}-{notebook.stem}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "chapters").mkdir(parents=True)
    for name in ("book", "utils", "tools"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    for name in ("_config.yml", "pyproject.toml"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    toc = (ROOT / "_toc.yml").read_text("utf8")
    for other in sorted((ROOT / "chapters").glob("*.ipynb")):
        shutil.copy(other, folder / "chapters" / other.name)
    shutil.copy(notebook, folder / "chapters" / notebook.name)
    if f"chapters/{notebook.stem}\n" not in toc:
        toc += f"  - caption: Preview\n    chapters:\n      - file: chapters/{notebook.stem}\n"
    (folder / "_toc.yml").write_text(toc, "utf8")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from jupyter_book.cli.main import main; main()",
            "build",
            str(folder),
        ],
        capture_output=True,
        text=True,
    )
    log = result.stdout + result.stderr
    # `make book` fails on a warning; here it is shown, for the chapters it links to may not exist yet.
    print(*[line for line in log.splitlines() if "WARNING:" in line or "ERROR:" in line], sep="\n")
    if result.returncode != 0:
        raise SystemExit(f"the build failed; the book lies in {folder}\n{log[-2000:]}")
    return folder / "_build" / "html", f"chapters/{notebook.stem}.html"


def shots(site: Path, page_path: str, target: Path) -> list[Path]:
    """Full-page pictures at two widths in two themes."""
    from playwright.sync_api import sync_playwright

    made = []
    with served(site) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        for width, height in ((390, 844), (1440, 900)):
            for theme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=theme
                )
                page = context.new_page()
                page.goto(f"{url}/{page_path}")
                page.wait_for_load_state("networkidle")
                file = target / f"{Path(page_path).stem}-{width}-{theme}.png"
                page.screenshot(path=str(file), full_page=True)
                made.append(file)
                context.close()
        browser.close()
    return made


def main() -> None:
    """Read the arguments, build, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", help="a notebook, or with --site a page of that site")
    parser.add_argument("--site", type=Path, help="an already built site")
    parser.add_argument("--shots", action="store_true", help="take pictures")
    options = parser.parse_args()
    if options.site:
        target = Path(tempfile.mkdtemp(prefix="course-shots-"))
        print(*shots(options.site, options.page, target), sep="\n")
        return
    site, page_path = build(Path(options.page).resolve())
    print(site / page_path)
    if options.shots:
        print(*shots(site, page_path, site.parent), sep="\n")


if __name__ == "__main__":
    main()
