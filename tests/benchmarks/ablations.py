"""What each choice is worth: python tests/benchmarks/ablations.py (ten minutes on 2 cores)

Trains a student of the 2-D flows with one choice changed at a time and prints a Markdown table.
Variants that shortcut.py does not ship live here.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import shortcut as sc
import toy_2d


def equal_halves(config, batch, generator):
    """Matched by their share: halves of equal grid time, teacher rows in the odds rho(u) to others.

    A self row's half is a stride drawn from `strides`, a teacher row's one grid step, cut to fit.
    L(u) = rho L_teacher_row + (1 - rho) L_self_row is solved for rho at the wanted L = L*.
    """
    n, N, shift = config.grid_steps, config.student_steps, sum(config.shift_range) / 2
    u = torch.arange(1, n + 1, dtype=torch.float64) / n

    def wanted(u):
        return (sc.shift_time(u, shift) - sc.shift_time((u - 1 / N).clamp(min=0), shift)) / 2

    def window(stride):  # weight of the first velocity; time to the second; what it looks ahead
        d = (u / 2).clamp(max=stride / n)
        t, t_mid, t_end = (sc.shift_time(u - j * d, shift) for j in (0, 1, 2))
        return (t - t_mid) / (t - t_end), t - t_mid, wanted(u - d)

    w, step, ahead = (torch.stack(column) for column in zip(*map(window, config.strides)))
    own = (w * wanted(u) + (1 - w) * (step + ahead)).mean(0)
    w, step, ahead = window(1)
    rho = (own - wanted(u)) / (own - (1 - w) * (step + ahead))
    odds = (rho := rho.clamp(0.05, 0.95)) / (1 - rho)
    share = odds.mean().item() / (1 + odds.mean().item())
    k = int(share * batch + torch.rand(1, generator=generator).item())
    stride = torch.tensor(config.strides)[torch.randint(3, (batch,), generator=generator)]
    stride[:k] = 1
    start = torch.randint(1, n + 1, (batch,), generator=generator)
    start[:k] = 1 + torch.multinomial(odds, batch, True, generator=generator)[:k]
    d = torch.minimum(stride, start / 2) / n
    return sc.Windows(*(sc.shift_time(start / n - j * d, shift) for j in (0, 1, 2)), k)


def next_stop(config, batch, generator):
    """Matched windows that end where the N-step sampler stops next: exact, at its own stops."""
    t, t_mid, _, k = sc.sample_windows(config, batch, generator=generator)
    stops = sc.time_grid(config.student_steps, sum(config.shift_range) / 2).flip(0)
    t_end = stops[torch.searchsorted(stops, t - 1e-6) - 1]
    return sc.Windows(t, torch.maximum(t_mid, t_end), t_end, k)


def authors_windows(config, batch, generator):
    """Aligned two-step merges on grids of 2, 4, 8 and 16 steps; teacher rows as in the paper."""
    windows = sc.sample_windows(config, batch, generator=generator)
    k, n = windows.teacher_rows, config.grid_steps
    stride = 2.0 ** torch.randint(1, 5, (batch,), generator=generator)
    merges = n / (2 * stride)
    u = (n - 2 * stride * (torch.rand(batch, generator=generator) * merges).floor()) / n
    low, high = config.shift_range
    shift = low + (high - low) * torch.rand(batch, generator=generator)
    times = [sc.shift_time((u - j * stride / n).clamp(min=0), shift) for j in (0, 1, 2)]
    return sc.Windows(*(torch.cat([a[:k], b[k:]]) for a, b in zip(windows, times)), k)


@dataclass(frozen=True)
class Variant:
    """One line of the table. `settings` go to ShortcutConfig; the others change the training."""

    name: str
    expected: str
    settings: dict = field(default_factory=lambda: bench.matched(3))
    shift: float = 1.0  # of training (unless `settings` has a range) and sampling
    draw: Callable = sc.sample_windows
    second: str = "slow"  # the average behind the second velocity of matched windows
    renoised: bool = False  # x at t_mid from the same data and noise, not by an Euler step
    pointwise: bool = False  # teacher rows regress on the teacher's velocity at (x_t, t)
    plain_mean: bool = False  # (v_1 + v_2) / 2, whatever the lengths
    ema_dtype: torch.dtype = torch.float32
    warm: bool = True  # the averages remember a quarter of the run so far; False: constant
    oracle: bool = False  # regression on the exact mean velocity of the sampler's own steps


def paper(rho):
    return dict(teacher_ratio=rho)


VARIANTS = (
    Variant("**as shipped**: matched windows, shift 1", "lam* about 1"),
    Variant("the fast average instead of the slow", "the same, sooner", second="fast"),
    *(Variant(f"averages of constant memory, {fast:g} / {slow:g}", expected,
              bench.matched(3) | dict(fast_decay=fast, slow_decay=slow), warm=False)
      for fast, slow, expected in ((0.99, 0.999, "stalls: as long as the run (the paper)"),
                                   (0.95, 0.99, "slower"), (0.8, 0.9, "as good, sooner"))),
    Variant("matched share, equal halves", "the same mean look-ahead, more spread out",
            draw=equal_halves),
    Variant("windows end at the sampler's next stop", "exact at 3 times, a jump at each",
            draw=next_stop),
    Variant("vanilla, paper windows, rho 0.4", "half the look-ahead of dual: suits 4 steps",
            {**paper(0.4), "dual": False}),
    Variant("paper windows, rho 0.2", "overshoots: look-ahead 0.61", paper(0.2)),
    Variant("paper windows, rho 0.4 (the paper)", "overshoots: suits 2 steps", paper(0.4)),
    Variant("paper windows, rho 0.52", "lam* about 1, worse than matched: uneven", paper(0.52)),
    Variant("paper windows, rho 0.8", "under-trained: suits 7 steps", paper(0.8)),
    Variant("authors' windows, rho 0.4", "overshoots: windows up to the full path", paper(0.4),
            draw=authors_windows),
    Variant("paper windows, rho 0.52, teacher rows point-wise", "look-ahead shorter by about 1/n",
            paper(0.52), pointwise=True),
    Variant("re-noised midpoint", "worse: the midpoint leaves the path", renoised=True),
    Variant("EMAs in bfloat16", "stalls: the averages stay the teacher", ema_dtype=torch.bfloat16),
    Variant("oracle: the teacher's exact mean velocity", "the best a 3-step student can be",
            oracle=True),
    Variant("**as shipped**, shift 3", "lam* about 1", shift=3.0),
    Variant("shift range 2-4, sampled at 3", "the same: L\\*(t) is that of shift 3",
            {**bench.matched(3), "shift_range": (2.0, 4.0)}, shift=3.0),
    Variant("shift range 2.5-4.5, sampled at 3", "matched to 3.5, so nearly as good",
            {**bench.matched(3), "shift_range": (2.5, 4.5)}, shift=3.0),
    Variant("matched share, equal halves, shift 3", "worse than at shift 1", shift=3.0,
            draw=equal_halves),
    Variant("paper windows, rho 0.52, shift 3", "far worse than matched", paper(0.52), shift=3.0),
    Variant("the same, plain mean", "biased where halves differ most", paper(0.52), shift=3.0,
            plain_mean=True),
    Variant("oracle, shift 3", "the best a 3-step student can be", shift=3.0, oracle=True),
)  # fmt: skip


def target_of(variant, config, windows, x_0, noise, teacher, fast, slow):
    """sc.shortcut_target, written out so that its parts can be replaced."""
    k, x_t = windows.teacher_rows, sc.interpolate(x_0, noise, windows.t)
    if variant.second == "fast":
        slow = fast
    first = partial(sc._split, k, teacher, fast if config.dual else slow)
    second = slow if config.dual else partial(sc._split, k, teacher, slow)
    t, t_mid, t_end = (time[:, None] for time in windows[:3])
    with torch.no_grad():
        v_1 = first(x_t, windows.t)
        x_mid = x_t - (t - t_mid) * v_1
        if variant.renoised:
            x_mid = sc.interpolate(x_0, noise, windows.t_mid)
        v_2 = second(x_mid, windows.t_mid)
        weight = 0.5 if variant.plain_mean else (t - t_mid) / (t - t_end)
        target = weight * v_1 + (1 - weight) * v_2
        if variant.pointwise:
            target[:k] = v_1[:k]
    return x_t, target


def oracle_of(variant, x_0, noise, teacher, generator):
    """Times and states where a 3-step sampler stops; the teacher's mean velocity from there on."""
    times = sc.time_grid(3, variant.shift)
    stop = torch.randint(0, 3, (len(x_0),), generator=generator)
    t, t_next = times[stop], times[stop + 1]
    x = x_t = sc.interpolate(x_0, noise, t)
    for i in range(16):
        x = x - (t - t_next)[:, None] / 16 * teacher(x, t + (t_next - t) * i / 16)
    return t, x_t, (x_t - x) / (t - t_next)[:, None]


