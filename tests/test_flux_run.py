"""flux_distill.py, whole runs on the tiny Flux: what they leave, and what a second one does."""

import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, content, copied, edited, fd, parsed, prepared, run, says
from torch.testing import assert_close

import shortcut as sc

SAMPLERS = ("teacher", "student", "student, scaled")


def times_of(folder: Path) -> dict[Path, int]:
    """When each file was written, those of phases (costs.json) among them."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def table_of(out: Path) -> dict[tuple[str, int], dict]:
    results = json.loads((out / "results.json").read_text())
    return {(row["sampler"], row["steps"]): row for row in results["table"]}


# -------------------------------------------------------------------------------- what a run leaves


def test_files_of_a_run(done):
    names = {path.name for path in done.iterdir() if path.is_file() and path.name != ".lock"}
    assert names == {*fd.OUTPUTS, fd.LORA}
    assert [path.name for path in (done / "checkpoint").iterdir()] == ["state.safetensors"]
    images = sorted(path.name for path in (done / "validation").iterdir())
    assert images == ["000002.png", "000004.png", "saved.png"]
    assert not list(done.rglob(".part*"))


def test_log_of_a_run(done):
    rows = (done / "log.csv").read_text().splitlines()
    assert len(rows) == 5
    assert rows[0] == (
        "iteration,loss,teacher_loss,residual,gradient_norm,learning_rate,"
        "lam_2,lam_3,teacher_rmse,rmse"
    )


def test_table_of_a_run(done):
    table = table_of(done)
    assert set(table) == {(sampler, n) for sampler in SAMPLERS for n in (2, 3)}
    assert all(0 < row["rmse"] < 2 and 5 < row["psnr"] < 60 for row in table.values())
    assert table["teacher", 3]["rmse"] < table["teacher", 2]["rmse"]
    scales = fd.read_metadata(done / fd.LORA)["scales"]
    for n in (2, 3):
        assert table["teacher", n]["scale"] == 0
        assert table["student", n]["scale"] == 1
        assert table["student, scaled", n]["scale"] == scales[str(n)]
    results = json.loads((done / "results.json").read_text())
    assert results["seed_to_seed"] > table["teacher", 2]["rmse"]
    assert results["teacher_steps"] == 8


def test_the_table_is_what_the_saved_lora_gives(done, setup):
    """On the prompts and noises of the comparison, against eight steps of the teacher."""
    pipe = fd.load_student(setup.model, done, 0.0)
    cond, noise = setup.cache.held_out(setup.data.comparison, "compare")
    fine = fd.stock_sample(setup.model, noise, 8, cond, shift=3.0, batch=4)
    for (_, n), row in table_of(done).items():
        pipe.set_adapters("student", row["scale"])
        end = fd.stock_sample(setup.model, noise, n, cond, shift=3.0, batch=4)
        distance = (end - fine).square().mean().sqrt().item()
        assert row["rmse"] == pytest.approx(distance, rel=1e-3)


@pytest.mark.parametrize("name", ["comparison.png", "training.png", "validation/saved.png"])
def test_figures_of_a_run_are_not_empty(done, name):
    with Image.open(done / name) as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_steps_and_teacher_steps_are_obeyed(tmp_path, capsys):
    """A teacher of six steps is at no distance from itself, and six steps make the pool."""
    out = tmp_path / "out"
    flags = ["--teacher-steps", 6, "--steps", 6, 1, "--iterations", 1]
    run(out, *flags)
    table = table_of(out)
    assert set(table) == {(sampler, n) for sampler in SAMPLERS for n in (1, 3, 6)}
    assert table["teacher", 6]["rmse"] == 0
    assert table["teacher", 3]["rmse"] > 0.1
    said = capsys.readouterr().out
    assert "RMSE of latents / PSNR of images, compared with the teacher's 6 steps" in said
    assert "| Euler steps | 1 | 3 | 6 |" in said
    assert "RMSE to the teacher's 6 steps is" in said
    assert "lam_1,lam_3,lam_6" in (out / "log.csv").read_text()
    assert set(fd.read_metadata(out / fd.LORA)["scales"]) == {"1", "3", "6"}

    setup = prepared(out, *flags)
    setup.model.load("image")
    cond = setup.cache.conditions([pair.text for pair in setup.data.pairs], 3.5)
    noise = setup.cache.noise([("pool", i) for i in range(len(setup.data.pairs))])
    shift = sum(setup.settings.shift_range) / 2
    stock = fd.stock_sample(setup.model, noise, 6, cond, shift=shift, batch=8)
    pool = setup.cache.read("latent", range(len(setup.data.pairs)))["latent"]
    assert_close(pool, stock, rtol=0, atol=5e-5)


# ------------------------------------------------------------------------------------- a second run


def test_a_second_run_has_nothing_to_do(done, capsys):
    before = content(done)
    written = times_of(done)
    run(done)
    assert content(done) == before
    assert times_of(done) == written  # no phase began: costs.json would say so
    assert "| student, scaled |" in capsys.readouterr().out


def test_another_sampling_shift_only_calibrates_and_compares(done, tmp_path):
    out = copied(done, tmp_path / "out")
    before = times_of(out)
    run(out, "--shift", 2)
    written = [path for path, time in times_of(out).items() if before.get(path) != time]
    assert {str(path.relative_to(out)) for path in written} == {
        "README.md",
        "cache/check.safetensors",
        "comparison.png",
        "costs.json",
        fd.LORA,
        "results.json",
        "validation/saved.png",
    }
    assert fd.read_metadata(out / fd.LORA)["shift"] == 2
    assert (out / "results.json").read_bytes() != (done / "results.json").read_bytes()


def test_other_step_counts_only_calibrate_and_compare(done, tmp_path):
    out = copied(done, tmp_path / "out")
    before = (out / fd.STATE).stat().st_mtime_ns
    run(out, "--steps", 4)
    assert (out / fd.STATE).stat().st_mtime_ns == before
    assert {n for _, n in table_of(out)} == {3, 4}


def test_cache_and_checkpoint_of_a_finished_run_can_go(done, tmp_path):
    out = copied(done, tmp_path / "out")
    for name in ("cache", "checkpoint"):
        shutil.rmtree(out / name)
    before = content(out)
    run(out)
    assert content(out) == before
    says("is finished and is left alone; .* are missing", "--out", out, "--shift", 2)
    assert (out / fd.LORA).read_bytes() == before[fd.LORA]


def test_a_run_of_other_settings_is_left_alone(done, tmp_path):
    out = copied(done, tmp_path / "out")
    before = content(out)
    says(r"other settings \(--rank 4, now 8\)", "--out", out, "--rank", 8)
    words = (
        r"other settings \(--paper False, now True; --shift-range \[2.0, 4.0\], now \[2.5, 4.5\]\)"
    )
    says(words, "--out", out, "--paper")
    assert content(out) == before


def refusal(out: Path, first: list, then: list) -> str:
    """What is said where training with the first flags has begun, and the second ones are given."""
    _, begun, _ = fd.prepare(parsed(out, *first), fd.Machine())
    fd.write_tensors(begun.state, {"student": torch.zeros(1)}, {"settings": begun.identity})
    before = content(out)
    with pytest.raises(SystemExit) as stopped:
        fd.prepare(parsed(out, *then), fd.Machine())
    assert content(out) == before
    found = re.search(r"holds a run with other settings \((.*)\): repeat them", str(stopped.value))
    return found[1]


def test_a_run_on_other_data_is_named_in_words(tmp_path):
    """In none of these three are there digests, which say nothing."""
    said = refusal(tmp_path / "out", [], ["--limit", 5])
    assert said.startswith("other training data: see --images, ")
    assert "--limit" in said


def test_a_run_of_another_model_is_named_in_words(tmp_path):
    other = edited(tmp_path, "scheduler/scheduler_config.json", base_shift=0.6)
    assert refusal(tmp_path / "out", [], ["--model", other]) == "another model"


def test_a_run_with_other_held_out_prompts_is_named_in_words(tmp_path):
    """They count where validations decide when training ends."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(f"a red circle\na red ring\na blue ring\n{file.stem}\n")
    first, then = (["--prompts", file, "--stop-when-matched"] for file in files)
    assert refusal(tmp_path / "out", first, then) == "other held-out prompts"


