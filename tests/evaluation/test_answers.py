"""Which answer a text gives, whether in the form asked for, and whether it means the same as the reference."""

import subprocess
import sys
import threading
import time

import pytest

from utils import CourseError
from utils.evaluation import answers

EXTRACTED = {
    "a box": (r"So it is \boxed{9}.", "9"),
    "the last of several boxes": (r"First \boxed{7}, no, \boxed{8}.", "8"),
    "nested braces": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "braces in braces in braces": (
        r"\boxed{\sqrt{\frac{a^{2}}{b}}} done}",
        r"\sqrt{\frac{a^{2}}{b}}",
    ),
    "a set, whose braces are escaped": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "one escaped brace": (r"\boxed{\{x : x > 0}", r"\{x : x > 0"),
    "a line break before TeX's next brace": (r"\boxed{a\\{b}}", r"a\\{b}"),
    "a space before the brace": (r"\boxed {4}", "4"),
    "fbox": (r"\fbox{4}", "4"),
    "a box in dollars": (r"$$\boxed{ 12 }$$", "12"),
    "text in a box": (r"\boxed{\text{Tuesday}}", r"\text{Tuesday}"),
    "a box wins over a later number": (r"\boxed{3} (see page 12)", "3"),
    "an empty box is none": (r"It is 5, in \boxed{}", "5"),
    "a box that is not closed is none": (r"\boxed{5", "5"),
    "a box that is not closed after one that is": (r"\boxed{4} or \boxed{5", "4"),
    "a box in the reasoning and another after it": (r"<think>\boxed{1}</think>\boxed{2}", "2"),
    "a box in the reasoning, a number after it": (
        r"<think>\boxed{1}</think> The answer is 2.",
        "2",
    ),
    "a box in the reasoning alone": (r"<think>\boxed{1}</think> Done.", "1"),
    "the template opened the reasoning": (r"maybe \boxed{1}</think>\boxed{2}", "2"),
    "reasoning that never ends": (r"<think> It could be \boxed{1}, or", "1"),
    "GSM8K's mark": ("5 + 7 = 12\n#### 12", "12"),
    "GSM8K's mark, then more": ("#### 12\nIs that 13?", "12"),
    "GSM8K's mark with a unit": ("#### $1,250 ", "1,250"),
    "the last number": ("There are 3 and 4, so 7 apples.", "7"),
    "a number at the end of a sentence": ("The answer is 7.", "7"),
    "a decimal": ("It costs 2.50 in all.", "2.50"),
    "a decimal without its zero": ("It is .5", ".5"),
    "thousands": ("That makes 1,234,567.", "1,234,567"),
    "money": ("She has $18 left.", "$18"),
    "a negative number": ("The difference is -4 degrees", "-4"),
    "a difference is not a negative number": ("It is 10 - 4", "4"),
    "nor is a range": ("pages 10-12", "12"),
    "a fraction": ("He ate 3/4 of it", "3/4"),
    "a percentage": ("It fell by 15%.", "15%"),
    "bold": ("**42**", "42"),
    "not part of a word": ("The answer is 5, says R2D2", "5"),
    "not a list read as thousands": ("They are 1,2,3", "3"),
    "a number of another script": ("١٢", None),
    "words": ("I do not know.", None),
    "nothing": ("", None),
    "an empty mark": ("####", None),
}
FORMATTED = {
    r"So \boxed{9}.": True,
    r"\boxed{\frac{1}{2}}": True,
    r"<think>\boxed{1} or \boxed{2}</think>\boxed{2}": True,
    r"\boxed{1}</think>\boxed{2}": True,
    "9": False,
    r"\boxed{}": False,
    r"\boxed{ }": False,
    r"\boxed{9": False,
    r"\boxed{9} \boxed{9}": False,
    r"\boxed{9} \boxed{": False,
    r"<think>\boxed{9}</think> 9": False,
    r"<think>\boxed{9}": False,
    "": False,
}
EQUAL = [
    ("12", "12"), ("12.0", "12"), ("012", "12"), ("1,234", "1234"), ("1{,}234", "1234"), (r"\$1,234", "1234"),
    ("$18", "18"), ("-5", "-5"), ("−5", "-5"), ("12.", "12"), ("**12**", "12"), ("$12$", "12"), (r"\(12\)", "12"),
    ("12 dollars", "12"), (r"12\text{ dollars}", "12"), (r"12~\text{cm}^2", "12"), ("12 cm^2", "12"),
    ("3 apples per day", "3"), (r"\text{12}", "12"), (r"90^\circ", "90"), ("x = 5", "5"), ("2+3", "5"),
    (r"\frac{1}{2}", "0.5"), (r"\frac12", "1/2"), (r"\dfrac{3}{4}", r"\frac{6}{8}"), (r"2\frac{1}{2}", "2.5"),
    (r"\frac{-1}{2}", "-0.5"), (r"50\%", "0.5"), ("50%", "50"), ("10^3", "1000"), (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"2\pi", r"\pi + \pi"), (r"\{1,2,3\}", r"\{3,2,1\}"), ("(0, 1]", "(0,1]"), (r"[0,\infty)", r"[0, \infty)"),
    ("(1, 2)", "(1,2)"), ("x^2+2x+1", "(x+1)^2"), ("5, 3", "3, 5"), ("2xy", "2yx"), ("A", r"\text{(A)}"),
    ("Tuesday", r"\text{Tuesday}"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("12", "13"), ("-5", "5"), ("1234", "1,235"), ("12 apples", "13"), (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("0.333", r"\frac{1}{3}"), ("0.5", "50"), (r"\{1,2\}", r"\{1,2,3\}"), ("(0,1]", "[0,1)"), ("(1,2)", "(2,1)"),
    ("x^2", "x^3"), ("3ab", "3xy"), ("A", "B"), ("listen", "silent"), ("Monday", "Tuesday"),
    ("12:00", "11:00"), (r"\pi", "3.14"), ("", "5"), (" ", "5"), (None, "5"), (r"\frac{1", "2"), ("{,}", "5"),
    ("}{", "5"), ("hello {", "5"), ("\\", "5"), ("nan", "5"), ("🙂", "5"), ("\n", "5"), ("(" * 3000, "5"),
]  # fmt: skip


@pytest.mark.parametrize("case", EXTRACTED)
def test_extract(case):
    text, answer = EXTRACTED[case]
    assert answers.extract(text) == answer


@pytest.mark.parametrize("text", FORMATTED)
def test_formatted(text):
    assert answers.formatted(text) is FORMATTED[text]


@pytest.mark.parametrize("answer, reference", EQUAL)
def test_the_same(answer, reference):
    assert answers.equal(answer, reference) is True


@pytest.mark.parametrize("answer, reference", DIFFERENT, ids=lambda text: repr(text)[:20])
def test_not_the_same(answer, reference):
    assert answers.equal(answer, reference) is False


def test_what_was_extracted_can_be_compared():
    for text, answer in (
        ("#### 1,200", "1200"),
        ("She pays $2.50.", "2.5"),
        ("so -4", "-4"),
        ("15%", "15"),
    ):
        assert answers.equal(answers.extract(text), answer), text


def test_work_without_end_is_ended_and_the_next_comparison_goes_on(monkeypatch, caplog):
    assert answers.equal("1", "1")
    before = answers._judge.process.pid
    monkeypatch.setattr(answers, "SECONDS", 1.0)
    start = time.monotonic()
    assert not answers.equal("9^{9^{9^{9}}}", "5")
    assert time.monotonic() - start < 10
    assert "counted as wrong" in caplog.text
    monkeypatch.undo()
    assert all(answers.equal("1", "1.0") for _ in range(3))
    assert answers._judge.process.pid != before


def test_a_process_that_died_is_replaced():
    assert answers.equal("1", "1")
    answers._judge.process.kill()
    answers._judge.process.wait()
    assert answers.equal("1/2", "0.5")


def test_from_several_threads_at_once():
    found = {}

    def ask(n):
        found[n] = [answers.equal(f"{n}.0", str(n)), answers.equal(str(n), str(n + 1))]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [True, False] for n in range(12)}


def test_without_the_library_one_line_says_what_to_do(monkeypatch):
    judge = answers.Judge()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CourseError, match="math-verify does not run: .*make install") as error:
        judge.same("1", "1")
    assert "\n" not in str(error.value)


def test_it_works_from_another_folder(tmp_path):
    from tests.helpers.folders import ROOT

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from utils.evaluation import answers; "
    code += "print(answers.equal('1/2', '.5'), 'jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True False\n", ""), done
