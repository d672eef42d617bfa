"""flux_distill.py, training: the generator, its state, what is drawn, stops and resumed runs."""

import csv
import math
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import copied, fd, new_lora, prepared, run, same_run, train
from torch import Tensor
from torch.testing import assert_close

import shortcut as sc


def begun(setup: SimpleNamespace, **change) -> tuple[Iterator[int], fd.TrainState, fd.LoRA]:
    """Training at its beginning, as an iterator; `change`: other settings."""
    settings = fd.replace(setup.settings, **change)
    lora = new_lora(setup, **change)
    state = fd.TrainState(lora.loaded_weights(), fd.config_of(settings))
    steps = fd.train(settings, setup.cache, fd.read_pool(setup.cache), lora, state)
    return steps, state, lora


def rows_of_log(out) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------- a generator, its state


def test_a_caller_may_leave_training_and_resume_it(setup, done):
    """It yields after each step, first of all the last one before; nothing is done twice."""
    steps, state, lora = begun(setup)
    seen = []
    for iteration in steps:
        seen.append(iteration)
        assert state.iteration == iteration
        if iteration == 2:
            break
    assert seen == [1, 2]
    assert not setup.run.state.exists()

    pool = fd.read_pool(setup.cache)
    rest = list(fd.train(setup.settings, setup.cache, pool, lora, state))
    assert rest == [2, 3, 4]
    saved = load_file(done / fd.STATE)
    for name, weights in state.weights.items():
        assert torch.equal(weights, saved[name])
    log = rows_of_log(done)
    assert [row["loss"] for row in state.rows] == [float(row["loss"]) for row in log]


@pytest.mark.parametrize("paper", [False, True], ids=["default", "--paper"])
def test_a_state_is_saved_and_loaded_to_the_bit(setup, tmp_path, paper):
    steps, state, lora = begun(setup, paper=paper)
    for iteration in steps:
        if iteration == 3:
            break
    state.checks = {"gradient": 0.0123}
    elsewhere = fd.replace(setup.run, out=tmp_path)
    state.save(elsewhere)
    assert state.saved == 3

    loaded = fd.TrainState(
        torch.zeros_like(state.student), fd.config_of(fd.replace(setup.settings, paper=paper))
    )
    loaded.load(elsewhere.state)
    assert (loaded.rows, loaded.checks) == (state.rows, state.checks)
    assert loaded.saved == loaded.iteration == 3
    assert loaded.weights.keys() == state.weights.keys()
    assert len(loaded.weights) == (3 if paper else 2)
    for name, weights in state.weights.items():
        assert torch.equal(loaded.weights[name], weights)
    ours = state.optimizer.state[state.student]
    theirs = loaded.optimizer.state[loaded.student]
    assert ours.keys() == theirs.keys() == {"step", *fd.MOMENTS}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert fd.read_metadata(elsewhere.state)["settings"] == setup.run.identity

    settings = fd.replace(setup.settings, paper=paper)
    pool = fd.read_pool(setup.cache)
    assert list(fd.train(settings, setup.cache, pool, lora, state)) == [3, 4]
    assert list(fd.train(settings, setup.cache, pool, lora, loaded)) == [3, 4]
    assert all(torch.equal(loaded.weights[name], state.weights[name]) for name in state.weights)
    assert loaded.rows == state.rows


def test_a_loaded_state_is_no_mapping_of_its_file(setup, tmp_path):
    """What overwrites the file in place, a copy by a user say, leaves training alone."""
    steps, state, _ = begun(setup)
    next(steps)
    elsewhere = fd.replace(setup.run, out=tmp_path)
    state.save(elsewhere)
    loaded = fd.TrainState(torch.zeros_like(state.student), fd.config_of(setup.settings))
    loaded.load(elsewhere.state)
    size = elsewhere.state.stat().st_size
    with open(elsewhere.state, "rb+") as file:
        file.write(b"\x7f" * size)
    for name, weights in state.weights.items():
        assert torch.equal(loaded.weights[name], weights)
    ours = state.optimizer.state[state.student]
    theirs = loaded.optimizer.state[loaded.student]
    for name in fd.MOMENTS:
        assert ours[name].any()
        assert torch.equal(theirs[name], ours[name])


