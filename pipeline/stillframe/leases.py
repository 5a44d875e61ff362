"""One driver per output: a lease with a heartbeat, and the fence that keeps out whoever was replaced.

Or several, each for a part of its own: they have a lease each, and keep out everybody but each other.

Whoever writes into a run's folder, driver or worker, does so while it holds a shared lock and after a look at the
lease; a new driver takes over under the exclusive lock. So a writer that was paused, or that belongs to an earlier
run, can never put its result over a newer one.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pydantic

from stillframe.durable import write_draft
from stillframe.errors import LeaseError, OutputLost
from stillframe.units import Share

HEARTBEAT = 5.0
"""Seconds between two signs of life of a lease."""
STALE = 60.0
"""Seconds without a sign of life after which a lease on another machine is void."""
SKEW = 25.0
"""Seconds by which the clocks of machines may differ; a stale lease is told by more than twice that."""
PATIENCE = 60.0
"""Seconds in which writers of an earlier run finish the file they are at."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
"""What a file system without locks says; a look at the lease is all there is on it."""
_AT_THE_GATE = 10
"""How many who want the lock alone, and do not get it, a writer outwaits."""
_OWNERS = 0o644
"""Mode of a lease, whatever else is open to a group: everybody may read who drives, and nobody else change it."""
_POLL = 0.05
_held: set[str] = set()
"""Tokens of the leases that this process holds: one that it could not remove is void, though the process lives."""


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
    token: str = ""
    """Different for every lease ever taken."""
    share: str = ""
    """The part of the stack that it does, where it is not all, such as 3/16."""

    @classmethod
    def me(cls, share: Share | None = None) -> "Holder":
        """Describe this process, now."""
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        born = psutil.Process(pid).create_time()
        part = str(share or "")
        return cls(host=socket.gethostname(), pid=pid, born=born, since=now, token=uuid.uuid4().hex, share=part)

    def __str__(self) -> str:
        """Who that is, in words."""
        part = f", part {self.share}," if self.share else ""
        return f"process {self.pid} on {self.host}{part} since {self.since}"

    @property
    def file(self) -> str:
        """Name of its lease."""
        return f"lease.{self.share.replace('/', '-of-')}.json" if self.share else "lease.json"

    def goes_with(self, other: "Holder") -> bool:
        """Tell whether both can drive a run at a time: they do different parts of the same division."""
        mine, theirs = (one.share.partition("/") for one in (self, other))
        return bool(self.share and other.share) and mine[0] != theirs[0] and mine[2] == theirs[2]

    def lives(self, silent: float) -> bool:
        """Tell whether it still drives, after so many seconds without a sign of life."""
        if self.host != socket.gethostname():
            return silent <= STALE
        if self.pid == os.getpid():
            return self.token in _held
        try:
            process = psutil.Process(self.pid)
            # One that was killed, and whose parent does not look, keeps its number.
            return process.status() != psutil.STATUS_ZOMBIE and bool(abs(process.create_time() - self.born) < 2)
        except psutil.NoSuchProcess:
            return False


def _lease_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("lease*.json"))


def is_lease(name: str) -> bool:
    """Tell whether a file in a run's folder is a lease by its name."""
    return name.startswith("lease") and name.endswith(".json")


def read_leases(folder: Path, now: float | None = None) -> list[Holder]:
    """Return who drives this run; ``now`` is the time by the clock of the file system."""
    found = (_living(file, time.time() if now is None else now) for file in _lease_files(folder))
    return [holder for holder in found if holder]


def _living(file: Path, now: float) -> Holder | None:
    """Return the holder of a lease, None where it is void."""
    try:
        holder = Holder.model_validate_json(file.read_bytes())
        seen = file.stat().st_mtime
    except (OSError, ValueError):
        return None
    return holder if holder.lives(now - seen) else None


@dataclass(frozen=True)
class Claim:
    """The right to write into a run's folder until another driver takes over; travels with every unit."""

    folder: Path
    """The run's folder."""
    token: str
    """That of the lease."""
    file: str = "lease.json"
    """Its name."""

    @property
    def path(self) -> Path:
        """Where the lease lies."""
        return self.folder / self.file

    def check(self) -> None:
        """Raise ``LeaseError`` if another driver has taken over, ``OutputLost`` if there is no folder any more."""
        if not self.holds():
            raise LeaseError(
                f"another driver took over {self.folder}, as this one had given no sign of life for {STALE:.0f} s. "
                "It goes on with what was finished; nothing needs to be done here."
            )

    def holds(self) -> bool:
        """Tell whether the lease is still the one that was taken."""
        try:
            return Holder.model_validate_json(self.path.read_bytes()).token == self.token
        except ValueError:
            return False
        except FileNotFoundError as error:
            if self.folder.is_dir():
                return False
            raise _lost(self.folder) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write while nobody can take over.

        Raises
        ------
        LeaseError
            Another driver has taken over: nothing may be written any more.
        """
        with _locked(self.folder, fcntl.LOCK_SH):
            self.check()
            yield

    @property
    def drafts(self) -> Path:
        """Folder of files that have not got their place yet; nobody else's."""
        return drafts_of(self.folder) / self.token


