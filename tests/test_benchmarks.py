"""The scripts behind the README's tables still run: all of them shortened, none of the numbers."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
ONE = "--seeds 1 --jobs 1"
# A command, shortened, and what its tables must hold.
COMMANDS = {
    "toy": (f"--flows moons --length 0.005 {ONE}", "5. few-shot, each draw"),
    "ablations": (f"--flows moons --length 0.005 {ONE}", "oracle, shift 3"),
    "flux": (f"--runs 'stopped when matched' --length 0.01 {ONE}", "lam*: all pairs"),
    "baselines": (f"--on moons flux --length 0.01 {ONE}", "told its step, distilled"),
    "iterations": (
        "--parts flows flux --flows moons --length 0.002 --settings 1 --flux-seeds 1 " + ONE,
        "tiny Flux",
    ),
    "fusion": (
        f"--length 0.002 --flux-recipes 'matched, 3 steps' --flux-seeds 1 {ONE}",
        "plain flow matching",
    ),
    "lookahead": (
        f"--parts table scales flux --flux-rhos 0.52 --length 0.01 {ONE}",
        "targets on the path",
    ),
    "quality": (f"--length 0.01 --figure steps.png {ONE}", "UniPC"),
    "fewshot": (f"--pairs 1 --length 0.02 {ONE}", "strangers"),
}


def run(name: str, flags: str, folder: Path) -> str:
    """What a script prints; on a CPU, and as a notebook's terminal would start it."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    call = [sys.executable, FOLDER / f"{name}.py", *shlex.split(flags)]
    done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_table(name, tmp_path):
    flags, words = COMMANDS[name]
    printed = run(name, flags, tmp_path)
    assert words in printed and "| " in printed
