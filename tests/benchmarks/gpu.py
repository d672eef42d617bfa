"""Try a card: python tests/benchmarks/gpu.py (at most 8 minutes on one H100)

Each part runs in a process and under a time limit of its own, prints what it finds as it finds it,
and leaves that in the file of results even if the machine goes away during a later part.

    gradients      attention kernel by kernel, on the tiny Flux: gradients against PyTorch's plain
                   attention, velocities against float32
    steps          seconds, matrix rate and peak memory of a training step on FLUX.1-dev's own
                   configuration with random weights: eager, compiled, some blocks recomputed;
                   sampling in 3 steps
    full           flux_distill.py on a whole pipeline of that configuration (34 GB, in a RAM disk
                   where there is room): seconds and peak memory of each phase
    demonstration  the tiny Flux distilled in bfloat16, as in the README

Without a GPU the same parts run on a small configuration, as a test of this script.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import common
import common_flux
import speed
import torch
from common_flux import TINY
from diffusers import AutoencoderKL, FluxPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import flux_distill as fd

LIMITS = {"gradients": 30, "steps": 200, "full": 180, "demonstration": 70}  # seconds, on a GPU
DEMONSTRATION = f"--model {TINY} --prompts {TINY}/prompts.txt {common_flux.DEMONSTRATION}"
LENGTHS = {
    True: "--validate-every 20",
    False: "--iterations 3 --validate-every 3 --limit 8 --held-out 6 --noises 2 --batch 4",
}
FULL = f"""--prompts {TINY}/prompts.txt --limit 4 --batch 4 --iterations 4 --validate-every 4
    --held-out 2 --noises 2 --resolution 256"""
EAGER = ["--recompute-every", "1"]
HALF = ["--recompute-every", "2"]
STEPS = {  # pixels, batch, flags
    True: [
        (512, 8, EAGER),
        (512, 8, HALF),
        (512, 8, [*EAGER, "--compile"]),
        (512, 8, [*HALF, "--compile"]),
        (512, 1, EAGER),
        (1024, 1, EAGER),
        (512, 16, EAGER),
        (1024, 4, EAGER),
        (512, 16, [*EAGER, "--compile"]),
    ],
    False: [(64, 2, EAGER), (64, 2, HALF)],
}
KERNELS = {
    "in use": "native",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "cuDNN": "_native_cudnn",
}

# ------------------------------------------------------------------------------------------- parts


def gradients(on_gpu: bool) -> Iterator[dict]:
    """A row for each attention kernel: relative differences, or what the kernel said."""
    with tempfile.TemporaryDirectory() as out:
        words = [*DEMONSTRATION.split(), "--limit", "6", "--held-out", "3", "--out", out]
        settings = fd.parse(words)
        world = common_flux.TinyFlux(settings)
        for name, backend in KERNELS.items():
            if name != "in use" and not on_gpu:
                continue
            try:
                with fd.attention_backend(backend):
                    found = fd.device_errors(settings, world.cache, world.lora)
                    yield {"kernel": name, **found}
            except RuntimeError as error:
                yield {"kernel": name, "error": str(error).splitlines()[0][:100]}


def steps(on_gpu: bool) -> Iterator[dict]:
    """Device checks at full size, sampling, then a row for each size and way of training."""
    peak = speed.matmul_peak("cuda") if on_gpu else None
    if peak:
        yield {"matmul_tflops": peak / 1e12}
    model = speed.RandomFlux(fd.Machine(), speed.DEV if on_gpu else speed.SMALL)
    for pixels in (512, 1024) if on_gpu else (64,):
        yield {"sampling": pixels, "seconds": speed.sampling_seconds(model, pixels)}
    pixels, batch = (512, 8) if on_gpu else (64, 2)
    with tempfile.TemporaryDirectory() as out:
        prepared = speed.Prepared(model, pixels, batch, out, [])
        began = time.perf_counter()
        found = fd.device_errors(prepared.settings, prepared.cache, prepared.lora)
        yield {"checks": found, "seconds": time.perf_counter() - began}
        prepared.close()
    for pixels, batch, flags in STEPS[on_gpu]:
        began = time.perf_counter()
        row = speed.timed_step(model, pixels, batch, flags, 5, peak)
        yield row | {"whole": time.perf_counter() - began}


def full(on_gpu: bool) -> Iterator[dict]:
    """flux_distill.py end to end on a folder of FLUX.1-dev's configuration."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("ROOMY")) as folder:
        model = Path(folder) / "model"
        began = time.perf_counter()
        command = [sys.executable, __file__, "--make-pipeline", str(model)]
        subprocess.run(command, check=True)
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        made = {"made": time.perf_counter() - began, "bytes": size}
        yield made | {"in_memory": "ROOMY" in os.environ}
        more = [] if on_gpu else ["--resolution", "32"]
        with tempfile.TemporaryDirectory() as out:
            yield distilled(out, "--model", str(model), *FULL.split(), *more)


