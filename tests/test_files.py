"""Files of flux_distill.py: whose a file is, who may read it, full disks, what a kill leaves."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faults import fill, give_away, largest_file, temporary, unprivileged
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import SMALL, TINY, content, copied, edited, fd, run, says

# -------------------------------------------------------------------------------------------- modes


def test_every_file_of_a_run_has_the_mode_of_a_plainly_opened_one(done, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path: path.stat().st_mode for path in done.rglob("*") if path.is_file()}
    assert {path.suffix for path in modes} >= {".safetensors", ".json", ".png", ".csv", ".md"}
    assert {path.name: mode for path, mode in modes.items() if mode != plain.stat().st_mode} == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_tensors_follow_the_umask(tmp_path, umask, mode):
    path = tmp_path / "a.safetensors"
    before = os.umask(umask)
    try:
        fd.write_tensors(path, {"a": torch.zeros(3)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


# -------------------------------------------------------------------- unreadable, not ours, damaged


@pytest.mark.parametrize("name", [fd.LORA, fd.STATE, "results.json", "cache/text", "cache/latent"])
def test_a_file_that_may_not_be_read_is_neither_damaged_nor_lost(done, public, name):
    """At --shift 2 the run reads all of them."""
    out = copied(done, public / "out")
    path = sorted(out.glob(f"{name}*"))[0]
    give_away(out)
    before = content(out)
    path.chmod(0)
    with unprivileged(), pytest.raises(SystemExit) as stopped:
        run(out, "--shift", 2)
    path.chmod(0o644)
    assert f"not allowed to read or write {path}: correct its permissions" in str(stopped.value)
    assert content(out) == before


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"ss_network_dim": "4 (of 8"}])
@pytest.mark.parametrize("flags", [SMALL, f"--model {TINY} --sample circle"])
def test_an_adapter_of_another_trainer_is_left_alone(tmp_path, metadata, flags):
    save_file({"lora_A.weight": torch.zeros(4, 8)}, tmp_path / fd.LORA, metadata)
    before = content(tmp_path)
    sentence = f"{fd.LORA} was not written by this program and is left alone: .*another --out"
    with pytest.raises(SystemExit, match=sentence):
        fd.main(["--out", str(tmp_path), *flags.split()])
    assert content(tmp_path) == before


def test_a_file_that_is_no_adapter_at_all_is_not_called_damaged(tmp_path):
    (tmp_path / fd.LORA).write_text("version https://git-lfs.github.com/spec/v1\n")
    before = content(tmp_path)
    says(f"{fd.LORA} is not a safetensors file: move it away to recreate it", "--out", tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", fd.OUTPUTS)
def test_a_file_of_the_user_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    save_file({"a": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    before = content(tmp_path)
    says(f"{name} is not from a run of this program.*move it", "--out", tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("kept", ["cache", "checkpoint", fd.LORA, "costs.json"])
def test_any_file_that_is_marked_shows_that_the_others_are_from_a_run(done, tmp_path, kept):
    """So a killed run's files are replaced: there is always a file of tensors, or costs.json."""
    out = copied(done, tmp_path / "out")

    def remove(name: str) -> None:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()

    for name in {"cache", "checkpoint", fd.LORA, "costs.json"} - {kept}:
        remove(name)
    fd.refuse_others(out)
    remove(kept)
    with pytest.raises(SystemExit, match="is not from a run of this program"):
        fd.refuse_others(out)


