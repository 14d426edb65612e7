r"""Word problems without a network: a seeded generator of small sums, told as little stories, with worked answers.

The real data set for this is GSM8K (Cobbe et al. 2021), whose problems take two to eight steps: too many for a model of
135 M parameters, and not always to be had. The problems here take one to three steps with small numbers, so that a short
fine-tuning on a CPU can be measured. A frame is a story with holes, and the work that answers it:

    {name} has {a} {things}. {friend} gives {him} {b} more. How many {things} does {name} have now?
    Now {name} has [a + b] {things}.          ->    Now Mia has 7 + 5 = 12 apples.    (the result is called x)

Training and held-out problems are disjoint by construction: which split a problem belongs to is decided by its frame and
its numbers alone, so what is asked there has not been seen here, not even about somebody else and other things.
"""

import operator
import random
import re
import zlib
from dataclasses import dataclass

from utils import CourseError
from utils.data.stories import BOYS, GIRLS, PRONOUNS

HELD_OUT = 8  # one in so many combinations of frame and numbers is held out
LEVELS = {  # difficulty: (steps of a problem, the largest number to add, the largest to multiply by, the largest result)
    1: ((1,), 20, 9, 100),
    2: ((1, 2), 20, 9, 100),
    3: ((2, 3), 99, 12, 1_000),
}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
# fmt: off
THINGS = [
    "apples", "marbles", "stickers", "books", "pencils", "shells", "coins", "cards", "buttons", "beads", "stamps", "pears",
    "plums", "cookies", "muffins", "flowers", "stones", "balloons", "crayons", "peaches", "candles", "badges", "nuts",
    "lemons", "ribbons", "postcards", "acorns", "feathers", "tickets", "cherries",
]
BOXES = [("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"), ("bowl", "bowls"), ("tin", "tins")]
FRAMES = [
    # one step: tellings, then the work
    (["{name} has {a} {things}. {friend} gives {him} {b} more. How many {things} does {name} have now?",
      "{friend} gives {b} {things} to {name}, who already has {a}. How many {things} does {name} have then?"],
     "Now {name} has [a + b] {things}."),
    (["{name} finds {a} {things} in the morning and {b} in the afternoon. How many {things} does {he} find in all?",
      "In the morning {name} collects {a} {things}. Later that day {he} collects {b} more. How many is that in total?"],
     "Together that is [a + b] {things}."),
    (["There are {a} {things} on the table and {b} on the floor. How many {things} are there altogether?",
      "A {box} holds {a} {things}, and another {box} holds {b}. How many {things} are in the two {boxes} together?"],
     "Altogether there are [a + b] {things}."),
    (["{name} has {a} {things} and gives {b} of them to {friend}. How many {things} does {name} have left?",
      "Of {his} {a} {things}, {name} loses {b} on the way home. How many {things} are left?"],
     "There are [a - b] {things} left."),
    (["{name} has {a} {things}. {friend} has {b} {things}. How many more {things} does {name} have than {friend}?",
      "{name} counts {a} {things}, and {friend} counts {b}. How many more does {name} count than {friend}?"],
     "{name} has [a - b] more."),
    (["{name} needs {a} {things} and has {b} already. How many more {things} does {he} need?",
      "{name} wants to collect {a} {things}. So far {he} has {b}. How many are missing?"],
     "That takes [a - b] more {things}."),
    (["There are {n} {boxes} with {m} {things} in each. How many {things} are there in all?",
      "{name} fills {n} {boxes}, and puts {m} {things} into each {box}. How many {things} does {he} need?"],
     "That makes [n * m] {things}."),
    (["One {box} of {things} costs {m} dollars. How many dollars do {n} {boxes} cost?",
      "{name} buys {n} {boxes} of {things} for {m} dollars each. How many dollars does {he} pay?"],
     "The price is [n * m] dollars."),
    (["{name} reads {m} pages every day. How many pages does {he} read in {n} days?",
      "Every day {name} walks {m} miles. How many miles does {he} walk in {n} days?"],
     "In all that is [n * m]."),
    (["{name} shares {t} {things} equally among {n} friends. How many {things} does each friend get?",
      "{n} children share {t} {things} equally. How many {things} does each child get?"],
     "Each gets [t / n] {things}."),
    (["{name} packs {t} {things} into {boxes}, {n} into each. How many {boxes} does {he} need?",
      "{n} {things} fit into one {box}. How many {boxes} do {t} {things} need?"],
     "That takes [t / n] {boxes}."),
    # two steps
    (["{name} has {a} {things}. {He} finds {b} more and then gives {c} to {friend}. How many {things} does {he} have now?",
      "{name} starts with {a} {things}, gets {b} from {friend}, and loses {c}. How many {things} are left?"],
     "First {name} has [a + b] {things}. Then there are [x - c] left."),
    (["{name} has {a} {things}. {He} gives {b} to {friend} and {c} to a teacher. How many {things} does {he} keep?",
      "There are {a} {things} in a {box}. {name} takes {b} and {friend} takes {c}. How many {things} stay in the {box}?"],
     "Together that is [b + c]. It leaves [a - x] {things}."),
    (["{name} has {a} {things}. {friend} has {b} more than {name}. How many {things} do they have together?",
      "{name} picks {a} {things}, and {friend} picks {b} more than that. How many {things} do the two pick in all?"],
     "{friend} has [a + b] {things}. Together they have [a + x]."),
    (["{name} buys {n} {boxes} with {m} {things} in each, and then {b} single {things}. How many {things} does {he} have?",
      "There are {n} {boxes} of {m} {things} and {b} loose {things}. How many {things} are there in all?"],
     "The {boxes} hold [n * m] {things}. In all there are [x + b]."),
    (["{name} has {n} {boxes} with {m} {things} in each. {He} gives {b} {things} away. How many {things} are left?",
      "{name} buys {n} {boxes} of {m} {things} and uses {b} of the {things}. How many does {he} still have?"],
     "At first there are [n * m] {things}. Then there are [x - b] left."),
    (["{name} buys {n} {things} at {m} dollars each and pays with {d} dollars. How many dollars does {he} get back?",
      "{name} has {d} dollars. {He} buys {n} {things} for {m} dollars each. How many dollars are left?"],
     "The {things} cost [n * m] dollars. {name} has [d - x] dollars left."),
    (["{name} has {a} {things} and {friend} has {b}. They share all of them equally among {n} children. How many {things} "
      "does each child get?",
      "{name} puts {a} {things} and then {b} more into {n} {boxes}, the same number into each. How many {things} are in "
      "each {box}?"],
     "There are [a + b] {things}. Each gets [x / n]."),
    (["{name} earns {m} dollars an hour. {He} works {n} hours on Monday and {k} hours on Tuesday. How many dollars does "
      "{he} earn?",
      "A ticket costs {m} dollars. {name} buys {n} tickets and {friend} buys {k}. How many dollars do they pay together?"],
     "That is [n + k] times {m} dollars. In all it is [x * m] dollars."),
    # three steps
    (["{name} has {n} {boxes} with {m} {things} in each. {He} finds {b} more {things} and gives {c} to {friend}. How many "
      "{things} does {he} have now?",
      "A shop has {n} {boxes} of {m} {things}. {b} more {things} arrive and {c} are sold. How many {things} are left?"],
     "The {boxes} hold [n * m] {things}. With the others there are [x + b]. Then there are [y - c] left."),
    (["{name} buys {n} {things} at {m} dollars each and {k} {boxes} at {j} dollars each. How many dollars does {he} pay?",
      "{name} sells {n} {boxes} of {things} for {m} dollars each and {k} cakes for {j} dollars each. How many dollars does "
      "{he} get?"],
     "The first part costs [n * m] dollars. The second part costs [k * j] dollars. Together that is [x + y] dollars."),
    (["{name} has {a} {things} and {friend} has {b}. They lose {c} of them and share the rest equally among {n} children. "
      "How many {things} does each child get?",
      "{name} bakes {a} rolls in the morning and {b} in the evening. {c} are eaten, and the others go into {n} {boxes}, the "
      "same number into each. How many rolls are in each {box}?"],
     "At first there are [a + b]. Then there are [x - c] left. Each gets [y / n]."),
    (["{name} has {a} {things}. {friend} has {b} more than {name}. They give {c} {things} away. How many {things} do the "
      "two have left together?",
      "{name} picks {a} {things}, {friend} picks {b} more than that, and they use {c} of all the {things}. How many are "
      "left?"],
     "{friend} has [a + b] {things}. Together they have [a + x]. Then there are [y - c] left."),
    (["{name} puts {n} {things} into each of {m} {boxes}, and {friend} puts {k} {things} into each of {j} {boxes}. How many "
      "more {things} does {name} use than {friend}?",
      "{name} carries {m} {boxes} with {n} {things} in each. {friend} carries {j} {boxes} with {k} {things} in each. How "
      "many more {things} does {name} carry?"],
     "{name} has [n * m] {things}. {friend} has [k * j]. The difference is [x - y]."),
    (["{name} saves {m} dollars a week for {n} weeks. {He} spends {b} dollars and then finds {c} dollars. How many dollars "
      "does {he} have?",
      "{name} earns {m} dollars an hour and works {n} hours. {He} pays {b} dollars for {things} and gets {c} dollars from "
      "{friend}. How many dollars does {he} have?"],
     "At first there are [n * m] dollars. Then there are [x - b] left. In the end there are [y + c]."),
    (["{name} has {n} {boxes} with {m} {things} in each and shares all of them equally among {k} children. {friend} gives "
      "each child {b} more. How many {things} does each child have?",
      "{n} {boxes} of {m} {things} are shared equally among {k} children. Then each child finds {b} more {things}. How many "
      "{things} does each child have?"],
     "There are [n * m] {things}. Each child gets [x / k]. With the others that is [y + b]."),
]
# fmt: on
WORKS = {frame: len(re.findall(r"\[", work)) for frame, (_, work) in enumerate(FRAMES)}


