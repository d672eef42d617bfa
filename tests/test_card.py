"""The model card: every number is the run's own, and what it says to do gives what it says."""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from tiny_runs import SMALL, TINY, content, copied, fd, run
from torch.testing import assert_close


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The folder of a run that is long enough for its scales to lie inside the search."""
    out = tmp_path_factory.mktemp("taught") / "out"
    run(out, "--iterations", 40, "--validate-every", 40)
    return out


DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def card(folder: Path, device="cpu", settings=None, out="out", teacher_steps=8, **change) -> str:
    """The card that the run in a folder gets where it has other numbers."""
    results = json.loads((folder / "results.json").read_text())
    adapter = results["adapter"]
    adapter["scales"] = {int(n): scale for n, scale in adapter["scales"].items()}
    adapter["settings"] |= settings or {}
    results |= {"adapter": adapter | change, "teacher_steps": teacher_steps}
    return fd.card(
        results, Path(out), fd.Flux({}, {}), SimpleNamespace(device=device, dtype=DTYPES[device])
    )


def snippet_of(text: str) -> str:
    return text.split("```python\n")[1].split("\n```\n")[0]


def calls_of(text: str, monkeypatch) -> SimpleNamespace:
    """What the card's snippet asks of diffusers."""
    diffusers, quantization = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    exec(snippet_of(text), {})
    pipe = diffusers.FluxPipeline.from_pretrained.return_value.to.return_value
    return SimpleNamespace(
        model=diffusers.FluxPipeline.from_pretrained.call_args,
        device=diffusers.FluxPipeline.from_pretrained.return_value.to.call_args,
        lora=pipe.load_lora_weights.call_args,
        scale=pipe.set_adapters.call_args,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.call_args,
        sample=pipe.call_args,
        int8=quantization.Int8WeightOnlyConfig.called,
    )


# ------------------------------------------------------------------------------------------ numbers

OTHER = dict(
    base_model="someone/Tune", student_steps=5, shift=2.7, guidance=4.25, resolution=640, rank=24,
    max_sequence_length=77, iterations=1234, scales={2: 1.9, 5: 1.125, 16: 0.75}, uncalibrated=[16],
)  # fmt: skip


def test_every_number_of_the_snippet_is_the_runs_own(taught, monkeypatch):
    calls = calls_of(card(taught, "cuda", **OTHER), monkeypatch)
    assert calls.model.args == ("someone/Tune",)
    assert calls.model.kwargs == {"dtype": torch.bfloat16}
    assert calls.device.args == ("cuda",)
    assert calls.lora.args == ("out",)
    assert calls.lora.kwargs["weight_name"] == fd.LORA
    assert calls.scale.args == ("scfm", 1.125)
    assert (calls.scheduler.args, calls.scheduler.kwargs) == ((), {"shift": 2.7})
    assert calls.sample.kwargs == {
        "prompt": "PROMPT", "num_inference_steps": 5, "guidance_scale": 4.25,
        "max_sequence_length": 77, "height": 640, "width": 640,
    }  # fmt: skip


def test_every_number_of_the_text_is_the_runs_own(taught):
    text = " ".join(card(taught, "cuda", teacher_steps=24, **OTHER).split())
    assert "# `someone/Tune` in 5 steps" in text
    assert "A LoRA of rank 24" in text
    assert 'set_adapters(["scfm", "other"], [1.125, 1.0])' in text
    assert "bfloat16: use the same" in text
    assert "after 1234 iterations" in text
    assert "Teacher in 5 steps, student in 5, teacher in 24]" in text
    assert "to 24 steps of the teacher" in text


def test_every_number_of_the_nodes_is_the_runs_own(taught):
    comfy = card(taught, **OTHER).split("## ComfyUI")[1].split("## ")[0]
    nodes = dict(line.strip("| ").split(" | ") for line in comfy.splitlines() if "|" in line)
    assert nodes["the empty latent image"] == "width and height 640, as in training"
    assert nodes["ModelSamplingAuraFlow"] == "shift 2.7"
    assert nodes["FluxGuidance"] == "guidance 4.25"
    assert nodes["KSampler"] == "steps 5, cfg 1, sampler euler, scheduler simple, denoise 1"
    loader = next(name for name in nodes if "LoraLoaderModelOnly" in name)
    assert "not the Bypass" in loader
    assert nodes[loader] == "strength 1.125"
    not_suited = comfy.split("Not suited")[1]
    assert all(name in not_suited for name in ("SD3", "normal", "beta", "lcm"))


