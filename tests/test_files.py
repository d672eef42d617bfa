"""Files, disks and signals: whose a file is, who may read it, what a stop or a kill leaves."""

import errno
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import SMALL, TINY, content, copied, edited, fd, run, same_run, says

import toy_2d

NOBODY = 65534


@contextmanager
def unprivileged():
    """Permissions hold for everybody but root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder of the unprivileged user; pytest's own are for root alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def give_away(folder: Path) -> None:
    if not os.geteuid():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root on Linux")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # tensors can still be mapped


def fill(disk: Path) -> Path:
    """A file that leaves no block free."""
    path = disk / "filler"
    with open(path, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


def toy(out: Path, *more) -> None:
    toy_2d.main(["--iterations", "4", "--out", str(out), *map(str, more)])


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(toy_2d, "POINTS", 256)


def temporary(folder: Path) -> list[Path]:
    return [*folder.rglob(".part*"), *folder.rglob(".tmp*")]


# ------------------------------------------------------------------------------------------- modes


def test_every_file_has_the_mode_of_a_plainly_opened_one(done, tmp_path):
    (tmp_path / "plain").touch()
    toy(tmp_path / "toy", "--animate")
    paths = [path for out in (done, tmp_path / "toy") for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} >= {".safetensors", ".json", ".png", ".csv", ".gif"}
    mode = (tmp_path / "plain").stat().st_mode
    assert {path.name: path.stat().st_mode for path in paths if path.stat().st_mode != mode} == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_tensors_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        fd.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


# -------------------------------------------------------------------- unreadable, not ours, damaged


@pytest.mark.parametrize(
    "name", [fd.LORA, "checkpoint/state.safetensors", "results.json", "cache/text", "cache/latent"]
)
def test_a_file_that_may_not_be_read_is_neither_damaged_nor_lost(done, public, name):
    """At --shift 2 the run reads all of them."""
    out = copied(done, public / "out")
    path = sorted(out.glob(f"{name}*"))[0]
    give_away(out)
    before = content(out)
    path.chmod(0)
    with unprivileged(), pytest.raises(SystemExit) as stopped:
        run(out, "--shift", 2)
    assert f"not allowed to read or write {path}: correct its permissions" in str(stopped.value)
    path.chmod(0o644)
    assert content(out) == before


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"ss_network_dim": "4 (of 8"}])
@pytest.mark.parametrize("flags", [SMALL, f"--model {TINY} --sample circle"])
def test_an_adapter_of_another_trainer_is_left_alone(tmp_path, metadata, flags):
    save_file({"lora_A.weight": torch.zeros(4, 8)}, tmp_path / fd.LORA, metadata)
    before = content(tmp_path)
    sentence = f"{fd.LORA} was not written by this program.*another --out"
    with pytest.raises(SystemExit, match=sentence):
        fd.main(["--out", str(tmp_path), *flags.split()])
    assert content(tmp_path) == before


def test_a_file_that_is_no_adapter_at_all_is_not_called_damaged(tmp_path):
    (tmp_path / fd.LORA).write_text("version https://git-lfs.github.com/spec/v1\n")
    before = content(tmp_path)
    says(f"{fd.LORA} is not a safetensors file: move it away", "--out", tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", fd.OUTPUTS)
def test_a_file_of_the_user_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    save_file({"a": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    before = content(tmp_path)
    says(f"{name} is not from a run of this program.*move it", "--out", tmp_path)
    assert content(tmp_path) == before


def test_what_a_run_wrote_is_its_own_by_any_of_its_tensors(done, tmp_path):
    """Files of a killed run are replaced: there is always a cache, a checkpoint or an adapter."""
    for kept in ("cache", "checkpoint", fd.LORA):
        out = copied(done, tmp_path / kept)
        for path in {out / name for name in ("cache", "checkpoint")} - {out / kept}:
            shutil.rmtree(path)
        if kept != fd.LORA:
            (out / fd.LORA).unlink()
        names = Namespace(out=out, lora=out / fd.LORA, state=out / "checkpoint/state.safetensors")
        fd.refuse_others(names)
    shutil.rmtree(tmp_path / "cache" / "cache")
    names = Namespace(out=tmp_path / "cache", lora=tmp_path / "none", state=tmp_path / "none")
    with pytest.raises(SystemExit, match="is not from a run"):
        fd.refuse_others(names)


@pytest.mark.parametrize("text", ["mine", "[1]", '{"accuracy": 1}'])
def test_toy_leaves_results_of_others_alone(tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit):
        toy(tmp_path)
    assert "results.json was not written by this program" in capsys.readouterr().err
    assert content(tmp_path) == {"results.json": text.encode()}


@pytest.mark.parametrize("name", ["samples.png", "quality.png", "flow.gif"])
def test_toy_leaves_figures_of_others_alone(tmp_path, capsys, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(SystemExit):
        toy(tmp_path)
    assert (
        f"{name} was not written by this program and would be replaced" in capsys.readouterr().err
    )
    assert content(tmp_path) == before


def test_toy_knows_its_figures_without_its_results(tmp_path):
    """As in assets/."""
    toy(tmp_path)
    (tmp_path / "results.json").unlink()
    toy(tmp_path)


def test_toy_replaces_its_own(tmp_path):
    toy(tmp_path)
    toy(tmp_path, "--seed", 1)
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["seed"] == 1


# -------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("write_tensors", 1),
        ("save_state", 2),
        pytest.param("draw", 1),
        pytest.param("write_log", 1, marks=pytest.mark.slow),
        pytest.param("calibrate", 1, marks=pytest.mark.slow),
        pytest.param("card", 1, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_gets_its_sentence_and_no_half_file(small_disk, monkeypatch, function, call):
    """Really full, from this call on; then there is room again and the same command resumes."""
    disk = small_disk(2**24)
    real, calls = getattr(fd, function), []

    def filling(*args):
        calls.append(1)
        if len(calls) == call:
            fill(disk)
        return real(*args)

    monkeypatch.setattr(fd, function, filling)
    says("disk of --out .* is full: free some space", "--out", disk / "out")
    assert not temporary(disk)
    for path in (disk / "out").rglob("*.safetensors"):
        load_file(path)
    for path in (disk / "out").rglob("*.png"):
        Image.open(path).load()
    state = disk / "out/checkpoint/state.safetensors"
    if function == "save_state":
        assert len(fd.read_metadata(state)["rows"]) == 2
    (disk / "filler").unlink()
    run(disk / "out")


@contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_the_size_of_files_gets_its_sentence(tmp_path):
    """safetensors has the system's error only in its text."""
    flags = ["--out", tmp_path / "out", "--rank", 32]
    with largest_file(200_000):
        says("state.safetensors would exceed the size limit for files.*ulimit", *flags)
    assert not temporary(tmp_path) and not list((tmp_path / "out/checkpoint").iterdir())
    run(*flags[1:])
    (tmp_path / "out" / "comparison.png").unlink()
    (tmp_path / "out" / "results.json").unlink()
    with largest_file(5_000):
        says("comparison.png would exceed the size limit for files", *flags)


