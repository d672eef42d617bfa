"""Shortcut a flow-matching teacher on 2-D data and look at the result.

Trains a small teacher, distils a student of few steps from it with shortcut.py, measures both
against fresh data and draws four figures. Needs no GPU, no network and no data set.
"""

# ruff: noqa: E402
import copy
import json
import math
import os
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate, pairwise, product
from pathlib import Path

OUTPUTS = ("results.json", "samples.png", "paths.png", "progress.png", "quality.png", "flow.gif")
MARK = "toy_2d.py"  # in the figures, by which the program knows them again
FLOW_NAMES = ("moons", "checkerboard", "spirals", "gaussians")

# ----------------------------------------------------------------------------------------- settings


def parse(argv: list[str] | None) -> Namespace:
    """Settings of the command line; needs none of the slow imports."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--flow", choices=FLOW_NAMES, default="moons", help="the data")
    add("--student-steps", type=int, default=3, dest="N", help="step count to build for")
    add("--paper", action="store_true", help="the paper's windows and share, whatever N is")
    add("--fusion", action="store_true", help="train from scratch: 2x --iterations; plain: 4x")
    add("--few-shot", type=int, default=0, metavar="K", help="distil on K points only; 0: on all")
    add("--shift", type=float, default=1.0, help="time shift s of training and sampling (Flux: 3)")
    add("--iterations", type=int, default=2000, help="of the teacher; student half of it")
    add("--seed", type=int, default=0, help="of networks, data and noise")
    add("--out", type=Path, default=Path("toy_out"), help="folder for figures and results.json")
    add("--animate", action="store_true", help="also write flow.gif, noise flowing to data")
    args = parser.parse_args(argv)
    if args.fusion and (args.few_shot or args.paper):
        parser.error("--fusion goes with neither --few-shot nor --paper")
    for name, value, low, high in (
        ("--iterations", args.iterations, 1, 10**9),
        ("--student-steps", args.N, 1, 1000 if args.paper else 16),  # half of the grid's 32
        ("--few-shot", args.few_shot, 0, 10**7),
        ("--seed", args.seed, 0, 2**62),  # PyTorch has 64 bits, and the seeds drawn from it
    ):
        if not low <= value <= high:
            parser.error(f"{name} {value} must be between {low} and {high}")
    if not 1e-3 <= args.shift <= 1e3:  # further out float32 has no times between 0 and 1
        parser.error(f"--shift {args.shift:g} must be between 0.001 and 1000")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # not allowed: say so before training
        foreign = [args.out / name for name in OUTPUTS if (args.out / name).exists()]
        if foreign and not is_ours(args.out):
            parser.error(f"{foreign[0]} is not from this program and would be replaced: move it, or"
                         " give another --out")  # fmt: skip
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}: give another --out")
    return args


def is_ours(folder: Path) -> bool:
    """Whether this program wrote the results or the samples there; damaged, it can't be told."""
    with suppress(OSError, ValueError, AttributeError):
        results = json.loads((folder / OUTPUTS[0]).read_text())
        if {"energy", "rms", "settings"} <= results.keys():
            return True
    with suppress(OSError), open(folder / OUTPUTS[1], "rb") as file:
        return MARK.encode() in file.read(1000)
    return False


if __name__ == "__main__":
    parse(None)  # --help and wrong flags are answered before the imports below take their seconds

import numpy as np
import torch

if "ipykernel" not in sys.modules:  # a notebook's backend stays in the notebook: no figure needs it
    os.environ.pop("MPLBACKEND", None)
from matplotlib.animation import PillowWriter
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import shortcut as sc

STEPS = (1, 2, 3, 4, 8, 16, 32)  # columns of the table
FINE_STEPS = 64  # what stands for the teacher's exact endpoint
POINTS = 8_192  # samples behind an energy distance
FROM_SCRATCH = dict(batch=1024, lr=5e-3, warmup=100)  # fusion, as plain flow matching is trained
COLORS = ("#5b6b7f", "#e4572e", "#2a9d8f", "#d79a22")  # teacher, student, student at its scale
Data = Callable[[int, torch.Generator], Tensor]  # (count, generator) -> points (count, 2)

# -------------------------------------------------------------------------------------------- flows


