"""Flipped bytes and files cut short, in every kind of file of a finished run: found, repaired, never silently used."""

import shutil
import subprocess

import numpy as np
import pytest
import xarray as xr

from faulty import chances, command, finish, records, stores
from stillframe.errors import OtherVersion
from stillframe.storage.reference_store import load_reference
from stillframe.storage.zarr_files import write_dataset
from stillframe.workflow.driver import run
from stillframe.workflow.verify import repair, verify
from synthetic import contents

KINDS = {
    "shard": "aligned.zarr/frames/c/*/*/*",
    "register record": "units/register/*.json",
    "align record": "units/align/*.json",
    "reference pixels": "reference.zarr/*/c/*/*",
    "reference metadata": "reference.zarr/**/zarr.json",
    "settings": "settings.toml",
    "description of the run": "run.json",
    "manifest": "manifest.json",
    "shifts": "shifts.zarr/**/*",
    "aligned metadata": "aligned.zarr/**/zarr.json",
    "aligned coordinates": "aligned.zarr/[!f]*/c/*",
    "picture": "shifts.png",
}


def flip(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def vanish(content, chance):
    return None


HARM = {"flipped": flip, "cut short": cut, "removed": vanish}


def harm(file, how, chance):
    content = HARM[how](file.read_bytes(), chance)
    file.write_bytes(content) if content is not None else file.unlink()


def files_of(folder, kind):
    return sorted(file for file in folder.glob(KINDS[kind]) if file.is_file())


@pytest.mark.parametrize("how", HARM)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_repaired(kind, how, undisturbed, stored, tmp_path, many, tried):
    chance = chances(kind + how)
    for number in range(many(1, 20)):
        out = tmp_path / str(number)
        shutil.copytree(undisturbed, out)
        file = chance.choice(files_of(out, kind))
        harm(file, how, chance)
        found = verify(out)
        assert found.findings, file
        repair(found, run)
        assert verify(out).findings == [], file
        assert stores(out) == stores(undisturbed), file
        shutil.rmtree(out)
        tried(f"{kind} {how}: found and repaired")


def test_what_the_reference_says_of_itself_is_repaired(undisturbed, stored, tmp_path):
    """No hash of pixels and settings knows it."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    root = out / "reference.zarr" / "zarr.json"
    root.write_text(root.read_text().replace('"reference_history"', '"reference_hist0ry"'))
    finish(stored, out)
    assert stores(out) == stores(undisturbed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shard"])
def test_a_run_that_goes_on_uses_nothing_damaged(kind, undisturbed, stored, tmp_path, many, tried):
    """What is cheap to look at is looked at by every run; of shards, their sizes."""
    chance = chances(kind)
    for number in range(many(1, 60)):
        out, how = tmp_path / str(number), chance.choice(list(HARM))
        shutil.copytree(undisturbed, out)
        harm(chance.choice(files_of(out, kind)), how, chance)
        finish(stored, out)
        assert stores(out) == stores(undisturbed), how
        assert verify(out).findings == [], how
        shutil.rmtree(out)
        tried(f"{kind} damaged: not used by a run that goes on")


@pytest.mark.parametrize("how", ["cut short", "removed"])
def test_a_run_that_goes_on_writes_shards_of_another_size_again(how, undisturbed, stored, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    harm(files_of(out, "shard")[2], how, chances(how))
    finish(stored, out)
    assert stores(out) == stores(undisturbed)


def test_what_is_damaged_is_named(undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shard = files_of(out, "shard")[2]
    shard.write_bytes(shard.read_bytes()[:-7])
    (out / "units" / "register" / "000001.json").write_bytes(b"{}")
    seen = subprocess.run(command("verify", out), capture_output=True, text=True, check=False)
    assert seen.returncode == 1
    assert "aligned.zarr/frames/c/2/0/0 (frames 8–11) has" in seen.stdout
    assert "frames 4–7: no record of the registration, or a damaged one" in seen.stdout
    assert "stillframe verify --repair" in seen.stdout
    mended = subprocess.run(command("verify", "--repair", out), capture_output=True, text=True, check=False)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    again = subprocess.run(command("verify", out), capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "All is well: 24 frames in 6 units" in again.stdout
    assert stores(out) == stores(undisturbed)


def test_only_what_is_broken_is_done_again(undisturbed, stored, tmp_path):
    out = tmp_path / "run"
    finish(stored, out)
    before = records(out)
    harm(files_of(out, "shard")[2], "flipped", chances(0))
    repair(verify(out), run)
    after = records(out)
    assert {path.name for path in after if after[path] != before.get(path)} == {"000002.json"}
    assert {path.parent.name for path in after if after[path] != before.get(path)} == {"align"}


def test_a_value_that_was_changed_in_a_store_is_found(undisturbed, stored, tmp_path):
    """Not damage but a hand: a store that is whole, with other values in it."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    with xr.open_zarr(out / "shifts.zarr", chunks=None) as shifts:
        changed = shifts.load()
    changed["shift"][3, 0] += 0.1
    shutil.rmtree(out / "shifts.zarr")
    write_dataset(changed, out / "shifts.zarr")
    assert any("does not hold the shifts of the records" in finding.what for finding in verify(out).findings)
    assert np.isfinite(load_reference(out / "reference.zarr").image).all()


def test_a_run_that_did_not_finish_says_so(stored, tmp_path, monkeypatch):
    import stillframe.workflow.unit_tasks

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stillframe.workflow.unit_tasks, "draft_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(stored, tmp_path / "run")
    words = [finding.what for finding in verify(tmp_path / "run").findings]
    assert "the last run did not finish: give the same 'stillframe run' command to go on" in words
    assert "frames 20–23: no record of the alignment, or a damaged one" in words


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run that has begun"):
        verify(tmp_path)


def test_a_stray_file_is_not_sealed_as_if_it_belonged(undisturbed, stored, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    stray = out / "reference.zarr" / "image" / "c" / "9"
    stray.write_bytes(b"stray")
    assert [finding.what for finding in verify(out).findings] == ["reference.zarr/image/c/9 was not written by the run"]
    finish(stored, out)
    assert not stray.exists()
    assert verify(out).findings == []


@pytest.mark.parametrize("store", ["reference.zarr", "shifts.zarr", "aligned.zarr", "manifest.json"])
def test_a_newer_format_of_a_store_is_refused(store, undisturbed, stored, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    file = out / store if store.endswith("json") else out / store / "zarr.json"
    newer = file.read_text().replace('"format_version": 1', '"format_version": 2')
    file.write_text('{"version":2}' if store.endswith("json") else newer)
    before = contents(out)
    with pytest.raises(OtherVersion, match="(a newer|another) one wrote it"):
        finish(stored, out)
    assert contents(out) == before
