"""What the benchmarks on the tiny Flux share: the README's demonstration, images, and their judge.

Distances are RMSE of latents to where the teacher's 32 steps end, on held-out captions.

The judge is a small network that learns, with a fixed seed, to name the shape and the color of
rendered images. Its 64 mean feature maps are the features of the Fréchet distance, so that it
weighs what captions tell; a random network's would weigh the hues of the ground most.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import common
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import flux_distill as fd
import shortcut as sc

sys.path.insert(0, str(common.ROOT / "tests"))
import make_tiny_flux as tiny

TINY = common.ROOT / "tests" / "tiny_flux"
ITERATIONS, BATCH = 200, 64
DEMONSTRATION = f"""--resolution 32 --shift 1 --shift-range 1 1 --iterations {ITERATIONS}
    --batch {BATCH} --learning-rate 1e-3 --recompute-every 0 --noises 8"""
STEPS = (2, 3, 4, 6, 8, 9, 12)

# ------------------------------------------------------------------------------- the demonstration


def demonstration(
    out: Path, seed: int, *more, steps: Sequence[int] = STEPS, length: float = 1.0
) -> fd.Settings:
    """Settings of the README's run with this seed and more flags.

    steps: numbers of steps that are calibrated and compared. length: shortens it, for a test.
    """
    words = ["--model", TINY, "--prompts", TINY / "prompts.txt", "--out", out, "--seed", seed]
    words += [*DEMONSTRATION.split(), "--steps", *steps, *more]
    settings = fd.parse([str(word) for word in words])
    if length == 1:
        return settings
    iterations = common.shortened(settings.iterations, length)
    return replace(settings, iterations=iterations, noises=2)


def distil(settings: fd.Settings) -> dict:
    """All phases of a run; its results. What it prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        fd.distil(settings, fd.Machine())
    return json.loads((settings.out / "results.json").read_text())


class TinyFlux:
    """A run before its training: data, cache, and a LoRA on the tiny Flux."""

    def __init__(self, settings: fd.Settings):
        with redirect_stdout(sys.stderr):
            settings, self.run, self.cache = fd.prepare(settings, fd.Machine())
            self.settings = settings
            fd.fill_cache(settings, self.cache)
        self.model, self.data = self.cache.model, self.cache.data
        self.pipe = self.model.load("image")
        self.lora = fd.LoRA(self.model.family, self.pipe.transformer, settings)
        self.pool = fd.read_pool(self.cache)
        self.fine = {}  # where the teacher's many steps end, by the purpose of the noise

    def velocity(self, weights: Tensor | None, scale: float = 1.0) -> sc.Velocity:
        """v(x, t, **cond) with LoRA weights (P,); None: the teacher."""
        return self.lora.velocity(weights, scale)

    def draw(self, *key) -> tuple[torch.Generator, Tensor, Tensor, dict[str, Tensor]]:
        """Generator, latents, noise and conditions of a batch."""
        generator = fd.keyed(self.settings.seed, *key)
        return generator, *fd.draw_batch(self.settings, self.cache, self.pool, generator)

    def minimize(
        self,
        loss: Callable[[int], Tensor],
        student: Tensor,
        iterations: int,
        rate: float | None = None,
        falling: bool = False,
        others: Sequence[Tensor] = (),
    ) -> Iterator[int]:
        """Train LoRA weights (P,) as flux_distill.py does; yields 1, 2, ... after each step.

        rate: None for that of the settings. falling: in the second half, it falls to 0. others:
        more parameters to train.
        """
        weights = [student, *others]
        rate = rate or self.settings.learning_rate
        optimizer = torch.optim.AdamW(weights, rate, weight_decay=1e-4)
        for iteration in range(1, iterations + 1):
            loss(iteration).backward()
            self.lora.move_gradients(student, 1.0)
            nn.utils.clip_grad_norm_(weights, 10.0)
            if falling:
                factor = min(1.0, 2 - 2 * (iteration - 1) / iterations)
                optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
            yield iteration

    def distil(
        self,
        config: sc.ShortcutConfig | sc.MatchedConfig,
        iterations: int,
        snapshots: Sequence[int] = (),
        ema_warmup: bool = True,
        which: str = "student",
    ) -> dict[int, Tensor]:
        """The student's weights (P,) after each of the snapshots and the last iteration.

        By flux_distill.py's own loop, for any config; ema_warmup False: with constant EMAs. which:
        "student", or the name of one of its EMAs.
        """
        settings = replace(self.settings, iterations=iterations, accumulate=1, warmup=0)
        state = fd.TrainState(self.lora.loaded_weights(), config, ema_warmup)
        kept = {}
        for iteration in fd.train(settings, self.cache, self.pool, self.lora, state):
            if iteration in (*snapshots, iterations):
                kept[iteration] = state.weights[which].detach().clone()
        return kept

    def saved_weights(self) -> Tensor:
        """The weights (P,) in the LoRA of a finished run."""
        saved = load_file(self.run.lora)
        names = self.lora.named(self.lora.loaded_weights())  # in the order of the vector
        return torch.cat([saved[f"transformer.{name}"].flatten() for name in names])

    @torch.no_grad()
    def distance(self, velocity: sc.Velocity, steps: int, purpose: str = "compare") -> float:
        """RMSE to the teacher's many steps; "compare": as in the comparison, or "validation"."""
        places = {"compare": self.data.comparison, "validation": self.data.validation}[purpose]
        cond, noise = self.cache.held_out(places, purpose)

        def end(velocity: sc.Velocity, steps: int) -> Tensor:
            return sc.euler_sample(
                velocity, noise, sc.time_grid(steps, self.settings.shift), **cond
            )

        if purpose not in self.fine:
            teacher = self.velocity(None)
            self.fine[purpose] = end(teacher, self.settings.teacher_steps)
        return fd.rms(end(velocity, steps) - self.fine[purpose])


