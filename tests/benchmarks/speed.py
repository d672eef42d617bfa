"""How near a training step is to its network calls: python tests/benchmarks/speed.py

No step can be faster than the network calls that it makes: the teacher twice and the slow EMA once
without a gradient, the student forward and backward. Steps of flux_distill.train, on random weights
and cached noise, are timed in turn with such calls alone. On a CPU: a Flux of 124 million
parameters (2 minutes on 2 cores). On a CUDA device: FLUX.1-dev's own configuration, built there in
bfloat16, with peak memory and the fraction of the rate of a large matrix product. "variants", at
one size, recompute fewer blocks or compile them. "profile" adds up the kernels of one step.
"sampling" takes 3 steps with the LoRA, without text encoders and VAE. "small" is a network to try
this script with.

One task at a time has the whole machine: leave --jobs at 1. --length scales the number of steps.
"""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import common
import torch
from common_flux import TINY
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

import flux_distill as fd
from flux_distill import Flux

DEV = dict(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38,
           axes_dims_rope=(16, 56, 56), in_channels=64, joint_attention_dim=4096,
           pooled_projection_dim=768, guidance_embeds=True)  # fmt: skip
MEDIUM = DEV | dict(num_attention_heads=8, attention_head_dim=96, num_layers=3, num_single_layers=6,
                    axes_dims_rope=(16, 40, 40))  # fmt: skip
SMALL = MEDIUM | dict(num_attention_heads=2, num_layers=1, num_single_layers=1)
CONFIGS = {"dev": DEV, "medium": MEDIUM, "small": SMALL}
VAE = {"block_out_channels": (128, 256, 512, 512)}  # latents are an eighth of the pixels
TEXT_TOKENS = {"cuda": 256, "cpu": 64}
SIZES = {"dev": {512: (1, 4, 8, 16), 1024: (1, 4)}, "medium": {256: (2,)}}  # pixels: batches
BEST = {"dev": (512, 8), "medium": (256, 2)}  # the size at which variants are tried
RECOMPUTE = ("--recompute-every 1", "--recompute-every 0")
VARIANTS = ("--recompute-every 2", "--recompute-every 4", "--compile")
PROFILED = ("--recompute-every 1", "--recompute-every 1 --compile")
STEPS = 8  # of a training
WARM_UP = 2  # steps that are not timed
KINDS = {  # of kernels, and of what a CPU calls: the first that fits
    "attention": "flash|fmha|attention",
    "compiled": "triton",
    "matrix products": "mm|nvjet|cutlass",
    "copies": "copy|memcpy|memset",
    "others": "",
}

# ---------------------------------------------------------------------------- a run without a model


def random_model(machine: fd.Machine, config: dict) -> fd.Model:
    """Flux with random weights in a transformer of this config, the image side loaded."""
    fd.free_memory()
    model = fd.Model(str(TINY), machine, None)
    model.download()
    model.family = Flux({}, config)
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
        lora = fd.LoRA(model.family, model.pipe.transformer, settings)
        yield SimpleNamespace(settings=settings, cache=cache, lora=lora)


# ------------------------------------------------------------------------------------- measurements


