"""What tests of files and signals share: other users, full disks, moments during a run."""

import errno
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from torch.nn.modules.module import register_module_forward_pre_hook

NOBODY = 65534  # the user id of the unprivileged user


@contextmanager
def unprivileged():
    """Permissions hold for everybody but root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def give_away(folder: Path) -> None:
    """Make the unprivileged user the owner of all that is in a folder."""
    if os.geteuid():
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def fill(disk: Path) -> Path:
    """A file that leaves no block free."""
    path = disk / "filler"
    with open(path, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


@contextmanager
def largest_file(size: int):
    """Files can't grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def temporary(folder: Path) -> list[Path]:
    """Half-written files: ours, and those of safetensors."""
    return [*folder.rglob(".part*"), *folder.rglob(".tmp*")]


@contextmanager
def before_network_calls(action: Callable[[], None]):
    """Call `action` before each call of a Flux transformer."""

    def before(module, inputs):
        if type(module).__name__ in ("FluxTransformer2DModel", "Flux2Transformer2DModel"):
            action()

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
