"""Network calls until the 3-step error reaches a level: python tests/benchmarks/iterations.py

The paper's recipe (dual, its windows, rho 0.4) against ours (`for_steps(3)`), at scale 1 and at a
scale found without data, over the course of training: on the 2-D flows (energy distance to fresh
data, x 1e-4) and on the tiny Flux (RMSE of latents to 32 teacher steps, held-out captions). Calls
are counted in whole batches: 5 an iteration, for either (3 for forward and backward, 2 for the
targets); a scale adds those of its search once. The teacher's training is not counted.

Both recipes have the same two settings, chosen by `--parts sweep` (seed 100, moons and gaussians):
averages and rates in a grid of 28, then warm-up and schedule around GOOD. QUICK is the paper's
quickest on moons and nearly ours; GOOD is slower, steadier, as low as any for ours. On gaussians
the grid has settings in which the paper's recipe is 1.3 times quicker than in GOOD, or 1.25 times
lower. On each line of a table the better of the two counts. Beside them stand the paper's recipe
with the paper's averages, 0.99 / 0.999 (published), and ours with 0.95 / 0.99 (long averages):
2 seeds, for they take the longest. All these memories are constant. Shipped: ours as toy_2d.py
trains it, with averages whose memory grows. On the tiny Flux: both recipes with the averages of
flux_distill.py, with a constant memory of a tenth of the run, and with that of GOOD.
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

BATCH, LENGTH = 512, 4000  # rows, iterations of the 2-D flows
SNAPSHOTS = sorted(round(LENGTH * 2 ** (-k / 3)) for k in range(31))  # 4 to 4,000
CHECKPOINTS = (12, 25, 50, 75, 100, 150, 200, 300, 400)  # iterations on the tiny Flux
CALLS = 5  # an iteration, for either recipe
# Calls of 256 rows in toy.calibrate: lam* (16 fine steps and two velocities, three times), the
# teacher's fine endpoints, 21 scales in 3 steps. On the tiny Flux of 32 rows: the same lam*, 32
# fine steps, 10 scales. Both in batches of the training.
SEARCH = (3 * 18 + toy.FINE_STEPS + 21 * 3) * 256 / BATCH
FLUX_SEARCH = (3 * 18 + 32 + 10 * 3) * 32 / 64
RECIPES = {"paper": dict(teacher_ratio=0.4), "ours": bench.matched(3)}
# Of the fast and the slow average; 0: the student itself.
DECAYS = ((0.0, 0.5), (0.5, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 0.99), (0.98, 0.995),
          (0.99, 0.999))  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GRID = dict(warm_up=0, length=1000, constant=True)
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
    how = {"ema_warmup": setting.get("growing", False)}
    with patch.object(toy, "adam", partial(adam, setting)):
        nets = world.train(base, last, snapshots=snapshots, how=how, **settings)
    scaled = [world.calibrated(base, nets[i], 3) for i in snapshots]
    return {
        "iterations": snapshots,
        "scale 1": [world.error(nets[i], 3) for i in snapshots],
        "scaled": [s["error"] for s in scaled],
        "scales": [s["scale"] for s in scaled],
    }


def label(setting: dict) -> str:
    fast, slow = setting["decays"]
    schedule = "constant" if setting["constant"] else "decayed"
    fast = "growing up to " * setting.get("growing", False) + str(fast)
    return (f"{fast}/{slow}, rate {setting['rate']:g}, warm-up {setting['warm_up']},"
            f" {setting['length']} iterations, {schedule}")  # fmt: skip


def grid() -> list[dict]:
    return [GRID | dict(decays=d, rate=r) for d, r in product(DECAYS, RATES)]


def around(setting: dict) -> list[dict]:
    """Other warm-ups of a setting, and decays to zero over runs of several lengths."""
    warm = [setting | dict(warm_up=w) for w in (0, 25, 100, 400)]
    return warm + [setting | dict(length=n) for n in (125, 250, 500, 2000)]


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
    return CALLS * at + (search if column == "scaled" else 0)


def sweep(out: Path, flow: str, recipe: str, length: float) -> list[tuple[dict, dict]]:
    """(setting, curve) of the grid, then around GOOD."""
    torch.set_num_threads(1)
    world = bench.Bench(flow, 100)
    base = cache(lambda: toy.train_teacher(world.data, max(2, round(2000 * length)), 100))

    def run(setting):
        name = f"sweep {flow} {recipe} {label(setting)}".replace(" ", "-").replace("/", "-")
        return kept(out, name, lambda: curve(world, base(), recipe, setting, length))

    found = [(setting, run(setting)) for setting in grid()]
    return found + [(setting, run(setting)) for setting in around(GOOD)]


def headline(out: Path, flow: str, seed: int, length: float) -> dict:
    """Curves of both recipes at their settings, and the teacher's errors, for a flow and seed."""
    torch.set_num_threads(1)
    world = bench.Bench(flow, seed)
    base = cache(lambda: toy.train_teacher(world.data, max(2, round(2000 * length)), seed))
    runs = {column: [] for column in (*RECIPES, *FIXED)}
    todo = [(r, r, setting) for r in RECIPES for setting in BEST[r]]
    todo += [(column, *fixed) for column, fixed in FIXED.items() if seed < FIXED_SEEDS[column]]
    for column, recipe, setting in todo:
        name = f"flow {flow} {seed} {recipe} {label(setting)}".replace(" ", "-").replace("/", "-")
        measure = lambda r=recipe, s=setting: curve(world, base(), r, s, length)  # noqa: E731
        runs[column].append(kept(out, name, measure))
    teacher = lambda: {n: world.error(base(), n) for n in (3, 8, 12, 16, 24, 32)}  # noqa: E731
    return runs | {"teacher": kept(out, f"teacher-{flow}-{seed}", teacher)}


