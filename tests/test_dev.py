"""FLUX.2-dev: the latents of klein, but guidance is an input, and another text encoder.

The pipeline has random weights; see tiny_dev.py. For what it shares with klein see test_klein.py.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny_dev import make_tiny_dev
from tiny_runs import calls_by_phase, cards_code, copied, fd, image_of_code, prepared, run, says
from torch import Tensor
from torch.testing import assert_close

import shortcut as sc

SHIFT = 6.0
GUIDANCE = 3.0
TOKENS = 48
EXACT = {"rtol": 0, "atol": 5e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The pipeline on disk, as a user has it."""
    folder = tmp_path_factory.mktemp("model") / "tiny_dev"
    make_tiny_dev().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(folder) -> tuple:
    return ("--model", folder, "--guidance", GUIDANCE, "--text-tokens", TOKENS)


@pytest.fixture(scope="module")
def setup(tmp_path_factory, flags) -> SimpleNamespace:
    """A prepared run, its cache filled."""
    return prepared(tmp_path_factory.mktemp("setup") / "out", *flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, flags) -> SimpleNamespace:
    """The folder of a whole run, and the guidance of its network calls by phase."""
    out = tmp_path_factory.mktemp("finished") / "out"
    phases = ("fill_cache", "loss_of", "compare")
    with calls_by_phase(Flux2Transformer2DModel, phases, lambda call: call["guidance"]) as guidance:
        run(out, *flags)
    return SimpleNamespace(out=out, guidance=guidance)


