"""How far students look ahead: python tests/benchmarks/lookahead.py (an hour on 1 core)

Predicted and measured mean look-ahead in t, at each time of the grid, and lam* against searches.

Predicted: at the fixed point (averages = student) a student is a weighted mean of the teacher's
velocities further along the path. Which windows sample_windows draws at each grid time gives linear
equations for these weights, (A) of the README; `law` solves them. At u = 1/n no window of the paper
starts: the equations keep the teacher there, a network does what it likes.

Measured: on the teacher's trajectories, the teacher's velocity is averaged over distances ahead
with density exp(-a / m), cut off at the data; m is fitted to the student's velocity by least
squares, and the mean of a is its look-ahead. The law is nearly that of the theory (waiting times)
but knows none of its numbers. Two other choices are measured beside it: a uniform law of distances
from 0 on, as a sampler's, and the law that the theory predicts, mixed with the teacher.

Students are trained for 4,000 iterations, one each, at half of toy_2d.py's rate and with constant
averages; those of tiny Flux for 800, else as in the demonstration. Scales: of students matched to 3
steps, 5 seeds; intervals as in toy.py.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import shortcut as sc
import toy_2d as toy

STRIDES = {"2, 4, 8": (2, 4, 8), "1, 2, 4": (1, 2, 4), "4, 8": (4, 8)}
RHOS = (0.2, 0.3, 0.4, 0.52, 0.6, 0.7, 0.8, 0.9)
MATCHED = (2, 3, 4, 6, 8)
FLUX_RHOS = (0.52, 0.3, 0.8)
FLOWS = ("moons", "gaussians")
ITERATIONS = 4000
SETTLED = dict(fast_decay=0.95, slow_decay=0.99)
SLOWLY = dict(lr=1e-3, warmup=100, ema_warmup=False)
FINE = 8  # Euler steps of a trajectory for one of the grid
SHOWN = {32: "o", 24: "s", 16: "^", 8: "v"}  # grid times of the first panel, and their markers
LAWS = ("exponential", "uniform", "theory's")
TARGETS = {"targets": False, "targets on the path": True}  # with x_mid where the teacher goes?


# ---------------------------------------------------------------------------------------- predicted


def windows_from(config: sc.ShortcutConfig, i: int) -> list[tuple[float, int, float, bool]]:
    """Windows that start at grid time i: share of them, stride, w of the first velocity, whose row.

    The sampler's starts are uniform over those from which both steps fit: k steps long, n + 1 - 2k.
    """
    n, rho, count = config.grid_steps, config.teacher_ratio, len(config.strides)
    kinds = [(rho, 1, True)] + [((1 - rho) / count, d, False) for d in config.strides]
    found = [(share / (n + 1 - 2 * d), d, row) for share, d, row in kinds if 2 * d <= i]
    total, t = sum(share for share, *_ in found), grid(config)
    w = [((t[i] - t[i - d]) / (t[i] - t[i - 2 * d])).item() for _, d, _ in found]
    return [(share / total, d, w, row) for (share, d, row), w in zip(found, w)]


def grid(config: sc.ShortcutConfig) -> Tensor:
    u = torch.linspace(0, 1, config.grid_steps + 1, dtype=torch.float64)
    return sc.shift_time(u, config.shift_range[0])


def law(config: sc.ShortcutConfig, iterations: int | None = None, growing=False) -> Tensor:
    """Weights P (n + 1, n + 1): at grid time i the student is the sum of P_ij v_teacher(j).

    iterations: not the fixed point, but what a student that always equals the mean of its targets
    has after as many updates of its averages; growing: of their memory.
    """
    n, t = config.grid_steps, grid(config)
    teacher, fast, slow = torch.zeros(3, n + 1, n + 1, dtype=torch.float64)
    teacher[0, 0] = 1
    if config.student_steps:
        i = torch.arange(1, n + 1)
        w = (t[1:] - t[:-1]) / (t[1:] - sc.matched_end(config, t[1:], t[:-1]))
        teacher[i, i], slow[i, i - 1] = w, 1 - w
    else:
        teacher[1, 1] = 1  # no window starts there
        for i in range(2, n + 1):
            for share, d, w, row in windows_from(config, i):
                first = teacher if row else fast if config.dual else slow
                second = teacher if row and not config.dual else slow
                first[i, i] += share * w
                second[i, i - d] += share * (1 - w)
    v, v_fast, v_slow, identity = torch.eye(n + 1, dtype=torch.float64).repeat(4, 1, 1)
    if iterations is None:
        return torch.linalg.solve(identity - fast - slow, teacher)
    for i in range(1, iterations + 1):
        v = teacher + fast @ v_fast + slow @ v_slow
        for average, decay in ((v_fast, config.fast_decay), (v_slow, config.slow_decay)):
            sc.update_ema([average], [v], decay, i if growing else math.inf)
    return v


def predicted(config: sc.ShortcutConfig, iterations: int | None = None, growing=False) -> list:
    """Look-ahead in t at grid times 0, ..., n."""
    t = grid(config)
    return (t - law(config, iterations, growing) @ t).tolist()


def table_error(config: sc.ShortcutConfig) -> float:
    """Largest difference in look-ahead, over the grid, from shortcut.py run on a table.

    The windows are drawn and the targets made by shortcut.py; the teacher v = t needs no network.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_shortcut import velocity_after_training

    shift = config.shift_range[0]
    t = sc.shift_time(torch.arange(33) / 32, shift)
    found = t - velocity_after_training(config, shift, rounds=100)
    return (found - torch.tensor(predicted(config))).abs().max().item()


