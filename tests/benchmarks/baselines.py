"""Against other ways to few steps, at an equal budget: python tests/benchmarks/baselines.py

Progressive distillation (Salimans and Ho 2022) and a shortcut model that is told its step (Frans et
al. 2024), distilled from the teacher and from scratch, against `for_steps(3)`; on the 2-D flows and
on the tiny Flux, at shift 1. Prints Markdown tables; errors as in toy.py and flux.py.

Budget: rows x network calls, a backward counts as two. Ours: 5.12 million, 2,000 iterations (twice
the toy's) of 512 rows with 5 calls each: teacher, average, student and its backward; on the tiny
Flux 200 of 64. All distilling methods have as many, the one from scratch the teacher's 6.14 million
besides. A scale takes 0.5 to 2 % more, not counted. Network, batch, Adam and schedule are the
toy's; the step comes as 9 more inputs. On the tiny Flux, LoRA and AdamW are flux_distill.py's, the
rate of the others falls in the second half; the step comes by a small MLP, at first 0, into the
embedding of time.

Samplers are each method's own. A progressive student of N steps knows N times only: one ladder
goes down to 3, our goal, one down to 1 with a network for each step count on the way. A ladder ends
no better than the teacher at its first rung: on the flows 48 and 64 steps do better than 24 and 32.

Tuned on the flows, on seed 100 of moons and eight gaussians: ours by iterations.py (rate and
warm-up), the others by --tune: rate, first rung and growth of iterations from rung to rung; or
rate, decay of the average, share of rows with d = 0 and finest step. (The second round of the
shortcut model, in which its share of 0.25 won, was run on eight gaussians only.) On the tiny Flux
likewise, on validation captions of seed 100; ours in making the demonstration.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts
import flux as demo  # isort: skip; tests/benchmarks/flux.py

import argparse
import copy
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

import flux_distill as fd
import shortcut as sc
import toy_2d

STEPS = (1, 2, 3, 4, 8)
BATCH, ITERATIONS = 512, 2000  # of our student: twice the toy's; the teacher's as well
WARMUP = 100  # iterations, of the others
FORWARD, TRAINED = 1, 3  # network calls of a row: without gradient; with its backward
OURS = ITERATIONS * BATCH * (2 * FORWARD + TRAINED)  # teacher, slow average, student
TEACHERS = 2000 * 1024 * TRAINED
DOWN_TO_3, DOWN_TO_1 = (24, 12, 6, 3), (32, 16, 8, 4, 2, 1)
COUNTS = torch.tensor([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])  # N of the step sizes


def halved(N, generator) -> sc.Windows:
    """Windows that halve a step of the N-step sampler, N (B,), at a random one of its times."""
    t = 1 - (N * torch.rand(len(N), generator=generator)).floor() / N
    return sc.Windows(t, (t - 0.5 / N).clamp(min=0), (t - 1 / N).clamp(min=0), 0)


def rungs(ladder, iterations: float, growth: float) -> list[tuple[int, int]]:
    """(N, iterations) of each rung below the first; each gets `growth` times the one before."""
    shares = growth ** np.arange(len(ladder) - 1)
    counts = (iterations * shares / shares.sum()).round().clip(1).astype(int)
    return list(zip(ladder[1:], counts.tolist()))


def progressive_loss(N, student, before, x_0, noise, generator, **cond):
    """Progressive distillation (Salimans and Ho 2022): one of N steps for two of those of `before`.

    The network is asked and trained at the N times of its own sampler only.
    """
    windows = halved(torch.full((len(x_0),), N), generator)
    x_t = sc.interpolate(x_0, noise, windows.t)
    target = sc.shortcut_target(before, before, x_t, windows, **cond)
    return (student(x_t, windows.t, **cond) - target).square().mean()


def step_size_loss(k, finest, student, average, teacher, x_0, noise, generator, **cond):
    """Shortcut model (Frans et al. 2024): v(x, t, d) is told the step d = 1/N that will be taken.

    The first k rows have d = 0: flow matching or, distilling, regression on the teacher's velocity.
    The others learn to do in one step what the average of the weights does in two of d/2; N is one
    of COUNTS up to the finest, at which half a step counts as d = 0.
    """
    batch, counts = len(x_0), COUNTS[finest >= COUNTS]
    N = counts[torch.randint(len(counts), (batch - k,), generator=generator)]
    windows = halved(N, generator)
    t = torch.cat([1 - torch.rand(k, generator=generator), windows.t])
    d, half = torch.cat([torch.zeros(k), 1 / N]), torch.where(finest >= 2 * N, 0.5 / N, 0.0)
    x_t = sc.interpolate(x_0, noise, t)
    head, tail = (
        {name: c[rows] for name, c in cond.items()} for rows in (slice(k), slice(k, None))
    )
    with torch.no_grad():
        velocity = teacher(x_t[:k], t[:k], **head) if teacher else (noise - x_0)[:k]
    target = sc.shortcut_target(average, average, x_t[k:], windows, d=half, **tail)
    v = student(x_t, t, d=d, **cond)
    return (v - torch.cat([velocity, target])).square().mean()


def at(velocity, steps: int):
    """v(x, t) of a shortcut model for a sampler of so many steps."""
    return lambda x, t, **cond: velocity(x, t, d=torch.full_like(t, 1 / steps), **cond)


def step_size_rows(budget: float, batch: int, share: float, distilled: bool) -> tuple[int, int]:
    """Rows of a batch with d = 0, and how many iterations the budget of network calls allows."""
    k = round(share * batch)
    plain = TRAINED + (FORWARD if distilled else 0)
    return k, round(budget / (k * plain + (batch - k) * (2 * FORWARD + TRAINED)))


# ----------------------------------------------------------------------------------- on the toys


def fourier(t) -> torch.Tensor:
    """Features (B, 9) of times or steps (B,), as VelocityMLP has them of t."""
    phase = t[:, None] * (torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]))
    return torch.cat([t[:, None], phase.sin(), phase.cos()], 1)


class StepMLP(toy_2d.VelocityMLP):
    """v(x, t, d): VelocityMLP that is told its step d (B,) too, by the features it has of t.

    With a teacher it starts as that, whatever d is.
    """

    def __init__(self, teacher: nn.Module | None = None):
        super().__init__()
        self.layers[0] = nn.Linear(20, self.layers[0].out_features)
        if teacher:
            weights = teacher.state_dict()
            first = weights["layers.0.weight"]
            self.load_state_dict(weights | {"layers.0.weight": nn.functional.pad(first, (0, 9))})

    def forward(self, x, t, d):
        return self.layers(torch.cat([x, fourier(t), fourier(d)], 1))


def progressive(teacher, data, budget, seed, *, ladder, rate, growth) -> dict[int, nn.Module]:
    """A network for each rung N of the ladder, which starts as the network of the rung before."""
    generator, kept, before = torch.Generator().manual_seed(seed + 1), {}, teacher
    for N, count in rungs(ladder, budget / (BATCH * (2 * FORWARD + TRAINED)), growth):
        student = copy.deepcopy(before).requires_grad_(True)
        optimizer, schedule = toy_2d.adam(list(student.parameters()), rate, count, WARMUP)
        for _ in range(count):
            x_0, noise = data(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
            loss = progressive_loss(N, student, before, x_0, noise, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        kept[N] = before = student.requires_grad_(False)
    return kept


def shortcut_model(teacher, data, budget, seed, *, rate, decay, share, finest) -> StepMLP:
    """Distilled from the teacher, or without one from scratch; the average of its weights."""
    torch.manual_seed(seed)
    generator, student = torch.Generator().manual_seed(seed + 1), StepMLP(teacher)
    average, weights = copy.deepcopy(student).requires_grad_(False), list(student.parameters())
    k, iterations = step_size_rows(budget, BATCH, share, bool(teacher))
    optimizer, schedule = toy_2d.adam(weights, rate, iterations, WARMUP)
    for _ in range(iterations):
        x_0, noise = data(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        loss = step_size_loss(k, finest, student, average, teacher, x_0, noise, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        sc.update_ema(average.parameters(), weights, decay)
    return average


PROGRESSIVE = {
    "down to 3": dict(ladder=(48, *DOWN_TO_3), rate=4e-3, growth=2.0),
    "down to 1": dict(ladder=(64, *DOWN_TO_1), rate=4e-3, growth=2.0),
}
SHORTCUT = {
    "distilled": dict(rate=2e-3, decay=0.95, share=0.25, finest=64),
    "from scratch": dict(rate=5e-3, decay=0.99, share=0.25, finest=64),
}


def grid(method: str) -> list[dict]:
    """What is tried for a method: settings around a middle, then around the best of those."""
    if method in PROGRESSIVE:
        ladder = DOWN_TO_3 if method == "down to 3" else DOWN_TO_1
        tries = product((ladder, (2 * ladder[0], *ladder)), (1e-3, 2e-3, 4e-3), (1.0, 2.0))
        return [dict(zip(("ladder", "rate", "growth"), values)) for values in tries]
    tries = [{"decay": 0.999}, {"share": 0.5}, {"share": 0.9}, {"finest": 16}, {"finest": 64}]
    if method == "distilled":
        middle = dict(rate=1e-3, decay=0.99, share=0.75, finest=32)
        rates = product((1e-3, 2e-3, 4e-3), (0.95, 0.99))
        tries += [{"rate": rate, "decay": decay} for rate, decay in rates]
        again = [{}, {"share": 0.5}, {"share": 0.5, "rate": 4e-3}]
    else:
        middle = dict(rate=2e-3, decay=0.99, share=0.75, finest=32)
        tries += [{"rate": rate} for rate in (2e-3, 5e-3, 1e-2)]
        others = ({}, {"finest": 128}, {"rate": 1e-2}, {"decay": 0.95})
        again = [{}, *({"share": 0.5} | other for other in others)]
    return [middle | one for one in tries] + [SHORTCUT[method] | one for one in again]


def errors(method: str, on: bench.Bench, base, length: float, settings: dict) -> dict:
    """Errors of a method trained with these settings, for all step counts that it has."""
    if method in PROGRESSIVE:
        nets = progressive(base, on.data, round(OURS * length), on.seed, **settings)
        return {n: on.error(nets[n], n) for n in nets if n in STEPS}
    base, budget = (base, OURS) if method == "distilled" else (None, OURS + TEACHERS)
    net = shortcut_model(base, on.data, round(budget * length), on.seed, **settings)
    return {n: on.error(at(net, n), n) for n in STEPS}


def tune(flow: str, seed: int, length: float) -> dict:
    """Errors of all settings in `grid`, for one flow and seed."""
    torch.set_num_threads(1)
    on, tried = bench.Bench(flow, seed), []
    base = toy_2d.train_teacher(on.data, max(2, round(ITERATIONS * length)), seed)
    for method in (*PROGRESSIVE, *SHORTCUT):
        for settings in grid(method):
            found = errors(method, on, base, length, settings)
            tried.append({"method": method, "settings": settings, "errors": found})
    return {"flow": flow, "seed": seed, "tried": tried}


def measure(flow: str, seed: int, length: float) -> dict:
    """Errors of every method at every number of steps, for one flow and seed."""
    torch.set_num_threads(1)
    on, iterations = bench.Bench(flow, seed), max(2, round(ITERATIONS * length))
    base = toy_2d.train_teacher(on.data, iterations, seed)
    budget, own = round(OURS * length), round((OURS + TEACHERS) * length)
    student = on.train(base, iterations, **bench.matched(3))[iterations]
    three = progressive(base, on.data, budget, seed, **PROGRESSIVE["down to 3"])[3]
    each = progressive(base, on.data, budget, seed, **PROGRESSIVE["down to 1"])
    distilled = shortcut_model(base, on.data, budget, seed, **SHORTCUT["distilled"])
    scratch = shortcut_model(None, on.data, own, seed, **SHORTCUT["from scratch"])
    nets = {
        "teacher": dict.fromkeys(STEPS, base),
        "ours": dict.fromkeys(STEPS, student),
        "down to 3": dict.fromkeys(STEPS, three),
        "down to 1": {n: each[n] for n in STEPS if n in each},
        "distilled": {n: at(distilled, n) for n in STEPS},
        "from scratch": {n: at(scratch, n) for n in STEPS},
    }
    out = {name: {n: on.error(net, n) for n, net in row.items()} for name, row in nets.items()}
    for name, net in {"ours": student, "down to 3": three}.items():
        out[f"{name}, scaled"] = {n: on.calibrated(base, net, n)["error"] for n in STEPS}
    return {"flow": flow, "seed": seed, "floor": on.floor, "errors": out}


# ------------------------------------------------------------------------------- on the tiny Flux

FLUX_STEPS = (2, 3, 4, 8)
FLUX = {
    "down to 3": dict(ladder=(48, *DOWN_TO_3), rate=1e-3, growth=2.0),
    "distilled": dict(rate=1e-3, decay=0.95, share=0.25, finest=32),
}


class TinyFlux:
    """One LoRA over the tiny Flux, pairs and held-out captions: flux.py's demonstration, shift 1.

    A network is a set of LoRA weights (P,) and, where it is told d, an embedder of d: its output is
    added to the embedding of time, guidance and text.
    """

    def __init__(self, out: Path, seed: int, length: float):
        self.args = demo.demonstration(out, seed, length=length)
        fd.make_cache(self.args)
        self.adapter = fd.Adapter(self.args)
        self.start = self.adapter.switch.weights.clone()
        self.fine = {}
        self.pairs = fd.read(self.args, "text", [pair.text for pair in self.args.pairs])
        rows = range(len(self.args.pairs))
        self.latents = fd.read(self.args, "latent", rows)["latent"].flatten(1, 2)
        self.of_step = 0.0  # what is added to the embedding
        self.adapter.net.time_text_embed.register_forward_hook(
            lambda module, given, embedding: embedding + self.of_step
        )

    def embedder(self) -> nn.Module:
        """An embedder of steps d, which at first adds 0."""
        torch.manual_seed(self.args.seed)
        width = self.adapter.net.inner_dim
        layers = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width))
        for p in layers[-1].parameters():
            nn.init.zeros_(p)
        return layers

    def velocity(self, weights, embedder=None):
        """v(x, t, d=None, **cond) of this network; weights None: the teacher."""
        plain = self.adapter.velocity(weights, self.args.size)

        def velocity(x, t, *, d=None, **cond):
            self.of_step = 0.0 if d is None else embedder(fourier(d))
            return plain(x, t, **cond)

        return velocity

    def draw(self, *key):
        """Generator, latents, noise and conditions of a batch."""
        generator = fd.keyed(self.args.seed, "baselines", *key)
        rows = torch.randint(len(self.latents), (self.args.batch,), generator=generator)
        x_0, cond = self.latents[rows], {name: x[rows] for name, x in self.pairs.items()}
        cond["guidance"] = 8 * torch.rand(len(rows), generator=generator)
        return generator, x_0, torch.randn(x_0.shape, generator=generator), cond

    def optimizer(self, lora, rate, iterations, more=()):
        """A function that takes a step down a loss; in the second half the rate falls to 0.

        lora: the student's LoRA weights (P,); more: parameters of its embedder.
        """
        weights = [lora, *more]
        adamw = torch.optim.AdamW(weights, rate, weight_decay=1e-4)
        factor = lambda i: min(1, 2 - 2 * i / iterations)  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(adamw, factor)

        def step(loss):
            loss.backward()
            self.adapter.move_gradients(lora, 1.0)
            nn.utils.clip_grad_norm_(weights, 10.0)
            adamw.step()
            adamw.zero_grad()
            schedule.step()

        return step

    @torch.no_grad()
    def distances(self, nets: dict, purpose: str) -> dict[int, float]:
        """RMSE of latents to 32 steps of the teacher, for {steps: velocity}; held-out captions."""
        args = self.args
        texts = {"compare": args.comparison, "validation": args.validation}[purpose]
        rows = [(i, k) for k in range(args.noises) for i in texts]
        cond = fd.read(args, "text", [i for i, _ in rows])
        cond["guidance"] = torch.full((len(rows),), args.guidance)
        noise = fd.noises(args, [(purpose, *row) for row in rows])

        def end(velocity, n):
            return sc.euler_sample(velocity, noise, sc.time_grid(n), **cond)

        if purpose not in self.fine:
            self.fine[purpose] = end(self.velocity(None), fd.FINE)
        return {n: fd.rms(end(velocity, n) - self.fine[purpose]) for n, velocity in nets.items()}

    def progressive(self, *, ladder, rate, growth) -> dict:
        """Velocities of the rungs: each rung's teacher is the LoRA of the rung before."""
        before, kept = None, {}
        for N, count in rungs(ladder, self.args.iterations, growth):
            weights = (self.start if before is None else before).clone()
            step = self.optimizer(weights, rate, count)
            student, teacher = self.velocity(weights), self.velocity(before)
            for i in range(count):
                generator, x_0, noise, cond = self.draw(N, i)
                step(progressive_loss(N, student, teacher, x_0, noise, generator, **cond))
            before, kept[N] = weights, student
        return kept

    def shortcut_model(self, *, rate, decay, share, finest):
        """Velocity v(x, t, d): the average of LoRA and embedder."""
        lora = self.start.clone()
        embedder = self.embedder()
        weights = [lora, *embedder.parameters()]
        slow_lora = lora.clone()
        slow_embedder = copy.deepcopy(embedder).requires_grad_(False)
        average = [slow_lora, *slow_embedder.parameters()]
        batch = self.args.batch
        k, count = step_size_rows(self.args.iterations * 5 * batch, batch, share, True)
        step = self.optimizer(lora, rate, count, embedder.parameters())
        student, slow = self.velocity(lora, embedder), self.velocity(slow_lora, slow_embedder)
        teacher = self.velocity(None)
        for i in range(count):
            generator, x_0, noise, cond = self.draw("step size", i)
            step(step_size_loss(k, finest, student, slow, teacher, x_0, noise, generator, **cond))
            sc.update_ema(average, weights, decay)
        return slow


