"""Shortcut a flow-matching teacher on 2-D data and look at the result.

Trains a small teacher and distils two students from it with shortcut.py: one with the paper's
windows, one with windows matched to the number of steps in which it will sample. Compares them with
fresh data and draws four figures. Needs no GPU, no internet connection and no data set.
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
from dataclasses import Field, asdict, dataclass, field, fields
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

    flow: str = flag("moons", "data distribution", choices=FLOW_NAMES)
    student_steps: int = flag(
        3, "number of sampling steps that the matched student is trained for", (1, 32)
    )
    shift: float = flag(
        1.0,
        "time shift of the students' training and of sampling (1: none; FLUX.1: 3)",
        (1e-3, 1e3),
    )
    fusion: bool = flag(
        False,
        "instead of distilling, train few-step networks from scratch, on data and on their own EMA,"
        " in twice --iterations, and compare them with plain flow matching, in four times"
        " --iterations",
    )
    few_shot: int = flag(0, "number of data points that the students see; 0: no limit", (0, 10**7))
    iterations: int = flag(
        2000,
        "training iterations of the teacher; its students get half as many (but see --fusion)",
        (1, 10**9),
    )
    seed: int = flag(0, "random seed for networks, data and noise", (0, 2**62))
    out: Path = flag(Path("toy_out"), "folder for figures and results.json")
    animate: bool = flag(False, "also write flow.gif, an animation of noise flowing to data")


def flag_name(setting: Field) -> str:
    return "--" + setting.name.replace("_", "-")


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from the command line. Makes the folder --out."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    for setting in fields(Settings):
        how = dict(type=setting.type, choices=setting.metadata["choices"])
        if setting.type is bool:
            how = dict(action="store_true")
        text = setting.metadata["help"]
        parser.add_argument(flag_name(setting), default=setting.default, help=text, **how)
    settings = Settings(**vars(parser.parse_args(argv)))

    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        limits = setting.metadata["limits"]
        if limits is None:
            continue
        low, high = limits
        if not low <= value <= high:
            parser.error(f"{flag_name(setting)} {value} must be between {low} and {high}")
    if settings.fusion and settings.few_shot:
        parser.error("--fusion and --few-shot cannot be combined: leave one out")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.out).close()  # fail now rather than after training
        foreign = foreign_files(settings.out)
    except OSError as error:
        parser.error(f"--out {settings.out}: {error.strerror}: give another --out")
    if foreign:
        reason = "was not written by this program and would be replaced"
        parser.error(f"{foreign[0]} {reason}: move it, or give another --out")
    return settings


def foreign_files(folder: Path) -> list[Path]:
    """Files of others that a run there would replace, now or later with --animate.

    If samples.png is from this program, so is the folder, and there are none.
    """
    with suppress(OSError), open(folder / "samples.png", "rb") as file:
        if MARK.encode() in file.read(1000):
            return []
    return [folder / name for name in OUTPUTS if (folder / name).exists()]


if __name__ == "__main__":
    parse()  # a first parse, so that --help and wrong flags are answered at once; main parses again

import numpy as np
import torch

if "ipykernel" not in sys.modules:
    # A shell that was started from a notebook inherits its MPLBACKEND, and matplotlib fails to
    # import if it cannot find that backend. Figures are only saved, which takes none.
    os.environ.pop("MPLBACKEND", None)
from matplotlib.animation import PillowWriter
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import shortcut as sc

STEPS = (1, 2, 3, 4, 8, 16, 32)  # columns of the table
FINE_STEPS = 64  # Euler steps of the teacher whose endpoints stand for the exact ones
SCALES = (0.01, 10)  # a first guess at a scale is clamped to these; a search stops beyond them
POINTS = 8_192  # generated samples in a measured energy distance; twice as many of the data
UNIT = 1e-4  # of energy distances in table, figures and results.json
UNIT_TEXT = "x 1e-4"
COLORS = {
    "teacher": "#5b6b7f",
    "flow matching": "#5b6b7f",
    "SCFM as published": "#e4572e",
    "matched": "#2a9d8f",
    "matched, scaled": "#7b4fa3",
    "data": "#f2c14e",
}
Data = Callable[[int, torch.Generator], Tensor]  # draws: (count, generator) -> points (count, 2)
Table = dict[str, dict[int, Any]]  # {row: {column: cell}}; a column is a step count or an iteration
Panels = list[tuple[str, Tensor]]  # name of a sampler, its states (steps + 1, n, 2)

# -------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    try:
        run(settings)
    except KeyboardInterrupt:
        raise SystemExit("toy_2d.py: stopped; repeat the command to start over") from None
    except OSError as error:
        where = error.filename or settings.out
        reason = error.strerror or error
        sentence = f"toy_2d.py: {where}: {reason}; fix that, or give another --out"
        raise SystemExit(sentence) from None


def run(settings: Settings) -> None:
    """Train, measure, print, draw."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # more threads only slow down such small tensors
    N = settings.student_steps
    shift = settings.shift
    data = FLOWS[settings.flow]
    generator = torch.Generator().manual_seed(settings.seed + 10_000)
    probe = draw_probe(data, generator)

    if settings.fusion:
        base_name = "flow matching"
        iterations = 2 * settings.iterations
        # Network calls for a row of a batch (a backward pass counts as two): 3 in plain flow
        # matching, about 4 in the few-step networks. In twice their iterations plain flow matching
        # makes 1.4 to 1.5 times their calls, so that the comparison does not favour them.
        base = train_teacher(data, 2 * iterations, settings.seed)
        train_student = partial(fuse, data)
    else:
        base_name = "teacher"
        iterations = max(1, settings.iterations // 2)
        base = train_teacher(data, settings.iterations, settings.seed)
        few = settings.few_shot
        student_data = draw_from(data(few, generator)) if few else data
        train_student = partial(distil, base, student_data)
    configs = {
        # except for our shift (the paper's: 2.5 to 4.5) and EMA warm-up (see `Recipe`)
        "SCFM as published": sc.ShortcutConfig(shift_range=(shift, shift)),
        "matched": sc.MatchedConfig(N, shift_range=(shift, shift)),
    }
    # iterations at which a student is copied, evenly spaced on a log axis
    snapshots = {round(i) for i in np.geomspace(2, iterations, 9).tolist()}
    students = {
        name: train_student(config, iterations, settings.seed, snapshots)
        for name, config in configs.items()
    }
    nets = {base_name: base} | {name: kept[iterations] for name, kept in students.items()}

    steps = sorted({*STEPS, N})
    # The network to sample with in n steps: the same for all n, except in the scaled row. The base
    # is the first row, here and in all tables made from this one.
    samplers = {name: dict.fromkeys(steps, net) for name, net in nets.items()}
    scales = {}
    if not settings.fusion:
        student = nets["matched"]
        scales = {n: calibrate(base, student, probe.validation, n, shift) for n in steps}
        samplers["matched, scaled"] = {n: scaled(base, student, scales[n]) for n in steps}

    samples = map_cells(samplers, lambda n, net: sample(net, probe.noise, n, shift))
    endpoints = sample(base, probe.noise, FINE_STEPS, shift)
    energy = map_cells(samples, lambda n, x: energy_distance(x, probe.data) / UNIT)
    rms = map_cells(samples, lambda n, x: (x - endpoints).square().sum(1).mean().sqrt().item())
    print(table(energy, rms, scales, probe.floor))

    watched = sorted({2, 4, 8, N})
    errors = {n: errors_of(students, probe, n, shift) for n in watched}
    lams = {} if settings.fusion else {n: lams_of(students, base, probe, n, shift) for n in watched}
    results = dict(
        energy=energy,
        rms=rms,
        floor=probe.floor,
        scales=scales,
        errors=errors,
        lams=lams,
        settings=asdict(settings),
    )

    out = settings.out
    plot_samples(samples, energy, probe, out / "samples.png")  # first: it marks the folder as ours
    with whole(out / "results.json") as part:
        part.write_text(json.dumps(results, indent=1, default=str) + "\n")
    plot_progress(errors, lams, energy, probe.floor, out / "progress.png")
    plot_quality(energy, N, probe.floor, out / "quality.png")
    noise = probe.noise[:1500]
    panels = [(name, trajectory(net, noise, N, shift)) for name, net in nets.items()]
    panels.append((base_name, trajectory(base, noise, FINE_STEPS, shift)))
    plot_paths(panels, probe.data, out / "paths.png")
    if settings.animate:
        animate(panels, probe.data, out / "flow.gif")
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


FLOWS: dict[str, Data] = {flow.__name__: flow for flow in (moons, checkerboard, spirals, gaussians)}


def draw_from(pool: Tensor) -> Data:
    """Few-shot data: draws from the points of the pool, with replacement."""
    return lambda count, generator: pool[torch.randint(len(pool), (count,), generator=generator)]


def draw_pairs(data: Data, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Data and noise of a batch, (batch, 2) each."""
    return data(batch, generator), torch.randn(batch, 2, generator=generator)


# ---------------------------------------------------------------------------------------- networks


class VelocityMLP(nn.Module):
    """v(x, t) for x (B, 2) and t (B,); t is embedded with sines and cosines at four frequencies."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(11, width),  # 11 = x (2) + t (1) + sin and cos at 4 frequencies (8)
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t[:, None] * (math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]))
        return self.layers(torch.cat([x, t[:, None], phase.sin(), phase.cos()], 1))


