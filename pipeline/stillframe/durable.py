"""Files that are whole and on disk, or not there: the ground that unit records, leases and stores stand on.

A name is durable when its folder is, and content when its file is; POSIX promises neither before ``fsync``.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic

_CHECKSUM = re.compile(rb',"checksum":"([0-9a-f]{64})"\}$')


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's content durable; its name needs its folder synced."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file and name below a folder durable."""
    for path in sorted(folder.rglob("*")):
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(folder)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, with names that last."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def write_draft(path: Path, content: bytes | memoryview) -> None:
    """Write a new file whose content is on disk; what cannot be written whole leaves nothing behind."""
    try:
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        # What writes tell of a full disk names no file.
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file by content that is on disk before its name is."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    write_draft(partial, content)
    try:
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash everything a result depends on; the order of the keys does not matter.

    Examples
    --------
    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(array: npt.NDArray[Any]) -> str:
    """Hash an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def with_checksum(content: bytes) -> bytes:
    """Add to a JSON object, as its last member, the checksum of all before it.

    Examples
    --------
    >>> without_checksum(with_checksum(b'{"a":1}'))
    (b'{"a":1}', True)
    """
    return content[:-1] + b',"checksum":"' + hashlib.sha256(content).hexdigest().encode() + b'"}'


def without_checksum(content: bytes) -> tuple[bytes, bool]:
    """Return a JSON object without its checksum, and whether it had one.

    Raises
    ------
    ValueError
        The checksum is that of something else.
    """
    found = _CHECKSUM.search(content)
    if found is None:
        return content, False
    before = content[: found.start()] + b"}"
    if hashlib.sha256(before).hexdigest().encode() != found[1]:
        raise ValueError("its checksum is that of something else: the file is damaged")
    return before, True


class Seal(pydantic.BaseModel):
    """How a finished file looked."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    size: int
    """Bytes."""
    sha256: str
    """Checksum of the content."""

    @classmethod
    def of(cls, path: Path) -> "Seal":
        """Seal a file as it is now."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(size=path.stat().st_size, sha256=digest)

    @classmethod
    def of_content(cls, content: bytes | memoryview) -> "Seal":
        """Seal what is going to be a file."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())
