"""flux_distill.py, validation: distances, lam*, the search for a scale, and verdicts in words."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_runs import TINY, fd, new_lora, prepared, train
from torch import Tensor
from torch.testing import assert_close

import shortcut as sc


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> SimpleNamespace:
    """A student of 40 iterations, with what has been validated."""
    out = tmp_path_factory.mktemp("learned") / "out"
    setup = prepared(out, "--iterations", 40, "--validate-every", 40)
    setup.validation, setup.state = train(setup)
    return setup


def distance_by_hand(setup: SimpleNamespace, weights: Tensor, steps: int, scale: float) -> float:
    """RMSE to the teacher's eight steps, of the student with its matrices B multiplied."""
    lora, validation = setup.validation.lora, setup.validation
    scaled = weights.clone()
    scaled[lora.first_B :] *= scale
    ends = []
    for velocity, count in ((lora.velocity(scaled), steps), (lora.velocity(None), 8)):
        times = sc.time_grid(count, 3.0)
        ends.append(sc.euler_sample(velocity, validation.noise, times, **validation.cond))
    return (ends[0] - ends[1]).square().mean().sqrt().item()


@pytest.mark.parametrize("steps", [2, 3])
def test_the_searched_scale_is_near_the_best(learned, steps):
    """Against a plain scan: within a hundredth of its least distance; others are far from it."""
    weights = learned.state.student
    distance, scale = learned.validation.search(weights, steps)
    assert distance == pytest.approx(distance_by_hand(learned, weights, steps, scale), rel=1e-4)
    scan = {x: distance_by_hand(learned, weights, steps, x) for x in np.arange(0.1, 4.05, 0.1)}
    assert distance < 1.01 * min(scan.values())
    far = [x for tried, x in scan.items() if abs(tried / scale - 1) > 0.5]
    assert len(far) > 10
    assert min(far) > 1.03 * distance


def test_lam_is_the_optimal_scale_and_the_teacher_is_followed_once(setup):
    """For each number of steps: 17 network calls a step at first, then one."""
    lora = new_lora(setup)
    validation = fd.Validation(setup.settings, setup.cache, lora)
    generator = torch.Generator().manual_seed(0)
    start = lora.loaded_weights()
    sets = [start + 0.05 * torch.randn(start.shape, generator=generator) for _ in range(2)]
    calls = []
    hook = lora.net.register_forward_pre_hook(lambda *_: calls.append(1))
    found = {}
    counts = []
    for i, steps in ((0, 2), (0, 3), (1, 2), (1, 3)):
        calls.clear()
        found[i, steps] = validation.lam(sets[i], steps)
        counts.append(len(calls))
    hook.remove()
    assert len(validation.noise) <= setup.settings.batch  # so that all rows are in one call
    assert counts == [17 * 2, 17 * 3, 2, 3]
    assert len(set(found.values())) == 4
    assert validation.lam(sets[0], 2) == found[0, 2]

    for (i, steps), lam in found.items():
        times = sc.time_grid(steps, setup.settings.shift)
        path = sc.teacher_path(lora.velocity(None), validation.noise, times, **validation.cond)
        direct = sc.optimal_scale(lora.velocity(sets[i]), path, **validation.cond)
        assert lam == pytest.approx(direct.item(), rel=1e-5)


def test_the_references_are_the_stock_pipelines(setup):
    """The teacher in --teacher-steps and in --student-steps steps, for each prompt and noise."""
    validation = fd.Validation(setup.settings, setup.cache, new_lora(setup))
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = validation.noise
    prompts = TINY.joinpath("prompts.txt").read_text().splitlines()[-3:]
    assert validation.texts == prompts[:1]
    for end, steps in ((validation.fine, 8), (validation.coarse, 3)):
        tokens = pipe(
            prompts[:1] * 2,
            height=32,
            width=32,
            guidance_scale=3.5,
            num_inference_steps=steps,
            max_sequence_length=validation.cond["text"].shape[1],
            latents=FluxPipeline._pack_latents(noise, *noise.shape),
            output_type="latent",
        ).images
        assert_close(end, fd.unpack(tokens, 4, 4), rtol=0, atol=5e-5)
    assert (noise[0] - noise[1]).abs().max() > 0.1