@dataclass(frozen=True)
class Sum:
    """A word problem, the work that answers it in short sentences, and the answer, a whole number."""

    problem: str
    work: str
    answer: int


def generate(n: int, split: str = "train", difficulty: int = 2, seed: int = 0) -> list[Sum]:
    """The first `n` problems of a seed, no two alike: `generate(5)` is the start of `generate(10)`.

    `split` is "train" or "test" (held out); `difficulty` is 1 (one step), 2 (one or two steps) or 3 (two or three steps,
    larger numbers). Raises CourseError for anything else.
    """
    if split not in ("train", "test"):
        raise CourseError(f"split: expected train or test, found {split!r}")
    if difficulty not in LEVELS:
        raise CourseError(f"difficulty: expected {', '.join(map(str, LEVELS))}, found {difficulty!r}")
    rng, found = random.Random(f"arithmetic {seed} {split} {difficulty}"), {}
    while len(found) < n:
        made = _draw(rng, split, difficulty)
        if made is not None:
            found.setdefault(made.problem, made)
    return list(found.values())


def held_out(frame: int, numbers: dict[str, int]) -> bool:
    """Whether the problems of this frame with these numbers are for testing."""
    return zlib.crc32(f"{frame} {sorted(numbers.items())}".encode()) % HELD_OUT == 0


