"""Network calls until the 3-step error reaches a level: python tests/benchmarks/iterations.py

The paper's recipe (dual, its windows, rho 0.4) against ours (`for_steps(3)`), at scale 1 and at a
scale found without data, over the course of training: on the 2-D flows (energy distance to fresh
data, x 1e-4) and on the tiny Flux (RMSE of latents to 32 teacher steps, held-out captions). Calls
are counted for each sample: 5 times the batch in an iteration, for either recipe (3 for forward and
backward, 2 for the targets); a scale adds those of its search once. The teacher's training is not
counted.

Both recipes have the same settings to choose from, SETTINGS; on each line of a table the best one
counts. `--parts sweep` (seed 100, moons and gaussians) proposed them: averages and rates in a grid
of 28, warm-up and schedule around GOOD, batches from 32 to 512. Beside them stand the paper's
recipe with the paper's averages, 0.99 / 0.999 (published; 2 seeds, for it takes the longest) and
ours as toy_2d.py trains it (shipped). On the tiny Flux: FLUX_SETTINGS.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import argparse
import json
import math
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch

import shortcut as sc
import toy_2d as toy

LENGTH = 4000  # the most iterations of the 2-D flows
SNAPSHOTS = sorted(round(LENGTH * 2 ** (-k / 3)) for k in range(31))  # 4 to 4,000
CHECKPOINTS = (12, 25, 50, 75, 100, 150, 200, 300, 400)  # iterations on the tiny Flux,
LATER = (600, 800, 1000, 1200, 1600, 2000, 2400)  # and with the paper's averages
CALLS = 5  # of a row in an iteration, for either recipe
# Calls of 256 rows in toy.calibrate: lam* (16 fine steps and two velocities, three times), the
# teacher's fine endpoints, 21 scales in 3 steps. On the tiny Flux of 32 rows: the same lam*, 32
# fine steps, 9 scales: its two searches share one. A best scale at a border costs a few more.
SEARCH = (3 * 18 + toy.FINE_STEPS + 21 * 3) * 256
FLUX_SEARCH = (3 * 18 + 32 + 9 * 3) * 32
RECIPES = {"paper": dict(teacher_ratio=0.4), "ours": bench.matched(3)}
# Of the fast and the slow average; 0: the student itself.
DECAYS = ((0.0, 0.5), (0.5, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 0.99), (0.98, 0.995),
          (0.99, 0.999))  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GRID = dict(batch=512, warm_up=0, length=1000, constant=True)
BATCHES = (32, 64, 128, 256)  # beside 512
REFERENCE = {"moons": (40, 20), "gaussians": (30, 10)}  # x 1e-4: to tell settings apart


def kept(out: Path, name: str, measure) -> dict:
    """The numbers of one run: read if they are in the folder, else measured and written there."""
    path = out / f"{name}.json"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(measure()))
        part.replace(path)
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------ the 2-D flows


def adam(setting: dict, weights, lr, iterations: int, warmup):
    """toy.adam with a setting of rate, warm-up and schedule instead of lr and warmup."""
    optimizer = torch.optim.Adam(weights, setting["rate"], fused=True)
    end = (lambda i: 1) if setting["constant"] else (lambda i: 2 - 2 * i / iterations)
    factor = lambda i: min((i + 1) / max(1, setting["warm_up"]), 1, end(i))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def curve(world: bench.Bench, base, recipe: str, setting: dict, length: float) -> dict:
    """3-step errors of the snapshots of one training, at scale 1 and at the calibrated scale."""
    last = round(setting["length"] * length)
    snapshots = [i for i in SNAPSHOTS if i < last] + [last]
    fast, slow = setting["decays"]
    settings = RECIPES[recipe] | dict(fast_decay=fast, slow_decay=slow)
    how = {"ema_warmup": setting.get("growing", False), "batch": setting["batch"]}
    with patch.object(toy, "adam", partial(adam, setting)):
        nets = world.train(base, last, snapshots=snapshots, how=how, **settings)
    scaled = [world.calibrated(base, nets[i], 3) for i in snapshots]
    return {
        "batch": setting["batch"],
        "iterations": snapshots,
        "scale 1": [world.error(nets[i], 3) for i in snapshots],
        "scaled": [s["error"] for s in scaled],
        "scales": [s["scale"] for s in scaled],
    }


def label(setting: dict) -> str:
    fast, slow = setting["decays"]
    schedule = "constant" if setting["constant"] else "decayed"
    fast = "growing up to " * setting.get("growing", False) + str(fast)
    return (f"{fast}/{slow}, batch {setting['batch']}, rate {setting['rate']:g}, warm-up"
            f" {setting['warm_up']}, {setting['length']} iterations, {schedule}")  # fmt: skip


def grid() -> list[dict]:
    return [GRID | dict(decays=d, rate=r) for d, r in product(DECAYS, RATES)]


def around(setting: dict) -> list[dict]:
    """Other warm-ups of a setting, and decays to zero over runs of several lengths."""
    warm = [setting | dict(warm_up=w) for w in (0, 25, 100, 400)]
    return warm + [setting | dict(length=n) for n in (125, 250, 500, 2000)]


def batches() -> list[dict]:
    """Other batches, at three rates, with quick averages, with those of GOOD and with growing."""
    averages = (QUICK["decays"], False), (GOOD["decays"], False), (SHIPPED["decays"], True)
    tries = product(averages, BATCHES, RATES[1:])
    return [GRID | dict(decays=d, growing=g, batch=b, rate=r) for (d, g), b, r in tries]


def cost(run: dict, column: str, level: float, search: float = SEARCH) -> float:
    """Calls until the level is reached, by interpolation of the logarithms; inf: never."""
    i, error = np.array(run["iterations"]), np.maximum(run[column], 1e-6)
    hit = np.flatnonzero(error <= level)
    if not len(hit):
        return float("inf")
    k = hit[0]
    at = i[k]
    if k and error[k] < level:
        part = np.log(error[k - 1] / level) / np.log(error[k - 1] / error[k])
        at = i[k - 1] * (i[k] / i[k - 1]) ** part
    return CALLS * run["batch"] * at + (search if column == "scaled" else 0)


def sweep(out: Path, flow: str, recipe: str, length: float) -> list[tuple[dict, dict]]:
    """(setting, curve) of the grid, around GOOD, then of other batches."""
    torch.set_num_threads(1)
    world = bench.Bench(flow, 100)
    base = cache(lambda: toy.train_teacher(world.data, max(2, round(2000 * length)), 100))

    def run(setting):
        name = f"sweep {flow} {recipe} {label(setting)}".replace(" ", "-").replace("/", "-")
        return kept(out, name, lambda: curve(world, base(), recipe, setting, length))

    return [(setting, run(setting)) for setting in (*grid(), *around(GOOD), *batches())]


def headline(out: Path, flow: str, seed: int, length: float, count: int | None = None) -> dict:
    """Curves of both recipes at their settings, and the teacher's errors, for a flow and seed."""
    torch.set_num_threads(1)
    world = bench.Bench(flow, seed)
    base = cache(lambda: toy.train_teacher(world.data, max(2, round(2000 * length)), seed))
    runs = {column: [] for column in (*RECIPES, *FIXED)}
    todo = [(r, r, setting) for r in RECIPES for setting in SETTINGS[:count]]
    todo += [(c, r, setting) for c, (r, *more) in FIXED.items() for setting in more[:count]]
    for column, recipe, setting in todo:
        if column == "published" and seed >= PUBLISHED_SEEDS:
            continue
        name = f"flow {flow} {seed} {recipe} {label(setting)}".replace(" ", "-").replace("/", "-")
        measure = lambda r=recipe, s=setting: curve(world, base(), r, s, length)  # noqa: E731
        runs[column].append(kept(out, name, measure))
    teacher = lambda: {n: world.error(base(), n) for n in (3, 8, 12, 16, 24, 32)}  # noqa: E731
    return runs | {"teacher": kept(out, f"teacher-{flow}-{seed}", teacher)}


