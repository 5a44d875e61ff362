"""Outputs of other versions: an older one is read and goes on, a newer one is refused and left alone."""

import hashlib
import json

import numpy as np
import pytest

from faulty import finish, records, settings, stores
from stillframe.batch import run
from stillframe.durable import without_checksum
from stillframe.frames import open_source
from stillframe.match import KERNEL_VERSION
from stillframe.progress import read_status
from stillframe.records import STAGES, Ledger
from stillframe.store import load_reference
from stillframe.verify import verify
from synthetic import contents


def as_first_format(out, frames):
    """Rewrite a run's folder as the first version of every format had it."""
    source, ledger = open_source(frames), Ledger(out)
    reference = load_reference(out / "reference.zarr").digest
    for stage in ("register", "align"):
        for record in ledger.records(stage):
            facts = {
                "kernel": KERNEL_VERSION,
                "reference": reference,
                "array": source.description(),
                "missing_chunks": "report",
                "files": source.identity(record.start, record.stop),
                "frames": (record.start, record.stop),
            }
            if stage == "align":
                facts |= {"interpolation": "nearest", "fill": "0.0", "layout": (24, 4), "shifts": record.shifts}
            mark = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
            old = record.model_copy(update={"format": 1, "fingerprint": mark})
            ledger.path(stage, record.unit).write_text(old.model_dump_json(exclude={"facts", "inputs"}))
    (out / "plan.json").write_text(json.dumps({"version": 1, "frames": 24, "unit_frames": 4}))
    origin, _ = without_checksum((out / "reference.json").read_bytes())
    (out / "reference.json").write_text(json.dumps(json.loads(origin) | {"version": 1}))
    (out / "seals.json").unlink()


def test_an_output_of_the_first_format_goes_on(stored, tmp_path, capsys):
    out = tmp_path / "run"
    finish(stored, out)
    before = stores(out)
    as_first_format(out, stored[0])
    kept = records(out)
    assert [stage.done for stage in read_status(out)] == [24, 24]
    words = [finding.what for finding in verify(out).findings]
    assert words == ["the last run did not finish: give the same 'stillframe run' command to go on"]
    finish(stored, out)
    assert records(out) == kept
    assert stores(out) == before
    assert "done again" not in capsys.readouterr().err
    assert verify(out).findings == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_newer_record_of_frames_that_there_are_no_more_is_refused(stage, stored, tmp_path):
    out = tmp_path / "run"
    finish(stored, out)
    newer = out / "units" / stage / "000017.json"
    newer.write_text(json.dumps({"format": 9}))
    for look in (lambda: finish(stored, out), lambda: verify(out)):
        with pytest.raises(ValueError, match=r"000017\.json has format 9.* a newer one wrote it"):
            look()
    assert newer.exists()


@pytest.mark.parametrize(
    ("name", "member"),
    [("units/align/000003.json", "format"), ("plan.json", "version"), ("reference.json", "version")],
)
def test_an_output_of_a_newer_format_is_refused(name, member, stored, tmp_path):
    out = tmp_path / "run"
    finish(stored, out)
    (out / name).write_text(json.dumps({member: 9, "novelty": [1, 2]}))
    before = contents(out)
    with pytest.raises(ValueError, match=f"{name.replace('.', '[.]')} has {member} 9.* a newer one wrote it"):
        run(settings(stored, out))
    after = contents(out)
    del before["run.log"], after["run.log"]
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert np.isfinite(load_reference(out / "reference.zarr").image).all()
