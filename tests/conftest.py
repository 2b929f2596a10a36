"""Shared by all tests: `pytest` runs what teaches, `pytest --full` everything."""

import os
import sys
from pathlib import Path

# Read when torch is loaded: a thread that waits shall sleep, not spin. Otherwise a test with two
# threads takes a hundred times as long where another program keeps one of two cores busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# The repository's files; pytest itself adds only tests/.
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run slow and exhaustive tests")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="slow or exhaustive: pytest --full")
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one seed, on one thread: small models would wait for the others."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
