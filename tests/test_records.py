import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.durable import Seal, fingerprint, with_checksum
from stillframe.match import MATCH_DTYPE, no_match
from stillframe.records import INPUT_FILES, Ledger, Mark, UnitRecord, changes, from_matches
from stillframe.units import Unit

UNIT = Unit(3, 12, 14)
MARK = Mark({"mask": "a", "fill": "0"}, [("c/0", 10, 5)])


def record(**changes):
    fields = {
        "stage": "register",
        "unit": 3,
        "start": 12,
        "stop": 14,
        "fingerprint": MARK.fingerprint,
        "facts": MARK.facts,
    }
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
    back = UnitRecord.from_bytes(record(matches=from_matches(matches)).to_bytes()).to_matches()
    for name in MATCH_DTYPE.names:
        np.testing.assert_array_equal(back[name], matches[name])


def test_a_published_record_is_finished(ledger):
    ledger.publish(record())
    assert ledger.finished("register", UNIT, MARK) == record()
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
    assert ledger.finished("register", UNIT, MARK) is None


def test_a_file_of_another_size_is_not_finished(ledger):
    file = ledger.folder / "shard"
    file.write_bytes(b"abc")
    ledger.publish(record(files={"shard": Seal.of(file)}))
    assert ledger.finished("register", UNIT, MARK)
    file.write_bytes(b"ab")
    assert ledger.finished("register", UNIT, MARK) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 2}', b"\x00\xff", b"1", b'"a"'])
def test_what_is_no_record_is_none(ledger, content):
    ledger.path("register", 3).write_bytes(content)
    assert ledger.read("register", 3) is None
    assert ledger.records("register") == []


@settings(max_examples=200)
@given(cut=st.integers(0, 600))
def test_a_torn_record_is_none(cut, tmp_path_factory):
    ledger = Ledger(tmp_path_factory.mktemp("torn"))
    ledger.prepare()
    whole = record().to_bytes()
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


@settings(max_examples=300)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(place, bit):
    whole = bytearray(record(matches=from_matches(np.array([no_match(1), no_match(2)], MATCH_DTYPE))).to_bytes())
    whole[place % len(whole)] ^= 1 << bit
    with pytest.raises(ValueError, match="damaged|valid"):
        UnitRecord.from_bytes(bytes(whole))


@pytest.mark.parametrize("sealed", [True, False])
def test_a_record_of_a_newer_version_is_refused(ledger, sealed):
    content = json.dumps({"format": 3, "novelty": True}, separators=(",", ":")).encode()
    ledger.path("register", 3).write_bytes(with_checksum(content) if sealed else content)
    with pytest.raises(ValueError, match=r"000003\.json has format 3, and this stillframe knows up to 2"):
        ledger.read("register", 3)


def test_a_damaged_record_does_not_pass_for_a_newer_one(ledger):
    whole = record().to_bytes().replace(b'"format":2', b'"format":7')
    ledger.path("register", 3).write_bytes(whole)
    assert ledger.read("register", 3) is None


def test_a_record_of_the_first_format_is_read_and_holds(ledger):
    then = {"frames": (0, 4)}
    old = record(format=1, fingerprint=fingerprint(then), facts={})
    content = old.model_dump_json(exclude={"facts", "inputs"}).encode()
    ledger.path("register", 3).write_bytes(content)
    assert ledger.read("register", 3) == old
    assert ledger.finished("register", UNIT, Mark({}, older=then)) == old
    assert ledger.finished("register", UNIT, Mark({}, older={"frames": (4, 8)})) is None


def test_a_record_of_today_without_a_checksum_is_damaged(ledger):
    ledger.path("register", 3).write_bytes(record().model_dump_json().encode())
    assert ledger.read("register", 3) is None


@pytest.mark.parametrize(
    "matches",
    [
        {name: [0.0] for name in MATCH_DTYPE.names},
        {name: [0.0, 0.0] for name in MATCH_DTYPE.names if name != "flag"},
        {name: [0.0, -1.0] for name in MATCH_DTYPE.names},
        {name: [0.0, 1e9] for name in MATCH_DTYPE.names},
    ],
)
def test_matches_that_cannot_be_are_refused(matches):
    with pytest.raises(ValueError, match="not those of 2 frames"):
        record(matches=matches)


def test_changes_are_told_by_name():
    before = record(
        facts={"mask": "a" * 64, "fill": "0", INPUT_FILES: "x" * 64},
        inputs=[("c/0", 1, 1), ("c/1", 2, 2), ("c/2", 3, 3)],
    )
    now = Mark(
        {"mask": "b" * 64, "fill": "nan", INPUT_FILES: "y" * 64, "new": "1"},
        [("c/0", 1, 1), ("c/1", 9, 2), ("c/3", 3, 3)],
    )
    assert changes(before, now) == ["mask", "fill (0 → nan)", "input files (c/1, c/2, c/3)", "new (none → 1)"]
    assert changes(record(), MARK) == []


def test_the_sweep_removes_what_a_killed_writer_left(ledger):
    litter = ledger.path("align", 3).with_name(".000003.json.abc.partial")
    litter.touch()
    ledger.publish(record())
    ledger.prepare()
    assert not litter.exists()
    assert ledger.read("register", 3) == record()
