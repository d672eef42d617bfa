"""What users give flux_distill.py and toy_2d.py: images, captions, prompts, flags, environment."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"
from tiny_runs import SMALL, TINY, copied, edited, fd, folder_of, picture, prepared, run, says

ROOT = Path(fd.__file__).parent

# ------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("script", ["toy_2d", "flux_distill"])
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_backend_of_a_notebook_does_not_matter(script, backend):
    """They draw without any backend; matplotlib itself stops at one that it can't find."""
    env = os.environ | {"MPLBACKEND": backend}
    code = f"import {script}; import matplotlib.animation"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]


# ------------------------------------------------------------------------------------------- images

RAMP = np.linspace(0, 1, 4096).reshape(64, 64)
DEEP = {  # name of a file: values of a ramp from black to white, as they are in it
    "unit.tif": RAMP.astype("f4"),
    "float255.tif": (255 * RAMP).astype("f4"),
    "float65535.tif": (65535 * RAMP).astype("f4"),
    "overshoot.tif": (1.3 * RAMP - 0.15).clip(-0.1, 1.1).astype("f4"),
    "16.png": (65535 * RAMP).astype("u2"),
    "16.tif": (65535 * RAMP).astype("u2"),
    "big-endian.tif": (65535 * RAMP).astype(">u2"),
    "int255.tif": (255 * RAMP).astype("i4"),
    "int65535.tif": (65535 * RAMP).astype("i4"),
    "int32.tif": ((2**31 - 1) * RAMP).astype("i4"),
    "16.pgm": (65535 * RAMP).astype("u2"),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_ramp_of_more_than_8_bits_is_the_ramp(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    pixels = fd.open_image(tmp_path / name, 64)[0, 0].numpy() / 2 + 0.5
    expected = RAMP if name != "overshoot.tif" else (1.3 * RAMP - 0.15).clip(0, 1)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1.01 / 255)


def test_16_bit_integers_are_never_stretched(tmp_path):
    """A dark image stays dark: the kind of file says where white is, not its brightest pixel."""
    Image.fromarray((200 * RAMP).astype("u2")).save(tmp_path / "dark.png")
    assert fd.open_image(tmp_path / "dark.png", 64).max() < -0.98


@pytest.mark.parametrize(("values", "said"), [
    (np.where(RAMP > 0.5, np.nan, RAMP), "NaN or infinity"),
    (np.where(RAMP > 0.5, np.inf, RAMP), "NaN or infinity"),
    (2 * RAMP - 1, "values run from -1 to 1: save it with 8 or 16 bits"),
    (1e6 * RAMP, r"values run from 0 to 1e\+06"),
])  # fmt: skip
def test_floats_without_black_and_white_are_refused(tmp_path, values, said):
    Image.fromarray(values.astype("f4")).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=said):
        fd.open_image(tmp_path / "a.tif", 64)


def test_negative_integers_are_refused(tmp_path):
    Image.fromarray((1000 * RAMP - 500).astype("i4")).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="values run from -500 to 500"):
        fd.open_image(tmp_path / "a.tif", 64)


def test_the_first_frame_and_a_transparent_palette(tmp_path):
    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        red.save(tmp_path / name, save_all=True, append_images=[blue], lossless=True)
        x = fd.open_image(tmp_path / name, 64)[0]
        assert x[0].min() > 0.98 and x[1:].max() < -0.98
    holes = Image.new("P", (64, 64))
    holes.putpalette([0, 0, 0, 255, 0, 0])
    holes.paste(1, (0, 0, 32, 64))
    for name in ("b.png", "b.gif"):
        holes.save(tmp_path / name, transparency=0)
        x = fd.open_image(tmp_path / name, 64)[0]
        assert (x[:, :, 40:] == 1).all() and (x[1:, :, :24] == -1).all()  # white behind, red


