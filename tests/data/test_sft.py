"""From problems to rows: what a model is shown, which tokens are in the loss, and that packing changes neither."""

import logging

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers import checkpoints, real
from utils import CourseError, lora
from utils.commands import finetune
from utils.data import sft
from utils.data.problems import Problem
from utils.hf import hub

FOLDER = checkpoints.folder_of("qwen2-untied")


def problem(question="What is it?", response="It is so.", **more) -> Problem:
    return Problem(
        **{
            "messages": [{"role": "user", "content": question}],
            "response": response,
            "answer": None,
            "source": "test",
        }
        | more
    )


PROBLEMS = [problem("Why?" * (1 + i % 4), "Because. " * (1 + i % 5)) for i in range(12)]


@pytest.fixture(scope="module")
def tok():
    return hub.tokenizer(FOLDER)


@pytest.fixture(scope="module")
def examples(tok):
    return sft.tokenise(PROBLEMS, tok)


def scored(rows: dict, tok) -> list[str]:
    """The text of each example's targets that are in the loss, by rows and segments."""
    found = []
    for targets, segments, weights in zip(rows["targets"], rows["segment_ids"], rows["loss_mask"]):
        for example in range(1, segments.max() + 1):
            found.append(
                tok.decode(
                    targets[(segments == example) & (weights > 0)], skip_special_tokens=False
                )
            )
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_the_completion_and_its_end_are_in_the_loss_and_nothing_else(tok, examples, packing):
    rows = sft.to_rows(sft.within(examples, 128), 128, packing=packing)
    wanted = [p.response + "<|eos|>" for p in PROBLEMS]
    assert sorted(scored(rows, tok)) == sorted(wanted)
    assert (len(rows["inputs"]) == len(PROBLEMS)) == (not packing)
    everything = sft.to_rows(sft.within(examples, 128), 128, packing=packing, completion_only=False)
    assert (everything["loss_mask"] == (everything["segment_ids"] > 0)).all()


def test_the_prompt_is_the_one_that_is_asked_later(tok, examples):
    ids, prompt = examples.example(3)
    assert ids[:prompt].tolist() == tok.encode(tok.chat(PROBLEMS[3].messages))
    assert ids[-1] == tok.eos_token_id


def test_inputs_and_targets_are_one_token_apart_within_each_segment(examples):
    rows = sft.to_rows(sft.within(examples, 128), 128)
    same = (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1]) & (
        rows["segment_ids"][:, 1:] > 0
    )
    assert (rows["inputs"][:, 1:][same] == rows["targets"][:, :-1][same]).all() and same.any()
    assert (rows["loss_mask"][rows["segment_ids"] == 0] == 0).all()


def test_packed_equals_padded_for_every_example(examples):
    """The loss of each example, alone in its row or beside others: within 1e-5."""
    model = checkpoints.model("qwen2-untied")
    kept = sft.within(examples, 128)

    def losses(rows):
        logits = np.asarray(checkpoints.run(model, rows["inputs"], segment_ids=rows["segment_ids"]))
        logp = np.asarray(jax.nn.log_softmax(logits))
        nats = -np.take_along_axis(logp, rows["targets"][..., None], -1)[..., 0] * rows["loss_mask"]
        found = []
        for row, segments in enumerate(rows["segment_ids"]):
            for example in range(1, segments.max() + 1):
                here = segments == example
                found.append((tuple(rows["inputs"][row][here]), nats[row][here].sum()))
        return sorted(found)

    packed, padded = (losses(sft.to_rows(kept, 128, packing=packing)) for packing in (True, False))
    assert [inputs for inputs, _ in packed] == [inputs for inputs, _ in padded]
    np.testing.assert_allclose([x for _, x in packed], [x for _, x in padded], rtol=1e-5)


def test_a_gradient_is_the_same_packed_and_padded(examples):
    kept, losses, gradients = sft.within(examples, 128), [], []
    loss = finetune.loss_fn(chunk_size=32)
    for packing in (True, False):
        model = checkpoints.model("qwen2-untied")
        lora.inject(model, rank=2, target_modules=("q_proj", "down_proj"), rngs=nnx.Rngs(0))
        rows = jax.device_put(sft.to_rows(kept, 128, packing=packing))
        graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)

        def of(trainable, graph=graph, frozen=frozen, rows=rows):
            return loss(nnx.merge(graph, trainable, frozen), rows, None)

        value, gradient = jax.jit(jax.value_and_grad(of))(trainable)
        losses.append(value)
        gradients.append(jax.tree.leaves(gradient))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(np.asarray(b)).max()))


