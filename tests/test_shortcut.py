"""The claims of shortcut.py against closed forms and independent computations."""

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from exact import (
    Mixture,
    constant,
    paper_student,
    required_lookahead,
    runge_kutta,
    sampler_time,
    seeded,
    to_grid,
    to_shifted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from table import trained_table
from torch.testing import assert_close

import shortcut as sc

PAPER = sc.ShortcutConfig()
FLAT = sc.ShortcutConfig(shift_range=(1, 1))
MATCHED = sc.MatchedConfig()
shifts = st.floats(0.2, 8)


def draw(kind, batch, config=None, seed=0, **more):
    """Windows of one of the four kinds."""
    g = seeded(seed)
    if "matched" in kind:
        return sc.matched_windows(config or MATCHED, batch, "fuse" in kind, generator=g, **more)
    return sc.sample_windows(config or PAPER, batch, "fuse" in kind, generator=g, **more)


def shift_of(low, high=None):
    return {"shift_range": (low, low if high is None else high)}


def chi_squared(counts, expected):
    """The statistic's distance from its mean, in its standard deviations."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


KINDS = ("distil", "fuse", "matched", "matched fuse")

# ------------------------------------------------------------------------------ time and sampling


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.25])
@pytest.mark.parametrize("steps", [3, 8])
def test_the_grid_is_that_of_the_scheduler_of_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    assert_close(sc.time_grid(steps, shift), scheduler.sigmas, atol=1e-7, rtol=0)


def test_a_dynamic_shift_of_diffusers_is_the_exponential_of_mu():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    assert_close(sc.time_grid(4, math.exp(0.8)), scheduler.sigmas, atol=1e-7, rtol=0)


@given(shifts)
def test_a_shift_is_equation_17(shift):
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    assert_close(sc.shift_time(u, shift), to_shifted(u, shift))


@given(shifts)
def test_the_inverse_shift_undoes_a_shift(shift):
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    assert_close(sc.shift_time(sc.shift_time(u, shift), 1 / shift), u)


@given(shifts)
def test_a_shift_keeps_both_ends_and_the_order(shift):
    t = sc.shift_time(torch.linspace(0, 1, 1001), shift)
    assert t[0] == 0
    assert_close(t[-1].item(), 1.0)
    assert t.max() <= 1
    assert (t.diff() > 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.5])
@pytest.mark.parametrize("steps", [3, 32, 57])
def test_a_grid_is_rounded_to_float32_only_once(steps, shift):
    exact = [to_shifted((steps - i) / steps, shift) for i in range(steps + 1)]
    assert torch.equal(sc.time_grid(steps, shift), torch.tensor(exact))


def test_a_grid_is_even_unless_shifted():
    assert_close(sc.time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_state_is_interpolated_from_data_to_noise():
    x_0 = torch.full((2, 3), 5.0)
    noise = torch.full((2, 3), -1.0)
    x_t = sc.interpolate(x_0, noise, torch.tensor([0.25, 1.0]))
    assert_close(x_t, torch.tensor([[3.5], [-1.0]]).expand(2, 3))


def test_euler_is_exact_for_a_constant_velocity():
    noise = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)
    end = sc.euler_sample(constant(0.7), noise, sc.time_grid(3, 3.0))
    assert_close(end, noise - 0.7, atol=1e-6, rtol=0)


def test_euler_is_first_order_on_a_curved_flow():
    flow = Mixture()
    noise = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)
    times = torch.linspace(1, 0.01, 1025, dtype=torch.float64)
    exact = runge_kutta(flow, noise, 1.0, 0.01, 500)
    errors = []
    for every in (8, 4, 2):
        errors.append((sc.euler_sample(flow, noise, times[::every]) - exact).norm())
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


def test_the_exact_flow_carries_noise_to_the_mixture():
    noise = torch.randn(10_000, 2, generator=seeded(), dtype=torch.float64)
    x = sc.euler_sample(Mixture(), noise, sc.time_grid(80))
    data = Mixture().sample(10_000, seeded(1))
    assert_close(x.mean(0), data.mean(0), atol=0.04, rtol=0)
    assert_close(x.T.cov(), data.T.cov(), atol=0.05, rtol=0)


def test_the_sampler_calls_the_network_once_a_step_with_times_and_cond():
    calls = []

    def velocity(x, t, *, label):
        calls.append((t.clone(), label))
        return torch.zeros_like(x)

    times = sc.time_grid(3, 3.0)
    sc.euler_sample(velocity, torch.zeros(5, 1), times, label=torch.arange(5))
    assert_close(torch.stack([t for t, _ in calls]), times[:-1, None].expand(3, 5))
    assert all(torch.equal(label, torch.arange(5)) for _, label in calls)


def test_euler_steps_of_a_bf16_network_are_not_rounded_to_bf16():
    """1/3 is 0.334 in bfloat16: three such steps of velocity 1 would go to -0.002."""
    network = lambda x, t: torch.ones_like(x, dtype=torch.bfloat16)  # noqa: E731
    end = sc.euler_sample(network, torch.ones(1, 1), sc.time_grid(3))
    assert_close(end, torch.zeros(1, 1), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ windows


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200), st.sampled_from([8, 30, 32, 64]), st.booleans(), shifts, st.integers(0, 99)
)
def test_windows_of_the_paper_descend_from_1_to_0_at_most(batch, n, fuse, shift, seed):
    config = sc.ShortcutConfig(grid_steps=n, strides=(2, n // 4), shift_range=(shift, 2 * shift))
    t, t_mid, t_end, k, *_ = sc.sample_windows(config, batch, fuse, generator=seeded(seed))
    assert t.shape == t_mid.shape == t_end.shape == (batch,)
    assert 0.4 * batch - 1 <= k <= 0.4 * batch + 1
    assert (t <= 1).all() and (t > t_mid).all() and (t_end >= 0).all()
    assert (t_mid[k:] > t_end[k:]).all()
    assert ((t_mid[:k] > t_end[:k]) | ((t_mid[:k] == 0) & fuse)).all()


@pytest.fixture(scope="module")
def many():
    """200,000 windows at shift 3, as strides and starts in grid steps; k; kind."""
    config = sc.ShortcutConfig(**shift_of(3))
    windows = sc.sample_windows(config, 200_000, U=0.0, generator=seeded())
    u, u_mid, u_end = (32 * to_grid(time.double(), 3) for time in windows[:3])
    start = u.round().long()
    stride = (u - u_mid).round().long()
    assert_close(u, start.double(), atol=1e-3, rtol=0)
    assert_close(u - u_mid, stride.double(), atol=1e-3, rtol=0)
    assert_close(u_mid - u_end, stride.double(), atol=1e-3, rtol=0)
    return SimpleNamespace(start=start, stride=stride, k=windows.teacher_rows, kind=windows.kind)


def test_teacher_rows_have_stride_1_and_start_anywhere(many):
    assert many.k == 80_000 and many.kind == "distil"
    assert (many.stride[: many.k] == 1).all()
    starts = torch.bincount(many.start[: many.k], minlength=33)
    assert (starts[:2] == 0).all()
    assert abs(chi_squared(starts[2:], many.k / 31)) < 4


def test_self_rows_have_each_stride_equally_often(many):
    strides = torch.bincount(many.stride[many.k :], minlength=9)
    assert strides.count_nonzero() == 3
    assert abs(chi_squared(strides[[2, 4, 8]], 120_000 / 3)) < 4


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_self_rows_start_wherever_both_steps_fit(many, stride):
    of_stride = many.start[many.k :][many.stride[many.k :] == stride]
    starts = torch.bincount(of_stride, minlength=33)
    assert (starts[: 2 * stride] == 0).all()
    assert abs(chi_squared(starts[2 * stride :], starts.sum() / (33 - 2 * stride))) < 4


def test_teacher_rows_of_fusion_start_uniformly_off_the_grid():
    windows = draw("fuse", 100_000, FLAT, U=0.0)
    t = windows.t[:40_000]
    assert windows.teacher_rows == 40_000 and windows.kind == "fuse"
    assert abs(chi_squared(torch.histc(t, 50, 0, 1), 40_000 / 50)) < 4
    assert ((32 * t) % 1 > 0.01).float().mean() > 0.95


def test_windows_of_fusion_are_cut_at_the_data():
    windows = draw("fuse", 10_000, FLAT, U=0.0)
    t, t_mid, t_end = (32 * time[:4000] for time in windows[:3])
    assert_close(t_mid, (t - 1).clamp(min=0), atol=1e-4, rtol=0)
    assert_close(t_end, (t - 2).clamp(min=0), atol=1e-4, rtol=0)


def test_self_rows_of_fusion_are_those_of_distillation():
    windows = draw("fuse", 10_000, FLAT, U=0.0)
    t, t_mid, t_end = (32 * time[4000:] for time in windows[:3])
    assert_close(t, t.round(), atol=1e-4, rtol=0)
    assert_close(t - t_mid, t_mid - t_end, atol=1e-4, rtol=0)
    assert set((t - t_mid).round().tolist()) == {2, 4, 8}


def test_each_row_of_the_paper_has_a_shift_of_its_own_from_the_whole_range():
    t, t_mid, t_end, k, *_ = sc.sample_windows(PAPER, 50_000, U=0.0, generator=seeded())
    t, t_mid, t_end = (time[:k].double() for time in (t, t_mid, t_end))
    # 1/t = 1/(s u) + 1 - 1/s at u, u - d and u - 2 d, d = 1/32: two differences give u, then s
    inner = (t < 0.999) & (t_end > 0)
    t, t_mid, t_end = t[inner], t_mid[inner], t_end[inner]
    a = 1 / t_mid - 1 / t
    b = 1 / t_end - 1 / t_mid
    u = 2 * b / (b - a) / 32
    s = (1 / u - 1) / (1 / t - 1)
    s = s[u < 0.9]
    assert 2.45 < s.min() < 2.55 and 4.45 < s.max() < 4.55
    assert abs(s.mean() - 3.5) < 0.03


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_number_of_teacher_rows_is_right_on_average(batch):
    g = seeded()
    k = [sc.sample_windows(PAPER, batch, generator=g).teacher_rows for _ in range(800)]
    low = math.floor(0.4 * batch)
    assert set(k) == {low, low + 1}
    assert abs(sum(k) / 800 - 0.4 * batch) < 4 * 0.5 / math.sqrt(800)


@pytest.mark.parametrize("U, k", [(0.0, 1), (0.19, 1), (0.21, 2), (0.999, 2)])
def test_processes_that_share_U_have_as_many_teacher_rows(U, k):
    for seed in range(3):
        assert draw("distil", 2, sc.ShortcutConfig(teacher_ratio=0.9), seed, U=U).teacher_rows == k


def test_rounding_of_U_makes_no_row_too_many():
    config = sc.ShortcutConfig(teacher_ratio=1.0)
    assert draw("distil", 512, config, U=1 - 1e-16).teacher_rows == 512


@pytest.mark.parametrize("ratio, k", [(0.0, 0), (1.0, 7)])
def test_a_batch_may_be_all_teacher_rows_or_none(ratio, k):
    config = sc.ShortcutConfig(teacher_ratio=ratio)
    for seed in range(20):
        assert draw("distil", 7, config, seed).teacher_rows == k


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_windows(kind):
    first, again, other = (draw(kind, 64, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))
    assert not torch.equal(first.t, other.t)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_need_no_generator(kind):
    sample = sc.matched_windows if "matched" in kind else sc.sample_windows
    windows = sample(MATCHED if "matched" in kind else PAPER, 5, fuse="fuse" in kind)
    assert len(windows.t) == 5 and windows.kind == kind


def test_windows_are_for_distillation_unless_fuse_is_given():
    assert sc.sample_windows(PAPER, 2).kind == "distil"
    assert sc.matched_windows(MATCHED, 2).kind == "matched"


@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_are_drawn_by_the_generator_on_its_device(kind, monkeypatch):
    generator = SimpleNamespace(device="a GPU")
    seen = []

    def rand(count, generator=None, device=None):
        seen.append((generator, device))
        return torch.full((count,), 0.5)

    monkeypatch.setattr(torch, "rand", rand)
    sample = sc.matched_windows if "matched" in kind else sc.sample_windows
    sample(MATCHED if "matched" in kind else PAPER, 4, fuse="fuse" in kind, generator=generator)
    assert len(seen) >= 2
    assert all(call == (generator, "a GPU") for call in seen)


# ---------------------------------------------------------------------------------- target and loss


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(shift=shifts, value=st.floats(-3, 3), rank=st.integers(1, 4))
def test_a_constant_velocity_is_a_fixed_point_of_every_window(kind, shift, value, rank):
    config = sc.MatchedConfig if "matched" in kind else sc.ShortcutConfig
    windows = draw(kind, 64, config(**shift_of(shift)))
    x_t = torch.randn(64, *[2] * (rank - 1), generator=seeded(), dtype=torch.float64)
    target = sc.shortcut_target(windows, x_t, constant(value), constant(value))
    assert_close(target, torch.full_like(x_t, value), atol=1e-9, rtol=0)


def test_the_target_of_a_linear_velocity_weighs_its_halves_by_their_lengths():
    """v = 2 t, where (v_1 + v_2) / 2 is wrong by more than 5 % in some window."""
    windows = draw("distil", 256, sc.ShortcutConfig(**shift_of(4)))
    t, t_mid, t_end = (time.double() for time in windows[:3])
    w = (t - t_mid) / (t - t_end)
    v = lambda x, t: 2 * t[:, None].expand_as(x)  # noqa: E731
    x_t = torch.randn(256, 3, generator=seeded(), dtype=torch.float64)
    target = sc.shortcut_target(windows, x_t, v, v)
    expected = w * 2 * t + (1 - w) * 2 * t_mid
    assert_close(target, expected[:, None].expand(256, 3), atol=1e-9, rtol=0)
    plain_mean = t + t_mid
    assert ((plain_mean - expected).abs() / expected).max() > 0.05


def test_one_step_along_the_target_ends_where_two_euler_steps_end():
    flow = Mixture()
    windows = draw("distil", 300, FLAT)
    x_t = torch.randn(300, 2, generator=seeded(), dtype=torch.float64)
    target = sc.shortcut_target(windows, x_t, flow, flow)
    t, t_mid, t_end = (time.double()[:, None] for time in windows[:3])
    x_mid = x_t - (t - t_mid) * flow(x_t, t[:, 0])
    x_end = x_mid - (t_mid - t_end) * flow(x_mid, t_mid[:, 0])
    assert_close(x_t - (t - t_end) * target, x_end)


def velocities_of(kind, windows, x_0, noise):
    """First and second velocity, from constants: teacher 1, fast 2, slow 4."""
    teacher, fast, slow = constant(1.0), constant(2.0), constant(4.0)
    if kind == "dual":
        return sc.dual(windows, teacher, fast, slow)
    if kind == "vanilla":
        return sc.vanilla(windows, teacher, slow)
    if kind == "fusion":
        return sc.fusion(windows, x_0, noise, fast)
    if kind == "matched":
        return sc.matched(windows, teacher, slow)
    return sc.matched_fusion(windows, x_0, noise, fast)


WINDOWS_OF = {
    "dual": "distil",
    "vanilla": "distil",
    "fusion": "fuse",
    "matched": "matched",
    "matched_fusion": "matched fuse",
}
SERVES = [
    # first and second velocity of a teacher row, of a self row; noise - x_0 is 9
    ("dual", (1, 4), (2, 4)),
    ("vanilla", (1, 1), (4, 4)),
    ("fusion", (9, 9), (2, 2)),
    ("matched", (1, 4), None),
    ("matched_fusion", (9, 2), None),
]


def windows_and_targets(kind, teacher_row, self_row):
    """Ten windows, four of teacher rows if there are self rows, and their targets from SERVES."""
    k = 4 if self_row else 10
    windows = draw(WINDOWS_OF[kind], 10, **({"U": 0.0} if self_row else {}))
    w = (windows.t - windows.t_mid) / (windows.t - windows.t_end)
    pairs = torch.tensor([teacher_row] * k + [self_row] * (10 - k)).float()
    return windows, w * pairs[:, 0] + (1 - w) * pairs[:, 1]


def loss_of(kind, windows, student):
    x_0 = torch.full((10, 2, 3), 2.0)
    noise = torch.full((10, 2, 3), 11.0)
    first, second = velocities_of(kind, windows, x_0, noise)
    return sc.shortcut_loss(windows, x_0, noise, student, first, second)


@pytest.mark.parametrize("kind, teacher_row, self_row", SERVES)
def test_which_velocity_serves_which_row(kind, teacher_row, self_row):
    windows, target = windows_and_targets(kind, teacher_row, self_row)
    loss, _ = loss_of(kind, windows, constant(1.5))
    assert_close(loss, (target - 1.5).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind, teacher_row, self_row", SERVES)
def test_the_log_tells_the_loss_of_teacher_and_self_rows(kind, teacher_row, self_row):
    windows, target = windows_and_targets(kind, teacher_row, self_row)
    _, log = loss_of(kind, windows, constant(1.5))
    error = (target - 1.5).square()
    k = 4 if self_row else 10
    assert_close(log["teacher_loss"], error[:k].mean(), rtol=1e-4, atol=0)
    assert_close(log["self_loss"], error[k:].mean(), rtol=1e-4, atol=0, equal_nan=True)
    assert log["self_loss"].isnan() == (self_row is None)


@pytest.mark.parametrize("student, residual", [(0.0, 1.0), (2.5, 0.25), (2.0, 0.0)])
def test_the_residual_is_relative_to_the_target(student, residual):
    windows = draw("distil", 8, FLAT)
    x = torch.zeros(8, 5)
    _, log = sc.shortcut_loss(windows, x, x, constant(student), constant(2.0), constant(2.0))
    assert_close(log["residual"], torch.tensor(residual), atol=1e-6, rtol=1e-6)


def test_the_student_sees_the_state_and_time_of_the_windows():
    seen = []

    def student(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    x_0 = torch.full((2, 3), 5.0)
    noise = torch.full((2, 3), -1.0)
    windows = draw("distil", 2)
    sc.shortcut_loss(windows, x_0, noise, student, constant(1), constant(1))
    assert len(seen) == 1
    assert_close(seen[0][0], (5 - 6 * windows.t)[:, None].expand(2, 3))
    assert torch.equal(seen[0][1], windows.t)


class Recorder:
    """Velocities that record their name, rows, times and whether gradients are on."""

    def __init__(self):
        self.calls = []

    def __call__(self, name):
        def velocity(x, t, *, row):
            assert len(x) == len(t) == len(row)
            self.calls.append((name, row.tolist(), t.clone(), torch.is_grad_enabled()))
            return torch.zeros_like(x)

        return velocity


def recorded(kind, batch=10, ratio=0.4, config=None):
    """Calls of one loss; x_0 and cond `row` hold the number of the row."""
    record = Recorder()
    config = config or (None if "matched" in kind else sc.ShortcutConfig(teacher_ratio=ratio))
    more = {} if "matched" in kind else {"U": 0.0}
    windows = draw(WINDOWS_OF[kind], batch, config, **more)
    row = torch.arange(batch)
    x = row.float()[:, None]
    first, second = {
        "dual": lambda: sc.dual(windows, record("teacher"), record("fast"), record("slow")),
        "vanilla": lambda: sc.vanilla(windows, record("teacher"), record("slow")),
        "fusion": lambda: sc.fusion(windows, x, x, record("ema")),
        "matched": lambda: sc.matched(windows, record("teacher"), record("slow")),
        "matched_fusion": lambda: sc.matched_fusion(windows, x, x, record("ema")),
    }[kind]()
    sc.shortcut_loss(windows, x, x, record("student"), first, second, row=row)
    return windows, record.calls


HEAD, TAIL, ALL = [0, 1, 2, 3], [4, 5, 6, 7, 8, 9], list(range(10))
CALLS = {
    "dual": [("teacher", HEAD), ("fast", TAIL), ("slow", ALL)],
    "vanilla": [("teacher", HEAD), ("slow", TAIL)] * 2,
    "fusion": [("ema", TAIL)] * 2,
    "matched": [("teacher", ALL), ("teacher", ALL), ("slow", ALL)],
    "matched_fusion": [("ema", ALL)],
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_are_few_in_order_and_get_their_own_rows(kind):
    _, calls = recorded(kind)
    assert [call[:2] for call in calls] == [*CALLS[kind], ("student", ALL)]


@pytest.mark.parametrize("kind", CALLS)
def test_only_the_student_is_called_with_gradients(kind):
    _, calls = recorded(kind)
    assert [call[3] for call in calls] == [False] * len(CALLS[kind]) + [True]


def test_the_velocities_of_dual_get_the_times_of_their_rows():
    windows, calls = recorded("dual")
    teacher, fast, slow, student = (call[2] for call in calls)
    assert_close(teacher, windows.t[:4])
    assert_close(fast, windows.t[4:])
    assert_close(slow, windows.t_mid)
    assert_close(student, windows.t)


def test_the_velocities_of_matched_windows_get_the_times_of_a_midpoint_step():
    windows, calls = recorded("matched")
    first, middle, slow, student = (call[2] for call in calls)
    assert_close(first, windows.t)
    assert_close(middle, (windows.t + windows.t_mid) / 2)
    assert_close(slow, windows.t_mid)
    assert_close(student, windows.t)


def test_a_long_part_of_the_teacher_takes_two_midpoint_steps():
    windows, calls = recorded("matched", config=sc.MatchedConfig(steps=1, **shift_of(3)))
    assert [call[0] for call in calls] == [*["teacher"] * 4, "slow", "student"]
    for quarter, call in enumerate(calls[:4]):
        assert_close(call[2], windows.t - quarter / 4 * (windows.t - windows.t_mid))
    assert_close(calls[4][2], windows.t_mid)


@pytest.mark.parametrize(
    "steps, shift, part, count",
    [(3, 1, 3 / 8, 1), (3, 3, 3 / 8, 1), (3, 6, 3 / 8, 1), (2, 3, 3 / 8, 1), (2, 6, 3 / 8, 2),
     (1, 1, 3 / 8, 1), (1, 3, 3 / 8, 2), (1, 3, 1.0, 2), (1, 1, 0.5, 1), (1, 0.5, 3 / 8, 2),
     (1, 0.3, 3 / 8, 2), (2, 0.3, 1.0, 2), (3, 0.2, 3 / 8, 1)],
)  # fmt: skip
def test_no_midpoint_step_is_longer_than_half_of_the_path(steps, shift, part, count):
    config = sc.MatchedConfig(steps, teacher_part=part, **shift_of(shift))
    assert config.midpoint_steps == count
    windows = draw("matched", 5000, config)
    longest = (windows.t - windows.t_mid).max().item()
    assert windows.midpoint_steps == count
    assert longest / count <= 0.5 + 1e-6
    assert count == 1 or longest / (count - 1) > 0.5


@pytest.mark.parametrize("kind", ["distil", "fuse", "matched", "matched fuse"])
def test_a_batch_without_rows_is_refused(kind):
    with pytest.raises(ValueError, match="batch=0 must be >= 1"):
        draw(kind, 0)


@pytest.mark.parametrize("ratio, called", [(0.0, ["fast", "slow"]), (1.0, ["teacher", "slow"])])
def test_no_network_is_called_without_rows(ratio, called):
    _, calls = recorded("dual", ratio=ratio)
    assert [name for name, *_ in calls] == [*called, "student"]
    assert all(rows == ALL for _, rows, *_ in calls)


@pytest.mark.parametrize("kind", CALLS)
def test_gradients_reach_the_student_and_nobody_else(kind):
    nets = {name: torch.nn.Linear(3, 2) for name in ("student", "teacher", "fast", "slow")}

    def velocity(name):
        return lambda x, t: nets[name](torch.cat([x, t[:, None]], 1))

    x_0, noise = torch.randn(2, 16, 2, generator=seeded())
    windows = draw(WINDOWS_OF[kind], 16)
    student, teacher, fast, slow = (velocity(name) for name in nets)
    first, second = {
        "dual": lambda: sc.dual(windows, teacher, fast, slow),
        "vanilla": lambda: sc.vanilla(windows, teacher, slow),
        "fusion": lambda: sc.fusion(windows, x_0, noise, fast),
        "matched": lambda: sc.matched(windows, teacher, slow),
        "matched_fusion": lambda: sc.matched_fusion(windows, x_0, noise, fast),
    }[kind]()
    loss, log = sc.shortcut_loss(windows, x_0, noise, student, first, second)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in nets.pop("student").parameters())
    assert all(p.grad is None for net in nets.values() for p in net.parameters())
    assert not any(value.requires_grad for value in log.values())
    assert not sc.shortcut_target(windows, x_0, first, second).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 4, 8), (6, 3, 4, 4)])
@pytest.mark.parametrize("kind", CALLS)
def test_networks_get_float32_or_float64_and_may_answer_in_less(kind, shape, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_0, noise = (torch.randn(shape, generator=seeded(seed)).to(dtype) for seed in (0, 1))
    weight = torch.ones((), dtype=dtype, requires_grad=True)

    def network(x, t):
        assert x.dtype == t.dtype == wide
        return weight * x.to(dtype)

    windows = draw(WINDOWS_OF[kind], 6)
    first, second = {
        "dual": lambda: sc.dual(windows, network, network, network),
        "vanilla": lambda: sc.vanilla(windows, network, network),
        "fusion": lambda: sc.fusion(windows, x_0, noise, network),
        "matched": lambda: sc.matched(windows, network, network),
        "matched_fusion": lambda: sc.matched_fusion(windows, x_0, noise, network),
    }[kind]()
    loss, _ = sc.shortcut_loss(windows, x_0, noise, network, first, second)
    assert loss.dtype == wide
    loss.backward()
    assert weight.grad.isfinite()
    assert sc.shortcut_target(windows, x_0, first, second).dtype == wide


@pytest.mark.parametrize("function", [sc.fusion, sc.matched_fusion])
def test_the_velocity_of_bf16_data_is_not_rounded_to_bf16(function):
    """1 - 1/512 needs nine bits; bfloat16 has eight."""
    x_0 = torch.full((4, 2), 1 / 512, dtype=torch.bfloat16)
    noise = torch.ones(4, 2, dtype=torch.bfloat16)
    windows = draw(WINDOWS_OF[function.__name__], 4)
    first, _ = function(windows._replace(teacher_rows=4), x_0, noise, constant(0))
    assert_close(first(torch.zeros(4, 2), windows.t), torch.full((4, 2), 511 / 512))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samplers_and_scale_work_in_float32_or_float64(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = torch.randn(6, 2, generator=seeded()).to(dtype)
    times = sc.time_grid(3)

    def network(x, t):
        assert x.dtype == t.dtype == wide
        return x.to(dtype)

    path = sc.teacher_path(network, noise, times)
    assert sc.euler_sample(network, noise, times).dtype == wide
    assert path.x.dtype == path.velocity.dtype == path.mean.dtype == wide
    assert sc.optimal_scale(lambda x, t: 2 * network(x, t), path).dtype == wide


def test_nothing_of_the_callers_is_changed():
    x_0, noise = torch.randn(2, 8, 2, generator=seeded())
    windows = draw("distil", 8)
    before = [x.clone() for x in (x_0, noise, *windows[:3])]
    first, second = sc.dual(windows, constant(1), constant(2), constant(4))
    sc.shortcut_loss(windows, x_0, noise, constant(0), first, second)
    sc.euler_sample(constant(1.0), noise, sc.time_grid(3))
    sc.teacher_path(constant(1.0), noise, sc.time_grid(3))
    assert all(torch.equal(a, b) for a, b in zip(before, (x_0, noise, *windows[:3])))


# ---------------------------------------------------------------------------------------------- EMA


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.9999), st.integers(1, 50))
def test_an_ema_of_constant_weights_has_its_closed_form(decay, steps):
    """Weights 1, EMA from 0: after m updates it is 1 - decay^m."""
    ema = [torch.zeros(2), torch.zeros(2, 3)]
    for _ in range(steps):
        sc.update_ema(ema, (torch.ones(2), torch.ones(2, 3)), decay)
    for average in ema:
        assert_close(average, torch.full_like(average, 1 - decay**steps), atol=2e-6, rtol=1e-5)


def test_an_ema_weighs_late_weights_most():
    ema = [torch.tensor([8.0])]
    for weight in (1.0, 2.0):
        sc.update_ema(iter(ema), iter([torch.tensor([weight])]), 0.75)
    assert_close(ema[0], torch.tensor([8 * 0.75**2 + 1 * 0.25 * 0.75 + 2 * 0.25]))


def test_an_ema_in_float32_of_bf16_weights_moves_where_one_in_bf16_would_stall():
    ema = [torch.zeros(4)]
    narrow = torch.zeros(4, dtype=torch.bfloat16)
    weights = [torch.ones(4, dtype=torch.bfloat16)]
    for _ in range(5000):
        sc.update_ema(ema, weights, 0.999)
        narrow.lerp_(weights[0], 0.001)
    assert_close(ema[0], torch.full((4,), 1 - 0.999**5000), atol=1e-4, rtol=0)
    assert narrow.max() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_ema_in_less_than_float32_is_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype} must be float32 or float64"):
        sc.update_ema([torch.zeros(4, dtype=dtype)], [torch.ones(4)], 0.999)


def test_an_ema_may_be_float64():
    ema = [torch.zeros(1, dtype=torch.float64)]
    sc.update_ema(ema, [torch.ones(1)], 0.9)
    assert_close(ema[0].item(), 1 - 0.9)


def test_an_ema_and_its_weights_must_be_equally_many():
    with pytest.raises(ValueError, match="zip"):
        sc.update_ema([torch.zeros(2)], [torch.ones(2), torch.ones(2)], 0.9)


def test_an_ema_and_its_weights_must_have_the_same_shape():
    with pytest.raises(ValueError, match=r"weight has shape \[1\], must have \[2\]"):
        sc.update_ema([torch.zeros(2)], [torch.ones(1)], 0.9)


def test_an_ema_keeps_no_graph():
    ema = [torch.zeros(1)]
    sc.update_ema(ema, [torch.ones(1, requires_grad=True)], 0.5)
    assert not ema[0].requires_grad


def test_an_ema_may_itself_be_a_parameter():
    ema = torch.nn.Linear(2, 1)
    sc.update_ema(ema.parameters(), torch.nn.Linear(2, 1).parameters(), 0.5)


# ---------------------------------------------------------------------- look-ahead, matched windows


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("rho", [0.2, 0.4, 0.52, 0.9, 1.0])
def test_formula_b_is_the_fixed_point_far_from_the_ends(rho, dual):
    """The student of the teacher v(u) = u is u - L. Solved as a matrix on a long grid."""
    config = sc.ShortcutConfig(teacher_ratio=rho, **shift_of(1))
    size = 1000  # grid points 1/32 apart; the lowest 16 are pinned to the teacher
    matrix = torch.eye(size, dtype=torch.float64)
    teacher = torch.arange(size, dtype=torch.float64) / 32
    right = teacher.clone()
    rows = torch.arange(16, size)
    matrix[rows, rows] -= (1 - rho) / 2
    for stride in (2, 4, 8):
        matrix[rows, rows - stride] -= (1 - rho) / 6
    right[rows] = rho / 2 * teacher[rows]
    if dual:
        matrix[rows, rows - 1] -= rho / 2
    else:
        right[rows] += rho / 2 * teacher[rows - 1]
    v = torch.linalg.solve_triangular(matrix, right[:, None], upper=False)[:, 0]
    lookahead = sc.paper_lookahead(config, is_vanilla=not dual)
    assert_close((teacher - v)[-1].item(), lookahead, rtol=1e-3, atol=0)


def test_settings_of_the_paper_suit_two_steps():
    assert_close(sc.paper_lookahead(PAPER), 1 / 32 + 1.5 * (14 / 3) / 32)
    assert round(1 / (2 * sc.paper_lookahead(PAPER))) == 2


def test_without_teacher_rows_the_lookahead_is_infinite():
    assert sc.paper_lookahead(sc.ShortcutConfig(teacher_ratio=0.0)) == math.inf


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_on_the_papers_windows_ends_at_their_fixed_point(shift, dual, power):
    """Its look-ahead is 0.1 to 0.2; 200,000 random windows determine it to about 0.002."""
    config = sc.ShortcutConfig(teacher_ratio=0.52, **shift_of(shift))
    table = trained_table(config, power, dual)
    expected = paper_student(0.52, shift, power, dual)
    assert_close(table, expected, atol=0.005, rtol=0)


SHIFT_RANGES = [(1.0, 1.0), (3.0, 3.0), (2.5, 4.5), (0.5, 4.0)]


@pytest.mark.parametrize("shift_range", SHIFT_RANGES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("part", [1 / 32, 3 / 8, 1.0])
def test_matched_windows_solve_a_with_the_required_lookahead(steps, shift_range, part):
    """At times of any shift; all rows share the L* of the middle of the range."""
    config = sc.MatchedConfig(steps=steps, shift_range=shift_range, teacher_part=part)
    t, t_mid, t_end = (time.double() for time in draw("matched", 2000, config)[:3])
    s = sum(shift_range) / 2
    w = (t - t_mid) / (t - t_end)
    of_first = (t - t_mid) / 2
    of_second = t - t_mid + required_lookahead(t_mid, steps, s)
    lookahead = w * of_first + (1 - w) * of_second
    assert_close(lookahead, required_lookahead(t, steps, s), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift_range", SHIFT_RANGES)
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_matched_windows_of_fusion_solve_a_with_a_first_velocity_that_looks_nowhere(
    steps, shift_range
):
    config = sc.MatchedConfig(steps=steps, shift_range=shift_range)
    t, t_mid, t_end = (time.double() for time in draw("matched fuse", 2000, config)[:3])
    s = sum(shift_range) / 2
    w = (t - t_mid) / (t - t_end)
    lookahead = (1 - w) * (t - t_mid + required_lookahead(t_mid, steps, s))
    assert_close(lookahead, required_lookahead(t, steps, s), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind, part", [("matched", 0.3), ("matched fuse", 0.075)])
def test_the_first_velocity_covers_its_part_of_the_samplers_step(kind, part):
    config = sc.MatchedConfig(steps=4, shift_range=(2.0, 4.0), teacher_part=0.3)
    t, t_mid, *_ = draw(kind, 2000, config)
    assert_close(t_mid.double(), sampler_time(t, 4, 3.0, part), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20), st.floats(0.01, 1), st.floats(0.2, 8), st.floats(1, 4), st.integers(0, 99)
)
def test_matched_windows_stay_on_the_path(steps, part, low, ratio, seed):
    config = sc.MatchedConfig(steps, (low, ratio * low), teacher_part=part)
    t, t_mid, t_end, *_ = draw("matched", 200, config, seed)
    assert (t <= 1).all() and (t > t_mid).all() and (t_mid >= 0).all()
    rounding = 1e-6 + 1e-6 * (t - t_end) / (t - t_mid)
    assert (t_end <= t_mid + rounding).all() and (t_end >= -rounding).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_matched_windows_within_a_step_of_the_data_end_at_the_data(steps):
    """So the student there is the mean of the teacher's velocities all the way, at equal weight."""
    t, _, t_end, *_ = draw("matched", 2000, sc.MatchedConfig(steps=steps))
    near = sampler_time(t, steps, 3.5) == 0
    assert near.sum() > 500
    assert_close(t_end[near], torch.zeros(near.sum()), atol=2e-6, rtol=0)


def test_matched_windows_of_fusion_near_the_data_weigh_by_a_time_below_it():
    """There L* = t / 2, so that w = h / (t + h) and t_end = -h with h = t - t_mid."""
    t, t_mid, t_end, *_ = draw("matched fuse", 2000, sc.MatchedConfig(steps=1))
    assert_close(t_end, t_mid - t, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["matched", "matched fuse"])
def test_matched_windows_start_uniformly_in_grid_time(kind):
    windows = draw(kind, 100_000, sc.MatchedConfig(**shift_of(3)))
    u = to_grid(windows.t.double(), 3)
    assert abs(chi_squared(torch.histc(u, 100, 0, 1), 1000)) < 4
    assert windows.teacher_rows == 100_000 and windows.kind == kind


@pytest.mark.parametrize("number", [0.0, 0.25, 1 - 2**-24])
@pytest.mark.parametrize("kind", ["matched", "matched fuse"])
def test_matched_starts_and_shifts_fill_their_ranges_and_leave_out_zero(kind, number, monkeypatch):
    """Every random number is this one, of [0, 1): starts lie in (0, 1], shifts in [low, high]."""
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), number))
    t, t_mid, t_end, *_ = draw(kind, 1, sc.MatchedConfig(**shift_of(1.25, 5.0)))
    expected = to_shifted(torch.tensor([1 - number]), 1.25 + 3.75 * number)
    assert_close(t, expected, rtol=1e-5, atol=0)
    assert 0 <= t_mid < t <= 1 and t_end.isfinite()


