"""What users give flux_distill.py and toy_2d.py: images, captions, prompts, flags, environment."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import SMALL, TINY, copied, edited, fd, parsed, picture, prepared, run, says

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
    "16.png": (65535 * RAMP).astype("u2"),
    "16.tif": (65535 * RAMP).astype("u2"),
    "big-endian.tif": (65535 * RAMP).astype(">u2"),
    "int255.tif": (255 * RAMP).astype("i4"),
    "int65535.tif": (65535 * RAMP).astype("i4"),
    "int32.tif": ((2**31 - 1) * RAMP).astype("i4"),
    "16.pgm": (65535 * RAMP).astype("u2"),
}


def opened_as_grey(path: Path) -> np.ndarray:
    """Red of an image as training sees it, in [0, 1]."""
    return fd.open_image(path, 64)[0, 0].numpy() / 2 + 0.5


@pytest.mark.parametrize("name", DEEP)
def test_a_ramp_of_more_than_8_bits_is_the_ramp(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    found = opened_as_grey(tmp_path / name)
    np.testing.assert_allclose(found, RAMP, rtol=0, atol=1.01 / 255)


def test_floats_slightly_beyond_black_and_white_are_clipped(tmp_path):
    """Resampled images overshoot."""
    values = (1.3 * RAMP - 0.15).clip(-0.1, 1.1)
    Image.fromarray(values.astype("f4")).save(tmp_path / "a.tif")
    found = opened_as_grey(tmp_path / "a.tif")
    np.testing.assert_allclose(found, values.clip(0, 1), rtol=0, atol=1.01 / 255)


def test_16_bit_integers_are_never_stretched(tmp_path):
    """A dark image stays dark: the kind of file says where white is, not its brightest pixel."""
    Image.fromarray((200 * RAMP).astype("u2")).save(tmp_path / "dark.png")
    assert opened_as_grey(tmp_path / "dark.png").max() < 0.01


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


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png"])
def test_of_several_frames_the_first_is_used(tmp_path, name):
    red = Image.new("RGB", (64, 64), "red")
    blue = Image.new("RGB", (64, 64), "blue")
    red.save(tmp_path / name, save_all=True, append_images=[blue], lossless=True)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    x = fd.open_image(tmp_path / name, 64)[0]
    assert x[0].min() > 0.98
    assert x[1:].max() < -0.98


@pytest.mark.parametrize("name", ["b.png", "b.gif"])
def test_transparent_entries_of_a_palette_are_seen_on_white(tmp_path, name):
    image = Image.new("P", (64, 64))
    image.putpalette([0, 0, 0, 255, 0, 0])  # black, which is transparent, and red
    image.paste(1, (0, 0, 32, 64))
    image.save(tmp_path / name, transparency=0)
    x = fd.open_image(tmp_path / name, 64)[0]
    assert (x[:, :, 40:] == 1).all()
    assert (x[0, :, :24] == 1).all()
    assert (x[1:, :, :24] == -1).all()


# --------------------------------------------------------------------------------- image folders


def nothing_is_cached(item: list) -> bool:
    return False


def read_folder(folder: Path) -> list[str]:
    """Names of the images that would be trained on."""
    found = fd.read_images(folder, 64, fd.Machine(), nothing_is_cached)
    return [file_of(example).name for example in found]


def file_of(example: fd.Example | fd.Pair) -> Path:
    """The file that the example's image is opened from."""
    path, _ = example.image.args
    return path


def with_caption(folder: Path, name: str, caption: str = "a red circle") -> None:
    picture("RGB").save(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption)


def image_folder(tmp_path, count: int = 3) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(count):
        with_caption(folder, f"{i}.png", f"a red circle {i}")
    return folder


def test_images_of_many_formats_are_used(tmp_path, capsys):
    names = ["a.png", "b.gif", "c.avif", "d.PNG", "e.jp2"]
    for name in names:
        with_caption(tmp_path, name)
    (tmp_path / "d.txt").rename(tmp_path / "d.TXT")
    assert read_folder(tmp_path) == names
    assert capsys.readouterr().out == ""  # nothing to mend