def frozen(net: nn.Module) -> nn.Module:
    """A copy without gradients."""
    return copy.deepcopy(net).requires_grad_(False)


def scaled(base: nn.Module, student: nn.Module, scale: float) -> nn.Module:
    """Network of weights base + scale (student - base): the effect of scaling a LoRA."""
    net = frozen(student)
    for weight, start in zip(net.parameters(), base.parameters()):
        weight.copy_(start.lerp(weight, scale))  # lerp is exact at 0 and 1
    return net


# ---------------------------------------------------------------------------------------- training


class Recipe(NamedTuple):
    """How a network is trained, apart from its loss."""

    batch: int
    rate: float  # the highest learning rate
    warmup: int  # iterations until the learning rate gets there
    ema_warmup: bool = True  # warm the EMAs up, too (`sc.warm_up`); the paper does not


FROM_SCRATCH = Recipe(batch=1024, rate=5e-3, warmup=100)
DISTILLATION = Recipe(batch=512, rate=2e-3, warmup=1)  # at the full rate from the start


def train_teacher(data: Data, iterations: int, seed: int) -> nn.Module:
    """Plain flow matching: the velocity is regressed on noise - x_0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher = VelocityMLP()
    recipe = FROM_SCRATCH

    def loss() -> Tensor:
        x_0, noise = draw_pairs(data, recipe.batch, generator)
        t = torch.rand(recipe.batch, generator=generator)
        v = teacher(sc.interpolate(x_0, noise, t), t)
        return (v - (noise - x_0)).square().mean()

    for _ in minimize(loss, teacher, "flow matching", recipe.rate, iterations, recipe.warmup):
        pass
    return teacher.requires_grad_(False)


def distil(
    teacher: nn.Module,
    data: Data,
    config: sc.ShortcutConfig | sc.MatchedConfig,
    iterations: int,
    seed: int,
    snapshots: Iterable[int] = (),
    recipe: Recipe = DISTILLATION,
) -> dict[int, nn.Module]:
    """Distil the teacher by Algorithm 2 (ShortcutConfig) or with matched windows (MatchedConfig).

    Returns {iteration: copy of the student}, for each of the snapshots and the last iteration.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    slow = frozen(teacher)
    emas = [(slow, config.slow_decay)]
    if isinstance(config, sc.MatchedConfig):
        velocities = partial(sc.matched, teacher=teacher, slow=slow)
    else:
        fast = frozen(teacher)
        emas.append((fast, config.fast_decay))
        velocities = partial(sc.dual, teacher=teacher, fast=fast, slow=slow)

    def loss() -> Tensor:
        x_0, noise = draw_pairs(data, recipe.batch, generator)
        windows = draw_windows(config, recipe.batch, generator)
        first, second = velocities(windows)
        return sc.shortcut_loss(windows, x_0, noise, student, first, second)[0]

    return train(loss, student, emas, iterations, snapshots, recipe)


