"""What must hold on the tiny Flux: python tests/benchmarks/flux.py (25 minutes on 2 cores)

Runs flux_distill.py as the README's demonstration does, with 3 seeds, on all pairs, on ten, with
the paper's windows, until lam* says stop, and at other time shifts, and prints Markdown tables.
Errors are distances (RMSE of latents) to 32 steps of the teacher at the same shift, on held-out
captions and paired noise.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import argparse
import os
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from safetensors.torch import load_file

import flux_distill as fd

TINY = Path(__file__).parents[1] / "tiny_flux"
ITERATIONS = 200
DEMO = f"""--resolution 32 --shift 1 --shift-range 1 1 --iterations {ITERATIONS} --batch 64
          --learning-rate 1e-3 --recompute-every 0 --noises 8"""
RUNS = {
    "all pairs": "", "ten pairs": "--limit 10", "all layers": "--layers all",
    "the paper's windows": "--paper",
    "stopped when matched": "--iterations 400 --validate-every 20 --stop-when-matched",
    "shift 2": "--shift 2 --shift-range 2 2", "shift 3": "--shift 3 --shift-range 2.5 4.5",
}  # fmt: skip
STEPS = (2, 3, 4, 6, 8, 9, 12)


def demonstration(out: Path, seed: int, *more, steps=STEPS, length: float = 1.0) -> Namespace:
    """Settings of the README's run with this seed and more flags, its folder checked.

    steps: numbers of steps that are calibrated and compared. length: shortens it, for a test.
    """
    paths = ["--model", TINY, "--prompts", TINY / "prompts.txt", "--out", out]
    args = fd.parse([str(word) for word in (*paths, *DEMO.split(), *more, "--seed", seed)])
    if length != 1:
        args.iterations = max(2, round(args.iterations * length))
        args.noises = 2
    fd.prepare(args)
    args.steps = sorted({*steps, args.student_steps})
    return args


def measure(out: Path, run: str, seed: int, length: float = 1.0) -> dict[tuple[str, int], dict]:
    """Rows of the table that a run prints, by sampler and steps."""
    torch.set_num_threads(1)
    folder = out / f"{run.replace(' ', '-')}-{seed}"
    args = demonstration(folder, seed, *RUNS[run].split(), length=length)
    with redirect_stdout(sys.stderr):  # each run prints its own table
        results = fd.distil(args)
    table = {(row["sampler"], row["steps"]): row for row in results["table"]}
    table["seed to seed"] = results["seed_to_seed"]
    table["iterations"] = results["adapter"]["iterations"]
    if run == "all pairs":  # of the weights that were saved, on the noises that chose the scales
        name = "slow" if "slow" in results["adapter"]["weights"] else "student"
        weights = load_file(args.state)[name]
        validation = fd.Validation(args, fd.Adapter(args))
        table["lam"] = [validation.lam(weights, n) for n in STEPS]
    return table


def tables(runs: dict[str, list[dict]]) -> str:
    """Distances of every sampler, then the claims with their bounds."""

    def error(run, sampler, steps):
        return np.array([table[sampler, steps]["rmse"] for table in runs[run]])

    def cell(values, digits=3):
        return "{:.{d}f} ± {:.{d}f}".format(*bench.interval(values), d=digits)

    apart = np.mean([table["seed to seed"] for table in runs["all pairs"]])
    lines = [f"Two seeds of the teacher: {apart:.3f}", ""]
    if "stopped when matched" in runs:
        counts = [str(table["iterations"]) for table in runs["stopped when matched"]]
        lines[0] += f". Stopped after {', '.join(counts)} iterations"
    lines += ["| Euler steps | " + " | ".join(map(str, STEPS)) + " |", "|---" * 8 + "|"]
    # Each shift has a teacher of its own.
    shifts = [run for run in ("all pairs", "shift 2", "shift 3") if run in runs]
    names = [(run, "teacher") for run in shifts]
    names += [(run, name) for run in runs for name in ("student", "student, scaled")]
    for run, name in names:
        label = f"{name}: {run}" if (run, name) != names[0] else name
        cells = [cell(error(run, name, n)) for n in STEPS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    scales = [np.mean([t["student, scaled", n]["scale"] for t in runs["all pairs"]]) for n in STEPS]
    lams = np.mean([t["lam"] for t in runs["all pairs"]], axis=0)
    for name, row in {"scale: all pairs": scales, "lam*: all pairs": lams}.items():
        lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    lines += ["", "| claim | ours | bound | ratio | must | target |", "|---|---|---|---|---|---|"]

    def claim(text, ours, other, name, must=None, target=None):
        times = np.mean(ours) / np.mean(other)
        met = [x and f"{'yes' if times <= x else 'no'} ({x:g})" for x in (must, target)]
        cells = [text, cell(ours), f"{name}: {cell(other)}", bench.ratio(ours, other)]
        lines.append("| " + " | ".join([*cells, *(x or "" for x in met)]) + " |")

    for run in shifts:
        place = "" if run == "all pairs" else f"{run}: "
        teacher = {n: error(run, "teacher", n) for n in STEPS}
        claim(f"{place}3 steps, scale 1", error(run, "student", 3), teacher[3], "teacher 3", 0.6)
        for n in (2, 3, 4):
            ours = error(run, "student, scaled", n)
            claim(f"{place}{n} steps, scaled", ours, teacher[2 * n], f"teacher {2 * n}", 1.1)
            claim(f"{place}{n} steps, scaled", ours, teacher[3 * n], f"teacher {3 * n}", None, 1.1)
    full = {name: error("all pairs", name, 3) for name in ("student", "student, scaled")}
    for name, ours in full.items() if "ten pairs" in runs else ():
        few = error("ten pairs", name, 3)
        claim(f"ten pairs, 3 steps, {name}", few, ours, "all pairs", must=1.3, target=1.15)
    for run in ("all layers", "the paper's windows", "stopped when matched"):
        for name, ours in full.items() if run in runs else ():
            claim(f"3 steps, {name}", ours, error(run, name, 3), run)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    told = f"some of {', '.join(RUNS)}; always all pairs, with which others are compared"
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, metavar="RUN", help=told)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, exclusive (3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder, and go on in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out = args.out or Path(scratch)
        futures = {
            run: [pool.submit(measure, out, run, seed, args.length) for seed in range(args.seeds)]
            for run in RUNS
            if run in {"all pairs", *args.runs}
        }
        print(tables({run: [f.result() for f in some] for run, some in futures.items()}))


if __name__ == "__main__":
    main()
