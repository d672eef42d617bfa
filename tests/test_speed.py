"""The benchmarks of speed and of a GPU still run, and their times are of what they say."""

# ruff: noqa: E402
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import common
import gpu
import speed
from speed import SMALL, fd

# ---------------------------------------------------------------------------------------- speed.py


def started(run) -> tuple:
    """A state, and a generator of training steps that change it."""
    state = fd.TrainState(run.lora.loaded_weights(), fd.config_of(run.settings))
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
            start = run.lora.loaded_weights()
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


def row_of(found: dict, flags: str = "--recompute-every 0") -> common.Row:
    settings = {"config": "small", "pixels": 64, "batch": 2, "flags": flags, "threads": 1}
    return common.Row("steps", settings, 1.0, found, 1.0, common.origin())


def test_a_size_that_does_not_fit_is_a_row_of_its_own(monkeypatch):
    def full(run, steps):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "timed_steps", full)
    found = speed.measure_steps("small", 64, 2, "--recompute-every 0", threads=1, length=1.0)
    assert found == {"note": "out of memory"}
    line = "| 64 | 2 | --recompute-every 0 | out of memory |  |  |  |  |"
    assert line in speed.tables([row_of(found)])
    assert line.count("|") == len(speed.HEAD) + 1


def test_a_row_without_a_gpu_has_neither_memory_nor_a_fraction():
    found = speed.measure_steps("small", 64, 2, "", threads=1, length=0.01)
    assert found.keys() == {"step", "calls", "ratio", "tflops"}
    assert found["ratio"] == pytest.approx(found["step"] / found["calls"])  # of one step
    cells = speed.cells_of(row_of(found), None)
    assert len(cells) == len(speed.HEAD)
    assert "%" not in cells[-2] and cells[-1] == ""


@pytest.mark.parametrize(
    "length, count, timed", [(1.0, 8, 6), (0.5, 8, 2), (1.0, 4, 2), (0.01, 8, 1)]
)
def test_length_scales_the_steps_of_which_one_is_timed_at_least(length, count, timed, monkeypatch):
    seen = []
    timed_steps = speed.timed_steps

    def spied(run, steps):
        seconds = timed_steps(run, steps)
        seen.append(len(seconds))
        return seconds

    monkeypatch.setattr(speed, "timed_steps", spied)
    speed.measure_steps("small", 64, 1, "", threads=1, length=length, count=count)
    assert seen == [timed]


def test_the_rate_is_that_of_counted_flops_and_a_fraction_of_the_matrix_product():
    found = {"step": 2.0, "calls": 1.6, "ratio": 1.25, "tflops": 100.0, "gib": 34.12}
    cards = [row_of({"matmul_tflops": rate}) for rate in (400.0, 500.0)]
    rows = [cards[0], row_of({"sampling": 0.25}), row_of(found), cards[1], row_of(found)]
    lines = speed.tables_of_steps(rows)
    assert "64 px, 3 steps, the latents of one image: 0.25 s" in lines
    assert "bfloat16 matrix product: 400 TFLOP/s" in lines
    for percent in (25, 20):  # of that of the same card
        cells = f"2.000 | 1.600 | 1.250 | 100 ({percent}%) | 34.1"
        assert f"| 64 | 2 | --recompute-every 0 | {cells} |" in lines
    with speed.random_run(SMALL, 64, 2) as run:
        flops = speed.flops_of_a_step(run)
    found = speed.measure_steps("small", 64, 2, "", threads=1, length=0.01)
    assert found["tflops"] * 1e12 == pytest.approx(flops / found["step"])


def test_the_time_of_a_profiled_step_is_that_of_its_operations():
    found = speed.measure_profile("small", 64, 2, "--recompute-every 0", threads=1, length=1.0)
    assert [*found["kinds"]] == [*speed.KINDS]
    assert 0.5 < sum(found["kinds"].values()) / found["profiled"] < 1.01
    assert found["kinds"]["matrix products"] > 0.1 * found["profiled"]
    assert any("mm" in name and count > 20 for name, _, count in found["longest"])
    lines = speed.tables([row_of(found)])
    assert f"a profiled step of {found['profiled']:.3f} s: 64 px, batch 2" in "\n".join(lines)


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_red_fused_addmm_mul_native_layer_norm_3", "compiled"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor>", "others"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel, kind):
    assert speed.kind_of(kernel) == kind


