"""MiniGPT: counts, causality, and files that come back as they were or not at all."""

import json
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import tiny
from utils import CourseError
from utils.course import pretrained


@pytest.fixture
def saved(tmp_path):
    return pretrained.save(tiny.wild(), tmp_path / "kept", provenance={"steps": 3})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(
            num_hidden_layers=1,
            hidden_size=24,
            num_attention_heads=3,
            vocab_size=77,
            max_position_embeddings=9,
        ),
    ],
)
def test_parameters_are_counted_without_making_them(changes):
    counts = tiny.config(**changes).count_parameters()
    assert counts["total"] == sum(a.size for a in tiny.weights(tiny.model(**changes)).values())
    assert counts["total"] == sum(value for name, value in counts.items() if name != "total")


def test_flops_agree_with_what_xla_counts():
    model = tiny.model(num_hidden_layers=1)  # XLA counts the body of a scan once
    graph, state = nnx.split(model)
    compiled = (
        jax.jit(lambda s, t: nnx.merge(graph, s)(t)).lower(state, jnp.zeros((2, 32), int)).compile()
    )
    cost = compiled.cost_analysis()
    found = (cost[0] if isinstance(cost, list) else cost)["flops"] / 64
    assert model.config.flops_per_token() == pytest.approx(found, rel=0.2)


def test_a_token_never_looks_ahead():
    model = tiny.wild()
    tokens = np.random.default_rng(0).integers(0, 400, (2, 32)).astype(np.int32)
    changed = tokens.copy()
    changed[:, 17:] = (changed[:, 17:] + 1) % 400
    a, b = tiny.forward(model, tokens), tiny.forward(model, changed)
    np.testing.assert_allclose(a[:, :17], b[:, :17], atol=1e-4)
    assert np.abs(a[:, 17] - b[:, 17]).max() > 1e-2


def test_it_starts_with_an_almost_uniform_guess():
    p = jax.nn.softmax(tiny.model()(jnp.arange(32)[None]), axis=-1)
    assert p.max() < 3 / 400 and p.min() > 1 / 3 / 400


def test_blocks_are_stacked_and_differ():
    kernel = tiny.weights(tiny.model())["layers.self_attn.q_proj.kernel"]
    assert kernel.shape == (2, 16, 16) and not np.array_equal(kernel[0], kernel[1])


def test_more_tokens_than_the_context_is_an_error():
    with pytest.raises(CourseError, match="expected at most 32 a row .*, found 33"):
        tiny.model()(jnp.zeros((1, 33), int))


@pytest.mark.parametrize(
    "bad",
    [
        dict(num_attention_heads=3),
        dict(num_hidden_layers=0),
        dict(hidden_size=1.5),
        dict(vocab_size="2048"),
    ],
)
def test_sizes_that_no_model_has_are_an_error(bad):
    with pytest.raises(
        CourseError, match=next(iter(bad)) if "num_attention_heads" not in bad else "hidden_size"
    ):
        tiny.config(**bad)


# ---------------------------------------------------------------------------------------------- files


def test_saved_and_loaded_is_the_same_to_the_bit(saved):
    model = pretrained.load(saved)
    assert (
        tiny.same(tiny.weights(model), tiny.weights(tiny.wild())) and model.config == tiny.config()
    )
    tokens = jnp.arange(20)[None]
    assert np.array_equal(tiny.forward(model, tokens), tiny.forward(tiny.wild(), tokens))
    assert json.loads((saved / "provenance.json").read_text()) == {"steps": 3}
    assert sorted(contents(saved)) == ["config.json", "model.safetensors", "provenance.json"]


def test_half_precision_halves_the_file(tmp_path, saved):
    small = pretrained.save(tiny.wild(), tmp_path / "half", dtype=np.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, saved)]
    assert sizes[0] < 0.6 * sizes[1]
    for name, array in tiny.weights(pretrained.load(small)).items():
        np.testing.assert_allclose(array, tiny.weights(tiny.wild())[name], rtol=1e-3, atol=1e-6)
        assert array.dtype == np.float32


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: cut(d / "model.safetensors"), "model.safetensors: damaged or cut short"),
        (lambda d: cut(d / "model.safetensors", 0), "model.safetensors: damaged or cut short"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 400),
            "model.safetensors: damaged",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: not found"),
        (lambda d: (d / "config.json").unlink(), "config.json: not found"),
        (lambda d: cut(d / "config.json"), "config.json: not the configuration"),
        (
            lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"),
            "config.json: not the configuration",
        ),
        (lambda d: (d / "config.json").write_text("[1, 2]"), "config.json: not the configuration"),
        (
            lambda d: (d / "config.json").write_text('{"n_embd": 768}'),
            "config.json: not the configuration",
        ),
        (
            lambda d: (d / "config.json").write_text('{"hidden_size": 0}'),
            "config.json: hidden_size: expected",
        ),
        (
            lambda d: rewrite(d, hidden_size=32),
            r"embed_positions.embedding: expected \(32, 32\), found \(32, 16\)",
        ),
        (
            lambda d: rewrite(d, num_hidden_layers=3),
            r"layers.*: expected \(3, 16\), found \(2, 16\)",
        ),
        (lambda d: shutil.rmtree(d), "config.json: not found"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_clear_error(saved, harm, message):
    harm(saved)
    before = contents(saved) if saved.is_dir() else None
    with pytest.raises(CourseError, match=message) as error:
        pretrained.load(saved)
    assert "\n" not in str(error.value)
    assert before == (contents(saved) if saved.is_dir() else None)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_name_that_the_model_lacks_is_an_error(saved):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(saved / "model.safetensors")
    save_file(arrays | {"lm_head.weight": np.zeros(3, np.float32)}, saved / "model.safetensors")
    with pytest.raises(CourseError, match="lm_head.weight: expected nothing of that name"):
        pretrained.load(saved)


def test_a_full_disk_leaves_every_old_file_as_it_was(saved):
    before = contents(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 20_000):  # nothing at all; the weights begin
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(CourseError, match="could not be written") as error:
                pretrained.save(tiny.model(num_hidden_layers=3), saved, provenance={"steps": 4})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and contents(saved) == before


def test_a_disk_with_room_for_the_weights_alone_leaves_every_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        pretrained.save(tiny.wild(), disk / "kept", provenance={"steps": 3})
        before = contents(disk / "kept")
        assert len(before["model.safetensors"]) > 30_000
        with pytest.raises(CourseError, match="could not be written.*unchanged"):
            pretrained.save(tiny.model(), disk / "kept", provenance={"note": "x" * 150_000})
        assert contents(disk / "kept") == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "kept").write_text("notes")
    with pytest.raises(CourseError, match="could not be written"):
        pretrained.save(tiny.model(), tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "notes"


def test_the_kept_weights_are_small_and_say_where_they_come_from():
    model = pretrained.load()
    assert sum(path.stat().st_size for path in pretrained.MINIGPT.iterdir()) < 3e6
    provenance = json.loads((pretrained.MINIGPT / "provenance.json").read_text())
    assert provenance["validation"]["bits_per_character"] <= 1.05
    assert all(np.isfinite(array).all() for array in tiny.weights(model).values())
