"""Shortcutting flow matching (SCFM, arXiv 2510.17858): few-step samplers by self-distillation.

Conventions (the field is split on both signs, so read this first):
    time       t = 1 is noise, t = 0 is data, as in Flux and Stable Diffusion 3
    state      x_t = (1 - t) x_0 + t noise
    velocity   v(x_t, t) estimates noise - x_0; an Euler step from t to t' is x_t - (t - t') v
    grid time  u in [0, 1] is uniform; the shift s maps it to t = s u / (1 + (s - 1) u)

A velocity is any callable v(x, t, **cond) that returns a tensor like x, with x (B, ...), t (B,) and
every conditioning tensor batched on dim 0. It is given x and t in float32 (float64 if the data is)
and casts them to what its network wants: bfloat16 rounds t by up to 0.002, and a step of the
paper's grid is as short as 0.007.

A window is two Euler steps, t -> t_mid -> t_end. The student at t is regressed on the one velocity
that does both. In teacher rows of a batch the first velocity is a frozen teacher's, in self rows
both are moving averages of the student. Fusion is training from scratch: data replace the teacher.

The student then looks ahead: it is an average of the teacher's velocity over what is to come, and
its look-ahead is the mean distance in t. Matched windows, which are ours, make it what a sampler of
N steps wants.

Equation and algorithm numbers are the paper's. (A) and (B) are ours: README.md derives them.
"""

import math
from collections import namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[..., Tensor]

# ------------------------------------------------------------------------------ time and sampling