def test_all_that_lies_in_a_folder_is_used_or_named(tmp_path, capsys):
    for name in ("ok.png", "b.gif", "c.avif", "d.PNG", "e.jp2", "lonely.png"):
        picture("RGB").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a red circle")
    (tmp_path / "lonely.png").unlink()
    (tmp_path / "d.txt").rename(tmp_path / "d.TXT")
    (tmp_path / "ok.txt").write_text("a red circle --ar 16:9")
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("sub/c.png", "sub/deep/d.png"):
        picture("RGB").save(tmp_path / name)
    for name in ("meta.json", "more.json", "Thumbs.db", "LICENSE", ".DS_Store", "._ok.png"):
        (tmp_path / name).write_bytes(b"x")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "flat.png")
    (tmp_path / "flat.txt").write_text("green")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "gone.txt").write_text("a red circle")
    names = [path.name for path, *_ in fd.read_images(folder_of(tmp_path))]
    assert names == ["b.gif", "c.avif", "d.PNG", "e.jp2", "flat.png", "ok.png"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "skipped 1, kept 6 images; mend these to use them:"
    assert said[1].startswith("  gone.png: ")
    assert said[2:] == [
        "ignored 1 caption without an image (lonely.txt): add the images if they should be there",
        "kept 1 caption with options like --ar 16:9, which are trained on as words (ok.txt): remove"
        " them from the text",
        "did not search 1 sub-folder with 2 images (sub): move images and captions up to use them",
        "ignored 4 files of other kinds (2 .json, 1 no suffix, 1 .db): convert any images among"
        " them to PNG",
        "kept 1 image of one value all over (flat.png): remove what should not be trained on",
    ]


def test_a_clean_folder_says_nothing_and_a_long_list_ends(tmp_path, capsys):
    picture("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red circle")
    fd.read_images(folder_of(tmp_path))
    assert capsys.readouterr().out == ""
    for i in range(30):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no image")
    fd.read_images(folder_of(tmp_path))
    said = capsys.readouterr().out
    assert "skipped 30, kept 1" in said and "19.png" in said
    assert "20.png" not in said and said.endswith("  and 10 more\n")


def image_folder(tmp_path, count=3) -> Path:
    (folder := tmp_path / "images").mkdir()
    for i in range(count):
        picture("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red circle {i}")
    return folder


def test_images_are_opened_once_and_the_same_pairs_are_found_again(tmp_path, monkeypatch):
    folder, out = image_folder(tmp_path), tmp_path / "out"
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    first = prepared(out, "--images", folder)
    opened, real = [], fd.open_image
    monkeypatch.setattr(fd, "open_image", lambda path, _: opened.append(path.name) or real(path, _))
    again = prepared(out, "--images", folder)
    assert opened == ["2.png"]  # the damaged one has no latents
    assert again.keys == first.keys and again.key == first.key and len(again.pairs) == 2


PREPARE = """
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, {root!r})
import flux_distill as fd
opened, real = [], fd.open_image
fd.open_image = lambda path, resolution: opened.append(path.name) or real(path, resolution)
args = fd.parse(sys.argv[1:])
fd.prepare(args)
kept = [pair.file.name for pair in args.pairs]
Path({folder!r}, "rank" + os.environ["RANK"]).write_text(" ".join([*opened, "of", *kept]))
"""


@pytest.mark.slow
def test_processes_share_the_opening_of_images(tmp_path):
    folder = image_folder(tmp_path, 4)
    (folder / "1.png").write_bytes(b"")
    (script := tmp_path / "prepare.py").write_text(
        PREPARE.format(root=str(ROOT), folder=str(tmp_path))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    command += [*SMALL.split(), "--out", tmp_path / "out", "--images", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = " of 0.png 2.png 3.png"
    assert (tmp_path / "rank0").read_text() == "0.png 2.png" + kept
    assert (tmp_path / "rank1").read_text() == "1.png 3.png" + kept
    assert done.stdout.count("skipped 1") == 1


def test_pairs_are_identified_as_before():
    """By these keys runs recognise their cache and results: they must not change."""
    item = ["a red circle", 123, "0123abcd"]
    settings = Namespace(model_print="model", device="cpu", resolution=512)
    assert fd.latent_key(settings, item) == fd.digest(["model", "cpu", 512, *item])


def test_many_prompts_are_read_in_linear_time(tmp_path):
    lines = [f"a red circle number {i}" for i in range(100_000)]
    (tmp_path / "many.txt").write_text("\n".join(lines))
    flags = ["--prompts", tmp_path / "many.txt", "--limit", 0, "--out", tmp_path / "out"]
    args = fd.parse([*SMALL.split(), *map(str, flags)])
    started = time.process_time()
    fd.prepare(args)
    assert time.process_time() - started < 15  # 3 s; by searching the list for each it took 40
    assert args.texts[args.pairs[-1].text] == lines[-4] and len(args.pairs) == 99_997


# ------------------------------------------------------------------------------------------ prompts


def refused(tmp_path, text: str, *flags) -> str:
    """The sentence that ends a run with these prompts."""
    (file := tmp_path / "prompts.txt").write_text(text)
    given = [*SMALL.split(), "--prompts", file, "--out", tmp_path / "out", *flags]
    args = fd.parse(list(map(str, given)))
    with pytest.raises(SystemExit) as stopped:
        fd.prepare(args)
    assert "None" not in str(stopped.value) and "\n" not in str(stopped.value)
    return str(stopped.value)


def test_prompts_that_differ_in_case_alone_are_one_and_the_sentence_speaks_of_prompts(tmp_path):
    said = refused(tmp_path, "A Cat\na cat\nb\nc\n", "--held-out", 3)
    assert "--prompts" in said and "--images" not in said
    assert "3 different prompts" in said and "--held-out 3 needs 4" in said
    assert said.endswith("give --prompts a longer file, or give a smaller --held-out")


def test_too_few_built_in_prompts_are_called_so():
    args = Namespace(prompts=None, images=None, held_out=24)
    with pytest.raises(SystemExit, match=r"the built-in list has 24 different prompts.*needs 25"):
        fd.read_prompts(args)
    args.held_out = 23
    assert len(fd.read_prompts(args)[1]) == 23


def test_images_whose_captions_are_all_held_out(tmp_path):
    folder = image_folder(tmp_path, 2)
    prompts = "first\nA Red circle 0\na red circle 1\n"
    said = refused(tmp_path, prompts, "--images", folder, "--held-out", 2)
    assert f"every caption in --images {folder} is also one of the 2 held-out prompts" in said


def test_comments_and_blank_lines_are_no_prompts(tmp_path):
    text = "\ufeff# a comment\r\n\r\na\r\n  # another\r\nb # no comment\r\nc -- d\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    args = Namespace(prompts=tmp_path / "a.txt", images=None, held_out=2)
    prompts = ["a", "b # no comment", "c -- d"]
    assert fd.read_prompts(args) == (prompts, prompts[1:])


@pytest.mark.parametrize(
    "option", ["--w 1024 --h 1024", "--ar 16:9", "--n blurry", "--d 1", "--S=1"]
)
def test_options_in_prompts_are_refused_with_their_line(tmp_path, option):
    said = refused(tmp_path, f"# mine\n\na cat {option}\na\nb\nc\nd\n")
    assert f"line 3 has the option {option.split()[0]}: prompts take no options here" in said


# ----------------------------------------------------------------------------------- length of text


def test_cut_texts_are_counted_and_named(tmp_path, capsys):
    """The tiny tokenizer takes 8 tokens: of a longer text the rest is lost."""
    texts = [
        "a red circle",
        "a red circle, " * 9,
        "a blue ring",
        "a red ring, " * 20,
        "b",
        "c",
        "d",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    flags = ["--prompts", tmp_path / "prompts.txt", "--held-out", 2]
    args = prepared(tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert "cut 2 of 7 texts to 8 tokens; shorten them:" in said
    tokenizer = fd.load(args, "text").tokenizer_2
    for text in map(fd.tidy, (texts[1], texts[3])):
        assert f"  {len(tokenizer(text).input_ids)} tokens: {text[:60]}\n" in said
    prepared(tmp_path / "out", *flags)
    assert "cut" not in capsys.readouterr().err  # nothing is encoded a second time


def longer(tmp_path) -> Path:
    """The tiny Flux with a tokenizer that takes 512 tokens, as the real one."""
    return edited(tmp_path, "tokenizer_2/tokenizer_config.json", model_max_length=512)


def test_text_tokens_reach_cache_adapter_and_memory(tmp_path, capsys, monkeypatch):
    model, out = longer(tmp_path), tmp_path / "out"
    text = "a red circle, " * 9
    (tmp_path / "prompts.txt").write_text("\n".join([text, "a", "b", "c"]))
    flags = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--iterations", 1]
    flags += ["--held-out", 2, "--batch", 1]
    run(out, *flags, "--text-tokens", 12)
    assert "cut 1 of 4 texts to 12 tokens; shorten them, or give --text-tokens up to 512:" in (
        capsys.readouterr().err
    )
    adapter = fd.read_metadata(out / fd.LORA)
    assert adapter["max_sequence_length"] == adapter["settings"]["text_tokens"] == 12
    assert "max_sequence_length=12" in (out / "README.md").read_text()
    seen = []
    monkeypatch.setattr(fd, "check_memory", lambda args, config: seen.append(args.text_tokens))
    says("holds a run of other settings .text_tokens 12, now 256", "--out", out, *flags)
    run(out, *flags, "--text-tokens", 12)
    assert seen == [256, 12]
    lengths = []
    for extra in ([], ["--text-tokens", "20"]):
        sampled = fd.parse(["--model", str(model), "--out", str(out), "--sample", text, *extra])
        fd.prepare(sampled)
        sampled.texts = sampled.sample
        lengths += [len(x["text"]) for x in fd.encode_text(sampled, range(1))]
    assert lengths == [12, 20]


def test_the_cache_knows_how_many_text_tokens_it_holds(args):
    text = [args.model_print, args.device, 256, args.texts[0]]
    assert args.keys["text"][0] == fd.digest(text)


def test_the_memory_estimate_counts_text_tokens(args, monkeypatch):
    """By the least memory that is enough, found by halving."""
    config = json.loads((TINY / "transformer/config.json").read_text())

    def enough(tokens: int) -> int:
        settings = Namespace(**vars(args) | {"text_tokens": tokens})
        low, high = 0, 2**20
        while high - low > 1:
            middle = (low + high) // 2
            pages = {"SC_PHYS_PAGES": middle, "SC_PAGE_SIZE": 4096}
            monkeypatch.setattr(fd.os, "sysconf", pages.get)
            try:
                fd.check_memory(settings, config)
                high = middle
            except SystemExit:
                low = middle
        return high

    assert enough(512) > 1.3 * enough(256)


def test_more_text_tokens_than_the_model_has(tmp_path, capsys):
    sentence = "--text-tokens 9 is more than the 8 .*give at most 8"
    says(sentence, "--text-tokens", 9, "--out", tmp_path)
    with pytest.raises(SystemExit):
        fd.parse(["--text-tokens", "513", "--out", str(tmp_path)])
    assert "at most 512" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- flags


def sampling(out, *flags) -> Namespace:
    args = fd.parse(["--model", str(TINY), "--out", str(out), "--sample", "a red ring", *flags])
    fd.prepare(args)
    return args


def test_sample_obeys_the_flags_that_it_takes(done, tmp_path, monkeypatch, capsys):
    out, calls, scales = copied(done, tmp_path / "out"), [], []
    real, set_adapters = fd.sample, fd.FluxPipeline.set_adapters

    def spy(args, pipe, cond, noise, steps):
        shift = pipe.scheduler.config.shift
        calls.append((steps, shift, cond["guidance"][0].item(), args.size, noise.sum().item()))
        return real(args, pipe, cond, noise, steps)

    monkeypatch.setattr(fd, "sample", spy)
    monkeypatch.setattr(fd.FluxPipeline, "set_adapters",
                        lambda self, *a: scales.append(a[1]) or set_adapters(self, *a))  # fmt: skip
    adapter = fd.read_metadata(out / fd.LORA) | {"scales": {"2": 1.5, "3": 2.5}}
    fd.write_tensors(out / fd.LORA, load_file(out / fd.LORA), adapter)
    fd.render(sampling(out))
    assert calls[-1][:4] == (3, 3.0, 3.5, (4, 4)) and scales[-1] == 2.5
    noise = calls[-1][4]
    flags = "--student-steps 2 --resolution 64 --guidance 0 --shift 2 --seed 7 --batch 1"
    fd.render(sampling(out, *flags.split()))
    assert calls[-1][:4] == (2, 2.0, 0.0, (8, 8)) and scales[-1] == 1.5
    assert calls[-1][4] != noise
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert Image.open(path).size == (64, 64)
    fd.render(sampling(out, "--seed", "7"))
    assert calls[-1][:4] == (3, 3.0, 3.5, (4, 4)) and calls[-1][4] != noise
    for steps in ("5", "40"):
        sentence = f"--student-steps {steps}: .* scales for 2 or 3 steps, give one of these"
        with pytest.raises(SystemExit, match=sentence):
            sampling(out, "--student-steps", steps)


@pytest.mark.parametrize("flags", [
    "--rank 4", "--iterations 3000", "--prompts p.txt", "--images d", "--paper", "--noises 2",
    "--recompute-every 1", "--compile", "--stop-when-matched", "--shift-range 1 2", "--limit 0",
    "--held-out 3",
])  # fmt: skip
def test_sample_refuses_flags_of_training(tmp_path, flags, capsys):
    """Even at their defaults: whoever gives them expects something of them."""
    with pytest.raises(SystemExit):
        fd.parse(["--out", str(tmp_path), *flags.split(), "--seed", "1", "--sample", "a"])
    said = " ".join(capsys.readouterr().err.split())
    assert f"--sample only renders, and {flags.split()[0]} would change nothing" in said


def test_sample_names_cut_texts_and_refuses_options(done, tmp_path, capsys):
    out = copied(done, tmp_path / "out")
    fd.main(["--model", str(TINY), "--out", str(out), "--sample", "a red circle, " * 9])
    said = capsys.readouterr()
    assert "cut 1 of 1 text to 8 tokens" in said.err
    assert len(said.out.splitlines()) == 1  # the path alone
    with pytest.raises(SystemExit, match="--sample 'a cat --w 64' has the option --w"):
        sampling(out, "a cat --w 64")


@pytest.mark.parametrize(("flags", "said"), [
    ("--warmup 5 --iterations 4", "--warmup 5 ends after the last of --iterations 4"),
    ("--stop-when-matched --validate-every 4", "--validate-every 4 has none before the last"),
    ("--guidance nan", "--guidance: nan must be at least"),
])  # fmt: skip
def test_flags_without_effect_are_refused(tmp_path, flags, said, capsys):
    with pytest.raises(SystemExit):
        fd.parse([*SMALL.split(), "--out", str(tmp_path), *flags.split()])
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_limit_above_the_pairs_is_named(tmp_path, capsys):
    folder = image_folder(tmp_path, 2)
    prepared(tmp_path / "out", "--images", folder, "--limit", 3)
    assert "--limit 3 is more than the 2 pairs there are: all are used" in capsys.readouterr().out


def test_sample_says_that_no_scale_was_found(done, tmp_path, capsys):
    out = copied(done, tmp_path / "out")
    tensors, metadata = load_file(out / fd.LORA), fd.read_metadata(out / fd.LORA)
    fd.write_tensors(out / fd.LORA, tensors, metadata | {"uncalibrated": [2]})
    for steps, said in ((2, True), (3, False)):
        sampling(out, "--student-steps", str(steps))
        assert ("scale" in capsys.readouterr().err) == said
