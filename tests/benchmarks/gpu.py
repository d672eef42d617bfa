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
LENGTHS = {
    True: "--iterations 200 --validate-every 20",
    False: "--iterations 3 --validate-every 3 --limit 8 --held-out 6 --noises 2 --batch 4",
}
FULL = f"""--prompts {TINY}/prompts.txt --limit 4 --batch 4 --iterations 4 --validate-every 4
    --held-out 2 --noises 2 --resolution 256"""
EAGER = ("--recompute-every", "1")
HALF = ("--recompute-every", "2")
STEPS = {  # pixels, batch, flags
    True: [(512, 8, EAGER), (512, 8, HALF), (512, 8, (*EAGER, "--compile")),
           (512, 8, (*HALF, "--compile")), (512, 1, EAGER), (1024, 1, EAGER), (512, 16, EAGER),
           (1024, 4, EAGER), (512, 16, (*EAGER, "--compile"))],
    False: [(64, 2, EAGER), (64, 2, HALF)],
}  # fmt: skip


def gradients(on_gpu: bool):
    """A row for each attention kernel: relative differences, or what the kernel said."""
    import flux_distill as fd

    with tempfile.TemporaryDirectory() as out:
        flags = [*DEMONSTRATION.split(), "--limit", "6", "--held-out", "3", "--out", out]
        args = fd.parse(flags)
        fd.prepare(args)
        fd.make_cache(args)
        adapter = fd.Adapter(args)
        pair = (args.pairs[0].text, fd.read(args, "latent", [0])["latent"][0].cpu())
        choices = {"in use": "native", "flash": "_native_flash", "efficient": "_native_efficient",
                   "cuDNN": "_native_cudnn"}  # fmt: skip
        for name, backend in choices.items() if on_gpu else [("in use", "native")]:
            try:
                with fd.attention_backend(backend):
                    yield {"kernel": name, **fd.device_errors(args, adapter, pair)}
            except RuntimeError as error:
                yield {"kernel": name, "error": str(error).splitlines()[0][:100]}


def demonstration(on_gpu: bool):
    """The results of the tiny demonstration and its seconds as a process."""
    with tempfile.TemporaryDirectory() as out:
        yield distilled(out, *DEMONSTRATION.split(), *LENGTHS[on_gpu].split())


def distilled(out: str, *flags: str) -> dict:
    """Run flux_distill.py; its seconds as a process, and what results.json says."""
    began = time.perf_counter()
    command = [sys.executable, ROOT / "flux_distill.py", "--out", out, *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        return {"seconds": seconds, "error": (done.stdout + done.stderr)[-1500:]}
    results = json.loads((Path(out) / "results.json").read_text())
    told = [line for line in done.stdout.splitlines() if "an iteration; training takes" in line]
    kept = ("phases", "table", "self_check", "seed_to_seed")
    row = {"seconds": seconds, "told": told} | {name: results[name] for name in kept}
    return row | {name: results["adapter"][name] for name in ("checks", "relative_change")}


def steps(on_gpu: bool):
    """Device checks at full size, sampling, then a row for each size and way of training."""
    import speed

    import flux_distill as fd

    device = "cuda" if on_gpu else "cpu"
    peak = speed.matmul_peak(device) if on_gpu else None
    yield {"matmul_tflops": peak and peak / 1e12}
    pipe = speed.build(device, speed.DEV if on_gpu else speed.SMALL)
    for pixels in (512, 1024) if on_gpu else (64,):
        yield {"sampling": pixels, "seconds": speed.sampling(pipe, pixels)}
    with tempfile.TemporaryDirectory() as out:
        args = speed.prepared(pipe, 512 if on_gpu else 64, 8 if on_gpu else 2, out)
        latent = fd.read(args, "latent", [0])["latent"][0].cpu()
        began = time.perf_counter()
        found = fd.device_errors(args, fd.Adapter(args), (args.pairs[0].text, latent))
        yield {"checks": found, "seconds": time.perf_counter() - began}
    speed.train_alone()
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    for pixels, batch, flags in STEPS[on_gpu]:
        began = time.perf_counter()
        if "--compile" not in flags:
            for block in blocks:
                block._compiled_call_impl = None  # of an earlier row
        row = speed.measure(pipe, pixels, batch, 5, peak, *flags)
        yield row | {"whole": time.perf_counter() - began}


def make_pipeline(folder: Path, on_gpu: bool) -> None:
    """A pipeline of FLUX.1-dev's own configuration, or a small one, with random weights."""
    import speed
    import torch
    from diffusers import AutoencoderKL, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if on_gpu else "cpu"):
        if on_gpu:
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
            parts = {"text_encoder": clip, "text_encoder_2": t5, "vae": vae}
            parts["transformer"] = speed.FluxTransformer2DModel(**speed.DEV)
        else:
            parts = {}
    torch.set_default_dtype(torch.float32)
    pipe = FluxPipeline.from_pretrained(TINY, dtype=dtype, **parts)
    if on_gpu:  # of the tiny Flux's text side only the tokenizers stay; they pad to 256, as T5's
        pipe.tokenizer_2.model_max_length = 512
    pipe.save_pretrained(folder)


