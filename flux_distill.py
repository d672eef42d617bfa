"""Distil FLUX.1 or FLUX.2 into a few-step sampler: a LoRA by SCFM (arXiv 2510.17858).

The phases of a run. A phase is skipped when its result is in --out and fits the settings, so after
any interruption the same command resumes. Every random draw has a key: it depends on --seed and
that key only, never on earlier draws.

phase      reads                      writes in --out
---------  -------------------------  ------------------------------------------------------------
set-up     flags, model, prompts,     --out itself, .lock
           images
cache      prompts, images, model     cache/: a file per text (embedding) and per pair (latent)
train      cache, model               checkpoint/, log.csv, training.png, validation/
calibrate  checkpoint, cache, model   the LoRA, cache/check, validation/saved.png
compare    the LoRA, cache, model     comparison.png, README.md (model card), results.json;
                                      FLUX.2: comfyui.safetensors, the LoRA under other names

Keys: "pool", example (noise of the teacher's images); "A", layer (a LoRA's first weights); "train",
iteration, pass; "fraction", iteration; "validation", "check" or "compare", text, sample; "check
device". When stopped, cache keeps whole files, train finishes its iteration and saves (a validation
is repeated), calibrate and compare start over.

costs.json has the seconds and the peak GPU memory of each phase. --sample renders prompts with a
finished LoRA instead, to samples/ (key: "sample", number of the prompt).
"""

# ruff: noqa: E402
from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

# ----------------------------------------------------------------------------------------- settings


def at_least(low: float, multiple_of: int = 1, high: float = math.inf):
    """An argparse type: a finite number of low's type in [low, high]."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not value >= low:  # or not a number
            raise ArgumentTypeError(f"{text} must be at least {low}")
        if value > high or value == math.inf:
            raise ArgumentTypeError(
                f"{text} must be at most {high}" if high < math.inf else f"{text} must be finite"
            )
        if isinstance(low, int) and value % multiple_of:
            raise ArgumentTypeError(f"{text} must be a multiple of {multiple_of}")
        return value

    return number


def flag(default, text: str, weights: bool = False, sampling: bool = False, **options):
    """A field with the help and the argparse options of its flag.

    weights: it determines the trained weights, so a run with another value is another run.
    sampling: --sample uses it. `group` opens a group of the help for this flag and the next ones.
    """
    marks = {"weights": weights, "sampling": sampling}
    return field(default=default, metadata=marks | {"options": {"help": text, **options}})


def flags_for(mark: str) -> list[str]:
    """Names of the settings with this mark, "weights" or "sampling"."""
    return [setting.name for setting in fields(Settings) if setting.metadata.get(mark)]


COUNT = at_least(1)
SHIFT = at_least(1e-3, high=1e3)  # further out, times round to 0 or 1 in float32
PAPER_GUIDANCE = (0.0, 8.0)  # range of guidance in the paper
LONGEST_TEXT = 512  # tokens that the stock pipelines accept
FLUX2_DEFAULTS = {  # where they differ from those of Settings
    # The stock pipeline's shift grows with the image and falls with the number of steps: 5.5 to 6.2
    # for 50 to 32 steps at 512 px, 7.6 to 8.4 at 1024 px.
    "shift": 6.0,
    "shift_range": (4.0, 8.0),  # as wide as FLUX.1's, relative to its middle
    "guidance": 4.0,
    "text_tokens": LONGEST_TEXT,  # as in the stock pipeline
    "layers": "all",  # the modulation, which tells blocks the time, lies outside the blocks
}
PAPER_SHIFTS = (2.5, 4.5)  # range of time shifts in the paper


@dataclass(frozen=True)
class Settings:
    """Every flag with its default and help. The command line's parser is made from it."""

    # fmt: off
    model: str = flag("black-forest-labs/FLUX.1-dev", sampling=True, group="input and output",
        text="diffusers pipeline: a Hub name or a folder")
    images: Path | None = flag(None, type=Path, metavar="DIR",
        text="train on these images, each with its caption beside it in a .txt of the same name;"
        " without this flag the teacher makes the training images")
    prompts: Path | None = flag(None, type=Path, metavar="FILE",
        text="text file, one prompt per line, in place of 24 built-in ones; with --images only the"
        " held-out ones are used")
    held_out: int = flag(12, type=at_least(2), metavar="K",
        text="keep the last K prompts out of the training: a third for validation, the others for"
        " the comparison")
    noises: int = flag(2, type=at_least(2), metavar="K",
        text="images per held-out prompt")
    limit: int = flag(0, type=at_least(0), metavar="K",
        text="train on the first K pairs of image and caption; 0: all")
    resolution: int = flag(512, weights=True, sampling=True, type=at_least(16, 16),
        text="side of the images in pixels, a multiple of 16")
    text_tokens: int = flag(256, weights=True, sampling=True, metavar="K",
        type=at_least(1, high=LONGEST_TEXT),
        text=f"pad or cut texts to K tokens, at most {LONGEST_TEXT}")
    out: Path = flag(Path("flux_out"), sampling=True, type=Path,
        text="folder for all output")
    sample: tuple[str, ...] = flag((), sampling=True, nargs="+", metavar="PROMPT",
        text="only render these prompts to OUT/samples, with the LoRA in --out; --student-steps,"
        " --resolution, --guidance, --shift, --text-tokens and --quantize then default to what the"
        " LoRA was made with")

    student_steps: int = flag(3, weights=True, sampling=True, metavar="N", group="method",
        type=at_least(1, high=1000),
        text="number of sampling steps to distil for, at most half of --teacher-steps")
    paper: bool = flag(False, weights=True, action="store_true",
        text="train as published (Algorithm 2), the same for all --student-steps")
    shift_range: tuple[float, float] = flag((2.0, 4.0), weights=True, type=SHIFT, nargs=2,
        metavar=("LOW", "HIGH"),
        text="range of the time shift in training; its middle should be --shift; with --paper"
        " FLUX.1's default is the paper's 2.5 4.5")
    shift: float = flag(3.0, sampling=True, type=SHIFT,
        text="time shift of sampling: the scheduler's shift in diffusers")
    guidance: float = flag(3.5, sampling=True, type=at_least(0.0),
        text="guidance scale of sampling. Students of models that take it as an input (FLUX.1,"
        " FLUX.2-dev) learn all of 0 to 8; others (FLUX.2-klein-base) get this one built in, and"
        " then sample without any")
    teacher_steps: int = flag(32, type=at_least(2), metavar="K",
        text="steps of the teacher's reference samples")
    steps: tuple[int, ...] = flag((2, 3, 4, 6, 8), type=COUNT, nargs="+", metavar="N",
        text="numbers of steps to validate, calibrate and compare, besides --student-steps")

    iterations: int = flag(3000, type=COUNT, group="training",
        text="training iterations, an optimizer step each. Repeat a command with more of them to"
        " train on, with fewer to end with what there is")
    batch: int = flag(8, weights=True, sampling=True, type=COUNT,
        text="pairs per forward pass and process")
    accumulate: int = flag(1, type=COUNT, metavar="K",
        text="passes per iteration and process, whose gradients are averaged")
    learning_rate: float = flag(2e-5, weights=True, type=at_least(1e-9),
        text="learning rate of AdamW")
    warmup: int = flag(0, weights=True, type=at_least(0), metavar="K",
        text="iterations of linear learning-rate warm-up")
    rank: int = flag(64, weights=True, type=COUNT,
        text="rank of the LoRA")
    layers: str = flag("blocks", weights=True, choices=("blocks", "all"),
        text="linear layers that get a LoRA: those inside the blocks, or all")
    recompute_every: int = flag(1, type=at_least(0), metavar="K",
        text="recompute every K-th block in the backward pass; 1: all, least memory; 0: none,"
        " fastest")
    compile: bool = flag(False, action="store_true",
        text="compile the blocks, which takes minutes at first")
    quantize: str | None = flag(None, weights=True, sampling=True, choices=("int8",),
        text="keep the frozen weights in int8, half the size of bfloat16; needs torchao")
    seed: int = flag(0, weights=True, sampling=True, type=at_least(0, high=2**63 - 1),
        text="seed of every random number")
    validate_every: int = flag(100, type=COUNT, metavar="K",
        text="validate every K iterations")
    checkpoint_every: int = flag(100, type=COUNT, metavar="K",
        text="save a state to resume from every K iterations")
    stop_when_matched: bool = flag(False, weights=True, action="store_true",
        text="stop training when the student's validation error has stopped falling over ten"
        " validations; with --paper when its best scale, lam*, is at most 1.05 or no longer falls")
    # fmt: on

    given: frozenset[str] = frozenset()  # names of the settings that the command line gave

    @property
    def all_steps(self) -> list[int]:
        """Numbers of steps that are watched, calibrated and compared."""
        return sorted({*self.steps, self.student_steps})

    def with_defaults(self, defaults: dict) -> Settings:
        """With these values, where no flag says otherwise."""
        others = {name: x for name, x in defaults.items() if name not in self.given}
        return replace(self, **others)


def make_parser() -> ArgumentParser:
    title = __doc__.splitlines()[0]
    phases = (
        "A run encodes the data, trains, finds the LoRA's best scale for each number of steps, and"
        "\ncompares student and teacher on held-out prompts. The same command resumes it."
    )
    parser = ArgumentParser(
        description=f"{title}\n\n{phases}", formatter_class=RawDescriptionHelpFormatter
    )
    group = parser
    for setting in fields(Settings):
        if not setting.metadata:
            continue
        options = dict(setting.metadata["options"])
        if "group" in options:  # it opens a group, which the flags that follow join
            group = parser.add_argument_group(options.pop("group"))
        default = setting.default
        if default is not None and default is not False and default != ():
            words = f"default: {as_typed(default)}"
            if setting.name in FLUX2_DEFAULTS:
                words += f"; FLUX.2: {as_typed(FLUX2_DEFAULTS[setting.name])}"
            options["help"] += f" ({words})"
        group.add_argument(as_flag(setting.name), default=SUPPRESS, **options)
    return parser


def as_flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def as_typed(value) -> str:
    """A value as the command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(argv: list[str] | None) -> Settings:
    """Settings of the command line; creates --out, to say early where that is impossible."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    flags = frozenset(given)
    if "paper" in given:  # not added to `flags`, so that another family's range replaces it
        given.setdefault("shift_range", PAPER_SHIFTS)
    settings = Settings(**given, given=flags)
    complaint = wrong_combination(settings)
    if complaint:
        parser.error(complaint)
    if not settings.sample:
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {settings.out}: {error.strerror}: give another --out")
    return settings


def wrong_combination(settings: Settings) -> str | None:
    """What is wrong with the combination of flags, or None. No flag is silently ignored."""
    if settings.sample:
        useless = sorted(settings.given.difference(flags_for("sampling")))
        if useless:
            flags = ", ".join(map(as_flag, useless))
            return f"--sample only renders, and {flags} has no effect there: remove it"
        for prompt in settings.sample:
            option = OPTION.search(prompt)
            if option:
                return f"--sample '{prompt[:60]}' {no_options(option)}"
    low, high = settings.shift_range
    if low > high:
        return f"--shift-range {low:g} {high:g}: give the lower end first"
    most = settings.teacher_steps // 2  # a student of more steps has nothing to gain
    if settings.student_steps > most and not settings.sample:
        return (
            f"--student-steps {settings.student_steps} must be at most {most}, half of"
            " --teacher-steps"
        )
    if max(settings.steps) > settings.teacher_steps:
        return (
            f"--steps {max(settings.steps)} is more than --teacher-steps"
            f" {settings.teacher_steps}, with which all are compared: give both"
        )
    if settings.warmup > settings.iterations:
        return (
            f"--warmup {settings.warmup} ends after the last of --iterations"
            f" {settings.iterations}, so --learning-rate is never reached: give a shorter"
            " --warmup"
        )
    if settings.stop_when_matched and settings.validate_every >= settings.iterations:
        return (
            "--stop-when-matched needs validations, and with --validate-every"
            f" {settings.validate_every} there is none before the last of --iterations"
            f" {settings.iterations}: give a smaller --validate-every"
        )
    if settings.quantize and not find_spec("torchao"):
        return "--quantize int8 needs torchao: pip install torchao"
    if settings.quantize and settings.compile:
        return "--compile does not work with --quantize: leave one of them out"
    return None


OPTION = re.compile(r"(?<!\S)--[A-Za-z]\S*")  # in prompts for other tools: --w 1024, --ar 16:9


def no_options(option: re.Match) -> str:
    return (
        f"has the option {option.group()}: prompts take no options here, remove it from the"
        " text (size, guidance and seed are flags of the command)"
    )


def die(sentence: str):
    raise SystemExit(f"flux_distill.py: {sentence}")


def stop_before_main(*_):
    os.write(2, b"\nflux_distill.py: stopped before the run started\n")
    os._exit(1)


if __name__ == "__main__":
    parse(None)  # --help and wrong flags are answered before the slow imports below
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored in a command that ends in &
        signal.signal(signal.SIGINT, stop_before_main)

import numpy as np
import torch

if "ipykernel" not in sys.modules:  # figures need no backend; a notebook keeps its own
    os.environ.pop("MPLBACKEND", None)
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# By default these libraries recommend packages that Flux does not need.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_dispatch import attention_backend
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.training_utils import (
    find_nearest_bucket,
    free_memory,
    generate_aspect_ratio_buckets,
)
from diffusers.utils import load_image
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub import errors as hub
from transformers import (
    CLIPTextModel,
    Mistral3ForConditionalGeneration,
    Qwen3ForCausalLM,
    T5EncoderModel,
)

import shortcut as sc

if signal.getsignal(signal.SIGINT) is stop_before_main:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# The backward pass of cuDNN's attention, which PyTorch 2.11 and newer prefer on H100 and H200,
# gives wrong gradients there: far too large, or NaN. It is switched off here, so that this holds
# for everybody who calls the network through this module.
torch.backends.cuda.enable_cudnn_sdp(False)

LORA = "pytorch_lora_weights.safetensors"  # files in --out
COMFYUI_LORA = "comfyui.safetensors"
STATE = "checkpoint/state.safetensors"
CHECK = "cache/check.safetensors"
OUTPUTS = (
    "README.md",
    "log.csv",
    "results.json",
    "costs.json",
    "training.png",
    "comparison.png",
)
VERSION = 7  # of training and of the files: a run of another version is not resumed
LESS_MEMORY = """what helps, in this order: --recompute-every 1, --batch 4 --accumulate 2 (down to \
--batch 1), --rank 16, --quantize int8, --resolution 256; all but the first need another --out"""
REPEAT = "repeat the command: finished work is kept"
LOWER_RATE = "distil with a lower --learning-rate in another --out"

# --------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with on_stop(stop_now):
            machine = Machine()
            if settings.sample:
                render(settings, machine)
            else:
                distil(settings, machine)
    except KeyboardInterrupt:
        if settings.sample:
            die("stopped; every image whose path was printed is complete")
        die(f"stopped; what is in --out {settings.out} is kept, and the same command resumes")
    except torch.OutOfMemoryError:
        advice = "give --batch 1, or a lower --resolution" if settings.sample else LESS_MEMORY
        die(f"out of GPU memory; {advice}. Finished work is kept")
    except BrokenPipeError:  # the reader of stdout, such as `| head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        die(in_words(error, settings.out))
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        die(f"--compile fails on this machine ({reason}): repeat the command without it to resume")


def distil(settings: Settings, machine: Machine) -> None:
    """A whole run, or what is left of it."""
    settings, run, cache = prepare(settings, machine)
    files = "adapter"
    with lock_out_folder(run.out, machine):
        results = finished(run) or run_phases(settings, machine, run, cache)
        if not machine.lead:
            return
        family = cache.model.family
        if family.comfyui_file != LORA:
            save_for_comfyui(run, family)
            files += f", {family.comfyui_file}"
    print(
        "RMSE of latents / PSNR of images, compared with the teacher's"
        f" {settings.teacher_steps} steps, held-out prompts:"
    )
    print(markdown(results))
    print(f"On the validation prompts, at scale 1: {results['adapter']['note']}")
    print(f"{files}, model card (README.md), images and tables in {run.out}/")