@pytest.mark.parametrize("number", [0.0, 0.25, 1 - 2**-24])
def test_fusion_starts_and_shifts_fill_their_ranges_and_leave_out_zero(number, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), number))
    config = sc.ShortcutConfig(teacher_ratio=1.0, **shift_of(1.25, 5.0))
    t, t_mid, *_ = draw("fuse", 1, config)
    expected = to_shifted(torch.tensor([1 - number]), 1.25 + 3.75 * number)
    assert_close(t, expected, rtol=1e-5, atol=0)
    assert 0 <= t_mid < t <= 1


@pytest.mark.parametrize("part", [1 / 8, 3 / 8, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_fixed_point_of_matched_windows_looks_ahead_as_required(
    shift, steps, part, monkeypatch
):
    """The teacher's velocity is t, so a student that looks ahead by L has the velocity t - L.

    Windows start at multiples of 1/480 in grid time. Their t_mid are such multiples too, so the
    student is a table, and as many rounds as there are hops to the data solve it.
    """
    size = 480
    u = torch.arange(1, size + 1, dtype=torch.float64) / size
    monkeypatch.setattr(torch, "rand", lambda count, **_: 1 - u)
    config = sc.MatchedConfig(steps=steps, teacher_part=part, **shift_of(shift))
    windows = draw("matched", size, config)
    table = torch.zeros(size + 1, dtype=torch.float64)

    def ema(x, t):
        return table[(size * to_grid(t, shift)).round().long()][:, None]

    first, second = sc.matched(windows, lambda x, t: t[:, None], ema)
    for _ in range(math.ceil(steps / part)):
        x_t = torch.zeros(size, 1, dtype=torch.float64)
        table[1:] = sc.shortcut_target(windows, x_t, first, second)[:, 0]
    t = to_shifted(u, shift)
    assert_close(t - table[1:], required_lookahead(t, steps, shift), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_with_the_whole_step_as_its_part_the_target_is_the_teachers_by_midpoint_steps(steps):
    """Whatever the EMA says."""
    flow = Mixture()
    config = sc.MatchedConfig(steps=steps, teacher_part=1.0)
    assert config.midpoint_steps == 2  # at a shift of 3.5
    windows = draw("matched", 500, config)
    x_t = torch.randn(500, 2, generator=seeded(), dtype=torch.float64)
    first, second = sc.matched(windows, flow, constant(100.0))
    target = sc.shortcut_target(windows, x_t, first, second)
    t = windows.t.double()
    quarter = (t - sampler_time(t, steps, 3.5)) / 4
    v_1 = flow(x_t - quarter[:, None] * flow(x_t, t), t - quarter)
    x = x_t - 2 * quarter[:, None] * v_1
    v_2 = flow(x - quarter[:, None] * flow(x, t - 2 * quarter), t - 3 * quarter)
    assert_close(target, (v_1 + v_2) / 2, atol=1e-3, rtol=1e-4)


def error_of_the_teachers_part(h, midpoint_steps):
    """Of its mean velocity from 0.6 down by h, on a curved flow."""
    flow = Mixture()
    x_t = torch.randn(500, 2, generator=seeded(), dtype=torch.float64)
    t = torch.full((500,), 0.6, dtype=torch.float64)
    exact = (x_t - runge_kutta(flow, x_t, 0.6, 0.6 - h, 50)) / h
    windows = sc.Windows(t, t - h, t - h, 500, "matched", midpoint_steps)
    first, second = sc.matched(windows, flow, constant(0))
    return (sc.shortcut_target(windows, x_t, first, second) - exact).norm()


@pytest.mark.parametrize("midpoint_steps", [1, 2])
def test_midpoint_steps_are_second_order_on_a_curved_flow(midpoint_steps):
    """Against the mean velocity of the exact path; an Euler step would be first order."""
    errors = [error_of_the_teachers_part(h, midpoint_steps) for h in (0.1, 0.05, 0.025)]
    assert 3.2 < errors[0] / errors[1] < 4.8
    assert 3.6 < errors[1] / errors[2] < 4.4


def test_two_midpoint_steps_have_a_quarter_of_the_error_of_one():
    assert 3.2 < error_of_the_teachers_part(0.1, 1) / error_of_the_teachers_part(0.1, 2) < 4.8


def mean_over_data(flow, x, t, function):
    """E[function(x_0, noise)] given x_t = x, on a line, by Gauss-Hermite quadrature.

    x, t: (B,); function maps (B, 1) tensors to (B, 1).
    """
    nodes, node_weights = map(torch.from_numpy, hermegauss(40))
    weights, means, _, std = flow.posterior(x[:, None], t)
    total = torch.zeros(len(x), 1, dtype=torch.float64)
    for k in range(weights.shape[1]):
        for node, node_weight in zip(nodes, node_weights / node_weights.sum()):
            x_0 = means[:, k] + (std * node)[:, None]
            noise = (x[:, None] - (1 - t[:, None]) * x_0) / t[:, None]
            total += weights[:, k, None] * node_weight * function(x_0, noise)
    return total


def test_a_holds_for_matched_fusion_to_first_order_in_the_first_step():
    """Data in place of the exact velocity change the mean target by the square of the first step.

    The student's look-ahead is of first order in it, so (A) is right to that order.
    """
    flow = Mixture(means=((-1.0,), (1.0,)), std=0.4)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)
    t = torch.full_like(x, 0.6)
    student = lambda x, t: flow(x, t - 0.1)  # noqa: E731
    differences = []
    for h in (0.01, 0.005, 0.0025):
        windows = sc.Windows(t, t - h, t - 3 * h, 21, "matched fuse")

        def of_data(x_0, noise, windows=windows):
            first, second = sc.matched_fusion(windows, x_0, noise, student)
            return sc.shortcut_target(windows, x[:, None], first, second)

        of_flow = sc.shortcut_target(windows, x[:, None], flow, student)
        differences.append((mean_over_data(flow, x, t, of_data) - of_flow).norm())
    assert 3.5 < differences[0] / differences[1] < 4.5
    assert 3.5 < differences[1] / differences[2] < 4.5


# ------------------------------------------------------------------------------------ kinds, errors


def calls_by_kind(windows):
    x = torch.zeros(4, 2)
    v = constant(0)
    return {
        "dual": lambda: sc.dual(windows, v, v, v),
        "vanilla": lambda: sc.vanilla(windows, v, v),
        "fusion": lambda: sc.fusion(windows, x, x, v),
        "matched": lambda: sc.matched(windows, v, v),
        "matched_fusion": lambda: sc.matched_fusion(windows, x, x, v),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", WINDOWS_OF)
def test_windows_of_another_kind_are_refused(function, kind):
    call = calls_by_kind(draw(kind, 4))[function]
    if WINDOWS_OF[function] == kind:
        assert len(call()) == 2
        return
    with pytest.raises(ValueError, match=f"'{kind}', must be '{WINDOWS_OF[function]}'"):
        call()


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(strides=()), r"strides=\(\) must be one or more integers in \[1, .*16\]"),
        (dict(strides=(2, 17)), r"strides=\(2, 17\) must be .*\[1, .*16\]"),
        (dict(strides=(0,)), r"strides=\(0,\) must be .*\[1, .*16\]"),
        (dict(strides=(2.5,)), r"strides=\(2.5,\) must be .*integers"),
        (dict(grid_steps=8, strides=(5,)), r"strides=\(5,\) must be .*\[1, .*4\]"),
        (dict(grid_steps=9, strides=(5,)), r"strides=\(5,\) must be .*\[1, .*4\]"),
        (dict(teacher_ratio=1.1), r"teacher_ratio=1.1 must lie in \[0, 1\]"),
        (dict(teacher_ratio=-0.1), r"teacher_ratio=-0.1 must lie in \[0, 1\]"),
        (dict(shift_range=(0, 1)), r"shift_range=\(0, 1\) must have 0 < low <= high < inf"),
        (dict(shift_range=(3, 2)), r"shift_range=\(3, 2\) must have 0 < low <= high < inf"),
        (dict(shift_range=(1, math.inf)), r"shift_range=\(1, inf\) must have .* < inf"),
        (dict(fast_decay=1.0), r"fast_decay=1.0 must lie in \[0, 1\)"),
        (dict(fast_decay=1.5), r"fast_decay=1.5 must lie in \[0, 1\)"),
        (dict(fast_decay=-0.1), r"fast_decay=-0.1 must lie in \[0, 1\)"),
        (dict(slow_decay=1.0), r"slow_decay=1.0 must lie in \[0, 1\)"),
        (dict(slow_decay=-0.1), r"slow_decay=-0.1 must lie in \[0, 1\)"),
    ],
)
def test_bad_settings_of_the_paper_are_refused_with_value_and_range(bad, words):
    with pytest.raises(ValueError, match=words):
        sc.ShortcutConfig(**bad)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(steps=0), "steps=0 must be >= 1"),
        (dict(teacher_part=0.0), r"teacher_part=0.0 must lie in \(0, 1\]"),
        (dict(teacher_part=-0.1), r"teacher_part=-0.1 must lie in \(0, 1\]"),
        (dict(teacher_part=1.01), r"teacher_part=1.01 must lie in \(0, 1\]"),
        (dict(shift_range=(-1, 2)), r"shift_range=\(-1, 2\) must have 0 < low <= high < inf"),
        (dict(shift_range=(3, 2)), r"shift_range=\(3, 2\) must have 0 < low <= high < inf"),
        (dict(slow_decay=1.0), r"slow_decay=1.0 must lie in \[0, 1\)"),
    ],
)
def test_bad_settings_of_matched_windows_are_refused_with_value_and_range(bad, words):
    with pytest.raises(ValueError, match=words):
        sc.MatchedConfig(**bad)


