"""Write files that after a power loss are either whole or absent.

A name survives once its folder was synced, content once its file was synced; POSIX promises neither before ``fsync``.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

CLOCK_SKEW = 25.0
"""Seconds by which the clocks of machines may differ; a lease counts as stale after more than twice that."""


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    _sync(path, os.O_RDONLY)


def sync_tree(folder: Path) -> None:
    """Make every file and name below a folder durable."""
    for path in sorted(folder.rglob("*")):
        _sync(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    sync_folder(folder)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and missing parents durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def write_draft(path: Path, content: bytes | memoryview) -> None:
    """Write a new file and sync its content; remove it if it cannot be written whole."""
    try:
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # a full disk, for example
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Create or replace a file in one step, after its content is on disk."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    write_draft(partial, content)
    try:
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def store_files(path: Path) -> Iterator[Path]:
    """Yield every file of a store except the shards of frames, which are many and which unit records list."""
    for home, folders, names in os.walk(path):
        if Path(home) == path / "frames":
            folders[:] = [name for name in folders if name != "c"]
        folders.sort()
        yield from (file for name in sorted(names) if (file := Path(home) / name).is_file())
