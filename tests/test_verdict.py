"""The verdict on a student, the search for its scale, and when nothing is saved or recommended."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import content, fd, prepared, run, says, train

RESULTS = {fd.LORA, "README.md", "results.json"}


def said_of(**change) -> str:
    """The verdict on a student of three steps whose validation found these numbers."""
    row = {"lam_3": 1.0, "rmse": 0.1, "teacher_rmse": 0.3} | change
    return fd.verdict(fd.Settings(student_steps=3), row)


# ----------------------------------------------------------------------------------------- diverged


@pytest.mark.parametrize("rmse", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lam", [0.5, math.nan, -1e-11])
def test_a_student_that_is_not_finite_is_diverged(rmse, lam):
    said = said_of(rmse=rmse, lam_3=lam)
    assert said.startswith("WARNING, diverged student: in 3 steps its latents hold NaN or infinity")
    assert said.endswith("; distil with a lower --learning-rate in another --out")
    assert "train longer" not in said


@pytest.mark.parametrize(
    ("rmse", "lam", "said"),
    [
        (0.7, 0.01, "diverged"),
        (0.7, math.nan, "diverged"),
        (2.1, 0.125, "overshot"),  # the paper's in 16 steps: lam* = 1/8, 7 times as far off
        (0.5, 0.01, "overshot"),
    ],
)
def test_a_student_that_is_far_off_is_diverged_unless_a_scale_mends_it(rmse, lam, said):
    assert said_of(rmse=rmse, lam_3=lam).startswith(f"WARNING, {said}")


@pytest.mark.parametrize(
    ("rmse", "lam", "said"), [(0.0, 0.5, "inert"), (0.1, 0.5, "overshot"), (0.1, 0.01, "diverged")]
)
def test_a_teacher_at_no_distance_from_itself_still_gets_a_verdict(rmse, lam, said):
    """Its ratio to the student's distance would be a division by zero."""
    assert said_of(rmse=rmse, lam_3=lam, teacher_rmse=0.0).startswith(f"WARNING, {said}")


@pytest.mark.parametrize("rate", [10, 1])
def test_training_that_diverges_ends_at_the_first_validation_and_says_so_again(tmp_path, rate):
    """At once, when the command is repeated, and with nothing saved as a result."""
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run(out, "--learning-rate", rate, "--checkpoint-every", 1)
        said = str(stopped.value)
        assert "\n" not in said
        assert "stopped at iteration 2: WARNING, diverged student" in said
        assert said.endswith("; distil with a lower --learning-rate in another --out")
        # Saved before its validation, with which the same command begins.
        assert len(fd.read_metadata(out / fd.STATE)["rows"]) == 2
        assert not RESULTS & content(out).keys()


def spoil(state: Path, *names: str, factor: float) -> None:
    """Weights of a finished training, as of a version that let them pass."""
    tensors, metadata = load_file(state), fd.read_metadata(state)
    for name in names:
        tensors[name] *= factor
    fd.write_tensors(state, tensors, metadata)


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_nothing_is_saved_where_student_and_ema_diverged(tmp_path, factor):
    setup = prepared(tmp_path / "out")
    train(setup)
    out = setup.run.out
    spoil(setup.run.state, "student", "slow", factor=factor)
    for _ in range(2):
        says("nothing is saved: WARNING, diverged student.*lower --learning-rate", "--out", out)
        assert not RESULTS & content(out).keys()


@pytest.mark.parametrize(
    ("bad", "saved"), [("student", "slow EMA of the student"), ("slow", "student")]
)
def test_of_a_diverged_and_a_sound_one_the_sound_one_is_saved(tmp_path, bad, saved):
    setup = prepared(tmp_path / "out")
    train(setup)
    out = setup.run.out
    spoil(setup.run.state, bad, factor=math.nan)
    run(out)
    adapter = fd.read_metadata(setup.run.lora)
    assert adapter["weights"] == saved
    assert "diverged" not in adapter["note"]
    assert all(x.isfinite().all() for x in load_file(setup.run.lora).values())
    results = json.loads((out / "results.json").read_text())
    assert all(math.isfinite(row["rmse"] * row["scale"]) for row in results["table"])


@pytest.mark.parametrize(
    ("nearer", "said"), [("student", "student"), ("slow", "slow EMA of the student")]
)
def test_of_two_sound_ones_the_one_that_ends_nearer_is_saved(tmp_path, nearer, said):
    setup = prepared(tmp_path / "out")
    validation, state = train(setup)

    def search(weights, steps):
        return (0.01 if torch.equal(weights, state.weights[nearer]) else 0.02, 1.23)

    validation.search = search
    fd.calibrate(setup.settings, setup.run, validation, state)
    assert fd.read_metadata(setup.run.lora)["weights"] == said
    saved = load_file(setup.run.lora)
    expected = validation.lora.named(state.weights[nearer])
    torch.testing.assert_close(
        saved, {f"transformer.{name}": x for name, x in expected.items()}, rtol=0, atol=0
    )


# ----------------------------------------------------------------------------------- the best scale


class Line(fd.Validation):
    """Ends that lie on a line, at `place(scale)`; the teacher's fine ones at 0."""

    def __init__(self, lam: float, place):
        self.fine = torch.zeros(2)
        self.number = lam
        self.place = place
        self.tried = []

    def lam(self, weights, steps):
        return self.number

    def end(self, weights, steps, scale=1.0):
        self.tried.append(scale)
        return torch.full((2,), float(self.place(scale)))


