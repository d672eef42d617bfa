"""flux_distill.py, the cache and the images in it; files that are damaged or of another run."""

from pathlib import Path

import make_tiny_flux as tiny
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import content, copied, fd, parsed, picture, prepared, run, train
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
    ["--resolution", 48], ["--seed", 1], ["--shift-range", 2, 3.5], ["--teacher-steps", 6],
], ids=lambda change: change[0])  # fmt: skip
def test_other_settings_recreate_the_latents_and_keep_the_texts(tmp_path, change):
    before = written(prepared(tmp_path / "out").run.out)
    after = written(prepared(tmp_path / "out", *change).run.out)
    assert before.items() < after.items()
    new = after.keys() - before.keys()
    assert {name[:4] for name in new} == {"late"}
    assert len(new) == len([name for name in before if name.startswith("late")])


def test_a_changed_weight_is_another_file(tmp_path):
    """Up to 16 MiB every byte counts, at the borders of the hashed pieces too."""
    path = tmp_path / "a"
    size = 2**24 - 5
    path.write_bytes(bytes(size))
    before = fd.fingerprint(path)
    borders = [k * size // 256 for k in range(16, 256, 16)]
    for place in (0, size - 1, *borders, *(border - 1 for border in borders)):
        with open(path, "rb+") as file:
            file.seek(place)
            file.write(b"x")
            file.flush()
            assert fd.fingerprint(path) != before
            file.seek(place)
            file.write(b"\0")
    assert fd.fingerprint(path) == before
    path.write_bytes(bytes(size + 1))
    assert fd.fingerprint(path) != before


def test_a_changed_mebibyte_of_a_large_file_is_another_file(tmp_path):
    """Wherever it begins: about the least that one layer of a real model takes."""
    path = tmp_path / "a"
    size, changed = 2**26, 2**20
    path.write_bytes(bytes(size))
    before = fd.fingerprint(path)
    places = range(0, size - changed, 3 * changed + 12_345)
    for place in (*places, size - changed):
        with open(path, "rb+") as file:
            file.seek(place)
            file.write(b"x" * changed)
            file.flush()
            assert fd.fingerprint(path) != before
            file.seek(place)
            file.write(bytes(changed))
    assert fd.fingerprint(path) == before


def test_the_pool_does_not_depend_on_what_was_held_out_before(tmp_path):
    """The noise of a pair is that of its prompt's number, also where a prompt occurs twice."""
    prompts = tmp_path / "prompts.txt"
    a, b, c, d, e = [f"a {colour} ring" for colour in ("red", "green", "blue", "white", "black")]
    prompts.write_text("\n".join([a, b, c, d, e, c, a]))
    flags = ["--prompts", prompts, "--limit", 0]
    earlier = prepared(tmp_path / "out", *flags, "--held-out", 3)
    before = written(tmp_path / "out")
    again = prepared(tmp_path / "out", *flags, "--held-out", 2)
    fresh = prepared(tmp_path / "fresh", *flags, "--held-out", 2)
    assert before.items() <= written(tmp_path / "out").items()  # they are used

    def texts(setup) -> list[str]:
        return [setup.data.texts[pair.text] for pair in setup.data.pairs]

    assert texts(earlier) == [a, b, a]
    assert texts(again) == texts(fresh) == [a, b, c, c, a]
    places = range(5)
    pool = fresh.cache.read("latent", places)["latent"]
    # Not to the bit: an entry's rounding depends on the others of its batch.
    assert_close(again.cache.read("latent", places)["latent"], pool, rtol=0, atol=1e-4)
    for first, second in ((0, 4), (2, 3)):  # one prompt, two noises
        assert (pool[first] - pool[second]).abs().max() > 0.1


def lacking_its_part(machine: fd.Machine) -> fd.Machine:
    """The first of two processes, whose partner fills a folder of its own."""
    machine.processes = 2
    machine.add_up = lambda *tensors: None
    machine.collect = lambda items: items * 2  # images are checked in turn
    return machine


@pytest.mark.parametrize("source", ["prompts", "images"])
def test_a_folder_that_machines_do_not_share_is_named(tmp_path, source):
    flags = ["--batch", 1]
    if source == "images":
        folder = tmp_path / "images"
        folder.mkdir()
        for name in "ab":
            picture("RGB").save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text("a red circle")
        flags += ["--images", folder]
    setup = prepared(tmp_path / "whole", *flags)
    settings = fd.replace(setup.settings, out=tmp_path / "out")
    lacking_its_part(setup.machine)
    sentence = "--out .*out is not a folder that all machines share: put it on a shared disk"
    with pytest.raises(SystemExit, match=sentence):
        fd.fill_cache(settings, fd.Cache(settings, setup.model, setup.data))
    whole = fd.Cache(setup.settings, setup.model, setup.data)
    fd.fill_cache(setup.settings, whole)  # the other one's part is there: no complaint


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
    (found,) = fd.read_images(tmp_path, 32, machine, lambda identity: False)
    assert found.caption == "a red circle"
    assert found.identity == ["a red circle", *fd.fingerprint(good)]
    assert torch.equal(found.image(), fd.open_image(good, 32))
    said = capsys.readouterr().out
    assert "skipped 5, kept 1 images" in said
    for words in ("b.png: b.txt is empty", "c.png: it has no caption c.txt",
                  "d.png: d.txt is not UTF-8 text", "e.png: ", "f.png: "):  # fmt: skip
        assert f"\n  {words}" in said
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SystemExit, match="no image with a caption"):
        fd.read_images(tmp_path, 32, machine, lambda identity: False)


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
    """As well as the VAE alone can."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = tiny.render(torch.tensor([3]), torch.Generator().manual_seed(5))
    levels = ((pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(levels.numpy()).save(folder / "a.png")
    (folder / "a.txt").write_text("a red ring")
    setup = prepared(tmp_path / "out", "--images", folder)
    latent = setup.cache.latent(0)
    assert latent.shape == setup.model.latent_shape(32)
    assert latent.std() < 2  # normalised
    pipe = setup.model.load("image")
    decoded = setup.model.family.decode(pipe, latent[None])
    as_saved = levels.permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        by_vae = pipe.vae.decode(pipe.vae.encode(as_saved).latent_dist.mode()).sample
    assert_close(decoded, (by_vae / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    assert (decoded - (pixels.permute(0, 2, 3, 1) + 1) / 2).square().mean() < 0.01


def test_latents_decode_as_in_the_stock_pipeline(setup):
    pipe = setup.model.load("image")
    cond = setup.cache.conditions([0, 1], 3.5)
    noise = setup.cache.noise([("a",), ("b",)])
    stock = {}
    for kind in ("latent", "pt"):
        stock[kind] = pipe(
            prompt_embeds=cond["text"],
            pooled_prompt_embeds=cond["pooled"],
            height=32,
            width=32,
            num_inference_steps=3,
            latents=FluxPipeline._pack_latents(noise, *noise.shape),
            output_type=kind,
        ).images
    latents = FluxPipeline._unpack_latents(stock["latent"], 32, 32, pipe.vae_scale_factor)
    decoded = setup.model.family.decode(pipe, latents)
    assert_close(decoded, stock["pt"].permute(0, 2, 3, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("flags", [("--text-tokens", 6), ("--batch", 2), ("--seed", 1)])
def test_images_of_the_teacher_are_made_again_where_they_would_be_others(setup, tmp_path, flags):
    """The text's length changes them; the batch and what shares it change their rounding."""
    other = fd.prepare(parsed(tmp_path / "out", *flags), fd.Machine())[2].data
    assert not set(other.latent_keys) & set(setup.data.latent_keys)
    same = fd.prepare(parsed(tmp_path / "out"), fd.Machine())[2].data
    assert same.latent_keys == setup.data.latent_keys
