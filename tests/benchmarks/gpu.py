"""Try a card: python tests/benchmarks/gpu.py (at most 8 minutes on one H100 or H200)

Each part runs in a process and under a time limit of its own, prints what it finds as it finds it,
and leaves that in the file of results even if the machine goes away during a later part.

    gradients      attention kernel by kernel, on the tiny Flux: gradients against PyTorch's plain
                   attention, velocities against float32
    steps          seconds, matrix rate and peak memory of a training step on FLUX.1-dev's own
                   configuration with random weights: eager, compiled, some blocks recomputed;
                   sampling in 3 steps
    full           flux_distill.py on a whole pipeline of that configuration (34 GB, in a RAM disk
                   where there is room): seconds and peak memory of each phase
    klein          the same on a pipeline of FLUX.2-klein-base-4B's configuration (16 GB), at 512 px
                   and the default batch
    demonstration  the tiny Flux distilled in bfloat16, as in the README
    profile        kernels of a training step by their kind, eager and compiled
    medium         a tiny Flux of 64 x 64 images and 20 to 40 million parameters, made and distilled

"gradient", "teacher", "student", "pipeline": relative differences, as flux_distill.py's check of
the device measures them before training.

Without a GPU the same parts run on a small configuration, as a test of this script, and nothing is
kept unless --results names a file.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import common
import common_flux
import speed
import torch
from common_flux import TINY
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
)
from speed import has_gpu
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

import flux_distill as fd

LIMITS = {  # seconds, on a GPU
    "gradients": 30, "steps": 200, "full": 180, "demonstration": 70, "profile": 120, "klein": 150,
    "medium": 570,
}  # fmt: skip
USUAL = ["gradients", "steps", "full", "demonstration"]  # if no flag says which
DEMONSTRATION = ("--model", str(TINY), "--prompts", str(TINY / "prompts.txt"),
                 *common_flux.DEMONSTRATION.split())  # fmt: skip
LENGTHS = {  # whether on a GPU: flags
    True: "--validate-every 20",
    False: "--iterations 3 --validate-every 3 --limit 8 --held-out 6 --noises 2 --batch 4",
}
MEDIUM_MODEL = {  # whether on a GPU: flags of make_tiny_flux.py
    True: "--size medium",
    False: "--size tiny --vae-iterations 9 --iterations 9 --guidance-iterations 9 --images 60",
}
MEDIUM = {  # whether on a GPU: flags of flux_distill.py
    True: """--resolution 64 --shift 3 --iterations 500 --batch 64 --learning-rate 3e-4
        --recompute-every 0 --noises 8 --validate-every 100""",
    False: f"--resolution 32 --shift 3 {LENGTHS[False]}",
}
FULL = """--limit 4 --batch 4 --iterations 4 --validate-every 4 --held-out 2 --noises 2
    --resolution"""
KLEIN = common.ROOT / "tests" / "tiny_klein"
KLEIN_4B = dict(num_attention_heads=24, attention_head_dim=128, num_layers=5, num_single_layers=20,
                axes_dims_rope=(32, 32, 32, 32), in_channels=128, joint_attention_dim=7680,
                guidance_embeds=False)  # fmt: skip
KLEIN_SIZE = {  # whether on a GPU: flags of flux_distill.py
    True: """--limit 4 --batch 8 --iterations 6 --validate-every 6 --held-out 2 --noises 2
        --teacher-steps 8 --steps 3 --resolution 512""",
    False: """--limit 4 --batch 4 --iterations 3 --validate-every 3 --held-out 2 --noises 2
        --teacher-steps 8 --steps 3 --resolution 32""",
}
EAGER = "--recompute-every 1"
HALF = "--recompute-every 2"
CASES = {  # whether on a GPU: pixels, batch, flags
    True: [(512, 8, EAGER), (512, 8, HALF), (512, 8, f"{EAGER} --compile"),
           (512, 8, f"{HALF} --compile"), (512, 1, EAGER), (1024, 1, EAGER), (512, 16, EAGER),
           (1024, 4, EAGER), (512, 16, f"{EAGER} --compile")],
    False: [(64, 2, EAGER), (64, 2, HALF)],
}  # fmt: skip
PROFILED = {  # likewise
    True: [(512, 8, EAGER), (512, 8, f"{EAGER} --compile")],
    False: [(64, 2, EAGER)],
}
COUNT = 5  # steps of each case
KERNELS = {  # attention: backend of diffusers
    "in use": "native", "flash": "_native_flash", "efficient": "_native_efficient",
    "cuDNN": "_native_cudnn",
}  # fmt: skip
CHECKS = ("gradient", "teacher", "student", "pipeline")  # of flux_distill.py's device check

# ------------------------------------------------------------------------------------- measurements


@cache
def tiny_flux() -> common_flux.TinyFlux:
    """On few prompts. A process makes it once, in the folder of its part."""
    settings = common_flux.demonstration(Path(tempfile.mkdtemp()), 0, "--limit", 6, "--held-out", 3)
    return common_flux.TinyFlux(settings)


def kernel_errors(kernel: str, length: float) -> dict:
    """Relative differences with an attention kernel, or what that said."""
    world = tiny_flux()
    try:
        with fd.attention_backend(KERNELS[kernel]):
            return fd.device_errors(world.settings, world.cache, world.lora)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:100]}


def full_size_errors(config: str, pixels: int, batch: int, length: float) -> dict:
    """The device check on a transformer of this config, and its seconds."""
    with speed.random_run(speed.CONFIGS[config], pixels, batch) as run:
        began = time.perf_counter()
        checks = fd.device_errors(run.settings, run.cache, run.lora)
        return {"checks": checks, "seconds": time.perf_counter() - began}


def full_size_pipeline() -> Path:
    """Where a part has its model: in a RAM disk if there is room, see `run_part`."""
    return Path(os.environ.get("ROOMY", tempfile.gettempdir())) / "model"


def made_pipeline(length: float, family: str = "dev") -> dict:
    """Make the model of the part "full" or "klein", in a process, which leaves no memory taken."""
    folder = full_size_pipeline()
    began = time.perf_counter()
    command = [sys.executable, __file__, "--make-pipeline", str(folder), "--family", family]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"made": seconds, "in_memory": "ROOMY" in os.environ, "bytes": size}


def make_pipeline(folder: Path) -> None:
    """A pipeline of FLUX.1-dev's own configuration with random weights, or the tiny Flux."""
    if not has_gpu():
        FluxPipeline.from_pretrained(TINY).save_pretrained(folder)
        return
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        parts = parts_of_dev()
    torch.set_default_dtype(torch.float32)
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.bfloat16, **parts)
    # Of the tiny Flux's text side only the tokenizers stay; they pad to 256, as T5's does.
    pipe.tokenizer_2.model_max_length = 512
    pipe.save_pretrained(folder)


