"""Shortcut a flow-matching teacher on 2-D data and look at the result.

Trains a small teacher, distils two students from it with shortcut.py, one as the paper does and one
with windows matched to its number of steps, measures all against fresh data and draws four figures.
Needs no GPU, no network and no data set.
"""

# ruff: noqa: E402
import copy
import json
import math
import os
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

OUTPUTS = ("results.json", "samples.png", "paths.png", "progress.png", "quality.png", "flow.gif")
MARK = "toy_2d.py"  # in the figures, so that the program recognises them
FLOW_NAMES = ("moons", "checkerboard", "spirals", "gaussians")

# ----------------------------------------------------------------------------------------- settings


def flag(default: Any, text: str, limits: tuple[float, float] | None = None, choices=None):
    return field(default=default, metadata=dict(help=text, limits=limits, choices=choices))


@dataclass(frozen=True)
class Settings:
    """The flags of the command line: default, help, limits."""

    flow: str = flag("moons", "the data", choices=FLOW_NAMES)
    student_steps: int = flag(3, "steps that the matched student is trained for", (1, 32))
    shift: float = flag(1.0, "time shift s of training and sampling (Flux: 3)", (1e-3, 1e3))
    fusion: bool = flag(False, "train from scratch: 2x --iterations, flow matching alone 4x")
    few_shot: int = flag(0, "distil on so many data points only; 0: on all data", (0, 10**7))
    iterations: int = flag(2000, "of the teacher; the students take half of it", (1, 10**9))
    seed: int = flag(0, "of networks, data and noise", (0, 2**62))
    out: Path = flag(Path("toy_out"), "folder for figures and results.json")  # noqa: RUF009
    animate: bool = flag(False, "also write flow.gif, noise flowing to data")


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from the command line, without the slow imports. Makes the folder --out."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    names = {setting.name: "--" + setting.name.replace("_", "-") for setting in fields(Settings)}
    for setting in fields(Settings):
        kind = dict(type=setting.type, choices=setting.metadata["choices"])
        if setting.type is bool:
            kind = dict(action="store_true")
        text, default = setting.metadata["help"], setting.default
        parser.add_argument(names[setting.name], help=text, default=default, **kind)
    settings = Settings(**vars(parser.parse_args(argv)))

    for setting in fields(Settings):
        value, limits = getattr(settings, setting.name), setting.metadata["limits"]
        if limits and not limits[0] <= value <= limits[1]:
            name, (low, high) = names[setting.name], limits
            parser.error(f"{name} {value} must be between {low} and {high}")
    if settings.fusion and settings.few_shot:
        parser.error("--fusion and --few-shot exclude each other: leave one out")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.out).close()  # not allowed: say so before training
        foreign = foreign_files(settings.out)
    except OSError as error:
        parser.error(f"--out {settings.out}: {error.strerror}: give another --out")
    if foreign:
        reason = "is not from this program and would be replaced"
        parser.error(f"{foreign[0]} {reason}: move it, or give another --out")
    return settings


def foreign_files(folder: Path) -> list[Path]:
    """Files there that would be replaced, unless this program wrote the results or the samples."""
    present = [folder / name for name in OUTPUTS if (folder / name).exists()]
    with suppress(OSError, ValueError, AttributeError):  # damaged results are no proof
        results = json.loads((folder / "results.json").read_text())
        if {"energy", "rms", "settings"} <= results.keys():
            return []
    with suppress(OSError), open(folder / "samples.png", "rb") as file:
        if MARK.encode() in file.read(1000):
            return []
    return present


if __name__ == "__main__":
    parse()  # --help and wrong flags are answered before the imports below take their seconds

import numpy as np
import torch

if "ipykernel" not in sys.modules:  # a notebook's backend stays in the notebook: no figure needs it
    os.environ.pop("MPLBACKEND", None)
from matplotlib.animation import PillowWriter
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from tqdm import tqdm

import shortcut as sc

STEPS = (1, 2, 3, 4, 8, 16, 32)  # columns of the table
FINE_STEPS = 64  # what stands for the teacher's exact endpoint
POINTS = 8_192  # samples behind an energy distance
UNIT = 1e-4  # of energy distances in table, figures and results.json
COLORS = {
    "teacher": "#5b6b7f",
    "SCFM as published": "#e4572e",
    "matched": "#2a9d8f",
    "matched, scaled": "#7b4fa3",
    "flow matching": "#5b6b7f",
    "fused as published": "#e4572e",
    "fused, matched": "#2a9d8f",
    "data": "#f2c14e",
}
Data = Callable[[int, torch.Generator], Tensor]  # (count, generator) -> points (count, 2)
Rows = dict[str, dict[int, Any]]  # a table: name of the row, column, cell

