"""Pretraining fusion against plain flow matching: python tests/benchmarks/fusion.py

Trains from scratch, every recipe with as many network calls: the paper's windows with several
shares rho of data rows, matched windows for 3 steps, and plain flow matching, which is rho = 1.
Counted for a row are 3 calls of the network that learns (forward, backward) and those of its
average: 2 for a self row, 1 for a row of matched windows, none for a data row. Shift 1, and the
same optimizer, schedule, batch and draws for all; nothing is tuned for any of them.

The 2-D flows: energy distance to fresh data. The tiny Flux: its transformer from random weights on
the pictures that its teacher learnt from, a fraction of the teacher's 20,000 iterations; Frechet
distance (features of quality.py) of 2,004 samples of the demonstration's 12 held-out captions to
as many rendered pictures, both through the VAE, share that shows its caption, and the loss of flow
matching on pictures that were not trained on. Captions are not held out from this training, nor
were they from the teacher's.
"""

import toy as bench  # isort: skip; tests/benchmarks/toy.py: it sets threads before torch starts

import argparse
import copy
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import quality
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from iterations import kept
from torch import Tensor

import shortcut as sc

tiny, TINY = quality.tiny, quality.demo.TINY
RECIPES = {"plain flow matching": dict(teacher_ratio=1.0)}
RECIPES |= {f"rho {rho}": dict(teacher_ratio=rho) for rho in (0.9, 0.75, 0.5, 0.33, 0.2)}
RECIPES["matched, 3 steps"] = bench.matched(3)
FLUX_RECIPES = ["plain flow matching", "rho 0.75", "matched, 3 steps"]
FLOWS, STEPS, FLUX_STEPS = ("moons", "gaussians"), (3, 8, 16, 32), (3, 32)
PLAIN, FLUX_PLAIN = 2000, 4000  # iterations of plain flow matching, batches of 1,024 and of 64
HOW = bench.toy.FROM_SCRATCH | {"ema_warmup": False}  # the average remembers 20 iterations
PICTURES = 6000  # rendered to train the tiny Flux on
NOISES = 167  # for each of 12 captions


def calls(settings: dict) -> float:
    """Network calls of a row; backward counts as two."""
    rho = settings["teacher_ratio"]
    return 3 + (1 if rho is None else 2 * (1 - rho))


def iterations(settings: dict, plain: int, length: float) -> int:
    """As many as cost what `plain` iterations of plain flow matching do."""
    return max(2, round(plain * length * 3 / calls(settings)))


def suited(settings: dict) -> str:
    """Steps N = 1/(2L) of a fused network: as (B), L = (1 - rho)/rho E[d]/2; data rows have 0."""
    if (rho := settings["teacher_ratio"]) is None:
        return str(settings["student_steps"])
    config = sc.ShortcutConfig()
    mean_d = np.mean(config.strides) / config.grid_steps
    return "all" if rho == 1 else f"{rho / (1 - rho) / mean_d:.1f}"


def flow_run(out: Path, flow: str, seed: int, length: float) -> dict:
    """Errors by recipe and steps."""
    torch.set_num_threads(1)
    world = bench.Bench(flow, seed)

    def measure(settings):
        count = iterations(settings, PLAIN, length)
        net = world.train(None, count, how=HOW, fast_decay=0.95, **settings)[count]
        return {n: world.error(net, n) for n in STEPS}

    return {
        recipe: kept(out, f"{flow}-{seed}-{recipe.replace(' ', '-')}", lambda s=s: measure(s))
        for recipe, s in RECIPES.items()
    }


# --------------------------------------------------------------------------------------- tiny Flux


