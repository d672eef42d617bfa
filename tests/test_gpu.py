"""What only a GPU can show: python -m pytest --gpu. Skipped, with a reason, where there is none."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import SMALL, TINY, fd, new_lora, prepared, run, same_run

pytestmark = pytest.mark.gpu
SCRIPT = Path(fd.__file__)
# The README's demonstration, and where its student ended in 3 steps on a CPU, in float32.
DEMONSTRATION = f"""--model {TINY} --prompts {TINY}/prompts.txt --resolution 32 --shift 1
    --shift-range 1 1 --iterations 200 --batch 64 --learning-rate 1e-3 --recompute-every 0
    --noises 8 --validate-every 20"""
ON_A_CPU = 0.214


def distilled(out: Path, *flags: str) -> dict[tuple[str, int], float]:
    """Distances to the teacher by sampler and steps, from a process of its own."""
    command = [sys.executable, SCRIPT, *DEMONSTRATION.split(), "--out", out, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((out / "results.json").read_text())["table"]
    return {(row["sampler"], row["steps"]): row["rmse"] for row in table}


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory) -> dict[tuple[str, int], float]:
    """In bfloat16."""
    return distilled(tmp_path_factory.mktemp("demonstration"))


def test_the_demonstration_ends_where_it_does_on_a_cpu(demonstration):
    assert demonstration["student", 3] == pytest.approx(ON_A_CPU, rel=0.15)


def test_an_int8_base_closes_nine_tenths_of_the_gap(demonstration, tmp_path):
    pytest.importorskip("torchao")
    quantized = distilled(tmp_path, "--quantize", "int8")
    gap = demonstration["teacher", 3] - demonstration["student", 3]
    assert gap > 0
    assert quantized["teacher", 3] - quantized["student", 3] > 0.9 * gap


@pytest.mark.parametrize("guidance", [1.5, 4, 8])
def test_the_rounding_of_a_guided_teacher_passes_the_check(tmp_path, guidance):
    """A guidance of g multiplies it by up to 2 g - 1."""
    model = TINY.parent / "tiny_klein"
    flags = ("--model", model, "--prompts", model / "prompts.txt", "--guidance", guidance)
    setup = prepared(tmp_path / "out", *flags)
    fd.check_device(setup.settings, setup.cache, new_lora(setup))  # ends the run otherwise


def gradient_of(setup, device: str, dtype: torch.dtype, **change) -> torch.Tensor:
    """Of a loss on four rows, weights away from the teacher; the same draws on every device.

    `change`: other settings.
    """
    settings = fd.replace(setup.settings, **change)
    model = copy.copy(setup.model)
    model.machine = copy.copy(setup.machine)
    model.machine.device = device
    model.machine.dtype = dtype
    cache = fd.Cache(settings, model, setup.data)
    lora = fd.LoRA(model.family, model.load("image", fresh=True).transformer, settings)
    assert lora.loaded.dtype == dtype
    assert lora.loaded.device.type == device

    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(lora.loaded.shape, generator=generator)
    student = weights.to(device)
    x = cache.noise([("x", i) for i in range(4)])
    target = cache.noise([("target", i) for i in range(4)])
    cond = cache.conditions(range(4), 1.0)
    v = lora.velocity(student)(x, torch.full((4,), 0.5, device=device), **cond)
    (v - target).square().mean().backward()
    lora.move_gradients(student, 1.0)
    return student.grad.cpu()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def plain(setup) -> torch.Tensor:
    """The gradient on the GPU, eager and without recomputing."""
    return gradient_of(setup, "cuda", torch.bfloat16, recompute_every=0)


def test_gradients_are_those_of_a_cpu_in_float32(setup, plain):
    reference = gradient_of(setup, "cpu", torch.float32, recompute_every=0)
    assert difference(plain, reference) < 0.1


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_have_the_same_gradients(setup, plain, every):
    recomputed = gradient_of(setup, "cuda", torch.bfloat16, recompute_every=every)
    assert difference(recomputed, plain) < 0.02


def test_compiled_blocks_have_the_same_gradients(setup, plain):
    compiled = gradient_of(setup, "cuda", torch.bfloat16, recompute_every=1, compile=True)
    assert difference(compiled, plain) < 0.1


def test_interrupted_and_resumed_is_as_if_undisturbed(tmp_path, monkeypatch):
    run(tmp_path / "calm")
    shortcut_loss = fd.sc.shortcut_loss
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return shortcut_loss(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", dying)
    with pytest.raises(MemoryError):
        run(tmp_path / "out")
    assert fd.read_metadata(tmp_path / "out" / fd.STATE)["rows"][-1]["iteration"] == 2
    run(tmp_path / "out")
    assert same_run(tmp_path / "out", tmp_path / "calm")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_follow_one_that_accumulates(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [SCRIPT, *SMALL.split(), "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", "--accumulate", 2)
    losses = []
    for name in ("two", "one"):
        rows = fd.read_metadata(tmp_path / name / fd.STATE)["rows"]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
