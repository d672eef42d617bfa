"""The claims of shortcut.py against closed forms and independent computations."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import shortcut as sc

PAPER = sc.ShortcutConfig()
FLAT = sc.ShortcutConfig(shift_range=(1, 1))
shifts = st.floats(0.2, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def constant(value):
    """A velocity that is the same everywhere."""
    return lambda x, t, **cond: torch.full_like(x, value)


class Mixture:
    """Flow matching of a 2-D Gaussian mixture: the exact velocity E[noise - x_0 | x_t]."""

    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    std = 0.3

    def sample(self, count, generator):
        which = torch.randint(0, 3, (count,), generator=generator)
        z = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return self.means[which] + self.std * z

    def __call__(self, x, t, **cond):
        t = t[:, None, None]
        offset = x[:, None] - (1 - t) * self.means  # (B, 3, 2)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        weight = (-(offset**2).sum(2, keepdim=True) / (2 * variance)).softmax(1)
        x_0 = self.means + (1 - t) * self.std**2 / variance * offset
        noise = t / variance * offset
        return (weight * (noise - x_0)).sum(1)


# ------------------------------------------------------------------------------ time and sampling


def test_shift_is_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0, 3.25):
        for steps in (3, 8):
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
            assert_close(sc.time_grid(steps, shift), scheduler.sigmas, atol=1e-7, rtol=0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    assert_close(sc.time_grid(4, math.exp(0.8)), dynamic.sigmas, atol=1e-7, rtol=0)


@given(shifts, shifts)
def test_shifts_compose_and_keep_the_ends(a, b):
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    assert_close(sc.shift_time(sc.shift_time(u, a), b), sc.shift_time(u, a * b))
    assert sc.shift_time(u, a)[0] == 0
    assert_close(sc.shift_time(u, a)[-1].item(), 1.0)
    assert (sc.shift_time(u, a).diff() > 0).all()


def test_a_grid_is_even_unless_shifted():
    assert_close(sc.time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_sampling_averages_and_scale_keep_no_graph():
    weight, average = torch.ones(1, requires_grad=True), torch.zeros(1)
    noise, times = torch.ones(2, 1), sc.time_grid(2)
    assert not sc.euler_sample(lambda x, t: weight * x, noise, times).requires_grad
    assert not sc.optimal_scale(lambda x, t: weight * x, constant(1), noise, times).requires_grad
    sc.update_ema([average], [weight], 0.5)
    assert not average.requires_grad


def test_euler_is_exact_for_a_constant_velocity_and_first_order_in_general():
    noise = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)
    end = sc.euler_sample(constant(0.7), noise, sc.time_grid(3, 3.0))
    assert_close(end, noise - 0.7, atol=1e-6, rtol=0)
    flow, times = Mixture(), lambda steps: sc.time_grid(steps).double()
    exact = sc.euler_sample(flow, noise, times(4096))
    errors = [(sc.euler_sample(flow, noise, times(n)) - exact).norm() for n in (128, 256, 512)]
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.4


def test_exact_flow_carries_noise_to_the_mixture():
    noise = torch.randn(20_000, 2, generator=seeded(), dtype=torch.float64)
    x, data = (
        sc.euler_sample(Mixture(), noise, sc.time_grid(80)),
        Mixture().sample(20_000, seeded(1)),
    )
    assert_close(x.mean(0), data.mean(0), atol=0.03, rtol=0)
    assert_close(x.T.cov(), data.T.cov(), atol=0.04, rtol=0)


def test_sampler_calls_the_network_once_a_step_with_cond_and_times():
    calls = []

    def velocity(x, t, *, label):
        calls.append((t.clone(), label))
        return torch.zeros_like(x)

    times = sc.time_grid(3, 3.0)
    sc.euler_sample(velocity, torch.zeros(5, 1), times, label=torch.arange(5))
    assert_close(torch.stack([t for t, _ in calls]), times[:-1, None].expand(3, 5))
    assert all(torch.equal(label, torch.arange(5)) for _, label in calls)


# ------------------------------------------------------------------------------------------ windows


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.sampled_from([8, 30, 32, 64]),
    st.sampled_from([None, 1, 2, 3, 4]),
    st.booleans(),
    shifts,
    st.integers(0, 10**6),
)
def test_windows_are_ordered_and_inside(batch, n, steps, fusion, shift, seed):
    common = dict(grid_steps=n, strides=(2, n // 4), shift_range=(shift, 2 * shift))
    if steps is None:
        config = sc.ShortcutConfig(**common)
    else:
        config = sc.ShortcutConfig.for_steps(steps, **common)
    t, t_mid, t_end, k = sc.sample_windows(config, batch, fusion, generator=seeded(seed))
    assert t.shape == t_mid.shape == t_end.shape == (batch,) and 0 <= k <= batch
    assert (t <= 1).all() and (t_mid >= 0).all()
    assert (t > t_mid).all() and ((t_mid > t_end) | (t_end == 0)).all()
    # Matched: a step below 0 at most, but for the rounding of 1 - w, w = (t - t_mid) / (t - t_end).
    rounding = 1e-6 + 2**-22 * (t - t_end).square() / (t - t_mid)
    assert (t_end >= (t_mid - t - rounding if steps else 0)).all()
    assert k == batch if steps else k <= 0.4 * batch + 1


def grid_time(t, shift):
    """u of t = s u / (1 + (s - 1) u)."""
    return t / (shift - (shift - 1) * t)


def chi_squared(counts, expected):
    """The statistic's distance from its mean, in its standard deviations."""
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_paper_windows_have_the_law_of_the_paper():
    config = sc.ShortcutConfig(shift_range=(3, 3))
    t, t_mid, t_end, k = sc.sample_windows(config, 200_000, U=0.0, generator=seeded())
    assert k == 80_000
    u, u_mid, u_end = (32 * grid_time(time.double(), 3) for time in (t, t_mid, t_end))
    start, stride = u.round().long(), (u - u_mid).round().long()
    assert_close(u, start.double(), atol=1e-3, rtol=0)
    assert_close(u_mid - u_end, stride.double(), atol=1e-3, rtol=0)
    assert (stride[:k] == 1).all()
    starts = torch.bincount(start[:k], minlength=33)
    assert (starts[:2] == 0).all()
    assert abs(chi_squared(starts[2:], k / 31)) < 4
    strides = torch.bincount(stride[k:], minlength=9)
    assert strides.count_nonzero() == 3
    assert abs(chi_squared(strides[[2, 4, 8]], 120_000 / 3)) < 4
    for s in (2, 4, 8):
        starts = torch.bincount(start[k:][stride[k:] == s], minlength=33)
        assert (starts[: 2 * s] == 0).all()
        assert abs(chi_squared(starts[2 * s :], starts.sum() / (33 - 2 * s))) < 4


