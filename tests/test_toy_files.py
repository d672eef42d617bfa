"""Files of toy_2d.py: whose a file is, full disks, a stop, numbers out of range."""

import json
import os
import signal
from pathlib import Path

import pytest
from faults import give_away, temporary, unprivileged
from PIL import Image
from tiny_runs import content

import toy_2d


def toy(out: Path, *more) -> None:
    toy_2d.main(["--iterations", "4", "--out", str(out), *map(str, more)])


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(toy_2d, "POINTS", 256)


def test_every_file_of_the_toy_has_the_mode_of_a_plainly_opened_one(tmp_path):
    (tmp_path / "plain").touch()
    toy(tmp_path / "toy", "--animate")
    paths = [path for path in (tmp_path / "toy").rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} >= {".json", ".png", ".gif"}
    mode = (tmp_path / "plain").stat().st_mode
    assert {path.name: path.stat().st_mode for path in paths if path.stat().st_mode != mode} == {}


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


def test_a_stop_of_the_toy_is_one_sentence(tmp_path, monkeypatch):
    def stopping(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(toy_2d, "distil", stopping)
    with pytest.raises(SystemExit, match="stopped; repeat the command to start over"):
        toy(tmp_path)


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
