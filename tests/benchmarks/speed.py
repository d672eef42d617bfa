"""How near a step is to its network calls: python tests/benchmarks/speed.py (2 min on 2 CPU cores)

A training step can't be faster than its network calls: two of the teacher and one of the EMA
without gradient, one of the student with its backward pass. Both are timed on random weights and
random latents: steps of flux_distill.train itself, and those calls alone. On a CPU: a Flux of 124
million parameters. On a CUDA device: FLUX.1-dev's own configuration, built there in bfloat16, with
peak memory and the fraction of the rate of a large matrix product; then, at one size, other
recomputation and compiled blocks. And what sampling with the LoRA takes, without text encoders and
VAE.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable

import common
import common_flux
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flux_distill as fd

DEV = dict(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38,
           axes_dims_rope=(16, 56, 56), in_channels=64, joint_attention_dim=4096,
           pooled_projection_dim=768, guidance_embeds=True)  # fmt: skip
MEDIUM = DEV | dict(num_attention_heads=8, attention_head_dim=96, num_layers=3, num_single_layers=6,
                    axes_dims_rope=(16, 40, 40))  # fmt: skip
SMALL = MEDIUM | dict(num_attention_heads=2, num_layers=1, num_single_layers=1)
CONFIGS = {"dev": DEV, "medium": MEDIUM, "small": SMALL}
SIZES = {"dev": {512: (1, 4, 8, 16), 1024: (1, 4)}, "medium": {256: (2,)}}  # pixels: batches
VARIANTS = (["--recompute-every", "2"], ["--recompute-every", "4"], ["--compile"])
RECOMPUTE = (["--recompute-every", "1"], ["--recompute-every", "0"])
STEPS = 12  # of a training that is timed

# --------------------------------------------------------------------------------- a random network


class RandomFlux(fd.Model):
    """A stock pipeline around a transformer of random weights; its VAE and text side are the tiny
    Flux's and not used."""

    def __init__(self, machine: fd.Machine, config: dict):
        super().__init__(str(common_flux.TINY), machine, quantize=None)
        self.download()
        torch.set_default_dtype(machine.dtype)
        with torch.device(machine.device):
            net = FluxTransformer2DModel(**config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        absent = dict.fromkeys(self.family.text_side)
        self.pipe = FluxPipeline.from_pretrained(self.folder, transformer=net, **absent)
        self.pipe.set_progress_bar_config(disable=True)
        self.loaded = "image"
        self.config = dict(net.config)
        self.vae_config = {"block_out_channels": (1,) * 4}  # latents: an eighth of the pixels


class Prepared:
    """What a training needs, filled with random numbers; `close` takes the LoRA off again."""

    def __init__(self, model: RandomFlux, pixels: int, batch: int, out: str, flags: list[str]):
        words = ["--model", common_flux.TINY, "--resolution", pixels, "--batch", batch]
        words += ["--limit", 2, "--held-out", 2, "--out", out, *flags]
        self.settings = fd.parse([str(word) for word in words])
        self.model = model
        self.cache = fd.Cache(self.settings, model, fd.read_data(self.settings, model))
        self.fill()
        self.pool = fd.read_pool(self.cache)
        self.lora = fd.LoRA(model.family, model.pipe.transformer, self.settings)
        self.state = fd.TrainState(self.lora.initial_weights(), self.settings)

    def fill(self) -> None:
        net, cache = self.model.pipe.transformer, self.cache
        tokens = 256 if self.model.machine.device == "cuda" else 64
        text = {
            "text": torch.randn(tokens, net.config.joint_attention_dim).to(net.dtype),
            "pooled": torch.randn(net.config.pooled_projection_dim).to(net.dtype),
        }
        shape = self.model.latent_shape(self.settings.resolution)
        for i in range(len(cache.data.texts)):
            cache.write("text", i, text)
        for i in range(len(cache.data.pairs)):
            cache.write("latent", i, {"latent": torch.randn(shape)})

    def train(self):
        return fd.train(self.settings, self.cache, self.pool, self.lora, self.state)

    def close(self) -> None:
        net = self.lora.net
        net.disable_gradient_checkpointing()
        for name, layer in self.lora.layers.items():
            net.set_submodule(name, layer.base)
        net.pos_embed = net.pos_embed.base
        for block in self.lora.blocks:
            block._compiled_call_impl = None
        fd.free_memory()


# ------------------------------------------------------------------------------------- measurements


def now(machine: fd.Machine) -> float:
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(call: Callable[[], object], machine: fd.Machine, repeats: int) -> float:
    """Without the first two, which warm up."""
    times = []
    for _ in range(repeats + 2):
        began = now(machine)
        call()
        times.append(now(machine) - began)
    return statistics.median(times[2:])


def step_seconds(prepared: Prepared) -> float:
    """Median of the steps of a training, without the first two."""
    machine = prepared.model.machine
    times = []
    began = now(machine)
    for _ in prepared.train():
        times.append(now(machine) - began)
        began = now(machine)
    return statistics.median(times[2:])


def calls_seconds(prepared: Prepared, repeats: int) -> float:
    """Median of the network calls of a step, alone."""
    settings, lora, state = prepared.settings, prepared.lora, prepared.state
    x_0, noise, cond = fd.draw_batch(settings, prepared.cache, prepared.pool, fd.keyed("speed"))
    t = torch.full((len(x_0),), 0.5, device=x_0.device)
    teacher, ema = lora.velocity(None), lora.velocity(state.weights["slow"])
    student = lora.velocity(state.student)

    def calls() -> None:
        with torch.no_grad():
            teacher(noise, t, **cond)
            teacher(noise, t, **cond)
            ema(noise, t, **cond)
        student(noise, t, **cond).square().mean().backward()
        for weight in lora.params:
            weight.grad = None

    return median_seconds(calls, prepared.model.machine, repeats)


def flops_of_a_call(prepared: Prepared) -> int:
    """FLOPs of the network's forward pass on one image."""
    cache = prepared.cache
    cond, noise = cache.conditions([0], 1.0), cache.noise([("flops",)])
    # Code that Dynamo first meets inside a dispatch mode, it never compiles afterwards.
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter, torch.no_grad():
        prepared.lora.velocity(None)(noise, torch.ones(1, device=noise.device), **cond)
    return counter.get_total_flops()


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


def timed_step(
    model: RandomFlux, pixels: int, batch: int, flags: list[str], repeats: int, peak: float | None
) -> dict:
    """Seconds of a step and of its calls, rate and memory, at this size."""
    found = {"pixels": pixels, "batch": batch, "flags": " ".join(flags)}
    with tempfile.TemporaryDirectory() as out:
        iterations = ["--iterations", str(max(4, repeats))]
        prepared = Prepared(model, pixels, batch, out, [*flags, *iterations])
        try:
            flops = flops_of_a_call(prepared)
            if peak:
                torch.cuda.reset_peak_memory_stats()
            step, calls = step_seconds(prepared), calls_seconds(prepared, repeats)
            every, blocks = prepared.settings.recompute_every, len(prepared.lora.blocks)
            recomputed = len(range(0, blocks, every)) / blocks if every else 0.0
            # Forward: teacher twice, EMA, student. Backward as one more, for weights are frozen.
            rate = flops * batch * (5 + recomputed) / step
            found |= {"step": step, "calls": calls, "tflops": rate / 1e12}
            if peak:
                found["fraction"] = rate / peak
                found["gib"] = torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError:
            found["note"] = "out of memory"
        finally:
            prepared.close()
    return found


def sampling_seconds(model: RandomFlux, pixels: int, steps: int = 3) -> float:
    """Seconds in which the stock pipeline makes the latents of one image, LoRA switched on."""
    with tempfile.TemporaryDirectory() as out:
        prepared = Prepared(model, pixels, 1, out, [])
        cond, noise = prepared.cache.conditions([0], 3.5), prepared.cache.noise([("speed",)])
        prepared.lora.use(prepared.state.student)
        shift = prepared.settings.shift

        def sample() -> Tensor:
            return fd.stock_sample(model, noise, steps, cond, shift, batch=1).cpu()

        seconds = median_seconds(sample, model.machine, repeats=5)
        prepared.close()
    return seconds


def measure(config: str, threads: int, length: float) -> dict:
    """All of one network, one after the other on the whole machine."""
    torch.set_num_threads(threads)
    model = RandomFlux(fd.Machine(), CONFIGS[config])
    device = model.machine.device
    peak = matmul_peak(device) if device == "cuda" else None
    repeats = common.shortened(STEPS, length)
    name = torch.cuda.get_device_name() if peak else f"{threads} CPU threads"
    parameters = model.pipe.transformer.num_parameters() / 1e6
    found = {"device": name, "parameters, million": parameters, "rows": []}
    if peak:
        found["matmul_tflops"] = peak / 1e12
    sizes = SIZES.get(config, {64: (2,)})
    found["sampling"] = {pixels: sampling_seconds(model, pixels) for pixels in sizes}
    cases = [(p, b, flags) for p, batches in sizes.items() for b in batches for flags in RECOMPUTE]
    if config == "dev":  # compiled last: blocks stay compiled
        cases += [(512, 8, flags) for flags in VARIANTS]
    for pixels, batch, flags in cases:
        found["rows"].append(timed_step(model, pixels, batch, flags, repeats, peak))
    return found


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    on_gpu = torch.cuda.device_count() > 0
    settings = {"config": "dev" if on_gpu else "medium", "threads": os.cpu_count()}
    small = {"config": "small", "threads": 1}
    parts = {"machine": [common.Task(measure, settings)], "small": [common.Task(measure, small)]}
    return parts


# ------------------------------------------------------------------------------------------- tables

HEAD = ["pixels", "batch", "flags", "step, s", "its calls, s", "ratio", "TFLOP/s", "GiB"]


def line_of(row: dict) -> list[str]:
    cells = [row["pixels"], row["batch"], row["flags"]]
    if "note" in row:
        return [*cells, row["note"], *[""] * 4]
    fraction = f" ({row['fraction']:.0%})" if "fraction" in row else ""
    cells += [f"{row['step']:.3f}", f"{row['calls']:.3f}", f"{row['step'] / row['calls']:.3f}"]
    return [*cells, f"{row['tflops']:.3g}{fraction}", f"{row['gib']:.1f}" if "gib" in row else ""]


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    for row in rows:
        found = row.found
        lines += [f"{found['device']}, {found['parameters, million']:.0f} million parameters"]
        if "matmul_tflops" in found:
            lines += [f"bfloat16 matrix product: {found['matmul_tflops']:.0f} TFLOP/s"]
        for pixels, seconds in found["sampling"].items():
            lines += [f"{pixels} px, 3 steps, the latents of one image: {seconds:.2f} s"]
        lines += common.table(HEAD, [line_of(one) for one in found["rows"]])
    return lines


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, jobs=1, usual=["machine"])