def test_a_run_of_other_passes_is_named_with_both_numbers(tmp_path):
    """Of an optimizer step, in all processes together."""
    assert refusal(tmp_path / "out", ["--accumulate", 2], []) == "--accumulate x processes 2, now 1"


def test_images_that_compare_have_at_most_eight_columns(tmp_path):
    """Of nine validation and 18 comparison prompts."""
    out = tmp_path / "out"
    run(out, "--held-out", 27, "--iterations", 1, "--batch", 36, "--limit", 1)
    for name in ("comparison.png", "validation/000001.png", "validation/saved.png"):
        with Image.open(out / name) as image:
            assert image.width == round((8 * 1.7 + 0.7) * 110)


def test_the_teachers_steps_decide_when_a_run_stops(tmp_path):
    """With images the data do not depend on them."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("all red")
    runs = {}
    for stop in ([], ["--stop-when-matched"]):
        for steps in (8, 10):
            flags = ["--images", folder, "--teacher-steps", steps, *stop]
            settings, machine = parsed(tmp_path / "out", *flags), fd.Machine()
            _, runs[len(stop), steps], _ = fd.prepare(settings, machine)
    assert runs[0, 8].identity == runs[0, 10].identity
    assert runs[0, 8].key != runs[0, 10].key
    assert runs[1, 8].identity != runs[1, 10].identity


# ------------------------------------------------------------------------------- the card, the LoRA


def test_the_model_card_and_its_snippet(done, monkeypatch):
    text = (done / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "diffusers"
    assert head["license"] == "other"
    assert "base_model" not in head
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
    results["adapter"] |= {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "scales": {int(n): scale for n, scale in results["adapter"]["scales"].items()},
    }
    machine = fd.Machine()
    machine.device, machine.dtype = "cuda", torch.bfloat16
    card = fd.card(results, Path("x"), fd.Flux({}, {}), machine)
    head = yaml.safe_load(card.split("---")[1])
    assert head["license_name"] == "flux-1-dev-non-commercial-license"
    assert head["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert "dtype=torch.bfloat16" in card


def test_a_fresh_process_with_only_diffusers_gives_the_same_latents(done, tmp_path):
    setup = prepared(tmp_path / "other")  # for the noise that the check was made with
    _, noise = setup.cache.held_out([0], "check")
    packed = FluxPipeline._pack_latents(noise, *noise.shape)
    save_file({"noise": packed}, tmp_path / "noise.safetensors")
    scale = fd.read_metadata(done / fd.LORA)["scales"]["3"]
    prompts = [setup.data.held_out[0]] * 2
    code = f"""if True:
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        from safetensors.torch import load_file, save_file
        torch.set_num_threads(1)
        pipe = FluxPipeline.from_pretrained({str(TINY)!r}, dtype=torch.float32)
        pipe.load_lora_weights({str(done)!r}, adapter_name="x")
        pipe.set_adapters("x", {scale})
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        noise = load_file({str(tmp_path / "noise.safetensors")!r})["noise"]
        x = pipe({prompts!r}, latents=noise, height=32, width=32, num_inference_steps=3,
                 guidance_scale=3.5, max_sequence_length=8, output_type="latent").images
        save_file({{"x": x}}, {str(tmp_path / "latents.safetensors")!r})
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    theirs = load_file(tmp_path / "latents.safetensors")["x"]
    ours = load_file(done / fd.CHECK)["latents"]
    assert_close(theirs, FluxPipeline._pack_latents(ours, *ours.shape), rtol=0, atol=1e-5)