def train(variant, teacher, data, iterations, seed, batch=512):
    shift_range = (variant.shift, variant.shift)
    config = sc.ShortcutConfig(**{"shift_range": shift_range, **variant.settings})
    generator = torch.Generator().manual_seed(seed + 1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    fast, slow = (copy.deepcopy(teacher) for _ in range(2))
    weights, *averages = (list(net.parameters()) for net in (student, fast, slow))
    kept = [[w.to(variant.ema_dtype) for w in average] for average in averages]
    optimizer, schedule = toy_2d.adam(weights, 2e-3, iterations, warmup=1)  # as toy_2d.py
    for i in range(1, iterations + 1):
        x_0, noise = data(batch, generator), torch.randn(batch, 2, generator=generator)
        windows = variant.draw(config, batch, generator=generator)
        t = windows.t
        if variant.oracle:
            t, x_t, target = oracle_of(variant, x_0, noise, teacher, generator)
        else:
            x_t, target = target_of(variant, config, windows, x_0, noise, teacher, fast, slow)
        loss = (student(x_t, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        most = i / (i + 4) if variant.warm else 1.0
        for average, own, decay in zip(averages, kept, (config.fast_decay, config.slow_decay)):
            with torch.no_grad():
                for w, a, weight in zip(average, own, weights):
                    w.copy_(a.lerp_(weight.to(a.dtype), 1 - min(decay, most)))
    return student.requires_grad_(False)


def measure(flow: str, seed: int, length: float = 1.0) -> dict:
    torch.set_num_threads(1)
    on, its = bench.Bench(flow, seed), lambda count: max(2, round(count * length))
    base = toy_2d.train_teacher(on.data, its(bench.TEACHER), seed)
    out = {"flow": flow, "seed": seed, "variants": {}}
    for variant in VARIANTS:
        net = train(variant, base, on.data, its(bench.STUDENT), seed)
        grid = sc.time_grid(3, variant.shift)
        out["variants"][variant.name] = {
            "error": on.error(net, 3, variant.shift),
            "calibrated": on.calibrated(base, net, 3, variant.shift)["error"],
            "2 steps": on.calibrated(base, net, 2, variant.shift)["error"],
            "lam": sc.optimal_scale(net, base, on.validation, grid).item(),
        }
    return out


def markdown(runs: list[dict]) -> str:
    flows = list(dict.fromkeys(run["flow"] for run in runs))
    named = {"error": "scale 1", "calibrated": "calibrated", "2 steps": "2 steps, calibrated"}
    columns = [f"{flow}: {what}" for flow in flows for what in (*named.values(), "lam*")]
    lines = [f"| 3 steps | expected | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for variant in VARIANTS:
        cells = []
        for flow in flows:
            group = [run["variants"][variant.name] for run in runs if run["flow"] == flow]
            cells += [bench.show([run[key] for run in group]) for key in named]
            cells.append(f"{bench.interval([run['lam'] for run in group])[0]:.2f}")
        lines.append(f"| {variant.name} | {variant.expected} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(bench.collect(measure, ["moons", "gaussians"])))
