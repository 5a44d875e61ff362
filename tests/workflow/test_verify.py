import subprocess

from faulty import command
from stillframe.workflow.run_folder import RunFolder, read_settings
from stillframe.workflow.verify import Finding, in_words, verify


def test_a_finished_run_is_well(undisturbed):
    seen = []
    found = verify(undisturbed, seen.append)
    assert found.findings == []
    assert found.files > 40
    assert len(seen) == 6
    told = subprocess.run(command("verify", undisturbed), capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout.split(":")[0]) == (0, "All is well")


def test_the_settings_are_known(undisturbed, stored):
    assert read_settings(RunFolder(undisturbed)).frames == stored[0]


def test_what_is_no_run_is_refused(tmp_path):
    told = subprocess.run(command("verify", tmp_path), capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "holds no run that has begun" in told.stderr


def test_words_are_said_once():
    assert in_words([Finding("a"), Finding("b"), Finding("a")]) == ["a", "b"]