def test_matched_windows_have_their_law():
    """Starts anywhere, one step with the teacher, and on for as long as L* wants."""
    config = sc.ShortcutConfig.for_steps(3, shift=1.0)
    t, t_mid, t_end, k = sc.sample_windows(config, 300_000, generator=seeded())
    assert k == 300_000
    assert abs(chi_squared(torch.histc(t, 100, 0, 1), k / 100)) < 4
    step = t.clamp(max=1 / 32)
    assert_close(t - t_mid, step, atol=1e-6, rtol=0)
    inside = t_mid > 1 / 3  # L* = 1/6 at both t and t_mid: the second half is as long
    assert_close(
        t_mid[inside] - t_end[inside], torch.full((inside.sum(),), 1 / 6), atol=1e-5, rtol=0
    )
    near = t < 1 / 3  # a step of the sampler from the data: L* = t/2
    assert_close(t_end[near], -step[near], atol=1e-5, rtol=0)


def test_flow_matching_rows_of_fusion_are_uniform_off_the_grid():
    t, *_, k = sc.sample_windows(FLAT, 100_000, True, U=0.0, generator=seeded())
    assert k == 40_000
    assert abs(chi_squared(torch.histc(t[:k], 50, 0, 1), k / 50)) < 4
    assert ((32 * t[:k]) % 1 > 0.01).float().mean() > 0.95
    config = sc.ShortcutConfig.for_steps(3, 1.0)
    t, t_mid, *_ = sc.sample_windows(config, 100_000, True, generator=seeded())
    assert abs(chi_squared(torch.histc(t, 50, 0, 1), 100_000 / 50)) < 4
    assert_close(t - t_mid, t.clamp(max=1 / 32), atol=1e-6, rtol=0)


def test_shift_is_drawn_for_each_row_over_the_whole_range():
    t, t_mid, t_end, k = sc.sample_windows(PAPER, 50_000, U=0.0, generator=seeded())
    t, t_mid, t_end = t.double(), t_mid.double(), t_end.double()
    inner = t[:k] < 0.999
    # 1/t = 1/(s u) + 1 - 1/s at u, u - d and u - 2 d, d = 1/32: two differences give u, then s
    a, b = (1 / t_mid - 1 / t)[:k][inner], (1 / t_end.clamp(min=1e-9) - 1 / t_mid)[:k][inner]
    u = 2 * b / (b - a) / 32
    s = (1 / u - 1) / (1 / t[:k][inner] - 1)
    s = s[(u * 32 > 2.5) & (u < 0.9)]
    assert 2.45 < s.min() < 2.55 and 4.45 < s.max() < 4.55
    assert abs(s.mean() - 3.5) < 0.03


