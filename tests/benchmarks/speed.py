"""How near a step is to its network calls: python tests/benchmarks/speed.py (90 s on 2 CPU cores)

The floor of a step is its calls of the network: teacher and average without gradient, student
forward and backward. Trains with flux_distill.train itself, on random weights and cached noise, and
takes the time within those calls and between the starts of steps. On a CPU: a Flux of 124 million
parameters. On a CUDA device: FLUX.1-dev's own configuration, built there in bfloat16, with peak
memory and the share of the rate of a large matrix product; then, at one size, compiled blocks and
other attention kernels. First, what sampling with the adapter takes, without text encoders and VAE.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils.flop_counter import FlopCounterMode

import flux_distill as fd
from flux_distill import FluxPipeline, FluxTransformer2DModel

TINY = Path(__file__).parents[1] / "tiny_flux"
DEV = dict(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38,
           axes_dims_rope=(16, 56, 56), in_channels=64, joint_attention_dim=4096,
           pooled_projection_dim=768, guidance_embeds=True)  # fmt: skip
MEDIUM = DEV | dict(num_attention_heads=8, attention_head_dim=96, num_layers=3, num_single_layers=6,
                    axes_dims_rope=(16, 40, 40))  # fmt: skip
SMALL = MEDIUM | dict(num_attention_heads=2, num_layers=1, num_single_layers=1)
CONFIGS = {"dev": DEV, "medium": MEDIUM, "small": SMALL}
SIZES = {"cuda": {512: (1, 4, 8, 16), 1024: (1, 4)}, "cpu": {256: (2,)}}  # pixels: batches
BEST = {"cuda": (512, 8), "cpu": (256, 2)}  # the size on which variants are tried
HEADS = ("pixels", "batch", "flags", "step, s", "its calls, s", "ratio", "TFLOP/s", "GiB")
RECOMPUTE = (("--recompute-every", "1"), ("--recompute-every", "0"))


class Clock:
    """Seconds within network calls and backward passes, and when steps start."""

    def __init__(self, device: str):
        self.device, self.inside, self.starts = device, 0.0, []
        self.originals = FluxTransformer2DModel.forward, torch.Tensor.backward, fd.sc.sample_windows

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function):
        def wrapped(*args, **kwargs):
            began = self.now()
            result = function(*args, **kwargs)
            self.inside += self.now() - began
            return result

        return wrapped

    def __enter__(self):
        forward, backward, windows = self.originals
        FluxTransformer2DModel.forward = self.timed(forward)
        torch.Tensor.backward = self.timed(backward)
        fd.sc.sample_windows = lambda *a, **k: (
            self.starts.append((self.now(), self.inside)) or windows(*a, **k)
        )
        return self

    def __exit__(self, *_):
        FluxTransformer2DModel.forward, torch.Tensor.backward, fd.sc.sample_windows = self.originals

    def steps(self) -> list[tuple[float, float]]:
        """Seconds of each step and of its calls, without the first two: they warm up."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(self.starts)][2:]


class Silent:
    """In place of fd.Validation: pictures and lam* are not part of a step."""

    seconds = 0.0  # of a call, for the forecast

    def __init__(self, args, adapter):
        self.args = args

    def report(self, weights, name):
        return {f"lam_{n}": 1.0 for n in self.args.steps} | {"rmse": 1.0, "teacher_rmse": 2.0}


def train_alone() -> None:
    """From here on fd.train neither validates nor writes its last checkpoint."""
    fd.Validation = Silent
    fd.save_state = lambda *_: None


