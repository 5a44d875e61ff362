import shutil
from collections import namedtuple

import pytest
from rich.console import Console

from faulty import settings
from stillframe.cluster.executors import process_memory
from stillframe.console import print_forecast
from stillframe.partition import unit_memory
from stillframe.storage.frames import open_source
from stillframe.workflow.forecast import forecast


def said(found, out):
    console = Console(width=200)
    with console.capture() as capture:
        fits = print_forecast(found, out, console)
    return fits, capture.get()


def test_a_pilot_tells_disk_and_time_and_leaves_nothing_behind(stored, undisturbed, tmp_path):
    found = forecast(settings(stored, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
    assert (found.left, found.pilot, found.workers) == (6, 2, 1)
    assert found.seconds > 0
    shards = (undisturbed / "aligned.zarr" / "frames" / "c").rglob("0")
    written = sum(file.stat().st_size for file in shards if file.is_file())
    assert 0.8 * written < found.disk < 1.25 * written
    fits, text = said(found, tmp_path / "run")
    assert fits
    assert "6 units" in text
    assert "as in the pilot" in text


def test_without_a_pilot_it_tells_the_most(stored, tmp_path):
    found = forecast(settings(stored, tmp_path / "run", interpolation="cubic"), pilot=0)
    assert found.seconds is None
    assert found.disk == 24 * 96 * 80 * 4
    assert found.reading == 24 * 96 * 80 * 2
    assert found.memory == process_memory(unit_memory(open_source(stored[0]).layout, 4, 4, 12))
    assert "at most" in said(found, tmp_path)[1]


def test_what_is_finished_is_not_counted(stored, finished):
    found = forecast(settings(stored, finished))
    assert (found.left, found.disk) == (0, 0)


def test_a_disk_without_room_is_refused_with_the_way_on(stored, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 990, 10))
    fits, text = said(forecast(settings(stored, tmp_path / "run"), pilot=0), tmp_path / "run")
    assert not fits
    assert "has no room for this. Free some, choose another --out, or the interpolation nearest" in text


def test_memory_that_does_not_suffice_is_refused_with_the_way_on(stored, tmp_path):
    with pytest.raises(ValueError, match="Use fewer workers, or give them more memory"):
        forecast(settings(stored, tmp_path / "run", memory=0.01))
    assert list(tmp_path.iterdir()) == []
