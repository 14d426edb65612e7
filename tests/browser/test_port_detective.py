"""The widget of chapter 08: its readings are those that were measured, and a case can be solved without a pointer."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, serve

pytestmark = pytest.mark.browser
WIDGETS = Path("book") / "_static" / "widgets"


@pytest.fixture(scope="module")
def data() -> dict:
    return json.loads((ROOT / WIDGETS / "port-detective.json").read_text("utf8"))


@pytest.fixture(scope="module")
def bench(site, data, tmp_path_factory):
    """A page with the widget alone, its scripts and readings of this checkout. Yields its folder."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(site / "_static", folder / "_static")
    shutil.copytree(ROOT / "book" / "_static", folder / "_static", dirs_exist_ok=True)
    script = f'Course.data("port-detective-data", {json.dumps(data)});'
    (folder / "_static" / "widgets" / "port-detective-data.js").write_text(script, "utf8")
    (folder / "index.html").write_text(
        """<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>bench</title>
        <meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
        <link rel="stylesheet" href="_static/course.css"><script defer src="_static/course.js"></script></head>
        <body><main class="bd-article"><h1>x</h1>
        <div class="widget" data-widget="port-detective"><p>fallback</p></div></main></body></html>""",
        "utf8",
    )
    return folder


@pytest.fixture(scope="module")
def bench_address(bench):
    server, url = serve(bench)
    yield url
    server.shutdown()


def opened(browser, address: str, scheme: str = "light"):
    """A page at phone width; what it asks for and what its console says are kept on it."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(5000)
    page.said, page.asked = [], []
    page.on("console", lambda m: page.said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda r: page.asked.append(r.url))
    page.goto(address)
    page.wait_for_selector("div.widget[data-state=ready]")
    return context, page


@pytest.fixture
def page(browser, bench_address):
    context, page = opened(browser, bench_address)
    yield page
    assert page.said == []
    assert all(url.startswith((bench_address, "data:")) for url in page.asked)
    context.close()


def number_of(page, data: dict, bug: dict) -> int:
    """A case in which this bug hides."""
    cases = page.evaluate("n => [...Array(200).keys()].map((i) => Course.portDetective.culprit(i + 1, n))", len(data["bugs"]))
    return cases.index(data["bugs"].index(bug)) + 1


def same(shown: str, measured) -> bool:
    if isinstance(measured, str):
        return shown == f"“{measured}”"
    return float(shown) == pytest.approx(measured, rel=1e-3)


def test_every_case_shows_what_was_measured(page, data):
    """Each bug, each probe: the port's reading, the healthy model's, the sentence; and the points go down."""
    counts = set()
    for bug in data["bugs"]:
        case = number_of(page, data, bug)
        counts.add(case)
        for probe in data["probes"]:
            page.locator(".detective-case").fill(str(case))
            page.locator(".detective-case").press("Enter")
            page.get_by_role("button", name="This case again").click()
            before = int(page.locator(".widget").get_attribute("data-left"))
            page.locator(f"[data-probe='{probe['id']}']").click()
            row = page.locator("li", has=page.locator(f"[data-probe='{probe['id']}']"))
            found = bug["results"][probe["id"]]
            assert same(row.locator(".detective-here").inner_text(), found["value"]), (bug["id"], probe["id"])
            assert same(row.locator(".detective-healthy").inner_text(), data["healthy"][probe["id"]]["value"])
            assert found["reading"] in row.inner_text()
            assert int(page.locator(".widget").get_attribute("data-left")) == before - probe["cost"]
    assert len(counts) == len(data["bugs"])


def test_a_case_by_keyboard(page, data):
    """Tab, space and enter: look, rule out, name, read the verdict, play again."""
    bug = data["bugs"][1]
    page.locator(".detective-case").fill(str(number_of(page, data, bug)))
    page.keyboard.press("Enter")
    said = page.locator("[role=status]")
    page.keyboard.press("Tab")  # the first probe
    assert page.evaluate("document.activeElement.dataset.probe") == data["probes"][0]["id"]
    page.keyboard.press("Enter")
    assert data["probes"][0]["name"] in said.inner_text()
    assert page.evaluate("document.activeElement.dataset.probe") == data["probes"][0]["id"], "the focus is lost"
    for _ in data["probes"]:  # over the other probes to the suspects
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "radio"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert f"{data['bugs'][0]['name']}: ruled out" in said.inner_text()
    page.locator("input[type=radio]").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.value") == bug["id"]
    name = page.get_by_role("button", name="Name the bug")
    for _ in range(40):
        if name.evaluate("b => b === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    text = said.inner_text()
    assert text.startswith(f"Right: {bug['name']}.") and bug["explanation"] in text and bug["fix"] in text
    assert page.evaluate("document.activeElement.textContent") == "Next case"
    page.keyboard.press("Enter")
    assert page.locator(".widget").get_attribute("data-verdict") is None
    assert page.evaluate("document.activeElement.dataset.probe") == data["probes"][0]["id"]
    assert page.locator(".detective-here").count() == 0


def test_the_points_end(page, data):
    """A probe that costs more than is left is refused, in words, and shows nothing."""
    for probe in sorted(data["probes"], key=lambda p: -p["cost"]):
        left = int(page.locator(".widget").get_attribute("data-left"))
        page.locator(f"[data-probe='{probe['id']}']").click(force=True)
        now = int(page.locator(".widget").get_attribute("data-left"))
        if probe["cost"] > left:
            assert now == left and f"{left} left" in page.locator("[role=status]").inner_text()
        else:
            assert now == left - probe["cost"]
    assert page.locator(".detective-here").count() < len(data["probes"])


def test_the_budget_is_enough_for_proof(page, data):
    """Some probes within the budget tell every two bugs apart, and no fewer points do."""
    least, budget = page.evaluate("d => [Course.portDetective.leastCost(d), Course.portDetective.budgetFor(d)]", data)

    def apart(chosen) -> bool:
        pairs = combinations(data["bugs"], 2)
        return all(any(differs(a["results"][p["id"]]["value"], b["results"][p["id"]]["value"]) for p in chosen) for a, b in pairs)

    sets = [chosen for n in range(len(data["probes"]) + 1) for chosen in combinations(data["probes"], n)]
    assert least == min(sum(p["cost"] for p in chosen) for chosen in sets if apart(chosen))
    assert least < budget < sum(p["cost"] for p in data["probes"]), "nothing to decide: the budget buys every probe"
    assert int(page.locator(".widget").get_attribute("data-left")) == budget


def differs(a, b) -> bool:
    """The widget's rule: texts that differ, signs that differ, or a factor of two."""
    if isinstance(a, str) or isinstance(b, str):
        return a != b
    small, large = sorted((abs(a), abs(b)))
    return large > 0 and (large >= 2 * small or a * b < 0)


