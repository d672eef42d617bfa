"""What must hold on the tiny Flux: python tests/benchmarks/flux.py (40 minutes on 2 cores)

Runs flux_distill.py as the README's demonstration does, with 3 seeds: on all pairs, on ten, with
the paper's windows, until lam* says stop, at other time shifts, and for other numbers of steps.
`--parts` picks some of these runs; "all pairs", with which others are compared, must be among them.
Errors are distances (RMSE of latents) to 32 steps of the teacher at the same shift, on held-out
captions and paired noise. "cut": a LoRA on all layers without those outside the blocks, as some
tools load it.
"""

import tempfile
from pathlib import Path

import common
import common_flux
import numpy as np
from common_flux import STEPS
from safetensors.torch import load_file

import flux_distill as fd

RUNS = {
    "all pairs": "",
    "ten pairs": "--limit 10",
    "all layers": "--layers all",
    "the paper's windows": "--paper",
    "stopped when matched": "--iterations 400 --validate-every 20 --stop-when-matched",
    "shift 2": "--shift 2 --shift-range 2 2",
    "shift 3": "--shift 3 --shift-range 2 4",
    "for 1 step": "--student-steps 1",
    "for 2 steps": "--student-steps 2",
    "for 4 steps": "--student-steps 4",
    "for 8 steps": "--student-steps 8",
}
FOR_STEPS = {1: "for 1 step", 2: "for 2 steps", 3: "all pairs", 4: "for 4 steps", 8: "for 8 steps"}
SHIFTS = ("all pairs", "shift 2", "shift 3")  # each has a teacher of its own
SAMPLERS = ("teacher", "student", "student, scaled")

# ------------------------------------------------------------------------------------- measurements


def measure(run: str, seed: int, length: float) -> dict:
    """Distances by sampler and steps, scales, lam*."""
    with tempfile.TemporaryDirectory() as folder:
        settings = common_flux.demonstration(Path(folder), seed, *RUNS[run].split(), length=length)
        results = common_flux.distil(settings)
        found = {name: {} for name in SAMPLERS}
        for row in results["table"]:
            found[row["sampler"]][row["steps"]] = row["rmse"]
        found["scales"] = results["adapter"]["scales"]
        found["iterations"] = results["adapter"]["iterations"]
        found["seed to seed"] = results["seed_to_seed"]
        if run == "all pairs":
            found["lam"] = lam_of_saved(settings, results)
        if run == "all layers":
            found["cut"] = cut_to_blocks(settings)
    return found


def lam_of_saved(settings: fd.Settings, results: dict) -> dict[int, float]:
    """lam* of the weights that were saved, on the noises that chose the scales."""
    world = common_flux.TinyFlux(settings)
    name = "slow" if "slow" in results["adapter"]["weights"] else "student"
    weights = load_file(world.run.state)[name]
    validation = fd.Validation(settings, world.cache, world.lora)
    return {n: validation.lam(weights, n) for n in STEPS}


def cut_to_blocks(settings: fd.Settings) -> float:
    """Distance in 3 steps of a saved LoRA without its layers outside the blocks, at scale 1."""
    world = common_flux.TinyFlux(settings)
    lora = world.lora
    weights = world.saved_weights()
    of_B = weights[lora.first_B :].split([layer.B.numel() for layer in lora.layers.values()])
    for name, B in zip(lora.layers, of_B, strict=True):
        if "transformer_blocks." not in name:
            B.zero_()
    return world.distance(world.velocity(weights), 3)


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    return {
        run: [common.Task(measure, {"run": run, "seed": seed}) for seed in seeds] for run in RUNS
    }


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    runs = common.grouped(rows, "run")
    all_pairs = runs["all pairs"]
    lines = []
    apart = common.column(all_pairs, "seed to seed").mean()
    lines += [f"Distance between the teacher's ends from two noises: {apart:.3f}"]
    if "stopped when matched" in runs:
        counts = [str(row.found["iterations"]) for row in runs["stopped when matched"]]
        lines += [f"Stopped when matched after {', '.join(counts)} iterations"]
    lines += table_of_distances(runs)
    by_steps = runs_for_steps(runs)
    if len(by_steps) > 1:
        lines += table_of_students(by_steps)
    head = ["claim", "ours", "bound", "ratio", "must", "target"]
    return lines + common.table(head, claims(runs))


