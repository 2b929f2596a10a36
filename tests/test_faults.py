"""Kills, full disks and damage: the short form of `python -m tests.faults`."""

import pytest
from faults import CASES, run_cases


@pytest.mark.full
def test_faults():
    """One case of each kind, or nearly: all work survives."""
    _, faults = run_cases(range(0, len(CASES), 2))
    assert not faults