def seconds_of(function: Callable[[], object], machine: fd.Machine) -> float:
    """How long a call takes, until the device has done it."""
    if machine.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def input_of_network(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    """A batch, as the family's velocity takes it."""
    rows = run.settings.batch
    x = run.cache.noise([("speed", i) for i in range(rows)])
    texts = [i % len(run.cache.data.texts) for i in range(rows)]
    t = torch.full((rows,), 0.5, device=x.device)
    return {"x": x, "t": t} | run.cache.conditions(texts, run.settings.guidance)


def calls_of_a_step(lora: fd.LoRA, batch: dict[str, torch.Tensor]) -> None:
    """The network calls of a training step and its backward pass, and nothing else."""
    velocity = partial(lora.family.velocity, lora.net, **batch)
    with torch.no_grad():
        lora.switch.on = False
        velocity()  # the teacher
        velocity()
        lora.switch.on = True
        velocity()  # the slow EMA
    v = velocity()  # the student
    v.square().mean().backward()
    for parameter in lora.params:
        parameter.grad = None


def timed_steps(run: SimpleNamespace, count: int) -> list[tuple[float, float]]:
    """Seconds of each training step, and of its network calls alone; without the first ones."""
    machine = run.cache.machine
    state = fd.TrainState(run.lora.loaded_weights(), fd.config_of(run.settings))
    steps = fd.train(run.settings, run.cache, fd.read_pool(run.cache), run.lora, state)
    batch = input_of_network(run)
    seconds = []
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


def measure_steps(
    config: str,
    pixels: int,
    batch: int,
    flags: str,
    threads: int,
    length: float,
    count: int = STEPS,
) -> dict:
    """Seconds of a step and of its calls, rate and memory, of a training of `count` steps."""
    torch.set_num_threads(threads)
    count = max(WARM_UP + 1, common.shortened(count, length))
    found = {}
    try:
        with random_run(CONFIGS[config], pixels, batch, *flags.split()) as run:
            on_gpu = run.cache.machine.device == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed_steps(run, count)
            if on_gpu:
                found["gib"] = run.cache.machine.peak_memory()
            found["step"] = statistics.median(step for step, _ in seconds)
            found["calls"] = statistics.median(calls for _, calls in seconds)
            found["ratio"] = statistics.median(step / calls for step, calls in seconds)
            found["tflops"] = flops_of_a_step(run) / found["step"] / 1e12
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    return found


def measure_profile(
    config: str, pixels: int, batch: int, flags: str, threads: int, length: float
) -> dict:
    """Where one training step spends its time: seconds of its kernels by kind, and the longest."""
    torch.set_num_threads(threads)
    with random_run(CONFIGS[config], pixels, batch, *flags.split()) as run:
        machine = run.cache.machine
        state = fd.TrainState(run.lora.loaded_weights(), fd.config_of(run.settings))
        steps = fd.train(run.settings, run.cache, fd.read_pool(run.cache), run.lora, state)
        while state.iteration < WARM_UP:
            next(steps)
        on_device = machine.device == "cuda"
        activity = torch.profiler.ProfilerActivity
        watched = activity.CUDA if on_device else activity.CPU
        with torch.profiler.profile(activities=[watched]) as profile:
            seconds = seconds_of(lambda: next(steps), machine)
    kernels = []
    for event in profile.key_averages():
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        kernels.append((event.key[:100], microseconds / 1e6, event.count))
    kernels.sort(key=lambda kernel: -kernel[1])
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, spent, _ in kernels:
        kinds[kind_of(name)] += spent
    return {"profiled": seconds, "kinds": kinds, "longest": kernels[:12]}


def kind_of(kernel: str) -> str:
    return next(kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE))


def measure_sampling(config: str, pixels: int, threads: int, length: float) -> dict:
    """Seconds in which the stock pipeline makes the latents of one image with the LoRA."""
    torch.set_num_threads(threads)
    with random_run(CONFIGS[config], pixels, 1) as run:
        cond, noise = run.cache.held_out([0], "speed")
        run.lora.use(run.lora.loaded_weights())
        model, shift = run.cache.model, run.settings.shift

        def sample() -> None:
            fd.stock_sample(model, noise[:1], 3, cond, shift, batch=1)

        sample()  # warms up
        return {"sampling": statistics.median(seconds_of(sample, model.machine) for _ in range(5))}


def measure_matmul(length: float, size: int = 8192, repeats: int = 20) -> dict:
    """Rate of a large matrix product in bfloat16 on CUDA."""
    machine = fd.Machine()
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(seconds_of(lambda: a @ b, machine) for _ in range(repeats))
    return {"matmul_tflops": 2 * size**3 / seconds / 1e12}


# -------------------------------------------------------------------------------------------- tasks


def has_gpu() -> bool:
    """Asked without starting CUDA, which a process must not have done before it forks."""
    return torch.cuda.device_count() > 0


def step_tasks(
    config: str,
    cases: Sequence[tuple[int, int, str]],
    threads: int,
    measure: Callable[..., dict] = measure_steps,
    **more,
) -> list[common.Task]:
    """cases: pixels, batch, flags."""
    tasks = []
    for pixels, batch, flags in cases:
        settings = {"config": config, "pixels": pixels, "batch": batch, "flags": flags}
        tasks.append(common.Task(measure, settings | {"threads": threads} | more))
    return tasks


