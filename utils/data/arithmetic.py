r"""Word problems without a network: seeded little stories of small sums, with worked answers.

The real data set, GSM8K (Cobbe et al. 2021), takes two to eight steps: too many for a model of
135 M parameters, and not always to be had. These take one to three steps with small numbers, so
that a short fine-tuning on a CPU can be measured. A frame (`assets/arithmetic.toml`) is a story
with holes, and the work that answers it:

    {name} has {a} {things}. {friend} gives {him} {b} more. How many {things} does {name} have now?
    Now {name} has [a + b] {things}.      ->      Now Mia has 7 + 5 = 12 apples.

Later steps may use the results of earlier ones: x, y and z. The frame and the numbers alone decide
the split of a problem: what is held out was not seen in training, not even about somebody else.
"""

import operator
import random
import re
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path

from utils import unexpected

HELD_OUT = 8  # one in so many combinations of frame and numbers is held out
# difficulty: (steps of a problem, largest number to add, largest to multiply by, largest result)
LEVELS = {1: ((1,), 20, 9, 100), 2: ((1, 2), 20, 9, 100), 3: ((2, 3), 99, 12, 1_000)}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_TEXTS = tomllib.loads((Path(__file__).parent / "assets" / "arithmetic.toml").read_text("utf-8"))
GIRLS, BOYS, THINGS = _TEXTS["girls"], _TEXTS["boys"], _TEXTS["things"]
BOXES = _TEXTS["boxes"]  # (singular, plural)
PRONOUNS = {True: ("she", "her", "her", "herself"), False: ("he", "him", "his", "himself")}
FRAMES = [(frame["tellings"], frame["work"]) for frame in _TEXTS["frames"]]
STEPS = [work.count("[") for _, work in FRAMES]  # of each frame


@dataclass(frozen=True)
class Sum:
    """A word problem, the work that answers it in short sentences, and the answer."""

    problem: str
    work: str
    answer: int


def generate(n: int, split: str = "train", difficulty: int = 2, seed: int = 0) -> list[Sum]:
    """The first `n` problems of a seed, no two alike: `generate(5)` is the start of `generate(10)`.

    `split` is "train" or "test" (held out); `difficulty` is 1 (one step), 2 (one or two steps) or 3
    (two or three steps, larger numbers). Raises CourseError for other values.
    """
    if split not in ("train", "test"):
        raise unexpected("split", "train or test", repr(split))
    if difficulty not in LEVELS:
        raise unexpected("difficulty", f"one of {[*LEVELS]}", repr(difficulty))
    rng, sums = random.Random(f"arithmetic {seed} {split} {difficulty}"), {}
    while len(sums) < n:
        if (drawn := _draw(rng, split, difficulty)) is not None:
            sums.setdefault(drawn.problem, drawn)
    return list(sums.values())


def held_out(frame: int, numbers: dict[str, int]) -> bool:
    """Whether the problems of this frame with these numbers are for testing."""
    return zlib.crc32(f"{frame} {sorted(numbers.items())}".encode()) % HELD_OUT == 0


def _draw(rng: random.Random, split: str, difficulty: int) -> Sum | None:
    """A problem, or None where the numbers drawn make none, or one of the other split."""
    steps, added, factor, largest = LEVELS[difficulty]
    number = rng.choice(steps)  # first the number of steps, so that each is as frequent
    frame = rng.choice([frame for frame, count in enumerate(STEPS) if count == number])
    tellings, work = FRAMES[frame]
    tops = dict.fromkeys("abc", added) | dict.fromkeys("nmkj", factor) | {"t": largest, "d": 100}
    # All tellings of a frame have the same holes for numbers.
    tops = {name: top for name, top in tops.items() if f"{{{name}}}" in tellings[0]}
    results = None
    while results is None:  # until the numbers work out
        numbers = {name: rng.randint(2, top) for name, top in tops.items()}
        results = _results(work, numbers, largest)
    if held_out(frame, numbers) != (split == "test"):
        return None
    holes, answer = _cast(rng) | numbers, results[-1][1]
    sentences = re.sub(r"\[(.*?)\]", lambda _: results.pop(0)[0], work)
    return Sum(rng.choice(tellings).format(**holes), sentences.format(**holes), answer)


def _results(work: str, numbers: dict[str, int], largest: int) -> list[tuple[str, int]] | None:
    """Each step as ("7 + 5 = 12", 12); None if a result is no whole number from 2 to `largest`."""
    known, steps = dict(numbers), []
    for name, (left, sign, right) in zip("xyz", re.findall(r"\[(\w) (.) (\w)\]", work)):
        a, b = known[left], known[right]
        result = known[name] = OPERATORS[sign](a, b)
        if not 2 <= result <= largest or (sign == "/" and a % b):  # "1 apples" is no English
            return None
        steps.append((f"{a} {sign} {b} = {result}", result))
    return steps


def _cast(rng: random.Random) -> dict[str, str]:
    she = rng.random() < 0.5
    name = friend = rng.choice(GIRLS if she else BOYS)
    while friend == name:
        friend = rng.choice(GIRLS + BOYS)
    box, boxes = rng.choice(BOXES)
    he, him, his, _ = PRONOUNS[she]
    cast = {"name": name, "friend": friend, "he": he, "him": him, "his": his, "He": he.capitalize()}
    return cast | {"things": rng.choice(THINGS), "box": box, "boxes": boxes}
