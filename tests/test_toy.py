"""toy_2d.py: its training against the equations, its measures, its figures, its whole command."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict, fields
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn
from torch.testing import assert_close

import shortcut as sc
import toy_2d

FAST, SLOW, ALONE = 0.3, 0.8, 0.5  # decays that a few iterations tell apart
PAPER = sc.ShortcutConfig(shift_range=(3, 3), fast_decay=FAST, slow_decay=SLOW)
MATCHED = sc.MatchedConfig(3, shift_range=(3, 3), slow_decay=SLOW)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_net(seed=0):
    torch.manual_seed(seed)
    return toy_2d.VelocityMLP().requires_grad_(False)


def weights_of(net):
    return nn.utils.parameters_to_vector(net.parameters())


@pytest.fixture(scope="module")
def pair():
    """A teacher, and a matched student that is young but clearly better at 3 steps."""
    teacher = toy_2d.train_teacher(toy_2d.moons, 400, seed=0)
    config = sc.MatchedConfig(3, shift_range=(1, 1), slow_decay=0.95)
    kept = toy_2d.distil(teacher, toy_2d.moons, config, 300, seed=0, snapshots={100})
    assert list(kept) == [100, 300]
    return teacher, kept[300]


# ---------------------------------------------------------------------------------------- training

BATCH, RATE, WARMUP, ITERATIONS = 16, 0.02, 3, 8


def rate_at(i, warmup, iterations):
    """The learning rate of iteration i = 0, 1, ..., as a fraction of the highest."""
    rise, fall = (i + 1) / warmup, 2 * (iterations - i) / iterations
    return min(rise, fall, 1)


def target_by_hand(windows, x_t, flow_velocity, teacher, fast, slow):
    """Target of a window, from the text of DESIGN's and the paper's equations.

    Without a teacher: fusion, whose one EMA is `slow`.
    """
    t, t_mid, t_end = (time[:, None] for time in windows[:3])
    is_teacher_row = torch.arange(BATCH)[:, None] < windows.teacher_rows
    matched = windows.kind.startswith("matched")
    if teacher is None:
        v_1 = torch.where(is_teacher_row, flow_velocity, slow(x_t, t[:, 0]))
    elif matched:
        half = (t - t_mid) / 2
        v_1 = teacher(x_t - half * teacher(x_t, t[:, 0]), (t - half)[:, 0])
    else:
        v_1 = torch.where(is_teacher_row, teacher(x_t, t[:, 0]), fast(x_t, t[:, 0]))
    x_mid = x_t - (t - t_mid) * v_1
    v_2 = slow(x_mid, t_mid[:, 0])
    if teacher is None and not matched:
        v_2 = torch.where(is_teacher_row, flow_velocity, v_2)
    return ((t - t_mid) * v_1 + (t_mid - t_end) * v_2) / (t - t_end)


def train_by_hand(config, teacher, ema_warmup):
    """Weights of the student after 1, 2, ... iterations, and its data from seed 5."""
    generator = seeded(6)
    torch.manual_seed(5)
    matched, fuse = isinstance(config, sc.MatchedConfig), teacher is None
    student = copy.deepcopy(teacher or toy_2d.VelocityMLP()).requires_grad_(True)
    fast, slow = copy.deepcopy(student), copy.deepcopy(student)
    slow_decay = ALONE if fuse else SLOW
    optimizer = torch.optim.Adam(student.parameters())
    after = []
    for i in range(ITERATIONS):
        x_0 = toy_2d.moons(BATCH, generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        draw = sc.matched_windows if matched else sc.sample_windows
        windows = draw(config, BATCH, fuse=fuse, generator=generator)
        t = windows.t[:, None]
        x_t = (1 - t) * x_0 + t * noise
        with torch.no_grad():
            target = target_by_hand(windows, x_t, noise - x_0, teacher, fast, slow)
        error = student(x_t, windows.t) - target
        optimizer.param_groups[0]["lr"] = RATE * rate_at(i, WARMUP, ITERATIONS)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        for ema, decay in ((fast, FAST), (slow, slow_decay)):
            if ema_warmup:
                decay = min(decay, (i + 1) / (i + 5))
            for average, weight in zip(ema.parameters(), student.parameters()):
                average.data = decay * average.data + (1 - decay) * weight.data
        after.append(weights_of(student).detach().clone())
    return after


@pytest.fixture
def double():
    """Adam turns the last bit of a gradient that is nearly 0 into a step: float32 is too coarse."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("ema_warmup", [True, False], ids=["warmed up", "constant"])