QUICK = dict(decays=(0.0, 0.5), rate=2e-3, warm_up=0, length=500, constant=True)
GOOD = dict(decays=(0.8, 0.9), rate=2e-3, warm_up=0, length=1000, constant=False)
BEST = {"paper": (QUICK, GOOD), "ours": (QUICK, GOOD)}  # chosen by the sweep
FIXED = {  # the paper's averages, at its best within these iterations; long ones; toy_2d.py's
    "published": ("paper", dict(GRID, decays=(0.99, 0.999), rate=1e-3, length=2520)),
    "long averages": ("ours", dict(GOOD, decays=(0.95, 0.99), rate=1e-3, warm_up=100, length=2000)),
    "shipped": ("ours", dict(GOOD, decays=(0.99, 0.999), growing=True)),
}
FIXED_SEEDS = {"published": 2, "long averages": 2, "shipped": 5}  # the first two take the longest


# -------------------------------------------------------------------------------------- tiny Flux


# Averages: growing, as shipped; of a constant memory of a tenth of 400 iterations; quick ones.
FLUX_DECAYS = {"growing, as shipped": None, "0.875/0.975": (0.875, 0.975), "0.8/0.9": (0.8, 0.9)}
# A run of 400 iterations is left where the paper's recipe is past its best, and ours with quick
# averages no longer gains.
FLUX_ENDS = {("paper", d): 200 for d in FLUX_DECAYS.values()}
FLUX_ENDS |= {("paper", (0.8, 0.9)): 100, ("ours", (0.8, 0.9)): 200}


class Enough(Exception):
    """The last checkpoint that counts is reached."""


def flux_run(out: Path, recipe: str, seed: int, length: float, decays=None, rate=1e-3) -> dict:
    """3-step RMSE on held-out captions at the checkpoints of one distillation."""
    name = f"flux-{recipe}-{seed}-{rate:g}" + (f"-{decays[0]}-{decays[1]}" if decays else "")
    return kept(out, name, lambda: distil(recipe, seed, length, decays, rate))