def test_the_file_of_a_state_has_float32_and_nothing_else(setup, done):
    tensors = load_file(done / fd.STATE)
    assert tensors.keys() == {"student", "slow", *fd.MOMENTS}
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    assert {x.shape for x in tensors.values()} == {new_lora(setup).loaded_weights().shape}


def test_the_base_stays_and_only_the_lora_is_trained(setup):
    steps, state, lora = begun(setup)
    ours = {id(p) for p in lora.params}
    base = {name: p for name, p in lora.net.named_parameters() if id(p) not in ours}
    before = {name: p.clone() for name, p in base.items()}
    start = state.student.clone()
    for _ in steps:
        pass
    assert all(torch.equal(before[name], p) for name, p in base.items())
    assert not any(p.requires_grad or p.grad is not None for p in base.values())
    assert len(base) + len(lora.params) == len(list(lora.net.parameters()))
    (group,) = state.optimizer.param_groups
    assert len(group["params"]) == 1
    assert group["params"][0] is state.student
    assert state.student.dtype == torch.float32
    changed = state.student != start
    assert all(part.any() for part in changed.split([p.numel() for p in lora.params]))


# ------------------------------------------------------------------------------- optimizer and EMAs


def test_the_learning_rate_warms_up(setup):
    """The first step of AdamW moves every weight that has a gradient by the learning rate."""
    steps, state, _ = begun(setup, warmup=3, learning_rate=1e-3)
    start = state.student.clone()
    next(steps)
    moved = (state.student - start).abs().max().item()
    assert moved == pytest.approx(1e-3 / 3, rel=1e-2)
    list(steps)
    rates = [row["learning_rate"] for row in state.rows]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


def gradients_of_passes(setup: SimpleNamespace, passes: int, **change) -> list[Tensor]:
    """Gradient of each pass of the first iteration, by itself."""
    settings = fd.replace(setup.settings, **change)
    lora = new_lora(setup, **change)
    state = fd.TrainState(lora.loaded_weights(), fd.config_of(settings))
    pool = fd.read_pool(setup.cache)
    U = torch.rand(1, generator=fd.keyed(settings.seed, "fraction", 1)).item()
    gradients = []
    for number in range(passes):
        generator = fd.keyed(settings.seed, "train", 1, number)
        batch = fd.draw_batch(settings, setup.cache, pool, generator)
        U_of_pass = (U + number / passes) % 1
        loss, _ = fd.loss_of(lora, state, *batch, U_of_pass, generator)
        loss.backward()
        lora.move_gradients(state.student, 1.0)
        gradients.append(state.student.grad)
        state.student.grad = None
    return gradients