def test_a_wrong_file_fails_the_self_check(done, tmp_path):
    out = copied(done, tmp_path / "out")
    tensors = load_file(out / fd.LORA)
    metadata = fd.read_metadata(out / fd.LORA)
    tensors |= {name: 1.01 * x for name, x in tensors.items() if "lora_B" in name}
    fd.write_tensors(out / fd.LORA, tensors, metadata)
    (out / "results.json").unlink()
    with pytest.raises(SystemExit, match="self-check failed"):
        run(out)
    assert not (out / "results.json").exists()


def test_held_out_prompts_are_not_trained_on(tmp_path):
    """All others are, without --limit."""
    settings = parsed(tmp_path / "out", "--limit", 0)
    data = fd.prepare(settings, fd.Machine())[2].data
    *others, a, b, c = TINY.joinpath("prompts.txt").read_text().splitlines()
    trained = [data.texts[pair.text] for pair in data.pairs]
    assert trained == [text for text in others if text not in (a, b, c)]
    held_out = [data.texts[i] for i in (*data.validation, *data.comparison)]
    assert held_out == [a, b, c]
    assert not set(data.validation) & set(data.comparison)


# ------------------------------------------------------------------------------------------- sample


def test_sample_only_renders(done, tmp_path, capsys):
    out = copied(done, tmp_path / "out")
    before = times_of(out)
    fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle", "ein Haus/è"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 2
    for path in paths:
        assert path.parent == out / "samples"
        with Image.open(path) as image:
            assert image.size == (32, 32)
    assert times_of(out) == before | times_of(out / "samples")


