"""Can a guided teacher be distilled? python tests/benchmarks/guidance.py (10 minutes on 1 core)

Class-conditional 2-D flow: four overlapping blobs. The teacher knows classes and the empty class,
and is sampled with classifier-free guidance, two network calls a step. The student is one plain
call: matched windows for 3 steps, whose teacher is the guided one at one guidance, which becomes
part of the student. It starts as the unguided network, and has the toy's 1,000 iterations.

Errors are energy distances (x 1e-4) of 4 x 4,096 samples to 4 x 8,192 of the guided teacher's 64
steps from other noise, the mean over the classes. "dialled": the change from the unguided network
is scaled as the scale of a LoRA does it, by the factor that is best on validation noise. "warm
start": for the first part of its iterations the student is regressed on the guided velocity itself.
± is half of a 95 % interval over the seeds.

What was expected: at guidance 1 as in the toy; at guidance 3 a student of 3 steps near 8 guided
steps; no gain from a warm start.
"""

import copy
from itertools import product

import common
import numpy as np
import torch
from torch import Tensor, nn

import shortcut as sc
import toy_2d

CLASSES = 4
EMPTY = CLASSES  # the label that stands for no class
SPREAD = 0.6  # standard deviation of a blob; their centers are 2 apart
DROPPED = 0.1  # fraction of the teacher's rows that have no class
GUIDANCES = (1.0, 3.0)
SHIFTS = (1.0, 3.0)
WARM_STARTS = (0.0, 0.1, 0.3)  # fractions of the student's iterations
STEPS = (1, 2, 3, 4, 8)
TEACHER_STEPS = (3, 4, 8, 16)
FINE = 64
ITERATIONS = 1000
SCALES = sorted([*np.geomspace(0.1, 3.0, 17), 1.0])


# ------------------------------------------------------------------------------- flow and networks


def blobs(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Points (B, 2) of these classes (B,)."""
    centers = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    return centers[labels] + SPREAD * torch.randn(len(labels), 2, generator=generator)


class LabelMLP(toy_2d.VelocityMLP):
    """v(x, t, label): the toy's network, which also gets the class, one-hot; EMPTY: zeros."""

    def __init__(self):
        super().__init__()
        first = self.layers[0]
        self.layers[0] = nn.Linear(first.in_features + CLASSES, first.out_features)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        known = torch.eye(CLASSES + 1)[label][:, :CLASSES]
        phase = t[:, None] * (torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]))
        return self.layers(torch.cat([x, t[:, None], phase.sin(), phase.cos(), known], 1))