# -------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    try:
        run(settings)
    except KeyboardInterrupt:
        raise SystemExit("toy_2d.py: stopped; the same command starts over") from None
    except OSError as error:
        where, reason = error.filename or settings.out, error.strerror or error
        sentence = f"toy_2d.py: {where}: {reason}; mend that, or give another --out"
        raise SystemExit(sentence) from None


def run(settings: Settings) -> None:
    """Train, measure, print, draw."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors are small: more would only wait for each other
    data, out = FLOWS[settings.flow], settings.out
    N, shift, seed = settings.student_steps, settings.shift, settings.seed
    generator = torch.Generator().manual_seed(seed + 10_000)
    probe = draw_probe(data, generator)

    published = sc.ShortcutConfig(shift_range=(shift, shift))
    matched = sc.MatchedConfig(N, shift_range=(shift, shift))
    if settings.fusion:
        iterations = 2 * settings.iterations
        base = train_teacher(data, 2 * iterations, seed)  # half the network calls in an iteration
        train = partial(fuse, data)
        matched = replace(matched, slow_decay=published.fast_decay)
        base_name, *names = "flow matching", "fused as published", "fused, matched"
    else:
        iterations = max(1, settings.iterations // 2)
        base = train_teacher(data, settings.iterations, seed)
        drawn = draw_from(data(settings.few_shot, generator)) if settings.few_shot else data
        train = partial(distil, base, drawn)
        base_name, *names = "teacher", "SCFM as published", "matched"
    snapshots = {round(2 * (iterations / 2) ** (i / 8)) for i in range(9)}  # in equal ratios
    students = {
        name: train(config, iterations, seed, snapshots)
        for name, config in zip(names, (published, matched))
    }
    nets = {base_name: base} | {name: kept[iterations] for name, kept in students.items()}

    steps = sorted({*STEPS, N})
    samplers = {name: dict.fromkeys(steps, net) for name, net in nets.items()}
    scales = {}
    if not settings.fusion:
        student = nets["matched"]
        scales = {n: calibrate(base, student, probe.validation, n, shift) for n in steps}
        samplers["matched, scaled"] = {n: scaled(base, student, scales[n]) for n in steps}

    samples = each(samplers, lambda n, net: sample(net, probe.noise, n, shift))
    fine = sample(base, probe.noise, FINE_STEPS, shift)
    energy = each(samples, lambda n, x: energy_distance(x, probe.data) / UNIT)
    rms = each(samples, lambda n, x: (x - fine).square().sum(1).mean().sqrt().item())
    print(table(energy, rms, scales, probe.floor))

    watched = sorted({2, 4, 8, N})
    errors = {n: errors_of(students, probe, n, shift) for n in watched}
    lams = {} if settings.fusion else {n: lams_of(students, base, probe, n, shift) for n in watched}
    results = dict(energy=energy, rms=rms, floor=probe.floor, scales=scales, errors=errors)
    results |= dict(lams=lams, settings=asdict(settings))
    with whole(out / "results.json") as part:
        part.write_text(json.dumps(results, indent=1, default=str) + "\n")

    panels = [Panel(name, net, N) for name, net in nets.items()]
    panels.append(Panel(base_name, base, FINE_STEPS))
    plot_samples(samples, energy, probe, out / "samples.png")
    plot_paths(panels, probe, shift, out / "paths.png")
    plot_progress(errors, lams, energy, probe.floor, out / "progress.png")
    plot_quality(energy, N, probe.floor, out / "quality.png")
    if settings.animate:
        animate(panels, probe, shift, out / "flow.gif")
    print(f"{time.perf_counter() - started:.1f} s; figures and results.json in {out}/")


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
    arm = math.pi * torch.randint(0, 2, (count, 1), generator=generator)
    angle = 3 * math.pi * radius + arm
    points = 2 * radius * torch.cat([angle.cos(), angle.sin()], 1)
    return points + 0.05 * torch.randn(count, 2, generator=generator)


def gaussians(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi / 4 * torch.randint(0, 8, (count, 1), generator=generator)
    centre = 1.8 * torch.cat([angle.cos(), angle.sin()], 1)
    return centre + 0.1 * torch.randn(count, 2, generator=generator)


FLOWS: dict[str, Data] = dict(zip(FLOW_NAMES, (moons, checkerboard, spirals, gaussians)))


def draw_from(pool: Tensor) -> Data:
    """Few-shot data: draws from the points of the pool, with replacement."""
    return lambda count, generator: pool[torch.randint(len(pool), (count,), generator=generator)]


def draw_pairs(data: Data, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Data and noise of a batch, (batch, 2) each."""
    return data(batch, generator), torch.randn(batch, 2, generator=generator)


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