def test_sample_needs_a_lora(tmp_path):
    """And makes no folder for one."""
    with pytest.raises(SystemExit, match="distil first, without --sample"):
        fd.main(["--model", str(TINY), "--out", str(tmp_path / "none"), "--sample", "a"])
    assert not (tmp_path / "none").exists()


def test_sample_refuses_a_lora_of_another_version(done, tmp_path):
    out = copied(done, tmp_path / "out")
    adapter = fd.read_metadata(out / fd.LORA)
    adapter["settings"]["version"] = fd.VERSION - 1
    fd.write_tensors(out / fd.LORA, load_file(out / fd.LORA), adapter)
    before = content(out)
    sentence = f"{fd.LORA} is from another version of this program: render with that version"
    with pytest.raises(SystemExit, match=sentence):
        fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle"])
    assert content(out) == before


def test_sample_refuses_another_model(done, tmp_path):
    folder = edited(tmp_path, "scheduler/scheduler_config.json", base_shift=0.6)
    with pytest.raises(SystemExit, match="was made for tiny_flux"):
        fd.main(["--model", str(folder), "--out", str(done), "--sample", "a red circle"])


@pytest.mark.parametrize("prompt", ["狐" * 200, "é" * 150, "a" * 300])
def test_sample_gives_long_prompts_names_that_file_systems_take(done, tmp_path, prompt, capsys):
    out = copied(done, tmp_path / "out")
    flags = ["--resolution", 32, "--shift", 3.25, "--guidance", 3.125, "--seed", 2**62]
    fd.main(["--model", str(TINY), "--out", str(out), *map(str, flags), "--sample", prompt])
    (path,) = (out / "samples").iterdir()
    assert len(path.name.encode()) + len(".part-10-") <= 255
    assert prompt[:30] in path.name


@pytest.mark.parametrize("resolution", [32, 64])
def test_sample_says_if_the_lora_was_trained_at_another_resolution(
    done, tmp_path, resolution, capsys
):
    out = copied(done, tmp_path / "out")
    flags = ["--out", str(out), "--resolution", str(resolution)]
    fd.main(["--model", str(TINY), *flags, "--sample", "a red ring"])
    told = "the LoRA was trained at 32 px: --resolution 64 is untried"
    assert (told in capsys.readouterr().err) == (resolution == 64)


# ------------------------------------------------------------------------------------------- memory


def loads_noted(monkeypatch, look) -> list[bool]:
    """What `look` says at each reading of weights."""
    noted = []
    read = fd.Model.read

    def noting(model, side):
        gc.collect()
        noted.append(look(side))
        return read(model, side)

    monkeypatch.setattr(fd.Model, "read", noting)
    return noted


def test_the_comparison_holds_no_second_transformer(tmp_path, monkeypatch):
    """The LoRA that was trained is gone, with its network, before the fresh pipeline is loaded."""
    loras = []
    install = fd.LoRA.install

    def noting(lora, *args):
        loras.append(weakref.ref(lora))
        install(lora, *args)

    monkeypatch.setattr(fd.LoRA, "install", noting)
    alive = loads_noted(monkeypatch, lambda side: [lora() is not None for lora in loras])
    run(tmp_path / "out", "--iterations", 1)
    assert len(loras) == 1
    assert alive[-1] == [False]


def test_sample_holds_no_text_encoder_beside_the_transformer(done, tmp_path, monkeypatch):
    encoders = []
    encode = fd.Flux.encode_text

    def noting(family, pipe, *args):
        encoders.append(weakref.ref(pipe.text_encoder))
        return encode(family, pipe, *args)

    monkeypatch.setattr(fd.Flux, "encode_text", noting)
    alive = loads_noted(monkeypatch, lambda side: [encoder() is not None for encoder in encoders])
    out = copied(done, tmp_path / "out")
    fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle"])
    assert alive == [[], [False]]


def test_other_processes_load_nothing_where_only_calibration_is_left(done, tmp_path, monkeypatch):
    settings = parsed(copied(done, tmp_path / "out"), "--steps", 2, 4)
    machine = fd.Machine()
    settings, found, cache = fd.prepare(settings, machine)
    assert found.state.exists() and not found.is_calibrated()
    machine.lead = False
    loads = loads_noted(monkeypatch, lambda side: True)
    costs = fd.Costs(found.out / "costs.json", machine)
    fd.make_lora(settings, cache, found, costs)
    assert loads == []