def test_settings_of_the_tasks_are_those_that_are_measured():
    """Of every task: its function takes them, its flags are flags, its config is one."""
    for script in (speed, gpu):
        for part in script.tasks((), range(1)).values():
            assert part
            for task in part:
                inspect.signature(task.measure).bind(length=1.0, **task.settings)
                assert common.as_kept(task.settings) == task.settings
                assert task.settings.get("config", "small") in speed.CONFIGS


def test_a_gpu_has_all_parts_at_full_size(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parts = speed.tasks((), range(1))
    assert [*parts] == [*speed.usual(), "profile", "small"]
    assert parts["matmul"]
    configs = [
        t.settings["config"] for name in ("sampling", "steps", "variants") for t in parts[name]
    ]
    assert set(configs) == {"dev"}
    parts = gpu.tasks()
    assert [task.settings["kernel"] for task in parts["gradients"]] == [*gpu.KERNELS]
    sizes = [
        (t.settings["pixels"], t.settings["batch"]) for t in parts["steps"] if "flags" in t.settings
    ]
    assert (1024, 4) in sizes and len(sizes) == 9
    counts = {t.settings["count"] for t in parts["steps"] if "flags" in t.settings}
    assert counts == {gpu.COUNT}


# ------------------------------------------------------------------------------------------ gpu.py


def test_the_tables_of_the_stored_results_are_made():
    """Also of parts that were stopped."""
    told = gpu.tables(common.load(common.RESULTS / "gpu.json"))
    for line in (
        "| efficient | 0.017 | 0.0076 | 0.0085 | 0.0065 |",
        "| cuDNN | 1.8e+04 | 0.0079 | 0.0078 | 0.0063 |",
        "dev: 11901 million parameters",
        "bfloat16 matrix product: 731 TFLOP/s",
        "512 px, 3 steps, the latents of one image: 0.39 s",
        "| full size | 0.0058 | 0.091 | 0.094 | 0.0043 |",
        "bfloat16 matrix product: 774 TFLOP/s",
        "| 512 | 8 | --recompute-every 1 | 2.429 | 2.391 | 1.016 | 361 (47%) | 32.9 |",
        "| 512 | 8 | --recompute-every 1 --compile | 1.924 | 2.260 | 0.877 | 456 (62%) | 32.7 |",
        "| matrix products | 1.440 | 69% |",
        "| full, phase | seconds | peak GiB |",
        "| train | 101 | 32.7 |",
        "| the whole process | 230 |  |",
        "| train | 27 | 13.4 |",
        "klein: 1.83 s per iteration",
        "Not measured: demonstration, medium",
    ):
        assert line in told


def test_a_kernel_that_failed_and_what_was_noted_by_hand_are_told():
    found = {"error": "No available kernel."}
    failed = common.Row("gradients", {"kernel": "cuDNN"}, 1.0, found, 1.0, common.origin())
    found = {"gradient": [float("nan"), 8.3e4, float("nan")]}
    noted = common.Row("an earlier call", {}, 1.0, found, None, common.origin())
    told = gpu.tables([failed, noted])
    assert "| cuDNN | No available kernel. |  |  |  |" in told
    assert "| gradient | nan, 8.3e+04, nan |" in told


def test_a_machine_is_named_once_with_what_is_noted_of_it():
    origin = {"machine": "a card", "versions": {"torch": "2.11.0"}}
    origins = [origin, origin | {"note": "one"}, origin | {"note": "two"}, origin | {"note": "one"}]
    rows = [common.Row("steps", {}, 1.0, {}, 1.0, one) for one in origins]
    rows.append(common.Row("steps", {}, 1.0, {}, 1.0, origin | {"machine": "another"}))
    assert speed.made_on(rows) == ["a card; torch 2.11.0; one; two", "another; torch 2.11.0"]


def test_a_run_that_failed_is_told():
    found = {"seconds": 12.3, "error": "out of GPU memory"}
    told = gpu.tables([common.Row("full", {}, 1.0, found, 12.3, common.origin())])
    assert "full: failed after 12 s: out of GPU memory" in told


def test_a_part_that_is_measured_again_replaces_its_rows_and_no_others(tmp_path, monkeypatch):
    """At once, so that what was measured stays if the machine goes away."""
    path = tmp_path / "gpu.json"
    rows = [common.Row(part, {}, 1.0, {"stopped": "before"}, 1.0, {}) for part in ("full", "steps")]
    common.save([common.replace(row, origin=common.origin()) for row in rows], path)

    def goes_away(part, limit):
        if part == "gradients":
            raise KeyboardInterrupt
        return [common.Row(part, {}, 1.0, {"stopped": "now"}, 1.0, common.origin())]

    monkeypatch.setattr(gpu, "run_part", goes_away)
    with pytest.raises(KeyboardInterrupt):
        gpu.try_parts(["full", "gradients", "steps"], path)
    kept = [(row.part, row.found["stopped"]) for row in common.load(path)]
    assert kept == [("steps", "before"), ("full", "now")]


def test_a_part_that_runs_out_of_time_leaves_the_rows_that_it_had(tmp_path, monkeypatch):
    """And neither files nor processes."""
    had = row_of({"sampling": 0.25})
    common.save([had], tmp_path / "had.json")
    python = tmp_path / "python"  # gpu.py --part PART --results FILE
    python.write_text('#!/bin/sh\ncp $TMPDIR/../../had.json "$5"\ntail -f "$5" &\nwait\n')
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(temporary))
    row, stopped = gpu.run_part("steps", 3)
    assert row == had
    assert stopped.found == {"stopped": "stopped after 3 s"}
    assert not list(temporary.iterdir())
    assert str(temporary) not in commands()