@pytest.mark.parametrize(
    "ends",
    [
        dict(teacher_ratio=0.0),
        dict(teacher_ratio=1.0),
        dict(strides=(1, 16)),
        dict(grid_steps=2, strides=(1,)),
        dict(shift_range=(0.1, 0.1)),
        dict(fast_decay=0.0, slow_decay=0.0),
    ],
)
def test_the_ends_of_ranges_are_allowed(ends):
    windows = draw("distil", 100, sc.ShortcutConfig(**ends))
    assert (windows.t <= 1).all() and (windows.t_end >= 0).all()


def test_one_matched_step_is_allowed():
    assert sc.MatchedConfig(steps=1, teacher_part=1, slow_decay=0.0).steps == 1


@pytest.mark.parametrize("name", ["ShortcutConfig", "MatchedConfig"])
def test_settings_are_frozen(name):
    config = getattr(sc, name)()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.shift_range = (1, 1)


def test_default_settings_are_those_of_the_paper():
    assert dataclasses.astuple(PAPER) == (32, 0.4, (2, 4, 8), (2.5, 4.5), 0.99, 0.999)


def test_default_settings_of_matched_windows():
    assert dataclasses.astuple(MATCHED) == (3, (2.5, 4.5), 0.999, 0.375)


def test_matched_windows_are_for_the_middle_of_the_shift_range():
    assert sc.MatchedConfig(**shift_of(1.0, 4.0)).shift == 2.5


