"""The lease: one driver per output folder, or one per part, with a heartbeat; and the lock that fences off old writers.

Every writer, driver or worker, holds a shared lock while it writes and first checks that the lease is still the one it
was started under. A new driver takes the lease under the exclusive lock. So a writer that was paused, or that belongs
to an earlier run, can never put its result over a newer one.
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

from stillframe.errors import LeaseError, OutputLost
from stillframe.partition import Share
from stillframe.storage.durable import CLOCK_SKEW, write_draft
from stillframe.workflow.run_folder import RunFolder

HEARTBEAT = 5.0
"""Seconds between two heartbeats of a lease."""
STALE = 60.0
"""Seconds without a heartbeat after which a lease of another machine is void; more than twice ``CLOCK_SKEW``."""
PATIENCE = 60.0
"""Seconds in which writers of an earlier run must finish the file that they are writing."""
SILENCE = STALE + HEARTBEAT + CLOCK_SKEW
"""Seconds after which a driver that was killed on another machine surely counts as dead."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
"""Errors of a file system without locks, on which the check of the lease is the only protection."""
_AT_THE_GATE = 10
"""How many drivers that wait for the exclusive lock in vain a writer outlasts."""
_LEASE_MODE = 0o644
"""Mode of a lease, whatever the umask: everybody may read who drives, and nobody else may change it."""
_POLL = 0.05
_held: set[str] = set()
"""Tokens of the leases of this process: a lease that it could not remove is void although the process lives."""


class Holder(pydantic.BaseModel):
    """The driver of a run, or of one part of it."""

    model_config = pydantic.ConfigDict(frozen=True)

    host: str
    """Machine."""
    pid: int
    """Process on that machine."""
    born: float
    """When that process began, seconds since 1970; process numbers are used again."""
    since: str
    """When it took the lease, in words."""
    token: str = ""
    """Different for every lease ever taken."""
    share: str = ""
    """The part of the stack that it does, such as 3/16; empty for all of it."""

    @classmethod
    def me(cls, share: Share | None = None) -> "Holder":
        """Describe this process, now."""
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        born = psutil.Process(pid).create_time()
        part = str(share or "")
        return cls(host=socket.gethostname(), pid=pid, born=born, since=now, token=uuid.uuid4().hex, share=part)

    def __str__(self) -> str:
        """Process, machine and start in words."""
        part = f", part {self.share}," if self.share else ""
        return f"process {self.pid} on {self.host}{part} since {self.since}"

    def goes_with(self, other: "Holder") -> bool:
        """Return True if both may work at once: they do different parts of the same division."""
        mine, theirs = (one.share.partition("/") for one in (self, other))
        return bool(self.share and other.share) and mine[0] != theirs[0] and mine[2] == theirs[2]

    def lives(self, silent: float) -> bool:
        """Return True if it still drives, after so many seconds without a heartbeat."""
        if self.host != socket.gethostname():
            return silent <= STALE
        if self.pid == os.getpid():
            return self.token in _held
        try:
            process = psutil.Process(self.pid)
            # A killed process whose parent does not collect it keeps its number as a zombie.
            return process.status() != psutil.STATUS_ZOMBIE and bool(abs(process.create_time() - self.born) < 2)
        except psutil.NoSuchProcess:
            return False


def read_leases(folder: RunFolder, now: float | None = None) -> list[Holder]:
    """Return the living drivers of a run; ``now`` is the time by the clock of the file system."""
    holders = (_living(file, time.time() if now is None else now) for file in folder.leases)
    return [holder for holder in holders if holder]


def _living(file: Path, now: float) -> Holder | None:
    """Return the holder of a lease, None where it is void."""
    try:
        holder = Holder.model_validate_json(file.read_bytes())
        beat = file.stat().st_mtime
    except (OSError, ValueError):
        return None
    return holder if holder.lives(now - beat) else None


@dataclass(frozen=True)
class Claim:
    """The right to write into a run's folder until another driver takes over; sent along with every unit."""

    folder: RunFolder
    """The run's folder."""
    token: str
    """Token of the lease."""
    share: str = ""
    """The part that it is for, such as 3/16."""

    @property
    def path(self) -> Path:
        """The lease's file."""
        return self.folder.lease(self.share)

    def check(self) -> None:
        """Raise ``LeaseError`` if another driver has taken over, ``OutputLost`` if the folder is gone."""
        if not self.holds():
            raise LeaseError(
                f"another driver took over {self.folder.path}, as this one had given no sign of life for {STALE:.0f} "
                "s. It goes on with what was finished; nothing needs to be done here."
            )

    def holds(self) -> bool:
        """Return True if the lease is still the one that was taken."""
        try:
            return Holder.model_validate_json(self.path.read_bytes()).token == self.token
        except ValueError:
            return False
        except FileNotFoundError as error:
            if self.folder.path.is_dir():
                return False
            raise _lost(self.folder.path) from error

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
        """Folder of this driver's shards that have not taken their place yet."""
        return self.folder.drafts / self.token