def shifted(steps: int, shift: str) -> list[float]:
    """Eq. 17 in exact fractions."""
    s = Fraction(shift)
    grid = [1 - Fraction(i, steps) for i in range(steps + 1)]
    return [float(s * u / (1 + (s - 1) * u)) for u in grid]


def test_times_are_as_a_user_of_comfyui_types_them():
    assert fd.format_times(3, 3.0) == "1, 0.857143, 0.6, 0"


@pytest.mark.parametrize("shift", ["0.00001", "1", "1000"])
def test_times_have_six_digits_and_no_exponent(shift):
    said = fd.format_times(16, float(shift))
    assert "e" not in said
    assert [float(x) for x in said.split(", ")] == pytest.approx(shifted(16, shift), rel=5e-6)


def test_every_number_of_steps_has_its_scale_and_times(taught):
    text = card(taught, **OTHER)
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count("|") == 4]
    rows = {cells[0]: cells[1:] for cells in table if cells[-1].startswith("`1,")}
    assert {n: scale for n, (scale, _) in rows.items()} == {
        "2": "1.9", "5": "1.125", "16": "none found"
    }  # fmt: skip
    for n, (_, said) in rows.items():
        numbers = [float(x) for x in said.strip("`").split(", ")]
        assert numbers == pytest.approx(shifted(int(n), "2.7"), rel=5e-6)
    assert f"ManualSigmas: {rows['5'][1]}" in text


@pytest.mark.parametrize(("low", "high", "said"), [(2.5, 4.5, True), (1, 3, False), (4, 5, False)])
def test_the_shift_without_a_node_is_said_where_it_was_trained(taught, low, high, said):
    text = " ".join(card(taught, settings={"shift_range": [low, high]}).split())
    assert ("Without a model sampling node" in text) == said
    assert (f"{math.exp(1.15):.3f}" in text) == said
    assert (f"trained on, {low:g} to {high:g}." in text) == said


def test_what_the_layers_mean_for_other_tools(taught):
    every = card(taught, settings={"layers": "all"})
    assert "InvokeAI refuses" in every
    assert "95 % of the gain" in every
    blocks = card(taught, settings={"layers": "blocks"})
    assert "InvokeAI" in blocks
    assert "refuses" not in blocks
    assert "%" not in blocks.split("## ")[0]


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_precision_of_the_base(taught, device, dtype):
    text = card(taught, device)
    assert f"the base model ran in {dtype}: use the same" in text
    assert "int8" not in snippet_of(text)
    assert "torchao" not in text


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_precision_of_an_int8_base(taught, monkeypatch, device, dtype):
    text = card(taught, device, {"quantize": "int8"})
    assert f"int8 (the weights of its transformer, by torchao) and {dtype}: use" in text
    calls = calls_of(text, monkeypatch)
    assert calls.int8
    assert calls.model.kwargs["dtype"] == DTYPES[device]
    assert "quantization_config" in calls.model.kwargs


