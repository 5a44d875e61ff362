import os
import signal
import threading
import time

import pytest

from faulty import wait_for
from racers import AllAtOnce, Broken, Flaky, Unfetchable
from stillframe import Settings
from stillframe.cluster import connect
from stillframe.cluster.dask_executor import DaskExecutor
from stillframe.cluster.executors import InProcess, results
from stillframe.errors import RunStopped


@pytest.fixture(params=["here", "cluster"])
def executor(request):
    if request.param == "here":
        return InProcess(2**30, threading.Event())
    return DaskExecutor(request.getfixturevalue("client"), 2**30, threading.Event(), "2 workers", 2)


def test_every_item_gets_its_result(executor):
    assert sorted(results(executor, str, range(20))) == [(number, str(number)) for number in range(20)]


def test_what_fails_is_tried_again_when_all_others_are_done(executor, tmp_path):
    work = Flaky(tmp_path, failures=2 if isinstance(executor, DaskExecutor) else 1)
    got = list(results(executor, work, [0, 1, 2, 3]))
    assert dict(got) == {0: "done", 1: "done", 2: "done", 3: "done"}
    assert got[-1][0] == 0


def test_it_is_tried_elsewhere(client, tmp_path):
    executor = DaskExecutor(client, 2**30, threading.Event(), "2 workers", 2)
    assert dict(results(executor, Flaky(tmp_path, failures=2), [0])) == {0: "done"}
    _, failed, last = (tmp_path / "0").read_text().split()
    assert failed != last


def test_what_fails_for_good_is_told_with_where(executor, tmp_path):
    got = dict(results(executor, Flaky(tmp_path, failures=99), [0, 1]))
    assert got[1] == "done"
    assert isinstance(got[0], ValueError)
    if isinstance(executor, DaskExecutor):
        assert got[0].__notes__[0].startswith("on worker tcp://127.0.0.1:")


def test_what_every_other_would_meet_too_is_told_at_once(executor, tmp_path):
    work = Flaky(tmp_path, failures=99, error=PermissionError(13, "Permission denied", "file"))
    outcome = next(outcome for item, outcome in results(executor, work, [0]) if item == 0)
    assert isinstance(outcome, PermissionError)
    assert len((tmp_path / "0").read_text().split()) <= 2


def test_a_stop_from_elsewhere_ends_it(executor):
    executor.stop.set()
    with pytest.raises(KeyboardInterrupt):
        list(results(executor, str, range(1000)))


@pytest.mark.parametrize("own", [True, False])
def test_a_cluster_without_workers_is_told(own, monkeypatch, capsys):
    from distributed import Client, LocalCluster

    monkeypatch.setattr("stillframe.cluster.dask_executor._WITHOUT_WORKERS", 0.2)
    monkeypatch.setattr("stillframe.cluster.dask_executor._COUNT_EVERY", 0.1)
    stop = threading.Event()
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        executor = DaskExecutor(client, 2**30, stop, "no worker", 1, patient=not own)
        if own:
            with pytest.raises(RunStopped, match="all worker processes ended"):
                list(results(executor, str, [1]))
            return
        threading.Timer(1, stop.set).start()
        with pytest.raises(KeyboardInterrupt):
            list(results(executor, str, [1]))
    assert "no worker is connected: waiting" in capsys.readouterr().err


def test_workers_that_come_later_need_not_wait_for_the_first(tmp_path):
    from distributed import Client, LocalCluster

    local = {"processes": False, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, **local) as cluster, Client(cluster) as client:
        executor = DaskExecutor(client, 2**30, threading.Event(), "workers", 1)
        later = threading.Timer(1, cluster.scale, [5])
        later.start()
        assert all(count >= 5 for _, count in results(executor, AllAtOnce(tmp_path, 5), range(8)))
        later.join()


def test_where_nothing_succeeds_failures_are_told_at_once(tmp_path):
    """A mistake in the settings must not take the whole stack before its first word."""
    told = results(InProcess(2**30, threading.Event()), Broken(tmp_path), range(100))
    next(told)
    assert len(list(tmp_path.iterdir())) == 9
    assert len(list(told)) == 99


def test_a_result_that_cannot_be_fetched_is_not_made_for_ever(client, tmp_path):
    executor = DaskExecutor(client, 2**30, threading.Event(), "2 workers", 2)
    ((_, outcome),) = results(executor, Unfetchable(tmp_path), [0])
    assert "could not be fetched from the worker" in str(outcome)
    assert len((tmp_path / "0").read_text()) < 12


def test_a_result_whose_worker_died_is_made_again(client, tmp_path):
    """The worker is killed when its result is there, and before it is fetched; another one takes over."""
    executor = DaskExecutor(client, 2**30, threading.Event(), "2 workers", 2)
    fetched, killed = executor._outcomes, []

    def kill_first(self, futures):
        if not killed:
            (holder,) = client.who_has(futures)[futures[0].key]
            killed.append(holder)
            os.kill(client.run(os.getpid, workers=[holder])[holder], signal.SIGKILL)
            wait_for(lambda: client.who_has(futures)[futures[0].key] != (holder,))
        return fetched(futures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DaskExecutor, "_outcomes", kill_first)
        assert dict(results(executor, Flaky(tmp_path, failures=0), [1])) == {1: "done"}
    assert len((tmp_path / "1").read_text().split()) == 2


def test_a_long_list_of_items_is_not_submitted_at_once(client):
    """Nor taken from its source: at 100,000 units that would fill the memory of the driver."""
    taken = []
    items = (taken.append(number) or number for number in range(2_000))
    executor = DaskExecutor(client, 2**30, threading.Event(), "2 workers", 2)
    got = results(executor, str, items)
    next(got)
    assert len(taken) < 1_000
    assert len(list(got)) == 1_999


def test_an_interrupt_is_heeded_at_once(client):
    stop = threading.Event()
    executor = DaskExecutor(client, 2**30, stop, "2 workers", 2)
    began = []
    threading.Timer(1, lambda: began.append(time.monotonic()) or stop.set()).start()
    with pytest.raises(KeyboardInterrupt):
        list(results(executor, time.sleep, [5]))
    assert time.monotonic() - began[0] < 0.5


def test_a_local_worker_that_died_is_replaced(tmp_path, monkeypatch):
    """Also while its nanny was starting it again: here the nanny is closed with it."""
    monkeypatch.setattr("stillframe.cluster.connect._WORKERS_REPLACED_EVERY", "100ms")
    monkeypatch.setitem(connect._LOCAL, "distributed.deploy.lost-worker-timeout", "100ms")
    asked = Settings(frames=tmp_path, out=tmp_path / "run", workers=1)
    with connect.executor(asked, None, threading.Event()) as executor:
        (address,) = executor.client.nthreads()
        cluster = executor.client.cluster
        cluster.sync(cluster.workers[0].close)
        wait_for(lambda: set(executor.client.nthreads()) - {address})
        assert list(results(executor, str, [1])) == [(1, "1")]
