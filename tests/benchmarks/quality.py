"""Quality against network calls on the tiny Flux: python tests/benchmarks/quality.py

Students of the README's demonstration (shift 1, guidance 3.5), 3 seeds, compared with their
teacher: plain Euler steps, and for each number of calls the best of several training-free solvers.
All on held-out captions, with the same noise for every sampler of a seed:
    distance     RMSE of latents to where 32 Euler steps of the teacher end, and to where its path
                 ends (128 steps of second order; on 64 images, other distances up to 6 calls and
                 at 8 on 1,336)
    Fréchet      of 2,004 decoded images to as many rendered ones of the same captions
    shown        fraction of the images in which the judge sees the caption's shape and color
    diversity    mean distance of latents from noise to noise, one caption

Everything is tuned on validation captions that are not compared. (The Fréchet distance counts them
too, with other noise.) The student has one scale for each number of calls, from its file, or
searched in the same way where the file has none. Solver and time shift are, for each number of
calls, those with the least distance to 32 Euler steps; the shift is one of SHIFTS.
"""

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import common
import common_flux
import numpy as np
import torch
from common_flux import tiny
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

import flux_distill as fd
import shortcut as sc
import toy_2d

CALLS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
JUDGED = (1, 2, 3, 4, 6, 8)  # calls at which images are decoded and judged; the teacher's 32 too
NOISES, FEW = 167, 16  # for each of 12 captions: where images are judged, and where they are not
SHIFTS = (1.0, 1.5, 2.0, 3.0)
SAMPLERS = ("teacher", "student", "student, scaled", "solver")

# ----------------------------------------------------------------------------------------- solvers


