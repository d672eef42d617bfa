"""What a run of flux_distill.py survives: several processes, lost ones, SIGKILL at any moment."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils import backend_registration as backends

os.environ["HF_HUB_OFFLINE"] = "1"
from tiny_runs import SMALL, TINY, content, fd, picture, prepared, run, same_run, says, train

import shortcut as sc

PATIENCE = 300  # seconds for a whole run on a busy machine

ROOT = os.path.dirname(fd.__file__)
QUICK = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import flux_distill as fd
fd.FINE, fd.STEPS = 8, (3,)
"""
# A process that leaves its three weight sets behind, as they are after the last iteration.
SPY = """
from safetensors.torch import save_file
kept, calls, update = {{}}, [], fd.sc.update_ema
def keep(ema, weights, decay, iteration):
    update(ema, weights, decay, iteration)
    calls.append(decay)
    kept[("fast", "slow")[len(calls) % 2]], kept["student"] = ema[0], weights[0]
    {then}
fd.sc.update_ema = keep
fd.main(sys.argv[1:])
tensors = {{name: weights.detach().clone() for name, weights in kept.items()}}
save_file(tensors, {folder!r} + "/rank" + os.environ["RANK"] + ".safetensors")
"""


def torchrun(tmp_path, *more, then="pass"):
    """Two processes on tmp_path/out; what became of them."""
    program = QUICK.format(root=ROOT) + SPY.format(folder=str(tmp_path), then=then)
    (script := tmp_path / "spy.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    command += [*SMALL.split(), "--out", tmp_path / "out", "--paper", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_two_processes_agree_and_follow_one_that_accumulates(tmp_path):
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{i}.safetensors") for i in range(2)]
    assert set(ranks[0]) == {"student", "fast", "slow"}
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


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    then = "len(calls) == 3 and os.environ['RANK'] == '1' and os._exit(9)"
    done = torchrun(tmp_path, "--checkpoint-every", 1, then=then)
    assert done.returncode != 0
    assert "lost another one" in done.stderr and "goes on from the last checkpoint" in done.stderr


def victim(out: str, moment: int, record: str) -> None:
    """A run that is killed at an event: amid or around a write, a training pass, a rendering."""
    fd.FINE, fd.STEPS = 8, (3,)
    torch.set_num_threads(1)
    events, phase = [], []
    save, replace, loss, sample = fd.save_file, Path.replace, sc.shortcut_loss, fd.sample

    def event(name, before_death=lambda: None):
        events.append(f"{phase[-1]}: {name}")
        if len(events) == moment:
            before_death()
            Path(record).write_text(events[-1])
            os.kill(os.getpid(), signal.SIGKILL)

    def saving(tensors, path, text):
        save(tensors, path, text)
        event("half a file", lambda: os.truncate(path, Path(path).stat().st_size // 2))

    def replacing(self, other):
        event("before a file takes its place")
        replace(self, other)
        event("after a file took its place")

    def around(name, function):
        return lambda *a, **k: event(name) or function(*a, **k)

    def phased(name, function):
        return lambda args: phase.append(name) or function(args)

    fd.save_file, Path.replace = saving, replacing
    fd.sc.shortcut_loss, fd.sample = around("a pass", loss), around("sampling", sample)
    for name, function in PHASES.items():
        setattr(fd, function.__name__, phased(name, function))
    run(out, *KILLED)
    Path(record).write_text(f"through {len(events)}")


KILLED = ["--iterations", 6, "--checkpoint-every", 1, "--validate-every", 3]
PHASES = dict(cache=fd.make_cache, train=fd.train, calibrate=fd.calibrate, compare=fd.compare)


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_as_if_undisturbed(tmp_path, monkeypatch):
    """SIGKILL in every phase, often amid a write: no file is broken, the weights are the same."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    server = multiprocessing.get_context("forkserver")  # it imports once
    server.set_forkserver_preload(["test_survival"])
    record, out, chance, ends = tmp_path / "record", tmp_path / "out", random.Random(0), []

    def start(folder, moment):
        process = server.Process(target=victim, args=(str(folder), moment, str(record)))
        process.start()
        process.join(PATIENCE)
        return process.exitcode, record.read_text()

    code, through = start(tmp_path / "calm", 0)
    assert code == 0
    while len(ends) < 20:
        code, where = start(out, chance.randint(1, int(through.split()[1]) // 3))
        if code == 0:  # through before its moment came: begin anew
            assert same_run(out, tmp_path / "calm")
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL
        ends.append(where)
        for path in out.rglob("[!.]*.*"):
            if path.suffix == ".safetensors":
                assert load_file(path)
            elif path.suffix == ".json":
                assert json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).load()
    assert {where.split(":")[0] for where in ends} == set(PHASES), ends
    assert sum("half a file" in where for where in ends) >= 3, ends
    assert start(out, 0)[0] == 0
    assert same_run(out, tmp_path / "calm")
    assert content(out).keys() == content(tmp_path / "calm").keys()


@pytest.mark.slow
def test_an_int8_base_closes_nine_tenths_of_the_gap(tmp_path):
    """How much nearer than the teacher the student ends: with an int8 base against without."""
    pytest.importorskip("torchao")
    flags = ["--iterations", 100, "--batch", 32, "--rank", 16, "--shift", 1, "--shift-range", 1, 1]
    flags += ["--held-out", 12, "--limit", 0, "--recompute-every", 0, "--noises", 8]
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


# -------------------------------------------------------------------------- numbers and input


def test_not_a_number_in_a_gradient_stops_before_the_step(tmp_path, monkeypatch):
    out, real, count = tmp_path / "out", fd.Adapter.move_gradients, []

    def bad(self, student, share):
        real(self, student, share)
        count.append(1)
        if len(count) == 3:
            student.grad[0] = float("inf")

    monkeypatch.setattr(fd.Adapter, "move_gradients", bad)
    says("iteration 3: loss .*gradient norm (inf|nan).*last checkpoint is kept", "--out", out)
    assert len(fd.read_metadata(out / "checkpoint/state.safetensors")["rows"]) == 2
    tensors = load_file(out / "checkpoint/state.safetensors")
    assert all(x.isfinite().all() for x in tensors.values())


@pytest.mark.parametrize("kind", [pytest.param("latent", marks=pytest.mark.slow), "text"])
def test_not_a_number_in_the_cache_is_named(tmp_path, kind):
    out = tmp_path / "out"
    path = fd.entry(prepared(out), kind, 4)
    tensors, metadata = load_file(path), fd.read_metadata(path)
    tensors[kind].view(-1)[7] = float("nan")
    fd.write_tensors(path, tensors, metadata)
    says(f"{path.name} holds NaN or infinity", "--out", out)
    assert not (out / fd.LORA).exists()
    state = out / "checkpoint/state.safetensors"
    assert not state.exists() or all(x.isfinite().all() for x in load_file(state).values())
    path.unlink()
    run(out)


TEXTS = ("a red circle, " * 150, "красный круг", "红色的圆圈 🔴", "دائرة حمراء", r"$\frac{a ${ %s",
         "{x} </s><pad> | <script>alert(1)</script> ![x](y)")  # fmt: skip


@pytest.mark.slow
def test_captions_of_any_length_and_script(tmp_path, capsys, recwarn):
    """Trained on, held out and rendered; neither pictures nor card stumble over them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*TEXTS, *reversed(TEXTS), "a", *TEXTS]), "utf-8")
    out = tmp_path / "out"
    run(out, "--prompts", prompts, "--held-out", 6, "--limit", 0, "--iterations", 1)
    fd.main(["--model", str(TINY), "--out", str(out), "--sample", "../../" + TEXTS[4], TEXTS[0]])
    assert {path.parent for path in (out / "samples").iterdir()} == {out / "samples"}
    assert (out / "README.md").read_text("utf-8") and len(TEXTS[0]) > 2000
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@pytest.mark.parametrize("count, batch, accumulate", [(1, 1, 1), (1, 4, 2), (2, 3, 1)])
def test_few_images_and_small_batches(tmp_path, count, batch, accumulate):
    (folder := tmp_path / "images").mkdir()
    for i, mode in zip(range(count), ("RGBA", "I;16")):
        picture(mode).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a blue dot")
    flags = ["--batch", batch, "--accumulate", accumulate, "--iterations", 1, "--held-out", 2]
    tensors, metadata = train(tmp_path / "out", "--images", folder, *flags)
    assert metadata["done"] and len(metadata["rows"]) == 1
    assert all(x.isfinite().all() for x in tensors.values())