def flux_errors(tiny: TinyFlux, method: str, settings: dict, purpose: str) -> dict[int, float]:
    """RMSE at all step counts: of the last progressive network, or of the shortcut model."""
    if method == "distilled":
        informed = tiny.shortcut_model(**settings)
        nets = {n: at(informed, n) for n in FLUX_STEPS}
    else:
        nets = dict.fromkeys(FLUX_STEPS, tiny.progressive(**settings)[3])
    return tiny.distances(nets, purpose)


def flux_grid(method: str) -> list[dict]:
    """What is tried on the tiny Flux: rates, with ladders or shares; then around the best."""
    rates, best = (5e-4, 1e-3, 2e-3), FLUX[method]
    if method == "down to 3":
        ladders = (DOWN_TO_3[1:], DOWN_TO_3, (48, *DOWN_TO_3))
        tries = [dict(ladder=x, rate=rate, growth=1.0) for x, rate in product(ladders, rates)]
        tries += [dict(ladder=ladder, growth=2.0) for ladder in ladders[1:]]
    else:
        tries = [dict(rate=rate, share=share) for rate, share in product(rates, (0.25, 0.5))]
        tries += [{"decay": 0.8}, {"decay": 0.99}, {"finest": 16}]
    return [best | one for one in tries]


def tune_flux(out: Path, seed: int, length: float) -> dict:
    """Errors of all settings in `flux_grid` on the validation captions, for one seed."""
    torch.set_num_threads(1)
    tiny, tried = TinyFlux(out / f"tune-{seed}", seed, length), []
    for method in FLUX:
        for settings in flux_grid(method):
            found = flux_errors(tiny, method, settings, "validation")
            tried.append({"method": method, "settings": settings, "errors": found})
    return {"flow": "flux", "seed": seed, "tried": tried}