def table_of_distances(runs: dict[str, list[common.Row]]) -> list[str]:
    lines = []
    for run, rows in runs.items():
        if run in FOR_STEPS.values() and run != "all pairs":  # see table_of_students
            continue
        for sampler in SAMPLERS:
            if sampler == "teacher" and run not in SHIFTS:
                continue
            texts = [common.mean_text(common.column(rows, sampler, n)) for n in STEPS]
            lines.append([f"{sampler}: {run}", *texts])
    for name in ("scales", "lam"):
        means = [common.column(runs["all pairs"], name, n).mean() for n in STEPS]
        lines.append([f"{name}: all pairs", *(f"{mean:.2f}" for mean in means)])
    return common.table(["Euler steps", *STEPS], lines)


def runs_for_steps(runs: dict[str, list[common.Row]]) -> dict[int, list[common.Row]]:
    """The runs that differ in the number of steps they distil for, by it."""
    return {N: runs[run] for N, run in FOR_STEPS.items() if run in runs}


def table_of_students(by_steps: dict[int, list[common.Row]]) -> list[str]:
    """Students that were distilled for N steps, in N steps."""
    cells = []
    for N, rows in by_steps.items():
        texts = [common.mean_text(common.column(rows, sampler, N)) for sampler in SAMPLERS]
        of_three = ""
        if N in STEPS and N != 3:
            errors = common.column(by_steps[3], "student, scaled", N)
            own = common.column(rows, "student, scaled", N)
            of_three = f"{common.mean_text(errors)} ({common.ratio_text(own, errors)})"
        cells.append([str(N), *texts, of_three])
    head = ["steps N, of distillation and sampling", "teacher", "student, scale 1"]
    head += ["student, scaled", "student for 3, scaled, in N steps (scaled student for N / this)"]
    return common.table(head, cells)


def claims(runs: dict[str, list[common.Row]]):
    """Lines of a table: claim, ours, bound, ratio of both, must, target."""

    def claim(text, ours, other, name, must=None, target=None):
        factor = np.mean(ours) / np.mean(other)
        met = ["" if x is None else f"{'yes' if factor <= x else 'no'} ({x:g})"
               for x in (must, target)]  # fmt: skip
        bound = f"{name}: {common.mean_text(other)}"
        return text, common.mean_text(ours), bound, common.ratio_text(ours, other), *met

    def error(run, sampler, steps):
        return common.column(runs[run], sampler, steps)

    for run in SHIFTS:
        if run not in runs:
            continue
        place = "" if run == "all pairs" else f"{run}: "
        teacher = {n: error(run, "teacher", n) for n in STEPS}
        ours = error(run, "student", 3)
        yield claim(f"{place}3 steps, scale 1", ours, teacher[3], "teacher 3", 0.6)
        for n in (2, 3, 4):
            ours, text = error(run, "student, scaled", n), f"{place}{n} steps, scaled"
            yield claim(text, ours, teacher[2 * n], f"teacher {2 * n}", 1.1)
            yield claim(text, ours, teacher[3 * n], f"teacher {3 * n}", None, 1.1)
    for name in SAMPLERS[1:]:
        ours = error("all pairs", name, 3)
        if "ten pairs" in runs:
            few = error("ten pairs", name, 3)
            yield claim(f"ten pairs, 3 steps, {name}", few, ours, "all pairs", 1.3, 1.15)
        for run in ("all layers", "the paper's windows", "stopped when matched"):
            if run in runs:
                yield claim(f"3 steps, {name}", ours, error(run, name, 3), run)
    if "all layers" in runs:
        cut = common.column(runs["all layers"], "cut")
        whole = error("all layers", "student", 3)
        yield claim("all layers, 3 steps, student, cut", cut, whole, "whole")


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, seeds=3)
