"""Network calls until the 3-step error reaches a level: python tests/benchmarks/iterations.py

The paper's recipe (dual, its windows, rho 0.4) against ours (matched windows for 3 steps), at scale
1 and at a scale found without data, over the course of training: on the 2-D flows (energy distance
to fresh data, x 1e-4) and on the tiny Flux (RMSE of latents to 32 teacher steps, held-out
captions). Calls are counted for each sample. A row costs 5 in an iteration of the paper's recipe
and 6 in one of ours: 3 for forward and backward, the others for the target. A scale adds those of
its search once. The teacher's training is not counted.

Both recipes have the same settings to choose from: EMA and batch, SETTINGS; on each line of a table
the best one counts ("tuned"). "(1 of 2)": in so many of the seeds; "both in 1 of 3": in only so
many did both reach the level. `--parts tune` (seed 100, moons and gaussians) tries three rates with
each of them. For comparison: "published", the paper's recipe with its own EMA decays, 0.99 / 0.999
from the start, at half the rate (2 seeds, for it takes the longest), and "shipped", ours as
toy_2d.py trains. On the tiny Flux: FLUX_SETTINGS.
"""

import tempfile
from itertools import product
from pathlib import Path

import common
import common_flux
import numpy as np

import flux_distill as fd
import shortcut as sc
import toy_2d

SNAPSHOTS = sorted(round(4000 * 2 ** (-k / 3)) for k in range(31))  # 4 to 4,000
RECIPES = ("paper", "ours")
# Decays of the fast and the slow EMA (0: the student itself), and are they warmed up?
EMAS = {
    "0 / 0.5": (0.0, 0.5, False),
    "0.8 / 0.9": (0.8, 0.9, False),
    "0.99 / 0.999, warmed up": (0.99, 0.999, True),
    "0.99 / 0.999": (0.99, 0.999, False),
}
TO_CHOOSE_FROM = ("0 / 0.5", "0.8 / 0.9", "0.99 / 0.999, warmed up")
ITERATIONS = {512: 1000, 64: 2000}  # by batch
RATES = (1e-3, 2e-3, 4e-3)
SETTINGS = [dict(ema=e, batch=b, rate=2e-3) for e, b in product(TO_CHOOSE_FROM, ITERATIONS)]
SHIPPED = dict(ema="0.99 / 0.999, warmed up", batch=512, rate=2e-3)
PUBLISHED = [dict(ema="0.99 / 0.999", batch=b, rate=1e-3, iterations=2520) for b in (512, 64)]
PUBLISHED_SEEDS = 2
TEACHER_STEPS = (3, 8, 12, 16, 24, 32)
TUNED_ON = ("moons", "gaussians")
# Calls of 256 rows in toy_2d.calibrate: the teacher's path and lam* (16 fine steps and two
# velocities, three times), the teacher's fine endpoints, 23 scales in 3 steps. Where the search
# goes further, its few more are not counted.
SEARCH = (3 * 18 + toy_2d.FINE_STEPS + 23 * 3) * 256

# ------------------------------------------------------------------------------------- measurements


def config_of(recipe: str, ema: str) -> tuple[sc.ShortcutConfig | sc.MatchedConfig, bool]:
    """Config of a recipe, and whether its EMAs are warmed up."""
    fast, slow, ema_warmup = EMAS[ema]
    if recipe == "paper":
        return common.paper(0.4, fast_decay=fast, slow_decay=slow), ema_warmup
    return common.matched(3, slow_decay=slow), ema_warmup


def measure_curve(recipe: str, setting: dict, flow: str, seed: int, length: float) -> dict:
    """3-step errors of the snapshots of one training, at scale 1 and at the calibrated scale."""
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    config, ema_warmup = config_of(recipe, setting["ema"])
    batch = setting["batch"]
    last = common.shortened(setting.get("iterations", ITERATIONS[batch]), length)
    snapshots = [i for i in SNAPSHOTS if i < last] + [last]
    how = toy_2d.Recipe(batch, setting["rate"], warmup=1, ema_warmup=ema_warmup)
    students = toy_2d.distil(teacher, on.data, config, last, seed, snapshots, how)
    calibrated = [on.calibrated(teacher, students[i], 3) for i in snapshots]
    calls_of_row = common.network_calls(config)
    return {
        "batch": batch,
        "iterations": snapshots,
        "calls": [calls_of_row * batch * i for i in snapshots],
        "scale 1": [on.error(students[i], 3) for i in snapshots],
        "scaled": [found["error"] for found in calibrated],
    }


