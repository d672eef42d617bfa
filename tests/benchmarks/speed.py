"""How near a training step is to its network calls: python tests/benchmarks/speed.py

No step can be faster than the calls of the network that it makes: the teacher twice and the slow
EMA once without a gradient, the student forward and backward. Steps of flux_distill.train, on
random weights and cached noise, are timed in turn with such calls alone. On a CPU: a Flux of 124
million parameters (2 minutes on 2 cores). On a CUDA device: FLUX.1-dev's own configuration, built
there in bfloat16, with peak memory and the fraction of the rate of a large matrix product; then,
at one size, fewer recomputed blocks and compiled ones. First it prints what sampling with the LoRA
takes, without text encoders and VAE.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils.flop_counter import FlopCounterMode

import flux_distill as fd
from flux_distill import Flux, FluxPipeline, FluxTransformer2DModel

TINY = Path(__file__).parents[1] / "tiny_flux"
DEV = dict(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38,
           axes_dims_rope=(16, 56, 56), in_channels=64, joint_attention_dim=4096,
           pooled_projection_dim=768, guidance_embeds=True)  # fmt: skip
MEDIUM = DEV | dict(num_attention_heads=8, attention_head_dim=96, num_layers=3, num_single_layers=6,
                    axes_dims_rope=(16, 40, 40))  # fmt: skip
SMALL = MEDIUM | dict(num_attention_heads=2, num_layers=1, num_single_layers=1)
VAE = {"block_out_channels": (128, 256, 512, 512)}  # latents are an eighth of the pixels
CONFIGS = {"dev": DEV, "medium": MEDIUM, "small": SMALL}
TEXT_TOKENS = {"cuda": 256, "cpu": 64}
SIZES = {"cuda": {512: (1, 4, 8, 16), 1024: (1, 4)}, "cpu": {256: (2,)}}  # pixels: batches
BEST = {"cuda": (512, 8), "cpu": (256, 2)}  # the size at which variants are tried
HEADS = ("pixels", "batch", "flags", "step, s", "its calls, s", "ratio", "TFLOP/s", "GiB")
RECOMPUTE = (("--recompute-every", "1"), ("--recompute-every", "0"))
WARM_UP = 2  # steps that are not timed


def random_model(machine: fd.Machine, config: dict) -> fd.Model:
    """Flux with random weights in a transformer of this config, the image side loaded."""
    fd.free_memory()
    model = fd.Model(str(TINY), machine, None)
    model.download()
    model.config = config
    model.vae_config = VAE
    torch.set_default_dtype(machine.dtype)
    with torch.device(machine.device):
        net = FluxTransformer2DModel(**config)
    torch.set_default_dtype(torch.float32)
    absent = dict.fromkeys(Flux.text_side)
    model.pipe = FluxPipeline.from_pretrained(TINY, transformer=net.requires_grad_(False), **absent)
    model.pipe.set_progress_bar_config(disable=True)
    model.loaded = "image"
    return model


@contextmanager
def random_run(config: dict, pixels: int, batch: int, *flags: str):
    """A run of this size on random weights, its cache filled with noise: settings, cache, LoRA."""
    machine = fd.Machine()
    with tempfile.TemporaryDirectory() as out:
        few = ["--model", str(TINY), "--out", out, "--limit", "2", "--held-out", "2"]
        size = ["--resolution", str(pixels), "--batch", str(batch)]
        settings = fd.parse([*few, *size, *flags])
        model = random_model(machine, config)
        data = fd.read_data(settings, model)
        cache = fd.Cache(settings, model, data)
        tokens = TEXT_TOKENS[machine.device]
        for i in range(len(data.text_keys)):
            text = torch.randn(tokens, config["joint_attention_dim"]).to(machine.dtype)
            pooled = torch.randn(config["pooled_projection_dim"]).to(machine.dtype)
            cache.write("text", i, {"text": text, "pooled": pooled})
        for i in range(len(data.latent_keys)):
            cache.write("latent", i, {"latent": torch.randn(model.latent_shape(pixels))})
        lora = fd.LoRA(Flux, model.pipe.transformer, settings)
        yield SimpleNamespace(settings=settings, cache=cache, lora=lora)


def seconds_of(function, machine: fd.Machine) -> float:
    """How long a call takes, until the device has done it."""
    if machine.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def input_of_network(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    """A batch, as Flux.velocity takes it."""
    rows = run.settings.batch
    x = run.cache.noise([("speed", i) for i in range(rows)])
    texts = [i % len(run.cache.data.texts) for i in range(rows)]
    t = torch.full((rows,), 0.5, device=x.device)
    return {"x": x, "t": t} | run.cache.conditions(texts, run.settings.guidance)


def calls_of_a_step(lora: fd.LoRA, batch: dict[str, torch.Tensor]) -> None:
    """The network calls of a training step and its backward pass, and nothing else."""
    with torch.no_grad():
        lora.switch.on = False
        Flux.velocity(lora.net, **batch)  # the teacher
        Flux.velocity(lora.net, **batch)
        lora.switch.on = True
        Flux.velocity(lora.net, **batch)  # the slow EMA
    v = Flux.velocity(lora.net, **batch)  # the student
    v.square().mean().backward()
    for parameter in lora.params:
        parameter.grad = None


def timed_steps(run: SimpleNamespace, count: int) -> list[tuple[float, float]]:
    """Seconds of each training step, and of its network calls alone; without the first ones."""
    machine = run.cache.machine
    state = fd.TrainState(run.lora.initial_weights(), run.settings)
    steps = fd.train(run.settings, run.cache, fd.read_pool(run.cache), run.lora, state)
    batch, seconds = input_of_network(run), []
    while state.iteration < count:
        step = seconds_of(lambda: next(steps), machine)
        if state.iteration > WARM_UP:
            calls = seconds_of(lambda: calls_of_a_step(run.lora, batch), machine)
            seconds.append((step, calls))
    return seconds


def flops_of_a_step(run: SimpleNamespace) -> int:
    """FLOPs of a training step's network calls; recomputed blocks count again."""
    row = {name: value[:1] for name, value in input_of_network(run).items()}
    eager = torch.compiler.set_stance("force_eager")  # compiled kernels are not counted
    with eager, FlopCounterMode(display=False) as counter:
        calls_of_a_step(run.lora, row)
    return counter.get_total_flops() * run.settings.batch