def fuse(
    data: Data,
    config: sc.ShortcutConfig | sc.MatchedConfig,
    iterations: int,
    seed: int,
    snapshots: Iterable[int] = (),
    recipe: Recipe = FROM_SCRATCH,
    decay: float = 0.99,
) -> dict[int, nn.Module]:
    """Train a few-step network from scratch; otherwise as `distil`.

    decay: of the EMA, in place of the config's decays: 0.99, which is fast_decay by default.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    student = VelocityMLP()
    ema = frozen(student)
    velocities = sc.matched_fusion if isinstance(config, sc.MatchedConfig) else sc.fusion

    def loss() -> Tensor:
        x_0, noise = draw_pairs(data, recipe.batch, generator)
        windows = draw_windows(config, recipe.batch, generator, fuse=True)
        first, second = velocities(windows, x_0, noise, ema)
        return sc.shortcut_loss(windows, x_0, noise, student, first, second)[0]

    return train(loss, student, [(ema, decay)], iterations, snapshots, recipe)


def draw_windows(
    config: sc.ShortcutConfig | sc.MatchedConfig,
    batch: int,
    generator: torch.Generator,
    fuse: bool = False,
) -> sc.Windows:
    """The paper's windows or matched ones, whichever the config is for."""
    if isinstance(config, sc.MatchedConfig):
        return sc.matched_windows(config, batch, fuse, generator)
    if isinstance(config, sc.ShortcutConfig):
        return sc.sample_windows(config, batch, fuse, generator=generator)
    raise TypeError(f"no windows for a {type(config).__name__}")