def test_hidden_files_are_ignored_in_silence(tmp_path, capsys):
    with_caption(tmp_path, "a.png")
    for name in (".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    assert read_folder(tmp_path) == ["a.png"]
    assert capsys.readouterr().out == ""


def lonely_caption(folder: Path) -> None:
    (folder / "lonely.txt").write_text("a red circle")


def caption_with_an_option(folder: Path) -> None:
    with_caption(folder, "option.png", "a red circle --ar 16:9")


def sub_folders(folder: Path) -> None:
    (folder / "sub" / "deep").mkdir(parents=True)
    for name in ("sub/c.png", "sub/deep/d.png"):
        picture("RGB").save(folder / name)


def files_of_other_kinds(folder: Path) -> None:
    for name in ("meta.json", "more.json", "Thumbs.db", "LICENSE"):
        (folder / name).write_bytes(b"x")


def flat_image(folder: Path) -> None:
    Image.new("RGB", (64, 64), "green").save(folder / "flat.png")
    (folder / "flat.txt").write_text("green")


LYING_AROUND = {  # what lies in a folder: what is said, and what is used of it
    lonely_caption: (
        "ignored 1 caption without an image (lonely.txt): add the images if they should be there",
        [],
    ),
    caption_with_an_option: (
        "kept 1 caption with options like --ar 16:9, which are trained on as words (option.txt):"
        " remove them from the text",
        ["option.png"],
    ),
    sub_folders: (
        "did not search 1 sub-folder with 2 images (sub): move images and captions up to use them",
        [],
    ),
    files_of_other_kinds: (
        "ignored 4 files of other kinds (2 .json, 1 no suffix, 1 .db): convert any images among"
        " them to PNG",
        [],
    ),
    flat_image: (
        "kept 1 image of a single colour (flat.png): remove what should not be trained on",
        ["flat.png"],
    ),
}


@pytest.mark.parametrize("add", LYING_AROUND, ids=lambda add: add.__name__)
def test_what_lies_in_a_folder_is_named(tmp_path, capsys, add):
    sentence, used = LYING_AROUND[add]
    with_caption(tmp_path, "a.png")
    add(tmp_path)
    assert read_folder(tmp_path) == ["a.png", *used]
    assert capsys.readouterr().out == sentence + "\n"


def test_notes_and_faults_are_told_together(tmp_path, capsys):
    with_caption(tmp_path, "a.png")
    for add in LYING_AROUND:
        add(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "gone.txt").write_text("a red circle")
    assert read_folder(tmp_path) == ["a.png", "flat.png", "option.png"]
    first, fault, *notes = capsys.readouterr().out.splitlines()
    assert first == "skipped 1, kept 3 images; fix these to use them:"
    assert fault.startswith("  gone.png: ")
    assert notes == [sentence for sentence, _ in LYING_AROUND.values()]


def test_a_long_list_of_faults_ends(tmp_path, capsys):
    with_caption(tmp_path, "a.png")
    for i in range(30):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no image")
    read_folder(tmp_path)
    said = capsys.readouterr().out
    assert "skipped 30, kept 1" in said
    assert "19.png" in said
    assert "20.png" not in said
    assert said.endswith("  and 10 more\n")


def test_images_are_opened_once_and_the_same_pairs_are_found_again(tmp_path, monkeypatch):
    folder = image_folder(tmp_path)
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:200])
    first = prepared(tmp_path / "out", "--images", folder)
    opened = []
    open_image = fd.open_image

    def noted(path, resolution):
        opened.append(path.name)
        return open_image(path, resolution)

    monkeypatch.setattr(fd, "open_image", noted)
    again = prepared(tmp_path / "out", "--images", folder)
    assert opened == ["2.png"]  # the damaged one has no latents
    assert len(again.data.pairs) == 2
    assert again.cache.keys == first.cache.keys
    assert again.run == first.run


PREPARE = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import flux_distill as fd
opened = []
open_image = fd.open_image
def noted(path, resolution):
    opened.append(path.name)
    return open_image(path, resolution)