def _draw(rng: random.Random, split: str, difficulty: int) -> Sum | None:
    """A problem, or None where the numbers drawn make none, or one of the other split."""
    steps, added, factor, largest = LEVELS[difficulty]
    wanted = rng.choice(steps)  # first the number of steps, so that each is as frequent
    frame = rng.choice([frame for frame, of in WORKS.items() if of == wanted])
    tellings, work = FRAMES[frame]
    while True:  # numbers that work out
        ranges = {name: added for name in "abc"} | {name: factor for name in "nmkj"} | {"t": largest, "d": 100}
        telling = tellings[0]  # all tellings of a frame have the same holes for numbers
        numbers = {name: rng.randint(2, top) for name, top in ranges.items() if f"{{{name}}}" in telling}
        if (results := _results(work, numbers, largest)) is not None:
            break
    if held_out(frame, numbers) != (split == "test"):
        return None
    holes = _cast(rng) | numbers
    sentences = re.sub(r"\[(.*?)\]", lambda _: results.pop(0)[0], work)
    answer = _results(work, numbers, largest)[-1][1]
    return Sum(_fill(rng.choice(tellings), holes), _fill(sentences, holes), answer)


def _results(work: str, numbers: dict[str, int], largest: int) -> list[tuple[str, int]] | None:
    """Each step as ("7 + 5 = 12", 12); None where a result is no whole number from 2 to `largest`."""
    known, steps = dict(numbers), []
    for name, (left, sign, right) in zip("xyz", re.findall(r"\[(\w) (.) (\w)\]", work)):
        a, b = known[left], known[right]
        result = known[name] = OPERATORS[sign](a, b)
        if not 2 <= result <= largest or (sign == "/" and a % b):  # from 2: "1 apples" is no English
            return None
        steps.append((f"{a} {sign} {b} = {result}", result))
    return steps


def _cast(rng: random.Random) -> dict[str, str]:
    she = rng.random() < 0.5
    name, friend = rng.choice(GIRLS if she else BOYS), rng.choice(GIRLS + BOYS)
    while friend == name:
        friend = rng.choice(GIRLS + BOYS)
    box, boxes = rng.choice(BOXES)
    he, him, his, _ = PRONOUNS[she]
    cast = {"name": name, "friend": friend, "he": he, "him": him, "his": his, "He": he.capitalize()}
    return cast | {"things": rng.choice(THINGS), "box": box, "boxes": boxes}


def _fill(text: str, holes: dict) -> str:
    return text.format_map(holes)