def sampling_tasks(config: str, sizes: Sequence[int], threads: int) -> list[common.Task]:
    """sizes: pixels."""
    settings = {"config": config, "threads": threads}
    return [common.Task(measure_sampling, settings | {"pixels": pixels}) for pixels in sizes]


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    config = "dev" if has_gpu() else "medium"
    sizes, threads = SIZES[config], os.cpu_count()
    cases = [(p, b, flags) for p, batches in sizes.items() for b in batches for flags in RECOMPUTE]
    variants = [(*BEST[config], flags) for flags in VARIANTS]
    profiled = [(*BEST[config], flags) for flags in PROFILED]
    small = [(64, 2, flags) for flags in RECOMPUTE]
    parts = {
        "sampling": sampling_tasks(config, [*sizes], threads),
        "steps": step_tasks(config, cases, threads),
        "variants": step_tasks(config, variants, threads),
        "profile": step_tasks(config, profiled, threads, measure_profile),
        "small": sampling_tasks("small", [64], 1) + step_tasks("small", small, 1),
    }
    if has_gpu():
        return {"matmul": [common.Task(measure_matmul, {})]} | parts
    return parts


def usual() -> list[str]:
    """Parts that are measured if no flag says which: on a CPU compiling takes minutes."""
    return ["matmul", "sampling", "steps", "variants"] if has_gpu() else ["sampling", "steps"]


# ------------------------------------------------------------------------------------------- tables

HEAD = ("pixels", "batch", "flags", "step, s", "its calls, s", "ratio", "TFLOP/s", "GiB")


def tables(rows: list[common.Row]) -> list[str]:
    return made_on(rows) + tables_of_steps(rows)


def made_on(rows: list[common.Row]) -> list[str]:
    """Machines, packages and notes, in a line for each machine."""
    notes = {}
    for row in rows:
        versions = [f"{name} {number}" for name, number in row.origin["versions"].items()]
        of_machine = notes.setdefault(f"{row.origin['machine']}; {', '.join(versions)}", {})
        if row.origin.get("note"):
            of_machine[row.origin["note"]] = True
    return ["; ".join([machine, *some]) for machine, some in notes.items()]


def tables_of_steps(rows: list[common.Row]) -> list[str]:
    """Of rows in their order; those that found something else are left out."""
    lines = []
    configs = [row.settings["config"] for row in rows if "config" in row.settings]
    for config in dict.fromkeys(configs):
        lines.append(f"{config}: {parameters(CONFIGS[config]) / 1e6:.0f} million parameters")
    timed = []
    for row, peak in with_peaks(rows):
        found = row.found
        if "matmul_tflops" in found:
            lines.append(f"bfloat16 matrix product: {peak:.0f} TFLOP/s")
        elif "sampling" in found:
            size = f"{row.settings['pixels']} px, 3 steps, the latents of one image"
            lines.append(f"{size}: {found['sampling']:.2f} s")
        elif "step" in found or "note" in found:
            timed.append(cells_of(row, peak))
    if timed:
        lines += common.table(HEAD, timed)
    for row in rows:
        if "kinds" in row.found:
            lines += table_of_kinds(row)
    return lines


def with_peaks(rows: list[common.Row]) -> list[tuple[common.Row, float | None]]:
    """Each row with the TFLOP/s of the last matrix product before it: that of the same card."""
    peak = None
    pairs = []
    for row in rows:
        peak = row.found.get("matmul_tflops", peak)
        pairs.append((row, peak))
    return pairs


def table_of_kinds(row: common.Row) -> list[str]:
    """What a step's kernels do."""
    kinds = row.found["kinds"]
    total = sum(kinds.values())
    cells = [[kind, f"{seconds:.3f}", f"{seconds / total:.0%}"] for kind, seconds in kinds.items()]
    cells.append(["all kernels", f"{total:.3f}", ""])
    size = "{pixels} px, batch {batch}, {flags}".format_map(row.settings)
    title = f"a profiled step of {row.found['profiled']:.3f} s: {size}"
    return common.table([title, "seconds", "share"], cells)


def parameters(config: dict) -> int:
    with torch.device("meta"):
        return FluxTransformer2DModel(**config).num_parameters()


def cells_of(row: common.Row, peak: float | None) -> list[str]:
    """A line of the table. peak: see `with_peaks`."""
    found = row.found
    cells = [str(row.settings[name]) for name in ("pixels", "batch", "flags")]
    if "note" in found:
        return [*cells, found["note"], "", "", "", ""]
    cells += [f"{found[name]:.3f}" for name in ("step", "calls", "ratio")]
    fraction = f" ({found['tflops'] / peak:.0%})" if peak else ""
    cells.append(f"{found['tflops']:.3g}{fraction}")
    cells.append(f"{found['gib']:.1f}" if "gib" in found else "")
    return cells


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, seeds=1, jobs=1, usual=usual())
