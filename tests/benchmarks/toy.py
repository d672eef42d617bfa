"""What the 2-D flows must hold, measured: python tests/benchmarks/toy.py (half an hour on 2 cores)

Trains everything for each flow and seed with the toy's defaults and prints a Markdown table. Errors
are unbiased energy distances (x 1e-4) of 16,384 samples to 32,768 fresh data points, with the same
noise and data for every column. Brackets are 95 % intervals over the seeds, of the mean or of the
paired ratio.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

import shortcut as sc
import toy_2d as toy

TEACHER, STUDENT = 2000, 1000  # iterations
TEACHER_STEPS = (2, 3, 4, 8, 12, 16, 24, 32)
LONG = (15, 30, 60, 125, 250, 500, 1000, 1500, 2000, 3000, 4000, 5000, 6000, 7000, 8000)
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


class Bench:
    """The noise and data that every network of one flow and seed is measured on."""

    def __init__(self, flow: str, seed: int):
        g = torch.Generator().manual_seed(20_000 + seed)
        self.data, self.seed = toy.FLOWS[flow], seed
        self.reference, self.noise = self.data(32_768, g), torch.randn(16_384, 2, generator=g)
        self.validation, self.pool = torch.randn(256, 2, generator=g), self.data(10, g)
        draws = [toy.energy_distance(self.data(16_384, g), self.reference) for _ in range(8)]
        self.floor = float(np.std(draws))

    def error(self, net, steps, shift=1.0):
        return toy.energy_distance(toy.sample(net, self.noise, steps, shift), self.reference)

    def calibrated(self, base, net, steps, shift=1.0):
        scale = toy.calibrate(base, net, self.validation, steps, shift)
        return {"scale": scale, "error": self.error(toy.scaled(base, net, scale), steps, shift)}

    def best(self, base, net, steps, shift=1.0):
        """Least error that any scale reaches, by a search on the measure itself."""
        lam = sc.optimal_scale(net, base, self.validation, sc.time_grid(steps, shift)).item()
        scales = np.geomspace(lam / 2, 2 * lam, 29).tolist()
        return min(self.error(toy.scaled(base, net, s), steps, shift) for s in scales)

    def lam_per_step(self, base, net, steps, shift=1.0):
        times, x, lams = sc.time_grid(steps, shift), self.validation, []
        for i in range(steps):
            lams.append(sc.optimal_scale(net, base, x, times[i : i + 2]).item())
            x = sc.euler_sample(base, x, torch.linspace(times[i], times[i + 1], 17))
        return lams

    def train(self, base, iterations, data=None, snapshots=(), how=None, **settings):
        config = sc.ShortcutConfig(**{"shift_range": (1.0, 1.0), **settings})
        data, how = data or self.data, how or ({} if base else toy.FROM_SCRATCH)
        return toy.train_student(base, data, config, iterations, self.seed, snapshots, **how)


def matched(steps):
    return dict(teacher_ratio=None, student_steps=steps)


def measure(flow: str, seed: int, length: float = 1.0) -> dict:
    """All the numbers of one flow and seed; `length` shortens every training, for a test."""
    torch.set_num_threads(1)
    bench, its = Bench(flow, seed), lambda count: max(2, round(count * length))
    base, last = toy.train_teacher(bench.data, its(TEACHER), seed), its(STUDENT)
    out = {"flow": flow, "seed": seed, "floor": bench.floor}
    out["teacher"] = {n: bench.error(base, n) for n in TEACHER_STEPS}
    out["teacher, shift 3"] = {n: bench.error(base, n, 3.0) for n in TEACHER_STEPS}

    student = bench.train(base, last, **matched(3))[last]
    out["student"] = {n: bench.error(student, n) for n in (1, 2, 3, 4, 8, 16, 32)}
    out["calibrated"] = {n: bench.calibrated(base, student, n) for n in (2, 3, 4, 8)}
    out["lam matched"] = bench.lam_per_step(base, student, 3)

    few = bench.train(base, last, toy.draw_from(bench.pool), **matched(3))[last]
    out["few-shot"] = bench.error(few, 3)
    out["few-shot, calibrated"] = bench.calibrated(base, few, 3)
    paper = bench.train(base, last, teacher_ratio=0.52)[last]
    out["lam paper"] = bench.lam_per_step(base, paper, 3)
    out["paper 0.52"] = bench.error(paper, 3)

    long = bench.train(base, its(8000), snapshots={its(i) for i in LONG}, **matched(3))
    out["long matched"] = {i: bench.error(long[its(i)], 3) for i in LONG}
    out["calibration"] = {
        i: {
            n: {
                **bench.calibrated(base, long[its(i)], n),
                "best": bench.best(base, long[its(i)], n),
            }
            for n in (2, 3, 4, 8)
        }
        for i in (250, 1000, 4000)
    }
    long = bench.train(base, its(8000), snapshots={its(i) for i in LONG}, teacher_ratio=0.4)
    out["long paper"] = {i: bench.error(long[its(i)], 3) for i in LONG}

    for name, kind in (
        ("matched", matched(3)),
        ("paper 0.4", dict(teacher_ratio=0.4)),
        ("paper 0.52", dict(teacher_ratio=0.52)),
    ):
        net = bench.train(base, last, shift_range=(3.0, 3.0), **kind)[last]
        out[f"shift 3, {name}"] = {
            "scale 1": bench.error(net, 3, 3.0),
            "calibrated": bench.calibrated(base, net, 3, 3.0),
            "best": bench.best(base, net, 3, 3.0),
            "lam": bench.lam_per_step(base, net, 3, 3.0),
        }

    fused = bench.train(None, its(4000), **matched(3))[its(4000)]
    plain = toy.train_teacher(bench.data, its(2 * 4000), seed)  # as many network calls
    out["fused"] = {n: bench.error(fused, n) for n in (2, 3, 4, 8, 16, 32)}
    out["plain"] = {n: bench.error(plain, n) for n in (2, 3, 4, 8, 16, 32)}
    return json.loads(json.dumps(out))  # keys as strings, as they are read back


# ---------------------------------------------------------------------------------------- the table


def interval(values) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = T_975.get(len(values) - 1, 2.0) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def show(values, scale=1e4) -> str:
    mean, half = interval(np.asarray(values) * scale)
    return f"{mean:.1f} ± {half:.1f}"


def ratio(a, b) -> str:
    """Geometric mean of the paired ratio, with its interval."""
    mean, half = interval(np.log(np.maximum(a, 1e-6)) - np.log(np.maximum(b, 1e-6)))
    return f"{np.exp(mean):.2f} [{np.exp(mean - half):.2f}, {np.exp(mean + half):.2f}]"


def verdict(a, b, floor) -> str:
    """Is a at most b, in the mean over the seeds? Or are both within 3 deviations of the floor?"""
    if max(np.mean(a), np.mean(b)) <= 3 * np.mean(floor):
        return "both at the floor"
    return "yes" if np.mean(a) <= np.mean(b) else "no"


def rows(runs: list[dict]):
    """(claim, ours, bound, paired ratio, must, target), for the seeds of one flow."""
    flow, floor = runs[0]["flow"], [r["floor"] for r in runs]
    hard = flow == "gaussians"

    def column(*keys):
        values = []
        for run in runs:
            for key in keys:
                run = run[str(key)]
            values.append(run)
        return np.array(values)

    def against(claim, ours, must, target, teacher="teacher"):
        bounds = [column(teacher, must), column(teacher, target)]
        verdicts = [verdict(ours, bound, floor) for bound in bounds]
        label = f"teacher {must}: {show(bounds[0])}"
        return claim, show(ours), label, ratio(ours, bounds[0]), verdicts[0], (
            f"{verdicts[1]} ({target})"
        )  # fmt: skip

    def factor(claim, low, high, label, must):
        times = np.mean(high) / max(np.mean(low), 1e-6)
        told = f"{times:.1f}x below"
        return (
            claim,
            show(low),
            f"{label}: {show(high)}",
            told,
            "yes" if times >= must else "no",
            "",
        )

    yield against("1. 3 steps, scale 1", column("student", 3), *((12, 16) if hard else (16, 32)))
    yield factor("1. the same, 20x below teacher at 3", column("student", 3), column("teacher", 3),
                 "teacher 3", 20)  # fmt: skip
    ours = column("shift 3, matched", "calibrated", "error")
    yield against("1. shift 3, calibrated", ours, 12, 16, "teacher, shift 3")
    for name in ("paper 0.4", "paper 0.52"):
        best = column(f"shift 3, {name}", "best")
        yield factor(f"1. shift 3, 3x below {name}, its best scale", ours, best, name, 3)
    for n, must, target in ((2, 4, 4), (4, 8, 8), (8, 8, 8)) if hard else (
        (2, 8, 12), (4, 16, 24), (8, 24, 32)):  # fmt: skip
        yield against(f"2. {n} steps, calibrated", column("calibrated", n, "error"), must, target)
    ours = column("calibration", 250, 3, "error")
    yield against("2. 3 steps after 250 iterations", ours, 8 if hard else 16, 8 if hard else 16)
    for i in (250, 1000, 4000):
        for n in (2, 3, 4, 8):
            a, b = column("calibration", i, n, "error"), column("calibration", i, n, "best")
            times = np.mean(a) / np.mean(b)
            yield (f"3. calibration, {n} steps, {i} iterations", show(a), f"best: {show(b)}",
                   f"{times:.2f}x", "yes" if times <= 1.5 else "no",
                   "yes" if times <= 1.2 else "no")  # fmt: skip
    for name in ("matched", "paper"):
        line = np.array([[r[f"long {name}"][str(i)] for i in LONG] for r in runs])
        ours, best = line[:, -1], line.min(1)
        times = np.mean(ours) / np.mean(best)
        held = times <= 1.5 if name == "matched" else times > 1.5
        yield (f"4. {name}, 3 steps at 8,000 iterations", show(ours), f"best: {show(best)}",
               f"{times:.2f}x", "yes" if held else "no", "")  # fmt: skip
    for shift, name, keys in (
        (1, "matched", ("lam matched",)),
        (1, "paper 0.52", ("lam paper",)),
        (3, "matched", ("shift 3, matched", "lam")),
        (3, "paper 0.52", ("shift 3, paper 0.52", "lam")),
    ):
        lams = column(*keys).mean(0)
        told = "[" + ", ".join(f"{lam:.2f}" for lam in lams) + "]"
        yield f"4. lam* per step, shift {shift}, {name}", told, "", "", "", ""
    yield factor("5. fused, 10x below flow matching at 3", column("fused", 3), column("plain", 3),
                 "flow matching", 10)  # fmt: skip
    a, b = column("fused", 32), column("plain", 32)
    yield "5. fused, 32 steps", show(a), f"flow matching: {show(b)}", ratio(a, b), "", ""
    few, full = column("few-shot"), column("student", 3)
    yield factor("5. few-shot, 15x below teacher at 3", few, column("teacher", 3), "teacher 3", 15)
    yield "5. few-shot, each draw", ", ".join(f"{1e4 * x:.1f}" for x in few), "", "", "", ""
    scaled = column("few-shot, calibrated", "error"), column("calibrated", 3, "error")
    for name, (a, b) in {"scale 1": (few, full), "calibrated": scaled}.items():
        times = np.mean(a) / np.mean(b)
        yield (f"5. few-shot, {name}, at most 2x the full data", show(a), f"full data: {show(b)}",
               f"{times:.2f}x", "yes" if times <= 2 else "no", "")  # fmt: skip


def markdown(runs: list[dict]) -> str:
    flows = list(dict.fromkeys(run["flow"] for run in runs))
    lines = []
    for flow in flows:
        group = [run for run in runs if run["flow"] == flow]
        floor = 1e4 * np.mean([run["floor"] for run in group])
        lines += ["", f"**{flow}**, {len(group)} seeds; data to data 0 ± {floor:.1f}", ""]
        lines += ["| claim | ours | bound | ratio | must | target |", "|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(group)]
    return "\n".join(lines)


def collect(measure, flows: list[str]) -> list[dict]:
    """Read the command line and measure every flow and seed, each in a process of one thread."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split(": ")[0])
    parser.add_argument("--flows", nargs="+", choices=toy.FLOWS, default=flows)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, exclusive (5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--raw", type=Path, help="file of the numbers: read what it has, add to it")
    args = parser.parse_args()
    runs = json.loads(args.raw.read_text()) if args.raw and args.raw.exists() else []
    done = {(run["flow"], run["seed"]) for run in runs}
    todo = [(f, s) for s in range(args.seeds) for f in args.flows if (f, s) not in done]
    with ProcessPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(measure, flow, seed, args.length) for flow, seed in todo]:
            runs.append(future.result())
            if args.raw:
                args.raw.write_text(json.dumps(runs))
    return sorted(runs, key=lambda run: (list(toy.FLOWS).index(run["flow"]), run["seed"]))


if __name__ == "__main__":
    print(markdown(collect(measure, list(toy.FLOWS))))