class World:
    """The stock pipeline, conditions of the captions and latents (B, tokens, channels)."""

    def __init__(self, pictures: int):
        self.pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
        with torch.no_grad():
            self.texts, self.pooled, _ = self.pipe.encode_prompt(
                tiny.CAPTIONS, tiny.CAPTIONS, max_sequence_length=tiny.TEXT_TOKENS
            )
        self.captions = torch.arange(pictures) % len(tiny.CAPTIONS)
        self.latents = self.encoded(self.captions, torch.Generator().manual_seed(1))

    def encoded(self, captions: Tensor, generator) -> Tensor:
        some = [tiny.render(c, generator) for c in captions.split(500)]
        return torch.cat([quality.encoded(self.pipe, pictures) for pictures in some])

    def cond(self, captions: Tensor, guidance: Tensor) -> dict[str, Tensor]:
        return dict(text=self.texts[captions], pooled=self.pooled[captions], guidance=guidance)

    def velocity(self, net):
        ids = self.pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

        def velocity(x, t, *, text, pooled, guidance):
            return net(
                hidden_states=x, timestep=t, guidance=guidance, img_ids=ids,
                txt_ids=ids.new_zeros(text.shape[1], 3), encoder_hidden_states=text,
                pooled_projections=pooled,
            ).sample  # fmt: skip

        return velocity