def frozen(net: nn.Module) -> nn.Module:
    """A copy without gradients."""
    return copy.deepcopy(net).requires_grad_(False)


def scaled(base: nn.Module, student: nn.Module, scale: float) -> nn.Module:
    """Network of weights base + scale (student - base): what a LoRA scale does, in one call."""
    net = frozen(student)
    for weight, start in zip(net.parameters(), base.parameters()):
        weight.copy_(start.lerp(weight, scale))  # lerp is exact at 0 and 1
    return net


# ---------------------------------------------------------------------------------------- training


def train_teacher(data: Data, iterations: int, seed: int) -> nn.Module:
    """Plain flow matching: the velocity is regressed on noise - x_0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher = VelocityMLP()

    def loss() -> Tensor:
        x_0, noise = draw_pairs(data, 1024, generator)
        t = torch.rand(1024, generator=generator)
        v = teacher(sc.interpolate(x_0, noise, t), t)
        return (v - (noise - x_0)).square().mean()

    for _ in minimize(loss, teacher, "teacher", 5e-3, iterations, warmup=100):
        pass
    return teacher.requires_grad_(False)


def distil(
    teacher, data, config, iterations, seed, snapshots=(),
    *, batch=512, rate=2e-3, warmup=1, ema_warmup=True,
) -> dict[int, nn.Module]:  # fmt: skip
    """Shortcut the teacher by Algorithm 2 (ShortcutConfig) or with matched windows (MatchedConfig).

    ema_warmup: EMAs average over no more than a quarter of the run so far; the paper's do not.
    Returns copies of the student after each of the snapshots and after the last iteration.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    fast, slow = frozen(teacher), frozen(teacher)
    matched = isinstance(config, sc.MatchedConfig)

    def loss() -> Tensor:
        x_0, noise = draw_pairs(data, batch, generator)
        if matched:
            windows = sc.matched_windows(config, batch, generator=generator)
            first, second = sc.matched(windows, teacher, slow)
        else:
            windows = sc.sample_windows(config, batch, generator=generator)
            first, second = sc.dual(windows, teacher, fast, slow)
        return sc.shortcut_loss(windows, x_0, noise, student, first, second)[0]

    emas = [(slow, config.slow_decay)]
    if not matched:
        emas.append((fast, config.fast_decay))
    steps = minimize(loss, student, "student", rate, iterations, warmup)
    return snapshots_of(student, steps, emas, ema_warmup, {*snapshots, iterations})