# ----------------------------------------------------------------------------------------- measured


@torch.no_grad()
def measure(student, teacher, noise: Tensor, config: sc.ShortcutConfig, fine=FINE, **cond) -> dict:
    """Look-ahead of a student at grid times 1, ..., n, by each of LAWS.

    "exact": what the exponential law says of a student that is on the path just as predicted.
    "explained": share of |v_student - v_teacher|^2 that the exponential law explains.
    """
    n, shift = config.grid_steps, config.shift_range[0]
    times = sc.shift_time(torch.linspace(0, 1, n * fine + 1, dtype=torch.float64), shift)
    x, path, own = noise, [], {}
    for k in range(n * fine, -1, -1):
        t = times[k].float().expand(len(x))
        path.append(v := teacher(x, t, **cond))
        if k % fine == 0:
            own[k // fine] = student(x, t, **cond).double().flatten()
        x = x - (times[k] - times[max(k - 1, 0)]).item() * v
    path = torch.stack(path[::-1]).double().flatten(1)  # (n fine + 1, B D), from data to noise
    theory, out = law(config), {name: [] for name in (*LAWS, "exact", "explained")}
    decay = torch.sinh(torch.linspace(-3.5, 6, 160, dtype=torch.float64))  # t/m; < 0: L > t/2
    reach = torch.linspace(0, 1, 161, dtype=torch.float64)[1:]
    for i in range(1, n + 1):
        k = i * fine
        t, change, seen = times[k], own[i] - path[k], path[: k + 1].flip(0)
        ahead = t - times[: k + 1].flip(0)  # 0, ..., t
        edges = torch.cat([ahead[:1], (ahead[1:] + ahead[:-1]) / 2, ahead[-1:]])
        cells = edges.diff()
        exponential = torch.exp(-decay[:, None] / t * ahead) * cells
        uniform = (reach[:, None] * t - edges[:-1]).clamp(min=0).minimum(cells)
        distance, explained = fit(exponential, ahead, seen, change)
        out["exponential"].append(distance)
        out["explained"].append(explained)
        out["uniform"].append(fit(uniform, ahead, seen, change)[0])
        toward = theory[i] @ path[::fine] - path[k]
        out["exact"].append(fit(exponential, ahead, seen, toward)[0])
        part = (change @ toward / (toward @ toward)).item()  # 0/0 = nan at u = 1/n
        out["theory's"].append(part * (t - theory[i] @ times[::fine]).item())
    return out


def fit(weights: Tensor, ahead: Tensor, seen: Tensor, change: Tensor) -> tuple[float, float]:
    """Mean distance and share of |change|^2 explained, of the best of a family of laws.

    weights: (laws, K), of neighbours alike; ahead: distances (K,); seen: the teacher there (K, D).
    """
    weights = weights / weights.sum(1, keepdim=True)
    means, changes = weights @ ahead, weights @ seen - seen[0]
    errors = (changes - change).square().sum(1)
    best = int(errors[1:-1].argmin()) + 1
    along, off = changes[best + 1] - changes[best - 1], change - changes[best]
    part = ((off @ along) / (along @ along)).clamp(-0.5, 0.5)  # to the next law, or the last
    distance = means[best] + part * (means[best + 1] - means[best - 1])
    return distance.item(), (1 - errors[best] / change.square().sum()).item()


# -------------------------------------------------------------------------------------------- tasks


@cache
def teacher_of(flow: str, seed: int, length: float):
    return toy.train_teacher(toy.FLOWS[flow], max(2, round(2000 * length)), seed)


def config_of(rho=None, strides="2, 4, 8", steps=None, shift=1.0, dual=True) -> sc.ShortcutConfig:
    settings = bench.matched(steps) if steps else {"teacher_ratio": rho}
    return sc.ShortcutConfig(
        strides=STRIDES[strides], shift_range=(shift, shift), dual=dual, **SETTLED, **settings
    )


def task_student(flow, seed, iterations, length, **settings) -> dict:
    base, config = teacher_of(flow, seed, length), config_of(**settings)
    iterations = max(2, round(iterations * length))
    student = toy.train_student(base, toy.FLOWS[flow], config, iterations, seed, **SLOWLY)
    noise = torch.randn(1024, 2, generator=torch.Generator().manual_seed(30_000 + seed))
    return measure(student[iterations], base, noise, config) | {
        "predicted": predicted(config)[1:],
        "in time": predicted(config, iterations)[1:],
    }


def targets(student, teacher, config: sc.ShortcutConfig, on_path: bool):
    """Velocity of the mean of the targets of paper windows, with the student as both averages.

    on_path: the second velocity is taken where the teacher's path is at t_mid, not at x_mid.
    """
    t_grid = grid(config).float()

    def velocity(x: Tensor, t: Tensor, **cond) -> Tensor:
        i = int((t_grid - t[0]).abs().argmin())
        own, true, total = student(x, t, **cond), teacher(x, t, **cond), torch.zeros_like(x)
        for share, d, w, row in windows_from(config, i):
            first = true if row else own
            x_mid = x - (t_grid[i] - t_grid[i - d]) * first
            if on_path:
                times = torch.linspace(t[0], t_grid[i - d], 8 * d + 1)
                x_mid = sc.euler_sample(teacher, x, times, **cond)
            second = student(x_mid, t_grid[i - d].expand(len(x)), **cond)
            total += share * (w * first + (1 - w) * second)
        return total if i > 1 else true

    return velocity


def task_why(flow, length, **settings) -> dict:
    """Why measured and predicted differ: look-ahead of a student and of its targets.

    "recursion": what (A) says of the targets, of the student's measured look-ahead.
    """
    base, config, its = teacher_of(flow, 0, length), config_of(**settings), round(4000 * length)
    student = toy.train_student(base, toy.FLOWS[flow], config, its, 0, **SLOWLY)[its]
    noise, t = torch.randn(1024, 2, generator=torch.Generator().manual_seed(30_000)), grid(config)
    own = [0.0, *measure(student, base, noise, config)["exponential"]]
    out = {"predicted": predicted(config)[1:], "student": own[1:], "recursion": own[1:2]}
    for name, on_path in TARGETS.items():
        made = targets(student, base, config, on_path)
        out[name] = measure(made, base, noise, config)["exponential"]
    for i in range(2, len(t)):
        terms = [
            share * (w * (not row) * own[i] + (1 - w) * (own[i - d] + (t[i] - t[i - d]).item()))
            for share, d, w, row in windows_from(config, i)
        ]
        out["recursion"].append(sum(terms))
    return out


def task_table(length, **settings) -> dict:
    return {"error": table_error(config_of(**settings))}


def task_scales(flow, seed, steps, length) -> dict:
    """Scales of the student matched to `steps`: lam*, calibrated, best; [scale, error] of each.

    Best: least energy distance to the data among these and 17 within a factor of 1.6 of lam*.
    """
    base, its, out = teacher_of(flow, seed, length), max(2, round(ITERATIONS * length)), {}
    one = bench.Bench(flow, seed)
    student = one.train(base, its, how=SLOWLY, **SETTLED, **bench.matched(steps))[its]
    for n in (2, 3, 4, 8):
        lam = sc.optimal_scale(student, base, one.validation, sc.time_grid(n)).item()
        named = {"lam*": lam, "calibrated": toy.calibrate(base, student, one.validation, n)}
        tries = [*named.values(), *np.geomspace(lam / 1.6, 1.6 * lam, 17).tolist()]
        errors = {scale: one.error(toy.scaled(base, student, scale), n) for scale in tries}
        named["best"] = min(errors, key=errors.get)
        out[n] = {name: [scale, errors[scale]] for name, scale in named.items()}
    return out


def task_flux(rho, iterations, length, folder) -> dict:
    """Tiny Flux as the demonstration trains it, but longer, with the paper's windows, this rho."""
    import flux as demo
    from safetensors.torch import load_file

    fd = demo.fd
    out = Path(folder) / f"flux-{rho}-{iterations}"
    args = demo.demonstration(out, 0, "--paper", "--iterations", iterations, length=length)
    args.config = config = dataclasses.replace(args.config, teacher_ratio=rho)
    fd.make_cache(args)
    fd.train(args)
    student = load_file(args.state)["student"]
    adapter = fd.Adapter(args)
    texts = args.comparison  # never seen, and not those of the log
    cond = fd.read(args, "text", texts) | {"guidance": torch.full((len(texts),), args.guidance)}
    noise = fd.noises(args, [("lookahead", i) for i in texts])
    student, teacher = (adapter.velocity(weights, args.size) for weights in (student, None))
    found = measure(student, teacher, noise, config, 2, **cond)
    for name, on_path in TARGETS.items():
        made = targets(student, teacher, config, on_path)
        found[name] = measure(made, teacher, noise, config, 2, **cond)["exponential"]
    return found | {
        "predicted": predicted(config)[1:],
        "in time": predicted(config, args.iterations, growing=True)[1:],
    }


def all_tasks(seeds: int, flux_rhos=FLUX_RHOS) -> dict[str, list[tuple]]:
    """(function's name, settings) of each part, in the order of their use."""
    flows, one = FLOWS, {"seed": 0, "iterations": ITERATIONS}
    students = [one | {"flow": f, "rho": r} for f, r in product(flows, RHOS)]
    students += [one | {"flow": f, "steps": n} for f, n in product(flows, MATCHED)]
    far = [{"shift": 3.0, "rho": r} for r in RHOS] + [{"shift": 3.0, "steps": n} for n in MATCHED]
    students += [one | {"flow": flows[0]} | more for more in far]
    students += [
        one | {"flow": flows[0], "rho": r, "iterations": 2 * ITERATIONS} for r in (0.2, 0.52)
    ]
    vanilla = [{"rho": r, "dual": False} for r in (0.2, 0.4, 0.6, 0.8)]
    others = [{"rho": r, "strides": s} for s, r in product(list(STRIDES)[1:], RHOS)]
    students += [one | {"flow": flows[0]} | more for more in (*others, *vanilla)]
    students += [one | {"flow": flows[0], "rho": 0.52, "seed": s} for s in (1, 2)]
    students += [one | {"flow": flows[1]} | more for more in others]
    kinds = [{k: v for k, v in s.items() if k not in ("flow", *one)} for s in students]
    kinds = [dict(pairs) for pairs in dict.fromkeys(tuple(k.items()) for k in kinds)]
    scales = [{"flow": f, "seed": s, "steps": 3} for s, f in product(range(seeds), flows)]
    return {
        "student": students, "table": kinds, "scales": scales,
        "why": [{"flow": f, "rho": 0.2} for f in flows],
        "flux": [{"rho": r, "iterations": 800} for r in flux_rhos],
    }  # fmt: skip


def run(kind: str, settings: dict, length: float, folder: Path) -> None:
    """Do a task unless its file of numbers is there."""
    torch.set_num_threads(1)
    name = "-".join([kind, *(f"{k}={v}" for k, v in settings.items())]).replace(", ", "+")
    if not (path := folder / f"{name}.json").exists():
        more = {"folder": folder} if kind == "flux" else {}
        found = globals()[f"task_{kind}"](length=length, **settings, **more)
        path.write_text(json.dumps({"kind": kind, **settings, "found": found}))


# ------------------------------------------------------------------------------- tables and figure


def load(folder: Path) -> dict[str, list[dict]]:
    runs = {}
    for path in sorted(folder.glob("*.json")):
        runs.setdefault((run := json.loads(path.read_text()))["kind"], []).append(run)
    return runs


def label(run: dict) -> str:
    """Windows of a run, without rho."""
    if "steps" in run:
        return "matched"
    return run.get("strides", next(iter(STRIDES))) + (
        ", vanilla" if not run.get("dual", True) else ""
    )


def column(runs: list[dict], name: str, least=4) -> np.ndarray:
    """What was found at all grid times from `least` on."""
    return np.concatenate([run["found"][name][least - 1 :] for run in runs])


def table(head: str, lines: list[list]) -> str:
    columns = head.split(" | ")
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(["", *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def summary(runs: list[dict]) -> str:
    """All students of a kind in a line: how far from the diagonal."""
    lines, groups = [], {}
    for run in runs:
        flow, shift = run.get("flow", "tiny Flux"), run.get("shift", 1.0)
        if run["kind"] == "flux" or (run["iterations"], run["seed"]) == (ITERATIONS, 0):
            groups.setdefault((flow, shift, label(run)), []).append(run)
    for (flow, shift, name), group in sorted(groups.items()):
        line = [flow, f"{shift:g}", name, len(group)]
        x = column(group, "predicted")
        ratios = [column(group, kind) / x for kind in LAWS]
        ratios += [
            column(group, "exact") / x,
            column(group, "exponential") / column(group, "exact"),
        ]
        for ratio in ratios:
            half, most = np.quantile(np.abs(ratio - 1), (0.5, 0.9))
            line.append(f"{np.median(ratio):.2f}; {half:.0%}, {most:.0%}")
        lines.append([*line, f"{np.median(column(group, 'explained')):.0%}"])
    head = "flow | shift | windows | students | exponential | uniform | theory's"
    head += " | exponential, of the exact student | exponential, student / exact | explained"
    return table(head, lines)


def details(runs: list[dict]) -> str:
    """Look-ahead of every student at the grid times of the figure, 1/8, 1/16 and 1/32."""
    lines = []
    for run in runs:
        found, where = run["found"], run.get("flow", "tiny Flux")
        kind = f"N = {run['steps']}" if "steps" in run else f"rho = {run['rho']}"
        extra = f", seed {run.get('seed')}" * bool(run.get("seed"))
        extra += f", {run['iterations']} iterations" * (run["iterations"] > ITERATIONS)
        names = ("predicted", "exact", "exponential")
        cells = [" / ".join(f"{found[name][i - 1]:.3f}" for name in names) for i in (*SHOWN, 4, 2)]
        one = f"{found['exponential'][0]:.3f}"
        lines.append([where, f"{run.get('shift', 1):g}", label(run), kind + extra, *cells, one])
    columns = " | ".join(f"u = {i}/32" for i in (*SHOWN, 4, 2, 1))
    return table(f"flow | shift | windows | | {columns}", sorted(lines))


def some_times(runs: list[dict], names: list[str]) -> str:
    """What these runs found, at a few grid times."""
    lines = []
    for run, i in product(runs, (32, 24, 16, 8)):
        cells = [f"{run['found'][name][i - 1]:.3f}" for name in names]
        lines.append([run.get("flow", "tiny Flux"), run["rho"], f"{i}/32", *cells])
    return table("flow | rho | u | " + " | ".join(names), lines)


def scale_table(runs: list[dict]) -> str:
    lines = []
    for flow, n in product(dict.fromkeys(run["flow"] for run in runs), runs[0]["found"]):
        group = [run["found"][n] for run in runs if run["flow"] == flow]
        scale, error = ({name: [g[name][k] for g in group] for name in group[0]} for k in (0, 1))
        line = [flow, n, len(group)]
        line += ["{:.2f} ± {:.2f}".format(*bench.interval(scale[name])) for name in scale]
        line += [bench.ratio(scale["lam*"], scale["best"])]
        line += [bench.show(error[name]) for name in error]
        lines.append(line)
    head = "flow | steps | seeds | λ* | calibrated | best | λ* / best"
    return table(head + " | error at λ* | at calibrated | at best", lines)


def markdown(runs: dict[str, list[dict]]) -> str:
    parts = []
    if checks := runs.get("table"):
        worst = [max(r["found"]["error"] for r in checks if r.get("shift", 1) == s) for s in (1, 3)]
        parts += [f"shortcut.py on a table, {len(checks)} settings: look-ahead differs from the"]
        parts += [f"prediction by at most {worst[0]:.4f} (shift 1), {worst[1]:.4f} (shift 3)"]
    students = runs.get("student", []) + runs.get("flux", [])
    if students:
        parts += ["\nLook-ahead, measured / predicted, at all grid times u >= 1/8:"]
        parts += ["median; median and 90 % quantile of its distance to 1", summary(students)]
        parts += ["\nLook-ahead in t: predicted / of an exact student / measured; exponential law"]
        parts += [details(students)]
    if why := runs.get("why"):
        parts += ["\nLook-ahead of a student and of its targets"]
        parts += [some_times(why, list(why[0]["found"]))]
    if flux := runs.get("flux"):
        parts += ["\nin time: what a student would have that equals its targets at every iteration"]
        parts += [some_times(flux, ["predicted", "in time", "exact", *LAWS, "explained", *TARGETS])]
    if scales := runs.get("scales"):
        parts += [
            "\nScales of the student matched to 3 steps; energy distance x 1e-4",
            scale_table(scales),
        ]
    return "\n".join(parts)


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Three panels: all students against their predictions; two along the path at shift 1 and 3.

    Filled: moons; open: gaussians. Dotted: what would be measured of an exact student.
    """
    figure = Figure((11, 4.4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    colors = dict(zip(("matched", *STRIDES), toy.COLORS))
    usual = [r for r in runs["student"] if r["iterations"] == ITERATIONS and r["seed"] == 0]

    def dots(axis, run, at, marker, size):
        flow, i = run.get("flow"), [i - 1 for i in at]
        color = colors[label(run).removesuffix(", vanilla")] if flow else "black"
        x = np.array(run["found"]["predicted"])[i] if axis is axes[0] else np.array(at) / 32
        style = dict(color=color, mfc=color if flow == FLOWS[0] else "none", ms=size, mew=0.9)
        axis.plot(x, np.array(run["found"]["exponential"])[i], marker, **style)

    flat = [r for r in usual if r.get("shift", 1) == 1]
    for run, (i, marker) in product(flat + runs.get("flux", []), SHOWN.items()):
        dots(
            axes[0], run, [i], marker if run.get("dual", True) else "x", 4 + 2 * ("flow" not in run)
        )
    axes[0].axline((0, 0), slope=1, color="black", lw=0.8, zorder=0)
    axes[0].set(title="shift 1", xlabel="predicted look-ahead", ylabel="measured look-ahead")
    axes[0].set(xlim=(0, None), ylim=(0, None))
    for name, color in colors.items():
        text = f"strides {name}" if name in STRIDES else "matched, 2 to 8 steps"
        axes[0].plot([], [], "o", color=color, ms=5, label=text)
    axes[0].plot([], [], "x", color=colors["2, 4, 8"], ms=4, label="strides 2, 4, 8, vanilla")
    axes[0].plot([], [], "o", color="black", mfc="none", label="tiny Flux, strides 2, 4, 8")
    for i, marker in SHOWN.items():
        axes[0].plot([], [], marker, color="black", ms=4, label=f"at u = {i / 32:g}")
    shown = {"2, 4, 8": ("rho", 0.52, "paper's windows"), "matched": ("steps", 3, "matched")}
    for axis, shift in zip(axes[1:], (1.0, 3.0)):
        for name, (key, value, text) in shown.items():
            some = [r for r in usual if r.get(key) == value and label(r) == name]
            for run in (some := [r for r in some if r.get("shift", 1) == shift]):
                dots(axis, run, range(1, 33), "o", 3.5)
                y = [0, *run["found"]["predicted"]]
                axis.plot(np.arange(33) / 32, y, color=colors[name], lw=1, label=text)
                y = [0, *run["found"]["exact"]]
                axis.plot(np.arange(33) / 32, y, ":", color=colors[name], lw=1)
                text = None  # one entry for both flows
        axis.set(title=f"along the path, shift {shift:g}", xlabel="grid time u (1: noise)")
        axis.set(ylabel="look-ahead in t", xlim=(0, 1.02), ylim=(0, None))
    style = dict(frameon=False, title_fontsize=8, alignment="left", labelspacing=0.3)
    style |= dict(loc="upper left", borderaxespad=0)
    told = "line: predicted; dots: measured;\ndotted: measured of an exact student"
    axes[1].legend(fontsize=8, title=told, **style)
    axes[0].legend(fontsize=7.5, title="filled: moons; open: gaussians", **style)
    axes[1].set_ylim(0, 0.27)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    parts = list(all_tasks(1))
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--seeds", type=int, default=5, help="of the scales: 0 to this, exclusive")
    parser.add_argument("--flux-rhos", type=float, nargs="+", default=FLUX_RHOS, metavar="RHO")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--raw", type=Path, help="keep the numbers in this folder, and go on in it")
    parser.add_argument("--figure", type=Path, help="draw this picture")
    args = parser.parse_args()
    tasks = all_tasks(args.seeds, args.flux_rhos)
    todo = [(kind, settings) for kind in args.parts for settings in tasks[kind]]
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        raw = args.raw or Path(scratch)
        raw.mkdir(parents=True, exist_ok=True)
        for future in as_completed([pool.submit(run, *t, args.length, raw) for t in todo]):
            future.result()
        runs = load(raw)
    print(markdown(runs))
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