def loss_with(x_0=None, noise=None, rows=4, student=0, first=0, second=0, **cond):
    """A loss of four rows of two, but for what is given; a number is a constant velocity."""
    x = torch.zeros(4, 2)
    velocities = [v if callable(v) else constant(v) for v in (student, first, second)]
    x_0 = x if x_0 is None else x_0
    noise = x if noise is None else noise
    return sc.shortcut_loss(draw("distil", rows), x_0, noise, *velocities, **cond)


def shaped(*shape):
    return lambda x, t: torch.zeros(shape)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(noise=torch.zeros(4, 1)), r"noise has shape \[4, 1\], must have \[4, 2\]"),
        (dict(noise=torch.zeros(3, 2)), r"noise has shape \[3, 2\], must have \[4, 2\]"),
        (dict(x_0=torch.zeros(4, 1)), r"noise has shape \[4, 2\], must have \[4, 1\]"),
        (dict(rows=5), "windows has 5 rows, must have 4"),
        (dict(rows=1), "windows has 1 rows, must have 4"),
        (dict(label=torch.zeros(3)), "label has 3 rows, must have 4"),
        (dict(student=shaped(4, 1)), r"student's velocity has shape \[4, 1\], must have \[4, 2\]"),
        (dict(student=shaped(1, 2)), r"student's velocity has shape \[1, 2\]"),
        (dict(first=shaped(4, 1)), r"first velocity has shape \[4, 1\], must have \[4, 2\]"),
        (dict(second=shaped(1, 2)), r"second velocity has shape \[1, 2\], must have \[4, 2\]"),
        (
            dict(x_0=torch.zeros(4, 2).long(), noise=torch.zeros(4, 2).long()),
            "int64 must be of a floating-point type",
        ),
    ],
)
def test_tensors_that_would_broadcast_in_silence_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        loss_with(**bad)