fd.open_image = noted
_, run, cache = fd.prepare(fd.parse(sys.argv[1:]), fd.Machine())
kept = [pair.image.args[0].name for pair in cache.data.pairs]
Path({folder!r}, "rank" + os.environ["RANK"]).write_text(" ".join([*opened, "of", *kept]))
"""


@pytest.mark.slow
def test_processes_share_the_opening_of_images(tmp_path):
    folder = image_folder(tmp_path, 4)
    (folder / "1.png").write_bytes(b"")
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE.format(root=str(ROOT), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    command += [*SMALL.split(), "--out", tmp_path / "out", "--images", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = "of 0.png 2.png 3.png"
    assert (tmp_path / "rank0").read_text() == f"0.png 2.png {kept}"
    assert (tmp_path / "rank1").read_text() == f"1.png 3.png {kept}"
    assert done.stdout.count("skipped 1") == 1


# --------------------------------------------------------------------- what entries are made from


def hashed(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_latents_of_the_teacher_are_identified_by_all_that_they_are_made_from(setup):
    """By these keys runs recognise their cache and results."""
    text = setup.data.texts[setup.data.pairs[1].text]
    model = [fd.VERSION, setup.model.fingerprint, "cpu", 32]
    made_with = [256, None, 4, 0, [2.0, 4.0]]
    assert setup.data.latent_keys[1] == hashed([*model, *made_with, text, 1, 8, 3.5])


def test_latents_of_images_are_identified_by_all_that_they_are_made_from(tmp_path):
    folder = image_folder(tmp_path)
    found = prepared(tmp_path / "out", "--images", folder)
    content = (folder / "1.png").read_bytes()
    starts = [len(content) * k // 256 for k in range(256)]
    pieces = b"".join(content[start : start + 2**16] for start in starts)
    image = [len(content), hashlib.sha256(pieces).hexdigest()]
    model = [fd.VERSION, found.model.fingerprint, "cpu", 32]
    assert found.data.latent_keys[1] == hashed([*model, "a red circle 1", *image])


def test_embeddings_are_identified_by_all_that_they_are_made_from(setup):
    made_from = [fd.VERSION, setup.model.fingerprint, "cpu", 256, setup.data.texts[0]]
    assert setup.cache.keys["text"][0] == hashed(made_from)


# ------------------------------------------------------------------------------------------ prompts


def test_many_prompts_are_read_in_linear_time(tmp_path):
    lines = [f"a red circle number {i}" for i in range(100_000)]
    (tmp_path / "many.txt").write_text("\n".join(lines))
    settings = parsed(tmp_path / "out", "--prompts", tmp_path / "many.txt", "--limit", 0)
    started = time.process_time()
    _, _, cache = fd.prepare(settings, fd.Machine())
    assert time.process_time() - started < 15  # 3 s; by searching the list for each it took 40
    assert len(cache.data.pairs) == 99_997
    assert cache.data.texts[cache.data.pairs[-1].text] == lines[-4]


def refused(tmp_path, text: str, *flags) -> str:
    """The sentence that ends a run with these prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    settings = parsed(tmp_path / "out", "--prompts", file, *flags)
    with pytest.raises(SystemExit) as stopped:
        fd.prepare(settings, fd.Machine())
    sentence = str(stopped.value)
    assert "None" not in sentence
    assert "\n" not in sentence
    return sentence


def test_prompts_that_differ_in_case_alone_are_one_and_the_sentence_speaks_of_prompts(tmp_path):
    said = refused(tmp_path, "A Cat\na cat\nb\nc\n", "--held-out", 3)
    assert "--prompts" in said
    assert "--images" not in said
    assert "3 different prompts" in said
    assert "--held-out 3 needs 4" in said
    assert said.endswith("give --prompts a longer file, or give a smaller --held-out")


def test_held_out_prompts_are_distinct_without_regard_to_case(tmp_path):
    """The first spelling counts."""
    file = tmp_path / "a.txt"
    file.write_text("one\nA Fox\ntwo\na fox\nthree\nTWO\n")
    prompts, held_out = fd.read_prompts(file, 3, needs_more=True)
    assert prompts == ["one", "A Fox", "two", "a fox", "three", "TWO"]
    assert held_out == ["A Fox", "two", "three"]
    settings = parsed(tmp_path / "out", "--prompts", file)
    data = fd.prepare(settings, fd.Machine())[2].data
    assert [data.texts[pair.text] for pair in data.pairs] == ["one"]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("a dog\na cat", ""),
        ("a dog\nA Red circle 1", "left out 1 image: the caption is a held-out prompt\n"),
        ("a red circle 2\na red circle 0", "left out 2 images: the caption is a held-out prompt\n"),
    ],
)
def test_images_whose_captions_are_held_out_are_counted(tmp_path, capsys, last, said):
    folder = image_folder(tmp_path, 3)
    file = tmp_path / "prompts.txt"
    file.write_text(f"first\n{last}\n")
    flags = ["--images", folder, "--prompts", file, "--held-out", 2, "--limit", 0]
    data = fd.prepare(parsed(tmp_path / "out", *flags), fd.Machine())[2].data
    kept = [f"{i}.png" for i in range(3) if f"a red circle {i}" not in last.lower()]
    assert [file_of(pair).name for pair in data.pairs] == kept
    told = f"{fd.counted(kept, 'image')} to train on; held-out prompts: 1 to validate on, 1 to"
    assert capsys.readouterr().out == f"{said}{told} compare on\n"


