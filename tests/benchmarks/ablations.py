"""What each choice is worth: python tests/benchmarks/ablations.py (ten minutes on 2 cores)

Students of the 2-D flows with one choice changed at a time, 1,000 iterations each. Variants that
shortcut.py does not have are written here. Errors as in toy.py.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

import shortcut as sc
import toy_2d

ITERATIONS = 1000
FLOWS = ["moons", "gaussians"]
STEPS = 3  # of all students but one in each table

# ----------------------------------------------------------------------------------------- windows


def one_grid_step(config: sc.MatchedConfig, batch: int, generator) -> sc.Windows:
    """Matched windows in which the teacher covers one step of the grid of 32, by its velocity at t.

    So the first velocity has no look-ahead, and (A) gives 1 - w = L*(t) / [t - t_mid + L*(t_mid)].
    """
    t = sc.matched_windows(config, batch, generator=generator).t
    t_mid = config.after(t, config.steps / 32)
    w = 1 - config.lookahead(t) / (t - t_mid + config.lookahead(t_mid))
    return sc.Windows(t, t_mid, t - (t - t_mid) / w, batch, "matched")


def to_next_stop(config: sc.MatchedConfig, batch: int, generator) -> sc.Windows:
    """Matched windows that end where the N-step sampler stops next: exact at its own stops."""
    windows = sc.matched_windows(config, batch, generator=generator)
    stops = sc.time_grid(config.steps, config.shift).flip(0)
    t_end = stops[torch.searchsorted(stops, windows.t - 1e-6) - 1]
    return windows._replace(t_mid=torch.maximum(windows.t_mid, t_end), t_end=t_end)


def equal_halves(config: sc.ShortcutConfig, batch: int, generator) -> sc.Windows:
    """The paper's windows, with as many teacher rows at each grid time as L = L* requires.

    Both steps of a window are equally long in grid time, and shorter where they would not fit. With
    rho(u) the fraction of teacher rows among those that start at u, at the fixed point
    L(u) = rho L_teacher_row + (1 - rho) L_self_row. This is solved for rho at L = L*.
    """
    n = config.grid_steps
    shift = config.shift_range[0]
    required = common.matched(STEPS, shift).lookahead
    u = torch.arange(1, n + 1, dtype=torch.float64) / n

    def row_lookahead(stride: int, first: Tensor | float) -> Tensor:
        """Look-ahead of a window, given that of its first velocity."""
        half = (u / 2).clamp(max=stride / n)
        t, t_mid, t_end = (sc.shift_time(u - j * half, shift) for j in (0, 1, 2))
        w = (t - t_mid) / (t - t_end)
        return w * first + (1 - w) * (t - t_mid + required(t_mid))

    goal = required(sc.shift_time(u, shift))
    of_teacher_rows = row_lookahead(1, 0.0)
    of_self_rows = torch.stack([row_lookahead(d, goal) for d in config.strides]).mean(0)
    rho = ((of_self_rows - goal) / (of_self_rows - of_teacher_rows)).clamp(0.05, 0.95)
    odds = rho / (1 - rho)  # of a teacher row, if the starts of self rows are uniform
    fraction = (odds.mean() / (1 + odds.mean())).item()

    k = int(fraction * batch + torch.rand(1, generator=generator).item())
    choice = torch.randint(len(config.strides), (batch,), generator=generator)
    stride = torch.tensor(config.strides)[choice]
    stride[:k] = 1
    start = torch.randint(1, n + 1, (batch,), generator=generator)
    start[:k] = 1 + torch.multinomial(odds, k, True, generator=generator)
    half = torch.minimum(stride, start / 2) / n
    times = (sc.shift_time(start / n - j * half, shift) for j in (0, 1, 2))
    return sc.Windows(*times, k, "distil")


def authors_windows(config: sc.ShortcutConfig, batch: int, generator) -> sc.Windows:
    """The authors' code: aligned merges of two steps on grids of 2, 4, 8 and 16 steps.

    Teacher rows are as in the paper.
    """
    windows = sc.sample_windows(config, batch, generator=generator)
    k, n = windows.teacher_rows, config.grid_steps
    stride = 2.0 ** torch.randint(1, 5, (batch,), generator=generator)
    merges = n / (2 * stride)  # that fit in the path
    merge = (torch.rand(batch, generator=generator) * merges).floor()
    start = n - 2 * stride * merge
    low, high = config.shift_range
    shift = low + (high - low) * torch.rand(batch, generator=generator)
    times = [sc.shift_time((start - j * stride).clamp(min=0) / n, shift) for j in (0, 1, 2)]
    of_rows = [torch.cat([paper[:k], aligned[k:]]) for paper, aligned in zip(windows, times)]
    return sc.Windows(*of_rows, k, "distil")


def pointwise(config: sc.ShortcutConfig, batch: int, generator) -> sc.Windows:
    """The paper's windows, but the target of teacher rows is the teacher's velocity at t alone."""
    windows = sc.sample_windows(config, batch, generator=generator)
    k = windows.teacher_rows
    t_mid = torch.cat([windows.t_end[:k], windows.t_mid[k:]])  # so the second weighs nothing
    return windows._replace(t_mid=t_mid)


def plain_mean(config: sc.ShortcutConfig, batch: int, generator) -> sc.Windows:
    """The paper's windows, but the target is (v_1 + v_2) / 2 however long the two steps are."""
    windows = sc.sample_windows(config, batch, generator=generator)
    return windows._replace(t_end=2 * windows.t_mid - windows.t)  # it only gives the weights


