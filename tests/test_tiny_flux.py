"""The script that makes the tiny Flux: its images, its training, pipelines that diffusers loads."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
import make_tiny_flux as tiny
import make_tiny_klein
from diffusers import FluxPipeline
from torch.testing import assert_close

FOLDER = Path(__file__).parent / "tiny_flux"
FEW = "--vae-iterations 10 --iterations 10 --guidance-iterations 10 --images 60"
FEWEST = "--vae-iterations 1 --iterations 1 --guidance-iterations 1 --images 30 --batch 2"

# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("colors", [tiny.COLORS, make_tiny_klein.COLORS])
def test_images_show_what_the_caption_says(colors):
    every = tiny.captions_of(colors)
    for name, color in colors.items():
        captions = torch.tensor([i for i, c in enumerate(every) if f" {name} " in c] * 20)
        generator = torch.Generator().manual_seed(0)
        images = (tiny.render(captions, generator, colors=colors) + 1) / 2
        near = (images - torch.tensor(color)[:, None, None]).abs().amax(1) < 0.02
        assert (near.flatten(1).sum(1) >= 8).all()  # every image has pixels of that color
        assert near.float().mean() < 0.4  # on a background of another


def test_images_of_one_caption_differ_and_repeat():
    captions = torch.zeros(50, dtype=torch.long)
    a, b = (tiny.render(captions, torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(a, b)
    assert (a[1:] - a[:-1]).abs().amax((1, 2, 3)).min() > 0.1


def test_larger_images_are_the_same_with_more_pixels():
    """But for pixels at edges, some 1.5 % of all."""
    captions = torch.arange(len(tiny.CAPTIONS))
    small = tiny.render(captions, torch.Generator().manual_seed(2))
    large = tiny.render(captions, torch.Generator().manual_seed(2), pixels=64)
    assert large.shape == (len(captions), 3, 64, 64)
    difference = (torch.nn.functional.avg_pool2d(large, 2) - small).abs()
    assert (difference > 0.01).float().mean() < 0.03


# ----------------------------------------------------------------------------------------- training


@pytest.fixture
def world(monkeypatch) -> SimpleNamespace:
    """Data and sizes of a training whose network answers with what it is fed."""
    data = tiny.Data(
        tokens=torch.randn(90, 16, 16, generator=torch.Generator().manual_seed(0)),
        captions=torch.arange(90) % len(tiny.CAPTIONS),
        texts=torch.zeros(0),
        pooled=torch.zeros(0),
        image_ids=torch.zeros(0),
        text_ids=torch.zeros(0),
    )
    sizes = replace(tiny.SIZES["tiny"], batch=512, iterations=1, guidance_iterations=1)
    calls = []

    def velocity(net, data, batch, captions, guidance):
        calls.append(SimpleNamespace(net=net, batch=batch, captions=captions, guidance=guidance))
        by_row = net(captions[:, None].float()) + guidance[:, None]
        return by_row[:, :, None].expand_as(batch.x_0)

    monkeypatch.setattr(tiny, "velocity", velocity)
    return SimpleNamespace(data=data, sizes=sizes, calls=calls, net=torch.nn.Linear(1, 1))


def test_a_tenth_of_the_captions_of_flow_matching_is_empty_and_guidance_is_1(world):
    tiny.train_flux(world.net, world.data, world.sizes, torch.Generator().manual_seed(0))
    (call,) = world.calls
    dropped = call.captions != call.batch.captions
    assert (call.captions[dropped] == tiny.EMPTY).all()
    assert 0.06 < dropped.float().mean() < 0.14
    assert (call.guidance == 1).all()
    assert (call.batch.captions < len(tiny.CAPTIONS)).all()


def test_guidance_is_distilled_from_a_frozen_copy_at_guidance_1(world):
    """The student alone gets the guidance that is drawn, and always a caption."""
    before = world.net.weight.clone()
    tiny.distil_guidance(world.net, world.data, world.sizes, torch.Generator().manual_seed(0))
    with_caption, without, student = world.calls
    assert student.net is world.net
    assert not torch.equal(student.net.weight, before)
    for call in (with_caption, without):
        assert call.net is not world.net
        assert torch.equal(call.net.weight, before)
        assert (call.guidance == 1).all()
    assert torch.equal(with_caption.captions, student.batch.captions)
    assert torch.equal(student.captions, student.batch.captions)
    assert (without.captions == tiny.EMPTY).all()
    values = student.guidance.sort().values
    assert (values / 8 - (torch.arange(512) + 0.5) / 512).abs().max() < 0.06


def test_guided_velocities_are_those_of_classifier_free_guidance(world):
    """Of a network that answers with the caption's number, plus 1 for its guidance."""
    torch.nn.init.ones_(world.net.weight)
    torch.nn.init.zeros_(world.net.bias)
    batch = tiny.draw(world.data, world.sizes, torch.Generator().manual_seed(0))
    guidance = torch.linspace(0, 8, world.sizes.batch)
    target = tiny.guided(world.net, world.data, batch, guidance)[:, 0, 0]
    weight = tiny.guidance_weight(guidance)
    assert_close(target, 31 + weight * (batch.captions - 30.0))
    assert tiny.guidance_weight(torch.tensor(1.0)) == 1
    assert (weight[1:] > weight[:-1]).all()