def fuse(
    data, config, iterations, seed, snapshots=(),
    *, batch=1024, rate=5e-3, warmup=100, ema_warmup=True,
) -> dict[int, nn.Module]:  # fmt: skip
    """Train a few-step network from scratch; in all else as `distil`.

    Its one EMA has the fast_decay of a ShortcutConfig, 0.99: a slow copy of random weights is no
    teacher. A MatchedConfig has only slow_decay; set it to as little.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    student = VelocityMLP()
    ema = frozen(student)
    matched = isinstance(config, sc.MatchedConfig)

    def loss() -> Tensor:
        x_0, noise = draw_pairs(data, batch, generator)
        if matched:
            windows = sc.matched_windows(config, batch, fuse=True, generator=generator)
            first, second = sc.matched_fusion(windows, x_0, noise, ema)
        else:
            windows = sc.sample_windows(config, batch, fuse=True, generator=generator)
            first, second = sc.fusion(windows, x_0, noise, ema)
        return sc.shortcut_loss(windows, x_0, noise, student, first, second)[0]

    emas = [(ema, config.slow_decay if matched else config.fast_decay)]
    steps = minimize(loss, student, "fused", rate, iterations, warmup)
    return snapshots_of(student, steps, emas, ema_warmup, {*snapshots, iterations})


def minimize(
    loss: Callable[[], Tensor], net: nn.Module, name: str, rate: float, iterations: int, warmup: int
) -> Iterator[int]:
    """Train the network on a loss that draws its own batch; yields 1, 2, ... after each step."""
    optimizer, schedule = adam(list(net.parameters()), rate, iterations, warmup)
    for iteration in tqdm(range(1, iterations + 1), name, leave=False):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
        yield iteration


def snapshots_of(student, steps, emas, ema_warmup: bool, wanted: set[int]) -> dict[int, nn.Module]:
    """Run training steps, each followed by (EMA, decay) pairs, and keep copies of the student."""
    kept = {}
    for iteration in steps:
        for ema, decay in emas:
            decay = sc.warm_up(decay, iteration) if ema_warmup else decay
            sc.update_ema(ema.parameters(), student.parameters(), decay)
        if iteration in wanted:
            kept[iteration] = frozen(student)
    return kept


def adam(weights: list[Tensor], rate: float, iterations: int, warmup: int):
    """Adam, up to the rate in `warmup` iterations, then constant, in the second half down to 0."""
    optimizer = torch.optim.Adam(weights, rate, fused=True)

    def factor(i: int) -> float:
        return min((i + 1) / warmup, 1, 2 - 2 * i / iterations)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --------------------------------------------------------------------------------------- measuring


class Probe(NamedTuple):
    """What all samplers are measured with."""

    data: Tensor  # (2 POINTS, 2), fresh
    noise: Tensor  # (POINTS, 2)
    validation: Tensor  # (256, 2), noise for calibration only
    floor: float  # standard deviation of the energy distance from data to data


def draw_probe(data: Data, generator: torch.Generator) -> Probe:
    reference = data(2 * POINTS, generator)
    noise = torch.randn(POINTS, 2, generator=generator)
    validation = torch.randn(256, 2, generator=generator)
    repeats = [energy_distance(data(POINTS, generator), reference) / UNIT for _ in range(8)]
    return Probe(reference, noise, validation, np.std(repeats).item())


def energy_distance(x: Tensor, y: Tensor, directions: int = 16) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points (n, 2) and (m, 2), unbiased.

    It is 0 for equal distributions. In the plane |a| is pi/2 times the mean of |<a, e>| over
    directions e, and on a line a sort gives the sum over all pairs. So thousands of points are
    quick; a test compares the direct sum.
    """
    angle = math.pi * torch.arange(directions) / directions
    axes = torch.stack([angle.cos(), angle.sin()])
    x, y = (x @ axes).T.numpy(), (y @ axes).T.numpy()

    def pair_sum(z) -> float:  # sum over i < j of |z_i - z_j|, averaged over the directions
        rank = 2.0 * np.arange(z.shape[1]) - z.shape[1] + 1
        return math.pi / 2 * (np.sort(z) @ rank).mean().item()

    n, m = x.shape[1], y.shape[1]
    xx, yy = pair_sum(x), pair_sum(y)
    xy = pair_sum(np.concatenate([x, y], 1)) - xx - yy
    return 2 * (xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1)))


