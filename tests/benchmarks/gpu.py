"""Try a card: python tests/benchmarks/gpu.py (at most 8 minutes on one H100)

Each part runs in a process and under a time limit of its own, prints what it finds as it finds it,
and leaves that in the JSON file even if the machine goes away during a later part.

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

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = ROOT / "tests/tiny_flux"
sys.path[:0] = [str(ROOT), str(HERE)]

LIMITS = {"gradients": 30, "steps": 200, "full": 180, "demonstration": 70}  # seconds, on a GPU
DEMONSTRATION = f"""--model {TINY} --prompts {TINY}/prompts.txt --resolution 32 --shift 1
    --shift-range 1 1 --batch 64 --learning-rate 1e-3 --recompute-every 0 --noises 8"""
LENGTHS = {  # whether on a GPU: flags
    True: "--iterations 200 --validate-every 20",
    False: "--iterations 3 --validate-every 3 --limit 8 --held-out 6 --noises 2 --batch 4",
}
FULL = f"""--prompts {TINY}/prompts.txt --limit 4 --batch 4 --iterations 4 --validate-every 4
    --held-out 2 --noises 2 --resolution 256"""
EAGER = ("--recompute-every", "1")
HALF = ("--recompute-every", "2")
CASES = {  # whether on a GPU: pixels, batch, flags
    True: [(512, 8, EAGER), (512, 8, HALF), (512, 8, (*EAGER, "--compile")),
           (512, 8, (*HALF, "--compile")), (512, 1, EAGER), (1024, 1, EAGER), (512, 16, EAGER),
           (1024, 4, EAGER), (512, 16, (*EAGER, "--compile"))],
    False: [(64, 2, EAGER), (64, 2, HALF)],
}  # fmt: skip
KERNELS = {  # attention: backend of diffusers
    "in use": "native", "flash": "_native_flash", "efficient": "_native_efficient",
    "cuDNN": "_native_cudnn",
}  # fmt: skip
CHECKS = ("gradient", "teacher", "student", "pipeline")  # of flux_distill.py's device check

# -------------------------------------------------------------------- parts, and the rows they find


def gradients(on_gpu: bool) -> Iterator[dict]:
    """A row for each attention kernel: relative differences, or what the kernel said."""
    import flux_distill as fd

    with tempfile.TemporaryDirectory() as out:
        more = ["--limit", "6", "--held-out", "3", "--out", out]
        settings = fd.parse([*DEMONSTRATION.split(), *more])
        _, cache = fd.prepare(settings, fd.Machine())
        fd.fill_cache(settings, cache)
        model = cache.model
        lora = fd.LoRA(model.family, model.load("image").transformer, settings)
        for name in KERNELS if on_gpu else ["in use"]:
            try:
                with fd.attention_backend(KERNELS[name]):
                    yield {"kernel": name} | fd.device_errors(settings, cache, lora)
            except RuntimeError as error:
                yield {"kernel": name, "error": str(error).splitlines()[0][:100]}


def steps(on_gpu: bool) -> Iterator[dict]:
    """Sampling and device checks at full size, then a row for each size and way of training."""
    import speed

    config = speed.DEV if on_gpu else speed.SMALL
    peak = speed.matmul_peak() if on_gpu else None
    yield {"matmul_tflops": peak / 1e12 if on_gpu else None}
    for pixels in (512, 1024) if on_gpu else (64,):
        yield {"sampling": pixels, "seconds": speed.sampling(config, pixels)}
    pixels, batch, _ = CASES[on_gpu][0]
    yield checks_of(config, pixels, batch)
    for pixels, batch, flags in CASES[on_gpu]:
        began = time.perf_counter()
        row = speed.measure(config, pixels, batch, 4, peak, *flags)
        yield row | {"whole": time.perf_counter() - began}


def checks_of(config: dict, pixels: int, batch: int) -> dict:
    """The device check on a transformer of this config, and its seconds."""
    import speed

    import flux_distill as fd

    with speed.random_run(config, pixels, batch) as run:
        began = time.perf_counter()
        found = fd.device_errors(run.settings, run.cache, run.lora)
        return {"checks": found, "seconds": time.perf_counter() - began}


def full(on_gpu: bool) -> Iterator[dict]:
    """flux_distill.py end to end on a folder of FLUX.1-dev's configuration."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("ROOMY")) as folder:
        model = Path(folder) / "model"
        began = time.perf_counter()
        command = [sys.executable, __file__, "--make-pipeline", str(model)]
        subprocess.run(command, check=True)
        yield {
            "made": time.perf_counter() - began,
            "in_memory": "ROOMY" in os.environ,
            "bytes": sum(path.stat().st_size for path in model.rglob("*") if path.is_file()),
        }
        more = [] if on_gpu else ["--resolution", "32"]
        with tempfile.TemporaryDirectory() as out:
            yield distilled(out, "--model", str(model), *FULL.split(), *more)


