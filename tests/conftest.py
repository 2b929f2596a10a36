"""Shared by all tests."""

import os
import sys
from pathlib import Path

# Read when torch is loaded: a thread that waits shall sleep, not spin, or else a test with two threads takes a hundred
# times as long where another program keeps one of two cores busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's files; pytest itself adds only tests/


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one seed, and on one thread: on small models the others would only wait for each other."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
