"""Names in a run's folder, and what run.json and the manifest say of it."""

import json
import shutil

import pytest

from faulty import settings
from stillframe.partition import Plan, Share
from stillframe.storage.checksums import with_checksum
from stillframe.workflow.run_folder import (
    Manifest,
    Origin,
    RunDescription,
    RunFolder,
    read_settings,
)


@pytest.fixture
def finished(undisturbed, tmp_path):
    return RunFolder(shutil.copytree(undisturbed, tmp_path / "run"))


def test_whatever_a_run_leaves_is_its_own(tmp_path):
    folder = RunFolder(tmp_path)
    for name in (
        ".lease.lock",
        ".lease.gate",
        ".parts.lock",
        "lease.3-of-16.json",
        ".run.json.1.partial",
        ".stillframe-0123456789abcdef",
    ):
        (tmp_path / name).touch()
    for name in (folder.log().name, folder.log(Share(3, 16)).name, "jobs", ".drafts"):
        (tmp_path / name).touch()
    assert folder.strangers() == []
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "running.txt").touch()
    assert folder.strangers() == ["running.txt", "thesis.tex"]


def test_a_description_comes_back(finished, stored):
    description = RunDescription.read(finished.description)
    assert description.plan == Plan(24, 4)
    assert (description.parts, description.aligns) == (0, True)
    assert read_settings(finished) == settings(stored, finished.path)
    assert len(description.origin.frames) >= 16 and set(description.origin.frames) <= set(range(24))
    other = RunDescription.of(Plan(24, 4), settings(stored, finished.path, align=False), None, 3)
    assert (other.parts, other.aligns, other.origin) == (3, False, None)


def test_settings_come_from_the_readable_copy_where_run_json_is_damaged(finished, stored):
    whole = finished.description.read_bytes()
    finished.description.write_bytes(whole.replace(b"24", b"25", 1))
    assert RunDescription.read(finished.description) is None
    assert read_settings(finished) == settings(stored, finished.path)
    finished.description.write_bytes(whole)


def test_settings_that_nobody_can_read_are_refused_with_the_way_on(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .*Give the 'stillframe run' command that began it once more"):
        read_settings(RunFolder(tmp_path))


def test_a_manifest_lists_everything_but_shards_and_records(finished):
    manifest = Manifest.read(finished.manifest)
    assert manifest == Manifest.of(finished)
    assert {"settings.toml", "shifts.png", "aligned.zarr/zarr.json"} <= manifest.files.keys()
    assert not [name for name in manifest.files if name.startswith(("units", "aligned.zarr/frames/c"))]


def test_a_manifest_notices_a_changed_an_added_and_a_lost_file(finished):
    manifest, store = Manifest.of(finished), finished.reference
    assert manifest.describes(finished, store)
    added = store / "note"
    added.write_text("")
    assert not manifest.describes(finished, store)
    added.unlink()
    file = store / "zarr.json"
    whole = file.read_bytes()
    file.write_bytes(whole + b" ")
    assert not manifest.describes(finished, store)
    file.unlink()
    assert not manifest.describes(finished, store)
    file.write_bytes(whole)


class TestOrigin:
    ORIGIN = Origin(settings="a", frames={0: "x", 1: None, 2: "y"})

    @pytest.mark.parametrize(
        ("changes", "holds"),
        [
            ({}, True),
            ({"frames": {0: "x", 1: "z", 2: None}}, True),
            ({"frames": {0: "other", 1: None, 2: "y"}}, False),
            ({"frames": {0: "x", 1: None}}, False),
            ({"settings": "b"}, False),
        ],
    )
    def test_holds_unless_something_was_changed(self, changes, holds):
        assert self.ORIGIN.holds(self.ORIGIN.model_copy(update=changes)) == holds

    def test_names_the_frames_that_came_back(self):
        now = self.ORIGIN.model_copy(update={"frames": {0: None, 1: "z", 2: "y"}})
        assert self.ORIGIN.returned(now) == [1]
        assert self.ORIGIN.without({0}).frames == {0: None, 1: None, 2: "y"}


def test_what_the_checksum_does_not_cover_is_not_believed(finished):
    stored = json.loads(finished.description.read_bytes())
    del stored["checksum"]
    content = json.dumps(stored, separators=(",", ":")).encode()
    whole = finished.description.read_bytes()
    finished.description.write_bytes(content)
    assert RunDescription.read(finished.description) is None
    finished.description.write_bytes(with_checksum(content))
    assert RunDescription.read(finished.description) == RunDescription(**stored)
    finished.description.write_bytes(whole)
