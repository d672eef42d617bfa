"""The benchmarks: what they share, what each defines for itself, and that all still run."""

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import flux_distill as fd
import shortcut as sc
import toy_2d

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import ablations
import baselines
import common
import common_flux
import iterations
import klein
import lookahead
import quality
import report
import toy

FOLDER = Path(__file__).parent / "benchmarks"
ONE = "--seeds 1 --jobs 1"
RUNS = [  # script, flags that shorten it, words that its tables must have
    ("toy", f"--flows moons --length 0.005 {ONE}", "ten points, each draw"),
    ("ablations", f"--flows moons --length 0.005 {ONE}", "oracle, shift 3"),
    ("baselines", f"--parts flows --flows moons --length 0.005 {ONE}", "8 teacher calls"),
    ("baselines", f"--parts direct --flows moons --length 0.002 {ONE}", "3 | a tenth | 4 |"),
    ("baselines", f"--parts tune_direct --length 0.002 {ONE}", "3 | a tenth | direct, 16 calls |"),
    ("fusion", f"--parts flows --flows moons --length 0.002 {ONE}", "plain flow matching"),
    ("guidance", f"--length 0.005 --first 1 {ONE}", "warm start of 30%"),
]
SLOW_RUNS = [  # more than 10 s
    ("baselines", f"--parts tune --first 40 --length 0.005 {ONE}", "finest 64"),
    ("baselines", f"--parts flux --length 0.01 {ONE}", "8 teacher calls"),
    ("baselines", f"--parts tune_flux --first 1 --length 0.01 {ONE}", "calls 4, rate"),
    (
        "iterations",
        f"--parts flows tune --flows moons --length 0.005 --first 14 {ONE}",
        "moons: mean",
    ),
    ("iterations", f"--parts flux --length 0.01 {ONE}", "the paper's least error, scaled"),
    (
        "lookahead",
        f"--parts table students why scales --first 6 --length 0.005 --figure figure.png {ONE}",
        "targets on the path",
    ),
    ("lookahead", f"--parts flux --first 1 --length 0.005 {ONE}", "in time"),
    ("fusion", f"--parts flux --length 0.002 {ONE}", "tiny Flux"),
    ("flux", f"--parts 'all pairs' 'ten pairs' --length 0.01 {ONE}", "lam: all pairs"),
    ("klein", f"--parts klein longer blocks --length 0.01 {ONE}", "the guided teacher's in 8"),
    ("klein", f"--parts curve --length 0.002 {ONE}", "student, 1,600 iterations"),
    ("quality", f"--length 0.01 --figure figure.png {ONE}", "UniPC"),
    ("speed", f"--parts small --length 0.5 {ONE}", "the latents of one image"),
    ("fewshot", f"--first 1 --length 0.01 {ONE}", "ratio, strangers"),
    ("oracle", f"--length 0.005 {ONE}", "held out, too"),
    ("readme", f"--length 0.02 {ONE}", "matched, scaled"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(name: str, flags: str, folder: Path) -> str:
    """What a script prints; on a CPU, and as a notebook's terminal would start it."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    call = [sys.executable, FOLDER / f"{name}.py", *shlex.split(flags)]
    done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(name: str, flags: str, words: str, folder: Path) -> None:
    """It prints its tables and keeps its numbers."""
    printed = run(name, f"{flags} --results numbers.json", folder)
    assert words in printed and "| --- |" in printed
    assert "nan" not in printed
    assert common.load(folder / "numbers.json")
    assert ("--figure" in flags) == (folder / "figure.png").exists()


@pytest.mark.parametrize("name, flags, words", RUNS)
def test_a_benchmark_prints_its_tables(name, flags, words, tmp_path):
    check(name, flags, words, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, flags, words", SLOW_RUNS)
def test_a_longer_benchmark_prints_its_tables(name, flags, words, tmp_path):
    check(name, flags, words, tmp_path)


def test_every_benchmark_runs():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"common", "common_flux", "report"}
    scripts.remove("gpu")  # test_speed.py runs it: it has other flags
    assert scripts == {name for name, *_ in RUNS + SLOW_RUNS}


# ----------------------------------------------------------------------------------------- results


def count_calls(file: str, value: float, length: float) -> dict:
    with open(file, "a") as log:
        log.write("x")
    return {"value": value * length, "by steps": {3: value}}


def tasks_of(file: Path, values) -> dict[str, list[common.Task]]:
    return {"part": [common.Task(count_calls, {"file": str(file), "value": v}) for v in values]}


def test_rows_are_measured_once_and_in_the_order_of_their_tasks(tmp_path):
    log, path = tmp_path / "log", tmp_path / "results.json"
    first = common.collect(tasks_of(log, [2.0]), path)
    rows = common.collect(tasks_of(log, [1.0, 2.0, 3.0]), path)
    assert [row.found["value"] for row in rows] == [1.0, 2.0, 3.0]
    assert rows[1] == first[0] and log.read_text() == "x" * 3
    assert sorted(row.found["value"] for row in common.load(path)) == [1.0, 2.0, 3.0]


def test_rows_of_another_length_are_others_and_fresh_measures_again(tmp_path):
    log, path = tmp_path / "log", tmp_path / "results.json"
    common.collect(tasks_of(log, [1.0]), path)
    short = common.collect(tasks_of(log, [1.0]), path, length=0.5)
    assert short[0].found["value"] == 0.5 and len(common.load(path)) == 2
    common.collect(tasks_of(log, [1.0]), path, fresh=True)
    assert len(log.read_text()) == 3 and len(common.load(path)) == 2


def test_results_say_what_made_them_and_what_has_changed_since(tmp_path):
    path = tmp_path / "results.json"
    rows = common.collect(tasks_of(tmp_path / "log", [1.0]), path)
    assert rows == common.load(path)
    assert rows[0].seconds > 0 and rows[0].found["by steps"] == {3: 1.0}
    made = rows[0].origin
    assert made["versions"]["torch"] == torch.__version__ and "cores" in made["machine"]
    assert {"shortcut.py", "toy_2d.py", "tests/benchmarks/common.py"} <= made["sources"].keys()
    assert not any("site-packages" in name for name in made["sources"])
    assert common.changed_sources(rows) == []
    kept = json.loads(path.read_text())
    kept["origins"][0]["sources"]["toy_2d.py"] = "another"
    path.write_text(json.dumps(kept))
    assert common.changed_sources(common.load(path)) == ["toy_2d.py"]


def test_interval_is_students_t_and_ratio_is_geometric():
    mean, half = common.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert_close(half, 4.30 / 3**0.5)
    assert math.isnan(common.interval([1.0])[1])
    with pytest.raises(IndexError):
        common.interval([1.0] * 11)  # not in the table of t
    assert common.mean_text([1.0, 2.0, 3.0], 1) == "2.0 ± 2.5"
    assert common.mean_text([1.0], 2) == "1.00" and common.mean_text([]) == ""
    assert common.ratio_text([1.0, 4.0], [2.0, 2.0]).startswith("1.00 [")


def test_network_calls_are_those_that_a_training_makes():
    """The student's two calls for backward besides."""
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return torch.zeros_like(x).requires_grad_()

    x_0 = torch.zeros(1000, 2)
    made = {}
    for config in (common.paper(), common.matched(), common.matched(1, 3.0)):
        for fuse in (False, True):
            calls.clear()
            matched = isinstance(config, sc.MatchedConfig)
            draw = sc.matched_windows if matched else sc.sample_windows
            windows = draw(config, 1000, fuse=fuse, generator=seeded())
            if fuse:
                velocities = sc.matched_fusion if matched else sc.fusion
                first, second = velocities(windows, x_0, x_0, counted)
            elif matched:
                first, second = sc.matched(windows, counted, counted)
            else:
                first, second = sc.dual(windows, counted, counted, counted)
            sc.shortcut_loss(windows, x_0, x_0, counted, first, second)
            made[config, fuse] = 2 + sum(calls) / 1000
    for (config, fuse), number in made.items():
        assert abs(common.network_calls(config, fuse) - number) < 0.002


def test_the_errors_of_a_velocity_are_measured_at_the_start_of_each_step():
    """v = t on a path whose mean velocities are 0.5 and 0: off by 0.5 at t = 1, 0.4 at 0.4."""
    x = torch.zeros(2, 3, 1)
    mean = torch.tensor([0.5, 0.0])[:, None, None].expand(2, 3, 1)
    path = sc.TeacherPath(torch.tensor([1.0, 0.4, 0.0]), x, x, mean)
    judge = SimpleNamespace(cond={})
    errors = klein.step_errors(lambda x, t: t[:, None].expand_as(x), path, judge)
    assert errors == pytest.approx([0.5, 0.4])


def test_mean_velocity_by_midpoint_steps_is_of_second_order_by_euler_steps_of_first():
    t, t_end = torch.tensor([1.0, 0.7]), torch.tensor([0.4, 0.1])
    x = torch.tensor([[1.0], [2.0]])
    linear = common.mean_velocity(lambda x, t: t[:, None].expand_as(x), x, t, t_end, calls=2)
    assert_close(linear, ((t + t_end) / 2)[:, None])
    exact = x * (1 - torch.exp(-(t - t_end)))[:, None] / (t - t_end)[:, None]  # x' = x
    errors = []
    for calls in (4, 8):
        found = common.mean_velocity(lambda x, t: x, x, t, t_end, calls)
        errors.append((found - exact).abs().max())
    assert errors[0] < 0.3**2 / 6 * x.max()  # h^2 / 6 |v''|, steps of 0.3
    assert 3.5 < errors[0] / errors[1] < 4.5
    errors = []
    for calls in (8, 16):
        found = common.mean_velocity(lambda x, t: x, x, t, t_end, calls, euler=True)
        errors.append((found - exact).abs().max())
    assert 1.9 < errors[0] / errors[1] < 2.1


# ---------------------------------------------------------------------------------------- the page


def test_the_page_is_what_its_numbers_say():
    """It is not written by hand: python tests/benchmarks/report.py"""
    _, rendered, _ = report.split(report.PAGE.read_text())
    assert rendered == report.render()


def test_a_changed_number_changes_the_page(monkeypatch, tmp_path):
    text = (common.RESULTS / "gpu.json").read_text()
    assert "32.9" in report.render() and "56789.1" not in report.render()
    changed = text.replace('"gib": 32.', '"gib": 56789.1, "was": 32.', 1)
    (tmp_path / "gpu.json").write_text(changed)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert "56789.1" in report.render()


# ------------------------------------------------------------------------------ definitions of each


@pytest.fixture(scope="module")
def teacher():
    return toy_2d.train_teacher(toy_2d.moons, 100, seed=0)


def variant(name: str) -> ablations.Variant:
    return next(some for some in ablations.VARIANTS if some.name == name)


@pytest.mark.parametrize(
    "name", ["**as shipped**: matched windows, shift 1", "paper windows, rho 0.4 (the paper)"]
)
def test_ablations_train_as_toy_2d_does(name, teacher):
    """To the bit, where nothing is changed."""
    base = variant(name)
    student = ablations.train(base, teacher, toy_2d.moons, 5, seed=3)
    expected = toy_2d.distil(teacher, toy_2d.moons, base.config, 5, seed=3)[5]
    for a, b in zip(student.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_variant_changes_the_student(teacher):
    """But for a bound on the EMA's decay that so short a run does not reach."""
    students = {}
    for one in ablations.VARIANTS:
        student = ablations.train(one, teacher, toy_2d.moons, 4, seed=0)
        students[one.name] = torch.cat([w.flatten() for w in student.parameters()])
    for a, b in itertools.combinations(students, 2):
        if b != "EMA decay at most 0.99":
            assert not torch.equal(students[a], students[b]), (a, b)


def lookahead_of(windows: sc.Windows, first, L) -> torch.Tensor:
    """Of the target of each row, by (A), if the student looks ahead by L."""
    t, t_mid, t_end = (time.double() for time in windows[:3])
    w = (t - t_mid) / (t - t_end)
    return w * first + (1 - w) * (t - t_mid + L(t_mid))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_grid_step_has_the_required_lookahead(shift):
    config = common.matched(3, shift)
    windows = ablations.one_grid_step(config, 2000, seeded())
    u, u_mid = (sc.shift_time(t, 1 / shift) for t in windows[:2])
    assert_close(u - u_mid, u.clamp(max=1 / 32), atol=1e-5, rtol=0)
    found = lookahead_of(windows, 0.0, config.lookahead)
    assert_close(found, config.lookahead(windows.t.double()), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equal_halves_have_the_required_lookahead_on_average(shift):
    config = common.paper(0.4, shift)
    windows = ablations.equal_halves(config, 400_000, seeded())
    k = windows.teacher_rows
    if shift == 1:
        assert abs(k / 400_000 - 0.467) < 1e-3  # over all starts
    u, u_mid, u_end = (sc.shift_time(t.double(), 1 / shift) for t in windows[:3])
    assert_close(u - u_mid, u_mid - u_end, atol=1e-5, rtol=0)
    required = common.matched(3, shift).lookahead
    of_teacher_rows = lookahead_of(windows, 0.0, required)[:k]
    of_self_rows = lookahead_of(windows, required(windows.t.double()), required)[k:]
    ahead = torch.cat([of_teacher_rows, of_self_rows])
    for start in (16, 24, 32):
        rows = (32 * u).round() == start
        goal = required(windows.t[rows].double())
        assert_close(ahead[rows].mean(), goal.mean(), atol=1e-3, rtol=0.01)


def test_windows_to_the_next_stop_end_there():
    windows = ablations.to_next_stop(common.matched(3), 1000, seeded())
    t, t_mid, t_end = windows[:3]
    assert_close(t_end, ((t * 3 - 1e-4).ceil() - 1) / 3, atol=1e-6, rtol=0)
    assert (t > t_mid).all() and (t_mid >= t_end).all()


def test_authors_windows_are_aligned_merges_up_to_the_full_path():
    t, t_mid, t_end, k, *_ = ablations.authors_windows(common.paper(), 4000, seeded())
    stride = (32 * (t - t_mid))[k:].round()
    assert set(stride.tolist()) == {2.0, 4.0, 8.0, 16.0}
    assert_close(((32 * t_end)[k:] / (2 * stride)).frac(), torch.zeros(4000 - k))
    assert (t <= 1).all() and (t_end >= 0).all()


def test_targets_that_are_pointwise_or_plain_means():
    config, x = common.paper(0.5, 3.0), torch.ones(200, 1)
    first, second = (lambda x, t: x), (lambda x, t: 10 * torch.ones_like(x))
    windows = ablations.plain_mean(config, 200, seeded())
    assert_close(sc.shortcut_target(windows, x, first, second), 5.5 * x)
    windows = ablations.pointwise(config, 200, seeded())
    target = sc.shortcut_target(windows, x, first, second)
    k = windows.teacher_rows
    assert_close(target[:k], x[:k])
    assert (target[k:] > 2).all()


def test_shortcut_model_starts_as_its_teacher_at_any_step(teacher):
    x, t, d = torch.randn(50, 2, generator=seeded()), torch.rand(50), torch.rand(50)
    assert_close(baselines.StepMLP(teacher)(x, t, d), teacher(x, t))


def test_budgets_of_the_rivals():
    assert sum(count for _, count in baselines.rungs((24, 12, 6, 3), 700, 2.0)) == 700
    assert baselines.rungs((24, 12, 6, 3), 700, 2.0) == [(12, 100), (6, 200), (3, 400)]
    k, count = baselines.step_size_rows(1e6, 100, 0.25, True)
    assert k == 25 and abs(count * (25 * 4 + 75 * 5) - 1e6) < 500


class CountedMLP(toy_2d.VelocityMLP):
    """Notes what its calls cost; copies note it in the same list."""

    rows: list[int]

    def __deepcopy__(self, memo):
        copied = CountedMLP()
        copied.rows = self.rows
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, x, t):
        with_backward = torch.is_grad_enabled() and next(self.parameters()).requires_grad
        self.rows.append((3 if with_backward else 1) * len(x))
        return super().forward(x, t)


@pytest.mark.parametrize("method", baselines.COMPARED)
def test_ours_and_direct_regression_make_as_many_calls(method):
    teacher = CountedMLP().requires_grad_(False)
    teacher.rows = []
    how = dict(steps=3, shift=1.0, rate=2e-3)
    baselines.student_of(method, teacher, toy_2d.moons, 0, length=0.1, **how)
    assert abs(sum(teacher.rows) / (100 * common.BATCH * 6) - 1) < 0.02


def test_every_choice_of_direct_regression_changes_the_student(teacher):
    base = dict(calls=4, rate=2e-3, euler=False, steps=3, shift=1.0)
    changes = [{}, {"calls": 2}, {"rate": 4e-3}, {"euler": True}, {"steps": 2}, {"shift": 3.0}]
    students = []
    for change in changes:
        how = base | change
        budget = 2 * common.BATCH * (3 + how["calls"])  # of two iterations
        student = baselines.direct(teacher, toy_2d.moons, budget, 0, **how)
        students.append(torch.cat([w.flatten() for w in student.parameters()]))
    for a, b in itertools.combinations(students, 2):
        assert not torch.equal(a, b)


def test_ours_is_compared_at_its_tuned_rate_steps_and_shift(monkeypatch):
    rates = {(3.0, "full budget"): {"ours": 4e-3}, (3.0, "a tenth"): {"ours": 1e-3}}
    monkeypatch.setattr(baselines, "TUNED", rates)
    found = baselines.measure_direct("moons", 1, 3.0, 2, length=0.04)
    on = common.FlowMeasure("moons", 1, 0.04)
    teacher = common.train_teacher("moons", 1, 0.04)
    config = sc.MatchedConfig(2, shift_range=(3.0, 3.0))
    for budget, rate, count in [("full budget", 4e-3, 40), ("a tenth", 1e-3, 4)]:
        recipe = toy_2d.Recipe(batch=512, rate=rate, warmup=1)
        student = toy_2d.distil(teacher, on.data, config, count, 1, recipe=recipe)[count]
        assert found["errors"][budget] == {"ours": on.error(student, 2, 3.0)}


def test_rates_of_direct_regression_are_those_that_the_tuning_found():
    rows = common.load(common.RESULTS / "baselines.json")
    for (shift, budget), rates in baselines.TUNED.items():
        assert tuple(rates) == baselines.COMPARED
        for method, rate in rates.items():
            assert baselines.tuned_rate(rows, shift, budget, method) == rate


def test_settings_on_the_tiny_flux_are_those_that_the_tuning_found():
    rows = common.where(common.load(common.RESULTS / "baselines.json"), "tune_flux")
    assert common.grouped(rows, "method").keys() == baselines.FLUX_SETTINGS.keys()
    for method, some in common.grouped(rows, "method").items():
        best = min(some, key=lambda row: row.found["errors"][3])
        assert best.settings["settings"] == common.as_kept(baselines.FLUX_SETTINGS[method][-1])


def test_tables_of_direct_regression_have_errors_and_geometric_means_of_ratios():
    """Rows may come in any order, and of the last seed a flow may be missing."""

    def row(flow: str, seed: int, ours: float, two: float, four: float) -> common.Row:
        errors = dict.fromkeys(baselines.REGRESSIONS, 1.0)
        errors |= {"ours": ours, "direct, 2 calls": two, "direct, 4 calls": four}
        found = {"floor": 1e-4, "errors": dict.fromkeys(baselines.BUDGETS, errors)}
        settings = {"flow": flow, "seed": seed, "shift": 1.0, "steps": 3}
        return common.Row("direct", settings, 1.0, found, 0.0, {})

    rows = [
        row("moons", 0, ours=0.02, two=0.01, four=0.08),
        row("spirals", 0, ours=0.02, two=0.02, four=0.05),
        row("spirals", 1, ours=0.04, two=0.04, four=0.004),
        row("moons", 1, ours=0.01, two=0.005, four=0.04),
        row("moons", 2, ours=0.03, two=0.005, four=0.04),
    ]
    told = baselines.tables(rows)
    assert "**shift 1, a tenth**" in told
    assert "| 3 | ours | 200.0 ± 248.3 | 300.0 ± 1271.0 |" in told
    (ratios,) = [line for line in told if line.startswith("| 1 | full budget | 3 |")]
    cells = ratios.split(" | ")[3:6]  # best is 2 calls on moons, 4 on spirals
    assert cells[0].startswith("2.00 [")
    assert cells[1] == "1.41 [1.41, 1.41]"
    assert cells[2].startswith("0.71 [")


def test_halved_windows_are_steps_of_the_sampler():
    N = torch.tensor([1, 3, 8]).repeat(100)
    t, t_mid, t_end, *_ = baselines.halved(N, seeded())
    assert_close((t * N).frac().minimum(1 - (t * N).frac()), torch.zeros(300), atol=1e-5, rtol=0)
    assert_close((t - t_end) * N, torch.ones(300))
    assert_close(t_mid, (t + t_end) / 2)


@pytest.mark.parametrize(
    "windows, value, shift",
    [("2, 4, 8", 0.3, 1.0), ("1, 2, 4", 0.52, 3.0), ("matched", 3, 1.0), ("matched", 8, 3.0)],
)
def test_predicted_lookahead_is_that_of_the_windows_on_a_table(windows, value, shift):
    config = lookahead.config_of(windows, value, shift)
    expected = torch.tensor(lookahead.predicted_lookahead(config), dtype=torch.float64)
    found = lookahead.lookahead_on_table(config, rows=50_000)
    assert_close(found, expected, atol=0.008, rtol=0)
    if windows == "matched":
        required = config.lookahead(lookahead.grid(config))
        assert_close(expected, required, atol=0.002, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_measured_lookahead_is_that_of_a_velocity_with_a_known_one(shift):
    """The teacher's velocity a distance ahead of t, in a flow where it is linear in t."""
    config = lookahead.config_of("matched", 3, shift)
    direction = torch.randn(64, 2, generator=seeded())
    teacher = lambda x, t: direction * t[:, None]  # noqa: E731
    student = lambda x, t: direction * (0.8 * t[:, None])  # noqa: E731
    found = lookahead.measured_lookahead(student, teacher, direction, config)
    expected = 0.2 * lookahead.grid(config)[1:]
    for name in ("exponential", "uniform"):
        assert_close(torch.tensor(found[name]), expected.float(), atol=2e-3, rtol=0.02)
    assert min(found["explained"]) > 0.99


def test_calls_to_a_level_are_interpolated():
    curve = {"calls": [100, 400, 1600], "scale 1": [8.0, 2.0, 1.0], "scaled": [4.0, 2.0, 1.0]}
    assert_close(iterations.calls_to(curve, "scale 1", 4.0, 7), 200.0)
    assert_close(iterations.calls_to(curve, "scaled", 4.0, 7.0), 107.0)
    assert iterations.calls_to(curve, "scale 1", 0.5, 7) == float("inf")
    column = [[curve], [curve | {"scale 1": [9.0, 9.0, 0.4]}]]
    assert iterations.soonest(column, "scale 1", [2.0], 0) == ([400.0], 0)
    assert iterations.soonest(column, "scale 1", [0.5], 0)[1] == 1
    assert iterations.least_errors(column, "scale 1") == [0.4]


def test_verdicts():
    assert toy.verdict([1e-3], [2e-3], [1e-5]) == "yes"
    assert toy.verdict([2e-3], [1e-3], [1e-5]) == "no"
    assert toy.verdict([2e-4], [1e-4], [1e-4]) == "both at the floor"


# ---------------------------------------------------------------------------------------- tiny Flux


@pytest.mark.parametrize("paper", [False, True], ids=["matched", "paper"])
def test_tiny_flux_is_distilled_as_flux_distill_does(paper, tmp_path):
    """To the bit, for the config that flux_distill.py takes."""
    config = common.paper() if paper else common.matched(3)
    more = ["--batch", 4, "--limit", 4] + ["--paper"] * paper
    settings = common_flux.demonstration(tmp_path, 0, *more, length=0.015)
    assert settings.iterations == 3
    world = common_flux.TinyFlux(settings)
    ours = world.distil(config, 3, snapshots=[2])
    assert sorted(ours) == [2, 3]
    world = common_flux.TinyFlux(settings)
    state = fd.TrainState(world.lora.loaded_weights(), fd.config_of(settings))
    for _ in fd.train(settings, world.cache, world.pool, world.lora, state):
        pass
    assert torch.equal(ours[3], state.student)


def test_solvers_are_of_their_order():
    """On x' = x from t = 1 to 0, where x ends at x / e."""
    x = torch.ones(1, 2, dtype=torch.float64)
    velocity = lambda x, t: x  # noqa: E731
    orders = {"Euler": 1, "midpoint": 2, "Heun": 2, "Adams-Bashforth, order 2": 2}
    for name, order in orders.items():
        errors = []
        for calls in (32, 64):
            end = quality.SOLVERS[name](velocity, x, calls, 1.0)
            errors.append((end - x / math.e).abs().max().item())
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15, (name, errors)


def test_every_solver_makes_as_many_calls_as_it_says_and_nears_the_end():
    x = torch.ones(1, 2)
    for name, solver in quality.SOLVERS.items():
        for calls in (3, 8):
            seen = []
            end = solver(lambda x, t, seen=seen: seen.append(1) or x, x, calls, 1.0)
            assert len(seen) == calls, name
        assert (end - x / math.e).abs().max() < 0.03, name


def test_frechet_distance_of_gaussians():
    eye = torch.eye(3, dtype=torch.float64)
    a = {"mean": torch.zeros(3), "covariance": 4 * eye}
    b = {"mean": torch.tensor([1.0, 2.0, 0.0]), "covariance": 9 * eye}
    assert_close(common_flux.frechet(a, b), 5.0 + 3 * (3 - 2) ** 2, rtol=1e-6, atol=0)
    assert abs(common_flux.frechet(a, a)) < 1e-9
