"""What must hold on the 2-D flows: python tests/benchmarks/toy.py (half an hour on 2 cores)

For each flow and seed all networks are trained with the toy's defaults. Errors are unbiased energy
distances (x 1e-4) of 16,384 samples to 32,768 fresh data points; lower is better. All columns of a
row share noise and data. Brackets are 95 % intervals of the ratio, paired by seed.

The bounds were set before the runs. "must": is the mean of ours at most the bound? "target": is it
at most a stricter bound, given in brackets? On gaussians, where the teacher needs fewer steps, the
bounds are lower, and three targets equal what must hold. "x below" and "x": quotients of the means,
with the bound in the claim. Calibration: the error at the scale that was found without data, over
the least at any scale; the bounds are 1.5 (must) and 1.2 (target).
"""

import common
import numpy as np

import shortcut as sc
import toy_2d

STUDENT = 1000  # iterations
FUSED = 4000
LONG = (15, 30, 60, 125, 250, 500, 1000, 1500, 2000, 3000, 4000, 5000, 6000, 7000, 8000)
TEACHER_STEPS = (2, 3, 4, 8, 12, 16, 24, 32)
STUDENT_STEPS = (1, 2, 3, 4, 8, 16, 32)
SCALED_STEPS = (2, 3, 4, 8)
CALIBRATED_AFTER = (250, 1000, 4000)
AT_SHIFT_3 = {
    "matched": common.matched(3, 3.0),
    "paper 0.4": common.paper(0.4, 3.0),
    "paper 0.52": common.paper(0.52, 3.0),
}

# ------------------------------------------------------------------------------------- measurements


def measure(flow: str, seed: int, length: float) -> dict:
    """All numbers of one flow and seed."""
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    found = {
        "floor": on.floor,
        "teacher": {n: on.error(teacher, n) for n in TEACHER_STEPS},
        "teacher, shift 3": {n: on.error(teacher, n, 3.0) for n in TEACHER_STEPS},
    }
    found |= students_of_three_steps(on, teacher, seed, length)
    found |= few_shot(on, teacher, seed, length)
    found |= long_trainings(on, teacher, seed, length)
    found |= students_at_shift_3(on, teacher, seed, length)
    found |= trained_from_scratch(on, seed, length)
    return found


def distil(on, teacher, config, seed: int, length: float, data=None):
    """The student after the usual number of iterations."""
    iterations = common.shortened(STUDENT, length)
    return toy_2d.distil(teacher, data or on.data, config, iterations, seed)[iterations]


def students_of_three_steps(on, teacher, seed: int, length: float) -> dict:
    student = distil(on, teacher, common.matched(3), seed, length)
    of_paper = distil(on, teacher, common.paper(0.52), seed, length)
    return {
        "student": {n: on.error(student, n) for n in STUDENT_STEPS},
        "calibrated": {n: on.calibrated(teacher, student, n) for n in SCALED_STEPS},
        "lam, matched": lam_per_step(on, teacher, student),
        "lam, paper 0.52": lam_per_step(on, teacher, of_paper),
        "paper 0.52": on.error(of_paper, 3),
    }


def few_shot(on, teacher, seed: int, length: float) -> dict:
    """A student that is distilled on ten points only."""
    student = distil(on, teacher, common.matched(3), seed, length, toy_2d.draw_from(on.pool))
    return {
        "few-shot": on.error(student, 3),
        "few-shot, calibrated": on.calibrated(teacher, student, 3),
    }


def long_trainings(on, teacher, seed: int, length: float) -> dict:
    """Errors in 3 steps over long trainings, and calibrations on the way."""
    last = common.shortened(LONG[-1], length)
    at = {i: common.shortened(i, length) for i in LONG}
    snapshots = set(at.values())
    matched = toy_2d.distil(teacher, on.data, common.matched(3), last, seed, snapshots)
    of_paper = toy_2d.distil(teacher, on.data, common.paper(0.4), last, seed, snapshots)
    found = {
        "long, matched": {i: on.error(matched[at[i]], 3) for i in LONG},
        "long, paper": {i: on.error(of_paper[at[i]], 3) for i in LONG},
        "calibration": {},
    }
    for i in CALIBRATED_AFTER:
        student = matched[at[i]]
        found["calibration"][i] = {
            n: calibrated_and_best(on, teacher, student, n) for n in SCALED_STEPS
        }
    return found