def demonstration(on_gpu: bool) -> Iterator[dict]:
    """The results of the tiny demonstration and its seconds as a process."""
    with tempfile.TemporaryDirectory() as out:
        yield distilled(out, *DEMONSTRATION.split(), *LENGTHS[on_gpu].split())


PARTS = {"gradients": gradients, "steps": steps, "full": full, "demonstration": demonstration}


def distilled(out: str, *flags: str) -> dict:
    """Run flux_distill.py; its seconds as a process, and what results.json says."""
    began = time.perf_counter()
    command = [sys.executable, str(common.ROOT / "flux_distill.py"), "--out", out, *flags]
    env = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}  # common.py's
    done = subprocess.run(command, cwd=common.ROOT, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        return {"seconds": seconds, "error": (done.stdout + done.stderr)[-1500:]}
    results = json.loads((Path(out) / "results.json").read_text())
    told = [line for line in done.stdout.splitlines() if "an iteration; training takes" in line]
    row = {"seconds": seconds, "told": told}
    row |= {name: results[name] for name in ("phases", "table", "self_check", "seed_to_seed")}
    return row | {name: results["adapter"][name] for name in ("checks", "relative_change")}


def make_pipeline(folder: Path, on_gpu: bool) -> None:
    """A pipeline of FLUX.1-dev's own configuration, or the tiny Flux, with random weights."""
    dtype = torch.bfloat16 if on_gpu else torch.float32
    parts = {}
    if on_gpu:
        torch.set_default_dtype(dtype)
        with torch.device("cuda"):
            clip = CLIPTextModel(CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, projection_dim=768, bos_token_id=0, eos_token_id=1,
                pad_token_id=1))  # fmt: skip
            t5 = T5EncoderModel(T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1))  # fmt: skip
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
                up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
                layers_per_block=2, norm_num_groups=32, sample_size=1024, use_quant_conv=False,
                use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)  # fmt: skip
            net = speed.FluxTransformer2DModel(**speed.DEV)
        parts = {"text_encoder": clip, "text_encoder_2": t5, "vae": vae, "transformer": net}
        torch.set_default_dtype(torch.float32)
    pipe = FluxPipeline.from_pretrained(TINY, dtype=dtype, **parts)
    if on_gpu:  # of the tiny Flux's text side only the tokenizers stay; they pad to 256, as T5's
        pipe.tokenizer_2.model_max_length = 512
    pipe.save_pretrained(folder)


# ------------------------------------------------------------------------------------------- tables

CHECKS = ("gradient", "teacher", "student", "pipeline")


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    kernels = [row.found for row in common.where(rows, "gradients") if "kernel" in row.found]
    if kernels:
        cells = []
        for found in kernels:
            differences = [f"{found[name]:.2g}" for name in CHECKS if name in found]
            cells.append([found["kernel"], *(differences or [found["error"], "", "", ""])])
        lines += common.table(["attention kernel, tiny Flux", *CHECKS], cells)
    lines += tables_of_steps([row.found for row in common.where(rows, "steps")])
    for part in ("demonstration", "full"):
        for row in common.where(rows, part):
            lines += tables_of_run(part, row.found)
    notes = [(row.part, row.found["stopped"]) for row in rows if "stopped" in row.found]
    return lines + [f"{part}: {note}" for part, note in notes]


