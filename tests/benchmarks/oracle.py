"""How near can any student of the tiny Flux come? python tests/benchmarks/oracle.py

Networks regressed on exact targets for 4,000 iterations: at the three times of the 3-step
sampler, on the teacher's own paths from fresh noise, the velocity that a student needs there (the
teacher's mean velocity over the coming step, from 16 Euler steps). There is no bootstrapping, no
EMA and no other time. What error they leave is that of the network, or of what it was trained on.

Two choices are varied. Weights: the LoRA of the demonstration, or all weights of the network.
Captions: the 18 that the demonstration trains on, or these and the 12 held-out ones, on which all
errors are measured (RMSE of latents to 32 steps of the teacher, in 3 steps, noise of its own).
6,400 paths, 4,000 iterations of 64 states; the learning rate is constant, then falls to 0.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import common
import common_flux
import torch
from torch import Tensor, nn

import flux_distill as fd
import shortcut as sc

STEPS = 3
PATHS = 6400  # each is followed to STEPS states
ITERATIONS = 4000
SNAPSHOTS = (250, 500, 1000, 2000, 4000)
WEIGHTS = ("LoRA", "all")
CAPTIONS = ("trained on", "held out, too")
RATES = {"LoRA": 1e-3, "all": 5e-4}

# ------------------------------------------------------------------------------------- measurements


class Bank:
    """States on the teacher's paths, and its mean velocity over the step that begins there."""

    def __init__(self, world: common_flux.TinyFlux, texts: list[int], paths: int):
        settings = world.settings
        times = sc.time_grid(STEPS, settings.shift)
        teacher = world.velocity(None)
        x, t, mean, of_text = [], [], [], []
        for start in range(0, paths, settings.batch):
            rows = [texts[i % len(texts)] for i in range(start, start + settings.batch)]
            keys = [("oracle", i) for i in range(start, start + settings.batch)]
            cond = world.cache.conditions(rows, settings.guidance)
            path = sc.teacher_path(teacher, world.cache.noise(keys), times, **cond)
            x.append(path.x.flatten(0, 1))
            mean.append(path.mean.flatten(0, 1))
            t.append(times[:-1].repeat_interleave(len(rows)))
            of_text.append(torch.tensor(rows).repeat(STEPS))
        self.x = torch.cat(x)
        self.t = torch.cat(t)
        self.mean = torch.cat(mean)
        self.text = torch.cat(of_text)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list]:
        """States, times and mean velocities of a batch, and the places of its captions."""
        rows = torch.randint(len(self.x), (batch,), generator=generator)
        return self.x[rows], self.t[rows], self.mean[rows], self.text[rows].tolist()


def places(world: common_flux.TinyFlux, captions: str) -> list[int]:
    """Places in the data's texts of the captions that an oracle learns from."""
    of_pairs = {pair.text for pair in world.data.pairs}
    if captions == "held out, too":
        of_pairs |= {*world.data.validation, *world.data.comparison}
    return sorted(of_pairs)


def loss_on(
    world: common_flux.TinyFlux, bank: Bank, student: sc.Velocity
) -> Callable[[int], Tensor]:
    """Loss of a student in an iteration, on exact targets."""

    def loss(iteration: int) -> Tensor:
        generator = fd.keyed(world.settings.seed, "oracle", iteration)
        x, t, mean, rows = bank.draw(common_flux.BATCH, generator)
        cond = world.cache.conditions(rows, world.settings.guidance)
        return (student(x, t, **cond) - mean).square().mean()

    return loss


def train_all_weights(loss, net: nn.Module, iterations: int, rate: float) -> Iterator[int]:
    """As TinyFlux.minimize trains a LoRA."""
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-4)
    for iteration in range(1, iterations + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 - 2 * (iteration - 1) / iterations)
        optimizer.zero_grad()
        loss(iteration).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
        yield iteration


def measure(weights: str, captions: str, seed: int, length: float) -> dict:
    """Errors of the oracle by iteration, and of the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        settings = common_flux.demonstration(Path(folder), seed, length=length)
        return train_oracle(common_flux.TinyFlux(settings), weights, captions, length)


def train_oracle(world: common_flux.TinyFlux, weights: str, captions: str, length: float) -> dict:
    """Train one on the teacher's paths; see `measure`."""
    bank = Bank(world, places(world, captions), common.shortened(PATHS, length))
    iterations = common.shortened(ITERATIONS, length)
    snapshots = {common.shortened(iteration, length) for iteration in SNAPSHOTS}
    teacher = world.distance(world.velocity(None), STEPS)

    if weights == "LoRA":
        lora_weights = world.lora.loaded_weights()
        student = world.velocity(lora_weights)
    else:
        family = world.model.family
        net = family.transformer.from_pretrained(common_flux.TINY / "transformer")
        student = partial(family.velocity, net.float())

    loss = loss_on(world, bank, student)
    if weights == "LoRA":
        steps = world.minimize(loss, lora_weights, iterations, RATES[weights], falling=True)
    else:
        steps = train_all_weights(loss, net, iterations, RATES[weights])
    errors = {}
    for iteration in steps:
        if iteration in snapshots:
            errors[iteration] = world.distance(student, STEPS)
    return {"teacher": teacher, "errors": errors}


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    some = [
        {"weights": weights, "captions": captions, "seed": seed}
        for seed in seeds
        for weights, captions in product(WEIGHTS, CAPTIONS)
    ]
    return {"oracle": [common.Task(measure, settings) for settings in some]}


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    columns = list(rows[0].found["errors"])
    lines = []
    for weights, captions in product(WEIGHTS, CAPTIONS):
        some = common.where(rows, "oracle", weights=weights, captions=captions)
        if some:
            cells = [common.mean_text(common.column(some, "errors", n)) for n in columns]
            lines.append([weights, captions, len(some), *cells])
    by_seed = common.grouped(rows, "seed")
    teacher = common.mean_text([some[0].found["teacher"] for some in by_seed.values()])
    head = ["weights", "captions", "seeds", *(f"{n} iterations" for n in columns)]
    of_method = common.where(common.load(common.RESULTS / "flux.json"), "all pairs")
    same = [row for row in of_method if row.settings["seed"] in by_seed]
    demonstration = common.mean_text([row.found["student"][STEPS] for row in same])
    return [
        f"{fd.counted(by_seed, 'seed')}; the teacher in {STEPS} steps: {teacher}; the demonstration"
        f" (200 iterations, scale 1): {demonstration}",
        *common.table(head, lines),
    ]


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, seeds=3)