@pytest.mark.parametrize("draw", [0.0, 0.25, 1 - 2**-24])
def test_starts_and_shifts_fill_their_ranges_and_leave_out_zero(draw, monkeypatch):
    """Every uniform draw is this one, of [0, 1): starts lie in (0, 1], shifts in [low, high]."""
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), draw))
    config = sc.ShortcutConfig.for_steps(3, shift_range=(1.25, 5.0))
    expected = sc.shift_time(torch.tensor([1 - draw]), 1.25 + 3.75 * draw)
    windows = sc.sample_windows(config, 1)
    assert_close(windows.t, expected, rtol=1e-5, atol=0)
    assert 0 < windows.t <= 1 and windows.t_end < windows.t_mid < windows.t


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_number_of_teacher_rows_is_right_on_average(batch):
    g = seeded()
    k = [sc.sample_windows(PAPER, batch, generator=g).teacher_rows for _ in range(800)]
    low = math.floor(0.4 * batch)
    assert set(k) == {low, low + 1}
    assert abs(sum(k) / 800 - 0.4 * batch) < 4 * 0.5 / math.sqrt(800)
    for U, expected in ((0.0, low), (0.999, low + 1)):  # several processes pass the same U
        assert sc.sample_windows(PAPER, batch, U=U, generator=g).teacher_rows == expected


def test_same_seed_same_windows():
    for config in (PAPER, sc.ShortcutConfig.for_steps(3)):
        first, again, other = (
            sc.sample_windows(config, 64, generator=seeded(s)) for s in (1, 1, 2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))
        assert not torch.equal(first.t, other.t)


# --------------------------------------------------------------------------------------- look-ahead


def wanted(u, steps, shift):
    """L*(u): half of an N-step sampler's coming step."""
    return (grid(u, shift) - grid(max(u - 1 / steps, 0.0), shift)) / 2


def grid(u, shift):
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (3.0, 3.0), (2.5, 4.5), (0.5, 4.0)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
def test_for_steps_satisfies_the_recursion_with_the_wanted_lookahead(steps, low, high):
    """(A) in plain scalars, at times of any shift: they all want the L* of the range's middle."""
    config = sc.ShortcutConfig.for_steps(steps, shift_range=(low, high))
    s = (low + high) / 2
    for t, t_mid, t_end in zip(*sc.sample_windows(config, 500, generator=seeded())[:3]):
        t, t_mid, t_end = t.item(), t_mid.item(), t_end.item()
        u, u_mid = (time / (s - (s - 1) * time) for time in (t, t_mid))
        w = (t - t_mid) / (t - t_end)
        ahead = (1 - w) * (wanted(u_mid, steps, s) + t - t_mid)
        assert_close(ahead, wanted(u, steps, s), atol=2e-5, rtol=0)


def test_within_a_step_of_the_data_the_student_is_the_mean_of_the_teachers_velocities():
    """v(t) = w v*(t) + (1 - w) v(t_mid): all teacher steps from t on then weigh the same."""
    config, t = sc.ShortcutConfig.for_steps(1, 1.0), torch.arange(33).double() / 32
    teacher = torch.randn(33, generator=seeded(), dtype=torch.float64)
    w = (t[1:] - t[:-1]) / (t[1:] - sc.matched_end(config, t[1:], t[:-1]))
    student = [teacher[0]]
    for j in range(1, 33):
        student.append(w[j - 1] * teacher[j] + (1 - w[j - 1]) * student[-1])
    assert_close(torch.stack(student), teacher.cumsum(0) / torch.arange(1, 34))


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("rho", [0.2, 0.4, 0.52, 0.9])
def test_lookahead_formula_is_the_fixed_point_of_a_linear_velocity(rho, dual):
    """(B): far from the ends, the student of the teacher v*(u) = u is u - L. Solved as a matrix."""
    config = sc.ShortcutConfig(teacher_ratio=rho, dual=dual, shift_range=(1, 1))
    size = 1000  # grid points 1/32 apart; the lowest 16 are pinned to the teacher
    A = torch.eye(size, dtype=torch.float64)
    b = torch.arange(size, dtype=torch.float64) / 32
    rows = torch.arange(16, size)
    A[rows, rows] -= (1 - rho) / 2
    for stride in (2, 4, 8):
        A[rows, rows - stride] -= (1 - rho) / 6
    v_teacher = b.clone()
    b[rows] = rho / 2 * v_teacher[rows]
    if dual:
        A[rows, rows - 1] -= rho / 2
    else:
        b[rows] += rho / 2 * v_teacher[rows - 1]
    v = torch.linalg.solve_triangular(A, b[:, None], upper=False)[:, 0]
    assert_close((v_teacher - v)[-1].item(), config.lookahead, rtol=1e-3, atol=0)


def test_lookahead_of_paper_settings():
    assert_close(PAPER.lookahead, 1 / 32 + 1.5 * (14 / 3) / 32)
    assert_close(dataclasses.replace(PAPER, dual=False).lookahead, PAPER.lookahead / 2)
    assert round(1 / (2 * PAPER.lookahead)) == 2  # the paper's rho suits two steps
    assert sc.ShortcutConfig.for_steps(3).lookahead == 1 / 6
    assert sc.ShortcutConfig(teacher_ratio=0.0).lookahead == float("inf")


