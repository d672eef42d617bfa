"""Pretraining fusion against plain flow matching: python tests/benchmarks/fusion.py

Trains from scratch, all recipes with equally many network calls: the paper's windows with several
fractions rho of data rows, matched windows for 3 steps, and plain flow matching, which is rho = 1.
A row costs 3 calls of the network that learns (forward, backward) and those of its EMA: 2 in a self
row, 1 in matched windows, none in a data row. All have shift 1 and the same optimizer, schedule,
batch and draws; nothing is tuned for any of them.

2-D flows: energy distance to fresh data. Tiny Flux: its transformer from random weights, on the
images that its teacher learned from, for a fraction of the teacher's 20,000 iterations. Measured
there: Fréchet distance of 2,004 samples of the demonstration's 12 held-out captions to as many
rendered images, both through the VAE; the fraction that shows its caption; and the loss of flow
matching on images that were not trained on. Captions are not held out from this training, nor were
they from the teacher's.
"""

import copy
from functools import cache

import common
import common_flux
import numpy as np
import torch
from common_flux import tiny
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

import shortcut as sc
import toy_2d

FLOWS = ["moons", "gaussians"]
STEPS = (3, 8, 16, 32)
PLAIN = 2000  # iterations of plain flow matching
PLAIN_RECIPE = "plain flow matching"


def recipes() -> dict[str, sc.ShortcutConfig | sc.MatchedConfig]:
    """By name."""
    ratios = {PLAIN_RECIPE: 1.0} | {f"rho {rho}": rho for rho in (0.9, 0.75, 0.5, 0.33, 0.2)}
    named = {name: common.paper(rho) for name, rho in ratios.items()}
    return named | {"matched, 3 steps": common.matched(3)}


def iterations(recipe: str, plain: int, length: float) -> int:
    """As many as cost what `plain` iterations of plain flow matching do."""
    config = recipes()[recipe]
    return common.shortened(plain * 3 / common.network_calls(config, fuse=True), length)


def suited(recipe: str) -> str:
    """Steps N = 1 / (2 L) of a fused network.

    Data rows look nowhere but at t, the two halves of a self row as in `vanilla`: by (B) without
    its 1 / n, L = (1 - rho) / rho E[d] / 2.
    """
    config = recipes()[recipe]
    if isinstance(config, sc.MatchedConfig):
        return str(config.steps)
    rho = config.teacher_ratio
    if rho == 1:
        return "all"
    mean_d = np.mean(config.strides) / config.grid_steps
    return f"{rho / (1 - rho) / mean_d:.1f}"


def measure_flow(recipe: str, flow: str, seed: int, length: float) -> dict:
    """Errors by steps. The EMA has a constant decay: it averages over 20 iterations."""
    on = common.FlowMeasure(flow, seed, length)
    count = iterations(recipe, PLAIN, length)
    config = recipes()[recipe]
    constant = toy_2d.FROM_SCRATCH._replace(ema_warmup=False)
    net = toy_2d.fuse(on.data, config, count, seed, recipe=constant, decay=0.95)[count]
    return {"errors": {n: on.error(net, n) for n in STEPS}, "iterations": count}


def tasks(flows, seeds) -> dict[str, list[common.Task]]:
    on_flows = [
        {"flow": flow, "seed": seed, "recipe": recipe}
        for seed in seeds
        for flow in flows
        for recipe in recipes()
    ]
    on_flux = [{"seed": seed, "recipe": recipe} for seed in seeds[:3] for recipe in FLUX_RECIPES]
    return {
        "flows": [common.Task(measure_flow, settings) for settings in on_flows],
        "flux": [common.Task(measure_flux, settings) for settings in on_flux],
    }


# ------------------------------------------------------------------------------------------- tables


def tables(rows: list[common.Row]) -> list[str]:
    lines = []
    for flow, some in common.grouped(common.where(rows, "flows"), "flow").items():
        seeds = len(common.grouped(some, "seed"))
        lines += [f"**{flow}**, {seeds} seeds, energy distance x 1e-4", *table_of_flow(some)]
    on_flux = common.where(rows, "flux")
    if on_flux:
        seeds = len(common.grouped(on_flux, "seed"))
        lines += [f"**tiny Flux**, {seeds} seeds", *table_of_flux(on_flux)]
    return lines


