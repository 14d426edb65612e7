"""The widget of chapter 08: its readings are those that were measured, and a case can be solved without a pointer."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import combinations, permutations
from pathlib import Path

import pytest
from conftest import PAGE, ROOT, bench_page, opened

from tests.helpers.detective import separates

pytestmark = pytest.mark.browser
WIDGETS = Path("book") / "_static" / "widgets"


@pytest.fixture(scope="module")
def data() -> dict:
    return json.loads((ROOT / WIDGETS / "port-detective.json").read_text("utf8"))


@pytest.fixture(scope="module")
def bench(site, data, tmp_path_factory):
    """A page with the widget alone, and one on which all probes can be paid. Yields their folder."""
    body = '<div class="widget" data-widget="port-detective"><p>fallback</p></div>'
    folder = bench_page(tmp_path_factory.mktemp("bench"), site, body, port_detective_data=data)
    everything = sum(probe["cost"] for probe in data["probes"])
    rich = f"""data-widget="port-detective" data-config='{{"budget": {everything}}}'"""
    (folder / "all.html").write_text(
        PAGE % body.replace('data-widget="port-detective"', rich), "utf8"
    )
    return folder


def number_of(page, data: dict, bug: dict) -> int:
    """A case in which this bug hides."""
    culprits = "n => [...Array(200).keys()].map((i) => Course.portDetective.culprit(i + 1, n))"
    cases = page.evaluate(culprits, len(data["bugs"]))
    return cases.index(data["bugs"].index(bug)) + 1


def same(shown: str, measured) -> bool:
    if isinstance(measured, str):
        return shown == f"“{measured}”"
    return float(shown) == pytest.approx(measured, rel=1e-3)


def test_every_case_shows_what_was_measured(browser, bench_address, data):
    """Each bug, each probe: the port's reading, the healthy model's, the sentence; and the points go down."""
    context, page = opened(browser, f"{bench_address}/all.html")
    cases = [number_of(page, data, bug) for bug in data["bugs"]]
    assert len(set(cases)) == len(cases)
    for bug, case in zip(data["bugs"], cases):
        page.locator(".detective-case").fill(str(case))
        page.locator(".detective-case").press("Enter")
        left = sum(probe["cost"] for probe in data["probes"])
        assert int(page.locator(".widget").get_attribute("data-left")) == left
        page.evaluate(
            "document.querySelectorAll('[data-probe]').forEach((button) => button.click())"
        )
        assert int(page.locator(".widget").get_attribute("data-left")) == 0
        rows = page.evaluate("""[...document.querySelectorAll('.detective-probes li')].map((row) => [
            ...['.detective-here', '.detective-healthy', 'p'].map((s) => row.querySelector(s).textContent)])""")
        for probe, (here, healthy, reading) in zip(data["probes"], rows, strict=True):
            found = bug["results"][probe["id"]]
            assert same(here, found["value"]), (bug["id"], probe["id"])
            assert same(healthy, data["healthy"][probe["id"]]["value"])
            assert reading == found["reading"]
    context.close()


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
    assert page.evaluate("document.activeElement.dataset.probe") == data["probes"][0]["id"], (
        "the focus is lost"
    )
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
    assert (
        text.startswith(f"Right: {bug['name']}.")
        and bug["explanation"] in text
        and bug["fix"] in text
    )
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
    least, budget = page.evaluate(
        "d => [Course.portDetective.leastCost(d), Course.portDetective.budgetFor(d)]", data
    )

    def apart(chosen) -> bool:
        return all(
            any(separates(p, a, b) for p in chosen) for a, b in combinations(data["bugs"], 2)
        )

    sets = [
        chosen for n in range(len(data["probes"]) + 1) for chosen in combinations(data["probes"], n)
    ]
    assert least == min(sum(p["cost"] for p in chosen) for chosen in sets if apart(chosen))
    assert least == budget < sum(p["cost"] for p in data["probes"]), (
        "nothing to decide: the budget buys every probe"
    )
    assert int(page.locator(".widget").get_attribute("data-left")) == budget


def test_the_verdict_names_the_probe_that_was_missing(page, data):
    """Every bug named as every other, with no probe, and with the first one that tells the two apart."""
    telling, questions = {}, []
    for bug, named in permutations(range(len(data["bugs"])), 2):
        pair = data["bugs"][bug], data["bugs"][named]
        telling[bug, named] = [
            i for i, probe in enumerate(data["probes"]) if separates(probe, *pair)
        ]
        questions += [[[], named, bug], [telling[bug, named][:1], named, bug]]
    questions += [[list(range(len(data["probes"]))), 0, 0], [[], 0, 0]]
    judge = """([d, questions]) => questions.map(([used, named, bug]) => Course.portDetective.judge(
               d, used.map((i) => d.probes[i]), d.bugs[named], d.bugs[bug]).join(' '))"""
    *texts, proof, luck = page.evaluate(judge, [data, questions])
    assert "that is proof" in proof and "there was luck in it" in luck
    for (pair, probes), blind, seen in zip(telling.items(), texts[::2], texts[1::2], strict=True):
        least = min(data["probes"][i]["cost"] for i in probes)
        advised = re.search(r"“([^”]*)” \(\d+ points?\) tells them apart", blind)
        assert advised and advised[1] in {
            p["name"] for p in (data["probes"][i] for i in probes) if p["cost"] == least
        }, pair
        assert seen.startswith(
            f"You had the evidence: “{data['probes'][probes[0]]['name']}” reads"
        ), pair


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