@pytest.mark.parametrize("kilobytes", [4, 40, 200])
def test_toy_on_a_full_disk(small_disk, kilobytes):
    """Whatever file is the first without room, it is not left by half."""
    disk = small_disk(1024 * kilobytes)
    with pytest.raises(SystemExit, match=r"toy_2d.py: .*No space left on device; .*--out"):
        toy(disk, "--animate")
    for path in disk.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            Image.open(path).load()
    assert not temporary(disk)


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
        writer, limit = subprocess.Popen(command), time.monotonic() + 60
        while writer.poll() is None and not temporary(out) and time.monotonic() < limit:
            pass
        writer.kill()
        writer.wait()
        if temporary(out):
            break
    assert temporary(out)
    run(out)
    assert content(out) == before


def test_a_second_run_is_refused_while_the_first_lives(done, tmp_path, capsys):
    """Also when the first is killed; rendering only reads."""
    out = copied(done, tmp_path / "out")
    ready, say = os.pipe()
    first = os.fork()
    if not first:
        with fd.alone(Namespace(lead=True, processes=1, device="cpu", out=out)):
            os.write(say, b"!")
            time.sleep(600)
        os._exit(0)
    try:
        os.read(ready, 1)
        (out / ".part-0-log.csv").write_text("half")  # of the first
        before = content(out)
        says("another run is using --out .*: wait until it ends, or give another", "--out", out)
        assert content(out) == before
        fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle"])
        assert "samples" in capsys.readouterr().out
        assert (out / ".part-0-log.csv").exists()
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    run(out)
    assert not temporary(out)


# ------------------------------------------------------------------------------------------- stops