def moons(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * torch.rand(count, 1, generator=generator)
    sign = torch.randint(0, 2, (count, 1), generator=generator) * 2 - 1
    points = sign * torch.cat([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return 1.5 * (points + 0.05 * torch.randn(count, 2, generator=generator))


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    row = torch.randint(0, 4, (count, 1), generator=generator)
    column = 2 * torch.randint(0, 2, (count, 1), generator=generator) + row % 2
    return torch.cat([column, row], 1) - 2 + torch.rand(count, 2, generator=generator)


def spirals(count: int, generator: torch.Generator) -> Tensor:
    radius = torch.rand(count, 1, generator=generator).sqrt()
    angle = 3 * math.pi * radius + math.pi * torch.randint(0, 2, (count, 1), generator=generator)
    points = 2 * radius * torch.cat([angle.cos(), angle.sin()], 1)
    return points + 0.05 * torch.randn(count, 2, generator=generator)


def gaussians(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi / 4 * torch.randint(0, 8, (count, 1), generator=generator)
    centre = 1.8 * torch.cat([angle.cos(), angle.sin()], 1)
    return centre + 0.1 * torch.randn(count, 2, generator=generator)


FLOWS: dict[str, Data] = {flow.__name__: flow for flow in (moons, checkerboard, spirals, gaussians)}


def draw_from(pool: Tensor) -> Data:
    """Few-shot data: draws from the points of the pool, with replacement."""
    return lambda count, generator: pool[torch.randint(len(pool), (count,), generator=generator)]


# ---------------------------------------------------------------------------------------- networks


class VelocityMLP(nn.Module):
    """v(x, t) for x (B, 2) and t (B,): three hidden layers; t comes with four Fourier octaves."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise((11, width, width, width))]
        self.layers = nn.Sequential(*sum(layers, ()), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t[:, None] * (math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]))
        return self.layers(torch.cat([x, t[:, None], phase.sin(), phase.cos()], 1))


def scaled(base: nn.Module, student: nn.Module, scale: float) -> nn.Module:
    """Network of weights base + scale (student - base): what a LoRA scale does, in one call."""
    net = copy.deepcopy(student).requires_grad_(False)
    for weight, start in zip(net.parameters(), base.parameters()):
        weight.copy_(start.lerp(weight, scale))  # lerp is exact at 0 and 1
    return net


# ---------------------------------------------------------------------------------------- training


def adam(weights: list[Tensor], lr: float, iterations: int, warmup: int):
    """Adam, up to lr in `warmup` iterations, then constant, in the second half down to 0."""
    optimizer = torch.optim.Adam(weights, lr, fused=True)
    factor = lambda i: min((i + 1) / warmup, 1, 2 - 2 * i / iterations)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_teacher(data: Data, iterations: int, seed: int) -> nn.Module:
    """Plain flow matching: the velocity is regressed on noise - x_0."""
    torch.manual_seed(seed)
    generator, teacher = torch.Generator().manual_seed(seed), VelocityMLP()
    optimizer, schedule = adam(list(teacher.parameters()), 5e-3, iterations, warmup=100)
    for _ in tqdm(range(iterations), "teacher", leave=False):
        x_0, noise = data(1024, generator), torch.randn(1024, 2, generator=generator)
        t = torch.rand(1024, generator=generator)
        loss = (teacher(sc.interpolate(x_0, noise, t), t) - (noise - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.requires_grad_(False)


def train_student(
    teacher, data: Data, config: sc.ShortcutConfig, iterations: int, seed: int, snapshots=(),
    batch=512, lr=2e-3, warmup=1, ema_warmup=True,
) -> dict[int, nn.Module]:  # fmt: skip
    """Shortcut the teacher or, without one, train from scratch (fusion).

    ema_warmup: the averages' memory grows with the run; False: it is constant, as in the paper.
    Returns copies of the student as it is after each of the snapshots and after the last iteration.
    """
    torch.manual_seed(seed)
    generator, kept = torch.Generator().manual_seed(seed + 1), {}
    student = copy.deepcopy(teacher).requires_grad_(True) if teacher else VelocityMLP()
    fast, slow = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    velocities = dict(student=student, fast=fast, slow=slow, teacher=teacher)
    weights, *averages = (list(net.parameters()) for net in (student, fast, slow))
    optimizer, schedule = adam(weights, lr, iterations, warmup)
    for iteration in tqdm(range(1, iterations + 1), "student", leave=False):
        x_0, noise = data(batch, generator), torch.randn(batch, 2, generator=generator)
        windows = sc.sample_windows(config, batch, fusion=teacher is None, generator=generator)
        loss, _ = sc.shortcut_loss(config, windows, x_0, noise, **velocities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for average, decay in zip(averages, (config.fast_decay, config.slow_decay)):
            sc.update_ema(average, weights, decay, iteration if ema_warmup else math.inf)
        if iteration in snapshots or iteration == iterations:
            kept[iteration] = copy.deepcopy(student).requires_grad_(False)
    return kept


# --------------------------------------------------------------------------------------- measuring


def energy_distance(x: Tensor, y: Tensor, directions: int = 16) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points (n, 2) and (m, 2), unbiased; 0 for equal laws.

    In the plane |a| is pi/2 times the mean of |<a, e>| over directions e, and on a line a sort
    gives the sum over all pairs. So thousands of points are quick; a test compares the direct sum.
    """
    angle = math.pi * torch.arange(directions) / directions
    x, y = ((points @ torch.stack([angle.cos(), angle.sin()])).T.numpy() for points in (x, y))

    def pair_sum(z):  # sum over i < j of |z_i - z_j|, averaged over the directions
        return math.pi / 2 * (np.sort(z) @ (2.0 * np.arange(z.shape[1]) - z.shape[1] + 1)).mean()

    n, m, xx, yy = x.shape[1], y.shape[1], pair_sum(x), pair_sum(y)
    xy = pair_sum(np.concatenate([x, y], 1)) - xx - yy
    return 2 * (xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1)))


def sample(net: nn.Module, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Euler samples of noise x (n, 2), 2,048 at a time: that fits a processor's cache."""
    return torch.cat([sc.euler_sample(net, z, sc.time_grid(steps, shift)) for z in x.split(2048)])


def calibrate(base: nn.Module, student: nn.Module, noise: Tensor, steps: int, shift=1.0) -> float:
    """Scale of the student for a number of steps, from validation noise alone: lam*, then a search.

    Of the scales within a factor of 1.6 around lam* it takes the one whose samples are, as a set,
    nearest to the teacher's fine endpoints from the same noise. (Sample by sample, the mean square
    would favour scales that blur.)
    """
    lam = sc.optimal_scale(student, base, noise, sc.time_grid(steps, shift)).clamp(0.01, 10).item()
    target = sample(base, noise, FINE_STEPS, shift)

    def distance(scale):
        return energy_distance(sample(scaled(base, student, scale), noise, steps, shift), target)

    return min(np.geomspace(lam / 1.6, lam * 1.6, 21).tolist(), key=distance)


def table(energy: dict, rms: dict, scales: dict[int, float], floor: float) -> str:
    def line(name, form, values):
        return f"{name:17s}" + "".join(f"{value:{form}}" for value in values)

    lines = [line("Euler steps", "9d", next(iter(energy.values())))]
    lines += [f"energy distance to fresh data, x 1e-4 (data to data: 0 +- {1e4 * floor:.1f})"]
    lines += [line(f"  {k}", "9.1f", (1e4 * e for e in row.values())) for k, row in energy.items()]
    lines += [f"RMS distance to where {FINE_STEPS} steps of the {next(iter(rms))} end"]
    lines += [line(f"  {name}", "9.3f", row.values()) for name, row in rms.items()]
    return "\n".join(lines + [line("scale", "9.2f", scales.values())] * bool(scales))


# ----------------------------------------------------------------------------------------- figures


@contextmanager
def whole(path: Path):
    """Write to the path that this yields: a full disk leaves no half of a file."""
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plot_samples(samples: dict, energy: dict, data: Tensor, floor: float, path: Path) -> None:
    """Densities: unlike scatter plots they show holes, and mass where none belongs."""
    figure = Figure((16, height := 2.2 * len(samples) + 0.4))
    grid = figure.subplots(len(samples), len(next(iter(samples.values()))) + 1)
    figure.subplots_adjust(0.02, 0.01, 0.998, 1 - 0.6 / height, wspace=0.04, hspace=0.15)
    edges = np.linspace(-1.15, 1.15, 81) * data.abs().max().item()
    for axes, (name, row), color in zip(grid, samples.items(), COLORS):
        labels = [f"{n} step{'s' * (n > 1)}: {1e4 * energy[name][n]:.1f}" for n in row]
        labels.append(f"data: ±{1e4 * floor:.1f}")
        for axis, points, label in zip(axes, [*row.values(), data], labels):
            image = np.histogram2d(*points.T.numpy(), bins=[edges, edges])[0].T
            axis.imshow(image**0.5, origin="lower", cmap="magma", interpolation="bicubic")
            axis.set(xticks=[], yticks=[], title=label)
        axes[0].set_ylabel(name, fontsize=13, color=color, fontweight="bold")
    figure.suptitle("Energy distance to the data (1/10,000); the same noise in all panels")
    with whole(path) as part:
        figure.savefig(part, dpi=100, metadata={"Software": MARK})


def plot_lines(panels: list[tuple[str, str, dict]], level: float, path: Path) -> None:
    """Log-log lines: a panel for each (title, x label, {name: {x: y}}), a black line at `level`."""
    figure = Figure((5.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, label, lines) in zip(axes, panels):
        for (name, points), color in zip(lines.items(), COLORS):
            axis.plot(list(points), list(points.values()), "o-", ms=4, color=color, label=name)
        axis.set(xscale="log", xlabel=label, title=title)
        if any(y > 0 for points in lines.values() for y in points.values()):
            axis.set_yscale("log")  # an unbiased distance, or lam*, can be negative everywhere
        axis.set_xticks(list(points), [str(x) for x in points])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axis.axhline(level, color="black", lw=0.8)
    axis.legend(frameon=False)
    with whole(path) as part:
        figure.savefig(part, dpi=100, metadata={"Software": MARK})


def square_panels(samplers: list[tuple], data: Tensor) -> tuple[Figure, list]:
    """A titled panel for each sampler (title, network, steps, color), the data faint below."""
    figure = Figure((4 * len(samplers), 4.3), layout="constrained")
    axes, limit = figure.subplots(1, len(samplers)), max(1.15 * data.abs().max().item(), 3)
    for axis, (title, _, _, color) in zip(axes, samplers):
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect=1)
        axis.set_title(title, fontsize=12, color=color, fontweight="bold")
        axis.scatter(*data[:4000].T, s=2, color="#f2c14e", alpha=0.35, linewidths=0)
    return figure, axes


def trajectory(net: nn.Module, x: Tensor, steps: int, shift: float) -> Tensor:
    """All states of the Euler sampler, (steps + 1, n, 2)."""
    step = lambda x, times: sc.euler_sample(net, x, torch.stack(times))  # noqa: E731
    return torch.stack([*accumulate(pairwise(sc.time_grid(steps, shift)), step, initial=x)])


def plot_paths(samplers: list[tuple], noise: Tensor, data: Tensor, shift: float, path: Path):
    figure, axes = square_panels(samplers, data)
    for axis, (_, net, steps, color) in zip(axes, samplers):
        states = trajectory(net, noise[:160], steps, shift)
        axis.add_collection(LineCollection(states.transpose(0, 1), colors=color, lw=0.7, alpha=0.6))
        for i, size, shade, name in ((0, 7, "#a9b4c0", "noise"), (-1, 15, "black", "sample")):
            axis.scatter(*states[i].T, s=size, color=shade, linewidths=0, label=name, zorder=3)
    axis.legend(loc="lower right", fontsize=8)
    with whole(path) as part:
        figure.savefig(part, dpi=100, metadata={"Software": MARK})


def animate(samplers: list[tuple], noise: Tensor, data: Tensor, shift: float, path: Path) -> None:
    """A GIF of noise flowing to data along each sampler's own paths, straight between its steps."""
    (figure, axes), frames, dots = square_panels(samplers, data), 48, []
    for axis, (_, net, steps, color) in zip(axes, samplers):
        states = trajectory(net, noise[:1500], steps, shift)
        dots.append((axis.scatter(*states[0].T, s=4, color=color, linewidths=0), states))
    writer = PillowWriter(fps=16)
    with whole(path) as part, writer.saving(figure, part, dpi=60):
        for frame in [0] * 8 + list(range(frames + 1)) + [frames] * 16:
            for dot, states in dots:
                place = frame / frames * (len(states) - 1)
                i = min(int(place), len(states) - 2)
                dot.set_offsets(torch.lerp(states[i], states[i + 1], place - i))
            writer.grab_frame()


# -------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        raise SystemExit("toy_2d.py: stopped; the same command starts over") from None
    except OSError as error:
        reason = error.strerror or error
        raise SystemExit(f"toy_2d.py: {error.filename or args.out}: {reason}; mend that, or give"
                         " another --out") from None  # fmt: skip


def run(args: Namespace) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors are small: more would only wait for each other
    data, shift, iterations = FLOWS[args.flow], args.shift, args.iterations
    make = sc.ShortcutConfig if args.paper else partial(sc.ShortcutConfig.for_steps, args.N)
    config = make(shift_range=(shift, shift))
    steps = sorted({*STEPS, few := args.N})
    generator = torch.Generator().manual_seed(args.seed + 10_000)  # of all that measures
    reference, noise = data(2 * POINTS, generator), torch.randn(POINTS, 2, generator=generator)
    validation = torch.randn(256, 2, generator=generator)
    floor = np.std([energy_distance(data(POINTS, generator), reference) for _ in range(8)]).item()

    its = 2 * iterations if args.fusion else max(1, iterations // 2)  # of the student
    snapshots, scales = {round(2 * (its / 2) ** (i / 8)) for i in range(9)}, {}
    if args.fusion:  # a fused row makes two network calls, one of plain flow matching one
        base = train_teacher(data, 2 * its, args.seed)
        kept = train_student(None, data, config, its, args.seed, snapshots, **FROM_SCRATCH)
        nets = {"flow matching": lambda n: base, "fused": lambda n: student}
    else:
        base = train_teacher(data, iterations, args.seed)
        drawn = draw_from(data(args.few_shot, generator)) if args.few_shot else data
        kept = train_student(base, drawn, config, its, args.seed, snapshots)
        nets = {"teacher": lambda n: base, "student": lambda n: student}
        nets["student, scaled"] = lambda n: scaled(base, student, scales[n])
        scales = {n: calibrate(base, kept[its], validation, n, shift) for n in steps}
    student, out, (first, second, *_) = kept[max(kept)], args.out, nets

    fine, samples, energy, rms = sample(base, noise, FINE_STEPS, shift), {}, {}, {}
    for name, net_for in nets.items():
        points = samples[name] = {n: sample(net_for(n), noise, n, shift) for n in steps}
        energy[name] = {n: energy_distance(x, reference) for n, x in points.items()}
        rms[name] = {n: (x - fine).square().sum(1).mean().sqrt().item() for n, x in points.items()}
    print(table(energy, rms, scales, floor))

    errors, lams = ({f"{n} steps": {} for n in STEPS[1:5]} for _ in range(2))
    for i, n in product(sorted(kept), STEPS[1:5]):
        x, times = sample(kept[i], noise[:4096], n, shift), sc.time_grid(n, shift)
        errors[f"{n} steps"][i] = energy_distance(x, reference[:8192])
        if not args.fusion:
            lams[f"{n} steps"][i] = sc.optimal_scale(kept[i], base, validation, times).item()
    results = dict(energy=energy, rms=rms, floor=floor, scales=scales, errors=errors, lams=lams)
    results["settings"] = {name: str(value) for name, value in vars(args).items()}
    with whole(out / "results.json") as part:
        part.write_text(json.dumps(results, indent=1) + "\n")

    samplers = [(f"{first}, {steps} steps", base, steps, COLORS[0]) for steps in (few, FINE_STEPS)]
    samplers += [(f"{second}, {few} steps", student, few, COLORS[1])]
    plot_samples(samples, energy, reference, floor, out / "samples.png")
    plot_paths(samplers, noise, reference, shift, out / "paths.png")
    title = "energy distance to the data"
    progress = [(title, "iteration", errors), ("λ*; 1: matched", "iteration", lams)]
    plot_lines(progress[: 1 + bool(scales)], 1.0 if scales else floor, out / "progress.png")
    plot_lines([(f"{title} (black: floor)", "Euler steps", energy)], floor, out / "quality.png")
    if args.animate:
        animate(samplers, noise, reference, shift, out / "flow.gif")
    print(f"{time.perf_counter() - started:.1f} s; figures and results.json in {out}/")


if __name__ == "__main__":
    main()
