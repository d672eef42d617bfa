"""flux_distill.py, errors: each ends the command with one sentence that names the way out."""

import json
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, copied, edited, fd, prepared, run, says

# The real Flux, and its VAE.
FLUX = {
    "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19,
    "num_single_layers": 38, "axes_dims_rope": [16, 56, 56], "in_channels": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
VAE = {"block_out_channels": [128, 256, 512, 512]}


# ---------------------------------------------------------------------------------------- the model


def test_a_model_that_is_nowhere(tmp_path):
    says("can't be reached|neither a local folder", "--model", "nobody/nothing", "--out", tmp_path)
    says("neither a local folder", "--model", "no/such/folder", "--out", tmp_path)


def test_a_folder_that_is_no_model(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    says("not a complete diffusers pipeline", "--model", folder, "--out", tmp_path / "out")


def test_a_gated_model(tmp_path, monkeypatch):
    """The default one; the error's own text, which can hold a token, is not passed on."""

    def gated(*_, **__):
        raise fd.hub.GatedRepoError("?token=hf_secret", response=MagicMock())

    monkeypatch.setattr(fd, "hf_hub_download", gated)
    sentence = "gated: accept its licence at https.*FLUX.1-dev.*hf auth login"
    says(sentence, "--model", fd.Settings().model, "--out", tmp_path)
    with pytest.raises(SystemExit, match=sentence) as stopped:
        fd.main(["--out", str(tmp_path)])
    assert "hf_secret" not in str(stopped.value)


def test_half_a_model(tmp_path):
    folder = copied(TINY, tmp_path / "model")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    says("can't be loaded: is it complete", "--model", folder, "--out", tmp_path / "out")


def test_weights_that_would_be_made_up(tmp_path):
    """Names of another version of transformers: it would draw the weights at random."""
    folder = copied(TINY, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    save_file({f"other.{name}": x for name, x in load_file(file).items()}, file, {"format": "pt"})
    says("text_encoder lacks [0-9]+ weights", "--model", folder, "--out", tmp_path / "out")


def test_schnell(tmp_path):
    folder = edited(tmp_path, "transformer/config.json", guidance_embeds=False)
    says("schnell.*4 steps already", "--model", folder, "--out", tmp_path / "out")


def test_a_guidance_beyond_the_training(tmp_path):
    sentence = "--guidance 8.5 is outside the range of the training: give 0 to 8"
    says(sentence, "--guidance", 8.5, "--out", tmp_path / "out")


@pytest.mark.parametrize("shift", [1.9, 4.1])
def test_a_shift_beyond_the_training(tmp_path, shift):
    sentence = f"--shift {shift} is outside the range of the training, 2.0 to 4.0: train with"
    says(sentence, "--shift", shift, "--out", tmp_path / "out")


def test_texts_of_no_token(tmp_path):
    """T5 adds an end."""
    sentence = "--text-tokens 1 leaves no room for a text: give more than 1"
    says(sentence, "--text-tokens", 1, "--out", tmp_path / "out")


def test_another_family_of_models(tmp_path):
    folder = edited(tmp_path, "model_index.json", _class_name="StableDiffusion3Pipeline")
    sentence = "is a StableDiffusion3Pipeline: this distils FLUX.1-dev"
    says(sentence, "--model", folder, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------------------- memory


def test_a_large_model_without_a_gpu(tmp_path):
    folder = edited(tmp_path, "transformer/config.json", **FLUX)
    sentence = "12 billion parameters and PyTorch sees no GPU.*older than 580.*--model tests/tiny_"
    says(sentence, "--model", folder, "--out", tmp_path / "out")


def test_a_batch_that_memory_can_not_hold(tmp_path):
    says("GiB.*what helps, in this order.*--batch.*--rank", "--batch", 10**7, "--out", tmp_path)


def test_memory_that_runs_out(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fd, "fill_cache", full)
    says("out of GPU memory; what helps, in this order", "--out", tmp_path)


def test_memory_that_runs_out_in_sample(done, monkeypatch):
    """Only flags that --sample takes are advised."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fd, "stock_sample", full)
    with pytest.raises(SystemExit, match="out of GPU memory; give --batch 1") as stopped:
        fd.main(["--model", str(TINY), "--out", str(done), "--sample", "a red ring"])
    advised = re.findall(r"--([a-z-]+)", str(stopped.value))
    assert advised
    assert {name.replace("-", "_") for name in advised} <= {*fd.flags_for("sampling")}


def test_the_memory_estimate_of_the_real_flux():
    """34 to 46 GiB at batch 8 and 512 px with checkpointing."""
    config = json.loads((TINY / "transformer/config.json").read_text())
    model = fd.Model(str(TINY), fd.Machine(), None)
    model.family = fd.Flux({}, config | FLUX)
    model.vae_config = VAE

    def check(gib: int) -> None:
        model.machine = SimpleNamespace(
            device="cuda", dtype=torch.bfloat16, memory=lambda: gib * 2**30
        )
        fd.check_memory(fd.Settings(), model)

    check(46)
    with pytest.raises(SystemExit, match=r"training needs about \d+ GiB of 34 GiB; what helps"):
        check(34)


def test_int8_without_torchao(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fd, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(tmp_path, "--quantize", "int8")
    assert "needs torchao: pip install torchao" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ data and disk


def test_prompts_that_are_missing_or_too_few(tmp_path):
    sentence = "none.txt: there is no such file"
    says(sentence, "--prompts", tmp_path / "none.txt", "--out", tmp_path)
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n\n")
    says("2 different prompts.*--held-out 3 needs 4", "--prompts", few, "--out", tmp_path)


def test_images_that_are_no_folder(tmp_path):
    says("--images nowhere is no folder", "--images", "nowhere", "--out", tmp_path)


def test_mistakes_in_the_data_are_named_before_the_model_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(fd.Model, "download", lambda model: pytest.fail("gigabytes"))
    (tmp_path / "options.txt").write_text("a fox --ar 16:9\n" * 9)
    (tmp_path / "few.txt").write_text("a fox\n")
    says("there is no such file", "--prompts", tmp_path / "none.txt", "--out", tmp_path / "out")
    says("has the option --ar", "--prompts", tmp_path / "options.txt", "--out", tmp_path / "out")
    says("needs 4: give", "--prompts", tmp_path / "few.txt", "--out", tmp_path / "out")
    says("is no folder", "--images", tmp_path / "none", "--out", tmp_path / "out")


def test_a_run_says_how_many_images_it_trains_on_and_is_judged_by(tmp_path, capsys):
    prepared(tmp_path)
    told = "6 images to train on; held-out prompts: 1 to validate on, 2 to compare on"
    assert told in capsys.readouterr().out


def test_a_disk_too_small_for_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(fd.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    says("checkpoints need .* GB and --out .* free some space", "--out", tmp_path / "a")


def test_a_disk_that_is_full_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    real = fd.save_file

    def full(tensors, path, metadata):
        if "state" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(fd, "save_file", full)
    says("disk of --out .* is full.*then repeat the command", "--out", tmp_path)
    assert not list((tmp_path / "checkpoint").iterdir())
    monkeypatch.undo()
    run(tmp_path)
    assert len(fd.read_metadata(tmp_path / fd.STATE)["rows"]) == 4


def http_error(kind: type, status: int) -> Exception:
    """An error of the Hub's library with the answer of a server."""
    return kind("no", response=MagicMock(status_code=status))


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (hub.RepositoryNotFoundError, 401, "is neither a local folder nor a public model"),
        (hub.RepositoryNotFoundError, 404, "is neither a local folder nor a public model"),
        (hub.GatedRepoError, 403, "is gated"),
    ],
)
def test_a_model_that_does_not_exist_is_not_called_gated(kind, status, words):
    error = http_error(kind, status)
    error.__cause__ = http_error(hub.HfHubHTTPError, status)
    assert fd.refusal_of(error).startswith(words)


def test_a_token_without_access_is_called_gated():
    """The Hub's library says then that a file can't be found."""
    error = hub.LocalEntryNotFoundError("no")
    error.__cause__ = http_error(hub.HfHubHTTPError, 403)
    assert fd.refusal_of(error).startswith("is gated")