# -------------------------------------------------------------------------- velocities and losses


class Networks(NamedTuple):
    student: nn.Module
    teacher: nn.Module
    fast: nn.Module
    slow: nn.Module


def of_matched(windows, nets: Networks, x_0, noise):
    return sc.matched(windows, nets.teacher, nets.slow)


def of_one_grid_step(windows, nets: Networks, x_0, noise):
    return nets.teacher, nets.slow


def of_paper(windows, nets: Networks, x_0, noise):
    return sc.dual(windows, nets.teacher, nets.fast, nets.slow)


def of_algorithm_1(windows, nets: Networks, x_0, noise):
    return sc.vanilla(windows, nets.teacher, nets.slow)


def renoised(windows, nets: Networks, x_0, noise):
    """Matched, but the state at t_mid is made of the same data and noise, not by an Euler step."""
    first, _ = sc.matched(windows, nets.teacher, nets.slow)
    return first, lambda x, t: nets.slow(sc.interpolate(x_0, noise, t), t)


def shortcut(variant: "Variant", nets: Networks, x_0, noise, generator) -> Tensor:
    windows = variant.windows(variant.config, len(x_0), generator=generator)
    first, second = variant.velocities(windows, nets, x_0, noise)
    return sc.shortcut_loss(windows, x_0, noise, nets.student, first, second)[0]


def direct(calls: int, variant: "Variant", nets: Networks, x_0, noise, generator) -> Tensor:
    return common.direct_loss(
        variant.config, calls, nets.teacher, nets.student, x_0, noise, generator
    )


def oracle(variant: "Variant", nets: Networks, x_0, noise, generator) -> Tensor:
    """Regression on the teacher's exact mean velocity, only where the sampler stops."""
    times = sc.time_grid(STEPS, variant.shift)
    stop = torch.randint(STEPS, (len(x_0),), generator=generator)
    t = times[stop]
    x_t = sc.interpolate(x_0, noise, t)
    target = common.mean_velocity(nets.teacher, x_t, t, times[stop + 1], calls=16)
    return (nets.student(x_t, t) - target).square().mean()


# ---------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    expected: str
    config: sc.ShortcutConfig | sc.MatchedConfig
    windows: Callable = sc.matched_windows
    velocities: Callable = of_matched
    loss: Callable = shortcut
    shift: float = 1.0  # of the sampler
    ema_warmup: bool = True  # or a constant decay
    ema_dtype: torch.dtype = torch.float32


