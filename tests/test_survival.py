"""What a run of flux_distill.py survives: several processes, lost ones, SIGKILL at any moment."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import killed_run
import pytest
import torch
from faults import temporary
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import (
    SMALL,
    TINY,
    content,
    copied,
    fd,
    picture,
    prepared,
    run,
    same_run,
    says,
    train,
)
from torch.utils import backend_registration as backends

PATIENCE = 300  # seconds for a whole run on a busy machine
TESTS = Path(__file__).parent


def start(*argv, env=None, **more) -> subprocess.Popen:
    """A Python program in a process of its own, which finds our files."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], env=os.environ | {"PYTHONPATH": path} | (env or {}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def finish(*argv, **more) -> str:
    """What a program says that ends well."""
    process = start(*argv, **more)
    said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said[1][-3000:]
    return "".join(said)


# ------------------------------------------------------------------------------------ two processes


def two_processes(program: Path, out: Path) -> None:
    """Run a program with the flags of a short run on two processes."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    finish(*launch, program, *SMALL.split(), "--out", out, "--paper")


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory) -> Path:
    """The folder of a run on one process, with as many passes in an iteration as two make."""
    out = tmp_path_factory.mktemp("accumulated") / "out"
    run(out, "--accumulate", 2, "--paper")
    return out


TRAIN = """
import os
import sys
from pathlib import Path
from safetensors.torch import save_file
from tiny_runs import fd

settings, machine = fd.parse(sys.argv[1:]), fd.Machine()
settings, run, cache = fd.prepare(settings, machine)
fd.fill_cache(settings, cache)
costs = fd.Costs(run.out / "costs.json", machine)
validation, state = fd.train_student(settings, cache, run, costs)
assert (validation is None) == (machine.process == 1)
save_file(state.weights, run.out / f"process{machine.process}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_weights(tmp_path):
    program, out = tmp_path / "train.py", tmp_path / "out"
    program.write_text(TRAIN)
    two_processes(program, out)
    ours, theirs = (load_file(out / f"process{i}.safetensors") for i in range(2))
    assert ours.keys() == theirs.keys() == {"student", "fast", "slow"}
    saved = load_file(out / fd.STATE)
    for name, weights in ours.items():
        assert torch.equal(weights, theirs[name])
        assert torch.equal(weights, saved[name])


@pytest.mark.slow
def test_two_processes_follow_one_that_accumulates(tmp_path, accumulated):
    """The command itself, from the cache to the card."""
    out = tmp_path / "out"
    two_processes(Path(fd.__file__), out)
    assert not temporary(out)
    assert content(out).keys() == content(accumulated).keys()

    two, one = fd.read_metadata(out / fd.STATE), fd.read_metadata(accumulated / fd.STATE)
    assert two["settings"] == one["settings"]  # so either may resume what the other began
    assert len(two["rows"]) == 4
    for row, other in zip(two["rows"], one["rows"], strict=True):
        for name in ("loss", "teacher_loss", "self_loss", "residual", "gradient_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    two, one = load_file(out / fd.STATE), load_file(accumulated / fd.STATE)
    for name in ("fast", "slow"):
        assert (two[name] - one[name]).norm() < 1e-3 * one[name].norm()


DIE = """
import os
import sys
import torch
from faults import before_network_calls
from tiny_runs import fd

iterations = []

def die_in_the_third():
    if torch.is_grad_enabled():  # the student's call, of which an iteration has one
        iterations.append(len(iterations) + 1)
    if iterations == [1, 2, 3] and os.environ["RANK"] == "1":
        os._exit(9)

with before_network_calls(die_in_the_third):
    fd.main(sys.argv[1:])
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_one_process_can_resume(tmp_path, accumulated):
    """Without torchrun, which would end the other process within a tenth of a second."""
    program, out = tmp_path / "die.py", tmp_path / "out"
    program.write_text(DIE)
    flags = [*SMALL.split(), "--out", out, "--paper", "--checkpoint-every", 1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (
        start(program, *flags, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    )
    said = first.communicate(timeout=PATIENCE)[1]
    second.communicate(timeout=PATIENCE)
    assert second.returncode == 9
    assert first.returncode == 1
    assert said.splitlines()[-1].startswith("flux_distill.py: process 0 lost another one")
    assert said.endswith("; the same command resumes from the last checkpoint\n")
    assert len(fd.read_metadata(out / fd.STATE)["rows"]) == 2
    run(out, "--accumulate", 2, "--paper")
    resumed, one = load_file(out / fd.STATE)["slow"], load_file(accumulated / fd.STATE)["slow"]
    assert (resumed - one).norm() < 1e-3 * one.norm()


# -------------------------------------------------------------------------------------------- kills

# The train phase twice: the second kill is of a resumed training.
KILLED_PHASES = ("cache", "train", "train", "calibrate", "compare")


@pytest.fixture(scope="module")
def start_run():
    """Starts a run that is killed at a moment; returns how it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])  # so that the slow imports are done once

    def run_until(out: Path, fatal: str, number: int, record: Path) -> int:
        arguments = (str(out), fatal, number, str(record))
        process = context.Process(target=killed_run.victim, args=arguments)
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
        return process.exitcode

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield run_until


