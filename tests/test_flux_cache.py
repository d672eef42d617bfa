"""flux_distill.py, the cache and the images in it; files that are damaged or of another run."""

from pathlib import Path

import make_tiny_flux as tiny
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import content, copied, fd, picture, prepared, run, train
from torch.testing import assert_close


def written(out: Path) -> dict[str, int]:
    """When each file of the cache was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "cache").iterdir()}


# -------------------------------------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    fd.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), fd.atomic(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert content(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "another entry"])
def test_a_damaged_cache_file_is_recreated(done, tmp_path, damage, capsys):
    out = copied(done, tmp_path / "out")
    path, other = sorted((out / "cache").glob("latent-*"))[:2]
    whole = path.read_bytes()
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    damaged = {
        "empty": b"",
        "short": b"12345",
        "cut": whole[:-7],
        "another entry": other.read_bytes(),
    }
    path.write_bytes(damaged[damage])
    before = written(out)
    prepared(out)
    said = capsys.readouterr().out
    assert f"{path.name} is damaged: it is recreated" in said
    assert other.name not in said
    assert {name for name, time in written(out).items() if before[name] != time} == {path.name}
    assert_close(load_file(path), tensors, rtol=0, atol=0)


def test_other_prompts_make_only_their_part_of_the_cache(tmp_path):
    setup = prepared(tmp_path / "out")
    before = written(setup.run.out)
    lines = setup.settings.prompts.read_text().splitlines()
    other = tmp_path / "prompts.txt"
    other.write_text("\n".join(["a blue lion", *lines[1:]]))
    prepared(tmp_path / "out", "--prompts", other)
    after = written(setup.run.out)
    assert before.items() <= after.items()
    assert sorted(name[:4] for name in after.keys() - before.keys()) == ["late", "text"]


@pytest.mark.parametrize("change", [
    ["--resolution", 48], ["--seed", 1], ["--shift-range", 1, 2], ["--teacher-steps", 6],
], ids=lambda change: change[0])  # fmt: skip
def test_other_settings_recreate_the_latents_and_keep_the_texts(tmp_path, change):
    before = written(prepared(tmp_path / "out").run.out)
    after = written(prepared(tmp_path / "out", *change).run.out)
    assert before.items() < after.items()
    new = after.keys() - before.keys()
    assert {name[:4] for name in new} == {"late"}
    assert len(new) == len([name for name in before if name.startswith("late")])


def test_a_changed_weight_is_another_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(3_000_000))
    before = fd.fingerprint(path)
    for place in (0, 1_234_567, 2_999_999):
        path.write_bytes(bytes(place) + b"x" + bytes(2_999_999 - place))
        assert fd.fingerprint(path) != before
    path.write_bytes(bytes(3_000_001))
    assert fd.fingerprint(path) != before


@pytest.mark.parametrize("name", [fd.STATE, fd.LORA])
def test_a_damaged_checkpoint_is_named_and_kept(done, tmp_path, name):
    out = copied(done, tmp_path / "out")
    data = (out / name).read_bytes()[:-100]
    (out / name).write_bytes(data)
    with pytest.raises(SystemExit, match=f"{name.split('/')[-1]} is damaged: move it away"):
        run(out)
    assert (out / name).read_bytes() == data


def test_no_pickle_is_read():
    source = Path(fd.__file__).read_text()
    assert "torch.load" not in source
    assert "pickle" not in source


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_images_of_all_kinds(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture(mode).save(path)
    x = fd.open_image(path, 64)
    assert x.shape[:2] == (1, 3)
    assert not x.shape[2] % 16
    assert not x.shape[3] % 16
    assert -1 <= x.min() < x.max() <= 1
    assert x.std() > 0.05


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3)])
def test_images_of_extreme_shapes(tmp_path, size):
    picture("RGB", size).save(tmp_path / "a.png")
    assert fd.open_image(tmp_path / "a.png", 64).isfinite().all()


def test_images_are_turned_as_the_camera_says(tmp_path):
    image = Image.new("RGB", (40, 80), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    _, _, height, width = fd.open_image(tmp_path / "a.jpg", 64).shape
    assert height < width


def test_transparent_images_are_seen_on_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (fd.open_image(tmp_path / "a.png", 64) == 1).all()


def test_bad_images_and_captions_are_named_counted_and_skipped(tmp_path, capsys):
    for name in "abcd":
        picture("RGB").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.png").write_bytes(b"")
    (tmp_path / "f.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    for name in "ef":
        (tmp_path / f"{name}.txt").write_text("a red circle\n")
    machine = fd.Machine()
    good = tmp_path / "a.png"
    item = ["a red circle", *fd.fingerprint(good)]
    assert fd.read_images(tmp_path, machine, lambda item: False) == [(good, "a red circle", item)]
    said = capsys.readouterr().out
    assert "skipped 5, kept 1 images" in said
    for words in ("b.png: b.txt is empty", "c.png: it has no caption c.txt",
                  "d.png: d.txt is not UTF-8 text", "e.png: ", "f.png: "):  # fmt: skip
        assert f"\n  {words}" in said
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SystemExit, match="no image with a caption"):
        fd.read_images(tmp_path, machine, lambda item: False)


def test_training_on_images_of_several_shapes(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(((64, 64), (96, 48), (40, 80))):
        picture("RGB", size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red circle {i}")
    setup = prepared(tmp_path / "out", "--images", folder, "--limit", 0, "--resolution", 48)
    _, state = train(setup)
    assert state.done
    assert all(weights.isfinite().all() for weights in state.weights.values())
    assert len(fd.read_pool(setup.cache)) == 3  # shapes


def test_latents_of_images_decode_to_them(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = tiny.render(torch.tensor([3]), torch.Generator().manual_seed(5))[0]
    levels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(levels.numpy()).save(folder / "a.png")
    (folder / "a.txt").write_text("a red ring")
    setup = prepared(tmp_path / "out", "--images", folder)
    latent = setup.cache.latent(0)
    assert latent.shape == setup.model.latent_shape(32)
    assert latent.std() < 2  # normalised
    decoded = setup.model.family.decode(setup.model.load("image"), latent[None])[0]
    assert (decoded - (pixels.permute(1, 2, 0) + 1) / 2).square().mean() < 0.01
