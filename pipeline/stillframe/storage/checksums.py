"""Checksums of files, arrays and JSON documents."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic

_CHECKSUM = re.compile(rb',"checksum":"([0-9a-f]{64})"\}$')
_CHECKSUM_LENGTH = 79
"""Bytes that match ``_CHECKSUM``."""


def fingerprint(dependencies: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything that a result depends on; the order of keys does not matter.

    Examples
    --------
    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def with_checksum(content: bytes) -> bytes:
    """Return a JSON object with one more member, last: the checksum of everything before it.

    Examples
    --------
    >>> without_checksum(with_checksum(b'{"a":1}'))
    b'{"a":1}'
    """
    return content[:-1] + b',"checksum":"' + hashlib.sha256(content).hexdigest().encode() + b'"}'


def without_checksum(content: bytes) -> bytes:
    """Return a JSON object without its checksum; raise ``ValueError`` if that is missing or of other content."""
    end = _CHECKSUM.search(content, max(0, len(content) - _CHECKSUM_LENGTH))
    if end is None:
        raise ValueError("it has no checksum: the file is damaged")
    before = content[: end.start()] + b"}"
    if hashlib.sha256(before).hexdigest().encode() != end[1]:
        raise ValueError("its checksum is that of another content: the file is damaged")
    return before


def has_checksum(content: bytes) -> bool:
    """Return True if a JSON object ends with a checksum, right or wrong."""
    return _CHECKSUM.search(content) is not None


class Checksum(pydantic.BaseModel):
    """Size and SHA-256 of a file."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of the content, hexadecimal."""

    @classmethod
    def of(cls, path: Path) -> "Checksum":
        """Return size and SHA-256 of a file."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(size=path.stat().st_size, sha256=digest)

    @classmethod
    def of_content(cls, content: bytes | memoryview) -> "Checksum":
        """Return size and SHA-256 of content in memory."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())
