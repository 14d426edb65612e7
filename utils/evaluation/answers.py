r"""Is an answer right? Three questions, kept apart, and the same for every model.

- `extract`: which answer does a text give? Lenient: a number in another form is an answer too.
- `formatted`: does it give it in the form that the prompt asks for? That is scored apart.
- `equal`: do two answers mean the same? `\frac{1}{2}` is 0.5, and `\{2, 1\}` is `\{1, 2\}`. The
  library math-verify (Hugging Face) decides, on top of SymPy.

A model can answer `9^{9^{9^{9}}}`, which nobody can compute. math-verify ends such work by a
signal, which only a main thread gets, and which does not interrupt the arithmetic of huge numbers.
So it works in a process of its own (`judge.py`), killed when it does not reply in time. A pool of
`multiprocessing` would not do: its processes import the caller's script again, and jax with it.
"""

import atexit
import contextlib
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

from utils import CourseError
from utils.data.problems import BOX, answer_part, boxes

logger = logging.getLogger(__name__)
SECONDS = 10.0  # for one comparison, of which nearly all take milliseconds
START_SECONDS = 120.0  # for the process to import SymPy, on a busy machine
# A sign, a currency, digits with or without thousands' commas, decimals, a denominator, a per cent.
NUMBER = r"(?<![\w.])[-+−]?[$€£]?"
NUMBER += r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER += r"(?:/[0-9]+)?(?:\\?%)?"
UNIT = r"(?:[A-Za-z]{3,}|[cmk]m|kg|lb|oz|ft|in|ml|m/s|km/h)\b[A-Za-z ./^\d]*"


def extract(text: str) -> str | None:
    r"""The answer that a text gives, as it is written there, or None where it gives none.

    The last `\boxed{...}`, else the line after the last `####` (as in GSM8K), else the last number:
    behind `</think>` first, and in the reasoning only where nothing is behind it.
    """
    for part in (answer_part(text), text):
        if inside := boxes(part):
            return inside[-1]
        if marked := re.findall(r"####[ \t]*(\S[^\n]*)", part):
            return marked[-1].strip(" \t*_$.") or None
        if numbers := re.findall(NUMBER, part):
            return numbers[-1].strip()
    return None


def formatted(text: str) -> bool:
    r"""Whether exactly one `\boxed{...}` stands behind the reasoning, closed and not empty.

    A text that opens `<think>` and does not close it has no answer part.
    """
    if text.rfind("<think>") > text.rfind("</think>"):
        return False
    part = answer_part(text)
    return len(boxes(part)) == 1 == len(BOX.findall(part))


def equal(answer: str | None, reference: str) -> bool:
    """Whether an answer means the same as the reference, as math-verify judges, from any thread.

    None, or what cannot be read, or compared within `SECONDS`, is not equal. Raises CourseError
    where the process that compares cannot be started.
    """
    given = answer is not None and bool(answer.strip())
    return given and _judge.same(tidy(answer), tidy(reference))


def tidy(answer: str) -> str:
    r"""LaTeX that math-verify reads as meant: without marks around it, plain words as `\text`."""
    answer = re.sub(r"^[\s$*_]+|[\s$*_.,;]+$", "", answer.replace("~", " ").replace("−", "-"))
    answer = re.sub(r"^\\[(\[]|\\[)\]]$", "", answer).strip()
    # "12 dollars" would be 12·d·o·l·l·a·r·s, and "listen" would equal "silent".
    if match := re.fullmatch(rf"({NUMBER})\s+({UNIT})", answer):
        return rf"{match[1]} \text{{ {match[2]} }}"
    return rf"\text{{{answer}}}" if re.fullmatch(r"[A-Za-z][A-Za-z' -]{3,}", answer) else answer


class Judge:
    """The process that compares: started at the first comparison, and again after it was killed."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def same(self, answer: str, reference: str) -> bool:
        """Whether the two mean the same; False, with a warning, where the process is silent."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            reply = self._exchange(answer, reference, SECONDS)
            if not reply:
                pair = f"{answer!r:.60} could not be compared with {reference!r:.60}"
                logger.warning(f"answers: {pair}: counted as wrong")
                self.stop()
            return reply == "true"

    def start(self) -> None:
        self.stop()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-P", str(Path(__file__).with_name("judge.py"))]
        self.process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8")
        if self._exchange("1", "1", START_SECONDS) != "true":
            self.stop()
            fix = "run `make install`, or pip install math-verify"
            raise CourseError(f"answers: math-verify does not run: {fix}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):  # a line that nobody will read
                self.process.communicate()
            self.process = None

    def _exchange(self, answer: str, reference: str, seconds: float) -> str:
        """One line there, one line back; "" where the process ended, or was killed for its time."""
        process = self.process
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps([answer, reference]) + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()
        except OSError:  # it is gone
            return ""
        finally:
            timer.cancel()


_judge = Judge()
atexit.register(_judge.stop)