def distil(recipe: str, seed: int, length: float, decays, rate: float) -> dict:
    import flux as demo  # tests/benchmarks/flux.py

    fd = demo.fd
    torch.set_num_threads(1)
    last = max(10, round(CHECKPOINTS[-1] * length))
    end = FLUX_ENDS.get((recipe, decays), CHECKPOINTS[-1])
    points = [max(1, round(i * last / CHECKPOINTS[-1])) for i in CHECKPOINTS if i <= end]
    with tempfile.TemporaryDirectory() as folder, patch.object(fd, "STEPS", (3,)):
        words = [*demo.DEMO.split(), "--learning-rate", rate, "--iterations", last, "--seed", seed,
                 "--validate-every", last, "--checkpoint-every", last, "--model", demo.TINY,
                 "--prompts", demo.TINY / "prompts.txt", "--out", folder,
                 "--limit", 0 if length >= 1 else 20]  # fmt: skip
        args = fd.parse([str(w) for w in words] + ["--paper"] * (recipe == "paper"))
        if decays:
            args.config = replace(args.config, fast_decay=decays[0], slow_decay=decays[1])
        fd.prepare(args)
        weights_at, update_ema = {}, sc.update_ema

        def watch(ema, weights, decay, iteration):
            update_ema(ema, weights, decay, math.inf if decays else iteration)
            if iteration in points:
                weights_at[iteration] = [w.detach().clone() for w in weights]
            if iteration == points[-1]:
                raise Enough

        with patch.object(fd.sc, "update_ema", watch), suppress(Enough):
            fd.distil(args)
        return evaluate(fd, args, weights_at)


@torch.no_grad()
def evaluate(fd, args, weights_at: dict[int, list]) -> dict:
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
    """Geometric mean of the calls over the seeds that reached the level, and how many did."""
    values = np.array(values)
    reached = values[np.isfinite(values)]
    if not len(reached):
        return "never"
    some = "" if len(reached) == len(values) else f" ({len(reached)} of {len(values)})"
    return f"{np.exp(np.log(reached).mean()):,.0f}{some}"


def compared(paper, ours) -> str:
    """Ratio of calls over the seeds in which both reach the level."""
    both = [(a, b) for a, b in zip(paper, ours) if np.isfinite(a) and np.isfinite(b)]
    if len(both) < len(paper):
        return f"both in {len(both)} of {len(paper)}" if both else ""
    return bench.ratio(*zip(*both)) if len(both) > 1 else f"{both[0][0] / both[0][1]:.2f}"


def level_rows(runs: list[dict], levels: dict[str, list[float]], show, search: float):
    """A line a level: its value, calls of each recipe at either scale, the paper's over ours.

    A run has a list of curves for each recipe: on each line that setting counts which reaches the
    level with more seeds, then in fewer calls.
    """
    columns = list(product(RECIPES, ("scale 1", "scaled")))
    fixed = list(product(FIXED, ("scale 1", "scaled")))
    fixed *= "published" in runs[0]
    names = [*(f"{r}, {c}" for r, c in fixed + columns), "paper / ours, scale 1", "both scaled"]
    names += ["published / shipped, scale 1"] * bool(fixed)
    yield "| level of the 3-step error | value | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 2) + "|"
    for name, values in levels.items():

        def best(recipe, column, values=values):
            tries = [
                [
                    cost(run[recipe][k], column, x, search)
                    for run, x in zip(runs, values)
                    if run[recipe]
                ]
                for k in range(len(runs[0][recipe]))
            ]
            return min(tries, key=lambda row: (np.isinf(row).sum(), np.mean(row)))

        calls = {key: best(*key) for key in fixed + columns}
        cells = [name, show(values), *map(cell, calls.values())]
        cells += [compared(calls["paper", c], calls["ours", c]) for c in ("scale 1", "scaled")]
        if fixed:
            cells.append(compared(calls["published", "scale 1"], calls["shipped", "scale 1"]))
        yield "| " + " | ".join(cells) + " |"


def least(runs: list[dict], recipe: str, column: str) -> list[float]:
    """Least error over training, of the setting in which its mean over the seeds is least."""
    runs = [run for run in runs if run[recipe]]
    tries = [[min(run[recipe][k][column]) for run in runs] for k in range(len(runs[0][recipe]))]
    return min(tries, key=np.mean)


def flow_tables(out: Path, flows: list[str], seeds: int, length: float) -> list[str]:
    lines = []
    for flow in flows:
        runs = [headline(out, flow, seed, length) for seed in range(seeds)]
        best = {(r, c): least(runs, r, c) for r in RECIPES for c in ("scale 1", "scaled")}
        levels = {
            "twice the paper's least": [2 * x for x in best["paper", "scale 1"]],
            "the paper's least": best["paper", "scale 1"],
            "the paper's least, scaled": best["paper", "scaled"],
        }
        levels |= {
            f"teacher, {n} steps": [run["teacher"][str(n)] for run in runs] for n in (16, 24, 32)
        }
        told = {
            (r, c): least(runs, r, c) for r in (*RECIPES, *FIXED) for c in ("scale 1", "scaled")
        }
        told = ", ".join(f"{r} {c} {bench.show(v)}" for (r, c), v in told.items())
        ends = bench.show([run["ours"][1]["scale 1"][-1] for run in runs])
        lines += ["", f"**{flow}**, {seeds} seeds; least error of a run: {told}; at the end of our"]
        lines[-1] += f" {GOOD['length']} iterations of GOOD: {ends}"
        lines += [""]
        lines += level_rows(runs, levels, bench.show, SEARCH)
    return lines


