"""flux_distill.py, the network: how Flux is called, and a LoRA that takes several sets of weights.

The references are stock diffusers: its packing, its pipeline, and its transformer with the LoRA
merged into the weights.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_runs import TINY, fd, new_lora
from torch import Tensor
from torch.testing import assert_close

import shortcut as sc


def stock_velocity(net: FluxTransformer2DModel) -> sc.Velocity:
    """The velocity of a stock transformer, packed by the library."""

    def velocity(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        v = net(
            hidden_states=FluxPipeline._pack_latents(x, batch, channels, height, width),
            timestep=t,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, "cpu", torch.float32
            ),
            txt_ids=torch.zeros(text.shape[1], 3),
        ).sample
        return FluxPipeline._unpack_latents(v, 8 * height, 8 * width, vae_scale_factor=8)

    return velocity


def merged(lora: fd.LoRA, weights: Tensor | None) -> FluxTransformer2DModel:
    """A stock transformer of its own, with B A added to the weights of each layer."""
    net = FluxTransformer2DModel.from_pretrained(TINY / "transformer", dtype=torch.float32)
    if weights is not None:
        matrices = lora.named(weights)
        with torch.no_grad():
            for name in lora.layers:
                A, B = matrices[f"{name}.lora_A.weight"], matrices[f"{name}.lora_B.weight"]
                net.get_submodule(name).weight += B @ A
    return net


def weight_sets(lora: fd.LoRA) -> list[Tensor]:
    """Three different sets of weights, all away from the teacher."""
    generator = torch.Generator().manual_seed(0)
    start = lora.loaded_weights()
    return [start + 0.05 * torch.randn(start.shape, generator=generator) for _ in range(3)]


def rows_of(setup: SimpleNamespace, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Data, noise and conditions of some rows, each with a guidance of its own."""
    x_0 = setup.cache.noise([(i,) for i in range(rows)])
    noise = setup.cache.noise([(i, i) for i in range(rows)])
    cond = setup.cache.conditions(range(rows), torch.linspace(0, 8, rows))
    return x_0, noise, cond