@pytest.fixture(scope="module")
def calm(start_run, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """The folder of a run that nothing disturbs, and how many events of each kind it had."""
    folder = tmp_path_factory.mktemp("calm")
    assert start_run(folder / "out", "none", 0, folder / "record.json") == 0
    return folder / "out", json.loads((folder / "record.json").read_text())


def check_whole_files(out: Path) -> None:
    """All but temporary ones can be read."""
    for path in out.rglob("[!.]*.*"):
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()


@pytest.mark.slow
@pytest.mark.parametrize("kind", killed_run.KINDS)
def test_a_run_that_is_killed_in_every_phase_ends_as_if_undisturbed(
    start_run, calm, tmp_path, kind
):
    """SIGKILL at five moments of each of four kinds: no file is broken, the end is the same."""
    undisturbed, counts = calm
    out, record = tmp_path / "out", tmp_path / "record.json"
    chance = random.Random(kind)
    for phase in KILLED_PHASES:
        fatal = f"{phase}: {kind}"
        # The first part of the phase in training, so that the second kill finds as much left.
        most = counts[fatal] // 3 if phase == "train" else counts[fatal]
        number = chance.randint(1, most)
        assert start_run(out, fatal, number, record) == -signal.SIGKILL, (fatal, number)
        assert not (out / "results.json").exists() or phase == "compare"
        check_whole_files(out)
    assert start_run(out, "none", 0, record) == 0
    assert not temporary(out)
    assert same_run(out, undisturbed)
    ours, theirs = content(out), content(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".png"))


# ------------------------------------------------------------------------------------- not a number


def test_not_a_number_in_a_gradient_stops_before_the_step(tmp_path, monkeypatch):
    out = tmp_path / "out"
    move = fd.LoRA.move_gradients
    passes = []

    def spoiled(self, student, fraction):
        move(self, student, fraction)
        passes.append(fraction)
        if len(passes) == 3:
            student.grad[0] = float("inf")

    monkeypatch.setattr(fd.LoRA, "move_gradients", spoiled)
    says("iteration 3: loss .*gradient norm (inf|nan).*last checkpoint is kept", "--out", out)
    assert len(fd.read_metadata(out / fd.STATE)["rows"]) == 2
    assert all(x.isfinite().all() for x in load_file(out / fd.STATE).values())


@pytest.mark.parametrize("kind", [pytest.param("latent", marks=pytest.mark.slow), "text"])
def test_not_a_number_in_the_cache_is_named(tmp_path, kind):
    setup = prepared(tmp_path / "out")
    out, path = setup.run.out, setup.cache.path(kind, 4)
    tensors, metadata = load_file(path), fd.read_metadata(path)
    tensors[kind].view(-1)[7] = float("nan")
    fd.write_tensors(path, tensors, metadata)
    says(f"{path.name} holds NaN or infinity", "--out", out)
    assert not setup.run.lora.exists()
    if setup.run.state.exists():
        assert all(x.isfinite().all() for x in load_file(setup.run.state).values())
    path.unlink()
    run(out)
    assert setup.run.lora.exists()


# ------------------------------------------------------------------------------------ unusual input

TEXTS = (
    "a red circle, " * 150,
    "красный круг",
    "红色的圆圈 🔴",
    "دائرة حمراء",
    r"$\frac{a ${ %s",
    "{x} </s><pad> | <script>alert(1)</script> ![x](y)",
)


