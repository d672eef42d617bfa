"""Quality against network calls on the tiny Flux: python tests/benchmarks/quality.py

Students of the README's demonstration (shift 1, guidance 3.5), 3 seeds, beside their teacher: plain
Euler steps, and the best of several training-free solvers at as many calls. Held-out captions,
the same noise for every sampler of a seed:
    distance     RMSE of latents to where 32 Euler steps of the teacher end, and to where its
                 path ends (128 steps of second order)
    Frechet      of 2,004 decoded pictures to as many rendered ones of the same captions
    shown        share of pictures in which the judge sees the caption's shape and colour
    diversity    mean distance of latents from noise to noise, one caption

Frechet features are the 64 mean maps of the judge, a small network that learns, with a fixed seed,
to name shape and colour of rendered pictures: so they weigh what captions tell, where a random
network's weigh the hues of the ground most.

Tuning, all on validation captions that are not compared (the Frechet distance counts them, with
other noise): the student has one scale for each number of calls, out of its file, or searched in
the same way where the file has none. The solver has a time shift for each number of calls out of
SHIFTS. Which solver: the least distance to 32 Euler steps, geometric mean over 3, 4, 6, 8 calls.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import argparse
import json
import os
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path

import flux as demo
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from safetensors.torch import load_file
from torch import Tensor, nn

import flux_distill as fd
import shortcut as sc
import toy_2d

sys.path.insert(0, str(demo.TINY.parent))
import make_tiny_flux as tiny

CALLS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
JUDGED = (1, 2, 3, 4, 6, 8)  # calls at which pictures are decoded and judged; the teacher's 32 too
NOISES, FEW = 167, 16  # for each of 12 captions: where pictures are judged, and where not
SHIFTS = (1.0, 1.5, 2.0, 3.0)
TUNED = (3, 4, 6, 8)  # calls by which a solver is chosen
SAMPLERS = ("teacher", "student", "student, scaled", "solver")


def distilled(out: Path, name: str, seed: int, *more, **how) -> Namespace:
    """Settings of the demonstration's run with this seed, its adapter in --out: now, or before."""
    args = demo.demonstration(out / name, seed, *more, **how)
    with redirect_stdout(sys.stderr):  # it prints a table
        fd.distil(args)
    return args


# ----------------------------------------------------------------------------------------- samplers


class Model:
    """The tiny Flux with the LoRA of --out merged at any scale; 0: the teacher.

    Merged, a call costs half of what it does with a LoRA beside each layer.
    """

    @torch.no_grad()
    def __init__(self, args: Namespace):
        self.pipe = fd.load(args, "image")
        self.adapter = fd.Adapter(args)
        self.scale = 0.0
        saved = load_file(args.lora)
        names = self.adapter.named(self.adapter.switch.weights)  # in the order of the vector
        self.student = torch.cat([saved[f"transformer.{name}"].flatten() for name in names])
        self.plain = self.adapter.velocity(None, args.size)
        self.adapter.use(self.student)
        layers = [(m.base.weight, m.B @ m.A) for m in self.adapter.layers.values()]
        self.layers = [(weight, weight.clone(), delta) for weight, delta in layers]

    @torch.no_grad()
    def merge(self, scale: float) -> None:
        if scale != self.scale:
            for weight, base, delta in self.layers:
                weight.copy_(base + scale * delta)
            self.scale = scale

    def velocity(self, scale: float):
        """Velocity of teacher + scale (student - teacher), in weights."""

        @torch.no_grad()
        def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            self.merge(scale)
            return self.plain(x, t, **cond)

        return velocity


