import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.storage.checksums import Checksum, fingerprint, has_checksum, with_checksum, without_checksum
from stillframe.storage.durable import make_folder, write_draft, write_durably


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "record"
    write_durably(file, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_fingerprints_depend_on_every_value_and_not_on_order():
    base = {"a": 1, "b": [1, 2]}
    assert fingerprint(base) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(base), fingerprint({**base, "a": 2}), fingerprint({**base, "c": None})}) == 3


@given(values=st.dictionaries(st.text(), st.integers()))
def test_a_checksum_comes_off_again(values):
    import json

    content = json.dumps(values).encode()
    assert without_checksum(with_checksum(content)) == content
    assert has_checksum(with_checksum(content))
    assert not has_checksum(content)


@pytest.mark.parametrize("content", [with_checksum(b'{"a":1}').replace(b"1", b"2", 1), b'{"a":1}', b""])
def test_a_wrong_or_missing_checksum_is_an_error(content):
    with pytest.raises(ValueError, match="damaged"):
        without_checksum(content)


def test_checksums_of_content_and_of_its_file_are_equal(tmp_path):
    file = tmp_path / "file"
    write_draft(file, memoryview(b"content"))
    assert Checksum.of(file) == Checksum.of_content(b"content")
    assert Checksum.of(file).size == 7


def test_folders_are_made_with_those_above_them(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
