"""Shortcutting flow matching (SCFM, arXiv 2510.17858): few-step samplers by self-distillation.

A pre-trained flow-matching model takes about 30 small steps to turn noise into data. SCFM
fine-tunes it until one large step lands where two smaller steps land.

Conventions (papers differ in the direction of time and in the sign of v, so read this first)
    time        t = 1 is noise, t = 0 is data, as in Flux and Stable Diffusion 3
    state       x_t = (1 - t) x_0 + t noise
    velocity    v(x_t, t) estimates noise - x_0; an Euler step from t to t' < t is x_t - (t - t') v
    grid time   u in [0, 1]: a sampler's steps are equal in u; the shift s maps it to
                t = s u / (1 + (s - 1) u)

A velocity is any callable v(x, t, **cond) that returns a tensor like x, with x (B, ...), t (B,) and
every conditioning tensor batched on dim 0. It is given x and t in float32 (float64 if the data is)
and must itself cast them to what its network needs: bfloat16 rounds t by up to 0.002, and a step of
the paper's grid is as short as 0.007.

Symbols
    paper       here             meaning
    theta       student          the network that is trained
    theta*      teacher          the pre-trained network, frozen; the student starts as its copy
    theta_fast  fast             exponential moving average (EMA) of the student, decay 0.99
    theta_slow  slow             EMA of the student, decay 0.999
    n           grid_steps       steps of the teacher's own sampler, 32
    s           shift            time shift; in training, drawn for every row of a batch
    rho = k/N   teacher_ratio    expected fraction of teacher rows in a batch, 0.4
Everywhere else N is the number of steps that the student will sample with.

A *window* is two consecutive steps, t > t_mid >= t_end. A batch has *teacher rows*, in which the
teacher takes the first step (Algorithm 2) or both (Algorithm 1), and *self rows*, in which EMAs of
the student take both.

One training step: config is ShortcutConfig(); teacher, student, fast and slow are modules called as
net(x, t, **cond), the last two started as float32 copies of the student; x_0, noise are (B, ...)
    windows = sample_windows(config, batch=len(x_0))                # t > t_mid >= t_end
    first, second = dual(windows, teacher, fast, slow)              # Algorithm 2
    loss, log = shortcut_loss(windows, x_0, noise, student, first, second, **cond)  # Eq. 11-13
    ...                                                             # backward and optimizer step
    update_ema(fast.parameters(), student.parameters(), config.fast_decay)
    update_ema(slow.parameters(), student.parameters(), config.slow_decay)
and then, in few steps (section 5: in how many), with a shift within config.shift_range
    samples = euler_sample(student, noise, time_grid(N, shift), **cond)

Sections 1 to 4 are the paper, with its equation and algorithm numbers. Section 5 is ours: what the
student learns, and windows for a student of N steps. Its equations are (A) to (C).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[..., Tensor]

# -------------------------------------------------------------------------- 1. time and sampling


def shift_time(u: Tensor | float, shift: Tensor | float) -> Tensor | float:
    """Map grid time u to t = s u / (1 + (s - 1) u) (Eq. 17). Shapes broadcast.

    The inverse is shift_time(t, 1 / shift).
    """
    lowest = float(torch.as_tensor(shift).min())
    _require(lowest > 0, f"shift={lowest} must be > 0")
    return u / (u + (1 - u) / shift)  # Eq. 17, divided by s so that rounding can't push t above 1


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times (steps + 1,) of a sampler, float32, from 1 (noise) down to 0 (data)."""
    _require(steps >= 1, f"steps={steps} must be >= 1")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_time(u, shift).float()


