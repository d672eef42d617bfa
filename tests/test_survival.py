"""What a run of flux_distill.py survives: several processes, lost ones, SIGKILL at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"
from test_flux import SMALL, content, fd, run, same_run

PATIENCE = 300  # seconds for a whole run on a busy machine

# A process that leaves its three weight sets behind, as they are after the last iteration.
SPY = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import flux_distill as fd
from safetensors.torch import save_file
fd.FINE, fd.STEPS, fd.WATCHED = 8, (3,), (3,)
kept, calls, update = {{}}, [], fd.sc.update_ema
def keep(ema, weights, decay):
    update(ema, weights, decay)
    calls.append(decay)
    kept[("fast", "slow")[len(calls) % 2]], kept["student"] = ema, weights
    {then}
fd.sc.update_ema = keep
fd.main(sys.argv[1:])
tensors = {{f"{{k}}.{{i}}": w.detach().clone() for k, ws in kept.items() for i, w in enumerate(ws)}}
save_file(tensors, {folder!r} + "/rank" + os.environ["RANK"] + ".safetensors")
"""


def torchrun(tmp_path, *more, then="pass"):
    """Two processes on tmp_path/out; what became of them."""
    root = os.path.dirname(fd.__file__)
    (script := tmp_path / "spy.py").write_text(
        SPY.format(root=root, folder=str(tmp_path), then=then)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    command += [*SMALL.split(), "--out", tmp_path / "out", "--paper", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)


def test_two_processes_agree_and_follow_one_that_accumulates(tmp_path):
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{i}.safetensors") for i in range(2)]
    assert {name.split(".")[0] for name in ranks[0]} == {"student", "fast", "slow"}
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(x, ranks[1][name]) for name, x in ranks[0].items())
    run(tmp_path / "one", "--accumulate", 2, "--paper")
    ours, theirs = (
        fd.read_metadata(tmp_path / name / "checkpoint/state.safetensors")["rows"]
        for name in ("out", "one")
    )
    for row, other in zip(ours, theirs, strict=True):
        for name in ("loss", "teacher_loss", "self_loss", "residual", "gradient_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    two, one = (
        load_file(tmp_path / name / "checkpoint/state.safetensors") for name in ("out", "one")
    )
    moved = [(two[n] - one[n]).norm() for n in one if n.startswith("slow")]
    assert max(moved) < 1e-3 * max(one[n].norm() for n in one if n.startswith("slow"))
    # One process may go on where two stopped, and the other way round: the settings are the same.
    assert fd.read_metadata(tmp_path / "out" / fd.LORA)["settings"] == fd.read_metadata(
        tmp_path / "one" / fd.LORA
    )["settings"]  # fmt: skip
    assert not list((tmp_path / "out").rglob(".part*"))


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    then = "len(calls) == 3 and os.environ['RANK'] == '1' and os._exit(9)"
    done = torchrun(tmp_path, "--checkpoint-every", 1, then=then)
    assert done.returncode != 0
    assert "lost another one" in done.stderr and "goes on from the last checkpoint" in done.stderr


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_as_if_undisturbed(tmp_path):
    """SIGKILL at random moments of a run: files stay whole, the final weights are the same."""
    (script := tmp_path / "quick.py").write_text(
        SPY.split("kept, calls")[0].format(root=os.path.dirname(fd.__file__))
        + "fd.main(sys.argv[1:])\n"
    )
    flags = [*SMALL.split(), "--iterations", "12", "--checkpoint-every", "1"]

    def start(out):
        command = [sys.executable, str(script), *flags, "--out", str(out)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return subprocess.Popen(command, start_new_session=True, **quiet)

    began = time.time()
    assert start(tmp_path / "calm").wait(PATIENCE) == 0
    length, chance, kills = time.time() - began, random.Random(0), 0
    while kills < 20:
        process, moment = start(tmp_path / "out"), chance.uniform(0.4, 1.0) * length
        try:
            assert process.wait(moment) == 0  # through before it was killed: begin anew
            assert same_run(tmp_path / "out", tmp_path / "calm")
            subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        for path in (tmp_path / "out").rglob("[!.]*.safetensors"):
            assert load_file(path) is not None
    assert start(tmp_path / "out").wait(PATIENCE) == 0
    assert same_run(tmp_path / "out", tmp_path / "calm")
    assert content(tmp_path / "out").keys() == content(tmp_path / "calm").keys()


@pytest.mark.slow
def test_an_int8_base_closes_nine_tenths_of_the_gap(tmp_path):
    """How much nearer than the teacher the student ends: with an int8 base against without."""
    pytest.importorskip("torchao")
    flags = ["--iterations", 100, "--batch", 32, "--rank", 16, "--shift", 1, "--shift-range", 1, 1]
    flags += ["--held-out", 12, "--limit", 0, "--no-checkpointing", "--noises", 8]
    flags += ["--validate-every", 100, "--checkpoint-every", 100]
    for name, more in (("float32", []), ("int8", ["--quantize", "int8"])):
        run(tmp_path / name, *flags, *more)
    results = {}
    for name in ("float32", "int8"):
        results[name] = json.loads((tmp_path / name / "results.json").read_text())["table"]
    ends = {
        name: {(row["sampler"], row["steps"]): row["rmse"] for row in table}
        for name, table in results.items()
    }
    gaps = {name: end["teacher", 3] - end["student", 3] for name, end in ends.items()}
    assert gaps["int8"] > 0.9 * gaps["float32"] > 0.9 * 0.3 * ends["float32"]["teacher", 3]