def train(
    loss: Callable[[], Tensor],
    student: nn.Module,
    emas: list[tuple[nn.Module, float]],
    iterations: int,
    snapshots: Iterable[int],
    recipe: Recipe,
) -> dict[int, nn.Module]:
    """Minimize the loss, update the EMAs, and return copies of the student as `distil` does.

    emas: pairs of an EMA and its decay.
    """
    kept = {}
    for iteration in minimize(loss, student, "student", recipe.rate, iterations, recipe.warmup):
        for ema, decay in emas:
            decay = sc.warm_up(decay, iteration) if recipe.ema_warmup else decay
            sc.update_ema(ema.parameters(), student.parameters(), decay)
        if iteration in snapshots or iteration == iterations:
            kept[iteration] = frozen(student)
    return kept


def minimize(
    loss: Callable[[], Tensor], net: nn.Module, name: str, rate: float, iterations: int, warmup: int
) -> Iterator[int]:
    """Train the network on a loss that draws its own batch; yields 1, 2, ... after each step.

    Adam: the learning rate warms up over `warmup` iterations, stays constant, then falls linearly
    to 0 over the second half.
    """

    def factor(i: int) -> float:
        return min((i + 1) / warmup, 1, 2 - 2 * i / iterations)

    optimizer = torch.optim.Adam(net.parameters(), rate, fused=True)
    schedule = LambdaLR(optimizer, factor)
    for iteration in tqdm(range(1, iterations + 1), name, leave=False):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
        yield iteration


# --------------------------------------------------------------------------------------- measuring


class Probe(NamedTuple):
    """Data and noise shared by all measurements."""

    data: Tensor  # (2 POINTS, 2), fresh
    noise: Tensor  # (POINTS, 2)
    validation: Tensor  # (256, 2), noise for calibration only
    floor: float  # root mean square of energy distances from fresh data to `data`, in UNIT