def test_a_stop_in_the_last_iteration_stops(done, tmp_path, monkeypatch):
    out, count, loss = tmp_path / "out", [], fd.sc.shortcut_loss

    def interrupting(*args, **kwargs):
        count.append(1)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **kwargs)

    monkeypatch.setattr(fd.sc, "shortcut_loss", interrupting)
    says("stopped after iteration 4; the same command", "--out", out)
    assert not (out / fd.LORA).exists()
    run(out)
    assert len(count) == 4 and same_run(out, done)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("file_print", "SIGINT"),
        ("encode_text", "SIGTERM"),
        ("sample_teacher", "SIGINT"),
        ("Validation", "SIGHUP"),
        ("calibrate", "SIGTERM"),
        ("compare", "SIGINT"),
    ],
)
def test_a_stop_outside_training_is_one_sentence(done, tmp_path, monkeypatch, function, kind):
    """From the set-up to the comparison; what was there before stays."""
    out = copied(done, tmp_path / "out")
    if function in ("encode_text", "sample_teacher", "Validation"):
        (out / fd.LORA).unlink()
        shutil.rmtree(out / "checkpoint")
    if function in ("encode_text", "sample_teacher"):
        kind_of_file = {"encode_text": "text", "sample_teacher": "latent"}[function]
        for path in (out / "cache").glob(f"{kind_of_file}-*"):
            path.unlink()
    before, number = content(out), getattr(signal, kind)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def stopping(*args):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    monkeypatch.setattr(fd, function, stopping)
    more = ["--shift", 2] if function in ("calibrate", "compare") else []
    if function == "compare":
        monkeypatch.setattr(fd, "calibrate", lambda args: None)
    says("stopped; what is in --out .* is kept, and the same command resumes", "--out", out, *more)
    assert content(out) == before
    assert handlers == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with fd.interruptible() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [True]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_of_the_toy_is_one_sentence(tmp_path, monkeypatch):
    def stopping(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(toy_2d, "distil", stopping)
    with pytest.raises(SystemExit, match="stopped; the same command starts over"):
        toy(tmp_path)


# --------------------------------------------------------------- other systems, wrong flags, models


def test_a_system_without_sysconf_hangup_and_locks(tmp_path, monkeypatch):
    """What Windows lacks."""
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("flux_elsewhere", fd.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    elsewhere.FINE, elsewhere.STEPS = fd.FINE, fd.STEPS
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


def test_prompts_and_images_that_may_not_be_read(public):
    (public / "prompts.txt").write_text("a\nb\nc\nd\n")
    (public / "images").mkdir()
    for name in ("prompts.txt", "images"):
        (public / name).chmod(0)
    give_away(public)
    out = ["--out", public / "out"]
    with unprivileged():
        says(
            "can't be read as a text file.*PermissionError",
            "--prompts",
            public / "prompts.txt",
            *out,
        )
        says("not allowed to read or write .*images", "--images", public / "images", *out)


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", str(2**64)],
        ["--seed", "-1"],
        ["--shift", "1e9"],
        ["--shift", "1e-300"],
        ["--shift-range", "1", "1e300"],
        ["--guidance", "nan"],
        ["--student-steps", str(10**30), "--paper"],
    ],
    ids=" ".join,
)
def test_numbers_out_of_range_end_with_a_sentence(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", *flags)
    assert stopped.value.code == 2 and f"{flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", str(2**64)],
        ["--seed", "-1"],
        ["--shift", "1e9"],
        ["--shift", "1e300"],
        ["--shift", "1e-300"],
        ["--iterations", str(10**30)],
        ["--few-shot", str(10**14)],
        ["--student-steps", str(10**9)],
    ],
    ids=" ".join,
)
def test_numbers_out_of_range_end_with_a_sentence_in_the_toy(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        toy(tmp_path, *flags)
    assert stopped.value.code == 2 and "must be between" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--shift", "1000"], ["--shift", "0.001"]], ids=" ".join)
def test_the_ends_of_the_range_work_in_the_toy(flags, tmp_path):
    toy(tmp_path, *flags)


def test_the_toy_says_at_the_start_that_it_may_not_write(public, capsys):
    (public / "out").mkdir()
    (public / "out").chmod(0o555)
    give_away(public)
    with unprivileged(), pytest.raises(SystemExit):
        toy(public / "out")
    assert "out: Permission denied: give another --out" in capsys.readouterr().err


def test_what_a_killed_sample_left_is_removed_when_no_other_can_be_at_work(tmp_path):
    (tmp_path / "samples").mkdir()
    old, young = (tmp_path / "samples" / f".part-0-{name}.png" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    fd.remove_parts(tmp_path)
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_stop_during_the_imports_is_one_sentence_unless_it_is_ignored(tmp_path, ignored):
    """A shell's & lets a command ignore SIGINT; then the run begins, here without a model."""
    command = [sys.executable, fd.__file__, "--model", "no/such/folder", "--out", tmp_path]
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # what a child ignores it has from its parent
    try:
        child = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 1 and "Traceback" not in said
    assert ("stopped before anything was begun" in said) != ignored
    assert ("no folder here" in said) == ignored