def drafts_of(folder: Path) -> Path:
    """Return the folder under which all runs into this folder keep their drafts."""
    return folder / ".drafts"


@dataclass(frozen=True)
class Lease(Claim):
    """The exclusive right to drive a run's folder."""

    def keep(self, stop: threading.Event) -> None:
        """Give a sign of life every few seconds until told to stop."""
        held = True
        while held and not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a file system that does not answer now may do so the next time
                held = self.holds()
                os.utime(self.path)

    def claim(self) -> Claim:
        """Return what workers need of it."""
        return Claim(self.folder, self.token, self.file)

    def give_back(self) -> None:
        """Remove it, if it is still one's own."""
        with contextlib.suppress(OSError, LeaseError), _locked(self.folder, fcntl.LOCK_EX):
            if self.holds():
                self.path.unlink(missing_ok=True)


def refuse_second(folder: Path, now: float | None = None, me: Holder | None = None) -> None:
    """Raise ``LeaseError`` if a living driver works on this folder, but for parts that go with one's own."""
    others = [holder for holder in read_leases(folder, now) if me is None or not me.goes_with(holder)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise LeaseError(
            f"{folder} is being written by {others[0]}{more}: two drivers would mix their results. Wait for it, or "
            "stop it and run this again."
        )


@contextlib.contextmanager
def lease(folder: Path, share: Share | None = None) -> Iterator[Lease]:
    """Hold the exclusive right to drive a run's folder, or a part of it, with a sign of life every few seconds.

    Raises
    ------
    LeaseError
        Another living driver holds it, named with its machine, process and start; or a writer of an earlier run does
        not end.
    """
    me = Holder.me(share)
    mine = Lease(folder, me.token, me.file)
    _take(folder, me)
    _held.add(me.token)
    stop = threading.Event()
    beat = threading.Thread(target=mine.keep, args=(stop,), name="stillframe-lease", daemon=True)
    beat.start()
    try:
        yield mine
    finally:
        stop.set()
        beat.join()
        mine.give_back()
        _held.discard(me.token)


def _take(folder: Path, me: Holder) -> None:
    """Put the lease in place with its content, whole or not at all, void ones removed first."""
    draft = folder / f".lease.{me.token}.partial"
    write_draft(draft, me.model_dump_json().encode())
    draft.chmod(_OWNERS)
    try:
        with _locked(folder, fcntl.LOCK_EX):
            os.utime(draft)
            now = draft.stat().st_mtime
            refuse_second(folder, now, me)
            for void in (file for file in _lease_files(folder) if not _living(file, now)):
                void.unlink(missing_ok=True)
            os.link(draft, folder / me.file)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(folder: Path, stop: threading.Event) -> Iterator[float]:
    """Prepare a run while every other part of it waits; the time is that of the file system's clock.

    Raises
    ------
    LeaseError
        The file system has no locks, without which parts would prepare it at the same time.
    """
    with (folder / ".parts.lock").open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(_POLL):
                    raise KeyboardInterrupt from None
            except OSError as error:
                raise LeaseError(
                    f"the file system of {folder} has no locks ({error.strerror}), so that parts of a run cannot agree "
                    "who prepares it. Mount it with flock, choose another --out, or run it with --cluster."
                ) from error
        os.utime(lock.fileno())
        yield os.fstat(lock.fileno()).st_mtime


@contextlib.contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Hold the lock under which a lease is changed (exclusive) or relied upon (shared)."""
    with _lock_file(folder / ".lease.gate") as gate, _lock_file(folder / ".lease.lock") as lock:
        # Writers in great number would never leave the lock to one who wants it alone: so who waits for it holds the
        # gate, through which they all must come.
        _acquire(gate, kind, folder, PATIENCE if kind == fcntl.LOCK_EX else _AT_THE_GATE * PATIENCE)
        _acquire(lock, kind, folder, PATIENCE)
        with contextlib.suppress(OSError):
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def _lock_file(path: Path) -> IO[str]:
    try:
        return path.open("a+")  # NFS locks for reading what can be read, for writing what can be written
    except FileNotFoundError as error:
        raise _lost(path.parent) from error


def _lost(folder: Path) -> OutputLost:
    return OutputLost(errno.ENOENT, "the folder of the results is gone", str(folder))


def _acquire(lock: IO[str], kind: int, folder: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while not _acquired(lock, kind):
        if time.monotonic() > until:
            raise LeaseError(
                f"a process of an earlier run still writes into {folder} and did not end within {patience:g} s. Look "
                "for paused stillframe or dask processes that have it open (lsof), stop them, and run this again."
            )
        time.sleep(_POLL)


def _acquired(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