def make_klein(folder: Path) -> None:
    """A pipeline of FLUX.2-klein-base-4B's own configuration with random weights, or the tiny one.

    The sizes of the text encoder are those of Qwen3-4B.
    """
    if not has_gpu():
        Flux2KleinPipeline.from_pretrained(KLEIN).save_pretrained(folder)
        return
    qwen = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        parts = {
            "text_encoder": Qwen3ForCausalLM(qwen),
            "vae": AutoencoderKLFlux2(),
            "transformer": Flux2Transformer2DModel(**KLEIN_4B),
        }
    torch.set_default_dtype(torch.float32)
    pipe = Flux2KleinPipeline.from_pretrained(KLEIN, dtype=torch.bfloat16, **parts)
    pipe.tokenizer.model_max_length = 512
    pipe.save_pretrained(folder)


def parts_of_dev() -> dict:
    """Text encoders, VAE and transformer of FLUX.1-dev's own configuration."""
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, projection_dim=768, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16, layers_per_block=2, norm_num_groups=32, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611,
        shift_factor=0.1159, **speed.VAE,
    )  # fmt: skip
    return {
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
        "vae": vae,
        "transformer": speed.FluxTransformer2DModel(**speed.DEV),
    }


def full_run(resolution: int, length: float) -> dict:
    """flux_distill.py end to end on the model of the part "full"."""
    prompts = ("--prompts", str(TINY / "prompts.txt"))
    model = ("--model", str(full_size_pipeline()))
    return distilled(*model, *prompts, *FULL.split(), str(resolution))


def klein_run(flags: str, length: float) -> dict:
    """flux_distill.py end to end on the model of the part "klein"."""
    prompts = ("--prompts", str(TINY / "prompts.txt"))
    return distilled("--model", str(full_size_pipeline()), *prompts, *flags.split())


def demonstration_run(flags: str, length: float) -> dict:
    return distilled(*DEMONSTRATION, *flags.split())


def medium_pipeline() -> Path:
    """Where the part "medium" has its model: in the folder that --medium-model gives, or its own.

    A folder that is given is kept, and its model is used again.
    """
    given = os.environ.get("MEDIUM_MODEL")
    return Path(given) if given else Path(tempfile.gettempdir()) / "medium"


def made_medium(flags: str, length: float) -> dict:
    """Train the model of the part "medium" with make_tiny_flux.py, if it is not there."""
    folder = medium_pipeline()
    if (folder / "prompts.txt").exists():  # which is written last
        return {"reused": True}
    script = common.ROOT / "tests" / "make_tiny_flux.py"
    command = [sys.executable, str(script), "--out", str(folder), *flags.split()]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        return {"seconds": seconds, "error": (done.stdout + done.stderr)[-1500:]}
    return {"made": seconds}