def measure(
    config: dict, pixels: int, batch: int, steps: int, peak: float | None, *flags: str
) -> dict:
    """A short run of this size, timed: a row of the table, by column.

    peak: FLOP/s of a large matrix product, on CUDA.
    """
    row = {"pixels": pixels, "batch": batch, "flags": " ".join(flags)}
    try:
        with random_run(config, pixels, batch, *flags) as run:
            if peak:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed_steps(run, steps)
            if peak:
                row["gib"] = run.cache.machine.peak_memory()
            row["step"], row["calls"] = map(statistics.median, zip(*seconds))
            row["ratio"] = statistics.median(step / calls for step, calls in seconds)
            rate = flops_of_a_step(run) / row["step"]
            row["tflops"] = rate / 1e12
            if peak:
                row["fraction"] = rate / peak
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    return row


def line_of(row: dict) -> str:
    """A row as a line of the Markdown table."""
    cells = [row["pixels"], row["batch"], row["flags"]]
    if "note" in row:
        cells += [row["note"], "", "", "", ""]
    else:
        cells += [f"{row[name]:.3f}" for name in ("step", "calls", "ratio")]
        fraction = f" ({row['fraction']:.0%})" if "fraction" in row else ""
        cells.append(f"{row['tflops']:.3g}{fraction}")
        cells.append(f"{row['gib']:.1f}" if "gib" in row else "")
    return f"| {' | '.join(map(str, cells))} |"


def sampling(config: dict, pixels: int, steps: int = 3, repeats: int = 5) -> float:
    """Seconds in which the stock pipeline makes the latents of one image with the LoRA."""
    with random_run(config, pixels, 1) as run:
        cond, noise = run.cache.held_out([0], "speed")
        run.lora.use(run.lora.initial_weights())

        def sample():
            fd.stock_sample(run.cache.model, noise[:1], steps, cond, run.settings.shift, batch=1)

        sample()  # warms up
        return statistics.median(seconds_of(sample, run.cache.machine) for _ in range(repeats))


def matmul_peak(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large matrix product in bfloat16 on CUDA."""
    machine = fd.Machine()
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [seconds_of(lambda: a @ b, machine) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    parser.add_argument("--iterations", type=int, default=8, help="steps of each case, 3 or more")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU")
    parser.add_argument("--config", choices=CONFIGS, help="default: dev on CUDA, else medium")
    parts = ("steps", "variants", "sampling")
    parser.add_argument("--parts", nargs="+", choices=parts, help="default: all on CUDA, else no"
                        " variants: there compiling takes minutes")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = fd.Machine()
    on_gpu, sizes = machine.device == "cuda", SIZES[machine.device]
    parts = args.parts or (parts if on_gpu else ("steps", "sampling"))
    peak = matmul_peak() if on_gpu else None
    config = CONFIGS[args.config or ("dev" if on_gpu else "medium")]
    with torch.device("meta"):
        size = FluxTransformer2DModel(**config).num_parameters() / 1e6
    name = torch.cuda.get_device_name() if on_gpu else f"{args.threads} CPU threads"
    print(f"{name}, PyTorch {torch.__version__}, {size:.0f} million parameters")
    if on_gpu:
        print(f"bfloat16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    if "sampling" in parts:
        for pixels in sizes:
            seconds = sampling(config, pixels)
            print(f"{pixels} px, 3 steps, the latents of one image: {seconds:.2f} s", flush=True)

    cases = []
    if "steps" in parts:
        for pixels, batches in sizes.items():
            cases += itertools.product([pixels], batches, RECOMPUTE)
    if "variants" in parts:
        for flags in (("--recompute-every", "2"), ("--recompute-every", "4"), ("--compile",)):
            cases.append((*BEST[machine.device], flags))
    if cases:
        print(f"| {' | '.join(HEADS)} |")
        print("|---" * len(HEADS) + "|")
    for pixels, batch, flags in cases:
        row = measure(config, pixels, batch, args.iterations, peak, *flags)
        print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