def pretrain(world: World, settings: dict, count: int, seed: int, batch=64):
    """The average of the network; optimizer and schedule are those of make_tiny_flux.py."""
    config = sc.ShortcutConfig(shift_range=(1.0, 1.0), **settings)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    net = FluxTransformer2DModel.from_config(world.pipe.transformer.config)
    fast = copy.deepcopy(net).requires_grad_(False)
    weights, average = list(net.parameters()), list(fast.parameters())
    optimizer = torch.optim.AdamW(weights, 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    velocities = dict(student=world.velocity(net), fast=world.velocity(fast))
    for i in range(count):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((i + 1) / 100, 1, 2 - 2 * i / count)
        rows = torch.randint(len(world.latents), (batch,), generator=generator)
        x_0, guidance = world.latents[rows], 8 * torch.rand(batch, generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        windows = sc.sample_windows(config, batch, fusion=True, generator=generator)
        cond = world.cond(world.captions[rows], guidance)
        loss, _ = sc.shortcut_loss(config, windows, x_0, noise, **velocities, **cond)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        sc.update_ema(average, weights, config.fast_decay)
    return fast


@torch.no_grad()
def judged(world: World, judge, net, seed: int, length: float) -> dict:
    """Frechet distance and shown captions by steps; loss of flow matching."""
    lines = (TINY / "prompts.txt").read_text().split("\n")
    held_out = [
        tiny.CAPTIONS.index(line) for line in list(dict.fromkeys(filter(None, lines)))[-12:]
    ]
    captions = torch.tensor(held_out).repeat(max(2, round(NOISES * length)))
    generator = torch.Generator().manual_seed(30_000 + seed)
    codes = quality.encoded(world.pipe, tiny.render(captions, generator))
    truth = quality.look(judge, quality.decoded(world.pipe, codes), captions)
    noise = torch.randn(len(captions), 16, 16, generator=generator)
    velocity, found = world.velocity(net), {"frechet": {}, "shown": {}}
    for n in FLUX_STEPS:
        ends = []
        for rows in torch.arange(len(noise)).split(256):
            cond = world.cond(captions[rows], torch.full((len(rows),), 3.5))
            ends.append(sc.euler_sample(velocity, noise[rows], sc.time_grid(n), **cond))
        seen = quality.look(judge, quality.decoded(world.pipe, torch.cat(ends)), captions)
        found["frechet"][n], found["shown"][n] = quality.frechet(truth, seen), seen["shown"]
    captions = torch.arange(3000) % len(tiny.CAPTIONS)
    x_0, losses = world.encoded(captions, torch.Generator().manual_seed(2)), []
    noise = torch.randn(x_0.shape, generator=generator)
    t = (torch.randperm(len(x_0), generator=generator) + 0.5) / len(x_0)
    for rows in torch.arange(len(x_0)).split(250):
        cond = world.cond(captions[rows], torch.full((len(rows),), 3.5))
        v = velocity(sc.interpolate(x_0[rows], noise[rows], t[rows]), t[rows], **cond)
        losses.append((v - (noise - x_0)[rows]).square().mean().item())
    return found | {"loss": float(np.mean(losses))}


def flux_run(out: Path, recipe: str, seed: int, length: float, judge=None) -> dict:
    """Quality of one training; recipe "teacher": of the shipped one."""

    def measure():
        torch.set_num_threads(1)
        world = World(round(PICTURES * min(1, 10 * length)))
        if recipe == "teacher":
            net = world.pipe.transformer
        else:
            settings = RECIPES[recipe]
            net = pretrain(world, settings, iterations(settings, FLUX_PLAIN, length), seed)
        return judged(world, judge, net, seed, length)

    return kept(out, f"flux-{seed}-{recipe.replace(' ', '-')}", measure)


# --------------------------------------------------------------------------------------- the tables


def flow_tables(out: Path, seeds: int, length: float) -> list[str]:
    lines = []
    for flow in FLOWS:
        runs = [flow_run(out, flow, seed, length) for seed in range(seeds)]
        lines += ["", f"**{flow}**, {seeds} seeds, energy distance x 1e-4", ""]
        columns = ["suits N =", "iterations", *(f"{n} steps" for n in STEPS), "32: times plain"]
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for recipe, settings in RECIPES.items():
            errors = {n: [run[recipe][str(n)] for run in runs] for n in STEPS}
            plain = [run["plain flow matching"]["32"] for run in runs]
            count = iterations(settings, PLAIN, length)
            cells = [recipe, suited(settings), f"{count:,}", *map(bench.show, errors.values())]
            cells.append(f"{np.mean(errors[32]) / np.mean(plain):.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def flux_tables(out: Path, recipes: list[str], seeds: int, length: float) -> list[str]:
    def cell(values, digits):
        mean, half = bench.interval(values)
        return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")

    lines = ["", f"**tiny Flux**, {seeds} seed(s)", "", "| | suits N = | iterations | "
             + " | ".join(f"Frechet x 100, {n} steps" for n in FLUX_STEPS)
             + " | shown, 3 steps, % | shown, 32 steps, % | loss |",
             "|---" * (len(FLUX_STEPS) + 6) + "|"]  # fmt: skip
    for recipe in [*recipes, "teacher"]:
        runs = [flux_run(out, recipe, seed, length) for seed in range(seeds)]
        suits, count = "all", "20,000"
        if recipe != "teacher":
            suits = suited(RECIPES[recipe])
            count = f"{iterations(RECIPES[recipe], FLUX_PLAIN, length):,}"
        cells = [recipe, suits, count]
        cells += [cell([100 * run["frechet"][str(n)] for run in runs], 2) for n in FLUX_STEPS]
        cells += [cell([100 * run["shown"][str(n)] for run in runs], 1) for n in FLUX_STEPS]
        cells.append(cell([run["loss"] for run in runs], 4))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[0])
    parts = ("flows", "flux")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, default=5, help="of the 2-D flows (5)")
    parser.add_argument("--flux-seeds", type=int, default=3, help="of the tiny Flux (3)")
    parser.add_argument("--flux-recipes", nargs="+", choices=RECIPES, default=FLUX_RECIPES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--length", type=float, default=1.0, help="scales all trainings (1)")
    parser.add_argument("--out", type=Path, help="keep the numbers in this folder, and go on in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.jobs) as pool:
        out, jobs, lines = args.out or Path(scratch), [], []
        out.mkdir(parents=True, exist_ok=True)
        if "flows" in args.parts:
            todo = product(range(args.seeds), FLOWS)
            jobs += [pool.submit(flow_run, out, flow, s, args.length) for s, flow in todo]
        if "flux" in args.parts:
            judge = pool.submit(quality.train_judge, max(2, round(500 * args.length))).result()
            todo = product(range(args.flux_seeds), [*args.flux_recipes, "teacher"])
            jobs += [pool.submit(flux_run, out, r, s, args.length, judge) for s, r in todo]
        for job in jobs:
            job.result()
        if "flows" in args.parts:
            lines += flow_tables(out, args.seeds, args.length)
        if "flux" in args.parts:
            lines += flux_tables(out, args.flux_recipes, args.flux_seeds, args.length)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
