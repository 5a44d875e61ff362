import threading

import numpy as np
import pytest
import zarr

from stillframe.registration.reference_frames import frames_needed
from stillframe.settings import Settings
from stillframe.storage.frames import FrameSource
from stillframe.workflow.follow import _FilesBefore, growing
from synthetic import store_frames

FRAMES = np.arange(10 * 16 * 16, dtype=np.uint16).reshape(10, 16, 16)


def test_a_file_counts_when_two_looks_find_it_the_same(tmp_path):
    store, seen = store_frames(tmp_path / "frames.zarr", FRAMES[:6]), _FilesBefore()
    assert seen.complete_frames(FrameSource(store)) == 0
    zarr.open_array(store, mode="r+")[4] = FRAMES[9]
    assert seen.complete_frames(FrameSource(store)) == 4
    assert seen.complete_frames(FrameSource(store)) == 6


def test_a_missing_file_ends_what_is_complete(tmp_path, capsys):
    store, seen = store_frames(tmp_path / "frames.zarr", FRAMES), _FilesBefore()
    (store / "c" / "3" / "0" / "0").unlink()
    seen.complete_frames(FrameSource(store))
    assert seen.complete_frames(FrameSource(store)) == 3
    assert capsys.readouterr().err.count("frame 3 of") == 1
    filled = FrameSource(store, "fill")
    seen.complete_frames(filled)
    assert seen.complete_frames(filled) == 10


def test_a_file_of_several_frames_counts_when_there_is_a_later_one(tmp_path):
    """Written frame by frame, it stays the same for as long as the experiment takes for one."""
    store = zarr.create_array(tmp_path / "frames.zarr", shape=(12, 16, 16), chunks=(4, 16, 16), dtype=np.uint16)
    seen, source = _FilesBefore(), FrameSource(tmp_path / "frames.zarr")
    for frame in range(6):
        store[frame] = FRAMES[frame] + 1
        seen.complete_frames(source)
        assert seen.complete_frames(source) == (4 if frame >= 4 else 0)


def test_an_array_without_a_frame_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("stillframe.workflow.follow.LOOK_EVERY", 0.01)
    store = zarr.create_array(tmp_path / "frames.zarr", shape=(0, 16, 16), chunks=(1, 16, 16), dtype=np.uint16)

    def write():
        for frame in FRAMES:
            store.append(frame[None] + 1)
        store.attrs["complete"] = True

    threading.Timer(0.3, write).start()
    sources = list(growing(Settings(frames=tmp_path / "frames.zarr", out=tmp_path / "run"), threading.Event()))
    assert sources[-1].shape[0] == 10


def test_a_shard_counts_when_it_is_full(tmp_path):
    store, seen = store_frames(tmp_path / "frames.zarr", FRAMES, shards=(4, 16, 16)), _FilesBefore()
    seen.complete_frames(FrameSource(store))
    assert seen.complete_frames(FrameSource(store)) == 8


def test_a_stack_that_is_marked_finished_is_given_whole(tmp_path):
    store = store_frames(tmp_path / "frames.zarr", FRAMES, attributes={"complete": True})
    sources = list(growing(Settings(frames=store, out=tmp_path / "run"), threading.Event()))
    assert [source.limit for source in sources] == [None]


def test_the_group_may_be_marked_instead(tmp_path):
    group = zarr.create_group(tmp_path / "group.zarr", attributes={"complete": True})
    group.create_array("frames", data=FRAMES)
    assert FrameSource(tmp_path / "group.zarr" / "frames").finished
    assert not FrameSource(store_frames(tmp_path / "alone.zarr", FRAMES)).finished


@pytest.mark.parametrize("use", [-1, slice(0, -2), slice(4, None), slice(-3, None), slice(0, 0)])
def test_a_reference_of_frames_counted_from_the_end_is_refused(use):
    with pytest.raises(ValueError, match="Count them from the first one"):
        frames_needed(use)


def test_waiting_ends_when_it_is_told_to(tmp_path):
    store, stop = store_frames(tmp_path / "frames.zarr", FRAMES), threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        list(growing(Settings(frames=store, out=tmp_path / "run"), stop))
