"""What only the pages need: hardware presets, figures, Colab, the pretrained MiniGPT, checks of
exercises.

The package logs and never prints. A page that imports from here shows the log's lines among its
output, as plain text: which source served what, what was skipped.
"""

import logging
import sys


class _PageHandler(logging.Handler):
    """Prints to what is standard output at that moment: a notebook replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def _show_log() -> None:
    logger = logging.getLogger("utils")
    if all(handler.name != __name__ for handler in logger.handlers):  # once, also when reloaded
        handler = _PageHandler(logging.INFO)
        handler.name = __name__
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    # In a notebook other packages give the root logger a handler, which would show each line twice.
    logger.propagate = "ipykernel" not in sys.modules


_show_log()