def measure_flux(out: Path, seed: int, length: float) -> dict:
    """Errors of every method on the tiny Flux, for one seed; ours by flux.py, kept in `out`."""
    torch.set_num_threads(1)
    table = demo.measure(out, "all pairs", seed, length)
    tiny = TinyFlux(out / f"all-pairs-{seed}", seed, length)
    rows = {"teacher": "teacher", "ours": "student", "ours, scaled": "student, scaled"}
    found = {name: {n: table[row, n]["rmse"] for n in FLUX_STEPS} for name, row in rows.items()}
    for method, settings in FLUX.items():
        found[method] = flux_errors(tiny, method, settings, "compare")
    return {"flow": "flux", "seed": seed, "errors": found}


# ------------------------------------------------------------------------------------- the tables

NAMES = {
    "teacher": "teacher",
    "ours": "ours, `for_steps(3)`, scale 1",
    "ours, scaled": "ours, that student at its scale for the step count",
    "down to 3": "progressive, down to 3: the 3-step network",
    "down to 3, scaled": "that network at its scale for the step count",
    "down to 1": "progressive, down to 1: a network for each step count",
    "distilled": "shortcut model, told its step, distilled",
    "from scratch": "shortcut model, told its step, from scratch",
}


def table(runs: list[dict]) -> list[str]:
    """Errors of one flow or of the tiny Flux: a line for each method, a column a step count."""
    tiny = "floor" not in runs[0]
    steps = FLUX_STEPS if tiny else STEPS
    lines = [f"| Euler steps | {' | '.join(map(str, steps))} |", "|---" * (1 + len(steps)) + "|"]
    for name, label in NAMES.items():
        rows = [run["errors"].get(name, {}) for run in runs]
        if not rows[0]:
            continue
        cells = [[row[str(n)] for row in rows] if str(n) in rows[0] else None for n in steps]
        if tiny:
            shown = [c and "{:.3f} ± {:.3f}".format(*bench.interval(c)) for c in cells]
        else:
            shown = [c and bench.show(c) for c in cells]
        lines.append(f"| {label} | {' | '.join(cell or '-' for cell in shown)} |")
    return lines


