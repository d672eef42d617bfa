"""Images of the tiny Flux and what judges them; shared by fusion.py, quality.py and fewshot.py.

The judge is a small network that learns, with a fixed seed, to name the shape and the color of
rendered images. Its 64 mean feature maps are the features of the Fréchet distance, so that it
weighs what captions tell; a random network's would weigh the hues of the ground most.
"""

import sys
from functools import cache
from itertools import pairwise

import common
import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(common.ROOT / "tests"))
import make_tiny_flux as tiny

TINY = common.ROOT / "tests" / "tiny_flux"


def held_out_captions() -> list[str]:
    """The 12 captions that the demonstration holds out: the last ones of its prompts."""
    lines = (TINY / "prompts.txt").read_text().splitlines()
    return list(dict.fromkeys(lines))[-12:]


# ----------------------------------------------------------------------------------------- latents


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

    def __init__(self):
        super().__init__()
        layers = []
        widths = (3, 32, 64, 64, 64)
        for i, (a, b) in enumerate(pairwise(widths)):
            stride = 2 if i % 2 == 0 else 1
            layers += [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.maps = nn.Sequential(*layers)
        self.name = nn.Linear(widths[-1], len(tiny.CAPTIONS))

    def features(self, images: Tensor) -> Tensor:
        return self.maps(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.name(self.features(images))


@cache
def train_judge(iterations: int, batch: int = 64) -> Judge:
    """The judge; each process trains it once."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, iterations)
    for _ in range(iterations):
        captions = torch.randint(len(tiny.CAPTIONS), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(judge(tiny.render(captions, generator)), captions)
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
