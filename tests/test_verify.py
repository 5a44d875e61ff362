import subprocess

import pytest

from faulty import command, finish
from stillframe.verify import Finding, in_words, known_settings, verify


@pytest.fixture(scope="module")
def whole(stored, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(stored, out)
    return out


def test_a_finished_run_is_well(whole):
    seen = []
    found = verify(whole, seen.append)
    assert found.findings == []
    assert found.files > 40
    assert len(seen) == 6
    told = subprocess.run(command("verify", whole), capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout.split(":")[0]) == (0, "All is well")


def test_the_settings_are_known(whole, stored):
    assert known_settings(whole).frames == stored[0]


def test_what_is_no_run_is_refused(tmp_path):
    told = subprocess.run(command("verify", tmp_path), capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "holds no run that has begun" in told.stderr


def test_words_are_said_once():
    assert in_words([Finding("a"), Finding("b"), Finding("a")]) == ["a", "b"]
