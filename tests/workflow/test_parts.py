"""Parts of a run as processes of their own, which agree through the folder alone."""

import json
import shutil
import subprocess
import threading

import pytest
import zarr

from faulty import command, finish, run_command, settings, stores
from stillframe.errors import LeaseError, RunStopped
from stillframe.partition import Share
from stillframe.workflow.driver import run
from stillframe.workflow.lease import Holder, lease, one_at_a_time
from stillframe.workflow.ledger import Ledger, known_plan
from stillframe.workflow.parts import gather, run_part
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.status import read_status
from stillframe.workflow.verify import verify


@pytest.mark.parametrize(("units", "parts"), [(6, 4), (3, 5), (1, 1), (2250, 16)])
def test_shares_are_all_units_once(units, parts):
    shares = [Share(number, parts).units(range(units)) for number in range(1, parts + 1)]
    assert [unit for share in shares for unit in share] == list(range(units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/3", ""])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ValueError, match="parts are counted from 1"):
        Share.parse(text)


def test_parts_in_any_order_make_the_same_bytes(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    for number in (3, 1, 2):
        assert run_part(settings(stored, out), Share(number, 3)).problems == []
    assert gather(out).problems == []
    assert stores(out) == stores(undisturbed)
    assert verify(out).findings == []


@pytest.mark.slow
def test_parts_at_once_make_the_same_bytes(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    parts = [subprocess.Popen([*run_command(stored, out), "--shard", f"{number}/4"]) for number in range(1, 5)]
    assert [part.wait() for part in parts] == [0] * 4
    assert subprocess.run(command("gather", out), check=False).returncode == 0
    assert stores(out) == stores(undisturbed)
    assert verify(out).findings == []


def test_what_is_missing_is_named_and_nothing_put_together(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    for number in (1, 3):
        run_part(settings(stored, out), Share(number, 3))
    with pytest.raises(RunStopped, match=r"8 of 24 frames are missing: frames 8–15\. Start part 2 of 3 again"):
        gather(out)
    assert not (out / "shifts.zarr").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*/*.json")}
    run_part(settings(stored, out), Share(2, 3))
    gather(out)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert stores(out) == stores(undisturbed)


@pytest.mark.slow
def test_a_run_as_a_whole_goes_on_after_parts_and_parts_after_it(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    run_part(settings(stored, out), Share(2, 2))
    finish(stored, out)
    assert stores(out) == stores(undisturbed)
    run_part(settings(stored, out), Share(1, 2))
    gather(out)
    assert stores(out) == stores(undisturbed)


def test_a_unit_that_failed_is_gathered_with_its_reason(stored, tmp_path):
    out, reason = tmp_path / "run", "frames 4–7: it was too much"
    for number in (1, 2):
        run_part(settings(stored, out), Share(number, 2))
    ledger, unit = Ledger(RunFolder(out)), known_plan(RunFolder(out)).units[1]
    ledger.withdraw("align", unit.number)
    ledger.fail("register", unit, reason)
    assert gather(out).problems == [reason]
    assert read_status(out).stages[0].done == 20


def test_shards_that_go_with_damaged_metadata_do_not_pass_for_finished(stored, undisturbed, tmp_path):
    """Nobody can tell any more what they mean."""
    out = tmp_path / "run"
    for number in (1, 2):
        run_part(settings(stored, out), Share(number, 2))
    (out / "aligned.zarr" / "frames" / "zarr.json").write_bytes(b"{")
    units = [str(unit) for unit in known_plan(RunFolder(out)).units]
    assert gather(out).problems == [
        f"{unit}: the aligned frames are gone; run the same command again" for unit in units
    ]
    attributes = zarr.open_group(out / "aligned.zarr", mode="r").attrs
    assert attributes["complete"] is False
    assert attributes["missing"] == units
    finish(stored, out)
    assert stores(out) == stores(undisturbed)


class TestTheLease:
    def test_lets_other_parts_work(self, tmp_path):
        with lease(RunFolder(tmp_path), Share(1, 3)) as first, lease(RunFolder(tmp_path), Share(2, 3)) as second:
            for held in (first, second):
                held.check()

    @pytest.mark.parametrize("other", [None, Share(1, 3), Share(1, 4), Share(4, 4)])
    def test_keeps_out_everybody_else(self, tmp_path, other):
        with (
            lease(RunFolder(tmp_path), Share(1, 3)),
            pytest.raises(LeaseError, match="part 1/3, since"),
            lease(RunFolder(tmp_path), other),
        ):
            pass

    def test_of_a_whole_run_keeps_out_parts(self, tmp_path):
        with lease(RunFolder(tmp_path)), pytest.raises(LeaseError), lease(RunFolder(tmp_path), Share(1, 3)):
            pass

    def test_that_is_void_is_removed_by_whoever_comes_so_that_its_holder_writes_no_more(self, tmp_path):
        with lease(RunFolder(tmp_path), Share(1, 3)) as old:
            void(old)
            with lease(RunFolder(tmp_path), Share(2, 3)), pytest.raises(LeaseError, match="another driver took over"):
                old.check()

    def test_is_void_for_a_whole_run_too(self, tmp_path):
        with lease(RunFolder(tmp_path), Share(1, 3)) as old:
            void(old)
            with lease(RunFolder(tmp_path)), pytest.raises(LeaseError, match="another driver took over"), old.writing():
                pass


def void(held):
    """Make a lease one of a process that ended long ago."""
    content = json.loads(held.path.read_text())
    held.path.write_text(json.dumps(content | {"pid": 2**22 + 1}))


def test_a_part_is_refused_while_another_works_with_other_settings(stored, tmp_path):
    out = tmp_path / "run"
    run_part(settings(stored, out), Share(1, 2))
    with lease(RunFolder(out), Share(1, 2)):
        with pytest.raises(ValueError, match=r"with other settings: max_shift"):
            run_part(settings(stored, out, max_shift=10), Share(2, 2))
        assert run_part(settings(stored, out, memory=3.0), Share(2, 2)).frames == 12


def test_gathering_waits_for_nobody(stored, tmp_path):
    out = tmp_path / "run"
    run_part(settings(stored, out), Share(1, 2))
    with lease(RunFolder(out), Share(2, 2)), pytest.raises(LeaseError, match="part 2/2"):
        gather(out)
    with pytest.raises(ValueError, match="holds no run|cannot be read"):
        gather(tmp_path / "nothing")


def test_parts_of_fewer_frames_than_there_are_now_are_not_gathered(stored, tmp_path):
    frames, mask = tmp_path / "frames.zarr", stored[1]
    shutil.copytree(stored[0] / "frames", frames)
    out = tmp_path / "run"
    run_part(settings((frames, mask), out), Share(1, 1))
    metadata = json.loads((frames / "zarr.json").read_text())
    metadata["shape"][0] += 4
    (frames / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="did 24 frames, and there are 28 now"):
        gather(out)


def test_gathering_waits_for_a_part_that_was_killed_on_another_machine(stored, undisturbed, tmp_path, monkeypatch):
    """Until it was silent for long enough to be dead."""
    out = tmp_path / "run"
    for number in (1, 2):
        run_part(settings(stored, out), Share(number, 2))
    killed = Holder.me(Share(2, 2)).model_copy(update={"host": "elsewhere"})
    RunFolder(out).lease(killed.share).write_text(killed.model_dump_json())
    monkeypatch.setattr("stillframe.workflow.lease.STALE", 2.0)
    assert gather(out).problems == []
    assert stores(out) == stores(undisturbed)


def test_whoever_waits_for_the_preparation_hears_a_stop(tmp_path):
    stop = threading.Event()
    stop.set()
    with (
        one_at_a_time(RunFolder(tmp_path), threading.Event()),
        pytest.raises(KeyboardInterrupt),
        one_at_a_time(RunFolder(tmp_path), stop),
    ):
        pass


def test_parts_do_not_follow(stored, tmp_path):
    told = subprocess.run(
        [*run_command(stored, tmp_path / "run"), "--shard", "1/2", "--follow"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2 and "do not go together" in told.stderr


def test_only_registering_leaves_no_aligned_frames(stored, undisturbed, tmp_path):
    out = tmp_path / "run"
    result = run(settings(stored, out, align=False))
    assert result.problems == [] and not result.aligned.exists()
    assert [stage.stage for stage in read_status(out).stages] == ["register"]
    assert verify(out).findings == []
    again = run(settings(stored, out))
    assert again.problems == []
    assert stores(out) == stores(undisturbed)


def test_aligned_frames_of_other_shifts_do_not_pass_for_these(stored, finished, capsys):
    out = finished
    assert run(settings(stored, out, align=False)).problems == []
    assert zarr.open_group(out / "aligned.zarr").attrs["complete"] is True
    run(settings(stored, out, align=False, subpixel=False))
    assert "6 units of aligned.zarr are out of date" in capsys.readouterr().err
    attributes = zarr.open_group(out / "aligned.zarr").attrs
    assert attributes["complete"] is False and len(attributes["missing"]) == 6
    assert not Ledger(RunFolder(out)).listing()["align"]
    assert verify(out).findings == []


def test_aligned_frames_of_the_same_shifts_stay_however_they_were_moved(stored, tmp_path):
    """Only registering again must not cost what took long to make."""
    out = tmp_path / "run"
    finish(stored, out, interpolation="cubic")
    before = stores(out)["aligned.zarr"]
    assert run(settings(stored, out, align=False)).problems == []
    finish(stored, out, interpolation="cubic")
    assert stores(out)["aligned.zarr"] == before


def test_a_new_folder_in_which_nothing_was_begun_is_removed(stored, tmp_path):
    with pytest.raises(ValueError, match="memory"):
        run(settings(stored, tmp_path / "run", memory=0.01))
    assert not (tmp_path / "run").exists()