def test_fitting_tensors_are_not_refused():
    loss, _ = loss_with(student=2.0)
    assert_close(loss, torch.tensor(4.0))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sc.time_grid(0), "steps=0 must be >= 1"),
        (lambda: sc.time_grid(3, 0.0), "shift=0.0 must be > 0"),
        (lambda: sc.shift_time(torch.zeros(2), torch.tensor([1.0, -2.0])), "shift=-2.0 must be"),
        (lambda: draw("distil", 2, U=1.0), r"U=1.0 must lie in \[0, 1\)"),
        (lambda: draw("distil", 2, U=1.5), r"U=1.5 must lie in \[0, 1\)"),
        (lambda: draw("distil", 2, U=-0.1), r"U=-0.1 must lie in \[0, 1\)"),
        (
            lambda: sc.euler_sample(constant(1), torch.zeros(2, 2).int(), sc.time_grid(2)),
            "int32 must be of a floating-point type",
        ),
    ],
)
def test_bad_arguments_are_refused_with_value_and_range(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_grid_may_have_one_step():
    assert_close(sc.time_grid(1), torch.tensor([1.0, 0.0]))


# -------------------------------------------------------------------------- warm-up, path and scale


@pytest.mark.parametrize("iteration, decay", [(1, 0.2), (4, 0.5), (36, 0.9), (396, 0.99)])
def test_a_warm_decay_is_i_over_i_plus_4(iteration, decay):
    assert_close(sc.warm_up(0.999, iteration), decay)


def test_a_warm_decay_ends_at_the_decay_itself():
    assert sc.warm_up(0.99, 397) == 0.99
    assert sc.warm_up(0.0, 1) == 0.0


def test_an_ema_that_warms_up_forgets_its_start_as_the_fourth_power_of_the_run():
    """The product of i / (i + 4) over m steps is 4! m! / (m + 4)!."""
    ema = [torch.ones(1, dtype=torch.float64)]
    for i in range(1, 101):
        sc.update_ema(ema, [torch.zeros(1)], sc.warm_up(0.999, i))
    assert_close(ema[0].item(), 24 / (101 * 102 * 103 * 104), rtol=1e-9, atol=0)


def test_the_path_of_a_teacher_has_its_closed_form():
    """Teacher v = t: Euler substeps of h from t to s go down by (t - s) (t + s + h) / 2."""
    times = sc.time_grid(3, 3.0)
    noise = torch.randn(5, 2, generator=seeded())
    path = sc.teacher_path(lambda x, t: t[:, None].expand_as(x), noise, times, substeps=4)
    x = noise
    for i, (t, t_next) in enumerate(pairwise(times)):
        mean = (t + t_next + (t - t_next) / 4) / 2
        assert_close(path.x[i], x, atol=1e-6, rtol=1e-6)
        assert_close(path.velocity[i], t.expand(5, 2))
        assert_close(path.mean[i], mean.expand(5, 2), atol=1e-6, rtol=1e-5)
        x = x - (t - t_next) * mean
    assert torch.equal(path.times, times)
    assert path.x.shape == path.velocity.shape == path.mean.shape == (3, 5, 2)


def test_the_path_of_a_teacher_nears_its_exact_trajectory_as_substeps_grow():
    flow = Mixture()
    noise = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)
    times = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    middle = runge_kutta(flow, noise, 1.0, 0.7, 200)
    end = runge_kutta(flow, middle, 0.7, 0.3, 200)
    exact_mean = torch.stack([(noise - middle) / 0.3, (middle - end) / 0.4])
    errors = []
    for substeps in (64, 128, 256):
        path = sc.teacher_path(flow, noise, times, substeps)
        errors.append((path.mean - exact_mean).norm())
    assert_close(path.x, torch.stack([noise, middle]), atol=0.01, rtol=0)
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


