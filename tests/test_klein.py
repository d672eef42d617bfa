"""FLUX.2: other latents, other positions, and a teacher with true guidance. See test_flux_model.py.

The references are the stock pipeline and transformer. Most of what is tested here is silent when it
is wrong: another image, and no error.
"""

import json
import os
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import make_tiny_klein
import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from faults import before_network_calls
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_dev import make_tiny_dev
from tiny_runs import (
    TINY,
    calls_by_phase,
    cards_code,
    copied,
    fd,
    image_of_code,
    new_lora,
    prepared,
    run,
    same_run,
    says,
)
from torch import Tensor
from torch.testing import assert_close

import shortcut as sc

KLEIN = Path(__file__).parent / "tiny_klein"
GUIDANCE = 2.0  # of the runs here
FLAGS = ("--model", KLEIN, "--prompts", KLEIN / "prompts.txt", "--guidance", GUIDANCE)
EXACT = {"rtol": 0, "atol": 5e-5}


# --------------------------------------------------------------------------------- what tests share


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> SimpleNamespace:
    """A prepared run, its cache filled."""
    return prepared(tmp_path_factory.mktemp("setup") / "out", *FLAGS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    """The folder of a whole run, and the rows of its network calls by phase."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with rows_of_calls() as rows:
        run(out, *FLAGS)
    return SimpleNamespace(out=out, rows=rows)


def rows_of_calls():
    """How many rows each call feeds the transformer, by phase."""
    phases = ("fill_cache", "loss_of", "compare", "render")
    return calls_by_phase(Flux2Transformer2DModel, phases, lambda call: len(call["hidden_states"]))


def stock_pipeline(shift: float) -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline.from_pretrained(KLEIN, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return pipe


def stock_latents(
    pipe: Flux2KleinPipeline, texts: list[str], noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Latents (B, C, H, W) of texts, by the stock pipeline alone."""
    latents = pipe(
        prompt=texts,
        height=32,
        width=32,
        guidance_scale=guidance,
        num_inference_steps=steps,
        max_sequence_length=8,
        latents=noise,
        output_type="latent",
    ).images
    return normalised(pipe, latents)


def normalised(pipe: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    bn = pipe.vae.bn
    patches = pipe._patchify_latents(latents)
    return torch.nn.functional.batch_norm(
        patches, bn.running_mean, bn.running_var, eps=pipe.vae.config.batch_norm_eps
    )


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, in RMS."""
    return fd.rms(a - b) / fd.rms(b)


# ------------------------------------------------------------------------------ latents, text, time


def test_latents_have_the_shape_that_the_pipeline_draws(setup):
    pipe = setup.model.load("image")
    tokens, ids = pipe.prepare_latents(1, 4, 48, 48, torch.float32, "cpu", torch.Generator())
    channels, height, width = setup.model.latent_shape(48)
    assert tokens.shape == (1, height * width, channels)
    assert ids.shape == (1, height * width, 4)


def test_images_are_encoded_as_the_pipeline_does_and_decoded_again(setup):
    pipe = stock_pipeline(3.0)
    family = setup.model.family
    pixels = 2 * torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) - 1
    latents = family.encode_image(pipe, pixels)
    assert_close(latents, pipe._encode_vae_image(pixels, None), **EXACT)
    raw = pipe.vae.encode(pixels).latent_dist.mode()
    assert difference(latents, pipe._patchify_latents(raw)) > 0.1  # batch norm does something
    expected = pipe.image_processor.postprocess(pipe.vae.decode(raw).sample, output_type="pt")
    assert_close(family.decode(pipe, latents).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-4)


def test_the_images_of_a_run_are_the_pipelines(setup):
    """From noise to pixels, by the stock pipeline alone and by our parts."""
    pipe = stock_pipeline(6.0)
    text = setup.data.texts[0]
    noise = setup.cache.noise([("image",)])
    expected = pipe(
        prompt=text, height=32, width=32, num_inference_steps=3, guidance_scale=GUIDANCE,
        max_sequence_length=8, latents=noise, output_type="np",
    ).images  # fmt: skip
    cond = setup.cache.conditions([0], GUIDANCE)
    teacher = new_lora(setup).velocity(None)
    latents = sc.euler_sample(teacher, noise, sc.time_grid(3, 6.0), **cond)
    ours = setup.model.family.decode(setup.model.load("image"), latents)
    assert np.abs(ours.numpy() - expected).max() < 1e-3


def test_a_text_is_what_the_pipeline_makes_of_it(setup):
    """Three layers of the encoder, no pooled vector; the empty text is cached with the others."""
    pipe = stock_pipeline(3.0)
    assert setup.data.texts[setup.data.empty] == ""
    for i, text in enumerate(setup.data.texts):
        embeddings, ids = pipe.encode_prompt(text, max_sequence_length=8)
        assert_close(setup.cache.read("text", [i])["text"], embeddings)
        assert ids.tolist() == [[[0, 0, 0, k] for k in range(8)]]
    cond = setup.cache.conditions([0, 1], GUIDANCE)
    assert cond.keys() == {"text", "guidance", "empty_text"}
    assert torch.equal(cond["empty_text"][0], cond["empty_text"][1])


def test_tokens_are_counted_with_the_template(setup):
    pipe = stock_pipeline(3.0)
    texts = ["a red ring", "a very long caption of a purple triangle on some tiles"]
    short, long = setup.model.family.count_tokens(pipe, texts)
    assert short == 5  # one for each word, and two around them
    assert long > 8 == setup.model.family.longest_text(pipe)
    _, mask = encoder_input(pipe, texts[0])
    assert mask.sum() == short


def encoder_input(pipe: Flux2KleinPipeline, text: str) -> tuple[Tensor, Tensor]:
    """Ids and mask that the text encoder gets."""
    given = {}

    def note(module, args, kwargs):
        given.update(kwargs)

    hook = pipe.text_encoder.register_forward_pre_hook(note, with_kwargs=True)
    pipe.encode_prompt(text, max_sequence_length=8)
    hook.remove()
    return given["input_ids"], given["attention_mask"]


@pytest.mark.parametrize("pixels", [512, 1024])
def test_default_shifts_are_those_of_the_stock_sampler_at_32_to_50_steps(pixels):
    low, high = fd.Flux2.defaults["shift_range"]
    assert fd.Flux2.defaults["shift"] == (low + high) / 2
    shifts = [np.exp(compute_empirical_mu((pixels // 16) ** 2, n)) for n in (32, 50)]
    near = [low <= shift <= high for shift in shifts]
    assert all(near) if pixels == 512 else near == [False, True]  # 8.4 and 7.6 at 1024 px


# ----------------------------------------------------------------------------------- the tiny klein


def test_stock_diffusers_loads_what_the_script_saves(tmp_path):
    few = "--vae-iterations 1 --iterations 1 --images 60 --batch 2"
    make_tiny_klein.main(["--out", str(tmp_path), *few.split()])
    pipe = Flux2KleinPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    how = dict(height=32, width=32, num_inference_steps=2, max_sequence_length=8)
    (image,) = pipe(prompt="a red ring", output_type="np", **how).images
    assert image.shape == (32, 32, 3)
    assert (tmp_path / "prompts.txt").read_text() == (KLEIN / "prompts.txt").read_text()


def test_a_third_of_its_captions_was_wrong_in_training_and_a_tenth_empty():
    """The network answers with the text that it is fed: a number for each caption."""
    count = len(make_tiny_klein.CAPTIONS)
    data = make_tiny_klein.Data(
        tokens=torch.zeros(count, 1, 1),
        captions=torch.arange(count),
        texts=torch.arange(count + 1.0)[:, None, None],
        image_ids=torch.zeros(0),
        text_ids=torch.zeros(0),
    )
    sizes = fd.replace(make_tiny_klein.SIZES, batch=3000, iterations=1)
    fed = []

    class Net(torch.nn.Linear):
        def forward(self, hidden_states, encoder_hidden_states, **more):
            fed.append(encoder_hidden_states.flatten())
            return SimpleNamespace(sample=super().forward(hidden_states))

    drawn = make_tiny_klein.tiny.draw(data, sizes, torch.Generator().manual_seed(0)).captions
    make_tiny_klein.train_klein(Net(1, 1), data, sizes, torch.Generator().manual_seed(0))
    (texts,) = fed
    empty = texts == make_tiny_klein.EMPTY
    wrong = (texts != drawn) & ~empty
    assert empty.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert wrong.sum().item() / 3000 == pytest.approx(0.9 * 0.3 * 59 / 60, abs=0.03)


# ----------------------------------------------------------------------------------------- velocity


@pytest.mark.parametrize("size", [(4, 4), (2, 6)])
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE, 5.0])
def test_the_teacher_is_the_stock_pipeline_at_the_same_guidance(setup, guidance, size):
    """Positions, time, guidance and normalisation: each wrong one gives another image."""
    noise = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    cond = setup.cache.conditions([0, 1], guidance)
    pipe = stock_pipeline(6.0)

    def stock(guidance: float) -> Tensor:
        latents = pipe(
            prompt_embeds=cond["text"],
            negative_prompt_embeds=cond["empty_text"],
            height=8 * size[0],
            width=8 * size[1],
            guidance_scale=guidance,
            num_inference_steps=3,
            latents=noise,
            output_type="latent",
        ).images
        return normalised(pipe, latents)

    lora = new_lora(setup)
    ours = sc.euler_sample(lora.velocity(None), noise, sc.time_grid(3, 6.0), **cond)
    assert_close(ours, stock(guidance), **EXACT)
    ours_by_pipeline = fd.stock_sample(setup.model, noise, 3, cond, 6.0, batch=1, guided=True)
    assert_close(ours_by_pipeline, ours, **EXACT)
    for other in {max(1, guidance - 1), guidance + 1} - {guidance}:
        assert difference(stock(other), ours) > 1e-2


def test_a_student_is_one_plain_call(setup):
    """As the pipeline's at guidance 1, whatever guidance it was taught."""
    lora = new_lora(setup)
    weights = lora.loaded_weights()
    noise = setup.cache.noise([("student", i) for i in range(2)])
    cond = setup.cache.conditions([0, 1], GUIDANCE)
    with rows_of_calls() as rows:
        ours = sc.euler_sample(lora.velocity(weights), noise, sc.time_grid(3, 6.0), **cond)
    assert rows == {"elsewhere": [2, 2, 2]}
    texts = setup.data.texts[:2]
    pipe = stock_pipeline(6.0)
    assert_close(ours, stock_latents(pipe, texts, noise, 3, 1.0), **EXACT)
    assert difference(stock_latents(pipe, texts, noise, 3, GUIDANCE), ours) > 1e-2
    assert_close(fd.stock_sample(setup.model, noise, 3, cond, 6.0, batch=2), ours, **EXACT)


def test_one_batch_of_both_texts_is_two_calls(setup):
    net = setup.model.load("image", fresh=True).transformer
    family = setup.model.family
    x = setup.cache.noise([("two", i) for i in range(3)])
    t = torch.tensor([0.9, 0.5, 0.1])
    cond = setup.cache.conditions([0, 1, 2], torch.tensor([1.5, 2.0, 4.0]))
    with torch.no_grad():
        together = family.teacher_velocity(net, x, t, **cond)
        plain = family.velocity(net, x, t, **cond)
        without = family.velocity(net, x, t, **cond | {"text": cond["empty_text"]})
    guidance = cond["guidance"][:, None, None, None]
    assert_close(together, without + guidance * (plain - without), **EXACT)


def test_a_teacher_without_the_empty_text_is_an_error(setup):
    cond = setup.cache.conditions([0], GUIDANCE)
    del cond["empty_text"]
    with pytest.raises(TypeError):
        new_lora(setup).velocity(None)(setup.cache.noise([(0,)]), torch.ones(1), **cond)


@pytest.mark.parametrize("which", ["img_ids", "txt_ids"])
def test_positions_matter(setup, which, monkeypatch):
    """Zeros in their place, as FLUX.1 has them for text, would be no error."""
    net = setup.model.load("image", fresh=True).transformer
    x = setup.cache.noise([("ids",)])
    cond = setup.cache.conditions([0], GUIDANCE)
    forward = net.forward

    def velocity() -> Tensor:
        with torch.no_grad():
            return setup.model.family.velocity(net, x, torch.full((1,), 0.5), **cond)

    right = velocity()
    monkeypatch.setattr(net, "forward", lambda **k: forward(**k | {which: 0 * k[which]}))
    assert difference(velocity(), right) > 1e-2


def test_a_guidance_that_the_network_does_not_take_is_ignored_by_diffusers(setup):
    """Hence the refusal below of a transformer that does not belong to its pipeline."""
    net = setup.model.load("image", fresh=True).transformer
    cond = setup.cache.conditions([0], GUIDANCE)
    x = setup.cache.noise([("ignored",)]).flatten(2).mT
    how = dict(
        hidden_states=x, timestep=torch.ones(1), encoder_hidden_states=cond["text"],
        img_ids=Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 16, 4, 4)),
        txt_ids=Flux2Pipeline._prepare_text_ids(cond["text"]),
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(net(**how).sample, net(guidance=torch.ones(1), **how).sample)


# --------------------------------------------------------------------------------- phases of a run


def test_the_pool_is_the_guided_teachers(setup):
    pairs = setup.data.pairs
    texts = [setup.data.texts[pair.text] for pair in pairs]
    noise = setup.cache.noise([("pool", pair.number) for pair in pairs])
    pool = setup.cache.read("latent", range(len(pairs)))["latent"]
    pipe = stock_pipeline(6.0)
    assert_close(pool, stock_latents(pipe, texts, noise, 8, GUIDANCE), rtol=0, atol=2e-4)
    for other in (1.0, GUIDANCE + 1):
        assert difference(stock_latents(pipe, texts, noise, 8, other), pool) > 1e-2


def test_training_has_one_guidance(setup):
    pool = fd.read_pool(setup.cache)
    _, _, cond = fd.draw_batch(setup.settings, setup.cache, pool, fd.keyed(0))
    assert cond["guidance"].tolist() == [GUIDANCE] * setup.settings.batch


def test_validation_measures_against_the_guided_teacher(setup):
    lora = new_lora(setup)
    with rows_of_calls() as rows:
        validation = fd.Validation(setup.settings, setup.cache, lora)
    # A first call, then those whose seconds are measured for the forecast.
    calls = sum(rows["references"]) / len(validation.noise)
    assert calls == validation.teacher_calls * (1 + setup.settings.teacher_steps + 3) == 2 * 12
    texts = validation.texts * setup.settings.noises
    pipe = stock_pipeline(6.0)
    for end, steps in ((validation.fine, 8), (validation.coarse, 3)):
        stock = stock_latents(pipe, texts, validation.noise, steps, GUIDANCE)
        assert_close(end, stock, rtol=0, atol=2e-4)
        assert difference(stock_latents(pipe, texts, validation.noise, steps, 1.0), end) > 1e-2


@torch.no_grad()
def test_lam_is_that_of_the_scale_which_starts_from_the_unguided_network(setup):
    """lam* = sum <v_S - v_0, mean - v_0> / sum |v_S - v_0|^2, with v_0 the velocity at scale 0."""
    lora = new_lora(setup)
    validation = fd.Validation(setup.settings, setup.cache, lora)
    weights = lora.loaded_weights()
    assert validation.lam(weights, 3) == float("inf")  # untrained, it is that network
    weights += 0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    teacher, student = lora.velocity(None), lora.velocity(weights)
    plain = lora.velocity(weights, 0.0)
    x, cond = validation.noise, validation.cond
    product = square = 0.0
    for t, t_next in pairwise(sc.time_grid(3, 6.0)):
        x_next = sc.euler_sample(teacher, x, torch.linspace(t, t_next, 17), **cond)
        at = t.expand(len(x))
        change = student(x, at, **cond) - plain(x, at, **cond)
        mean = (x - x_next) / (t - t_next)
        product += (change * (mean - plain(x, at, **cond))).sum()
        square += change.square().sum()
        x = x_next
    assert validation.lam(weights, 3) == pytest.approx((product / square).item(), rel=1e-4)


@pytest.mark.parametrize("steps", [3, 6])
def test_a_student_that_has_not_learned_is_inert_and_has_not_diverged(setup, steps):
    """Without guidance it is far from the guided teacher, all the more in many steps."""
    settings = fd.replace(setup.settings, student_steps=steps, teacher_steps=24)
    lora = new_lora(setup)
    validation = fd.Validation(settings, setup.cache, lora)
    weights = lora.loaded_weights()
    row = validation.measure(weights, validation.end(weights, steps), [steps])
    assert not fd.has_diverged(settings, row)
    assert "inert student" in fd.verdict(settings, row)
    assert not fd.has_matched(fd.replace(settings, paper=True), [row])


def test_a_scale_is_kept_that_is_better_than_none(tmp_path):
    """Even in 6 steps, where the teacher ends nearer to its own 8 than the student does."""
    out = tmp_path / "out"
    run(out, *FLAGS, "--steps", 2, 3, 6)
    adapter = fd.read_metadata(out / fd.LORA)
    results = json.loads((out / "results.json").read_text())
    cells = {(row["sampler"], row["steps"]): row["rmse"] for row in results["table"]}
    assert adapter["uncalibrated"] == []
    assert cells["student, scaled", 6] > cells["teacher", 6]


def test_the_device_check_has_as_few_tokens_as_that_of_flux(tmp_path):
    """32 x 32; plain attention takes memory by their square."""
    setup = prepared(tmp_path / "out", *FLAGS, "--resolution", 320, "--limit", 1)
    tokens = []

    def note(module, args, kwargs):
        tokens.append(kwargs["hidden_states"].shape[1])

    lora = new_lora(setup)
    lora.net.register_forward_pre_hook(note, with_kwargs=True)
    found = fd.device_errors(setup.settings, setup.cache, lora)
    assert tokens[0] == 32 * 32 < max(tokens) == 40 * 40
    assert found["pipeline"] < 1e-4  # both are guided


@pytest.mark.parametrize("guidance", [4, 8])
def test_the_rounding_of_a_guided_teacher_passes_the_device_check(tmp_path, guidance):
    """An H200 refused the tiny klein in bfloat16, for true guidance multiplies rounding."""
    setup = prepared(tmp_path / "out", *FLAGS, "--guidance", guidance, dtype=torch.bfloat16)
    lora = new_lora(setup)
    assert lora.net.dtype == torch.bfloat16
    found = fd.check_device(setup.settings, setup.cache, lora)  # ends the run otherwise
    assert found["pipeline"] > 1e-3  # it does round


def test_the_device_check_finds_a_pipeline_with_another_guidance(setup, monkeypatch):
    """Or one that leaves it out: by a third of the result or more, on this model."""
    sample = fd.Flux2.sample

    def without_guidance(family, pipe, steps, guided, noise, **cond):
        return sample(family, pipe, steps, False, noise, **cond)

    def with_more_guidance(family, pipe, steps, guided, noise, **cond):
        return sample(
            family, pipe, steps, guided, noise, **cond | {"guidance": cond["guidance"] + 1}
        )

    for wrong in (without_guidance, with_more_guidance):
        monkeypatch.setattr(fd.Flux2, "sample", wrong)
        found = fd.device_errors(setup.settings, setup.cache, new_lora(setup))
        assert found["pipeline"] > 2 * fd.CHECKS["pipeline"].bound


def test_calls_are_counted_as_they_are_made(finished, setup):
    """Rows of the transformer; a backward pass is two more, which no call shows."""
    settings = setup.settings
    calls = fd.network_calls(settings, setup.model.family)
    assert calls == {"iteration": 8, "teacher": 16, "student": 3}
    trained = settings.iterations * settings.batch
    assert sum(finished.rows["loss_of"]) == (calls["iteration"] - 2) * trained
    assert sum(finished.rows["fill_cache"]) == calls["teacher"] * len(setup.data.pairs)
    rows = settings.noises * len(setup.data.comparison)
    steps = sum(settings.all_steps)
    check = settings.noises * settings.student_steps
    of_students = 2 * steps * rows
    of_teacher = 2 * steps * rows + calls["teacher"] * rows
    assert sum(finished.rows["compare"]) == of_students + of_teacher + check


@pytest.mark.parametrize(
    "change, stated",
    [({}, 8), ({"paper": True}, 5.4), ({"student_steps": 1}, 12)],
    ids=["default", "--paper", "one step"],
)
def test_calls_of_an_iteration_are_as_stated(setup, change, stated):
    """Over ten iterations: the paper's fraction of teacher rows is right on average."""
    settings = fd.replace(setup.settings, **change, iterations=10, batch=5)
    lora = new_lora(setup, **change, batch=5)
    state = fd.TrainState(lora.loaded_weights(), fd.config_of(settings))
    with rows_of_calls() as rows:
        for _ in fd.train(settings, setup.cache, fd.read_pool(setup.cache), lora, state):
            pass
    calls = fd.network_calls(settings, setup.model.family)["iteration"]
    assert calls == pytest.approx(stated)
    assert sum(rows["loss_of"]) / 50 == pytest.approx(calls - 2, abs=1e-6)


def test_the_table_has_the_guided_teacher_and_the_unguided_student(finished, setup):
    results = json.loads((finished.out / "results.json").read_text())
    cells = {(row["sampler"], row["steps"]): row["rmse"] for row in results["table"]}
    rows = [(i, k) for k in range(setup.settings.noises) for i in setup.data.comparison]
    texts = [setup.data.texts[i] for i, _ in rows]
    noise = setup.cache.noise([("compare", *row) for row in rows])
    pipe = stock_pipeline(6.0)
    fine = stock_latents(pipe, texts, noise, 8, GUIDANCE)
    coarse = stock_latents(pipe, texts, noise, 2, GUIDANCE)
    assert cells["teacher", 2] == pytest.approx(fd.rms(coarse - fine), rel=1e-3)
    pipe.load_lora_weights(finished.out, weight_name=fd.LORA, adapter_name="student")
    student = stock_latents(pipe, texts, noise, 3, 1.0)
    assert cells["student", 3] == pytest.approx(fd.rms(student - fine), rel=1e-3)


def test_the_cards_code_in_another_process_makes_the_students_image(finished, setup, tmp_path):
    """By stock diffusers alone, but for the noise."""
    out = copied(finished.out, tmp_path / "out")
    (tmp_path / "tiny_klein").symlink_to(KLEIN)
    noise = setup.cache.noise([("check", 0, 0)])
    code = cards_code(out)
    found = image_of_code(code, setup.data.texts[0], noise, tmp_path)
    check = load_file(out / fd.CHECK)["latents"][:1]
    pixels = setup.model.family.decode(stock_pipeline(6.0), check)[0].numpy()
    assert np.abs(found - 255 * pixels).max() <= 1


def test_card_and_file_say_how_the_student_samples(finished):
    card = (finished.out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert "flux2" in head["tags"]
    assert "Flux2KleinPipeline.from_pretrained(" in card
    assert "guidance_scale=1.0," in card
    assert "FluxGuidance" not in card
    assert "cfg 1," in card
    assert "Network calls: 8 for each row" in card
    assert fd.read_metadata(finished.out / fd.LORA)["guidance"] == GUIDANCE


@pytest.mark.parametrize("missing, warned", [([8], False), ([3, 8], True)])
def test_a_scale_that_is_not_recommended_need_not_be_found(finished, setup, missing, warned):
    results = json.loads((finished.out / "results.json").read_text())
    adapter = results["adapter"]
    adapter["scales"] = {int(n): scale for n, scale in adapter["scales"].items()}
    adapter |= {"uncalibrated": missing, "note": "all is well"}
    card = fd.card(results, finished.out, setup.model.family, setup.machine)
    assert ("> Warning." in card) == warned


def test_a_run_does_not_complain_of_a_scale_that_it_does_not_recommend(tmp_path, monkeypatch):
    found = {2: (0.01, fd.SCALES[1]), 3: (0.01, 1.23)}
    monkeypatch.setattr(fd.Validation, "search", lambda self, weights, steps: found[steps])
    out = tmp_path / "out"
    run(out, *FLAGS)
    adapter = fd.read_metadata(out / fd.LORA)
    assert adapter["uncalibrated"] == [2]
    assert "no scale" not in adapter["note"]


# --------------------------------------------------------------------------- the file for ComfyUI


def lora_of(net: torch.nn.Module) -> dict[str, Tensor]:
    """Random matrices for all linear layers of a transformer, as diffusers saves them."""
    tensors = {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear):
            outputs, inputs = layer.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, inputs)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, 2)
    return dict(sorted(tensors.items()))


