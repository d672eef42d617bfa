"""What the README's two commands print: python tests/benchmarks/readme.py (3 minutes on 2 cores)

Both scripts run as a reader runs them, with as many threads as they like, toy_2d.py five times for
its median time. One task at a time has the whole machine: leave --jobs at 1.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product

import baselines
import common
import fewshot
import flux
import speed

import toy_2d

TOY = ["toy_2d.py"]
TINY_FLUX = [
    "flux_distill.py",
    *("--model", "tests/tiny_flux"),
    *("--prompts", "tests/tiny_flux/prompts.txt"),
    *("--resolution", "32"),
    *("--shift", "1"),
    *("--shift-range", "1", "1"),
    *("--iterations", "200"),
    *("--batch", "64"),
    *("--learning-rate", "1e-3"),
    *("--recompute-every", "0"),
    *("--noises", "8"),
    *("--validate-every", "20"),
]

# ------------------------------------------------------------------------------------ measurements


def printed_by(command: list[str], length: float, *more: str) -> tuple[list[str], float]:
    """Lines that one of the scripts prints, and the seconds that it takes as a process.

    In a test, which is short, it has one thread: others may be running.
    """
    environment = dict(os.environ)
    if length == 1:
        del environment["OMP_NUM_THREADS"]
    with tempfile.TemporaryDirectory() as out:
        call = [sys.executable, *command, *more, "--out", out]
        began = time.perf_counter()
        done = subprocess.run(
            call, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=True
        )
        seconds = time.perf_counter() - began
        lines = done.stdout.replace(out, "OUT").splitlines()
    return lines, seconds


def measure_toy(length: float) -> dict:
    """Length: the fraction of the five runs that are made."""
    runs = []
    for _ in range(round(5 * length) or 1):
        lines, seconds = printed_by(TOY, length)
        runs.append(seconds)
    return {"lines": lines, "seconds": runs}


def measure_tiny_flux(length: float) -> dict:
    iterations = common.shortened(200, length)
    lines, seconds = printed_by(TINY_FLUX, length, "--iterations", str(iterations))
    return {"lines": lines, "seconds": [seconds]}


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    return {
        "toy": [common.Task(measure_toy, {})],
        "tiny_flux": [common.Task(measure_tiny_flux, {})],
    }


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    for row in rows:
        command = {"toy": TOY, "tiny_flux": TINY_FLUX}[row.part]
        seconds = row.found["seconds"]
        took = f"{statistics.median(seconds):.1f} s"
        if len(seconds) > 1:
            took += f", the median of {len(seconds)} runs"
        lines += [f"`python {' '.join(command)}`, {took}:", "", "```"]
        lines += [*row.found["lines"], "```", ""]
    return lines


# ------------------------------------------------------------------------------- the README's text


def results(name: str) -> list[common.Row]:
    return common.load(common.RESULTS / f"{name}.json")


def found_by(part: str) -> dict:
    return common.where(results("readme"), part)[0].found


def printed(part: str, first: str, last: str) -> str:
    """The lines from the one that starts with `first` to the one that starts with `last`."""
    lines = found_by(part)["lines"]
    starts = [line.startswith(first) for line in lines]
    ends = [line.startswith(last) for line in lines]
    return "\n".join(lines[starts.index(True) : ends.index(True) + 1])


def on_all_flows(*keys, flows=toy_2d.FLOWS) -> str:
    """Mean energy distances x 1e-4 on these flows: "3.4, 2.8, 5.7 and 2.9"."""
    by_flow = common.grouped(results("toy"), "flow")
    means = [f"{1e4 * common.column(by_flow[flow], *keys).mean():.1f}" for flow in flows]
    *others, last = means
    return f"{', '.join(others)} and {last}" if others else last


def few_shot() -> str:
    """How many times the error of all data that of ten points is, on the best and worst flow."""
    ratios = []
    for rows in common.grouped(results("toy"), "flow").values():
        few = common.column(rows, "few-shot").mean()
        ratios.append(few / common.column(rows, "student", 3).mean())
    return f"{min(ratios):.1f} to {max(ratios):.1f} on 2-D flows"


def few_pairs() -> str:
    """The same on the tiny Flux, of ten pairs in place of all."""
    few, whole = (
        common.column(common.where(results("fewshot"), "draws", pairs=pairs), "rmse", "student")
        for pairs in (10, fewshot.ALL)
    )
    return f"{few.mean() / whole.mean():.2f} on the tiny Flux"


def step_of(flags: str) -> tuple[dict, float]:
    """What gpu.py found of a training iteration of eight rows, and its card's matmul rate."""
    for row, peak in speed.with_peaks(results("gpu")):
        if row.part == "steps" and row.settings.get("flags") == flags:
            return row.found, peak
    raise LookupError(f"no step was measured with {flags}")


def cost_of(flags: str) -> str:
    """A line of the table of costs."""
    found, peak = step_of(flags)
    hours = 3000 * found["step"] / 3600
    shown = flags.replace("--recompute-every 1", "").strip()
    cells = [f"{found['step']:.2f} s", f"{100 * found['tflops'] / peak:.0f} %"]
    cells += [f"{found['gib']:.1f} GiB", f"{hours:.1f} h"]
    return f"| {f'`{shown}`' if shown else 'default'} | {' | '.join(cells)} |"


