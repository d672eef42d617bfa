"""What flux_distill.py checks, estimates and tells of the device that it runs on."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tiny_runs import SMALL, TINY, fd, prepared, run
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils import backend_registration as backends

import shortcut as sc

HERE = Path(__file__).parent
FAKE_GPU = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="needs a newer PyTorch"
)


def test_without_the_flag_no_gpu_is_seen():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_attention_of_cudnn_is_off():
    """Whoever imports the script: benchmarks and tests too."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


# ------------------------------------------------------------------------------- silent errors


def first_pair(args):
    return args.pairs[0].text, fd.read(args, "latent", [0])["latent"][0]


def test_a_right_device_passes(args):
    found = fd.check_device(args, fd.Adapter(args), first_pair(args))
    assert found.keys() == fd.CHECKS.keys()
    assert all(0 <= value < 1e-5 for value in found.values())


class WrongBackward(torch.autograd.Function):
    """The value is right, the gradient is not."""

    factor = 800.0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return WrongBackward.factor * gradient


def attention_with_a_wrong_backward(*args, **kwargs):
    """As cuDNN's: right again where PyTorch's plain attention is asked for."""
    result = ATTENTION(*args, **kwargs)
    return WrongBackward.apply(result) if torch.backends.cuda.flash_sdp_enabled() else result


ATTENTION = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("factor", [800.0, 1.2, float("nan")])
def test_a_wrong_gradient_of_attention_is_found(args, monkeypatch, factor):
    monkeypatch.setattr(WrongBackward, "factor", factor)
    functional = torch.nn.functional
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention_with_a_wrong_backward)
    with pytest.raises(SystemExit, match=r"student's gradient .* differs .* try DIFFUSERS_ATTN"):
        fd.check_device(args, fd.Adapter(args), first_pair(args))


def test_a_wrong_velocity_is_found(args, monkeypatch):
    adapter, real = fd.Adapter(args), fd.Adapter.velocity

    def wrong(self, weights, size, dtype=None):
        velocity = real(self, weights, size, dtype)
        factor = 1.0 if dtype == torch.float32 else 1.5
        return lambda x, t, **cond: factor * velocity(x, t, **cond)

    monkeypatch.setattr(fd.Adapter, "velocity", wrong)
    with pytest.raises(SystemExit, match="the teacher's velocity differs from the same in float32"):
        fd.check_device(args, adapter, first_pair(args))


def test_times_that_the_stock_pipeline_does_not_take_are_found(args):
    adapter = fd.Adapter(args)
    pipe = fd.load(args, "image")
    fd.set_shift(pipe, 2.0)
    try:
        with pytest.raises(SystemExit, match="our own sampler differ from those of the stock"):
            fd.check_device(args, adapter, first_pair(args))
    finally:
        fd.set_shift(pipe, args.shift)


PLANTED = """
import sys
sys.path.insert(0, {tests!r})
import fake_gpu as gpu
import test_device
from fake_gpu import torch
torch.nn.functional.scaled_dot_product_attention = test_device.attention_with_a_wrong_backward
gpu.main(sys.argv[1:])
"""


