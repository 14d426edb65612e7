"""The widgets: their numbers equal Python's, and the keyboard is enough."""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT, bench_page

pytestmark = pytest.mark.browser

GUESS = """<div class="widget" data-widget="guess" data-name="{name}" data-config='{config}'><p>fallback</p></div>"""
CONFIG = '{"title": "Loss", "x": {"label": "step", "min": 0, "max": 10}, "y": {"label": "loss", "min": 0, "max": 8}}'
PICK = CONFIG[:-1] + (
    ', "choices": [{"label": "falls", "points": [[0, 7], [10, 1]]}, {"label": "stays", "points": [[0, 7], [10, 7]]}]}'
)
DATA = '<script type="application/json" data-guess="{name}">{{"label": "run", "x": [0, 5, 10], "y": [7, 3, 2]}}</script>'

NASTY = [
    "",
    " ",
    "  ",
    "\n",
    " \n\n  x",
    "a  b",
    "trailing   ",
    "don't DON'T we'll I've they're 's 'd 'x",
    "Once upon a time, there was a little girl named Lily.",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "\ufeffbom inside\ufeff \ufeff\ufeff",
    "next\x85line \x85\x85 x",
    "nbsp\u00a0 \u00a0thin\u2009\u200bzero\u3000wide\u180e",
    "\u2028line\u2029paragraph",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f",
    "\t\t tab\r\ncr\rlf\n\r\n  \n",
    "Größe naïve ﬁ ǆ ß İ ı",
    "e\u0301 combining \u0301\u0301 alone",
    "привет 你好世界 こんにちは 안녕 ไทย हिन्दी עברית العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 1️⃣",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐍈",
    "½ ² Ⅷ ٣ ৪ ㊿ 〇",
    "x" * 600,
    "ab" * 300 + " " * 50,
    "1234567890 1,000.50",
    "____---===!!! ¿¡",
    "\ue000\uf8ff private \U000e0001",
    "\u0378\uffff\U0010ffff unassigned",
    "\u1c89\u1c8a\U000105c0\U00010d6f new letters \U00011bf3",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings over the whole of Unicode, heavy in spaces, quotes and the borders between classes."""
    rng = random.Random(seed)
    common = (
        " \n\t'stlldmvre.,!?0123456789abcdefghijklmnopqrstuvwxyz" + "\u00a0\x85\ufeff\u3000é你🙂"
    )
    texts = []
    for _ in range(count):
        letters = []
        for _ in range(rng.randint(0, 60)):
            point = rng.choice([rng.randrange(0x3000), rng.randrange(0x110000)])
            if rng.random() < 0.6 or 0xD800 <= point <= 0xDFFF:
                letters.append(rng.choice(common))
            else:
                letters.append(chr(point))
        texts.append("".join(letters))
    return texts


@functools.cache
def encoding():
    """The course's tokenizer."""
    from utils.course import tokenizer

    kept = ROOT / "utils" / "course" / "assets" / "stories2048.tiktoken"
    return tokenizer.encoding(tokenizer.load(kept), "stories2048")


@pytest.fixture(scope="module")
def bench(site, tmp_path_factory):
    """A page of its own that holds the widgets. Yields its folder."""
    body = "\n".join(
        [
            '<div class="widget" data-widget="tokenizer"><p>fallback</p></div>',
            GUESS.format(name="draw", config=CONFIG),
            GUESS.format(name="pick", config=PICK),
            GUESS.format(name="nothing", config=CONFIG),
            DATA.format(name="draw"),
            DATA.format(name="pick"),
        ]
    )
    return bench_page(tmp_path_factory.mktemp("bench"), site, body)


def ids_in_page(page, texts: list[str]) -> list[list[int]]:
    """What the page's encoder gives."""
    return page.evaluate("texts => texts.map((t) => Course.tokenizer.encode(t))", texts)


def test_tokenizer_equals_python_on_nasty_text(page):
    expected = [encoding().encode_ordinary(text) for text in NASTY]
    for text, found, wanted in zip(NASTY, ids_in_page(page, NASTY), expected):
        assert found == wanted, repr(text)


@pytest.mark.parametrize("seed", range(4))
def test_tokenizer_equals_python_on_random_text(page, seed):
    texts = random_texts(500, seed)
    for text, found in zip(texts, ids_in_page(page, texts)):
        assert found == encoding().encode_ordinary(text), ascii(text)


def test_tokenizer_equals_python_on_every_character(page):
    """Each code point between letters, so that its class decides where the word ends."""
    points = [p for p in range(0x110000) if not 0xD800 <= p <= 0xDFFF]
    points = points[:0x3400] + [
        p for p in points[0x3400:] if unicodedata.category(chr(p)) not in ("Cn", "Co")
    ]
    step = 64
    texts = [
        "".join(f"a{chr(p)}{chr(p)} 1" for p in points[i : i + step])
        for i in range(0, len(points), step)
    ]
    for i, (text, found) in enumerate(zip(texts, ids_in_page(page, texts))):
        assert found == encoding().encode_ordinary(text), (
            f"U+{points[i * step]:04X} and the 63 after it"
        )


def test_tokenizer_lone_surrogates(page):
    """Half a character: tiktoken reads it as U+FFFD. Whole pairs are characters."""
    for text in ("\ud83d", "a\ude00b", "\ud83d\ud83d\ude00x", "\ude00\ud83d"):
        literal = "".join(
            f"\\u{ord(c):04x}" for c in text
        )  # the bridge to the browser takes no lone halves
        found = page.evaluate(f'Course.tokenizer.encode("{literal}")')
        assert found == encoding().encode_ordinary(text), ascii(text)


def test_tokenizer_as_a_reader_uses_it(page):
    """Typing changes chips, ids and numbers, and the numbers are right."""
    text = "Once upon a time, a naïve 🙂 sang."
    area = page.locator(".widget-tokenizer textarea")
    area.fill(text)
    ids = encoding().encode_ordinary(text)
    assert page.locator(".token-ids").inner_text() == str(ids)
    assert page.locator("li.token").count() == len(ids)
    numbers = page.locator(".widget-tokenizer .widget-numbers").inner_text()
    assert numbers.startswith(
        f"{len(ids)} tokens, {len(text)} characters, {len(text) / len(ids):.2f} "
    )
    area.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second example
    assert page.locator(".token-ids").inner_text() != str(ids)


def widget(page, name: str):
    """A guess widget, by its name."""
    return page.locator(f'.widget-guess[data-name="{name}"]')


def test_guess_by_keyboard(page):
    """Tab to a point, move it, see the recorded curve: no pointer needed; no answer before a guess."""
    draw = widget(page, "draw")
    reveal = draw.get_by_role("button", name="Show the recorded curve")
    assert reveal.is_disabled()
    assert draw.locator(".guess-recorded").count() == 0
    first = draw.get_by_role("slider").first
    assert float(first.get_attribute("aria-valuenow")) == 4
    first.focus()
    page.keyboard.press("ArrowUp")
    assert float(first.get_attribute("aria-valuenow")) == pytest.approx(4 + 0.02 * 8)
    page.keyboard.press("PageDown")
    assert float(first.get_attribute("aria-valuenow")) == pytest.approx(4 - 0.08 * 8)
    page.keyboard.press("End")
    assert float(first.get_attribute("aria-valuenow")) == 8
    assert "8 at step 0" in first.get_attribute("aria-valuetext")
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    assert float(draw.get_by_role("slider").nth(1).get_attribute("aria-valuenow")) == 0
    for _ in range(6):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert draw.locator(".guess-recorded").count() == 1
    assert draw.locator(".guess-answer").inner_text().startswith("run: 7 at 0, 2 at 10.")
    page.keyboard.press("Enter")  # the focus is on "Start again"
    assert draw.locator(".guess-recorded").count() == 0
    assert float(first.get_attribute("aria-valuenow")) == 4


def test_guess_by_pointer(page):
    """Dragging across the plot sets the points it passes."""
    draw = widget(page, "draw")
    draw.locator("svg").scroll_into_view_if_needed()
    area = draw.locator("svg").bounding_box()
    page.mouse.move(area["x"] + 60, area["y"] + 20)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] - 18, area["y"] + 20, steps=20)
    page.mouse.up()
    values = [float(s.get_attribute("aria-valuenow")) for s in draw.get_by_role("slider").all()]
    assert all(value > 7 for value in values)