@dataclass(frozen=True)
class Lease(Claim):
    """The exclusive right to drive a run's folder, or one part of it."""

    def beat(self, stop: threading.Event) -> None:
        """Give a heartbeat every few seconds until told to stop."""
        held = True
        while held and not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a file system that does not answer now may do so the next time
                held = self.holds()
                os.utime(self.path)

    def claim(self) -> Claim:
        """Return the claim that workers need."""
        return Claim(self.folder, self.token, self.share)

    def release(self) -> None:
        """Remove the lease, if it is still the one that was taken."""
        with contextlib.suppress(OSError, LeaseError), _locked(self.folder, fcntl.LOCK_EX):
            if self.holds():
                self.path.unlink(missing_ok=True)


def refuse_second(folder: RunFolder, now: float | None = None, me: Holder | None = None) -> None:
    """Raise ``LeaseError`` if a living driver works on this folder, unless it does another part beside ``me``."""
    others = [holder for holder in read_leases(folder, now) if me is None or not me.goes_with(holder)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise LeaseError(
            f"{folder.path} is being written by {others[0]}{more}: two drivers would mix their results. Wait for it, "
            "or stop it and run this again."
        )


@contextlib.contextmanager
def lease(folder: RunFolder, share: Share | None = None) -> Iterator[Lease]:
    """Hold the exclusive right to drive a run's folder, or one part of it, with a heartbeat.

    Raises
    ------
    LeaseError
        Another living driver holds it, named with its machine, process and start; or a writer of an earlier run does
        not end.
    """
    me = Holder.me(share)
    mine = Lease(folder, me.token, me.share)
    _take(folder, me)
    _held.add(me.token)
    stop = threading.Event()
    beat = threading.Thread(target=mine.beat, args=(stop,), name="stillframe-lease", daemon=True)
    beat.start()
    try:
        yield mine
    finally:
        stop.set()
        beat.join()
        mine.release()
        _held.discard(me.token)


def _take(folder: RunFolder, me: Holder) -> None:
    """Put the lease in place with its whole content, after void ones were removed."""
    draft = folder.path / f".lease.{me.token}.partial"
    write_draft(draft, me.model_dump_json().encode())
    draft.chmod(_LEASE_MODE)
    try:
        with _locked(folder, fcntl.LOCK_EX):
            os.utime(draft)
            now = draft.stat().st_mtime
            refuse_second(folder, now, me)
            for void in (file for file in folder.leases if not _living(file, now)):
                void.unlink(missing_ok=True)
            os.link(draft, folder.lease(me.share))
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(folder: RunFolder, stop: threading.Event) -> Iterator[float]:
    """Let one part prepare the folder while every other part waits; yield the time by the file system's clock.

    Raises
    ------
    LeaseError
        The file system has no locks, without which several parts would prepare the folder at once.
    """
    with folder.parts_lock.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(_POLL):
                    raise KeyboardInterrupt from None
            except OSError as error:
                raise LeaseError(
                    f"the file system of {folder.path} has no locks ({error.strerror}), so that parts of a run cannot "
                    "agree who prepares it. Mount it with flock, choose another --out, or run it with --cluster."
                ) from error
        os.utime(lock.fileno())
        yield os.fstat(lock.fileno()).st_mtime


@contextlib.contextmanager
def _locked(folder: RunFolder, kind: int) -> Iterator[None]:
    """Hold the lock under which a lease is changed (exclusive) or relied upon (shared)."""
    with _lock_file(folder.lease_gate) as gate, _lock_file(folder.lease_lock) as lock:
        # A crowd of writers would never leave the lock free for a driver that needs it exclusively. So everybody passes
        # a gate first, and the driver keeps the gate locked while it waits.
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


def _acquire(lock: IO[str], kind: int, folder: RunFolder, patience: float) -> None:
    until = time.monotonic() + patience
    while not _acquired(lock, kind):
        if time.monotonic() > until:
            raise LeaseError(
                f"a process of an earlier run still writes into {folder.path} and did not end within {patience:g} s. "
                "Look for paused stillframe or dask processes that have it open (lsof), stop them, and run this again."
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