QUICK = dict(GRID, decays=(0.0, 0.5), rate=2e-3)
GOOD = dict(GRID, decays=(0.8, 0.9), rate=2e-3, constant=False)
SHIPPED = dict(GOOD, decays=(0.99, 0.999), growing=True)
LONG = dict(length=2000, constant=False)
SETTINGS = [
    QUICK,
    GOOD,
    QUICK | dict(batch=256),
    QUICK | LONG | dict(batch=128),
    QUICK | LONG | dict(batch=32, rate=4e-3),
    GOOD | LONG | dict(batch=128),
    GOOD | LONG | dict(batch=32, rate=1e-3),
    GOOD | LONG | dict(batch=64),
    SHIPPED | LONG | dict(batch=64),
    SHIPPED | LONG | dict(batch=128, rate=4e-3),
]
# The paper's averages, with two batches, at their best within these iterations; toy_2d.py's.
PUBLISHED = dict(GRID, decays=(0.99, 0.999), rate=1e-3, length=2520)
FIXED = {
    "published": ("paper", PUBLISHED, PUBLISHED | dict(batch=64)),
    "shipped": ("ours", SHIPPED),
}
PUBLISHED_SEEDS = 2


# -------------------------------------------------------------------------------------- tiny Flux


FLUX_SETTINGS = {
    "growing averages, as shipped, batch 64": dict(batch=64, ends=(200, 400)),
    "growing averages, batch 32": dict(batch=32, ends=(200, 400)),
    "growing averages, batch 16": dict(batch=16, ends=(200, 400)),
    "growing averages, batch 8": dict(batch=8, ends=(200, 400)),
    "averages 0.8/0.9, batch 64": dict(batch=64, decays=(0.8, 0.9), ends=(100, 200)),
    "averages 0.875/0.975, batch 64": dict(batch=64, decays=(0.875, 0.975), ends=(200, 400)),
    "averages 0.8/0.9, batch 32": dict(batch=32, decays=(0.8, 0.9), ends=(100, 200)),
    "averages 0.875/0.975, batch 32": dict(batch=32, decays=(0.875, 0.975), ends=(200, 400)),
}  # ends of the paper's recipe, when it is past its best, and of ours
FLUX_PUBLISHED = dict(batch=8, decays=(0.99, 0.999), ends=(LATER[-1], 0))


