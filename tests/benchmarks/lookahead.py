"""How far students look ahead: python tests/benchmarks/lookahead.py (an hour on 1 core)

Predicted and measured mean look-ahead in t, at each time of a grid of 32; lam* against searches.

Predicted: at the fixed point (EMAs = student) a student is a weighted mean of the teacher's
velocities further along the path. The windows that start at each time give linear equations for
these weights, (A) of shortcut.py; `predicted_weights` solves them. At u = 1/32 no window of the
paper starts: the equations keep the teacher there, a network does what it likes.

Measured: on the teacher's trajectories, the teacher's velocity is averaged over distances ahead
with density exp(-a / m), cut off at the data. m is fitted to the student's velocity by least
squares, and the mean of a is the look-ahead. The exponential is nearly what the theory says of the
paper's windows (waiting times) but knows none of its numbers. Two other distributions are measured
too: uniform from 0 on, as a sampler's step, and the predicted one, mixed with the teacher.

Students are trained for 4,000 iterations at half of toy_2d.py's rate with constant EMA decays;
those of the tiny Flux for 800, else as in the demonstration. Scales: of students matched to 3
steps, 5 seeds; intervals as in toy.py.

"exact student": what the exponential says of a student that is exactly as predicted. "explained":
the fraction of |v_student - v_teacher|^2 that the exponential explains. "targets": the mean targets
of the windows, with the student as both EMAs; "on the path": with their middle moved onto the
teacher's path. "recursion": what (A) says of the targets, given the student's measured look-ahead.
"in time": of a student that equals its targets at every iteration.
"""

import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import common
import common_flux
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import shortcut as sc
import toy_2d

GRID = 32  # times at which look-aheads are compared; the grid of the paper's windows
FINE = 8  # Euler steps of a trajectory for one of the grid
STRIDES = {"2, 4, 8": (2, 4, 8), "1, 2, 4": (1, 2, 4), "4, 8": (4, 8)}
RHOS = (0.2, 0.3, 0.4, 0.52, 0.6, 0.7, 0.8, 0.9)
MATCHED_STEPS = (2, 3, 4, 6, 8)
IN_TABLE = {"2, 4, 8": (0.2, 0.4, 0.52, 0.8), "matched": (3,)}  # the figure shows all
FLOWS = ["moons", "gaussians"]
ITERATIONS = 4000
SLOWLY = toy_2d.Recipe(batch=512, rate=1e-3, warmup=100, ema_warmup=False)
SHOWN = {32: "o", 24: "s", 16: "^", 8: "v"}  # grid times of the first panel, and their markers
DISTRIBUTIONS = ("exponential", "uniform", "predicted distribution")
Config = sc.ShortcutConfig | sc.MatchedConfig


def config_of(windows: str, value: float, shift: float = 1.0) -> Config:
    """windows: "matched", then value is N, or the strides of the paper's, then it is rho."""
    if windows == "matched":
        return common.matched(value, shift, slow_decay=0.99)
    decays = dict(fast_decay=0.95, slow_decay=0.99)
    return common.paper(value, shift, strides=STRIDES[windows], **decays)


def grid(config: Config, cells: int = GRID) -> Tensor:
    """Times of the grid, from 0 to 1."""
    u = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    return sc.shift_time(u, config.shift_range[0])


# --------------------------------------------------------------------------------------- predicted


def predicted_lookahead(config: Config, fine: int = FINE) -> list[float]:
    """Look-ahead in t at the grid times 0, ..., 1."""
    weights = predicted_weights(config, fine)
    return (grid(config) - weights @ grid(config, GRID * fine)).tolist()


def predicted_weights(config: Config, fine: int = FINE) -> Tensor:
    """Weights (33, 32 fine + 1) of the teacher's velocities at the fine grid's times.

    With them, at each grid time, the student's velocity is the sum of the teacher's.
    """
    if isinstance(config, sc.MatchedConfig):
        return weights_of_matched(config, fine)
    teacher, fast, slow = equations_of_paper(config)
    identity = torch.eye(GRID + 1, dtype=torch.float64)
    return on_fine_grid(torch.linalg.solve(identity - fast - slow, teacher), fine)


