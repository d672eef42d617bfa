"""Tests import the files of the repository's root, whichever way pytest is started."""

import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

torch.set_num_threads(1)  # tests are small: threads would wait for each other on a busy machine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