def test_too_few_built_in_prompts_are_called_so():
    with pytest.raises(SystemExit, match=r"the built-in list has 24 different prompts.*needs 25"):
        fd.read_prompts(None, 24, needs_more=True)
    for held_out, needs_more in ((23, True), (24, False)):
        assert len(fd.read_prompts(None, held_out, needs_more)[1]) == held_out


def test_images_whose_captions_are_all_held_out_are_refused(tmp_path):
    folder = image_folder(tmp_path, 2)
    prompts = "first\nA Red circle 0\na red circle 1\n"
    said = refused(tmp_path, prompts, "--images", folder, "--held-out", 2)
    assert f"every caption in --images {folder} is also one of the 2 held-out prompts" in said


def test_comments_and_blank_lines_are_no_prompts(tmp_path):
    text = "\ufeff# a comment\r\n\r\na\r\n  # another\r\nb # no comment\r\nc -- d\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    prompts = ["a", "b # no comment", "c -- d"]
    assert fd.read_prompts(tmp_path / "a.txt", 2, needs_more=True) == (prompts, prompts[1:])


@pytest.mark.parametrize(
    "option", ["--w 1024 --h 1024", "--ar 16:9", "--n blurry", "--d 1", "--S=1"]
)
def test_options_in_prompts_are_refused_with_their_line(tmp_path, option):
    said = refused(tmp_path, f"# mine\n\na cat {option}\na\nb\nc\nd\n")
    assert f"line 3 has the option {option.split()[0]}: prompts take no options here" in said


# ----------------------------------------------------------------------------------- length of text

LONG = "a red circle, " * 9  # the tiny tokenizer takes 8 tokens: of a longer text the rest is lost


def test_cut_texts_are_counted_and_named(tmp_path, capsys):
    texts = ["a red circle", LONG, "a blue ring", "a red ring, " * 20, "b", "c", "d"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(texts))
    found = prepared(tmp_path / "out", "--prompts", file, "--held-out", 2)
    said = capsys.readouterr().err
    assert "cut 2 of 7 texts to 8 tokens; shorten them:" in said
    tokenizer = found.model.load("text").tokenizer_2
    for text in (texts[1].strip(), texts[3].strip()):
        length = len(tokenizer(text, truncation=False).input_ids)
        assert length > 8
        assert f"  {length} tokens: {text[:60]}\n" in said


def test_cut_texts_are_named_once(tmp_path, capsys):
    """When they are encoded: later starts find them in the cache."""
    file = tmp_path / "prompts.txt"
    file.write_text(f"{LONG}\na\nb\nc\n")
    flags = ["--prompts", file, "--held-out", 2]
    prepared(tmp_path / "out", *flags)
    assert "cut 1 of 4 texts" in capsys.readouterr().err
    prepared(tmp_path / "out", *flags)
    assert "cut" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def twelve_tokens(tmp_path_factory) -> SimpleNamespace:
    """A finished run with --text-tokens 12, of a model whose tokenizer takes 512, as Flux's does;
    its flags without that one; and the longer text of its prompts."""
    folder = tmp_path_factory.mktemp("twelve")
    model = edited(folder, "tokenizer_2/tokenizer_config.json", model_max_length=512)
    file = folder / "prompts.txt"
    file.write_text(f"{LONG}\na\nb\nc\n")
    flags = ["--model", model, "--prompts", file, "--iterations", 1, "--held-out", 2, "--batch", 1]
    run(folder / "out", *flags, "--text-tokens", 12)
    return SimpleNamespace(out=folder / "out", model=model, flags=flags)