def build(device: str, config: dict) -> FluxPipeline:
    """A pipeline without a text side, around a transformer of random weights."""
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        net = FluxTransformer2DModel(**config)
    torch.set_default_dtype(torch.float32)
    absent = dict.fromkeys(fd.TEXT_SIDE)
    pipe = FluxPipeline.from_pretrained(TINY, transformer=net.requires_grad_(False), **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepared(pipe: FluxPipeline, pixels: int, batch: int, out: str, *more: str):
    """Settings of a run of this size, its cache filled with noise."""
    flags = f"--model {TINY} --resolution 32 --batch {batch} --limit 2 --held-out 2 --out {out}"
    args = fd.parse([*flags.split(), *more])
    fd.prepare(args)
    fd.set_shift(pipe, args.shift)
    net, args.loaded = pipe.transformer, ("image", pipe)
    args.size, args.channels = (pixels // 16,) * 2, net.config.in_channels
    tokens = 256 if args.device == "cuda" else 64
    for i, key in enumerate(args.keys["text"]):
        text = {"text": torch.randn(tokens, net.config.joint_attention_dim).to(net.dtype),
                "pooled": torch.randn(net.config.pooled_projection_dim).to(net.dtype)}  # fmt: skip
        fd.write_tensors(fd.entry(args, "text", i), text, {"key": key})
    for i, key in enumerate(args.keys["latent"]):
        latent = {"latent": torch.randn(*args.size, args.channels)}
        fd.write_tensors(fd.entry(args, "latent", i), latent, {"key": key})
    return args


def flops_of_a_call(args) -> int:
    """FLOPs of the network's forward on one image."""
    velocity = fd.Adapter(args).velocity(None, args.size)
    cond = fd.read(args, "text", [0]) | {"guidance": torch.ones(1, device=args.device)}
    noise, t = fd.noises(args, [("x",)]), torch.ones(1, device=args.device)
    # Code that Dynamo first meets inside a dispatch mode, it never compiles afterwards.
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity(noise, t, **cond)
    return counter.get_total_flops()


def measure(pipe, pixels: int, batch: int, iterations: int, peak: float | None, *flags: str):
    """A short run of this size, timed: a row of the table, by column."""
    row = {"pixels": pixels, "batch": batch, "flags": " ".join(flags)}
    try:
        with tempfile.TemporaryDirectory() as out:
            more = ["--iterations", str(iterations), "--checkpoint-every", "1000000", *flags]
            args = prepared(pipe, pixels, batch, out, *more)
            args.checks = {}  # a part of its own
            pipe.transformer.disable_gradient_checkpointing()
            flops = flops_of_a_call(args)
            if peak:
                torch.cuda.reset_peak_memory_stats()
            with Clock(args.device) as clock:
                fd.train(args)
        step, calls = (statistics.median(column) for column in zip(*clock.steps()))
        blocks = fd.Adapter(args).blocks
        recomputed = len(blocks[:: args.recompute_every]) if args.recompute_every else 0
        # teacher, EMA, student forward; backward as one more, for weights are frozen
        rate = flops * batch * (4 + recomputed / len(blocks)) / step
        row |= {"step": step, "calls": calls, "tflops": rate / 1e12}
        row["ratio"] = statistics.median(s / c for s, c in clock.steps())
        if peak:
            row["fraction"] = rate / peak
            row["gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    gc.collect()
    fd.free_memory()
    return row


def line_of(row: dict) -> str:
    """A row as a line of the Markdown table."""
    if "note" in row:
        cells = [row["note"], *[""] * 4]
    else:
        fraction = f" ({row['fraction']:.0%})" if "fraction" in row else ""
        cells = [f"{row['step']:.3f}", f"{row['calls']:.3f}", f"{row['ratio']:.3f}"]
        cells += [f"{row['tflops']:.3g}{fraction}", f"{row['gib']:.1f}" if "gib" in row else ""]
    return f"| {row['pixels']} | {row['batch']} | {row['flags']} | {' | '.join(cells)} |"


def sampling(pipe, pixels: int, steps: int = 3, repeats: int = 5) -> float:
    """Seconds in which the stock pipeline makes the latents of one picture, adapter switched on."""
    with tempfile.TemporaryDirectory() as out:
        args, times = prepared(pipe, pixels, 1, out), []
        adapter = fd.Adapter(args)
        adapter.use(adapter.switch.weights.float())
        cond, noise = fd.held_out(args, [0], "speed")
        for _ in range(repeats + 1):  # the first warms up
            began = time.perf_counter()
            fd.sample(args, pipe, cond, noise[:1], steps).cpu()
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matmul_peak(device: str, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    parser.add_argument("--iterations", type=int, default=12, help="steps of each case, 4 or more")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU")
    parser.add_argument("--config", choices=CONFIGS, help="default: dev on CUDA, else medium")
    parts = ("steps", "variants", "sampling")
    parser.add_argument("--parts", nargs="+", choices=parts, help="default: all on CUDA, else no"
                        " variants: there compiling takes minutes")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train_alone()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu, sizes = device == "cuda", SIZES[device]
    parts = args.parts or (parts if on_gpu else ("steps", "sampling"))
    peak = matmul_peak(device) if on_gpu else None
    name = torch.cuda.get_device_name() if on_gpu else f"{args.threads} CPU threads"
    pipe = build(device, CONFIGS[args.config or ("dev" if on_gpu else "medium")])
    print(f"{name}, PyTorch {torch.__version__},", f"{pipe.transformer.num_parameters() / 1e6:.0f}",
          "million parameters")  # fmt: skip
    if on_gpu:
        print(f"bfloat16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    for pixels in sizes if "sampling" in parts else ():
        print(f"{pixels} px, 3 steps, the latents of one picture: {sampling(pipe, pixels):.2f} s")
    if {"steps", "variants"} & {*parts}:
        print(f"| {' | '.join(HEADS)} |")
        print("|---" * len(HEADS) + "|")
    for pixels, batches in sizes.items() if "steps" in parts else ():
        for batch, flags in itertools.product(batches, RECOMPUTE):
            print(line_of(measure(pipe, pixels, batch, args.iterations, peak, *flags)), flush=True)
    if "variants" in parts:  # last, for blocks stay compiled
        case = (pipe, *BEST[device], args.iterations, peak)
        for every in ("2", "4"):
            print(line_of(measure(*case, "--recompute-every", every)), flush=True)
        print(line_of(measure(*case, "--compile")), flush=True)


if __name__ == "__main__":
    main()
