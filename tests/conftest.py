"""Tests import the files of the repository's root, whichever way pytest is started.

Without --gpu they see no GPU, so that they give the same result everywhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a busy machine is no failure
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")
    parser.addoption("--gpu", action="store_true", help="only the tests that need a GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("markers", "gpu: needs a GPU; runs with --gpu, which runs nothing else")
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any test imports torch
    # Tests send themselves signals, which nohup and a shell's & let their commands ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)  # tests are small: threads would wait for each other on a busy machine


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        if config.getoption("--gpu") != ("gpu" in item.keywords):
            item.add_marker(
                pytest.mark.skip(reason="--gpu runs those that need a GPU, and no other")
            )
        elif "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU that PyTorch can use"))
        elif "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="runs with --slow"))


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """The folder of a finished run. Tests do not write to it."""
    from tiny_runs import run

    out = tmp_path_factory.mktemp("done") / "out"
    run(out)
    return out


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A short run that is prepared, its cache filled."""
    from tiny_runs import prepared

    return prepared(tmp_path_factory.mktemp("setup") / "out")


@pytest.fixture
def public():
    """A folder of the unprivileged user; pytest's own are for root alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root on Linux")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # tensors can still be mapped