def measure_teacher(flow: str, seed: int, length: float) -> dict:
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    return {n: on.error(teacher, n) for n in TEACHER_STEPS}


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    curves = []
    for seed, flow in product(seeds, flows):
        one = {"flow": flow, "seed": seed}
        tuned = product(RECIPES, SETTINGS)
        curves += [one | {"recipe": recipe, "setting": setting} for recipe, setting in tuned]
        if seed < PUBLISHED_SEEDS:
            curves += [one | {"recipe": "paper", "setting": setting} for setting in PUBLISHED]
    teachers = [{"flow": flow, "seed": seed} for seed, flow in product(seeds, flows)]
    tuning = [
        {"flow": flow, "seed": 100, "recipe": recipe, "setting": setting | {"rate": rate}}
        for flow, recipe, setting, rate in product(TUNED_ON, RECIPES, SETTINGS, RATES)
    ]
    on_flux = []
    for seed in seeds[:3]:
        tuned = product(RECIPES, FLUX_SETTINGS)
        on_flux += [{"seed": seed, "recipe": r, "setting": setting} for r, setting in tuned]
        published = {"seed": seed, "recipe": "paper"}
        on_flux += [published | {"setting": setting} for setting in FLUX_PUBLISHED]
    return {
        "flux": [common.Task(measure_flux, settings) for settings in on_flux],
        "flows": [common.Task(measure_curve, settings) for settings in curves],
        "teachers": [common.Task(measure_teacher, settings) for settings in teachers],
        "tune": [common.Task(measure_curve, settings) for settings in tuning],
    }


# ---------------------------------------------------------------------------------- calls to levels


def calls_to(curve: dict, scale: str, level: float, search: float) -> float:
    """Calls until the level is reached, by interpolation of the logarithms; inf: never."""
    errors = np.maximum(curve[scale], 1e-6)
    reached = np.flatnonzero(errors <= level)
    if len(reached) == 0:
        return float("inf")
    k = reached[0]
    calls = curve["calls"][k]
    if k > 0 and errors[k] < level:
        part = np.log(errors[k - 1] / level) / np.log(errors[k - 1] / errors[k])
        before = curve["calls"][k - 1]
        calls = before * (calls / before) ** part
    return calls + (search if scale == "scaled" else 0)


Column = list[list[dict]]  # the curves that a recipe has to choose from: [setting][seed]


def soonest(column: Column, scale: str, levels: list[float], search: float) -> tuple[list, int]:
    """Calls by seed, and which setting needs them.

    It is that which reaches the level with most seeds, then in the fewest calls.
    """
    tried = []
    for k, curves in enumerate(column):
        calls = [calls_to(curve, scale, level, search) for curve, level in zip(curves, levels)]
        tried.append((np.isinf(calls).sum(), np.mean(calls), calls, k))
    _, _, calls, k = min(tried, key=lambda one: one[:2])
    return calls, k


def least_errors(column: Column, scale: str) -> list[float]:
    """The least error over training by seed, of the setting with the least mean of it."""
    return min(([min(curve[scale]) for curve in curves] for curves in column), key=np.mean)


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    curves = common.where(rows, "flows")
    for flow, some in common.grouped(curves, "flow").items():
        columns = columns_of(some, SETTINGS, PUBLISHED, SHIPPED)
        if not {"paper", "ours"} <= columns.keys():
            continue  # not measured yet
        teacher = [row.found for row in common.where(rows, "teachers", flow=flow)]
        best = least_errors(columns["paper"], "scale 1")
        levels = {
            "twice the paper's least error": [2 * error for error in best],
            "the paper's least error": best,
            "the paper's least error, scaled": least_errors(columns["paper"], "scaled"),
        }
        if teacher:
            levels |= {f"teacher, {n} steps": [e[n] for e in teacher] for n in (16, 24, 32)}
        seeds = len(common.grouped(some, "seed"))
        lines += [f"**{flow}**, {seeds} seeds; thousand network calls to a level, and the batch"]
        lines += table_of_levels(columns, levels, SEARCH, common.energy_text)
        lines += ["Least error of a training", *table_of_least(columns, common.energy_text)]
    if curves:
        lines += ["Error by setting: at the end, and the least", *table_of_settings(curves)]
    on_flux = common.where(rows, "flux")
    if on_flux:
        lines += tables_of_flux(on_flux)
    tuned = common.where(rows, "tune")
    if tuned:
        lines += ["Least errors on seed 100 by learning rate, over the EMAs and batches above"]
        lines += table_of_tuning(tuned)
    return lines


