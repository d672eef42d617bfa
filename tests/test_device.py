"""What flux_distill.py checks, estimates and tells of the device that it runs on."""

import copy
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wrong_attention
from tiny_runs import SMALL, fd, new_lora, parsed, prepared, run
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils import backend_registration as backends

HERE = Path(__file__).parent
FAKE_GPU = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="needs a newer PyTorch"
)
functional = torch.nn.functional


def test_without_the_flag_no_gpu_is_seen():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


def test_attention_of_cudnn_is_off():
    """For whoever imports the script: benchmarks and tests, too."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


# ------------------------------------------------------------------------------- silent errors


@pytest.fixture
def lora(setup):
    return new_lora(setup)


def check(setup, lora) -> dict[str, float]:
    return fd.check_device(setup.settings, setup.cache, lora)


def errors(setup, lora) -> dict[str, float]:
    return fd.device_errors(setup.settings, setup.cache, lora)


def test_a_right_device_passes(setup, lora):
    found = check(setup, lora)
    assert found.keys() == fd.CHECKS.keys()
    assert all(0 <= value < 1e-5 for value in found.values())


@pytest.mark.parametrize("factor", [800.0, 1.2, float("nan")])
def test_a_wrong_gradient_of_attention_is_found(setup, lora, monkeypatch, factor):
    monkeypatch.setattr(wrong_attention.WrongBackward, "factor", factor)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", wrong_attention.attention)
    with pytest.raises(SystemExit, match=r"student's gradient differs .* try DIFFUSERS_ATTN"):
        check(setup, lora)


def test_a_wrong_velocity_is_found(setup, lora, monkeypatch):
    right = fd.LoRA.velocity

    def wrong(self, weights, scale=1.0, dtype=None):
        velocity = right(self, weights, scale, dtype)
        factor = 1.0 if dtype == torch.float32 else 1.5
        return lambda x, t, **cond: factor * velocity(x, t, **cond)

    monkeypatch.setattr(fd.LoRA, "velocity", wrong)
    with pytest.raises(SystemExit, match="the teacher's velocity differs from the same in float32"):
        check(setup, lora)


def test_a_velocity_that_is_wrong_with_the_lora_alone_is_found(setup, lora, monkeypatch):
    in_float32, forward = fd.LoRA.in_float32, fd.LoRALinear.forward
    reference = SimpleNamespace(on=False)

    @contextmanager
    def marked(self):
        reference.on = True
        with in_float32(self):
            yield
        reference.on = False

    def wrong(self, x):
        y = forward(self, x)
        return y + 0.5 if self.switch.on and not reference.on else y

    monkeypatch.setattr(fd.LoRA, "in_float32", marked)
    monkeypatch.setattr(fd.LoRALinear, "forward", wrong)
    found = errors(setup, lora)
    assert found["teacher"] < 1e-5
    assert found["student"] > 1e-3


def test_times_that_the_stock_pipeline_does_not_take_are_found(setup, lora, monkeypatch):
    right = fd.stock_sample

    def wrong(model, noise, steps, cond, shift, *more, **options):
        return right(model, noise, steps, cond, 2.0, *more, **options)

    monkeypatch.setattr(fd, "stock_sample", wrong)
    with pytest.raises(
        SystemExit, match="our sampler's result differs from the stock pipeline's by"
    ):
        check(setup, lora)


def test_the_gradient_check_reaches_every_weight(setup, lora, monkeypatch):
    gradients = []
    move_gradients = fd.LoRA.move_gradients

    def noted(self, student, fraction):
        move_gradients(self, student, fraction)
        gradients.append(student.grad.clone())

    monkeypatch.setattr(fd.LoRA, "move_gradients", noted)
    errors(setup, lora)
    assert len(gradients) == 2  # with the kernels in use, and with plain attention
    sizes = [p.numel() for p in lora.params]
    assert all(part.abs().max() > 0 for part in gradients[0].split(sizes))


def test_the_check_looks_at_32_x_32_tokens_at_most(setup, lora):
    """Plain attention takes memory by the square of the tokens."""
    cache = copy.copy(setup.cache)
    channels, _, _ = setup.model.latent_shape(32)
    cache.latent = lambda i: torch.randn(channels, 66, 90)
    tokens = []

    def note(module, args, kwargs):
        tokens.append(kwargs["hidden_states"].shape[1])

    lora.net.register_forward_pre_hook(note, with_kwargs=True)
    fd.device_errors(setup.settings, cache, lora)
    assert max(tokens) == 32 * 32


def test_the_reference_is_plain_attention_whatever_the_environment_says(setup, lora, monkeypatch):
    """DIFFUSERS_ATTN_BACKEND opens a kernel of its own inside the call."""
    registry = fd.attention_backend.__wrapped__.__globals__["_AttentionBackendRegistry"]
    monkeypatch.setattr(registry, "_active_backend", "_native_flash")
    math_is_on = []

    def noted(*args, **kwargs):
        math_is_on.append(torch.backends.cuda.math_sdp_enabled())
        return wrong_attention.RIGHT(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    errors(setup, lora)
    assert any(math_is_on)
    assert not all(math_is_on)


PLANTED = """
import sys
sys.path.insert(0, {tests!r})
import fake_gpu
import torch
import wrong_attention
torch.nn.functional.scaled_dot_product_attention = wrong_attention.attention
fake_gpu.main(sys.argv[1:])
"""


def on_fake_gpu(program: Path, out: Path) -> subprocess.CompletedProcess:
    more = ["--iterations", 1, "--held-out", 2, "--batch", 2, "--limit", 2]
    command = [sys.executable, program, *SMALL.split(), *more, "--out", out]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)


@pytest.mark.slow
@FAKE_GPU
def test_training_on_a_fake_gpu_stops_at_a_wrong_backward_before_the_first_iteration(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(tests=str(HERE)))
    done = on_fake_gpu(script, tmp_path / "out")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "the student's gradient differs from that with PyTorch's plain" in done.stderr
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.slow
@FAKE_GPU
def test_results_and_card_of_a_fake_gpu_hold_device_checks_and_memory(tmp_path):
    done = on_fake_gpu(HERE / "fake_gpu.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    checks = results["adapter"]["checks"]
    assert checks.keys() == fd.CHECKS.keys()
    for name, value in checks.items():
        assert 0 <= value < fd.CHECKS[name][0]
    assert results["machine"]["device"] == "a fake GPU"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Relative differences before the first iteration: the student's gradient and" in card
    assert "| train | " in card
    assert "1.0 GiB" in card


# ----------------------------------------------------------------------------- cost, told early


def test_after_the_third_iteration_the_cost_is_told(tmp_path, capsys):
    run(tmp_path / "out", "--validate-every", 4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration 3")]
    assert len(said) == 1
    for words in ("s per iteration; training takes", "until", "1 validation of", "calibration then",
                  "comparison"):  # fmt: skip
        assert words in said[0]


# Ten iterations are left after the third, with validations after the fifth, tenth and thirteenth.
THIRTEEN = fd.Settings(
    steps=(2, 3), student_steps=3, teacher_steps=32, iterations=13, validate_every=5
)
ON_A_CPU = SimpleNamespace(device="cpu")


def validation_of(seconds: float, teacher_calls: int = 1) -> SimpleNamespace:
    """What the forecast knows of validations: seconds of a call; half as many rows as compared."""
    calls = {"iteration": 6}
    return SimpleNamespace(
        seconds=seconds, compared=2.0, network_calls=calls, teacher_calls=teacher_calls
    )


def test_the_forecast_is_that_of_a_count_by_hand():
    words = fd.forecast(THIRTEEN, ON_A_CPU, validation_of(seconds=1.0), 3, seconds=60.0)
    # 10 x 60 s, three validations of 3 + 2 + 3 calls, 16 x 5 for the first lam*
    assert "training takes 12 min more" in words  # 704 s
    assert "3 validations of 8 s" in words
    assert "takes about 88 s" in words  # 11 x (5 + 3)
    assert "comparison 94 s" in words  # twice the rows, 32 calls and 3 x 5
    assert words.endswith("a row of an iteration takes 6 network calls")


def test_the_forecast_counts_a_guided_velocity_as_two_calls():
    validation = validation_of(seconds=1.0, teacher_calls=2)
    words = fd.forecast(THIRTEEN, ON_A_CPU, validation, 3, seconds=60.0)
    assert "3 validations of 8 s" in words  # by the student alone
    assert "training takes 13 min more" in words  # 16 x 5 calls more: 784 s
    assert "takes about 88 s" in words
    assert "comparison 168 s" not in words
    assert "comparison 3 min" in words  # twice the rows, 2 x (32 + 5) calls and 2 x 5: 168 s


def test_the_end_of_training_is_told_with_its_validations(monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 5, 12)

    monkeypatch.setattr(fd, "datetime", Noon)
    words = fd.forecast(THIRTEEN, ON_A_CPU, validation_of(seconds=60.0), 3, seconds=60.0)
    assert "until Mon 13:54" in words  # 10 x 60 s + 3 x 8 x 60 s + 80 x 60 s = 114 min


def test_validations_take_as_many_network_calls_as_the_forecast_says(setup, lora, tmp_path):
    calls = []
    validation = fd.Validation(setup.settings, setup.cache, lora)
    lora.net.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for number in range(2):
        calls.clear()
        validation.report(lora.loaded_weights(), tmp_path / f"{number}.png")
        counts.append(len(calls))
    assert counts == [8 + 16 * 5, 8]  # as in the count by hand: steps 2 and 3, N = 3


def test_a_validation_knows_what_a_network_call_takes(setup, lora):
    pause = 0.05
    lora.net.register_forward_hook(lambda *_: time.sleep(pause))
    began = time.perf_counter()
    validation = fd.Validation(setup.settings, setup.cache, lora)
    calls = setup.settings.teacher_steps + 3  # teacher in many steps, and in N
    assert pause <= validation.seconds <= (time.perf_counter() - began) / calls


@pytest.mark.parametrize(("peak", "alarm"), [(70.0, False), (77.0, True)])
def test_a_card_that_is_nearly_full_is_told(peak, alarm):
    machine = SimpleNamespace(device="cuda", peak_memory=lambda: peak, memory=lambda: 80 * 2**30)
    words = fd.forecast(THIRTEEN, machine, validation_of(seconds=1.0), 3, seconds=60.0)
    assert f"peak memory {peak} of 80.0 GiB" in words
    assert ("WARNING" in words) == alarm
    assert ("--recompute-every 1" in words) == alarm


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
        costs = fd.Costs(path, fd.Machine())
        with pytest.raises(ZeroDivisionError), costs.phase("train", resumes):
            time.sleep(0.05 if resumes else 0.02)
            raise ZeroDivisionError
        seconds.append(json.loads(path.read_text())["phases"]["train"]["seconds"])
    first, resumed, again = seconds
    assert first >= 0.02
    assert resumed >= first + 0.05
    assert 0.02 <= again < resumed


def test_costs_are_brought_up_to_date_without_counting_twice(tmp_path):
    costs = fd.Costs(tmp_path / "costs.json", fd.Machine())
    began = time.perf_counter()
    with costs.phase("train"):
        for _ in range(5):
            time.sleep(0.02)
            costs.save()
    assert 0.1 <= costs.phases["train"]["seconds"] <= time.perf_counter() - began


def test_relative_change_is_that_of_the_merged_weights(lora):
    start = lora.loaded_weights()
    weights = start + 0.05 * torch.randn(start.shape)
    lora.use(weights)
    ratios = []
    for layer in lora.layers.values():
        ratios.append((0.7 * (layer.B @ layer.A)).norm() / layer.base.weight.norm())
    ordered = torch.stack(ratios).sort().values
    middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean().item()
    assert_close(lora.relative_change(weights, 0.7), middle, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("change", "fades"), [(0.002, True), (0.004, False)])
def test_the_card_warns_of_a_change_that_fades_in_bfloat16(change, fades):
    adapter = {"checks": None, "relative_change": change}
    results = {"phases": {}, "machine": {"device": "CPU"}, "adapter": adapter}
    calls = {"iteration": 6, "teacher": 32, "student": 3}
    card = fd.card_costs(results | {"network_calls": calls, "teacher_steps": 32})
    assert ("lost to rounding" in card) == fades


# --------------------------------------------------------------------------------------- memory


def test_the_memory_of_a_cpu_is_that_of_the_machine(monkeypatch):
    pages = {"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.get)
    assert fd.Machine().memory() == 7 * 4096
    monkeypatch.delattr(os, "sysconf")
    assert fd.Machine().memory() == float("inf")


def test_the_memory_of_a_gpu_is_that_of_this_process_s_card(monkeypatch):
    machine = fd.Machine()
    machine.device = "cuda"
    cards = {"cuda": SimpleNamespace(total_memory=20)}  # without an index: the current device
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.get)
    assert machine.memory() == 20


@pytest.mark.parametrize(("every", "peak"), [(1, 32.9), (2, 64.8)])
def test_the_estimate_is_near_what_training_took(setup, every, peak):
    """Peaks in GiB of training on one H200 (FLUX.1-dev's size, batch 8, 512 px)."""
    model = copy.copy(setup.model)
    config = model.family.config | dict(
        num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38,
        axes_dims_rope=[16, 56, 56], in_channels=64, joint_attention_dim=4096,
        pooled_projection_dim=768,
    )  # fmt: skip
    model.family = fd.Flux({}, config)
    model.vae_config = {"block_out_channels": [128, 256, 512, 512]}
    settings = fd.Settings(recompute_every=every)

    def check_card(gib: float) -> None:
        model.machine = SimpleNamespace(
            device="cuda", dtype=torch.bfloat16, memory=lambda: gib * 2**30
        )
        fd.check_memory(settings, model)

    with pytest.raises(SystemExit, match=r"training needs about .*--recompute-every 1"):
        check_card(peak)
    check_card(1.25 * peak)


# ---------------------------------------------------------------------------- compiling, rotary


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Four steps with compiled blocks: what was compiled up to the end of each, and two
    validations that follow."""
    setup = prepared(tmp_path_factory.mktemp("compiled") / "out", "--compile")
    torch._dynamo.reset()
    counters.clear()
    lora = new_lora(setup)
    state = fd.TrainState(lora.loaded_weights(), fd.config_of(setup.settings))
    graphs = []
    for _ in fd.train(setup.settings, setup.cache, fd.read_pool(setup.cache), lora, state):
        graphs.append(counters["stats"]["unique_graphs"])
    validation = fd.Validation(setup.settings, setup.cache, lora)
    for number in range(2):
        validation.report(state.student, setup.run.out / f"{number}.png")
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = dict(counters["graph_break"])
    return SimpleNamespace(setup=setup, lora=lora, graphs=graphs, breaks=breaks)


@pytest.mark.slow
def test_blocks_are_compiled_whole_and_only_at_first(compiled):
    first, *steps, validation, again = compiled.graphs
    assert len(steps) == 3
    assert first > 0
    assert steps == [first] * 3
    assert again == validation
    assert compiled.breaks == {}


@pytest.mark.slow
def test_compiled_blocks_give_what_eager_ones_give(compiled):
    """The device check compares with eager blocks and float32."""
    found = errors(compiled.setup, compiled.lora)
    assert found.keys() == fd.CHECKS.keys()
    assert all(value < 1e-5 for value in found.values())


def test_compile_is_refused_with_int8(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fd, "find_spec", lambda name: True)
    with pytest.raises(SystemExit):
        parsed(tmp_path, "--quantize", "int8", "--compile")
    assert "--compile does not work with --quantize" in capsys.readouterr().err


@pytest.fixture
def asked(lora) -> list:
    """Positions that the network's own rotary embedding was asked for."""
    positions = []
    lora.net.pos_embed.base.register_forward_hook(
        lambda module, inputs, output: positions.append(inputs[0])
    )
    return positions


def velocity_of_teacher(setup, lora, height: int, width: int, **cond) -> torch.Tensor:
    """On latents of this size; the same draw each time."""
    channels, _, _ = setup.model.latent_shape(32)
    x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    cond = setup.cache.conditions([0], 1.0) | cond
    with torch.no_grad():
        return lora.velocity(None)(x, torch.ones(1), **cond)


def test_the_rotary_embedding_is_computed_once_for_each_grid(setup, lora, asked):
    sizes = [(8, 8), (4, 16)]  # of as many tokens
    first = [velocity_of_teacher(setup, lora, *size) for size in sizes]
    again = [velocity_of_teacher(setup, lora, *size) for size in sizes]
    assert len(asked) == 2
    assert not torch.equal(*asked)
    for v, w in zip(first, again):
        assert torch.equal(v, w)


def test_positions_are_told_apart_by_text_length_too(setup, lora, asked):
    short = {"text": setup.cache.conditions([0], 1.0)["text"][:, :5]}
    velocity_of_teacher(setup, lora, 8, 8)
    v = velocity_of_teacher(setup, lora, 8, 8, **short)
    assert len(asked) == 2
    lora.net.pos_embed.known.clear()
    assert torch.equal(v, velocity_of_teacher(setup, lora, 8, 8, **short))


def test_the_stock_pipeline_computes_its_own_rotary_embedding(setup, lora, asked):
    """It gives no key: what is remembered may be of another grid."""
    velocity_of_teacher(setup, lora, 4, 16)
    asked.clear()
    cond, noise = setup.cache.held_out([0], "rotary")
    fd.stock_sample(setup.model, noise, 2, cond, 3.0, batch=len(noise))
    assert len(asked) == 2


# ------------------------------------------------------------------ the LoRA layer by itself


def test_a_lora_layer_is_the_linear_layer_of_merged_weights_gradients_too():
    """Against autograd through W + B A, which knows nothing of the layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    base = torch.nn.Linear(6, 5).requires_grad_(False)
    layer = fd.LoRALinear(base, draw(3, 6), draw(5, 3), SimpleNamespace(on=True))
    x = draw(2, 7, 6).requires_grad_()
    A, B, x_copy = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, x))
    y = functional.linear(x_copy, base.weight + B @ A, base.bias)
    direction = draw(2, 7, 5)
    (layer(x) * direction).sum().backward()
    (y * direction).sum().backward()
    assert_close(layer(x), y)
    assert_close(layer.A.grad, A.grad)
    assert_close(layer.B.grad, B.grad)
    assert_close(x.grad, x_copy.grad)


def test_a_lora_layer_that_is_off_is_the_frozen_one():
    base = torch.nn.Linear(6, 5)
    layer = fd.LoRALinear(base, torch.ones(3, 6), torch.ones(5, 3), SimpleNamespace(on=False))
    x = torch.randn(2, 7, 6)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(("every", "again"), [(0, 0), (1, 4), (2, 2), (3, 2)])
def test_as_many_blocks_are_recomputed_as_asked_also_after_the_device_check(setup, every, again):
    lora = new_lora(setup, recompute_every=every)
    settings = fd.replace(setup.settings, recompute_every=every)
    calls = []
    for block in lora.blocks:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        norm.register_forward_hook(lambda *_: calls.append(1))
    v = lora.velocity(lora.loaded_weights())
    x, cond = setup.cache.noise([("a",)]), setup.cache.conditions([0], 1.0)
    counts = []
    for _ in range(2):
        calls.clear()
        v(x, torch.ones(1), **cond).sum().backward()
        counts.append(len(calls))
        fd.device_errors(settings, setup.cache, lora)
    assert len(lora.blocks) == 4
    assert counts == [4 + again] * 2