@pytest.mark.parametrize("paper", [False, True], ids=["default", "--paper"])
def test_a_step_takes_the_mean_gradient_of_its_passes(setup, paper):
    """AdamW's first moment holds a tenth of the first gradient."""
    change = {"accumulate": 3, "paper": paper}
    steps, state, _ = begun(setup, **change)
    next(steps)
    gradient = 10 * state.optimizer.state[state.student]["exp_avg"]
    passes = gradients_of_passes(setup, 3, **change)
    assert_close(gradient, torch.stack(passes).mean(0), rtol=1e-4, atol=1e-8)
    assert (passes[0] - passes[1]).norm() > 0.1 * passes[0].norm()
    norm = torch.stack(passes).mean(0).norm().item()
    assert state.rows[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_emas_follow_the_student_once_a_step_in_float32(setup, accumulate):
    """By hand, from the students of 12 steps: the decay is i / (i + 4), until its own is less."""
    steps, state, _ = begun(setup, paper=True, iterations=12, accumulate=accumulate)
    assert state.decays == {"fast": 0.99, "slow": 0.999}  # the paper's
    state.decays.update(fast=0.5, slow=0.7)
    by_hand = {name: state.student.double() for name in state.decays}
    for i in steps:
        for name, decay in state.decays.items():
            factor = min(decay, i / (i + 4))
            by_hand[name] = factor * by_hand[name] + (1 - factor) * state.student.double()
    for name, ema in by_hand.items():
        assert state.weights[name].dtype == torch.float32
        assert_close(state.weights[name].double(), ema, rtol=1e-4, atol=1e-8)
    assert (state.weights["fast"] - state.weights["slow"]).abs().max() > 1e-4
    assert (state.weights["fast"] - state.student).abs().max() > 1e-4


def test_matched_windows_need_the_slow_ema_alone(setup):
    _, state, _ = begun(setup)
    assert state.decays == {"slow": 0.999}
    assert state.weights.keys() == {"student", "slow"}


def test_passes_of_a_step_have_the_papers_fraction_of_teacher_rows(setup, monkeypatch):
    """0.4 of five passes of four rows: eight, in every iteration."""
    counts = []
    draw = sc.sample_windows

    def counting(*args, **kwargs):
        windows = draw(*args, **kwargs)
        counts.append(windows.teacher_rows)
        return windows

    monkeypatch.setattr(fd.sc, "sample_windows", counting)
    steps, _, _ = begun(setup, paper=True, accumulate=5)
    for _ in steps:
        assert sum(counts) == 8
        assert len(counts) == 5
        counts.clear()


def passes_noted(monkeypatch) -> list[tuple[float, dict[str, float]]]:
    """A list that the loss and the log of each pass are added to."""
    noted = []
    loss_of = fd.loss_of

    def noting(*args):
        loss, log = loss_of(*args)
        noted.append((loss.item(), {name: value.item() for name, value in log.items()}))
        return loss, log

    monkeypatch.setattr(fd, "loss_of", noting)
    return noted


def test_the_log_has_means_over_the_passes_that_have_such_rows(setup, monkeypatch):
    """Of passes of one row, which is the teacher's or the student's own."""
    noted = passes_noted(monkeypatch)
    steps, state, _ = begun(setup, paper=True, batch=1, accumulate=4)
    for iteration in steps:
        row = state.rows[iteration - 1]
        losses = [loss for loss, _ in noted]
        assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
        for name in ("teacher_loss", "self_loss"):
            values = [log[name] for _, log in noted if not math.isnan(log[name])]
            assert 1 <= len(values) <= 3
            assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
        noted.clear()


def test_the_log_leaves_out_the_loss_of_rows_that_no_pass_had(tmp_path, monkeypatch):
    """Of one row in each iteration."""
    noted = passes_noted(monkeypatch)
    setup = prepared(tmp_path / "out", "--paper", "--batch", 1, "--iterations", 8)
    train(setup)
    rows = rows_of_log(setup.run.out)
    assert len(rows) == len(noted) == 8
    for row, (loss, log) in zip(rows, noted):
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-5)
        for name in ("teacher_loss", "self_loss"):
            if math.isnan(log[name]):
                assert row[name] == ""
            else:
                assert float(row[name]) == pytest.approx(loss, rel=1e-5)
    of_teacher = [row for row in rows if row["teacher_loss"]]
    assert 1 <= len(of_teacher) <= 7


def test_a_loss_of_one_pass_that_is_not_a_number_stops_before_the_step(setup, monkeypatch):
    """Also where its gradient is finite."""
    count = []
    loss_of = fd.loss_of

    def bad(*args):
        loss, log = loss_of(*args)
        count.append(1)
        return (loss + math.nan if len(count) == 2 else loss), log

    monkeypatch.setattr(fd, "loss_of", bad)
    steps, state, _ = begun(setup, paper=True, batch=1, accumulate=4)
    start = state.student.clone()
    with pytest.raises(SystemExit, match=r"iteration 1: loss nan, gradient norm [0-9.]+\. Stopped"):
        next(steps)
    assert len(count) == 4
    assert torch.equal(state.student, start)


# -------------------------------------------------------------------------------------------- draws


def test_guidance_is_drawn_for_each_row_over_its_whole_range(setup):
    pool = {(4, 8, 8): [(0, torch.zeros(4, 8, 8))]}
    draws = []
    for i in range(200):
        _, _, cond = fd.draw_batch(setup.settings, setup.cache, pool, fd.keyed(i))
        draws.append(cond["guidance"])
    guidance = torch.cat(draws)
    assert 0 <= guidance.min() < 0.2
    assert 7.8 < guidance.max() <= 8
    assert abs(guidance.mean() - 4) < 0.3
    assert len(guidance.unique()) > 700


def test_batches_have_one_shape_and_every_pair_is_as_likely(setup):
    """Three square pairs and a wide one, told apart by their values."""
    square = [(0, torch.full((4, 8, 8), float(i))) for i in range(3)]
    pool = {(4, 8, 8): square, (4, 4, 16): [(1, torch.full((4, 4, 16), 3.0))]}
    counts = torch.zeros(4)
    for i in range(400):
        x_0, noise, cond = fd.draw_batch(setup.settings, setup.cache, pool, fd.keyed(i))
        assert noise.shape == x_0.shape
        texts = setup.cache.read("text", [int(x_0.shape[2] == 4)] * 4)["text"]
        assert torch.equal(cond["text"], texts)
        counts += torch.bincount(x_0[:, 0, 0, 0].long(), minlength=4)
    assert_close(counts / 1600, torch.full((4,), 0.25), rtol=0, atol=0.08)