class MergedStudent:
    """A finished run's LoRA, merged into the tiny Flux at any scale; 0: the teacher.

    Merged, a call costs half of what it does with a LoRA in each layer.
    """

    def __init__(self, settings: fd.Settings):
        self.world = TinyFlux(settings)
        lora = self.world.lora
        self.student = self.world.saved_weights()
        lora.use(self.student)
        with torch.no_grad():
            self.layers = [
                (layer.base.weight, layer.base.weight.clone(), layer.B @ layer.A)
                for layer in lora.layers.values()
            ]
        self.scale = 0.0

    @torch.no_grad()
    def merge(self, scale: float) -> None:
        if scale != self.scale:
            for weight, base, change in self.layers:
                weight.copy_(base + scale * change)
            self.scale = scale

    def velocity(self, scale: float) -> sc.Velocity:
        """Velocity of teacher + scale (student - teacher), in weights."""
        family, net = self.world.model.family, self.world.pipe.transformer

        @torch.no_grad()
        def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            self.merge(scale)
            self.world.lora.use(None)
            return family.velocity(net, x, t, **cond)

        return velocity


# ---------------------------------------------------------------------------------- images, latents


def held_out_captions() -> list[str]:
    """The 12 captions that the demonstration holds out: the last ones of its prompts."""
    lines = (TINY / "prompts.txt").read_text().splitlines()
    return list(dict.fromkeys(lines))[-12:]


@torch.no_grad()
def decoded(vae, latents: Tensor) -> Tensor:
    """Images (B, 3, 32, 32) in [-1, 1] of latents (B, C, H, W), 16 at a time."""
    x = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(part).sample for part in x.split(16)]).clamp(-1, 1)


@torch.no_grad()
def encoded(vae, images: Tensor) -> Tensor:
    """Latents (B, C, H, W) of images."""
    return (tiny.encode(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor


def diversity(latents: Tensor, captions: Tensor) -> float:
    """Mean RMS distance of two latents of one caption, over pairs, then over captions."""
    means = []
    for caption in captions.unique():
        x = latents[captions == caption].flatten(1).double()
        means.append(nn.functional.pdist(x).mean().item() / x.shape[1] ** 0.5)
    return float(np.mean(means))


# --------------------------------------------------------------------------------------- the judge


class Judge(nn.Module):
    """Names the caption of images (B, 3, 32, 32); the means of its last maps are the features."""

    def __init__(self, captions: int):
        super().__init__()
        layers = []
        widths = (3, 32, 64, 64, 64)
        for i, (a, b) in enumerate(pairwise(widths)):
            stride = 2 if i % 2 == 0 else 1
            layers += [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.maps = nn.Sequential(*layers)
        self.name = nn.Linear(widths[-1], captions)

    def features(self, images: Tensor) -> Tensor:
        return self.maps(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.name(self.features(images))


@cache
def train_judge(iterations: int) -> Judge:
    """The judge of the tiny Flux; each process trains it once."""
    return new_judge(iterations)


@torch.enable_grad()
def new_judge(iterations: int, colors: tiny.Colors = tiny.COLORS, batch: int = 64) -> Judge:
    """A judge of images in these colors."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    count = len(tiny.captions_of(colors))
    judge = Judge(count)
    optimizer = torch.optim.AdamW(judge.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, iterations)
    for _ in range(iterations):
        captions = torch.randint(count, (batch,), generator=generator)
        images = tiny.render(captions, generator, colors=colors)
        loss = nn.functional.cross_entropy(judge(images), captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.requires_grad_(False).eval()


def look(judge: Judge, images: Tensor, captions: Tensor) -> dict:
    """Mean and covariance of the features, and the fraction of images that show their caption."""
    features = torch.cat([judge.features(part) for part in images.split(256)])
    seen = judge.name(features).argmax(1) == captions
    features = features.double()
    mean, covariance = features.mean(0), features.T.cov()
    return {"mean": mean, "covariance": covariance, "shown": seen.double().mean().item()}


def frechet(a: dict, b: dict) -> float:
    """Squared distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""
    A, B = a["covariance"], b["covariance"]
    cross = square_root(square_root(A) @ B @ square_root(A))
    gap = (a["mean"] - b["mean"]).square().sum()
    return (gap + A.trace() + B.trace() - 2 * cross.trace()).item()


def square_root(matrix: Tensor) -> Tensor:
    """Of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
