"""A wrong guidance anywhere in flux_distill.py is found.

The tiny Flux reacts to guidance, as FLUX.1-dev does. The runs here have a --guidance that is no
default. The references are the stock pipeline at the guidance that is right, and the guidance that
each call of the network was given.
"""

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY, calls_by_phase, copied, fd, new_lora, prepared, run
from torch import Tensor
from torch.testing import assert_close

import shortcut as sc

GUIDANCE = 6.0  # of the runs here
OF_THE_POOL = 3.5
EXACT = {"rtol": 0, "atol": 2e-5}
PHASES = ("fill_cache", "loss_of", "device_errors", "validate", "calibrate", "compare", "render")


# --------------------------------------------------------------------------------- what tests share


def guidance_of_calls():
    """Guidance (B,) of each call of a Flux transformer, by phase."""
    return calls_by_phase(FluxTransformer2DModel, PHASES, lambda call: call["guidance"].clone())


def distinct(calls: list[Tensor]) -> set[float]:
    return {value for call in calls for value in call.tolist()}


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> SimpleNamespace:
    """A prepared run with another guidance, its cache filled."""
    return prepared(tmp_path_factory.mktemp("guided") / "out", "--guidance", GUIDANCE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    """The folder of a whole run with another guidance, and the guidance of its network calls."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with guidance_of_calls() as calls:
        run(out, "--guidance", GUIDANCE)
    return SimpleNamespace(out=out, calls=calls)


def stock_pipeline(shift: float) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return pipe


def stock_latents(
    pipe: FluxPipeline, texts: list[str], noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Latents (B, C, H, W) of texts, by the stock pipeline alone."""
    tokens = pipe(
        texts,
        height=32,
        width=32,
        guidance_scale=guidance,
        num_inference_steps=steps,
        max_sequence_length=8,
        latents=FluxPipeline._pack_latents(noise, *noise.shape),
        output_type="latent",
    ).images
    return FluxPipeline._unpack_latents(tokens, 32, 32, pipe.vae_scale_factor)


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, in RMS."""
    return fd.rms(a - b) / fd.rms(b)


# ----------------------------------------------------------------------------- the tiny Flux reacts


def test_guidance_changes_what_the_tiny_flux_makes(guided):
    """By 5 % or more, so that the tests below see another guidance."""
    texts = guided.data.texts
    noise = guided.cache.noise([("reacts", i) for i in range(len(texts))])
    pipe = stock_pipeline(1.0)
    ends = {g: stock_latents(pipe, texts, noise, 16, g) for g in (0.0, 1.0, 3.5, GUIDANCE, 8.0)}
    for a, b in combinations(ends, 2):
        assert difference(ends[a], ends[b]) > 0.05, (a, b)
    assert difference(ends[0.0], ends[8.0]) > 0.25


# ----------------------------------------------------------------------------------------- training


def test_training_draws_guidance_uniformly_from_0_to_8_for_each_row(guided):
    """The largest difference to the distribution function; 0.05 is exceeded once in 80 tries."""
    pool = fd.read_pool(guided.cache)
    draws = []
    for i in range(250):
        _, _, cond = fd.draw_batch(guided.settings, guided.cache, pool, fd.keyed("draw", i))
        draws.append(cond["guidance"])
    values = torch.cat(draws).sort().values
    assert len(values.unique()) == len(values) == 1000
    expected = (torch.arange(1000) + 0.5) / 1000
    assert (values / 8 - expected).abs().max() < 0.05


@pytest.mark.parametrize("paper", [False, True], ids=["default", "--paper"])
def test_velocities_and_student_get_the_same_guidance_row_by_row(guided, paper):
    """Of the network calls of an iteration the student's comes last."""
    settings = fd.replace(guided.settings, paper=paper, accumulate=1)
    lora = new_lora(guided, paper=paper)
    state = fd.TrainState(lora.loaded_weights(), fd.config_of(settings))
    pool = fd.read_pool(guided.cache)
    with guidance_of_calls() as calls:
        for iteration in fd.train(settings, guided.cache, pool, lora, state):
            *others, student = calls.pop("loss_of")
            assert not calls
            _, _, cond = fd.draw_batch(
                settings, guided.cache, pool, fd.keyed(settings.seed, "train", iteration, 0)
            )
            assert torch.equal(student, cond["guidance"])
            assert len(student.unique()) == settings.batch
            # The teacher twice and the EMA once, or two velocities, one of them in two parts.
            velocities = 2 if paper else 3
            assert torch.equal(torch.cat(others), student.repeat(velocities))


def test_rows_keep_their_guidance_where_a_batch_is_split(guided):
    lora = new_lora(guided, batch=2)
    noise = guided.cache.noise([("split", i) for i in range(5)])
    t = torch.full((5,), 0.8)
    guidance = torch.tensor([0.0, 8.0, 3.5, 1.0, 6.0])
    cond = guided.cache.conditions([0, 1, 2, 0, 1], guidance)
    with torch.no_grad():
        together = lora.velocity(None)(noise, t, **cond)
        for i in range(5):
            row = {name: x[i : i + 1] for name, x in cond.items()}
            assert row["guidance"].item() == guidance[i]
            alone = lora.velocity(None)(noise[i : i + 1], t[:1], **row)
            assert_close(together[i : i + 1], alone, **EXACT)


# ------------------------------------------------------------------ velocities, pool and references


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5, 6.0, 8.0])
def test_our_velocity_is_the_stock_pipelines_at_the_same_guidance(guided, guidance):
    """One Euler step from t = 1 to 0 moves by the velocity."""
    texts = [guided.data.texts[i] for i in range(3)]
    noise = guided.cache.noise([("velocity", i) for i in range(3)])
    pipe = stock_pipeline(3.0)

    def stock(guidance: float) -> Tensor:
        return noise - stock_latents(pipe, texts, noise, 1, guidance)

    cond = guided.cache.conditions([0, 1, 2], guidance)
    net = guided.model.load("image", fresh=True).transformer
    with torch.no_grad():
        ours = guided.model.family.velocity(net, noise, torch.ones(3), **cond)
    assert_close(ours, stock(guidance), **EXACT)
    assert_close(noise - fd.stock_sample(guided.model, noise, 1, cond, 3.0, 2), ours, **EXACT)
    for other in (guidance - 0.5, guidance + 0.5):  # far beyond the tolerance
        assert (stock(other) - ours).abs().max() > 100 * EXACT["atol"]


