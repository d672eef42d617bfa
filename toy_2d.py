"""Shortcut a flow-matching teacher on 2-D data and look at the result: python toy_2d.py

Trains a small teacher, distils a few-step student from it with shortcut.py, measures both against
fresh data, and draws figures. Needs no GPU, network or data set. Options: python toy_2d.py --help
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import shortcut as sc

STEPS = (1, 2, 3, 4, 8, 16, 32)  # columns of the table
PROGRESS_STEPS = (2, 3, 4, 8)
FINE_STEPS = 64  # the teacher's "exact" endpoint
POINTS = 16_384  # samples behind each energy distance
Data = Callable[[int, torch.Generator], Tensor]  # (count, generator) -> points (count, 2)


# ---------------------------------------------------------------------------------------------- flows


def moons(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * torch.rand(count, generator=generator)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    points = sign[:, None] * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return 1.5 * (points + 0.05 * torch.randn(count, 2, generator=generator))


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    row = torch.randint(0, 4, (count,), generator=generator)
    column = 2 * torch.randint(0, 2, (count,), generator=generator) + row % 2
    return torch.stack([column, row], 1) - 2 + torch.rand(count, 2, generator=generator)


def spirals(count: int, generator: torch.Generator) -> Tensor:
    radius = torch.rand(count, generator=generator).sqrt()
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    angle = 3 * math.pi * radius
    points = 2 * (sign * radius)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return points + 0.05 * torch.randn(count, 2, generator=generator)


def gaussians(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi / 4 * torch.randint(0, 8, (count,), generator=generator)
    centre = 1.8 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.1 * torch.randn(count, 2, generator=generator)


FLOWS: dict[str, Data] = {f.__name__: f for f in (moons, checkerboard, spirals, gaussians)}


def pool_of(points: Tensor) -> Data:
    """Few-shot data: draws, with replacement, from the given points only."""
    return lambda count, generator: points[
        torch.randint(len(points), (count,), generator=generator)
    ]


# ------------------------------------------------------------------------------------------- networks


class VelocityMLP(nn.Module):
    """v(x, t) for x (B, 2), t (B,): three hidden layers, and t as four octaves of a Fourier series."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.register_buffer("frequency", math.pi / 2 * 2.0 ** torch.arange(4))
        layers = [nn.Linear(11, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        phase = t * self.frequency
        return self.layers(torch.cat([x, t, phase.sin(), phase.cos()], 1))


def scaled(base: nn.Module, student: nn.Module, scale: float) -> nn.Module:
    """The network with weights base + scale (student - base): what a LoRA scale does, in one call."""
    net = copy.deepcopy(base)
    with torch.no_grad():
        for weight, target in zip(net.parameters(), student.parameters()):
            weight.copy_(weight.lerp(target, scale) if scale != 1 else target)
    return net


# ------------------------------------------------------------------------------------------- training


def one_cycle(optimizer, iterations: int):
    """Learning rate up to 5e-3 in the first tenth, then down to 0: trains from scratch in seconds."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, iterations + 1, pct_start=0.1)


def plateau(optimizer, iterations: int):
    """Learning rate up in 100 iterations, constant, and down to 0 in the second half of the run."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 1, 2 * (1 - i / iterations))
    )


def train_teacher(data: Data, iterations: int, seed: int, batch: int = 1024) -> nn.Module:
    """Plain flow matching: regress v(x_t, t) on noise - x_0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher = VelocityMLP()
    optimizer = torch.optim.Adam(teacher.parameters(), fused=True)
    schedule = one_cycle(optimizer, iterations)
    for _ in tqdm(range(iterations), "teacher", leave=False):
        x_0, noise = data(batch, generator), torch.randn(batch, 2, generator=generator)
        t = torch.rand(batch, generator=generator)
        loss = (teacher(sc.interpolate(x_0, noise, t), t) - (noise - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.requires_grad_(False)


def train_student(
    teacher: nn.Module | None, data: Data, config: sc.ShortcutConfig, iterations: int, seed: int,
    snapshots: Iterable[int] = (), batch: int = 1024,
) -> dict[int, nn.Module]:  # fmt: skip
    """Shortcut the teacher or, without one, train from scratch (fusion).

    Returns copies of the student as it is after the `snapshots` and after the last iteration.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = copy.deepcopy(teacher) if teacher else VelocityMLP()
    fast, slow = (
        copy.deepcopy(student).requires_grad_(False),
        copy.deepcopy(student).requires_grad_(False),
    )
    weights, fast_weights, slow_weights = (
        list(net.parameters()) for net in (student.requires_grad_(True), fast, slow)
    )
    optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True)
    schedule = (plateau if teacher else one_cycle)(optimizer, iterations)
    kept = {}
    for iteration in tqdm(range(1, iterations + 1), "student", leave=False):
        x_0, noise = data(batch, generator), torch.randn(batch, 2, generator=generator)
        windows = sc.sample_windows(config, batch, fusion=teacher is None, generator=generator)
        loss, _ = sc.shortcut_loss(
            config, windows, x_0, noise, student=student, fast=fast, slow=slow, teacher=teacher
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        sc.update_ema(fast_weights, weights, config.fast_decay)
        sc.update_ema(slow_weights, weights, config.slow_decay)
        if iteration in snapshots or iteration == iterations:
            kept[iteration] = copy.deepcopy(student).requires_grad_(False)
    return kept


# -------------------------------------------------------------------------------------------- metrics


def energy_distance(x: Tensor, y: Tensor, directions: int = 16) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points (n, 2) and (m, 2), unbiased; 0 for equal laws.

    In the plane |a| is pi/2 times the mean of |<a, e>| over directions e, and on a line the sums over
    all pairs need only a sort. Tests hold it against the direct sum.
    """
    angle = math.pi * torch.arange(directions) / directions
    lines = torch.stack([angle.cos(), angle.sin()])
    x, y = ((points @ lines).T.contiguous().numpy() for points in (x, y))

    def pair_sum(z):  # sum over i < j of |z_i - z_j|, mean over the lines
        rank = 2.0 * np.arange(z.shape[1]) - z.shape[1] + 1
        return math.pi / 2 * (np.sort(z) @ rank).mean()

    n, m, xx, yy = x.shape[1], y.shape[1], pair_sum(x), pair_sum(y)
    xy = pair_sum(np.concatenate([x, y], 1)) - xx - yy
    return 2 * (xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1)))


def sample(net: nn.Module, noise: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Euler samples (n, 2), 2,048 at a time: that fits a processor's cache."""
    times = sc.time_grid(steps, shift)
    return torch.cat([sc.euler_sample(net, chunk, times) for chunk in noise.split(2048)])


def calibrate(
    base: nn.Module, student: nn.Module, noise: Tensor, steps: int, shift: float = 1.0
) -> float:
    """Scale of the student for a number of steps, from validation noise alone: lam*, then a search.

    The search tries scales from lam* / 1.6 to 1.6 lam* for the sampler whose endpoints are, as a set, nearest
    to the teacher's fine endpoints from the same noise. (Pair by pair it would favour the average.)
    """
    guess = sc.optimal_scale(student, base, noise, sc.time_grid(steps, shift)).item()
    if not math.isfinite(guess):
        return 1.0
    target = sample(base, noise, FINE_STEPS, shift)

    def distance(scale):
        return energy_distance(sample(scaled(base, student, scale), noise, steps, shift), target)

    return min((guess * f for f in np.geomspace(1 / 1.6, 1.6, 21).tolist()), key=distance)


def evaluate(net_for, noise, data, fine, shift) -> dict[int, dict]:
    """For each number of steps: the samples, their energy distance to data, the RMS distance to fine."""
    rows = {}
    for steps in STEPS:
        x = sample(net_for(steps), noise, steps, shift)
        rms = (x - fine).square().sum(1).mean().sqrt().item()
        rows[steps] = {"samples": x, "energy": energy_distance(x, data), "paired": rms}
    return rows


def table(rows: dict[str, dict], scales: dict[int, float] | None, floor: float) -> list[str]:
    lines = [f"{'Euler steps':24s}" + "".join(f"{n:9d}" for n in STEPS)]
    lines.append(
        f"energy distance to fresh data, x 1e-4 (two draws of data: 0 +- {1e4 * floor:.1f})"
    )
    for name, row in rows.items():
        lines.append(f"  {name:22s}" + "".join(f"{1e4 * c['energy']:9.1f}" for c in row.values()))
    lines.append(
        f"RMS distance to the endpoint of {FINE_STEPS} steps of the first, from the same noise"
    )
    for name, row in rows.items():
        lines.append(f"  {name:22s}" + "".join(f"{c['paired']:9.3f}" for c in row.values()))
    if scales:
        lines.append(f"{'scale':24s}" + "".join(f"{scale:9.2f}" for scale in scales.values()))
    return lines


# -------------------------------------------------------------------------------------------- figures

BASE, STUDENT, SCALED = "#5b6b7f", "#e4572e", "#2a9d8f"  # one colour for each sampler, everywhere


def density(axis, points: Tensor, extent: float, title: str) -> None:
    """Smoothed histogram: unlike a scatter plot it shows holes, and probability where none belongs."""
    edges = np.linspace(-extent, extent, 97)
    image = np.histogram2d(*points.T.numpy(), bins=[edges, edges])[0].T
    kernel = np.array([0.25, 0.5, 0.25])
    for side in (0, 1):
        image = np.apply_along_axis(np.convolve, side, image, kernel, "same")
    box = (-extent, extent, -extent, extent)
    axis.imshow(image**0.5, origin="lower", extent=box, cmap="magma", interpolation="bilinear")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def plot_samples(rows: dict[str, dict], data: Tensor, floor: float, path: Path) -> None:
    extent = 1.15 * data.abs().max().item()
    figure = Figure(figsize=(14, 1.95 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(STEPS) + 1, squeeze=False)
    for line, (name, row), color in zip(grid, rows.items(), (BASE, STUDENT, SCALED)):
        for axis, (steps, cell) in zip(line, row.items()):
            label = f"{steps} steps: {1e4 * cell['energy']:.1f}".replace("1 steps", "1 step")
            density(axis, cell["samples"], extent, label)
        line[0].set_ylabel(name, fontsize=12, color=color, fontweight="bold")
        density(line[-1], data, extent, f"data: ±{1e4 * floor:.1f}")
    figure.suptitle("Energy distance to data × 10⁻⁴. The same noise in every panel.", fontsize=11)
    figure.savefig(path, dpi=110)


def trajectory(net: nn.Module, x: Tensor, times: Tensor) -> Tensor:
    """All states of the Euler sampler, (steps + 1, count, 2)."""
    states = [x]
    for i in range(len(times) - 1):
        states.append(sc.euler_sample(net, states[-1], times[i : i + 2]))
    return torch.stack(states)


def plot_paths(panels: dict[str, tuple], noise: Tensor, data: Tensor, shift: float, path: Path):
    extent = max(1.15 * data.abs().max().item(), 3.0)
    figure = Figure(figsize=(4.2 * len(panels), 4.5), layout="constrained")
    for axis, (title, (net, steps, color)) in zip(figure.subplots(1, len(panels)), panels.items()):
        states = trajectory(net, noise[:160], sc.time_grid(steps, shift))
        axis.scatter(*data[:4000].T, s=2, color="#f2c14e", alpha=0.35, linewidths=0)
        axis.add_collection(
            LineCollection(states.transpose(0, 1), colors=color, lw=0.7, alpha=0.55)
        )
        axis.scatter(*states[0].T, s=5, color="#b9c2cc", label="noise")
        if steps < 10:
            axis.scatter(*states[1:-1].flatten(0, 1).T, s=4, color=color, alpha=0.5)
        axis.scatter(*states[-1].T, s=14, color="black", zorder=3, linewidths=0, label="sample")
        axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect=1)
        axis.set_title(title, fontsize=12, color=color, fontweight="bold")
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_progress(progress: dict[int, dict], reference: dict[int, float], path: Path) -> None:
    """progress[iteration][steps] = (energy distance, lam* or None); reference: the base's distance."""
    lam = next(iter(progress.values()))[PROGRESS_STEPS[0]][1] is not None
    figure = Figure(figsize=(11, 4.2) if lam else (6, 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + lam, squeeze=False)[0]
    for steps, color in zip(PROGRESS_STEPS, ("#8e5ea2", "#e4572e", "#e9a23b", "#2a9d8f")):
        cells = [row[steps] for row in progress.values()]
        axes[0].plot(list(progress), [max(e, 1e-5) for e, _ in cells], "o-", ms=3, color=color)
        axes[0].axhline(reference[steps], color=color, lw=0.9, ls=":")
        if lam:
            axes[1].plot(list(progress), [s for _, s in cells], "o-", ms=3, color=color)
            axes[1].annotate(f"{steps} steps", (list(progress)[-1], cells[-1][1]), (5, -3),
                             textcoords="offset points", color=color)  # fmt: skip
        axes[0].annotate(f"{steps} steps", (list(progress)[-1], cells[-1][0]), (5, -3),
                         textcoords="offset points", color=color)  # fmt: skip
    axes[0].set(xscale="log", yscale="log", xlabel="iteration", title="Error of the student")
    axes[0].set_ylabel("energy distance to data (dotted: before)")
    if lam:
        axes[1].axhline(1, color="black", lw=1)
        axes[1].set(xscale="log", yscale="log", xlabel="iteration", title="Its best scale λ*")
        axes[1].set_yticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1: matched", "2", "4", "8"])
        axes[1].minorticks_off()
        axes[1].set_ylim(0.25, 8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.savefig(path, dpi=110)


def plot_quality(rows: dict[str, dict], floor: float, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for (name, row), color in zip(rows.items(), (BASE, STUDENT, SCALED)):
        errors = [max(cell["energy"], floor) for cell in row.values()]
        axis.plot(STEPS, errors, "o-", color=color, label=name)
    axis.axhspan(floor / 10, floor, color="#dddddd", label="noise floor")
    axis.set(xscale="log", yscale="log", xticks=STEPS, xticklabels=STEPS, ylim=(floor / 2, None))
    axis.set(xlabel="Euler steps (network calls)", ylabel="energy distance to data")
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def animate(panels: dict[str, tuple], noise: Tensor, data: Tensor, shift: float, path: Path):
    """A GIF of the same noise flowing to data along each sampler's own (piecewise straight) paths."""
    extent, frames = max(1.15 * data.abs().max().item(), 3.0), 48
    figure = Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
    artists = []
    for axis, (title, (net, steps, color)) in zip(figure.subplots(1, len(panels)), panels.items()):
        states = trajectory(net, noise[:1500], sc.time_grid(steps, shift))
        axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect=1)
        axis.set_title(title, fontsize=12, color=color, fontweight="bold")
        artists.append((axis.scatter(*states[0].T, s=3, color=color, linewidths=0), states, steps))
    writer = PillowWriter(fps=16)
    with writer.saving(figure, path, dpi=64):
        for frame in [0] * 8 + list(range(frames + 1)) + [frames] * 16:
            for dots, states, steps in artists:
                i = min(int(frame * steps / frames), steps - 1)
                dots.set_offsets(torch.lerp(states[i], states[i + 1], frame * steps / frames - i))
            writer.grab_frame()


# ----------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--flow", choices=FLOWS, default="moons", help="data distribution (default: moons)")
    add("--student-steps", type=int, metavar="N", help="step count to build for (default: 3)")
    add("--paper", action="store_true", help="the paper's windows, with its teacher share of 0.4")
    add("--fusion", action="store_true", help="train from scratch, without a teacher")
    add(
        "--few-shot",
        type=int,
        metavar="K",
        help="distil on a pool of K points (default: fresh data)",
    )
    add("--shift", type=float, default=1.0, help="time shift s; Flux uses about 3 (default: 1)")
    add("--iterations", type=int, default=2000, help="of teacher and student each (default: 2000)")
    add("--seed", type=int, default=0, help="of networks, data and noise (default: 0)")
    add("--out", type=Path, default=Path("toy_out"), help="folder for figures (default: toy_out)")
    add("--animate", action="store_true", help="also write flow.gif, noise flowing to data")
    args = parser.parse_args(argv)
    if args.paper and args.student_steps:
        parser.error("--paper has no --student-steps: its windows do not depend on a step count")
    if args.fusion and (args.few_shot or args.paper):
        parser.error("--fusion goes with neither --few-shot nor --paper")
    for name in ("iterations", "few_shot"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}"
            )
    return args


def main(argv: list[str] | None = None) -> dict:
    args, started = parse(argv), time.perf_counter()
    torch.set_num_threads(2)  # more only wait for each other at this size; and the table repeats
    data, shift, iterations = FLOWS[args.flow], args.shift, args.iterations
    draw = torch.Generator().manual_seed(
        10_000 + args.seed
    )  # measurement draws, apart from training
    reference, noise = data(POINTS, draw), torch.randn(POINTS, 2, generator=draw)
    validation = torch.randn(256, 2, generator=draw)
    again = [energy_distance(data(POINTS, draw), reference) for _ in range(6)]
    floor = float(np.mean(np.square(again)) ** 0.5)

    settings = dict(fast_decay=0.95, slow_decay=0.99)
    if args.paper:
        config = sc.ShortcutConfig(shift_range=(shift, shift), **settings)
    else:
        config = sc.ShortcutConfig.for_steps(args.student_steps or 3, shift, **settings)
    snapshots = {round(5 * (iterations / 5) ** (i / 9)) for i in range(10)}
    if args.fusion:  # plain flow matching gets as many network calls as the fused run makes
        calls = 1 + 2 * (1 - config.teacher_share(fusion=True))
        base = train_teacher(data, round(2 * iterations * calls), args.seed)
        kept = train_student(None, data, config, 2 * iterations, args.seed, snapshots)
        names = ("flow matching", "fused")
    else:
        base = train_teacher(data, iterations, args.seed)
        pool = pool_of(data(args.few_shot, draw)) if args.few_shot else data
        kept = train_student(base, pool, config, iterations, args.seed, snapshots)
        names = ("teacher", "student")
    student = kept[max(kept)]
    samplers = {names[0]: lambda steps: base, names[1]: lambda steps: student}
    if not args.fusion:
        scales = {n: calibrate(base, student, validation, n, shift) for n in STEPS}
        samplers["student, scaled"] = lambda steps: scaled(base, student, scales[steps])

    fine = sample(base, noise, FINE_STEPS, shift)
    rows = {n: evaluate(f, noise, reference, fine, shift) for n, f in samplers.items()}
    progress = {i: {} for i in sorted(kept)}
    for i, net in sorted(kept.items()):
        for steps in PROGRESS_STEPS:
            error = energy_distance(sample(net, noise[:4096], steps, shift), reference[:8192])
            times = sc.time_grid(steps, shift)
            lam = None if args.fusion else sc.optimal_scale(net, base, validation, times).item()
            progress[i][steps] = (error, lam)

    lines = table(rows, None if args.fusion else scales, floor)
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": vars(args) | {"out": str(args.out)},
        "floor": floor,
        "progress": progress,
    }
    results["rows"] = {
        name: {n: {k: cell[k] for k in ("energy", "paired")} for n, cell in row.items()}
        for name, row in rows.items()
    }
    results["scales"] = None if args.fusion else scales
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    few = args.student_steps or 3
    panels = {
        f"{names[0]}, {few} steps": (base, few, BASE),
        f"{names[0]}, {FINE_STEPS} steps": (base, FINE_STEPS, BASE),
        f"{names[1]}, {few} steps": (student, few, STUDENT),
    }
    plot_samples(rows, reference, floor, args.out / "samples.png")
    plot_paths(panels, noise, reference, shift, args.out / "paths.png")
    before = {n: rows[names[0]][n]["energy"] for n in PROGRESS_STEPS}
    plot_progress(progress, before, args.out / "progress.png")
    plot_quality(rows, floor, args.out / "quality.png")
    if args.animate:
        animate(panels, noise, reference, shift, args.out / "flow.gif")
    print(f"{args.out}/: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    print(f"{time.perf_counter() - started:.1f} s")
    return results


if __name__ == "__main__":
    main()
