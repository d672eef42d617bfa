"""What tests of flux_distill.py share: short runs on the tiny Flux, and how to look at them."""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"
import flux_distill as fd

SHIPPED = fd.FINE, fd.STEPS
fd.FINE, fd.STEPS = 8, (2, 3)  # quicker
TINY = Path(__file__).parent / "tiny_flux"
SMALL = f"""--model {TINY} --prompts {TINY / "prompts.txt"} --resolution 32 --iterations 4 --batch 4
    --rank 4 --learning-rate 3e-3 --held-out 3 --noises 2 --limit 6 --validate-every 2
    --checkpoint-every 2"""


def run(out, *more):
    fd.main([*SMALL.split(), "--out", str(out), *map(str, more)])


def prepared(out, *more) -> Namespace:
    """Settings as main prepares them, with the cache made."""
    args = fd.parse([*SMALL.split(), "--out", str(out), *map(str, more)])
    fd.prepare(args)
    fd.make_cache(args)
    return args


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def same_run(a: Path, b: Path) -> bool:
    """The same log and, to the bit, the same weights; metadata have no order in a file."""
    for name in (fd.LORA, "checkpoint/state.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys() and all(
            map(torch.equal, ours.values(), theirs.values())
        )
        assert fd.read_metadata(a / name) == fd.read_metadata(b / name)
    return (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    """All files but costs.json: a run that is started again adds its seconds."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "costs.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def train(out, *more):
    args = prepared(out, *more)
    fd.train(args)
    with safe_open(args.state, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, fd.read_metadata(args.state)  # noqa: SIM118


def picture(mode, size=(64, 48)):
    values = np.linspace(0, 255, size[0] * size[1] * 4).reshape(size[1], size[0], 4)
    if mode == "I;16":
        return Image.fromarray((values[..., 0] * 257).astype(np.uint16))
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def folder_of(images: Path) -> Namespace:
    """What read_images uses of the settings."""
    return Namespace(
        images=images, out=images / "out", model_print="", device="cpu", resolution=64,
        process=0, processes=1, lead=True, quiet={},
    )  # fmt: skip


def edited(tmp_path: Path, file: str, **change) -> Path:
    """A copy of the tiny Flux with entries of a config changed."""
    folder = copied(TINY, tmp_path / "model")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    return folder


def says(pattern, *argv):
    with pytest.raises(SystemExit, match=pattern) as stopped:
        fd.main([*SMALL.split(), *map(str, argv)])
    assert "\n" not in str(stopped.value) and "Traceback" not in str(stopped.value)
