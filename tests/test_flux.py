"""flux_distill.py on the tiny Flux: what it leaves behind, what it survives, what it says."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"
from tiny_runs import (
    SHIPPED,
    SMALL,
    TINY,
    content,
    copied,
    edited,
    fd,
    folder_of,
    picture,
    prepared,
    run,
    same_run,
    says,
    train,
)

import shortcut as sc

# ---------------------------------------------------------------------------------------- the model


def test_one_euler_step_is_the_stock_pipelines(args):
    """Times in [0, 1], real guidance, one shift: each wrong one gives another picture."""
    adapter = fd.Adapter(args)
    noise = fd.noises(args, [("a",), ("b",)])
    cond = fd.read(args, "text", [0, 1])
    cond["guidance"] = torch.full((2,), 3.5)
    stock = fd.sample(args, fd.load(args, "fresh"), cond, noise, 3)
    velocity = adapter.velocity(None, args.size)
    ours = sc.euler_sample(velocity, noise, sc.time_grid(3, args.shift), **cond)
    assert_close(ours, stock, rtol=0, atol=2e-5)


def test_a_new_adapter_is_the_teacher_and_a_scale_scales_its_weights(args):
    adapter = fd.Adapter(args)
    x, cond = fd.noises(args, [("a",)]), fd.read(args, "text", [0])
    cond["guidance"], t = torch.ones(1), torch.ones(1)
    weights = adapter.switch.weights.clone()
    with torch.no_grad():
        base = adapter.velocity(None, args.size)(x, t, **cond)
        assert_close(adapter.velocity(weights, args.size)(x, t, **cond), base)  # B = 0
        weights = weights + 0.1
        adapter.use(weights, 0.5)
        guided = dict(guidance=cond["guidance"], pooled_projections=cond["pooled"])
        ids = fd.FluxPipeline._prepare_latent_image_ids(1, *args.size, "cpu", torch.float32)
        half = adapter.net(
            hidden_states=x, timestep=t, encoder_hidden_states=cond["text"], img_ids=ids,
            txt_ids=torch.zeros(cond["text"].shape[1], 3), **guided,
        ).sample  # fmt: skip
        scaled = weights.clone()
        scaled[adapter.switch.first_B :] *= 0.5
        assert_close(adapter.velocity(scaled, args.size)(x, t, **cond), half)
        assert (half - base).abs().max() > 0.01
        assert torch.equal(adapter.velocity(None, args.size)(x, t, **cond), base)


def gradients(args, recompute_every: int, config: sc.ShortcutConfig) -> torch.Tensor:
    args.loaded = (None, None)
    adapter = fd.Adapter(args)
    adapter.recompute(recompute_every)
    student, fast, slow = weight_sets(adapter)
    loss_of(args, adapter, student, fast, slow, config).backward()
    adapter.move_gradients(student, 1.0)
    return student.grad


def weight_sets(adapter):
    """Three different sets of weights, all away from the teacher."""
    generator = torch.Generator().manual_seed(0)
    start = adapter.switch.weights.clone()
    return [start + 0.05 * torch.randn(start.shape, generator=generator) for _ in range(3)]


def batch_of(args, config):
    x_0, cond = fd.noises(args, [(i,) for i in range(4)]), fd.read(args, "text", range(4))
    cond["guidance"] = torch.tensor([0.0, 2.0, 4.0, 8.0])
    windows = sc.sample_windows(config, 4, U=0.5, generator=torch.Generator().manual_seed(0))
    return windows, x_0, fd.noises(args, [(i, i) for i in range(4)]), cond


def loss_of(args, adapter, student, fast, slow, config):
    windows, x_0, noise, cond = batch_of(args, config)
    sets = dict(student=student, fast=fast, slow=slow, teacher=None)
    velocities = {name: adapter.velocity(ws, args.size) for name, ws in sets.items()}
    return sc.shortcut_loss(config, windows, x_0, noise, **velocities, **cond)[0]


def test_gradients_are_equal_whichever_blocks_are_recomputed(args):
    plain, *recomputed = (gradients(args, every, args.config) for every in (0, 1, 2, 3))
    for gradient in recomputed:
        assert_close(plain, gradient, rtol=0, atol=1e-7)
    sizes = [p.numel() for p in fd.Adapter(args).params]
    assert all(part.abs().max() > 0 for part in plain.split(sizes))


@pytest.mark.parametrize("config", [sc.ShortcutConfig(), sc.ShortcutConfig.for_steps(3)])
def test_gradients_are_those_of_four_networks_that_share_nothing(args, config):
    """Weights that take turns in one network give what separate networks give."""
    ours = gradients(args, 0, config)
    args.loaded = (None, None)
    adapter = fd.Adapter(args)
    sets = dict(zip(("student", "fast", "slow"), weight_sets(adapter)))
    nets = {}
    for name, weights in sets.items():
        adapter.use(weights)
        nets[name] = copy.deepcopy(adapter.net)
    adapter.use(None)
    nets["teacher"] = copy.deepcopy(adapter.net)
    windows, x_0, noise, cond = batch_of(args, config)
    ids = fd.FluxPipeline._prepare_latent_image_ids(1, *args.size, "cpu", torch.float32)

    def velocity(net):
        return lambda x, t, text, pooled, guidance: net(
            hidden_states=x, timestep=t, guidance=guidance, encoder_hidden_states=text,
            pooled_projections=pooled, img_ids=ids, txt_ids=torch.zeros(text.shape[1], 3),
        ).sample  # fmt: skip

    velocities = {name: velocity(net) for name, net in nets.items()}
    sc.shortcut_loss(config, windows, x_0, noise, **velocities, **cond)[0].backward()
    layers = [m for m in nets["student"].modules() if isinstance(m, fd.LoRALinear)]
    theirs = [layer.A.grad for layer in layers] + [layer.B.grad for layer in layers]
    assert_close(ours, torch.cat([x.flatten() for x in theirs]), rtol=1e-4, atol=1e-7)


def test_layers(args):
    net = fd.load(args, "fresh").transformer
    linear = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    assert args.layers == "blocks"
    inside = [name for name in linear if "blocks." in name]
    assert fd.targets(args, net) == inside
    assert any("norm" in name for name in inside) and len(linear) == len(inside) + 10
    assert fd.targets(Namespace(**{**vars(args), "layers": "all"}), net) == linear


# -------------------------------------------------------------------------------------- a whole run


def test_what_a_run_leaves(done):
    expected = {"README.md", "comparison.png", "training.png", "log.csv", "results.json", fd.LORA}
    assert expected <= {path.name for path in done.iterdir()}
    assert [p.name for p in (done / "checkpoint").iterdir()] == ["state.safetensors"]
    assert len(list((done / "validation").glob("*.png"))) == 3
    assert not list(done.rglob(".part*"))
    rows = (done / "log.csv").read_text().splitlines()
    assert len(rows) == 5
    assert rows[0].startswith("iteration,loss,teacher_loss,residual,gradient_norm")
    assert all(f"lam_{n}" in rows[0] for n in fd.STEPS)
    results = json.loads((done / "results.json").read_text())
    table = {(row["sampler"], row["steps"]): row for row in results["table"]}
    assert set(table) == {
        (s, n) for s in ("teacher", "student", "student, scaled") for n in fd.STEPS
    }
    assert all(0 < row["rmse"] < 2 and 5 < row["psnr"] < 60 for row in table.values())
    errors = [table["teacher", n]["rmse"] for n in fd.STEPS]
    assert errors == sorted(errors, reverse=True)  # the teacher gets better with steps
    assert results["seed_to_seed"] > table["teacher", 2]["rmse"]
    for name in ("comparison.png", "training.png"):
        with Image.open(done / name) as image:
            assert np.asarray(image.convert("L")).std() > 10


def test_step_counts_that_are_shipped():
    assert SHIPPED == (32, (2, 3, 4, 6, 8))


def test_a_second_run_has_nothing_to_do(done, monkeypatch, capsys):
    before = content(done)
    for phase in ("make_cache", "train", "calibrate", "compare"):
        monkeypatch.setattr(fd, phase, lambda args: pytest.fail("a phase ran again"))
    run(done)
    assert content(done) == before
    assert "| student, scaled |" in capsys.readouterr().out


def test_another_sampling_shift_only_calibrates_and_compares(done, tmp_path, monkeypatch):
    out = copied(done, tmp_path / "out")
    before = content(out)
    monkeypatch.setattr(fd.sc, "sample_windows", lambda *_, **__: pytest.fail("trained again"))
    run(out, "--shift", 2)
    changed = {name for name, data in content(out).items() if before.get(name) != data}
    assert changed >= {fd.LORA, "results.json", "README.md", "comparison.png"}
    assert {name for name in changed if "/" in name} == {
        "cache/check.safetensors",
        "validation/saved.png",
    }
    assert fd.read_metadata(out / fd.LORA)["shift"] == 2


def test_the_model_card_and_its_snippet(done, monkeypatch):
    text = (done / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "diffusers" and "base_model" not in head
    assert head["license"] == "other"
    assert str(TINY.parent) not in text  # no path of this machine
    snippet = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(done.parent)
    snippet = snippet.replace("'tiny_flux'", repr(str(TINY))).replace("PROMPT", "a red circle")
    names = {}
    exec(snippet, names)
    assert names["image"].size == (32, 32)
    assert_close(names["pipe"].scheduler.sigmas, sc.time_grid(3, 3.0), rtol=0, atol=1e-6)


def test_flux_dev_passes_on_its_licence(done):
    results = json.loads((done / "results.json").read_text())
    results["adapter"]["scales"] = {int(n): s for n, s in results["adapter"]["scales"].items()}
    args = Namespace(base_model=fd.FLUX, device="cuda", out=Path("x"))
    card = fd.card(args, results | {"adapter": results["adapter"] | {"base_model": fd.FLUX}})
    assert "license_name: flux-1-dev-non-commercial-license" in card
    assert "dtype=torch.bfloat16" in card


def test_a_fresh_process_with_only_diffusers_gives_the_same_latents(done, tmp_path):
    args = prepared(tmp_path / "other")  # for the noise that the check was made with
    torch.save(fd.held_out(args, [0], "check")[1], tmp_path / "noise.pt")
    scale = fd.read_metadata(done / fd.LORA)["scales"]["3"]
    prompt = args.texts[0]
    code = f"""if True:
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        torch.set_num_threads(1)
        pipe = FluxPipeline.from_pretrained({str(TINY)!r}, dtype=torch.float32)
        pipe.load_lora_weights({str(done)!r}, adapter_name="x")
        pipe.set_adapters("x", {scale})
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, use_dynamic_shifting=False, shift=3.0)
        x = pipe({[prompt] * 2}, latents=torch.load({str(tmp_path / "noise.pt")!r}),
                 height=32, width=32, num_inference_steps=3, guidance_scale=3.5,
                 max_sequence_length=8,
                 output_type="latent").images
        torch.save(x, {str(tmp_path / "latents.pt")!r})
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    theirs = torch.load(tmp_path / "latents.pt")
    ours = load_file(done / "cache" / "check.safetensors")["latents"]
    assert (theirs - ours).abs().max() < 1e-5


