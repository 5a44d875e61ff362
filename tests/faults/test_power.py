"""Power loss: what was not yet made durable vanishes, is cut short, or has its new name without its content."""

import contextlib
import os
import random
import shutil
import sys
import threading
from pathlib import Path

import pytest

from faulty import chances, finish, settings, stores
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate
from stillframe.workflow.driver import run


class Disk:
    """What of a folder is on the disk, by what was made durable: names by their folder, contents by their file.

    Every file that was ever seen is held by a second name, so that its number is not given to another one.
    """

    def __init__(self, folder: Path, vault: Path, crash):
        self.folder, self.vault, self.crash = folder, vault, crash
        self.names: dict[Path, dict[str, int]] = {}
        self.contents: dict[int, bytes] = {}
        vault.mkdir()
        self.fsync = os.fsync

    def synced(self, handle):
        """Stand in for ``os.fsync``."""
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path == self.folder.parent or self.folder in (path, *path.parents):
            self.crash(self, before=path)
            self.remember(path)
        return self.fsync(handle)

    def remember(self, path: Path) -> None:
        if not path.is_dir():
            self.contents[self._hold(path)] = path.read_bytes()
        else:
            self.names[path] = self._listed(path)

    def _listed(self, path: Path) -> dict[str, int]:
        """Names in a folder now, with the numbers of their files, 0 for folders."""
        names = [name for name in path.iterdir() if self.folder in (name, *name.parents)]
        numbers = {name.name: self._hold(name) for name in names}
        return {name: number for name, number in numbers.items() if number is not None}

    def _hold(self, path: Path) -> int | None:
        """Keep a file from being forgotten; None if another thread renamed it just now."""
        try:
            number = 0 if path.is_dir() else path.stat().st_ino
            if number and not (self.vault / str(number)).exists():
                with contextlib.suppress(FileExistsError):  # another thread did it just now
                    os.link(path, self.vault / str(number))
        except FileNotFoundError:
            return None
        return number

    def after_power_loss(self, target: Path, how: str, chance: random.Random) -> None:
        """Write what the machine finds when it starts again."""
        keep = {"nothing": 0.0, "all names": 1.0, "some": 0.5}[how]
        self._restore(self.folder, target, keep, chance)

    def _restore(self, path: Path, target: Path, keep: float, chance: random.Random) -> None:
        durable = self.names.get(path, {})
        now = self._listed(path) if path.is_dir() else {}
        names = {}
        for name in sorted(durable.keys() | now.keys()):
            known = now if chance.random() < keep else durable
            if name in known:
                names[name] = known[name]
        target.mkdir(parents=True)
        for name, number in names.items():
            if number == 0:
                self._restore(path / name, target / name, keep, chance)
            else:
                (target / name).write_bytes(self._content(number, chance))

    def _content(self, number: int, chance: random.Random) -> bytes:
        if number in self.contents:
            return self.contents[number]
        written = (self.vault / str(number)).read_bytes()
        return chance.choice([b"", written[: len(written) // 2], bytes(len(written))])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    experiment = Experiment(frames=10, shape=(48, 40), dose=200.0, max_drift=3.0, dark_every=7, seed=5)
    return simulate(experiment, tmp_path_factory.mktemp("frames"))


SMALL = {"unit_frames": 4, "max_shift": 8}


@pytest.mark.parametrize("how", ["nothing", "all names", "some"])
@pytest.mark.parametrize("again", [False, True], ids=["a first run", "a run with another interpolation"])
def test_power_loss(how, again, stored, tmp_path, many, tried, monkeypatch):
    """At every step that makes something durable, or between two of them."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "disk" / "run"
    out.parent.mkdir()
    options = SMALL | ({"interpolation": "linear"} if again else {})
    finish(stored, undisturbed, **options)
    chance, losses, steps = chances(how), [], []
    every = many(24, 4)

    one_at_a_time, looking = threading.RLock(), []  # the lease is kept up by a thread of its own

    def crash(disk, before):
        with one_at_a_time:
            if looking:  # second names are made for the look itself
                return
            looking.append(before)
            steps.append(before)
            if (len(steps) + offset) % every == 0:
                target = tmp_path / f"lost{len(losses)}"
                disk.after_power_loss(target, how, chance)
                losses.append((target, before))
            looking.clear()

    disk = Disk(out, tmp_path / "vault", crash)
    offset = chance.randrange(every)
    if again:
        finish(stored, out, **SMALL)
        for path in (out.parent, out, *out.rglob("*")):
            disk.remember(path)
    monkeypatch.setattr(os, "fsync", disk.synced)
    sys.addaudithook(hook := _Hook(disk, crash, out))
    try:
        run(settings(stored, out, **options))
    finally:
        hook.active = False
        monkeypatch.undo()
    assert stores(out) == stores(undisturbed)
    for target, before in losses:
        for litter in target.rglob("lease.json"):
            litter.unlink()  # its process still lives: this one
        finish(stored, target, **options)
        assert stores(target) == stores(undisturbed), before
        shutil.rmtree(target)
    tried(f"power loss, {how} of what was not durable is there", len(losses))
    assert len(losses) > many(5, 40)


class _Hook:
    """A moment before every change of a name; what Python tells of, one is told."""

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")

    def __init__(self, disk, crash, folder):
        self.disk, self.crash, self.folder, self.active = disk, crash, str(folder), True

    def __call__(self, event, arguments):
        if self.active and event in self.EVENTS and str(arguments[0]).startswith(self.folder):
            self.active = False
            self.crash(self.disk, f"{event} {arguments[0]}")
            self.active = True