# ------------------------------------------------------------------------------- how Flux is called


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 16, 6, 10)])
def test_packing_is_the_librarys(shape):
    x = torch.randn(shape)
    tokens = fd.pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, *shape))
    height, width = shape[2:]
    assert torch.equal(
        fd.unpack(tokens, height // 2, width // 2),
        FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, vae_scale_factor=8),
    )
    assert torch.equal(fd.unpack(tokens, height // 2, width // 2), x)


def test_latents_have_the_shape_that_the_pipeline_draws(setup):
    pipe = setup.model.load("image")
    latents, _ = pipe.prepare_latents(1, 4, 48, 48, torch.float32, "cpu", torch.Generator())
    channels, height, width = setup.model.latent_shape(48)
    assert fd.pack(torch.zeros(1, channels, height, width)).shape == latents.shape


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_three_euler_steps_are_the_stock_pipelines(setup, size):
    """Times in [0, 1], real guidance, one shift: each wrong one gives another image."""
    height, width = size
    noise = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    cond = setup.cache.conditions([0, 1], 3.5)
    text_side = dict.fromkeys(setup.model.family.text_side)
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32, **text_side)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scale = pipe.vae_scale_factor
    tokens = pipe(
        prompt_embeds=cond["text"],
        pooled_prompt_embeds=cond["pooled"],
        guidance_scale=3.5,
        height=scale * height,
        width=scale * width,
        num_inference_steps=3,
        latents=FluxPipeline._pack_latents(noise, 2, 4, height, width),
        output_type="latent",
    ).images
    stock = FluxPipeline._unpack_latents(tokens, scale * height, scale * width, scale)

    net = setup.model.load("image", fresh=True).transformer

    def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return setup.model.family.velocity(net, x, t, **cond)

    ours = sc.euler_sample(velocity, noise, sc.time_grid(3, 3.0), **cond)
    assert_close(ours, stock, rtol=0, atol=2e-5)
    assert_close(fd.stock_sample(setup.model, noise, 3, cond, 3.0, batch=1), stock)
    assert (stock - noise).abs().mean() > 0.1


@pytest.mark.parametrize(
    "option", [{"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"stochastic_sampling": True}]
)
def test_options_of_the_models_own_scheduler_change_no_samples(setup, option):
    """They would change the times, or the sampler, of the teacher and of every comparison."""
    cond, noise = setup.cache.held_out([0], "scheduler")
    sample = partial(fd.stock_sample, setup.model, noise, 3, cond, 3.0, batch=2)
    expected = sample()
    pipe = setup.model.load("image")
    own = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config, **option)
    found = sample()
    pipe.scheduler = own
    assert torch.equal(found, expected)


# ------------------------------------------------------------- one network, several sets of weights


def test_layers_are_those_inside_the_blocks_or_all(setup):
    net = setup.model.load("image", fresh=True).transformer
    linear = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    inside = [name for name in linear if "blocks." in name]
    assert fd.linear_layers(net, "blocks") == inside
    assert fd.linear_layers(net, "all") == linear
    assert any("norm" in name for name in inside)
    assert len(linear) == len(inside) + 10
    assert setup.settings.layers == "blocks"
    assert list(new_lora(setup).layers) == inside
    assert list(new_lora(setup, layers="all").layers) == linear


def test_a_new_lora_is_the_teacher(setup):
    lora = new_lora(setup)
    x, _, cond = rows_of(setup, 2)
    t = torch.tensor([1.0, 0.3])
    weights = lora.loaded_weights()
    assert weights.dtype == torch.float32
    assert weights.shape == (sum(p.numel() for p in lora.params),)
    with torch.no_grad():
        teacher = stock_velocity(merged(lora, None))(x, t, **cond)
        assert_close(lora.velocity(weights)(x, t, **cond), teacher)
        assert_close(lora.velocity(None)(x, t, **cond), teacher)


@pytest.mark.parametrize("layers", ["blocks", "all"])
def test_each_set_of_weights_is_the_network_with_these_weights_merged(setup, layers):
    """In turn, and whatever was loaded before."""
    lora = new_lora(setup, layers=layers)
    x, _, cond = rows_of(setup, 2)
    t = torch.tensor([1.0, 0.3])
    sets = weight_sets(lora)
    with torch.no_grad():
        answers = [stock_velocity(merged(lora, weights))(x, t, **cond) for weights in [*sets, None]]
        for _ in range(2):
            for weights, answer in zip([*sets, None], answers):
                assert_close(lora.velocity(weights)(x, t, **cond), answer, rtol=1e-4, atol=1e-5)
    assert all((answer - answers[-1]).abs().max() > 0.01 for answer in answers[:-1])


def test_a_scale_scales_the_change_of_the_weights(setup):
    lora = new_lora(setup)
    x, _, cond = rows_of(setup, 2)
    t = torch.tensor([1.0, 0.3])
    weights = weight_sets(lora)[0]
    kept = weights.clone()
    half = weights.clone()
    half[lora.first_B :] *= 0.5
    with torch.no_grad():
        teacher = lora.velocity(None)(x, t, **cond)
        scaled = lora.velocity(weights, 0.5)(x, t, **cond)
        assert_close(scaled, stock_velocity(merged(lora, half))(x, t, **cond), rtol=1e-4, atol=1e-5)
        assert torch.equal(lora.velocity(weights, 0.0)(x, t, **cond), teacher)
    assert (scaled - teacher).abs().max() > 0.01
    assert torch.equal(weights, kept)


def test_more_rows_than_a_batch_are_split(setup):
    lora = new_lora(setup, batch=2)
    x, _, cond = rows_of(setup, 5)
    t = torch.linspace(0.2, 1, 5)
    sizes = []
    lora.net.x_embedder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        split = lora.velocity(None)(x, t, **cond)
        assert sizes == [2, 2, 1]
        assert_close(split, stock_velocity(merged(lora, None))(x, t, **cond), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- the loss of one pass


def settings_of(setup: SimpleNamespace, paper: bool) -> fd.Settings:
    return fd.replace(setup.settings, paper=paper, shift_range=(1.0, 3.0))


def state_of(setup: SimpleNamespace, lora: fd.LoRA, paper: bool) -> fd.TrainState:
    """A state whose student and EMAs all differ."""
    state = fd.TrainState(lora.loaded_weights(), fd.config_of(settings_of(setup, paper)))
    for weights, drawn in zip(state.weights.values(), weight_sets(lora)):
        weights.copy_(drawn)
    return state


def our_loss(
    setup: SimpleNamespace, lora: fd.LoRA, state: fd.TrainState, paper: bool
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, gradient and log of one pass of four rows."""
    x_0, noise, cond = rows_of(setup, 4)
    generator = torch.Generator().manual_seed(7)
    loss, log = fd.loss_of(lora, state, x_0, noise, cond, 0.5, generator)
    loss.backward()
    lora.move_gradients(state.student, 1.0)
    return loss.item(), state.student.grad, log


def algorithm_2(windows, x_t, teacher, fast, slow, cond):
    """The paper's target, from separate networks, row by row."""
    targets = []
    for i in range(len(x_t)):
        row = slice(i, i + 1)
        here = {name: value[row] for name, value in cond.items()}
        t, t_mid, t_end = windows.t[row], windows.t_mid[row], windows.t_end[row]
        first = teacher if i < windows.teacher_rows else fast
        x_mid = x_t[row] - (t - t_mid) * first(x_t[row], t, **here)
        x_end = x_mid - (t_mid - t_end) * slow(x_mid, t_mid, **here)
        targets.append((x_t[row] - x_end) / (t - t_end))
    return torch.cat(targets)


def matched_target(windows, x_t, teacher, slow, cond):
    """The target of matched windows: the teacher by a midpoint step, then the slow EMA."""
    t, t_mid, t_end = (time[:, None, None, None] for time in windows[:3])
    half = (windows.t + windows.t_mid) / 2
    x_half = x_t - (t - t_mid) / 2 * teacher(x_t, windows.t, **cond)
    x_mid = x_t - (t - t_mid) * teacher(x_half, half, **cond)
    x_end = x_mid - (t_mid - t_end) * slow(x_mid, windows.t_mid, **cond)
    return (x_t - x_end) / (t - t_end)


@pytest.mark.parametrize("paper", [True, False], ids=["--paper", "default"])
def test_loss_and_gradient_are_those_of_networks_that_share_nothing(setup, paper):
    """--paper trains by Algorithm 2, the default on matched windows; merged weights instead of a
    LoRA, whose gradients follow from G, that of the merged ones: B^T G for A and G A^T for B.
    """
    lora = new_lora(setup)
    state = state_of(setup, lora, paper)
    names = {"student", "fast", "slow"} if paper else {"student", "slow"}
    assert state.weights.keys() == names
    nets = {name: merged(lora, weights) for name, weights in state.weights.items()}
    nets["teacher"] = merged(lora, None)
    velocities = {name: stock_velocity(net) for name, net in nets.items()}
    student = velocities.pop("student")

    x_0, noise, cond = rows_of(setup, 4)
    generator = torch.Generator().manual_seed(7)
    if paper:
        config = sc.ShortcutConfig(shift_range=(1.0, 3.0))
        windows = sc.sample_windows(config, 4, U=0.5, generator=generator)
        assert windows.teacher_rows == 2
    else:
        windows = sc.matched_windows(sc.MatchedConfig(3, (1.0, 3.0)), 4, generator=generator)
    t = windows.t[:, None, None, None]
    x_t = (1 - t) * x_0 + t * noise
    target_of = algorithm_2 if paper else matched_target
    with torch.no_grad():
        target = target_of(windows, x_t, **velocities, cond=cond)
    expected = (student(x_t, windows.t, **cond) - target).square().mean()
    expected.backward()

    loss, gradient, _ = our_loss(setup, lora, state, paper)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    matrices = lora.named(state.student)
    of_A, of_B = [], []
    for name in lora.layers:
        G = nets["student"].get_submodule(name).weight.grad
        of_A.append(matrices[f"{name}.lora_B.weight"].T @ G)
        of_B.append(G @ matrices[f"{name}.lora_A.weight"].T)
    theirs = torch.cat([part.flatten() for part in [*of_A, *of_B]])
    assert_close(gradient, theirs, rtol=1e-3, atol=1e-6)
    assert all(part.abs().max() > 1e-5 for part in [*of_A, *of_B])


@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradients_do_not_depend_on_the_blocks_that_are_recomputed(setup, every):
    plain_lora = new_lora(setup, recompute_every=0)
    _, plain, _ = our_loss(setup, plain_lora, state_of(setup, plain_lora, True), True)
    lora = new_lora(setup, recompute_every=every)
    _, recomputed, _ = our_loss(setup, lora, state_of(setup, lora, True), True)
    assert_close(recomputed, plain, rtol=0, atol=1e-7)
    assert all(part.abs().max() > 0 for part in plain.split([p.numel() for p in lora.params]))


def test_gradients_add_up_in_float32_and_leave_the_lora(setup):
    lora = new_lora(setup)
    student = lora.loaded_weights()
    parts = [torch.randn(p.shape) for p in lora.params]
    flat = torch.cat([part.flatten() for part in parts])
    for fraction in (0.25, 0.5):
        for p, part in zip(lora.params, parts):
            p.grad = part.clone()
        lora.move_gradients(student, fraction)
        assert all(p.grad is None for p in lora.params)
    assert student.grad.dtype == torch.float32
    assert_close(student.grad, 0.75 * flat)