def test_a_longer_input_is_offered_where_the_tokenizer_takes_more(twelve_tokens, tmp_path, capsys):
    prepared(tmp_path / "out", *twelve_tokens.flags, "--text-tokens", 12)
    sentence = "cut 1 of 4 texts to 12 tokens; shorten them, or give --text-tokens up to 512:"
    assert sentence in capsys.readouterr().err


def test_text_tokens_reach_cache_lora_and_card(twelve_tokens):
    out = twelve_tokens.out
    for path in out.glob("cache/text-*"):
        assert len(load_file(path)["text"]) == 12
    adapter = fd.read_metadata(out / fd.LORA)
    assert adapter["max_sequence_length"] == adapter["settings"]["text_tokens"] == 12
    assert "max_sequence_length=12" in (out / "README.md").read_text()


def test_other_text_tokens_are_another_run(twelve_tokens):
    sentence = "holds a run with other settings .--text-tokens 12, now 256"
    says(sentence, "--out", twelve_tokens.out, *twelve_tokens.flags)


@pytest.mark.parametrize(("flags", "length"), [([], 12), (["--text-tokens", "20"], 20)])
def test_text_tokens_of_sample_are_those_of_the_run_or_the_flag(twelve_tokens, rendered, flags,
                                                                length):  # fmt: skip
    call = rendered(twelve_tokens.out, *flags, model=twelve_tokens.model, prompt=LONG)
    assert call.text_tokens == length


def test_the_memory_estimate_counts_text_tokens(setup):
    """By the least memory that is enough, found by halving."""
    model = copy.copy(setup.model)

    def enough(tokens: int) -> int:
        settings = fd.replace(setup.settings, text_tokens=tokens)
        low, high = 0, 2**32
        while high - low > 2**12:
            middle = (low + high) // 2
            model.machine = SimpleNamespace(
                device="cpu", dtype=setup.machine.dtype, memory=lambda size=middle: size
            )
            try:
                fd.check_memory(settings, model)
                high = middle
            except SystemExit:
                low = middle
        return high

    assert enough(512) > 1.3 * enough(256)


def test_more_text_tokens_than_the_tokenizer_takes_are_refused(tmp_path):
    sentence = "--text-tokens 9 is more than the 8 .*give at most 8"
    says(sentence, "--text-tokens", 9, "--out", tmp_path)


def test_more_text_tokens_than_flux_takes_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fd.parse(["--text-tokens", "513", "--out", str(tmp_path)])
    assert "--text-tokens: 513 must be at most 512" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- --sample


@pytest.fixture
def rendered(monkeypatch):
    """A function that renders one prompt, and tells with what the stock pipeline was called."""
    calls = []
    stock_sample = fd.stock_sample

    def noted(model, noise, steps, cond, shift, batch):
        latents = stock_sample(model, noise, steps, cond, shift, batch)
        layers = [m for m in model.pipe.transformer.modules() if hasattr(m, "scaling")]
        call = SimpleNamespace(
            steps=steps,
            scale=layers[0].scaling["student"],
            shift=model.pipe.scheduler.config.shift,
            guidance=cond["guidance"][0].item(),
            text_tokens=cond["text"].shape[1],
            noise=noise,
        )
        calls.append(call)
        return latents

    monkeypatch.setattr(fd, "stock_sample", noted)

    def render(out, *flags, model=TINY, prompt="a red ring") -> SimpleNamespace:
        fd.main(["--model", str(model), "--out", str(out), "--sample", prompt, *flags])
        return calls[-1]

    return render


@pytest.fixture
def scaled(done, tmp_path) -> Path:
    """A finished run whose LoRA says that it was made with other values than the defaults."""
    out = copied(done, tmp_path / "out")
    made_with = {"student_steps": 2, "shift": 2.25, "guidance": 2.0, "scales": {"2": 1.5, "3": 2.5}}
    adapter = fd.read_metadata(out / fd.LORA) | made_with
    fd.write_tensors(out / fd.LORA, load_file(out / fd.LORA), adapter)
    return out


def test_sample_renders_as_the_lora_was_made(scaled, rendered, capsys):
    call = rendered(scaled)
    assert (call.steps, call.scale, call.shift, call.guidance) == (2, 1.5, 2.25, 2.0)
    path = Path(capsys.readouterr().out.strip())
    with Image.open(path) as image:
        assert image.size == (32, 32)


