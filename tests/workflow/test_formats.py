"""Outputs of other versions are refused with words, and left alone."""

import json
import shutil

import numpy as np
import pytest

from faulty import finish, settings
from stillframe.errors import OtherVersion
from stillframe.storage.reference_store import load_reference
from stillframe.workflow.driver import run
from stillframe.workflow.run_folder import STAGES
from stillframe.workflow.verify import verify
from synthetic import contents


@pytest.fixture
def finished(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("stage", STAGES)
def test_a_record_of_another_version_of_frames_that_do_not_exist_any_more_is_refused(stage, stored, finished):
    other = finished / "units" / stage / "000017.json"
    other.write_text(json.dumps({"version": 9}))
    for look in (lambda: finish(stored, finished), lambda: verify(finished)):
        with pytest.raises(OtherVersion, match=r"000017\.json has version 9.*another one wrote it"):
            look()
    assert other.exists()


@pytest.mark.parametrize("name", ["units/align/000003.json", "run.json", "manifest.json"])
@pytest.mark.parametrize("version", [2, 9])
def test_an_output_of_another_version_is_refused(name, version, stored, finished):
    (finished / name).write_text(json.dumps({"version": version, "novelty": [1, 2]}))
    before = contents(finished)
    with pytest.raises(OtherVersion, match=f"{name.replace('.', '[.]')} has version {version}.*another one wrote it"):
        run(settings(stored, finished))
    after = contents(finished)
    del before["run.log"], after["run.log"]
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert np.isfinite(load_reference(finished / "reference.zarr").image).all()


def test_an_output_of_a_version_that_was_never_released_is_refused(stored, tmp_path):
    (tmp_path / "settings.toml").write_text("version = 1\n")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(OtherVersion, match=r"never released.*nothing was changed"):
        run(settings(stored, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"settings.toml", "plan.json"}
