import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.errors import OtherVersion
from stillframe.partition import Plan, Unit
from stillframe.registration.matches import MATCH_DTYPE, no_match
from stillframe.storage.checksums import Checksum, with_checksum
from stillframe.workflow.ledger import Ledger, UnitRecord, UnitRecords, fields_of, known_plan
from stillframe.workflow.run_folder import RunFolder

UNIT = Unit(3, 12, 14)


def record(**changes):
    fields = {"stage": "register", "unit": 3, "start": 12, "stop": 14, "fingerprint": "abc", "facts": {"mask": "a"}}
    return UnitRecord(**(fields | changes))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def ledger(folder):
    ledger = Ledger(folder)
    ledger.prepare()
    return ledger


def read_back(content, tmp_path):
    return UnitRecord.parse(tmp_path, content)


@settings(max_examples=50)
@given(values=st.lists(st.floats(), min_size=10, max_size=10))
def test_matches_come_back_bit_for_bit(values, tmp_path_factory):
    matches = np.array([(*values[:9], 5), no_match(1)], MATCH_DTYPE)
    back = read_back(record(matches=fields_of(matches)).to_bytes(), tmp_path_factory.getbasetemp()).to_matches()
    for name in MATCH_DTYPE.names:
        np.testing.assert_array_equal(back[name], matches[name])


def test_a_published_record_is_listed_and_read(ledger):
    ledger.publish(record())
    assert ledger.listing() == {"register": {3}, "align": set()}
    assert ledger.read("register", 3) == record()
    assert ledger.records_of(3, ledger.listing()) == UnitRecords(register=record())
    assert not list(ledger.folder.path.rglob("*.partial"))


def test_a_record_that_is_not_listed_is_not_read(ledger, monkeypatch):
    monkeypatch.setattr(Ledger, "read", lambda *_: pytest.fail("a file was opened"))
    assert ledger.records_of(7, ledger.listing()) == UnitRecords()


def test_a_file_of_another_size_is_noticed(ledger, folder):
    file = folder.path / "shard"
    file.write_bytes(b"abc")
    written = record(files={"shard": Checksum.of(file)})
    assert ledger.has_files(written)
    file.write_bytes(b"ab")
    assert not ledger.has_files(written)
    file.unlink()
    assert not ledger.has_files(written)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"version": 3}', b"\x00\xff", b"1", b'"a"'])
def test_what_is_no_record_is_damaged(ledger, folder, content):
    folder.record("register", 3).write_bytes(content)
    assert ledger.read("register", 3) is None
    assert ledger.records_of(3, ledger.listing()) == UnitRecords(damaged=("register",))


@settings(max_examples=200)
@given(cut=st.integers(0, 600))
def test_a_torn_record_is_damaged(cut, tmp_path_factory):
    whole = record().to_bytes()
    assert read_back(whole[: min(cut, len(whole) - 1)], tmp_path_factory.getbasetemp()) is None


def test_a_record_under_another_name_is_damaged(ledger, folder):
    ledger.publish(record())
    folder.record("register", 3).rename(folder.record("register", 4))
    assert ledger.read("register", 4) is None


def test_a_withdrawn_record_is_gone(ledger):
    ledger.withdraw("register", 3)
    ledger.publish(record())
    ledger.withdraw("register", 3)
    assert ledger.listing() == {"register": set(), "align": set()}


def test_all_records_of_one_stage_can_be_withdrawn(ledger):
    for stage in ("register", "align"):
        for number in (3, 4):
            ledger.publish(record(stage=stage, unit=number))
    ledger.withdraw_all("align")
    assert ledger.listing() == {"register": {3, 4}, "align": set()}


@settings(max_examples=300)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(place, bit, tmp_path_factory):
    whole = bytearray(record(matches=fields_of(np.array([no_match(1), no_match(2)], MATCH_DTYPE))).to_bytes())
    whole[place % len(whole)] ^= 1 << bit
    assert read_back(bytes(whole), tmp_path_factory.getbasetemp()) is None


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_record_of_another_version_is_refused(ledger, folder, sealed, version):
    content = json.dumps({"version": version, "novelty": True}, separators=(",", ":")).encode()
    folder.record("register", 3).write_bytes(with_checksum(content) if sealed else content)
    with pytest.raises(OtherVersion, match=rf"000003\.json has version {version}, and this stillframe reads version 3"):
        ledger.read("register", 3)


def test_a_damaged_record_does_not_pass_for_one_of_another_version(ledger, folder):
    folder.record("register", 3).write_bytes(record().to_bytes().replace(b'"version":3', b'"version":7'))
    assert ledger.read("register", 3) is None


def test_a_record_without_a_checksum_is_damaged(ledger, folder):
    folder.record("register", 3).write_bytes(record().model_dump_json().encode())
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


def test_partial_files_of_a_killed_writer_are_removed(ledger, folder):
    litter = folder.record("align", 3).with_name(".000003.json.abc.partial")
    litter.touch()
    ledger.publish(record())
    ledger.prepare()
    assert not litter.exists()
    assert ledger.read("register", 3) == record()


def test_without_run_json_the_plan_follows_from_the_records(ledger, folder):
    assert known_plan(folder) is None
    for number, start in ((0, 0), (1, 8), (2, 16)):
        ledger.publish(record(unit=number, start=start, stop=min(start + 8, 20)))
    assert known_plan(folder) == Plan(20, 8)