def sweep_table(out: Path, length: float) -> list[str]:
    """Least errors, at scale 1 and scaled, and calls to the levels of REFERENCE, seed 100."""
    names = [
        f"{flow}: {what}"
        for flow, (a, b) in REFERENCE.items()
        for what in ("least", "least, scaled", f"calls to {a}", f"to {b}", f"to {b}, scaled")
    ]
    lines = ["", "| recipe | fast/slow average, ... | " + " | ".join(names) + " |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for recipe in RECIPES:
        found = [sweep(out, flow, recipe, length) for flow in REFERENCE]
        for runs in zip(*found):
            cells = [recipe, label(runs[0][0])]
            for (_, run), levels in zip(runs, REFERENCE.values()):
                a, b = (1e-4 * level for level in levels)
                cells += [f"{1e4 * min(run[c]):.1f}" for c in ("scale 1", "scaled")]
                tries = (("scale 1", a), ("scale 1", b), ("scaled", b))
                cells += [cell([cost(run, *some)]) for some in tries]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def flux_tables(out: Path, seeds: int, length: float) -> list[str]:
    digits = lambda values: "{:.3f} ± {:.3f}".format(*bench.interval(values))  # noqa: E731
    lines = []
    for title, decays in FLUX_DECAYS.items():
        runs = [{r: [flux_run(out, r, s, length, decays)] for r in RECIPES} for s in range(seeds)]
        best = {(r, c): least(runs, r, c) for r in RECIPES for c in ("scale 1", "scaled")}
        levels = {
            "1.1 x the paper's least": [1.1 * x for x in best["paper", "scale 1"]],
            "the paper's least": best["paper", "scale 1"],
            "the paper's least, scaled": best["paper", "scaled"],
        }
        for n in (4, 6, 8, 9):
            levels[f"teacher, {n} steps"] = [run["ours"][0]["teacher"][str(n)] for run in runs]
        lines += ["", f"**tiny Flux**, averages {title}, {seeds} seeds", ""]
        lines += ["| iterations | " + " | ".join(map(str, CHECKPOINTS)) + " |"]
        lines += ["|---" * (len(CHECKPOINTS) + 1) + "|"]
        for r, c in best:
            at = [dict(zip(run[r][0]["iterations"], run[r][0][c])) for run in runs]
            cells = [
                digits([x[i] for x in at]) if all(i in x for x in at) else "" for i in CHECKPOINTS
            ]
            lines.append(f"| {r}, {c} | " + " | ".join(cells) + " |")
        lines += ["", *level_rows(runs, levels, digits, FLUX_SEARCH)]
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
    parser.add_argument("--out", type=Path, help="keep the runs in this folder, and go on in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out, jobs, lines = args.out or Path(scratch), [], []
        out.mkdir(parents=True, exist_ok=True)
        if "flux" in args.parts:
            todo = product(range(args.flux_seeds), FLUX_DECAYS.values(), RECIPES)
            jobs += [pool.submit(flux_run, out, r, s, args.length, d) for s, d, r in todo]
        if "sweep" in args.parts:
            todo = product(REFERENCE, RECIPES)
            jobs += [pool.submit(sweep, out, flow, recipe, args.length) for flow, recipe in todo]
        if "flows" in args.parts:
            todo = product(range(args.seeds), args.flows)
            jobs += [pool.submit(headline, out, flow, s, args.length) for s, flow in todo]
        for job in jobs:
            job.result()
        if "flows" in args.parts:
            lines += flow_tables(out, args.flows, args.seeds, args.length)
        if "flux" in args.parts:
            lines += flux_tables(out, args.flux_seeds, args.length)
        if "sweep" in args.parts:
            lines += sweep_table(out, args.length)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