def euler(velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    return sc.euler_sample(velocity, x, sc.time_grid(calls, shift))


def adams_bashforth(velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    """A line through this velocity and the last, integrated over the step. First step: Euler."""
    t_last = v_last = None
    for t, t_next in pairwise(sc.time_grid(calls, shift)):
        v = velocity(x, t.expand(len(x)))
        slope = 0.0 if t_last is None else (v - v_last) / (t - t_last)
        x = x + (t_next - t) * v + (t_next - t) ** 2 / 2 * slope
        t_last, v_last = t, v
    return x


def two_stage(c: float, velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    """Steps of two calls, c of the step apart (1: Heun, 1/2: midpoint). Odd calls: Euler last."""
    times = sc.time_grid((calls + 1) // 2, shift)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t.expand(len(x)))
        step = t_next - t
        if 2 * i + 2 <= calls:
            v_c = velocity(x + c * step * v, (t + c * step).expand(len(x)))
            v = v + (v_c - v) / (2 * c)
        x = x + step * v
    return x


def stock(kind, order: int, velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    """A scheduler of diffusers on its own grid; times as exact as its sigmas are."""
    scheduler = kind(
        solver_order=order,
        flow_shift=shift,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )
    scheduler.set_timesteps(calls)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        v = velocity(x, sigma.to(x).expand(len(x)))
        x = scheduler.step(v, t, x).prev_sample
    return x


SOLVERS = {
    "Euler": euler,
    "midpoint": partial(two_stage, 0.5),
    "Heun": partial(two_stage, 1.0),
    "Adams-Bashforth, order 2": adams_bashforth,
    "DPM-Solver++ 2M": partial(stock, DPMSolverMultistepScheduler, 2),
    "DPM-Solver++ 3M": partial(stock, DPMSolverMultistepScheduler, 3),
    "UniPC, order 2": partial(stock, UniPCMultistepScheduler, 2),
    "UniPC, order 3": partial(stock, UniPCMultistepScheduler, 3),
}


def sample(solver, velocity, cond: dict, noise: Tensor, calls: int, shift: float = 1.0) -> Tensor:
    """Latents (B, C, H, W), 334 at a time."""
    ends = []
    for start in range(0, len(noise), 334):
        rows = slice(start, start + 334)
        fixed = partial(velocity, **{name: x[rows] for name, x in cond.items()})
        ends.append(solver(fixed, noise[rows], calls, shift))
    return torch.cat(ends)


def head(cond: dict, count: int) -> dict:
    return {name: x[:count] for name, x in cond.items()}


def draws(cache: fd.Cache, texts: list[int], count: int, purpose: str) -> tuple[dict, Tensor]:
    """Conditions and noise of these captions, `count` times each; the caption runs fastest."""
    cond = cache.conditions(texts * count, cache.settings.guidance)
    return cond, cache.noise([(purpose, i, k) for k in range(count) for i in texts])


# ------------------------------------------------------------------------------------- measurements


def measure_solvers(length: float) -> dict:
    """The best shift of every solver on validation captions, and the solver to compare with."""
    with tempfile.TemporaryDirectory() as folder:
        settings = common_flux.demonstration(Path(folder), 0, length=length)
        world = common_flux.TinyFlux(settings)
        teacher = partial(world.model.family.velocity, world.pipe.transformer)
        with torch.no_grad():
            return tuned_solvers(teacher, world, length)


def tuned_solvers(teacher, world: common_flux.TinyFlux, length: float) -> dict:
    """found: by solver and calls, least distance and its shift. chosen: a solver, by calls."""
    cond, noise = draws(world.cache, world.data.validation, common.shortened(16, length), "tuning")
    fine = sample(euler, teacher, cond, noise, world.settings.teacher_steps)

    def best(name: str, calls: int) -> tuple[float, float]:
        ends = {s: sample(SOLVERS[name], teacher, cond, noise, calls, s) for s in SHIFTS}
        return min((fd.rms(x - fine), s) for s, x in ends.items())

    found = {name: {n: best(name, n) for n in CALLS} for name in SOLVERS}
    chosen = {n: min(SOLVERS, key=lambda name, n=n: found[name][n][0]) for n in CALLS}

    few, noise = head(cond, 8), noise[:8]
    exact = sample(euler, teacher, few, noise, max(32, round(1024 * length)))
    limits = {}
    for name, solver in SOLVERS.items():
        limits[name] = fd.rms(sample(solver, teacher, few, noise, 128) - exact)
    return {"found": found, "chosen": chosen, "limits": limits}


def measure_student(seed: int, length: float, given: dict) -> dict:
    """All numbers of one seed. given: what `measure_solvers` found."""
    with tempfile.TemporaryDirectory() as folder:
        settings = common_flux.demonstration(Path(folder), seed, length=length)
        common_flux.distil(settings)
        model = common_flux.MergedStudent(settings)
        scales = calibrated(settings, model)
        with torch.no_grad():
            return judged_samplers(model, scales, given, length)


def calibrated(settings: fd.Settings, model: common_flux.MergedStudent) -> dict[int, float]:
    """The student's scale for each of CALLS: from its file, or searched as those in it were."""
    scales = fd.read_adapter(settings.out)["scales"]
    model.merge(0.0)
    validation = fd.Validation(settings, model.world.cache, model.world.lora)
    for n in CALLS:
        if n not in scales:
            scales[n] = validation.search(model.student, n)[1]
    return {n: scales[n] for n in CALLS}


def judged_samplers(
    model: common_flux.MergedStudent, scales: dict[int, float], solvers: dict, length: float
) -> dict:
    world, seed = model.world, model.world.settings.seed
    vae, data = world.pipe.vae, world.data
    texts = [*data.validation, *data.comparison]
    count = common.shortened(NOISES, length) * len(texts)
    few = common.shortened(FEW, length) * len(texts)
    cond, noise = draws(world.cache, texts, count // len(texts), "quality")
    captions = torch.tensor([tiny.CAPTIONS.index(data.texts[i]) for i in texts])
    captions = captions.repeat(count // len(texts))
    compared = torch.arange(count) % len(texts) >= len(data.validation)

    judge = common_flux.train_judge(common.shortened(500, length))
    generator = torch.Generator().manual_seed(30_000 + seed)
    rendered, again = (tiny.render(captions, generator) for _ in range(2))
    codes, codes_again = (common_flux.encoded(vae, x) for x in (rendered, again))
    truths = {
        "frechet": common_flux.look(judge, rendered, captions),
        "frechet decoded": common_flux.look(judge, common_flux.decoded(vae, codes), captions),
    }

    def judged(images: Tensor) -> dict[str, float]:
        seen = common_flux.look(judge, images, captions)
        distances = {key: common_flux.frechet(truth, seen) for key, truth in truths.items()}
        return distances | {"shown": seen["shown"]}

    def diversity(latents: Tensor) -> float:
        rows = compared[: len(latents)]
        return common_flux.diversity(latents[rows], captions[: len(latents)][rows])

    floors = {
        "rendered": judged(again) | {"diversity": diversity(codes_again)},
        "rendered, through the VAE": judged(common_flux.decoded(vae, codes_again)),
    }

    chosen = solvers["chosen"]
    shifts = {n: solvers["found"][name][n][1] for n, name in chosen.items()}
    setting = {  # solver, scale and shift at n calls
        "teacher": lambda n: (euler, 0.0, 1.0),
        "student": lambda n: (euler, 1.0, 1.0),
        "student, scaled": lambda n: (euler, scales[n], 1.0),
        "solver": lambda n: (SOLVERS[chosen[n]], 0.0, shifts[n]),
    }
    teacher, many = model.velocity(0.0), world.settings.teacher_steps
    exact = sample(adams_bashforth, teacher, head(cond, few // 2), noise[: few // 2], 128)
    fine = sample(euler, teacher, cond, noise, many)

    def distance(latents: Tensor, reference: Tensor) -> float:
        """On compared captions; of as many as there are of both."""
        both = min(len(latents), len(reference))
        return fd.rms((latents[:both] - reference[:both])[compared[:both]])

    found = {name: {} for name in SAMPLERS}
    for name in SAMPLERS:
        for n in CALLS:
            to_judge = n in JUDGED or (name, n) == ("teacher", many)
            rows = count if to_judge else few
            solver, scale, shift = setting[name](n)
            latents = sample(
                solver, model.velocity(scale), head(cond, rows), noise[:rows], n, shift
            )
            cell = {"rmse": distance(latents, fine), "exact": distance(latents, exact)}
            cell["diversity"] = diversity(latents)
            if to_judge:
                cell |= judged(common_flux.decoded(vae, latents))
            found[name][n] = cell
    return found | {"floors": floors, "scales": scales, "fine to exact": distance(fine, exact)}


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    students = [common.Task(measure_student, {"seed": seed}, after="solvers") for seed in seeds]
    return {"solvers": [common.Task(measure_solvers, {})], "students": students}


# ------------------------------------------------------------------------------------------- tables

MEASURES = {  # name in the numbers: title, digits, factor
    "rmse": ("distance to the teacher's 32 Euler steps", 3, 1),
    "exact": ("distance to the end of the teacher's path", 3, 1),
    "frechet": ("Fréchet distance to rendered images", 3, 1),
    "frechet decoded": ("Fréchet distance to rendered images that went through the VAE", 3, 1),
    "shown": ("images that show their caption, %", 1, 100),
    "diversity": ("distance of two samples of one caption", 3, 1),
}


def values(rows: list[common.Row], sampler: str, calls: int, measure: str) -> np.ndarray:
    cells = [row.found[sampler][calls] for row in rows]
    return np.array([cell[measure] for cell in cells if measure in cell])


def tables(rows: list[common.Row]) -> list[str]:
    solvers = common.where(rows, "solvers")[0].found
    students = common.where(rows, "students")
    lines = [
        "Training-free solvers on validation captions: distance, and in brackets the shift. Bold:"
        " the best, which is compared. Limit: distance of 128 calls to 1,024 Euler steps"
    ]
    lines += table_of_solvers(solvers)
    if not students:
        return lines
    for measure, (title, digits, factor) in MEASURES.items():
        lines += [f"**{title}**"]
        lines += table_of_measure(students, measure, digits, factor)
    scales = [common.column(students, "scales", n).mean() for n in CALLS]
    lines += ["Scales: " + ", ".join(f"{n}: {s:.2f}" for n, s in zip(CALLS, scales)), ""]
    apart = common.mean_text(common.column(students, "fine to exact"))
    return [*lines, f"The teacher's 32 Euler steps end {apart} from where its path ends."]


def table_of_solvers(solvers: dict) -> list[str]:
    lines = []
    for name in SOLVERS:
        cells = []
        for n in CALLS:
            cell = "{:.3f} ({:g})".format(*solvers["found"][name][n])
            cells.append(f"**{cell}**" if solvers["chosen"][n] == name else cell)
        lines.append([name, *cells, f"{solvers['limits'][name]:.4f}"])
    return common.table(["network calls", *CALLS, "limit"], lines)


def table_of_measure(rows: list[common.Row], measure: str, digits: int, factor: float) -> list[str]:
    """A measure of all samplers, and of rendered images themselves, whatever the calls."""
    calls = [n for n in CALLS if len(values(rows, "teacher", n, measure))]
    lines = []
    for sampler in SAMPLERS:
        cells = [common.mean_text(values(rows, sampler, n, measure), digits, factor) for n in calls]
        lines.append(["teacher, best solver" if sampler == "solver" else sampler, *cells])
    for name, floors in rows[0].found["floors"].items():
        if measure in floors:
            numbers = common.column(rows, "floors", name, measure)
            text = common.mean_text(numbers, digits, factor)
            lines.append([f"other images: {name}", text, *[""] * (len(calls) - 1)])
    return common.table(["calls", *calls], lines)


# ------------------------------------------------------------------------------------------- figure

COLORS = {
    "teacher": toy_2d.COLORS["teacher"],
    "student": toy_2d.COLORS["matched"],
    "student, scaled": toy_2d.COLORS["matched, scaled"],
    "solver": "#d79a22",
}


def draw(rows: list[common.Row], path: Path) -> None:
    """Distance, Fréchet distance and diversity; bands: intervals, black: the teacher's 32 steps."""
    students = common.where(rows, "students")
    measures = {
        "rmse": "distance to the teacher's 32 Euler steps",
        "frechet": "Fréchet distance to rendered images",
        "diversity": "distance of two samples of one caption",
    }
    figure = Figure((5.2 * len(measures), 4.6), layout="constrained")
    axes = figure.subplots(1, len(measures))
    for axis, (measure, title) in zip(axes, measures.items()):
        draw_measure(students, measure, axis)
        axis.set(xlabel="network calls", title=title)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=100)


def draw_measure(rows: list[common.Row], measure: str, axis) -> None:
    labels = {"teacher": "teacher, Euler", "solver": "teacher, best solver"}
    shown = [n for n in CALLS if len(values(rows, "student", n, measure))]
    for sampler in SAMPLERS:
        positive = {n: values(rows, sampler, n, measure) for n in shown}
        positive = {n: x for n, x in positive.items() if x.min() > 0}  # the teacher's 32 to itself
        mean, half = np.nan_to_num([common.interval(x) for x in positive.values()]).T
        low = np.maximum(mean - half, mean / 3)  # a log axis has no zero
        color = COLORS[sampler]
        label = labels.get(sampler, sampler)
        axis.plot(list(positive), mean, "o-", ms=4, color=color, label=label)
        axis.fill_between(list(positive), low, mean + half, color=color, alpha=0.12, lw=0)
    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if measure == "diversity":  # it saturates
        axis.set(yscale="linear", ylim=(0, None))
    if measure != "rmse":
        level = values(rows, "teacher", CALLS[-1], measure).mean()
        axis.axhline(level, color="black", lw=0.8, zorder=0, label="teacher, 32 Euler steps")
    axis.set_xticks(shown, [str(n) for n in shown])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, seeds=3, draw=draw)