def test_sample_obeys_the_flags_that_it_takes(scaled, rendered, capsys):
    flags = "--student-steps 3 --resolution 64 --guidance 0 --shift 2 --batch 1"
    call = rendered(scaled, *flags.split())
    assert (call.steps, call.scale, call.shift, call.guidance) == (3, 2.5, 2.0, 0.0)
    path = Path(capsys.readouterr().out.strip())
    with Image.open(path) as image:
        assert image.size == (64, 64)


def test_the_seed_of_sample_changes_the_noise_and_nothing_else(scaled, rendered):
    call = rendered(scaled)
    other = rendered(scaled, "--seed", "7")
    assert other.noise.shape == call.noise.shape
    assert not other.noise.allclose(call.noise)
    for name in ("steps", "scale", "shift", "guidance", "text_tokens"):
        assert getattr(other, name) == getattr(call, name)


@pytest.mark.parametrize("steps", ["5", "40"])
def test_sample_refuses_steps_that_the_lora_has_no_scale_for(scaled, rendered, steps):
    sentence = f"--student-steps {steps}: .* scales for 2 or 3 steps, give one of these"
    with pytest.raises(SystemExit, match=sentence):
        rendered(scaled, "--student-steps", steps)


@pytest.mark.parametrize("flag, value", [("--guidance", 8.5), ("--shift", 4.5)])
def test_sample_refuses_what_the_student_was_not_trained_for(scaled, rendered, flag, value):
    sentence = f"{flag} {value} is outside the range of the training"
    with pytest.raises(SystemExit, match=sentence):
        rendered(scaled, flag, str(value))


def test_sample_names_the_only_number_of_steps_that_the_lora_has_a_scale_for(scaled, rendered):
    adapter = fd.read_metadata(scaled / fd.LORA) | {"scales": {"2": 1.5}}
    fd.write_tensors(scaled / fd.LORA, load_file(scaled / fd.LORA), adapter)
    with pytest.raises(SystemExit, match=" has scales for 2 steps, give one of these"):
        rendered(scaled, "--student-steps", "3")


def test_sample_overwrites_no_image_that_was_made_with_other_flags(done, rendered, tmp_path):
    out = copied(done, tmp_path / "out")
    images = {}
    flags_of_runs = (
        "", "--seed 7", "--student-steps 2", "--resolution 48", "--guidance 2", "--shift 2.5",
        "--text-tokens 6",
    )  # fmt: skip
    for flags in flags_of_runs:
        rendered(out, *flags.split())
        found = {path: path.read_bytes() for path in (out / "samples").iterdir()}
        assert images.items() <= found.items()
        assert len(found) == len(images) + 1
        images = found
    assert len(images) == len(flags_of_runs)


@pytest.fixture
def of_int8(done, tmp_path) -> Path:
    """A finished run whose LoRA says that it was made for an int8 base."""
    out = copied(done, tmp_path / "out")
    adapter = fd.read_metadata(out / fd.LORA)
    adapter["settings"]["quantize"] = "int8"
    fd.write_tensors(out / fd.LORA, load_file(out / fd.LORA), adapter)
    return out


def test_sample_quantizes_the_base_as_the_lora_was_made(done, of_int8, rendered, monkeypatch):
    asked = []
    monkeypatch.setattr(fd, "int8", lambda: asked.append(True))
    monkeypatch.setattr(fd, "find_spec", lambda name: True)
    rendered(copied(done, of_int8.parent / "plain"))
    assert asked == []
    rendered(of_int8)
    assert asked == [True]


def test_sample_for_an_int8_base_without_torchao_ends_with_a_sentence(of_int8, monkeypatch):
    monkeypatch.setattr(fd, "find_spec", lambda name: None)
    sentence = "the adapter in --out .* is for an int8 base, which needs torchao: pip install"
    with pytest.raises(SystemExit, match=sentence):
        fd.main(["--model", str(TINY), "--out", str(of_int8), "--sample", "a red ring"])