def of_matched_windows(name: str, expected: str, shift: float = 1.0, **more) -> Variant:
    return Variant(name, expected, common.matched(STEPS, shift), shift=shift, **more)


def of_paper_windows(name: str, expected: str, rho: float, shift: float = 1.0, **more) -> Variant:
    how = {"windows": sc.sample_windows, "velocities": of_paper} | more
    return Variant(name, expected, common.paper(rho, shift), shift=shift, **how)


def constant_ema(decay: float, expected: str) -> Variant:
    config = common.matched(STEPS, slow_decay=decay)
    return Variant(f"constant EMA decay {decay:g}", expected, config, ema_warmup=False)


def teacher_part(part: float, label: str, expected: str) -> Variant:
    config = common.matched(STEPS, teacher_part=part)
    return Variant(f"teacher covers {label} of the step", expected, config)


def shift_range(low: float, high: float, expected: str) -> Variant:
    config = sc.MatchedConfig(STEPS, shift_range=(low, high))
    return Variant(f"shift range {low:g}-{high:g}, sampled at 3", expected, config, shift=3.0)


ONE_GRID_STEP = {"windows": one_grid_step, "velocities": of_one_grid_step}
VARIANTS = (
    of_matched_windows("**as shipped**: matched windows, shift 1", "lam* about 1"),
    of_matched_windows(
        "teacher covers one grid step, by its velocity at t", "deeper bootstrapping",
        **ONE_GRID_STEP,
    ),
    teacher_part(1 / 4, "1/4", "nearly the same"),
    teacher_part(1 / 2, "1/2", "nearly the same"),
    teacher_part(1, "all", "error of one midpoint step over the whole step"),
    of_matched_windows(
        "direct regression, 4 teacher calls", "as good", loss=partial(direct, 4)
    ),
    of_matched_windows(
        "direct regression, 8 teacher calls", "as good, for more calls", loss=partial(direct, 8)
    ),
    Variant(
        "EMA decay at most 0.99", "the same, sooner", common.matched(STEPS, slow_decay=0.99)
    ),
    constant_ema(0.999, "stalls: averages over the whole run (the paper)"),
    constant_ema(0.99, "slower"),
    constant_ema(0.9, "as good, sooner"),
    of_matched_windows(
        "re-noised midpoint", "worse: the midpoint leaves the path", velocities=renoised
    ),
    of_matched_windows(
        "windows end at the sampler's next stop", "exact at 3 times, a jump at each",
        windows=to_next_stop,
    ),
    of_matched_windows(
        "EMA in bfloat16", "stalls: the EMA stays the teacher", ema_dtype=torch.bfloat16
    ),
    of_matched_windows(
        "oracle: exact mean velocity at the sampler's stops", "the best a 3-step student can be",
        loss=oracle,
    ),
    of_paper_windows(
        "equal halves, fraction of teacher rows by L = L*",
        "the same mean look-ahead, more spread out", 0.4, windows=equal_halves,
    ),
    of_paper_windows(
        "vanilla (Algorithm 1), paper windows, rho 0.4", "half the look-ahead: suits 4 steps", 0.4,
        velocities=of_algorithm_1,
    ),
    of_paper_windows("paper windows, rho 0.2", "overshoots: look-ahead 0.61", 0.2),
    of_paper_windows("paper windows, rho 0.4 (the paper)", "overshoots: suits 2 steps", 0.4),
    of_paper_windows("paper windows, rho 0.52", "lam* about 1, worse than matched: uneven", 0.52),
    of_paper_windows("paper windows, rho 0.8", "undertrained: suits 7 steps", 0.8),
    of_paper_windows(
        "authors' windows, rho 0.4", "overshoots: windows up to the full path", 0.4,
        windows=authors_windows,
    ),
    of_paper_windows(
        "paper windows, rho 0.52, teacher rows pointwise", "look-ahead shorter by about 1/n", 0.52,
        windows=pointwise,
    ),
    of_matched_windows("**as shipped**, shift 3", "lam* about 1", 3.0),
    of_matched_windows(
        "teacher covers one grid step, shift 3", "worse than at shift 1", 3.0, **ONE_GRID_STEP
    ),
    of_matched_windows(
        "direct regression, 4 teacher calls, shift 3", "worse: two midpoint steps are too long",
        3.0, loss=partial(direct, 4),
    ),
    of_matched_windows(
        "direct regression, 8 teacher calls, shift 3", "as good, for more calls", 3.0,
        loss=partial(direct, 8),
    ),
    shift_range(2, 4, "the same: L\\* is that of shift 3"),
    shift_range(2.5, 4.5, "matched to 3.5, so nearly as good"),
    of_paper_windows(
        "equal halves, fraction of teacher rows by L = L*, shift 3", "worse than at shift 1", 0.4,
        3.0, windows=equal_halves,
    ),
    of_paper_windows("paper windows, rho 0.52, shift 3", "far worse than matched", 0.52, 3.0),
    of_paper_windows(
        "the same, plain mean", "biased where the two steps differ most", 0.52, 3.0,
        windows=plain_mean,
    ),
    of_matched_windows("oracle, shift 3", "the best a 3-step student can be", 3.0, loss=oracle),
)  # fmt: skip