@pytest.mark.parametrize("config", [PAPER, MATCHED], ids=["paper", "matched"])
@pytest.mark.parametrize("fuse", [False, True], ids=["distil", "fuse"])
def test_training_is_the_equations(fuse, config, ema_warmup):
    teacher = None if fuse else small_net()
    recipe = toy_2d.Recipe(BATCH, RATE, WARMUP, ema_warmup)
    settings = (toy_2d.moons, config, ITERATIONS, 5, {2, 5}, recipe)
    kept = toy_2d.fuse(*settings, ALONE) if fuse else toy_2d.distil(teacher, *settings)
    after = train_by_hand(config, teacher, ema_warmup)
    assert list(kept) == [2, 5, ITERATIONS]
    for iteration, net in kept.items():
        assert_close(weights_of(net), after[iteration - 1], rtol=0, atol=1e-9)
        assert not any(weight.requires_grad for weight in net.parameters())


def test_teacher_is_plain_flow_matching():
    generator = seeded(3)
    torch.manual_seed(3)
    net = toy_2d.VelocityMLP()
    optimizer = torch.optim.Adam(net.parameters())
    for i in range(4):
        x_0 = toy_2d.spirals(1024, generator)
        noise = torch.randn(1024, 2, generator=generator)
        t = torch.rand(1024, generator=generator)
        x_t = (1 - t[:, None]) * x_0 + t[:, None] * noise
        loss = nn.functional.mse_loss(net(x_t, t), noise - x_0)
        optimizer.param_groups[0]["lr"] = 5e-3 * rate_at(i, 100, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    teacher = toy_2d.train_teacher(toy_2d.spirals, 4, seed=3)
    assert_close(weights_of(teacher), weights_of(net).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [PAPER, MATCHED], ids=["paper", "matched"])
def test_distilling_leaves_the_teacher_alone_and_repeats_itself(config):
    teacher = small_net()
    before = weights_of(teacher).clone()
    recipe = toy_2d.DISTILLATION._replace(batch=8)
    students = [
        toy_2d.distil(teacher, toy_2d.moons, config, 3, seed, recipe=recipe)[3]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights_of(teacher), before)
    first, same, other = (weights_of(student) for student in students)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.usefixtures("double")
def test_learning_rate_rises_stays_and_falls_to_nothing():
    """While the gradient stays 1, a step of Adam is as long as the learning rate."""
    net = nn.Linear(1, 1, bias=False)
    weights = [net.weight.item()]
    steps = toy_2d.minimize(lambda: net.weight.sum(), net, "net", 0.5, 20, warmup=4)
    for _ in steps:
        weights.append(net.weight.item())
    rates = [before - after for before, after in pairwise(weights)]
    expected = [0.125, 0.25, 0.375] + [0.5] * 8 + [0.05 * i for i in range(9, 0, -1)]
    assert_close(rates, expected, rtol=1e-6, atol=0)


def test_a_fused_network_has_a_fast_ema_whatever_the_config_has():
    recipe = toy_2d.FROM_SCRATCH._replace(batch=BATCH, ema_warmup=False)
    for config in (PAPER, MATCHED):
        usual, same, slow = (
            weights_of(toy_2d.fuse(toy_2d.moons, config, 4, 0, recipe=recipe, **more)[4])
            for more in ({}, {"decay": 0.99}, {"decay": 0.999})
        )
        assert torch.equal(usual, same)
        assert not torch.equal(usual, slow)


def test_a_third_kind_of_config_is_an_error():
    """Not silently the paper's, though it has all that the paper's has."""
    other = SimpleNamespace(**asdict(PAPER))
    with pytest.raises(TypeError, match="no windows for a SimpleNamespace"):
        toy_2d.distil(small_net(), toy_2d.moons, other, 1, seed=0)
    with pytest.raises(TypeError, match="no windows for a SimpleNamespace"):
        toy_2d.fuse(toy_2d.moons, other, 1, seed=0)


def test_a_loop_that_is_left_keeps_what_it_has_trained():
    """Benchmarks stop training where they like."""
    net = small_net().requires_grad_(True)
    before = weights_of(net).detach().clone()
    loss = lambda: net(torch.ones(4, 2), torch.ones(4)).square().mean()  # noqa: E731
    for iteration in toy_2d.minimize(loss, net, "net", 1e-2, 100, warmup=1):
        if iteration == 2:
            break
    assert iteration == 2
    assert not torch.equal(weights_of(net), before)


# ---------------------------------------------------------------------------------- flows and nets


@pytest.mark.parametrize("flow", toy_2d.FLOWS.values(), ids=toy_2d.FLOWS)
def test_flows_are_centred_spread_like_noise_and_repeatable(flow):
    x = flow(20_000, seeded())
    assert x.shape == (20_000, 2) and x.dtype == torch.float32
    assert_close(x.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    assert ((x.std(0) > 0.6) & (x.std(0) < 1.5)).all()
    assert torch.equal(x, flow(20_000, seeded()))


def test_every_flow_that_the_flag_offers_is_there():
    assert tuple(toy_2d.FLOWS) == toy_2d.FLOW_NAMES


def test_few_shot_data_are_the_points_of_the_pool():
    pool = toy_2d.moons(10, seeded())
    drawn = toy_2d.draw_from(pool)(500, seeded(1))
    assert {tuple(x) for x in drawn.tolist()} == {tuple(x) for x in pool.tolist()}


def test_scale_0_is_the_teacher_and_1_the_student_to_the_bit(pair):
    teacher, student = pair
    for scale, same in ((0.0, teacher), (1.0, student)):
        net = toy_2d.scaled(teacher, student, scale)
        assert torch.equal(weights_of(net), weights_of(same))
    double = toy_2d.scaled(teacher, student, 2.0)
    assert_close(weights_of(double), 2 * weights_of(student) - weights_of(teacher))


# --------------------------------------------------------------------------------------- measuring


def test_energy_distance_is_the_direct_sum():
    x, y = toy_2d.moons(700, seeded()), toy_2d.spirals(900, seeded(1))
    distance = lambda a, b: torch.cdist(a.double(), b.double())  # noqa: E731
    cross = distance(x, y).mean()
    within = [distance(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    exact = (2 * cross - sum(within)).item()
    assert_close(toy_2d.energy_distance(x, y), exact, rtol=0.01, atol=0)
    assert_close(toy_2d.energy_distance(x, y, directions=256), exact, rtol=1e-4, atol=0)


def test_energy_distance_is_unbiased():
    """Between two draws of one distribution it is 0 on average, on both sides of 0."""
    g = seeded()
    values = [toy_2d.energy_distance(*(toy_2d.moons(100, g) for _ in "xy")) for _ in range(300)]
    values = torch.tensor(values)
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    assert (values < 0).float().mean() > 0.3


def test_student_beats_its_teacher_at_three_steps_and_follows_its_paths(pair):
    noise, data = torch.randn(4096, 2, generator=seeded(2)), toy_2d.moons(4096, seeded(3))
    fine = toy_2d.sample(pair[0], noise, 64)
    floor = toy_2d.energy_distance(fine, data)
    three = [toy_2d.sample(net, noise, 3) for net in pair]
    errors = [toy_2d.energy_distance(x, data) - floor for x in three]
    distances = [(x - fine).square().mean().sqrt() for x in three]
    assert errors[1] < errors[0] / 4
    assert distances[1] < distances[0] / 2


def test_calibration_is_near_the_closed_form_and_better_than_scale_1(pair):
    teacher, student = pair
    noise = torch.randn(256, 2, generator=seeded())
    fine = toy_2d.sample(teacher, noise, 64, 2.0)
    scales = []
    gains = []
    for n in (2, 8):
        path = sc.teacher_path(teacher, noise, sc.time_grid(n, 2.0))
        lam = sc.optimal_scale(student, path).item()
        scale = toy_2d.calibrate(teacher, student, noise, n, 2.0)
        assert lam / 1.61 < scale < 1.61 * lam
        ratio = 1.6**0.1  # of the search's neighbouring scales
        others = (scale / ratio, scale * ratio, 1.0)
        nets = [toy_2d.scaled(teacher, student, s) for s in (scale, lam, *others)]
        best, closed, *worse = (
            toy_2d.energy_distance(toy_2d.sample(net, noise, n, 2.0), fine) for net in nets
        )
        assert best < min(worse)
        assert best <= closed  # lam* is one of the candidates
        scales.append(scale)
        gains.append(closed - best)
    assert scales[0] > scales[1] > 0
    assert gains[0] > 0  # at 8 steps lam* can be the best, which depends on rounding
    assert toy_2d.calibrate(teacher, teacher, noise, 3) <= 16  # untrained: lam* is inf, capped


def test_calibration_never_ends_farther_from_the_teacher_than_teacher_or_unscaled_student(pair):
    teacher, student = pair
    noise = torch.randn(256, 2, generator=seeded())
    for flip in (1.0, -1.0):  # a student that learned the opposite needs scale 0
        net = toy_2d.scaled(teacher, student, flip)
        for n, shift in ((1, 3.0), (3, 1.0)):
            fine = toy_2d.sample(teacher, noise, 64, shift)

            def distance(scale, net=net, n=n, shift=shift, fine=fine):
                moved = toy_2d.scaled(teacher, net, scale)
                return toy_2d.energy_distance(toy_2d.sample(moved, noise, n, shift), fine)

            scale = toy_2d.calibrate(teacher, net, noise, n, shift)
            assert distance(scale) <= min(distance(0.0), distance(1.0))


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_calibration_finds_the_best_scale_wherever_lam_is(pair, monkeypatch, lam):
    """For the toy's student of moons in one step at shift 3, lam* is 2.4 times the best scale."""
    teacher, student = pair
    noise = torch.randn(256, 2, generator=seeded())
    fine = toy_2d.sample(teacher, noise, 64, 3.0)

    def distance(scale: float) -> float:
        moved = toy_2d.scaled(teacher, student, scale)
        return toy_2d.energy_distance(toy_2d.sample(moved, noise, 1, 3.0), fine)

    least = min(distance(10**exponent) for exponent in torch.linspace(-2, 1, 200).tolist())
    monkeypatch.setattr(sc, "optimal_scale", lambda *_: torch.tensor(lam))
    assert distance(toy_2d.calibrate(teacher, student, noise, 1, 3.0)) < 1.02 * least


def test_sampling_in_chunks_changes_nothing(pair):
    noise = torch.randn(5000, 2, generator=seeded())
    whole = sc.euler_sample(pair[0], noise, sc.time_grid(3, 3.0))
    assert_close(toy_2d.sample(pair[0], noise, 3, 3.0), whole, atol=1e-5, rtol=1e-5)


def test_a_trajectory_is_the_samplers_states_from_noise_to_sample(pair):
    noise = torch.randn(10, 2, generator=seeded())
    states = toy_2d.trajectory(pair[0], noise, 4, 2.0)
    times = sc.time_grid(4, 2.0)
    assert states.shape == (5, 10, 2)
    for i, state in enumerate(states):
        assert_close(state, sc.euler_sample(pair[0], noise, times[: i + 1]))
    assert_close(states[-1], toy_2d.sample(pair[0], noise, 4, 2.0))


def test_floor_is_the_root_mean_square_of_distances_from_fresh_data():
    """The offset that one reference gives all of them belongs to it."""
    probe = toy_2d.draw_probe(toy_2d.spirals, seeded(7))
    generator = seeded(7)
    reference = toy_2d.spirals(1024, generator)
    torch.randn(512, 2, generator=generator)
    torch.randn(256, 2, generator=generator)
    distances = []
    for _ in range(8):
        fresh = toy_2d.spirals(512, generator)
        distances.append(1e4 * toy_2d.energy_distance(fresh, reference))
    distances = torch.tensor(distances)
    assert torch.equal(probe.data, reference)
    assert_close(probe.floor, distances.square().mean().sqrt().item(), rtol=1e-5, atol=0)
    assert probe.floor > 1.05 * distances.std(unbiased=False)


# ------------------------------------------------------------------------------------- the command

FILES = {"samples.png", "paths.png", "progress.png", "quality.png", "results.json"}
DISTILLED = ["teacher", "SCFM as published", "matched", "matched, scaled"]
FUSED = ["flow matching", "SCFM as published", "matched"]


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(toy_2d, "POINTS", 512)


@pytest.mark.parametrize(
    "flags",
    [
        ["--animate"],
        ["--flow", "spirals", "--student-steps", "1"],
        ["--fusion", "--flow", "gaussians"],
        ["--few-shot", "10", "--student-steps", "5", "--shift", "3", "--flow", "checkerboard"],
        ["--student-steps", "32", "--iterations", "1"],
    ],
    ids=" ".join,
)
def test_command_writes_every_file(flags, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    toy_2d.main(["--iterations", "12", "--out", str(out), *flags])
    files = FILES | ({"flow.gif"} if "--animate" in flags else set())
    assert {path.name for path in out.iterdir()} == files
    assert all(path.stat().st_size > 1000 for path in out.iterdir())
    results = json.loads((out / "results.json").read_text())
    names = FUSED if "--fusion" in flags else DISTILLED
    assert list(results["energy"]) == list(results["rms"]) == names
    N = int(flags[flags.index("--student-steps") + 1]) if "--student-steps" in flags else 3
    steps = [str(n) for n in sorted({*toy_2d.STEPS, N})]
    assert all(list(row) == steps for row in results["energy"].values())
    assert list(results["scales"]) == ([] if "--fusion" in flags else steps)
    watched = [str(n) for n in sorted({2, 4, 8, N})]
    assert list(results["errors"]) == watched
    assert list(results["lams"]) == ([] if "--fusion" in flags else watched)
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(f"  {name} ") == 2


def test_what_is_printed_is_measured_in_one_unit(tmp_path, capsys):
    """x 1e-4 in the table, results.json and the titles of samples.png, all of the same samples."""
    figures = drawn_by("--iterations", "12", "--shift", "2", "--seed", "4", "--out", tmp_path)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())

    generator = seeded(10_004)
    data = toy_2d.moons(1024, generator)
    noise = torch.randn(512, 2, generator=generator)
    teacher = toy_2d.train_teacher(toy_2d.moons, 12, seed=4)
    config = sc.ShortcutConfig(shift_range=(2, 2))
    published = toy_2d.distil(teacher, toy_2d.moons, config, 6, 4)[6]
    matched = sc.MatchedConfig(3, shift_range=(2, 2))
    matched = toy_2d.distil(teacher, toy_2d.moons, matched, 6, 4)[6]
    fine = toy_2d.sample(teacher, noise, 64, 2.0)
    for name, net in zip(DISTILLED, (teacher, published, matched)):
        x = toy_2d.sample(net, noise, 8, 2.0)
        energy = 1e4 * toy_2d.energy_distance(x, data)
        assert_close(results["energy"][name]["8"], energy)
        assert_close(
            results["rms"][name]["8"], (x - fine).norm(dim=1).square().mean().item() ** 0.5
        )
        assert f"{energy:9.1f}" in printed
        titles = [axis.get_title() for axis in figures["samples.png"].axes]
        assert f"8 steps: {energy:.1f}" in titles
    for name in DISTILLED[1:3]:
        assert results["errors"]["8"][name]["6"] == results["energy"][name]["8"]
    scale = results["scales"]["8"]
    x = toy_2d.sample(toy_2d.scaled(teacher, matched, scale), noise, 8, 2.0)
    assert_close(results["energy"]["matched, scaled"]["8"], 1e4 * toy_2d.energy_distance(x, data))
    assert f"{scale:9.2f}" in printed.splitlines()[-2]
    axes = [*figures["progress.png"].axes, *figures["quality.png"].axes]
    labels = [axis.get_ylabel() for axis in axes]
    assert sum("energy distance" in label and "x 1e-4" in label for label in labels) == 2
    assert "x 1e-4" in printed and "x 1e-4" in figures["samples.png"].get_suptitle()


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes longer than a short training."""
    monkeypatch.setattr(toy_2d, "save", lambda figure, path: None)


@pytest.mark.usefixtures("undrawn")
def test_few_shot_students_see_the_pool_only_and_the_teacher_all(tmp_path, monkeypatch):
    seen = []
    real = toy_2d.distil

    def watching(teacher, data, *args):
        seen.append(data(500, seeded()).unique(dim=0))
        return real(teacher, data, *args)

    monkeypatch.setattr(toy_2d, "distil", watching)
    few = tmp_path / "few"
    toy_2d.main(["--few-shot", "7", "--iterations", "4", "--out", str(few)])
    assert [len(points) for points in seen] == [7, 7]
    assert torch.equal(*seen)
    results = json.loads((few / "results.json").read_text())
    full = tmp_path / "full"
    toy_2d.main(["--iterations", "4", "--out", str(full)])
    plain = json.loads((full / "results.json").read_text())
    assert results["energy"]["teacher"] == plain["energy"]["teacher"]
    assert results["energy"]["matched"] != plain["energy"]["matched"]


@pytest.mark.usefixtures("undrawn")
def test_fused_networks_get_the_network_calls_of_flow_matching(tmp_path, monkeypatch):
    """Iterations: 2x and 4x."""
    asked = []
    fuse, train_teacher = toy_2d.fuse, toy_2d.train_teacher
    monkeypatch.setattr(toy_2d, "fuse", lambda *args: asked.append(args[1:3]) or fuse(*args))
    monkeypatch.setattr(
        toy_2d, "train_teacher", lambda *args: asked.append(args[1]) or train_teacher(*args)
    )
    flags = ["--fusion", "--shift", "2", "--student-steps", "4", "--iterations", "3"]
    toy_2d.main([*flags, "--out", str(tmp_path)])
    published = sc.ShortcutConfig(shift_range=(2, 2))
    matched = sc.MatchedConfig(4, shift_range=(2, 2))
    assert asked == [12, (published, 6), (matched, 6)]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), toy_2d.whole(path) as part:
        part.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with toy_2d.whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_stop_between_figures_leaves_a_folder_that_can_be_used_again(tmp_path, monkeypatch, call):
    calls = []
    save = toy_2d.save

    def stopping(figure, path):
        calls.append(path.name)
        if len(calls) == call:
            raise KeyboardInterrupt
        save(figure, path)

    monkeypatch.setattr(toy_2d, "save", stopping)
    with pytest.raises(SystemExit, match="stopped"):
        toy_2d.main(["--iterations", "2", "--out", str(tmp_path)])
    assert len(calls) == call
    assert toy_2d.foreign_files(tmp_path) == []


@pytest.mark.usefixtures("undrawn")
def test_progress_is_measured_after_iterations_in_equal_ratios(tmp_path):
    toy_2d.main(["--iterations", "64", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    for values in results["errors"]["8"].values():
        assert [int(i) for i in values] == [2, 3, 4, 6, 8, 11, 16, 23, 32]


@pytest.mark.usefixtures("undrawn")
def test_same_seed_same_table(tmp_path, capsys):
    tables = []
    for i, seed in enumerate(("0", "0", "1")):
        toy_2d.main(["--iterations", "15", "--out", str(tmp_path / str(i)), "--seed", seed])
        tables.append(capsys.readouterr().out.splitlines()[:-1])
    assert tables[0] == tables[1] != tables[2]


# ----------------------------------------------------------------------------------------- figures


def drawn_by(*flags):
    """The figures that the command draws, by the names of their files."""
    figures, with_panels = {}, []
    save, draw_panels = toy_2d.save, toy_2d.draw_panels

    def saving(figure, path):
        figures[path.name] = figure
        save(figure, path)

    def drawing(*args):
        figure, axes = draw_panels(*args)
        with_panels.append(figure)
        return figure, axes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_2d, "save", saving)
        patch.setattr(toy_2d, "draw_panels", drawing)
        toy_2d.main([str(flag) for flag in flags])
    if "--animate" in flags:
        figures["flow.gif"] = with_panels[-1]
    return figures


@pytest.fixture(scope="module", params=["distil", "fuse"])
def figures(request, tmp_path_factory):
    flags = ["--fusion"] if request.param == "fuse" else ["--animate"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_2d, "POINTS", 512)
        return drawn_by("--iterations", 40, "--out", tmp_path_factory.mktemp("figures"), *flags)


def colours_of(figure):
    """(name of a sampler, colour) for lines, legends, titles and row names of a figure."""
    found = []
    for axis in figure.axes:
        for line in axis.get_lines():
            found.append((line.get_label(), to_hex(line.get_color())))
        for text in (axis.title, axis.yaxis.label):
            found.append((text.get_text().rsplit(", ", text is axis.title)[0], text.get_color()))
        for paths in axis.collections:
            if type(paths).__name__ == "LineCollection":
                name = axis.get_title().rsplit(", ", 1)[0]
                found.append((name, to_hex(paths.get_colors()[0][:3])))
    return {(name, colour) for name, colour in found if name in toy_2d.COLORS}


def test_a_colour_means_one_sampler_in_all_figures(figures):
    names = set(FUSED if "flow matching" in str(colours_of(figures["quality.png"])) else DISTILLED)
    found = set().union(*(colours_of(figure) for figure in figures.values()))
    assert {name for name, _ in found} == names
    assert len({colour for _, colour in found}) == len(found) == len(names)
    assert {name for name, _ in colours_of(figures["samples.png"])} == names
    assert {name for name, _ in colours_of(figures["quality.png"])} == names
    for name in ("paths.png", "progress.png"):
        assert {name for name, _ in colours_of(figures[name])} == names - {"matched, scaled"}
    data = toy_2d.COLORS["data"]
    assert data not in {colour for _, colour in found}
    band = figures["quality.png"].axes[0].patches[0]
    assert to_hex(band.get_facecolor()) == data
    for axis in figures["paths.png"].axes:
        assert to_hex(axis.collections[0].get_facecolor()[0]) == data


def test_each_panel_of_paths_tells_its_sampler_and_steps(figures):
    base = "teacher" if "flow.gif" in figures else "flow matching"
    expected = [f"{base}, 3 steps", "SCFM as published, 3 steps", "matched, 3 steps"]
    expected.append(f"{base}, 64 steps")
    for name in figures.keys() & {"paths.png", "flow.gif"}:
        assert [axis.get_title() for axis in figures[name].axes] == expected


def test_legends_and_titles_cover_no_panel_and_stay_inside(figures):
    """As saved: to draw again would lay out again, and differently."""
    for name, figure in figures.items():
        boxes = [axis.get_window_extent() for axis in figure.axes]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), name
        assert not any(axis.get_legend() for axis in figure.axes), name
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(panel) for panel in boxes), name
        texts = [text for axis in figure.axes for text in (axis.title, axis.yaxis.label)]
        for text in [*figure.legends, *(text for text in texts if text.get_text())]:
            box = text.get_window_extent()
            x, y = box.get_points().T
            assert x.min() >= 2 and x.max() <= figure.bbox.width - 2, (name, text)
            assert y.min() >= 2 and y.max() <= figure.bbox.height - 2, (name, text)


def labels_in_view(ticks):
    low, high = sorted(ticks.get_view_interval())
    pairs = zip(ticks.get_majorticklocs(), ticks.get_ticklabels())
    return [label for place, label in pairs if low <= place <= high and label.get_text()]


def test_ticks_are_plain_numbers_that_do_not_collide(figures):
    for name in ("progress.png", "quality.png"):
        for axis in figures[name].axes:
            for ticks in (axis.xaxis, axis.yaxis):
                labels = labels_in_view(ticks)
                if not ticks.get_label_text():  # shared with a panel that has the labels
                    continue
                assert len(labels) >= 2, (name, axis.get_title())
                assert all(float(label.get_text()) > 0 for label in labels)
                assert not any("e" in label.get_text() for label in labels)
                boxes = [label.get_window_extent() for label in labels]
                assert not any(a.overlaps(b) for a, b in pairwise(boxes))


@pytest.mark.parametrize("steps", [3, 5, 9, 14, 15, 17, 18, 31])
def test_the_steps_that_the_student_is_trained_for_have_a_tick(steps, tmp_path, monkeypatch):
    figures = []
    save = toy_2d.save

    def saving(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(toy_2d, "save", saving)
    columns = sorted({*toy_2d.STEPS, steps})
    energy = {"matched": {n: 100 / n for n in columns}}
    toy_2d.plot_quality(energy, steps, 1.0, tmp_path / "quality.png")
    labels = labels_in_view(figures[0].axes[0].xaxis)
    shown = [int(label.get_text()) for label in labels]
    assert steps in shown
    assert set(shown) <= set(columns)
    assert len(shown) >= len(columns) - 1
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--flow", "swissroll"], "invalid choice: 'swissroll'"),
        (["--student-steps", "40"], "--student-steps 40 must be between 1 and 32"),
        (["--student-steps", "0"], "--student-steps 0 must be between 1 and 32"),
        (["--student-steps", "2.5"], "invalid int value: '2.5'"),
        (["--shift", "-1"], "--shift -1.0 must be between 0.001 and 1000"),
        (["--shift", "nan"], "--shift nan must be between"),
        (["--fusion", "--few-shot", "3"], "--fusion and --few-shot cannot be combined"),
        (["--paper"], "unrecognized arguments: --paper"),
        (["--iterations", "0"], "--iterations 0 must be between 1 and 1000000000"),
        (["--seed", "-1"], "--seed -1 must be between 0 and"),
        (["--few-shot", "-2"], "--few-shot -2 must be between 0 and 10000000"),
        (["--out", __file__], "File exists: give another --out"),
        (["--out", f"{__file__}/under"], "Not a directory: give another --out"),
    ],
)
def test_wrong_flags_end_with_a_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        toy_2d.main(flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_every_setting_has_a_flag_with_its_default(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert toy_2d.parse([]) == toy_2d.Settings()
    assert (tmp_path / "toy_out").is_dir()
    with pytest.raises(SystemExit):
        toy_2d.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for setting in fields(toy_2d.Settings):
        assert f"--{setting.name.replace('_', '-')} " in told
        assert f"{setting.metadata['help']} (default: {setting.default})" in told


@pytest.mark.parametrize("flags, code", [(["--help"], 0), (["--shift", "0"], 2)])
def test_help_and_wrong_flags_wait_for_no_import(flags, code, tmp_path):
    call = [sys.executable, "-X", "importtime", toy_2d.__file__, *flags]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported
    assert not {"torch", "numpy", "matplotlib", "tqdm", "shortcut"} & imported