@pytest.mark.parametrize("flags", [
    "--rank 4", "--iterations 3000", "--prompts p.txt", "--images d", "--paper", "--noises 2",
    "--recompute-every 1", "--compile", "--stop-when-matched", "--shift-range 1 2", "--limit 0",
    "--held-out 3", "--teacher-steps 32", "--steps 2 3",
])  # fmt: skip
def test_sample_refuses_flags_of_training(tmp_path, flags, capsys):
    """Even at their defaults: whoever gives them expects something of them."""
    with pytest.raises(SystemExit):
        fd.parse(["--out", str(tmp_path), *flags.split(), "--seed", "1", "--sample", "a"])
    said = " ".join(capsys.readouterr().err.split())
    assert f"--sample only renders, and {flags.split()[0]} has no effect there: remove it" in said


def test_sample_names_cut_texts_and_prints_paths_alone(done, rendered, tmp_path, capsys):
    out = copied(done, tmp_path / "out")
    rendered(out, prompt=LONG)
    said = capsys.readouterr()
    assert "cut 1 of 1 text to 8 tokens" in said.err
    printed = said.out.splitlines()
    assert len(printed) == 1
    assert Path(printed[0]).exists()


def test_sample_refuses_options_in_prompts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fd.parse(["--out", str(tmp_path), "--sample", "a dog", "a cat --w 64"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--sample 'a cat --w 64' has the option --w: prompts take no options here" in said


@pytest.mark.parametrize(("steps", "is_said"), [(2, True), (3, False)])
def test_sample_says_that_no_scale_was_found(done, rendered, tmp_path, capsys, steps, is_said):
    out = copied(done, tmp_path / "out")
    adapter = fd.read_metadata(out / fd.LORA) | {"uncalibrated": [2]}
    fd.write_tensors(out / fd.LORA, load_file(out / fd.LORA), adapter)
    rendered(out, "--student-steps", str(steps))
    assert ("For 2 steps no scale" in capsys.readouterr().err) == is_said


# ------------------------------------------------------------------------------------ other flags


@pytest.mark.parametrize(("flags", "said"), [
    ("--warmup 5 --iterations 4", "--warmup 5 ends after the last of --iterations 4"),
    ("--stop-when-matched --validate-every 4",
     "with --validate-every 4 there is none before the last of --iterations 4"),
    ("--guidance nan", "--guidance: nan must be at least"),
])  # fmt: skip
def test_flags_without_effect_are_refused(tmp_path, flags, said, capsys):
    with pytest.raises(SystemExit):
        parsed(tmp_path, *flags.split())
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_limit_above_the_pairs_is_named(tmp_path, capsys):
    folder = image_folder(tmp_path, 2)
    fd.prepare(parsed(tmp_path / "out", "--images", folder, "--limit", 3), fd.Machine())
    assert "--limit 3 is more than the 2 pairs there are: all are used" in capsys.readouterr().out


def test_images_in_hidden_folders_are_not_counted(tmp_path):
    folder = image_folder(tmp_path)
    for name, count in (("sub", 1), (".thumbs", 5), ("sub/deeper", 2)):
        (folder / name).mkdir()
        for i in range(count):
            with_caption(folder / name, f"{i}.png")
    notes = fd.list_images(folder)[2]
    assert notes == [
        "did not search 1 sub-folder with 3 images (sub): move images and captions up to use them"
    ]


def test_only_line_ends_separate_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    lines = ["a\u2028b", "c\x0bd", "e\x0cf", "g\x85h"]
    file.write_bytes("\r\n".join(lines).encode())
    prompts, _ = fd.read_prompts(file, 2, True)
    assert prompts == ["a b", "c d", "e f", "g h"]


def test_sample_takes_the_model_that_the_lora_was_made_for(done, tmp_path):
    """A folder has to be named; a model on the Hub is known by its name."""
    out = copied(done, tmp_path / "out")
    with pytest.raises(SystemExit, match="was made for tiny_flux, a folder: say where it is with"):
        fd.main(["--out", str(out), "--sample", "a red circle"])
    adapter = fd.read_metadata(out / fd.LORA) | {"base_model": "somebody/tuned"}
    fd.write_tensors(out / fd.LORA, load_file(out / fd.LORA), adapter)
    settings = fd.parse(["--out", str(out), "--sample", "a red circle"])
    assert fd.follow_adapter(settings, fd.read_adapter(out)).model == "somebody/tuned"
    settings = fd.parse(["--model", "mine/too", "--out", str(out), "--sample", "a red circle"])
    assert fd.follow_adapter(settings, fd.read_adapter(out)).model == "mine/too"