def test_the_pool_is_the_stock_pipelines_at_the_default_guidance(guided):
    """Whatever --guidance is; by the teacher's steps, at the middle of the range of shifts."""
    pairs = guided.data.pairs
    texts = [guided.data.texts[pair.text] for pair in pairs]
    noise = guided.cache.noise([("pool", pair.number) for pair in pairs])
    pool = guided.cache.read("latent", range(len(pairs)))["latent"]
    low, high = guided.settings.shift_range
    pipe = stock_pipeline((low + high) / 2)
    assert_close(pool, stock_latents(pipe, texts, noise, 8, OF_THE_POOL), rtol=0, atol=5e-5)
    for other in (3.0, 4.0, GUIDANCE):
        assert difference(stock_latents(pipe, texts, noise, 8, other), pool) > 1e-3


def test_validation_compares_with_the_stock_pipeline_at_the_guidance_of_the_run(guided):
    """And follows the teacher's path at that guidance, on which lam* is measured."""
    lora = new_lora(guided)
    validation = fd.Validation(guided.settings, guided.cache, lora)
    noise = validation.noise
    texts = validation.texts * guided.settings.noises
    pipe = stock_pipeline(3.0)
    for end, steps in ((validation.fine, 8), (validation.coarse, 3)):
        assert_close(end, stock_latents(pipe, texts, noise, steps, GUIDANCE), rtol=0, atol=5e-5)
        assert difference(stock_latents(pipe, texts, noise, steps, OF_THE_POOL), end) > 5e-3

    generator = torch.Generator().manual_seed(0)
    weights = lora.loaded_weights()
    weights += 0.05 * torch.randn(weights.shape, generator=generator)
    cond = guided.cache.conditions([guided.data.validation[0]] * 2, GUIDANCE)
    times = sc.time_grid(3, 3.0)
    path = sc.teacher_path(lora.velocity(None), noise, times, **cond)
    expected = sc.optimal_scale(lora.velocity(weights), path, **cond).item()
    assert validation.lam(weights, 3) == pytest.approx(expected, rel=1e-5)
    end = sc.euler_sample(lora.velocity(weights, 0.7), noise, times, **cond)
    assert_close(validation.end(weights, 3, 0.7), end, **EXACT)


def test_the_device_check_samples_at_the_guidance_of_the_run(guided):
    with guidance_of_calls() as calls:
        found = fd.device_errors(guided.settings, guided.cache, new_lora(guided))
    assert calls.keys() == {"device_errors"}
    assert distinct(calls["device_errors"]) == {GUIDANCE}
    assert found["pipeline"] < 1e-5


# -------------------------------------------------------------------------------------- a whole run


def test_each_phase_of_a_run_calls_the_network_with_its_guidance(finished):
    calls = dict(finished.calls)
    assert distinct(calls.pop("fill_cache")) == {OF_THE_POOL}
    drawn = distinct(calls.pop("loss_of"))
    assert len(drawn) == 16  # four iterations of four rows
    assert min(drawn) >= 0
    assert max(drawn) <= 8
    assert calls.keys() == {"references", "validate", "calibrate", "compare"}
    for phase, some in calls.items():
        assert distinct(some) == {GUIDANCE}, phase


