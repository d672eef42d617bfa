"""What the benchmarks share: flags, raw results, statistics, tables, and the measure on 2-D flows.

A benchmark has three parts. `tasks` lists what to measure, by part: functions and their settings.
Each task runs in a process of one thread and returns numbers. These become one row of
results/NAME.json as soon as they are there, with the time they took and what made them. `tables`
turns rows into lines of Markdown. A task whose row is in the file is not measured again.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts: tasks share the processor's cores
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import hashlib
import json
import platform
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import shortcut as sc
import toy_2d

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate")

# ------------------------------------------------------------------------------- tasks and results


class Task(NamedTuple):
    """Calls measure(length=..., **settings), which returns a dict that JSON can hold.

    after: an earlier part, of one task; what that found is given as the argument `given`.
    """

    measure: Callable[..., dict]
    settings: dict
    after: str | None = None


@dataclass(frozen=True)
class Row:
    """What one task found, when `length` times the full trainings were done."""

    part: str
    settings: dict
    length: float
    found: dict
    seconds: float
    origin: dict  # see `origin`


def as_kept(found: dict) -> dict:
    """A dict as it is when it comes back from a file, except that whole numbers stay keys."""

    def with_numbers(pairs: list[tuple]) -> dict:
        return {int(key) if key.isdecimal() else key: value for key, value in pairs}

    return json.loads(json.dumps(found), object_pairs_hook=with_numbers)


def origin() -> dict:
    """The machine, the packages' versions and hashes of the repository's files in this process."""
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES if name in sys.modules}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    ours = {ROOT, ROOT / "tests", Path(__file__).parent}
    files = {getattr(module, "__file__", None) for module in [*sys.modules.values()]}
    files = {Path(file) for file in files if file}
    names = sorted(str(file.relative_to(ROOT)) for file in files if file.parent in ours)
    sources = {name: digest(name) for name in names}
    return {"machine": machine, "versions": versions, "sources": sources}


def digest(name: str) -> str:
    """Hash of a file of the repository; empty if there is no such file."""
    path = ROOT / name
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ""


def changed_sources(rows: Sequence[Row]) -> list[str]:
    """Files of the repository that differ from those which made some of these rows."""
    made = {item for row in rows for item in row.origin["sources"].items()}
    return sorted({name for name, was in made if was != digest(name)})


def load(path: Path) -> list[Row]:
    """Rows of a file of results; none if there is no file."""
    if not path.exists():
        return []
    kept = as_kept(json.loads(path.read_text()))
    rows = [Row(**row) for row in kept["rows"]]
    return [replace(row, origin=kept["origins"][row.origin]) for row in rows]


def save(rows: Sequence[Row], path: Path) -> None:
    """One line a row; a reader never sees half of a file."""
    origins = []
    for row in rows:
        if row.origin not in origins:
            origins.append(row.origin)
    kept = [asdict(row) | {"origin": origins.index(row.origin)} for row in rows]
    blocks = []
    for name, items in {"origins": origins, "rows": kept}.items():
        lines = ",\n".join(json.dumps(item) for item in items)
        blocks.append(f'"{name}": [\n{lines}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    part.write_text("{" + ",\n".join(blocks) + "}\n")
    part.replace(path)


def run(task: Task, more: dict) -> tuple[dict, float, dict]:
    """What a task finds, given more arguments; the seconds it takes and its origin."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = as_kept(task.measure(**task.settings, **more))
    return found, time.perf_counter() - started, origin()


def collect(
    tasks: dict[str, list[Task]],
    path: Path | None = None,
    length: float = 1.0,
    jobs: int = 1,
    fresh: bool = False,
) -> list[Row]:
    """Rows of all tasks, in their order: from the file, or measured and added to it.

    fresh: measure all of them again. Without a path nothing is kept.
    """

    def key(part: str, settings: dict) -> str:
        return json.dumps([part, as_kept(settings), length])

    kept = load(path) if path else []
    rows = {json.dumps([row.part, row.settings, row.length]): row for row in kept}
    collected = []
    with ProcessPoolExecutor(jobs) as pool:
        for part, some in tasks.items():
            futures = {}
            for task in some:
                if fresh or key(part, task.settings) not in rows:
                    more = {"length": length}
                    if task.after:
                        more["given"] = where(collected, task.after)[0].found
                    futures[pool.submit(run, task, more)] = task
            for future in as_completed(futures):
                settings = futures[future].settings
                row = Row(part, as_kept(settings), length, *future.result())
                rows[key(part, settings)] = row
                if path:
                    save([*rows.values()], path)
            collected += [rows[key(part, task.settings)] for task in some]
    return collected