def velocity_after_training(config, shift, power=1, rounds=60, rows=50_000):
    """The whole method on a table instead of a network; the teacher is v*(x, t) = t^power.

    Each round replaces the table by the mean target of the rows that start at its entries, which is
    what the loss's minimum is. Returns v at u = 0, ..., 1: the mean of (t - look-ahead)^power.
    """
    table = sc.shift_time(torch.arange(33) / 32, shift) ** power

    def student(x, t):
        u = 32 * grid_time(t, shift)
        i = u.floor().long().clamp(0, 31)
        return torch.lerp(table[i], table[i + 1], u - i)[:, None]

    windows = sc.sample_windows(config, rows, U=0.5, generator=seeded())
    if config.student_steps:  # on the grid, where the table has its entries
        t, t_mid = (sc.shift_time((torch.arange(rows) % 32 + i) / 32, shift) for i in (1, 0))
        windows = sc.Windows(t, t_mid, sc.matched_end(config, t, t_mid), rows)
    entry = (32 * grid_time(windows.t, shift)).round().long()
    for _ in range(rounds):
        seen = {}

        def capture(x, t, seen=seen):
            seen["v"] = torch.zeros_like(x, requires_grad=True)
            return seen["v"]

        loss, _ = sc.shortcut_loss(
            config, windows, torch.zeros(rows, 1), torch.zeros(rows, 1),
            student=capture, fast=student, slow=student, teacher=lambda x, t: t[:, None] ** power,
        )  # fmt: skip
        loss.backward()  # d/dv mean (v - target)^2 at v = 0 is -2 target / B
        target = -seen["v"].grad[:, 0] * rows / 2
        total, count = (
            torch.zeros(33).index_add(0, entry, target),
            torch.bincount(entry, minlength=33),
        )
        table = torch.where(count > 0, total / count, table)
    return table


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_on_matched_windows_ends_at_the_wanted_lookahead(shift):
    """The student must be t - L*: what 3 Euler steps want."""
    v = velocity_after_training(sc.ShortcutConfig.for_steps(3, shift), shift)
    expected = [grid(j / 32, shift) - wanted(j / 32, 3, shift) for j in range(33)]
    assert_close(v, torch.tensor(expected), atol=0.003, rtol=0)


@pytest.mark.parametrize(
    "shift, kind, means, squares",
    [
        (1.0, "paper", (0.215, 0.172, 0.080), (2.9, 1.7, 0.4)),
        (1.0, "matched", (0.167, 0.167, 0.163), (1.6, 1.5, 1.0)),
        (3.0, "paper", (0.137, 0.166, 0.127), (8.0, 2.9, 0.3)),
        (3.0, "matched", (0.071, 0.129, 0.290), (2.6, 2.3, 1.0)),
    ],
)
def test_lookahead_where_three_steps_stop_is_what_the_readme_says(shift, kind, means, squares):
    """At u = 1, 2/3 and 1/3; the last two lie between grid points."""
    config = sc.ShortcutConfig(teacher_ratio=0.52, shift_range=(shift, shift))
    if kind == "matched":
        config = sc.ShortcutConfig.for_steps(3, shift)
    v, of_square = (velocity_after_training(config, shift, power) for power in (1, 2))
    t = sc.shift_time(torch.arange(33) / 32, shift)
    ahead = t - v
    square = of_square - t**2 + 2 * t * ahead
    steps = -sc.time_grid(3, shift).diff()  # a uniform average over a step has its square / 3
    for values, told, scale, atol in (
        (ahead, means, 1, 0.003),
        (square, squares, steps**2 / 3, 0.12),
    ):
        stops = [values[32], values[21].lerp(values[22], 1 / 3), values[10].lerp(values[11], 2 / 3)]
        assert_close(torch.stack(stops) / scale, torch.tensor(told), atol=atol, rtol=0.01)


# ---------------------------------------------------------------------------------- target and loss


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([None, 2, 3]), shifts, st.floats(-3, 3), st.integers(1, 4))
def test_constant_velocity_is_a_fixed_point_of_every_window(steps, shift, value, rank):
    kind = (
        sc.ShortcutConfig if steps is None else lambda **s: sc.ShortcutConfig.for_steps(steps, **s)
    )
    windows = sc.sample_windows(kind(shift_range=(shift, shift)), 64, generator=seeded())
    x_t = torch.randn(64, *[2] * (rank - 1), generator=seeded(), dtype=torch.float64)
    target = sc.shortcut_target(constant(value), constant(value), x_t, windows)
    assert_close(target, torch.full_like(x_t, value), atol=1e-9, rtol=0)


