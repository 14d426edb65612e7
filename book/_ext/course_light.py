"""Pages that weigh little: the theme brings 1.5 MB of icons, of which a page shows a dozen.

After the build, the script that holds every icon is dropped (the theme's icon font draws the same
ones), the font is cut down to the icons that the site uses, and their unused style rules go too.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from sphinx.application import Sphinx

SCRIPT = re.compile(r'\s*<script defer src="[^"]*scripts/fontawesome\.js[^"]*"></script>')
# `.fa-gear:before,.fa-cog:before{content:"\f013"}`
RULE = re.compile(r'((?:\.fa-[a-z0-9-]+:before,?)+)\{content:"((?:\\[0-9a-f]+)+|[^"]*)"\}')
SOURCES = re.compile(
    r'src:url\((\.\./vendor/fontawesome/webfonts/([a-z0-9-]+))\.woff2\) format\("woff2"\),'
    r'url\([^)]*\) format\("truetype"\)'
)


def used_icons(outdir: Path) -> set[str]:
    """Names such as `fa-bars` in the pages and in the theme's scripts (`fa-xmark`, for the dialog)."""
    names: set[str] = set()
    for file in [*outdir.rglob("*.html"), *(outdir / "_static" / "scripts").glob("*.js")]:
        if file.name != "fontawesome.js":
            names.update(re.findall(r"\bfa-[a-z0-9-]+", file.read_text("utf8")))
    return names


def lighten(app: Sphinx, exception: Exception | None) -> None:
    """Called when the pages are written."""
    if exception is not None or app.builder.format != "html":
        return
    import pydata_sphinx_theme
    from fontTools import subset

    logging.getLogger("fontTools").setLevel(
        logging.WARNING
    )  # else a page of what it keeps and drops

    outdir = Path(app.outdir)
    theme = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
    names = used_icons(outdir)
    points: set[int] = set()

    def keep(rule: re.Match) -> str:
        if not names & set(re.findall(r"fa-[a-z0-9-]+", rule[1])):
            return ""
        points.update(int(code, 16) for code in re.findall(r"\\([0-9a-f]+)", rule[2]))
        return rule[0]

    css = RULE.sub(keep, (theme / "styles" / "pydata-sphinx-theme.css").read_text("utf8"))
    css = SOURCES.sub(r'src:url(\1.ttf) format("truetype")', css)
    css = re.sub(r"/\*# sourceMappingURL=.*?\*/", "", css)
    (outdir / "_static" / "styles" / "pydata-sphinx-theme.css").write_text(css, "utf8")

    fonts = outdir / "_static" / "vendor" / "fontawesome" / "webfonts"
    for source in sorted((theme / "vendor" / "fontawesome" / "webfonts").glob("*.ttf")):
        font = subset.load_font(str(source), subset.Options())
        cutter = subset.Subsetter(subset.Options())
        cutter.populate(unicodes=points)
        cutter.subset(font)
        fonts.mkdir(parents=True, exist_ok=True)
        font.save(str(fonts / source.name))

    for page in outdir.rglob("*.html"):
        text = page.read_text("utf8")
        if "fontawesome.js" in text:
            page.write_text(SCRIPT.sub("", text), "utf8")
    for unused in [
        *(outdir / "_static").rglob("*.map"),
        *fonts.glob("*.woff2"),
        outdir / "_static/scripts/fontawesome.js",
    ]:
        unused.unlink(missing_ok=True)


def setup(app: Sphinx) -> dict:
    """Run after everything else."""
    app.connect("build-finished", lighten, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