def euler(velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    return sc.euler_sample(velocity, x, sc.time_grid(calls, shift))


def adams_bashforth(velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    """A line through this velocity and the last, integrated over the step; first step: Euler."""
    t_last = v_last = None
    for t, t_next in pairwise(sc.time_grid(calls, shift)):
        v = velocity(x, t.expand(len(x)))
        slope = 0.0 if t_last is None else (v - v_last) / (t - t_last)
        x = x + (t_next - t) * v + (t_next - t) ** 2 / 2 * slope
        t_last, v_last = t, v
    return x


def two_stage(c: float, velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    """Steps of two calls, c of the step apart (1: Heun, 1/2: midpoint); odd calls: Euler last."""
    times = sc.time_grid((calls + 1) // 2, shift)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v, h = velocity(x, t.expand(len(x))), t_next - t
        if 2 * i + 2 <= calls:
            v_c = velocity(x + c * h * v, (t + c * h).expand(len(x)))
            v = v + (v_c - v) / (2 * c)
        x = x + h * v
    return x


def stock(kind, options: dict, velocity, x: Tensor, calls: int, shift: float) -> Tensor:
    """A scheduler of diffusers, on its own grid; times as exact as its sigmas are."""
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **options}
    scheduler = kind(flow_shift=shift, **options)
    scheduler.set_timesteps(calls)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        v = velocity(x, sigma.to(x).expand(len(x)))
        x = scheduler.step(v, t, x).prev_sample
    return x


dpm = partial(stock, DPMSolverMultistepScheduler)
unipc = partial(stock, UniPCMultistepScheduler)
SOLVERS = {
    "Euler": euler, "midpoint": partial(two_stage, 0.5), "Heun": partial(two_stage, 1.0),
    "Adams-Bashforth, order 2": adams_bashforth,
    "DPM-Solver++ 2M": partial(dpm, {"solver_order": 2}),
    "DPM-Solver++ 3M": partial(dpm, {"solver_order": 3}),
    "UniPC, order 2": partial(unipc, {"solver_order": 2}),
    "UniPC, order 3": partial(unipc, {"solver_order": 3}),
}  # fmt: skip


def sample(solver, velocity, cond: dict, noise: Tensor, calls: int, shift=1.0) -> Tensor:
    """Latents (B, tokens, channels), 334 at a time."""
    ends = []
    for start in range(0, len(noise), 334):
        rows = slice(start, start + 334)
        fixed = partial(velocity, **{name: x[rows] for name, x in cond.items()})
        ends.append(solver(fixed, noise[rows], calls, shift))
    return torch.cat(ends)


def draws(args: Namespace, texts: list[int], count: int, purpose: str) -> tuple[dict, Tensor]:
    """Conditions and noise of these captions, `count` times each; the caption runs fastest."""
    text = fd.read(args, "text", texts)
    cond = {name: x.repeat(count, *[1] * (x.ndim - 1)) for name, x in text.items()}
    cond["guidance"] = torch.full((count * len(texts),), args.guidance)
    return cond, fd.noises(args, [(purpose, i, k) for k in range(count) for i in texts])


def head(cond: dict, count: int) -> dict:
    return {name: x[:count] for name, x in cond.items()}


def calibrated(args: Namespace, model: Model) -> dict[int, float]:
    """The student's scale for each of CALLS: out of its file, or searched as those there were."""
    scales = fd.read_adapter(args)["scales"]
    missing = [n for n in CALLS if n not in scales]
    if missing:
        model.merge(0.0)
        validation = fd.Validation(Namespace(**vars(args) | {"steps": missing}), model.adapter)
        scales |= {n: validation.search(model.student, n)[1] for n in missing}
    return scales


def tune(out: Path, length: float) -> dict:
    """The best shift of every solver on validation captions, and the solver to compare with."""
    torch.set_num_threads(1)
    args = distilled(out, "all-pairs-0", 0, length=length)
    teacher = Model(args).velocity(0.0)
    cond, noise = draws(args, args.validation, max(2, round(16 * length)), "tuning")
    fine = sample(euler, teacher, cond, noise, fd.FINE)

    def best(name: str, calls: int) -> tuple[float, float]:
        """Least distance, and its shift."""
        ends = {s: sample(SOLVERS[name], teacher, cond, noise, calls, s) for s in SHIFTS}
        return min((fd.rms(x - fine), s) for s, x in ends.items())

    found = {name: {n: best(name, n) for n in TUNED} for name in SOLVERS}
    marks = {
        name: float(np.exp(np.mean([np.log(error) for error, _ in row.values()])))
        for name, row in found.items()
    }
    chosen = min(marks, key=marks.get)
    found[chosen] |= {n: best(chosen, n) for n in CALLS if n not in TUNED}
    few, noise = head(cond, 8), noise[:8]
    exact = sample(euler, teacher, few, noise, max(32, round(1024 * length)))
    limits = {
        name: fd.rms(sample(solver, teacher, few, noise, 128) - exact)
        for name, solver in SOLVERS.items()
    }
    return {"found": found, "marks": marks, "chosen": chosen, "limits": limits}


# ------------------------------------------------------------------------------------- the pictures


class Judge(nn.Module):
    """Names the caption of pictures (B, 3, 32, 32); the means of its last maps are features."""

    def __init__(self):
        super().__init__()
        widths, layers = (3, 32, 64, 64, 64), []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, 2 - i % 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.maps, self.name = nn.Sequential(*layers), nn.Linear(widths[-1], len(tiny.CAPTIONS))

    def features(self, pictures: Tensor) -> Tensor:
        return self.maps(pictures).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.name(self.features(pictures))


def train_judge(iterations: int, batch=64) -> Judge:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    judge, generator = Judge(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, iterations)
    for _ in range(iterations):
        captions = torch.randint(len(tiny.CAPTIONS), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(judge(tiny.render(captions, generator)), captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.requires_grad_(False).eval()


def look(judge: Judge, pictures: Tensor, captions: Tensor) -> dict:
    """Mean and covariance of the features, and the share of pictures that show their caption."""
    features = torch.cat([judge.features(some) for some in pictures.split(256)])
    seen = judge.name(features).argmax(1) == captions
    features = features.double()
    return {"mean": features.mean(0), "cov": features.T.cov(), "shown": seen.double().mean().item()}


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a: dict, b: dict) -> float:
    """Squared distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""
    cross = root(root(a["cov"]) @ b["cov"] @ root(a["cov"])).trace()
    gap = (a["mean"] - b["mean"]).square().sum()
    return (gap + a["cov"].trace() + b["cov"].trace() - 2 * cross).item()


@torch.no_grad()
def decoded(pipe, latents: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32) in [-1, 1] of latents, 16 at a time."""
    vae = pipe.vae
    x = pipe._unpack_latents(latents, tiny.SIZE, tiny.SIZE, pipe.vae_scale_factor)
    x = x / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(some).sample for some in x.split(16)]).clamp(-1, 1)


@torch.no_grad()
def encoded(pipe, pictures: Tensor) -> Tensor:
    """Latents (B, tokens, channels) of pictures."""
    x, config = tiny.encode(pipe.vae, pictures), pipe.vae.config
    return pipe._pack_latents((x - config.shift_factor) * config.scaling_factor, *x.shape)


def diversity(latents: Tensor, captions: Tensor) -> float:
    """Mean RMS distance of two latents of one caption, over pairs, then captions."""
    groups = [latents[captions == c].flatten(1).double() for c in captions.unique()]
    means = [nn.functional.pdist(x).mean().item() / x.shape[1] ** 0.5 for x in groups]
    return float(np.mean(means))


# ------------------------------------------------------------------------------------- measurements


def measure(out: Path, seed: int, judge: Judge, tuned: dict, length: float = 1.0) -> dict:
    """All the numbers of one seed; `length` shortens training and draws fewer noises."""
    torch.set_num_threads(1)
    args = distilled(out, f"all-pairs-{seed}", seed, length=length)
    model, texts = Model(args), [*args.validation, *args.comparison]
    noises, few = (max(2, round(count * length)) * len(texts) for count in (NOISES, FEW))
    cond, noise = draws(args, texts, noises // len(texts), "quality")
    captions = torch.tensor([tiny.CAPTIONS.index(args.texts[i]) for i in texts])
    captions = captions.repeat(noises // len(texts))
    compared = torch.arange(noises) % len(texts) >= len(args.validation)

    scales = calibrated(args, model)
    solver, shifts = SOLVERS[tuned["chosen"]], tuned["found"][tuned["chosen"]]
    setting = {  # solver, scale and shift at n calls
        "teacher": lambda n: (euler, 0.0, 1.0),
        "student": lambda n: (euler, 1.0, 1.0),
        "student, scaled": lambda n: (euler, scales[n], 1.0),
        "solver": lambda n: (solver, 0.0, shifts[str(n)][1]),
    }
    generator = torch.Generator().manual_seed(30_000 + seed)
    rendered, again = (tiny.render(captions, generator) for _ in range(2))
    codes, latents = (encoded(model.pipe, x) for x in (rendered, again))
    truth = look(judge, rendered, captions)
    truth_decoded = look(judge, decoded(model.pipe, codes), captions)

    def judged(pictures: Tensor) -> dict[str, float]:
        seen = look(judge, pictures, captions)
        distances = {"frechet": truth, "frechet decoded": truth_decoded}
        return {key: frechet(a, seen) for key, a in distances.items()} | {"shown": seen["shown"]}

    result = {"seed": seed, "scales": {n: scales[n] for n in CALLS}, "rows": []}
    result["floors"] = {
        "rendered": judged(again) | {"diversity": diversity(latents[compared], captions[compared])},
        "rendered, through the VAE": judged(decoded(model.pipe, latents)),
    }

    teacher = model.velocity(0.0)
    exact = sample(adams_bashforth, teacher, head(cond, few // 2), noise[: few // 2], 128)
    reference = sample(euler, teacher, cond, noise, fd.FINE)
    result["fine to exact"] = fd.rms((reference[: few // 2] - exact)[compared[: few // 2]])
    for name in SAMPLERS:
        for n in CALLS:
            to_judge = n in JUDGED or (name, n) == ("teacher", fd.FINE)
            count = noises if to_judge else few
            method, scale, shift = setting[name](n)
            velocity, rows = model.velocity(scale), compared[:count]
            if (name, n) == ("teacher", fd.FINE):
                latents = reference
            else:
                latents = sample(method, velocity, head(cond, count), noise[:count], n, shift)
            row = {
                "sampler": name, "calls": n, "scale": scale, "shift": shift,
                "rmse": fd.rms((latents - reference[:count])[rows]),
                "exact": fd.rms((latents[: few // 2] - exact)[rows[: few // 2]]),
                "diversity": diversity(latents[rows], captions[:count][rows]),
            }  # fmt: skip
            if to_judge:
                row |= judged(decoded(model.pipe, latents))
            result["rows"].append(row)
    return json.loads(json.dumps(result))  # keys as strings, as they are read back


# --------------------------------------------------------------------------------------- the tables

MEASURES = {  # name in the numbers: title, digits, factor
    "rmse": ("distance to the teacher's 32 Euler steps", 3, 1),
    "exact": ("distance to the end of the teacher's path", 3, 1),
    "frechet": ("Fréchet distance to rendered pictures, x 100", 2, 100),
    "frechet decoded": ("the same to rendered pictures that went through the VAE, x 100", 2, 100),
    "shown": ("pictures that show their caption, %", 1, 100),
    "diversity": ("distance of two samples of one caption", 3, 1),
}


def values(runs: list[dict], sampler: str, calls: int, measure: str) -> np.ndarray:
    rows = [row for run in runs for row in run["rows"]]
    rows = [row for row in rows if (row["sampler"], row["calls"]) == (sampler, calls)]
    return np.array([row[measure] for row in rows if measure in row])


def cell(numbers, digits: int, factor=1) -> str:
    if len(numbers) == 0:
        return ""
    mean, half = bench.interval(np.asarray(numbers) * factor)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown(runs: list[dict], tuned: dict) -> str:
    chosen, found = tuned["chosen"], tuned["found"]
    lines = ["Training-free solvers on validation captions: distance, and in brackets the shift"]
    lines += ["", "| network calls | " + " | ".join(map(str, TUNED)) + " | mean | limit |"]
    lines += ["|---" * (len(TUNED) + 3) + "|"]
    for name in sorted(SOLVERS, key=tuned["marks"].get):
        cells = ["{:.3f} ({:g})".format(*found[name][str(n)]) for n in TUNED]
        cells += [f"{tuned['marks'][name]:.3f}", f"{tuned['limits'][name]:.4f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Solver: {chosen}, at shifts "]
    lines[-1] += ", ".join(f"{n}: {found[chosen][str(n)][1]:g}" for n in CALLS)
    for key, (title, digits, factor) in MEASURES.items():
        calls = [n for n in CALLS if len(values(runs, "teacher", n, key))]
        lines += ["", f"**{title}**", "", "| calls | " + " | ".join(map(str, calls)) + " |"]
        lines += ["|---" * (len(calls) + 1) + "|"]
        for name in SAMPLERS:
            cells = [cell(values(runs, name, n, key), digits, factor) for n in calls]
            label = f"teacher: {chosen}" if name == "solver" else name
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        for floor in ("rendered", "rendered, through the VAE"):
            numbers = [run["floors"][floor].get(key) for run in runs]
            if None not in numbers:
                lines += ["", f"{floor}: {cell(numbers, digits, factor)}"]
    scales = [np.mean([run["scales"][str(n)] for run in runs]) for n in CALLS]
    lines += ["", "Scales: " + ", ".join(f"{n}: {s:.2f}" for n, s in zip(CALLS, scales))]
    apart = cell([run["fine to exact"] for run in runs], 3)
    lines += ["", f"The teacher's 32 Euler steps end {apart} from where its path ends."]
    return "\n".join(lines)


def plot(runs: list[dict], tuned: dict, path: Path) -> None:
    """Distance, Frechet distance and diversity; bands: intervals, black: the teacher's 32 steps."""
    titles = {
        "rmse": "distance to the teacher's 32 Euler steps",
        "frechet": "Fréchet distance to rendered pictures",
        "diversity": "distance of two samples of one caption",
    }
    labels = ("teacher, Euler", "student", "student, scaled", f"teacher, {tuned['chosen']}")
    figure = Figure((5.2 * len(titles), 4.2), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(titles)), titles.items()):
        shown = [n for n in CALLS if len(values(runs, "student", n, key))]
        for name, label, color in zip(SAMPLERS, labels, toy_2d.COLORS):
            some = {n: x for n in shown if (x := values(runs, name, n, key)).min() > 0}
            mean, half = np.array([bench.interval(x) for x in some.values()]).T
            low = np.maximum(mean - half, mean / 3)  # a log axis has no zero
            axis.plot(list(some), mean, "o-", ms=4, color=color, label=label)
            axis.fill_between(list(some), low, mean + half, color=color, alpha=0.12, lw=0)
        if key == "diversity":  # what saturates has no use for a log axis
            axis.set(xscale="log", ylim=(0, None))
        else:
            axis.set(xscale="log", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        if key != "rmse":
            level = values(runs, "teacher", fd.FINE, key).mean()
            axis.axhline(level, color="black", lw=0.8, zorder=0, label="teacher, 32 Euler steps")
        axis.set(xlabel="network calls", title=title)
        axis.set_xticks(shown, [str(n) for n in shown])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, exclusive (3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all that costs (1)")
    parser.add_argument("--out", type=Path, help="keep the students in this folder, and go on")
    parser.add_argument("--raw", type=Path, help="file of the numbers: read what it has, add to it")
    parser.add_argument("--figure", type=Path, help="write the figure to this path")
    args = parser.parse_args()
    raw = {"runs": []}
    if args.raw and args.raw.exists():
        raw = json.loads(args.raw.read_text())
    todo = sorted(set(range(args.seeds)) - {run["seed"] for run in raw["runs"]})

    def keep():
        if args.raw:
            args.raw.write_text(json.dumps(raw))

    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out = args.out or Path(scratch)
        if "tuned" not in raw:
            raw["tuned"] = json.loads(json.dumps(pool.submit(tune, out, args.length).result()))
            keep()
        if todo:
            judge = pool.submit(train_judge, max(2, round(500 * args.length))).result()
            jobs = [
                pool.submit(measure, out, seed, judge, raw["tuned"], args.length) for seed in todo
            ]
            for job in jobs:
                raw["runs"].append(job.result())
                keep()
    print(markdown(runs := sorted(raw["runs"], key=lambda run: run["seed"]), raw["tuned"]))
    if args.figure:
        plot(runs, raw["tuned"], args.figure)


if __name__ == "__main__":
    main()
