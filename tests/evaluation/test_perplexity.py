"""Bits per character: every token counted once, the same number as by hand."""

import math

import numpy as np
import pytest

from tests.helpers import tiny
from utils import CourseError
from utils.course import tokenizer
from utils.evaluation import perplexity


@pytest.mark.parametrize("context", [1, 2, 3, 4, 7, 8, 32])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 100])
def test_windows_count_every_target_once_in_its_own_context(length, context):
    row = np.arange(1000, 1000 + length)
    counted = []
    for inputs, targets, weight in perplexity.windows(row, context):
        assert inputs.shape == targets.shape == weight.shape == (context,)
        assert set(np.unique(weight)) <= {0, 1}
        real = weight == 1
        np.testing.assert_array_equal(targets[real], inputs[real] + 1)  # the token that follows
        inside = np.flatnonzero(real)
        if (
            inside.size and inputs[0] > 1000
        ):  # a later window: half a context has been read before its first guess
            assert (
                inside[0] >= context // 2
                or inside[-1] == inside[0] + inside.size - 1
                and inside[0] >= 0
            )
            assert inside[0] >= min(context // 2, context - 1) - 1
        counted += targets[real].tolist()
    assert counted == list(range(1001, 1000 + length))


def by_hand(model, stories):
    """One token at a time, one window at a time, in float64."""
    tok, context = tiny.tok(), model.config.max_position_embeddings
    nats = tokens = 0
    for story in stories:
        row = [tok.eot_token, *tok.encode_ordinary(story), tok.eot_token]
        assert len(row) - 1 <= context
        logits = np.asarray(tiny.forward(model, np.array([row[:-1]])), np.float64)[0]
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        nats -= sum(logp[t, target] for t, target in enumerate(row[1:]))
        tokens += len(row) - 1
    return nats, tokens


def test_it_equals_a_computation_by_hand():
    model, stories = (
        tiny.wild(max_position_embeddings=128),
        ["The dog ran.", "A cat sat. It was happy!", "", "Nö 🎈."],
    )
    score = perplexity.bits_per_character(model, tiny.tok(), stories, batch_size=3)
    nats, tokens = by_hand(model, stories)
    characters = len("".join(stories))
    assert (score.tokens, score.characters) == (tokens, characters)
    assert score.bits_per_character == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
    assert score.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)


def test_an_untrained_model_guesses_uniformly():
    score = perplexity.bits_per_character(tiny.model(), tiny.tok(), tiny.texts()[:5])
    assert score.nats_per_token == pytest.approx(math.log(400), rel=0.01)
    assert score.bits_per_character == pytest.approx(
        score.nats_per_token / math.log(2) * score.tokens / score.characters
    )


def test_batch_size_changes_nothing():
    scores = [
        perplexity.bits_per_character(
            tiny.wild(), tiny.tok(), tiny.texts()[:4], batch_size=size
        ).nats_per_token
        for size in (1, 7, 32)
    ]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)


def test_stories_longer_than_the_context_are_scored_whole():
    stories = [" ".join(tiny.texts()[:3])]
    score = perplexity.bits_per_character(tiny.model(), tiny.tok(), stories)
    assert score.tokens == len(tiny.tok().encode_ordinary(stories[0])) + 1 > 3 * 32


@pytest.mark.parametrize("stories", [[], [""], "One story, not a list"])
def test_nothing_to_evaluate_on_is_an_error(stories):
    with pytest.raises(CourseError, match="stories: expected a list of at least one text") as error:
        perplexity.bits_per_character(tiny.model(), tiny.tok(), stories)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [300, 500])
def test_a_tokenizer_of_another_size_is_refused(size):
    other = tokenizer.encoding(tokenizer.train_bpe(tiny.texts(), size), "other")
    with pytest.raises(CourseError, match="use the tokenizer that the model was trained with"):
        perplexity.bits_per_character(tiny.model(), other, tiny.texts())
