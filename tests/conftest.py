"""Shared by all tests."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's files; pytest itself adds only tests/


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one seed, and on one thread: on small models the others would only wait for each other."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
