"""Other ways to few steps, at an equal budget: python tests/benchmarks/baselines.py

Against matched windows for 3 steps: direct regression on the teacher's mean velocity over the
coming step, progressive distillation (Salimans and Ho 2022) and a shortcut model, which is told its
step (Frans et al. 2024), distilled from the teacher and from scratch. On the 2-D flows and on the
tiny Flux, at shift 1. Errors as in toy.py and flux.py.

Budget: rows x network calls, where a backward pass counts as two. Ours has 2,000 iterations (twice
the toy's) of 512 rows with 6 calls each: 6.14 million, which is also what the teacher's training
takes. On the tiny Flux it has 200 of 64 rows. All distilling methods have the same budget; the one
from scratch has the teacher's in addition. A calibrated scale takes 0.5 to 2 % more, not counted.
Network, batch, Adam and schedule are the toy's; the shortcut model's step comes as 9 more inputs.
On the tiny Flux, LoRA and AdamW are those of flux_distill.py. Ours is what that program saves:
trained at a constant rate, the student or its slow EMA, whichever is nearer to the teacher on
validation captions. The rate of the others falls in the second half, except for direct regression
with a constant one. The shortcut model is told its step through a small MLP, which at first adds 0
to the embedding of time. Each rival there has two settings, one chosen by hand and one by
tune_flux; the one with the least error in 3 steps on the compared captions counts, which favours
the rivals.

Each method is sampled in its own way. A progressive student of N steps knows only the N times of
its sampler: one ladder goes down to 3, our goal, one down to 1 with a network for each number of
steps on the way. A ladder ends no better than the teacher at its first rung; on the flows ladders
from 48 and 64 steps do better than from 24 and 32.

`--parts tune` measures other settings of the rivals on seed 100: rate and teacher calls (direct);
rate, first rung and growth of iterations from rung to rung (progressive); rate, EMA decay, fraction
of rows with d = 0 ("plain") and finest step (shortcut models). The setting of each method was
chosen from these by hand, one for all flows. Ours is tuned by iterations.py. `--parts tune_flux`:
likewise on the tiny Flux, on validation captions; the setting with the least error in 3 steps is
the second one of a rival. Ours was tuned there in making the demonstration.

`--parts direct` measures what bootstrapping buys: matched windows against direct regression alone,
on the flows, for 1 to 4 steps at shifts 1 and 3, scale 1. Direct regression has 2, 4 or 8 teacher
calls a row by midpoint steps, or 16 by Euler steps. The budget is that of 1,000 iterations of ours,
as in the toy, or a tenth of it. `--parts tune_direct` finds the learning rates: for each method,
shift and budget the one of six with the least geometric mean of the 3-step errors on seed 100 of
moons and gaussians. It is used for all numbers of steps. Both parts are measured only if --parts
names them.
"""

import copy
import tempfile
from itertools import product
from pathlib import Path

import common
import common_flux
import numpy as np
import torch
from torch import Tensor, nn

import shortcut as sc
import toy_2d

USUAL = ("flows", "tune", "flux", "tune_flux")  # parts that are measured if no flag says which
STEPS = (1, 2, 3, 4, 8)
ITERATIONS = 2000  # of our student, twice the toy's
WARMUP = 100  # iterations, of the others
OURS = ITERATIONS * common.BATCH * common.network_calls(common.matched(3))  # budget
TEACHERS = common.TEACHER_ITERATIONS * 1024 * 3
TWO_VELOCITIES = 5  # network calls of a row: two for the target, student with its backward
DOWN_TO_3, DOWN_TO_1 = (24, 12, 6, 3), (32, 16, 8, 4, 2, 1)
COUNTS = torch.tensor([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])  # N of the step sizes

# ------------------------------------------------------------------------------------------ losses


def halved(N: Tensor, generator) -> sc.Windows:
    """Windows of two halves of a step of the N-step sampler, N (B,), at one of its times."""
    t = 1 - (N * torch.rand(len(N), generator=generator)).floor() / N
    return sc.Windows(t, (t - 0.5 / N).clamp(min=0), (t - 1 / N).clamp(min=0), 0, "halved")


def progressive_loss(N: int, student, before, x_0, noise, generator, **cond) -> Tensor:
    """Progressive distillation: one of N steps for two steps of the network before.

    The network is called and trained at the N times of its own sampler only.
    """
    windows = halved(torch.full((len(x_0),), N), generator)
    return sc.shortcut_loss(windows, x_0, noise, student, before, before, **cond)[0]


