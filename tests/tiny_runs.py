"""What tests of flux_distill.py share: short runs on the tiny Flux, and how to look at them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"
import flux_distill as fd

TINY = Path(__file__).parent / "tiny_flux"
SMALL = f"""--model {TINY} --prompts {TINY / "prompts.txt"} --resolution 32 --iterations 4 --batch 4
    --rank 4 --learning-rate 3e-3 --held-out 3 --noises 2 --limit 6 --validate-every 2
    --checkpoint-every 2 --teacher-steps 8 --steps 2 3"""


def run(out: Path, *more) -> None:
    """A whole run, as the command does it."""
    fd.main([*SMALL.split(), "--out", str(out), *map(str, more)])


def parsed(out: Path, *more) -> fd.Settings:
    return fd.parse([*SMALL.split(), "--out", str(out), *map(str, more)])


def prepared(out: Path, *more, dtype: torch.dtype | None = None) -> SimpleNamespace:
    """All that the phases need, with the cache filled. dtype: of networks; None: the machine's."""
    settings, machine = parsed(out, *more), fd.Machine()
    machine.dtype = dtype or machine.dtype
    settings, found, cache = fd.prepare(settings, machine)
    fd.fill_cache(settings, cache)
    costs = fd.Costs(found.out / "costs.json", machine)
    return SimpleNamespace(settings=settings, machine=machine, run=found, cache=cache, costs=costs,
                           model=cache.model, data=cache.data)  # fmt: skip


def new_lora(setup: SimpleNamespace, **change) -> fd.LoRA:
    """A LoRA on a freshly loaded transformer; `change`: other settings."""
    settings = fd.replace(setup.settings, **change)
    return fd.LoRA(setup.model.family, setup.model.load("image", fresh=True).transformer, settings)


def train(setup: SimpleNamespace) -> tuple[fd.Validation, fd.TrainState]:
    """Phase 2."""
    return fd.train_student(setup.settings, setup.cache, setup.run, setup.costs)


@contextmanager
def calls_by_phase(
    network: type, phases: Sequence[str], note: Callable[[dict], object]
) -> Iterator[dict[str, list]]:
    """What `note` makes of the arguments of each call, by the innermost phase that makes it.

    network: class of the transformer. phases: names of functions of flux_distill.py; what makes
    the references of a validation is the phase "references".
    """
    current = ["elsewhere"]
    found = {}
    forward = network.forward

    def noted_forward(net, *args, **kwargs):
        found.setdefault(current[-1], []).append(note(kwargs))
        return forward(net, *args, **kwargs)

    def as_phase(function, name: str):
        def noted(*args, **kwargs):
            current.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                current.pop()

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "forward", noted_forward)
        for name in phases:
            patch.setattr(fd, name, as_phase(getattr(fd, name), name))
        init = as_phase(fd.Validation.__init__, "references")
        patch.setattr(fd.Validation, "__init__", init)
        yield found


def cards_code(out: Path) -> str:
    """The code for diffusers in the model card."""
    return (out / "README.md").read_text().split("```python\n")[1].split("```")[0]


def image_of_code(code: str, text: str, noise: torch.Tensor, folder: Path) -> np.ndarray:
    """Image (h, w, 3) in 0..255 that the card's code makes of text and noise in another process."""
    fd.save_file({"noise": noise}, folder / "noise.safetensors")
    given = 'safetensors.torch.load_file("noise.safetensors")["noise"]'
    code = code.replace('"PROMPT"', repr(text)).replace(
        "pipe(prompt", f"pipe(latents={given}, prompt"
    )
    code = f"import safetensors.torch\n{code}\nimage.save('image.png')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    with Image.open(folder / "image.png") as image:
        return np.asarray(image).astype(int)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def same_run(a: Path, b: Path) -> bool:
    """The same log and, to the bit, the same weights; metadata have no order in a file."""
    for name in (fd.LORA, fd.STATE):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        assert all(map(torch.equal, ours.values(), theirs.values()))
        assert fd.read_metadata(a / name) == fd.read_metadata(b / name)
    return (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    """All files but costs.json: a run that is started again adds its seconds."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "costs.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def picture(mode: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.linspace(0, 255, size[0] * size[1] * 4).reshape(size[1], size[0], 4)
    if mode == "I;16":
        return Image.fromarray((values[..., 0] * 257).astype(np.uint16))
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def edited(tmp_path: Path, file: str, **change) -> Path:
    """A copy of the tiny Flux with entries of a config changed."""
    folder = copied(TINY, tmp_path / "model")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    return folder


def says(pattern: str, *argv) -> None:
    """The command ends with one sentence that matches."""
    with pytest.raises(SystemExit, match=pattern) as stopped:
        fd.main([*SMALL.split(), *map(str, argv)])
    assert "\n" not in str(stopped.value) and "Traceback" not in str(stopped.value)