def test_each_row_has_noise_of_its_own(setup):
    pool = {(4, 8, 8): [(0, torch.zeros(4, 8, 8))]}
    _, noise, _ = fd.draw_batch(setup.settings, setup.cache, pool, fd.keyed(0))
    gram = torch.corrcoef(noise.flatten(1))
    assert_close(gram, torch.eye(4), rtol=0, atol=0.3)
    assert noise.std() == pytest.approx(1, abs=0.15)


def test_draws_depend_on_their_key_alone():
    """Seed, purpose, iteration and pass."""
    keys = [(0, "train", 1, 0), (1, "train", 1, 0), (0, "train", 2, 0), (0, "train", 1, 1)]
    draws = [torch.rand(3, generator=fd.keyed(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == 4
    assert torch.rand(3, generator=fd.keyed(*keys[0])).tolist() == draws[0]


def test_every_pass_of_every_iteration_draws_again(setup, monkeypatch):
    seeds = []
    draw = fd.draw_batch

    def noting(settings, cache, pool, generator):
        seeds.append(generator.initial_seed())
        return draw(settings, cache, pool, generator)

    monkeypatch.setattr(fd, "draw_batch", noting)
    steps, _, _ = begun(setup, accumulate=2, iterations=3)
    assert list(steps) == [1, 2, 3]
    assert len(seeds) == len(set(seeds)) == 6


# ------------------------------------------------------------------------------ stops, resumed runs


@pytest.mark.parametrize("moment", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_is_as_if_undisturbed(done, tmp_path, monkeypatch, moment):
    """The signal arrives during an iteration; whatever iteration it is."""
    out = tmp_path / "out"
    count = []
    real = sc.shortcut_loss

    def interrupting(*args, **kwargs):
        count.append(1)
        if len(count) == moment:
            os.kill(os.getpid(), signal.SIGINT if moment == 1 else signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", interrupting)
    with pytest.raises(SystemExit, match=f"stopped after iteration {moment}; the same command"):
        run(out)
    run(out)
    assert len(count) == 4  # no iteration was done twice
    assert same_run(out, done)


def die_in_iteration(moment: int, monkeypatch) -> None:
    """Let the process end there, with nothing saved on the way out; later it is sound again."""
    count = []
    real = sc.shortcut_loss

    def dying(*args, **kwargs):
        count.append(1)
        if len(count) == moment:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", dying)


def test_killed_between_checkpoints_is_as_if_undisturbed(done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    die_in_iteration(4, monkeypatch)
    with pytest.raises(MemoryError):
        run(out)
    assert len(fd.read_metadata(out / fd.STATE)["rows"]) == 2
    run(out)
    assert same_run(out, done)


@pytest.mark.parametrize(("flags", "saved"), [
    ("--checkpoint-every 3 --validate-every 4", 3),
    ("--checkpoint-every 4 --validate-every 2", 2),
])  # fmt: skip
def test_checkpoints_and_validations_are_saved(tmp_path, monkeypatch, flags, saved):
    die_in_iteration(4, monkeypatch)
    with pytest.raises(MemoryError):
        run(tmp_path / "out", *flags.split())
    assert len(fd.read_metadata(tmp_path / "out" / fd.STATE)["rows"]) == saved


def test_a_checkpoint_before_the_first_validation_has_its_log(tmp_path, monkeypatch):
    out = tmp_path / "out"
    die_in_iteration(4, monkeypatch)
    with pytest.raises(MemoryError):
        run(out, "--checkpoint-every", 3, "--validate-every", 4)
    rows = rows_of_log(out)
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == [
        row["loss"] for row in fd.read_metadata(out / fd.STATE)["rows"]
    ]


def test_a_stop_before_the_first_validation_leaves_a_log(tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = sc.shortcut_loss

    def interrupting(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", interrupting)
    with pytest.raises(SystemExit, match="stopped after iteration 1"):
        run(out)
    (row,) = rows_of_log(out)
    assert row["iteration"] == "1"
    assert math.isfinite(float(row["loss"]))


def test_not_a_number_stops_before_the_step(done, tmp_path, monkeypatch):
    """The checkpoint of iteration 2 is as it was, and a sound machine resumes there."""
    out = tmp_path / "out"
    count = []
    real = sc.shortcut_loss

    def bad(*args, **kwargs):
        loss, log = real(*args, **kwargs)
        count.append(1)
        return (loss * math.nan if len(count) == 3 else loss), log

    monkeypatch.setattr(fd.sc, "shortcut_loss", bad)
    sentence = "iteration 3: loss nan.*last checkpoint is kept; try a lower --learning-rate"
    with pytest.raises(SystemExit, match=sentence):
        run(out)
    assert len(fd.read_metadata(out / fd.STATE)["rows"]) == 2
    assert not (out / fd.LORA).exists()
    run(out)
    assert (out / "log.csv").read_bytes() == (done / "log.csv").read_bytes()


def test_a_lost_lora_is_made_from_the_checkpoint_without_training(done, tmp_path):
    out = copied(done, tmp_path / "moved")
    before = (out / fd.STATE).stat().st_mtime_ns
    (out / fd.LORA).unlink()
    run(out)
    assert same_run(out, done)
    assert (out / fd.STATE).stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------- when it is done


def has_matched(*lams: float, rmse: float = 0.1) -> bool:
    """With the paper's windows."""
    rows = [{"lam_3": lam, "rmse": rmse, "teacher_rmse": 0.3} for lam in lams]
    return fd.has_matched(fd.Settings(student_steps=3, paper=True), [{"loss": 1.0}, *rows])


def has_settled(*errors: float) -> bool:
    """With matched windows, where lam* is 1 all the time."""
    rows = [{"lam_3": 1.0, "rmse": error, "teacher_rmse": 0.3} for error in errors]
    return fd.has_matched(fd.Settings(student_steps=3), [{"loss": 1.0}, *rows])


def test_a_student_of_the_papers_windows_has_matched_when_lam_has_come_down_to_1_05():
    assert has_matched(3.0, 1.04)
    assert not has_matched(3.0, 1.2)
    assert not has_matched(math.inf)


def test_a_student_that_has_not_learned_has_not_matched():
    assert not has_matched(-0.5)
    assert not has_matched(3.0, 1.04, rmse=0.3)  # lam* of rounding noise: still the teacher
    assert not has_settled(*[0.3] * 12)


def test_a_student_of_the_papers_windows_has_matched_when_lam_stalls_over_ten_validations():
    assert has_matched(*[2.0] * 10)
    assert not has_matched(*[2.0] * 9)
    assert not has_matched(*[2 - 0.1 * i for i in range(10)])


def test_matched_windows_train_until_the_error_stalls_whatever_lam_is():
    """On the tiny Flux lam* is near 1 after 20 iterations, long before the student is good."""
    assert not has_settled(0.25)
    assert not has_settled(*[0.25 - 0.01 * i for i in range(15)])
    assert has_settled(*[0.2] * 10)
    assert not has_settled(*[0.2] * 9)


def test_stop_when_matched_ends_training_at_a_validation(tmp_path, monkeypatch):
    """Here every student has learned, and is matched from the second validation on."""
    lams = iter([2.0, 1.0, 2.0])

    def measure(*_):
        return {"lam_2": 3.0, "lam_3": next(lams), "teacher_rmse": 0.3, "rmse": 0.1}

    monkeypatch.setattr(fd.Validation, "measure", measure)
    flags = ["--stop-when-matched", "--iterations", 6, "--paper"]
    _, state = train(prepared(tmp_path / "out", *flags))
    assert state.done
    assert state.iteration == 4
    saved = fd.read_metadata(tmp_path / "out" / fd.STATE)
    assert len(saved["rows"]) == 4

    _, again = train(prepared(tmp_path / "out", *flags))  # as the file says
    assert again.done
    assert again.iteration == 4


def test_without_that_flag_a_matched_student_trains_on(tmp_path, monkeypatch):
    row = {"lam_2": 1.0, "lam_3": 1.0, "teacher_rmse": 0.3, "rmse": 0.1}
    monkeypatch.setattr(fd.Validation, "measure", lambda *_: dict(row))
    _, state = train(prepared(tmp_path / "out"))
    assert state.iteration == 4