def draw_probe(data: Data, generator: torch.Generator) -> Probe:
    reference = data(2 * POINTS, generator)
    noise = torch.randn(POINTS, 2, generator=generator)
    validation = torch.randn(256, 2, generator=generator)
    floor = sampling_error(data, POINTS, reference, generator) / UNIT
    return Probe(reference, noise, validation, floor)


def sampling_error(
    data: Data, count: int, reference: Tensor, generator: torch.Generator, repeats: int = 8
) -> float:
    """Root mean square of energy distances from `count` fresh data points to the reference."""
    distances = [energy_distance(data(count, generator), reference) for _ in range(repeats)]
    return float(np.sqrt(np.mean(np.square(distances))))


def energy_distance(x: Tensor, y: Tensor, directions: int = 16) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points (n, 2) and (m, 2); some texts take its root.

    Unbiased: for equal distributions it is 0 on average, and can be negative. In the plane, |a| is
    pi/2 times the mean of |<a, e>| over unit vectors e (with 16 of them, to 0.4 %). On a line,
    sorting gives the sum over all pairs, so thousands of points take milliseconds.
    """
    angle = math.pi * torch.arange(directions) / directions
    axes = torch.stack([angle.cos(), angle.sin()])
    x, y = (x @ axes).T.numpy(), (y @ axes).T.numpy()

    def pair_sum(z: np.ndarray) -> float:
        """Sum over i < j of |p_i - p_j| for points p, from projections z (directions, n)."""
        coefficient = 2.0 * np.arange(z.shape[1]) - z.shape[1] + 1
        return math.pi / 2 * (np.sort(z) @ coefficient).mean().item()

    n, m = x.shape[1], y.shape[1]
    xx, yy = pair_sum(x), pair_sum(y)
    xy = pair_sum(np.concatenate([x, y], 1)) - xx - yy
    return 2 * (xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1)))


def sample(net: nn.Module, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Euler samples of noise x (n, 2), in chunks of 2,048, which fit in the CPU cache."""
    times = sc.time_grid(steps, shift)
    return torch.cat([sc.euler_sample(net, part, times) for part in x.split(2048)])


def calibrate(base: nn.Module, student: nn.Module, noise: Tensor, steps: int, shift=1.0) -> float:
    """Scale of the student for a number of steps, from validation noise alone.

    It takes the scale whose samples are, as a set, nearest to the teacher's fine endpoints from the
    same noise. (Sample by sample, the mean square would favour scales that blur.) The search begins
    with scales within a factor of 1.6 around lam* (`sc.optimal_scale`), and goes on outwards while
    the best is the outermost: far from 1, lam* is only a rough guess. The teacher and the unscaled
    student, scales 0 and 1, are candidates too.
    """
    path = sc.teacher_path(base, noise, sc.time_grid(steps, shift))
    lam = sc.optimal_scale(student, path).clamp(*SCALES).item()
    target = sample(base, noise, FINE_STEPS, shift)

    def distance(scale: float) -> float:
        return energy_distance(sample(scaled(base, student, scale), noise, steps, shift), target)

    ratio = 1.6**0.1  # of neighbouring scales
    distances = {scale: distance(scale) for scale in np.geomspace(lam / 1.6, lam * 1.6, 21)}
    for outermost, factor in ((min, 1 / ratio), (max, ratio)):  # smallest, then largest scale
        scale = outermost(distances)
        while scale == min(distances, key=distances.get) and SCALES[0] < scale < SCALES[1]:
            scale = scale * factor
            distances[scale] = distance(scale)
    distances |= {scale: distance(scale) for scale in (0.0, 1.0)}
    return float(min(distances, key=distances.get))


def map_cells(cells: Table, function: Callable[[int, Any], Any]) -> Table:
    """The table of function(column, cell) for every cell."""
    return {
        name: {column: function(column, cell) for column, cell in row.items()}
        for name, row in cells.items()
    }


