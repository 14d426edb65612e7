"""The port detective's readings: whole, in words that give nothing away, and enough to name every bug."""

import json
import math
from itertools import combinations

import pytest

from tests.helpers.detective import separates
from tools import port_symptoms


@pytest.fixture(scope="module")
def data() -> dict:
    return json.loads(port_symptoms.OUT.read_text(encoding="utf-8"))


def test_every_bug_has_every_reading(data):
    probes = {probe["id"] for probe in data["probes"]}
    assert len(probes) == len(data["probes"]) >= 5
    for probe in data["probes"]:
        assert (
            isinstance(probe["cost"], int)
            and probe["cost"] >= 1
            and probe["told_apart_by"] in ("value", "reading")
        )
        assert probe["name"] and probe["question"].endswith("?")
    assert len({bug["id"] for bug in data["bugs"]}) == len(data["bugs"]) >= 7
    for bug in data["bugs"]:
        assert bug["name"] and all(bug[key].endswith((".", "…")) for key in ("explanation", "fix"))
    for results in (data["healthy"], *(bug["results"] for bug in data["bugs"])):
        assert set(results) == probes
        for found in results.values():
            value, reading = found["value"], found["reading"]
            assert isinstance(value, str) or (
                isinstance(value, int | float) and math.isfinite(value)
            )
            assert 0 < len(reading) <= 120 and reading.endswith(".")
            assert not any(bug["name"].lower() in reading.lower() for bug in data["bugs"])


def test_the_words_are_those_of_the_tool(data):
    """Names, prices and sentences were not edited by hand; the numbers are asserted by chapter 08."""
    assert [
        (p["id"], p["name"], p["cost"], p["question"]) for p in data["probes"]
    ] == port_symptoms.PROBES
    assert {
        b["id"]: (b["name"], b["explanation"], b["fix"]) for b in data["bugs"]
    } == port_symptoms.BUGS
    for results in (data["healthy"], *(bug["results"] for bug in data["bugs"])):
        for probe, found in results.items():
            assert found["reading"] == port_symptoms.reading(
                probe, found["value"], data["healthy"][probe]["value"]
            )


def test_every_bug_shows_and_every_two_can_be_told_apart(data):
    for bug in data["bugs"]:
        assert any(
            bug["results"][p["id"]]["value"] != data["healthy"][p["id"]]["value"]
            for p in data["probes"]
        ), bug["id"]
    for a, b in combinations(data["bugs"], 2):
        assert any(separates(p, a, b) for p in data["probes"]), (a["id"], b["id"])


def test_no_probe_alone_names_every_bug(data):
    """Else there is nothing to think about."""
    for probe in data["probes"]:
        assert any(not separates(probe, a, b) for a, b in combinations(data["bugs"], 2)), probe[
            "id"
        ]