class Enough(Exception):
    """The last checkpoint that counts is reached."""


def flux_run(out: Path, recipe: str, seed: int, length: float, setting: dict) -> dict:
    """3-step RMSE on held-out captions at the checkpoints of one distillation."""
    decays = setting.get("decays", ("growing",))
    name = "-".join(map(str, ["flux", recipe, seed, setting["batch"], *decays]))
    return kept(out, name, lambda: distil(recipe, seed, length, **setting))


def distil(recipe: str, seed: int, length: float, batch: int, ends, decays=None) -> dict:
    import flux as demo  # tests/benchmarks/flux.py

    fd = demo.fd
    torch.set_num_threads(1)
    points = [i for i in CHECKPOINTS + LATER if i <= ends[recipe == "ours"]]
    points = sorted({max(1, round(i * length)) for i in points})
    last = points[-1]
    with tempfile.TemporaryDirectory() as folder:
        more = ["--batch", batch, "--iterations", last, "--validate-every", last,
                "--checkpoint-every", last, "--limit", 0 if length >= 1 else 20]  # fmt: skip
        more += ["--paper"] * (recipe == "paper")
        args = demo.demonstration(Path(folder), seed, *more, steps=(3,))
        if decays:
            args.config = replace(args.config, fast_decay=decays[0], slow_decay=decays[1])
        weights_at, update_ema = {}, sc.update_ema

        def watch(ema, weights, decay, iteration):
            update_ema(ema, weights, decay, math.inf if decays else iteration)
            if iteration in points:
                weights_at[iteration] = weights[0].clone()
            if iteration == last:
                raise Enough

        with patch.object(fd.sc, "update_ema", watch), suppress(Enough):
            fd.distil(args)
        args.batch = 64  # samples at a time
        return {"batch": batch} | evaluate(fd, args, weights_at)


@torch.no_grad()
def evaluate(fd, args, weights_at: dict[int, torch.Tensor]) -> dict:
    adapter = fd.Adapter(args)
    pipe, validation = fd.load(args, "image"), fd.Validation(args, adapter)
    cond, noise = fd.held_out(args, args.comparison, "compare")

    def end(weights, steps, scale=1.0):
        adapter.use(weights, scale)
        return fd.sample(args, pipe, cond, noise, steps)

    fine = end(None, fd.FINE)
    scales = {i: validation.search(weights, 3)[1] for i, weights in weights_at.items()}
    return {
        "iterations": list(weights_at),
        "scale 1": [fd.rms(end(w, 3) - fine) for w in weights_at.values()],
        "scaled": [fd.rms(end(w, 3, scales[i]) - fine) for i, w in weights_at.items()],
        "scales": list(scales.values()),
        "teacher": {n: fd.rms(end(None, n) - fine) for n in (3, 4, 6, 8, 9, 12, 16)},
    }


# ------------------------------------------------------------------------------------- the tables


def cell(values) -> str:
    """Thousand calls over the seeds that reached the level (geometric mean), and how many did."""
    values = np.array(values)
    reached = values[np.isfinite(values)]
    if not len(reached):
        return "never"
    some = "" if len(reached) == len(values) else f" ({len(reached)} of {len(values)})"
    return f"{np.exp(np.log(reached).mean()) / 1000:,.1f}{some}"