def test_quadratic_path_on_unequal_halves():
    """v = 2 t: two Euler steps have the mean velocity w v(t) + (1 - w) v(t_mid), w by length."""
    windows = sc.sample_windows(sc.ShortcutConfig(shift_range=(4, 4)), 256, generator=seeded())
    t, t_mid, t_end = (time.double() for time in windows[:3])
    w = (t - t_mid) / (t - t_end)
    v = lambda x, t: 2 * t.double()[:, None].expand_as(x)  # noqa: E731
    x_t = torch.randn(256, 3, generator=seeded(), dtype=torch.float64)
    target = sc.shortcut_target(v, v, x_t, windows)
    expected = w * 2 * t + (1 - w) * 2 * t_mid
    assert_close(target, expected[:, None].expand(256, 3), atol=1e-9, rtol=0)
    plain_mean = t + t_mid
    assert ((plain_mean - expected).abs() / expected).max() > 0.05


def test_fine_window_of_the_exact_flow_has_the_velocity_of_its_path():
    """Across a whole window the target is the displacement of two Euler steps of the exact flow."""
    flow, g = Mixture(), seeded()
    windows = sc.sample_windows(FLAT, 500, generator=g)
    x_t = torch.randn(500, 2, generator=g, dtype=torch.float64)
    target = sc.shortcut_target(flow, flow, x_t, windows)
    for i in range(0, 500, 37):
        times = torch.stack([windows.t[i], windows.t_mid[i], windows.t_end[i]]).double()
        x_end = sc.euler_sample(flow, x_t[i : i + 1], times)
        assert_close(target[i : i + 1], (x_t[i : i + 1] - x_end) / (times[0] - times[2]))


FOUR = {name: constant(value) for name, value in zip(("teacher", "fast", "slow"), (1.0, 2.0, 4.0))}


@pytest.mark.parametrize(
    "kind, teacher_row, self_row",
    [
        ("dual", (1, 4), (2, 4)), ("vanilla", (1, 1), (4, 4)), ("fusion", (9, 9), (2, 2)),
        ("matched", (1, 4), (1, 4)), ("matched fusion", (9, 2), (9, 2)),
    ],
)  # fmt: skip
def test_which_velocity_serves_which_row(kind, teacher_row, self_row):
    config = dataclasses.replace(PAPER, dual=kind != "vanilla")
    if "matched" in kind:
        config = sc.ShortcutConfig.for_steps(3)
    windows = sc.sample_windows(config, 10, "fusion" in kind, U=0.0, generator=seeded())
    w = (windows.t - windows.t_mid) / (windows.t - windows.t_end)
    first, second = (torch.tensor([a] * 4 + [b] * 6) for a, b in zip(teacher_row, self_row))
    expected = w * first + (1 - w) * second
    without = {"fusion": ("teacher", "slow"), "matched fusion": ("teacher", "slow")}
    without["matched"] = ("fast",)
    velocities = {name: v for name, v in FOUR.items() if name not in without.get(kind, ())}
    x_0, noise = torch.full((10, 2, 3), 2.0), torch.full((10, 2, 3), 11.0)
    loss, log = sc.shortcut_loss(config, windows, x_0, noise, student=constant(0), **velocities)
    square = expected.square()
    assert_close(loss, square.mean(), rtol=1e-4, atol=0)
    of_teacher = square[: windows.teacher_rows]
    assert_close(log["teacher_loss"], of_teacher.mean(), rtol=1e-4, atol=0)
    assert log["self_loss"].isnan() if "matched" in kind else True
    if "matched" not in kind:
        assert_close(log["self_loss"], square[4:].mean(), rtol=1e-4, atol=0)
    assert_close(log["residual"], torch.tensor(1.0))


def test_residual_is_relative():
    windows = sc.sample_windows(FLAT, 8, U=0.0, generator=seeded())
    velocities = dict.fromkeys(("teacher", "fast", "slow"), constant(2.0))
    x = torch.zeros(8, 5)
    _, log = sc.shortcut_loss(FLAT, windows, x, x, student=constant(2.5), **velocities)
    assert_close(log["residual"], torch.tensor(0.25))


