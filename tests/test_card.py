"""The verdict on a student, its scale, and the model card that recommends it."""

import json
import math
import os
import sys
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from torch.testing import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"
from tiny_runs import SMALL, TINY, content, copied, fd, prepared, run, says

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


@pytest.mark.parametrize("rate", [10, 1])
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
        # Saved before its validation, with which the same command begins.
        assert len(fd.read_metadata(out / "checkpoint/state.safetensors")["rows"]) == 2
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


def test_nan_at_the_recommended_scale_saves_nothing(tmp_path, monkeypatch):
    """On other prompts and noises than those that chose the scale."""
    held_out = fd.held_out

    def spoiled(args, texts, purpose):
        cond, noise = held_out(args, texts, purpose)
        return cond, noise * math.nan if purpose == "check" else noise

    monkeypatch.setattr(fd, "held_out", spoiled)
    says("nothing is saved: at scale .* NaN or infinity.*another --out", "--out", tmp_path / "out")
    assert not {fd.LORA, "README.md", "results.json"} & set(content(tmp_path / "out"))


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


# ----------------------------------------------------------------------------------- the model card


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The folder of a run that is long enough for its scales to lie inside the search."""
    out = tmp_path_factory.mktemp("taught") / "out"
    run(out, "--iterations", 40, "--validate-every", 40)
    return out


def card(folder: Path, device="cpu", settings=(), out="out", **change) -> str:
    """The card that the run in a folder gets where it has other numbers."""
    results = json.loads((folder / "results.json").read_text())
    adapter = results["adapter"]
    adapter["scales"] = {int(n): scale for n, scale in adapter["scales"].items()}
    adapter["settings"] |= dict(settings)
    return fd.card(Namespace(device=device, out=Path(out)), results | {"adapter": adapter | change})


def snippet_of(text: str) -> str:
    return text.split("```python\n")[1].split("\n```\n")[0]


def calls_of(text: str, monkeypatch) -> Namespace:
    """What the card's snippet asks of diffusers."""
    diffusers, quantization = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    exec(snippet_of(text), {})
    pipe = diffusers.FluxPipeline.from_pretrained.return_value.to.return_value
    return Namespace(
        model=diffusers.FluxPipeline.from_pretrained.call_args,
        device=diffusers.FluxPipeline.from_pretrained.return_value.to.call_args,
        lora=pipe.load_lora_weights.call_args,
        scale=pipe.set_adapters.call_args,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config.call_args,
        sample=pipe.call_args,
        int8=quantization.Int8WeightOnlyConfig.called,
    )


OTHER = dict(
    base_model="someone/Tune", student_steps=5, shift=2.7, guidance=4.25, resolution=640, rank=24,
    max_sequence_length=77, iterations=1234, scales={2: 1.9, 5: 1.125, 16: 0.75}, uncalibrated=[16],
)  # fmt: skip


def test_every_number_of_the_card_is_the_runs_own(taught, monkeypatch):
    text = card(taught, "cuda", {"rank": 24}, **OTHER)
    calls = calls_of(text, monkeypatch)
    assert calls.model.args == ("someone/Tune",) and calls.model.kwargs == {"dtype": torch.bfloat16}
    assert calls.device.args == ("cuda",)
    assert calls.lora.args == ("out",) and calls.lora.kwargs["weight_name"] == fd.LORA
    assert calls.scale.args == ("scfm", 1.125) and calls.scheduler.kwargs["shift"] == 2.7
    assert calls.scheduler.kwargs["use_dynamic_shifting"] is False
    assert calls.sample.kwargs == {
        "num_inference_steps": 5, "guidance_scale": 4.25, "max_sequence_length": 77,
        "height": 640, "width": 640,
    }  # fmt: skip
    assert "# `someone/Tune` in 5 steps" in text and "A LoRA of rank 24" in text
    assert 'set_adapters(["scfm", "other"], [1.125, 1.0])' in text
    assert "bfloat16: use the same precision" in text and "after 1234 iterations" in text
    comfy = text.split("## ComfyUI")[1].split("## ")[0]
    nodes = dict(line.strip("| ").split(" | ") for line in comfy.splitlines() if "|" in line)
    assert nodes["ModelSamplingAuraFlow"] == "shift 2.7"
    assert nodes["FluxGuidance"] == "guidance 4.25"
    assert nodes["KSampler"] == ("steps 5, cfg 1, sampler euler, scheduler simple, denoise 1")
    loader = next(name for name in nodes if "LoraLoaderModelOnly" in name)
    assert "not the Bypass" in loader and nodes[loader] == "strength 1.125"
    assert all(x in comfy.split("Not suited")[1] for x in ("SD3", "normal", "beta", "lcm"))