def test_the_snippet_of_an_int8_run_renders_in_int8(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    run(tmp_path / "out", "--quantize", "int8")
    snippet = snippet_of((tmp_path / "out" / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.replace("'tiny_flux'", repr(str(TINY))).replace("PROMPT", "a red circle"), names)
    kinds = {type(p).__name__ for p in names["pipe"].transformer.parameters()}
    assert "Int8Tensor" in kinds or any("Quantized" in kind for kind in kinds), kinds
    assert names["image"].size == (32, 32)


# ------------------------------------------------------------------------------- what the card says


def latents(pipe) -> torch.Tensor:
    return pipe(
        "a red circle", generator=torch.Generator().manual_seed(0), height=32, width=32,
        num_inference_steps=3, max_sequence_length=8, output_type="latent",
    ).images  # fmt: skip


SCALE = 1.5  # neither 1 nor its own square passes for it


def stock(folder: Path, scale: float = SCALE):
    """As in the card."""
    pipe = fd.FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder, weight_name=fd.LORA, adapter_name="scfm")
    pipe.set_adapters("scfm", scale)
    return pipe


def test_fused_as_the_card_says_it_is_the_same(taught):
    pipe = stock(taught)
    unfused = latents(pipe)
    pipe.fuse_lora()
    assert_close(latents(pipe), unfused, rtol=0, atol=1e-4)


def test_fused_with_a_lora_scale_the_scale_is_applied_twice(taught):
    """What the card warns of."""
    unfused = latents(stock(taught))
    pipe = stock(taught)
    pipe.fuse_lora(lora_scale=SCALE)
    assert (latents(pipe) - unfused).abs().max() > 0.01
    assert_close(latents(pipe), latents(stock(taught, SCALE**2)), rtol=0, atol=1e-4)


def test_a_second_lora_switches_this_one_off_unless_both_are_named(taught):
    teacher = latents(stock(taught, 0.0))
    pipe = stock(taught)
    alone = latents(pipe)
    assert (alone - teacher).abs().max() > 0.05
    zeros = {name: 0 * x for name, x in load_file(taught / fd.LORA).items()}
    pipe.load_lora_weights(zeros, adapter_name="other")
    assert pipe.get_active_adapters() == ["other"]
    assert_close(latents(pipe), teacher)
    pipe.set_adapters(["scfm", "other"], [SCALE, 1.0])
    assert_close(latents(pipe), alone)


# ------------------------------------------------------------------------- names of models, folders

NAMES = [
    "plain",
    "with space: and colon",
    """qu"ote's""",
    "naïve 模型 🦊",
    "new\nline\n---\n# title",
    "`tick` ``two`` *star* _[x](y)_ <b>|",
    "{brace} %s \\n #tag",
]


def head_of(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text[4 : text.index("\n---\n", 4)])


def markdown_of(text: str) -> list:
    """The tokens of what follows the head."""
    return MarkdownIt().parse(text.split("\n---\n", 1)[1])


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_leaves_the_card_whole(taught, monkeypatch, name):
    text = card(taught, out=f"/tmp/{name}", base_model=name)
    assert head_of(text).keys() == {
        "library_name", "license", "license_name", "pipeline_tag", "tags",
    }  # fmt: skip
    tokens = markdown_of(text)
    titles = [i for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h1"]
    assert len(titles) == 1
    title = tokens[titles[0] + 1]
    assert [child.type for child in title.children] == ["code_inline", "text"]
    assert title.children[0].content.strip() == " ".join(name.split())
    assert len([t for t in tokens if t.type == "fence"]) == 1
    calls = calls_of(text, monkeypatch)
    assert calls.model.args == (name,)
    assert calls.lora.args == (name,)


def test_text_of_prompts_in_the_settings_is_code(taught):
    """--stop-when-matched keeps the held-out prompts among them."""
    prompts = ["a *cat*", "# `b`\n", "<img src=x>", "{x}"]
    text = card(taught, settings={"stop": [3.0, 3.5, prompts, 2, 100]})
    last = markdown_of(text)[-2].children
    assert {child.type for child in last} <= {"code_inline", "text", "softbreak"}
    assert any("<img src=x>" in child.content for child in last if child.type == "code_inline")


@pytest.mark.parametrize("name", ["someone/Tune-1.0_x", fd.Settings().model])
def test_a_name_of_the_hub_is_the_base_model(taught, name):
    head = head_of(card(taught, base_model=name))
    assert head["base_model"] == name
    assert head["base_model_relation"] == "adapter"


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder whose path must stay a secret, with a model in it."""
    folder = tmp_path / "secret place"
    (folder / "other").mkdir(parents=True)
    copied(TINY, folder / """my "Flux": é""")
    return folder


@pytest.mark.parametrize("form", ["relative", "absolute", "dots", "dot"])
def test_no_path_of_the_machine_is_written(place, monkeypatch, form):
    """Of a folder the last part alone, as a string of Python; the snippet runs next to it."""
    model = place / """my "Flux": é"""
    out = place / "it's out"
    forms = {
        "relative": f"../{model.name}",
        "absolute": model,
        "dots": f"../other/../{model.name}",
        "dot": ".",
    }
    monkeypatch.chdir(model if form == "dot" else place / "other")
    fd.main([*SMALL.split(), "--model", str(forms[form]), "--out", f"../{out.name}"])
    files = content(out)
    assert not [name for name, data in files.items() if b"secret place" in data]
    text = (out / "README.md").read_text("utf-8")
    assert "../" not in text
    assert b"../" not in files["results.json"]
    assert "base_model" not in head_of(text)
    assert fd.read_metadata(out / fd.LORA)["base_model"] == model.name
    monkeypatch.chdir(place)
    names = {}
    exec(snippet_of(text), names)
    assert names["image"].size == (32, 32)


def test_the_number_of_processes_is_told(monkeypatch):
    machine = fd.Machine()
    assert machine.describe()["device"] == "CPU"
    monkeypatch.setattr(machine, "processes", 4)
    assert machine.describe()["device"] == "4 x CPU"
