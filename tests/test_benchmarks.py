"""The scripts behind the README's tables still run: all of them shortened, none of the numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
ONE = "--seeds 1 --jobs 1"
# The command, shortened, and what its tables must hold.
COMMANDS = {
    "baselines.py --on moons --length 0.01 " + ONE: "progressive",
    "iterations.py --parts flows --flows moons --length 0.013 --settings 2 "
    + ONE: "twice the paper's least",
    "iterations.py --parts flux --flux-seeds 1 --length 0.002 --settings 1 --jobs 1": "tiny Flux",
    "fusion.py --parts flows --length 0.005 " + ONE: "plain flow matching",
    "lookahead.py --parts table scales --length 0.01 " + ONE: "on a table",
    "quality.py --length 0.02 " + ONE: "UniPC",
    "fewshot.py --pairs 1 --length 0.02 " + ONE: "strangers",
    "speed.py --config small --iterations 4 --threads 1": "latents of one picture",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_its_table(command, tmp_path):
    name, *flags = command.split()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    call = [sys.executable, FOLDER / name, *flags]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert COMMANDS[command] in done.stdout and "| " in done.stdout