def ratios(groups: dict[str, list[dict]]) -> list[str]:
    """Ours at its scale over the others, paired by seed; at 3 steps ours is at scale 1."""
    lines = [
        "| ours / other | steps | " + " | ".join(groups) + " |",
        "|---" * (2 + len(groups)) + "|",
    ]
    for name, n in product(list(NAMES)[3:], STEPS):
        if name.startswith("down to 3") and n != 3:
            continue  # it was not made for them
        cells, mine = [], "ours" if n == 3 else "ours, scaled"
        for runs in groups.values():
            pairs = [[run["errors"].get(k, {}).get(str(n)) for run in runs] for k in (mine, name)]
            cells.append("" if None in pairs[0] + pairs[1] else bench.ratio(*pairs))
        if any(cells):
            lines.append(f"| {NAMES[name]} | {n} | {' | '.join(cells)} |")
    return lines


def markdown(runs: list[dict]) -> str:
    lines, groups = [], {}
    for run in runs:
        groups.setdefault(run["flow"], []).append(run)
    for flow, group in groups.items():
        floor = 1e4 * np.mean([run.get("floor", np.nan) for run in group])
        told = "" if np.isnan(floor) else f"; energy distance x 1e-4, data to data 0 ± {floor:.1f}"
        title = {"flux": "tiny Flux"}.get(flow, flow)
        lines += [f"**{title}**, {len(group)} seeds{told}", "", *table(group), ""]
    return "\n".join(lines + ratios(groups))


