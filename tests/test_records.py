import multiprocessing
import os
import socket
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racers import race
from stillframe.errors import LeaseError
from stillframe.match import MATCH_DTYPE, no_match
from stillframe.records import (
    STALE,
    Holder,
    Ledger,
    Seal,
    UnitRecord,
    fingerprint,
    from_matches,
    lease,
    read_lease,
    write_durably,
)
from stillframe.units import Unit

UNIT = Unit(3, 12, 14)


def record(**changes):
    fields = {"stage": "register", "unit": 3, "start": 12, "stop": 14, "fingerprint": "mark"}
    return UnitRecord(**(fields | changes))


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.prepare()
    return ledger


@settings(max_examples=50)
@given(values=st.lists(st.floats(), min_size=10, max_size=10))
def test_matches_come_back_bit_for_bit(values):
    matches = np.array([(*values[:9], 5), no_match(1)], MATCH_DTYPE)
    published = record(matches=from_matches(matches)).model_dump_json()
    back = UnitRecord.model_validate_json(published).to_matches()
    for name in MATCH_DTYPE.names:
        np.testing.assert_array_equal(back[name], matches[name])


def test_a_published_record_is_finished(ledger):
    ledger.publish(record())
    assert ledger.finished("register", UNIT, "mark") == record()
    assert ledger.records("register") == [record()]
    assert not list(ledger.folder.rglob("*.partial"))


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "other"},
        {"problems": ["chunk c/0 is missing"]},
        {"start": 11},
        {"stop": 15},
        {"files": {"aligned.zarr/gone": Seal(size=3, sha256="")}},
    ],
)
def test_a_record_that_does_not_hold_is_not_finished(ledger, changes):
    ledger.publish(record(**changes))
    assert ledger.finished("register", UNIT, "mark") is None


def test_a_file_of_another_size_is_not_finished(ledger):
    file = ledger.folder / "shard"
    file.write_bytes(b"abc")
    ledger.publish(record(files={"shard": Seal.of(file)}))
    assert ledger.finished("register", UNIT, "mark")
    file.write_bytes(b"ab")
    assert ledger.finished("register", UNIT, "mark") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 2}', b"\x00\xff"])
def test_what_is_no_record_is_none(ledger, content):
    ledger.path("register", 3).write_bytes(content)
    assert ledger.read("register", 3) is None
    assert ledger.records("register") == []


@settings(max_examples=200)
@given(cut=st.integers(0, 400))
def test_a_torn_record_is_none(cut, tmp_path_factory):
    ledger = Ledger(tmp_path_factory.mktemp("torn"))
    ledger.prepare()
    whole = record().model_dump_json().encode()
    ledger.path("register", 3).write_bytes(whole[: min(cut, len(whole) - 1)])
    assert ledger.read("register", 3) is None


def test_a_record_under_another_name_is_none(ledger):
    ledger.publish(record())
    ledger.path("register", 3).rename(ledger.path("register", 4))
    assert ledger.read("register", 4) is None


def test_a_withdrawn_record_is_gone(ledger):
    ledger.withdraw("register", 3)
    ledger.publish(record())
    ledger.withdraw("register", 3)
    assert ledger.read("register", 3) is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "record"
    write_durably(file, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(file, b"new")
    assert file.read_bytes() == b"old"


def test_fingerprints_differ_with_every_part():
    base = {"a": 1, "b": [1, 2]}
    assert fingerprint(base) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(base), fingerprint({**base, "a": 2}), fingerprint({**base, "c": None})}) == 3


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
            other = put(tmp_path, host="elsewhere")
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
