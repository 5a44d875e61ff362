"""TLS keys, private folders, and checks of what other users could read or change.

A dask scheduler runs any code that a connected client sends. With TLS, only holders of the key can connect. The keys of
a session lie in a private folder (mode 0700) within the run's folder, which all machines share.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillframe.log import warn
from stillframe.storage.durable import make_folder

_PREFIX, _NEW = ".stillframe-", ".new"
_MAKING = 60.0
"""Seconds between making a private folder and locking it, at most."""
CERTIFICATES = ("ca.pem", "cert.pem", "key.pem")
"""Files in a folder of TLS keys: the trusted authority, the certificate and its key."""


@contextlib.contextmanager
def private_folder(out: Path) -> Iterator[Path]:
    """Make a locked folder that only its owner can enter, and remove it at the end; first remove abandoned ones."""
    make_folder(out)
    sweep(out)
    folder = out / f"{_PREFIX}{secrets.token_hex(8)}"
    new = folder.with_name(f"{folder.name}{_NEW}")  # locked before it gets the name by which others would sweep it
    new.mkdir(mode=0o700)
    try:
        with (new / "lock").open("w") as lock:
            with contextlib.suppress(OSError):  # without locks on this file system, folders are never swept
                fcntl.flock(lock, fcntl.LOCK_EX)
            new.rename(folder)
            yield folder
    finally:
        for path in (new, folder):
            shutil.rmtree(path, ignore_errors=True)


def is_private_folder(name: str) -> bool:
    """True for the name of a private folder."""
    return re.fullmatch(f"{re.escape(_PREFIX)}[0-9a-f]{{16}}({re.escape(_NEW)})?", name) is not None


def sweep(out: Path) -> None:
    """Remove private folders of killed sessions."""
    for folder in out.glob(f"{_PREFIX}*"):
        if is_private_folder(folder.name) and _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def private_scratch() -> Iterator[None]:
    """Set dask's scratch folder to a new one of mode 0700, for all that dask starts from this process.

    Dask's own choice, ``dask-scratch-space`` in the shared temporary folder, has a predictable name and lies on the
    import path of the scheduler and the workers. Another user who makes that folder first could put packages there.
    """
    import dask

    base = Path(dask.config.get("temporary-directory", None) or tempfile.gettempdir())
    with private_folder(base) as folder, dask.config.set({"temporary-directory": str(folder)}):
        if others := replaceable_by(folder):
            raise PermissionError(
                f"{base}, the folder for temporary files, can be changed by {others}, and packages put there would run "
                "in your name. Set TMPDIR to a folder of your own."
            )
        yield


def _is_abandoned(folder: Path) -> bool:
    """True if no session holds the lock of a private folder, and the folder is not just being made."""
    try:
        if folder.lstat().st_uid != os.geteuid():
            return False  # another user's session, in a shared temporary folder
        old = time.time() - folder.stat().st_mtime > _MAKING
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return old or not folder.name.endswith(_NEW)
    except FileNotFoundError:
        return folder.exists() and time.time() - folder.stat().st_mtime > _MAKING
    except OSError:
        return False


def secret() -> str:
    """Return a random word for the URL prefix of dask's pages."""
    return secrets.token_urlsafe(16)


@dataclass(frozen=True)
class Keys:
    """TLS keys in a folder."""

    folder: Path
    """Folder with the files :data:`CERTIFICATES`."""

    def security(self) -> Any:
        """Return dask's security settings with these keys. Connections without a certificate of this authority fail."""
        from distributed.security import Security

        authority, certificate, key = (str(self.folder / name) for name in CERTIFICATES)
        roles = ("client", "scheduler", "worker")
        certificates = {f"tls_{role}_cert": certificate for role in roles}
        keys = {f"tls_{role}_key": key for role in roles}
        return Security(require_encryption=True, tls_ca_file=authority, **certificates, **keys)


def make_keys(folder: Path) -> Keys:
    """Make a self-signed certificate and its key, in files that only their owner can read.

    Dask-jobqueue can do so too, but keeps its files open, and over NFS other machines may see an open file empty.
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
    """Return the TLS keys in a folder; raise ``PermissionError`` if anybody else can use or replace them."""
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
    """Raise ``PermissionError`` if others can write a file that names a scheduler or the authority to be trusted."""
    if open_to := _open_to(file, stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{file} can be written by {open_to}, who could put a scheduler of theirs in its place. Make sure of it, "
            f"then chmod 600 {file}."
        )


def warn_of_open_folder(out: Path) -> None:
    """Warn if every user of this system can write the output folder."""
    if (mode := out.stat().st_mode) & stat.S_IWOTH and not mode & stat.S_ISVTX:
        warn(f"{out} can be written by everybody on this system, who could change results: chmod o-w {out}.")


def replaceable_by(folder: Path) -> str:
    """Return in words which other users could write into a folder or replace it; empty if nobody can.

    Groups are trusted, since many home and project folders are open to a group, and so are sticky folders such as /tmp.
    """
    for place in (folder, *folder.parents):
        state = place.stat()
        if state.st_uid not in (os.geteuid(), 0):
            return f"user {state.st_uid}, who owns {place}"
        if state.st_mode & stat.S_IWOTH and (place == folder or not state.st_mode & stat.S_ISVTX):
            return f"everybody on this system, as {place} is open to all"
    return ""


def _open_to(file: Path, mode: int) -> str:
    """Return in words which other users have any of the permissions ``mode`` on a file; empty if nobody has."""
    state = file.stat()
    if state.st_uid not in (os.geteuid(), 0):
        return f"its owner, user {state.st_uid}"
    if state.st_mode & mode & stat.S_IRWXO:
        return "everybody on this system"
    return "its group" if state.st_mode & mode & stat.S_IRWXG else ""


def warn_without_tls(address: str) -> None:
    """Warn if a scheduler has no TLS, since it runs any code that other users send."""
    host = address.split("://")[-1].rsplit(":", 1)[0]
    if address.startswith(("tls://", "inproc://")):
        return
    who = "every user of this machine" if host in ("127.0.0.1", "localhost", "[::1]") else "everybody on its network"
    warn(
        f"the scheduler at {address} has no TLS: {who} can run anything there in your name. Start it with "
        "certificates: cluster/README.md tells how."
    )


def require_secret_prefix(scheduler: Any, prefix: str) -> None:
    """Answer 404 to requests for pages outside the secret URL prefix. Every user of a machine can reach loopback."""
    from tornado.web import ErrorHandler

    pages = scheduler.http_application
    find_handler = pages.find_handler

    def find(request: Any, **rest: Any) -> Any:
        if request.path.startswith(f"/{prefix}/"):
            return find_handler(request, **rest)
        return pages.get_handler_delegate(request, ErrorHandler, {"status_code": 404})

    pages.find_handler = find