def on_fine_grid(weights: Tensor, fine: int) -> Tensor:
    spread = weights.new_zeros(len(weights), GRID * fine + 1)
    spread[:, ::fine] = weights
    return spread


def paper_windows_from(config: sc.ShortcutConfig, i: int) -> list[tuple[float, int, float, bool]]:
    """Windows that start at grid time i: fraction of them, stride, w, is it a teacher row.

    Starts are uniform over the n + 1 - 2 d grid times from which two strides d fit.
    """
    n, rho, count = config.grid_steps, config.teacher_ratio, len(config.strides)
    kinds = [(rho, 1, True)] + [((1 - rho) / count, d, False) for d in config.strides]
    found = [(p / (n + 1 - 2 * d), d, is_teachers) for p, d, is_teachers in kinds if 2 * d <= i]
    total = sum(p for p, _, _ in found)
    t = grid(config)
    weights = [((t[i] - t[i - d]) / (t[i] - t[i - 2 * d])).item() for _, d, _ in found]
    return [(p / total, d, w, is_teachers) for (p, d, is_teachers), w in zip(found, weights)]


def equations_of_paper(config: sc.ShortcutConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices T, F, S of Algorithm 2: the mean target is T v_teacher + F v_fast + S v_slow."""
    teacher, fast, slow = torch.zeros(3, GRID + 1, GRID + 1, dtype=torch.float64)
    teacher[0, 0] = 1
    teacher[1, 1] = 1  # no window starts there
    for i in range(2, GRID + 1):
        for fraction, d, w, is_teachers in paper_windows_from(config, i):
            first = teacher if is_teachers else fast
            first[i, i] += fraction * w
            slow[i, i - d] += fraction * (1 - w)
    return teacher, fast, slow


def weights_of_matched(config: sc.MatchedConfig, fine: int) -> Tensor:
    """(A) from the data on: the teacher midway to t_mid, and what is known already at t_mid."""
    times = grid(config, GRID * fine)
    t_mid = config.after(times, config.teacher_part)
    second = times - t_mid + config.lookahead(t_mid)
    w = (second - config.lookahead(times)) / (second - (times - t_mid) / 2)  # (C)
    at_half = interpolation(times, (times + t_mid) / 2)
    at_mid = interpolation(times, t_mid)
    weights = torch.eye(len(times), dtype=torch.float64)
    for i in range(1, len(times)):
        weights[i] = w[i] * at_half[i] + (1 - w[i]) * at_mid[i] @ weights
    return weights[::fine]


def interpolation(times: Tensor, at: Tensor) -> Tensor:
    """Matrix that interpolates values at the times, linearly, to other times."""
    upper = torch.searchsorted(times, at).clamp(min=1)
    part = (at - times[upper - 1]) / (times[upper] - times[upper - 1])
    rows = torch.arange(len(at))
    matrix = times.new_zeros(len(at), len(times))
    matrix[rows, upper] = part
    matrix[rows, upper - 1] = 1 - part
    return matrix


def lookahead_on_table(config: Config, vanilla: bool = False, rows: int = 200_000) -> Tensor:
    """What shortcut.py's windows and targets make of a table of velocities, by grid time.

    The table stands for a network that makes no error: each round replaces its entries by the mean
    of their targets. For the teacher v = t, t - v is the mean look-ahead.
    """
    shift = config.shift_range[0]
    matched = isinstance(config, sc.MatchedConfig)
    cells = GRID * FINE if matched else GRID
    table = grid(config, cells).float()

    def own(x: Tensor, t: Tensor) -> Tensor:
        place = sc.shift_time(t, 1 / shift) * cells
        i = place.floor().long().clamp(max=cells - 1)
        return torch.lerp(table[i], table[i + 1], place - i)[:, None]

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return t[:, None]

    generator = torch.Generator().manual_seed(0)
    draw = sc.matched_windows if matched else sc.sample_windows
    windows = draw(config, rows, generator=generator)
    entry = (sc.shift_time(windows.t, 1 / shift) * cells).round().long()
    count = torch.bincount(entry, minlength=cells + 1)
    for _ in range(100):
        if matched:
            first, second = sc.matched(windows, teacher, own)
        elif vanilla:
            first, second = sc.vanilla(windows, teacher, own)
        else:
            first, second = sc.dual(windows, teacher, own, own)
        target = sc.shortcut_target(windows, torch.zeros(rows, 1), first, second)[:, 0]
        total = torch.zeros(cells + 1).index_add(0, entry, target)
        table = torch.where(count > 0, total / count, table)
    return (grid(config, cells) - table)[:: cells // GRID]


# ---------------------------------------------------------------------------------------- measured


@torch.no_grad()
def measured_lookahead(
    student, teacher, noise: Tensor, config: Config, fine: int = FINE, **cond
) -> dict[str, list[float]]:
    """Look-ahead of a student at the grid times 1/32, ..., 1, by each of DISTRIBUTIONS.

    "exact": what the exponential says of a student that is exactly as predicted. "explained":
    fraction of |v_student - v_teacher|^2 that the exponential explains.
    """
    times = grid(config, GRID * fine)
    path, own = velocities_on_path(student, teacher, noise, times, fine, **cond)
    weights = predicted_weights(config, fine)
    decay = torch.sinh(torch.linspace(-3.5, 6, 160, dtype=torch.float64))  # t/m; < 0: L > t/2
    reach = torch.linspace(0, 1, 161, dtype=torch.float64)[1:]
    found = {name: [] for name in (*DISTRIBUTIONS, "exact", "explained")}
    for i in range(1, GRID + 1):
        k = i * fine
        t = times[k]
        seen = path[: k + 1].flip(0)  # from t on
        ahead = t - times[: k + 1].flip(0)  # 0, ..., t
        edges = torch.cat([ahead[:1], (ahead[1:] + ahead[:-1]) / 2, ahead[-1:]])
        cells = edges.diff()
        exponential = torch.exp(-decay[:, None] / t * ahead) * cells
        uniform = (reach[:, None] * t - edges[:-1]).clamp(min=0).minimum(cells)

        change = own[i] - path[k]
        distance, explained = fit(exponential, ahead, seen, change)
        found["exponential"].append(distance)
        found["explained"].append(explained)
        found["uniform"].append(fit(uniform, ahead, seen, change)[0])
        expected = weights[i] @ path - path[k]
        found["exact"].append(fit(exponential, ahead, seen, expected)[0])
        part = (change @ expected / (expected @ expected)).item()  # 0/0 = nan if it is the teacher
        found["predicted distribution"].append(part * (t - weights[i] @ times).item())
    return found


def velocities_on_path(
    student, teacher, noise: Tensor, times: Tensor, fine: int, **cond
) -> tuple[Tensor, dict[int, Tensor]]:
    """The teacher's velocities on its path at the times 0, ..., 1, and the student's on the grid.

    Each is flat: all rows in one vector.
    """
    x = noise
    path, own = [], {}
    for k in reversed(range(len(times))):
        t = times[k].float().expand(len(x))
        v = teacher(x, t, **cond)
        path.append(v)
        if k % fine == 0:
            own[k // fine] = student(x, t, **cond).double().flatten()
        x = x - (times[k] - times[max(k - 1, 0)]).item() * v
    return torch.stack(path[::-1]).double().flatten(1), own


def fit(weights: Tensor, ahead: Tensor, seen: Tensor, change: Tensor) -> tuple[float, float]:
    """Mean distance and fraction of |change|^2 explained, of the best of a family.

    weights: (members, K), of neighbours alike; ahead: distances (K,); seen: the teacher there
    (K, D). Between the best member and its neighbours: interpolated by least squares.
    """
    weights = weights / weights.sum(1, keepdim=True)
    means = weights @ ahead
    changes = weights @ seen - seen[0]
    errors = (changes - change).square().sum(1)
    best = int(errors[1:-1].argmin()) + 1
    along = changes[best + 1] - changes[best - 1]
    part = ((change - changes[best]) @ along / (along @ along)).clamp(-0.5, 0.5)
    distance = means[best] + part * (means[best + 1] - means[best - 1])
    return distance.item(), (1 - errors[best] / change.square().sum()).item()


# ------------------------------------------------------------------------------- tasks on 2-D flows


def measure_table(windows: str, value: float, shift: float, vanilla: bool, length: float) -> dict:
    """Largest difference of prediction and table over the grid."""
    config = config_of(windows, value, shift)
    expected = torch.tensor(predicted_lookahead(config))
    if vanilla:
        expected = torch.tensor(predicted_of_vanilla(config))
    rows = 200_000 if length >= 0.1 else 20_000
    return {"error": (lookahead_on_table(config, vanilla, rows) - expected).abs().max().item()}


def predicted_of_vanilla(config: sc.ShortcutConfig) -> list[float]:
    """Look-ahead of Algorithm 1: both velocities of teacher rows are the teacher's."""
    teacher, own = torch.zeros(2, GRID + 1, GRID + 1, dtype=torch.float64)
    teacher[0, 0] = 1
    teacher[1, 1] = 1
    for i in range(2, GRID + 1):
        for fraction, d, w, is_teachers in paper_windows_from(config, i):
            matrix = teacher if is_teachers else own
            matrix[i, i] += fraction * w
            matrix[i, i - d] += fraction * (1 - w)
    weights = torch.linalg.solve(torch.eye(GRID + 1, dtype=torch.float64) - own, teacher)
    return (grid(config) - weights @ grid(config)).tolist()


def measure_student(
    flow: str, windows: str, value: float, shift: float, iterations: int, seed: int, length: float
) -> dict:
    config = config_of(windows, value, shift)
    teacher = common.train_teacher(flow, seed, length)
    student = settled_student(teacher, flow, config, iterations, seed, length)
    noise = torch.randn(1024, 2, generator=torch.Generator().manual_seed(30_000 + seed))
    found = measured_lookahead(student, teacher, noise, config)
    return found | {"predicted": predicted_lookahead(config)[1:]}


def settled_student(teacher, flow: str, config: Config, iterations: int, seed: int, length: float):
    """A student of a long training with small steps."""
    last = common.shortened(iterations, length)
    return toy_2d.distil(teacher, toy_2d.FLOWS[flow], config, last, seed, recipe=SLOWLY)[last]


def targets(student, teacher, config: sc.ShortcutConfig, on_path: bool) -> Callable:
    """Velocity of the mean target of the paper's windows, with the student as both EMAs.

    on_path: the second velocity is taken where the teacher's path is at t_mid, not at x_mid.
    """
    times = grid(config).float()

    def velocity(x: Tensor, t: Tensor, **cond) -> Tensor:
        i = int((times - t[0]).abs().argmin())
        of_student = student(x, t, **cond)
        of_teacher = teacher(x, t, **cond)
        if i < 2:
            return of_teacher
        total = torch.zeros_like(x)
        for fraction, d, w, is_teachers in paper_windows_from(config, i):
            first = of_teacher if is_teachers else of_student
            x_mid = x - (times[i] - times[i - d]) * first
            if on_path:
                between = torch.linspace(t[0], times[i - d], 8 * d + 1)
                x_mid = sc.euler_sample(teacher, x, between, **cond)
            second = student(x_mid, times[i - d].expand(len(x)), **cond)
            total += fraction * (w * first + (1 - w) * second)
        return total

    return velocity


@torch.no_grad()
def lookahead_of_targets(student, teacher, noise, config, fine=FINE, **cond) -> dict:
    """Look-ahead, by the exponential, of the mean targets that a student would have."""
    found = {}
    for name, on_path in {"targets": False, "targets on the path": True}.items():
        made = targets(student, teacher, config, on_path)
        found[name] = measured_lookahead(made, teacher, noise, config, fine, **cond)["exponential"]
    return found


def measure_why(flow: str, rho: float, length: float) -> dict:
    """Why measured and predicted differ: look-ahead of a student and of its targets.

    "recursion": what (A) says of the targets, given the student's measured look-ahead.
    """
    config = config_of("2, 4, 8", rho)
    teacher = common.train_teacher(flow, 0, length)
    student = settled_student(teacher, flow, config, ITERATIONS, 0, length)
    noise = torch.randn(1024, 2, generator=torch.Generator().manual_seed(30_000))
    t = grid(config).tolist()
    own = [0.0, *measured_lookahead(student, teacher, noise, config)["exponential"]]
    recursion = own[1:2]
    for i in range(2, GRID + 1):
        total = 0.0
        for fraction, d, w, is_teachers in paper_windows_from(config, i):
            first = 0.0 if is_teachers else own[i]
            total += fraction * (w * first + (1 - w) * (t[i] - t[i - d] + own[i - d]))
        recursion.append(total)
    found = {"predicted": predicted_lookahead(config)[1:], "student": own[1:]}
    found["recursion"] = recursion
    return found | lookahead_of_targets(student, teacher, noise, config)


def measure_scales(flow: str, seed: int, length: float) -> dict:
    """Scales of a student matched to 3 steps: lam*, calibrated, best; [scale, error] of each.

    Best: least energy distance to the data among these and 17 within a factor of 1.6 of lam*.
    """
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    student = settled_student(teacher, flow, config_of("matched", 3), ITERATIONS, seed, length)
    found = {}
    for n in (2, 3, 4, 8):
        lam = sc.optimal_scale(student, on.teacher_path(teacher, n)).item()
        named = {"lam*": lam, "calibrated": on.calibrated(teacher, student, n)["scale"]}
        tried = [*named.values(), *np.geomspace(lam / 1.6, 1.6 * lam, 17).tolist()]
        errors = {scale: on.scaled_error(teacher, student, scale, n) for scale in tried}
        named["best"] = min(errors, key=errors.get)
        found[n] = {name: [scale, errors[scale]] for name, scale in named.items()}
    return found


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    kinds = [{"windows": "matched", "value": n} for n in MATCHED_STEPS]
    kinds += [{"windows": "2, 4, 8", "value": rho} for rho in RHOS]
    others = [{"windows": s, "value": rho} for s in [*STRIDES][1:] for rho in RHOS]
    usual = {"shift": 1.0, "iterations": ITERATIONS, "seed": 0}
    students = [{"flow": flow} | kind | usual for flow in flows for kind in kinds + others]
    moons = {"flow": flows[0], "windows": "2, 4, 8"} | usual
    students += [moons | kind | {"shift": 3.0} for kind in kinds]
    students += [moons | {"value": rho, "iterations": 2 * ITERATIONS} for rho in (0.2, 0.52)]
    students += [moons | {"value": 0.52, "seed": seed} for seed in (1, 2)]

    checks = [kind | {"shift": 1.0, "vanilla": False} for kind in kinds + others]
    checks += [kind | {"shift": 3.0, "vanilla": False} for kind in kinds]
    vanilla = {"windows": "2, 4, 8", "vanilla": True}
    checks += [vanilla | {"value": rho, "shift": 1.0} for rho in (0.2, 0.4, 0.6, 0.8)]

    whys = [{"flow": flow, "rho": 0.2} for flow in flows]
    scales = [{"flow": flow, "seed": seed} for seed in seeds for flow in flows]
    on_flux = [{"rho": rho, "iterations": 800} for rho in FLUX_RHOS]
    return {
        "table": [common.Task(measure_table, settings) for settings in checks],
        "students": [common.Task(measure_student, settings) for settings in students],
        "why": [common.Task(measure_why, settings) for settings in whys],
        "scales": [common.Task(measure_scales, settings) for settings in scales],
        "flux": [common.Task(measure_flux, settings) for settings in on_flux],
    }


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    checks = common.where(rows, "table")
    if checks:
        lines += ["Code of shortcut.py on a table; largest difference to the predicted look-ahead"]
        lines += table_of_checks(checks)
    students = common.where(rows, "students") + common.where(rows, "flux")
    if students:
        lines += [
            "Look-ahead, measured / predicted, at all grid times u >= 1/8: median; median and"
        ]
        lines += ["90 % quantile of its distance to 1", *table_of_ratios(students)]
        lines += [
            "Look-ahead in t of some of them: predicted / of an exact student / measured, by the"
            " exponential; at u = 1/32 only measured"
        ]
        lines += table_of_students(students)
    why = common.where(rows, "why")
    if why:
        lines += ["Look-ahead of a student and of its targets"]
        lines += table_of_times(why, list(why[0].found))
    on_flux = common.where(rows, "flux")
    if on_flux:
        names = ["predicted", "in time", "exact", *DISTRIBUTIONS, "explained"]
        names += ["targets", "targets on the path"]
        lines += ["Tiny Flux; in time: of a student that equals its targets at every iteration"]
        lines += table_of_times(on_flux, names)
    scales = common.where(rows, "scales")
    if scales:
        lines += ["Scales of the student matched to 3 steps; energy distance x 1e-4"]
        lines += table_of_scales(scales)
    return lines


def place(row: common.Row) -> str:
    return row.settings.get("flow", "tiny Flux")


def windows_of(row: common.Row) -> str:
    return row.settings.get("windows", "2, 4, 8")


def is_usual(row: common.Row) -> bool:
    """Not one of the longer trainings or other seeds."""
    usual = {"iterations": ITERATIONS, "seed": 0}
    return row.part == "flux" or usual.items() <= row.settings.items()


def flat(rows: list[common.Row], name: str, least: int = 4) -> np.ndarray:
    """What was found at all grid times from `least` on."""
    return np.concatenate([row.found[name][least - 1 :] for row in rows])


def table_of_checks(rows: list[common.Row]) -> list[str]:
    groups = {}
    for row in rows:
        name = row.settings["windows"] + ", vanilla" * row.settings["vanilla"]
        groups.setdefault((name, row.settings["shift"]), []).append(row.found["error"])
    lines = [[name, f"{shift:g}", len(e), f"{max(e):.4f}"] for (name, shift), e in groups.items()]
    return common.table(["windows", "shift", "settings", "largest difference"], lines)


def table_of_ratios(rows: list[common.Row]) -> list[str]:
    """All students with the same kind of windows in a line."""
    groups = {}
    for row in filter(is_usual, rows):
        key = place(row), row.settings.get("shift", 1.0), windows_of(row)
        groups.setdefault(key, []).append(row)
    lines = []
    for (where, shift, windows), some in sorted(groups.items()):
        predicted = flat(some, "predicted")
        exact = flat(some, "exact")
        ratios = [flat(some, name) / predicted for name in DISTRIBUTIONS]
        ratios += [exact / predicted, flat(some, "exponential") / exact]
        cells = [where, f"{shift:g}", windows, len(some)]
        for ratio in ratios:
            half, most = np.quantile(np.abs(ratio - 1), (0.5, 0.9))
            cells.append(f"{np.median(ratio):.2f}; {half:.0%}, {most:.0%}")
        lines.append([*cells, f"{np.median(flat(some, 'explained')):.0%}"])
    head = ["flow", "shift", "windows", "students", *DISTRIBUTIONS]
    head += ["exact student / predicted", "measured / exact student", "explained"]
    return common.table(head, lines)


def table_of_students(rows: list[common.Row]) -> list[str]:
    """Some students at the grid times of the figure, 1/8, 1/16 and 1/32."""
    lines = []
    for row in filter(is_usual, rows):
        value = row.settings.get("value", row.settings.get("rho"))
        if value not in IN_TABLE.get(windows_of(row), ()):
            continue
        kind = f"N = {value}" if windows_of(row) == "matched" else f"rho = {value}"
        cells = [place(row), f"{row.settings.get('shift', 1.0):g}", windows_of(row), kind]
        for i in (*SHOWN, 4, 2):
            names = ("predicted", "exact", "exponential")
            cells.append(" / ".join(f"{row.found[name][i - 1]:.3f}" for name in names))
        lines.append([*cells, f"{row.found['exponential'][0]:.3f}"])
    head = ["flow", "shift", "windows", "", *(f"u = {i}/32" for i in (*SHOWN, 4, 2, 1))]
    return common.table(head, sorted(lines))


def table_of_times(rows: list[common.Row], names: list[str]) -> list[str]:
    """What these rows found, at a few grid times."""
    lines = []
    for row, i in product(rows, SHOWN):
        cells = [f"{row.found[name][i - 1]:.3f}" for name in names]
        lines.append([place(row), row.settings["rho"], f"{i}/32", *cells])
    return common.table(["flow", "rho", "u", *names], lines)


def table_of_scales(rows: list[common.Row]) -> list[str]:
    lines = []
    names = ("lam*", "calibrated", "best")
    for flow, some in common.grouped(rows, "flow").items():
        for n in some[0].found:
            scale = {name: common.column(some, n, name)[:, 0] for name in names}
            error = {name: common.column(some, n, name)[:, 1] for name in names}
            cells = [flow, n, len(some)]
            cells += [common.mean_text(values, 2) for values in scale.values()]
            cells += [common.ratio_text(scale["lam*"], scale["best"])]
            lines.append(cells + [common.energy_text(values) for values in error.values()])
    head = ["flow", "steps", "seeds", *names, "lam* / best"]
    return common.table(head + [f"error at {name}" for name in names], lines)


# ------------------------------------------------------------------------------------------- figure

COLORS = {
    "matched": toy_2d.COLORS["matched"],
    "2, 4, 8": toy_2d.COLORS["SCFM as published"],
    "1, 2, 4": "#d79a22",
    "4, 8": "#5b6b7f",
}


def draw(rows: list[common.Row], path: Path) -> None:
    """Three panels: all students against their predictions; two along the path, shift 1 and 3."""
    usual = [row for row in rows if row.part in ("students", "flux") and is_usual(row)]
    figure = Figure((11, 4.4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    draw_all_students([r for r in usual if r.settings.get("shift", 1.0) == 1.0], axes[0])
    for axis, shift in zip(axes[1:], (1.0, 3.0)):
        shown = [row for row in usual if row.settings.get("shift") == shift]
        draw_along_path(shown, axis)
        axis.set(title=f"along the path, shift {shift:g}", xlabel="grid time u (1: noise)")
        axis.set(ylabel="look-ahead in t", xlim=(0, 1.02), ylim=(0, None))
    axes[1].set_ylim(0, 0.27)
    style = dict(frameon=False, alignment="left", labelspacing=0.3, borderaxespad=0)
    style |= dict(loc="upper left", title_fontsize=8)
    told = "line: predicted; dots: measured;\ndotted: measured of an exact student"
    axes[1].legend(fontsize=8, title=told, **style)
    axes[0].legend(fontsize=7.5, title="filled: moons; open: gaussians", **style)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def marker_style(row: common.Row, size: float) -> dict:
    """Filled: moons; open: other flows; black: tiny Flux."""
    color = "black" if row.part == "flux" else COLORS[windows_of(row)]
    face = color if place(row) == FLOWS[0] else "none"
    return dict(color=color, markerfacecolor=face, markersize=size, markeredgewidth=0.9)


def draw_all_students(rows: list[common.Row], axis) -> None:
    for row, (i, marker) in product(rows, SHOWN.items()):
        found = row.found
        size = 6 if row.part == "flux" else 4
        x, y = found["predicted"][i - 1], found["exponential"][i - 1]
        axis.plot(x, y, marker, **marker_style(row, size))
    axis.axline((0, 0), slope=1, color="black", lw=0.8, zorder=0)
    axis.set(title="shift 1", xlabel="predicted look-ahead", ylabel="measured look-ahead")
    axis.set(xlim=(0, None), ylim=(0, None))
    for name, color in COLORS.items():
        label = f"strides {name}" if name in STRIDES else "matched, 2 to 8 steps"
        axis.plot([], [], "o", color=color, ms=5, label=label)
    if any(row.part == "flux" for row in rows):
        axis.plot([], [], "o", color="black", mfc="none", label="tiny Flux, strides 2, 4, 8")
    for i, marker in SHOWN.items():
        axis.plot([], [], marker, color="black", ms=4, label=f"at u = {i / GRID:g}")


def draw_along_path(rows: list[common.Row], axis) -> None:
    """One student of each kind of windows on each flow."""
    shown = {("2, 4, 8", 0.52): "paper's windows, rho = 0.52", ("matched", 3): "matched, 3 steps"}
    u = np.arange(GRID + 1) / GRID
    for (windows, value), label in shown.items():
        for row in rows:
            if (row.settings["windows"], row.settings["value"]) != (windows, value):
                continue
            color = COLORS[windows]
            axis.plot(u[1:], row.found["exponential"], "o", **marker_style(row, 3.5))
            axis.plot(u, [0, *row.found["predicted"]], color=color, lw=1, label=label)
            axis.plot(u, [0, *row.found["exact"]], ":", color=color, lw=1)
            label = None  # one entry for all flows


# ---------------------------------------------------------------------------------------- tiny Flux

FLUX_RHOS = (0.52, 0.3, 0.8)


def lookahead_in_time(config: sc.ShortcutConfig, iterations: int) -> list[float]:
    """Not at the fixed point: of a student that equals its mean targets at every iteration.

    Its EMAs, warmed up, begin as the teacher.
    """
    teacher, fast, slow = equations_of_paper(config)
    v, v_fast, v_slow = torch.eye(GRID + 1, dtype=torch.float64).repeat(3, 1, 1)
    for i in range(1, iterations + 1):
        v = teacher + fast @ v_fast + slow @ v_slow
        sc.update_ema([v_fast], [v], sc.warm_up(config.fast_decay, i))
        sc.update_ema([v_slow], [v], sc.warm_up(config.slow_decay, i))
    return (grid(config) - v @ grid(config)).tolist()


def measure_flux(rho: float, iterations: int, length: float) -> dict:
    """The tiny Flux as the demonstration trains it, but longer, with the paper's windows."""
    iterations = common.shortened(iterations, length)
    config = common.paper(rho)
    with tempfile.TemporaryDirectory() as folder:
        settings = common_flux.demonstration(Path(folder), 0, length=length)
        world = common_flux.TinyFlux(settings)
        weights = world.distil(config, iterations)[iterations]
        texts = world.data.comparison  # never seen
        cond = world.cache.conditions(texts, settings.guidance)
        noise = world.cache.noise([("lookahead", i) for i in texts])
    student, teacher = world.velocity(weights), world.velocity(None)
    found = measured_lookahead(student, teacher, noise, config, 2, **cond)
    found |= lookahead_of_targets(student, teacher, noise, config, 2, **cond)
    found["predicted"] = predicted_lookahead(config, 2)[1:]
    found["in time"] = lookahead_in_time(config, iterations)[1:]
    return found


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, flows=FLOWS, draw=draw)