def test_guess_distance_is_right(page):
    """The mean distance it reports, computed again here: a flat guess at 4.16, points 7, 3 and 2 of 8."""
    draw = widget(page, "draw")
    for slider in draw.get_by_role("slider").all():
        slider.press("ArrowUp")
    draw.get_by_role("button", name="Show the recorded curve").click()
    share = sum(abs(4.16 - y) / 8 for y in (7, 3, 2)) / 3
    found = int(re.search(r"is (\d+)% of", draw.locator(".guess-answer").inner_text())[1])
    assert found == round(100 * share)


def test_guess_by_choice(page):
    """Pick with the keyboard; the closest of the curves offered is named."""
    pick = widget(page, "pick")
    reveal = pick.get_by_role("button", name="Show the recorded curve")
    assert reveal.is_disabled()
    pick.get_by_role("radio").nth(1).focus()
    page.keyboard.press("Space")
    reveal.press("Enter")
    assert "The closest of the curves offered is A." in pick.locator(".guess-answer").inner_text()


def test_guess_without_a_recorded_curve(page):
    """A page that was never executed says so and offers no answer."""
    nothing = widget(page, "nothing")
    nothing.get_by_role("slider").first.press("ArrowUp")
    assert nothing.get_by_role("button", name="Show the recorded curve").is_disabled()
    assert "no recorded curve" in nothing.locator(".guess-answer").inner_text()


def test_a_broken_widget_leaves_its_fallback(browser, bench_address):
    """A configuration that makes no sense: the sentence inside stays, and the console says why."""
    context = browser.new_context()
    page = context.new_page()
    said = []
    page.on("console", lambda m: said.append(m.text))
    broken = '<div class="widget" data-widget="guess" data-name="x" data-config=\'{"x": 1}\'><p>fallback</p></div>'
    page.route(
        "**/broken.html",
        lambda route: route.fulfill(
            content_type="text/html",
            body=f'<html lang="en"><body>{broken}<script src="_static/course.js"></script></body></html>',
        ),
    )
    page.goto(f"{bench_address}/broken.html")
    page.wait_for_selector("div.widget[data-state=failed]")
    assert page.inner_text("div.widget") == "fallback"
    assert any("widget guess" in line for line in said)
    context.close()


def test_bench_data_is_made_from_the_kept_file(site):
    """The page's vocabulary is written by the build, and there is no second copy in the repository."""
    assert (site / "_static" / "widgets" / "stories2048.js").is_file()
    assert not list((ROOT / "book").rglob("stories2048*"))
    assert Path(ROOT / "utils" / "course" / "assets" / "stories2048.tiktoken").is_file()
