"""What only a GPU can show: python -m pytest --gpu. Skipped, with a reason, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import SMALL, TINY, fd, prepared, same_run

pytestmark = pytest.mark.gpu
ROOT = Path(fd.__file__).parent
# The README's demonstration, and where its student ended in 3 steps on a CPU, in float32.
DEMONSTRATION = f"""--model {TINY} --prompts {TINY}/prompts.txt --resolution 32 --shift 1
    --shift-range 1 1 --iterations 200 --batch 64 --learning-rate 1e-3 --recompute-every 0
    --noises 8 --validate-every 20"""
ON_A_CPU = 0.207


def distilled(out: Path, *flags: str) -> dict[tuple[str, int], float]:
    """Distances in a process of its own, with the script's own step counts."""
    command = [sys.executable, ROOT / "flux_distill.py", *DEMONSTRATION.split(), "--out", out]
    done = subprocess.run(list(map(str, [*command, *flags])), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((out / "results.json").read_text())["table"]
    return {(row["sampler"], row["steps"]): row["rmse"] for row in table}


def test_the_demonstration_ends_where_it_does_on_a_cpu(tmp_path):
    assert distilled(tmp_path)["student", 3] == pytest.approx(ON_A_CPU, rel=0.15)


def test_an_int8_base_closes_nine_tenths_of_the_gap(tmp_path):
    pytest.importorskip("torchao")
    ends = {name: distilled(tmp_path / name, *flags)
            for name, flags in (("bfloat16", []), ("int8", ["--quantize", "int8"]))}  # fmt: skip
    gaps = {name: end["teacher", 3] - end["student", 3] for name, end in ends.items()}
    assert gaps["int8"] > 0.9 * gaps["bfloat16"] > 0


def gradient_of(args, device: str, dtype: torch.dtype, recompute_every: int) -> torch.Tensor:
    """Of a loss on four rows, weights away from the teacher; the same draws on every device."""
    args.device = device
    args.loaded = (None, None)
    adapter = fd.Adapter(args)
    assert adapter.net.dtype == dtype
    adapter.recompute(recompute_every)
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(adapter.switch.weights.shape, generator=generator)
    student = start.to(device)
    x, target = (fd.noises(args, [(name, i) for i in range(4)]) for name in ("x", "target"))
    cond = fd.read(args, "text", range(4)) | {"guidance": torch.ones(4, device=device)}
    v = adapter.velocity(student, args.size)(x, torch.full((4,), 0.5, device=device), **cond)
    (v - target).square().mean().backward()
    adapter.move_gradients(student, 1.0)
    return student.grad.cpu()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_gradients_are_those_of_a_cpu_in_float32_however_they_are_computed(tmp_path):
    args = prepared(tmp_path / "out")
    plain = gradient_of(args, "cuda", torch.bfloat16, 0)
    for every in (1, 2):
        assert difference(gradient_of(args, "cuda", torch.bfloat16, every), plain) < 0.02
    assert difference(plain, gradient_of(args, "cpu", torch.float32, 0)) < 0.1
    args.compile = True
    assert difference(gradient_of(args, "cuda", torch.bfloat16, 1), plain) < 0.1


def test_interrupted_and_resumed_is_as_if_undisturbed(tmp_path, monkeypatch):
    flags = [*SMALL.split(), "--out"]
    fd.main([*flags, str(tmp_path / "calm")])
    real, count = fd.sc.shortcut_loss, []

    def dying(*args, **kwargs):
        count.append(1)
        if len(count) == 4:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", dying)
    with pytest.raises(MemoryError):
        fd.main([*flags, str(tmp_path / "out")])
    fd.main([*flags, str(tmp_path / "out")])
    assert same_run(tmp_path / "out", tmp_path / "calm")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_follow_one_that_accumulates(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [ROOT / "flux_distill.py", *SMALL.split(), "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), env=dict(os.environ), capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    fd.main([*SMALL.split(), "--accumulate", "2", "--out", str(tmp_path / "one")])
    rows = [fd.read_metadata(tmp_path / name / "checkpoint/state.safetensors")["rows"]
            for name in ("two", "one")]  # fmt: skip
    for row, other in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)