def test_the_path_has_the_teachers_velocity_at_its_states():
    flow = Mixture()
    noise = torch.randn(8, 2, generator=seeded(), dtype=torch.float64)
    path = sc.teacher_path(flow, noise, sc.time_grid(3, 3.0).double())
    for t, x, velocity in zip(path.times, path.x, path.velocity):
        assert_close(velocity, flow(x, t.expand(8)))


def test_a_path_in_float64_is_not_rounded_to_float32():
    times = torch.tensor([1.0, 1 / 3, 0.0], dtype=torch.float64)
    noise = torch.zeros(1, 1, dtype=torch.float64)
    path = sc.teacher_path(constant(0.7), noise, times)
    assert_close(path.mean, torch.full((2, 1, 1), 0.7, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_step_of_the_path_takes_16_substeps_by_default():
    calls = []

    def teacher(x, t, *, label):
        calls.append((t[0].item(), label.tolist()))
        return torch.zeros_like(x)

    sc.teacher_path(teacher, torch.zeros(2, 1), sc.time_grid(1), label=torch.tensor([5, 6]))
    assert sorted({t for t, _ in calls}) == [(i + 1) / 16 for i in range(16)]
    assert all(label == [5, 6] for _, label in calls)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (3, 1.0), (3, 3.0), (8, 3.0)])