def test_the_verdict_names_the_probe_that_was_missing(page, data):
    """Every bug named as every other, with no probe, and with the cheapest one that tells the two apart."""
    for bug in data["bugs"]:
        for named in data["bugs"]:
            if named is bug:
                continue
            telling = [p for p in data["probes"] if differs(*(x["results"][p["id"]]["value"] for x in (bug, named)))]
            judge = """([d, used, named, bug]) => Course.portDetective.judge(d, used.map((i) => d.probes[i]),
                       d.bugs[named], d.bugs[bug]).join(' ')"""
            numbers = [data["bugs"].index(named), data["bugs"].index(bug)]
            text = page.evaluate(judge, [data, [], *numbers])
            first = re.search(r"“(.*?)” \(\d+ points?\) tells them apart", text)
            assert first and first[1] in {p["name"] for p in telling if p["cost"] == min(q["cost"] for q in telling)}
            text = page.evaluate(judge, [data, [data["probes"].index(telling[0])], *numbers])
            assert text.startswith(f"You had the evidence: “{telling[0]['name']}” reads")
    everything = list(range(len(data["probes"])))
    assert "that is proof" in page.evaluate(judge, [data, everything, 0, 0])
    assert "there was luck in it" in page.evaluate(judge, [data, [], 0, 0])


def test_a_wrong_answer_as_a_reader_sees_it(page, data):
    bug, named = data["bugs"][0], data["bugs"][2]
    page.locator(".detective-case").fill(str(number_of(page, data, bug)))
    page.locator(".detective-case").press("Enter")
    page.locator(f"[data-suspect='{bug['id']}']").click()
    page.locator(f"input[value='{named['id']}']").check()
    page.get_by_role("button", name="Name the bug").click()
    text = page.locator("[role=status]").inner_text()
    assert text.startswith(f"No: it is “{bug['name']}”.") and "You looked at nothing." in text
    assert "You had ruled it out" in text
    assert page.locator(".widget").get_attribute("data-verdict") == "wrong"
    assert page.locator("input[type=radio]:disabled").count() == len(data["bugs"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_at_each_stage(browser, bench_address, data, theme):
    """axe-core before, with readings and a suspect ruled out, and after the verdict; nothing pushes the page sideways."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None:
        pytest.skip("axe-playwright-python is not installed: run `make install`")
    context, page = opened(browser, bench_address, theme)
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    page.evaluate((Path(spec.origin).parent / "axe.min.js").read_text("utf8"))

    def problems() -> list:
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        return page.evaluate(
            """async () => (await axe.run('.widget')).violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html)}`)"""
        )

    assert problems() == []
    page.locator("[data-probe]").first.click()
    page.locator("[data-suspect]").first.click()
    assert problems() == []
    page.locator("input[type=radio]").nth(1).check()
    page.get_by_role("button", name="Name the bug").click()
    assert problems() == []
    context.close()


def test_from_a_file(browser, bench):
    """Opened from disk, without a server, it works as well."""
    context, page = opened(browser, (bench / "index.html").as_uri())
    page.locator("[data-probe]").first.click()
    assert page.locator(".detective-here").count() == 1
    assert page.said == []
    context.close()