def sample(net: nn.Module, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Euler samples of noise x (n, 2), 2,048 at a time: that fits a processor's cache."""
    times = sc.time_grid(steps, shift)
    return torch.cat([sc.euler_sample(net, part, times) for part in x.split(2048)])


def calibrate(base: nn.Module, student: nn.Module, noise: Tensor, steps: int, shift=1.0) -> float:
    """Scale of the student for a number of steps, from validation noise alone: lam*, then a search.

    Of the scales within a factor of 1.6 around lam* it takes the one whose samples are, as a set,
    nearest to the teacher's fine endpoints from the same noise. (Sample by sample, the mean square
    would favour scales that blur.)
    """
    path = sc.teacher_path(base, noise, sc.time_grid(steps, shift))
    lam = sc.optimal_scale(student, path).clamp(0.01, 10).item()
    target = sample(base, noise, FINE_STEPS, shift)

    def distance(scale: float) -> float:
        return energy_distance(sample(scaled(base, student, scale), noise, steps, shift), target)

    return min(np.geomspace(lam / 1.6, lam * 1.6, 21).tolist(), key=distance)


def errors_of(students: Rows, probe: Probe, steps: int, shift: float) -> Rows:
    """Energy distance of each student's snapshots in so many steps."""

    def error(iteration: int, net: nn.Module) -> float:
        return energy_distance(sample(net, probe.noise, steps, shift), probe.data) / UNIT

    return each(students, error)


def lams_of(students: Rows, base: nn.Module, probe: Probe, steps: int, shift: float) -> Rows:
    """lam* of each student's snapshots for so many steps."""
    path = sc.teacher_path(base, probe.validation, sc.time_grid(steps, shift))
    return each(students, lambda iteration, net: sc.optimal_scale(net, path).item())


def each(rows: Rows, function: Callable[[int, Any], Any]) -> Rows:
    """The rows with function(column, cell) in place of every cell."""
    return {
        name: {column: function(column, cell) for column, cell in row.items()}
        for name, row in rows.items()
    }


def table(energy: Rows, rms: Rows, scales: dict[int, float], floor: float) -> str:
    """What the program prints."""

    def line(name: str, form: str, values: Iterable) -> str:
        return f"{name:19s}" + "".join(f"{value:{form}}" for value in values)

    base, columns = next(iter(energy.items()))
    lines = [line("Euler steps", "9d", columns)]
    lines += [f"energy distance to fresh data, x 1e-4 (data to data: 0 +- {floor:.1f})"]
    lines += [line(f"  {name}", "9.1f", row.values()) for name, row in energy.items()]
    lines += [f"RMS distance to where {FINE_STEPS} steps of the {base} end"]
    lines += [line(f"  {name}", "9.3f", row.values()) for name, row in rms.items()]
    if scales:
        lines += [line("calibrated scale", "9.2f", scales.values())]
    return "\n".join(lines)


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


def save(figure: Figure, path: Path) -> None:
    with whole(path) as part:
        figure.savefig(part, dpi=100, metadata={"Software": MARK})


def in_steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def plot_samples(samples: Rows, energy: Rows, probe: Probe, path: Path) -> None:
    """Densities: unlike scatter plots they show holes, and mass where none belongs."""
    columns = len(next(iter(samples.values()))) + 1
    height = 2.2 * len(samples) + 0.4
    figure = Figure((2 * columns, height))
    grid = figure.subplots(len(samples), columns)
    figure.subplots_adjust(0.02, 0.01, 0.998, 1 - 0.6 / height, wspace=0.04, hspace=0.15)
    edges = np.linspace(-1.15, 1.15, 81) * probe.data.abs().max().item()
    for axes, (name, row) in zip(grid, samples.items()):
        titles = [f"{in_steps(n)}: {energy[name][n]:.1f}" for n in row]
        titles.append(f"data: 0 ± {probe.floor:.1f}")
        for axis, points, title in zip(axes, [*row.values(), probe.data], titles):
            image = np.histogram2d(*points.T.numpy(), bins=[edges, edges])[0].T
            axis.imshow(image**0.5, origin="lower", cmap="magma", interpolation="bicubic")
            axis.set(xticks=[], yticks=[], title=title)
        axes[0].set_ylabel(name, fontsize=12, color=COLORS[name], fontweight="bold")
    figure.suptitle("Energy distance to the data, x 1e-4; the same noise in all panels")
    save(figure, path)


def draw_lines(axis, lines: Rows) -> None:
    """Log-log lines {name: {x: y}}."""
    for name, points in lines.items():
        axis.plot(list(points), list(points.values()), "o-", ms=4, color=COLORS[name], label=name)
    axis.set(xscale="log", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)


def set_ticks(axis) -> None:
    """Plain numbers, more of them where an axis spans little."""
    for ticks, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        ticks.set_major_formatter("{x:g}")
    axis.minorticks_off()


def draw_floor(axis, floor: float) -> None:
    """Distances as short as from data to data; what is below half of that is at the bottom."""
    axis.axhspan(0, floor, color=COLORS["data"], alpha=0.5, lw=0, label="data to data")
    axis.set_ylim(bottom=floor / 2)


def plot_progress(errors: dict, lams: dict, energy: Rows, floor: float, path: Path) -> None:
    """Error over training, a panel for each number of steps; below it lam*, if there is any."""
    rows = [errors, lams] if lams else [errors]
    figure = Figure((3.6 * len(errors), 2.9 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(errors), sharex=True, sharey="row", squeeze=False)
    base = next(iter(energy))
    for axis, (n, lines) in zip(grid[0], errors.items()):
        draw_lines(axis, lines)
        axis.axhline(energy[base][n], color=COLORS[base], ls="--", label=base)
        draw_floor(axis, floor)
        axis.set_title(in_steps(n))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    for axis, lines in zip(grid[-1], lams.values()):
        draw_lines(axis, lines)
        axis.axhline(1, color="black", lw=0.8)
    for axis, label in zip(grid[:, 0], ("energy distance, x 1e-4", "best scale λ*")):
        axis.set_ylabel(label)
    for axis in grid[-1]:
        axis.set_xlabel("iteration")
    for axis in grid.flat:
        set_ticks(axis)
    save(figure, path)


def plot_quality(energy: Rows, steps: int, floor: float, path: Path) -> None:
    """Error over the number of steps."""
    figure = Figure((6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    draw_lines(axis, energy)
    draw_floor(axis, floor)
    set_ticks(axis)
    axis.set_xticks(STEPS, STEPS)
    axis.set(xlabel=f"Euler steps (matched: trained for {steps})")
    axis.set(ylabel="energy distance to the data, x 1e-4")
    figure.legend(loc="outside upper center", ncols=3)
    save(figure, path)


class Panel(NamedTuple):
    """A sampler in a figure of paths."""

    name: str
    net: nn.Module
    steps: int

    def states(self, x: Tensor, shift: float) -> Tensor:
        """All states of the sampler from noise x (n, 2): (steps + 1, n, 2)."""
        states = [x]
        for times in pairwise(sc.time_grid(self.steps, shift)):
            states.append(sc.euler_sample(self.net, states[-1], torch.stack(times)))
        return torch.stack(states)


def draw_panels(panels: list[Panel], data: Tensor, height: float) -> tuple[Figure, list]:
    """A square for each panel, with the data faint in it."""
    figure = Figure((3.6 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels))
    limit = max(1.15 * data.abs().max().item(), 3)
    for axis, panel in zip(axes, panels):
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect=1)
        title = f"{panel.name}, {in_steps(panel.steps)}"
        axis.set_title(title, fontsize=12, color=COLORS[panel.name], fontweight="bold")
        axis.scatter(*data[:4000].T, s=2, color=COLORS["data"], alpha=0.35, lw=0, label="data")
    return figure, axes


def plot_paths(panels: list[Panel], probe: Probe, shift: float, path: Path) -> None:
    """The way of some samples from noise to data."""
    figure, axes = draw_panels(panels, probe.data, 4.4)
    for axis, panel in zip(axes, panels):
        states, color = panel.states(probe.noise[:160], shift), COLORS[panel.name]
        axis.add_collection(LineCollection(states.transpose(0, 1), colors=color, lw=0.7, alpha=0.6))
        axis.scatter(*states[0].T, s=7, color="#a9b4c0", lw=0, label="noise", zorder=3)
        axis.scatter(*states[-1].T, s=15, color="black", lw=0, label="sample", zorder=3)
    legend = figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for handle in legend.legend_handles:
        handle.set(alpha=1, sizes=[30])
    save(figure, path)


def animate(panels: list[Panel], probe: Probe, shift: float, path: Path) -> None:
    """A GIF of noise flowing to data along each sampler's own paths, straight between its steps."""
    figure, axes = draw_panels(panels, probe.data, 4.1)
    paths = [panel.states(probe.noise[:1500], shift) for panel in panels]
    dots = [
        axis.scatter(*states[0].T, s=4, color=COLORS[panel.name], lw=0)
        for axis, states, panel in zip(axes, paths, panels)
    ]
    frames = 48
    writer = PillowWriter(fps=16)
    with whole(path) as part, writer.saving(figure, part, dpi=60):
        for frame in [0] * 8 + list(range(frames + 1)) + [frames] * 16:
            for dot, states in zip(dots, paths):
                place = frame / frames * (len(states) - 1)
                i = min(int(place), len(states) - 2)
                dot.set_offsets(torch.lerp(states[i], states[i + 1], place - i))
            writer.grab_frame()


if __name__ == "__main__":
    main()
