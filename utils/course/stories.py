"""Stories without a network: a seeded generator of short tales in the manner of TinyStories.

The real data set cannot always be reached. This module writes stories like it: a hero, a place, a
problem, somebody who helps, a happy end, and what was learned. Each plot in `assets/plots.txt` is
a text with three kinds of holes:

    <toy>            one entry of a table of the plot, the same throughout the story
    [one|two|three]  one of the phrases, chosen anew each time it is met; they can be nested
    {name} {he}      the cast: the hero, a friend and a grown-up, with pronouns that agree

Story number i of a seed depends on nothing else, so `generate(5)` is the start of `generate(10)`.
"""

import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path

from utils.data.arithmetic import BOYS, GIRLS, PRONOUNS

# fmt: off
ANIMALS = [
    "rabbit", "bear", "fox", "mouse", "duck", "frog", "cat", "dog", "squirrel", "turtle",
    "hedgehog", "owl", "badger", "beaver", "mole", "panda", "pig", "goat", "otter", "raccoon",
]
# fmt: on
ELDERS = [("mom", True), ("dad", False), ("grandma", True), ("grandpa", False)]


@dataclass(frozen=True)
class Plot:
    """A text with holes, and for each table the names of its holes and its rows."""

    text: str
    tables: tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...]


@functools.cache
def plots() -> tuple[Plot, Plot, tuple[Plot, ...]]:
    """The opening, the closing and the plots, read from `assets/plots.txt`."""
    text = (Path(__file__).parent / "assets" / "plots.txt").read_text(encoding="utf-8")
    parsed = {}
    for block in re.split(r"(?m)^=== ", text)[1:]:  # what stands before the first plot is a comment
        title, _, body = block.partition("\n")
        story, *tables = re.split(r"(?m)^table: ", body)
        parsed[title] = Plot(_tidy(story), tuple(map(_table, tables)))
    return parsed.pop("opening"), parsed.pop("closing"), tuple(parsed.values())


def _table(block: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    names, _, body = block.partition("\n")
    names = tuple(names.split())
    if len(names) == 1:
        return names, tuple((entry.strip(),) for entry in " ".join(body.split()).split(" / "))
    rows = tuple(tuple(line.split(" / ")) for line in body.strip().splitlines())
    assert all(len(row) == len(names) for row in rows), f"plots.txt, table {names}: uneven rows"
    return names, rows


def _tidy(text: str) -> str:
    """One space between words, one newline between paragraphs."""
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n|\n$", text)).strip()


def _choose(text: str, rng: random.Random) -> str:
    """Replace every [one|two|three], the innermost first."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda hole: rng.choice(hole[1].split("|")), text)
    return text


def _cast(rng: random.Random) -> dict[str, str]:
    """A hero, a friend and a grown-up: their names, kinds and pronouns."""
    girl, friend_girl = rng.random() < 0.5, rng.random() < 0.5
    name = rng.choice(GIRLS if girl else BOYS)
    friend = rng.choice([other for other in (GIRLS if friend_girl else BOYS) if other != name])
    if rng.random() < 0.6:
        kind, friend_kind = ("girl" if girl else "boy"), ("girl" if friend_girl else "boy")
    else:
        kind, friend_kind = rng.sample(ANIMALS, 2)
    elder, elder_is_she = rng.choice(ELDERS)
    cast = dict(name=name, friend=friend, kind=kind, fkid=f"a {friend_kind}", elder=elder)
    for letter, is_she in (("", girl), ("e", elder_is_she)):
        for word, pronoun in zip(("he", "him", "his", "himself"), PRONOUNS[is_she], strict=True):
            cast[letter + word] = pronoun
            cast[letter + word.capitalize()] = pronoun.capitalize()
    cast["Elder"] = elder.capitalize()
    return cast


def _story(rng: random.Random) -> str:
    opening, closing, every = plots()
    plot = rng.choice(every)
    text = f"{opening.text}\n{plot.text} {closing.text}"
    values = {}
    for names, rows in opening.tables + plot.tables + closing.tables:
        values.update(zip(names, (_choose(entry, rng) for entry in rng.choice(rows)), strict=True))
    text = _choose(re.sub(r"<(\w+)>", lambda hole: values[hole[1]], text), rng)
    cast = _cast(rng)
    text = _tidy(re.sub(r"\{(\w+)\}", lambda hole: cast[hole[1]], text).replace("\n", "\n\n"))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def generate(n: int, seed: int = 0) -> list[str]:
    """The first n stories of a seed: the same on every machine, without end, different per seed."""
    # A text seeds through SHA-512, so neighbouring numbers give unrelated stories.
    return [_story(random.Random(f"{seed} {number}")) for number in range(n)]
