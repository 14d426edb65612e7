"""Run chapters for real and record what they print, where and how they ran (`make execute`).

Each chapter runs in a kernel of its own, in an empty temporary folder, with the repository on the
path: what a cell writes lands there and is thrown away. If every cell succeeds and every output can
be shown to a reader, the notebook is replaced at once; else it stays as it was, and the reason is
printed in one line.

Outputs are cleaned: no colour codes, progress bars in their final state alone. Refused, because a
reader could not get the same or should not see it: warnings (repair them, or tag the cell
`allow-stderr`), paths of this machine, addresses of objects in memory.

    python tools/execute.py [--timing-only] [CHAPTER ...]        COURSE_PROFILE chooses the size, `cpu` when unset
"""

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nbclient
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell

from tools import pairs, provenance, sync
from tools.pairs import PairError

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
PROGRESS = re.compile(
    r"\d+%\|.*\||\d+(\.\d+)?\s?(it|s|batch|step|B|kB|MB)/(s|it|batch|step)\b|\[\d+:\d\d"
)
SYSTEM_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|Users|tmp|var|private|mnt|opt|srv|work|workspace)/[\w.@-]+"
)
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


class Refused(Exception):
    """A chapter failed or printed what a page must not show; the message says where."""


# ----------------------------------------------------------------------------------------- cleaning


def final_state(text: str) -> str:
    """What a terminal shows in the end: each `\\r` begins its line again, progress bars keep their
    last state."""
    text = ANSI.sub("", text).replace("\r\n", "\n")
    lines = []
    for line in text.split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        lines.append(states[-1].rstrip() if states else "")
    return "\n".join(lines)


def clean_output(output, tags: list[str]) -> list[str]:
    """Clean one output in place. Returns what is wrong with it, in words."""
    if output.output_type == "stream":
        output.text = final_state(output.text)
        if output.name == "stderr" and "allow-stderr" not in tags:
            other = [
                line
                for line in output.text.splitlines()
                if line.strip() and not PROGRESS.search(line)
            ]
            if other:
                return [f"a warning: {other[0].strip()[:160]}"]
    elif output.output_type == "error":
        # A cell that is meant to fail: readers need the last line, not this machine's files.
        output.evalue = ANSI.sub("", output.evalue)
        output.traceback = [f"{output.ename}: {output.evalue}"]
    return []


def texts_of(output) -> list[str]:
    """Every text of an output that a reader may see."""
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return [output.ename, output.evalue]
    return [
        value
        for kind, value in output.get("data", {}).items()
        if isinstance(value, str) and kind != "image/png"
    ]


def problems(nb, forbidden: list[str]) -> list[str]:
    """Clean all outputs of an executed notebook; returns `cell N (first line): what is wrong`."""
    complaints = []
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code":
            continue
        wrong = []
        tags = cell.metadata.get("tags", [])
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            wrong += clean_output(output, tags)
            for text in texts_of(output):
                path = next((p for p in forbidden if p in text), None) or SYSTEM_PATH.search(text)
                if path:
                    shown = path if isinstance(path, str) else path.group()
                    wrong.append(f"a path of this machine: {shown}")
                if ADDRESS.search(text):
                    wrong.append(f"an object's address in memory: {ADDRESS.search(text).group()}")
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
        complaints += [f"cell {number} ({first_line(cell)}): {w}" for w in wrong]
    return complaints


def joined(outputs: list) -> list:
    """Neighbouring pieces of one stream as one output: a progress bar may arrive in pieces."""
    result = []
    for output in outputs:
        last = result[-1] if result else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def first_line(cell) -> str:
    """A cell's first line of code, to find it by."""
    return next((line.strip() for line in cell.source.splitlines() if line.strip()), "")[:60]


# ---------------------------------------------------------------------------------------- execution