def test_a_wrong_file_fails_the_self_check(done, tmp_path):
    out = copied(done, tmp_path / "out")
    tensors, metadata = load_file(out / fd.LORA), fd.read_metadata(out / fd.LORA)
    tensors |= {name: 1.01 * x for name, x in tensors.items() if "lora_B" in name}
    fd.write_tensors(out / fd.LORA, tensors, metadata)
    (out / "results.json").unlink()
    with pytest.raises(SystemExit, match="self-check failed"):
        run(out)


def test_sample_only_renders(done, tmp_path, capsys, monkeypatch):
    out = copied(done, tmp_path / "out")
    before = content(out)
    fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle", "ein Haus/è"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 2 and all(path.parent == out / "samples" for path in paths)
    assert all(Image.open(path).size == (32, 32) for path in paths)
    after = content(out)
    assert {name: after[name] for name in before} == before
    with pytest.raises(SystemExit, match="distil first"):
        fd.main(["--model", str(TINY), "--out", str(tmp_path / "none"), "--sample", "a"])


def test_held_out_prompts_are_not_trained_on(args):
    trained = {args.texts[pair.text] for pair in args.pairs}
    held_out = {args.texts[i] for i in (*args.validation, *args.comparison)}
    assert len(held_out) == 3 and len(args.pairs) == 6
    assert not trained & held_out
    assert not set(args.validation) & set(args.comparison)


