"""Closed doors: keys for one session of a cluster, in a folder that nobody but their owner can look into.

A dask scheduler runs whatever anybody sends it who can connect; with TLS, that is whoever holds the key. The key's
folder lies in the run's, since that is what all machines share; it is locked while its session lives, and removed at
the end, or by the next run where the session was killed.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillframe.progress import warn

_PREFIX = ".cluster."
_MAKING = 5.0
"""Seconds in which a folder gets its lock, after it was made."""
CERTIFICATES = ("ca.pem", "cert.pem", "key.pem")
"""Files of a folder of certificates: who is trusted, and one's own certificate with its key."""


@contextlib.contextmanager
def private_folder(out: Path) -> Iterator[Path]:
    """Make a folder in a run's that only its owner can enter, for as long as this session lives."""
    sweep(out)
    folder = out / f"{_PREFIX}{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    try:
        with (folder / "lock").open("w") as lock:
            with contextlib.suppress(OSError):  # no locks on this file system: then nobody sweeps either
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_private_folder(name: str) -> bool:
    """Tell whether a file in a run's folder is such a folder by its name."""
    return name.startswith(_PREFIX)


def sweep(out: Path) -> None:
    """Remove the folders of sessions that were killed."""
    for folder in out.glob(f"{_PREFIX}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Tell whether nobody holds the lock of a folder that is not just being made."""
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return time.time() - folder.stat().st_mtime > _MAKING
    except FileNotFoundError:
        return folder.exists() and time.time() - folder.stat().st_mtime > _MAKING
    except OSError:
        return False


def secret() -> str:
    """Return a word that nobody guesses, so that pages on a shared machine are for those who were told."""
    return secrets.token_urlsafe(16)


@dataclass(frozen=True)
class Keys:
    """A folder with certificates."""

    folder: Path
    """Where they lie."""

    def security(self) -> Any:
        """Return them as dask wants them; whoever has none of this authority is refused."""
        from distributed.security import Security

        authority, certificate, key = (str(self.folder / name) for name in CERTIFICATES)
        roles = ("client", "scheduler", "worker")
        certificates = {f"tls_{role}_cert": certificate for role in roles}
        keys = {f"tls_{role}_key": key for role in roles}
        return Security(require_encryption=True, tls_ca_file=authority, **certificates, **keys)


def make_keys(folder: Path) -> Keys:
    """Make a certificate for one session, readable by its owner alone; it is its own authority.

    Raises
    ------
    FileExistsError
        There are certificates already: a running cluster may use them.
    """
    from distributed.security import Security

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if there := [name for name in CERTIFICATES if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder} holds {', '.join(there)} already, which a running cluster may use. Choose another folder, or "
            "delete it."
        )
    made = Security.temporary()
    for name, content in zip(CERTIFICATES, (made.tls_ca_file, made.tls_client_cert, made.tls_client_key), strict=True):
        with open(folder / name, "x", opener=_owner_only) as file:
            file.write(content)
    return Keys(folder)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def known_keys(folder: Path) -> Keys:
    """Return the certificates of a folder, if nobody else can use them.

    Raises
    ------
    FileNotFoundError
        One is missing.
    PermissionError
        Others can read the key, or say which scheduler is trusted.
    """
    missing = [name for name in CERTIFICATES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no {', '.join(missing)}: certificates to connect with are {', '.join(CERTIFICATES)}. "
            "Copy those of the scheduler there, or make some with 'stillframe certificates'."
        )
    key = folder / CERTIFICATES[-1]
    if open_to := _open_to(key, stat.S_IRWXG | stat.S_IRWXO):
        raise PermissionError(
            f"{key} can be read by {open_to}: whoever has it can run anything in your name. Make new certificates, as "
            f"these may have been copied, in a folder of mode 700; then chmod 600 {key}."
        )
    for name in CERTIFICATES[:-1]:
        refuse_foreign(folder / name)
    return Keys(folder)


def refuse_foreign(file: Path) -> None:
    """Raise ``PermissionError`` if others may say in a file which scheduler is connected to, or trusted."""
    if open_to := _open_to(file, stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{file} can be written by {open_to}, who could put a scheduler of theirs in its place. Make sure of it, "
            f"then chmod 600 {file}."
        )


def warn_of_open_folder(out: Path) -> None:
    """Say it where anybody may change results."""
    if (mode := out.stat().st_mode) & stat.S_IWOTH and not mode & stat.S_ISVTX:
        warn(f"{out} can be written by everybody on this system, who could change results: chmod o-w {out}.")


def _open_to(file: Path, mode: int) -> str:
    """Return in words to whom a file is open that should be so to its owner alone, who is its user."""
    found = file.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"its owner, user {found.st_uid}"
    if found.st_mode & mode & stat.S_IRWXO:
        return "everybody on this system"
    return "its group" if found.st_mode & mode & stat.S_IRWXG else ""


def warn_of_open_door(address: str) -> None:
    """Say that a scheduler without TLS runs whatever anybody sends it."""
    host = address.split("://")[-1].rsplit(":", 1)[0]
    if address.startswith(("tls://", "inproc://")):
        return
    who = "every user of this machine" if host in ("127.0.0.1", "localhost", "[::1]") else "everybody on its network"
    warn(
        f"the scheduler at {address} has no TLS: {who} can run anything there in your name. Start it with "
        "certificates: cluster/README.md tells how."
    )


def for_those_who_know(scheduler: Any, word: str) -> None:
    """Answer only requests for pages below a secret word: loopback is open to every user of a machine."""
    from tornado.web import ErrorHandler

    pages = scheduler.http_application
    found = pages.find_handler

    def find(request: Any, **rest: Any) -> Any:
        if request.path.startswith(f"/{word}/"):
            return found(request, **rest)
        return pages.get_handler_delegate(request, ErrorHandler, {"status_code": 404})

    pages.find_handler = find