def full(on_gpu: bool):
    """flux_distill.py end to end on a folder of FLUX.1-dev's configuration."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("ROOMY")) as folder:
        model = Path(folder) / "model"
        began = time.perf_counter()
        command = [sys.executable, __file__, "--make-pipeline", str(model)]
        subprocess.run(command, check=True)
        yield {"made": time.perf_counter() - began, "in_memory": "ROOMY" in os.environ,
               "bytes": sum(p.stat().st_size for p in model.rglob("*") if p.is_file())}  # fmt: skip
        more = [] if on_gpu else ["--resolution", "32"]
        with tempfile.TemporaryDirectory() as out:
            yield distilled(out, "--model", str(model), *FULL.split(), *more)


PARTS = {"gradients": gradients, "steps": steps, "full": full, "demonstration": demonstration}


def table(heads: list[str], lines: list[list]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"


def markdown(results: dict) -> str:
    """The tables of what was found."""
    import speed

    words = [", ".join(f"{name} {value}" for name, value in results["machine"].items())]
    names = ("gradient", "teacher", "student", "pipeline")
    lines = [[row["kernel"], *([f"{row[n]:.2g}" for n in names] if "gradient" in row
                               else [row["error"], "", "", ""])]
             for row in results.get("gradients", []) if "kernel" in row]  # fmt: skip
    if lines:
        words.append(table(["attention kernel, tiny Flux", *names], lines))
    for row in results.get("steps", []):
        if "checks" in row:
            line = ["full size", *(f"{row['checks'][n]:.2g}" for n in names)]
            words.append(table(["kernels in use", *names], [line]))
        if "sampling" in row:
            words.append(f"{row['sampling']} px, 3 steps, the latents of one image:"
                         f" {row['seconds']:.2f} s\n")  # fmt: skip
        if row.get("matmul_tflops"):
            words.append(f"bfloat16 matrix product: {row['matmul_tflops']:.0f} TFLOP/s\n")
    measured = [row for row in results.get("steps", []) if "pixels" in row]
    if measured:
        head = f"| {' | '.join(speed.HEADS)} |\n|{'---|' * len(speed.HEADS)}"
        words.append("\n".join([head, *map(speed.line_of, measured)]) + "\n")
    for part in ("demonstration", "full"):
        for row in results.get(part, []):
            if "error" in row:
                words.append(f"{part}: failed after {row['seconds']:.0f} s: {row['error']}\n")
            elif "phases" in row:
                lines = [[name, f"{phase['seconds']:.0f}",
                          f"{phase['peak_gib']:.1f}" if phase["peak_gib"] else ""]
                         for name, phase in row["phases"].items()]  # fmt: skip
                lines.append(["the whole process", f"{row['seconds']:.0f}", ""])
                words.append(table([f"{part}, phase", "seconds", "peak GiB"], lines))
                ends = {(r["sampler"], r["steps"]): r["rmse"] for r in row["table"]}
                words.append(f"3 steps: teacher {ends['teacher', 3]:.3f}, student"
                             f" {ends['student', 3]:.3f}\n")  # fmt: skip
    return "\n".join(words)


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
        try:
            code = process.wait(limit)
            note = f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            note = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        return found + ([{"stopped": note}] if note else [])


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
        return make_pipeline(args.make_pipeline, on_gpu)
    if args.part:
        for row in PARTS[args.part](on_gpu):
            with open(args.rows, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row)[:600], flush=True)
        return None
    import flux_distill as fd

    results = {"machine": fd.machine("cuda" if on_gpu else "cpu")}
    for part in args.parts:
        began = time.perf_counter()
        results[part] = run_part(part, on_gpu, LIMITS[part] if on_gpu else None)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