def compared(paper, ours) -> str:
    """Ratio of calls over the seeds in which both reach the level."""
    both = [(a, b) for a, b in zip(paper, ours) if np.isfinite(a) and np.isfinite(b)]
    if len(both) < len(paper):
        return f"both in {len(both)} of {len(paper)}" if both else ""
    return bench.ratio(*zip(*both)) if len(both) > 1 else f"{both[0][0] / both[0][1]:.2f}"


def level_rows(runs: list[dict], levels: dict[str, list[float]], show, search: float):
    """A line a level: its value, calls of each recipe at either scale, the paper's over ours.

    A run has a list of curves for each recipe: on each line that setting counts which reaches the
    level with more seeds, then in fewer calls; its batch stands beside the calls.
    """
    recipes = [r for r in (*FIXED, *RECIPES) if r in runs[0]]
    columns = list(product(recipes, ("scale 1", "scaled")))
    names = [*(f"{r}, {c}" for r, c in columns), "paper / ours, scale 1", "both scaled"]
    names += ["published / ours, scale 1"] * ("published" in recipes)
    yield "| level of the 3-step error | value | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 2) + "|"
    for name, values in levels.items():
        calls, cells = {}, [name, show(values)]
        for recipe, column in columns:
            some = [(run[recipe], x) for run, x in zip(runs, values) if run[recipe]]
            tries = [
                ([cost(curves[k], column, x, search) for curves, x in some], some[0][0][k]["batch"])
                for k in range(len(some[0][0]))
            ]
            row, batch = min(tries, key=lambda t: (np.isinf(t[0]).sum(), np.mean(t[0])))
            calls[recipe, column] = row
            cells.append(cell(row) + f", batch {batch}" * bool(np.isfinite(row).any()))
        pairs = [("paper", "scale 1"), ("paper", "scaled"), ("published", "scale 1")]
        cells += [compared(calls[r, c], calls["ours", c]) for r, c in pairs if r in recipes]
        yield "| " + " | ".join(cells) + " |"


def least(runs: list[dict], recipe: str, column: str) -> list[float]:
    """Least error over training, of the setting in which its mean over the seeds is least."""
    runs = [run for run in runs if run[recipe]]
    tries = [[min(run[recipe][k][column]) for run in runs] for k in range(len(runs[0][recipe]))]
    return min(tries, key=np.mean)


def setting_rows(groups: dict[str, list[dict]]):
    """A line a setting: for each flow ours at its end, its least error and the paper's, scale 1."""
    names = [
        f"{flow}: {c}" for flow in groups for c in ("ours, last", "ours, least", "paper, least")
    ]
    yield "| fast/slow average, ... | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for k, setting in enumerate(SETTINGS[: len(next(iter(groups.values()))[0]["ours"])]):
        cells = [label(setting)]
        for runs in groups.values():
            ours, paper = ([run[r][k]["scale 1"] for run in runs] for r in ("ours", "paper"))
            errors = [x[-1] for x in ours], [min(x) for x in ours], [min(x) for x in paper]
            cells += [f"{1e4 * np.mean(x):.1f}" for x in errors]
        yield "| " + " | ".join(cells) + " |"


def flow_tables(
    out: Path, flows: list[str], seeds: int, length: float, count: int | None
) -> list[str]:
    lines, groups = [], {}
    for flow in flows:
        runs = [headline(out, flow, seed, length, count) for seed in range(seeds)]
        groups[flow] = runs
        best = {(r, c): least(runs, r, c) for r in RECIPES for c in ("scale 1", "scaled")}
        levels = {
            "twice the paper's least": [2 * x for x in best["paper", "scale 1"]],
            "the paper's least": best["paper", "scale 1"],
            "the paper's least, scaled": best["paper", "scaled"],
        }
        levels |= {
            f"teacher, {n} steps": [run["teacher"][str(n)] for run in runs] for n in (16, 24, 32)
        }
        told = product((*RECIPES, *FIXED), ("scale 1", "scaled"))
        told = ", ".join(f"{r} {c} {bench.show(least(runs, r, c))}" for r, c in told)
        lines += ["", f"**{flow}**, {seeds} seeds; least error of a run: {told}", ""]
        lines += level_rows(runs, levels, bench.show, SEARCH)
    return [*lines, "", *setting_rows(groups)]