def test_the_table_is_that_of_the_stock_pipeline_at_the_guidance_of_the_run(finished, guided):
    """The teacher's row in two steps."""
    results = json.loads((finished.out / "results.json").read_text())
    (cell,) = [row for row in results["table"] if (row["sampler"], row["steps"]) == ("teacher", 2)]
    rows = [(i, k) for k in range(guided.settings.noises) for i in guided.data.comparison]
    texts = [guided.data.texts[i] for i, _ in rows]
    noise = guided.cache.noise([("compare", *row) for row in rows])
    pipe = stock_pipeline(3.0)

    def distance(guidance: float) -> float:
        coarse, fine = (stock_latents(pipe, texts, noise, steps, guidance) for steps in (2, 8))
        return fd.rms(coarse - fine)

    assert cell["rmse"] == pytest.approx(distance(GUIDANCE), rel=1e-4)
    assert cell["rmse"] != pytest.approx(distance(OF_THE_POOL), rel=1e-2)


def test_file_results_and_card_hold_the_guidance_of_the_run(finished):
    assert fd.read_metadata(finished.out / fd.LORA)["guidance"] == GUIDANCE
    results = json.loads((finished.out / "results.json").read_text())
    assert results["adapter"]["guidance"] == GUIDANCE
    card = (finished.out / "README.md").read_text()
    assert f"guidance_scale={GUIDANCE}," in card
    assert f"| FluxGuidance | guidance {GUIDANCE:g} |" in card
    assert card.count("guidance_scale") == card.count("FluxGuidance") == 1


def with_lora(out: Path) -> FluxPipeline:
    """A stock pipeline with the LoRA of a run at its scale for three steps."""
    pipe = stock_pipeline(3.0)
    pipe.load_lora_weights(out, weight_name=fd.LORA, adapter_name="student")
    pipe.set_adapters("student", fd.read_metadata(out / fd.LORA)["scales"]["3"])
    return pipe


def test_at_the_guidance_of_its_file_the_lora_gives_the_latents_of_the_check(finished, guided):
    pipe = with_lora(finished.out)
    rows = [(0, k) for k in range(guided.settings.noises)]
    noise = guided.cache.noise([("check", *row) for row in rows])
    texts = guided.data.texts[:1] * len(rows)
    check = load_file(finished.out / fd.CHECK)["latents"]
    guidance = fd.read_metadata(finished.out / fd.LORA)["guidance"]
    assert_close(stock_latents(pipe, texts, noise, 3, guidance), check, rtol=0, atol=5e-5)
    assert difference(stock_latents(pipe, texts, noise, 3, OF_THE_POOL), check) > 5e-3


def test_another_guidance_calibrates_and_compares_again(finished, tmp_path):
    out = copied(finished.out, tmp_path / "out")
    trained = (out / fd.STATE).stat().st_mtime_ns
    with guidance_of_calls() as calls:
        run(out, "--guidance", 1)
    assert calls.keys() == {"references", "calibrate", "compare"}
    assert all(distinct(some) == {1.0} for some in calls.values())
    assert (out / fd.STATE).stat().st_mtime_ns == trained
    assert fd.read_metadata(out / fd.LORA)["guidance"] == 1


@pytest.mark.parametrize(
    "flags, guidance", [("", GUIDANCE), ("--guidance 1", 1.0), ("--guidance 3.5", 3.5)]
)
def test_sample_renders_at_the_guidance_of_the_lora_or_the_flag(
    finished, guided, tmp_path, capsys, flags, guidance
):
    """The image is the stock pipeline's; two levels of 255 may be rounding."""
    out = copied(finished.out, tmp_path / "out")
    prompt = "a red ring"
    with guidance_of_calls() as calls:
        fd.main(["--model", str(TINY), "--out", str(out), "--sample", prompt, *flags.split()])
    assert calls.keys() == {"render"}
    assert distinct(calls["render"]) == {guidance}

    path = Path(capsys.readouterr().out.strip())
    with Image.open(path) as image:
        found = np.asarray(image).astype(int)
    pipe = with_lora(out)
    noise = guided.cache.noise([("sample", 0)])
    levels = {}
    for value in {guidance, GUIDANCE, 1.0, 3.5}:
        latents = stock_latents(pipe, [prompt], noise, 3, value)
        pixels = guided.model.family.decode(pipe, latents)[0]
        levels[value] = (255 * pixels).round().int().numpy()
    assert np.abs(found - levels.pop(guidance)).max() <= 2
    for other in levels.values():
        assert np.abs(found - other).max() > 10
