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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import psutil
import pydantic

from stillframe.errors import LeaseError
from stillframe.flags import Flag
from stillframe.match import MATCH_DTYPE, Matches, no_match
from stillframe.units import Unit

Stage = Literal["register", "align"]
STAGES: tuple[Stage, ...] = get_args(Stage)

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
    shifts: str = ""
    """Of the align stage: digest of the shifts that were applied."""
    problems: list[str] = []
    """What could not be read, in words; such a unit is tried again by the next run."""
    seconds: float = 0.0
    """Time the unit took."""

    def to_matches(self) -> Matches:
        """Return the matches as the kernel's structured array; where the unit failed, corrupt frames."""
        if self.matches is None:
            return np.full(self.stop - self.start, np.array(no_match(Flag.CORRUPT), MATCH_DTYPE))
        out = np.empty(self.stop - self.start, MATCH_DTYPE)
        for name in MATCH_DTYPE.names or ():
            out[name] = self.matches[name]
        return out


def digest_of(array: npt.NDArray[Any]) -> str:
    """Hash an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


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
        for stage in STAGES:
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

    def finished(self, stage: Stage, unit: Unit, mark: str, known: Sequence[str] = ()) -> UnitRecord | None:
        """Return the unit's record if it holds: same fingerprint, files as recorded, no problem but known ones."""
        record = self.read(stage, unit.number)
        if record is None or record.fingerprint != mark or record.problems not in ([], list(known)):
            return None
        if (record.start, record.stop) != (unit.start, unit.stop):
            return None
        whole = all(_size(self.folder / name) == seal.size for name, seal in record.files.items())
        return record if whole else None

    def failed(self, stage: Stage, unit: Unit, problem: str) -> None:
        """Keep why a unit could not be done, for a look from outside and for the next run."""
        self.publish(
            UnitRecord(
                stage=stage, unit=unit.number, start=unit.start, stop=unit.stop, fingerprint="", problems=[problem]
            )
        )

    def numbers(self, stage: Stage) -> list[int]:
        """Numbers of all records of a stage, in order."""
        return sorted(int(path.stem) for path in (self.folder / "units" / stage).glob("[0-9]*.json"))

    def records(self, stage: Stage) -> list[UnitRecord]:
        """All records of a stage that can be understood, in order."""
        return [record for number in self.numbers(stage) if (record := self.read(stage, number)) is not None]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


class Holder(pydantic.BaseModel):
    """Who drives a run."""

    model_config = pydantic.ConfigDict(frozen=True)

    host: str
    """Machine."""
    pid: int
    """Process there."""
    born: float
    """When that process began, seconds since 1970: process numbers are used again."""
    since: str
    """When it took the lease, in words."""

    @classmethod
    def me(cls) -> "Holder":
        """Describe this process, now."""
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(host=socket.gethostname(), pid=pid, born=psutil.Process(pid).create_time(), since=now)

    def lives(self, silent: float) -> bool:
        """Tell whether it still drives, after so many seconds without a sign of life."""
        if self.host != socket.gethostname():
            return silent <= STALE
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.born) < 2)
        except psutil.NoSuchProcess:
            return False


def read_lease(folder: Path) -> Holder | None:
    """Return who drives this run now, or None."""
    path = folder / "lease.json"
    try:
        holder = Holder.model_validate_json(path.read_bytes())
        silent = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    return holder if holder.lives(silent) else None


@dataclass(frozen=True)
class Lease:
    """The exclusive right to drive a run's folder."""

    folder: Path
    holder: Holder

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.folder / "lease.json"

    def check(self) -> None:
        """Raise ``LeaseError`` if another driver has taken over."""
        if not self._mine():
            raise LeaseError(
                f"another driver took over {self.folder}, as this one had given no sign of life for {STALE:.0f} s. "
                "It goes on with what was finished; nothing needs to be done here."
            )

    def _mine(self) -> bool:
        try:
            return Holder.model_validate_json(self.path.read_bytes()) == self.holder
        except (OSError, ValueError):
            return False

    def keep(self, stop: threading.Event) -> None:
        """Give a sign of life every few seconds until told to stop."""
        while not stop.wait(HEARTBEAT) and self._mine():
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def give_back(self) -> None:
        """Remove it, if it is still one's own."""
        if self._mine():
            self.path.unlink(missing_ok=True)


def refuse_second(folder: Path) -> None:
    """Raise ``LeaseError`` if a living driver works on this folder."""
    holder = read_lease(folder)
    if holder is not None:
        raise LeaseError(
            f"{folder} is being written by process {holder.pid} on {holder.host} since {holder.since}: two drivers "
            "would mix their results. Wait for it, or stop it and run this again."
        )


@contextlib.contextmanager
def lease(folder: Path) -> Iterator[Lease]:
    """Hold the exclusive right to drive a run's folder, with a sign of life every few seconds.

    Raises
    ------
    LeaseError
        Another living driver holds it; names its machine, process and start.
    """
    mine = Lease(folder, Holder.me())
    _take(mine)
    stop = threading.Event()
    beat = threading.Thread(target=mine.keep, args=(stop,), name="stillframe-lease", daemon=True)
    beat.start()
    try:
        yield mine
    finally:
        stop.set()
        beat.join()
        mine.give_back()


def _take(mine: Lease) -> None:
    """Put the lease in place with its content, whole or not at all, a void one removed first."""
    draft = mine.path.with_name(f".lease.{mine.holder.host}.{mine.holder.pid}.partial")
    draft.write_text(mine.holder.model_dump_json())
    try:
        with _alone(mine.folder):
            refuse_second(mine.folder)
            mine.path.unlink(missing_ok=True)
            os.link(draft, mine.path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the lease and change it."""
    with (folder / ".lease.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