def sweep_table(out: Path, length: float) -> list[str]:
    """Least errors, at scale 1 and scaled, and calls to the levels of REFERENCE, seed 100."""
    names = [
        f"{flow}: {what}"
        for flow, (a, b) in REFERENCE.items()
        for what in ("least", "least, scaled", f"calls to {a}", f"to {b}", f"to {b}, scaled")
    ]
    usual = ", warm-up 0, 1000 iterations, constant"  # GRID; not said again on each line
    lines = ["", "| recipe | fast/slow average, ... | " + " | ".join(names) + " |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for recipe in RECIPES:
        found = [sweep(out, flow, recipe, length) for flow in REFERENCE]
        for runs in zip(*found):
            cells = [recipe, label(runs[0][0]).replace(usual, "")]
            for (_, run), levels in zip(runs, REFERENCE.values()):
                a, b = (1e-4 * level for level in levels)
                cells += [f"{1e4 * min(run[c]):.1f}" for c in ("scale 1", "scaled")]
                tries = (("scale 1", a), ("scale 1", b), ("scaled", b))
                cells += [cell([cost(run, *some)]) for some in tries]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def flux_tables(out: Path, seeds: int, length: float, count: int | None) -> list[str]:
    digits = lambda values: "{:.3f} ± {:.3f}".format(*bench.interval(values))  # noqa: E731
    run = lambda recipe, seed, setting: flux_run(out, recipe, seed, length, setting)  # noqa: E731
    settings = dict([*FLUX_SETTINGS.items()][:count])
    runs = [
        {r: [run(r, seed, some) for some in settings.values()] for r in RECIPES}
        | {"published": [run("paper", seed, FLUX_PUBLISHED)]}
        for seed in range(seeds)
    ]
    best = {(r, c): least(runs, r, c) for r in RECIPES for c in ("scale 1", "scaled")}
    levels = {
        "1.1 x the paper's least": [1.1 * x for x in best["paper", "scale 1"]],
        "the paper's least": best["paper", "scale 1"],
        "the paper's least, scaled": best["paper", "scaled"],
    }
    for n in (4, 6, 8, 9):
        levels[f"teacher, {n} steps"] = [run["ours"][0]["teacher"][str(n)] for run in runs]
    told = product((*RECIPES, "published"), ("scale 1", "scaled"))
    told = ", ".join(f"{r} {c} {digits(least(runs, r, c))}" for r, c in told)
    lines = ["", f"**tiny Flux**, {seeds} seeds; least error of a run: {told}", ""]
    lines += level_rows(runs, levels, digits, FLUX_SEARCH)
    for k, title in enumerate([*settings, "published"]):
        names, row = (RECIPES, k) if title in settings else (("published",), 0)
        points = max((run[r][row]["iterations"] for run in runs for r in names), key=len)
        lines += ["", f"| {title}; iterations | " + " | ".join(map(str, points)) + " |"]
        lines += ["|---" * (len(points) + 1) + "|"]
        for r, c in product(names, ("scale 1", "scaled")):
            at = [dict(zip(run[r][row]["iterations"], run[r][row][c])) for run in runs]
            cells = [digits([x[i] for x in at]) if i in at[0] else "" for i in points]
            lines.append(f"| {r}, {c} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    parts = ("sweep", "flows", "flux")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--flows", nargs="+", choices=toy.FLOWS, default=list(toy.FLOWS))
    parser.add_argument("--seeds", type=int, default=5, help="of the 2-D flows (5)")
    parser.add_argument("--flux-seeds", type=int, default=3, help="of the tiny Flux (3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--settings", type=int, help="only the first so many of each recipe (all)")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder, and go on in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out, jobs, lines = args.out or Path(scratch), [], []
        out.mkdir(parents=True, exist_ok=True)
        if "flux" in args.parts:
            kinds = [*product(RECIPES, [*FLUX_SETTINGS.values()][: args.settings])]
            todo = product(range(args.flux_seeds), [*kinds, ("paper", FLUX_PUBLISHED)])
            jobs += [pool.submit(flux_run, out, r, s, args.length, some) for s, (r, some) in todo]
        if "sweep" in args.parts:
            todo = product(REFERENCE, RECIPES)
            jobs += [pool.submit(sweep, out, flow, recipe, args.length) for flow, recipe in todo]
        if "flows" in args.parts:
            todo = product(range(args.seeds), args.flows)
            jobs += [
                pool.submit(headline, out, flow, s, args.length, args.settings) for s, flow in todo
            ]
        for job in jobs:
            job.result()
        if "flows" in args.parts:
            lines += flow_tables(out, args.flows, args.seeds, args.length, args.settings)
        if "flux" in args.parts:
            lines += flux_tables(out, args.flux_seeds, args.length, args.settings)
        if "sweep" in args.parts:
            lines += sweep_table(out, args.length)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
