"""The command line, for work that outlives a notebook: `python -m utils generate --help`.

Results go to standard output; the log, progress bars and errors to standard error. Bad input ends
with status 2 and one line. Only the command that is run is imported, with all that it needs.
"""

import importlib
import json
import logging
import os
import sys

from utils import CourseError
from utils.commands import arguments


def main(words: list[str] | None = None) -> int:
    """Run one command. Returns the process's status: 0, or 2 after one line about what was wrong.

    What the command's `run` returns is printed: as text, or with --json its `summary()`.
    """
    logger = logging.getLogger("utils")
    handlers, propagate = logger.handlers, logger.propagate
    try:
        name, options = arguments.parse(sys.argv[1:] if words is None else words)
        room = "course" if name == "mirror" else "commands"
        command = importlib.import_module(f"utils.{room}.{name}")
        # Only now: what was imported may have given this logger or the root's a handler of its own,
        # which would show each line twice.
        logger.handlers, logger.propagate = [logging.StreamHandler(sys.stderr)], False
        logger.setLevel(logging.INFO)
        if name == "finetune":
            command.keep_memory()
        result = command.run(options)
        if result is not None:
            as_json = getattr(options, "json", False)
            print(json.dumps(result.summary(), ensure_ascii=False, indent=1) if as_json else result)
    except CourseError as error:
        print(f"python -m utils: {error}", file=sys.stderr)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            sys.stderr.flush()
            os._exit(2)  # the usual end would wait for the other processes, which may be gone
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
