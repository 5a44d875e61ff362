"""Every answer of ``unit_state``, the one place that says whether a unit is done."""

import numpy as np
import pytest

from stillframe.partition import Unit
from stillframe.registration.matches import MATCH_DTYPE, no_match
from stillframe.storage.checksums import Checksum
from stillframe.workflow.ledger import UnitRecord, UnitRecords, fields_of
from stillframe.workflow.staleness import (
    INPUT_FILES,
    Alignment,
    Dependencies,
    State,
    changes,
    explain,
    shifts_of,
    to_redo,
    unit_state,
)

UNIT = Unit(3, 12, 14)
NOW = Dependencies({"mask": "a", "frames": "12–13"}, [("c/0", 10, 5)])
ALIGNMENT = Alignment("nearest", 0.0, 2)
MATCHES = np.array([(1.0, 2.0, 0.1, 0.1, 0, 0.9, 0.1, 1, 5, 0), no_match(1)], MATCH_DTYPE)
AFTER = NOW.with_alignment(ALIGNMENT, shifts_of(MATCHES))


def registered(**fields):
    given = {"stage": "register", "fingerprint": NOW.fingerprint, "facts": NOW.facts, "matches": fields_of(MATCHES)}
    return UnitRecord(**({"unit": 3, "start": 12, "stop": 14} | given | fields))


def aligned(**fields):
    files = {"aligned.zarr/frames/c/3/0/0": Checksum(size=9, sha256="")}
    given = {"stage": "align", "fingerprint": AFTER.fingerprint, "facts": AFTER.facts, "files": files}
    return UnitRecord(**({"unit": 3, "start": 12, "stop": 14} | given | fields))


def judged(register=None, align=None, damaged=(), *, there=True, now=NOW, alignment=ALIGNMENT):
    records = UnitRecords(register, align, damaged)
    return unit_state(UNIT, records, lambda _: there, now, alignment)


def states(*arguments, **options):
    return tuple(one.state for one in judged(*arguments, **options))


FAILED = {"fingerprint": "", "facts": {}, "matches": None, "problems": ["no"]}


@pytest.mark.parametrize(
    ("records", "options", "expected"),
    [
        ((), {}, (State.MISSING, State.MISSING)),
        ((registered(),), {}, (State.DONE, State.MISSING)),
        ((registered(), aligned()), {}, (State.DONE, State.DONE)),
        ((registered(), aligned()), {"now": None}, (State.DONE, State.DONE)),
        ((registered(), aligned()), {"there": False}, (State.DONE, State.ALTERED)),
        ((registered(), aligned()), {"there": False, "now": None}, (State.DONE, State.ALTERED)),
        ((None, aligned()), {}, (State.MISSING, State.WAITING)),
        ((None, None, ("register", "align")), {}, (State.ALTERED, State.ALTERED)),
        ((registered(), None, ("align",)), {}, (State.DONE, State.ALTERED)),
        ((None, aligned(), ("register",)), {}, (State.ALTERED, State.WAITING)),
        ((registered(problems=["lost"]),), {}, (State.PARTIAL, State.MISSING)),
        ((registered(problems=["lost"]), aligned(problems=["lost"])), {}, (State.PARTIAL, State.PARTIAL)),
        ((registered(problems=["lost"]), aligned(problems=["lost"])), {"there": False}, (State.PARTIAL, State.ALTERED)),
        ((registered(), aligned(problems=["lost"])), {}, (State.DONE, State.FAILED)),
        ((registered(**FAILED),), {}, (State.FAILED, State.MISSING)),
        ((registered(**FAILED),), {"now": None}, (State.FAILED, State.MISSING)),
        ((registered(), aligned(**FAILED | {"files": {}})), {}, (State.DONE, State.FAILED)),
        ((registered(fingerprint="other"), aligned()), {}, (State.OUTDATED, State.WAITING)),
        ((registered(), aligned(fingerprint="other")), {}, (State.DONE, State.OUTDATED)),
        ((registered(start=11, matches=None),), {"now": None}, (State.OUTDATED, State.MISSING)),
        ((registered(), aligned(facts=AFTER.facts | {"shifts": "x"})), {"now": None}, (State.DONE, State.OUTDATED)),
        ((registered(), aligned(fingerprint="other")), {"alignment": None}, (State.DONE, State.DONE)),
    ],
)
def test_the_state_of_a_unit(records, options, expected):
    assert states(*records, **options) == expected


def test_only_valid_results_count_as_results():
    assert {state for state in State if judged_as(state).has_result} == {State.DONE, State.PARTIAL}
    kept = {State.DONE, State.MISSING, State.WAITING}
    assert {state for state in State if not judged_as(state).has_record} == kept


def judged_as(state):
    return judged().register._replace(state=state)


def test_what_is_redone_is_explained_by_its_reasons():
    other = Dependencies({"mask": "b", "frames": "12–13"})
    redone = list(to_redo(UNIT, judged(registered(), aligned(), now=other)))
    assert [(one.stage, one.unit) for one in redone] == [("register", 3)]
    assert list(explain(redone)) == [("register: 1 unit is done again (frames 12–13): mask (a → b)", True)]
    failed = list(to_redo(UNIT, judged(registered(**FAILED))))
    words, changed = next(explain(failed))
    assert not changed
    assert words.endswith("something could not be done then, and is tried again")
    assert list(to_redo(UNIT, judged(registered(), aligned()))) == []


def test_changes_are_named():
    before = registered(
        facts={"mask": "a" * 64, "fill": "0", INPUT_FILES: "x" * 64},
        inputs=[("c/0", 1, 1), ("c/1", 2, 2), ("c/2", 3, 3)],
    )
    now = Dependencies(
        {"mask": "b" * 64, "fill": "nan", INPUT_FILES: "y" * 64, "new": "1"},
        [("c/0", 1, 1), ("c/1", 9, 2), ("c/3", 3, 3)],
    )
    assert changes(before, now) == ["mask", "fill (0 → nan)", "input files (c/1, c/2, c/3)", "new (none → 1)"]
    assert changes(registered(), NOW) == []


def test_aligned_frames_depend_on_shifts_and_settings():
    moved = MATCHES.copy()
    moved["dx"][0] += 1e-12
    others = [
        NOW.with_alignment(ALIGNMENT, shifts_of(moved)),
        NOW.with_alignment(Alignment("cubic", 0.0, 2), shifts_of(MATCHES)),
        NOW.with_alignment(Alignment("nearest", 1.0, 2), shifts_of(MATCHES)),
        NOW.with_alignment(Alignment("nearest", 0.0, 4), shifts_of(MATCHES)),
    ]
    assert len({one.fingerprint for one in (AFTER, *others)}) == 5