def test_state_is_interpolated_from_data_to_noise():
    x_0, noise = torch.full((2, 3), 5.0), torch.full((2, 3), -1.0)
    x_t = sc.interpolate(x_0, noise, torch.tensor([0.25, 1.0]))
    assert_close(x_t, torch.tensor([[3.5], [-1.0]]).expand(2, 3))
    seen = []

    def student(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    windows = sc.sample_windows(FLAT, 2, generator=seeded())
    sc.shortcut_loss(FLAT, windows, x_0, noise, student=student, **FOUR)
    assert_close(seen[0][0], (5 - 6 * windows.t)[:, None].expand(2, 3))
    assert torch.equal(seen[0][1], windows.t)


def test_calls_are_few_in_order_and_see_their_own_rows():
    log = []

    def named(name):
        def velocity(x, t, *, row):
            log.append((name, row.tolist(), torch.is_grad_enabled()))
            assert torch.equal(x[:, 0].round().long(), row) or name == "slow"
            return torch.zeros_like(x)

        return velocity

    names = ("student", "teacher", "fast", "slow")
    row, config = torch.arange(10), FLAT
    x = row.float()[:, None]
    windows = sc.sample_windows(config, 10, U=0.0, generator=seeded())
    sc.shortcut_loss(config, windows, x, x, row=row, **{name: named(name) for name in names})
    first, rest, everything = [0, 1, 2, 3], [4, 5, 6, 7, 8, 9], row.tolist()
    assert log == [
        ("teacher", first, False),
        ("fast", rest, False),
        ("slow", everything, False),
        ("student", everything, True),
    ]


@pytest.mark.parametrize("U, called", [(0.0, {"fast", "slow"}), (0.7, {"teacher", "slow"})])
def test_no_network_is_called_without_rows(U, called):
    seen = set()

    def named(name):
        return lambda x, t: seen.add(name) or torch.zeros_like(x)

    windows = sc.sample_windows(FLAT, 1, U=U, generator=seeded())
    _, log = sc.shortcut_loss(
        FLAT, windows, torch.zeros(1, 2), torch.ones(1, 2), student=constant(0.0),
        teacher=named("teacher"), fast=named("fast"), slow=named("slow"),
    )  # fmt: skip
    assert seen == called
    assert log["teacher_loss"].isnan() == ("teacher" not in called)


def test_gradients_reach_the_student_and_nobody_else():
    nets = {n: torch.nn.Linear(3, 2) for n in ("student", "teacher", "fast", "slow")}
    velocities = {
        name: lambda x, t, net=net: net(torch.cat([x, t[:, None]], 1)) for name, net in nets.items()
    }
    x_0, noise = torch.randn(2, 16, 2, generator=seeded())
    for fusion in (False, True):
        windows = sc.sample_windows(FLAT, 16, fusion, generator=seeded())
        given = {k: v for k, v in velocities.items() if not fusion or k in ("student", "fast")}
        loss, log = sc.shortcut_loss(FLAT, windows, x_0, noise, **given)
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in nets["student"].parameters())
        assert all(p.grad is None for n in nets for p in nets[n].parameters() if n != "student")
        assert not any(value.requires_grad for value in log.values())
        target = sc.shortcut_target(velocities["fast"], velocities["slow"], x_0, windows)
        assert not target.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 4, 8), (6, 3, 4, 4)])
def test_dtypes_and_ranks(dtype, shape):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_0, noise = (torch.randn(shape, generator=seeded(s)).to(dtype) for s in (0, 1))
    weight = torch.ones((), dtype=dtype, requires_grad=True)

    def network(x, t):  # computes in dtype, as a bf16 model does
        assert x.dtype == t.dtype == wide
        return weight * x.to(dtype)

    windows = sc.sample_windows(PAPER, 6, U=0.0, generator=seeded())
    loss, _ = sc.shortcut_loss(
        PAPER, windows, x_0, noise, student=network, teacher=network, fast=network, slow=network
    )
    assert loss.dtype == wide
    loss.backward()
    assert weight.grad.isfinite()
    sampler = lambda x, t: x.to(dtype)  # noqa: E731
    assert sc.euler_sample(sampler, noise, sc.time_grid(3)).dtype == wide
    assert sc.optimal_scale(sampler, sampler, noise, sc.time_grid(3)) == float("inf")


def test_nothing_of_the_callers_is_changed():
    x_0, noise = torch.randn(2, 8, 2, generator=seeded())
    windows = sc.sample_windows(FLAT, 8, generator=seeded())
    before = [x.clone() for x in (x_0, noise, *windows[:3])]
    sc.shortcut_loss(FLAT, windows, x_0, noise, student=constant(0.0), **FOUR)
    sc.euler_sample(constant(1.0), noise, sc.time_grid(3))
    assert all(torch.equal(a, b) for a, b in zip(before, (x_0, noise, *windows[:3])))


# ---------------------------------------------------------------------------------------------- EMA


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.9999), st.integers(1, 50))
def test_ema_closed_form(decay, steps):
    """Constant weights 1 from 0: after m updates the average is 1 - decay^m."""
    ema = [torch.zeros(2), torch.zeros(2, 3)]
    for _ in range(steps):
        sc.update_ema(ema, (torch.ones(2), torch.ones(2, 3)), decay)
    for average in ema:
        assert_close(average, torch.full_like(average, 1 - decay**steps), atol=2e-6, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.floats(0.9, 0.9999))