def shift_time(u: Tensor, shift: float | Tensor) -> Tensor:
    """Grid time u -> t = s u / (1 + (s - 1) u) (Eq. 17); shapes broadcast, s = 1: t = u."""
    _require((low := float(torch.as_tensor(shift).min())) > 0, f"shift={low} must be > 0")
    return u / (u + (1 - u) / shift)  # Eq. 17 over s; rounding cannot carry it past 1


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times (steps + 1,) of a sampler, float32, from 1 (noise) down to 0 (data)."""
    _require(steps >= 1, f"steps={steps} must be >= 1")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def interpolate(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """State x_t = (1 - t) x_0 + t noise, for x_0 and noise (B, ...) and t (B,)."""
    t = _per_row(t, x_0)
    return (1 - t) * _wide(x_0) + t * _wide(noise)  # the state x_t


@torch.no_grad()
def euler_sample(velocity: Velocity, x: Tensor, times: Tensor, **cond: Tensor) -> Tensor:
    """Carry x (B, ...) from times[0] to times[-1], one network call a step; the last x."""
    x = _wide(x)
    for t, t_next in pairwise(times):
        x = x - (t - t_next) * velocity(x, t.to(x).expand(len(x)), **cond)
    return x


# ----------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class ShortcutConfig:
    """What a student is trained on. The defaults are the paper's; `for_steps(N)` is for N steps.

    A setting out of range raises ValueError with its value and the range.
    """

    grid_steps: int = 32  # n, the teacher's own steps; the paper's windows lie on its grid
    teacher_ratio: float | None = 0.4  # rho, share of teacher rows; matched: None, all are
    strides: tuple[int, ...] = (2, 4, 8)  # half the window of a self row, in grid steps
    shift_range: tuple[float, float] = (2.5, 4.5)  # s ~ U[low, high] (Eq. 17), drawn per row
    dual: bool = True  # Algorithm 2; False: vanilla, Algorithm 1; matched: True
    student_steps: int | None = None  # N of the matched windows; None: the paper's windows
    fast_decay: float = 0.99  # of the moving average theta_fast, per optimizer step
    slow_decay: float = 0.999  # of theta_slow

    def __post_init__(self):
        # A list will do as well; tuples can be hashed.
        vars(self).update(strides=tuple(self.strides), shift_range=tuple(self.shift_range))
        half, rho, N = self.grid_steps / 2, self.teacher_ratio, self.student_steps
        (low, high), decays = self.shift_range, (self.fast_decay, self.slow_decay)
        _require(0 < low <= high < float("inf"), f"shift_range=({low}, {high}) must ascend, > 0")
        _require(all(0 <= d < 1 for d in decays), f"EMA decays {decays} must lie in [0, 1)")
        if N is None:
            _require(rho is not None and 0 <= rho <= 1, f"teacher_ratio={rho} must lie in [0, 1]")
            fit = all(1 <= d <= half and d % 1 == 0 for d in self.strides or [0])
            _require(fit, f"strides={self.strides} must be integers in [1, grid_steps/2={half:g}]")
        else:
            _require(1 <= N <= half, f"student_steps={N} must lie in [1, grid_steps/2 = {half:g}]")
            _require(rho is None, f"teacher_ratio={rho} must be None where student_steps={N}")
            _require(self.dual, f"dual={self.dual} must be True where student_steps={N}")

    @classmethod
    def for_steps(cls, student_steps: int, shift: float | None = None, **settings):
        """Matched windows: the student looks ahead as far as an N-step Euler sampler wants.

        shift: train for and sample at this one. None: train on shift_range; it then suits a sampler
        at the middle of that.
        """
        fixed = {} if shift is None else {"shift_range": (shift, shift)}
        return cls(student_steps=student_steps, **{"teacher_ratio": None, **settings}, **fixed)

    @property
    def lookahead(self) -> float:
        """Look-ahead L in grid time at shift 1, far from both ends; it suits 1/(2L) steps.

        (B) with a teacher, dual or vanilla; matched: the wanted 1/(2N).
        """
        if self.student_steps:
            return 1 / (2 * self.student_steps)
        if not (rho := self.teacher_ratio):
            return float("inf")
        mean_d = sum(self.strides) / len(self.strides) / self.grid_steps
        dual = 1 / self.grid_steps + (1 - rho) / rho * mean_d  # (B)
        return dual if self.dual else dual / 2


# ------------------------------------------------------------------------------------------ windows


# Times t > t_mid >= t_end, each (B,). The first `teacher_rows` (an int) rows are the teacher's.
# Only as the end of a matched window can a time be below 0.
Windows = namedtuple("Windows", "t t_mid t_end teacher_rows")


def matched_end(config: ShortcutConfig, t: Tensor, t_mid: Tensor) -> Tensor:
    """End (B,) of a window from t over t_mid (B,) that teaches the wanted look-ahead L*.

    The target is w v_teacher(t) + (1 - w) v(t_mid), w = (t - t_mid) / (t - t_end). The first looks
    ahead by 0, the second by L(t_mid) + t - t_mid. So, at times of any shift, the student does by
        L(t) = (1 - w) (L(t_mid) + t - t_mid)                                                    (A)
    Near the data the end is below 0, by a step at most: it is a weight, no network sees it.
    """
    shift = sum(config.shift_range) / 2

    def wanted(t):  # L*(t), half of the N-step sampler's coming step
        u = shift_time(t, 1 / shift) - 1 / config.student_steps
        return (t - shift_time(u.clamp(min=0), shift)) / 2

    w = 1 - wanted(t) / (wanted(t_mid) + t - t_mid)  # (A) solved for w at L = L*
    return t - (t - t_mid) / w


def sample_windows(
    config: ShortcutConfig, batch: int, fusion=False, U: float | None = None, generator=None
) -> Windows:
    """Random windows, of Algorithms 1 and 2 or matched; `fusion`: for a loss without a teacher.

    Self rows have a stride out of `strides`, teacher rows one grid step; starts are uniform over
    the grid points from which both steps fit, each row has a shift of its own. The first
    k = floor(rho B + U) rows are the teacher's: exact in expectation for every B. On several
    processes pass the same U, uniform in [0, 1), so that all make equally many network calls.
    Fusion: teacher rows start anywhere in (0, 1]. Matched: all rows are teacher rows and start so,
    the first step is cut at 0 and the end is `matched_end`.
    The windows are on the generator's device.
    """
    n, matched, (low, high) = config.grid_steps, config.student_steps, config.shift_range
    rand = partial(torch.rand, generator=generator, device=generator and generator.device)
    U = rand(1).item() if U is None else U
    k = batch if matched else int(config.teacher_ratio * batch + U)
    choice = (rand(batch) * len(config.strides)).long()
    stride = torch.tensor(config.strides).to(choice)[choice]
    stride[:k] = 1
    lowest = 2 * stride  # from here a window fits
    start = lowest + (rand(batch) * (n + 1 - lowest)).floor()
    if matched or fusion:
        start[:k] = n * (1 - rand(k))  # neither needs the grid: u ~ U(0, 1]
    u = [(start - j * stride).clamp(min=0) / n for j in (0, 1, 2)]
    shift = low + (high - low) * rand(batch)
    t, t_mid, t_end = (shift_time(x, shift) for x in u)
    return Windows(t, t_mid, matched_end(config, t, t_mid) if matched else t_end, k)


# -------------------------------------------------------------------------------- target, loss, EMA


@torch.no_grad()
def shortcut_target(first: Velocity, second: Velocity, x_t: Tensor, windows: Windows, **cond):
    """The velocity (B, ...) that does in one step what two steps do (Eq. 11-12), without gradient.

    Displacement over elapsed time: (v_1 + v_2) / 2 would be wrong for steps of unequal length.
    """
    t, t_mid, t_end = (_per_row(time, x_t) for time in windows[:3])
    v_1 = first(x_t, windows.t.to(x_t), **cond)
    x_mid = x_t - (t - t_mid) * v_1
    v_2 = second(x_mid, windows.t_mid.to(x_t), **cond)
    _require(v_1.shape == v_2.shape == x_t.shape, f"{v_1.shape}, {v_2.shape} must be like x_t")
    x_end = x_mid - (t_mid - t_end) * v_2
    return (x_t - x_end) / (t - t_end)  # Eq. 11-12


def shortcut_loss(
    config: ShortcutConfig, windows: Windows, x_0: Tensor, noise: Tensor, *, student: Velocity,
    fast: Velocity | None = None, slow: Velocity | None = None, teacher: Velocity | None = None,
    **cond: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss (Eq. 13) of data x_0 and noise (B, ...), and scalars to log. fast, slow: the EMAs.

                            teacher rows         self rows
        dual                teacher, slow        fast, slow    first, second velocity (Algorithm 2)
        vanilla             teacher, teacher     slow, slow    (Algorithm 1)
        fusion              noise - x_0, twice   fast, fast    no teacher: training from scratch
        matched             teacher, slow        none
        matched fusion      noise - x_0, fast    none          (A) to first order in a grid step

    The student comes last, so that all four may be one network whose weights are swapped. Log:
    teacher_loss and self_loss (nan without such rows), residual = |v_student - target| / |target|.
    """
    _require(noise.shape == x_0.shape, f"noise {[*noise.shape]} must be like x_0 {[*x_0.shape]}")
    for name, value in {"windows": windows.t, **cond}.items():
        _require(len(value) == len(x_0), f"{name} has {len(value)} rows, must have {len(x_0)}")
    _require(teacher is None or slow is not None, "slow=None must be given where a teacher is")
    unused = teacher is not None and (config.student_steps or not config.dual)
    _require(fast is not None or unused, "fast=None must be given: dual and fusion need it")
    k, x_t = windows.teacher_rows, interpolate(x_0, noise, windows.t)
    if teacher is None:
        first = partial(_split, k, lambda *_, **__: (_wide(noise) - _wide(x_0))[:k], fast)
        second = fast if config.student_steps else first
    elif config.dual:
        first, second = partial(_split, k, teacher, fast), slow
    else:
        first = second = partial(_split, k, teacher, slow)
    target = shortcut_target(first, second, x_t, windows, **cond)
    v = student(x_t, windows.t.to(x_t), **cond)
    _require(v.shape == x_t.shape, f"student's velocity {[*v.shape]} must be like x_0")
    loss = (error := (v - target).square()).mean()  # Eq. 13
    error = error.detach()
    log = {"teacher_loss": error[:k].mean(), "self_loss": error[k:].mean()}
    return loss, {**log, "residual": (error.sum() / target.square().sum()).sqrt()}