def columns_of(
    rows: list[common.Row], shared: list[dict], published: list[dict], shipped: dict
) -> dict[str, Column]:
    """Curves by recipe: with the settings that both share, and with those of their own."""
    named = {
        "published": ("paper", published),
        "paper": ("paper", shared),
        "shipped": ("ours", [shipped]),
        "ours": ("ours", shared),
    }
    part = rows[0].part
    columns = {}
    for name, (recipe, settings) in named.items():
        found = [common.where(rows, part, recipe=recipe, setting=some) for some in settings]
        columns[name] = [[row.found for row in some] for some in found if some]
    return {name: column for name, column in columns.items() if column}


def calls_text(calls: list[float]) -> str:
    """Thousand calls, geometric mean over the seeds that reach the level, and how many do."""
    reached = [c for c in calls if np.isfinite(c)]
    if not reached:
        return "never"
    text = f"{np.exp(np.mean(np.log(reached))) / 1000:,.1f}"
    return text if len(reached) == len(calls) else f"{text} ({len(reached)} of {len(calls)})"


def ratio_of_calls(some: list[float], ours: list[float]) -> str:
    """Over the seeds that both have, if both reach the level in all of them."""
    pairs = [*zip(some, ours)]
    both = [pair for pair in pairs if np.isfinite(pair).all()]
    if len(both) < len(pairs):
        return f"both in {len(both)} of {len(pairs)}" if both else ""
    if len(both) < 3:  # too few for an interval
        return f"{np.exp(np.mean([np.log(a / b) for a, b in both])):.0f}, {len(both)} seeds"
    return common.ratio_text(*zip(*both))


def table_of_levels(columns: dict[str, Column], levels: dict, search: float, text) -> list[str]:
    """Calls of each recipe, with the batch of the setting that counts."""
    shown = [(name, "scale 1") for name in columns] + [("paper", "scaled"), ("ours", "scaled")]
    lines = []
    for level, values in levels.items():
        cells, calls = [level, text(values)], {}
        for name, scale in shown:
            calls[name, scale], k = soonest(columns[name], scale, values, search)
            cells.append(calls_text(calls[name, scale]))
            if np.isfinite(calls[name, scale]).any():
                cells[-1] += f", batch {columns[name][k][0]['batch']}"
        for name in ("published", "paper"):
            if name in columns:
                cells.append(ratio_of_calls(calls[name, "scale 1"], calls["ours", "scale 1"]))
        lines.append(cells)
    head = ["level of the 3-step error", "value", *(f"{name}, {scale}" for name, scale in shown)]
    head += [f"{name} / ours, scale 1" for name in ("published", "paper") if name in columns]
    return common.table(head, lines)


def table_of_least(columns: dict[str, Column], text) -> list[str]:
    lines = []
    for name, column in columns.items():
        lines.append([name, *(text(least_errors(column, s)) for s in ("scale 1", "scaled"))])
    return common.table(["recipe", "scale 1", "scaled"], lines)


def setting_text(setting: dict) -> str:
    rate = f", rate {setting['rate']:g}" if "rate" in setting else ""
    return f"EMA {setting['ema']}, batch {setting['batch']}{rate}"


def table_of_settings(rows: list[common.Row]) -> list[str]:
    by_flow = common.grouped(rows, "flow")
    head = ["setting"]
    for flow in by_flow:
        head += [f"{flow}: {name}" for name in ("ours, last", "ours, least", "paper, least")]
    lines = []
    for setting in SETTINGS:
        cells = [setting_text(setting)]
        for some in by_flow.values():
            ours = common.where(some, "flows", recipe="ours", setting=setting)
            paper = common.where(some, "flows", recipe="paper", setting=setting)
            errors = [row.found["scale 1"][-1] for row in ours]
            errors = [errors, *([min(r.found["scale 1"]) for r in s] for s in (ours, paper))]
            cells += [f"{1e4 * np.mean(some):.1f}" if some else "" for some in errors]
        lines.append(cells)
    return common.table(head, lines)


def table_of_tuning(rows: list[common.Row]) -> list[str]:
    """Least errors by recipe and rate: geometric mean over EMAs and batches, and the least."""
    lines = []
    for recipe, rate in product(RECIPES, RATES):
        cells = [recipe, f"{rate:g}"]
        for some in common.grouped(common.where(rows, "tune", recipe=recipe), "flow").values():
            at_rate = [row for row in some if row.settings["setting"]["rate"] == rate]
            errors = [1e4 * min(row.found["scale 1"]) for row in at_rate]
            cells += [f"{np.exp(np.mean(np.log(errors))):.1f}", f"{min(errors):.1f}"]
        if len(cells) > 2:
            lines.append(cells)
    head = ["recipe", "rate"]
    for flow in common.grouped(rows, "flow"):
        head += [f"{flow}: mean", f"{flow}: least"]
    return common.table(head, lines)


