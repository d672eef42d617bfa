"""The benchmarks of speed and of a GPU still run, and their times are of what they say."""

# ruff: noqa: E402
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import gpu
import speed
from speed import SMALL, fd

# ---------------------------------------------------------------------------------------- speed.py


def started(run) -> tuple:
    """A state, and a generator of training steps that change it."""
    state = fd.TrainState(run.lora.initial_weights(), run.settings)
    return state, fd.train(run.settings, run.cache, fd.read_pool(run.cache), run.lora, state)


@pytest.mark.parametrize("every", ["0", "1", "2"])
def test_the_calls_that_are_timed_alone_are_those_of_a_training_step(every):
    """By their number and their FLOPs, which all but the weights determine."""
    with speed.random_run(SMALL, 64, 2, "--recompute-every", every) as run:
        _, steps = started(run)
        calls = []
        run.lora.net.register_forward_hook(lambda *_: calls.append(1))
        with FlopCounterMode(display=False) as step:
            next(steps)
        of_step = len(calls)
        calls.clear()
        with FlopCounterMode(display=False) as alone:
            speed.calls_of_a_step(run.lora, speed.input_of_network(run))
        assert len(calls) == of_step == 4
        assert alone.get_total_flops() == step.get_total_flops() == speed.flops_of_a_step(run)


def test_calls_that_are_timed_alone_leave_training_as_it_is():
    students = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        with speed.random_run(SMALL, 64, 2) as run:
            start = run.lora.initial_weights()
            state, steps = started(run)
            while state.iteration < 3:
                next(steps)
                if disturbed:
                    speed.calls_of_a_step(run.lora, speed.input_of_network(run))
        students.append(state.student.detach())
    assert torch.equal(*students)
    assert not torch.equal(students[0], start)


def test_what_a_step_does_besides_its_calls_counts_in_the_step_alone():
    pause = 0.5
    with speed.random_run(SMALL, 64, 1) as run:
        read = run.cache.read

        def slow(kind, places):
            time.sleep(pause)
            return read(kind, places)

        run.cache.read = slow
        (seconds,) = speed.timed_steps(run, 3)  # the first two warm up
    step, calls = seconds
    assert 0 < calls < pause < step


def test_a_size_that_does_not_fit_is_a_row_of_its_own(monkeypatch):
    def full(run, steps):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "timed_steps", full)
    row = speed.measure(SMALL, 64, 2, 3, None, "--recompute-every", "0")
    line = speed.line_of(row)
    assert line == "| 64 | 2 | --recompute-every 0 | out of memory |  |  |  |  |"
    assert line.count("|") == len(speed.HEADS) + 1


def test_a_row_without_a_gpu_has_neither_memory_nor_a_fraction():
    row = speed.measure(SMALL, 64, 2, 3, None)
    assert row.keys() == {"pixels", "batch", "flags", "step", "calls", "ratio", "tflops"}
    assert row["ratio"] == pytest.approx(row["step"] / row["calls"])
    cells = speed.line_of(row).split(" | ")
    assert len(cells) == len(speed.HEADS)


# ---------------------------------------------------------------------------------------- gpu.py


def test_the_tables_of_the_stored_results_are_made():
    """Also of parts that were stopped, and of kernels that failed."""
    results = json.loads((FOLDER / "results/gpu_h100.json").read_text())
    told = gpu.markdown(results)
    for line in (
        "device NVIDIA H100 80GB HBM3, torch 2.11.0, diffusers 0.42.1, transformers 5.17.0",
        "| efficient | 0.02 | 0.0066 | 0.006 | 0.0063 |",
        "| cuDNN | No available kernel. Aborting execution. |  |  |  |",
        "bfloat16 matrix product: 771 TFLOP/s",
        "512 px, 3 steps, the latents of one image: 0.25 s",
        "| full size | 0.0055 | 0.096 | 0.098 | 0.0042 |",
        "| 512 | 8 | --recompute-every 1 | 2.339 | 2.291 | 1.021 | 302 (39%) | 34.1 |",
        "| demonstration, phase | seconds | peak GiB |",
        "| train | 28 | 0.1 |",
        "| the whole process | 57 |  |",
        "3 steps: teacher 0.351, student 0.200",
    ):
        assert line in told.splitlines()


# ------------------------------------------------------------------------------------ whole scripts


def printed_by(name: str, flags: str, folder: Path) -> str:
    """What a script prints on a CPU."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, FOLDER / f"{name}.py", *shlex.split(flags)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_speed_prints_its_table(tmp_path):
    printed = printed_by("speed", "--config small --iterations 4 --threads 1", tmp_path)
    assert "256 px, 3 steps, the latents of one image: " in printed
    for every in ("1", "0"):
        assert f"| 256 | 2 | --recompute-every {every} | " in printed


@pytest.mark.slow
def test_gpu_tries_each_part_on_a_small_configuration(tmp_path):
    parts = ("gradients", "steps", "full", "demonstration")
    printed = printed_by("gpu", f"--parts {' '.join(parts)} --out gpu.json", tmp_path)
    results = json.loads((tmp_path / "gpu.json").read_text())
    found = {part: set().union(*results[part]) for part in parts}
    assert "CPU" in results["machine"]["device"]
    assert found["gradients"] == {"kernel", *gpu.CHECKS}
    assert found["steps"] >= {"sampling", "checks", "step", "calls", "ratio"}
    assert found["full"] >= {"made", "phases", "table", "self_check", "told"}
    assert found["demonstration"] >= {"phases", "table", "self_check", "told"}
    for names in found.values():
        assert not {"error", "stopped", "note"} & names
    for head in ("attention kernel, tiny Flux", "kernels in use", "pixels | batch", "full, phase",
                 "demonstration, phase"):  # fmt: skip
        assert f"| {head} |" in printed


@pytest.mark.slow
def test_nothing_of_a_part_outlives_its_time(tmp_path, monkeypatch):
    """Neither its processes nor its files: they would slow the next part, and fill the memory."""
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = gpu.run_part("full", False, 12)
    assert rows[-1] == {"stopped": "stopped after 12 s"}
    assert not list(tmp_path.iterdir())
    time.sleep(1)
    told = subprocess.run(["ps", "ax", "-o", "command"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in told