def test_ema_that_warms_up_remembers_a_quarter_of_the_run(steps, decay):
    """From 0, of weights 1: the product of i / (i + 4) is 4! m! / (m + 4)!, until decay is less."""
    ema, rest = [torch.zeros(2)], 1.0
    for i in range(1, steps + 1):
        sc.update_ema(ema, [torch.ones(2)], decay, i)
        rest *= i / (i + 4) if i / (i + 4) < decay else decay
    if steps / (steps + 4) < decay:
        exact = 24 / ((steps + 1) * (steps + 2) * (steps + 3) * (steps + 4))
        assert_close(rest, exact, rtol=1e-9, atol=0)
    assert_close(ema[0], torch.full((2,), 1 - rest), atol=2e-6, rtol=1e-5)


def test_ema_averages_bf16_weights_in_fp32_where_bf16_stalls():
    ema, narrow = [torch.zeros(4)], torch.zeros(4, dtype=torch.bfloat16)
    weights = [torch.ones(4, dtype=torch.bfloat16)]
    for _ in range(5000):
        sc.update_ema(ema, weights, 0.999)
        narrow.lerp_(weights[0], 0.001)
    assert_close(ema[0], torch.full((4,), 1 - 0.999**5000), atol=1e-4, rtol=0)
    assert narrow.max() < 0.5  # should be 0.993: increments round to nothing
    with pytest.raises(ValueError, match="bfloat16"):
        sc.update_ema([narrow], weights, 0.999)


# ------------------------------------------------------------------------------------ optimal scale


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (3, 1.0), (3, 3.0), (8, 3.0)])
@pytest.mark.parametrize("part", [0.4, 1.0, 1.7])
def test_optimal_scale_of_a_student_that_goes_part_of_the_way(steps, shift, part):
    """Teacher v = t: 16 Euler steps from t to s have the mean velocity t - (t - s) 15/32."""
    times = sc.time_grid(steps, shift)

    def teacher(x, t):
        return t[:, None].expand_as(x)

    def student(x, t):
        nearest = (times[:-1] - t[0]).abs().argmin()
        half_step = (times[nearest] - times[nearest + 1]) * 15 / 32
        return teacher(x, t) - part * half_step

    lam = sc.optimal_scale(student, teacher, torch.randn(5, 2, generator=seeded()), times)
    assert_close(lam.item(), 1 / part, rtol=1e-3, atol=0)


def test_optimal_scale_minimises_the_squares():
    flow, g = Mixture(), seeded()
    noise, times = torch.randn(64, 2, generator=g, dtype=torch.float64), sc.time_grid(3).double()

    def student(x, t):
        return flow(x, t) + 0.3 * x.sin() - 0.2

    lam = sc.optimal_scale(student, flow, noise, times).item()

    def squares(scale):
        x, total = noise, 0.0
        for t, t_next in pairwise(times):
            x_next = sc.euler_sample(flow, x, torch.linspace(t, t_next, 17, dtype=torch.float64))
            v = torch.lerp(flow(x, t.expand(64)), student(x, t.expand(64)), scale)
            total += (v - (x - x_next) / (t - t_next)).square().sum().item()
            x = x_next
        return total

    assert squares(lam) < min(squares(lam - 1e-3), squares(lam + 1e-3))


def test_optimal_scale_passes_cond():
    cond = {"label": torch.tensor([1.0, 2.0])}

    def velocity(x, t, *, label):
        return label[:, None] * x

    assert sc.optimal_scale(velocity, velocity, torch.ones(2, 1), sc.time_grid(2), **cond) > 1e9


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(strides=()), r"strides=\(\)"),
        (dict(strides=(2, 17)), r"strides=\(2, 17\).*16"),
        (dict(strides=(0,)), r"strides=\(0,\)"),
        (dict(strides=(2.5,)), r"strides=\(2.5,\) must be integers"),
        (dict(shift_range=(1, math.inf)), "shift_range"),
        (dict(grid_steps=8, strides=(8,)), r"strides=\(8,\).*4"),
        (dict(teacher_ratio=1.1), r"teacher_ratio=1.1.*\[0, 1\]"),
        (dict(teacher_ratio=-0.1), "teacher_ratio=-0.1"),
        (dict(teacher_ratio=None), "teacher_ratio=None"),
        (dict(shift_range=(0, 1)), r"shift_range=\(0, 1\)"),
        (dict(shift_range=(3, 2)), r"shift_range=\(3, 2\)"),
        (dict(teacher_ratio=None, student_steps=0), r"student_steps=0.*\[1, .*16\]"),
        (dict(teacher_ratio=None, student_steps=17), r"student_steps=17.*\[1, .*16\]"),
        (dict(student_steps=3), "teacher_ratio=0.4 must be None"),
        (dict(teacher_ratio=None, student_steps=3, shift_range=(-1, 2)), "shift_range"),
        (dict(teacher_ratio=None, student_steps=3, dual=False), "dual=False must be True"),
        (dict(fast_decay=1.0), r"1.0.*\[0, 1\)"),
        (dict(fast_decay=1.5), r"1.5.*\[0, 1\)"),
        (dict(slow_decay=-0.1), r"-0.1.*\[0, 1\)"),
    ],
)
def test_bad_settings_are_refused_with_value_and_range(bad, words):
    with pytest.raises(ValueError, match=words):
        sc.ShortcutConfig(**bad)