def table_of_flow(rows: list[common.Row]) -> list[str]:
    by_recipe = common.grouped(rows, "recipe")
    lines = []
    for recipe, some in by_recipe.items():
        cells = [recipe, suited(recipe), f"{some[0].found['iterations']:,}"]
        cells += [common.energy_text(common.column(some, "errors", n)) for n in STEPS]
        if PLAIN_RECIPE in by_recipe:
            plain = common.column(by_recipe[PLAIN_RECIPE], "errors", 32).mean()
            cells.append(f"{common.column(some, 'errors', 32).mean() / plain:.1f}")
        lines.append(cells)
    steps = [f"{n} steps" for n in STEPS]
    return common.table(["", "suits N =", "iterations", *steps, "32: times plain"], lines)


def table_of_flux(rows: list[common.Row]) -> list[str]:
    lines = []
    for recipe, some in common.grouped(rows, "recipe").items():
        cells = [recipe, "all", "20,000"]
        if recipe != "teacher":
            cells = [recipe, suited(recipe), f"{iterations(recipe, FLUX_PLAIN, some[0].length):,}"]
        distances = [common.column(some, "frechet", n) for n in FLUX_STEPS]
        cells += [common.mean_text(values) for values in distances]
        shown = [common.column(some, "shown", n) for n in FLUX_STEPS]
        cells += [common.mean_text(values, 1, 100) for values in shown]
        lines.append([*cells, common.mean_text(common.column(some, "loss"), 4)])
    head = ["", "suits N =", "iterations"]
    head += [f"Fréchet distance, {n} steps" for n in FLUX_STEPS]
    head += [f"shown, {n} steps, %" for n in FLUX_STEPS]
    return common.table([*head, "loss"], lines)


# ---------------------------------------------------------------------------------------- tiny Flux

FLUX_RECIPES = (PLAIN_RECIPE, "rho 0.75", "matched, 3 steps", "teacher")
FLUX_STEPS = (3, 32)
FLUX_PLAIN = 4000  # iterations of plain flow matching, batches of 64
IMAGES = 6000  # rendered to train on
NOISES = 167  # for each of 12 captions
GUIDANCE = tiny.PLAIN_GUIDANCE  # at which the teacher is as plain as networks without a guidance


class TinyFlux:
    """The stock pipeline, its captions, latents (B, C, H, W) and a velocity around a network."""

    def __init__(self, count: int):
        self.pipe = FluxPipeline.from_pretrained(common_flux.TINY, dtype=torch.float32)
        with torch.no_grad():
            self.texts, self.pooled, _ = self.pipe.encode_prompt(
                tiny.CAPTIONS, tiny.CAPTIONS, max_sequence_length=tiny.TEXT_TOKENS
            )
        self.captions = torch.arange(count) % len(tiny.CAPTIONS)
        self.latents = self.rendered(self.captions, torch.Generator().manual_seed(1))

    def rendered(self, captions: Tensor, generator) -> Tensor:
        """Latents of rendered images."""
        parts = [tiny.render(part, generator) for part in captions.split(500)]
        return torch.cat([common_flux.encoded(self.pipe.vae, part) for part in parts])

    def cond(self, captions: Tensor, guidance: Tensor) -> dict[str, Tensor]:
        return dict(text=self.texts[captions], pooled=self.pooled[captions], guidance=guidance)

    def velocity(self, net):
        """v(x, t) for latents x (B, C, H, W)."""

        def velocity(x, t, *, text, pooled, guidance):
            batch, channels, height, width = x.shape
            ids = self.pipe._prepare_latent_image_ids(
                batch, height // 2, width // 2, x.device, x.dtype
            )
            tokens = net(
                hidden_states=self.pipe._pack_latents(x, batch, channels, height, width),
                timestep=t,
                guidance=guidance,
                img_ids=ids,
                txt_ids=ids.new_zeros(text.shape[1], 3),
                encoder_hidden_states=text,
                pooled_projections=pooled,
            ).sample
            factor = self.pipe.vae_scale_factor
            return self.pipe._unpack_latents(tokens, tiny.SIZE, tiny.SIZE, factor)

        return velocity


tiny_flux = cache(TinyFlux)


