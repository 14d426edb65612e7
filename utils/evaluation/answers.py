r"""Is an answer right? Three questions, kept apart, and the same for every model.

- `extract`: which answer does a text give? Lenient, so that a model which knows the number but not the form is not
  called wrong: the last `\boxed{...}`, else what follows the last `####` (GSM8K's mark), else the last number.
- `formatted`: does it give it in the form that was asked for? That is scored apart.
- `equal`: do two answers mean the same? `\frac{1}{2}` is 0.5, and `\{2, 1\}` is `\{1, 2\}`. The library math-verify
  (Hugging Face) decides, on top of SymPy.

An answer comes out of a model: it can be `9^{9^{9^{9}}}`, which nobody can compute. math-verify ends such work by a
signal, which exists in a process's main thread alone, and does not interrupt the arithmetic of huge numbers. So it
works in a process of its own (`python -m utils.answers`), which is ended when it does not reply in time.
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

logger = logging.getLogger(__name__)
SECONDS = 10.0  # for one comparison, of which nearly all take milliseconds
START_SECONDS = 120.0  # for the process to import SymPy, on a busy machine
NUMBER = (
    r"(?<![\w.])[-+−]?[$€£]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?(?:\\?%)?"
)
UNIT = r"(?:[A-Za-z]{3,}|[cmk]m|kg|lb|oz|ft|in|ml|m/s|km/h)\b[A-Za-z ./^\d]*"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def answer_part(text: str) -> str:
    """What comes after the reasoning: the text behind the last `</think>`, or all of it."""
    return text.rpartition("</think>")[2]


def boxes(text: str) -> list[str]:
    r"""The contents of each `\boxed{...}` that is closed and not empty, in order; braces inside may be nested."""
    found = []
    for start in BOX.finditer(text):
        depth, at = 1, start.end()
        while at < len(text) and depth:
            if text[at] == "\\":  # \{ and \} are characters of the answer
                at += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth and (inside := text[start.end() : at - 1].strip()):
            found.append(inside)
    return found


def extract(text: str) -> str | None:
    r"""The answer that a text gives, as it is written there, or None where it gives none.

    The last `\boxed{...}`, else the line after the last `####`, else the last number; looked for behind `</think>`
    first, and in the reasoning only where nothing is behind it.
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
    r"""Whether the answer has the form that was asked for: behind the reasoning exactly one `\boxed{...}`, closed, filled.

    A text that opens `<think>` and does not close it has no answer part.
    """
    if text.rfind("<think>") > text.rfind("</think>"):
        return False
    part = answer_part(text)
    return len(boxes(part)) == 1 == len(BOX.findall(part))


def equal(found: str | None, wanted: str) -> bool:
    """Whether `found` means the same as the reference answer `wanted`, as math-verify judges; False for None.

    An answer that cannot be read, or not be compared within `SECONDS`, is not equal. Safe to call from any thread.
    Raises CourseError where the process that compares cannot be started.
    """
    if found is None or not found.strip():
        return False
    return _judge.ask(tidy(found), tidy(wanted))


def tidy(answer: str) -> str:
    r"""LaTeX that math-verify reads as it was meant: without marks around it, plain words as `\text`."""
    answer = re.sub(r"^[\s$*_]+|[\s$*_.,;]+$", "", answer.replace("~", " ").replace("−", "-"))
    answer = re.sub(r"^\\[(\[]|\\[)\]]$", "", answer).strip()
    # "12 dollars" would be 12·d·o·l·l·a·r·s, and "listen" would equal "silent".
    if found := re.fullmatch(rf"({NUMBER})\s+({UNIT})", answer):
        return rf"{found[1]} \text{{ {found[2]} }}"
    return rf"\text{{{answer}}}" if re.fullmatch(r"[A-Za-z][A-Za-z' -]{3,}", answer) else answer


class _Judge:
    """The process that compares, started when it is first asked, and again after it had to be ended."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def ask(self, found: str, wanted: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            reply = self._exchange(json.dumps([found, wanted]), SECONDS)
            if not reply:  # out of time, or out of memory
                logger.warning(f"answers: {found!r:.60} could not be compared with {wanted!r:.60}: counted as wrong")
                self.stop()
            return reply.strip() == "true"

    def stop(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # a line that nobody will read
                    pipe.close()

    def _start(self) -> None:
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "utils.answers"],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if self._exchange(json.dumps(["1", "1"]), START_SECONDS).strip() != "true":
            self.stop()
            raise CourseError("answers: math-verify does not run: run `make install`, or pip install math-verify")

    def _exchange(self, line: str, seconds: float) -> str:
        """One line there, one line back; empty where the process ended or, out of time, was ended."""
        process = self.process
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:  # it is gone
            return ""
        finally:
            timer.cancel()


_judge = _Judge()
atexit.register(_judge.stop)


def _compare(found: str, wanted: str) -> bool:
    """In the process of its own: math-verify's judgement."""
    from math_verify import parse, verify

    gold, target = (parse(rf"$\boxed{{{answer}}}$", parsing_timeout=None) for answer in (wanted, found))
    return verify(gold, target, timeout_seconds=None)


def main() -> None:
    """Pairs as JSON lines in, true or false out, until the input ends."""
    logging.disable(logging.CRITICAL)  # math-verify reports what it cannot read
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))  # 4 GB: huge numbers should not take the machine's
    except (ImportError, OSError, ValueError):
        pass
    for line in sys.stdin:
        found, wanted = json.loads(line)
        try:
            right = bool(_compare(found, wanted))
        except (Exception, RecursionError, MemoryError):
            right = False
        print(json.dumps(right), flush=True)


if __name__ == "__main__":
    main()