def tuning(runs: list[dict]) -> str:
    """Errors of what was tried, at all step counts that a method has, in this order.

    On the flows x 1e-4.
    """
    lines, cells = ["| method | setting | " + " | ".join(run["flow"] for run in runs) + " |"], {}
    lines += ["|---" * (2 + len(runs)) + "|"]
    for flow, tried in [(run["flow"], tried) for run in runs for tried in run["tried"]]:
        found = sorted((int(n), error) for n, error in tried["errors"].items())
        setting = ", ".join(f"{name} {value}" for name, value in tried["settings"].items())
        row = cells.setdefault((tried["method"], setting), {})
        show = "{:.3f}".format if flow == "flux" else lambda error: f"{1e4 * error:.1f}"
        row[flow] = " / ".join(show(error) for _, error in found)
    for key, row in cells.items():
        lines.append(f"| {' | '.join([*key, *(row.get(run['flow'], '') for run in runs)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    everything = [*toy_2d.FLOWS, "flux"]
    parser.add_argument("--on", nargs="+", choices=everything, default=everything)
    parser.add_argument("--seeds", type=int, default=5, help="of the flows (5); Flux: 3 at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--raw", type=Path, help="file of the numbers: read what it has, add to it")
    parser.add_argument("--out", type=Path, help="keep ours on the tiny Flux here, and go on in it")
    parser.add_argument("--tune", action="store_true", help="settings of the others, on seed 100")
    args = parser.parse_args()
    runs = json.loads(args.raw.read_text()) if args.raw and args.raw.exists() else []
    done = {(run["flow"], run["seed"]) for run in runs}
    seeds = [100] if args.tune else range(args.seeds)
    todo = [key for key in product(args.on, seeds) if key not in done]
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out, futures = args.out or Path(scratch), []
        for on, seed in todo:
            if on in toy_2d.FLOWS:
                task = tune if args.tune else measure
                futures.append(pool.submit(task, on, seed, args.length))
            elif seed < 3 or args.tune:
                task = tune_flux if args.tune else measure_flux
                futures.append(pool.submit(task, out, seed, args.length))
        for future in as_completed(futures):
            runs.append(json.loads(json.dumps(future.result())))
            if args.raw:
                args.raw.write_text(json.dumps(runs))
    runs.sort(key=lambda run: (everything.index(run["flow"]), run["seed"]))
    print(tuning(runs) if args.tune else markdown(runs))


if __name__ == "__main__":
    main()
