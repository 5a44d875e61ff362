"""What a run keeps beside its stores so that it can be killed anywhere: unit records and a lease.

A record is published only after everything it speaks of is on disk: ledger entry and durable copy in one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pydantic

from stillframe.errors import LeaseError
from stillframe.match import MATCH_DTYPE, Matches
from stillframe.units import Unit

Stage = Literal["register", "align"]

HEARTBEAT = 5.0
"""Seconds between two signs of life of a lease."""
STALE = 60.0
"""Seconds without a sign of life after which a lease on another machine is void."""


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


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file by content that is on disk before its name is."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash everything a result depends on; the order of the keys does not matter.

    Examples
    --------
    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


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


class UnitRecord(pydantic.BaseModel):
    """What became of one unit in one stage."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format: Literal[1] = 1
    """Version of this format."""
    stage: Stage
    """Which pass over the frames."""
    unit: int
    """Number of the unit."""
    start: int
    """First frame."""
    stop: int
    """One past the last frame."""
    fingerprint: str
    """Hash of all that the result depends on."""
    matches: dict[str, list[float]] | None = None
    """Of the register stage: the kernel's fields."""
    files: dict[str, Seal] = {}
    """Of the align stage: what was written, relative to the run's folder."""
    problems: list[str] = []
    """What could not be read, in words; such a unit is tried again by the next run."""
    seconds: float = 0.0
    """Time the unit took."""

    def to_matches(self) -> Matches:
        """Return the matches as the kernel's structured array."""
        assert self.matches is not None
        out = np.empty(self.stop - self.start, MATCH_DTYPE)
        for name in MATCH_DTYPE.names or ():
            out[name] = self.matches[name]
        return out


def from_matches(matches: Matches) -> dict[str, list[float]]:
    """Return the kernel's result as a record holds it, exactly."""
    return {name: matches[name].tolist() for name in MATCH_DTYPE.names or ()}


class Ledger:
    """The unit records of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, stage: Stage, unit: int) -> Path:
        """Where a unit's record lies."""
        return self.folder / "units" / stage / f"{unit:06d}.json"

    def prepare(self) -> None:
        """Make the folders before any worker needs them."""
        for stage in ("register", "align"):
            (self.folder / "units" / stage).mkdir(parents=True, exist_ok=True)

    def publish(self, record: UnitRecord) -> None:
        """Make a record durable; everything it speaks of must be so already."""
        write_durably(self.path(record.stage, record.unit), record.model_dump_json().encode())

    def withdraw(self, stage: Stage, unit: int) -> None:
        """Remove a unit's record before anything it speaks of changes."""
        path = self.path(stage, unit)
        if path.exists():
            path.unlink()
            sync_folder(path.parent)

    def read(self, stage: Stage, unit: int) -> UnitRecord | None:
        """Return a unit's record, or None where there is none that can be understood."""
        try:
            record = UnitRecord.model_validate_json(self.path(stage, unit).read_bytes())
        except (OSError, ValueError):
            return None
        return record if (record.stage, record.unit) == (stage, unit) else None

    def finished(self, stage: Stage, unit: Unit, mark: str) -> UnitRecord | None:
        """Return the unit's record if it holds: same fingerprint, no problem, files as recorded."""
        record = self.read(stage, unit.number)
        if record is None or record.fingerprint != mark or record.problems:
            return None
        if (record.start, record.stop) != (unit.start, unit.stop):
            return None
        whole = all(_size(self.folder / name) == seal.size for name, seal in record.files.items())
        return record if whole else None

    def records(self, stage: Stage) -> list[UnitRecord]:
        """All records of a stage that can be understood, in order."""
        numbers = sorted(int(path.stem) for path in (self.folder / "units" / stage).glob("[0-9]*.json"))
        return [record for number in numbers if (record := self.read(stage, number)) is not None]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def read_lease(folder: Path) -> dict[str, Any] | None:
    """Return who drives this run now, or None."""
    path = folder / "lease.json"
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    here = holder.get("host") == socket.gethostname()
    gone = not psutil.pid_exists(int(holder.get("pid", -1))) if here else age > STALE
    return None if gone else holder


@contextlib.contextmanager
def lease(folder: Path) -> Iterator[None]:
    """Hold the exclusive right to drive a run's folder, with a sign of life every few seconds.

    Raises
    ------
    LeaseError
        Another living driver holds it; names its machine, process and start.
    """
    path = folder / "lease.json"
    content = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    _take(folder, path, json.dumps(content).encode())
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), name="stillframe-lease", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        path.unlink(missing_ok=True)


def _take(folder: Path, path: Path, content: bytes) -> None:
    """Put the lease in place with its content, whole or not at all, void ones removed first."""
    mine = path.with_name(f".lease.{socket.gethostname()}.{os.getpid()}.partial")
    mine.write_bytes(content)
    try:
        with _alone(folder):
            holder = read_lease(folder)
            if holder is not None:
                raise LeaseError(
                    f"{folder} is being written by process {holder.get('pid')} on {holder.get('host')} since "
                    f"{holder.get('since')}: two drivers would mix their results. "
                    "Wait for it, or stop it and run this again."
                )
            mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the lease and change it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