def run_phases(settings: Settings, machine: Machine, run: Run, cache: Cache) -> dict | None:
    """All phases; returns the results in the lead process."""
    costs = Costs(run.out / "costs.json", machine)
    with costs.phase("cache", resumes=True):
        fill_cache(settings, cache)
    if not run.is_calibrated():
        make_lora(settings, cache, run, costs)
    if not machine.lead:
        return None
    with costs.phase("compare"):
        results = compare(settings, cache, run)
    results |= {"phases": costs.phases, "machine": machine.describe()}
    card_text = card(results, run.out, cache.model.family, machine)
    write_text(run.out / "README.md", card_text)
    write_text(run.out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def make_lora(settings: Settings, cache: Cache, run: Run, costs: Costs) -> None:
    """Phases 2 and 3: train the student and save it.

    On return the memory of training is freed, but for the network: the comparison loads it again.
    """
    machine = cache.machine
    if not machine.lead and is_done(settings, read_metadata(run.state).get("rows", [])):
        return
    with costs.phase("train", resumes=run.state.exists()):
        validation, state = train_student(settings, cache, run, costs)
    if machine.lead:
        with costs.phase("calibrate"):
            calibrate(settings, run, validation, state)


def prepare(settings: Settings, machine: Machine) -> tuple[Settings, Run, Cache]:
    """Find model and data; ends if --out holds the files of something else.

    The settings come back with the defaults of the model's family.
    """
    refuse_others(settings.out)
    model = Model(settings.model, machine, settings.quantize)
    settings = settings.with_defaults(model.family.defaults)
    refuse_untrained(settings, model.family)
    check_memory(settings, model)
    # Read already here, so that mistakes are named before gigabytes are downloaded.
    read_prompts(settings.prompts, settings.held_out, not settings.images)
    if settings.images:
        list_images(settings.images)
    model.download()
    data = read_data(settings, model)
    if machine.lead:
        print(
            f"{counted(data.pairs, 'image')} to train on; held-out prompts: {len(data.validation)}"
            f" to validate on, {len(data.comparison)} to compare on"
        )
    run = identify(settings, model, data)
    refuse_another_run(run)
    return settings, run, Cache(settings, model, data)


def refuse_untrained(settings: Settings, family: Family) -> None:
    """Ends if the student would sample at a guidance or shift outside of its training."""
    guidance = settings.guidance
    if family.true_guidance and guidance <= 1:
        die(f"--guidance {guidance} must be above 1: at 1 or below the pipeline applies none")
    low, high = family.training_guidance(guidance)
    if guidance > high:
        die(f"--guidance {guidance} is outside the range of the training: give {low:g} to {high:g}")
    low, high = settings.shift_range
    if not low <= settings.shift <= high:
        die(
            f"--shift {settings.shift} is outside the range of the training, {low} to {high}:"
            " train with another --shift-range, in another --out"
        )


def finished(run: Run) -> dict | None:
    """The results, if this run is complete, else None."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        results = json.loads((run.out / "results.json").read_text())
        in_file = read_metadata(run.lora).get("key")
        all_exist = all((run.out / name).exists() for name in ("README.md", "comparison.png"))
        if all_exist and in_file == results["adapter"]["key"] == run.key:
            return results
    return None


@dataclass(frozen=True)
class Run:
    """Paths and identity of a run."""

    out: Path
    base_model: str  # its name, without a path of this machine
    identity: dict  # everything that determines the trained weights
    key: str  # of these settings and of those that calibration and comparison use

    @property
    def lora(self) -> Path:
        return self.out / LORA

    @property
    def state(self) -> Path:
        return self.out / STATE

    @property
    def check(self) -> Path:
        return self.out / CHECK

    def is_calibrated(self) -> bool:
        return all(read_metadata(path).get("key") == self.key for path in (self.lora, self.check))


OTHER = {  # message for a setting that differs
    "version": "another version of this program",
    "model": "another model",
    "data": "other training data: see --images, --prompts, --held-out, --limit, --teacher-steps",
    "held_out": "other held-out prompts",
    "passes": "--accumulate x processes {found}, now {now}",
}


def identify(settings: Settings, model: Model, data: Data) -> Run:
    """The run that these settings define."""
    sampling = {
        name: getattr(settings, name) for name in ("shift", "guidance", "noises", "teacher_steps")
    }
    sampling["held_out"] = digest(data.held_out)
    identity = {"version": VERSION, "model": model.fingerprint, "data": data.fingerprint}
    identity |= {name: getattr(settings, name) for name in flags_for("weights")}
    identity["passes"] = settings.accumulate * model.machine.processes
    if model.family.true_guidance:  # then the student learns this one
        identity["guidance"] = settings.guidance
    if settings.stop_when_matched:  # then these decide when training ends
        validated = {name: getattr(settings, name) for name in ("validate_every", "iterations")}
        identity |= sampling | validated
    identity = json.loads(json.dumps(identity))  # as it will be read from a file
    key = digest([identity, sampling, settings.iterations, settings.all_steps])
    return Run(settings.out, model.base_model, identity, key)


def refuse_another_run(run: Run) -> None:
    """Ends if --out holds a run with other settings, or a damaged file of one."""
    for path in filter(Path.exists, (run.state, run.lora)):
        saved = read_metadata(path).get("settings")
        if not saved:
            what = "is damaged" if is_ours(path) else "is not a safetensors file"
            die(f"{path} {what}: move it away to recreate it, or give another --out")
        others = []
        for name, now in run.identity.items():
            if saved.get(name) != now:
                words = OTHER.get(name, as_flag(name) + " {found}, now {now}")
                others.append(words.format(found=saved.get(name), now=now))
        if others:
            die(
                f"--out {run.out} holds a run with other settings ({'; '.join(others)}): repeat"
                " them, or give another --out"
            )


# --------------------------------------------------------------------------------- the model family


OF_THE_BASE = "that-of-the-base-model"  # a licence that the Hub has no identifier for


class Family:
    """What is specific to a family of models.

    A family is made from a pipeline's model_index.json and the config of its transformer. The rest
    of the script sees latents (B, C, H, W), conditions (tensors with a row for each of B), and the
    methods and attributes below.

    A new family is a subclass, entered in FAMILIES; if it has defaults of its own, make_parser is
    to name them. Elsewhere it is assumed
        of the transformer   that `_repeated_blocks` and `inner_dim` of diffusers are set
        of the pipeline      that it samples at the times of its scheduler, i.e. passes it sigmas
                             from 1 to 1/N (check_device tests it, on a GPU)
        of the condition     that "text" has all tokens of a text, and no others: their number is
                             the pipeline's max_sequence_length
        of ComfyUI           that ModelSamplingAuraFlow sets its shift, which the card says
    """

    names: str  # of its models
    tiny: str  # folder of a small one, to try
    size: str  # of its files
    gpu: str  # to train with the defaults
    pipeline: type[DiffusionPipeline]
    transformer: type[torch.nn.Module]
    text_encoders: dict[str, type[torch.nn.Module]]
    text_side: tuple[str, ...]  # parts of the pipeline that only texts need
    defaults: ClassVar = {}  # of flags, where they differ from those of Settings
    patch: int  # latents along a side of a token
    # Activations that autograd keeps of a block, and of one while it is recomputed, in multiples of
    # a block's input; see check_memory.
    kept: tuple[int, int]
    # Whether the teacher needs classifier-free guidance ("true guidance"): a velocity takes two
    # network calls, one of them without the text.
    true_guidance = False
    # What the model card says.
    tags: tuple[str, ...]
    tools: dict[str, str]  # which programs load a LoRA on these layers
    comfyui_file = LORA
    comfyui_shift: float  # of ComfyUI, where no node sets another
    unsuited: str  # nodes of ComfyUI

    def __init__(self, index: dict, config: dict):
        self.config = config  # of the transformer

    @property
    def teacher_calls(self) -> int:
        """Network calls for a velocity of the teacher."""
        return 2 if self.true_guidance else 1

    def refusal(self) -> str | None:
        """Why this model can't be distilled; None if it can."""
        raise NotImplementedError

    def training_guidance(self, guidance: float) -> tuple[float, float]:
        """The range of guidance that training draws from."""
        return (guidance, guidance) if self.true_guidance else PAPER_GUIDANCE

    def pool_guidance(self, guidance: float) -> float:
        """Guidance of the teacher's images for training."""
        return guidance if self.true_guidance else self.defaults.get("guidance", Settings.guidance)

    def latent_shape(self, vae: dict, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square image, from the config of the VAE."""
        raise NotImplementedError

    def prepare(self, net: torch.nn.Module) -> None:
        """Speed the network up without changing what it computes."""

    def encode_text(self, pipe: DiffusionPipeline, text: str, length: int) -> dict[str, Tensor]:
        """Conditions of one text, without the first dimension."""
        raise NotImplementedError

    def count_tokens(self, pipe: DiffusionPipeline, texts: list[str]) -> list[int]:
        """Tokens of each text with what the pipeline puts around it."""
        raise NotImplementedError

    def longest_text(self, pipe: DiffusionPipeline) -> int:
        """The most tokens that the text encoder takes."""
        raise NotImplementedError

    def normalised(self, vae: torch.nn.Module, x: Tensor) -> Tensor:
        """The network's latents (B, C, H, W) from the VAE's."""
        raise NotImplementedError

    def denormalised(self, vae: torch.nn.Module, x: Tensor) -> Tensor:
        """The VAE's latents from the network's (B, C, H, W)."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """Latents (B, C, H, W) of pixels (B, 3, h, w) in [-1, 1]."""
        vae = pipe.vae
        x = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return self.normalised(vae, x.float())

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Images (B, h, w, 3) in [0, 1], on the CPU; one at a time through the VAE."""
        vae = pipe.vae
        images = []
        for x in latents.split(1):
            pixels = vae.decode(self.denormalised(vae, x).to(vae.dtype)).sample.float().cpu()
            images.append(VaeImageProcessor.denormalize(pixels))
        return torch.cat(images).permute(0, 2, 3, 1)

    def velocity(self, net, x: Tensor, t: Tensor, dtype=None, **cond: Tensor) -> Tensor:
        """The student's velocity (B, C, H, W) in float32, by one call of the transformer `net`.

        The network is fed in `dtype`, by default its own.
        """
        raise NotImplementedError

    def teacher_velocity(self, net, x: Tensor, t: Tensor, dtype=None, **cond: Tensor) -> Tensor:
        """The velocity that the student learns. Without true guidance it is the same call."""
        return self.velocity(net, x, t, dtype, **cond)

    def sample(
        self, pipe: DiffusionPipeline, steps: int, guided: bool, noise: Tensor, **cond: Tensor
    ) -> Tensor:
        """Latents (B, C, H, W) in float32 that the stock pipeline makes of noise.

        guided: as the teacher does; it matters only with true guidance.
        """
        raise NotImplementedError

    def for_comfyui(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The LoRA of a file of ours under the names in `comfyui_file`, if that is another file."""
        raise NotImplementedError

    def licence(self, base_model: str) -> dict[str, str]:
        """The licence, as the Hub's YAML has it."""
        raise NotImplementedError


class Flux(Family):
    """FLUX.1-dev and its fine-tunes.

    Latents are an eighth of the pixels high and wide. The network takes them packed, as tokens of
    2 x 2. Conditions are "text" (B, T, D) from T5, "pooled" (B, d) from CLIP, and "guidance" (B,).
    """

    names = "FLUX.1-dev"
    tiny = "tests/tiny_flux"
    size = "34 GB"
    gpu = "40 GB or more"
    pipeline = FluxPipeline
    transformer = FluxTransformer2DModel
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    text_side = (*text_encoders, "tokenizer", "tokenizer_2")
    patch = 2
    kept = (28, 45)

    def refusal(self) -> str | None:
        if not self.config.get("guidance_embeds"):
            return "takes no guidance: models like FLUX.1-schnell sample in 4 steps already"
        return None

    def latent_shape(self, vae: dict, resolution: int) -> tuple[int, int, int]:
        size = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
        return self.config["in_channels"] // 4, size, size

    def prepare(self, net: FluxTransformer2DModel) -> None:
        net.pos_embed = RotaryCache(net.pos_embed)

    @torch.no_grad()
    def encode_text(self, pipe: FluxPipeline, text: str, length: int) -> dict[str, Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(text, text, max_sequence_length=length)
        return {"text": embeddings[0], "pooled": pooled[0]}

    def count_tokens(self, pipe: FluxPipeline, texts: list[str]) -> list[int]:
        return [len(ids) for ids in pipe.tokenizer_2(texts, truncation=False).input_ids]

    def longest_text(self, pipe: FluxPipeline) -> int:
        return min(pipe.tokenizer_2.model_max_length, LONGEST_TEXT)

    def normalised(self, vae: torch.nn.Module, x: Tensor) -> Tensor:
        return (x - vae.config.shift_factor) * vae.config.scaling_factor

    def denormalised(self, vae: torch.nn.Module, x: Tensor) -> Tensor:
        return x / vae.config.scaling_factor + vae.config.shift_factor

    def velocity(self, net, x, t, dtype=None, *, text, pooled, guidance) -> Tensor:
        dtype = dtype or net.dtype
        height, width = x.shape[2] // 2, x.shape[3] // 2
        if isinstance(net.pos_embed, RotaryCache):
            net.pos_embed.key = (height, width, text.shape[1])
        v = net(
            hidden_states=pack(x).to(dtype),
            timestep=rounded(t, net.dtype),
            guidance=guidance,
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height, width, x.device, dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=dtype),
        ).sample
        return unpack(v.float(), height, width)

    def sample(
        self, pipe: FluxPipeline, steps: int, guided: bool, noise: Tensor, **cond: Tensor
    ) -> Tensor:
        height, width = noise.shape[2] // 2, noise.shape[3] // 2
        latents = pipe(
            prompt_embeds=cond["text"],
            pooled_prompt_embeds=cond["pooled"],
            guidance_scale=cond["guidance"][0].item(),
            height=2 * height * pipe.vae_scale_factor,
            width=2 * width * pipe.vae_scale_factor,
            num_inference_steps=steps,
            latents=pack(noise),
            output_type="latent",
        ).images
        return unpack(latents.float(), height, width)

    tags = ("flux",)
    tools: ClassVar = {
        "blocks": """The LoRA is on the linear layers inside the transformer's blocks. The code by
which ComfyUI, InvokeAI, mflux, DiffSynth and sd-scripts map the keys of a LoRA was run on such a
file and found a place for all of them. A LoRA on all layers (`--layers all`) loads whole in
diffusers and ComfyUI alone. On a tiny Flux, where ten of 50 layers lie outside the blocks, it came
nearer to the teacher (by a factor of 1.31, three seeds); in FLUX.1-dev they are ten of 504.""",
        "all": """The LoRA is on all linear layers, which not every tool takes. InvokeAI refuses the
file because of `norm_out.linear`. mflux, DiffSynth and sd-scripts drop the ten layers outside the
blocks (`x_embedder`, `context_embedder`, six of `time_text_embed`, `norm_out`, `proj_out`), which
cost 95 % of the gain when it was tried on a tiny Flux. `--layers blocks` makes a file without
them.""",
    }
    comfyui_shift = math.exp(1.15)
    unsuited = """ModelSamplingSD3, ModelSamplingFlux with its defaults below 1024 px, the
schedulers normal and beta, ancestral and lcm samplers"""

    def licence(self, base_model: str) -> dict[str, str]:
        known = "flux.1-dev" in base_model.lower()
        licence = "flux-1-dev-non-commercial-license" if known else OF_THE_BASE
        return {"license": "other", "license_name": licence}


def pack(x: Tensor) -> Tensor:
    """FLUX.1's latents (B, C, H, W) as tokens (B, H W / 4, 4 C) of 2 x 2 latents."""
    return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, height width, 4 C) as FLUX.1's latents (B, C, 2 height, 2 width)."""
    x = tokens.mT.unflatten(2, (height, width))
    return torch.nn.functional.pixel_shuffle(x, 2)


class RotaryCache(torch.nn.Module):
    """The rotary embedding of positions, computed once for each `key` that a caller sets."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base
        self.key = None  # what tells the next call's positions apart; None: compute
        self.known = {}

    def forward(self, ids: Tensor):
        key, self.key = self.key, None
        if key is None:
            return self.base(ids)
        if key not in self.known:
            self.known[key] = self.base(ids)
        return self.known[key]


ORIGINAL_LAYERS = {  # of the code that FLUX.2 was published with: layers of diffusers
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
    # in a block of two streams
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.linear_in"],
    "img_mlp.2": ["ff.linear_out"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.linear_in"],
    "txt_mlp.2": ["ff_context.linear_out"],
    # in a block of one stream
    "linear1": ["attn.to_qkv_mlp_proj"],
    "linear2": ["attn.to_out"],
}
OF_COMFYUI = f"""`{LORA}` names them as diffusers does. By the names of diffusers
ComfyUI finds only layers inside the blocks; `{COMFYUI_LORA}` has the names of the code that FLUX.2
was published with, by which it finds all. (By its code; it was not run.)"""


class Flux2(Family):
    """FLUX.2: klein-base, whose teacher needs true guidance, and dev, which takes guidance as an
    input.

    Latents are a sixteenth of the pixels high and wide: 2 x 2 patches of the VAE's, normalised by
    its batch norm. Conditions are "text" (B, T, D), "guidance" (B,) and, with true guidance,
    "empty_text" (B, T, D), that of no text.
    """

    names = "FLUX.2-klein-base and FLUX.2-dev"
    tiny = "tests/tiny_klein"
    transformer = Flux2Transformer2DModel
    text_side = ("text_encoder", "tokenizer")
    defaults = FLUX2_DEFAULTS
    patch = 1
    kept = (33, 53)  # FLUX.1's, scaled by how much more autograd keeps of a block

    def __init__(self, index: dict, config: dict):
        super().__init__(index, config)
        self.is_distilled = bool(index.get("is_distilled"))
        self.tokenizer = index.get("tokenizer", ("", ""))[1]  # its class
        self.true_guidance = index["_class_name"] == "Flux2KleinPipeline"
        if self.true_guidance:
            self.pipeline = Flux2KleinPipeline
            self.text_encoders = {"text_encoder": Qwen3ForCausalLM}
            self.size = "16 GB (4B) or 35 GB (9B)"
            self.gpu = "24 GB or more (9B: 40 GB)"
        else:
            self.pipeline = Flux2Pipeline
            self.text_encoders = {"text_encoder": Mistral3ForConditionalGeneration}
            self.size = "110 GB"
            self.gpu = "96 GB or more"

    def refusal(self) -> str | None:
        if self.is_distilled:
            return "is distilled: it samples in 4 steps already"
        takes_guidance = self.config.get("guidance_embeds", True)  # by default, as in diffusers
        if takes_guidance == self.true_guidance:  # diffusers would silently ignore the guidance
            return "has a transformer that does not belong to its pipeline"
        if self.tokenizer == "PixtralProcessor" and not find_spec("torchvision"):
            return "needs torchvision, for its tokenizer also takes images: pip install torchvision"
        return None

    def latent_shape(self, vae: dict, resolution: int) -> tuple[int, int, int]:
        size = resolution // 2 ** len(vae["block_out_channels"])
        return self.config["in_channels"], size, size

    @torch.no_grad()
    def encode_text(self, pipe: DiffusionPipeline, text: str, length: int) -> dict[str, Tensor]:
        embeddings, _ = pipe.encode_prompt(text, max_sequence_length=length)
        return {"text": embeddings[0]}

    def count_tokens(self, pipe: DiffusionPipeline, texts: list[str]) -> list[int]:
        if self.true_guidance:
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            messages = [[{"role": "user", "content": text}] for text in texts]
            whole = [pipe.tokenizer.apply_chat_template(message, **options) for message in messages]
            return [len(ids) for ids in pipe.tokenizer(whole, truncation=False).input_ids]
        # The tokenizer of dev is a processor of text and images.
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": False}
        messages = [format_input([text], pipe.system_message) for text in texts]
        whole = [pipe.tokenizer.apply_chat_template(message, **options) for message in messages]
        return [len(encoded["input_ids"][0]) for encoded in whole]

    def longest_text(self, pipe: DiffusionPipeline) -> int:
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # dev has a processor
        return min(tokenizer.model_max_length, pipe.tokenizer_max_length)

    def normalised(self, vae: torch.nn.Module, x: Tensor) -> Tensor:
        mean, deviation = batch_norm_of(vae)
        return (torch.nn.functional.pixel_unshuffle(x, 2) - mean) / deviation

    def denormalised(self, vae: torch.nn.Module, x: Tensor) -> Tensor:
        mean, deviation = batch_norm_of(vae)
        return torch.nn.functional.pixel_shuffle(x * deviation + mean, 2)

    def velocity(self, net, x, t, dtype=None, *, text, guidance, empty_text=None) -> Tensor:
        # `empty_text` is for the teacher alone.
        dtype = dtype or net.dtype
        v = net(
            hidden_states=x.flatten(2).mT.to(dtype),
            timestep=rounded(t, net.dtype),
            guidance=None if self.true_guidance else guidance,
            encoder_hidden_states=text.to(dtype),
            img_ids=Flux2Pipeline._prepare_latent_ids(x[:1]).to(x.device),
            txt_ids=Flux2Pipeline._prepare_text_ids(text[:1]).to(x.device),
        ).sample
        return v.float().mT.unflatten(2, x.shape[2:])

    def teacher_velocity(self, net, x, t, dtype=None, *, text, guidance, empty_text=None) -> Tensor:
        if not self.true_guidance:
            return self.velocity(net, x, t, dtype, text=text, guidance=guidance)
        # With and without text in one pass of 2 B rows, which counts as two network calls.
        x_twice = x.repeat(2, 1, 1, 1)
        t_twice = t.repeat(2)
        texts = torch.cat([text, empty_text])
        both = self.velocity(net, x_twice, t_twice, dtype, text=texts, guidance=guidance.repeat(2))
        with_text, without = both.chunk(2)
        return without + guidance[:, None, None, None] * (with_text - without)

    def sample(
        self, pipe: DiffusionPipeline, steps: int, guided: bool, noise: Tensor, **cond: Tensor
    ) -> Tensor:
        height, width = noise.shape[2:]
        side = 2 * pipe.vae_scale_factor  # of a token, in pixels
        options = {"guidance_scale": cond["guidance"][0].item()}
        if self.true_guidance:
            options["negative_prompt_embeds"] = cond.get("empty_text")
            if not guided:
                options["guidance_scale"] = 1.0  # which the pipeline takes for none
        latents = pipe(
            prompt_embeds=cond["text"],
            height=height * side,
            width=width * side,
            num_inference_steps=steps,
            latents=noise,
            output_type="latent",
            **options,
        ).images.float()
        if self.true_guidance:  # klein returns the VAE's latents, dev tokens
            return self.normalised(pipe.vae, latents)
        return latents.mT.unflatten(2, (height, width))

    def for_comfyui(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the names and layers of the code that FLUX.2 was published with.

        ComfyUI uses these names. It has those of diffusers too, but for layers inside the blocks
        alone. There q, k and v are one layer, and the last modulation has its halves exchanged.
        """
        A = {}
        B = {}
        for name, matrix in tensors.items():
            layer, part = name.removeprefix("transformer.").split(".lora_")
            (A if part == "A.weight" else B)[layer] = matrix
        prefixes = {re.match(r"((single_)?transformer_blocks\.\d+\.)?", layer)[0] for layer in A}
        found = {}
        for prefix in sorted(prefixes):
            theirs = prefix.replace("single_transformer_blocks", "single_blocks")
            theirs = theirs.replace("transformer_blocks", "double_blocks")
            for original, parts in ORIGINAL_LAYERS.items():
                layers = [prefix + part for part in parts if prefix + part in A]
                if not layers:
                    continue
                down = torch.cat([A.pop(layer) for layer in layers])
                up = torch.block_diag(*[B.pop(layer) for layer in layers])
                if original == "final_layer.adaLN_modulation.1":
                    scale, shift = up.chunk(2)
                    up = torch.cat([shift, scale])
                found[f"diffusion_model.{theirs}{original}.lora_A.weight"] = down
                found[f"diffusion_model.{theirs}{original}.lora_B.weight"] = up
        if A:
            raise ValueError(f"layers without an original name: {', '.join(A)}")
        return found

    tags = ("flux2",)
    tools: ClassVar = {
        "blocks": f"""The LoRA is on the linear layers inside the transformer's blocks. The
modulation, by which all blocks learn the time, is outside of them: with a LoRA there too
(`--layers all`), a tiny model came much nearer to its teacher. {OF_COMFYUI}""",
        "all": f"The LoRA is on all linear layers. {OF_COMFYUI}",
    }
    comfyui_file = COMFYUI_LORA
    comfyui_shift = math.exp(2.02)
    unsuited = """Flux2Scheduler, whose times depend on image and steps, the schedulers normal and
beta, ancestral and lcm samplers"""

    def licence(self, base_model: str) -> dict[str, str]:
        name = base_model.lower()
        if name == "black-forest-labs/flux.2-klein-base-4b":
            return {"license": "apache-2.0"}
        known = name.startswith("black-forest-labs/flux.2-")
        licence = "flux-non-commercial-license" if known else OF_THE_BASE
        return {"license": "other", "license_name": licence}


def batch_norm_of(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation (4 C, 1, 1) of patches of latents, by which FLUX.2 normalises them."""
    variance = vae.bn.running_var.float() + vae.config.batch_norm_eps
    return vae.bn.running_mean.float()[:, None, None], variance.sqrt()[:, None, None]


FAMILIES = {  # by _class_name in model_index.json
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2,
    "Flux2Pipeline": Flux2,
}


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Times as the stock pipelines feed them to a network of this type."""
    return t if dtype == torch.float32 else (1000 * t).to(dtype) / 1000


def blocks_of(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer's blocks, in their order."""
    return [block for block in net.modules() if type(block).__name__ in net._repeated_blocks]


def linear_layers(net: torch.nn.Module, layers: str) -> list[str]:
    """Names of the transformer's linear layers: those inside its blocks ("blocks"), or "all"."""
    inside = {id(layer) for block in blocks_of(net) for layer in block.modules()}
    linear = [(name, m) for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    return [name for name, layer in linear if layers == "all" or id(layer) in inside]


# --------------------------------------------------------------------------- the teacher's pipeline


class Model:
    """The teacher's pipeline: checked on creation, downloaded and loaded on request.

    Only one side of it is in memory at a time, "text" or "image".
    """

    def __init__(self, name: str, machine: Machine, quantize: str | None):
        self.name = name
        self.machine = machine
        self.quantize = quantize
        self.loaded = None  # the side in memory
        self.pipe = None
        self.folder = Path(name) if Path(name).is_dir() else None  # None: not downloaded yet
        self.base_model = Path(os.path.abspath(name)).name if self.folder else name
        try:
            index = self.read_json("model_index.json")
            class_name = index["_class_name"]
            config = self.read_json("transformer/config.json")
            self.vae_config = self.read_json("vae/config.json")
        except Exception as error:
            die(f"--model {name} {refusal_of(error).format(name)}")
        if class_name not in FAMILIES:
            known = ", ".join(dict.fromkeys(family.names for family in FAMILIES.values()))
            die(f"--model {name} is a {class_name}: this distils {known}, and their fine-tunes")
        self.family = FAMILIES[class_name](index, config)
        self.parts = sorted(name for name, value in index.items() if isinstance(value, list))
        refusal = self.family.refusal()
        if refusal:
            die(f"--model {name} {refusal}")

    def read_json(self, file: str) -> dict:
        """A config, from the folder or the Hub."""
        path = self.folder / file if self.folder else hf_hub_download(self.name, file)
        return json.loads(Path(path).read_text())

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image."""
        return self.family.latent_shape(self.vae_config, resolution)

    def download(self) -> None:
        with explain(
            f"--model {self.name} can't be downloaded; with network and disk for"
            f" {self.family.size} the same command resumes",
            Exception,
        ):
            if self.folder is None:
                self.folder = Path(self.family.pipeline.download(self.name))
        files = []
        for kind in ("*.json", "*.safetensors"):
            for part in self.parts:
                files += sorted((self.folder / part).glob(kind))
        self.fingerprint = digest([[*path.parts[-2:], fingerprint(path)] for path in files])

    def load(self, side: str, fresh: bool = False) -> DiffusionPipeline:
        """The stock pipeline with its "text" or "image" side; fresh: as it is on disk."""
        if side == self.loaded and not fresh:
            return self.pipe
        self.unload()
        kinds = (OSError, ValueError, RuntimeError, SafetensorError)
        try:
            with explain(f"--model {self.name} can't be loaded: is it complete?", *kinds):
                self.pipe = self.read(side)
        except ImportError as error:  # a quantised base needs the package of its quantisation
            reason = str(error).strip().split(". ")[0].splitlines()[0]
            die(
                f"--model {self.name} needs a package that is missing ({reason}): install it and"
                " start again"
            )
        self.pipe.to(self.machine.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.loaded = side
        return self.pipe

    def unload(self) -> None:
        self.loaded = None
        self.pipe = None
        free_memory()

    def read(self, side: str) -> DiffusionPipeline:
        family = self.family
        dtype = self.machine.dtype
        if side == "image":
            parts = dict.fromkeys(family.text_side)
            if self.quantize:
                parts["quantization_config"] = int8()
        else:
            parts = dict.fromkeys(("transformer", "vae"))
            for name, kind in family.text_encoders.items():
                parts[name], info = kind.from_pretrained(
                    self.folder / name, dtype=dtype, output_loading_info=True
                )
                missing = info["missing_keys"]  # transformers would draw them at random
                if missing:
                    die(
                        f"--model {self.name}: {name} lacks {len(missing)} weights that this"
                        " version of transformers requires: try a newer one"
                    )
        return family.pipeline.from_pretrained(self.folder, dtype=dtype, **parts)


REFUSALS = (  # messages for errors while finding a model; the first that fits is used
    (
        hub.GatedRepoError,
        "is gated: accept its licence at https://huggingface.co/{0}, run `hf auth"
        " login` (a fine-grained token needs access to gated repositories), and start again",
    ),
    (
        (hub.RepositoryNotFoundError, hub.HFValidationError),
        "is neither a local folder nor a public model on the Hub (private: `hf auth login`)",
    ),
    (
        (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled),
        "is no folder here and the Hub can't be reached: give a folder, or go online",
    ),
    (
        PermissionError,
        "has files, here or in the Hub's"
        " cache, that you are not allowed to read or write: correct their permissions",
    ),
    (
        (hub.EntryNotFoundError, FileNotFoundError, ValueError, KeyError, TypeError),
        "is not a complete diffusers pipeline: it needs a model_index.json, transformer/ and vae/",
    ),
    (Exception, "can't be reached: go online, or give a folder"),  # any other error of the network
)


def refusal_of(error: Exception) -> str:
    """Why there is no such model; {0} stands for its name."""
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    kind = type(error)
    if status in (401, 403) and not isinstance(error, hub.RepositoryNotFoundError):
        kind = hub.GatedRepoError  # a token without access; the Hub's library calls it a lost file
    return next(words for kinds, words in REFUSALS if issubclass(kind, kinds))


def int8():
    """Weights of the transformer in int8 (torchao); activations keep their type."""
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    mapping = {"transformer": TorchAoConfig(Int8WeightOnlyConfig())}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def stock_sample(
    model: Model,
    noise: Tensor,
    steps: int,
    cond: dict[str, Tensor],
    shift: float,
    batch: int,
    guided: bool = False,
) -> Tensor:
    """Latents (B, C, H, W) that the stock pipeline makes of noise, `batch` at a time.

    guided: as the teacher; a student needs no true guidance.
    """
    pipe = model.load("image")
    # One of our own: the model's may have other options that change the times.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return in_batches(batch, partial(model.family.sample, pipe, steps, guided), noise, **cond)


# ----------------------------------------------------------------------------------- phase 1: cache


class Cache:
    """What networks are fed with: embeddings of all texts, latents of all pairs, noise.

    One file per embedding or latent. What `read` and `latent` return is on the CPU, conditions and
    noise are on the device.
    """

    def __init__(self, settings: Settings, model: Model, data: Data):
        self.settings = settings
        self.model = model
        self.machine = model.machine
        self.data = data
        self.keys = {"text": data.text_keys, "latent": data.latent_keys}

    def path(self, kind: str, i: int) -> Path:
        return cache_file(self.settings.out, kind, self.keys[kind][i])

    def is_whole(self, kind: str, i: int) -> bool:
        return read_metadata(self.path(kind, i)).get("key") == self.keys[kind][i]

    def write(self, kind: str, i: int, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.path(kind, i), tensors, {"key": self.keys[kind][i]})

    def read(self, kind: str, places) -> dict[str, Tensor]:
        """Entries at these places, stacked."""
        paths = [self.path(kind, i) for i in places]
        entries = [load_file(path) for path in paths]
        for path, entry in zip(paths, entries):
            if not all(tensor.isfinite().all() for tensor in entry.values()):
                die(
                    f"{path} holds NaN or infinity: if its text or image is sound, delete it to"
                    " recreate it; else leave that pair out"
                )
        return stacked(entries)

    def latent(self, i: int) -> Tensor:
        """Latent (C, H, W) of a pair."""
        return self.read("latent", [i])["latent"][0]

    def conditions(self, texts, guidance: float | Tensor) -> dict[str, Tensor]:
        """All that the family's velocity takes besides x and t, for texts at these places."""
        guidance = torch.as_tensor(guidance).expand(len(texts))
        cond = self.read("text", texts) | {"guidance": guidance}
        cond = {name: value.to(self.machine.device) for name, value in cond.items()}
        if self.data.empty is not None:
            for name, value in self.no_text.items():
                cond[f"empty_{name}"] = value.expand_as(cond[name])
        return cond

    @cached_property
    def no_text(self) -> dict[str, Tensor]:
        """The embedding of no text, with one row, on the device."""
        entry = self.read("text", [self.data.empty])
        return {name: value.to(self.machine.device) for name, value in entry.items()}

    def noise(self, keys: list[tuple]) -> Tensor:
        """Noise (B, C, H, W), a draw for each key."""
        return draw_noise(self.settings, self.model, keys)

    def held_out(self, texts: list[int], purpose: str) -> tuple[dict[str, Tensor], Tensor]:
        """Conditions of these texts, --noises times, and a noise sample for each row.

        The first len(texts) rows have each text once, the next ones again, with other noise.
        """
        rows = [(i, k) for k in range(self.settings.noises) for i in texts]
        cond = self.conditions([i for i, _ in rows], self.settings.guidance)
        return cond, self.noise([(purpose, *row) for row in rows])


def cache_file(out: Path, kind: str, key: str) -> Path:
    """A file of the cache; its name tells what it was made from."""
    return out / "cache" / f"{kind}-{key}.safetensors"


def draw_noise(settings: Settings, model: Model, keys: list[tuple]) -> Tensor:
    """Noise (B, C, H, W), a draw for each key."""
    shape = model.latent_shape(settings.resolution)
    draws = [torch.randn(shape, generator=keyed(settings.seed, *key)) for key in keys]
    return torch.stack(draws).to(model.machine.device)


def fill_cache(settings: Settings, cache: Cache) -> None:
    """Phase 1: fill in the missing entries of the cache."""
    data = cache.data
    made = fill(settings, cache, "text", encode_captions)
    named = [data.texts[i] for i in made if i != data.empty]
    if named:
        name_cut_texts(settings, cache.model, named)
    fill(settings, cache, "latent", encode_images if data.pairs[0].image else sample_teacher)


Entries = list[dict[str, Tensor]]


def fill(
    settings: Settings, cache: Cache, kind: str, make: Callable[[Settings, Cache, range], Entries]
) -> list[int]:
    """Make the missing entries of a kind; returns the places of those that this process made.

    A batch always consists of the same entries, for its rounding depends on all of them.
    """
    machine = cache.machine
    count = len(cache.keys[kind])
    starts = range(0, count, settings.batch)[machine.process :: machine.processes]
    made = []
    for start in machine.progress(starts, f"cache: {kind}s", unit="batch"):
        places = range(count)[start : start + settings.batch]
        missing = [i for i in places if not cache.is_whole(kind, i)]
        if not missing:
            continue
        for path in [cache.path(kind, i) for i in missing]:
            if path.exists():
                tqdm.write(f"{path} is damaged: it is recreated")
        for i, tensors in zip(places, make(settings, cache, places)):
            if i in missing:
                cache.write(kind, i, tensors)
        made += missing
    machine.wait()
    # Other processes made the rest. All is needed here: latents are made from the texts.
    if not all(cache.path(kind, i).exists() for i in range(count)):
        die(
            f"--out {settings.out} is not a folder that all machines share: put it on a shared disk"
        )
    return made


def encode_captions(settings: Settings, cache: Cache, places: range) -> Entries:
    return encode_texts(settings, cache.model, [cache.data.texts[i] for i in places])


def encode_images(settings: Settings, cache: Cache, places: range) -> Entries:
    pipe = cache.model.load("image")
    images = [cache.data.pairs[i].image() for i in places]
    return [{"latent": cache.model.family.encode_image(pipe, image)[0]} for image in images]


def sample_teacher(settings: Settings, cache: Cache, places: range) -> Entries:
    family = cache.model.family
    pairs = [cache.data.pairs[i] for i in places]
    teacher = partial(family.teacher_velocity, cache.model.load("image").transformer)
    guidance = family.pool_guidance(settings.guidance)
    cond = cache.conditions([pair.text for pair in pairs], guidance)
    noise = cache.noise([("pool", pair.number) for pair in pairs])
    times = sc.time_grid(settings.teacher_steps, sum(settings.shift_range) / 2)
    latents = sc.euler_sample(teacher, noise, times.to(cache.machine.device), **cond)
    return [{"latent": latent} for latent in latents]


def encode_texts(settings: Settings, model: Model, texts: list[str]) -> list[dict[str, Tensor]]:
    """The embeddings of each text."""
    pipe = model.load("text")
    length = text_length(settings, model)
    return [model.family.encode_text(pipe, text, length) for text in texts]


def text_length(settings: Settings, model: Model) -> int:
    """Tokens that a text is padded or cut to."""
    pipe = model.load("text")
    most = model.family.longest_text(pipe)
    if "text_tokens" in settings.given and settings.text_tokens > most:
        die(
            f"--text-tokens {settings.text_tokens} is more than the {most} of the tokenizer of"
            f" --model {model.name}: give at most {most}"
        )
    length = min(settings.text_tokens, most)
    (template,) = model.family.count_tokens(pipe, [""])
    if length <= template:  # no token of a text itself would be left
        die(f"--text-tokens {length} leaves no room for a text: give more than {template}")
    return length


def name_cut_texts(settings: Settings, model: Model, texts: list[str]) -> None:
    """Say which of these texts are longer than the encoder's input."""
    pipe = model.load("text")
    length = text_length(settings, model)
    sizes = model.family.count_tokens(pipe, texts)
    cut = [f"{size} tokens: {text[:60]}" for text, size in zip(texts, sizes) if size > length]
    if not cut:
        return
    advice = "shorten them"
    most = model.family.longest_text(pipe)
    if length < most:
        advice += f", or give --text-tokens up to {most}"
    title = f"cut {len(cut)} of {counted(texts, 'text')} to {length} tokens; {advice}:"
    # On stderr, since --sample prints paths to stdout.
    tqdm.write(first_few([title, *cut], "\n  ", most=6), file=sys.stderr)


# ---------------------------------------------------- the LoRA, which holds several sets of weights


class LoRALinear(torch.nn.Module):
    """A frozen linear layer plus B A x, A (rank, inputs) and B (outputs, rank).

    `switch` is one object that all layers of a network read: while `switch.on` is False, the
    layer is the frozen one alone.
    """

    def __init__(self, base: torch.nn.Linear, A: Tensor, B: Tensor, switch: SimpleNamespace):
        super().__init__()
        self.base = base
        self.switch = switch
        self.A = torch.nn.Parameter(A)
        self.B = torch.nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.on:
            return self.base(x)
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        # In place, since no gradient needs the base's output. It is flattened before and not after,
        # because autograd would copy a view before an in-place addition.
        y.addmm_(rows @ self.A.T, self.B.T)
        return y.reshape(*x.shape[:-1], -1)


class LoRA:
    """A LoRA on a frozen transformer; its weights can be swapped.

    A set of weights is one float32 vector (P,): A of every layer, then B of every layer. Loading it
    is one copy, next to nothing compared with a network call. None stands for the teacher.
    """

    def __init__(self, family: Family, net: torch.nn.Module, settings: Settings):
        self.family = family
        self.net = net
        self.batch = settings.batch
        self.blocks = blocks_of(net)
        names = linear_layers(net, settings.layers)
        self.install(names, settings.rank, settings.seed)
        self.recompute(settings.recompute_every)
        if settings.compile:
            # A graph for each of teacher, EMA and student, in each kind of block and shape.
            torch._dynamo.config.cache_size_limit = 64  # the older of its two names
            net.compile_repeated_blocks()

    def install(self, names: list[str], rank: int, seed: int) -> None:
        """Freeze the network and put LoRA layers around linear ones: A normal, B zero."""
        net = self.net
        net.requires_grad_(False)
        self.family.prepare(net)
        bases = [net.get_submodule(name) for name in names]
        count = len(bases)
        shapes = [(rank, base.in_features) for base in bases]  # of all A, then of all B
        shapes += [(base.out_features, rank) for base in bases]
        sizes = [math.prod(shape) for shape in shapes]
        self.first_B = sum(sizes[:count])  # where B begins in a set of weights
        # The weights that the network computes with. Those of all layers are views of this vector.
        self.loaded = torch.zeros(sum(sizes), device=net.device, dtype=net.dtype)
        views = [part.view(shape) for part, shape in zip(self.loaded.split(sizes), shapes)]
        self.switch = SimpleNamespace(on=False)
        self.layers = {}
        for name, base, A, B in zip(names, bases, views[:count], views[count:], strict=True):
            A.copy_(torch.randn(A.shape, generator=keyed(seed, "A", name)) / rank)
            self.layers[name] = LoRALinear(base, A, B, self.switch)
            net.set_submodule(name, self.layers[name])
        layers = self.layers.values()
        self.params = [layer.A for layer in layers] + [layer.B for layer in layers]

    def loaded_weights(self) -> Tensor:
        """A copy (P,) of the set that is loaded; of a new LoRA, one that changes nothing."""
        return self.loaded.float().clone()

    def recompute(self, every: int) -> None:
        """Recompute every k-th block in the backward (gradient checkpointing); 1: all, 0: none."""
        self.net.disable_gradient_checkpointing()
        if not every:
            return
        recomputed = {id(block) for block in self.blocks[::every]}

        def call(block, *inputs):
            if id(block) in recomputed:
                return checkpoint(block, *inputs, use_reentrant=False)
            return block(*inputs)

        self.net.enable_gradient_checkpointing(gradient_checkpointing_func=call)

    @torch.no_grad()
    def use(self, weights: Tensor | None, scale: float = 1.0) -> None:
        """Load weights (P,), with B multiplied by `scale`; None or 0: switch the LoRA off."""
        self.switch.on = weights is not None and scale != 0
        if not self.switch.on:
            return
        self.loaded.copy_(weights)
        if scale != 1:
            self.loaded[self.first_B :] = scale * weights[self.first_B :]

    def velocity(
        self, weights: Tensor | None, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> sc.Velocity:
        """Velocity of latents (B, C, H, W) with these weights, which every call loads.

        Between the student's call and its backward there must be no other call. More rows than
        --batch are split, for calls without a backward.
        """

        network = self.family.teacher_velocity if weights is None else self.family.velocity

        def call(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            self.use(weights, scale)
            return network(self.net, x, t, dtype, **cond)

        return partial(in_batches, self.batch, call)

    def move_gradients(self, student: Tensor, fraction: float) -> None:
        """Add a fraction of the LoRA's gradients to the student's, in float32, and clear them."""
        gradient = fraction * torch.cat([p.grad.flatten() for p in self.params]).float()
        student.grad = gradient if student.grad is None else student.grad + gradient
        for p in self.params:
            p.grad = None

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights in the network's type, under the names that stock diffusers reads."""
        names = [f"{name}.lora_{part}.weight" for part in "AB" for name in self.layers]
        parts = weights.to(self.loaded.dtype).split([p.numel() for p in self.params])
        return {name: x.view_as(p) for name, x, p in zip(names, parts, self.params, strict=True)}

    @torch.no_grad()
    def relative_change(self, weights: Tensor, scale: float) -> float:
        """Median over layers of |scale B A| / |W|, in Frobenius norms."""
        self.use(weights)
        ratios = []
        for layer in self.layers.values():
            A = layer.A.float()
            B = layer.B.float()
            W = layer.base.weight.dequantize().float()
            change = ((A @ A.T) * (B.T @ B)).sum().sqrt()  # |B A|, without the large matrix
            ratios.append((scale * change / W.norm()).item())
        return float(np.median(ratios))

    @contextmanager
    def in_float32(self):
        """Compute in float32, one layer at a time, so that the network keeps its size."""
        narrow = {}

        def to_float32(module, inputs):
            narrow[module] = dict(module.named_parameters(recurse=False))
            for name, p in narrow[module].items():
                setattr(module, name, torch.nn.Parameter(p.float(), requires_grad=False))

        def to_own_type(module, inputs, output):
            for name, p in narrow.pop(module).items():
                setattr(module, name, p)

        with ExitStack() as hooks:  # each is removed at the end
            for module in self.net.modules():
                hooks.enter_context(module.register_forward_pre_hook(to_float32))
                hooks.enter_context(module.register_forward_hook(to_own_type))
            yield


# ----------------------------------------------------------------------------------- phase 2: train


def train_student(
    settings: Settings, cache: Cache, run: Run, costs: Costs
) -> tuple[Validation | None, TrainState]:
    """Phase 2: train, or resume; returns what calibration needs (no validation if not the lead)."""
    machine = cache.machine
    lora, state = restore(settings, cache, run)
    if not state.done:
        check_disk(run, state)
        if machine.device != "cpu":
            state.checks = check_device(settings, cache, lora)
    validation = Validation(settings, cache, lora) if machine.lead else None
    if not state.done:
        steps = train(settings, cache, read_pool(cache), lora, state)
        watch(steps, settings, machine, run, validation, state, costs)
    return validation, state


def restore(settings: Settings, cache: Cache, run: Run) -> tuple[LoRA, TrainState]:
    """The LoRA in its network, and the state of training: as saved, or at its start."""
    model = cache.model
    lora = LoRA(model.family, model.load("image").transformer, settings)
    state = TrainState(lora.loaded_weights(), config_of(settings))
    if run.state.exists():
        state.load(run.state)
        state.done = is_done(settings, state.rows)
    elif run.lora.exists():
        die(
            f"{run.lora} is finished and is left alone; to calibrate or compare it again,"
            f" {run.state} or {run.check} would be needed, which are missing: give another --out"
        )
    return lora, state


def config_of(settings: Settings) -> sc.ShortcutConfig | sc.MatchedConfig:
    """Settings of Algorithm 2 of the paper, or of matched windows."""
    if settings.paper:
        return sc.ShortcutConfig(shift_range=settings.shift_range)
    return sc.MatchedConfig(settings.student_steps, settings.shift_range)


def decays_of(config: sc.ShortcutConfig | sc.MatchedConfig) -> dict[str, float]:
    """Decays of the EMAs, by name."""
    fast = {"fast": config.fast_decay} if isinstance(config, sc.ShortcutConfig) else {}
    return {"slow": config.slow_decay} | fast


def network_calls(settings: Settings, family: Family) -> dict[str, float]:
    """Calls for a row of an iteration, and for an image by the teacher and by the student.

    A guided velocity of the teacher is two calls with true guidance. The student has three in an
    iteration, for its backward pass counts as two.
    """
    config = config_of(settings)
    if settings.paper:
        teacher, emas = config.teacher_ratio, 2 - config.teacher_ratio  # on average
    else:
        teacher, emas = 2 * config.midpoint_steps, 1
    return {
        "iteration": teacher * family.teacher_calls + emas + 3,
        "teacher": settings.teacher_steps * family.teacher_calls,
        "student": settings.student_steps,
    }


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class TrainState:
    """All that training changes and resumes from: weights, optimizer, log.

    config: of the windows and EMAs. ema_warmup: whether the EMAs are warmed up (`sc.warm_up`).
    """

    def __init__(
        self,
        start: Tensor,
        config: sc.ShortcutConfig | sc.MatchedConfig,
        ema_warmup: bool = True,
    ):
        self.config = config
        self.decays = decays_of(config)
        self.ema_warmup = ema_warmup
        self.weights = {name: start.clone() for name in ("student", *self.decays)}
        self.student = self.weights["student"]
        self.optimizer = torch.optim.AdamW([self.student], weight_decay=1e-4)
        self.rows = []  # of the log, one for each iteration
        self.done = False
        self.checks = None  # what check_device found
        self.saved = 0  # the iteration that is on disk
        self.seconds = 0.0  # of the last iteration

    @property
    def iteration(self) -> int:
        """How many optimizer steps there were."""
        return len(self.rows)

    def save(self, run: Run) -> None:
        """Write one file, atomically."""
        moments = {name: self.optimizer.state[self.student][name] for name in MOMENTS}
        metadata = {
            "settings": run.identity,
            "rows": self.rows,
            "checks": self.checks,
        }
        write_tensors(run.state, self.weights | moments, metadata)
        self.saved = self.iteration

    @torch.no_grad()
    def load(self, path: Path) -> None:
        metadata = read_metadata(path)
        saved = load_file(path)
        for name, weights in self.weights.items():
            weights.copy_(saved[name])
        self.rows = metadata["rows"]
        self.checks = metadata["checks"]
        # A copy: otherwise they would be the file itself, mapped into memory.
        moments = {name: saved[name].to(self.student.device, copy=True) for name in MOMENTS}
        steps = torch.tensor(float(self.iteration))
        self.optimizer.state[self.student] = moments | {"step": steps}
        self.saved = self.iteration


Pool = dict[tuple, list[tuple[int, Tensor]]]  # see read_pool


def read_pool(cache: Cache) -> Pool:
    """All pairs, (place of the text, latent (C, H, W)), by the shape of the latent; on the CPU."""
    pool = {}
    for i, pair in enumerate(cache.data.pairs):
        latent = cache.latent(i)
        pool.setdefault(tuple(latent.shape), []).append((pair.text, latent))
    return pool


def train(
    settings: Settings, cache: Cache, pool: Pool, lora: LoRA, state: TrainState
) -> Iterator[int]:
    """Train the student; yields the number of the iteration after each optimizer step.

    A resumed run first yields the iteration that it resumes from, as its validation may be missing.
    """
    machine = cache.machine
    student = state.student
    optimizer = state.optimizer
    passes = settings.accumulate * machine.processes  # for one optimizer step
    names = ("loss", "teacher_loss", "self_loss", "residual")
    if state.iteration:
        yield state.iteration
    while state.iteration < settings.iterations:
        began = time.perf_counter()
        iteration = state.iteration + 1
        # U is shifted by 1 / passes from pass to pass, so that all passes together have as many
        # teacher rows as one large batch. (Matched windows have nothing but teacher rows.)
        U = torch.rand(1, generator=keyed(settings.seed, "fraction", iteration)).item()
        sums = torch.zeros(len(names), device=machine.device)
        counts = torch.zeros(len(names), device=machine.device)
        for pass_index in range(machine.process, passes, machine.processes):
            generator = keyed(settings.seed, "train", iteration, pass_index)
            x_0, noise, cond = draw_batch(settings, cache, pool, generator)
            U_of_pass = (U + pass_index / passes) % 1
            loss, log = loss_of(lora, state, x_0, noise, cond, U_of_pass, generator)
            loss.backward()
            lora.move_gradients(student, 1 / passes)
            values = torch.stack([loss.detach(), *(log[name] for name in names[1:])])
            exists = ~values.isnan()  # nan: the loss of rows that this pass had none of
            exists[0] = True  # a loss that is nan must stay so
            sums += torch.where(exists, values, 0)
            counts += exists
        machine.add_up(sums, counts, student.grad)

        norm = torch.nn.utils.clip_grad_norm_(student, 10.0).item()
        means = dict(zip(names, (sums / counts).tolist()))
        if not math.isfinite(means["loss"] + norm):
            die(
                f"iteration {iteration}: loss {means['loss']}, gradient norm {norm}. Stopped, the"
                " last checkpoint is kept; try a lower --learning-rate or a longer --warmup in"
                " another --out"
            )
        rate = settings.learning_rate * min(1, iteration / max(1, settings.warmup))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for name, decay in state.decays.items():
            if state.ema_warmup:
                decay = sc.warm_up(decay, iteration)
            sc.update_ema([state.weights[name]], [student], decay)

        row = {"iteration": iteration}
        row |= {name: mean for name, mean in means.items() if not math.isnan(mean)}
        row |= {"gradient_norm": norm, "learning_rate": rate}
        state.rows.append(row)
        state.seconds = time.perf_counter() - began
        yield iteration


def draw_batch(
    settings: Settings, cache: Cache, pool: Pool, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents and noise (B, C, H, W) of one shape, and their conditions."""
    shapes = list(pool)
    counts = torch.tensor([float(len(pairs)) for pairs in pool.values()])
    pairs = pool[shapes[torch.multinomial(counts, 1, generator=generator)]]
    rows = torch.randint(len(pairs), (settings.batch,), generator=generator)
    drawn = [pairs[row] for row in rows]
    texts = [text for text, _ in drawn]
    x_0 = torch.stack([latent for _, latent in drawn])
    noise = torch.randn(x_0.shape, generator=generator)
    low, high = cache.model.family.training_guidance(settings.guidance)
    guidance = low + (high - low) * torch.rand(len(rows), generator=generator)
    device = cache.machine.device
    return x_0.to(device), noise.to(device), cache.conditions(texts, guidance)


def loss_of(
    lora: LoRA,
    state: TrainState,
    x_0: Tensor,
    noise: Tensor,
    cond: dict[str, Tensor],
    U: float,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one pass (Eq. 13), and what to log."""
    teacher = lora.velocity(None)
    emas = {name: lora.velocity(state.weights[name]) for name in state.decays}
    if isinstance(state.config, sc.ShortcutConfig):
        windows = sc.sample_windows(state.config, len(x_0), U=U, generator=generator)
        first, second = sc.dual(windows, teacher, **emas)
    else:  # all are teacher rows
        windows = sc.matched_windows(state.config, len(x_0), generator=generator)
        first, second = sc.matched(windows, teacher, **emas)
    student = lora.velocity(state.student)
    return sc.shortcut_loss(windows, x_0, noise, student, first, second, **cond)


def watch(
    steps: Iterator[int],
    settings: Settings,
    machine: Machine,
    run: Run,
    validation: Validation | None,
    state: TrainState,
    costs: Costs,
) -> None:
    """Follow training: save, validate, stop when asked to.

    A validation takes long, so the state is saved before: a resumed run repeats only that.
    """
    third = state.iteration + 3  # the first iterations are slower, so the third is timed
    bar = machine.progress(
        steps, "train", initial=max(state.iteration - 1, 0), total=settings.iterations
    )
    with interruptible() as asked:
        for iteration in bar:
            if machine.lead and iteration == third:
                words = forecast(settings, machine, validation, iteration, state.seconds)
                tqdm.write(f"iteration {iteration}: {words}")
                check_disk(run, state)
            is_last = iteration >= settings.iterations
            due = is_last or iteration % settings.validate_every == 0
            stop = machine.any(bool(asked))
            is_checkpoint = due or stop or iteration % settings.checkpoint_every == 0
            if machine.lead and is_checkpoint and iteration > state.saved:
                write_log(run.out, state.rows)
                state.save(run)
                costs.save()
            if stop:
                machine.wait()  # for the one that saves
                die(f"stopped after iteration {iteration}; {how_to_go_on(settings, iteration)}")
            is_validated = "rmse" in state.rows[-1]
            if is_validated or not due:
                continue
            is_hopeless = False
            if machine.lead:
                with on_stop(stop_now):
                    bar.set_description("validate")  # the first takes minutes, later ones seconds
                    is_hopeless = validate(settings, run, validation, state, bar)
                    bar.set_description("train")
            # The same command would repeat this validation and stop again.
            if machine.any(is_hopeless):
                words = f"diverged student; {LOWER_RATE}"
                if machine.lead:
                    words = verdict(settings, state.rows[-1])
                die(f"stopped at iteration {iteration}: {words}")
            state.done = machine.any(state.done)
            if machine.lead:
                state.save(run)
                costs.save()
            if state.done:
                break
    bar.close()


def validate(
    settings: Settings, run: Run, validation: Validation, state: TrainState, bar: tqdm
) -> bool:
    """Add a validation to the last row and set state.done; returns whether there is no hope."""
    row = state.rows[-1]
    iteration = state.iteration
    N = settings.student_steps
    row |= validation.report(state.student, run.out / f"validation/{iteration:06d}.png")
    bar.set_postfix({f"lam*({N})": f"{row[f'lam_{N}']:.2f}"})
    is_hopeless = has_diverged(settings, row, 5.0)
    words = verdict(settings, row)
    if 2 * iteration >= settings.iterations and not is_hopeless and "WARNING" in words:
        tqdm.write(f"iteration {iteration}: {words}")
    write_log(run.out, state.rows)
    draw_log(settings, run.out, state.rows)
    state.done = is_done(settings, state.rows)
    return is_hopeless


def is_done(settings: Settings, rows: list[dict]) -> bool:
    """Whether training has ended after these rows of the log, its last validation included."""
    if not rows or "rmse" not in rows[-1]:
        return False
    is_matched = settings.stop_when_matched and has_matched(settings, rows)
    return len(rows) >= settings.iterations or is_matched


def how_to_go_on(settings: Settings, iteration: int) -> str:
    words = "the same command resumes there"
    if settings.stop_when_matched or iteration >= settings.iterations:
        return words
    return f"{words}, with --iterations {iteration} it ends with what there is"


def has_matched(settings: Settings, rows: list[dict]) -> bool:
    """Whether the student beats the teacher by 2 %, and more training would gain nothing.

    Matched windows settle at the match: the error stalls. The paper's pass through it: lam* is at
    most 1.05, or stalls. What stalls has fallen by less than 1 % from five validations to the next
    five, on average.
    """

    def stalls(name: str) -> bool:
        values = [row[name] for row in rows if name in row]
        return len(values) >= 10 and sum(values[-5:]) > 0.99 * sum(values[-10:-5])

    lam = f"lam_{settings.student_steps}"
    last = rows[-1]
    if not last["rmse"] < 0.98 * last["teacher_rmse"]:
        return False
    if settings.paper:
        return 0 < last[lam] <= 1.05 or stalls(lam)
    return stalls("rmse")


def write_log(out: Path, rows: list[dict]) -> None:
    """log.csv: a line for each iteration."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(out / "log.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_log(settings: Settings, out: Path, rows: list[dict]) -> None:
    """training.png: losses, residual and lam* over the iterations."""
    losses = {"loss": "all rows"}
    if settings.paper:  # matched windows have teacher rows only
        losses |= {"teacher_loss": "teacher rows", "self_loss": "self rows"}
    lams = {f"lam_{n}": f"N = {n}" for n in settings.all_steps}
    panels = {
        "loss": losses,
        "|student - target| / |target|": {"residual": ""},
        "best scale lam* for N steps (1: matched)": lams,
    }
    figure = Figure((14, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (title, lines) in zip(axes, panels.items()):
        for name, label in lines.items():
            drawn = [row for row in rows if math.isfinite(row.get(name, math.nan))]
            x = [row["iteration"] for row in drawn]
            y = [row[name] for row in drawn]
            axis.plot(x, y, ".-" if len(x) < 99 else "-", lw=0.9, label=label)
        axis.set(title=title, xlabel="iteration")
        if len(lines) > 1:
            axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1].axhline(1, color="black", lw=0.8)
    with atomic(out / "training.png") as part:
        figure.savefig(part, format="png", dpi=110)


# --------------------------------------------------------------------------------------- validation

# Range of the LoRA scales that are searched; a best one at either end counts as none.
SCALES = (0.05, 8.0)

MOST_COLUMNS = 8  # of an image that compares


class Validation:
    """Measures students on held-out prompts and noises; keeps the teacher's results."""

    def __init__(self, settings: Settings, cache: Cache, lora: LoRA):
        data = cache.data
        self.settings = settings
        self.cache = cache
        self.lora = lora
        self.texts = [data.texts[i] for i in data.validation]
        self.compared = len(data.comparison) / len(data.validation)  # texts, for one validated
        self.cond, self.noise = cache.held_out(data.validation, "validation")
        self.paths = {}  # of the teacher, for each number of steps
        self.end(None, 1)  # the first call may compile
        began = time.perf_counter()
        self.fine = self.end(None, settings.teacher_steps)
        self.coarse = self.end(None, settings.student_steps)
        self.coarse.sum().item()  # waits for a GPU
        family = cache.model.family
        self.network_calls = network_calls(settings, family)
        self.teacher_calls = family.teacher_calls
        calls = self.teacher_calls * (settings.teacher_steps + settings.student_steps)
        self.seconds = (time.perf_counter() - began) / calls  # of one network call on all rows

    def times(self, steps: int) -> Tensor:
        return sc.time_grid(steps, self.settings.shift).to(self.noise.device)

    def end(self, weights: Tensor | None, steps: int, scale: float = 1.0) -> Tensor:
        """Latents (B, C, H, W) where sampling in so many steps ends."""
        velocity = self.lora.velocity(weights, scale)
        return sc.euler_sample(velocity, self.noise, self.times(steps), **self.cond)

    def distance(self, end: Tensor) -> float:
        """RMSE to where the teacher's many steps end; inf if it is not finite."""
        distance = rms(end - self.fine)
        return distance if math.isfinite(distance) else math.inf

    def lam(self, weights: Tensor, steps: int) -> float:
        if steps not in self.paths:
            self.paths[steps] = self.teacher_path(weights, steps)
        student = self.lora.velocity(weights)
        return sc.optimal_scale(student, self.paths[steps], **self.cond).item()

    @torch.no_grad()
    def teacher_path(self, weights: Tensor, steps: int) -> sc.TeacherPath:
        """The teacher's path, with the velocities that any student has at scale 0.

        These are the teacher's, except with true guidance: then they are those without guidance,
        from which the scale leads to the student.
        """
        teacher = self.lora.velocity(None)
        path = sc.teacher_path(teacher, self.noise, self.times(steps), **self.cond)
        if not self.cache.model.family.true_guidance:
            return path
        plain = self.lora.velocity(weights, 0.0)
        states = zip(path.times[:-1], path.x, strict=True)
        velocities = [plain(x, t.expand(len(x)), **self.cond) for t, x in states]
        return path._replace(velocity=torch.stack(velocities))

    def search(self, weights: Tensor, steps: int) -> tuple[float, float]:
        """Least distance to the teacher's reference samples, and the scale that gives it.

        Five scales around lam* are tried; while the best is the outermost of all, or none gives
        finite samples, five more around that; at last five close to the best. All lie in SCALES.
        """
        lam = self.lam(weights, steps)
        distance_at = {}

        def try_scales(center: float, spread: float) -> float:
            tries = center * np.linspace(1 - spread, 1 + spread, 5)
            for scale in tries.round(3).clip(*SCALES).tolist():
                if scale not in distance_at:
                    distance_at[scale] = self.distance(self.end(weights, steps, scale))
            best = min(distance_at, key=distance_at.get)
            return best if math.isfinite(distance_at[best]) else min(distance_at)

        center = min(max(lam, 0.1), 5.0) if math.isfinite(lam) else 1.0
        best = try_scales(center, 0.4)
        while best in (min(distance_at), max(distance_at)) and best not in SCALES:
            best = try_scales(best, 0.4)
        best = try_scales(best, 0.15)
        return distance_at[best], best

    def measure(self, weights: Tensor, end: Tensor, steps: list[int]) -> dict[str, float]:
        """lam* for these numbers of steps; how far teacher and student end from many steps."""
        row = {f"lam_{n}": self.lam(weights, n) for n in steps}
        return row | {"teacher_rmse": rms(self.coarse - self.fine), "rmse": rms(end - self.fine)}

    def report(self, weights: Tensor, path: Path) -> dict[str, float]:
        """What `measure` finds, for the log; draws the ends of teacher, student, many steps."""
        end = self.end(weights, self.settings.student_steps)
        ends = [self.coarse, end, self.fine]
        model = self.cache.model
        pipe = model.load("image")
        columns = min(len(self.texts), MOST_COLUMNS)
        images = [model.family.decode(pipe, latents[:columns]) for latents in ends]
        draw(self.settings, images, self.texts[:columns], path)
        return self.measure(weights, end, self.settings.all_steps)


def has_diverged(settings: Settings, row: dict[str, float], factor: float = 2.0) -> bool:
    """Whether the student is not finite, or its error is over `factor` times the teacher's.

    A student that overshoots that far has a lam* of about 1 / (1 + factor): a scale corrects it, so
    it has not diverged. During training the factor is larger, for students may recover.
    """
    student = row["rmse"]
    lam = row[f"lam_{settings.student_steps}"]
    far = student > factor * row["teacher_rmse"]
    return not math.isfinite(student) or (far and not lam >= 0.1)


def verdict(settings: Settings, row: dict[str, float], scale_helps: bool = True) -> str:
    """In words, whether the student learned. scale_helps: whether its scale corrects overshoot."""
    N = settings.student_steps
    student = row["rmse"]
    teacher = row["teacher_rmse"]
    lam = row[f"lam_{N}"]
    in_steps = f"in {counted(N, 'step')}"
    distances = (
        f"{in_steps} the student's RMSE to the teacher's {settings.teacher_steps} steps is"
        f" {student:.3f}, the teacher's own {teacher:.3f}"
    )
    if not math.isfinite(student):
        distances = f"{in_steps} its latents hold NaN or infinity"
    if has_diverged(settings, row):
        return f"WARNING, diverged student: {distances}; {LOWER_RATE}"
    if lam <= 0:
        return f"WARNING, led astray: lam* is {lam:.2f}; {distances}; {LOWER_RATE}"
    if lam < 0.8 and abs(student - teacher) > 0.02 * teacher:
        way_out = "use its scale, or train shorter" if scale_helps else "train shorter"
        return f"WARNING, overshot: lam* is {lam:.2f}; {distances}; {way_out}"
    if not student < 0.98 * teacher:
        return f"WARNING, inert student: {distances}; train longer or with a higher --learning-rate"
    return distances


def draw(settings: Settings, rows: list[Tensor], texts: list[str], path: Path) -> None:
    """Images (B, h, w, 3) of teacher, student, teacher in many steps; a column for each text."""
    N = settings.student_steps
    labels = [
        f"{name}\n{n} steps"
        for name, n in (("teacher", N), ("student", N), ("teacher", settings.teacher_steps))
    ]
    figure = Figure((1.7 * len(texts) + 0.7, 1.7 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(texts), squeeze=False)
    for axes, label, images in zip(grid, labels, rows):
        for axis, image in zip(axes, images):
            axis.imshow(image.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label)
    for axis, text in zip(grid[0], texts):
        axis.set_title(textwrap.fill(text[:72], 24), fontsize=8, parse_math=False)
    with atomic(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts may lack glyphs
        figure.savefig(part, format="png", dpi=110)


# ---------------------------------------------------------------------- phase 3: calibrate and save


def calibrate(settings: Settings, run: Run, validation: Validation, state: TrainState) -> None:
    """Phase 3: a scale for each number of steps; save the student or its slow EMA as a LoRA.

    All on validation prompts and noises. The one that ends nearer to the teacher is saved.
    """
    cache = validation.cache
    lora = validation.lora
    N = settings.student_steps
    model = cache.model
    found = {}
    measured = {}
    for name in ("student", "slow"):
        weights = state.weights[name]
        measured[name] = validation.measure(weights, validation.end(weights, N), [N])
        if not has_diverged(settings, measured[name]):
            found[name] = validation.search(weights, N)
    if not found:
        die(f"nothing is saved: {verdict(settings, measured['student'])}")
    name = min(found, key=found.get)
    weights = state.weights[name]

    scales = {}
    uncalibrated = []
    for n in cache.machine.progress(settings.all_steps, "calibrate"):
        distance, scale = found[name] if n == N else validation.search(weights, n)
        # At a scale near 0 every student samples like the untrained network: require an improvement
        # on that.
        at_zero = validation.distance(validation.end(weights, n, 0.0))
        scales[n] = scale
        if scale in SCALES or not distance < 0.999 * at_zero:
            uncalibrated.append(n)
            scales[n] = 1.0
    row = validation.report(weights, run.out / "validation/saved.png")
    note = verdict(settings, row, scale_helps=scales[N] < 1)  # 1: none was found
    shown = recommended(N, scales, model.family)
    missing = [n for n in uncalibrated if n in shown]
    if missing:
        note += f". {no_scale(missing)}"

    lora.use(weights, scales[N])
    check = check_latents(settings, cache)
    if not check.isfinite().all():
        die(
            f"nothing is saved: at scale {scales[N]:g} the student's latents hold NaN or infinity;"
            f" {LOWER_RATE}"
        )
    write_tensors(run.check, {"latents": check}, {"key": run.key})
    metadata = {
        "base_model": run.base_model,
        "pipeline": model.family.pipeline.__name__,
        "student_steps": N,
        "shift": settings.shift,
        "scales": scales,
        "uncalibrated": uncalibrated,
        "resolution": settings.resolution,
        "guidance": settings.guidance,
        "rank": settings.rank,
        "max_sequence_length": validation.cond["text"].shape[1],
        "iterations": state.iteration,
        "weights": "slow EMA of the student" if name == "slow" else name,
        "note": note,
        "checks": state.checks,
        "relative_change": lora.relative_change(weights, scales[N]),
        "settings": run.identity,
        "key": run.key,
    }
    model.family.pipeline.save_lora_weights(
        run.out,
        transformer_lora_layers=lora.named(weights),
        save_function=lambda tensors, path: write_tensors(Path(path), tensors, metadata),
    )


def check_latents(settings: Settings, cache: Cache) -> Tensor:
    """What the student that is loaded makes of the first text: the same before and after saving."""
    cond, noise = cache.held_out([0], "check")
    N = settings.student_steps
    return stock_sample(cache.model, noise, N, cond, settings.shift, settings.batch)


def save_for_comfyui(run: Run, family: Family) -> None:
    """Save the LoRA once more, under the names by which ComfyUI finds every layer."""
    path = run.out / family.comfyui_file
    if read_metadata(path).get("key") != run.key:  # it is missing, damaged, or of another run
        tensors = family.for_comfyui(load_file(run.lora))
        write_tensors(path, tensors, {"base_model": run.base_model, "key": run.key})


def no_scale(steps: list[int]) -> str:
    """Says for which numbers of steps the LoRA has no scale to recommend."""
    low, high = SCALES
    return (
        f"For {listed(steps)} steps no scale between {low:g} and {high:g} is a clear optimum: 1 is"
        " a placeholder, not a recommendation"
    )


def read_adapter(out: Path) -> dict:
    """What the file of the saved LoRA says of it."""
    adapter = read_metadata(out / LORA)
    if not adapter:
        die(f"there is no complete {LORA} in --out {out}: distil first, without --sample")
    if adapter["settings"].get("version") != VERSION:
        die(
            f"{out / LORA} is from another version of this program: render with that version, or"
            " distil again in another --out"
        )
    adapter["scales"] = {int(n): scale for n, scale in adapter["scales"].items()}
    return adapter


def load_student(model: Model, out: Path, scale: float) -> DiffusionPipeline:
    """A stock pipeline with the saved LoRA at a scale."""
    pipe = model.load("image", fresh=True)
    pipe.load_lora_weights(out, weight_name=LORA, adapter_name="student")
    pipe.set_adapters("student", scale)
    return pipe


# --------------------------------------------------------------------------------- phase 4: compare


def compare(settings: Settings, cache: Cache, run: Run) -> dict:
    """Phase 4: a stock pipeline with the saved file against the teacher, on held-out prompts."""
    model = cache.model
    data = cache.data
    machine = cache.machine
    adapter = read_adapter(run.out)
    N = settings.student_steps
    pipe = load_student(model, run.out, adapter["scales"][N])
    expected = load_file(run.check)["latents"].to(machine.device)
    check = rms(check_latents(settings, cache) - expected) / rms(expected)
    if not check < (3e-2 if machine.device == "cuda" else 1e-5):
        die(
            f"self-check failed: in a fresh pipeline {run.lora} gives other latents than in"
            f" training, by {check:.1e} of their size; do not use it"
        )

    cond, noise = cache.held_out(data.comparison, "compare")

    def sample(steps: int, guided: bool) -> Tensor:
        return stock_sample(model, noise, steps, cond, settings.shift, settings.batch, guided)

    pipe.set_adapters("student", 0.0)
    fine = sample(settings.teacher_steps, guided=True)
    fine_images = model.family.decode(pipe, fine)
    steps = settings.all_steps
    samplers = {
        "teacher": dict.fromkeys(steps, 0.0),
        "student": dict.fromkeys(steps, 1.0),
        "student, scaled": adapter["scales"],
    }
    table = []
    shown = {}
    cells = [(sampler, n) for sampler in samplers for n in steps]
    for sampler, n in machine.progress(cells, "compare"):
        scale = samplers[sampler][n]
        pipe.set_adapters("student", scale)
        latents = sample(n, guided=sampler == "teacher")
        distance = rms(latents - fine)
        if not math.isfinite(distance):
            die(
                f"{run.lora} gives NaN or infinity in {n} steps at scale {scale:g}: do not use it,"
                f" {LOWER_RATE}"
            )
        images = model.family.decode(pipe, latents)
        error = (images - fine_images).square().mean((1, 2, 3)).clamp(min=1e-10)
        psnr = -10 * error.log10().mean().item()
        table.append(
            {"sampler": sampler, "steps": n, "scale": scale, "rmse": distance, "psnr": psnr}
        )
        if n == N:
            shown[sampler] = images
    rows = [shown["teacher"], shown["student, scaled"], fine_images]
    texts = [data.texts[i] for i in data.comparison[:MOST_COLUMNS]]
    draw(settings, rows, texts, run.out / "comparison.png")
    return {
        "table": table,
        "samples": len(noise),
        "self_check": check,
        "adapter": adapter,
        # Each sample with that of the same text and the next noise.
        "seed_to_seed": rms(fine - fine.roll(len(data.comparison), 0)),
        "network_calls": network_calls(settings, model.family),
        "teacher_steps": settings.teacher_steps,
    }


def markdown(results: dict) -> str:
    """The table: RMSE of latents / PSNR of images."""
    cells = {(row["sampler"], row["steps"]): row for row in results["table"]}
    samplers = list(dict.fromkeys(sampler for sampler, _ in cells))
    steps = list(dict.fromkeys(n for _, n in cells))
    rows = [["Euler steps", *steps]]
    for sampler in samplers:
        row = [cells[sampler, n] for n in steps]
        rows.append([sampler, *(f"{cell['rmse']:.3f} / {cell['psnr']:.1f}" for cell in row)])
    scales = ["its scale"]
    for n in steps:
        missing = n in results["adapter"]["uncalibrated"]
        scales.append("none found" if missing else f"{cells[samplers[-1], n]['scale']:.2f}")
    return as_table([*rows, scales])


def as_table(rows: list[list]) -> str:
    """Rows in Markdown; the first is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ----------------------------------------------------------------------------------------- --sample


def render(settings: Settings, machine: Machine) -> None:
    """--sample: images of prompts by the saved LoRA, as its card recommends or flags say."""
    if not machine.lead:
        return
    out = settings.out
    adapter = read_adapter(out)
    settings = follow_adapter(settings, adapter)
    model = Model(settings.model, machine, settings.quantize)
    family = model.family
    other_model = (
        f"{out / LORA} was made for {adapter['base_model']}, and --model {settings.model} is a"
        " different model: give the one it was made for"
    )
    if adapter["pipeline"] != family.pipeline.__name__:
        die(other_model)
    refuse_untrained(settings, family)
    refuse_unscaled(settings, family, adapter)
    if settings.resolution != adapter["resolution"]:
        trained = f"the LoRA was trained at {adapter['resolution']} px"
        tqdm.write(f"{trained}: --resolution {settings.resolution} is untried", file=sys.stderr)
    model.download()
    if adapter["settings"]["model"] != model.fingerprint:
        die(other_model)
    texts = list(settings.sample)
    encoded = encode_texts(settings, model, texts)
    name_cut_texts(settings, model, texts)
    N = settings.student_steps
    load_student(model, out, adapter["scales"][N])
    guidance = torch.full((len(texts),), settings.guidance)
    cond = stacked(encoded) | {"guidance": guidance}
    noise = draw_noise(settings, model, [("sample", i) for i in range(len(texts))])
    latents = stock_sample(model, noise, N, cond, settings.shift, settings.batch)
    how = [
        f"{N}-steps",
        f"{settings.resolution}-px",
        f"guidance-{settings.guidance:g}",
        f"shift-{settings.shift:g}",
        f"{settings.text_tokens}-tokens",
        f"seed-{settings.seed}",
    ]
    for i, image in enumerate(family.decode(model.pipe, latents)):
        name = "".join(c if c.isalnum() else "-" for c in texts[i])
        name = name.encode()[:100].decode(errors="ignore")  # names of files have 255 bytes
        path = out / "samples" / ("-".join([f"{i:02d}", name, *how]) + ".png")
        with atomic(path) as part:
            Image.fromarray((255 * image).round().byte().numpy()).save(part, "png")
        print(path)


def refuse_unscaled(settings: Settings, family: Family, adapter: dict) -> None:
    """Ends if the saved LoRA has no scale for --student-steps, or has learned another guidance."""
    out = settings.out
    if family.true_guidance and settings.guidance != adapter["guidance"]:
        die(
            f"--guidance: the student in --out {out} has learned a guidance of"
            f" {adapter['guidance']:g}, and no other can be had from it: leave the flag out"
        )
    N = settings.student_steps
    shown = recommended(adapter["student_steps"], adapter["scales"], family)
    if N not in shown and family.true_guidance:
        die(
            f"--student-steps {N}: the student in --out {out} was distilled for"
            f" {adapter['student_steps']}, and its scale for others changes its guidance, too:"
            " leave the flag out, or distil another student"
        )
    if N not in shown:
        die(
            f"--student-steps {N}: the adapter in --out {out} has scales for {listed(shown)} steps,"
            " give one of these"
        )
    if N in adapter["uncalibrated"]:
        others = set(shown) - set(adapter["uncalibrated"])
        advice = "give another --student-steps" if others else "distil again, for longer"
        tqdm.write(f"{no_scale([N])}: {advice}", file=sys.stderr)


def recommended(student_steps: int, scales: dict[int, float], family: Family) -> list[int]:
    """Numbers of steps for which the LoRA has a scale that can be recommended.

    With true guidance the scale changes the guidance, too: at 0 there is none.
    """
    return [student_steps] if family.true_guidance else list(scales)


def follow_adapter(settings: Settings, adapter: dict) -> Settings:
    """Settings by which the LoRA was made, where no flag says otherwise."""
    made_with = {
        name: adapter[name] for name in ("student_steps", "resolution", "guidance", "shift")
    }
    made_with["text_tokens"] = adapter["max_sequence_length"]
    made_with["quantize"] = adapter["settings"]["quantize"]
    made_with["model"] = adapter["base_model"]
    made_with["shift_range"] = tuple(adapter["settings"]["shift_range"])
    if "/" not in made_with["model"] and "model" not in settings.given:
        die(
            f"the adapter in --out {settings.out} was made for {made_with['model']}, a folder: say"
            " where it is with --model"
        )
    settings = settings.with_defaults(made_with)
    if settings.quantize and not find_spec("torchao"):
        die(
            f"the adapter in --out {settings.out} is for an int8 base, which needs torchao: pip"
            " install torchao"
        )
    return settings


# --------------------------------------------------------------------------------------------- data

PROMPTS = """\
a red fox asleep in fresh snow, soft morning light
a bowl of ramen, seen from above
an old fisherman mending a net, black and white
a lighthouse on a cliff in a storm, oil painting
a hand-painted shop sign that says "FRESH BREAD"
a city street at night in the rain, neon lights
an astronaut playing chess with a cat, watercolour
a glass teapot with blooming tea, macro
a crowd at a summer music festival, wide angle
a tiny library with a spiral stair, isometric
a hummingbird at a purple flower, wings blurred
a knight in worn armour under a cherry tree
a yellow taxi before a white brick wall
a map of an imaginary island, ink on old paper
two children running along a beach at sunset
a green sports car on a mountain pass, motion blur
a cup of coffee beside an open notebook
a dragon made of origami paper on a desk
an elderly woman laughing, close-up, natural light
a wooden cabin by a lake under the Milky Way
a corgi in a raincoat jumping over a puddle
a marble statue overgrown with ivy in a ruined temple
a robot watering plants on a balcony, pencil drawing
a plate of strawberries, still life"""


class Example(NamedTuple):
    """What a source of data yields: a caption, and an image or none.

    A new source is a function that returns a list of these, called in read_data.
    """

    caption: str
    identity: list  # what its latent depends on, besides what all latents of the run do
    image: Callable[[], Tensor] | None  # opens it: (1, 3, h, w) in [-1, 1]; None: the teacher's


class Pair(NamedTuple):
    """An example that is trained on."""

    text: int  # the caption's place in Data.texts
    image: Callable[[], Tensor] | None
    number: int  # among all examples of the source: it is the key of the noise


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by."""

    texts: list[str]  # all captions and prompts, the held-out ones first
    pairs: list[Pair]
    held_out: list[str]
    validation: list[int]  # places in texts
    comparison: list[int]
    text_keys: list[str]  # identify the embeddings and latents in the cache
    latent_keys: list[str]
    fingerprint: str  # of what is trained on
    empty: int | None  # place in texts of "", for true guidance


def read_data(settings: Settings, model: Model) -> Data:
    """Prompts and pairs, without the held-out prompts among the pairs."""
    machine = model.machine
    prompts, held_out = read_prompts(settings.prompts, settings.held_out, not settings.images)

    # What all latents of this run depend on. Those of the teacher's images also depend on the
    # embeddings, noise and shift, and by rounding on what shares their batch.
    made_with = [VERSION, model.fingerprint, machine.device, settings.resolution]
    if not settings.images:
        made_with += [settings.text_tokens, settings.quantize, settings.batch]
        made_with += [settings.seed, settings.shift_range]

    def latent_key(identity: list) -> str:
        return digest([*made_with, *identity])

    def is_cached(identity: list) -> bool:
        return cache_file(settings.out, "latent", latent_key(identity)).exists()

    if settings.images:
        examples = read_images(settings.images, settings.resolution, machine, is_cached)
    else:
        how = [settings.teacher_steps, model.family.pool_guidance(settings.guidance)]
        examples = [Example(text, [text, i, *how], None) for i, text in enumerate(prompts)]
    held_out_texts = {text.casefold() for text in held_out}
    numbers = [i for i, one in enumerate(examples) if one.caption.casefold() not in held_out_texts]
    left_out = len(examples) - len(numbers)
    if settings.images and machine.lead and left_out:
        print(f"left out {counted(left_out, 'image')}: the caption is a held-out prompt")
    if machine.lead and settings.limit > len(numbers) > 0:
        print(
            f"--limit {settings.limit} is more than the {len(numbers)} pairs there are: all are"
            " used"
        )
    numbers = numbers[: settings.limit or None]
    if not numbers:  # only with --images: read_prompts checks the other case
        die(
            f"every caption in --images {settings.images} is also one of the {len(held_out)}"
            " held-out prompts: give --prompts a file that ends with other lines"
        )
    kept = [examples[i] for i in numbers]
    empty = [""] if model.family.true_guidance else []
    captions = [example.caption for example in kept]
    texts = list(dict.fromkeys([*held_out, *captions, *empty]))
    places = {text: i for i, text in enumerate(texts)}
    third = max(1, len(held_out) // 3)

    def text_key(text: str) -> str:
        return digest([VERSION, model.fingerprint, machine.device, settings.text_tokens, text])

    return Data(
        texts=texts,
        pairs=[Pair(places[one.caption], one.image, i) for i, one in zip(numbers, kept)],
        held_out=held_out,
        validation=list(range(third)),
        comparison=list(range(third, len(held_out))),
        text_keys=[text_key(text) for text in texts],
        latent_keys=[latent_key(example.identity) for example in kept],
        fingerprint=digest([example.identity for example in kept]),
        empty=places[""] if empty else None,
    )


def read_prompts(file: Path | None, held_out: int, needs_more: bool) -> tuple[list[str], list[str]]:
    """All prompts, and the last `held_out` different ones; needs_more: there must be others.

    Blank lines and lines that start with # are skipped.
    """
    if file:
        source = f"--prompts {file}"
        with explain(
            f"{source} can't be read as a text file: give one in UTF-8, a prompt a line",
            OSError,
            UnicodeDecodeError,
        ):
            if not file.exists():
                die(f"{source}: there is no such file")
            lines = file.read_text("utf-8-sig").split("\n")  # splitlines knows other ends, too
    else:
        source = "the built-in list"
        lines = PROMPTS.splitlines()
    prompts = []
    for number, line in enumerate(map(tidy, lines), 1):
        if line and not line.startswith("#"):
            option = OPTION.search(line)
            if option:
                die(f"{source}, line {number} {no_options(option)}")
            prompts.append(line)
    distinct = {}
    for prompt in prompts:
        distinct.setdefault(prompt.casefold(), prompt)
    different = len(distinct)
    needed = held_out + needs_more
    if different < needed:
        die(
            f"{source} has {different} different prompts, upper and lower case being the same, and"
            f" --held-out {held_out} needs {needed}: give --prompts a longer file, or give a"
            " smaller --held-out"
        )
    return prompts, list(distinct.values())[-held_out:]


# ------------------------------------------------------------------------- data: a folder of images


def read_images(
    folder: Path, resolution: int, machine: Machine, is_cached: Callable[[list], bool]
) -> list[Example]:
    """The images of a folder with their captions; what can't be used is named and counted.

    To check them, those whose latents are not cached are opened, each by one process.
    """
    pairs, skipped, notes = list_images(folder)
    mine = pairs[machine.process :: machine.processes]
    bar = machine.progress(mine, "check images", unit="image")
    checked = machine.collect([check_image(path, caption, is_cached) for path, caption in bar])
    looked_at = {image.path: image for image in checked}
    found = []
    flat = []
    for path, caption in pairs:
        image = looked_at[path]
        if image.fault:
            skipped.append(f"{path.name}: {image.fault}")
            continue
        if image.flat:
            flat.append(path.name)
        identity = [caption, *image.fingerprint]
        found.append(Example(caption, identity, partial(open_image, path, resolution)))
    if flat:
        notes.append(
            f"kept {counted(flat, 'image')} of a single colour ({first_few(flat)}): remove"
            " what should not be trained on"
        )
    if machine.lead and skipped:
        print(f"skipped {len(skipped)}, kept {len(found)} images; fix these to use them:")
        print("  " + first_few(skipped, "\n  "))
    if machine.lead and notes:
        print(*notes, sep="\n")
    if not found:
        die(f"--images {folder} has no image with a caption: NAME.png goes with NAME.txt")
    return found


def list_images(folder: Path) -> tuple[list[tuple[Path, str]], list[str], list[str]]:
    """Images with their captions, why others are skipped, and notes on the other files.

    Hidden files are ignored, sub-folders are not searched.
    """
    if not folder.is_dir():
        die(f"--images {folder} is no folder: give one with images, and captions in NAME.txt")
    kinds = Image.registered_extensions()
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in visible if path.is_dir()]
    files = [path for path in visible if not path.is_dir()]
    images = [path for path in files if path.suffix.lower() in kinds]
    captions = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    pairs = []
    skipped = []
    with_options = []
    for path in images:
        try:
            caption = read_caption(captions.get(path.stem, path.with_suffix(".txt")))
        except ValueError as error:
            skipped.append(f"{path.name}: {error}")
            continue
        pairs.append((path, caption))
        if OPTION.search(caption):
            with_options.append(path.stem + ".txt")

    notes = []
    without_image = sorted(captions.keys() - {path.stem for path in images})
    if without_image:
        names = first_few([captions[stem].name for stem in without_image])
        count = counted(without_image, "caption")
        notes.append(
            f"ignored {count} without an image ({names}): add the images if they should be there"
        )
    if with_options:
        names = first_few(with_options)
        notes.append(
            f"kept {counted(with_options, 'caption')} with options like --ar 16:9, which"
            f" are trained on as words ({names}): remove them from the text"
        )
    if folders:
        below = [path for sub in folders for path in sub.rglob("*")]
        inside = [path for path in below if path.suffix.lower() in kinds]
        names = first_few([path.name for path in folders])
        notes.append(
            f"did not search {counted(folders, 'sub-folder')} with"
            f" {counted(inside, 'image')} ({names}): move images and captions up to use"
            " them"
        )
    known = {*images, *captions.values()}
    others = [path for path in files if path not in known]
    if others:
        counts = Counter(path.suffix.lower() or "no suffix" for path in others).most_common()
        names = first_few([f"{number} {suffix}" for suffix, number in counts])
        notes.append(
            f"ignored {counted(others, 'file')} of other kinds ({names}): convert any"
            " images among them to PNG"
        )
    return pairs, skipped, notes


def read_caption(path: Path) -> str:
    """ValueError says why there is none."""
    try:
        caption = tidy(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"it has no caption {path.name}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path.name} can't be read ({error.strerror})") from None
    if not caption:
        raise ValueError(f"{path.name} is empty")
    return caption


@dataclass
class ImageFile:
    path: Path
    fingerprint: list | None = None
    fault: str | None = None
    flat: bool = False  # of one value all over


def check_image(path: Path, caption: str, is_cached: Callable[[list], bool]) -> ImageFile:
    """Check an image; one whose latents are cached is not opened."""
    image = ImageFile(path)
    try:
        image.fingerprint = fingerprint(path)
        if not is_cached([caption, *image.fingerprint]):
            pixels = open_image(path, 64)
            spread = pixels.amax((2, 3)) - pixels.amin((2, 3))
            image.flat = spread.max().item() < 3 / 255  # of [-1, 1]: about one of 255 levels
    except Exception as error:  # Pillow raises exceptions of many kinds
        image.fault = str(error) or type(error).__name__
    return image


def fingerprint(path: Path) -> list:
    """Identify a file by its size and a hash of 256 evenly spaced pieces, 16 MiB in all."""
    size = path.stat().st_size
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for k in range(256):
            file.seek(size * k // 256)
            found.update(file.read(2**16))
    return [size, found.hexdigest()]


def open_image(path: Path, resolution: int) -> Tensor:
    """Image (1, 3, h, w) in [-1, 1], the first frame, cut to the bucket of the nearest shape."""
    image = load_image(str(path), convert_method=on_white)
    buckets = generate_aspect_ratio_buckets(resolution)
    height, width = buckets[find_nearest_bucket(image.height, image.width, buckets)]
    processor = VaeImageProcessor(resample="lanczos")
    return processor.preprocess(image, height, width, resize_mode="crop")


def on_white(image: Image.Image) -> Image.Image:
    """As RGB of 8 bits, transparency composited onto white."""
    if image.mode[0] in "IF":
        image = eight_bits(image)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits a pixel (modes I;16, I and F) in 8 bits; black is 0.

    White is 65535 for 16-bit integers. For others it is the least of 1 (floats only), 255, 65535
    and 2^31 - 1 (integers only) that no value exceeds. Floats may exceed black and white by a
    quarter of the range, as resampled ones do: they are clipped. ValueError for all else.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise ValueError("it has NaN or infinity among its values")
    whites = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    slack = 0.25 if image.mode == "F" else 0.0
    white = next((white for white in whites if high <= (1 + slack) * white), 0)
    if not white or low < -slack * white:
        raise ValueError(f"its values run from {low:g} to {high:g}: save it with 8 or 16 bits")
    return Image.fromarray((255 * (values / white).clip(0, 1)).round().astype(np.uint8))


# ----------------------------------------------------------------------------------- the model card

CARD = """{head}
# {title} in {student_steps} steps

A LoRA of rank {rank}, distilled with SCFM ([arXiv 2510.17858](https://arxiv.org/abs/2510.17858)).
As an adapter of {title} it inherits that model's licence.
{alarm}
In training the base model ran in {precision}: use the same. {layers}

![Teacher in {student_steps} steps, student in {student_steps}, teacher in {fine}](comparison.png)

*Same noise in each column; prompts that were not trained on, not selected.*

## diffusers

```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}
{int8}
# The base model by its name on the Hub, or its folder.
pipe = {pipeline}.from_pretrained({base_model!r}, dtype=torch.{dtype}{quantized}).to("{device}")
pipe.load_lora_weights({out!r}, weight_name="{lora}", adapter_name="scfm")
pipe.set_adapters("scfm", {scale})
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})
image = pipe(prompt="PROMPT", num_inference_steps={student_steps}, guidance_scale={guidance_scale},
             max_sequence_length={max_sequence_length},
             height={resolution}, width={resolution}).images[0]
```

With a second LoRA, name both: `pipe.set_adapters(["scfm", "other"], [{scale}, 1.0])`. Loading the
second one alone switches this one off. To fuse, call `pipe.fuse_lora()` after `set_adapters`, and
without `lora_scale`, which would apply the scale twice.

## ComfyUI

Put `{comfyui_file}` into `models/loras`.

| node | values |
| --- | --- |
| Load LoRA (`LoraLoaderModelOnly`: model only, not the Bypass variant) | strength {scale} |
| the empty latent image | width and height {resolution}, as in training |
| ModelSamplingAuraFlow | shift {shift:g} |
{guidance_node}\
| KSampler | steps {student_steps}, cfg 1, sampler euler, scheduler simple, denoise 1 |

The exact times, for the node ManualSigmas: `{times}`. {no_node}

Not suited: {unsuited}.

## Scale and times for each number of steps

{strengths}

RMSE of latents / PSNR of images (dB) to {fine} steps of the teacher, {samples} samples of held-out
prompts. Two samples of one prompt by the teacher differ by {seed_to_seed:.3f}. The scaled student
has the scales of the last row.

{table}

## How it was made

Saved: the {weights}, after {iterations} iterations.{verdict} A fresh diffusers pipeline with this
file reproduces latents of training to a relative difference of {self_check:.1g}.

## Cost

{costs}

Settings: {list}.
"""

INT8 = """from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

int8 = PipelineQuantizationConfig(
    quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})"""

OWN_STEPS = """
For other numbers of steps distil another student. The scale of this one changes its guidance, too:
at 0 it has none. The last row of the table has the best scales found on validation prompts."""

FADES = 0.003  # relative change of weights below which bfloat16 rounds much of it away


def card(results: dict, out: Path, family: Family, machine: Machine) -> str:
    """The model card."""
    adapter = results["adapter"]
    identity = adapter["settings"]
    N = adapter["student_steps"]
    shift = adapter["shift"]
    scale = adapter["scales"][N]
    dtype = str(machine.dtype).removeprefix("torch.")
    is_int8 = identity["quantize"] == "int8"
    precision = f"int8 (the weights of its transformer, by torchao) and {dtype}"
    low, high = identity["shift_range"]
    no_node = ""
    if low <= family.comfyui_shift <= high:
        no_node = (
            "Without a model sampling node ComfyUI samples at a shift of"
            f" {family.comfyui_shift:.3f}, which lies in the range that this student was trained"
            f" on, {low:g} to {high:g}."
        )
    sentence = f"On the validation prompts, at scale 1: {adapter['note']}."
    shown = recommended(N, adapter["scales"], family)
    missing = set(adapter["uncalibrated"]).intersection(shown)
    is_warning = "WARNING" in sentence or missing
    rows = [["steps", "scale, or strength", "times for ManualSigmas"]]
    for n in shown:
        cell = "none found" if n in missing else adapter["scales"][n]
        rows.append([n, cell, f"`{format_times(n, shift)}`"])
    strengths = as_table(rows)
    guidance_node = f"| FluxGuidance | guidance {adapter['guidance']:g} |\n"
    if family.true_guidance:
        strengths += f"\n{OWN_STEPS}"
        guidance_node = ""
    made_with = [f"{name}: {markdown_code(value)}" for name, value in identity.items()]
    more = {
        "head": card_head(adapter["base_model"], family),
        "title": markdown_code(adapter["base_model"]),
        "alarm": f"\n> Warning. {sentence}\n" if is_warning else "",
        "verdict": "" if is_warning else f" {sentence}",
        "precision": precision if is_int8 else dtype,
        "int8": INT8 if is_int8 else "",
        "quantized": ", quantization_config=int8" if is_int8 else "",
        "layers": family.tools[identity["layers"]],
        "scale": scale,
        "comfyui_file": family.comfyui_file,
        "guidance_node": guidance_node,
        "unsuited": family.unsuited,
        "guidance_scale": 1.0 if family.true_guidance else adapter["guidance"],
        "times": format_times(N, shift),
        "no_node": no_node,
        "strengths": strengths,
        "table": markdown(results),
        "costs": card_costs(results),
        "lora": LORA,
        "fine": results["teacher_steps"],
        "list": ", ".join(made_with),
        "dtype": dtype,
        "device": machine.device,
        "out": out.resolve().name,
    }
    return CARD.format(**results | adapter | more)


def card_costs(results: dict) -> str:
    """Seconds and memory of each phase, on what machine, and what was checked there."""
    rows = [["phase", "time", "peak GPU memory"]]
    for name, phase in results["phases"].items():
        memory = f"{phase['peak_gib']:.1f} GiB" if phase["peak_gib"] else ""
        rows.append([name, duration(phase["seconds"]), memory])
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine.items() if name != "device")
    calls = results["network_calls"]
    words = [
        f"On {machine['device']} with {versions}. Network calls: {calls['iteration']:g} for each"
        " row of an iteration (a backward pass counts as two);"
        f" {calls['teacher']} for an image by {results['teacher_steps']} steps of the teacher,"
        f" {calls['student']} for one by the student."
    ]
    checks = results["adapter"]["checks"]
    if checks:
        found = []
        for name, value in checks.items():
            check = CHECKS[name]
            found.append(f"{check.what} and {check.reference}, {value:.1g}")
        words.append(f"Relative differences before the first iteration: {'; '.join(found)}.")
    change = results["adapter"]["relative_change"]
    words.append(f"The median change of a layer's weights is {change:.2%} of their norm.")
    if change < FADES:
        words.append(
            "Merged into bfloat16 weights, as ComfyUI's Load LoRA does, much of this change is lost"
            " to rounding; in diffusers do not fuse it."
        )
    return "\n".join([as_table(rows), "", *words])


def card_head(base_model: str, family: Family) -> str:
    """The card's YAML; the Hub takes a name of its own as base model, and refuses a folder's."""
    relation = {"base_model": base_model, "base_model_relation": "adapter"}
    data = ModelCardData(
        **(relation if "/" in base_model else {}),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        **family.licence(base_model),
        tags=[*family.tags, "lora", "few-step", "distillation"],
    )
    return f"---\n{data.to_yaml()}\n---"


def format_times(steps: int, shift: float) -> str:
    """Times of a sampler with six significant digits, and without the e of small ones."""
    digits = partial(np.format_float_positional, precision=6, fractional=False, trim="-")
    return ", ".join(map(digits, sc.time_grid(steps, shift).tolist()))


def markdown_code(value) -> str:
    """A value as code in Markdown, whatever characters it holds."""
    text = tidy(str(value)).encode("utf-8", "replace").decode()  # names need not be UTF-8
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


# ------------------------------------------------------------------------------ check of the device


class Check(NamedTuple):
    """Something that a GPU may get wrong without an error."""

    bound: float  # the largest relative difference that is taken for rounding
    what: str
    reference: str
    advice: str


TRY_KERNELS = "try DIFFUSERS_ATTN_BACKEND=_native_math, another version of PyTorch, or no --compile"
TRY_DIFFUSERS = "try another version of diffusers"
PLAIN = "that with PyTorch's plain attention"
CHECKS = {
    "gradient": Check(0.05, "the student's gradient", PLAIN, TRY_KERNELS),
    "teacher": Check(0.25, "the teacher's velocity", "the same in float32", TRY_KERNELS),
    "student": Check(0.25, "the student's velocity", "the same in float32", TRY_KERNELS),
    "pipeline": Check(0.03, "our sampler's result", "the stock pipeline's", TRY_DIFFUSERS),
}
# True guidance g multiplies rounding by up to 2 g - 1: on an H200, at 4, sampler and pipeline were
# 0.036 apart. Whether guidance is applied, and how, shows as well at a mild one.
MILD_GUIDANCE = 1.5


def check_device(settings: Settings, cache: Cache, lora: LoRA) -> dict[str, float]:
    """The relative errors of this device; ends with a sentence if one is too large."""
    found = device_errors(settings, cache, lora)
    for name, value in found.items():
        check = CHECKS[name]
        if not value < check.bound:  # or not a number
            die(
                f"on this device {check.what} differs from {check.reference} by {value:.2g} of its"
                f" size (at most {check.bound:g} is rounding): training would go wrong;"
                f" {check.advice}"
            )
    return found


def device_errors(settings: Settings, cache: Cache, lora: LoRA) -> dict[str, float]:
    """Compare what this device computes with what it should; relative differences.

    All of these errors are silent: finite numbers, and a student that learns something else. The
    LoRA is drawn away from the teacher, so that every weight of it has a gradient.
    """
    data = cache.data
    device = cache.machine.device
    guidance = settings.guidance
    if cache.model.family.true_guidance:
        guidance = min(guidance, MILD_GUIDANCE)
    generator = keyed(settings.seed, "check device")
    # Cropped to 32 x 32 tokens: plain attention takes memory that grows with the square of their
    # number.
    side = 32 * cache.model.family.patch
    x_0 = cache.latent(0)[None, :, :side, :side].to(device)
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    t = torch.full((1,), 0.5, device=device)  # 1000 t is exact in bfloat16
    x_t = sc.interpolate(x_0, noise, t)
    cond = cache.conditions([data.pairs[0].text], guidance)
    weights = lora.loaded_weights()
    count_B = len(weights) - lora.first_B
    weights[lora.first_B :] += 0.01 * torch.randn(count_B, generator=generator).to(device)

    def gradient(rows: int) -> Tensor:
        """Of the mean loss of `rows` equal rows: the same for any number of them."""
        repeat = partial(torch.repeat_interleave, repeats=rows, dim=0)
        many = {name: repeat(x) for name, x in cond.items()}
        v = lora.velocity(weights)(repeat(x_t), repeat(t), **many)
        (v - (noise - x_0)).square().mean().backward()
        holder = torch.empty_like(weights)
        lora.move_gradients(holder, 1.0)
        return holder.grad

    def velocities(dtype: torch.dtype | None) -> list[Tensor]:
        return [lora.velocity(ws, dtype=dtype)(x_t, t, **cond) for ws in (None, weights)]

    def difference(x: Tensor, reference: Tensor) -> float:
        return ((x - reference).norm() / reference.norm()).item()

    @contextmanager
    def plainly():
        """Eager, and with PyTorch's plain attention, whatever DIFFUSERS_ATTN_BACKEND says."""
        with torch.compiler.set_stance("force_eager"), attention_backend("_native_math"):
            yield

    found = {}
    in_use = gradient(settings.batch)
    with plainly():
        lora.recompute(1)
        found["gradient"] = difference(in_use, gradient(1))
        lora.recompute(settings.recompute_every)
    with torch.no_grad():
        ours = velocities(None)
        if not settings.quantize:  # int8 has no float32 to be compared with
            with plainly(), lora.in_float32():
                references = velocities(torch.float32)
            for name, v, reference in zip(("teacher", "student"), ours, references):
                found[name] = difference(v, reference)
    N = settings.student_steps
    shift = settings.shift
    held_out_cond, start = cache.held_out([0], "check")
    held_out_cond["guidance"] = torch.full_like(held_out_cond["guidance"], guidance)
    times = sc.time_grid(N, shift).to(device)
    our_latents = sc.euler_sample(lora.velocity(None), start, times, **held_out_cond)
    lora.use(None)
    stock = stock_sample(cache.model, start, N, held_out_cond, shift, settings.batch, guided=True)
    found["pipeline"] = difference(our_latents, stock)
    return found


# ------------------------------------------------------------------------------ processes and costs


class Machine:
    """The device of this process, and the other processes of the run."""

    def __init__(self):
        gpu = torch.cuda.is_available()
        patience = timedelta(days=1)  # of those that wait while one validates
        state = PartialState(cpu=not gpu, timeout=patience)
        self.device = "cuda" if gpu else "cpu"
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self.process = state.process_index
        self.processes = state.num_processes
        self.lead = state.is_main_process  # it validates, and writes all but the cache

    def add_up(self, *tensors: Tensor) -> None:
        """Sum each tensor over all processes, in place; a barrier."""
        if self.processes == 1:
            return
        with self.name_lost_process():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
            if self.device == "cuda":
                torch.cuda.synchronize()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; a barrier."""
        flags = torch.tensor([int(flag)], device=self.device)
        self.add_up(flags)
        return flags.item() > 0

    def wait(self) -> None:
        """A barrier: no process continues until all have arrived."""
        self.any(False)

    def collect(self, items: list) -> list:
        """The items of all processes."""
        with self.name_lost_process():
            return gather_object(items)

    @contextmanager
    def name_lost_process(self):
        try:
            yield
        except RuntimeError as error:
            # Printed at once: torchrun is about to end this process, too.
            print(
                f"flux_distill.py: process {self.process} lost another one"
                f" ({type(error).__name__}); the same command resumes from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(1) from None

    def progress(self, items, text: str, **options):
        """A progress bar over the items, shown by one process."""
        quiet = {} if self.lead else {"disable": True}  # False would override TQDM_DISABLE
        return tqdm(items, text, **options | quiet)

    def memory(self) -> float:
        """Total memory in bytes of this GPU, or of the machine without one; inf if unknown."""
        if self.device == "cuda":
            return torch.cuda.get_device_properties("cuda").total_memory
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # Windows
            return math.inf

    def peak_memory(self) -> float | None:
        """Peak GPU memory in GiB since the phase began; None without a GPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None

    def describe(self) -> dict[str, str]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        if self.processes > 1:
            name = f"{self.processes} x {name}"
        packages = ("torch", "diffusers", "transformers")
        return {"device": name} | {package: version(package) for package in packages}


class Costs:
    """Seconds and peak GPU memory (GiB) of each phase, kept in a file over interruptions."""

    def __init__(self, path: Path, machine: Machine):
        self.path = path
        self.machine = machine
        self.phases = {}
        self.running = None
        with suppress(OSError, ValueError, KeyError, TypeError):
            self.phases = dict(json.loads(path.read_text())["phases"])

    @contextmanager
    def phase(self, name: str, resumes: bool = False):
        """Measure what happens inside; a phase that resumes adds to what it took before."""
        if not resumes:
            self.phases.pop(name, None)
        self.running = name
        self.since = time.perf_counter()
        if self.machine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            self.save()
            self.running = None

    def save(self) -> None:
        """Bring the running phase up to date, in the file too."""
        if self.running is None:
            return
        now = time.perf_counter()
        row = self.phases.setdefault(self.running, {"seconds": 0.0, "peak_gib": None})
        row["seconds"] += now - self.since
        self.since = now
        if self.machine.device == "cuda":
            row["peak_gib"] = max(self.machine.peak_memory(), row["peak_gib"] or 0.0)
        if self.machine.lead:
            write_text(self.path, json.dumps(MADE_BY | {"phases": self.phases}, indent=1) + "\n")


def check_memory(settings: Settings, model: Model) -> None:
    """Stop if training would need more memory than there is; nothing is loaded."""
    machine = model.machine
    with torch.device("meta"):
        net = model.family.transformer.from_config(model.family.config)
    parameters = sum(p.numel() for p in net.parameters())
    if parameters > 1e9 and machine.device == "cpu":
        die(
            f"--model {model.name} has {parameters / 1e9:.0f} billion parameters and PyTorch sees"
            f" no GPU: use one with {model.family.gpu} (if nvidia-smi shows one, its driver is"
            f" older than 580: pip install 'torch<2.11'), or try --model {model.family.tiny} here"
        )
    bytes_each = machine.dtype.itemsize
    blocks = len(blocks_of(net))
    every = settings.recompute_every
    recomputed = math.ceil(blocks / every) if every else 0

    base = parameters * (1 if settings.quantize else bytes_each)
    if settings.quantize:  # torchao computes with copies, which autograd keeps in other blocks
        base += parameters * bytes_each * (blocks - recomputed) / blocks
    # Activations kept, as multiples of a block's input: 1 for each block that is recomputed, more
    # for any other, and most while one is recomputed.
    whole, while_recomputed = model.family.kept
    kept = recomputed + whole * (blocks - recomputed) + while_recomputed * (recomputed > 0)
    _, height, width = model.latent_shape(settings.resolution)
    tokens = height * width // model.family.patch**2 + settings.text_tokens
    activations = bytes_each * settings.batch * tokens * net.inner_dim * kept
    layers = linear_layers(net, settings.layers)
    lora = settings.rank * sum(sum(net.get_submodule(name).weight.shape) for name in layers)
    # In float32: student, gradient, two moments, EMAs.
    vectors = 4 + len(decays_of(config_of(settings)))
    need = base + activations + lora * (4 * vectors + 2 * bytes_each)
    have = machine.memory()
    if need > have:
        die(f"training needs about {need / 2**30:.0f} GiB of {have / 2**30:.0f} GiB; {LESS_MEMORY}")


def check_disk(run: Run, state: TrainState) -> None:
    """Ends if checkpoints don't fit on the disk; the old one stays until the new one is whole."""
    vectors = len(state.weights) + len(MOMENTS)
    files = 1 if run.state.exists() else 2
    need = 4e-9 * state.student.numel() * (vectors + 1) * files
    free = shutil.disk_usage(run.out).free / 1e9
    if free < need:
        die(
            f"checkpoints need {need:.1f} GB and --out {run.out} has {free:.1f}: free some space,"
            " give --out on another disk, or a smaller --rank"
        )


def forecast(
    settings: Settings, machine: Machine, validation: Validation, iteration: int, seconds: float
) -> str:
    """What is still to come, in words, from the seconds of one iteration."""
    every_n = sum(settings.all_steps)
    N = settings.student_steps
    call = validation.seconds  # one network call, on all validation rows
    validating = call * (N + every_n)  # a sampling, and a velocity at each step for lam*
    calibrating = call * 11 * (every_n + N)  # ten samplings and lam*; at N for two sets of weights
    teacher_calls = validation.teacher_calls
    comparing = call * (teacher_calls * (settings.teacher_steps + every_n) + 2 * every_n)
    comparing *= validation.compared
    left = range(iteration + 1, settings.iterations + 1)
    due = [i for i in left if i % settings.validate_every == 0 or i == settings.iterations]
    # The first lam* also follows the teacher's path, by 16 velocities a step.
    training = len(left) * seconds + len(due) * validating + call * teacher_calls * 16 * every_n
    end = datetime.now() + timedelta(seconds=training)
    validations = f"{counted(due, 'validation')} of {duration(validating)}"
    words = (
        f"{seconds:.3g} s per iteration; training takes {duration(training)} more, until"
        f" {end:%a %H:%M}, with {validations}; calibration then takes about"
        f" {duration(calibrating)} and comparison {duration(comparing)}; a row of an iteration"
        f" takes {validation.network_calls['iteration']:g} network calls"
    )
    if machine.device != "cuda":
        return words
    peak = machine.peak_memory()
    have = machine.memory() / 2**30
    words += f"; peak memory {peak:.1f} of {have:.1f} GiB"
    if peak > 0.95 * have:
        words += f". WARNING: that is nearly all, and may not last; {LESS_MEMORY}"
    return words


# ------------------------------------------------------------------------------------- stop signals


@contextmanager
def on_stop(handler):
    """Call `handler` on stop signals. Ignored signals stay ignored, as under nohup.

    In a thread that is not the main one, signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        kind = getattr(signal, name, None)  # Windows lacks the last
        if kind and signal.getsignal(kind) not in (signal.SIG_IGN, None):
            before[kind] = signal.signal(kind, handler)
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def stop_now(*_):
    raise KeyboardInterrupt


@contextmanager
def interruptible():
    """A list that a stop signal fills, instead of ending the process during an iteration."""
    asked = []

    def ask(*_):
        asked.append(True)
        with suppress(OSError):  # a terminal that hung up
            os.write(2, b"\nstopping after this iteration\n")  # safe during any other writing

    with on_stop(ask):
        yield asked


# -------------------------------------------------------------------------------------------- files

MADE_BY = {"made_by": "flux_distill.py"}  # in each safetensors file that this program writes


@contextmanager
def atomic(path: Path):
    """Write to the path that this yields: it becomes `path` whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.environ.get('RANK', 0)}-{path.name}")
    try:
        part.touch()
        mode = part.stat().st_mode  # of any new file here; safetensors would leave 600
        yield part
        if part.stat().st_mode != mode:
            part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.filename in (None, part, str(part)):
            error.filename = str(path)
        raise
    except SafetensorError as error:  # it has the system's error only in its text
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, "utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    text = {name: json.dumps(value) for name, value in metadata.items()}
    text |= {"format": "pt"} | MADE_BY
    with atomic(path) as part:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, part, text)


def header(path: Path) -> dict | None:
    """Metadata in the header of a safetensors file, as text; None: there is no such header.

    OSError if the file can't be read, for which safe_open would say that it does not exist.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, 10**8))  # safetensors allows no longer header
    try:
        return dict(json.loads(text).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError):
        return None


def is_ours(path: Path) -> bool:
    return path.exists() and MADE_BY.items() <= (header(path) or {}).items()


def has_costs(out: Path) -> bool:
    """Whether costs.json is ours. A run that stops early leaves nothing else."""
    try:
        return MADE_BY.items() <= json.loads((out / "costs.json").read_text()).items()
    except (OSError, ValueError, AttributeError):
        return False


def read_metadata(path: Path) -> dict:
    """What write_tensors was given; {} if there is no such file or it is damaged.

    A file that can't be read raises OSError; one that this program did not write is refused.
    """
    texts = header(path) if path.exists() else None
    if texts is None:
        return {}
    if not MADE_BY.items() <= texts.items():
        die(
            f"{path} was not written by this program and is left alone: move it, or give another"
            " --out"
        )
    try:
        with safe_open(path, "pt"):  # the tensors fit the header
            names = texts.keys() - MADE_BY.keys() - {"format"}
            return {name: json.loads(texts[name]) for name in names}
    except (ValueError, SafetensorError):
        return {}


def refuse_others(out: Path) -> None:
    """Stop rather than replace a file that this program did not write.

    Its safetensors files and costs.json say who wrote them. The other files of a run can't: they
    are taken for ours if one of those is there and ours.
    """
    known = (out / LORA, out / COMFYUI_LORA, out / STATE)
    for path in known:
        read_metadata(path)  # ends if it is not ours
    others = [out / name for name in OUTPUTS if (out / name).exists()]
    ours = (*known, *out.glob("cache/*.safetensors"))
    if others and not any(map(is_ours, ours)) and not has_costs(out):
        die(
            f"{others[0]} is not from a run of this program and is left alone: move it, or give"
            " another --out"
        )


@contextmanager
def lock_out_folder(out: Path, machine: Machine):
    """Keep other runs out of --out, and remove partial files of killed ones.

    The system releases the lock with the process, however that ends. Several processes of one run
    share the lead's. Without fcntl (Windows), or on a disk without locks, there is none.
    """
    taken = False
    with ExitStack() as stack:
        if machine.lead and fcntl:
            try:
                path = out / ".lock"
                # A lock file of another user will do: locking needs no write access.
                with suppress(PermissionError):
                    path.touch()
                file = stack.enter_context(open(path))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_parts(out)
            except BlockingIOError:
                taken = True
            except OSError:
                pass
        if machine.any(taken):
            die(f"another run is using --out {out}: wait until it ends, or give another --out")
        yield


def remove_parts(out: Path) -> None:
    """Remove temporary files: ours, and those that safetensors renames when they are whole."""
    for folder in (out, out / "cache", out / "checkpoint", out / "validation"):
        for path in folder.glob(".*"):
            if re.fullmatch(r"\.part-\d+-.+|\.tmp[0-9A-Za-z]{6}", path.name):
                path.unlink(missing_ok=True)
    for path in (out / "samples").glob(".part-*"):  # --sample takes no lock: one may be at work
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


@contextmanager
def explain(sentence: str, *kinds: type[Exception]):
    """End with a sentence, not a traceback, on these errors; main explains out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        die(f"{sentence} ({type(error).__name__})")


def in_words(error: OSError, out: Path) -> str:
    """What the system refused, and the way out."""
    full = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name)]
    if error.errno in full:
        return f"the disk of --out {out} is full: free some space, then {REPEAT}"
    file = error.filename or f"--out {out}"
    if error.errno == errno.EFBIG:
        return (
            f"{file} would exceed the size limit for files: raise it (ulimit -f), or give --out"
            " on another disk"
        )
    if isinstance(error, PermissionError):
        return (
            f"you are not allowed to read or write {file}: correct its permissions, then {REPEAT}"
        )
    reason = str(error.strerror or error) or type(error).__name__
    return f"{file}: {reason.splitlines()[0]}. Once that is fixed, {REPEAT}"


# ------------------------------------------------------------------------------------ small helpers


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def keyed(*key) -> torch.Generator:
    """A generator for each key: no draw depends on what was drawn before, or on which machine."""
    return torch.Generator().manual_seed(int(digest(key)[:15], 16))


def stacked(entries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


def in_batches(size: int, call: Callable[..., Tensor], *tensors: Tensor, **cond: Tensor) -> Tensor:
    """call(*tensors, **cond) on at most `size` rows at a time."""
    rows = len(tensors[0])
    if rows <= size:
        return call(*tensors, **cond)
    parts = []
    for start in range(0, rows, size):
        part = slice(start, start + size)
        of_part = {name: value[part] for name, value in cond.items()}
        parts.append(call(*(x[part] for x in tensors), **of_part))
    return torch.cat(parts)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def tidy(text: str) -> str:
    return " ".join(text.split())


def counted(things: Sized | int, noun: str) -> str:
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_few(names: list[str], separator: str = ", ", most: int = 20) -> str:
    """The first names, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join([*names[:most], *more])


def listed(numbers) -> str:
    """2, 3 or 4"""
    *others, last = map(str, sorted(numbers))
    return f"{', '.join(others)} or {last}" if others else last


def duration(seconds: float) -> str:
    """In words: 45 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