def students_at_shift_3(on, teacher, seed: int, length: float) -> dict:
    found = {}
    for name, config in AT_SHIFT_3.items():
        student = distil(on, teacher, config, seed, length)
        found[f"shift 3, {name}"] = {
            "scale 1": on.error(student, 3, 3.0),
            "calibrated": calibrated_and_best(on, teacher, student, 3, 3.0),
            "lam": lam_per_step(on, teacher, student, 3.0),
        }
    return found


def trained_from_scratch(on, seed: int, length: float) -> dict:
    """Pretraining fusion, and plain flow matching with twice as many iterations."""
    iterations = common.shortened(FUSED, length)
    fused = toy_2d.fuse(on.data, common.matched(3), iterations, seed)[iterations]
    plain = toy_2d.train_teacher(on.data, 2 * iterations, seed)
    steps = STUDENT_STEPS[1:]
    return {
        "fused": {n: on.error(fused, n) for n in steps},
        "plain": {n: on.error(plain, n) for n in steps},
    }


def calibrated_and_best(on, teacher, student, steps: int, shift: float = 1.0) -> dict[str, float]:
    """The calibrated scale, its error, and the least error at any of 31 scales, with this and 1."""
    found = on.calibrated(teacher, student, steps, shift)
    path = on.teacher_path(teacher, steps, shift)
    lam = sc.optimal_scale(student, path).item()
    scales = [found["scale"], 1.0, *np.geomspace(lam / 2, 2 * lam, 29).tolist()]
    errors = [on.scaled_error(teacher, student, scale, steps, shift) for scale in scales]
    return found | {"best": min(errors)}


def lam_per_step(on, teacher, student, shift: float = 1.0) -> list[float]:
    """lam* of each of three steps alone."""
    path = on.teacher_path(teacher, 3, shift)
    lams = []
    for i in range(3):
        states = (x[i : i + 1] for x in path[1:])
        step = sc.TeacherPath(path.times[i : i + 2], *states)
        lams.append(sc.optimal_scale(student, step).item())
    return lams


# ------------------------------------------------------------------------------------------- tables


def verdict(ours, bound, floor) -> str:
    """Is ours at most the bound, on average? "both at the floor": within 3 deviations of it."""
    if max(np.mean(ours), np.mean(bound)) <= 3 * np.mean(floor):
        return "both at the floor"
    return "yes" if np.mean(ours) <= np.mean(bound) else "no"