def test_a_cut_answer_has_no_end_and_long_examples_are_counted(tok, caplog):
    long = problem("Why?", "And so on. " * 40)
    examples = sft.tokenise([PROBLEMS[0], long, problem("What? " * 60)], tok)
    with caplog.at_level(logging.INFO):
        kept = sft.within(examples, 64, cut=True)
    assert "2 of 3 examples are longer than 64 tokens: 1 cut, 1 skipped" in caplog.text
    assert [ids[-1] == tok.eos_token_id for ids, _ in map(kept.example, range(2))] == [True, False]
    assert kept.lengths.max() == 65
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert len(sft.within(examples, 64)) == 1
    assert "2 of 3 examples are longer than 64 tokens: skipped" in caplog.text


def test_what_fits_is_counted(examples):
    lengths = examples.lengths - 1
    assert sft.fitting(examples, (1, lengths.min(), 4096)) == {
        1: 0,
        lengths.min(): (lengths == lengths.min()).sum(),
        4096: 12,
    }


def test_r1_thinks_once_and_begins_once():
    tok = real.or_skip(lambda: hub.tokenizer(hub.R1), "models", hub.R1)
    asked = problem("1+1?", "<think>\nOne and one.\n</think>\n\nIt is \\boxed{2}.")
    ids, prompt = sft.tokenise([asked], tok).example(0)
    text = tok.decode(ids, skip_special_tokens=False)
    assert text.count("<think>") == 1 and text.count("</think>") == 1
    assert (
        (ids == tok.bos_token_id).sum() == 1
        and ids[0] == tok.bos_token_id
        and ids[-1] == tok.eos_token_id
    )
    assert tok.decode(ids[:prompt]).endswith("<think>\n")


def test_a_base_model_is_asked_without_a_chat(tok):
    assert sft.render(problem("Question: 1+1?\nAnswer: "), tok, chat=False) == (
        "Question: 1+1?\nAnswer: ",
        "It is so.",
    )


def test_the_cache_knows_everything_that_it_depends_on(tok, tmp_path, monkeypatch):
    first = sft.tokenise(PROBLEMS, tok, cache=tmp_path)
    (folder,) = (tmp_path / "tokens").iterdir()
    (file,) = folder.iterdir()
    monkeypatch.setattr(type(tok), "encode", lambda *_, **__: 1 / 0)  # nobody tokenises again
    again = sft.tokenise(PROBLEMS, tok, cache=tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(again).values()))
    with pytest.raises(ZeroDivisionError):
        sft.tokenise(PROBLEMS[:-1], tok, cache=tmp_path)
    with pytest.raises(ZeroDivisionError):
        sft.tokenise(PROBLEMS, tok, chat=False, cache=tmp_path)
    file.write_bytes(file.read_bytes()[:200])  # a damaged cache is made again, not believed
    with pytest.raises(ZeroDivisionError):
        sft.tokenise(PROBLEMS, tok, cache=tmp_path)
    monkeypatch.undo()
    sft.tokenise(PROBLEMS, tok, cache=tmp_path)
    assert file.exists()


def test_batches_continue_where_they_stopped(examples):
    rows = sft.to_rows(sft.within(examples, 128), 128, packing=False)
    stream = sft.batches(rows, 4)
    seen = [next(stream) for _ in range(3)]
    assert len({row.tobytes() for batch in seen for row in batch["inputs"]}) == len(
        {row.tobytes() for row in rows["inputs"]}
    )
    state, wanted = stream.get_state(), next(stream)
    other = sft.batches(rows, 4)
    other.set_state(state)
    assert all(np.array_equal(wanted[name], value) for name, value in next(other).items())


def test_two_processes_read_their_own_halves_of_the_same_batches(examples, monkeypatch):
    rows = sft.to_rows(sft.within(examples, 128), 128, packing=False)
    whole = next(sft.batches(rows, 4))["inputs"]
    halves = []
    for host in (0, 1):
        monkeypatch.setattr(sft.jax, "process_count", lambda: 2)
        monkeypatch.setattr(sft.jax, "process_index", lambda host=host: host)
        halves.append(next(sft.batches(rows, 4))["inputs"])
    assert np.array_equal(np.concatenate(halves), whole)
    with pytest.raises(CourseError, match="multiple of the 2 processes, found 3"):
        sft.batches(rows, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tok, e: sft.tokenise([], tok), "expected at least one, found none"),
        (lambda tok, e: sft.within(e, 1), "max_seq_length: expected at least 2 tokens, found 1"),
        (
            lambda tok, e: sft.within(e, 5),
            "max_seq_length: 5 tokens are too few: the shortest of 12 examples has",
        ),
        (
            lambda tok, e: sft.batches(sft.to_rows(sft.within(e, 128), 128), 99),
            "batch_size: expected at most .* found 99",
        ),
    ],
)
def test_bad_input_is_one_line(tok, examples, call, words):
    with pytest.raises(CourseError, match=words) as error:
        call(tok, examples)
    assert "\n" not in str(error.value)