@pytest.mark.parametrize("part", [0.4, 1.0, 1.7])
def test_the_scale_of_a_student_that_goes_part_of_the_way_is_its_inverse(steps, shift, part):
    """Teacher v = t: 16 Euler steps from t to s have the mean velocity t - (t - s) 15/32."""
    times = sc.time_grid(steps, shift)

    def teacher(x, t):
        return t[:, None].expand_as(x)

    def student(x, t):
        nearest = (times[:-1] - t[0]).abs().argmin()
        half_step = (times[nearest] - times[nearest + 1]) * 15 / 32
        return teacher(x, t) - part * half_step

    path = sc.teacher_path(teacher, torch.randn(5, 2, generator=seeded()), times)
    assert_close(sc.optimal_scale(student, path).item(), 1 / part, rtol=1e-3, atol=0)


@pytest.mark.parametrize("substeps", [4, 16, 64])
def test_the_scale_of_a_matched_student_is_1_up_to_one_substep(substeps):
    """Its look-ahead is half a step; that of a mean over Euler substeps is half a substep less."""
    config = sc.MatchedConfig(3, **shift_of(3))

    def teacher(x, t):
        return t[:, None].expand_as(x)

    def student(x, t):
        return teacher(x, t - config.lookahead(t))

    noise = torch.randn(5, 2, generator=seeded())
    path = sc.teacher_path(teacher, noise, sc.time_grid(3, 3.0), substeps)
    assert_close(sc.optimal_scale(student, path).item(), 1 - 1 / substeps, rtol=1e-4, atol=0)