def pretrain(world: TinyFlux, config, count: int, seed: int, batch: int = 64, decay=0.99):
    """The EMA of a network; optimizer and schedule are those of make_tiny_flux.py."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    net = FluxTransformer2DModel.from_config(world.pipe.transformer.config)
    ema = copy.deepcopy(net).requires_grad_(False)
    student, average = world.velocity(net), world.velocity(ema)
    weights = list(net.parameters())
    optimizer = torch.optim.AdamW(weights, 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    is_matched = isinstance(config, sc.MatchedConfig)
    for i in range(count):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((i + 1) / 100, 1, 2 - 2 * i / count)
        rows = torch.randint(len(world.latents), (batch,), generator=generator)
        x_0 = world.latents[rows]
        cond = world.cond(world.captions[rows], 8 * torch.rand(batch, generator=generator))
        noise = torch.randn(x_0.shape, generator=generator)
        if is_matched:
            windows = sc.matched_windows(config, batch, fuse=True, generator=generator)
            first, second = sc.matched_fusion(windows, x_0, noise, average)
        else:
            windows = sc.sample_windows(config, batch, fuse=True, generator=generator)
            first, second = sc.fusion(windows, x_0, noise, average)
        loss, _ = sc.shortcut_loss(windows, x_0, noise, student, first, second, **cond)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        sc.update_ema(ema.parameters(), weights, decay)
    return ema


def measure_flux(recipe: str, seed: int, length: float) -> dict:
    """Quality of one training; recipe "teacher": of the shipped network."""
    world = tiny_flux(round(IMAGES * min(1, 10 * length)))
    net = world.pipe.transformer
    if recipe != "teacher":
        count = iterations(recipe, FLUX_PLAIN, length)
        net = pretrain(world, recipes()[recipe], count, seed)
    generator = torch.Generator().manual_seed(30_000 + seed)
    velocity = world.velocity(net)
    judge = common_flux.train_judge(common.shortened(500, length))
    found = judged(world, judge, velocity, generator, length)
    return found | {"loss": flow_matching_loss(world, velocity, generator)}


@torch.no_grad()
def judged(world: TinyFlux, judge: common_flux.Judge, velocity, generator, length: float) -> dict:
    """Fréchet distance and fraction of captions shown, by steps."""
    vae = world.pipe.vae
    held_out = [tiny.CAPTIONS.index(caption) for caption in common_flux.held_out_captions()]
    captions = torch.tensor(held_out).repeat(common.shortened(NOISES, length))
    rendered = world.rendered(captions, generator)
    truth = common_flux.look(judge, common_flux.decoded(vae, rendered), captions)
    noise = torch.randn(rendered.shape, generator=generator)
    found = {"frechet": {}, "shown": {}}
    for n in FLUX_STEPS:
        ends = []
        for rows in torch.arange(len(noise)).split(256):
            cond = world.cond(captions[rows], torch.full((len(rows),), GUIDANCE))
            ends.append(sc.euler_sample(velocity, noise[rows], sc.time_grid(n), **cond))
        seen = common_flux.look(judge, common_flux.decoded(vae, torch.cat(ends)), captions)
        found["frechet"][n] = common_flux.frechet(truth, seen)
        found["shown"][n] = seen["shown"]
    return found


@torch.no_grad()
def flow_matching_loss(world: TinyFlux, velocity, generator) -> float:
    """On 3,000 images that were not trained on, at times spread evenly."""
    captions = torch.arange(3000) % len(tiny.CAPTIONS)
    x_0 = world.rendered(captions, torch.Generator().manual_seed(2))
    noise = torch.randn(x_0.shape, generator=generator)
    t = (torch.randperm(len(x_0), generator=generator) + 0.5) / len(x_0)
    losses = []
    for rows in torch.arange(len(x_0)).split(250):
        cond = world.cond(captions[rows], torch.full((len(rows),), GUIDANCE))
        v = velocity(sc.interpolate(x_0[rows], noise[rows], t[rows]), t[rows], **cond)
        losses.append((v - (noise - x_0)[rows]).square().mean().item())
    return float(np.mean(losses))


if __name__ == "__main__":
    common.main(__file__, __doc__, tasks, tables, flows=FLOWS)