def stock_pipeline(folder: Path) -> Flux2Pipeline:
    pipe = Flux2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return pipe


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, in RMS."""
    return fd.rms(a - b) / fd.rms(b)


# --------------------------------------------------------------------------------------- the model


def test_guidance_is_an_input_and_no_second_call(setup):
    family = setup.model.family
    assert not family.true_guidance
    assert family.training_guidance(GUIDANCE) == (0.0, 8.0)
    assert family.pool_guidance(GUIDANCE) == 4.0
    assert fd.network_calls(setup.settings, family)["teacher"] == setup.settings.teacher_steps


@torch.no_grad()
def test_the_teacher_is_the_stock_pipeline_from_text_to_latents(setup, folder):
    """Its own text encoder, template and guidance; the network is called once a step."""
    settings = setup.settings
    pipe = stock_pipeline(folder)
    text = setup.data.texts[0]
    cond, noise = setup.cache.held_out([0], "check")
    packed = pipe(
        prompt=[text] * len(noise),
        height=32,
        width=32,
        guidance_scale=GUIDANCE,
        num_inference_steps=3,
        max_sequence_length=TOKENS,
        latents=noise,
        output_type="latent",
    ).images
    expected = packed.mT.unflatten(2, noise.shape[2:])
    family = setup.model.family
    net = setup.model.load("image").transformer

    def ours(guidance: float) -> Tensor:
        def teacher(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            return family.teacher_velocity(net, x, t, **cond)

        with_guidance = cond | {"guidance": torch.full((len(noise),), guidance)}
        return sc.euler_sample(teacher, noise, sc.time_grid(3, SHIFT), **with_guidance)

    with calls_by_phase(Flux2Transformer2DModel, (), lambda call: len(call["guidance"])) as rows:
        assert_close(ours(GUIDANCE), expected, **EXACT)
    assert rows == {"elsewhere": [len(noise)] * 3}
    assert difference(ours(GUIDANCE + 1), expected) > 1e-3
    for guided in (False, True):
        by_pipeline = fd.stock_sample(setup.model, noise, 3, cond, SHIFT, settings.batch, guided)
        assert_close(by_pipeline, expected, **EXACT)


def test_a_text_is_what_the_pipeline_makes_of_it(setup, folder):
    pipe = stock_pipeline(folder)
    found = setup.cache.read("text", range(len(setup.data.texts)))["text"]
    expected, _ = pipe.encode_prompt(setup.data.texts, max_sequence_length=TOKENS)
    assert_close(found, expected)
    assert difference(found[0], found[1]) > 1e-2


def test_tokens_are_counted_with_the_system_message(setup, folder):
    pipe = stock_pipeline(folder)
    texts = ["a red ring", "a big ring in front of a big red disc on a big"]
    short, long = setup.model.family.count_tokens(pipe, texts)
    given = {}
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    pipe.encode_prompt(texts[0], max_sequence_length=TOKENS)
    hook.remove()
    assert given["attention_mask"].sum() == short < TOKENS
    assert long - short == len(texts[1].split()) - len(texts[0].split())
    assert setup.model.family.longest_text(pipe) == 512


def test_texts_without_room_beside_the_system_message_are_refused(folder, tmp_path):
    says("leaves no room for a text: give more than", "--model", folder, "--text-tokens", 16,
         "--out", tmp_path / "out")  # fmt: skip


# ------------------------------------------------------------------------------------- a whole run


def test_training_draws_guidance_and_comparison_has_the_one_asked_for(finished):
    trained = torch.cat(finished.guidance["loss_of"])
    assert 0 <= trained.min() < 2 and 6 < trained.max() <= 8
    assert all((g == GUIDANCE).all() for g in finished.guidance["compare"])
    assert all((g == 4.0).all() for g in finished.guidance["fill_cache"])


def test_the_cards_code_in_another_process_makes_the_students_image(
    finished, folder, setup, tmp_path
):
    """By stock diffusers alone, but for the noise."""
    out = copied(finished.out, tmp_path / "out")
    (tmp_path / "tiny_dev").symlink_to(folder)
    noise = setup.cache.noise([("check", 0, 0)])
    code = cards_code(out)
    assert f"guidance_scale={GUIDANCE}," in code
    found = image_of_code(code, setup.data.texts[0], noise, tmp_path)
    check = load_file(out / fd.CHECK)["latents"][:1]
    pixels = setup.model.family.decode(stock_pipeline(folder), check)[0].numpy()
    assert np.abs(found - 255 * pixels).max() <= 1


def test_the_card_names_a_guidance_and_every_calibrated_number_of_steps(finished):
    card = (finished.out / "README.md").read_text()
    assert "Flux2Pipeline.from_pretrained(" in card
    assert f"| FluxGuidance | guidance {GUIDANCE:g} |" in card
    results = json.loads((finished.out / "results.json").read_text())
    for n in results["adapter"]["scales"]:
        assert f"\n| {n} |" in card


def test_sample_takes_another_guidance_of_the_training(finished, flags, tmp_path, capsys):
    out = copied(finished.out, tmp_path / "out")
    for guidance in (GUIDANCE, 5):
        options = ("--model", flags[1], "--out", out, "--guidance", guidance)
        fd.main([*map(str, options), "--sample", "a red ring"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    images = [np.asarray(Image.open(path)) for path in paths]
    assert len(images) == 2
    assert not np.array_equal(*images)


# ------------------------------------------------------------------------------- what it refuses


def test_a_transformer_without_guidance_does_not_belong_to_it():
    """diffusers would sample all the same, and ignore the guidance."""
    index = {"_class_name": "Flux2Pipeline"}
    assert "belong" in fd.Flux2(index, {"guidance_embeds": False}).refusal()
    assert fd.Flux2(index, {}).refusal() is None  # then diffusers makes one that takes it


@pytest.mark.parametrize("is_installed", [False, True])
def test_its_processor_needs_torchvision_before_anything_is_downloaded(
    folder, tmp_path, monkeypatch, is_installed
):
    """Without it diffusers says, after a download of 110 GB, that a class has no loading method."""
    model = copied(folder, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]  # as in FLUX.2-dev
    (model / "model_index.json").write_text(json.dumps(index))
    find_spec = fd.find_spec
    monkeypatch.setattr(
        fd, "find_spec", lambda name: is_installed if name == "torchvision" else find_spec(name)
    )
    if is_installed:
        assert fd.Model(str(model), fd.Machine(), None).family.refusal() is None
    else:
        says("needs torchvision, .* pip install torchvision", "--model", model, "--out",
             tmp_path / "out")  # fmt: skip
        assert not os.listdir(tmp_path / "out")