def shifted(steps: int, shift: str) -> list[float]:
    """Eq. 17 in exact fractions."""
    s = Fraction(shift)
    grid = [1 - Fraction(i, steps) for i in range(steps + 1)]
    return [float(s * u / (1 + (s - 1) * u)) for u in grid]


def test_times_for_manual_sigmas(taught):
    assert fd.times(3, 3.0) == "1, 0.857143, 0.6, 0"  # as a user of ComfyUI types it
    text = card(taught, **OTHER)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count("|") == 4]
    rows = {cells[0]: cells[1:] for cells in rows if cells[-1].startswith("`1,")}
    assert {n: row[0] for n, row in rows.items()} == {"2": "1.9", "5": "1.125", "16": "none found"}
    for n, (_, said) in rows.items():
        numbers = [float(x) for x in said.strip("`").split(", ")]
        assert numbers == pytest.approx(shifted(int(n), "2.7"), rel=5e-6)
    assert f"ManualSigmas: {rows['5'][1]}" in text
    for shift in ("0.00001", "1000"):
        assert "e" not in fd.times(16, float(shift))
        numbers = [float(x) for x in fd.times(16, float(shift)).split(", ")]
        assert numbers == pytest.approx(shifted(16, shift), rel=5e-6)


@pytest.mark.parametrize(("low", "high", "said"), [(2.5, 4.5, True), (1, 3, False), (4, 5, False)])
def test_the_shift_without_a_node_is_said_where_it_was_trained(taught, low, high, said):
    text = " ".join(card(taught, settings={"shift_range": [low, high]}).split())
    assert (f"{math.exp(1.15):.3f}" in text) == ("Without a model sampling node" in text) == said
    assert (f"trained on, {low:g} to {high:g}." in text) == said


def test_what_the_layers_mean_for_other_tools(taught):
    every, blocks = (card(taught, settings={"layers": name}) for name in ("all", "blocks"))
    assert "InvokeAI refuses" in every and "40 % of the gain" in every
    assert "InvokeAI" in blocks and "refuses" not in blocks and "%" not in blocks.split("## ")[0]
    assert "untested" not in every + blocks


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_precision_of_the_base(taught, monkeypatch, device, dtype):
    text = card(taught, device)
    assert f"on the base model in {dtype}: use the same precision" in text
    assert "int8" not in snippet_of(text) and "torchao" not in text
    text = card(taught, device, {"quantize": "int8"})
    assert f"int8 (the weights of its transformer, by torchao) and {dtype}: use" in text
    calls = calls_of(text, monkeypatch)
    assert calls.int8 and calls.model.kwargs["dtype"] == getattr(torch, dtype)
    assert "quantization_config" in calls.model.kwargs