@pytest.mark.parametrize("lam", [0.01, 0.3, 1, 4.9, 60, math.inf, -math.inf, math.nan, -3])
@pytest.mark.parametrize("best", [0.2, 1, 1.7, 6])
def test_a_search_finds_the_best_scale_from_any_start(lam, best):
    line = Line(lam, lambda scale: scale - best)
    distance, scale = line.search([], 3)
    assert abs(scale - best) < 0.05 * best
    assert distance == pytest.approx(abs(scale - best))
    low, high = fd.SCALES
    assert all(low <= x <= high for x in line.tried)


def test_a_good_start_takes_nine_samplings():
    line = Line(1.1, lambda scale: scale - 1)
    line.search([], 3)
    assert len(line.tried) == 9


@pytest.mark.parametrize(("best", "edge"), [(-1, 0.05), (100, 8.0)])
def test_a_search_whose_best_lies_outside_ends_at_its_edge(best, edge):
    line = Line(1.0, lambda scale: scale - best)
    assert line.search([], 3) == (pytest.approx(abs(edge - best)), edge)


def test_a_scale_that_gives_nan_is_never_the_best():
    nan_above = Line(1.0, lambda scale: math.nan if scale > 1 else scale - 2)
    assert nan_above.search([], 3) == (1, 1)


def test_where_every_scale_gives_nan_the_distance_is_infinite():
    nan_everywhere = Line(1.0, lambda scale: math.nan)
    assert nan_everywhere.search([], 3)[0] == math.inf


@pytest.mark.parametrize("rate", [1e-9, 1e-7])
def test_an_inert_student_gets_no_scale(tmp_path, capsys, rate):
    out = tmp_path / "out"
    run(out, "--learning-rate", rate)
    adapter = fd.read_metadata(out / fd.LORA)
    assert adapter["scales"] == {"2": 1.0, "3": 1.0}
    assert adapter["uncalibrated"] == [2, 3]
    card, printed = (out / "README.md").read_text(), capsys.readouterr().out
    for said in (adapter["note"], card, printed):
        assert "WARNING, inert student" in said
        assert (
            "For 2 or 3 steps no scale between 0.05 and 8 is a clear optimum: 1 is a placeholder"
            in said
        )
    for said in (card, printed):
        assert said.count("| its scale | none found | none found |") == 1


@pytest.mark.parametrize("edge", fd.SCALES)
def test_a_scale_at_the_edge_is_not_recommended(tmp_path, monkeypatch, edge):
    """In one number of steps; the other keeps its own."""
    out = tmp_path / "out"
    found = {2: (0.01, edge), 3: (0.01, 1.23)}
    monkeypatch.setattr(fd.Validation, "search", lambda self, weights, steps: found[steps])
    run(out)
    adapter = fd.read_metadata(out / fd.LORA)
    assert adapter["scales"] == {"2": 1.0, "3": 1.23}
    assert adapter["uncalibrated"] == [2]
    assert "For 2 steps no scale" in adapter["note"]
    assert "| its scale | none found | 1.23 |" in (out / "README.md").read_text()


@pytest.mark.parametrize("scale, helps", [(0.8, True), (1.2, False), (fd.SCALES[0], False)])
def test_a_scale_that_would_go_further_is_no_advice_on_overshoot(
    tmp_path, monkeypatch, scale, helps
):
    found = {2: (0.01, 1.1), 3: (0.01, scale)}
    monkeypatch.setattr(fd.Validation, "search", lambda self, weights, steps: found[steps])
    told = []
    verdict = fd.verdict

    def noted(*args, **kwargs):
        told.append(kwargs)
        return verdict(*args, **kwargs)

    monkeypatch.setattr(fd, "verdict", noted)
    run(tmp_path / "out")
    assert told[-1] == {"scale_helps": helps}


# ------------------------------------------------------------------------------------- not a number


def test_nan_at_the_recommended_scale_saves_nothing(tmp_path, monkeypatch):
    """On other prompts and noises than those that chose the scale."""
    out = tmp_path / "out"
    held_out = fd.Cache.held_out

    def spoiled(self, texts, purpose):
        cond, noise = held_out(self, texts, purpose)
        if purpose == "check":
            noise = noise * math.nan
        return cond, noise

    monkeypatch.setattr(fd.Cache, "held_out", spoiled)
    says("nothing is saved: at scale .* NaN or infinity.*another --out", "--out", out)
    assert not RESULTS & content(out).keys()


def test_nan_in_the_comparison_ends_it(tmp_path, monkeypatch):
    out = tmp_path / "out"
    sample = fd.stock_sample

    def spoiled(model, noise, steps, *more):
        latents = sample(model, noise, steps, *more)
        compares = len(noise) == 4  # two texts, two noises; the self-check has one text
        return latents * math.nan if compares and steps == 2 else latents

    monkeypatch.setattr(fd, "stock_sample", spoiled)
    says("gives NaN or infinity in 2 steps at scale 0: .*lower --learning-rate", "--out", out)
    assert RESULTS & content(out).keys() == {fd.LORA}