def claims(rows: list[common.Row], flow: str):
    """Lines of a table: claim, ours, bound, ratio of both, must, target."""
    find = lambda *keys: common.column(rows, *keys)  # noqa: E731
    text = common.energy_text
    floor = find("floor")
    hard = flow == "gaussians"  # where the teacher needs fewer steps: the bounds are lower

    def at_most_teacher(claim, ours, must, target, teacher="teacher"):
        bound = find(teacher, must)
        reached = verdict(ours, find(teacher, target), floor)
        label = f"teacher {must}: {text(bound)}"
        ratio = common.ratio_text(ours, bound)
        return claim, text(ours), label, ratio, verdict(ours, bound, floor), f"{reached} ({target})"

    def times_below(claim, ours, other, label, must):
        factor = np.mean(other) / max(np.mean(ours), 1e-6)
        met = "yes" if factor >= must else "no"
        return claim, text(ours), f"{label}: {text(other)}", f"{factor:.1f}x below", met, ""

    def at_most_times(claim, ours, other, label, must, target=None):
        factor = np.mean(ours) / np.mean(other)
        met = ["yes" if factor <= bound else "no" for bound in (must, target) if bound]
        met += [""] * (2 - len(met))
        return claim, text(ours), f"{label}: {text(other)}", f"{factor:.2f}x", *met

    student = find("student", 3)
    bounds = (12, 16) if hard else (16, 32)
    yield at_most_teacher("3 steps, scale 1", student, *bounds)
    teacher = find("teacher", 3)
    yield times_below("the same, 20x below teacher at 3", student, teacher, "teacher 3", 20)
    ours = find("shift 3, matched", "calibrated", "error")
    yield at_most_teacher("3 steps at shift 3, calibrated", ours, 12, 16, "teacher, shift 3")
    for name in ("paper 0.4", "paper 0.52"):
        best = find(f"shift 3, {name}", "calibrated", "best")
        yield times_below(f"the same, 3x below {name} at its best scale", ours, best, name, 3)

    bounds = {2: (8, 12), 4: (16, 24), 8: (24, 32)}
    if hard:
        bounds = {2: (4, 4), 4: (8, 8), 8: (8, 8)}
    for n, (must, target) in bounds.items():
        ours = find("calibrated", n, "error")
        yield at_most_teacher(f"{n} steps, calibrated", ours, must, target)
    ours = find("calibration", 250, 3, "error")
    bound = 8 if hard else 16
    yield at_most_teacher("3 steps after 250 iterations, calibrated", ours, bound, bound)

    yield worst_calibration(rows)

    for name, stays in {"matched": True, "paper": False}.items():
        curve = np.array([[row.found[f"long, {name}"][i] for i in LONG] for row in rows])
        bound = "within" if stays else "beyond"
        claim = f"{name}, 3 steps after 8,000 iterations: {bound} 1.5x its best"
        line = at_most_times(claim, curve[:, -1], curve.min(1), "best", 1.5)
        met = "yes" if (line[4] == "yes") == stays else "no"
        yield *line[:4], met, ""
    for label, keys in {
        "shift 1, matched": ("lam, matched",),
        "shift 1, paper 0.52": ("lam, paper 0.52",),
        "shift 3, matched": ("shift 3, matched", "lam"),
        "shift 3, paper 0.52": ("shift 3, paper 0.52", "lam"),
    }.items():
        lams = " / ".join(f"{lam:.2f}" for lam in find(*keys).mean(0))
        yield f"lam* of each of the 3 steps, {label}", lams, "", "", "", ""

    fused = find("fused", 3)
    plain = find("plain", 3)
    yield times_below("fused, 3 steps, 10x below flow matching", fused, plain, "flow matching", 10)
    fused = find("fused", 32)
    plain = find("plain", 32)
    ratio = f"{np.mean(fused) / np.mean(plain):.0f}x above"
    yield "fused, 32 steps", text(fused), f"flow matching: {text(plain)}", ratio, "", ""

    few = find("few-shot")
    yield times_below("ten points, 3 steps, 15x below teacher at 3", few, teacher, "teacher 3", 15)
    yield "ten points, each draw", ", ".join(f"{1e4 * x:.1f}" for x in few), "", "", "", ""
    claim = "ten points, {}, at most 2x the full data"
    yield at_most_times(claim.format("scale 1"), few, student, "full data", 2)
    few = find("few-shot, calibrated", "error")
    full = find("calibrated", 3, "error")
    yield at_most_times(claim.format("calibrated"), few, full, "full data", 2)


def worst_calibration(rows: list[common.Row]) -> tuple[str, ...]:
    """A line: the step count and iteration at which calibration misses the best scale most."""
    found = []
    for i in CALIBRATED_AFTER:
        for n in SCALED_STEPS:
            ours = common.column(rows, "calibration", i, n, "error")
            best = common.column(rows, "calibration", i, n, "best")
            found.append((np.mean(ours) / np.mean(best), n, i, ours, best))
    factor, n, i, ours, best = max(found, key=lambda one: one[0])
    claim = f"calibration, worst of {len(found)}: {n} steps after {i:,} iterations"
    met = ["yes" if factor <= bound else "no" for bound in (1.5, 1.2)]
    label = f"best scale: {common.energy_text(best)}"
    return claim, common.energy_text(ours), label, f"{factor:.2f}x", *met


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    for flow, some in common.grouped(rows, "flow").items():
        floor = 1e4 * common.column(some, "floor").mean()
        lines += [f"**{flow}**, {len(some)} seeds; data to data 0 ± {floor:.1f}"]
        head = ["claim", "ours", "bound", "ratio", "must", "target"]
        lines += common.table(head, claims(some, flow))
    return lines


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    some = [common.Task(measure, {"flow": f, "seed": s}) for s in seeds for f in flows]
    return {"flows": some}


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, flows=list(toy_2d.FLOWS))