def medium_run(flags: str, length: float) -> dict:
    """flux_distill.py on the model of the part "medium"."""
    folder = medium_pipeline()
    model = ("--model", str(folder), "--prompts", str(folder / "prompts.txt"))
    return distilled(*model, *flags.split())


def environment() -> dict[str, str]:
    """Of a process as if a user had started it: common.py leaves one thread, which suits a CPU."""
    env = dict(os.environ)
    if has_gpu():
        env.pop("OMP_NUM_THREADS", None)
    return env


def distilled(*flags: str) -> dict:
    """Run flux_distill.py; its seconds as a process, and what results.json says."""
    env = environment()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(common.ROOT / "flux_distill.py"), "--out", out, *flags]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=common.ROOT, env=env, capture_output=True, text=True)
        found = {"seconds": time.perf_counter() - began}
        if done.returncode:
            return found | {"error": (done.stdout + done.stderr)[-1500:]}
        results = json.loads((Path(out) / "results.json").read_text())
    told = [line for line in done.stdout.splitlines() if "per iteration; training takes" in line]
    found["told"] = told
    for name in ("phases", "table", "self_check", "seed_to_seed"):
        found[name] = results[name]
    for name in ("checks", "relative_change"):
        found[name] = results["adapter"][name]
    return found


# -------------------------------------------------------------------------------------------- tasks


def tasks(flows=(), seeds=()) -> dict[str, list[common.Task]]:
    on_gpu = has_gpu()
    config = "dev" if on_gpu else "small"
    threads = os.cpu_count() if on_gpu else 1
    kernels = [*KERNELS] if on_gpu else ["in use"]
    matmul = [common.Task(speed.measure_matmul, {})] if on_gpu else []
    sampling = speed.sampling_tasks(config, [512, 1024] if on_gpu else [64], threads)
    pixels, batch, _ = CASES[on_gpu][0]
    size = {"config": config, "pixels": pixels, "batch": batch}
    steps = speed.step_tasks(config, CASES[on_gpu], threads, count=COUNT)
    resolution = {"resolution": 256 if on_gpu else 32}
    return {
        "gradients": [common.Task(kernel_errors, {"kernel": name}) for name in kernels],
        "steps": [*matmul, *sampling, common.Task(full_size_errors, size), *steps],
        "full": [common.Task(made_pipeline, {}), common.Task(full_run, resolution)],
        "profile": speed.step_tasks(config, PROFILED[on_gpu], threads, speed.measure_profile),
        "demonstration": [common.Task(demonstration_run, {"flags": LENGTHS[on_gpu]})],
        "klein": [
            common.Task(made_pipeline, {"family": "klein"}),
            common.Task(klein_run, {"flags": KLEIN_SIZE[on_gpu]}),
        ],
        "medium": [
            common.Task(made_medium, {"flags": MEDIUM_MODEL[on_gpu]}),
            common.Task(medium_run, {"flags": MEDIUM[on_gpu]}),
        ],
    }


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    lines = table_of_kernels(common.where(rows, "gradients"))
    steps = common.where(rows, "steps")
    for row in steps:
        if "checks" in row.found:
            cells = ["full size", *differences(row.found["checks"])]
            lines += common.table(["kernels in use", *CHECKS], [cells])
    lines += speed.tables_of_steps([*steps, *common.where(rows, "profile")])
    for part in ("demonstration", "full", "klein", "medium"):
        for row in common.where(rows, part):
            lines += about_run(part, row.found)
    for row in common.where(rows, "medium"):
        if "made" in row.found:
            lines.append(f"medium: its model was made in {row.found['made']:.0f} s")
        if "table" in row.found:
            lines += table_of_ends("medium", row.found["table"])
    for row in rows:
        if "stopped" in row.found:
            lines.append(f"{row.part}: {row.found['stopped']}")
    for row in rows:
        if row.part not in LIMITS:  # noted by hand
            cells = [(name, text_of(value)) for name, value in row.found.items()]
            lines += common.table([row.part, "found"], cells)
    missing = [part for part in LIMITS if not common.where(rows, part)]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}")
    return lines