# ---------------------------------------------------------------------------------------- tiny Flux

CHECKPOINTS = (12, 25, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1000, 1200, 1600, 2000, 2400)
FLUX_SETTINGS = [
    dict(ema="0.99 / 0.999, warmed up", batch=64),
    dict(ema="0.99 / 0.999, warmed up", batch=16),
    dict(ema="0.8 / 0.9", batch=64),
    dict(ema="0.8 / 0.9", batch=16),
]
FLUX_SHIPPED = FLUX_SETTINGS[0]
FLUX_LAST = {"paper": 200, "ours": 400}  # iterations: then the paper's recipe is past its best
FLUX_PUBLISHED = [dict(ema="0.99 / 0.999", batch=8, iterations=2400)]
FLUX_LEVELS = (4, 6, 8, 9)  # steps of the teacher
# Calls of the 32 validation rows: lam* as above, 32 fine steps, 9 scales in 3 steps. The two
# searches of `Validation.search` share a scale. A best one at a border costs a few more.
FLUX_SEARCH = (3 * 18 + 32 + 9 * 3) * 32


def measure_flux(recipe: str, setting: dict, seed: int, length: float) -> dict:
    """3-step RMSE on held-out captions at the checkpoints of one distillation."""
    config, ema_warmup = config_of(recipe, setting["ema"])
    batch = setting["batch"]
    last = setting.get("iterations", FLUX_LAST[recipe])
    points = sorted({common.shortened(i, length) for i in CHECKPOINTS if i <= last})
    more = ["--batch", batch]
    if length < 1:
        more += ["--limit", 20]
    with tempfile.TemporaryDirectory() as folder:
        settings = common_flux.demonstration(Path(folder), seed, *more, steps=(3,), length=length)
        world = common_flux.TinyFlux(settings)
        weights = world.distil(config, points[-1], points, ema_warmup)
        validation = fd.Validation(settings, world.cache, world.lora)
        scales = {i: validation.search(weights[i], 3)[1] for i in points}
        calls_of_row = common.network_calls(config)
        found = {
            "batch": batch,
            "iterations": points,
            "calls": [calls_of_row * batch * i for i in points],
            "scale 1": [world.distance(world.velocity(weights[i]), 3) for i in points],
            "scaled": [world.distance(world.velocity(weights[i], scales[i]), 3) for i in points],
        }
        teacher = world.velocity(None)
        found["teacher"] = {n: world.distance(teacher, n) for n in FLUX_LEVELS}
    return found


def tables_of_flux(rows: list[common.Row]) -> list[str]:
    settings = (FLUX_SETTINGS, FLUX_PUBLISHED, FLUX_SHIPPED)
    columns = columns_of(rows, *settings)
    if not {"paper", "ours"} <= columns.keys():
        return []  # not measured yet
    best = least_errors(columns["paper"], "scale 1")
    levels = {
        "1.1 x the paper's least error": [1.1 * error for error in best],
        "the paper's least error": best,
        "the paper's least error, scaled": least_errors(columns["paper"], "scaled"),
    }
    for n in FLUX_LEVELS:
        levels[f"teacher, {n} steps"] = [curve["teacher"][n] for curve in columns["ours"][0]]
    seeds = len(common.grouped(rows, "seed"))
    lines = [f"**tiny Flux**, {seeds} seeds; thousand network calls to a level, and the batch"]
    lines += table_of_levels(columns, levels, FLUX_SEARCH, common.mean_text)
    lines += ["Least error of a training", *table_of_least(columns, common.mean_text)]
    for recipe, setting in product(RECIPES, FLUX_SETTINGS + FLUX_PUBLISHED):
        some = common.where(rows, "flux", recipe=recipe, setting=setting)
        if some:
            lines += table_of_curve(f"{recipe}, {setting_text(setting)}", some)
    return lines


def table_of_curve(title: str, rows: list[common.Row]) -> list[str]:
    """Errors over the course of training."""
    points = rows[0].found["iterations"]
    lines = []
    for scale in ("scale 1", "scaled"):
        errors = common.column(rows, scale).T
        lines.append([scale, *(common.mean_text(values) for values in errors)])
    return common.table([f"{title}; iterations", *points], lines)


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, flows=list(toy_2d.FLOWS))