def test_what_is_measured_is_in_the_log(learned):
    validation, state = learned.validation, learned.state
    row = state.rows[-1]
    assert row["rmse"] == pytest.approx(distance_by_hand(learned, state.student, 3, 1.0), rel=1e-4)
    teacher = distance_by_hand(learned, state.student, 3, 0.0)
    assert row["teacher_rmse"] == pytest.approx(teacher, rel=1e-4)
    assert row["rmse"] < 0.9 * row["teacher_rmse"]  # it learned
    for steps in (2, 3):
        assert row[f"lam_{steps}"] == validation.lam(state.student, steps)
    assert not any("rmse" in row for row in state.rows[:-1])


# ------------------------------------------------------------------------------- verdicts in words

SETTINGS = fd.Settings(student_steps=3, teacher_steps=32)
GOOD = {"lam_3": 1.0, "rmse": 0.1, "teacher_rmse": 0.3}


def test_a_good_student_gives_no_alarm():
    words = fd.verdict(SETTINGS, GOOD)
    assert words == (
        "in 3 steps the student's RMSE to the teacher's 32 steps is 0.100, the teacher's own 0.300"
    )


@pytest.mark.parametrize("lam", [1.0, 0.1])  # lam* of rounding noise can be anything
def test_a_student_that_is_still_the_teacher_is_inert(lam):
    words = fd.verdict(SETTINGS, GOOD | {"rmse": 0.3, "lam_3": lam})
    assert words.startswith("WARNING, inert student: in 3 steps")
    assert words.endswith("train longer or with a higher --learning-rate")


@pytest.mark.parametrize("change", [{"rmse": 0.5, "lam_3": 0.3}, {"lam_3": 0.7}])
def test_a_small_lam_is_an_overshot_student(change):
    words = fd.verdict(SETTINGS, GOOD | change)
    assert words.startswith(f"WARNING, overshot: lam* is {change['lam_3']:.2f}; ")
    assert words.endswith("use its scale, or train shorter")
    without = fd.verdict(SETTINGS, GOOD | change, scale_helps=False)
    assert without.endswith("0.300; train shorter")


def test_a_student_that_is_not_finite_has_diverged():
    words = fd.verdict(SETTINGS, GOOD | {"rmse": math.nan})
    assert words.startswith(
        "WARNING, diverged student: in 3 steps its latents hold NaN or infinity"
    )
    assert words.endswith("distil with a lower --learning-rate in another --out")


def test_the_search_leaves_scales_at_which_samples_are_not_finite(learned, monkeypatch):
    """Also where all of the first ones are such."""
    validation = learned.validation
    end = validation.end
    searched = []

    def too_large(weights, steps, scale=1.0):
        searched.append(scale)
        return end(weights, steps, scale) * (math.inf if scale > 0.35 else 1.0)

    monkeypatch.setattr(validation, "end", too_large)
    monkeypatch.setattr(validation, "lam", lambda weights, steps: 1.0)
    distance, scale = validation.search(learned.state.student, 3)
    assert math.isfinite(distance) and 0.05 < scale <= 0.35
    assert max(searched[:5]) > 1  # it began far above


def test_the_time_of_a_call_leaves_out_the_first_which_may_compile(setup, monkeypatch):
    lora = new_lora(setup)
    calls = []

    def slow_at_first(*_):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(3.0)

    hook = lora.net.register_forward_pre_hook(slow_at_first)
    validation = fd.Validation(setup.settings, setup.cache, lora)
    hook.remove()
    assert validation.seconds * len(calls) < 3.0


def test_a_student_that_went_the_wrong_way_is_told_to_learn_slower():
    row = {"rmse": 0.31, "teacher_rmse": 0.3, "lam_3": -0.5}
    words = fd.verdict(fd.Settings(), row)
    assert words.startswith("WARNING, led astray: lam* is -0.50; in 3 steps")
    assert words.endswith(fd.LOWER_RATE)


def test_one_step_is_singular():
    row = {"rmse": 0.1, "teacher_rmse": 0.3, "lam_1": 1.0}
    assert fd.verdict(fd.Settings(student_steps=1), row).startswith("in 1 step the student's RMSE")