@torch.no_grad()
def update_ema(ema: Iterable, weights: Iterable, decay: float, iteration: float = math.inf) -> None:
    """ema <- decay ema + (1 - decay) weights (Eq. 14-16), in place, once per optimizer step.

    iteration: how many optimizer steps there were, from 1 on. The average then remembers a quarter
    of them at most: its decay is at most i / (i + 4). Without it the memory is constant, as in the
    paper.
    The averages must be float32 or float64: in bfloat16 a step of 1 - 0.999 rounds to nothing.
    """
    decay = min(decay, 1 - 4 / (iteration + 4))  # i / (i + 4), and 1 for infinity
    ema, wide = list(ema), {torch.float32, torch.float64}
    _require(not (bad := {e.dtype for e in ema} - wide), f"EMA in {bad} must be float32, float64")
    # Eq. 14-16
    torch._foreach_lerp_(ema, [w.to(e) for e, w in zip(ema, weights, strict=True)], 1 - decay)


# ------------------------------------------------------------------------------- scale of a student


@torch.no_grad()
def optimal_scale(student: Velocity, teacher: Velocity, noise: Tensor, times: Tensor, **cond):
    """lam*: the scale for which v_T + lam (v_S - v_T), teacher v_T and student v_S, fits best.

    It is fitted to v_mean, the teacher's mean velocity over the coming step:
    lam* = sum <v_S - v_T, v_mean - v_T> / sum |v_S - v_T|^2, over noises and steps.

    A scalar tensor. Least squares over validation noise (B, ...) and a sampler's times (N + 1,), on
    the teacher's trajectories, 16 Euler steps for each of the N. More than 1: under-trained for N
    steps; 1: matched; less: overshot; inf: the student equals the teacher.
    """
    x, product, square = _wide(noise), 0.0, 0.0
    for t, t_next in pairwise(times):
        x_next = euler_sample(teacher, x, torch.linspace(t, t_next, 17), **cond)
        v_mean = (x - x_next) / (t - t_next)
        v_T, v_S = (_wide(v(x, t.to(x).expand(len(x)), **cond)) for v in (teacher, student))
        product = product + ((v_S - v_T) * (v_mean - v_T)).sum()
        square = square + (v_S - v_T).square().sum()
        x = x_next
    return torch.where(square == 0, float("inf"), product / square)


# ---------------------------------------------------------------------------------------- internals


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    _require(x.is_floating_point(), f"tensor of {x.dtype} must be of a floating-point type")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_row(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) as (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.to(_wide(x)).reshape(-1, *[1] * (x.ndim - 1))


def _split(k: int, head: Velocity, tail: Velocity, x: Tensor, t: Tensor, /, **cond) -> Tensor:
    """Velocity `head` on the first k rows and `tail` on the others, one call of each."""
    parts = [(v, r) for v, r in ((head, slice(k)), (tail, slice(k, None))) if len(t[r])]
    return torch.cat([v(x[r], t[r], **{n: c[r] for n, c in cond.items()}) for v, r in parts])
