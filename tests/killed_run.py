"""A run of flux_distill.py that kills itself at a given moment.

It is the program as it is: events are told by Python's audit hooks and by PyTorch's hook on all
modules, the phase by the functions on the stack.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from faults import before_network_calls
from tiny_runs import fd, run

PHASES = {
    "fill_cache": "cache",
    "train_student": "train",
    "calibrate": "calibrate",
    "compare": "compare",
}
HALF = "half a file"
BEFORE = "before a file takes its place"
AFTER = "after a file took its place"
CALL = "a network call"
KINDS = (HALF, BEFORE, AFTER, CALL)
FLAGS = ["--iterations", 6, "--checkpoint-every", 1, "--validate-every", 3]


def functions_on_the_stack() -> set[str]:
    names = set()
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename == fd.__file__:
            names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


class Moments:
    """Counts the events of each kind in each phase, and kills the process at one of them."""

    def __init__(self, fatal: str, number: int):
        self.fatal = fatal  # "phase: kind"
        self.number = number  # of the event, from 1 on; 0: none is fatal
        self.phase = "set-up"  # until the next begins: what follows the comparison is part of it
        self.counts = Counter()

    def count(self, kind: str, half: Path | None = None) -> None:
        for function in functions_on_the_stack() & PHASES.keys():
            self.phase = PHASES[function]
        event = f"{self.phase}: {kind}"
        self.counts[event] += 1
        if event == self.fatal and self.counts[event] == self.number:
            if half:
                os.truncate(half, half.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple) -> None:
        """An audit hook. A file is written under a temporary name, synchronised, then renamed."""
        if event not in ("open", "os.rename", "os.remove"):
            return
        if not isinstance(args[0], str | os.PathLike):
            return
        path = Path(args[0])
        if not path.name.startswith(".part-"):
            return
        if event == "os.rename":
            self.count(BEFORE)
        if event == "os.remove":
            self.count(AFTER)
        if event == "open" and args[2] & os.O_RDWR and not args[2] & os.O_CREAT:
            self.count(HALF, half=path)


def victim(out: str, fatal: str, number: int, record: str) -> None:
    """A whole run in `out`; one that survives writes to `record` how many events there were."""
    torch.set_num_threads(1)
    moments = Moments(fatal, number)
    sys.addaudithook(moments.audit)
    with before_network_calls(lambda: moments.count(CALL)):
        run(Path(out), *FLAGS)
    Path(record).write_text(json.dumps(moments.counts))