def step_size_loss(k, finest, student, ema, teacher, x_0, noise, generator, **cond) -> Tensor:
    """Shortcut model: v(x, t, d) is told the step d = 1/N that will be taken.

    The first k rows have d = 0: flow matching or, distilling, regression on the teacher's velocity.
    The others learn to do in one step what the EMA does in two of d/2. N is one of COUNTS up to the
    finest, at which half a step counts as d = 0.
    """
    counts = COUNTS[finest >= COUNTS]
    N = counts[torch.randint(len(counts), (len(x_0) - k,), generator=generator)]
    windows = halved(N, generator)
    t = torch.cat([1 - torch.rand(k, generator=generator), windows.t])
    d = torch.cat([torch.zeros(k), 1 / N])
    half = torch.where(finest >= 2 * N, 0.5 / N, 0.0)
    x_t = sc.interpolate(x_0, noise, t)
    of_plain_rows = {name: value[:k] for name, value in cond.items()}
    of_other_rows = {name: value[k:] for name, value in cond.items()}
    velocity = (noise - x_0)[:k]
    if teacher:
        with torch.no_grad():
            velocity = teacher(x_t[:k], t[:k], **of_plain_rows)
    target = sc.shortcut_target(windows, x_t[k:], ema, ema, d=half, **of_other_rows)
    v = student(x_t, t, d=d, **cond)
    return (v - torch.cat([velocity, target])).square().mean()


def at(velocity, steps: int):
    """v(x, t) of a shortcut model for a sampler of so many steps."""
    return lambda x, t, **cond: velocity(x, t, d=torch.full_like(t, 1 / steps), **cond)


def rungs(ladder, iterations: float, growth: float) -> list[tuple[int, int]]:
    """(N, iterations) of each rung below the first; each gets `growth` times the one before."""
    weights = growth ** np.arange(len(ladder) - 1)
    counts = (iterations * weights / weights.sum()).round().clip(1).astype(int)
    return list(zip(ladder[1:], counts.tolist()))


def step_size_rows(budget: float, batch: int, plain: float, distilled: bool) -> tuple[int, int]:
    """Rows of a batch with d = 0, a fraction `plain`, and the iterations in the budget."""
    k = round(plain * batch)
    calls_of_plain_row = 4 if distilled else 3
    return k, round(budget / (k * calls_of_plain_row + (batch - k) * TWO_VELOCITIES))


# ----------------------------------------------------------------------------------- on 2-D flows


def fourier(t: Tensor) -> Tensor:
    """Features (B, 9) of times or steps (B,), as VelocityMLP has them of t."""
    phase = t[:, None] * (torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]))
    return torch.cat([t[:, None], phase.sin(), phase.cos()], 1)