def test_the_snippet_of_an_int8_run_gives_its_latents(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    run(tmp_path / "out", "--quantize", "int8")
    snippet = snippet_of((tmp_path / "out" / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.replace("'tiny_flux'", repr(str(TINY))).replace("PROMPT", "a red circle"), names)
    kinds = {type(p).__name__ for p in names["pipe"].transformer.parameters()}
    assert "Int8Tensor" in kinds or any("Quantized" in kind for kind in kinds), kinds
    assert names["image"].size == (32, 32)


def latents(pipe) -> torch.Tensor:
    return pipe(
        "a red circle", generator=torch.Generator().manual_seed(0), height=32, width=32,
        num_inference_steps=3, max_sequence_length=8, output_type="latent",
    ).images  # fmt: skip


def stock(folder: Path):
    """As in the card."""
    pipe = fd.FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder, weight_name=fd.LORA, adapter_name="scfm")
    scale = fd.read_metadata(folder / fd.LORA)["scales"]["3"]
    assert abs(scale - 1) > 0.2
    pipe.set_adapters("scfm", scale)
    return pipe, scale


def test_fused_as_the_card_says_it_is_the_same(taught):
    pipe, scale = stock(taught)
    unfused = latents(pipe)
    pipe.fuse_lora()
    assert_close(latents(pipe), unfused, rtol=0, atol=1e-4)
    pipe, scale = stock(taught)
    pipe.fuse_lora(lora_scale=scale)
    assert (latents(pipe) - unfused).abs().max() > 0.01  # the scale twice


def test_a_second_lora_switches_this_one_off_unless_both_are_named(taught):
    pipe, scale = stock(taught)
    alone = latents(pipe)
    pipe.load_lora_weights(taught, weight_name=fd.LORA, adapter_name="other")
    pipe.set_adapters("other", 0.0)
    without = latents(pipe)
    pipe, scale = stock(taught)
    other = {name: 0 * x for name, x in fd.load_file(taught / fd.LORA).items()}
    pipe.load_lora_weights(other, adapter_name="other")
    assert pipe.get_active_adapters() == ["other"]
    assert_close(latents(pipe), without)  # a LoRA of zeros, and the teacher
    pipe.set_adapters(["scfm", "other"], [scale, 1.0])
    assert_close(latents(pipe), alone)
    assert (alone - without).abs().max() > 0.05


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


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_leaves_the_card_whole(taught, monkeypatch, name):
    text = card(taught, out=f"/tmp/{name}", base_model=name)
    assert head_of(text).keys() == {
        "library_name", "license", "license_name", "pipeline_tag", "tags",
    }  # fmt: skip
    tokens = MarkdownIt().parse(text.split("\n---\n", 1)[1])
    title = tokens[tokens.index(next(t for t in tokens if t.type == "heading_open")) + 1]
    assert [child.type for child in title.children] == ["code_inline", "text"]
    assert title.children[0].content.strip() == " ".join(name.split())
    assert len([t for t in tokens if t.type == "heading_open" and t.tag == "h1"]) == 1
    assert len([t for t in tokens if t.type == "fence"]) == 1
    calls = calls_of(text, monkeypatch)
    assert calls.model.args == (name,) and calls.lora.args == (name,)


def test_text_of_prompts_in_the_settings_is_code(taught):
    """--stop-when-matched keeps the held-out prompts among them."""
    prompts = ["a *cat*", "# `b`\n", "<img src=x>", "{x}"]
    text = card(taught, settings={"stop": [3.0, 3.5, prompts, 2, 100]})
    tokens = MarkdownIt().parse(text.split("\n---\n", 1)[1])
    last = tokens[-2].children
    assert {child.type for child in last} <= {"code_inline", "text", "softbreak"}
    assert any("<img src=x>" in child.content for child in last if child.type == "code_inline")


@pytest.mark.parametrize("name", ["someone/Tune-1.0_x", fd.FLUX])
def test_a_name_of_the_hub_is_the_base_model(taught, name):
    head = head_of(card(taught, base_model=name))
    assert head["base_model"] == name and head["base_model_relation"] == "adapter"


@pytest.mark.parametrize("form", ["relative", "absolute", "dots"])
def test_no_path_of_the_machine_is_written(tmp_path, monkeypatch, form):
    """Of a folder the last part alone, as a string of Python; and the snippet runs beside it."""
    (place := tmp_path / "secret place").mkdir()
    model, out = copied(TINY, place / """my "Flux": é"""), place / "it's out"
    (other := place / "other").mkdir()
    monkeypatch.chdir(other)
    given = {"relative": f"../{model.name}", "absolute": model, "dots": f"../other/../{model.name}"}
    fd.main([*SMALL.split(), "--model", str(given[form]), "--out", f"../{out.name}"])
    text = (out / "README.md").read_text("utf-8")
    assert "base_model" not in head_of(text)
    for name, data in content(out).items():
        assert b"secret place" not in data, name
    assert "../" not in text + (out / "results.json").read_text()
    assert fd.read_metadata(out / fd.LORA)["base_model"] == model.name
    monkeypatch.chdir(place)
    names = {}
    exec(snippet_of(text), names)
    assert names["image"].size == (32, 32)
