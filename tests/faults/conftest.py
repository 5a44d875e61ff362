"""Faults, tried for real. ``STILLFRAME_FAULTS=long`` tries more of each, as told in CONTRIBUTING.md."""

from collections import Counter

import pytest

from faulty import LONG


def pytest_collection_modifyitems(items):
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.fault)
            item.add_marker(pytest.mark.timeout(7200 if LONG else 900))


@pytest.fixture(scope="session")
def many():
    """Choose how often something is tried: in the gate, and at length."""
    return lambda short, long: long if LONG else short


@pytest.fixture
def tried(record_property):
    """Count what was survived, by the name of the fault; told at the end, whichever process tried it."""
    survived = Counter()

    def count(name, number=1):
        survived[name] += number

    yield count
    record_property("survived", dict(survived))
