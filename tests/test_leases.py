import fcntl
import multiprocessing
import os
import socket
import time

import pytest

from racers import race
from stillframe.errors import LeaseError
from stillframe.leases import STALE, Claim, Holder, lease, read_lease


def put(folder, **changes):
    """Write a lease of this process, but for the changes."""
    file = folder / "lease.json"
    file.write_text(Holder.me().model_copy(update=changes).model_dump_json())
    return file


class TestLease:
    def test_is_exclusive_and_names_the_holder(self, tmp_path):
        with lease(tmp_path):
            with pytest.raises(LeaseError, match=f"process {os.getpid()} on {socket.gethostname()}"), lease(tmp_path):
                pass
            assert read_lease(tmp_path).pid == os.getpid()
        assert read_lease(tmp_path) is None
        with lease(tmp_path):
            pass

    def test_of_a_dead_process_is_void(self, tmp_path):
        gone = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
        gone.start()
        gone.join()
        put(tmp_path, pid=gone.pid)
        with lease(tmp_path):
            assert read_lease(tmp_path).pid == os.getpid()

    def test_of_a_process_number_used_again_is_void(self, tmp_path):
        put(tmp_path, born=1.0)
        with lease(tmp_path):
            pass

    @pytest.mark.parametrize("content", ["", "[1]", '{"host": "a"}', '{"pid": "x"}', "\x00"])
    def test_that_is_none_is_void(self, tmp_path, content):
        (tmp_path / "lease.json").write_text(content)
        with lease(tmp_path):
            pass

    def test_that_was_taken_over_is_noticed_and_left_alone(self, tmp_path):
        with lease(tmp_path) as mine:
            mine.check()
            other = put(tmp_path, host="elsewhere", token="another")
            with pytest.raises(LeaseError, match="another driver took over"):
                mine.check()
        assert other.exists()

    def test_of_another_machine_is_void_when_it_gives_no_sign(self, tmp_path):
        file = put(tmp_path, host="elsewhere", pid=1, since="then")
        with pytest.raises(LeaseError, match="process 1 on elsewhere since then"), lease(tmp_path):
            pass
        long_ago = time.time() - STALE - 1
        os.utime(file, (long_ago, long_ago))
        with lease(tmp_path):
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
    with lease(tmp_path) as mine:
        assert mine.holds()


class TestClaim:
    def test_lets_its_holder_write_and_nobody_else(self, tmp_path):
        with lease(tmp_path) as mine:
            with mine.claim().writing():
                pass
            with pytest.raises(LeaseError, match="another driver took over"), Claim(tmp_path, "older").writing():
                pass
        with pytest.raises(LeaseError), mine.claim().writing():
            pass

    def test_keeps_a_new_driver_waiting_while_something_is_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr("stillframe.leases.PATIENCE", 0.2)
        with lease(tmp_path) as mine, mine.writing():
            put(tmp_path, pid=2**22 + 1)  # as if the driver had died while its worker writes
            with pytest.raises(LeaseError, match="still writes into .* within 0.2 s"), lease(tmp_path):
                pass

    def test_works_where_a_file_system_has_no_locks(self, tmp_path, monkeypatch):
        def without(*_):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", without)
        with lease(tmp_path) as mine, mine.writing():
            assert mine.holds()

    def test_tells_a_lock_that_fails_otherwise(self, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(fcntl, "flock", broken)
        with pytest.raises(OSError, match="Input/output"), lease(tmp_path):
            pass