def interpolate(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """State x_t = (1 - t) x_0 + t noise, for x_0 and noise (B, ...) and t (B,)."""
    t = _per_row(t, x_0)
    return (1 - t) * x_0 + t * noise


@torch.no_grad()
def euler_sample(velocity: Velocity, x: Tensor, times: Tensor, **cond: Tensor) -> Tensor:
    """Integrate x (B, ...) along falling times (steps + 1,), with one network call per Euler step.

    It computes and returns float32, or float64 if x is that.
    """
    x = _wide(x)
    for t, t_next in pairwise(times):
        x = x - (t - t_next) * _at(velocity, x, t, **cond)
    return x


# ----------------------------------------------------------------------- 2. settings and windows


@dataclass(frozen=True)
class ShortcutConfig:
    """The paper's settings. A value out of range raises a ValueError, which names the range."""

    grid_steps: int = 32  # n: windows lie on the grid of the teacher's own sampler
    teacher_ratio: float = 0.4  # rho (k / N in the paper): expected fraction of teacher rows
    strides: tuple[int, ...] = (2, 4, 8)  # grid steps in each of the two steps of a self row
    shift_range: tuple[float, float] = (2.5, 4.5)  # s ~ U[low, high], drawn per row
    fast_decay: float = 0.99  # of theta_fast, per optimizer step
    slow_decay: float = 0.999  # of theta_slow

    def __post_init__(self):
        longest = self.grid_steps // 2
        strides_fit = all(d in range(1, longest + 1) for d in self.strides)
        _require(
            len(self.strides) > 0 and strides_fit,
            f"strides={self.strides} must be one or more integers in "
            f"[1, grid_steps / 2 = {longest}]",
        )
        rho = self.teacher_ratio
        _require(0 <= rho <= 1, f"teacher_ratio={rho} must lie in [0, 1]")
        _check_shift_range(self.shift_range)
        _check_decay("fast_decay", self.fast_decay)
        _check_decay("slow_decay", self.slow_decay)


class Windows(NamedTuple):
    """Two steps for each row of a batch, from t via t_mid to t_end.

    kind: "distil" for `dual` and `vanilla`, "fuse" for `fusion`, and from section 5 "matched" for
    `matched`, "matched fuse" for `matched_fusion`.
    """

    t: Tensor  # (B,), in (0, 1]
    t_mid: Tensor  # (B,), in [0, t)
    t_end: Tensor  # (B,), at most t_mid; can be below 0 ("matched fuse": down to -t)
    teacher_rows: int  # k: the first k rows are teacher rows, the others self rows
    kind: str  # which functions take these windows
    midpoint_steps: int = 1  # of the teacher from t to t_mid, in `matched` (section 5)


def sample_windows(
    config: ShortcutConfig,
    batch: int,
    fuse: bool = False,
    U: float | None = None,
    generator: torch.Generator | None = None,
) -> Windows:
    """Random windows of Algorithms 1 and 2; set `fuse` to train from scratch (`fusion`).

    Both steps span `stride` grid steps: 1 in teacher rows, one of `strides` in self rows. The start
    is uniform over all grid points from which both steps fit. In fusion the teacher rows need no
    grid: their start is uniform in (0, 1].

    The first k = floor(rho B + U) rows are teacher rows. With U uniform in [0, 1), drawn unless it
    is given, the expectation of k is exactly rho B. Processes that train together must pass the
    same U, so that all make the same network calls (one is left out if k is 0 or B). The windows
    are on the generator's device.
    """
    _require(batch >= 1, f"batch={batch} must be >= 1")
    n = config.grid_steps
    rand = _uniform(generator)
    U = rand(1).item() if U is None else U
    _require(0 <= U < 1, f"U={U} must lie in [0, 1)")
    k = min(int(config.teacher_ratio * batch + U), batch)  # rounding could give batch + 1

    strides = torch.tensor(config.strides)
    choice = (rand(batch) * len(strides)).long()
    stride = strides.to(choice.device)[choice]
    stride[:k] = 1

    lowest = 2 * stride  # the grid point nearest to the data from which both steps fit
    start = lowest + (rand(batch) * (n + 1 - lowest)).floor()
    if fuse:
        # Both velocities are noise - x_0 there, so any t_mid and t_end give the same target. They
        # are kept from falling below 0.
        start[:k] = n * (1 - rand(k))

    low, high = config.shift_range
    shift = low + (high - low) * rand(batch)
    t = shift_time(start / n, shift)
    t_mid = shift_time((start - stride).clamp(min=0) / n, shift)
    t_end = shift_time((start - 2 * stride).clamp(min=0) / n, shift)
    return Windows(t, t_mid, t_end, k, "fuse" if fuse else "distil")


# --------------------------------------------------------------------------- 3. target and loss


def by_rows(k: int, head: Velocity, tail: Velocity) -> Velocity:
    """The velocity that is `head` on the first k rows and `tail` on the others.

    No network is called with an empty batch.
    """

    def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if k == 0:
            return tail(x, t, **cond)
        if k == len(x):
            return head(x, t, **cond)
        head_cond = {name: value[:k] for name, value in cond.items()}
        tail_cond = {name: value[k:] for name, value in cond.items()}
        return torch.cat([head(x[:k], t[:k], **head_cond), tail(x[k:], t[k:], **tail_cond)])

    return velocity


def dual(
    windows: Windows, teacher: Velocity, fast: Velocity, slow: Velocity
) -> tuple[Velocity, Velocity]:
    """First and second velocity of Algorithm 2, the paper's final version.

    Teacher rows: teacher, then slow. Self rows: fast, then slow. That the fast EMA comes first is
    the paper's choice.
    """
    _require_kind(windows, "distil")
    first = by_rows(windows.teacher_rows, teacher, fast)
    second = slow
    return first, second


def vanilla(windows: Windows, teacher: Velocity, slow: Velocity) -> tuple[Velocity, Velocity]:
    """First and second velocity of Algorithm 1: the teacher twice, in self rows `slow` twice."""
    _require_kind(windows, "distil")
    both = by_rows(windows.teacher_rows, teacher, slow)
    return both, both


def fusion(
    windows: Windows, x_0: Tensor, noise: Tensor, ema: Velocity
) -> tuple[Velocity, Velocity]:
    """First and second velocity of training from scratch, without a teacher.

    The rows that have the place of teacher rows regress on noise - x_0, as in plain flow matching;
    the others on two steps of `ema`. Update it with fast_decay: a slower EMA of random weights
    would make a poor target.
    """
    _require_kind(windows, "fuse")
    both = by_rows(windows.teacher_rows, _data_velocity(x_0, noise), ema)
    return both, both


@torch.no_grad()
def shortcut_target(
    windows: Windows, x_t: Tensor, first: Velocity, second: Velocity, **cond: Tensor
) -> Tensor:
    """Velocity (B, ...) of the one step that ends where the two steps end (Eq. 11-12).

    It is displacement over elapsed time. (v_1 + v_2) / 2 would be wrong, since the shift makes the
    two steps unequal in length. Computed in float32 (or float64), without gradients.
    """
    x_t = _wide(x_t)
    t = _per_row(windows.t, x_t)
    t_mid = _per_row(windows.t_mid, x_t)
    t_end = _per_row(windows.t_end, x_t)
    v_1 = first(x_t, windows.t.to(x_t), **cond)
    _require_like(v_1, x_t, "first velocity")
    x_mid = x_t - (t - t_mid) * v_1
    v_2 = second(x_mid, windows.t_mid.to(x_t), **cond)
    _require_like(v_2, x_t, "second velocity")
    x_end = x_mid - (t_mid - t_end) * v_2
    return (x_t - x_end) / (t - t_end)


def shortcut_loss(
    windows: Windows,
    x_0: Tensor,
    noise: Tensor,
    student: Velocity,
    first: Velocity,
    second: Velocity,
    **cond: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error between the student's velocity and the target (Eq. 13), and a log.

    x_0 and noise are (B, ...). The student is called last, so one network with swapped weights can
    serve as all velocities. The log has scalars () without gradients: teacher_loss and self_loss,
    the loss over these rows only (nan if there are none), and residual, |v - target| / |target|.
    """
    _require_like(noise, x_0, "noise")
    for name, value in {"windows": windows.t, **cond}.items():
        _require(len(value) == len(x_0), f"{name} has {len(value)} rows, must have {len(x_0)}")
    x_t = interpolate(x_0, noise, windows.t)
    target = shortcut_target(windows, x_t, first, second, **cond)
    v = student(x_t, windows.t.to(x_t), **cond)
    _require_like(v, x_t, "student's velocity")
    error = (v - target).square()
    loss = error.mean()  # Eq. 13

    error = error.detach()
    k = windows.teacher_rows
    log = {
        "teacher_loss": error[:k].mean(),
        "self_loss": error[k:].mean(),
        "residual": (error.sum() / target.square().sum()).sqrt(),
    }
    return loss, log


# ----------------------------------------------------------------------------------------- 4. EMA


@torch.no_grad()
def update_ema(ema: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) weights (Eq. 14-16), in place, once per optimizer step.

    An EMA must be float32 or float64: in bfloat16 it stalls, as 0.001 of the difference to the
    weights rounds to nothing. The weights may have any dtype. Buffers are not averaged.
    """
    for average, weight in zip(ema, weights, strict=True):
        wide = average.dtype in (torch.float32, torch.float64)
        _require(wide, f"EMA in {average.dtype} must be float32 or float64")
        _require_like(weight, average, "weight")
        average.lerp_(weight.to(average), 1 - decay)  # Eq. 14-16


# ---------------------------------------------------------- 5. beyond the paper: matched windows
#
# The student has no step size among its inputs, so it can't be right for every window that starts
# at t. Follow the teacher from x_t to the data, and let v_T(t - l) be its velocity there a time
# l >= 0 ahead. A target averages velocities of the teacher and of EMAs, and an EMA has itself been
# fitted to such targets. When they are substituted repeatedly, only an average of the v_T(t - l) is
# left. To first order in l it is v_T(t - L), where L is the mean of l: call it the *look-ahead*
# L(t), a time. An Euler step needs the mean velocity over the step: a look-ahead of half the step.
#
# In a target the first velocity has the weight w = (t - t_mid) / (t - t_end), the second 1 - w. Let
# L_1 be the look-ahead of the first at t, and L_2 that of the second at t_mid. (x_mid misses the
# teacher's path, but only by second order in the lengths.) Training has converged when the
# student's look-ahead is that of its targets, on average over the windows that start at t:
#
#     L(t) = mean of  w L_1 + (1 - w) [t - t_mid + L_2]                                         (A)
#
# The teacher has the look-ahead 0, since it is right at t itself. An EMA has the student's: L(t) if
# it is the first velocity, L(t_mid) if it is the second.


def paper_lookahead(config: ShortcutConfig, is_vanilla: bool = False) -> float:
    """Look-ahead L that the paper's windows teach at shift 1, as if the path had no ends.

    It suits N = 1 / (2 L) steps: by default 2 (`vanilla`: 4). Without ends at t = 0 and 1, L is the
    same at all t, and in (A) w = 1/2. With d the stride of a self row divided by n, `dual` has
        teacher rows   (1/n + L) / 2
        self rows      (L + d + L) / 2
    and the mean over all rows, L = rho (1/n + L) / 2 + (1 - rho) (L + E[d] / 2), is solved by
        L = 1/n + (1 - rho) / rho E[d]                                                           (B)
    In teacher rows of `vanilla` both velocities are the teacher's: their look-ahead (0 + 1/n) / 2
    halves (B). Without teacher rows L is inf. On the real path long windows fit only near the
    noise: there L is larger than (B), near the data smaller. The config's shift_range is ignored.
    """
    rho = config.teacher_ratio
    if rho == 0:
        return float("inf")
    mean_d = sum(config.strides) / len(config.strides) / config.grid_steps
    lookahead = 1 / config.grid_steps + (1 - rho) / rho * mean_d  # (B)
    return lookahead / 2 if is_vanilla else lookahead


@dataclass(frozen=True)
class MatchedConfig:
    """Settings of windows that teach the look-ahead which an Euler sampler of N steps requires.

    Sample with time_grid(config.steps, config.shift). What that requires depends on t alone: a
    row's own shift only sets how its t is drawn.
    """

    steps: int = 3  # N
    shift_range: tuple[float, float] = (2.5, 4.5)  # s ~ U[low, high], drawn per row
    slow_decay: float = 0.999  # of theta_slow, per optimizer step
    teacher_part: float = 3 / 8  # fraction of the sampler's step, in u, that the teacher covers

    def __post_init__(self):
        _require(self.steps >= 1, f"steps={self.steps} must be >= 1")
        part = self.teacher_part
        _require(0 < part <= 1, f"teacher_part={part} must lie in (0, 1]")
        _check_shift_range(self.shift_range)
        _check_decay("slow_decay", self.slow_decay)

    @property
    def shift(self) -> float:
        """Shift of the sampler that the windows are matched to."""
        return sum(self.shift_range) / 2

    @property
    def midpoint_steps(self) -> int:
        """Number of midpoint steps of the teacher in `matched`: none is longer than 1/2 in t.

        One, with the default teacher_part, for N >= 3 and shifts between 1/7 and 7.
        """
        # In t, the part that is nearest to the data is the longest if s > 1, nearest to the noise
        # if s < 1.
        longest_part = shift_time(self.teacher_part / self.steps, max(self.shift, 1 / self.shift))
        return math.ceil(2 * longest_part)

    def after(self, t: Tensor, steps: float) -> Tensor:
        """The time, at least 0, that the sampler reaches from t in `steps` of its steps."""
        u = shift_time(t, 1 / self.shift) - steps / self.steps
        return shift_time(u.clamp(min=0), self.shift)

    def lookahead(self, t: Tensor) -> Tensor:
        """Required look-ahead L*(t): half of the sampler's next step from t."""
        return (t - self.after(t, 1)) / 2


def matched_windows(
    config: MatchedConfig,
    batch: int,
    fuse: bool = False,
    generator: torch.Generator | None = None,
) -> Windows:
    """Random windows with which training converges to L(t) = L*(t); `fuse`: for `matched_fusion`.

    t is uniform in grid time, with a shift for each row; the rest follows from t. The teacher
    covers `teacher_part` of the sampler's step from t, down to t_mid, with midpoint steps (see
    `matched`): its velocity is the mean over that part, so L_1 = (t - t_mid) / 2. The second is
    that of the student's EMA, L_2 = L*(t_mid). (A) with L = L* gives the weight
        w = [t - t_mid + L*(t_mid) - L*(t)] / [t - t_mid + L*(t_mid) - L_1]                      (C)
    and t_end = t - (t - t_mid) / w. By (A), an error of L at t_mid enters L(t) times 1 - w < 1.
    Without `fuse`, w = 1 where t_mid = 0: there the target is the teacher's alone, and from there
    L = L* spreads to larger t. With teacher_part = 1 it is so everywhere; the smaller it is, the
    more the student learns from its own EMA. The default was tuned.
    """
    _require(batch >= 1, f"batch={batch} must be >= 1")
    rand = _uniform(generator)
    low, high = config.shift_range
    shift = low + (high - low) * rand(batch)
    t = shift_time(1 - rand(batch), shift)
    if fuse:
        # The first velocity will be noise - x_0. Its mean at x_t is the flow's velocity there, so
        # L_1 = 0. But x_mid is then the interpolated state at t_mid, which scatters about the
        # flow's path from x_t, and the mean of the EMA's velocity over it is right only to first
        # order in t - t_mid. So the first step is made shorter, by a factor of 1/4, not tuned.
        t_mid = config.after(t, config.teacher_part / 4)
        first_lookahead = torch.zeros_like(t)
    else:
        t_mid = config.after(t, config.teacher_part)
        first_lookahead = (t - t_mid) / 2
    second_lookahead = t - t_mid + config.lookahead(t_mid)
    w = (second_lookahead - config.lookahead(t)) / (second_lookahead - first_lookahead)  # (C)
    # Up to rounding, t_end <= t_mid: w <= 1, since L*(t) >= L_1 with teacher_part <= 1. Without
    # fusion t_end >= 0, which is w >= (t - t_mid) / t: twice the numerator of (C) is
    #     t - t_mid + after(t, 1) - after(t_mid, 1) >= t - t_mid,
    # as `after` rises with t, and twice the denominator is t - after(t_mid, 1) <= t. With fusion
    # L_1 is 0, and t_end falls to -t where t_mid = 0 and w = 1/2. That does no harm: no network is
    # called at t_end, which only sets w.
    t_end = t - (t - t_mid) / w
    kind = "matched fuse" if fuse else "matched"
    return Windows(t, t_mid, t_end, batch, kind, config.midpoint_steps)


def matched(windows: Windows, teacher: Velocity, slow: Velocity) -> tuple[Velocity, Velocity]:
    """First and second velocity of matched windows: the teacher by midpoint steps, then slow.

    With one midpoint step a target takes three network calls, one more than with `dual`.
    """
    _require_kind(windows, "matched")

    def first(x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return mean_velocity(teacher, x_t, t, windows.t_mid.to(t), windows.midpoint_steps, **cond)

    return first, slow


def mean_velocity(
    velocity: Velocity, x: Tensor, t: Tensor, t_end: Tensor, steps: int, **cond: Tensor
) -> Tensor:
    """Mean velocity (B, ...) on the way from x (B, ...) at t to t_end, both (B,).

    By midpoint steps, of two network calls each.
    """
    step = (t - t_end) / steps
    mean = 0.0
    for i in range(steps):
        t_i = t - i * step
        x_half = x - _per_row(step / 2, x) * velocity(x, t_i, **cond)
        v = _wide(velocity(x_half, t_i - step / 2, **cond))
        x = x - _per_row(step, x) * v
        mean = mean + v / steps
    return mean


def matched_fusion(
    windows: Windows, x_0: Tensor, noise: Tensor, ema: Velocity
) -> tuple[Velocity, Velocity]:
    """First and second velocity of matched windows in training from scratch.

    Update `ema` with a decay of 0.99, as in `fusion`, in place of the config's slow_decay.
    """
    _require_kind(windows, "matched fuse")
    return _data_velocity(x_0, noise), ema


def warm_up(decay: float, iteration: int) -> float:
    """Decay for `update_ema` after optimizer step i = 1, 2, ...: at most i / (i + 4).

    The time constant of the EMA, 1 / (1 - decay) steps, is then about a quarter of the run so far.
    The constant decays of the paper are meant for long runs. (Ours, like all of this section.)
    """
    return min(decay, iteration / (iteration + 4))


class TeacherPath(NamedTuple):
    """The teacher on its own trajectory, at the start of each of the N steps of a sampler."""

    times: Tensor  # (N + 1,)
    x: Tensor  # (N, B, ...): states at times[:-1]
    velocity: Tensor  # (N, B, ...): the teacher's velocity there
    mean: Tensor  # (N, B, ...): its mean velocity over the step


@torch.no_grad()
def teacher_path(
    teacher: Velocity, noise: Tensor, times: Tensor, substeps: int = 16, **cond: Tensor
) -> TeacherPath:
    """Follow the teacher from noise (B, ...) at times[0], with Euler substeps in each step.

    It takes `substeps` network calls per step.
    """
    x = _wide(noise)
    states, velocities, means = [], [], []
    for t, t_next in pairwise(times):
        fine = torch.linspace(t, t_next, substeps + 1, dtype=times.dtype)
        v = _at(teacher, x, t, **cond)
        x_next = x - (t - fine[1]) * v  # the first substep, without calling the teacher again
        x_next = euler_sample(teacher, x_next, fine[1:], **cond)
        states.append(x)
        velocities.append(v)
        means.append((x - x_next) / (t - t_next))
        x = x_next
    return TeacherPath(times, torch.stack(states), torch.stack(velocities), torch.stack(means))


@torch.no_grad()
def optimal_scale(student: Velocity, path: TeacherPath, **cond: Tensor) -> Tensor:
    """Scale lam of the student's change that fits the teacher's mean velocities best; a scalar ().

    With v_S the student's velocity and v_T the teacher's, v_T + lam (v_S - v_T) is, to first order,
    that of a network with weights theta* + lam (theta - theta*): of a LoRA at scale lam. Least
    squares over the N steps and all rows:
    lam* = sum <v_S - v_T, mean - v_T> / sum |v_S - v_T|^2.

    lam* = 1: the student is matched to N steps. (More precisely 1 - 1 / substeps, for the mean over
    Euler substeps looks ahead by that fraction of half a step.) lam* > 1: it does not look far
    enough ahead; it is undertrained, or trained for more steps. lam* < 1: too far; below 0, in the
    wrong direction. inf: it equals the teacher. Far from 1, the best samples can have another
    scale: search for it, from lam*.
    """
    product = 0.0
    square = 0.0
    steps = zip(path.times[:-1], path.x, path.velocity, path.mean, strict=True)
    for t, x, v_T, mean in steps:
        v_S = _at(student, x, t, **cond)
        product = product + ((v_S - v_T) * (mean - v_T)).sum()
        square = square + (v_S - v_T).square().sum()
    return torch.where(square == 0, float("inf"), product / square)


# --------------------------------------------------------------------------------------- internals


def _data_velocity(x_0: Tensor, noise: Tensor) -> Velocity:
    """The velocity noise - x_0. Called with k rows, it returns the first k."""
    v = _wide(noise) - _wide(x_0)
    return lambda x, t, **cond: v[: len(x)]


def _uniform(generator: torch.Generator | None) -> Callable[[int], Tensor]:
    """The function count -> (count,) numbers uniform in [0, 1), on the generator's device."""
    device = None if generator is None else generator.device
    return partial(torch.rand, generator=generator, device=device)


def _at(velocity: Velocity, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    """The velocity at one time t () for all rows, in float32 whatever the network computes in."""
    return _wide(velocity(x, t.to(x).expand(len(x)), **cond))


def _wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    _require(x.is_floating_point(), f"tensor of {x.dtype} must be of a floating-point type")
    return torch.promote_types(x.dtype, torch.float32)


def _per_row(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) as (B, 1, ..., 1), to multiply x (B, ...); in float32, or float64 if x is that."""
    return t.to(x.device, _wide_dtype(x)).reshape(-1, *[1] * (x.ndim - 1))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _require_like(x: Tensor, other: Tensor, name: str) -> None:
    """Raise a ValueError unless the shapes are equal: others might broadcast silently."""
    shape, expected = list(x.shape), list(other.shape)
    _require(shape == expected, f"{name} has shape {shape}, must have {expected}")


def _require_kind(windows: Windows, kind: str) -> None:
    _require(windows.kind == kind, f"windows are of kind '{windows.kind}', must be '{kind}'")


def _check_shift_range(shift_range: tuple[float, float]) -> None:
    low, high = shift_range
    fits = 0 < low <= high < float("inf")
    _require(fits, f"shift_range=({low}, {high}) must have 0 < low <= high < inf")


def _check_decay(name: str, decay: float) -> None:
    _require(0 <= decay < 1, f"{name}={decay} must lie in [0, 1)")
