"""The variants of tests/benchmarks/ablations.py are what their names say."""

import sys
from pathlib import Path

import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import ablations
import toy as bench

import shortcut as sc
import toy_2d

FLAT = sc.ShortcutConfig(shift_range=(1, 1))
MATCHED = sc.MatchedConfig(3, shift_range=(1, 1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_variants_train_as_the_toy_does():
    """The first line of the table, and the paper's."""
    torch.manual_seed(0)
    teacher = toy_2d.VelocityMLP().requires_grad_(False)
    shipped, *others = ablations.VARIANTS
    paper = next(some for some in others if "(the paper)" in some.name)
    for variant in (shipped, paper):
        student = ablations.train(variant, teacher, toy_2d.moons, 4, seed=0)
        same = toy_2d.distil(teacher, toy_2d.moons, variant.config, 4, seed=0)[4]
        for weight, expected in zip(student.parameters(), same.parameters()):
            assert torch.equal(weight, expected)


def test_equal_halves_have_the_required_lookahead():
    """On average over the rows that start at a time, if the student looks 1/6 ahead everywhere."""
    means = []
    t, t_mid, t_end, k, _ = ablations.equal_halves(FLAT, 200_000, seeded())
    assert abs(k / 200_000 - 0.467) < 1e-3
    assert_close(t - t_mid, t_mid - t_end, atol=1e-6, rtol=0)
    for start in (27, 29, 32):
        rows = (32 * t).round() == start
        ahead = (1 / 6 + (1 / 6 + t - t_mid)) / 2
        ahead[:k] = ((1 / 6 + t - t_mid) / 2)[:k]
        means.append(ahead[rows].mean())
    assert_close(torch.stack(means), torch.full((3,), 1 / 6), atol=2e-3, rtol=0)


def test_next_stops_are_the_samplers():
    t, t_mid, t_end, *_ = ablations.to_next_stop(MATCHED, 1000, seeded())
    assert_close(t_end, ((t * 3 - 1e-4).ceil() - 1) / 3, atol=1e-6, rtol=0)
    assert (t > t_mid).all() and (t_mid >= t_end).all()


def test_authors_windows_are_aligned_merges_up_to_the_full_path():
    t, t_mid, t_end, k, _ = ablations.authors_windows(FLAT, 4000, seeded())
    stride = (32 * (t - t_mid))[k:].round()
    assert set(stride.tolist()) == {2.0, 4.0, 8.0, 16.0}
    assert_close(((32 * t_end)[k:] / (2 * stride)).frac(), torch.zeros(4000 - k))
    assert (t <= 1).all() and (t_end >= 0).all()


def test_benchmark_verdicts():
    mean, half = bench.common.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert_close(half, 4.30 / 3**0.5)
    assert bench.verdict([1e-3], [2e-3], [1e-5]) == "yes"
    assert bench.verdict([2e-3], [1e-3], [1e-5]) == "no"
    assert bench.verdict([2e-4], [1e-4], [1e-4]) == "both at the floor"