@pytest.mark.slow
def test_a_token_is_written_nowhere_and_nothing_outside_out(tmp_path):
    """In a process of its own; our own file and its calls use nothing deprecated."""
    token, model = "hf_" + "Secret" * 6, shutil.copytree(TINY, tmp_path / "model")
    before, env = content(model), os.environ | {"HF_TOKEN": token}
    (work := tmp_path / "work").mkdir()
    (script := tmp_path / "quick.py").write_text(QUICK.format(root=ROOT) + "fd.main(sys.argv[1:])")
    kinds = product(("DeprecationWarning", "FutureWarning"), ("flux_distill", "shortcut"))
    errors = [word for kind, module in kinds for word in ("-W", f"error::{kind}:{module}")]
    flags = [*SMALL.replace(str(TINY), str(model)).split(), "--iterations", "1", "--out", "out"]
    command = [sys.executable, *errors, script, *flags]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in work.iterdir()] == ["out"]
    assert content(model) == before
    files = content(work / "out")
    assert len(files) > 15
    assert not any(token.encode() in data for data in files.values())
    assert token not in done.stdout + done.stderr


MIXED = """
import sys
sys.path.insert(0, {tests!r})
import fake_gpu as gpu
from fake_gpu import torch
with gpu.Names(), gpu.Dispatch():
    there, here, generator = torch.ones(2, 2, device="cuda"), torch.ones(2, 2), torch.Generator()
    assert (2 * there + torch.tensor(1.0)).sum().item() == 12 and there.device == gpu.DEVICE
    for number, mixed in enumerate((
        lambda: there + here, lambda: torch.stack([there, here]), lambda: there.numpy(),
        lambda: here[there.long()], lambda: torch.rand(2, device="cuda", generator=generator),
    )):
        try:
            mixed()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"nothing was said of mixture {{number}}")
gpu.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="needs a newer PyTorch"
)
def test_the_branch_of_a_gpu_on_a_fake_one(tmp_path):
    """No tensor of the CPU meets one of the GPU, from the cache to the self-check, in bfloat16."""
    (script := tmp_path / "gpu.py").write_text(MIXED.format(tests=os.path.dirname(__file__)))
    more = ["--iterations", 2, "--held-out", 2, "--batch", 2, "--limit", 4, "--paper"]
    command = [sys.executable, script, *SMALL.split(), "--out", tmp_path / "out", *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {x.dtype for x in load_file(tmp_path / "out" / fd.LORA).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/results.json").read_text())["self_check"] < 3e-2