def text_of(value) -> str:
    if isinstance(value, list):
        return ", ".join(text_of(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table_of_kernels(rows: list[common.Row]) -> list[str]:
    lines = []
    for row in rows:
        if "error" in row.found:
            lines.append([row.settings["kernel"], row.found["error"], "", "", ""])
        elif "kernel" in row.settings:
            lines.append([row.settings["kernel"], *differences(row.found)])
    return common.table(["attention kernel, tiny Flux", *CHECKS], lines) if lines else []


def differences(found: dict[str, float]) -> list[str]:
    return [f"{found[name]:.2g}" for name in CHECKS]


def about_run(part: str, found: dict) -> list[str]:
    """Of a run of flux_distill.py: seconds and memory by phase, and where the student ends."""
    if "error" in found:
        return [f"{part}: failed after {found['seconds']:.0f} s: {found['error']}"]
    if "phases" not in found:
        return []
    lines = []
    for name, phase in found["phases"].items():
        memory = f"{phase['peak_gib']:.1f}" if phase["peak_gib"] else ""
        lines.append([name, f"{phase['seconds']:.0f}", memory])
    lines.append(["the whole process", f"{found['seconds']:.0f}", ""])
    lines = common.table([f"{part}, phase", "seconds", "peak GiB"], lines)
    for told in found["told"]:
        (seconds,) = re.findall(r"[\d.e-]+ s per iteration", told)
        lines.append(f"{part}: {seconds}")
    if part in ("full", "klein"):  # of random weights
        return lines
    ends = {(row["sampler"], row["steps"]): row["rmse"] for row in found["table"]}
    teacher, student = ends["teacher", 3], ends["student", 3]
    return [*lines, f"3 steps: teacher {teacher:.3f}, student {student:.3f}"]


def table_of_ends(part: str, table: list[dict]) -> list[str]:
    """RMSE of latents / PSNR of images, as flux_distill.py prints it."""
    steps = sorted({row["steps"] for row in table})
    samplers = list(dict.fromkeys(row["sampler"] for row in table))
    cells = {(row["sampler"], row["steps"]): row for row in table}
    lines = []
    for sampler in samplers:
        row = [cells[sampler, n] for n in steps]
        lines.append([sampler, *(f"{cell['rmse']:.3f} / {cell['psnr']:.1f}" for cell in row)])
    lines.append(["its scale", *(f"{cell['scale']:.2f}" for cell in row)])
    return common.table([f"{part}, Euler steps", *steps], lines)


# --------------------------------------------------------------------------------- one process each


def run_part(part: str, limit: float | None) -> list[common.Row]:
    """The rows of a part, those before its time was up included.

    Nothing of it outlives its time: neither processes, which would slow the next part, nor files.
    """
    began = time.perf_counter()
    shared = Path("/dev/shm")
    roomy = has_gpu() and shared.is_dir() and shutil.disk_usage(shared).free > 40e9
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        env = os.environ | {"TMPDIR": folder}
        if roomy:
            env["ROOMY"] = stack.enter_context(tempfile.TemporaryDirectory(dir=shared))
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--part", part, "--results", str(path)]
        process = subprocess.Popen(command, env=env, start_new_session=True)
        note = None
        try:
            code = process.wait(limit)
            if code:
                note = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            note = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows = common.load(path)
    if note:
        seconds = time.perf_counter() - began
        rows.append(common.Row(part, {}, 1.0, {"stopped": note}, seconds, common.origin()))
    return rows


def run_tasks(part: str, path: Path) -> None:
    """Do a part in this process; its rows are written and printed as they come."""
    rows = []
    for task in tasks()[part]:
        row = common.Row(
            part, common.as_kept(task.settings), 1.0, *common.run(task, {"length": 1.0})
        )
        rows.append(row)
        common.save(rows, path)
        print(json.dumps([row.settings, row.found])[:600], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=USUAL, help="in order"
                        " (all but profile, klein and medium; the last is the medium model of"
                        " make_tiny_flux.py, trained and then distilled at shift 3, in at most 10"
                        " minutes)")  # fmt: skip
    parser.add_argument("--medium-model", type=Path, metavar="DIR", help="folder of that model,"
                        " which is made there if it is missing (a temporary one)")  # fmt: skip
    parser.add_argument("--results", type=Path, help="file of the numbers (results/gpu.json; none"
                        " without a GPU)")  # fmt: skip
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--make-pipeline", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--family", choices=("dev", "klein"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    if args.medium_model:  # for the process of the part
        os.environ["MEDIUM_MODEL"] = str(args.medium_model.absolute())
    if args.make_pipeline:
        make = make_klein if args.family == "klein" else make_pipeline
        make(args.make_pipeline)
    elif args.part:
        run_tasks(args.part, args.results)
    else:
        kept = common.RESULTS / "gpu.json" if has_gpu() else None
        try_parts(args.parts, args.results or kept)


def stop(*_) -> None:
    """End as after Ctrl-C: with the processes of the part that runs."""
    sys.exit("stopped")


def try_parts(parts: list[str], path: Path | None) -> None:
    """Measure these parts, replace their rows in the file, print the tables."""
    rows = common.load(path) if path else []
    for part in parts:
        began = time.perf_counter()
        rows = [row for row in rows if row.part != part]
        rows += run_part(part, LIMITS[part] if has_gpu() else None)
        if path:
            common.save(rows, path)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join([*speed.made_on(rows), *tables(rows)]))


if __name__ == "__main__":
    main()
