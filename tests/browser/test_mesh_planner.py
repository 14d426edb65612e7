"""The widget of chapter 13: its bytes are the package's, within 15% of the compiler's, and the keyboard is enough."""

from __future__ import annotations

import json

import pytest
from conftest import bench_page, opened

from tests.helpers.plans import ROWS, config, recording, sizes
from utils import CourseError, sharding
from utils.course import estimate

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def bench(site, tmp_path_factory):
    """A page with the widget alone. Yields its folder."""
    config = '{"slice": "v5e-8", "batch_size": 16}'
    body = f"<div class='widget' data-widget='mesh-planner' data-config='{config}'><p>x</p></div>"
    return bench_page(tmp_path_factory.mktemp("bench"), site, body)


ESTIMATE = (
    "([model, asked]) => Course.meshPlanner.estimate(Course.meshPlanner.MODELS[model], asked)"
)
REFUSAL = "([model, asked]) => Course.meshPlanner.refusal(Course.meshPlanner.MODELS[model], asked)"


def test_every_recorded_plan(page):
    """The same terms as `estimate.bytes_per_chip`, and within 15% of what the compiler said."""
    assert len(ROWS) >= 10
    for row in ROWS:
        found = page.evaluate(ESTIMATE, [row["setting"]["model"], sizes(row)])
        assert found == estimate.bytes_per_chip(config(row), **sizes(row)), row["setting"]
        assert sum(found.values()) == pytest.approx(row["bytes_per_chip"]["peak"], rel=0.15), row[
            "setting"
        ]


def test_sizes_are_those_of_the_recording(page):
    known = recording().MODELS
    models = page.evaluate("() => Course.meshPlanner.MODELS")
    assert set(models) == set(known)
    for name, fields in models.items():
        config = known[name]
        assert fields == {field: getattr(config, field) for field in fields}
        assert not (config.o_proj_bias or config.mlp_bias)
        for fsdp, tp in ((1, 1), (4, 1), (4, 2), (2, 4), (8, 1)):
            options = dict(
                batch_size=16,
                seq_len=4096,
                rank=32,
                fsdp=fsdp,
                tp=tp,
                gradient_checkpointing=fsdp > 2,
            )
            try:
                expected = estimate.bytes_per_chip(config, **options)
            except CourseError as refused:
                said = page.evaluate(REFUSAL, [name, options])
                assert said and str(refused).startswith(said), (name, options)
            else:
                assert page.evaluate(ESTIMATE, [name, options]) == expected and not page.evaluate(
                    REFUSAL, [name, options]
                )
    for name, (devices, memory) in page.evaluate("() => Course.meshPlanner.SLICES").items():
        row = next(row for row in ROWS if row["setting"]["topology"] == name)
        assert (devices, memory) == (row["fsdp"] * row["tp"], row["memory_per_chip"])


def test_by_keyboard(page):
    """Tab to a box and type; the verdict, the terms and the refusal follow."""
    root = page.locator(".widget-mesh-planner")
    r1 = config(next(row for row in ROWS if row["setting"]["model"].endswith("Qwen-1.5B")))
    assert json.loads(root.get_attribute("data-terms")) == estimate.bytes_per_chip(
        r1, batch_size=16, seq_len=2048, fsdp=8
    )
    assert root.locator(".planner-verdict").inner_text().startswith("Fits: ")
    chips = root.locator("[data-choice=slice]")
    chips.focus()
    page.keyboard.press("ArrowUp")  # v5e-4
    assert json.loads(root.get_attribute("data-terms")) == estimate.bytes_per_chip(
        r1, batch_size=16, seq_len=2048, fsdp=4
    )
    page.keyboard.press("ArrowUp")  # v5e-1
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("End")  # the largest batch
    assert root.locator(".planner-verdict").inner_text().startswith("Does not fit: ")
    assert root.locator(".planner-limit").is_visible()
    root.locator("[data-choice=gradient_checkpointing]").focus()
    page.keyboard.press("Space")
    assert json.loads(root.get_attribute("data-terms")) == estimate.bytes_per_chip(
        r1, batch_size=128, seq_len=2048, gradient_checkpointing=False
    )


def test_refusals_name_the_axis(page):
    root = page.locator(".widget-mesh-planner")
    root.locator("[data-choice=tp]").select_option("8")
    said = root.locator(".planner-verdict").inner_text()
    with pytest.raises(CourseError, match="num_attention_heads: 12 does not divide over tp=8"):
        sharding.check(config(ROWS[0]), fsdp=1, tp=8)
    assert said == "Refused. num_attention_heads: 12 does not divide over tp=8."
    root.locator("[data-choice=tp]").select_option("1")
    root.locator("[data-choice=batch_size]").select_option("4")
    assert (
        "batch_size: 4 rows do not divide over fsdp=8"
        in root.locator(".planner-verdict").inner_text()
    )
    root.locator("[data-choice=slice]").select_option("v5e-1")  # a slice with fewer meshes
    assert (
        root.locator("[data-choice=tp]").input_value() == "1"
        and root.get_attribute("data-refused") == ""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, bench_address, scheme):
    context, page = opened(browser, bench_address, scheme)
    page.evaluate("scheme => document.documentElement.dataset.theme = scheme", scheme)
    for model in ("DeepSeek-R1-Distill-Qwen-32B", "SmolLM2-135M"):
        page.locator("[data-choice=model]").select_option(model)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
