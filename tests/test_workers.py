import os
import threading
import time
from dataclasses import replace

import pytest

from stillframe import workers as subject
from stillframe.errors import RunStopped, WorkerUnfit
from stillframe.executors import OnCluster, results
from stillframe.workers import _judged, demands_of, refuse_unfit_workers, unmet


@pytest.fixture
def demands(tmp_path):
    for name in ("frames.zarr", "private"):
        (tmp_path / name).mkdir()
    return demands_of(tmp_path / "frames.zarr", tmp_path / "private")


class TestUnmet:
    def test_is_nothing_where_all_is_well(self, demands, tmp_path):
        assert unmet(demands, str(tmp_path)) == []
        assert list(demands.private.iterdir()) == []

    def test_names_packages_of_other_versions(self, demands, tmp_path):
        other = replace(demands, versions=(("numpy", "1.0"), *demands.versions[2:]))
        (lack,) = unmet(other, str(tmp_path))
        assert "numpy" in lack and "instead of 1.0: install there what the driver has" in lack

    @pytest.mark.parametrize(("name", "word"), [("frames.zarr", "cannot read"), ("private", "cannot write into")])
    def test_names_folders_that_are_not_seen(self, demands, tmp_path, name, word):
        (tmp_path / name).rmdir()
        (lack,) = unmet(demands, str(tmp_path))
        assert word in lack and "No such file" in lack

    def test_names_scratch_that_cannot_be_written(self, demands, tmp_path):
        (lack,) = unmet(demands, str(tmp_path / "none"))
        assert "scratch" in lack

    def test_tells_a_clock_that_is_wrong(self, demands, tmp_path, monkeypatch):
        monkeypatch.setattr(subject.time, "time", lambda: time.time_ns() / 1e9 - 3600)
        (lack,) = unmet(demands, str(tmp_path))
        assert "its clock is 3600 s behind" in lack


class TestJudged:
    def test_compares_clocks_with_the_drivers(self):
        assert _judged(([], 1000.0), 999.0, 2.0) == []
        assert "100 s behind the driver" in _judged(([], 900.0), 1000.0, 2.0)[0]
        assert "100 s ahead of the driver" in _judged(([], 1100.0), 1000.0, 2.0)[0]

    def test_understands_what_a_worker_without_this_package_answers(self):
        (lack,) = _judged(ModuleNotFoundError("No module named 'stillframe'"), 0.0, 0.0)
        assert "is not installed there" in lack


class TestOnACluster:
    def test_workers_that_are_fit_are_taken(self, client, demands):
        refuse_unfit_workers(client, demands)

    def test_workers_that_are_not_are_named(self, client, demands):
        other = replace(demands, versions=(("zarr", "2.0"),))
        with pytest.raises(
            WorkerUnfit, match=r"2 of 2 workers cannot take part\. worker tcp://127\.0\.0\.1:\d+: it has"
        ):
            refuse_unfit_workers(client, other)

    def test_some_that_are_not_are_no_reason_to_refuse_all(self, client, demands, monkeypatch):
        monkeypatch.setattr(subject, "unfit_of", lambda *_: {"a": "lacks", "b": ""})
        refuse_unfit_workers(client, demands, some=True)
        with pytest.raises(WorkerUnfit, match="1 of 2"):
            refuse_unfit_workers(client, demands)

    def test_those_that_come_later_are_sent_away_before_they_do_anything(self, demands, capsys, monkeypatch):
        """Their folder is gone when they look; none is better, so that the run stops and says why."""
        monkeypatch.setattr("stillframe.executors._MOST_UNFIT", 1)
        from distributed import Client, LocalCluster

        lost = replace(demands, private=demands.private / "gone")
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            keep = lambda _: cluster.scale(1)  # noqa: E731
            executor = OnCluster(client, 2**30, threading.Event(), "1 worker", 1, keep=keep, demands=lost)
            with pytest.raises(RunStopped, match="not fit for this run, the last one too: it cannot write into"):
                list(results(executor, os.getpid, range(4)))
        assert "is sent away: it cannot write into" in capsys.readouterr().err