def guided(net: nn.Module, guidance: float) -> sc.Velocity:
    """Classifier-free guidance: v_empty + guidance (v_class - v_empty)."""

    def velocity(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        empty = net(x, t, torch.full_like(label, EMPTY))
        return empty + guidance * (net(x, t, label) - empty)

    return velocity


def dialled(base: nn.Module, student: nn.Module, scale: float) -> sc.Velocity:
    """What a LoRA at this scale computes, to first order."""

    def velocity(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        v = base(x, t, label)
        return v + scale * (student(x, t, label) - v)

    return velocity


def train_teacher(seed: int, length: float) -> LabelMLP:
    """Flow matching; some rows have no class."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = LabelMLP()
    batch, rate, warmup, _ = toy_2d.FROM_SCRATCH

    def loss() -> Tensor:
        label = torch.randint(CLASSES, (batch,), generator=generator)
        x_0 = blobs(label, generator)
        noise = torch.randn(batch, 2, generator=generator)
        t = torch.rand(batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < DROPPED
        v = net(sc.interpolate(x_0, noise, t), t, label.masked_fill(dropped, EMPTY))
        return (v - (noise - x_0)).square().mean()

    count = common.shortened(common.TEACHER_ITERATIONS, length)
    for _ in toy_2d.minimize(loss, net, "teacher", rate, count, warmup):
        pass
    return net.requires_grad_(False)


def distil(
    base: LabelMLP, teacher: sc.Velocity, config: sc.MatchedConfig, warm: int, count: int, seed: int
) -> nn.Module:
    """The student after so many iterations, the first `warm` of them on the teacher's velocity."""
    generator = torch.Generator().manual_seed(seed + 1)
    student = copy.deepcopy(base).requires_grad_(True)
    slow = toy_2d.frozen(base)
    done = 0

    def loss() -> Tensor:
        label = torch.randint(CLASSES, (common.BATCH,), generator=generator)
        x_0 = blobs(label, generator)
        noise = torch.randn(common.BATCH, 2, generator=generator)
        windows = sc.matched_windows(config, common.BATCH, generator=generator)
        if done < warm:
            x_t = sc.interpolate(x_0, noise, windows.t)
            with torch.no_grad():
                target = teacher(x_t, windows.t, label)
            return (student(x_t, windows.t, label) - target).square().mean()
        first, second = sc.matched(windows, teacher, slow)
        return sc.shortcut_loss(windows, x_0, noise, student, first, second, label=label)[0]

    recipe = toy_2d.DISTILLATION
    for done in toy_2d.minimize(loss, student, "student", recipe.rate, count, recipe.warmup):
        decay = sc.warm_up(config.slow_decay, done)
        sc.update_ema(slow.parameters(), student.parameters(), decay)
    return student.requires_grad_(False)


# ------------------------------------------------------------------------------------- measurements


class Measure:
    """Noise, and where the guided teacher's many steps end from other noise, by class."""

    def __init__(self, teacher: sc.Velocity, shift: float, points: int, key: int):
        generator = torch.Generator().manual_seed(key)
        self.shift = shift
        self.noise = torch.randn(CLASSES, points, 2, generator=generator)
        noise = torch.randn(CLASSES, 2 * points, 2, generator=generator)
        self.fine = [self.end(teacher, x, k, FINE) for k, x in enumerate(noise)]

    def end(self, velocity: sc.Velocity, noise: Tensor, label: int, steps: int) -> Tensor:
        labels = torch.full((len(noise),), label)
        return sc.euler_sample(velocity, noise, sc.time_grid(steps, self.shift), label=labels)

    @torch.no_grad()
    def error(self, velocity: sc.Velocity, steps: int) -> float:
        distances = []
        for label, (noise, fine) in enumerate(zip(self.noise, self.fine)):
            end = self.end(velocity, noise, label, steps)
            distances.append(toy_2d.energy_distance(end, fine))
        return float(np.mean(distances))


def measure(guidance: float, shift: float, seed: int, length: float) -> dict:
    """Errors of the guided teacher, and of a student for each warm start."""
    base = train_teacher(seed, length)
    teacher = guided(base, guidance)
    points = 4096 if length >= 0.1 else 128
    on = Measure(teacher, shift, points, 30_000 + seed)
    validation = Measure(teacher, shift, points // 4, 40_000 + seed)
    config = common.matched(3, shift)
    count = common.shortened(ITERATIONS, length)
    found = {
        "floor": on.error(teacher, FINE),
        "without guidance": on.error(base, FINE),
        "teacher": {n: on.error(teacher, n) for n in TEACHER_STEPS},
        "students": {},
    }
    for part in WARM_STARTS:
        student = distil(base, teacher, config, round(part * count), count, seed)
        errors = {n: on.error(student, n) for n in STEPS}
        found["students"][f"warm {part:g}"] = errors
        if part == 0:
            found["dialled"] = {}
            for n in STEPS:
                scales = {s: validation.error(dialled(base, student, s), n) for s in SCALES}
                scale = min(scales, key=scales.get)
                error = on.error(dialled(base, student, scale), n)
                found["dialled"][n] = {"scale": float(scale), "error": error}
    return found


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    some = [
        {"guidance": guidance, "shift": shift, "seed": seed}
        for seed, shift, guidance in product(seeds, SHIFTS, GUIDANCES)
    ]
    return {"guidance": [common.Task(measure, settings) for settings in some]}


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    for shift, guidance in product(SHIFTS, GUIDANCES):
        some = common.where(rows, "guidance", shift=shift, guidance=guidance)
        if some:
            floor = common.energy_text(common.column(some, "floor"))
            seeds = len(common.grouped(some, "seed"))
            lines += [f"**shift {shift:g}, guidance {guidance:g}**, {seeds} seeds; floor {floor}"]
            lines += table_of(some)
    return lines


def table_of(rows: list[common.Row]) -> list[str]:
    counts = sorted({*STEPS, *TEACHER_STEPS, FINE})

    def cells(label: str, errors: dict[int, object]) -> list[str]:
        return [label, *(common.energy_text(errors[n]) if n in errors else "" for n in counts)]

    teacher = {n: common.column(rows, "teacher", n) for n in TEACHER_STEPS}
    lines = [
        cells("guided teacher, two calls a step", teacher),
        cells("teacher without guidance", {FINE: common.column(rows, "without guidance")}),
    ]
    for part in WARM_STARTS:
        errors = {n: common.column(rows, "students", f"warm {part:g}", n) for n in STEPS}
        label = f"the same, warm start of {part:.0%}" if part else "student for 3 steps, one call"
        lines.append(cells(label, errors))
    errors = {n: common.column(rows, "dialled", n, "error") for n in STEPS}
    lines.append(cells("student, dialled", errors))
    scales = [f"{common.column(rows, 'dialled', n, 'scale').mean():.2f}" for n in STEPS]
    by_count = dict(zip(STEPS, scales))
    lines.append(["its scale", *(by_count.get(n, "") for n in counts)])
    return common.table(["Euler steps", *counts], lines)


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, seeds=5)
