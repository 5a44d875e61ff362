"""What several test modules share: one small simulated experiment, one real local cluster."""

import shutil
from collections import Counter

import pytest

from faulty import Started, finish, records, stores
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate

EXPERIMENT = Experiment(frames=24, shape=(96, 80), dose=200.0, max_drift=5.0, dark_every=10, seed=3)


@pytest.fixture(autouse=True)
def ended():
    """Kill what a failed test has left at work, so that it spoils no other test."""
    yield
    for process in list(Started.unended):
        process.kill(group=True)


@pytest.fixture(scope="session")
def experiment():
    return EXPERIMENT


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """Paths of the experiment's frames and mask; tests only read them."""
    return simulate(EXPERIMENT, tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="session")
def undisturbed(stored, tmp_path_factory):
    """Folder of a finished run of the experiment, which tests only read or copy."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert not finish(stored, out).problems
    before = stores(out), records(out)
    yield out
    assert (stores(out), records(out)) == before, "a test wrote into the shared run"


@pytest.fixture
def finished(undisturbed, tmp_path):
    """Folder of a finished run of the experiment, of which a test may do what it likes."""
    return shutil.copytree(undisturbed, tmp_path / "run")


@pytest.fixture(scope="session")
def client():
    """A real cluster of two worker processes."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def pytest_terminal_summary(terminalreporter):
    """Tell what the tests of faults survived; here, since a process that only hands out tests knows no deeper ones."""
    ended = (report for report in terminalreporter.getreports("") if report.when == "teardown")
    told = [found for report in ended for name, found in report.user_properties if name == "survived"]
    if told:
        terminalreporter.section("faults tried and survived")
        for name, number in sorted(sum(map(Counter, told), Counter()).items()):
            terminalreporter.write_line(f"{number:6d}  {name}")