def test_the_ends_of_ranges_are_allowed():
    assert sc.ShortcutConfig(teacher_ratio=0.0, fast_decay=0.0, strides=(1, 16), grid_steps=32)
    assert sc.ShortcutConfig(teacher_ratio=1.0, shift_range=(0.1, 0.1), strides=(1, 3, 16))
    for steps in (1, 16):
        assert sc.ShortcutConfig.for_steps(steps).student_steps == steps


def test_settings_stay_as_they_are():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sc.ShortcutConfig().dual = False


def test_lists_do_as_well_as_tuples():
    config = sc.ShortcutConfig.for_steps(3, strides=[2, 4], shift_range=[1, 2])
    assert config == sc.ShortcutConfig.for_steps(3, strides=(2, 4), shift_range=(1, 2))
    assert len(sc.sample_windows(config, 5).t) == 5


def test_for_steps_refuses_two_shifts():
    with pytest.raises(TypeError, match="shift_range"):
        sc.ShortcutConfig.for_steps(3, 3.0, shift_range=(2, 4))


def test_for_steps_refuses_a_teacher_share_of_ones_own():
    with pytest.raises(ValueError, match=r"teacher_ratio=0\.5"):
        sc.ShortcutConfig.for_steps(3, teacher_ratio=0.5)


def test_bad_tensors_are_refused():
    x, windows = torch.zeros(4, 2), sc.sample_windows(FLAT, 4, generator=seeded())

    def loss(x_0=x, noise=x, windows=windows, **more):
        return sc.shortcut_loss(FLAT, windows, x_0, noise, student=constant(0), **FOUR, **more)

    loss()
    for words, bad in {
        r"noise \[4, 1\]": dict(noise=torch.zeros(4, 1)),
        r"noise \[3, 2\]": dict(noise=torch.zeros(3, 2)),
        "windows has 5 rows, must have 4": dict(windows=sc.sample_windows(FLAT, 5)),
        "label has 3 rows, must have 4": dict(label=torch.zeros(3)),
        "int64.*floating": dict(x_0=x.long(), noise=x.long()),
    }.items():
        with pytest.raises(ValueError, match=words):
            loss(**bad)
    for net in (lambda x, t: x[:, :1], lambda x, t: x[:1]):  # would broadcast in silence
        with pytest.raises(ValueError, match=r"velocity \[\d, \d\] must be like x_0"):
            sc.shortcut_loss(FLAT, windows, x, x, student=net, **FOUR)
        with pytest.raises(ValueError, match=r"\[4, 2\]\), .*\[\d, \d\]\) must be like x_t"):
            sc.shortcut_loss(FLAT, windows, x, x, student=constant(0), **FOUR | {"slow": net})
    for widths in ((1, 2, 2), (2, 1, 2), (1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 2, 1)):
        first, second, state = (torch.zeros(4, width) for width in widths)
        with pytest.raises(ValueError, match=r"\[4, {}\]\), .*\[4, {}\]\) must".format(*widths)):
            sc.shortcut_target(lambda *_, v=first: v, lambda *_, v=second: v, state, windows)
    one = x[:, :1]
    with pytest.raises(ValueError, match=r"velocity \[4, 2\] must be like x_0"):
        sc.shortcut_loss(FLAT, windows, one, one, student=lambda *_: x, **FOUR)
    with pytest.raises(ValueError, match=r"noise \[4, 2\] must be like x_0 \[4, 1\]"):
        loss(one, x)
    with pytest.raises(ValueError, match="slow=None"):
        sc.shortcut_loss(FLAT, windows, x, x, student=None, fast=None, teacher=constant(1))
    vanilla = dataclasses.replace(FLAT, dual=False)
    assert sc.shortcut_loss(vanilla, windows, x, x, student=constant(0), **FOUR | {"fast": None})
    for config, more in ((FLAT, FOUR | {"fast": None}), (sc.ShortcutConfig.for_steps(3), {})):
        with pytest.raises(ValueError, match="fast=None must be given: dual and fusion need it"):
            sc.shortcut_loss(config, windows, x, x, student=None, **more)
    for call, words in (
        (lambda: sc.time_grid(0), "steps=0"),
        (lambda: sc.time_grid(3, 0.0), "shift=0.0"),
        (lambda: sc.shift_time(x, torch.tensor([1.0, -2.0])), "shift=-2.0"),
        (lambda: sc.euler_sample(constant(1), torch.zeros(2, 2).int(), sc.time_grid(2)), "int32"),
        (lambda: sc.update_ema([x], [x, x], 0.9), "zip"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
