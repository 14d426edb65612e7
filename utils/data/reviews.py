"""Short film reviews without a network: a seeded generator of labelled sentences, for when SST-2 cannot be had.

SST-2 (Socher et al. 2013) asks whether a sentence from a film review is positive or negative. The sentences here are
made in its manner, lower case with spaced punctuation: a frame with holes, filled with words of one opinion or the
other. Some say it straight, some negate the opposite, some concede a point first, so that counting good and bad words
is not enough. They are easier than the real data: an accuracy on them says nothing about SST-2.
"""

import random
import re

POSITIVE, NEGATIVE = 1, 0
# fmt: off
PRAISE = [
    "charming", "gripping", "tender", "witty", "inventive", "moving", "hilarious", "warm", "elegant", "thrilling",
    "heartfelt", "smart", "vivid", "graceful", "delightful", "stirring", "fresh", "sharp", "absorbing", "luminous",
    "touching", "clever", "haunting", "exhilarating",
]
BLAME = [
    "dull", "clumsy", "tedious", "shallow", "predictable", "lifeless", "bloated", "muddled", "stale", "grating",
    "hollow", "lazy", "contrived", "sluggish", "forgettable", "bland", "incoherent", "crude", "dreary", "tiresome",
    "clichéd", "pointless", "flat", "overlong",
]
LOVED = [
    "a small triumph", "a joy from start to finish", "a film to treasure", "the best surprise of the season",
    "well worth the ticket", "a rare pleasure", "one of the year 's finest", "a feast for the eyes",
]
HATED = [
    "a waste of good actors", "a chore to sit through", "a long way from funny", "the worst kind of sequel",
    "hardly worth renting", "an empty exercise", "a mess in every sense", "two hours you never get back",
]
WHOLE = [
    "the film", "this comedy", "this drama", "the documentary", "this thriller", "the movie", "this love story",
    "the sequel", "this debut", "the picture", "this western", "the remake",
]
PART = [
    "the acting", "the script", "the score", "the camera work", "the dialogue", "the pacing", "the plot", "the humor",
    "the cast", "the ending", "the direction", "the first hour", "the editing", "the lead performance",
]
FRAMES = [
    "{whole} is {good} and {good2} .",
    "a {good} , {good2} piece of work .",
    "{part} is {good} , and {whole} is {loved} .",
    "{whole} is {loved} .",
    "although {part} is {bad} , {whole} is {good} and {loved} .",
    "{part} may be {bad} , but {whole} turns out {good} .",
    "never {bad} , always {good} .",
    "{whole} is anything but {bad} .",
    "i expected something {bad} and got something {good} .",
    "{good} {noun} , {good2} {noun2} .",
    "it 's {loved} , thanks to {part} .",
    "there is nothing {bad} about {part} , and nothing {bad2} about {whole} .",
    "{part} alone makes {whole} {loved} .",
    "as {good} as it is {good2} .",
    "{whole} starts out {bad} and ends up {good} .",
    "what a {good} way to spend an evening .",
    "with {part} this {good} , {whole} is {loved} .",
    "so {good} that you forgive {part} for being {bad} .",
]
NOUNS = [
    "storytelling", "performances", "music", "images", "jokes", "characters", "ideas", "scenes", "dialogue", "action",
]
# fmt: on


def generate(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """`n` different labelled sentences (1 positive, 0 negative), half of each. Number i depends on `seed` and i alone
    but for repetitions, which are left out, so `generate(5)` is the start of `generate(10)`."""
    rng, found = random.Random(f"reviews {seed}"), {}
    while len(found) < n:
        label = POSITIVE if len(found) % 2 else NEGATIVE
        found.setdefault(_sentence(rng, label), label)
    return list(found.items())


def _sentence(rng: random.Random, label: int) -> str:
    # A negative review is the same frame with the two lists of words exchanged.
    good, bad = (PRAISE, BLAME) if label == POSITIVE else (BLAME, PRAISE)
    (good1, good2), (bad1, bad2), (noun1, noun2) = (rng.sample(words, 2) for words in (good, bad, NOUNS))
    sentence = rng.choice(FRAMES).format(
        whole=rng.choice(WHOLE), part=rng.choice(PART), loved=rng.choice(LOVED if label == POSITIVE else HATED),
        good=good1, good2=good2, bad=bad1, bad2=bad2, noun=noun1, noun2=noun2,
    )  # fmt: skip
    sentence = re.sub(r"\ba (?=[aeiou])", "an ", sentence)
    return sentence if rng.random() < 0.7 else sentence.removesuffix(" .")
