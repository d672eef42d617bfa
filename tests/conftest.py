"""Tests import the files of the repository's root, whichever way pytest is started."""

import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a busy machine is no failure
settings.load_profile("busy")
torch.set_num_threads(1)  # tests are small: threads would wait for each other on a busy machine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items if not config.getoption("--slow") else ():
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="runs with --slow"))


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """The folder of a finished run. Tests do not write to it."""
    from tiny_runs import run

    out = tmp_path_factory.mktemp("done") / "out"
    run(out)
    return out


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Settings of a short run, its cache made."""
    from tiny_runs import prepared

    return prepared(tmp_path_factory.mktemp("args") / "out")
