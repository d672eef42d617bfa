"""The verdict on a student, its scale, and the model card that recommends it."""

import json
import math
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
from tiny_runs import content, fd, prepared, run, says

# --------------------------------------------------------------------------- diverged, inert, scale

ROW = {"lam_3": 1.0, "rmse": 0.1, "teacher_rmse": 0.3}


def verdict(**change):
    return fd.verdict(Namespace(student_steps=3), ROW | change)


@pytest.mark.parametrize("rmse", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lam", [0.5, math.nan, -1e-11])
def test_a_student_that_is_not_finite_is_diverged(rmse, lam):
    said = verdict(rmse=rmse, lam_3=lam)
    assert said.startswith("ALARM, diverged student: in 3 steps its latents hold NaN or infinity")
    assert said.endswith("; distil with a lower --learning-rate in another --out")
    assert "train longer" not in said


def test_far_off_is_diverged_and_overshot_is_not():
    """A student of lam* = 1/8, the paper's in 16 steps, ends 7 times as far off."""
    assert "diverged" in verdict(rmse=0.7, lam_3=0.01)
    assert "diverged" in verdict(rmse=0.7, lam_3=math.nan)
    assert "overshot" in verdict(rmse=2.1, lam_3=0.125)
    assert "overshot" in verdict(rmse=0.5, lam_3=0.01)


def lines_of(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("rate", [1, 0.1])
def test_training_that_diverges_ends_at_the_first_validation_and_says_so_again(tmp_path, rate):
    """At once, at the same command, and with nothing saved as a result."""
    out = tmp_path / "out"
    more = ("--learning-rate", rate, "--checkpoint-every", 1)
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            run(out, *more)
        said = lines_of(error)
        assert "stopped at iteration 2: ALARM, diverged student" in said
        assert said.endswith("; distil with a lower --learning-rate in another --out")
        assert len(fd.read_metadata(out / "checkpoint/state.safetensors")["rows"]) == 1
        assert not {fd.LORA, "README.md", "results.json"} & set(content(out))


def spoil(out: Path, *names: str, factor: float) -> None:
    """Weights of a finished training, as of a version that let them pass."""
    path = out / "checkpoint/state.safetensors"
    tensors, metadata = fd.load_file(path), fd.read_metadata(path)
    spoiled = {n: x * factor if n.split(".")[0] in names else x for n, x in tensors.items()}
    fd.write_tensors(path, spoiled, metadata)


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_nothing_is_saved_where_student_and_average_diverged(tmp_path, factor):
    args = prepared(tmp_path / "out")
    fd.train(args)
    spoil(args.out, "student", "slow", factor=factor)
    for _ in range(2):
        says("nothing is saved: ALARM, diverged student.*lower --learning-rate", "--out", args.out)
        assert not {fd.LORA, "README.md", "results.json"} & set(content(args.out))


@pytest.mark.parametrize("bad", ["student", "slow"], ids=["the student", "its average"])
def test_of_a_diverged_student_and_a_sound_average_the_sound_one_is_saved(tmp_path, bad):
    args = prepared(tmp_path / "out")
    fd.train(args)
    spoil(args.out, bad, factor=math.nan)
    run(args.out)
    adapter = fd.read_metadata(args.out / fd.LORA)
    assert ("slow" in adapter["weights"]) == (bad == "student")
    assert "diverged" not in adapter["note"]
    assert all(x.isfinite().all() for x in fd.load_file(args.out / fd.LORA).values())
    results = json.loads((args.out / "results.json").read_text())
    assert all(math.isfinite(row["rmse"] * row["scale"]) for row in results["table"])


class Line(fd.Validation):
    """Ends that lie on a line, at `end(scale)`; the teacher's fine ones at 0."""

    def __init__(self, lam: float, end):
        self.fine, self.number, self.place, self.tried = torch.zeros(2), lam, end, []

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
    assert abs(scale - best) < 0.15 * best and distance == pytest.approx(abs(scale - best))
    assert all(fd.SCALES[0] <= x <= fd.SCALES[1] for x in line.tried)


def test_a_good_start_takes_nine_ends():
    line = Line(1.1, lambda scale: scale - 1)
    line.search([], 3)
    assert len(line.tried) <= 10


@pytest.mark.parametrize(("best", "edge"), [(-1, 0.05), (100, 8.0)])
def test_a_search_whose_best_lies_outside_ends_at_its_edge(best, edge):
    assert Line(1.0, lambda scale: scale - best).search([], 3)[1] == edge


def test_a_scale_that_gives_nan_is_never_the_best():
    nan_above = Line(1.0, lambda scale: math.nan if scale > 1 else scale - 2)
    distance, scale = nan_above.search([], 3)
    assert scale == 1 and distance == 1
    assert Line(1.0, lambda scale: math.nan).search([], 3)[0] == math.inf


@pytest.mark.parametrize("rate", [1e-9, 1e-7])
def test_an_inert_student_gets_no_scale(tmp_path, capsys, rate):
    run(tmp_path / "out", "--learning-rate", rate)
    adapter = fd.read_metadata(tmp_path / "out" / fd.LORA)
    card = (tmp_path / "out" / "README.md").read_text()
    printed = capsys.readouterr().out
    assert adapter["scales"] == {"2": 1.0, "3": 1.0} and adapter["uncalibrated"] == [2, 3]
    for said in (adapter["note"], card, printed):
        assert "ALARM, inert student" in said
        assert "For 2 or 3 steps no scale from 0.05 to 8 was best: 1 stands in its place" in said
    assert "| its scale | none found | none found |" in card and printed.count("none found") == 2


@pytest.mark.parametrize("edge", fd.SCALES)
def test_a_scale_at_the_edge_is_not_recommended(tmp_path, monkeypatch, edge):
    """In one number of steps; the other keeps its own."""
    monkeypatch.setattr(
        fd.Validation, "search", lambda self, weights, n: (0.01, edge if n == 2 else 1.23)
    )
    run(tmp_path / "out")
    adapter = fd.read_metadata(tmp_path / "out" / fd.LORA)
    assert adapter["scales"] == {"2": 1.0, "3": 1.23} and adapter["uncalibrated"] == [2]
    assert "For 2 steps no scale" in adapter["note"]
    assert "| its scale | none found | 1.23 |" in (tmp_path / "out" / "README.md").read_text()


def test_nan_in_the_comparison_ends_it(tmp_path, monkeypatch):
    def spoiled(args, pipe, cond, noise, steps):
        latents = sample(args, pipe, cond, noise, steps)
        return latents * math.nan if steps == 2 and len(noise) == 4 else latents

    sample = fd.sample
    args = prepared(tmp_path / "out")
    fd.train(args)
    fd.calibrate(args)
    monkeypatch.setattr(fd, "sample", spoiled)
    with pytest.raises(SystemExit, match=r"NaN or infinity in 2 steps.*lower --learning-rate"):
        fd.compare(args)
    assert not (args.out / "results.json").exists() and not (args.out / "README.md").exists()