# ----------------------------------------------------------------------------------------- training


def test_the_base_stays_and_only_the_lora_is_trained(tmp_path, monkeypatch):
    args, seen = prepared(tmp_path / "out"), []
    adam = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, *a, **k: seen.extend(p) or adam(p, *a, **k))
    before = {n: p.clone() for n, p in fd.load(args, "image").transformer.named_parameters()}
    fd.train(args)
    net = fd.load(args, "image").transformer
    lora = [p for layer in fd.Adapter(args).layers.values() for p in (layer.A, layer.B)]
    ours = {id(p) for p in lora}
    after = {n.replace(".base.", "."): p for n, p in net.named_parameters() if id(p) not in ours}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in after.values())
    (student,) = seen
    assert student.shape == (sum(p.numel() for p in lora),) and student.dtype == torch.float32


@pytest.mark.parametrize("moment", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_is_as_if_undisturbed(done, tmp_path, monkeypatch, moment):
    """The signal arrives amid an iteration; whatever iteration it is."""
    out, count, real = tmp_path / "out", [], sc.shortcut_loss

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


def test_killed_between_checkpoints_is_as_if_undisturbed(done, tmp_path, monkeypatch):
    out, count, real = tmp_path / "out", [], sc.shortcut_loss

    def dying(*args, **kwargs):
        count.append(1)
        if len(count) == 4:
            raise MemoryError  # nothing is saved on the way out
        return real(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", dying)
    with pytest.raises(MemoryError):
        run(out)
    run(out)
    assert same_run(out, done)


def test_accumulation_averages_and_keeps_one_ema_update_a_step(tmp_path, monkeypatch):
    updates = []
    real = sc.update_ema
    monkeypatch.setattr(fd.sc, "update_ema", lambda *a: updates.append(a[2]) or real(*a))
    train(tmp_path / "out", "--accumulate", 3, "--iterations", 2)
    train(tmp_path / "paper", "--accumulate", 3, "--iterations", 2, "--paper")
    assert len(updates) == 2 + 4  # the slow average alone, or both, two steps
    # Two equal micro-batches give what one gives.
    windows = sc.sample_windows
    monkeypatch.setattr(
        fd.sc, "sample_windows", lambda *a, U, generator: windows(*a, U=0.5, generator=generator)
    )
    monkeypatch.setattr(fd, "keyed", lambda *key: torch.Generator().manual_seed(len(str(key[:3]))))
    (one, _), (two, _) = (
        train(tmp_path / f"{k}", "--accumulate", k, "--iterations", 1) for k in (1, 2)
    )
    for name in one:
        assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_averages_follow_the_student_in_float32(tmp_path, monkeypatch):
    """By hand, from the students of 12 steps: the decay is i / (i + 4), until its own is less."""
    args = prepared(tmp_path / "out", "--paper", "--iterations", 12, "--validate-every", 12)
    assert (args.config.fast_decay, args.config.slow_decay) == (0.99, 0.999)  # the paper's
    args.config = replace(args.config, fast_decay=0.5, slow_decay=0.7)
    averages, steps, update = {}, {0.5: 0, 0.7: 0}, sc.update_ema

    def updates(ema, weights, decay, *iteration):
        steps[decay] += 1
        factor = min(decay, steps[decay] / (steps[decay] + 4))
        by_hand = averages.setdefault(decay, [x.double() for x in ema])
        averages[decay] = [factor * x + (1 - factor) * w for x, w in zip(by_hand, weights)]
        update(ema, weights, decay, *iteration)

    monkeypatch.setattr(fd.sc, "update_ema", updates)
    fd.train(args)
    tensors = load_file(args.state)
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    for name, decay in {"fast": 0.5, "slow": 0.7}.items():
        assert_close(tensors[name].double(), averages[decay][0], rtol=1e-4, atol=1e-8)
    assert (tensors["fast"] - tensors["slow"]).abs().max() > 1e-4


def test_each_role_has_its_own_weights(tmp_path, monkeypatch):
    """The student is what the optimizer moves; each average is what its own decay updates."""
    args, roles, updated = prepared(tmp_path / "out", "--iterations", 60, "--paper"), {}, {}
    velocity, loss, update = fd.Adapter.velocity, sc.shortcut_loss, sc.update_ema
    adam, moved = torch.optim.AdamW, []

    def tagged(self, weights, *more):
        result = velocity(self, weights, *more)
        result.weights = weights
        return result

    def seen(*more, **named):
        if updated:
            raise ZeroDivisionError  # one iteration is enough
        roles.update({name: named[name].weights for name in ("student", "fast", "slow", "teacher")})
        return loss(*more, **named)

    def updates(ema, weights, decay, iteration):
        assert weights[0] is roles["student"]
        updated[decay] = ema[0]
        update(ema, weights, decay, iteration)

    monkeypatch.setattr(fd.Adapter, "velocity", tagged)
    monkeypatch.setattr(fd.sc, "shortcut_loss", seen)
    monkeypatch.setattr(fd.sc, "update_ema", updates)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, *a, **k: moved.append(p) or adam(p, *a, **k)
    )
    with pytest.raises(ZeroDivisionError):
        fd.train(args)
    assert roles["student"] is moved[0][0] and roles["teacher"] is None
    assert args.config.fast_decay < args.config.slow_decay
    assert roles["fast"] is updated[args.config.fast_decay]
    assert roles["slow"] is updated[args.config.slow_decay]
    assert roles["student"] is not roles["fast"] is not roles["slow"]


def test_guidance_is_drawn_once_a_sample(args, monkeypatch):
    pool = {args.size: [(0, torch.zeros(16, 16))]}
    draws = [fd.draw_batch(args, pool, fd.keyed(i))[3]["guidance"] for i in range(200)]
    guidance = torch.cat(draws)
    assert guidance.min() >= 0 and guidance.max() <= 8
    assert abs(guidance.mean() - 4) < 0.3 and len(guidance.unique()) > 700


def test_batches_have_one_size_and_every_pair_is_as_likely(args):
    pool = {(4, 4): [(0, torch.zeros(16, 16))] * 3, (2, 8): [(1, torch.ones(16, 16))]}
    sizes = [fd.draw_batch(args, pool, fd.keyed(i))[2] for i in range(400)]
    assert abs(sizes.count((4, 4)) / 400 - 0.75) < 0.08


def test_draws_depend_on_seed_iteration_and_micro_batch_alone():
    keys = [(0, "train", 1, 0), (1, "train", 1, 0), (0, "train", 2, 0), (0, "train", 1, 1)]
    draws = [torch.rand(3, generator=fd.keyed(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == 4
    assert torch.rand(3, generator=fd.keyed(*keys[0])).tolist() == draws[0]


def test_every_pass_of_every_iteration_draws_anew(tmp_path, monkeypatch):
    seeds, draw = [], fd.draw_batch
    monkeypatch.setattr(fd, "draw_batch", lambda *a: seeds.append(a[2].initial_seed()) or draw(*a))
    train(tmp_path / "out", "--accumulate", 2, "--iterations", 3)
    assert len(seeds) == len(set(seeds)) == 6


def test_stops_when_matched_or_stalled():
    def matched(*lams, rmse=0.1):
        rows = [{"lam_3": lam, "rmse": rmse, "teacher_rmse": 0.3} for lam in lams]
        return fd.matched(Namespace(student_steps=3), [{"loss": 1.0}, *rows])

    assert matched(3.0, 1.04)
    assert not matched(3.0, 1.2)
    assert not matched(math.inf)
    assert not matched(-0.5)  # not learned at all
    assert not matched(3.0, 1.04, rmse=0.3)  # lam* of rounding noise: still the teacher
    assert matched(*[2.0] * 10) and not matched(*[2.0] * 9)
    assert not matched(*[2 - 0.1 * i for i in range(9)])


def test_stop_when_matched_ends_training(tmp_path, monkeypatch):
    monkeypatch.setattr(fd.Validation, "lam", lambda *_: 1.0)
    _, metadata = train(tmp_path / "out", "--stop-when-matched")
    assert metadata["done"] and len(metadata["rows"]) == 2


def test_alarms():
    args = Namespace(student_steps=3)
    row = {"lam_3": 1.0, "rmse": 0.1, "teacher_rmse": 0.3}
    assert "ALARM" not in fd.verdict(args, row)
    assert "inert" in fd.verdict(args, row | {"rmse": 0.3})
    assert "inert" in fd.verdict(args, row | {"rmse": 0.3, "lam_3": 0.1})  # of rounding noise
    assert "overshot" in fd.verdict(args, row | {"rmse": 0.5, "lam_3": 0.3})
    assert "overshot" in fd.verdict(args, row | {"lam_3": 0.7})
    assert "diverged" in fd.verdict(args, row | {"rmse": math.nan})


def test_lam_is_optimal_scale_and_the_memory_changes_nothing(args):
    adapter = fd.Adapter(args)
    validation = fd.Validation(args, adapter)
    weights = weight_sets(adapter)[0]
    direct = sc.optimal_scale(
        adapter.velocity(weights, args.size), adapter.velocity(None, args.size), validation.noise,
        sc.time_grid(3, args.shift), **validation.cond,
    )  # fmt: skip
    assert validation.lam(weights, 3) == validation.lam(weights, 3)
    assert_close(validation.lam(weights, 3), direct.item(), rtol=1e-5, atol=0)


def test_the_searched_scale_is_near_the_best(tmp_path):
    """Against a plain scan: within a hundredth of its least distance; others are far from it."""
    args = prepared(tmp_path / "out", "--iterations", 40, "--validate-every", 40)
    fd.train(args)
    validation, saved = args.validator, load_file(args.state)
    weights = saved["student"]
    distance, scale = validation.search(weights, 3)
    scan = {
        tried: fd.rms(validation.end(weights, 3, tried) - validation.fine)
        for tried in (scale, *np.linspace(0.1, 3, 59))
    }
    assert_close(scan[scale], distance)
    assert distance < 1.01 * min(scan.values())
    assert all(x > 1.1 * distance for tried, x in scan.items() if abs(tried - scale) > 0.5)


# -------------------------------------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    fd.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), fd.atomic(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert content(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize("damage", [b"", b"12345", None, "foreign"])
def test_a_damaged_cache_file_is_made_anew(done, tmp_path, damage, capsys):
    out = copied(done, tmp_path / "out")
    path, other = sorted((out / "cache").glob("latent-*"))[:2]
    whole, tensors = path.read_bytes(), {k: x.clone() for k, x in load_file(path).items()}
    path.write_bytes({None: whole[:-7], "foreign": other.read_bytes()}.get(damage, damage))
    prepared(out)
    said = capsys.readouterr().out
    assert f"{path.name} is damaged: made anew" in said and other.name not in said
    assert_close(load_file(path), tensors, rtol=0, atol=0)


def test_other_prompts_make_only_their_part_of_the_cache(tmp_path):
    args = prepared(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (args.out / "cache").iterdir()}
    lines = args.prompts.read_text().splitlines()
    (other := tmp_path / "prompts.txt").write_text("\n".join(["a blue lion", *lines[1:]]))
    prepared(tmp_path / "out", "--prompts", other)
    after = {path: path.stat().st_mtime_ns for path in (args.out / "cache").iterdir()}
    assert before.items() <= after.items()
    assert sorted(path.name[:4] for path in after.keys() - before.keys()) == ["late", "text"]


@pytest.mark.parametrize("change", [["--resolution", 48], ["--seed", 1]])
def test_other_settings_make_the_latents_anew_and_keep_the_texts(tmp_path, change):
    before = set(content(prepared(tmp_path / "out").out / "cache"))
    after = set(content(prepared(tmp_path / "out", *change).out / "cache"))
    assert before < after and {name[:4] for name in after - before} == {"late"}
    assert len(after - before) == len([name for name in before if name.startswith("late")])


def test_cache_and_checkpoint_of_a_finished_run_can_go(done, tmp_path):
    out = copied(done, tmp_path / "out")
    for name in ("cache", "checkpoint"):
        shutil.rmtree(out / name)
    before = content(out)
    run(out)
    assert content(out) == before
    says("is finished, but .* is gone", "--out", out, "--shift", 2)
    assert (out / fd.LORA).read_bytes() == before[fd.LORA]


def test_sample_refuses_another_model(done, tmp_path):
    folder = edited(tmp_path, "scheduler/scheduler_config.json", base_shift=0.6)
    with pytest.raises(SystemExit, match="was made for tiny_flux"):
        fd.main(["--model", str(folder), "--out", str(done), "--sample", "a red circle"])


def test_a_changed_weight_is_another_file(tmp_path):
    (path := tmp_path / "a").write_bytes(bytes(3_000_000))
    before = fd.file_print(path)
    for place in (0, 1_234_567, 2_999_999):
        path.write_bytes(bytes(place) + b"x" + bytes(2_999_999 - place))
        assert fd.file_print(path) != before
    path.write_bytes(bytes(3_000_001))
    assert fd.file_print(path) != before


@pytest.mark.parametrize("name", ["checkpoint/state.safetensors", fd.LORA])
def test_a_damaged_checkpoint_is_named_and_kept(done, tmp_path, name):
    out = copied(done, tmp_path / "out")
    data = (out / name).read_bytes()[:-100]
    (out / name).write_bytes(data)
    with pytest.raises(SystemExit, match=f"{name.split('/')[-1]} is damaged"):
        run(out)
    assert (out / name).read_bytes() == data


def test_no_pickle_is_read():
    source = Path(fd.__file__).read_text()
    assert "torch.load" not in source and "pickle" not in source


# ------------------------------------------------------------------------------------------- images


def test_images_of_all_kinds(tmp_path):
    for i, mode in enumerate(("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")):
        path = tmp_path / f"{i}.{'tif' if mode == 'CMYK' else 'png'}"
        picture(mode).save(path)
        x = fd.open_image(path, 64)[0]
        assert x.shape[0] == 3 and not x.shape[1] % 16 and not x.shape[2] % 16
        assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.05
    for size in ((1, 1), (3, 900), (900, 3)):
        picture("RGB", size).save(tmp_path / "s.png")
        assert not fd.open_image(tmp_path / "s.png", 64).isnan().any()


def test_images_are_turned_as_the_camera_says_and_seen_on_white(tmp_path):
    image = Image.new("RGB", (40, 80), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    _, _, height, width = fd.open_image(tmp_path / "a.jpg", 64).shape
    assert height < width
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "b.png")
    assert (fd.open_image(tmp_path / "b.png", 64) == 1).all()


def test_bad_images_and_captions_are_named_counted_and_skipped(tmp_path, capsys):
    for name in "abcd":
        picture("RGB").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.png").write_bytes(b"")
    (tmp_path / "f.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    print_of_a = fd.file_print(tmp_path / "a.png")
    assert fd.read_images(folder_of(tmp_path)) == [(tmp_path / "a.png", "a red circle", print_of_a)]
    said = capsys.readouterr().out
    assert "skipped 5, kept 1" in said
    assert all(name in said for name in ("b.txt", "c.png", "d.txt", "e.png", "f.png"))
    with pytest.raises(SystemExit, match="no image with a caption"):
        (tmp_path / "a.txt").unlink()
        fd.read_images(folder_of(tmp_path))


def test_training_on_images_of_several_shapes(tmp_path):
    (folder := tmp_path / "images").mkdir()
    for i, size in enumerate(((64, 64), (96, 48), (40, 80))):
        picture("RGB", size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red circle {i}")
    tensors, metadata = train(
        tmp_path / "out", "--images", folder, "--limit", 0, "--resolution", 48
    )
    assert metadata["done"] and all(x.isfinite().all() for x in tensors.values())
    args = prepared(tmp_path / "out", "--images", folder, "--limit", 0, "--resolution", 48)
    sizes = {fd.read(args, "latent", [i])["latent"].shape[1:3] for i in range(3)}
    assert len(sizes) > 1


def test_latents_of_images_decode_to_them(tmp_path):
    sys.path.insert(0, str(TINY.parent))
    import make_tiny_flux as tiny

    (folder := tmp_path / "images").mkdir()
    pixels = tiny.render(torch.tensor([3]), torch.Generator().manual_seed(5))[0]
    Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(
        folder / "a.png"
    )
    (folder / "a.txt").write_text("a red ring")
    args = prepared(tmp_path / "out", "--images", folder)
    latent = fd.read(args, "latent", [0])["latent"]
    assert latent.std() < 2  # normalised
    decoded = fd.decode(fd.load(args, "image"), latent.flatten(1, 2), args.size)[0]
    assert (decoded - (pixels.permute(1, 2, 0) + 1) / 2).square().mean() < 0.01


# ------------------------------------------------------------------------------------------- errors


def test_error_model_missing(tmp_path):
    says("can't be reached|no folder here", "--model", "nobody/nothing", "--out", tmp_path)
    says("no folder here", "--model", "no/such/folder", "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    says("not a whole diffusers pipeline", "--model", tmp_path / "empty", "--out", tmp_path)


def test_error_gated(tmp_path, monkeypatch):
    def gated(*_, **__):
        raise fd.hub.GatedRepoError("?token=hf_secret", response=MagicMock())

    monkeypatch.setattr(fd, "hf_hub_download", gated)
    says(
        "gated: accept its licence at .*FLUX.1-dev.*hf auth login",
        "--model",
        fd.FLUX,
        "--out",
        tmp_path,
    )
    with pytest.raises(SystemExit) as stopped:
        fd.main(["--out", str(tmp_path)])
    assert "hf_secret" not in str(stopped.value)


def test_error_half_a_model(tmp_path):
    folder = copied(TINY, tmp_path / "model")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    says("can't be loaded", "--model", folder, "--out", tmp_path / "out")


def test_error_weights_that_would_be_made_up(tmp_path):
    """Names of another version of transformers: it would draw the weights at random, and go on."""
    folder = copied(TINY, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    save_file({f"other.{name}": x for name, x in load_file(file).items()}, file, {"format": "pt"})
    says("text_encoder lacks [0-9]+ weights", "--model", folder, "--out", tmp_path / "out")


def test_error_schnell_and_other_models(tmp_path):
    folder = edited(tmp_path / "a", "transformer/config.json", guidance_embeds=False)
    says("schnell.*4 steps already", "--model", folder, "--out", tmp_path / "out")
    folder = edited(tmp_path / "b", "model_index.json", _class_name="StableDiffusion3Pipeline")
    says("is a StableDiffusion3Pipeline", "--model", folder, "--out", tmp_path / "out")


def test_error_large_model_without_gpu(tmp_path):
    size = dict(num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38)
    folder = edited(tmp_path, "transformer/config.json", **size, axes_dims_rope=[16, 56, 56])
    sentence = "12 billion parameters and PyTorch sees no GPU.*older than 580"
    says(sentence, "--model", folder, "--out", tmp_path / "out")


def test_error_memory(tmp_path, monkeypatch):
    says("GiB.*what helps, in this order.*--batch.*--rank", "--batch", 10**7, "--out", tmp_path)

    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fd, "make_cache", full)
    says("out of GPU memory; what helps, in this order", "--out", tmp_path)


def test_memory_estimate_of_the_real_flux(monkeypatch):
    """34 to 46 GiB at batch 8 and 512 px with checkpointing; not into 24 GiB."""
    config = json.loads((TINY / "transformer/config.json").read_text())
    config |= dict(num_attention_heads=24, attention_head_dim=128, num_layers=19,
                   num_single_layers=38, axes_dims_rope=[16, 56, 56], in_channels=64,
                   joint_attention_dim=4096, pooled_projection_dim=768)  # fmt: skip
    args = fd.parse(["--out", "/tmp"])
    args.device, args.size = "cuda", (32, 32)
    for memory, fits in ((46, True), (34, False)):
        card = Namespace(total_memory=memory * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        if fits:
            fd.check_memory(args, config)
        else:
            with pytest.raises(SystemExit, match="training needs about"):
                fd.check_memory(args, config)


@pytest.mark.parametrize(("flags", "said"), [
    (["--resolution", "100"], "100 must be a multiple of 16"),
    (["--batch", "0"], "--batch: 0 must be at least 1"),
    (["--iterations", "0"], "--iterations: 0 must be at least 1"),
    (["--batch", "x"], "--batch: invalid"),
    (["--learning-rate", "-1"], "--learning-rate: -1 must be at least"),
    (["--shift", "nan"], "--shift: nan must be at least"),
    (["--resolution", "0"], "must be at least 16"),
    (["--shift-range", "4", "2"], "--shift-range 4 2: give the lower end first"),
    (["--student-steps", "40"], "--student-steps 40 must be at most 16"),
])  # fmt: skip
def test_error_flags(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fd.main([*SMALL.split(), "--out", str(tmp_path), *flags])
    assert said in capsys.readouterr().err


def test_error_prompts(tmp_path):
    says("can't be read as a text file", "--prompts", tmp_path / "none.txt", "--out", tmp_path)
    (tmp_path / "few.txt").write_text("one\ntwo\n\n")
    says("2 different prompts", "--prompts", tmp_path / "few.txt", "--out", tmp_path)


def test_error_no_torchao(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fd, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(tmp_path, "--quantize", "int8")
    assert "needs torchao: pip install torchao" in capsys.readouterr().err


def test_error_images(tmp_path):
    says("--images nowhere is no folder", "--images", "nowhere", "--out", tmp_path)


def test_error_out_of_another_run(done, tmp_path):
    out = copied(done, tmp_path / "out")
    before = content(out)
    says(r"other settings \(rank 4, now 8\)", "--out", out, "--rank", 8)
    assert content(out) == before


def test_error_disk_full(tmp_path, monkeypatch):
    monkeypatch.setattr(fd.shutil, "disk_usage", lambda _: Namespace(free=1000))
    says("checkpoints need .* GB", "--out", tmp_path / "a")
    monkeypatch.undo()
    real = fd.save_file

    def full(tensors, path, metadata):
        if "state" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(fd, "save_file", full)
    says("disk of --out .* is full.*the same command goes on", "--out", tmp_path / "b")
    assert not list((tmp_path / "b" / "checkpoint").iterdir())
    monkeypatch.undo()
    run(tmp_path / "b")


def test_error_not_a_number(done, tmp_path, monkeypatch):
    """It stops before the step, and the checkpoint of iteration 2 is as it was."""
    out, real, count = tmp_path / "out", sc.shortcut_loss, []

    def bad(*args, **kwargs):
        loss, log = real(*args, **kwargs)
        count.append(1)
        return (loss * math.nan if len(count) == 3 else loss), log

    monkeypatch.setattr(fd.sc, "shortcut_loss", bad)
    says("iteration 3: loss nan.*last checkpoint is kept", "--out", out)
    assert len(fd.read_metadata(out / "checkpoint/state.safetensors")["rows"]) == 2
    assert not (out / fd.LORA).exists()
    run(out)  # the noise of a broken machine gone, it goes on
    assert (out / "log.csv").read_bytes() == (done / "log.csv").read_bytes()


def test_help_names_every_flag_with_its_default():
    text = subprocess.run(
        [sys.executable, fd.__file__, "--help"], capture_output=True, text=True
    ).stdout
    assert text.count("default:") >= 24 and "cache" in text