class StepMLP(toy_2d.VelocityMLP):
    """v(x, t, d): VelocityMLP that is told its step d (B,) too, by the features it has of t.

    With a teacher it starts as that, whatever d is.
    """

    def __init__(self, teacher: nn.Module | None = None):
        super().__init__()
        self.layers[0] = nn.Linear(20, self.layers[0].out_features)
        if teacher:
            weights = teacher.state_dict()
            first = nn.functional.pad(weights["layers.0.weight"], (0, 9))
            self.load_state_dict(weights | {"layers.0.weight": first})

    def forward(self, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        return self.layers(torch.cat([x, fourier(t), fourier(d)], 1))


def direct(
    teacher,
    data,
    budget: float,
    seed: int,
    *,
    calls: int,
    rate: float,
    euler: bool = False,
    steps: int = 3,
    shift: float = 1.0,
) -> nn.Module:
    """A student of so many steps, by direct regression with so many teacher calls a row."""
    generator = torch.Generator().manual_seed(seed + 1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    config = common.matched(steps, shift)

    def loss() -> Tensor:
        x_0, noise = toy_2d.draw_pairs(data, common.BATCH, generator)
        return common.direct_loss(config, calls, teacher, student, x_0, noise, generator, euler)

    iterations = max(2, round(budget / (common.BATCH * (3 + calls))))
    for _ in toy_2d.minimize(loss, student, "direct", rate, iterations, warmup=1):
        pass
    return student.requires_grad_(False)


def progressive(
    teacher, data, budget: float, seed: int, *, ladder, rate: float, growth: float
) -> dict[int, nn.Module]:
    """A network for each rung N of the ladder. It starts as the network of the rung before."""
    generator = torch.Generator().manual_seed(seed + 1)
    before = teacher
    kept = {}
    for N, count in rungs(ladder, budget / (common.BATCH * TWO_VELOCITIES), growth):
        student = copy.deepcopy(before).requires_grad_(True)

        def loss(N=N, student=student, before=before) -> Tensor:
            x_0, noise = toy_2d.draw_pairs(data, common.BATCH, generator)
            return progressive_loss(N, student, before, x_0, noise, generator)

        for _ in toy_2d.minimize(loss, student, f"{N} steps", rate, count, WARMUP):
            pass
        before = student.requires_grad_(False)
        kept[N] = before
    return kept


def shortcut_model(
    teacher, data, budget: float, seed: int, *, rate: float, decay: float, plain: float, finest: int
) -> StepMLP:
    """The EMA of a shortcut model, distilled from the teacher or, without one, from scratch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    student = StepMLP(teacher)
    ema = toy_2d.frozen(student)
    k, iterations = step_size_rows(budget, common.BATCH, plain, bool(teacher))

    def loss() -> Tensor:
        x_0, noise = toy_2d.draw_pairs(data, common.BATCH, generator)
        return step_size_loss(k, finest, student, ema, teacher, x_0, noise, generator)

    for _ in toy_2d.minimize(loss, student, "shortcut model", rate, iterations, WARMUP):
        sc.update_ema(ema.parameters(), student.parameters(), decay)
    return ema


SETTINGS = {
    "teacher": {},
    "ours": {},
    "direct, 4 calls": dict(calls=4, rate=2e-3),
    "direct, 8 calls": dict(calls=8, rate=2e-3),
    "down to 3": dict(ladder=(48, *DOWN_TO_3), rate=4e-3, growth=2.0),
    "down to 1": dict(ladder=(64, *DOWN_TO_1), rate=4e-3, growth=2.0),
    "distilled": dict(rate=2e-3, decay=0.95, plain=0.25, finest=64),
    "from scratch": dict(rate=5e-3, decay=0.99, plain=0.25, finest=64),
}
FOR_THREE_STEPS = ("ours", "direct, 4 calls", "direct, 8 calls", "down to 3")  # one network each


def trained(method: str, settings: dict, teacher, data, seed: int, length: float) -> dict:
    """The velocity of a method for each number of steps that it has."""
    budget = OURS * length
    if method == "teacher":
        return dict.fromkeys(STEPS, teacher)
    if method == "ours":
        iterations = common.shortened(ITERATIONS, length)
        student = toy_2d.distil(teacher, data, common.matched(3), iterations, seed)[iterations]
        return dict.fromkeys(STEPS, student)
    if method.startswith("direct"):
        return dict.fromkeys(STEPS, direct(teacher, data, budget, seed, **settings))
    if method == "down to 3":
        return dict.fromkeys(STEPS, progressive(teacher, data, budget, seed, **settings)[3])
    if method == "down to 1":
        kept = progressive(teacher, data, budget, seed, **settings)
        return {n: kept[n] for n in STEPS if n in kept}
    if method == "from scratch":
        teacher, budget = None, (OURS + TEACHERS) * length
    informed = shortcut_model(teacher, data, budget, seed, **settings)
    return {n: at(informed, n) for n in STEPS}


def measure_method(method: str, flow: str, seed: int, length: float) -> dict:
    """Errors by number of steps; of a network for three steps also with calibrated scales."""
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    nets = trained(method, SETTINGS[method], teacher, on.data, seed, length)
    found = {"floor": on.floor, "errors": {n: on.error(net, n) for n, net in nets.items()}}
    if method in FOR_THREE_STEPS:
        net = nets[3]
        found["scaled"] = {n: on.calibrated(teacher, net, n)["error"] for n in STEPS}
    return found


def tried(method: str) -> list[dict]:
    """Settings to compare: around a middle one, then around the best of those."""
    if method.startswith("direct"):
        return [SETTINGS[method] | {"rate": rate} for rate in (1e-3, 2e-3, 4e-3)]
    if method in ("down to 3", "down to 1"):
        ladder = DOWN_TO_3 if method == "down to 3" else DOWN_TO_1
        ladders = (ladder, (2 * ladder[0], *ladder))
        tries = product(ladders, (1e-3, 2e-3, 4e-3), (1.0, 2.0))
        return [dict(ladder=some, rate=rate, growth=growth) for some, rate, growth in tries]
    changes = [{"decay": 0.999}, {"plain": 0.5}, {"plain": 0.9}, {"finest": 16}, {"finest": 64}]
    if method == "distilled":
        middle = dict(rate=1e-3, decay=0.99, plain=0.75, finest=32)
        rates = product((1e-3, 2e-3, 4e-3), (0.95, 0.99))
        changes += [{"rate": rate, "decay": decay} for rate, decay in rates]
        again = [{}, {"plain": 0.5}, {"plain": 0.5, "rate": 4e-3}]
    else:
        middle = dict(rate=2e-3, decay=0.99, plain=0.75, finest=32)
        changes += [{"rate": rate} for rate in (2e-3, 5e-3, 1e-2)]
        others = ({}, {"finest": 128}, {"rate": 1e-2}, {"decay": 0.95})
        again = [{}, *({"plain": 0.5} | other for other in others)]
    return [middle | one for one in changes] + [SETTINGS[method] | one for one in again]


def measure_settings(method: str, settings: dict, flow: str, length: float) -> dict:
    """Errors of a method with these settings, on the tuning seed."""
    on = common.FlowMeasure(flow, 100, length)
    teacher = common.train_teacher(flow, 100, length)
    nets = trained(method, settings, teacher, on.data, 100, length)
    return {"errors": {n: on.error(net, n) for n, net in nets.items()}}


# ------------------------------------------------------- on 2-D flows: direct regression in detail

DIRECT_STEPS = (1, 2, 3, 4)
SHIFTS = (1.0, 3.0)
BUDGETS = {"full budget": 1.0, "a tenth": 0.1}  # fractions of what the toy's student takes
TOY_ITERATIONS = 1000
TOY_BUDGET = TOY_ITERATIONS * common.BATCH * common.network_calls(common.matched())
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
REGRESSIONS = {
    "direct, 2 calls": dict(calls=2),
    "direct, 4 calls": dict(calls=4),
    "direct, 8 calls": dict(calls=8),
    "direct, 16 calls": dict(calls=16, euler=True),
}
COMPARED = ("ours", *REGRESSIONS)
TUNED = {  # learning rates in the order of COMPARED, from --parts tune_direct by `tuned_rate`
    (1.0, "full budget"): dict(zip(COMPARED, (2e-3, 2e-3, 4e-3, 4e-3, 4e-3))),
    (1.0, "a tenth"): dict(zip(COMPARED, (8e-3, 16e-3, 8e-3, 8e-3, 8e-3))),
    (3.0, "full budget"): dict(zip(COMPARED, (16e-3, 1e-3, 1e-3, 8e-3, 16e-3))),
    (3.0, "a tenth"): dict(zip(COMPARED, (8e-3, 1e-3, 8e-3, 8e-3, 8e-3))),
}


def compare(
    flow: str,
    seed: int,
    shift: float,
    steps: int,
    rates: dict[str, dict[str, float]],
    length: float,
) -> dict:
    """Errors in so many steps, by budget and method, as the learning rates are."""
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    found = {"floor": on.floor, "errors": {}}
    for budget, fraction in BUDGETS.items():
        errors = {}
        for method, rate in rates[budget].items():
            how = dict(steps=steps, shift=shift, rate=rate)
            student = student_of(method, teacher, on.data, seed, fraction * length, **how)
            errors[method] = on.error(student, steps, shift)
        found["errors"][budget] = errors
    return found


def student_of(
    method: str, teacher, data, seed: int, length: float, steps: int, shift: float, rate: float
) -> nn.Module:
    """The student of a method, with `length` times the toy's budget."""
    if method == "ours":
        config = common.matched(steps, shift)
        calls = common.BATCH * common.network_calls(config)
        iterations = common.shortened(TOY_BUDGET / calls, length)
        recipe = toy_2d.DISTILLATION._replace(rate=rate)
        return toy_2d.distil(teacher, data, config, iterations, seed, recipe=recipe)[iterations]
    how = REGRESSIONS[method]
    budget = TOY_BUDGET * length
    return direct(teacher, data, budget, seed, rate=rate, steps=steps, shift=shift, **how)


def measure_direct(flow: str, seed: int, shift: float, steps: int, length: float) -> dict:
    """Errors of all methods, each with its own learning rate."""
    rates = {budget: TUNED[shift, budget] for budget in BUDGETS}
    return compare(flow, seed, shift, steps, rates, length)


def measure_rate(flow: str, shift: float, rate: float, length: float) -> dict:
    """Errors of all methods with one learning rate, for 3 steps, on the tuning seed."""
    rates = {budget: dict.fromkeys(COMPARED, rate) for budget in BUDGETS}
    return compare(flow, 100, shift, 3, rates, length)


def tuned_rate(rows: list[common.Row], shift: float, budget: str, method: str) -> float:
    """The best rate by the geometric mean over the flows of the tuning."""
    by_rate = common.grouped(common.where(rows, "tune_direct", shift=shift), "rate")
    errors = {
        rate: geometric_mean(common.column(some, "errors", budget, method)).item()
        for rate, some in by_rate.items()
    }
    return min(errors, key=errors.get)


def geometric_mean(values, axis: int = 0) -> np.ndarray:
    """Of energy distances, which may be below 0: at least 1e-6, as in `common.ratio_text`."""
    return np.exp(np.log(np.maximum(values, 1e-6)).mean(axis))


# -------------------------------------------------------------------------------------------- tasks


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    measured = [
        {"flow": flow, "seed": seed, "method": method}
        for seed in seeds
        for flow in flows
        for method in SETTINGS
    ]
    tuning = [
        {"flow": flow, "method": method, "settings": settings}
        for flow in ("moons", "gaussians")
        for method in [*SETTINGS][2:]
        for settings in tried(method)
    ]
    tuning_flux = [
        {"method": method, "settings": settings}
        for method in FLUX_SETTINGS
        for settings in tried_on_flux(method)
    ]
    against_direct = [
        {"flow": flow, "seed": seed, "shift": shift, "steps": steps}
        for seed, flow, shift, steps in product(seeds, flows, SHIFTS, DIRECT_STEPS)
    ]
    tuning_direct = [
        {"flow": flow, "shift": shift, "rate": rate}
        for flow, shift, rate in product(("moons", "gaussians"), SHIFTS, RATES)
    ]
    on_flux = []
    for seed in seeds[:3]:
        on_flux += [{"seed": seed, "method": method} for method in ("teacher", "ours")]
        for method, tries in FLUX_SETTINGS.items():
            on_flux += [{"seed": seed, "method": method, "settings": some} for some in tries]
    return {
        "flows": [common.Task(measure_method, settings) for settings in measured],
        "tune": [common.Task(measure_settings, settings) for settings in tuning],
        "flux": [common.Task(measure_flux, settings) for settings in on_flux],
        "tune_flux": [common.Task(measure_settings_on_flux, settings) for settings in tuning_flux],
        "direct": [common.Task(measure_direct, settings) for settings in against_direct],
        "tune_direct": [common.Task(measure_rate, settings) for settings in tuning_direct],
    }


# ------------------------------------------------------------------------------------------- tables

CALIBRATED = "the same network, with its calibrated scale"
LINES = (  # label, method, with calibrated scales?
    ("teacher", "teacher", False),
    ("ours: matched windows for 3 steps, scale 1", "ours", False),
    (CALIBRATED, "ours", True),
    ("direct regression for 3 steps, 4 teacher calls", "direct, 4 calls", False),
    (CALIBRATED, "direct, 4 calls", True),
    ("direct regression for 3 steps, 8 teacher calls", "direct, 8 calls", False),
    (CALIBRATED, "direct, 8 calls", True),
    ("progressive, down to 3: the 3-step network", "down to 3", False),
    (CALIBRATED, "down to 3", True),
    ("progressive, down to 1: a network for each number of steps", "down to 1", False),
    ("shortcut model, told its step, distilled", "distilled", False),
    ("shortcut model, told its step, from scratch", "from scratch", False),
)


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    groups = {}
    on_flows = common.where(rows, "flows")
    if on_flows:
        groups = common.grouped(on_flows, "flow")
        for flow, some in groups.items():
            floor = 1e4 * common.column(some, "floor").mean()
            told = f"energy distance x 1e-4, data to data 0 ± {floor:.1f}"
            lines += [f"**{flow}**, {seeds_of(some)} seeds; {told}"]
            lines += table_of_methods(some, STEPS, common.energy_text)
    on_flux = of_best_settings(common.where(rows, "flux"))
    if on_flux:
        groups = groups | {"tiny Flux": on_flux}
        lines += [f"**tiny Flux**, {seeds_of(on_flux)} seeds; distance to the teacher's 32 steps"]
        lines += table_of_methods(on_flux, FLUX_STEPS, common.mean_text)
        lines += ["All settings of the rivals there"]
        lines += table_of_tries(common.where(rows, "flux"))
    if groups:
        lines += ["Ours / other, paired by seed; ours is calibrated at other step counts than 3"]
        lines += table_of_ratios(groups)
    for part in ("tune", "tune_flux"):
        tuned = common.where(rows, part)
        if tuned:
            places = "validation captions" if part == "tune_flux" else "the flows"
            lines += [
                f"Settings tried on seed 100, {places}: errors in 3 steps (down to 1: in 4). The"
                " chosen one is compared above; all are in the file of results"
            ]
            lines += table_of_settings(tuned)
    against_direct = common.where(rows, "direct")
    if against_direct:
        lines += tables_of_direct(against_direct)
    tuned = common.where(rows, "tune_direct")
    if tuned:
        flows = " / ".join(common.grouped(tuned, "flow"))
        lines += [f"Errors in 3 steps on seed 100, {flows}, by learning rate"]
        lines += table_of_rates(tuned)
    return lines


def of_best_settings(rows: list[common.Row]) -> list[common.Row]:
    """Of each rival on the tiny Flux, the rows with the settings of the least error in 3 steps."""
    kept = [row for row in rows if "settings" not in row.settings]
    for tries in tries_by_method(rows).values():
        kept += min(tries.values(), key=lambda some: common.column(some, "errors", 3).mean())
    return kept


def tries_by_method(rows: list[common.Row]) -> dict[str, dict[str, list[common.Row]]]:
    """Rows of the rivals on the tiny Flux by method and settings."""
    found = {}
    for row in rows:
        if "settings" in row.settings:
            tries = found.setdefault(row.settings["method"], {})
            tries.setdefault(settings_text(row.settings["settings"]), []).append(row)
    return found


def settings_text(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def table_of_tries(rows: list[common.Row]) -> list[str]:
    lines = []
    for method, tries in tries_by_method(rows).items():
        for text, some in tries.items():
            errors = [common.mean_text(common.column(some, "errors", n)) for n in FLUX_STEPS]
            lines.append([method, text, *errors])
    return common.table(["method", "settings", *(f"{n} steps" for n in FLUX_STEPS)], lines)


def seeds_of(rows: list[common.Row]) -> int:
    return len(common.grouped(rows, "seed"))


def errors_of(rows: list[common.Row], method: str, scaled: bool, steps: int) -> list[float]:
    """By seed; empty if the method was not measured at so many steps."""
    some = [row.found for row in rows if row.settings["method"] == method]
    errors = [found.get("scaled" if scaled else "errors", {}) for found in some]
    return [row[steps] for row in errors if steps in row]


def table_of_methods(rows: list[common.Row], steps: tuple[int, ...], text) -> list[str]:
    lines = []
    for label, method, scaled in LINES:
        cells = [text(errors_of(rows, method, scaled, n)) for n in steps]
        if any(cells):
            lines.append([label, *cells])
    return common.table(["Euler steps", *steps], lines)


def table_of_ratios(groups: dict[str, list[common.Row]]) -> list[str]:
    lines = []
    rivals = [line[:2] for line in LINES if line[1] not in ("teacher", "ours") and not line[2]]
    for (label, method), n in product(rivals, STEPS):
        if n != 3 and method in FOR_THREE_STEPS:
            continue  # it was not made for them
        cells = []
        for rows in groups.values():
            ours = errors_of(rows, "ours", n != 3, n)
            other = errors_of(rows, method, False, n)
            comparable = ours and len(ours) == len(other)
            cells.append(common.ratio_text(ours, other) if comparable else "")
        if any(cells):
            lines.append([label, n, *cells])
    return common.table(["ours / other", "steps", *groups], lines)


def table_of_settings(rows: list[common.Row]) -> list[str]:
    """For each method what is chosen, and the least, median and largest error of all tried."""
    lines = []
    for (place, method), some in by_place_and_method(rows).items():
        on_flux = place == "tiny Flux"
        chosen = FLUX_SETTINGS[method][-1] if on_flux else SETTINGS[method]
        factor, digits = (1, 3) if on_flux else (1e4, 1)
        errors = {}
        for row in some:
            found = row.found["errors"]
            text = settings_text(common.as_kept(row.settings["settings"]))
            errors[text] = factor * found.get(3, found.get(4))
        values = sorted(errors.values())
        of_chosen = errors.get(settings_text(common.as_kept(chosen)))
        numbers = [of_chosen, values[0], float(np.median(values)), values[-1]]
        texts = ["" if x is None else f"{x:.{digits}f}" for x in numbers]
        lines.append([place, method, settings_text(chosen), len(some), *texts])
    head = ["", "method", "chosen", "tried", "error of the chosen", "least", "median", "largest"]
    return common.table(head, lines)


def by_place_and_method(rows: list[common.Row]) -> dict[tuple[str, str], list[common.Row]]:
    groups = {}
    for row in rows:
        key = row.settings.get("flow", "tiny Flux"), row.settings["method"]
        groups.setdefault(key, []).append(row)
    return groups


def tables_of_direct(rows: list[common.Row]) -> list[str]:
    """A table for each shift and budget, and one of ratios."""
    flows = common.grouped(rows, "flow")
    floors = {flow: 1e4 * common.column(some, "floor").mean() for flow, some in flows.items()}
    told = ", ".join(f"{floor:.1f} ({flow})" for flow, floor in floors.items())
    lines = [f"Energy distance x 1e-4, {seeds_of(rows)} seeds; data to data 0 ± {told}", ""]
    for shift, budget in product(SHIFTS, BUDGETS):
        cells = []
        for steps, method in product(DIRECT_STEPS, COMPARED):
            texts = []
            for flow in flows:
                some = common.where(rows, "direct", flow=flow, shift=shift, steps=steps)
                texts.append(common.energy_text(common.column(some, "errors", budget, method)))
            if any(texts):
                cells.append([steps, method, *texts])
        if cells:
            lines += [f"**shift {shift:g}, {budget}**"]
            lines += common.table(["steps", "method", *flows], cells)
    lines += [
        "Ours / direct regression: geometric mean over the flows, paired by seed. Best: with the "
        "number of calls that has the least geometric mean on each flow, chosen on these seeds"
    ]
    return lines + table_of_direct_ratios(rows)


def table_of_direct_ratios(rows: list[common.Row]) -> list[str]:
    lines = []
    for shift, budget, steps in product(SHIFTS, BUDGETS, DIRECT_STEPS):
        some = common.where(rows, "direct", shift=shift, steps=steps)
        if not some:
            continue
        errors = {method: errors_by_seed(some, budget, method) for method in COMPARED}
        ours = geometric_mean(errors["ours"], axis=1)
        regressions = [errors[method] for method in REGRESSIONS]
        cells = []
        for other in [best_of_each_flow(regressions), *regressions]:
            cells.append(common.ratio_text(ours, geometric_mean(other, axis=1)))
        lines.append([f"{shift:g}", budget, steps, *cells])
    return common.table(["shift", "budget", "steps", "direct, best", *REGRESSIONS], lines)


def errors_by_seed(rows: list[common.Row], budget: str, method: str) -> np.ndarray:
    """Errors (seeds, flows), of the seeds that have been measured on all flows."""
    flows = [*common.grouped(rows, "flow")]
    errors = []
    for some in common.grouped(rows, "seed").values():
        by_flow = {row.settings["flow"]: row.found["errors"][budget][method] for row in some}
        if len(by_flow) == len(flows):
            errors.append([by_flow[flow] for flow in flows])
    return np.array(errors)


def best_of_each_flow(errors: list[np.ndarray]) -> np.ndarray:
    """Errors (seeds, flows) of the method with the least geometric mean, for each flow."""
    flows = range(errors[0].shape[1])
    best = [min((some[:, i] for some in errors), key=geometric_mean) for i in flows]
    return np.stack(best, axis=1)


def table_of_rates(rows: list[common.Row]) -> list[str]:
    rates = common.grouped(rows, "rate")
    flows = common.grouped(rows, "flow")
    lines = []
    for shift, budget, method in product(common.grouped(rows, "shift"), BUDGETS, COMPARED):
        cells = []
        for rate in rates:
            texts = []
            for flow in flows:
                some = common.where(rows, "tune_direct", flow=flow, shift=shift, rate=rate)
                texts.append(common.energy_text(common.column(some, "errors", budget, method)))
            cells.append(" / ".join(texts))
        best = tuned_rate(rows, shift, budget, method)
        lines.append([f"{shift:g}", budget, method, *cells, best])
    return common.table(["shift", "budget", "method", *rates, "best"], lines)


# ---------------------------------------------------------------------------------------- tiny Flux

FLUX_STEPS = (2, 3, 4, 8)
FLUX_SETTINGS = {  # chosen by hand, and the best of --parts tune_flux; see `of_best_settings`
    "direct, 4 calls": [
        dict(calls=4, rate=1e-3, falling=False),
        dict(calls=4, rate=5e-4, falling=True),
    ],
    "direct, 8 calls": [
        dict(calls=8, rate=1e-3, falling=False),
        dict(calls=8, rate=5e-4, falling=True),
    ],
    "down to 3": [
        dict(ladder=(48, *DOWN_TO_3), rate=1e-3, growth=2.0),
        dict(ladder=(12, 6, 3), rate=1e-3, growth=1.0),
    ],
    "distilled": [
        dict(rate=1e-3, decay=0.95, plain=0.25, finest=32),
        dict(rate=5e-4, decay=0.95, plain=0.25, finest=32),
    ],
}


class StepFlux(common_flux.TinyFlux):
    """The tiny Flux with a LoRA, whose velocity may also be told a step d.

    A network is a set of LoRA weights (P,) and, where it is told d, an embedder of d: its output is
    added to the embedding of time, guidance and text.
    """

    def __init__(self, settings):
        super().__init__(settings)
        calls = common.network_calls(common.matched(3))
        self.budget = settings.iterations * settings.batch * calls  # that of our student
        self.of_step = 0.0  # what is added to the embedding
        self.pipe.transformer.time_text_embed.register_forward_hook(
            lambda module, given, embedding: embedding + self.of_step
        )

    def embedder(self) -> nn.Module:
        """An embedder of steps d, which at first adds 0."""
        torch.manual_seed(self.settings.seed)
        width = self.pipe.transformer.inner_dim
        layers = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width))
        for weight in layers[-1].parameters():
            nn.init.zeros_(weight)
        return layers

    def velocity(self, weights: Tensor | None, embedder: nn.Module | None = None) -> sc.Velocity:
        """v(x, t, d=None, **cond) of this network, for up to --batch rows; None: the teacher."""
        plain = self.lora.velocity(weights)

        def velocity(x: Tensor, t: Tensor, *, d: Tensor | None = None, **cond: Tensor) -> Tensor:
            self.of_step = 0.0 if d is None else embedder(fourier(d))
            return plain(x, t, **cond)

        return velocity


def direct_on_flux(world: StepFlux, *, calls: int, rate: float, falling: bool) -> sc.Velocity:
    """A student of 3 steps, by direct regression with so many teacher calls a row."""
    weights = world.lora.loaded_weights()
    teacher, student = world.velocity(None), world.velocity(weights)
    config = common.matched(3)

    def loss(iteration: int) -> Tensor:
        generator, x_0, noise, cond = world.draw("direct", iteration)
        return common.direct_loss(config, calls, teacher, student, x_0, noise, generator, **cond)

    count = round(world.budget / (world.settings.batch * (3 + calls)))
    for _ in world.minimize(loss, weights, count, rate, falling):
        pass
    return student


def progressive_on_flux(world: StepFlux, *, ladder, rate: float, growth: float) -> sc.Velocity:
    """The network of the last rung. Each rung's teacher is the LoRA of the rung before."""
    weights = None
    iterations = world.budget / (world.settings.batch * TWO_VELOCITIES)
    for N, count in rungs(ladder, iterations, growth):
        before = world.velocity(weights)
        weights = world.lora.loaded_weights() if weights is None else weights.clone()
        student = world.velocity(weights)

        def loss(iteration: int, N=N, student=student, before=before) -> Tensor:
            generator, x_0, noise, cond = world.draw("progressive", N, iteration)
            return progressive_loss(N, student, before, x_0, noise, generator, **cond)

        for _ in world.minimize(loss, weights, count, rate, falling=True):
            pass
    return student


def shortcut_model_on_flux(
    world: StepFlux, *, rate: float, decay: float, plain: float, finest: int
) -> sc.Velocity:
    """v(x, t, d) of the EMA of LoRA and embedder."""
    weights, embedder = world.lora.loaded_weights(), world.embedder()
    ema_weights, ema_embedder = weights.clone(), toy_2d.frozen(embedder)
    teacher = world.velocity(None)
    student, ema = world.velocity(weights, embedder), world.velocity(ema_weights, ema_embedder)
    k, count = step_size_rows(world.budget, world.settings.batch, plain, True)

    def loss(iteration: int) -> Tensor:
        generator, x_0, noise, cond = world.draw("step size", iteration)
        return step_size_loss(k, finest, student, ema, teacher, x_0, noise, generator, **cond)

    others = list(embedder.parameters())
    for _ in world.minimize(loss, weights, count, rate, falling=True, others=others):
        emas = [ema_weights, *ema_embedder.parameters()]
        sc.update_ema(emas, [weights, *others], decay)
    return ema


def tried_on_flux(method: str) -> list[dict]:
    """Settings to compare: rates with ladders or fractions of plain rows, then around the best."""
    if method.startswith("direct"):
        calls = FLUX_SETTINGS[method][0]["calls"]
        tries = [(rate, True) for rate in (2.5e-4, 5e-4, 1e-3, 2e-3)]
        tries += [(rate, False) for rate in (5e-4, 1e-3, 2e-3)]
        return [dict(calls=calls, rate=rate, falling=falling) for rate, falling in tries]
    if method == "down to 3":
        ladders = ((6, 3), DOWN_TO_3[1:], DOWN_TO_3, (48, *DOWN_TO_3))
        rates = (5e-4, 1e-3, 2e-3)
        tries = [(ladders[0], rate, 1.0) for rate in rates]  # one rung
        tries += product(ladders[1:], rates, (1.0, 2.0))
        return [dict(ladder=ladder, rate=rate, growth=growth) for ladder, rate, growth in tries]
    tries = product((1.25e-4, 2.5e-4, 5e-4, 1e-3), (0.25, 0.5))
    some = [dict(rate=rate, decay=0.95, plain=plain, finest=32) for rate, plain in tries]
    changes = [{"decay": 0.8}, {"decay": 0.99}, {"finest": 16}]
    return some + [some[4] | one for one in changes]


def errors_on_flux(world: StepFlux, method: str, settings: dict, purpose: str) -> dict[int, float]:
    """RMSE at all step counts."""
    if method == "distilled":
        informed = shortcut_model_on_flux(world, **settings)
        nets = {n: at(informed, n) for n in FLUX_STEPS}
    else:
        train = progressive_on_flux if method == "down to 3" else direct_on_flux
        nets = dict.fromkeys(FLUX_STEPS, train(world, **settings))
    return {n: world.distance(net, n, purpose) for n, net in nets.items()}


def measure_settings_on_flux(method: str, settings: dict, length: float) -> dict:
    """Errors with these settings on the validation captions of the tuning seed."""
    with tempfile.TemporaryDirectory() as folder:
        world = StepFlux(common_flux.demonstration(Path(folder), 100, length=length))
        return {"errors": errors_on_flux(world, method, settings, "validation")}


def measure_flux(method: str, seed: int, length: float, settings: dict | None = None) -> dict:
    """Errors of a method on the tiny Flux; "ours" is the demonstration, with its scales."""
    with tempfile.TemporaryDirectory() as folder:
        how = dict(steps=FLUX_STEPS, length=length)
        run = common_flux.demonstration(Path(folder), seed, **how)
        if method == "ours":
            rows = common_flux.distil(run)["table"]
            student, scaled = (
                {row["steps"]: row["rmse"] for row in rows if row["sampler"] == sampler}
                for sampler in ("student", "student, scaled")
            )
            return {"errors": student, "scaled": scaled}
        world = StepFlux(run)
        if method == "teacher":
            teacher = world.velocity(None)
            return {"errors": {n: world.distance(teacher, n) for n in FLUX_STEPS}}
        return {"errors": errors_on_flux(world, method, settings, "compare")}


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, flows=list(toy_2d.FLOWS), usual=USUAL)