def make_pipeline(folder: Path, on_gpu: bool) -> None:
    """A pipeline of FLUX.1-dev's own configuration, or a small one, with random weights."""
    import torch
    from diffusers import FluxPipeline

    if not on_gpu:
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


def parts_of_dev() -> dict:
    """Text encoders, VAE and transformer of FLUX.1-dev's own configuration."""
    import speed
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

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


def demonstration(on_gpu: bool) -> Iterator[dict]:
    """The results of the tiny demonstration and its seconds as a process."""
    with tempfile.TemporaryDirectory() as out:
        yield distilled(out, *DEMONSTRATION.split(), *LENGTHS[on_gpu].split())


def distilled(out: str, *flags: str) -> dict:
    """Run flux_distill.py; its seconds as a process, and what results.json says."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "flux_distill.py"), "--out", out, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    row = {"seconds": time.perf_counter() - began}
    if done.returncode:
        return row | {"error": (done.stdout + done.stderr)[-1500:]}
    told = [line for line in done.stdout.splitlines() if "per iteration; training takes" in line]
    row["told"] = told
    results = json.loads((Path(out) / "results.json").read_text())
    for name in ("phases", "table", "self_check", "seed_to_seed"):
        row[name] = results[name]
    for name in ("checks", "relative_change"):
        row[name] = results["adapter"][name]
    return row


PARTS = {"gradients": gradients, "steps": steps, "full": full, "demonstration": demonstration}

# --------------------------------------------------------------------------------------- the tables


def table(heads: list[str], lines: list[list]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"


def markdown(results: dict) -> str:
    """The tables of what was found."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    paragraphs = [machine, *about_kernels(results.get("gradients", []))]
    paragraphs += about_steps(results.get("steps", []))
    for part in ("demonstration", "full"):
        for row in results.get(part, []):
            paragraphs += about_run(part, row)
    return "\n".join(paragraphs)


def about_kernels(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["kernel"], row["error"], "", "", ""])
        elif "kernel" in row:
            lines.append([row["kernel"], *differences(row)])
    return [table(["attention kernel, tiny Flux", *CHECKS], lines)] if lines else []


def differences(found: dict[str, float]) -> list[str]:
    return [f"{found[name]:.2g}" for name in CHECKS]


def about_steps(rows: list[dict]) -> list[str]:
    import speed

    paragraphs, measured = [], []
    for row in rows:
        if "checks" in row:
            line = ["full size", *differences(row["checks"])]
            paragraphs.append(table(["kernels in use", *CHECKS], [line]))
        elif "sampling" in row:
            paragraphs.append(f"{row['sampling']} px, 3 steps, the latents of one image:"
                              f" {row['seconds']:.2f} s\n")  # fmt: skip
        elif row.get("matmul_tflops"):
            paragraphs.append(f"bfloat16 matrix product: {row['matmul_tflops']:.0f} TFLOP/s\n")
        elif "pixels" in row:
            measured.append(speed.line_of(row))
    if measured:
        head = f"| {' | '.join(speed.HEADS)} |\n|{'---|' * len(speed.HEADS)}"
        paragraphs.append("\n".join([head, *measured]) + "\n")
    return paragraphs


def about_run(part: str, row: dict) -> list[str]:
    """Of a run of flux_distill.py: seconds and memory by phase, and where the student ends."""
    if "error" in row:
        return [f"{part}: failed after {row['seconds']:.0f} s: {row['error']}\n"]
    if "phases" not in row:
        return []
    lines = []
    for name, phase in row["phases"].items():
        memory = f"{phase['peak_gib']:.1f}" if phase["peak_gib"] else ""
        lines.append([name, f"{phase['seconds']:.0f}", memory])
    lines.append(["the whole process", f"{row['seconds']:.0f}", ""])
    ends = {(cell["sampler"], cell["steps"]): cell["rmse"] for cell in row["table"]}
    return [
        table([f"{part}, phase", "seconds", "peak GiB"], lines),
        f"3 steps: teacher {ends['teacher', 3]:.3f}, student {ends['student', 3]:.3f}\n",
    ]


# --------------------------------------------------------------------------------- one process each


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
    if note:
        found.append({"stopped": note})
    return found


def write_rows(part: str, path: Path, on_gpu: bool) -> None:
    """Run a part in this process; its rows are written and printed as they come."""
    for row in PARTS[part](on_gpu):
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:600], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in order")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-pipeline", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    if args.make_pipeline:
        make_pipeline(args.make_pipeline, on_gpu)
    elif args.part:
        write_rows(args.part, args.rows, on_gpu)
    else:
        try_all(args.parts, args.out, on_gpu)


def try_all(parts: list[str], out: Path, on_gpu: bool) -> None:
    import flux_distill as fd

    results = {"machine": fd.Machine().describe()}
    for part in parts:
        began = time.perf_counter()
        results[part] = run_part(part, on_gpu, LIMITS[part] if on_gpu else None)
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
