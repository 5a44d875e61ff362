import fcntl
import multiprocessing
import os
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from racers import race
from stillframe.errors import LeaseError, OutputLost
from stillframe.workflow import lease as leases
from stillframe.workflow.lease import STALE, Claim, Holder, lease, read_leases
from stillframe.workflow.run_folder import RunFolder


def put(folder, **changes):
    """Write a lease of this process, but for the changes."""
    file = folder / "lease.json"
    file.write_text(Holder.me().model_copy(update=changes).model_dump_json())
    return file


class TestLease:
    def test_is_exclusive_and_names_the_holder(self, tmp_path):
        with lease(RunFolder(tmp_path)):
            with (
                pytest.raises(LeaseError, match=f"process {os.getpid()} on {socket.gethostname()}"),
                lease(RunFolder(tmp_path)),
            ):
                pass
            assert read_leases(RunFolder(tmp_path))[0].pid == os.getpid()
        assert read_leases(RunFolder(tmp_path)) == []
        with lease(RunFolder(tmp_path)):
            pass

    def test_of_a_dead_process_is_void(self, tmp_path):
        gone = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
        gone.start()
        gone.join()
        put(tmp_path, pid=gone.pid)
        with lease(RunFolder(tmp_path)):
            assert read_leases(RunFolder(tmp_path))[0].pid == os.getpid()

    def test_of_a_process_number_used_again_is_void(self, tmp_path):
        put(tmp_path, born=1.0)
        with lease(RunFolder(tmp_path)):
            pass

    @pytest.mark.parametrize("content", ["", "[1]", '{"host": "a"}', '{"pid": "x"}', "\x00"])
    def test_that_is_none_is_void(self, tmp_path, content):
        (tmp_path / "lease.json").write_text(content)
        with lease(RunFolder(tmp_path)):
            pass

    def test_that_was_taken_over_is_noticed_and_left_alone(self, tmp_path):
        with lease(RunFolder(tmp_path)) as mine:
            mine.check()
            other = put(tmp_path, host="elsewhere", token="another")
            with pytest.raises(LeaseError, match="another driver took over"):
                mine.check()
        assert other.exists()

    def test_of_another_machine_is_void_when_it_gives_no_sign(self, tmp_path):
        file = put(tmp_path, host="elsewhere", pid=1, since="then")
        with pytest.raises(LeaseError, match="process 1 on elsewhere since then"), lease(RunFolder(tmp_path)):
            pass
        long_ago = time.time() - STALE - 1
        os.utime(file, (long_ago, long_ago))
        with lease(RunFolder(tmp_path)):
            pass

    def test_is_given_to_one_of_many(self, tmp_path):
        context = multiprocessing.get_context("spawn")
        start, answers = context.Event(), context.Queue()
        racers = [context.Process(target=race, args=(tmp_path, start, answers)) for _ in range(4)]
        for racer in racers:
            racer.start()
        start.set()
        got = sorted(answers.get(timeout=60) for _ in racers)
        for racer in racers:
            racer.join()
        assert got == [False, False, False, True]


def test_a_lease_that_this_process_could_not_remove_is_void(tmp_path):
    put(tmp_path)
    with lease(RunFolder(tmp_path)) as mine:
        assert mine.holds()


class TestClaim:
    def test_lets_its_holder_write_and_nobody_else(self, tmp_path):
        with lease(RunFolder(tmp_path)) as mine:
            with mine.claim().writing():
                pass
            with (
                pytest.raises(LeaseError, match="another driver took over"),
                Claim(RunFolder(tmp_path), "older").writing(),
            ):
                pass
        with pytest.raises(LeaseError), mine.claim().writing():
            pass

    def test_keeps_a_new_driver_waiting_while_something_is_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr("stillframe.workflow.lease.PATIENCE", 0.2)
        with lease(RunFolder(tmp_path)) as mine, mine.writing():
            put(tmp_path, pid=2**22 + 1)  # as if the driver had died while its worker writes
            with pytest.raises(LeaseError, match="still writes into .* within 0.2 s"), lease(RunFolder(tmp_path)):
                pass

    def test_works_where_a_file_system_has_no_locks(self, tmp_path, monkeypatch):
        def without(*_):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", without)
        with lease(RunFolder(tmp_path)) as mine, mine.writing():
            assert mine.holds()

    def test_tells_a_lock_that_fails_otherwise(self, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(fcntl, "flock", broken)
        with pytest.raises(OSError, match="Input/output"), lease(RunFolder(tmp_path)):
            pass


def test_a_driver_that_was_killed_and_not_looked_after_is_dead(tmp_path):
    """In a container whose first process does not care for orphans it keeps its number for ever."""
    gone = subprocess.Popen(["sleep", "0"])
    born = psutil.Process(gone.pid).create_time()
    while psutil.Process(gone.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    put(tmp_path, pid=gone.pid, born=born)
    assert read_leases(RunFolder(tmp_path)) == []
    gone.wait()


def test_many_writers_do_not_keep_a_driver_out(tmp_path):
    """They never leave the lock alone, one always begins before another ends; who wants it comes in between."""
    with lease(RunFolder(tmp_path)) as held:
        stop = threading.Event()

        def write():
            while not stop.is_set():
                with held.writing():
                    time.sleep(0.1)

        writers = [threading.Thread(target=write) for _ in range(8)]
        for writer in writers:
            writer.start()
        began = time.monotonic()
        with leases._locked(RunFolder(tmp_path), fcntl.LOCK_EX):
            waited = time.monotonic() - began
        stop.set()
        for writer in writers:
            writer.join()
    assert waited < 5


def test_nobody_else_can_change_it(tmp_path):
    before = os.umask(0)
    try:
        with lease(RunFolder(tmp_path)) as held:
            assert stat.S_IMODE(held.path.stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_folder_that_is_gone_is_no_other_driver(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with lease(RunFolder(folder)) as mine:
        folder.rename(tmp_path / "away")
        for look in (mine.check, mine.writing().__enter__):
            with pytest.raises(OutputLost, match="the folder of the results is gone"):
                look()
        (tmp_path / "away").rename(folder)
        mine.check()


def test_a_file_system_that_fails_for_a_moment_does_not_end_the_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("stillframe.workflow.lease.HEARTBEAT", 0.02)
    with lease(RunFolder(tmp_path)):
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        time.sleep(0.2)
        monkeypatch.setattr(Path, "read_bytes", read)
        before = (tmp_path / "lease.json").stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / "lease.json").stat().st_mtime_ns > before