def to_direct(budget: str, shift: float) -> str:
    """A line of the table of errors of matched windows over those of direct regression."""
    cells = [f"{'full' if budget == 'full budget' else budget}, {shift:g}"]
    for steps in (3, 2, 1):
        rows = common.where(results("baselines"), "direct", shift=shift, steps=steps)
        errors = [baselines.errors_by_seed(rows, budget, name) for name in baselines.REGRESSIONS]
        best = baselines.geometric_mean(baselines.best_of_each_flow(errors), axis=1)
        ours = baselines.geometric_mean(baselines.errors_by_seed(rows, budget, "ours"), axis=1)
        cells.append(common.ratio_text(ours, best).split()[0])
    return f"| {' | '.join(cells)} |"


def to_progressive() -> str:
    """Error of matched windows over that of progressive distillation, in 3 steps, by flow."""
    rows = common.where(results("baselines"), "flows")
    ratios = []
    for flow in toy_2d.FLOWS:
        ours, other = (
            common.column(common.where(rows, "flows", flow=flow, method=method), "errors", 3)
            for method in ("ours", "down to 3")
        )
        ratios.append(common.ratio_text(ours, other).split()[0])
    *others, last = ratios
    return f"{', '.join(others)} and {last}"


def for_steps() -> str:
    """How far students of the tiny Flux for other numbers of steps end."""
    ratios = []
    for steps in (1, 2, 4, 8):
        rows = common.where(results("flux"), flux.FOR_STEPS[steps])
        student, teacher = (common.column(rows, name, steps) for name in ("student", "teacher"))
        ratios.append(f"{student.mean() / teacher.mean():.2f}")
    *others, last = ratios
    return f"tiny Flux, N = 1, 2, 4, 8: error {', '.join(others)}, {last} of the teacher's in N"


def of_klein() -> str:
    """How far the tiny klein's students end in 3 steps, and how often they show their captions."""
    ratios = []
    seen = []
    for part in ("klein", "longer"):
        rows = common.where(results("klein"), part)
        student, teacher = (
            common.column(rows, "distance", name, 3) for name in ("student, scaled", "teacher")
        )
        ratios.append(common.ratio_text(student, teacher).split()[0])
        seen.append(common.column(rows, "shown", "student, 3 steps").mean())
    samplers = ("teacher, 3 steps", "teacher, 8 steps", "teacher without guidance")
    seen += [common.column(rows, "shown", name).mean() for name in samplers]
    short, long, three, eight, plain = (f"{100 * fraction:.0f} %" for fraction in seen)
    return (
        f"On `tests/tiny_klein` the student's 3 steps end {ratios[0]} times as far from the"
        f" teacher's 32 as the teacher's 3 do (6 calls); {short} of its images match their caption"
        f" (teacher, 3 steps: {three}, 8: {eight}; 32 without guidance: {plain}). After 1,500"
        f" iterations instead of 200: {ratios[1]} times; {long}."
    )


def klein_on_a_card() -> tuple[float, float]:
    """Seconds of an iteration, and peak GiB, of gpu.py's part "klein"."""
    found = common.where(results("gpu"), "klein")[-1].found
    (told,) = found["told"]
    (seconds,) = re.findall(r"(\S+) s per iteration", told)
    return float(seconds), found["phases"]["train"]["peak_gib"]


def quotations() -> list[str]:
    """The README's passages with numbers in them, made from the results of all scripts."""
    hours = 3000 * step_of("--recompute-every 1")[0]["step"] / 3600
    klein_seconds, klein_gib = klein_on_a_card()
    toy_seconds = statistics.median(found_by("toy")["seconds"])
    few_steps = on_all_flows("student", 3)
    return [
        f"in {toy_seconds:.0f} s on two cores",
        f"about {hours:.1f} h of training on an H200",
        f"about {3000 * klein_seconds / 3600:.1f} h on an H200, {klein_gib:.1f} GiB",
        f"an iteration of the 4B size (batch 8) took {klein_seconds} s and {klein_gib:.1f} GiB",
        f"{few_shot()}; {few_pairs()}",
        printed("toy", "Euler steps", "  matched, scaled"),
        printed("toy", "calibrated scale", "calibrated scale"),
        found_by("toy")["lines"][-1].replace("OUT", "toy_out"),
        printed("tiny_flux", "RMSE of latents", "| its scale"),
        f"the student in 3 steps {few_steps}; the teacher in 16 steps"
        f" {on_all_flows('teacher', 16)}; a student from ten points {on_all_flows('few-shot')}.",
        *map(cost_of, ("--recompute-every 1", "--recompute-every 1 --compile",
                       "--recompute-every 2 --compile")),
        *(to_direct(*place) for place in product(("full budget", "a tenth"), baselines.SHIFTS)),
        f"down to 3 steps: {to_progressive()} on the four flows",
        for_steps(),
        of_klein(),
    ]  # fmt: skip


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, jobs=1)
