"""How near a step is to its network calls: python tests/benchmarks/speed.py (90 s on 2 CPU cores)

The floor of a step is its calls of the network: teacher and average without gradient, student
forward and backward. Trains with flux_distill.train itself, on random weights and cached noise, and
takes the time within those calls and between the starts of steps. On a CPU: a Flux of 124 million
parameters. On a CUDA device: FLUX.1-dev's own configuration, built there in bfloat16, with peak
memory and the share of the rate of a large matrix product.
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
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

import flux_distill as fd

TINY = Path(__file__).parents[1] / "tiny_flux"
DEV = dict(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38,
           axes_dims_rope=(16, 56, 56), in_channels=64, joint_attention_dim=4096,
           pooled_projection_dim=768, guidance_embeds=True)  # fmt: skip
MEDIUM = DEV | dict(num_attention_heads=8, attention_head_dim=96, num_layers=3, num_single_layers=6,
                    axes_dims_rope=(16, 40, 40))  # fmt: skip
CASES = {  # configuration, text tokens, (pixels, batches)
    "cpu": (MEDIUM, 64, [(256, (2,))]),
    "cuda": (DEV, 256, [(512, (1, 4, 8, 16)), (1024, (1, 4))]),
}


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

    def __init__(self, args, adapter):
        self.args = args

    def report(self, weights, name):
        return {f"lam_{n}": 1.0 for n in self.args.steps} | {"rmse": 1.0, "teacher_rmse": 2.0}


def train(device, config, tokens, pixels, batch, checkpointing, iterations, out):
    """Time of a step, of its calls, FLOPs of a forward of one image, parameters, peak GiB."""
    flags = f"--model {TINY} --resolution 32 --rank 64 --batch {batch} --limit 2 --held-out 2"
    flags += f" --iterations {iterations} --checkpoint-every 1000000 --out {out}"
    args = fd.parse(flags.split() + ([] if checkpointing else ["--no-checkpointing"]))
    fd.prepare(args)
    args.size, args.channels = (pixels // 16,) * 2, config["in_channels"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        net = FluxTransformer2DModel(**config)
    torch.set_default_dtype(torch.float32)
    pipe = FluxPipeline.from_pretrained(
        TINY, transformer=net.requires_grad_(False), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    args.loaded, fd.Validation = ("image", pipe), Silent
    for i, key in enumerate(args.keys["text"]):
        text = {"text": torch.randn(tokens, config["joint_attention_dim"]).to(dtype),
                "pooled": torch.randn(config["pooled_projection_dim"]).to(dtype)}  # fmt: skip
        fd.write_tensors(fd.entry(args, "text", i), text, {"key": key})
    for i, key in enumerate(args.keys["latent"]):
        latent = {"latent": torch.randn(*args.size, args.channels)}
        fd.write_tensors(fd.entry(args, "latent", i), latent, {"key": key})
    velocity = fd.Adapter(args).velocity(None, args.size)
    cond = fd.read(args, "text", [0]) | {"guidance": torch.ones(1, device=device)}
    x = torch.randn(1, args.size[0] * args.size[1], args.channels, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity(x, torch.ones(1, device=device), **cond)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Clock(device) as clock:
        fd.train(args)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    count = sum(p.numel() for name, p in net.named_parameters() if "lora" not in name)
    return clock.steps(), counter.get_total_flops(), count, peak


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
    parser.add_argument("--iterations", type=int, default=12, help="steps of each case")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, tokens, sizes = CASES[device]
    peak = matmul_peak(device) if device == "cuda" else None
    name = torch.cuda.get_device_name() if peak else f"{args.threads} CPU threads"
    print(f"{name}, PyTorch {torch.__version__}")
    if peak:
        print(f"bfloat16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    heads = "pixels", "batch", "checkpointing", "step, s", "its calls, s", "ratio", "TFLOP/s", "GiB"
    print(f"| {' | '.join(heads)} |")
    print("|---" * 8 + "|")
    for pixels, batches in sizes:
        for batch, checkpointing in itertools.product(batches, (True, False)):
            cells = [str(pixels), str(batch), "yes" if checkpointing else "no"]
            try:
                with tempfile.TemporaryDirectory() as out:
                    steps, flops, count, memory = train(
                        device, config, tokens, pixels, batch, checkpointing, args.iterations, out
                    )
                step, calls = (statistics.median(column) for column in zip(*steps))
                ratio = statistics.median(s / c for s, c in steps)
                # teacher, average, student forward; backward twice that but for frozen weights
                total = flops * batch * (4 + (1 if checkpointing else 0))
                rate = total / step / 1e12
                share = f" ({rate * 1e12 / peak:.0%})" if peak else ""
                cells += [f"{step:.3f}", f"{calls:.3f}", f"{ratio:.3f}", f"{rate:.3g}{share}"]
                cells.append(f"{memory:.1f}" if memory else "")
            except torch.OutOfMemoryError:
                cells += ["out of memory", "", "", "", ""]
            print(f"| {' | '.join(cells)} |", flush=True)
            gc.collect()
            fd.free_memory()
    print(f"{count / 1e6:.0f} million parameters; TFLOP/s: counted forward, backward as one more")


if __name__ == "__main__":
    main()