def test_the_scale_is_that_of_dense_least_squares():
    flow = Mixture()
    noise = torch.randn(64, 2, generator=seeded(), dtype=torch.float64)
    times = torch.tensor([1.0, 0.75, 0.3, 0.0], dtype=torch.float64)

    def student(x, t):
        return flow(x, t) + 0.3 * x.sin() - 0.2 * t[:, None]

    changes, goals = [], []
    x = noise
    for t, t_next in pairwise(times.tolist()):
        fine = torch.linspace(t, t_next, 17, dtype=torch.float64)
        end = x
        for a, b in pairwise(fine):
            end = end - (a - b) * flow(end, a.expand(64))
        start = torch.full((64,), t, dtype=torch.float64)
        changes.append((student(x, start) - flow(x, start)).flatten())
        goals.append(((x - end) / (t - t_next) - flow(x, start)).flatten())
        x = end
    expected = torch.linalg.lstsq(torch.cat(changes)[:, None], torch.cat(goals)[:, None]).solution
    lam = sc.optimal_scale(student, sc.teacher_path(flow, noise, times))
    assert lam.shape == ()
    assert_close(lam, expected[0, 0], rtol=1e-6, atol=0)


def test_the_scale_of_the_teacher_itself_is_infinite():
    path = sc.teacher_path(constant(1.0), torch.zeros(2, 1), sc.time_grid(3))
    assert sc.optimal_scale(constant(1.0), path) == math.inf


def test_a_path_with_parts_of_different_lengths_is_refused():
    path = sc.teacher_path(constant(1.0), torch.zeros(2, 1), sc.time_grid(3))
    with pytest.raises(ValueError, match="zip"):
        sc.optimal_scale(constant(2.0), path._replace(mean=path.mean[:2]))


def test_path_and_scale_pass_cond():
    label = torch.tensor([1.0, 2.0])

    def velocity(x, t, *, label):
        return label[:, None] * x

    path = sc.teacher_path(velocity, torch.ones(2, 1), sc.time_grid(2), label=label)
    assert_close(path.velocity[0], label[:, None])
    lam = sc.optimal_scale(lambda x, t, label: 2 * velocity(x, t, label=label), path, label=label)
    assert 0 > lam > -1  # x decays, so its mean velocity is below that at the start


def test_sampling_path_and_scale_keep_no_graph():
    weight = torch.ones(1, requires_grad=True)
    network = lambda x, t: weight * x  # noqa: E731
    noise = torch.ones(2, 1)
    times = sc.time_grid(2)
    path = sc.teacher_path(network, noise, times)
    assert not sc.euler_sample(network, noise, times).requires_grad
    assert not any(x.requires_grad for x in (path.x, path.velocity, path.mean))
    assert not sc.optimal_scale(lambda x, t: 2 * network(x, t), path).requires_grad


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CALLS)
def test_a_training_step_runs_on_a_gpu_with_windows_of_the_cpu_or_the_gpu(kind):
    for device in ("cpu", "cuda"):
        g = torch.Generator(device).manual_seed(0)
        sample = sc.matched_windows if "matched" in kind else sc.sample_windows
        config = MATCHED if "matched" in kind else PAPER
        windows = sample(config, 10, "fuse" in WINDOWS_OF[kind], generator=g)
        assert all(time.device.type == device for time in windows[:3])
        x_0, noise = torch.randn(2, 10, 3, device="cuda")
        first, second = velocities_of(kind, windows, x_0, noise)
        loss, _ = sc.shortcut_loss(windows, x_0, noise, constant(0.0), first, second)
        assert loss.device.type == "cuda" and loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sampling_and_scale_run_on_a_gpu_with_times_of_the_cpu_or_the_gpu(device):
    noise = torch.ones(4, 2, device="cuda")
    times = sc.time_grid(3).to(device)
    path = sc.teacher_path(lambda x, t: x, noise, times)
    assert path.x.device.type == "cuda"
    assert sc.euler_sample(lambda x, t: x, noise, times).device.type == "cuda"
    assert sc.optimal_scale(lambda x, t: 2 * x, path).isfinite()


@pytest.mark.gpu
def test_an_ema_on_a_gpu_may_be_of_weights_on_the_cpu():
    ema = [torch.zeros(2, device="cuda")]
    sc.update_ema(ema, [torch.ones(2)], 0.75)
    assert_close(ema[0].cpu(), torch.full((2,), 0.25))


# ----------------------------------------------------------------------------------------- training


class Correction(torch.nn.Module):
    """The exact velocity and a small network that starts at zero, as a LoRA does."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 48), torch.nn.SiLU(), torch.nn.Linear(48, 48), torch.nn.SiLU(),
            torch.nn.Linear(48, 2),
        )  # fmt: skip
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, t):
        exact = self.flow(x.double(), t.double()).float()
        return exact + self.net(torch.cat([x, t[:, None]], 1))


def error_after_training(kind, iterations, steps=3):
    """Mean distance of a few-step sample from the end of the teacher's trajectory."""
    torch.manual_seed(0)
    flow = Mixture()
    g = seeded()
    student, fast, slow = (Correction(flow) for _ in range(3))
    fast.load_state_dict(student.state_dict())
    slow.load_state_dict(student.state_dict())
    teacher = lambda x, t: flow(x.double(), t.double()).float()  # noqa: E731
    optimizer = torch.optim.Adam(student.net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
    paper = sc.ShortcutConfig(teacher_ratio=0.52, **shift_of(1))
    config = sc.MatchedConfig(steps=steps, **shift_of(1))
    for i in range(1, iterations + 1):
        x_0 = flow.sample(256, g).float()
        noise = torch.randn(256, 2, generator=g)
        if kind == "dual":
            windows = sc.sample_windows(paper, 256, generator=g)
            first, second = sc.dual(windows, teacher, fast, slow)
        else:
            windows = sc.matched_windows(config, 256, generator=g)
            first, second = sc.matched(windows, teacher, slow)
        loss, _ = sc.shortcut_loss(windows, x_0, noise, student, first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for ema, decay in ((fast, 0.99), (slow, 0.999)):
            sc.update_ema(ema.net.parameters(), student.net.parameters(), sc.warm_up(decay, i))
    noise = torch.randn(2000, 2, generator=seeded(1))
    exact = sc.euler_sample(teacher, noise, sc.time_grid(100))
    return (sc.euler_sample(slow, noise, sc.time_grid(steps)) - exact).norm(dim=1).mean()


@pytest.mark.parametrize("kind", ["dual", "matched"])
def test_training_brings_few_step_samples_nearer_to_the_teachers_trajectory(kind):
    before = error_after_training(kind, iterations=0)
    after = error_after_training(kind, iterations=300)
    assert after < before / 2
