"""A course in miniature for the tests: a few stories, a small vocabulary, a model that trains in milliseconds.

`python -m tests.helpers.tiny DIRECTORY [SECONDS]` trains it with checkpoints, and dies by SIGKILL so many seconds
after a save has begun, if it is told to.
"""

import functools
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
from flax import nnx

from utils import checkpoints, minigpt, train
from utils.course import pretrained, stories, tokenizer
from utils.data import corpus, packing

STEPS, LONG, SAVE_EVERY = 40, 200, 4  # LONG: room for ten kills


@functools.cache
def texts() -> tuple[str, ...]:
    return tuple(stories.generate(60, seed=3))


@functools.cache
def tok():
    ranks = tokenizer.train_bpe(texts(), 400)
    assert len(ranks) == 399
    return tokenizer.encoding(ranks, "tiny")


@functools.cache
def rows() -> tuple[np.ndarray, ...]:
    return tuple(corpus.encode(list(texts()), tok()))


def config(**changes) -> minigpt.Config:
    sizes = dict(
        vocab_size=400,
        max_position_embeddings=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return minigpt.Config(**(sizes | changes))


@functools.cache
def _made(sizes: minigpt.Config, seed: int) -> minigpt.MiniGPT:
    return minigpt.MiniGPT(sizes, rngs=nnx.Rngs(seed))


def model(seed: int = 0, **changes) -> minigpt.MiniGPT:
    """A copy of its own for each caller; making a model anew takes a second."""
    return nnx.clone(_made(config(**changes), seed))


def wild(seed: int = 0, **changes) -> minigpt.MiniGPT:
    """A model whose weights are large, so that its guesses differ from each other as a trained model's do."""
    made = model(seed, **changes)
    made.embed_tokens.embedding[...] = made.embed_tokens.embedding[...] * 15
    made.embed_positions.embedding[...] = made.embed_positions.embedding[...] * 15
    return made


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph, state, *inputs):
    return nnx.merge(graph, state)(*inputs)


def forward(made, *inputs):
    """`made(*inputs)`, compiled once per shape: called as it is, a model compiles its scan anew each time."""
    return _forward(*nnx.split(made), *inputs)


def batches(seed: int = 0):
    return packing.batches(rows(), 32, 4, eot=tok().eot_token, seed=seed)


def fit(
    made,
    directory=None,
    *,
    stream=None,
    loss=train.next_token_loss,
    steps=STEPS,
    peak=3e-3,
    **options,
):
    """`train.fit` with the sizes of this file."""
    options = (
        dict(directory=directory, save_every=SAVE_EVERY, log_every=10, progress=False) | options
    )
    tx = train.optimizer(train.schedule(peak, steps))
    return train.fit(
        made, batches() if stream is None else stream, loss, tx, steps=steps, **options
    )


def weights(made) -> dict[str, np.ndarray]:
    return checkpoints.named_parameters(made)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class Paced:
    """Batches that come no faster than one in 10 ms, so that moments to be killed at lie between steps on any machine."""

    def __init__(self, stream):
        self.stream, self.get_state, self.set_state = stream, stream.get_state, stream.set_state

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.01)
        return next(self.stream)


def main(directory: str, seconds: float | None = None) -> None:
    if seconds is not None:
        saves, save = iter(range(10**6)), train.Store.save

        def dying_save(*args):
            if next(saves) == 2:  # the third save of this process
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            save(*args)

        train.Store.save = dying_save
    print("started", flush=True)
    made = model()
    history = fit(made, directory, stream=Paced(batches()), steps=LONG)
    pretrained.save(
        made, directory + "/final", provenance={"steps": history.steps, "loss": history.loss}
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