def errors_of(students: Table, probe: Probe, steps: int, shift: float) -> Table:
    """Energy distance of each student's snapshots for a sampler with `steps` steps."""

    def error(iteration: int, net: nn.Module) -> float:
        return energy_distance(sample(net, probe.noise, steps, shift), probe.data) / UNIT

    return map_cells(students, error)


def lams_of(students: Table, base: nn.Module, probe: Probe, steps: int, shift: float) -> Table:
    """lam* of each student's snapshots for a sampler with `steps` steps."""
    path = sc.teacher_path(base, probe.validation, sc.time_grid(steps, shift))
    return map_cells(students, lambda iteration, net: sc.optimal_scale(net, path).item())


def table(energy: Table, rms: Table, scales: dict[int, float], floor: float) -> str:
    """What the program prints."""

    def line(name: str, form: str, values: Iterable) -> str:
        return f"{name:19s}" + "".join(f"{value:{form}}" for value in values)

    base, first_row = next(iter(energy.items()))
    lines = [line("Euler steps", "9d", first_row)]
    lines += [f"energy distance to fresh data, {UNIT_TEXT} (data to data: 0 +- {floor:.1f})"]
    lines += [line(f"  {name}", "9.1f", row.values()) for name, row in energy.items()]
    lines += [f"RMS distance to the endpoints of {FINE_STEPS} steps, {base}"]
    lines += [line(f"  {name}", "9.3f", row.values()) for name, row in rms.items()]
    if scales:
        lines += [line("calibrated scale", "9.2f", scales.values())]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- figures


@contextmanager
def whole(path: Path):
    """Yield a path that replaces `path` at the end, so that a full disk leaves no partial file."""
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


def plot_samples(samples: Table, energy: Table, probe: Probe, path: Path) -> None:
    """Densities: unlike scatter plots they show holes, and mass where none belongs."""
    columns = len(next(iter(samples.values()))) + 1
    height = 2.2 * len(samples) + 0.4
    figure = Figure((2 * columns, height))
    grid = figure.subplots(len(samples), columns)
    figure.subplots_adjust(0.02, 0.01, 0.998, 1 - 0.6 / height, wspace=0.04, hspace=0.15)
    edges = np.linspace(-1.15, 1.15, 81) * probe.data.abs().max().item()
    for axes, (name, row) in zip(grid, samples.items()):
        panels = {f"{in_steps(n)}: {energy[name][n]:.1f}": points for n, points in row.items()}
        panels[f"data: 0 ± {probe.floor:.1f}"] = probe.data
        for axis, (title, points) in zip(axes, panels.items()):
            image = np.histogram2d(*points.T.numpy(), bins=[edges, edges])[0].T
            axis.imshow(image**0.5, origin="lower", cmap="magma", interpolation="bicubic")
            axis.set(xticks=[], yticks=[], title=title)
        axes[0].set_ylabel(name, fontsize=12, color=COLORS[name], fontweight="bold")
    figure.suptitle(f"Energy distance to the data, {UNIT_TEXT}; the same noise in all panels")
    save(figure, path)


def draw_lines(axis, lines: Table) -> None:
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
    """Band of distances that fresh data has from data; smaller values are not resolved."""
    axis.axhspan(0, floor, color=COLORS["data"], alpha=0.5, lw=0, label="data to data")
    axis.set_ylim(bottom=floor / 2)


