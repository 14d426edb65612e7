"""Film reviews without a network: seeded labelled sentences, for when SST-2 cannot be had.

SST-2 (Socher et al. 2013) asks whether a sentence from a film review is positive or negative. The
sentences here are made in its manner, lower case with spaced punctuation: a frame with holes
(`assets/reviews.toml`), filled with words of one opinion or the other. Some say it straight, some
negate the opposite, some concede a point first, so that counting good and bad words is not enough.
They are easier than the real data: an accuracy on them says nothing about SST-2.
"""

import random
import re
import tomllib
from pathlib import Path

POSITIVE, NEGATIVE = 1, 0
TEXTS = tomllib.loads((Path(__file__).parent / "assets" / "reviews.toml").read_text("utf-8"))


def generate(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """`n` different labelled sentences (1 positive, 0 negative), half of each.

    `generate(5)` is the start of `generate(10)`.
    """
    rng, labels = random.Random(f"reviews {seed}"), {}
    while len(labels) < n:
        label = POSITIVE if len(labels) % 2 else NEGATIVE
        labels.setdefault(_sentence(rng, label), label)
    return list(labels.items())


def _sentence(rng: random.Random, label: int) -> str:
    # A negative review is the same frame with the two lists of words exchanged.
    good, bad, loved = "praise", "blame", "loved"
    if label == NEGATIVE:
        good, bad, loved = "blame", "praise", "hated"
    holes = {}
    for hole, words in (("good", good), ("bad", bad), ("noun", "nouns")):
        holes[hole], holes[f"{hole}2"] = rng.sample(TEXTS[words], 2)
    frame = rng.choice(TEXTS["frames"])
    for hole, words in (("whole", "whole"), ("part", "part"), ("loved", loved)):
        holes[hole] = rng.choice(TEXTS[words])
    sentence = re.sub(r"\ba (?=[aeiou])", "an ", frame.format(**holes))
    return sentence if rng.random() < 0.7 else sentence.removesuffix(" .")
