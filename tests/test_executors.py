import threading

import pytest

from racers import AllAtOnce, Broken, Flaky, Unfetchable
from stillframe.errors import RunStopped
from stillframe.executors import InProcess, OnCluster, results


@pytest.fixture(params=["here", "cluster"])
def executor(request):
    if request.param == "here":
        return InProcess(2**30, threading.Event())
    return OnCluster(request.getfixturevalue("client"), 2**30, threading.Event(), "2 workers", 2)


def test_every_item_gets_its_result(executor):
    assert sorted(results(executor, str, range(20))) == [(number, str(number)) for number in range(20)]


def test_what_fails_is_tried_again_when_all_others_are_done(executor, tmp_path):
    work = Flaky(tmp_path, failures=2 if isinstance(executor, OnCluster) else 1)
    got = list(results(executor, work, [0, 1, 2, 3]))
    assert dict(got) == {0: "done", 1: "done", 2: "done", 3: "done"}
    assert got[-1][0] == 0


def test_it_is_tried_elsewhere(client, tmp_path):
    executor = OnCluster(client, 2**30, threading.Event(), "2 workers", 2)
    assert dict(results(executor, Flaky(tmp_path, failures=2), [0])) == {0: "done"}
    _, failed, last = (tmp_path / "0").read_text().split()
    assert failed != last


def test_what_fails_for_good_is_told_with_where(executor, tmp_path):
    got = dict(results(executor, Flaky(tmp_path, failures=99), [0, 1]))
    assert got[1] == "done"
    assert isinstance(got[0], ValueError)
    if isinstance(executor, OnCluster):
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

    monkeypatch.setattr("stillframe.executors._WITHOUT_WORKERS", 0.2)
    stop = threading.Event()
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        executor = OnCluster(client, 2**30, stop, "no worker", 1, patient=not own)
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
        executor = OnCluster(client, 2**30, threading.Event(), "workers", 1)
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
    executor = OnCluster(client, 2**30, threading.Event(), "2 workers", 2)
    ((_, outcome),) = results(executor, Unfetchable(tmp_path), [0])
    assert "could not be fetched from the worker" in str(outcome)
    assert len((tmp_path / "0").read_text()) < 12


def test_workers_of_ones_own_are_brought_back():
    """As when one died while its nanny started it again."""
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        executor = OnCluster(client, 2**30, threading.Event(), "1 worker", 1, keep=lambda _: cluster.scale(1))
        assert list(results(executor, str, [1])) == [(1, "1")]