def plot_progress(errors: dict, lams: dict, energy: Table, floor: float, path: Path) -> None:
    """Error over training, a panel for each number of steps; below it lam*, if there is any."""
    rows = {f"energy distance, {UNIT_TEXT}": errors}
    if lams:
        rows["estimated best scale λ*"] = lams
    figure = Figure((3.6 * len(errors), 2.9 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(errors), sharex=True, sharey="row", squeeze=False)
    for axes, (label, panels) in zip(grid, rows.items()):
        axes[0].set_ylabel(label)
        for axis, lines in zip(axes, panels.values()):
            draw_lines(axis, lines)
    base = next(iter(energy))
    for axis, n in zip(grid[0], errors):
        axis.axhline(energy[base][n], color=COLORS[base], ls="--", label=base)
        draw_floor(axis, floor)
        axis.set_title(in_steps(n))
    for axis in grid[1:].flat:
        axis.axhline(1, color="black", lw=0.8)
    for axis in grid[-1]:
        axis.set_xlabel("iteration")
    for axis in grid.flat:
        set_ticks(axis)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save(figure, path)


def plot_quality(energy: Table, steps: int, floor: float, path: Path) -> None:
    """Error over the number of steps."""
    figure = Figure((6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    draw_lines(axis, energy)
    draw_floor(axis, floor)
    set_ticks(axis)
    columns = next(iter(energy.values()))
    # without those so near to the student's that their labels would collide
    ticks = [n for n in columns if n == steps or not 0.88 < n / steps < 1.13]
    axis.set_xticks(ticks, ticks)
    axis.set_xlabel(f"Euler steps (matched: trained for {steps})")
    axis.set_ylabel(f"energy distance to the data, {UNIT_TEXT}")
    figure.legend(loc="outside upper center", ncols=3)
    save(figure, path)


def trajectory(net: nn.Module, x: Tensor, steps: int, shift: float) -> Tensor:
    """All states of an Euler sampler from noise x (n, 2): (steps + 1, n, 2)."""
    states = [x]
    for times in pairwise(sc.time_grid(steps, shift)):
        states.append(sc.euler_sample(net, states[-1], torch.stack(times)))
    return torch.stack(states)


def draw_panels(panels: Panels, data: Tensor, height: float) -> tuple[Figure, list]:
    """A square for each sampler, with the data faint in it."""
    figure = Figure((3.6 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels))
    limit = max(1.15 * data.abs().max().item(), 3)
    for axis, (name, states) in zip(axes, panels):
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect=1)
        title = f"{name}, {in_steps(len(states) - 1)}"
        axis.set_title(title, fontsize=12, color=COLORS[name], fontweight="bold")
        axis.scatter(*data[:4000].T, s=2, color=COLORS["data"], alpha=0.35, lw=0, label="data")
    return figure, axes


def plot_paths(panels: Panels, data: Tensor, path: Path) -> None:
    """Trajectories of some samples from noise to data."""
    figure, axes = draw_panels(panels, data, 4.4)
    for axis, (name, states) in zip(axes, panels):
        lines = states[:, :160]
        curves = LineCollection(lines.transpose(0, 1), colors=COLORS[name], lw=0.7, alpha=0.6)
        axis.add_collection(curves)
        axis.scatter(*lines[0].T, s=7, color="#a9b4c0", lw=0, label="noise", zorder=3)
        axis.scatter(*lines[-1].T, s=15, color="black", lw=0, label="sample", zorder=3)
    handles = axes[0].get_legend_handles_labels()
    legend = figure.legend(*handles, loc="outside lower center", ncols=3)
    for handle in legend.legend_handles:
        handle.set(alpha=1, sizes=[30])
    save(figure, path)


def animate(panels: Panels, data: Tensor, path: Path) -> None:
    """A GIF of noise flowing to data along each sampler's own path, straight between its steps."""
    figure, axes = draw_panels(panels, data, 4.1)
    dots = [
        axis.scatter(*states[0].T, s=4, color=COLORS[name], lw=0)
        for axis, (name, states) in zip(axes, panels)
    ]
    frames = 48
    writer = PillowWriter(fps=16)
    with whole(path) as part, writer.saving(figure, part, dpi=60):
        for frame in [0] * 8 + list(range(frames + 1)) + [frames] * 16:
            for dot, (_, states) in zip(dots, panels):
                place = frame / frames * (len(states) - 1)
                i = min(int(place), len(states) - 2)
                dot.set_offsets(torch.lerp(states[i], states[i + 1], place - i))
            writer.grab_frame()


if __name__ == "__main__":
    main()