def tables_of_steps(rows: list[dict]) -> list[str]:
    lines = []
    for found in rows:
        if "checks" in found:
            cells = ["full size", *(f"{found['checks'][name]:.2g}" for name in CHECKS)]
            lines += common.table(["kernels in use", *CHECKS], [cells])
        if "sampling" in found:
            pixels, seconds = found["sampling"], found["seconds"]
            lines += [f"{pixels} px, 3 steps, the latents of one image: {seconds:.2f} s"]
        if "matmul_tflops" in found:
            lines += [f"bfloat16 matrix product: {found['matmul_tflops']:.0f} TFLOP/s"]
    timed = [speed.line_of(found) for found in rows if "pixels" in found]
    return lines + common.table(speed.HEAD, timed) if timed else lines


def tables_of_run(part: str, found: dict) -> list[str]:
    if "error" in found:
        return [f"{part}: failed after {found['seconds']:.0f} s: {found['error']}"]
    if "phases" not in found:
        return []
    cells = []
    for name, phase in found["phases"].items():
        peak = f"{phase['peak_gib']:.1f}" if phase["peak_gib"] else ""
        cells.append([name, f"{phase['seconds']:.0f}", peak])
    cells.append(["the whole process", f"{found['seconds']:.0f}", ""])
    lines = common.table([f"{part}, phase", "seconds", "peak GiB"], cells)
    ends = {(row["sampler"], row["steps"]): row["rmse"] for row in found["table"]}
    teacher, student = ends["teacher", 3], ends["student", 3]
    return [*lines, f"3 steps: teacher {teacher:.3f}, student {student:.3f}"]


# -------------------------------------------------------------------------------- running the parts


def run_part(name: str, on_gpu: bool, limit: float | None) -> list[dict]:
    """The rows of a part, those before its time was up included.

    Nothing of it outlives its time: neither processes, which would slow the next part, nor files.
    """
    shared = Path("/dev/shm")
    roomy = on_gpu and shared.is_dir() and shutil.disk_usage(shared).free > 40e9
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        env = os.environ | {"TMPDIR": folder}
        if roomy:
            env["ROOMY"] = stack.enter_context(tempfile.TemporaryDirectory(dir=shared))
        rows = Path(folder) / "rows"
        rows.touch()
        command = [sys.executable, __file__, "--part", name, "--rows", str(rows)]
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
        found = [json.loads(line) for line in rows.read_text().splitlines()]
    return [*found, {"stopped": note}] if note else found


def write_rows(part: str, file: Path) -> None:
    """In the process of a part: append its rows to a file, one by one."""
    on_gpu = torch.cuda.is_available()
    for row in PARTS[part](on_gpu):
        with open(file, "a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:600], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in order")
    parser.add_argument("--results", type=Path, default=common.RESULTS / "gpu.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-pipeline", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make_pipeline:
        make_pipeline(args.make_pipeline, torch.cuda.is_available())
        return
    if args.part:
        write_rows(args.part, args.rows)
        return
    on_gpu = torch.cuda.device_count() > 0
    results = [row for row in common.load(args.results) if row.part not in args.parts]
    for part in args.parts:
        began = time.perf_counter()
        found = run_part(part, on_gpu, LIMITS[part] if on_gpu else None)
        seconds = time.perf_counter() - began
        for i, row in enumerate(found):
            of_part = {"row": i}
            results.append(
                common.Row(part, of_part, 1.0, common.as_kept(row), seconds, common.origin())
            )
        common.save(results, args.results)
        print(f"{part}: {seconds:.0f} s", flush=True)
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
