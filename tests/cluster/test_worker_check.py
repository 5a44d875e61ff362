import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stillframe.cluster import worker_check as subject
from stillframe.cluster.dask_executor import DaskExecutor
from stillframe.cluster.executors import results
from stillframe.cluster.worker_check import refuse_unfit_cluster, requirements, unmet_by
from stillframe.errors import RunStopped, WorkerUnfit


@pytest.fixture
def required(tmp_path):
    for name in ("frames.zarr", "private"):
        (tmp_path / name).mkdir()
    return requirements(tmp_path / "frames.zarr", tmp_path / "private")


@pytest.fixture
def wrong_clock(monkeypatch):
    now = subject.time.time
    monkeypatch.setattr(subject.time, "time", lambda: now() - 3600)


class TestUnmet:
    def test_is_empty_for_a_fit_worker(self, required, tmp_path):
        assert unmet_by(required, str(tmp_path)) == []
        assert list(required.private.iterdir()) == []

    def test_names_packages_of_other_versions(self, required, tmp_path):
        other = replace(required, versions=(("numpy", "1.0"), *required.versions[2:]))
        (reason,) = unmet_by(other, str(tmp_path))
        assert "numpy" in reason and "instead of 1.0: install there what the driver has" in reason

    @pytest.mark.parametrize(("name", "word"), [("frames.zarr", "cannot read"), ("private", "cannot write into")])
    def test_names_folders_that_do_not_exist(self, required, tmp_path, name, word):
        (tmp_path / name).rmdir()
        (reason,) = unmet_by(required, str(tmp_path))
        assert word in reason and "No such file" in reason

    def test_names_scratch_that_cannot_be_written(self, required, tmp_path):
        (reason,) = unmet_by(required, str(tmp_path / "none"))
        assert "scratch" in reason

    def test_names_a_wrong_clock(self, required, tmp_path, wrong_clock):
        (reason,) = unmet_by(required, str(tmp_path))
        assert "its clock is 3600 s behind" in reason


class TestAClusterWithFitWorkers:
    def test_is_used(self, client, required):
        refuse_unfit_cluster(client, required)

    def test_is_refused_if_the_drivers_own_clock_is_wrong(self, client, required, wrong_clock):
        with pytest.raises(WorkerUnfit, match="this machine cannot drive the run: its clock is 3600 s behind"):
            refuse_unfit_cluster(client, required)


class TestAClusterWithUnfitWorkers:
    def test_is_refused_with_their_names(self, client, required):
        other = replace(required, versions=(("zarr", "2.0"),))
        with pytest.raises(
            WorkerUnfit, match=r"2 of 2 workers cannot take part\. worker tcp://127\.0\.0\.1:\d+: it has"
        ):
            refuse_unfit_cluster(client, other)

    def test_is_used_if_some_may_be_unfit(self, client, required, monkeypatch):
        monkeypatch.setattr(subject, "unfit_workers", lambda *_: {"a": "lacks", "b": ""})
        refuse_unfit_cluster(client, required, some=True)
        with pytest.raises(WorkerUnfit, match="1 of 2"):
            refuse_unfit_cluster(client, required)

    def test_is_refused_if_this_package_is_not_installed_there(self, required):
        client = SimpleNamespace(run=lambda *_, **__: {"a": ModuleNotFoundError("No module named 'stillframe'")})
        with pytest.raises(WorkerUnfit, match="this stillframe is not installed there"):
            refuse_unfit_cluster(client, required)


class TestWorkersThatConnectLater:
    @pytest.mark.parametrize("first", ["driver", "worker"])
    def test_are_dismissed_before_they_do_anything(self, required, capsys, monkeypatch, first):
        """Their folder is gone when they look; no better one comes, so that the run stops and reports why."""
        monkeypatch.setattr("stillframe.cluster.dask_executor._MOST_UNFIT", 1)
        if first == "worker":  # it gets a unit before the driver has asked
            monkeypatch.setattr("stillframe.cluster.dask_executor._Workers._check", lambda *_: None)
        from distributed import Client, LocalCluster

        lost = replace(required, private=required.private / "gone")
        with (
            LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            cluster.adapt(minimum=2, maximum=2, interval="100ms")
            executor = DaskExecutor(client, 2**30, threading.Event(), "2 workers", 2, required=lost)
            with pytest.raises(RunStopped, match="not fit for this run, the last one too: it cannot write into"):
                list(results(executor, (required.private / "done").mkdir, [0o700] * 4))
        assert "is sent away: it cannot write into" in capsys.readouterr().err
        assert list(required.private.iterdir()) == []
