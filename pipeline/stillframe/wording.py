"""Numbers, ranges and errors in the words of messages."""

from collections.abc import Sequence
from typing import Any

import pydantic

_MOST_NAMED = 3
"""Files or frames that one message names."""


def frame_range(start: int, stop: int) -> str:
    """Return the name of frames start … stop − 1.

    Examples
    --------
    >>> frame_range(3, 4), frame_range(3, 6)
    ('frame 3', 'frames 3–5')
    """
    return f"frame {start}" if stop - start == 1 else f"frames {start}–{stop - 1}"


def first_few(names: Sequence[str]) -> str:
    """Return the first names of a sequence, with an ellipsis if there are more.

    Examples
    --------
    >>> first_few(["a", "b"]), first_few(["a", "b", "c", "d"])
    ('a, b', 'a, b, c…')
    """
    return ", ".join(names[:_MOST_NAMED]) + ("…" if len(names) > _MOST_NAMED else "")


def duration(seconds: float) -> str:
    """Return a duration with units that suit its size.

    Examples
    --------
    >>> duration(42), duration(3723)
    ('42 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def first_line(error: Exception) -> str:
    r"""Return the type of an exception and the first line of its message, at most 120 characters.

    Examples
    --------
    >>> first_line(ValueError("no chunk\nat all"))
    'ValueError: no chunk'
    """
    return f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])[:120]}"


def in_words(head: str, error: pydantic.ValidationError, advice: str) -> str:
    """Return a message that names every mistake, one line each, between a heading and advice."""
    return "\n".join((head, *(f"  {_mistake(detail)}" for detail in error.errors()), advice))


def _mistake(detail: Any) -> str:
    field = ".".join(map(str, detail["loc"]))
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{field}: {message}" if detail["type"] == "missing" else f"{field} = {detail['input']!r}: {message}"
