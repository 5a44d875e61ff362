"""Faults, tried for real. ``STILLFRAME_FAULTS=long`` tries more of each, as told in CONTRIBUTING.md."""

from collections import defaultdict

import pytest

from faulty import LONG

_TRIED = defaultdict(int)


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
def tried():
    """Count what was survived, by the name of the fault; told at the end."""

    def count(name, number=1):
        _TRIED[name] += number

    return count


def pytest_terminal_summary(terminalreporter):
    if _TRIED:
        terminalreporter.section("faults tried and survived")
        for name, number in sorted(_TRIED.items()):
            terminalreporter.write_line(f"{number:6d}  {name}")