def test_the_network_ends_as_the_ema_of_its_weights():
    """One step of AdamW at a hundredth of the learning rate, of which the EMA takes 0.5 %."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    tiny.minimize(lambda: (net.weight - 5).square().sum(), net, 1, 1.0, "test")
    assert net.weight.item() == pytest.approx(0.005 * 0.01, rel=1e-3)


# ------------------------------------------------------------------------------------ the tiny Flux


@pytest.fixture(scope="module")
def shipped() -> SimpleNamespace:
    """The tiny Flux, and the data of a training on one image of each caption."""
    pipe = FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    sizes = replace(tiny.SIZES["tiny"], images=len(tiny.CAPTIONS), batch=60)
    data = tiny.make_data(pipe, sizes, torch.Generator().manual_seed(0))
    batch = tiny.draw(data, sizes, torch.Generator().manual_seed(0))
    return SimpleNamespace(net=pipe.transformer, data=data, batch=batch)


def test_the_velocity_of_the_tiny_flux_is_linear_in_guidance(shipped):
    """As what it was distilled from; to a fifth of the change from guidance 0 to 8."""
    batch = shipped.batch
    found = {}
    with torch.no_grad():
        for guidance in (0.0, 2.0, 4.0, 6.0, 8.0):
            same = torch.full_like(batch.t, guidance)
            found[guidance] = tiny.velocity(shipped.net, shipped.data, batch, batch.captions, same)
    change = found[8.0] - found[0.0]
    assert change.norm() > 0.05 * found[0.0].norm()
    for guidance in (2.0, 4.0, 6.0):
        error = found[guidance] - found[0.0] - guidance / 8 * change
        assert error.norm() < 0.2 * change.norm(), guidance


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of torch, about speed
def test_autocast_computes_in_bfloat16_with_weights_and_velocity_in_float32(shipped, monkeypatch):
    """On a GPU. Here the CPU's autocast is switched on in its place."""
    batch = shipped.batch
    guidance = torch.full_like(batch.t, 3.5)
    inputs = (shipped.net, shipped.data, batch, batch.captions, guidance)
    with torch.no_grad():
        plain = tiny.velocity(*inputs)
    autocast = torch.autocast
    asked = []

    def switched_on(device, dtype, enabled):
        asked.append((device, enabled))
        return autocast(device, dtype)

    monkeypatch.setattr(torch, "autocast", switched_on)
    kinds = []
    layer = shipped.net.transformer_blocks[0].attn.to_q
    hook = layer.register_forward_hook(lambda layer, inputs, output: kinds.append(output.dtype))
    v = tiny.velocity(*inputs)
    hook.remove()
    v.square().mean().backward()
    assert asked == [("cpu", False)]
    assert kinds == [torch.bfloat16]
    assert v.dtype == torch.float32
    assert 0 < (v - plain).norm() / plain.norm() < 0.05
    for weight in shipped.net.parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all()


@pytest.mark.slow
def test_stock_diffusers_loads_what_it_saves(tmp_path):
    tiny.main(["--out", str(tmp_path), *FEW.split()])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert not [path for path in files if path.suffix not in (".json", ".safetensors", ".txt")]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)  # anyone may read them
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red circle", height=32, width=32, num_inference_steps=2, max_sequence_length=16
    ).images[0]
    assert image.size == (32, 32)


# ---------------------------------------------------------------------------------- the medium Flux


def test_the_medium_flux_has_20_to_40_million_parameters():
    with torch.device("meta"):
        net = tiny.make_transformer(tiny.SIZES["medium"])
    assert 20 < tiny.millions(net) < 40
    assert sum(net.config.axes_dims_rope) == net.config.attention_head_dim
    assert net.config.guidance_embeds


@pytest.mark.slow
def test_the_medium_flux_is_made_and_has_16_x_16_tokens(tmp_path):
    tiny.main(["--size", "medium", "--out", str(tmp_path), *FEWEST.split()])
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sizes = []
    pipe.transformer.x_embedder.register_forward_pre_hook(
        lambda layer, inputs: sizes.append(inputs[0].shape)
    )
    image = pipe(
        "a red circle", height=64, width=64, num_inference_steps=1, max_sequence_length=8
    ).images[0]
    assert image.size == (64, 64)
    assert sizes == [(1, 256, 16)]
    assert (tmp_path / "prompts.txt").exists()


def test_a_size_without_a_folder_of_its_own_needs_one(capsys):
    with pytest.raises(SystemExit):
        tiny.main(["--size", "medium"])
    assert "--size medium needs --out" in capsys.readouterr().err
