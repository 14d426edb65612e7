"""The widget of chapter 12: who holds what is what JAX says, the messages are those recorded, and no pointer is needed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, bench_page, opened

pytestmark = pytest.mark.browser
WIDGETS = Path("book") / "_static" / "widgets"


@pytest.fixture(scope="module")
def data() -> dict:
    return json.loads((ROOT / WIDGETS / "sharding-painter.json").read_text("utf8"))


@pytest.fixture(scope="module")
def jax_says() -> list:
    """[mesh, spec, bytes on a device of a float32 [256, 64] array, [first row, first column, devices] of its parts]."""
    code = """
import json, jax
jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from tools import sharding_cases as cases
from utils import sharding
from utils.course import plot
found = []
for fsdp, tp in cases.MESHES:
    mesh = sharding.make_mesh(fsdp=fsdp, tp=tp)
    for spec in cases.SPECS:
        place = NamedSharding(mesh, P(*(cases.NAMES[letter] for letter in spec)))
        array = jax.ShapeDtypeStruct((256, 64), 'float32', sharding=place)
        rows, columns = place.shard_shape(array.shape)
        parts = [[top // rows, left // columns, devices] for (top, _, left, _), devices in plot.parts(array).items()]
        found.append([[fsdp, tp], spec, 4 * rows * columns, parts])
print(json.dumps(found))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bench(site, data, tmp_path_factory):
    """A page with the widget alone, its script and cases of this checkout. Yields its folder."""
    body = '<div class="widget" data-widget="sharding-painter"><p>fallback</p></div>'
    return bench_page(tmp_path_factory.mktemp("bench"), site, body, sharding_painter_data=data)


def select(page, dimension: str):
    return page.locator(f"select[data-dimension='{dimension}']")


def shown(page) -> list:
    return json.loads(page.locator("div.widget").get_attribute("data-messages"))


def test_who_holds_what(page, jax_says):
    ask = """cases => cases.map(([mesh, spec]) => [Course.shardingPainter.held(spec, mesh, [256, 64], 4),
             Course.shardingPainter.parts(spec, mesh)])"""
    answers = page.evaluate(ask, [[mesh, spec] for mesh, spec, *_ in jax_says])
    for (mesh, spec, bytes_, parts), (held, blocks) in zip(jax_says, answers, strict=True):
        assert held["bytes"] == bytes_, (mesh, spec)
        assert held["copies"] * len(parts) == 8
        found = sorted([b["row"], b["column"], b["devices"]] for b in blocks)
        assert found == sorted(parts), (mesh, spec)


def test_the_messages_are_those_recorded(page, data):
    """Every combination is looked up in its place, and each message has its reason."""
    n = len(data["specs"])
    for mesh, cases in data["cases"].items():
        ask = """([data, mesh, all]) => all.map((specs) => {
            const found = Course.shardingPainter.outcome(data, mesh, specs);
            return [found, found.map((message) => Course.shardingPainter.why(message, specs))]; })"""
        combinations = list(itertools.product(data["specs"], repeat=3))
        answers = page.evaluate(ask, [data, mesh, combinations])
        assert len(answers) == n**3
        for number, (found, reasons) in zip(cases, answers, strict=True):
            assert found == data["outcomes"][number]
            assert all(len(reason) > 20 and "undefined" not in reason for reason in reasons)


def test_the_known_layouts(page, data):
    wanted = {
        "data parallel": [],
        "FSDP": [["all-gather", "W", "fsdp", 32768]],
        "tp by columns": [],
        "tp by rows": [["all-reduce", "y", "tp", 32768]],
        "FSDP and tp, columns": [["all-gather", "W", "fsdp", 16384]],
        "FSDP and tp, rows": [["all-gather", "W", "fsdp", 16384], ["all-reduce", "y", "tp", 32768]],
        "like a gradient": [["all-reduce", "y", "fsdp", 131072]],
        "all on every device": [],
    }
    for name, messages in wanted.items():
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert shown(page) == messages, name
        text = page.locator(".painter-said").inner_text()
        for kind, _, _, bytes_ in messages:
            assert kind in text and f"{bytes_:,} bytes" in text
        assert ("None." in text) == (not messages)
    assert (
        page.locator(".painter-numbers").first.inner_text()
        == "65,536 bytes a device, 8 copies of each"
    )


def test_by_keyboard(page, data):
    """Tab and arrows: the mesh, a layout, a dimension; an axis that is used twice is taken from the other dimension."""
    page.locator("input[type=radio]:checked").focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.value") == "2x4"
    assert page.locator("div.widget").get_attribute("data-bytes-x") == str(256 * 64 * 4 // 2)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert shown(page) == []
    for _ in range(20):
        if page.evaluate("document.activeElement.dataset.dimension") == "x.in":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("f")  # a select takes the first letter of an option: fsdp
    assert (
        select(page, "x.in").input_value() == "f" and select(page, "x.batch").input_value() == "."
    )
    assert "batch of x is no longer cut along fsdp" in page.locator(".painter-note").inner_text()
    assert page.evaluate("document.activeElement.dataset.dimension") == "x.in", "the focus is lost"
    n = len(data["specs"])
    i = [data["specs"].index(spec) for spec in (".f", "..", "f.")]
    assert shown(page) == data["outcomes"][data["cases"]["2x4"][(i[0] * n + i[1]) * n + i[2]]] != []


def test_any_choice_draws(page):
    """A hundred choices by chance: the pictures hold every device once per copy, the words fit."""
    chance = random.Random(5)
    for _ in range(100):
        box = page.locator("select").nth(chance.randrange(6))
        box.select_option(chance.choice("ftb."))
        for picture in page.locator(".painter-picture").all():
            assert picture.locator("rect").count() == picture.locator("text").count() >= 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(browser, bench_address, theme):
    """axe-core with no message, with one, with many; nothing pushes the page sideways."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None:
        pytest.skip("axe-playwright-python is not installed: run `make install`")
    context, page = opened(browser, bench_address, theme)
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    page.evaluate((Path(spec.origin).parent / "axe.min.js").read_text("utf8"))
    for layout in ("f. f. f.", "f. .. f.", ".. .. .."):
        page.locator(f"[data-layout='{layout}']").click()
        select(page, "y.out").select_option("t" if layout == ".. .. .." else ".")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        run = "async () => (await axe.run('.widget')).violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html)}`)"
        assert page.evaluate(run) == []
    context.close()


def test_from_a_file(browser, bench):
    """Opened from disk, without a server, it works as well."""
    context, page = opened(browser, (bench / "index.html").as_uri())
    assert shown(page) == [["all-gather", "W", "fsdp", 32768]]
    assert page.said == []
    context.close()