def where(rows: Sequence[Row], part: str, **settings) -> list[Row]:
    """The rows of a part that have these settings."""
    some = [row for row in rows if row.part == part]
    return [row for row in some if settings.items() <= row.settings.items()]


def grouped(rows: Sequence[Row], setting: str) -> dict[object, list[Row]]:
    """Rows by the value that they have of a setting."""
    groups = {}
    for row in rows:
        groups.setdefault(row.settings[setting], []).append(row)
    return groups


def column(rows: Sequence[Row], *keys) -> np.ndarray:
    """What each row found at these nested keys."""
    values = []
    for row in rows:
        value = row.found
        for key in keys:
            value = value[key]
        values.append(value)
    return np.array(values)


# ------------------------------------------------------------------------------------ command line


def flags(
    doc: str,
    parts: Sequence[str],
    usual: Sequence[str],
    flows: Sequence[str],
    seeds: int,
    jobs: int | None,
) -> ArgumentParser:
    """The flags of every benchmark. usual: the parts that are measured if no flag says which."""
    parser = ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    if len(parts) > 1:
        add("--parts", nargs="+", choices=parts, default=usual, help="what to measure")
    if flows:
        add("--flows", nargs="+", choices=toy_2d.FLOWS, default=flows, help="2-D data")
    add("--seeds", type=int, default=seeds, help=f"use seeds 0 to this, exclusive ({seeds})")
    add("--first", type=int, help="only the first so many tasks of each part")
    add("--length", type=float, default=1.0, help="scales all trainings (1)")
    add("--jobs", type=int, default=jobs or os.cpu_count(), help="processes of one thread")
    add("--results", type=Path, help="file of the numbers (results/NAME.json; none if --length)")
    add("--fresh", action="store_true", help="measure again what the file has")
    add("--figure", type=Path, help="write the figure, if there is one, to this path")
    return parser


def main(
    script: str,
    doc: str,
    tasks: Callable[[Sequence[str], range], dict[str, list[Task]]],
    tables: Callable[[list[Row]], list[str]],
    flows: Sequence[str] = (),
    seeds: int = 5,
    jobs: int | None = None,
    usual: Sequence[str] | None = None,
    draw: Callable[[list[Row], Path], None] | None = None,
) -> None:
    """Read the flags, measure what is missing, print the tables.

    script, doc: the benchmark's __file__ and docstring. tasks(flows, seeds): tasks by part. usual:
    parts to measure if no flag says which; None: all.
    """
    parts = [*tasks(flows, range(1))]
    args: Namespace = flags(doc, parts, usual or parts, flows, seeds, jobs).parse_args()
    by_part = tasks(args.flows if flows else (), range(args.seeds))
    chosen = {part: by_part[part][: args.first] for part in getattr(args, "parts", parts)}
    path = args.results
    if path is None and args.length == 1:
        path = RESULTS / f"{Path(script).stem}.json"
    rows = collect(chosen, path, args.length, args.jobs, args.fresh)
    changed = changed_sources(rows)
    if changed:
        told = f"some rows are from other versions of {', '.join(changed)}; --fresh: measure again"
        print(told, file=sys.stderr)
    print("\n".join(tables(rows)))
    if args.figure and draw:
        draw(rows, args.figure)


def shortened(count: int, length: float) -> int:
    """Iterations of a training at this length."""
    return max(2, round(count * length))


# ---------------------------------------------------------------------------- statistics and tables

T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # for 2, 3, ... values


