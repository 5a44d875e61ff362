"""A file system that is full, in any file of a run; and one that refuses to be written."""

import errno
import os
import shutil
import subprocess

import pytest

from faulty import STORES, finish, settings, stores
from stillframe.errors import RunStopped
from stillframe.workflow.driver import run
from stillframe.workflow.verify import verify


@pytest.fixture
def small(tmp_path):
    """Mount a file system of some bytes; give how to do it again with more."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size, *more):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *more)), "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"this machine does not let a test mount a file system: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def used(folder):
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_system_that_is_full(workers, stored, undisturbed, small, tmp_path, many, tried):
    """From one that holds almost nothing to one that almost suffices, so that every kind of file meets its end."""
    finish(stored, tmp_path / "whole")
    whole = used(tmp_path / "whole")
    sizes = many(24, 120) if workers == 0 else many(2, 12)
    stopped_at = set()
    for step in range(sizes):
        folder = small(int(whole * (step + 1) / (sizes + 1)) // 4096 * 4096 + 4096)
        out = folder / "run"
        try:
            run(settings(stored, out, workers=workers))
        except RunStopped as error:
            words = str(error)
            assert "No space left on device" in words
            assert str(out) in words
            assert "run the same command again" in words
            stopped_at.add(kind_of(words))
            tried(f"a full file system, {'in this process' if workers == 0 else 'on a cluster'}")
        else:
            assert step > 0.7 * sizes, "it must not have fitted"
        assert not (out / "lease.json").exists()
        subprocess.run(["mount", "-o", f"remount,size={4 * whole}", folder], check=True)
        finish(stored, out)
        assert stores(out) == stores(undisturbed)
        assert verify(out).findings == []
        subprocess.run(["umount", "-l", folder], check=True)
    assert workers or len(stopped_at) >= 3, stopped_at


def kind_of(words):
    """Which kind of file met its end."""
    return next((name for name in (*STORES, "units", ".drafts", "settings", "plan", "lease") if name in words), "other")


KINDS = (".drafts", "units/register", "units/align", "run.json", "settings.toml", "manifest.json")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails(kind, number, stored, undisturbed, tmp_path, monkeypatch, tried):
    """What a quota, a vanished permission or a broken disk say, at the second file of a kind."""
    out, fsync, met = tmp_path / "run", os.fsync, []

    def failing(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if str(out / kind) in name.replace("/.", "/").replace("/drafts", "/.drafts") and os.path.isfile(name):
            met.append(name)
            if len(met) >= (2 if "/" in kind or kind == ".drafts" else 1):
                raise OSError(number, os.strerror(number), name)
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    if number == errno.EIO and kind == ".drafts":
        assert run(settings(stored, out)).problems
    else:
        with pytest.raises((RunStopped, OSError), match=os.strerror(number)):
            run(settings(stored, out))
    monkeypatch.undo()
    assert met
    finish(stored, out)
    assert stores(out) == stores(undisturbed)
    tried(f"{errno.errorcode[number]} while writing")


def test_an_output_that_becomes_read_only(stored, undisturbed, small, tmp_path, monkeypatch, tried):
    import stillframe.workflow.unit_tasks

    out, draft, done = small(64 * 2**20) / "run", stillframe.workflow.unit_tasks.draft_unit, []

    def remount(*arguments):
        done.append(arguments)
        if len(done) == 3:
            subprocess.run(["mount", "--bind", out, out], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
        return draft(*arguments)

    monkeypatch.setattr(stillframe.workflow.unit_tasks, "draft_unit", remount)
    with pytest.raises(RunStopped, match=r"Read-only file system \(.*run.*\)"):
        run(settings(stored, out))
    subprocess.run(["umount", "-l", out], check=True)
    monkeypatch.undo()
    finish(stored, out)
    assert stores(out) == stores(undisturbed)
    tried("an output that becomes read-only")


def test_an_input_that_vanishes(stored, undisturbed, tmp_path, monkeypatch, tried):
    """As when its file system is unmounted: the run stops, and no frame is taken for dark or damaged."""
    import stillframe.workflow.unit_tasks

    source, away, out = tmp_path / "in", tmp_path / "away", tmp_path / "run"
    shutil.copytree(stored[0].parent, source)
    here, draft, done = (
        (source / stored[0].name, source / stored[1].name),
        stillframe.workflow.unit_tasks.draft_unit,
        [],
    )

    def unmount(*arguments):
        done.append(arguments)
        if len(done) == 3:
            source.rename(away)
        return draft(*arguments)

    monkeypatch.setattr(stillframe.workflow.unit_tasks, "draft_unit", unmount)
    with pytest.raises(RunStopped, match=r"the frames cannot be reached any more \(.*frames\.zarr"):
        run(settings(here, out))
    monkeypatch.undo()
    away.rename(source)
    finish(here, out)
    assert stores(out)["aligned.zarr"] == stores(undisturbed)["aligned.zarr"]
    tried("an input that vanishes")
