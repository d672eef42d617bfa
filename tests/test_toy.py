"""The toy: its metric, its scale, its whole command, and the benchmarks beside it."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import shortcut as sc
import toy_2d

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair():
    """A teacher and a student, half a minute too young to be good but clearly better at 3 steps."""
    teacher = toy_2d.train_teacher(toy_2d.moons, 400, seed=0)
    config = sc.ShortcutConfig.for_steps(3, 1.0, fast_decay=0.9, slow_decay=0.95)
    kept = toy_2d.train_student(teacher, toy_2d.moons, config, 300, 0, snapshots={100})
    assert sorted(kept) == [100, 300]
    return teacher, kept[300]


@pytest.mark.parametrize("grows", [True, False])
def test_memory_of_both_averages_grows_with_the_run_or_is_constant(grows, monkeypatch):
    seen, real = [], sc.update_ema
    monkeypatch.setattr(sc, "update_ema", lambda *a: seen.append(a[2:]) or real(*a))
    teacher, config = toy_2d.VelocityMLP().requires_grad_(False), sc.ShortcutConfig.for_steps(3)
    toy_2d.train_student(teacher, toy_2d.moons, config, 3, 0, batch=8, ema_warmup=grows)
    at = (1, 2, 3) if grows else [math.inf] * 3
    assert seen == [(decay, i) for i in at for decay in (config.fast_decay, config.slow_decay)]


@pytest.mark.parametrize("flow", toy_2d.FLOWS.values(), ids=toy_2d.FLOWS)
def test_flows_are_centred_spread_like_noise_and_repeatable(flow):
    x = flow(20_000, seeded())
    assert x.shape == (20_000, 2) and x.dtype == torch.float32
    assert_close(x.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    assert ((x.std(0) > 0.6) & (x.std(0) < 1.5)).all()
    assert torch.equal(x, flow(20_000, seeded()))


def test_few_shot_data_are_the_points_of_the_pool():
    pool = toy_2d.moons(10, seeded())
    drawn = toy_2d.draw_from(pool)(500, seeded(1))
    assert {tuple(x) for x in drawn.tolist()} == {tuple(x) for x in pool.tolist()}


def test_energy_distance_is_the_direct_sum():
    x, y = toy_2d.moons(700, seeded()), toy_2d.spirals(900, seeded(1))
    distance = lambda a, b: torch.cdist(a.double(), b.double())  # noqa: E731
    cross = distance(x, y).mean()
    within = [distance(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    exact = (2 * cross - sum(within)).item()
    assert_close(toy_2d.energy_distance(x, y), exact, rtol=0.01, atol=0)
    assert_close(toy_2d.energy_distance(x, y, directions=256), exact, rtol=1e-4, atol=0)


def test_energy_distance_is_unbiased():
    """Between two draws of one law it is 0 on average, on both sides of 0."""
    g = seeded()
    values = [toy_2d.energy_distance(*(toy_2d.moons(100, g) for _ in "xy")) for _ in range(300)]
    values = torch.tensor(values)
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    assert (values < 0).float().mean() > 0.3


def test_scale_0_is_the_teacher_and_1_the_student_to_the_bit(pair):
    teacher, student = pair
    for scale, same in ((0.0, teacher), (1.0, student)):
        net = toy_2d.scaled(teacher, student, scale)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters()))
    double = toy_2d.scaled(teacher, student, 2.0)
    for w, a, b in zip(double.parameters(), teacher.parameters(), student.parameters()):
        assert_close(w, 2 * b - a)


def test_student_beats_its_teacher_at_three_steps_and_follows_its_paths(pair):
    noise, data = torch.randn(4096, 2, generator=seeded(2)), toy_2d.moons(4096, seeded(3))
    fine = toy_2d.sample(pair[0], noise, 64)
    three = {net: toy_2d.sample(net, noise, 3) for net in pair}
    floor = toy_2d.energy_distance(fine, data)
    errors = [toy_2d.energy_distance(three[net], data) - floor for net in pair]
    assert errors[1] < errors[0] / 4
    distances = [(three[net] - fine).square().mean().sqrt() for net in pair]
    assert distances[1] < distances[0] / 2


def test_calibration_is_near_the_closed_form_and_uses_no_data(pair):
    teacher, student = pair
    noise = torch.randn(256, 2, generator=seeded())
    lams = [sc.optimal_scale(student, teacher, noise, sc.time_grid(n)).item() for n in (2, 3, 8)]
    scales = [toy_2d.calibrate(teacher, student, noise, n) for n in (2, 3, 8)]
    assert scales[0] > scales[1] > scales[2] > 0
    for scale, lam in zip(scales, lams):
        assert lam / 1.61 < scale < 1.61 * lam
    assert toy_2d.calibrate(teacher, teacher, noise, 3) <= 16  # untrained: lam* is inf, capped


def test_sampling_in_chunks_changes_nothing(pair):
    noise = torch.randn(5000, 2, generator=seeded())
    whole = sc.euler_sample(pair[0], noise, sc.time_grid(3, 3.0))
    assert_close(toy_2d.sample(pair[0], noise, 3, 3.0), whole, atol=1e-5, rtol=1e-5)


def test_trajectory_ends_where_the_sampler_does(pair):
    noise = torch.randn(10, 2, generator=seeded())
    states = toy_2d.trajectory(pair[0], noise, 4, 2.0)
    assert states.shape == (5, 10, 2) and torch.equal(states[0], noise)
    assert_close(states[-1], toy_2d.sample(pair[0], noise, 4, 2.0))


FILES = {"samples.png", "paths.png", "progress.png", "quality.png", "results.json"}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--animate"], marks=pytest.mark.slow),
        ["--paper", "--flow", "spirals"],
        ["--fusion", "--flow", "gaussians"],
        ["--few-shot", "10", "--student-steps", "5", "--shift", "3", "--flow", "checkerboard"],
    ],
    ids=" ".join,
)
def test_command_writes_every_file(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_2d, "POINTS", 512)
    out = tmp_path / "new" / "folder"
    toy_2d.main(["--iterations", "12", "--out", str(out), *flags])
    files = FILES | ({"flow.gif"} if "--animate" in flags else set())
    assert {path.name for path in out.iterdir()} == files
    assert all(path.stat().st_size > 1000 for path in out.iterdir())
    results = json.loads((out / "results.json").read_text())
    fused = "--fusion" in flags
    names = ["flow matching", "fused"] if fused else ["teacher", "student", "student, scaled"]
    assert list(results["energy"]) == list(results["rms"]) == names
    steps = [str(n) for n in sorted({*toy_2d.STEPS, 5 if "5" in flags else 3})]
    assert all(list(row) == steps for row in results["energy"].values())
    assert list(results["scales"]) == ([] if fused else steps)
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(f"  {name} ") == 2
    assert f"{1e4 * results['energy'][names[1]]['3']:9.1f}" in printed


def test_same_seed_same_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_2d, "POINTS", 512)
    tables = []
    for seed in ("0", "0", "1"):
        toy_2d.main(["--iterations", "15", "--out", str(tmp_path), "--seed", seed])
        tables.append(capsys.readouterr().out.splitlines()[:-1])
    assert tables[0] == tables[1] != tables[2]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--flow", "swissroll"], "invalid choice: 'swissroll'"),
        (["--student-steps", "40"], "--student-steps 40 must be between 1 and 16"),
        (["--shift", "-1"], "--shift -1 must be between 0.001 and 1000"),
        (["--fusion", "--paper"], "--fusion"),
        (["--fusion", "--few-shot", "3"], "--fusion"),
        (["--iterations", "0"], "--iterations"),
        (["--paper", "--student-steps", "0"], "--student-steps"),
        (["--out", __file__], "File exists"),
        (["--few-shot", "-2"], "--few-shot"),
    ],
)
def test_wrong_flags_end_with_a_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        toy_2d.main(flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


# -------------------------------------------------------------------------------------- benchmarks


def test_ablations_base_target_is_the_shipped_one(pair):
    import ablations

    teacher, student = pair
    for shift in (1.0, 3.0):
        config, g = sc.ShortcutConfig.for_steps(3, shift), seeded()
        windows = sc.sample_windows(config, 256, generator=g)
        x_0, noise = toy_2d.moons(256, g), torch.randn(256, 2, generator=g)
        base = ablations.VARIANTS[0]
        x_t, target = ablations.target_of(
            base, config, windows, x_0, noise, teacher, student, student
        )
        loss, _ = sc.shortcut_loss(
            config, windows, x_0, noise,
            student=student, fast=student, slow=student, teacher=teacher,
        )  # fmt: skip
        assert_close((student(x_t, windows.t) - target).square().mean(), loss, rtol=1e-4, atol=0)


def test_equal_halves_have_the_wanted_lookahead_and_next_stops_are_the_samplers():
    import ablations

    config, means = sc.ShortcutConfig.for_steps(3, 1.0), []
    t, t_mid, t_end, k = ablations.equal_halves(config, 200_000, seeded())
    assert abs(k / 200_000 - 0.467) < 1e-3
    assert_close(t - t_mid, t_mid - t_end, atol=1e-6, rtol=0)
    for start in (27, 29, 32):  # each row's target, if the student looks 1/6 ahead everywhere
        rows = (32 * t).round() == start
        ahead = (1 / 6 + (1 / 6 + t - t_mid)) / 2
        ahead[:k] = ((1 / 6 + t - t_mid) / 2)[:k]
        means.append(ahead[rows].mean())
    assert_close(torch.stack(means), torch.full((3,), 1 / 6), atol=2e-3, rtol=0)
    t, t_mid, t_end, k = ablations.next_stop(config, 1000, seeded())
    assert_close(t_end, ((t * 3 - 1e-4).ceil() - 1) / 3, atol=1e-6, rtol=0)
    assert (t > t_mid).all() and (t_mid >= t_end).all()


def test_authors_windows_are_aligned_merges_up_to_the_full_path():
    import ablations

    config = sc.ShortcutConfig(shift_range=(1, 1))
    t, t_mid, t_end, k = ablations.authors_windows(config, 4000, seeded())
    stride = (32 * (t - t_mid))[k:].round()
    assert set(stride.tolist()) == {2.0, 4.0, 8.0, 16.0}
    assert_close(((32 * t_end)[k:] / (2 * stride)).frac(), torch.zeros(4000 - k))
    assert (t <= 1).all() and (t_end >= 0).all()


def test_benchmark_verdicts():
    import toy as bench

    mean, half = bench.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert_close(half, 4.30 / 3**0.5)
    assert bench.verdict([1e-3], [2e-3], [1e-5]) == "yes"
    assert bench.verdict([2e-3], [1e-3], [1e-5]) == "no"
    assert bench.verdict([2e-4], [1e-4], [1e-4]) == "both at the floor"


def test_readme_links_hit_their_lines():
    """[`name`](shortcut.py#L12): line 12 defines that name. Tests that it names exist."""
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) == readme.count(".py#L") >= 12
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), (name, line, text)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", readme))
    assert len(named) >= 12
    assert all(f"def {name}(" in tests for name in named)


def test_readme_snippet_trains_a_network_of_ones_own():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, t, label):
            return self.layer(torch.cat([x, t[:, None]], 1)) * label[:, None]

    snippet = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    student, fast, slow, teacher = (Net() for _ in range(4))
    before = [w.clone() for net in (student, fast, slow) for w in net.parameters()]
    scope = dict(torch=torch, student=student, fast=fast, slow=slow, teacher=teacher)
    scope |= dict(x_0=torch.randn(8, 3), label=torch.ones(8), iteration=1)
    scope["optimizer"] = torch.optim.Adam(student.parameters())
    for net in (fast, slow, teacher):
        net.requires_grad_(False)
    exec(snippet, scope)
    assert scope["loss"].isfinite() and scope["log"]["residual"] > 0
    after = [w for net in (student, fast, slow) for w in net.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


def test_readme_has_the_commands_that_ci_runs():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    commands = [line for line in ci.splitlines() if "pytest" in line or "install" in line]
    assert commands
    assert all(command in readme for command in commands)