# ------------------------------------------------------------------------------------- measurements


def train(variant: Variant, teacher: nn.Module, data, iterations: int, seed: int) -> nn.Module:
    """The student after training, as `toy_2d.distil` does it."""
    config = variant.config
    generator = torch.Generator().manual_seed(seed + 1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    nets = Networks(student, teacher, toy_2d.frozen(teacher), toy_2d.frozen(teacher))
    emas = [(nets.slow, config.slow_decay)]
    if isinstance(config, sc.ShortcutConfig):
        emas.append((nets.fast, config.fast_decay))

    def loss() -> Tensor:
        x_0, noise = toy_2d.draw_pairs(data, common.BATCH, generator)
        return variant.loss(variant, nets, x_0, noise, generator)

    for iteration in toy_2d.minimize(loss, student, "student", 2e-3, iterations, warmup=1):
        for ema, decay in emas:
            decay = sc.warm_up(decay, iteration) if variant.ema_warmup else decay
            sc.update_ema(ema.parameters(), student.parameters(), decay)
            for weight in ema.parameters():
                weight.copy_(weight.to(variant.ema_dtype))
    return student.requires_grad_(False)


def measure(variant: str, flow: str, seed: int, length: float) -> dict:
    changed = next(some for some in VARIANTS if some.name == variant)
    on = common.FlowMeasure(flow, seed, length)
    teacher = common.train_teacher(flow, seed, length)
    iterations = common.shortened(ITERATIONS, length)
    student = train(changed, teacher, on.data, iterations, seed)
    shift = changed.shift
    return {
        "error": on.error(student, STEPS, shift),
        "calibrated": on.calibrated(teacher, student, STEPS, shift)["error"],
        "2 steps": on.calibrated(teacher, student, 2, shift)["error"],
        "lam": sc.optimal_scale(student, on.teacher_path(teacher, STEPS, shift)).item(),
    }


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    some = [
        common.Task(measure, {"flow": flow, "seed": seed, "variant": variant.name})
        for seed in seeds
        for flow in flows
        for variant in VARIANTS
    ]
    return {"variants": some}


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    by_flow = common.grouped(rows, "flow")
    names = {"error": "scale 1", "calibrated": "calibrated", "2 steps": "2 steps, calibrated"}
    head = [f"in {STEPS} steps, if nothing is said", "expected, or why it was tried"]
    head += [f"{flow}: {name}" for flow in by_flow for name in (*names.values(), "lam*")]
    lines = []
    for variant in VARIANTS:
        cells = [variant.name, variant.expected]
        for some in by_flow.values():
            of_variant = common.where(some, "variants", variant=variant.name)
            if of_variant:
                cells += [common.energy_text(common.column(of_variant, key)) for key in names]
                cells.append(f"{common.column(of_variant, 'lam').mean():.2f}")
        if len(cells) == len(head):
            lines.append(cells)
    return common.table(head, lines)


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, flows=FLOWS)