def test_a_try_that_is_told_to_end_ends_with_the_processes_of_its_part(tmp_path):
    """Otherwise they would slow whatever is tried next."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntouch $TMPDIR/../started\ntail -f $0 &\nwait\n")
    python.chmod(0o755)
    command = [
        sys.executable,
        "-c",
        f"import gpu; gpu.sys.executable = {str(python)!r}; gpu.main()",
    ]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(FOLDER)}
    flags = ["--parts", "steps", "--results", str(tmp_path / "rows.json")]
    with subprocess.Popen([*command, *flags], env=env, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.terminate()
    assert process.returncode == 1
    assert str(tmp_path) not in commands()


def test_a_part_that_fails_says_so(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    (row,) = gpu.run_part("steps", 30)
    assert row.found == {"stopped": "ended with code 3"}
    assert "steps: ended with code 3" in gpu.tables([row])


def test_the_medium_flux_is_tried_only_if_asked_for(monkeypatch):
    tried = []
    monkeypatch.setattr(gpu, "try_parts", lambda parts, path: tried.append(parts))
    for flags in ([], ["--parts", "medium"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
        gpu.main()
    assert tried == [["gradients", "steps", "full", "demonstration"], ["medium"]]


@pytest.fixture
def processes(monkeypatch) -> list[list[str]]:
    """The commands that are run, in place of running them: each fails."""
    commands = []

    def failing(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no memory")

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=failing))
    monkeypatch.delenv("MEDIUM_MODEL", raising=False)
    return commands


def test_the_medium_flux_is_made_in_a_temporary_folder_and_distilled_from_there(
    processes, monkeypatch, tmp_path
):
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    found = gpu.made_medium("--size medium", 1.0)
    assert found["error"] == "no memory"
    told = gpu.tables([common.Row("medium", {}, 1.0, found, 1.0, common.origin())])
    assert "medium: failed after 0 s: no memory" in told
    gpu.medium_run("--shift 3", 1.0)
    made, distilled = processes
    assert Path(made[1]).name == "make_tiny_flux.py"
    assert made[2:] == ["--out", str(tmp_path / "medium"), "--size", "medium"]
    assert Path(distilled[1]).name == "flux_distill.py"
    model = ["--model", str(tmp_path / "medium")]
    assert distilled[4:] == [
        *model, "--prompts", str(tmp_path / "medium" / "prompts.txt"), "--shift", "3",
    ]  # fmt: skip


def test_a_folder_with_a_medium_flux_is_used_again(processes, monkeypatch, tmp_path):
    """One whose making was interrupted is made again."""
    monkeypatch.setenv("MEDIUM_MODEL", str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert "error" in gpu.made_medium("", 1.0)
    (tmp_path / "prompts.txt").write_text("a red circle")
    assert gpu.made_medium("", 1.0) == {"reused": True}
    assert len(processes) == 1


def test_the_table_of_the_medium_flux_is_told():
    table = []
    for sampler, rmse, scale in (("teacher", 0.5, 0.0), ("student, scaled", 0.25, 0.9)):
        for steps in (2, 3):
            cell = {"steps": steps, "scale": scale, "rmse": rmse / steps, "psnr": 20.0 + steps}
            table.append({"sampler": sampler} | cell)
    lines = gpu.table_of_ends("medium", table)
    assert lines[1:-1] == [
        "| medium, Euler steps | 2 | 3 |",
        "| --- | --- | --- |",
        "| teacher | 0.250 / 22.0 | 0.167 / 23.0 |",
        "| student, scaled | 0.125 / 22.0 | 0.083 / 23.0 |",
        "| its scale | 0.90 | 0.90 |",
    ]


def commands() -> str:
    """Of all processes, a second from now."""
    time.sleep(1)
    return subprocess.run(["ps", "ax", "-o", "command"], capture_output=True, text=True).stdout


# ----------------------------------------------------------------------------------- whole scripts


@pytest.mark.slow
def test_gpu_tries_each_part_on_a_small_configuration(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, FOLDER / "gpu.py", "--results", "gpu.json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = common.load(tmp_path / "gpu.json")
    found = {part: set() for part in gpu.USUAL}
    for row in rows:
        found[row.part] |= row.found.keys()
        assert row.origin["sources"].keys() >= {"flux_distill.py", "tests/benchmarks/speed.py"}
        assert row.seconds > 0
        assert len(row.found.get("told", [""])) == 1  # what an iteration takes
    assert found["gradients"] == {*gpu.CHECKS}
    assert found["steps"] >= {"sampling", "checks", "step", "calls", "ratio"}
    assert found["full"] >= {"made", "phases", "table", "self_check", "told"}
    assert found["demonstration"] >= {"phases", "table", "self_check", "told"}
    for names in found.values():
        assert not {"error", "stopped", "note"} & names
    for head in ("attention kernel, tiny Flux", "kernels in use", "pixels | batch", "full, phase",
                 "demonstration, phase"):  # fmt: skip
        assert f"| {head} |" in done.stdout


@pytest.mark.slow
def test_gpu_makes_a_model_in_a_folder_that_is_given_and_distils_it(tmp_path):
    """Of the tiny size, in few iterations; a second time it is not made again."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, FOLDER / "gpu.py", "--parts", "medium", "--medium-model", "model"]
    command += ["--results", "gpu.json"]
    for first in ("made", "reused"):
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        model, run = common.load(tmp_path / "gpu.json")
        assert model.found.keys() == {first}
        assert run.found.keys() >= {"phases", "table", "self_check", "told"}
        assert "| medium, Euler steps | 2 | 3 | 4 | 6 | 8 |" in done.stdout


@pytest.mark.slow
def test_nothing_of_a_part_outlives_its_time(tmp_path, monkeypatch):
    """Neither its processes nor its files: they would slow the next part, and fill the memory."""
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    rows = gpu.run_part("full", 12)
    assert rows[-1].found == {"stopped": "stopped after 12 s"}
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) not in commands()