def changes(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What a LoRA adds to the weights, by their names."""
    found = {}
    for name, A in tensors.items():
        if name.endswith("lora_A.weight"):
            B = tensors[name.replace("lora_A", "lora_B")]
            found[name.removeprefix(prefix).replace("lora_A.weight", "weight")] = B @ A
    assert len(found) == len(tensors) / 2
    return found


@pytest.mark.parametrize("which", ["klein", "dev"])
def test_the_file_for_comfyui_changes_the_published_weights_as_the_lora_does(setup, which):
    """As published weights are read into diffusers by diffusers."""
    pipe = make_tiny_dev() if which == "dev" else stock_pipeline(6.0)
    net = pipe.transformer
    tensors = lora_of(net)
    theirs = setup.model.family.for_comfyui(tensors)
    assert all(name.startswith("diffusion_model.") for name in theirs)
    read = convert_flux2_transformer_checkpoint_to_diffusers(changes(theirs, "diffusion_model."))
    ours = changes(tensors, "transformer.")
    assert len(ours) == sum(isinstance(m, torch.nn.Linear) for m in net.modules())
    assert read.keys() == ours.keys()
    for name, change in ours.items():
        assert_close(read[name], change)


def test_a_layer_that_has_no_name_in_comfyui_is_an_error(setup):
    tensors = {"transformer.new.lora_A.weight": torch.ones(1, 1)}
    tensors["transformer.new.lora_B.weight"] = torch.ones(1, 1)
    with pytest.raises(ValueError, match="without an original name: new"):
        setup.model.family.for_comfyui(tensors)


@pytest.mark.parametrize("damage", ["deleted", "cut", "of another run"])
def test_a_run_leaves_the_file_for_comfyui_and_makes_it_again(finished, setup, tmp_path, damage):
    """From the LoRA alone, whatever else was deleted."""
    out = copied(finished.out, tmp_path / "out")
    path = out / fd.COMFYUI_LORA
    made = load_file(path)
    expected = setup.model.family.for_comfyui(load_file(out / fd.LORA))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert "Put `comfyui.safetensors` into `models/loras`" in (out / "README.md").read_text()
    shutil.rmtree(out / "cache")
    shutil.rmtree(out / "checkpoint")
    before = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(before[: len(before) // 2])
    elif damage == "of another run":
        fd.write_tensors(path, {"x": torch.ones(1)}, {"key": "another"})
    run(out, *FLAGS)
    again = load_file(path)
    assert again.keys() == made.keys()
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_sample_of_another_familys_student_is_refused_for_that_reason(finished):
    flags = ("--model", TINY, "--out", finished.out, "--guidance", 3, "--sample", "a fox")
    with pytest.raises(SystemExit, match=r"was made for tiny_klein, and .* different model"):
        fd.main(list(map(str, flags)))


def test_diffusers_takes_the_other_file_where_no_name_is_given(finished):
    pipe = stock_pipeline(6.0)
    pipe.load_lora_weights(finished.out)
    (adapter,) = pipe.get_list_adapters()["transformer"]
    weight = pipe.transformer.norm_out.linear.lora_B[adapter].weight
    assert_close(
        weight, load_file(finished.out / fd.LORA)["transformer.norm_out.linear.lora_B.weight"]
    )


def test_a_file_of_that_name_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / fd.COMFYUI_LORA
    save_file({"x": torch.ones(1)}, path)
    before = path.read_bytes()
    says("comfyui.safetensors was not written by this program", *FLAGS, "--out", tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name, licence",
    [
        ("black-forest-labs/FLUX.2-klein-base-4B", {"license": "apache-2.0"}),
        (
            "black-forest-labs/FLUX.2-klein-base-9B",
            {"license": "other", "license_name": "flux-non-commercial-license"},
        ),
        (
            "black-forest-labs/FLUX.2-dev",
            {"license": "other", "license_name": "flux-non-commercial-license"},
        ),
        (
            "someone/FLUX.2-klein-4b-tune",
            {"license": "other", "license_name": "that-of-the-base-model"},
        ),
        ("someone/tune", {"license": "other", "license_name": "that-of-the-base-model"}),
    ],
)
def test_each_model_has_its_licence(name, licence):
    assert fd.Flux2({"_class_name": "Flux2Pipeline"}, {}).licence(name) == licence


def test_sample_renders_without_guidance_what_the_student_makes(finished, tmp_path, capsys):
    out = copied(finished.out, tmp_path / "out")
    prompt = "a red ring"
    with rows_of_calls() as rows:
        fd.main(["--model", str(KLEIN), "--out", str(out), "--sample", prompt])
    assert rows == {"render": [1, 1, 1]}
    with Image.open(Path(capsys.readouterr().out.strip())) as image:
        found = np.asarray(image).astype(int)
    pipe = stock_pipeline(6.0)
    pipe.load_lora_weights(out, weight_name=fd.LORA, adapter_name="student")
    pipe.set_adapters("student", fd.read_metadata(out / fd.LORA)["scales"]["3"])
    noise = torch.randn(1, 16, 4, 4, generator=fd.keyed(0, "sample", 0))
    pixels = pipe(
        prompt=prompt, height=32, width=32, num_inference_steps=3, guidance_scale=1.0,
        max_sequence_length=8, latents=noise, output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(found - 255 * pixels).max() <= 1


def test_sample_refuses_another_guidance(finished):
    flags = ("--out", finished.out, "--model", KLEIN, "--sample", "a fox", "--guidance", 3)
    told = f"--guidance: the student in --out .* has learned a guidance of {GUIDANCE:g}"
    with pytest.raises(SystemExit, match=told):
        fd.main([*map(str, flags)])
    fd.main([*map(str, flags[:-1]), str(GUIDANCE)])  # that which it has learned


def test_one_number_of_steps_is_recommended_and_the_others_are_shown(finished):
    """The table has the best scales of all."""
    flags = ("--out", finished.out, "--model", KLEIN, "--sample", "a fox", "--student-steps", 2)
    with pytest.raises(SystemExit, match="was distilled for 3, and its scale for"):
        fd.main([*map(str, flags)])
    card = (finished.out / "README.md").read_text()
    strengths, table = card.split("## Scale and times")[1].split("RMSE of latents")
    assert "| 3 |" in strengths
    assert "| 2 |" not in strengths
    assert "distil another student" in strengths
    assert "| Euler steps | 2 | 3 |" in table


def test_another_guidance_is_another_student(finished, tmp_path):
    out = copied(finished.out, tmp_path / "out")
    flags = [*FLAGS[:-1], GUIDANCE + 1]
    says(rf"--guidance {GUIDANCE}, now {GUIDANCE + 1}", "--out", out, *flags)


def test_stopped_and_resumed_it_is_the_same_to_the_bit(finished, tmp_path):
    out = tmp_path / "out"
    calls = []

    def stop_in_the_third():
        if torch.is_grad_enabled():  # the student's call
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with before_network_calls(stop_in_the_third):
        says("stopped after iteration 3; the same command resumes there", "--out", out, *FLAGS)
    run(out, *FLAGS)
    assert same_run(out, finished.out)


# ---------------------------------------------------------------------------------------- refusals


def changed(tmp_path: Path, file: str, **change) -> Path:
    folder = copied(KLEIN, tmp_path / "model")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    return folder


def test_a_distilled_klein_is_refused(tmp_path):
    folder = changed(tmp_path, "model_index.json", is_distilled=True)
    says("is distilled: it samples in 4 steps already", "--model", folder, "--out", tmp_path / "o")


@pytest.mark.parametrize("guidance_embeds", [True, None], ids=["said", "by default"])
def test_a_transformer_that_takes_guidance_does_not_belong_to_klein(tmp_path, guidance_embeds):
    """Diffusers makes one that takes it where the config does not say."""
    folder = changed(tmp_path, "transformer/config.json", guidance_embeds=guidance_embeds)
    if guidance_embeds is None:
        file = folder / "transformer/config.json"
        config = json.loads(file.read_text())
        del config["guidance_embeds"]
        file.write_text(json.dumps(config))
    says("does not belong to its pipeline", "--model", folder, "--out", tmp_path / "o")


@pytest.mark.parametrize("guidance", [0.5, 1])
def test_a_guidance_that_does_not_guide_is_refused(tmp_path, guidance):
    sentence = f"--guidance {guidance:.1f} must be above 1"
    says(sentence, *FLAGS[:-1], guidance, "--out", tmp_path / "o")


@pytest.mark.parametrize("shift", [3.9, 8.1])
def test_a_shift_outside_the_range_of_the_training_is_refused(tmp_path, shift):
    sentence = f"--shift {shift} is outside the range of the training, 4.0 to 8.0"
    says(sentence, *FLAGS, "--shift", shift, "--out", tmp_path)


def test_texts_that_would_be_cut_to_nothing_are_refused(tmp_path):
    """The template around them has two tokens."""
    says(
        "--text-tokens 2 leaves no room for a text: give more than 2",
        *FLAGS, "--text-tokens", 2, "--out", tmp_path / "o",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["QwenImagePipeline", "ZImagePipeline", "StableDiffusion3Pipeline", "ChromaPipeline"]
)
def test_other_families_are_refused_by_name(tmp_path, name):
    folder = changed(tmp_path, "model_index.json", _class_name=name)
    says(f"is a {name}: this distils", "--model", folder, "--out", tmp_path / "o")


# ---------------------------------------------------------------------------------- the real sizes


def config_of(blocks: int, single: int, heads: int, width: int, **more) -> dict:
    """As FLUX.2's transformers have it."""
    return dict(
        in_channels=128, num_layers=blocks, num_single_layers=single, num_attention_heads=heads,
        attention_head_dim=128, joint_attention_dim=width, axes_dims_rope=(32, 32, 32, 32),
        guidance_embeds=False,
    ) | more  # fmt: skip


def test_klein_4b_has_109_linear_layers_and_a_lora_of_102_million_parameters():
    with torch.device("meta"):
        net = Flux2Transformer2DModel(**config_of(5, 20, 24, 7680))
    assert 3.8e9 < sum(p.numel() for p in net.parameters()) < 4.0e9
    sizes = {}
    for layers in ("all", "blocks"):
        names = fd.linear_layers(net, layers)
        weights = [net.get_submodule(name).weight for name in names]
        sizes[layers] = len(names), 64 * sum(sum(weight.shape) for weight in weights)
    assert sizes["all"][0] == 109
    assert sizes["all"][1] == pytest.approx(102e6, rel=0.01)
    assert sizes["blocks"][0] == 100


PEAK = 13.4  # GiB of training it on one H200, batch 8, 512 px (random weights)


@pytest.mark.parametrize(
    "gib, batch, resolution, fits",
    [
        (24, 8, 512, True),
        (24, 4, 1024, True),
        (24, 16, 1024, False),
        (PEAK, 8, 512, False),
        (1.25 * PEAK, 8, 512, True),
    ],
)
def test_klein_4b_fits_a_24_gb_card(monkeypatch, gib, batch, resolution, fits):
    """By the estimate that is made before anything is loaded; it is near what training took."""
    config = config_of(5, 20, 24, 7680)
    index = {"_class_name": "Flux2KleinPipeline"}
    machine = fd.Machine()
    machine.device, machine.dtype = "cuda", torch.bfloat16
    monkeypatch.setattr(machine, "memory", lambda: gib * 2**30)
    family = fd.Flux2(index, config)
    vae = {"block_out_channels": [128, 256, 512, 512]}
    model = SimpleNamespace(
        name="klein", machine=machine, family=family,
        latent_shape=lambda resolution: family.latent_shape(vae, resolution),
    )  # fmt: skip
    settings = fd.Settings(batch=batch, resolution=resolution).with_defaults(family.defaults)
    assert settings.text_tokens == 512
    if fits:
        fd.check_memory(settings, model)
    else:
        with pytest.raises(SystemExit, match="training needs about"):
            fd.check_memory(settings, model)


def test_flags_win_over_the_defaults_of_a_family(tmp_path):
    family = fd.Flux2({"_class_name": "Flux2KleinPipeline"}, {"guidance_embeds": False})
    settings = fd.parse(["--shift", "3", "--out", str(tmp_path)]).with_defaults(family.defaults)
    assert (settings.shift, settings.shift_range, settings.guidance) == (3.0, (4.0, 8.0), 4.0)
    assert settings.layers == "all"
    settings = fd.parse(["--layers", "blocks", "--out", str(tmp_path)]).with_defaults(
        family.defaults
    )
    assert settings.layers == "blocks"


def test_the_modulation_of_all_blocks_lies_outside_of_them(setup):
    """So a LoRA on the blocks alone can't change what a block makes of the time."""
    lora = new_lora(setup)
    assert any("modulation" in name for name in lora.layers)
    inside = new_lora(setup, layers="blocks")
    assert not any("modulation" in name for name in inside.layers)


# --------------------------------------------------------------------------------- what it can do


@pytest.mark.slow
def test_the_tiny_klein_is_distilled_with_its_guidance():
    """One seed of tests/benchmarks/klein.py, which also has what is missed."""
    sys.path.insert(0, str(KLEIN.parent / "benchmarks"))
    import klein

    found = klein.measure(seed=0, length=1.0)
    distance, shown = found["distance"], found["shown"]
    assert distance["student"][3] < 0.6 * distance["teacher"][3]
    assert shown["teacher, 32 steps"] > 0.95
    assert shown["teacher without guidance"] < 0.6
    assert shown["student, 3 steps"] > 0.9
    assert shown["student, 3 steps"] > shown["teacher, 3 steps"] + 0.1