def run(nb, root: Path, profile: str, timeout: int, say=print) -> dict:
    """Execute the notebook in place. Returns its provenance, without the code's hash. Raises
    Refused on a failure."""
    with tempfile.TemporaryDirectory(prefix="chapter-") as folder:
        env = dict(os.environ)
        env |= {
            "COURSE_PROFILE": profile,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        }
        for name in ("COURSE_REPOSITORY", "COURSE_REVISION"):
            env.pop(name, None)  # the code that is here is what is recorded, not a clone of another
        client = nbclient.NotebookClient(
            nb,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            record_timing=False,
            allow_errors=False,
        )
        started = time.perf_counter()
        try:
            with client.setup_kernel(env=env):
                for index, cell in enumerate(nb.cells):
                    if cell.cell_type != "code" or not cell.source.strip():
                        continue
                    began = time.perf_counter()
                    where = f"cell {index + 1} ({first_line(cell)})"
                    try:
                        client.execute_cell(cell, index)
                    except CellExecutionError as error:
                        why = f"{error.ename}: {ANSI.sub('', error.evalue or '').strip().splitlines()[:1]}"
                        why = (
                            why.replace("['", "")
                            .replace("']", "")
                            .replace('["', "")
                            .replace('"]', "")
                        )
                        raise Refused(f"{where}: {why}") from None
                    except (CellTimeoutError, TimeoutError):
                        raise Refused(f"{where}: not done after {timeout} s (--timeout)") from None
                    except DeadKernelError:
                        raise Refused(f"{where}: the kernel died, out of memory?") from None
                    if (took := time.perf_counter() - began) > 5:
                        say(f"    {took:6.1f} s  {where}")
                seconds = time.perf_counter() - started
                question = new_code_cell(provenance.ASK_KERNEL)
                nb.cells.append(question)
                try:
                    client.execute_cell(question, len(nb.cells) - 1, store_history=False)
                finally:
                    nb.cells.pop()
                facts = json.loads(question.outputs[-1].text.splitlines()[-1])
        except NoSuchKernel:
            raise Refused("no kernel named python3: run `make install`") from None
        wrong = problems(nb, forbidden_paths(root, folder))
    if wrong:
        raise Refused("outputs that cannot be shown:\n  " + "\n  ".join(wrong))
    modules = facts.pop("modules")
    return facts | {
        "profile": profile,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "utils": provenance.module_hashes(modules, root),
    }


def forbidden_paths(root: Path, folder: str) -> list[str]:
    """Paths of this machine that an output must not hold; the root of the file system is no clue to
    anything."""
    names = [str(root), folder, sys.prefix, os.environ.get("COURSE_MIRROR", ""), str(Path.home())]
    names += [str(Path(name).resolve()) for name in names if name]
    return sorted({name for name in names if len(name) > 4}, key=len, reverse=True)


def execute(stem: Path, root: Path, profile: str, timeout: int, timing_only: bool) -> dict:
    """Run one chapter and record it. Raises Refused or PairError; then the notebook is as it was."""
    sync.sync_pair(stem, pairs.settings(root))
    path = stem.with_suffix(".ipynb")
    nb = pairs.read_ipynb(path)
    code = pairs.code_hash(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    record = run(nb, root, profile, timeout) | {"code": code}
    now = pairs.read_ipynb(path)
    if pairs.code_hash(now) != code or (md := pairs.read_md(stem.with_suffix(".md"))) is None:
        raise Refused("the chapter was edited while it ran: nothing was recorded, run it again")
    if pairs.code_hash(md) != code:
        raise Refused("the chapter was edited while it ran: nothing was recorded, run it again")
    course = dict(now.metadata.get("course", {}))
    if timing_only:
        same = ("device", "profile")
        others = [r for r in course.get("runs", []) if any(r.get(k) != record[k] for k in same)]
        course["runs"] = [*others, record]
    else:
        # Text may have been edited meanwhile: take the cells as they are now, and the new outputs.
        for fresh, cell in zip(
            [c for c in nb.cells if c.cell_type == "code" and c.source.strip()],
            [c for c in now.cells if c.cell_type == "code" and c.source.strip()],
        ):
            cell.outputs, cell.execution_count = fresh.outputs, fresh.execution_count
            pairs.fold(cell)
        course["provenance"] = record
    now.metadata["course"] = course
    pairs.write_ipynb(path, now)
    return record


def main(argv: list[str] | None = None) -> int:
    """The command line. Status 0: all recorded; 1: a chapter failed; 2: bad arguments or files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "chapter", nargs="*", help="a number (05) or a file; all of them when none is given"
    )
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one cell (900)")
    parser.add_argument(
        "--timing-only",
        action="store_true",
        help="record this device's run beside the outputs shown, not in their place",
    )
    parser.add_argument("--root", type=Path, default=pairs.ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    profile = os.environ.get("COURSE_PROFILE") or "cpu"
    rows, status = [], 0
    try:
        stems = pairs.chapters(args.root, args.chapter)
    except PairError as error:
        print(f"execute: {error}", file=sys.stderr)
        return 2
    for stem in stems:
        print(f"{stem.name} (profile {profile})", flush=True)
        try:
            record = execute(stem, args.root, profile, args.timeout, args.timing_only)
            rows.append((stem.name, f"{record['seconds']:7.1f} s", record["device"]))
        except Refused as error:
            print(f"execute: chapters/{stem.name}.ipynb {error}", file=sys.stderr)
            rows.append((stem.name, "   failed", ""))
            status = max(status, 1)
        except PairError as error:
            print(f"execute: {error}", file=sys.stderr)
            rows.append((stem.name, "   failed", ""))
            status = 2
    try:
        sync.stamp_files(args.root, pairs.settings(args.root), write=True)  # the README's minutes
    except PairError:
        pass  # already reported above
    print()
    for row in rows:
        print(f"{row[0]:36} {row[1]}  {row[2]}")
    return status


if __name__ == "__main__":
    sys.exit(main())
