import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.durable import (
    Seal,
    fingerprint,
    make_folder,
    with_checksum,
    without_checksum,
    write_draft,
    write_durably,
)


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


def test_fingerprints_differ_with_every_part():
    base = {"a": 1, "b": [1, 2]}
    assert fingerprint(base) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(base), fingerprint({**base, "a": 2}), fingerprint({**base, "c": None})}) == 3


@given(values=st.dictionaries(st.text(), st.integers()))
def test_a_checksum_comes_off_again(values):
    import json

    content = json.dumps(values).encode()
    assert without_checksum(with_checksum(content)) == (content, True)
    assert without_checksum(content) == (content, False)


def test_a_wrong_checksum_is_told():
    with pytest.raises(ValueError, match="damaged"):
        without_checksum(with_checksum(b'{"a":1}').replace(b"1", b"2", 1))


def test_a_seal_is_the_same_of_content_and_of_its_file(tmp_path):
    file = tmp_path / "file"
    write_draft(file, memoryview(b"content"))
    assert Seal.of(file) == Seal.of_content(b"content")
    assert Seal.of(file).size == 7


def test_folders_are_made_with_those_above_them(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
