"""The script that makes the tiny Flux: its images, and a pipeline that stock diffusers loads."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
import make_tiny_flux as tiny


def test_images_show_what_the_caption_says():
    for name, color in tiny.COLORS.items():
        captions = torch.tensor([i for i, c in enumerate(tiny.CAPTIONS) if f" {name} " in c] * 20)
        images = (tiny.render(captions, torch.Generator().manual_seed(0)) + 1) / 2
        near = (images - torch.tensor(color)[:, None, None]).abs().amax(1) < 0.02
        assert (near.flatten(1).sum(1) >= 8).all()  # every image has pixels of that colour
        assert near.float().mean() < 0.4  # on a background of another


def test_images_of_one_caption_differ_and_repeat():
    captions = torch.zeros(50, dtype=torch.long)
    a, b = (tiny.render(captions, torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(a, b)
    assert (a[1:] - a[:-1]).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.slow
def test_stock_diffusers_loads_what_it_saves(tmp_path):
    from diffusers import FluxPipeline

    flags = "--vae-iterations 10 --iterations 10 --pictures 60"
    tiny.main(["--out", str(tmp_path), *flags.split()])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert not [path for path in files if path.suffix not in (".json", ".safetensors", ".txt")]
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red circle", height=32, width=32, num_inference_steps=2, max_sequence_length=16
    ).images[0]
    assert image.size == (32, 32)
