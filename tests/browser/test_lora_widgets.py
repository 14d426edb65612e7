"""The widgets of chapter 05: their numbers equal the package's, and the keyboard is enough."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import bench_page

pytestmark = pytest.mark.browser

RECORDED = {
    "title": "a change",
    "u": [[2.0, 0.5], [-2.0, 0.5], [0.0, 1.0]],
    "v": [[1.0, 0.0], [0.0, 1.0]],
    "share": [0.8, 1.0],
    "ranks": [0, 1, 2],
    "loss": [3.0, 2.5, 2.0],
    "base": 3.0,
    "tuned": 2.0,
}


@pytest.fixture(scope="module")
def bench(site, tmp_path_factory):
    """A page with the three widgets. Yields its folder."""
    widgets = [
        '<div class="widget" data-widget="lora-calculator" data-config=\'{"width": 144, "depth": 4, "rank": 8}\'>x</div>',
        '<div class="widget" data-widget="step0"><p>x</p></div>',
        '<div class="widget" data-widget="rank-slider" data-name="ch05"><p>x</p></div>',
        f'<script type="application/json" data-rank-slider="ch05">{json.dumps(RECORDED)}</script>',
    ]
    return bench_page(tmp_path_factory.mktemp("bench"), site, "".join(widgets))


def in_package(width: int, rank: int, depth: int, targets: list[str]) -> dict[str, int]:
    """The same numbers, counted on a model that is described and not built."""
    from flax import nnx

    from utils import lora, minigpt

    config = minigpt.Config(
        vocab_size=2048,
        max_position_embeddings=256,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=4 * width,
    )

    def make():
        return lora.inject(
            minigpt.MiniGPT(config, rngs=nnx.Rngs(0)),
            rank=rank,
            target_modules=targets,
            rngs=nnx.Rngs(0),
        )

    counts = lora.count(nnx.eval_shape(make))
    assert counts.base == config.count_parameters()["total"]
    return {
        "adapter": counts.adapter,
        "base": counts.base,
        "adapter_bytes": counts.adapter_bytes,
        "optimizer_bytes": counts.optimizer_bytes,
        "full_optimizer_bytes": 8 * counts.base,
        "adapter_flops": counts.flops_per_token,
        "base_flops": config.flops_per_token(),
    }


@pytest.mark.parametrize(
    ("width", "rank", "depth", "targets"),
    [
        (144, 8, 4, ["q_proj", "v_proj"]),
        (16, 1, 1, ["down_proj"]),
        (256, 128, 2, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        (1536, 16, 28, ["o_proj", "up_proj"]),
    ],
)
def test_calculator_equals_the_package(page, width, rank, depth, targets):
    state = {"width": width, "rank": rank, "depth": depth, "targets": targets}
    assert page.evaluate("state => Course.loraCost(state)", state) == in_package(
        width, rank, depth, targets
    )


def test_calculator_by_keyboard(page):
    """Arrow keys move a slider, the space bar a target, and what is shown is what is computed."""
    root = page.locator(".widget-lora-calculator")
    cost = in_package(144, 8, 4, ["q_proj", "v_proj"])
    assert json.loads(root.get_attribute("data-cost")) == cost
    assert (
        f"{cost['adapter']:,} of {cost['base']:,} parameters"
        in root.locator(".lora-numbers").inner_text()
    )
    root.locator("[data-slider=rank]").focus()
    page.keyboard.press("ArrowRight")
    root.locator("input[value=up_proj]").focus()
    page.keyboard.press("Space")
    cost = in_package(144, 9, 4, ["q_proj", "v_proj", "up_proj"])
    assert json.loads(root.get_attribute("data-cost")) == cost
    text = root.locator(".lora-numbers").inner_text()
    assert f"{cost['adapter']:,} of" in text and f"{cost['adapter_flops']:,} operations" in text
    root.locator("[data-slider=width]").press("Home")
    root.locator("[data-slider=rank]").press("End")
    assert "the package refuses it" in root.locator(".lora-numbers").inner_text()


def numpy_bench(A, B, steps: int, frozen=()) -> list[float]:
    """The bench again, in NumPy."""
    W, x, target = (
        np.array([[0.6, -0.4, 0.2], [-0.3, 0.5, 0.7]]),
        np.array([1, -0.5, 2]),
        np.array([1, -1]),
    )
    losses = []
    for _ in range(steps + 1):
        g = W @ x + 2 * B @ (A @ x) - target
        losses.append(0.5 * g @ g)
        dA, dB = 2 * np.outer(B.T @ g, x), 2 * np.outer(g, A @ x)
        A, B = A - 0.05 * dA * ("A" not in frozen), B - 0.05 * dB * ("B" not in frozen)
    return losses


@pytest.mark.parametrize(
    ("a", "b", "frozen", "said"),
    [
        ("drawn", "zero", "", "A stays: its gradient contains B, and B is zero. B moves"),
        ("zero", "drawn", "", "A moves: its gradient contains B, which is not zero. B stays"),
        ("zero", "zero", "", "A stays: its gradient contains B, and B is zero. B stays"),
        ("drawn", "drawn", "", "A moves: its gradient contains B, which is not zero. B moves"),
        (
            "drawn",
            "zero",
            "B",
            "A stays: its gradient contains B, and B is zero. B stays: it is frozen",
        ),
    ],
)
def test_step0(page, a, b, frozen, said):
    root = page.locator(".widget-step0")
    for name, value in (("A", a), ("B", b)):
        root.locator(f"[data-factor={name}][value={value}]").check()
    for name in frozen:
        root.locator(f"[data-freeze={name}]").focus()
        page.keyboard.press("Space")
    at_base = "exactly the base" in root.locator(".step0-answer").inner_text()
    assert at_base == ("zero" in (a, b))
    root.get_by_role("button", name="Step", exact=True).focus()
    page.keyboard.press("Enter")
    assert said in root.locator(".step0-answer").inner_text()
    page.keyboard.press("Enter")
    drawn = {
        "A": np.array([[0.4, -0.3, 0.5], [-0.5, 0.1, 0.3]]),
        "B": np.array([[0.5, -0.2], [0.3, 0.6]]),
    }
    A, B = (drawn[name] * (value == "drawn") for name, value in (("A", a), ("B", b)))
    np.testing.assert_allclose(
        json.loads(root.get_attribute("data-losses")), numpy_bench(A, B, 2, frozen), atol=1e-12
    )


def test_rank_slider(page):
    """Each rank: its share and its loss; the picture at full rank is the whole change."""
    root = page.locator(".widget-rank-slider")
    slider = root.get_by_role("slider")
    slider.focus()
    fills = "r => [...r.querySelectorAll('svg')].map((s) => [...s.children].map((c) => c.getAttribute('fill-opacity')))"
    for key, rank, share, loss in (
        ("Home", 0, 0, 3.0),
        ("ArrowRight", 1, 80, 2.5),
        ("End", 2, 100, 2.0),
    ):
        page.keyboard.press(key)
        text = root.locator(".widget-numbers").inner_text()
        assert re.search(
            rf"Rank {rank}: {share}% .* the loss is {loss:.3f}; base 3\.000, fully tuned 2\.000",
            text,
        ), text
        kept, whole = root.evaluate(fills)
        assert (kept == whole) == (rank == 2)
    found = page.evaluate(
        "([u, v]) => Course.rankSlider.product(u, v, 1)", [RECORDED["u"], RECORDED["v"]]
    )
    np.testing.assert_allclose(
        found, np.array(RECORDED["u"])[:, :1] @ np.array(RECORDED["v"])[:, :1].T
    )
    between = page.evaluate("Course.rankSlider.lossAt([0, 1, 4, 16], [3, 2.5, 2, 1], 8)")
    assert between["measured"] is False and between["value"] == pytest.approx(1.5)
