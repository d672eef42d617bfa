"""flux_distill.py, flags: settings are frozen, --help is whole, and wrong flags are refused."""

import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest
from tiny_runs import SMALL, fd, parsed

import shortcut as sc

FLAGS = [setting for setting in fields(fd.Settings) if setting.metadata]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.fixture(scope="module")
def helped() -> dict[str, str]:
    """The text of each flag in --help, in one line."""
    command = [sys.executable, fd.__file__, "--help"]
    wide = os.environ | {"COLUMNS": "9999"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout
    entries = re.findall(r"^  (-.*(?:\n {3,}.*)*)", text, flags=re.MULTILINE)
    lines = [" ".join(entry.split()) for entry in entries]
    return {line.split()[0]: line for line in lines}


@pytest.mark.parametrize("setting", FLAGS, ids=lambda setting: setting.name)
def test_help_names_every_flag_with_its_text_and_default(setting, helped, tmp_path, monkeypatch):
    """The default that it shows is one that the flag takes, and the one that is in force."""
    monkeypatch.chdir(tmp_path)
    line = helped[flag_of(setting.name)]
    assert " ".join(setting.metadata["options"]["help"].split()) in line
    default = getattr(fd.parse([]), setting.name)
    shown = re.search(r"\(default: (.+?)(?:; FLUX.2: (.+))?\)$", line)
    if default is None or default is False or default == ():
        assert shown is None
        return
    typed = fd.parse([flag_of(setting.name), *shown[1].split()])
    assert getattr(typed, setting.name) == default
    dev = fd.Flux2({"_class_name": "Flux2Pipeline"}, {})
    others = fd.parse([]).with_defaults(dev.defaults)
    typed = fd.parse([flag_of(setting.name), *(shown[2] or shown[1]).split()])
    assert getattr(typed, setting.name) == getattr(others, setting.name)


def test_help_names_no_other_flags(helped):
    assert helped.keys() == {"-h,", *(flag_of(setting.name) for setting in FLAGS)}


def test_help_shows_what_the_paper_and_the_tables_use(helped):
    assert helped["--teacher-steps"].endswith("(default: 32)")
    assert helped["--steps"].endswith("(default: 2 3 4 6 8)")
    assert helped["--student-steps"].endswith("(default: 3)")
    assert helped["--shift-range"].endswith("(default: 2.0 4.0; FLUX.2: 4.0 8.0)")


@pytest.mark.parametrize("flags", [["--help"], ["--batch", "0"]], ids=" ".join)
def test_help_and_wrong_flags_do_not_wait_for_the_slow_imports(flags):
    code = f"""if True:
        import runpy, sys
        sys.argv = ["flux_distill.py", *{flags!r}]
        try:
            runpy.run_path({fd.__file__!r}, run_name="__main__")
        except SystemExit:
            slow = {{"torch", "numpy", "diffusers", "transformers", "matplotlib", "PIL"}}
            print("imported:", sorted(slow & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")


def test_every_setting_is_frozen_and_immutable(tmp_path):
    settings = fd.parse(["--out", str(tmp_path), "--sample", "a red circle", "--shift", "2"])
    for setting in fields(settings):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, setting.name, None)
    assert isinstance(hash(settings), int)  # no list, no dict, no set among the values


def test_settings_know_which_flags_were_given(tmp_path):
    settings = fd.parse(["--out", str(tmp_path), "--batch", "8", "--paper"])
    assert settings.given == {"out", "batch", "paper"}
    assert settings.batch == fd.Settings().batch


def test_the_students_own_steps_are_always_among_all_steps():
    assert fd.Settings().all_steps == [2, 3, 4, 6, 8]
    assert fd.Settings(steps=(8, 2), student_steps=5).all_steps == [2, 5, 8]


@pytest.mark.parametrize(("flags", "said"), [
    ("--resolution 100", "--resolution: 100 must be a multiple of 16"),
    ("--resolution 0", "--resolution: 0 must be at least 16"),
    ("--batch 0", "--batch: 0 must be at least 1"),
    ("--batch x", "--batch: invalid"),
    ("--iterations 0", "--iterations: 0 must be at least 1"),
    ("--learning-rate -1", "--learning-rate: -1 must be at least"),
    ("--shift nan", "--shift: nan must be at least"),
    ("--shift inf", "--shift: inf must be at most 1000"),
    ("--guidance inf", "--guidance: inf must be finite"),
    ("--shift-range 4 2", "--shift-range 4 2: give the lower end first"),
    ("--student-steps 5", "--student-steps 5 must be at most 4, half of --teacher-steps"),
    ("--student-steps 17 --teacher-steps 32", "--student-steps 17 must be at most 16"),
    ("--teacher-steps 4", "--student-steps 3 must be at most 2, half of --teacher-steps"),
    ("--student-steps 5 --paper", "--student-steps 5 must be at most 4, half of --teacher-steps"),
    ("--teacher-steps 0", "--teacher-steps: 0 must be at least 2"),
    ("--teacher-steps 1", "--teacher-steps: 1 must be at least 2"),
    ("--teacher-steps 8.5", "--teacher-steps: invalid"),
    ("--steps 2 9", "--steps 9 is more than --teacher-steps 8, with which all are compared"),
    ("--steps 2 0", "--steps: 0 must be at least 1"),
    ("--steps 2,3", "--steps: invalid"),
    ("--steps", "--steps: expected at least one argument"),
])  # fmt: skip
def test_wrong_flags_are_refused(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        fd.main([*SMALL.split(), "--out", str(tmp_path), *flags.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("flags", [
    "--student-steps 4",
    "--student-steps 16 --teacher-steps 32",
    "--paper --student-steps 16 --teacher-steps 32",
])  # fmt: skip
def test_student_steps_within_bounds_are_taken(flags, tmp_path):
    assert str(parsed(tmp_path, *flags.split()).student_steps) in flags


def test_windows_are_matched_to_the_shift_of_sampling_unless_they_are_the_papers(tmp_path):
    """2-D flows end twice as far off where the middle of the range is half a shift away."""
    ours = fd.Settings()
    assert sum(ours.shift_range) / 2 == ours.shift
    papers = fd.parse(["--out", str(tmp_path), "--paper"])
    assert papers.shift_range == sc.ShortcutConfig().shift_range
    assert papers.given == {"out", "paper"}
    given = fd.parse(["--out", str(tmp_path), "--paper", "--shift-range", "1", "2"])
    assert given.shift_range == (1.0, 2.0)