@pytest.mark.slow
def test_captions_of_any_length_and_script(tmp_path, capsys, recwarn):
    """Trained on, held out and rendered; neither images nor card stumble over them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*TEXTS, *reversed(TEXTS), "a", *TEXTS]), "utf-8")
    out = tmp_path / "out"
    run(out, "--prompts", prompts, "--held-out", 6, "--limit", 0, "--iterations", 1)
    fd.main(["--model", str(TINY), "--out", str(out), "--sample", "../../" + TEXTS[4], TEXTS[0]])
    images = [path for path in tmp_path.rglob("*.png") if path.parent != out / "validation"]
    assert len(list((out / "samples").iterdir())) == 2
    assert {path.parent for path in images} == {out, out / "samples"}
    assert (out / "README.md").read_text("utf-8")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(1, 1, 1), (1, 4, 2), (2, 3, 1)])
def test_few_images_and_small_batches(tmp_path, count, batch, accumulate):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, mode in zip(range(count), ("RGBA", "I;16")):
        picture(mode).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a blue dot")
    flags = ["--batch", batch, "--accumulate", accumulate, "--iterations", 1, "--held-out", 2]
    setup = prepared(tmp_path / "out", "--images", folder, *flags)
    assert len(setup.data.pairs) == count
    _, state = train(setup)
    assert state.done
    assert state.iteration == 1
    assert all(x.isfinite().all() for x in load_file(setup.run.state).values())


# ------------------------------------------------------------------------------- in other processes


@pytest.mark.slow
def test_a_token_is_written_nowhere_and_nothing_outside_out(tmp_path):
    token = "hf_" + "Secret" * 6
    model, work = copied(TINY, tmp_path / "model"), tmp_path / "work"
    work.mkdir()
    before = content(model)
    flags = [*SMALL.split(), "--model", model, "--iterations", 1, "--out", "out"]
    said = finish(fd.__file__, *flags, cwd=work, env={"HF_TOKEN": token})
    assert [path.name for path in work.iterdir()] == ["out"]
    assert content(model) == before
    files = content(work / "out")
    assert len(files) > 15
    assert not [name for name, data in files.items() if token.encode() in data]
    assert token not in said


@pytest.mark.slow
def test_our_files_and_their_calls_use_nothing_deprecated(tmp_path):
    errors = []
    for module in ("flux_distill", "shortcut"):
        errors += ["-W", f"error::DeprecationWarning:{module}"]
        errors += ["-W", f"error::FutureWarning:{module}"]
    program = "import sys, flux_distill; flux_distill.main(sys.argv[1:])"
    flags = [*SMALL.split(), "--iterations", 1, "--out", tmp_path / "out"]
    finish(*errors, "-c", program, *flags)


@pytest.mark.slow
def test_an_int8_base_closes_nine_tenths_of_the_gap(tmp_path):
    """How much nearer than the teacher the student ends: with an int8 base against without."""
    pytest.importorskip("torchao")
    flags = ["--iterations", 100, "--batch", 32, "--rank", 16, "--shift", 1, "--shift-range", 1, 1]
    flags += ["--held-out", 12, "--limit", 0, "--recompute-every", 0, "--noises", 8]
    flags += ["--validate-every", 100, "--checkpoint-every", 100]
    teacher, gap = {}, {}
    for name, more in (("float32", []), ("int8", ["--quantize", "int8"])):
        run(tmp_path / name, *flags, *more)
        table = json.loads((tmp_path / name / "results.json").read_text())["table"]
        rmse = {row["sampler"]: row["rmse"] for row in table if row["steps"] == 3}
        teacher[name] = rmse["teacher"]
        gap[name] = rmse["teacher"] - rmse["student"]
    assert gap["float32"] > 0.3 * teacher["float32"]
    assert gap["int8"] > 0.9 * gap["float32"]


MIXED = """
import sys
import fake_gpu as gpu
from fake_gpu import torch

with gpu.Names(), gpu.Dispatch():
    there, here, generator = torch.ones(2, 2, device="cuda"), torch.ones(2, 2), torch.Generator()
    assert (2 * there + torch.tensor(1.0)).sum().item() == 12
    assert there.device == gpu.DEVICE
    mixtures = (
        lambda: there + here,
        lambda: torch.stack([there, here]),
        lambda: there.numpy(),
        lambda: here[there.long()],
        lambda: torch.rand(2, device="cuda", generator=generator),
    )
    for number, mixed in enumerate(mixtures):
        try:
            mixed()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"nothing was said of mixture {number}")
gpu.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="needs a newer PyTorch"
)
def test_the_branch_of_a_gpu_on_a_fake_one(tmp_path):
    """No tensor of the CPU meets one of the GPU, from the cache to the self-check, in bfloat16."""
    program, out = tmp_path / "mixed.py", tmp_path / "out"
    program.write_text(MIXED)
    more = ["--iterations", 2, "--held-out", 2, "--batch", 2, "--limit", 4, "--paper"]
    finish(program, *SMALL.split(), "--out", out, *more, env={"OMP_NUM_THREADS": "1"})
    assert {x.dtype for x in load_file(out / fd.LORA).values()} == {torch.bfloat16}
    assert json.loads((out / "results.json").read_text())["self_check"] < 3e-2