@pytest.mark.slow
@FAKE_GPU
def test_training_on_a_fake_gpu_stops_at_a_wrong_backward(tmp_path):
    """Before the first iteration; and what a right one gave stands in results.json and the card."""
    more = ["--iterations", 1, "--held-out", 2, "--batch", 2, "--limit", 2]
    flags = [*SMALL.split(), *more, "--out", tmp_path / "out"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    (script := tmp_path / "gpu.py").write_text(PLANTED.format(tests=str(HERE)))

    def start(program):
        command = list(map(str, [sys.executable, program, *flags]))
        return subprocess.run(command, env=env, capture_output=True, text=True)

    wrong = start(script)
    assert wrong.returncode == 1, wrong.stderr[-2000:]
    assert "student's gradient with the attention kernels in use differs" in wrong.stderr
    assert not (tmp_path / "out" / "checkpoint").exists()
    right = start(HERE / "fake_gpu.py")
    assert right.returncode == 0, right.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["adapter"]["checks"]["gradient"] < fd.CHECKS["gradient"][0]
    assert results["machine"]["device"] == "a fake GPU"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Relative differences before the first iteration: the gradient" in card
    assert "| train | " in card and "1.0 GiB" in card


# ----------------------------------------------------------------------------- cost, told early


def test_after_the_third_iteration_the_cost_is_told(tmp_path, capsys):
    run(tmp_path / "out", "--validate-every", 4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration 3")]
    assert len(said) == 1
    for words in ("s an iteration; training takes", "until", "1 validations of", "calibration then",
                  "comparison"):  # fmt: skip
        assert words in said[0]


def test_the_forecast_counts_network_calls():
    """Against a count by hand: 10 iterations left, two validations, steps 2 and 3, N = 3."""
    args = Namespace(steps=[2, 3], student_steps=3, comparison=[0] * 8, validation=[0] * 4,
                     iterations=13, validate_every=5, device="cpu")  # fmt: skip
    words = fd.forecast(args, Namespace(seconds=1.0), 3, 60.0)
    # 10 x 60 s, three validations (5, 10, 13) of 3 + 2 x 5 calls, 16 x 5 for the first lam*
    assert "training takes 12 min more" in words  # 719 s
    assert "3 validations of 13 s" in words
    assert "takes about 96 s" in words  # 12 x (5 + 3)
    assert f"comparison {2 * (fd.FINE + 15)} s" in words  # twice the rows, 3 x 5 calls and FINE


@pytest.mark.parametrize(("peak", "alarm"), [(70.0, False), (77.0, True)])
def test_a_card_that_is_nearly_full_is_told(monkeypatch, peak, alarm):
    card = Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    costs = Namespace(peak=lambda: peak)
    args = Namespace(steps=[2, 3], student_steps=3, comparison=[0], validation=[0], iterations=13,
                     validate_every=5, device="cuda", costs=costs)  # fmt: skip
    words = fd.forecast(args, Namespace(seconds=1.0), 3, 60.0)
    assert f"peak memory {peak} of 80.0 GiB" in words
    assert ("ALARM" in words and "--recompute-every 1" in words) == alarm


def test_results_and_card_hold_what_a_run_took(done):
    results = json.loads((done / "results.json").read_text())
    assert list(results["phases"]) == ["cache", "train", "calibrate", "compare"]
    assert all(phase["seconds"] > 0 for phase in results["phases"].values())
    assert results["machine"]["torch"] == torch.__version__
    assert results["adapter"]["checks"] is None  # a CPU
    card = (done / "README.md").read_text()
    assert all(f"| {phase} | " in card for phase in results["phases"])
    assert f"torch {torch.__version__}" in card
    assert f"is {results['adapter']['relative_change']:.2%} of their norm" in card


def test_costs_add_up_over_interruptions_of_a_phase_that_resumes(tmp_path):
    path = tmp_path / "costs.json"
    seconds = []
    for resumes in (False, True, False):
        costs = fd.Costs(path, "cpu", lead=True)
        with pytest.raises(ZeroDivisionError), costs.phase("train", resumes):
            time.sleep(0.05 if resumes else 0.02)
            raise ZeroDivisionError
        seconds.append(json.loads(path.read_text())["train"]["seconds"])
    first, resumed, again = seconds
    assert first >= 0.02 and resumed >= first + 0.05 and 0.02 <= again < resumed


def test_relative_change_is_that_of_the_merged_weights(args):
    adapter = fd.Adapter(args)
    weights = adapter.switch.weights + 0.05 * torch.randn(adapter.switch.weights.shape)
    adapter.use(weights)
    ratios = [(0.7 * (m.B @ m.A)).norm() / m.base.weight.norm() for m in adapter.layers.values()]
    expected = torch.stack(ratios).sort().values
    middle = expected[[(len(expected) - 1) // 2, len(expected) // 2]].mean().item()
    assert_close(adapter.relative_change(weights, 0.7), middle, rtol=1e-4, atol=0)
    card = fd.took({"phases": {}, "machine": {"device": "CPU"},
                    "adapter": {"checks": None, "relative_change": 0.002}})  # fmt: skip
    assert "lost to rounding" in card


# ------------------------------------------------------------------- memory, compiling, rotary


def test_the_estimate_grows_with_the_blocks_that_are_not_recomputed(monkeypatch):
    """Against peaks of a whole run's training on one H100 (FLUX.1-dev's size, batch 8, 512 px)."""
    config = json.loads((TINY / "transformer/config.json").read_text())
    config |= dict(num_attention_heads=24, attention_head_dim=128, num_layers=19,
                   num_single_layers=38, axes_dims_rope=[16, 56, 56], in_channels=64,
                   joint_attention_dim=4096, pooled_projection_dim=768)  # fmt: skip
    measured = {1: 34.1, 2: 64.8}
    for every, gib in measured.items():
        args = fd.parse(["--out", "/tmp", "--recompute-every", str(every)])
        args.device, args.size = "cuda", (32, 32)
        for card, fits in ((gib, False), (1.25 * gib, True)):
            properties = Namespace(total_memory=card * 2**30)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
            if fits:
                fd.check_memory(args, config)
            else:
                with pytest.raises(SystemExit, match=r"training needs about .*--recompute-every 1"):
                    fd.check_memory(args, config)


@pytest.mark.slow
def test_compiled_blocks_give_what_eager_ones_give_and_compile_only_at_first(tmp_path):
    compiled = prepared(tmp_path / "compiled", "--compile")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    windows = sc.sample_windows

    def counted(*more, **named):
        graphs.append(counters["stats"]["unique_graphs"])
        return windows(*more, **named)

    fd.sc.sample_windows = counted
    try:
        fd.train(compiled)
    finally:
        fd.sc.sample_windows = windows
    assert graphs[3] > 0 and graphs[3] == graphs[2]  # none in the third step or later
    assert not counters["graph_break"]
    # The check compares with eager blocks and float32.
    found = fd.device_errors(compiled, fd.Adapter(compiled), first_pair(compiled))
    assert all(value < 1e-5 for value in found.values())


def test_compile_is_refused_with_int8(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fd, "find_spec", lambda name: True)
    with pytest.raises(SystemExit):
        run(tmp_path, "--quantize", "int8", "--compile")
    assert "--compile does not work with --quantize" in capsys.readouterr().err


def test_the_rotary_embedding_is_computed_once_for_each_grid(args, monkeypatch):
    args.loaded = (None, None)
    adapter = fd.Adapter(args)
    rotary = adapter.net.pos_embed
    asked = []
    hook = rotary.base.register_forward_hook(lambda module, inputs, out: asked.append(inputs[0]))
    cond = fd.read(args, "text", [0]) | {"guidance": torch.ones(1)}
    t = torch.ones(1)
    with torch.no_grad():
        x = {size: torch.randn(1, 16, 16) for size in ((4, 4), (2, 8))}
        first = {size: adapter.velocity(None, size)(x[size], t, **cond) for size in x}
        again = {size: adapter.velocity(None, size)(x[size], t, **cond) for size in x}
    assert len(asked) == 2 and not torch.equal(*asked)
    assert all(torch.equal(first[size], again[size]) for size in x)
    ends = fd.sample(args, fd.load(args, "image"), cond, fd.noises(args, [("a",)]), 2)
    assert len(asked) == 4 and ends.isfinite().all()  # the stock pipeline's own, each time
    hook.remove()


# ------------------------------------------------------------------ the LoRA layer by itself


def test_a_lora_layer_is_the_linear_layer_of_merged_weights_gradients_too():
    """Against autograd through W + B A, which knows nothing of the layer."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    base = torch.nn.Linear(6, 5).requires_grad_(False)
    A, B = draw(3, 6), draw(5, 3)
    layer = fd.LoRALinear(base, A, B, Namespace(on=True))
    x = draw(2, 7, 6).requires_grad_()
    merged = [p.clone().requires_grad_() for p in (A, B, x.detach())]
    y = torch.nn.functional.linear(merged[2], base.weight + merged[1] @ merged[0], base.bias)
    direction = draw(2, 7, 5)
    (layer(x) * direction).sum().backward()
    (y * direction).sum().backward()
    assert_close(layer(x), y)
    for ours, theirs in zip((layer.A, layer.B, x), merged):
        assert_close(ours.grad, theirs.grad)
    layer.switch.on = False
    assert_close(layer(x), base(x))


@pytest.mark.parametrize(("every", "again"), [(0, 0), (1, 4), (2, 2), (3, 2)])
def test_as_many_blocks_are_recomputed_as_asked(args, every, again):
    args.loaded = (None, None)
    adapter = fd.Adapter(args)
    adapter.recompute(every)
    calls = []
    for block in adapter.blocks:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        norm.register_forward_hook(lambda *_: calls.append(1))
    cond = fd.read(args, "text", [0]) | {"guidance": torch.ones(1)}
    v = adapter.velocity(adapter.switch.weights.clone(), args.size)
    v(fd.noises(args, [("a",)]), torch.ones(1), **cond).sum().backward()
    args.loaded = (None, None)
    assert len(calls) == len(adapter.blocks) + again == 4 + again


def test_the_device_check_moves_every_weight_and_looks_at_the_student(args, monkeypatch):
    seen = []
    real = fd.Adapter.move_gradients

    def kept(self, student, fraction):
        real(self, student, fraction)
        seen.append((self, student.grad.clone()))

    monkeypatch.setattr(fd.Adapter, "move_gradients", kept)
    fd.device_errors(args, fd.Adapter(args), first_pair(args))
    adapter, gradient = seen[0]
    sizes = [p.numel() for p in adapter.params]
    assert len(seen) == 2 and all(part.abs().max() > 0 for part in gradient.split(sizes))
    monkeypatch.setattr(fd.Adapter, "move_gradients", real)
    forward = fd.LoRALinear.forward

    def wrong(self, x):  # in the student alone, and in whichever type the check computes
        y = forward(self, x)
        return y + 0.5 if self.switch.on and x.dtype == torch.float32 and wrong.on else y

    wrong.on = False
    monkeypatch.setattr(fd.LoRALinear, "forward", wrong)
    in_float32 = fd.Adapter.in_float32

    @contextmanager
    def marked(self):
        with in_float32(self):
            wrong.on = True
            yield
            wrong.on = False

    monkeypatch.setattr(fd.Adapter, "in_float32", marked)
    found = fd.device_errors(args, fd.Adapter(args), first_pair(args))
    assert found["teacher"] < 1e-5 and found["student"] > 1e-3


def test_the_reference_is_plain_attention_whatever_the_environment_says(args, monkeypatch):
    """DIFFUSERS_ATTN_BACKEND opens a kernel of its own inside the call."""
    registry = fd.attention_backend.__wrapped__.__globals__["_AttentionBackendRegistry"]
    monkeypatch.setattr(registry, "_active_backend", "_native_flash")
    functional, used = torch.nn.functional, []

    def noted(*more, **named):
        used.append(torch.backends.cuda.math_sdp_enabled())
        return ATTENTION(*more, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    fd.device_errors(args, fd.Adapter(args), first_pair(args))
    assert any(used) and not all(used)


def test_costs_are_brought_up_to_date_without_counting_twice(tmp_path):
    costs = fd.Costs(tmp_path / "costs.json", "cpu", lead=True)
    began = time.perf_counter()
    with costs.phase("train"):
        for _ in range(5):
            time.sleep(0.02)
            costs.save()
    assert 0.1 <= costs.phases["train"]["seconds"] <= time.perf_counter() - began


def test_the_end_of_training_is_told_with_its_validations(monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 5, 12)

    monkeypatch.setattr(fd, "datetime", Noon)
    args = Namespace(steps=[2, 3], student_steps=3, comparison=[0] * 8, validation=[0] * 4,
                     iterations=13, validate_every=5, device="cpu")  # fmt: skip
    words = fd.forecast(args, Namespace(seconds=60.0), 3, 60.0)
    assert "until Mon 14:09" in words  # 10 x 60 s + 3 x 13 x 60 s + 80 x 60 s = 129 min


def test_positions_are_told_apart_by_text_length_too(args):
    adapter = fd.Adapter(args)
    x = torch.randn(1, 16, 16)
    guidance, t = torch.ones(1), torch.ones(1)
    text = fd.read(args, "text", [0])
    short = {"text": text["text"][:, :5], "pooled": text["pooled"], "guidance": guidance}
    with torch.no_grad():
        adapter.velocity(None, (4, 4))(x, t, **text, guidance=guidance)
        after = adapter.velocity(None, (4, 4))(x, t, **short)
        adapter.net.pos_embed.known.clear()
        assert torch.equal(after, adapter.velocity(None, (4, 4))(x, t, **short))
