"""The log of a run, and messages on standard error."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

log = logging.getLogger("stillframe")
log.addHandler(logging.NullHandler())


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append log messages to a file, and the reason if the block ends with an exception."""
    handler = _LenientHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", str(error) or type(error).__name__)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()


class _LenientHandler(logging.FileHandler):
    """Handler that ignores errors of writing: a full disk must not stop a run, and important messages are printed."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore the error."""


def warn(message: str) -> None:
    """Log and print a message that asks the user to act."""
    log.warning(message)
    print_message(message)


def print_message(message: str) -> None:
    """Print a message on standard error, without logging it."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"stillframe: {message}", markup=False)