def interval(values) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; nan for one value. At most 10 values."""
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return float(values[0]), float("nan")
    half = T_975[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def mean_text(values, digits: int = 3, factor: float = 1.0) -> str:
    """Mean and half of the interval as text, for instance "4.2 ± 1.8"; no values: empty."""
    if len(values) == 0:
        return ""
    mean, half = interval(np.asarray(values, dtype=float) * factor)
    return f"{mean:.{digits}f}" if np.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def energy_text(values) -> str:
    """Energy distances x 1e-4."""
    return mean_text(values, digits=1, factor=1e4)


def ratio_text(a, b) -> str:
    """Geometric mean of the ratio a / b, paired, with its 95 % interval."""
    mean, half = interval(np.log(np.maximum(a, 1e-6)) - np.log(np.maximum(b, 1e-6)))
    if np.isnan(half):
        return f"{np.exp(mean):.2f}"
    return f"{np.exp(mean):.2f} [{np.exp(mean - half):.2f}, {np.exp(mean + half):.2f}]"


def table(head: Sequence, rows: Sequence[Sequence]) -> list[str]:
    """Lines of a Markdown table, an empty one before and after."""
    lines = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(map(str, cells)) + " |" for cells in lines), ""]


# ----------------------------------------------------------------------------------- the 2-D flows

TEACHER_ITERATIONS = 2000
BATCH = 512  # of the students


class FlowMeasure:
    """The noise and data on which all networks of one flow and seed are measured.

    Networks of very short trainings, as in a test, are measured on fewer points.
    """

    def __init__(self, flow: str, seed: int, length: float):
        generator = torch.Generator().manual_seed(20_000 + seed)
        points = 16_384 if length >= 0.1 else 1_024
        self.data = toy_2d.FLOWS[flow]
        self.reference = self.data(2 * points, generator)
        self.noise = torch.randn(points, 2, generator=generator)
        self.validation = torch.randn(256, 2, generator=generator)
        self.pool = self.data(10, generator)  # of few-shot training
        self.floor = toy_2d.sampling_error(self.data, points, self.reference, generator)

    def error(self, velocity, steps: int, shift: float = 1.0) -> float:
        """Unbiased energy distance of Euler samples to fresh data."""
        return toy_2d.energy_distance(
            toy_2d.sample(velocity, self.noise, steps, shift), self.reference
        )

    def calibrated(self, teacher, student, steps: int, shift: float = 1.0) -> dict[str, float]:
        """The scale that `calibrate` finds without data, and the error there."""
        scale = toy_2d.calibrate(teacher, student, self.validation, steps, shift)
        return {"scale": scale, "error": self.scaled_error(teacher, student, scale, steps, shift)}

    def scaled_error(self, teacher, student, scale, steps: int, shift: float = 1.0) -> float:
        return self.error(toy_2d.scaled(teacher, student, scale), steps, shift)

    def teacher_path(self, teacher, steps: int, shift: float = 1.0) -> sc.TeacherPath:
        return sc.teacher_path(teacher, self.validation, sc.time_grid(steps, shift))


@cache
def train_teacher(flow: str, seed: int, length: float) -> nn.Module:
    """The toy's teacher; each process trains it once."""
    count = shortened(TEACHER_ITERATIONS, length)
    return toy_2d.train_teacher(toy_2d.FLOWS[flow], count, seed)


def paper(teacher_ratio: float = 0.4, shift: float = 1.0, **more) -> sc.ShortcutConfig:
    """The paper's windows, at one shift."""
    return sc.ShortcutConfig(teacher_ratio=teacher_ratio, shift_range=(shift, shift), **more)


def matched(steps: int = 3, shift: float = 1.0, **more) -> sc.MatchedConfig:
    """Matched windows, at one shift."""
    return sc.MatchedConfig(steps=steps, shift_range=(shift, shift), **more)


def network_calls(config: sc.ShortcutConfig | sc.MatchedConfig, fuse: bool = False) -> float:
    """Calls of the network for a row in one iteration, on average.

    3 for the student: a forward pass and a backward pass, which counts as two. The paper's windows
    (dual): two velocities. Matched: two calls of the teacher for each midpoint step, one of the
    EMA. Fusion has data instead of the teacher, and then a row of data needs no call of the EMA.
    """
    is_matched = isinstance(config, sc.MatchedConfig)
    if fuse:
        return 3 + (1 if is_matched else 2 * (1 - config.teacher_ratio))
    return 3 + (2 * config.midpoint_steps + 1 if is_matched else 2)


@torch.no_grad()
def mean_velocity(
    teacher, x: Tensor, t: Tensor, t_end: Tensor, calls: int, euler: bool = False, **cond
) -> Tensor:
    """The teacher's mean velocity from x (B, ...) at t down to t_end (B,), in so many calls.

    By midpoint steps, of two calls each, or by Euler steps.
    """
    steps = calls if euler else calls // 2
    per_row = (-1, *[1] * (x.ndim - 1))
    step = (t - t_end) / steps
    x_end = x
    for i in range(steps):
        t_i = t - i * step
        v = teacher(x_end, t_i, **cond)
        if not euler:
            x_half = x_end - step.reshape(per_row) / 2 * v
            v = teacher(x_half, t_i - step / 2, **cond)
        x_end = x_end - step.reshape(per_row) * v
    return (x - x_end) / (t - t_end).reshape(per_row)


def direct_loss(
    config: sc.MatchedConfig,
    calls: int,
    teacher,
    student,
    x_0,
    noise,
    generator,
    euler: bool = False,
    **cond,
) -> Tensor:
    """Direct regression on the teacher's mean velocity over the sampler's step, from any time.

    No EMA: this is the end of matched windows at which the teacher covers the whole step, done with
    more calls of the teacher.
    """
    windows = sc.matched_windows(config, len(x_0), generator=generator)
    t_end = config.after(windows.t, 1)
    x_t = sc.interpolate(x_0, noise, windows.t)
    target = mean_velocity(teacher, x_t, windows.t, t_end, calls, euler, **cond)
    return (student(x_t, windows.t, **cond) - target).square().mean()