# --------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("owner", "function", "call"),
    [
        pytest.param(fd, "write_tensors", 1, id="first file of the cache"),
        pytest.param(fd.TrainState, "save", 2, id="second checkpoint"),
        pytest.param(fd, "draw", 1, id="images of a validation"),
        pytest.param(fd, "write_log", 1, id="log", marks=pytest.mark.slow),
        pytest.param(fd, "calibrate", 1, id="LoRA", marks=pytest.mark.slow),
        pytest.param(fd, "card", 1, id="card", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_gets_its_sentence_and_no_half_file(
    small_disk, monkeypatch, owner, function, call
):
    """Really full, from this call on; then there is room again and the same command resumes."""
    disk = small_disk(2**24)
    real = getattr(owner, function)
    calls = []

    def filling(*args, **options):
        calls.append(function)
        if len(calls) == call:
            fill(disk)
        return real(*args, **options)

    monkeypatch.setattr(owner, function, filling)
    out = disk / "out"
    says("the disk of --out .* is full: free some space", "--out", out)
    assert not temporary(disk)
    for path in out.rglob("*.safetensors"):
        load_file(path)
    for path in out.rglob("*.png"):
        Image.open(path).load()
    if function == "save":
        assert len(fd.read_metadata(out / fd.STATE)["rows"]) == 2
    (disk / "filler").unlink()
    run(out)
    assert (out / "results.json").exists()


def test_a_limit_on_the_size_of_files_gets_its_sentence(tmp_path):
    """safetensors has the system's error only in its text."""
    out = tmp_path / "out"
    flags = ["--rank", 32]
    with largest_file(200_000):
        says(
            "state.safetensors would exceed the size limit for files.*ulimit", "--out", out, *flags
        )
    assert not temporary(tmp_path)
    assert not list((out / "checkpoint").iterdir())
    run(out, *flags)
    (out / "comparison.png").unlink()
    (out / "results.json").unlink()
    with largest_file(5_000):
        says("comparison.png would exceed the size limit for files", "--out", out, *flags)


# --------------------------------------------------------------------- killed runs, and two at once

PARTS = (".part-0-log.csv", "cache/.part-3-text-0.safetensors", "checkpoint/.tmpA1b2C3",
         ".tmpzzzzzz", "validation/.part-0-000002.png")  # fmt: skip
MINE = (".tmp", ".tmpABCDEFG", ".tmp-abcde", "cache/.parts", "tmpABCDEF", "other/.tmpABCDEF")


def test_what_killed_writers_left_is_removed_at_the_next_start(done, tmp_path):
    out = copied(done, tmp_path / "out")
    before = content(out)
    (out / "other").mkdir()
    for name in (*PARTS, *MINE):
        (out / name).write_text("half")
    run(out)
    assert content(out) == before | dict.fromkeys(MINE, b"half")


WRITER = """
import sys
import numpy as np
from safetensors.numpy import save_file
save_file({"a": np.zeros(10**8, np.uint8)}, sys.argv[1])
"""


def test_what_safetensors_leaves_when_killed_is_removed(done, tmp_path):
    """Its own temporary file, whatever this version calls it."""
    out = copied(done, tmp_path / "out")
    before = content(out)
    command = [sys.executable, "-c", WRITER, str(out / "checkpoint" / ".part-0-state.safetensors")]
    for _ in range(20):
        writer = subprocess.Popen(command)
        limit = time.monotonic() + 60
        while writer.poll() is None and not temporary(out) and time.monotonic() < limit:
            pass
        writer.kill()
        writer.wait()
        if temporary(out):
            break
    assert temporary(out)
    run(out)
    assert content(out) == before


def test_what_a_killed_sample_left_is_removed_when_no_other_can_be_at_work(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    old = folder / ".part-0-old.png"
    young = folder / ".part-0-young.png"
    for path in (old, young):
        path.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    fd.remove_parts(tmp_path)
    assert not old.exists()
    assert young.exists()


@contextmanager
def another_run(out: Path):
    """A run in another process, which is killed in the end."""
    ready, say = os.pipe()
    process = os.fork()
    if not process:
        with fd.lock_out_folder(out, fd.Machine()):
            os.write(say, b"!")
            time.sleep(600)
        os._exit(0)
    try:
        os.read(ready, 1)
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(ready)
        os.close(say)


def test_a_second_run_is_refused_while_the_first_lives(done, tmp_path, capsys):
    """Rendering is not: it only reads. A killed run's lock goes with it."""
    out = copied(done, tmp_path / "out")
    half = out / ".part-0-log.csv"
    with another_run(out):
        half.write_text("half")  # of the first
        before = content(out)
        says("another run is using --out .*: wait until it ends, or give another", "--out", out)
        assert content(out) == before
        fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle"])
        assert "samples" in capsys.readouterr().out
        assert half.exists()
    run(out)
    assert not temporary(out)


# ------------------------------------------------------------------------- other systems and models


def test_a_system_without_sysconf_hangup_and_locks(tmp_path, monkeypatch):
    """What Windows lacks."""
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("flux_elsewhere", fd.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "flux_elsewhere", elsewhere)
    spec.loader.exec_module(elsewhere)
    elsewhere.main([*SMALL.split(), "--iterations", "1", "--out", str(tmp_path)])
    assert (tmp_path / fd.LORA).exists()


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_quantised_base_names_the_package_it_needs(tmp_path, part):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = edited(tmp_path, f"{part}/config.json", quantization_config=config)
    sentence = "needs a package that is missing .*bitsandbytes.*install it and start again"
    says(sentence, "--model", folder, "--out", tmp_path / "out")


def test_a_missing_package_is_named_as_transformers_does(tmp_path, monkeypatch):
    """Its messages begin with an empty line."""

    def read(self, side):
        raise ImportError("\nTextEncoder requires the Glyph library. Install it.\n")

    monkeypatch.setattr(fd.Model, "read", read)
    says("missing .TextEncoder requires the Glyph library.: install", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model_index.json", "has files.* that you are not allowed to read or write: correct"),
        ("vae/diffusion_pytorch_model.safetensors", "not allowed to read or write .*safetensors"),
    ],
)
def test_a_model_that_may_not_be_read(public, name, sentence):
    folder = copied(TINY, public / "model")
    give_away(folder)
    (folder / name).chmod(0)
    with unprivileged():
        says(sentence, "--model", folder, "--out", public / "out")


def unreadable(path: Path) -> Path:
    path.chmod(0)
    give_away(path.parent)
    return path


def test_prompts_that_may_not_be_read(public):
    prompts = public / "prompts.txt"
    prompts.write_text("a\nb\nc\nd\n")
    unreadable(prompts)
    sentence = "prompts.txt can't be read as a text file.*PermissionError"
    with unprivileged():
        says(sentence, "--prompts", prompts, "--out", public / "out")


def test_images_that_may_not_be_read(public):
    images = public / "images"
    images.mkdir()
    unreadable(images)
    with unprivileged():
        says("not allowed to read or write .*images", "--images", images, "--out", public / "out")


@pytest.mark.parametrize(
    ("flag", "values", "wrong"),
    [
        ("--seed", [str(2**64)], str(2**64)),
        ("--seed", ["-1"], "-1"),
        ("--shift", ["1e9"], "1e9"),
        ("--shift", ["1e-300"], "1e-300"),
        ("--shift-range", ["1", "1e300"], "1e300"),
        ("--guidance", ["nan"], "nan"),
        ("--student-steps", [str(10**30), "--paper"], str(10**30)),
    ],
)
def test_numbers_out_of_range_end_with_a_sentence(flag, values, wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", flag, *values)
    assert stopped.value.code == 2
    assert f"argument {flag}: {wrong} must be at " in capsys.readouterr().err


def test_an_error_of_the_system_without_words_gets_its_sentence(tmp_path):
    assert "OSError. Once that is fixed" in fd.in_words(OSError(), tmp_path)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_sample_without_a_word(done, tmp_path):
    """As `| head -1` does."""
    out = copied(done, tmp_path / "out")
    call = [sys.executable, fd.__file__, "--model", TINY, "--out", out]
    call += ["--sample", *["a red circle"] * 3]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 1
    assert "Traceback" not in said and "Broken pipe" not in said


def test_a_run_that_stopped_before_its_first_file_resumes(tmp_path, monkeypatch):
    """costs.json is the only output then, and says whose it is."""

    def stopped(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(fd.Model, "load", stopped)
        says("and the same command resumes", "--out", out)
    assert {path.name for path in out.iterdir()} == {".lock", "costs.json"}
    run(out, "--iterations", 1)
    assert (out / fd.LORA).exists()


def test_costs_of_another_program_are_left_alone(tmp_path):
    (tmp_path / "costs.json").write_text('{"phases": {}}')
    says("costs.json is not from a run of this program", "--out", tmp_path)


@pytest.mark.parametrize("name", ["README.md", "comparison.png"])
def test_what_was_deleted_of_a_finished_run_is_made_again(done, tmp_path, name):
    out = copied(done, tmp_path / "out")
    before = (out / name).read_bytes()
    (out / name).unlink()
    run(out)
    assert (out / name).exists()
    if name.endswith("png"):
        assert (out / name).read_bytes() == before


def test_a_run_inside_the_folder_of_its_model_is_recognised(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    flags = ["--model", folder, "--iterations", 1]
    run(folder / "out", *flags)
    before = content(folder / "out")
    run(folder / "out", *flags)
    assert content(folder / "out") == before


def test_names_that_are_not_utf8_are_told(tmp_path):
    """Of images that are skipped, on a terminal in UTF-8."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red circle")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (32, 32), "red").save(folder / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    flags = [*SMALL.split(), "--images", folder, "--held-out", 2, "--iterations", 1]
    call = [sys.executable, fd.__file__, *flags, "--out", tmp_path / "out"]
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [str(word) for word in call], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "caf\\udce9.png: it has no caption" in done.stdout
