"""Distil FLUX.1-dev into a few-step sampler: a LoRA by SCFM (arXiv 2510.17858), see shortcut.py.

    cache      prompt embeddings and latents, so that the encoders can leave memory
    train      one LoRA on a frozen base; the student and its average are float32, outside it
    calibrate  the scale of the LoRA for each number of steps; the student or its slow average
    compare    with the teacher on held-out prompts, from the saved file in a stock pipeline

Each phase is skipped when its result is in --out and fits the settings; after an interruption the
same command goes on. Latents are packed, (B, tokens, channels), as the transformer takes them.
"""

# ruff: noqa: E402
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
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from argparse import RawDescriptionHelpFormatter as RawFormatter
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

FLUX = "black-forest-labs/FLUX.1-dev"
FINE = 32  # steps of the teacher that stand for all of its quality
MOST_STEPS = 16  # that windows can be matched to: half of FINE
TEXT_TOKENS, MOST_TEXT_TOKENS = 256, 512  # of T5: by default, and the longest text it knows
OPTION = re.compile(r"(?<!\S)--[A-Za-z]\S*")  # in prompts for other tools: --w 1024, --ar 16:9
SAMPLING = """model out sample student_steps resolution guidance shift seed batch quantize
text_tokens"""  # the settings that --sample obeys


def die(sentence: str):
    raise SystemExit(f"flux_distill.py: {sentence}")


def refuse_options(prompt: str, where: str) -> None:
    option = OPTION.search(prompt)
    if option:
        die(f"{where} has the option {option.group()}: prompts take no options here, remove it from"
            " the text (size, guidance and seed are flags of the command)")  # fmt: skip


# ----------------------------------------------------------------------------------------- settings


class Help(ArgumentDefaultsHelpFormatter, RawFormatter):
    pass


def at_least(low: float, unit: int = 1, high: float = math.inf):
    """An argparse type: a number of low's kind, finite; integers are multiples of unit."""

    def number(text: str) -> float:
        if not low <= (value := type(low)(text)) < math.inf:
            raise ArgumentTypeError(f"{text} must be at least {low}")
        if value > high:
            raise ArgumentTypeError(f"{text} must be at most {high}")
        if type(low) is int and value % unit:
            raise ArgumentTypeError(f"{text} must be a multiple of {unit}")
        return value

    return number


def parse(argv: list[str] | None) -> Namespace:
    """Settings of the command line; needs none of the slow imports."""
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    count, number, positive = at_least(1), at_least(0), at_least(1e-9)
    shift = at_least(1e-3, high=1e3)  # further out float32 has no times between 0 and 1
    # fmt: off
    add = parser.add_argument_group("what").add_argument
    add("--model", default=FLUX, help="a FluxPipeline: name on the Hub, or folder")
    add("--images", type=Path, metavar="DIR", help="train on these, with captions in NAME.txt")
    add("--prompts", type=Path, metavar="FILE", help="one a line; default: 24 built-in. Without"
        " --images the teacher makes what is trained on")
    add("--held-out", type=at_least(2), default=12, metavar="K",
        help="never train on the last K prompts: a third validates, the rest compares")
    add("--noises", type=at_least(2), default=2, metavar="K", help="for each of those")
    add("--limit", type=number, default=0, metavar="K", help="train on the first K pairs; 0: all")
    add("--resolution", type=at_least(16, 16), default=512, help="pixels, a multiple of 16")
    add("--text-tokens", type=count, default=TEXT_TOKENS, metavar="K",
        help=f"of T5 for a prompt or caption, at most {MOST_TEXT_TOKENS}; longer texts are cut")
    add("--out", type=Path, default=Path("flux_out"), help="folder for all that is written")
    add("--sample", nargs="+", metavar="PROMPT", help="only render these, by the adapter in --out;"
        " also --student-steps, --resolution, --guidance, --shift are by default as it was made")
    add = parser.add_argument_group("method").add_argument
    add("--student-steps", type=at_least(1, high=1000), default=3, metavar="N",
        help="step count to build for")
    add("--paper", action="store_true", help="the paper's windows and share, whatever N is")
    add("--shift-range", type=shift, nargs=2, default=(2.5, 4.5), metavar=("LOW", "HIGH"),
        help="of the time shift in training; its middle is what the windows are matched to")
    add("--shift", type=shift, default=3.0, help="of time in sampling; see --shift-range")
    add("--guidance", type=at_least(0.0), default=3.5,
        help="of sampling; training draws it from [0, 8]")
    add = parser.add_argument_group("training").add_argument
    add("--iterations", type=count, default=3000, help="optimizer steps")
    add("--batch", type=count, default=8, help="pairs in a pass through the network")
    add("--accumulate", type=count, default=1, metavar="K", help="passes in an optimizer step")
    add("--learning-rate", type=positive, default=2e-5, help="of AdamW")
    add("--warmup", type=number, default=0, metavar="K", help="iterations up to that rate")
    add("--rank", type=count, default=64, help="of the LoRA")
    add("--layers", choices=("blocks", "all"), default="blocks",
        help="linear layers with a LoRA: those inside the blocks, which every tool loads, or all")
    add("--recompute-every", type=number, default=1, metavar="K",
        help="recompute every K-th block in the backward; 1: all, least memory; 0: none")
    add("--compile", action="store_true", help="compile the blocks: minutes at first")
    add("--quantize", choices=("int8",), help="frozen base in int8, half as large; by torchao")
    add("--seed", type=at_least(0, high=2**63 - 1), default=0, help="of all that is drawn")
    add("--validate-every", type=count, default=100, metavar="K", help="iterations")
    add("--checkpoint-every", type=count, default=100, metavar="K", help="iterations")
    add("--stop-when-matched", action="store_true", help="end at lam* of 1.05, or when it stalls")
    # fmt: on
    args = parser.parse_args(argv)
    args.given = given(parser, argv, args)
    refuse_useless(parser, args)
    low, high = args.shift_range
    if low > high:
        parser.error(f"--shift-range {low:g} {high:g}: give the lower end first")
    if args.student_steps > MOST_STEPS and not args.paper and not args.sample:
        parser.error(f"--student-steps {args.student_steps} must be at most {MOST_STEPS}, half of"
                     " the teacher's 32")  # fmt: skip
    if args.quantize and not find_spec("torchao"):
        parser.error("--quantize int8 needs torchao: pip install torchao")
    if args.quantize and args.compile:
        parser.error("--compile does not work with --quantize: leave one of them out")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    return args


def given(parser: ArgumentParser, argv: list[str] | None, args: Namespace) -> set[str]:
    """Names of the settings that flags gave: argparse keeps what a namespace holds already."""
    blank = Namespace(**dict.fromkeys(vars(args)))
    parsed = vars(parser.parse_args(argv, blank))
    return {name for name, value in parsed.items() if value is not None}


def refuse_useless(parser: ArgumentParser, args: Namespace) -> None:
    """No flag is ignored in silence."""
    if args.text_tokens > MOST_TEXT_TOKENS:
        parser.error(f"--text-tokens {args.text_tokens}: Flux knows texts of at most"
                     f" {MOST_TEXT_TOKENS} tokens, give at most that")  # fmt: skip
    if args.sample:
        names = sorted(args.given - set(SAMPLING.split()))
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        if flags:
            parser.error(f"--sample only renders, and {flags} would change nothing: leave out all"
                         " flags of training")  # fmt: skip
        for prompt in args.sample:
            refuse_options(prompt, f"--sample '{prompt[:60]}'")
    if args.warmup > args.iterations:
        parser.error(f"--warmup {args.warmup} ends after the last of --iterations"
                     f" {args.iterations}, before --learning-rate is reached: give a shorter"
                     " --warmup")  # fmt: skip
    if args.stop_when_matched and args.validate_every >= args.iterations:
        parser.error("--stop-when-matched looks at validations, and --validate-every"
                     f" {args.validate_every} has none before the last of --iterations"
                     f" {args.iterations}: give a smaller --validate-every")  # fmt: skip


def stop_before_main(*_):
    os.write(2, b"\nflux_distill.py: stopped before anything was begun\n")
    os._exit(1)


if __name__ == "__main__":
    parse(None)  # --help and wrong flags are answered before the imports below take their seconds
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for a command that ends in &
        signal.signal(signal.SIGINT, stop_before_main)

import numpy as np
import torch
import torch.distributed as dist

if "ipykernel" not in sys.modules:  # a notebook's backend stays in the notebook: no figure needs it
    os.environ.pop("MPLBACKEND", None)
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # they advise packages that Flux needs not
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import free_memory, generate_aspect_ratio_buckets
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub import errors as hub
from transformers import CLIPTextModel, T5EncoderModel

import shortcut as sc

# The backward of cuDNN's attention, which PyTorch 2.11 and newer prefer on H100 and H200, gives
# wrong gradients there: finite and 800 times too large, or NaN. Here, so that it holds for all
# who call the network through this module.
torch.backends.cuda.enable_cudnn_sdp(False)

LORA = "pytorch_lora_weights.safetensors"
OUTPUTS = (
    "README.md", "log.csv", "results.json", "costs.json", "training.png", "comparison.png",
)  # fmt: skip
MADE_BY = {"made_by": "flux_distill.py"}  # in each safetensors file that this program writes
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
DISK_FULL = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name)]
STEPS = (2, 3, 4, 6, 8)  # watched while training, calibrated and compared; with --student-steps
SCALES = (0.05, 8.0)  # of the LoRA, searched between these; one of them itself is no best scale
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
TEXT_SIDE = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2")
MAX_GUIDANCE, POOL_GUIDANCE = 8.0, 3.5  # training draws it from [0, 8]; for what the teacher draws
TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1))  # what it sets, and what holds without it
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
VERSION = 2  # of what training does and of the checkpoint's form: no other version is resumed
SMALLER = """what helps, in this order: --recompute-every 1, --batch 4 \
--accumulate 2 (down to --batch 1), --rank 16, --quantize int8, --resolution 256"""
LOWER = "distil with a lower --learning-rate in another --out"  # what helps a diverged student
PROMPTS = """a red fox asleep in fresh snow, soft morning light; a bowl of ramen, seen from above
an old fisherman mending a net, black and white; a lighthouse on a cliff in a storm, oil painting
a hand-painted shop sign that says "FRESH BREAD"; a city street at night in the rain, neon lights
an astronaut playing chess with a cat, watercolour; a glass teapot with blooming tea, macro
a crowd at a summer music festival, wide angle; a tiny library with a spiral stair, isometric
a hummingbird at a purple flower, wings blurred; a knight in worn armour under a cherry tree
a yellow taxi before a white brick wall; a map of an imaginary island, ink on old paper
two children running along a beach at sunset; a green sports car on a mountain pass, motion blur
a cup of coffee beside an open notebook; a dragon made of origami paper on a desk
an elderly woman laughing, close-up, natural light; a wooden cabin by a lake under the Milky Way
a corgi in a raincoat jumping over a puddle; a marble statue overgrown with ivy in a ruined temple
a robot watering plants on a balcony, pencil drawing; a plate of strawberries, still life"""


@contextmanager
def explain(sentence: str, *kinds: type[Exception]):
    """End with a sentence, not a traceback, on these errors; out of memory is main's to explain."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        die(f"{sentence} ({type(error).__name__})")


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def keyed(*key) -> torch.Generator:
    """A generator for each key: no draw depends on what was drawn before, or on which machine."""
    return torch.Generator().manual_seed(int(digest(key)[:15], 16))


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# -------------------------------------------------------------------------------------------- files


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
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path), int(code[1])) from error
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


def read_metadata(path: Path) -> dict:
    """What write_tensors was given; {} if there is no such file or it is damaged.

    A file that can't be read raises OSError; one that this program did not write is refused.
    """
    texts = header(path) if path.exists() else None
    if texts is None:
        return {}
    if not MADE_BY.items() <= texts.items():
        die(f"{path} was not written by this program and is left alone: move it, or give another"
            " --out")  # fmt: skip
    try:
        with safe_open(path, "pt"):  # the tensors fit the header
            names = texts.keys() - MADE_BY.keys() - {"format"}
            return {name: json.loads(texts[name]) for name in names}
    except (ValueError, SafetensorError):
        return {}


def refuse_others(args: Namespace) -> None:
    """Nothing that this program did not write is replaced.

    Its safetensors files say who wrote them. The other files of a run can't: they are taken for
    ours if there is also an adapter, a checkpoint or a file of the cache that is ours. A run
    writes to its cache first, and a finished one keeps its adapter.
    """
    for path in (args.lora, args.state):
        read_metadata(path)
    others = [args.out / name for name in OUTPUTS if (args.out / name).exists()]
    ours = (args.lora, args.state, *args.out.glob("cache/*.safetensors"))
    if others and not any(map(is_ours, ours)):
        die(f"{others[0]} is not from a run of this program and is left alone: move it, or give"
            " another --out")  # fmt: skip


@contextmanager
def alone(args: Namespace):
    """Keep other runs out of --out, and remove what killed ones left half written.

    The system releases the lock with the process, however that ends. Several processes of one run
    share the lead's. Without fcntl (Windows), or on a disk without locks, there is none.
    """
    taken = False
    with ExitStack() as stack:
        if args.lead and fcntl:
            try:
                path = args.out / ".lock"
                with suppress(PermissionError):  # another user's will do: a lock needs no writing
                    path.touch()
                file = stack.enter_context(open(path))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_parts(args.out)
            except BlockingIOError:
                taken = True
            except OSError:
                pass
        refused = torch.tensor([int(taken)], device=args.device)
        add_up(args, refused)
        if refused.item():
            die(f"another run is using --out {args.out}: wait until it ends, or give another --out")
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


def file_print(path: Path) -> list:
    """Tells a file from another: its size and a hash of 16 pieces of it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        pieces = [file.read(2**19) for k in range(16) if file.seek(size * k // 16) >= 0]
    return [size, hashlib.sha256(b"".join(pieces)).hexdigest()]


# -------------------------------------------------------------------------------- what a run costs


class Costs:
    """Seconds and peak GPU memory (GiB) of each phase, kept in a file over interruptions."""

    def __init__(self, path: Path, device: str, lead: bool):
        self.path = path
        self.device = device
        self.lead = lead
        self.phases = {}
        self.running = None
        with suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            self.phases = found if isinstance(found, dict) else {}

    def peak(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None

    @contextmanager
    def phase(self, name: str, resumes: bool = False):
        """Measure what happens inside; a phase that resumes adds to what it took before."""
        if not resumes:
            self.phases.pop(name, None)
        self.running = name
        self.since = time.perf_counter()
        if self.device == "cuda":
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
        if self.device == "cuda":
            row["peak_gib"] = max(self.peak(), row["peak_gib"] or 0.0)
        if self.lead:
            write_text(self.path, json.dumps(self.phases, indent=1) + "\n")


def machine(device: str) -> dict[str, str]:
    """What a run on "cuda" or "cpu" runs on."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    packages = ("torch", "diffusers", "transformers")
    return {"device": name} | {package: version(package) for package in packages}


def duration(seconds: float) -> str:
    """In words: 45 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def forecast(args: Namespace, validation, iteration: int, seconds: float) -> str:
    """What is still to come, in words, from the seconds of one iteration."""
    every_n, N = sum(args.steps), args.student_steps
    call = validation.seconds  # one network call, on all validation rows
    validate = call * (N + 2 * every_n)  # a sampling, and two velocities at each step for lam*
    calibrate = call * 12 * (every_n + N)  # ten samplings and lam*; at N for two sets of weights
    fraction = len(args.comparison) / len(args.validation)
    compare = call * (FINE + 3 * every_n) * fraction
    left = range(iteration + 1, args.iterations + 1)
    times = len([i for i in left if i % args.validate_every == 0 or i == args.iterations])
    # The first lam* also takes the teacher's mean velocities, 16 calls a step.
    training = len(left) * seconds + times * validate + call * 16 * every_n
    end = datetime.now() + timedelta(seconds=training)
    words = (f"{seconds:.3g} s an iteration; training takes {duration(training)} more, until"
             f" {end:%a %H:%M}, with {times} validations of {duration(validate)}; calibration then"
             f" takes about {duration(calibrate)} and comparison {duration(compare)}")  # fmt: skip
    if args.device != "cuda":
        return words
    peak, card = args.costs.peak(), card_memory() / 2**30
    words += f"; peak memory {peak:.1f} of {card:.1f} GiB"
    if peak > 0.95 * card:
        words += f". ALARM: that is nearly all, and may not last; {SMALLER}"
    return words


def check_disk(args: Namespace, parameters: int) -> None:
    """Up to six float32 numbers a parameter in a checkpoint, in the old and in the new file."""
    need = 4e-9 * parameters * (6 if args.paper else 5) * (1 if args.state.exists() else 2)
    free = shutil.disk_usage(args.out).free / 1e9
    if free < need:
        die(f"checkpoints need {need:.1f} GB and --out {args.out} has {free:.1f}: free some space,"
            " give --out on another disk, or a smaller --rank")  # fmt: skip


# -------------------------------------------------------------------- the model, checked and loaded


REFUSALS = (  # the first that fits an error on the way to a model
    (hub.GatedRepoError, "is gated: accept its licence at https://huggingface.co/{0}, run `hf auth"
     " login` (a fine-grained token needs access to gated repositories), and start again"),
    ((hub.RepositoryNotFoundError, hub.HFValidationError),
     "is no folder here and no public model on the Hub (private: `hf auth login`)"),
    ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled),
     "is no folder here and the Hub can't be reached: give a folder, or go online"),
    (PermissionError, "has files, here or in the Hub's"
     " cache, that you are not allowed to read or write: correct their permissions"),
    ((hub.EntryNotFoundError, FileNotFoundError, ValueError, KeyError, TypeError),
     "is not a whole diffusers pipeline: it needs a model_index.json, transformer/ and vae/"),
    (Exception, "can't be reached: go online, or give a folder"),  # whatever networks come up with
)  # fmt: skip


def locate(args: Namespace) -> Path:
    """Folder of the model: checked to be a Flux that this machine can train, then downloaded."""
    folder, name = Path(args.model), f"--model {args.model}"
    get = folder.joinpath if folder.is_dir() else partial(hf_hub_download, args.model)
    files = ("model_index.json", "transformer/config.json", "vae/config.json")
    try:
        index, config, vae = (json.loads(Path(get(file)).read_text()) for file in files)
        kind, args.channels = index["_class_name"], config["in_channels"]
        # All halvings but one are the VAE's; the last makes a token of 2 x 2 latents.
        halvings = len(vae["block_out_channels"])
    except Exception as error:
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        # The Hub's library reports a token without access as a file that can't be found.
        error = hub.GatedRepoError if status in (401, 403) else type(error)
        words = next(words for kinds, words in REFUSALS if issubclass(error, kinds))
        die(f"{name} {words.format(args.model)}")
    if kind != "FluxPipeline":
        die(f"{name} is a {kind}: this distils a FluxPipeline, FLUX.1-dev or a tune of it")
    if not config.get("guidance_embeds"):
        die(f"{name} takes no guidance: FLUX.1-schnell and its like sample in 4 steps already")
    if args.sample:
        follow_adapter(args)
    args.size = (args.resolution // 2**halvings,) * 2
    if not args.sample:
        check_memory(args, config)
    with explain(f"{name} can't be downloaded; with network and disk for 34 GB the same command"
                 " goes on", Exception):  # fmt: skip
        return folder if folder.is_dir() else Path(FluxPipeline.download(args.model))


def check_memory(args: Namespace, config: dict) -> None:
    """Estimate what training takes, before anything is loaded."""
    with torch.device("meta"):
        net = FluxTransformer2DModel.from_config(config)
    parameters, gpu = sum(p.numel() for p in net.parameters()), args.device == "cuda"
    if parameters > 1e9 and not gpu:
        die(f"--model {args.model} has {parameters / 1e9:.0f} billion parameters and PyTorch sees"
            " no GPU: use one of 48 GB or more (if nvidia-smi shows one, its driver is older than"
            " 580: pip install 'torch<2.11'), or try --model tests/tiny_flux here")  # fmt: skip
    lora = args.rank * sum(sum(net.get_submodule(name).weight.shape) for name in targets(args, net))
    blocks, width = len([*net.transformer_blocks, *net.single_transformer_blocks]), 2 if gpu else 4
    recomputed = math.ceil(blocks / args.recompute_every) if args.recompute_every else 0
    # Activations kept for a token, of its width: the input of a recomputed block, about 28 of any
    # other, and 45 while a block is recomputed.
    kept = recomputed + 28 * (blocks - recomputed) + 45 * (recomputed > 0)
    tokens = args.batch * (math.prod(args.size) + args.text_tokens)
    base = parameters * (1 if args.quantize else width)
    if args.quantize:  # torchao computes with copies, which autograd keeps in other blocks
        base += parameters * width * (blocks - recomputed) / blocks
    lists = 6 if args.paper else 5  # student, gradient, two moments, averages, in float32
    need = base + width * tokens * kept * net.inner_dim + lora * (4 * lists + 2 * width)
    have = card_memory() if gpu else machine_memory()
    if need > have:
        die(f"training needs about {need / 2**30:.0f} GiB of {have / 2**30:.0f} GiB; {SMALLER}")


def local_rank() -> int:
    """Which card of its machine is this process's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def card_memory() -> int:
    """Bytes of this process's card."""
    return torch.cuda.get_device_properties(local_rank()).total_memory


def machine_memory() -> float:
    """In bytes; infinite where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def load(args: Namespace, part: str) -> FluxPipeline:
    """The stock pipeline's "text" or "image" side, or "fresh": an image side as on disk.

    One is in memory at a time.
    """
    if args.loaded[0] != part:
        args.loaded, args.validator = (None, None), None
        free_memory()
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        absent = ("transformer", "vae") if part == "text" else TEXT_SIDE
        more, kinds = dict.fromkeys(absent), (OSError, ValueError, RuntimeError, SafetensorError)
        if args.quantize and part != "text":
            more["quantization_config"] = int8()
        whole = explain(f"--model {args.model} can't be loaded: is it complete?", *kinds)
        with name_missing_package(args), whole:
            for name in TEXT_ENCODERS.keys() - absent:  # by default made up if the file lacks some
                more[name], info = TEXT_ENCODERS[name].from_pretrained(
                    args.folder / name, dtype=dtype, output_loading_info=True
                )
                if missing := info["missing_keys"]:
                    die(f"--model {args.model}: {name} lacks {len(missing)} weights that this"
                        " version of transformers wants: try a newer one")  # fmt: skip
            pipe = FluxPipeline.from_pretrained(args.folder, dtype=dtype, **more)
        pipe.to(args.device)
        pipe.set_progress_bar_config(disable=True)
        set_shift(pipe, args.shift)
        args.loaded = (part, pipe)
    return args.loaded[1]


@contextmanager
def name_missing_package(args: Namespace):
    """A quantised base needs the package that it was quantised with."""
    try:
        yield
    except ImportError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        die(f"--model {args.model} needs a package that is missing ({reason}): install it and start"
            " again")  # fmt: skip


def int8():
    """Weights of the transformer in int8 (torchao); computing and LoRA as without it."""
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    mapping = {"transformer": TorchAoConfig(Int8WeightOnlyConfig())}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def set_shift(pipe: FluxPipeline, shift: float) -> None:
    """With num_inference_steps alone it then takes the times of sc.time_grid(steps, shift)."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_dynamic_shifting=False, shift=shift
    )


def targets(args: Namespace, net: FluxTransformer2DModel) -> list[str]:
    """Linear layers that get a LoRA: those inside the blocks, or all."""
    names = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    if args.layers == "all":
        return names
    return [name for name in names if "transformer_blocks." in name]


class LoRALinear(torch.nn.Module):
    """A frozen linear layer plus B A x, A (rank, inputs) and B (outputs, rank).

    `switch` is one object that all layers of a network read: while `switch.on` is False, the
    layer is the frozen one alone.
    """

    def __init__(self, base: torch.nn.Linear, A: Tensor, B: Tensor, switch: Namespace):
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
        # Added in place: no gradient needs the base's output. It must not be a view, of which
        # autograd would make a copy; so the rows are made a matrix before, not after.
        y.addmm_(rows @ self.A.T, self.B.T)
        return y.reshape(*x.shape[:-1], -1)


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


class Adapter:
    """One LoRA on a frozen transformer, in which sets of weights take turns; None: the teacher.

    A set is one float32 vector (P,): first A of every layer, then B of every layer. To load it is
    one copy, next to nothing compared with a call.
    """

    def __init__(self, args: Namespace):
        self.net = load(args, "image").transformer
        self.batch = args.batch
        if not any(isinstance(m, LoRALinear) for m in self.net.modules()):
            self.install(args)
        self.layers = {n: m for n, m in self.net.named_modules() if isinstance(m, LoRALinear)}
        self.params = [m.A for m in self.layers.values()] + [m.B for m in self.layers.values()]
        self.switch = next(iter(self.layers.values())).switch
        self.blocks = [*self.net.transformer_blocks, *self.net.single_transformer_blocks]
        self.recompute(args.recompute_every)
        if args.compile and self.blocks[0]._compiled_call_impl is None:
            # A graph for each of teacher, EMA and student, in each kind of block and shape.
            torch._dynamo.config.cache_size_limit = 64  # the older of its two names
            self.net.compile_repeated_blocks()

    def install(self, args: Namespace) -> None:
        """Freeze the network and put a LoRA around its linear layers: A normal, B zero."""
        self.net.requires_grad_(False)
        self.net.pos_embed = RotaryCache(self.net.pos_embed)
        bases = {name: self.net.get_submodule(name) for name in targets(args, self.net)}
        shapes = [(args.rank, base.in_features) for base in bases.values()]
        shapes += [(base.out_features, args.rank) for base in bases.values()]
        parts = []
        for name, shape in zip(bases, shapes):
            A = torch.randn(shape, generator=keyed(args.seed, "A", name)) / args.rank
            parts.append(A.flatten())
        first_B = sum(map(len, parts))
        parts += [torch.zeros(math.prod(shape)) for shape in shapes[len(bases) :]]
        weights = torch.cat(parts).to(self.net.device, self.net.dtype)
        switch = Namespace(on=False, weights=weights, first_B=first_B)
        # All layers' weights are views of that one vector.
        sizes = [len(part) for part in parts]
        views = [view.view(shape) for view, shape in zip(weights.split(sizes), shapes)]
        for (name, base), A, B in zip(bases.items(), views, views[len(bases) :]):
            self.net.set_submodule(name, LoRALinear(base, A, B, switch))

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
        """Load weights (P,), their change of the network multiplied by `scale`."""
        self.switch.on = weights is not None and scale != 0
        if not self.switch.on:
            return
        self.switch.weights.copy_(weights)
        if scale != 1:
            first = self.switch.first_B
            self.switch.weights[first:] = scale * weights[first:]

    def velocity(
        self, weights: Tensor | None, size: tuple[int, int], dtype: torch.dtype | None = None
    ):
        """Velocity of latents (B, tokens, channels), `size` their rows and columns of tokens.

        A call loads its weights. No other may come between the student's call and its backward.
        The network is fed in `dtype`, by default that of its weights.
        """
        net, device, own = self.net, self.switch.weights.device, self.switch.weights.dtype
        dtype = dtype or own
        ids = FluxPipeline._prepare_latent_image_ids(1, *size, device, dtype)

        def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            if len(x) > self.batch:  # only where there is no backward
                parts = zip(*(v.split(self.batch) for v in (x, t, *cond.values())))
                return torch.cat([velocity(x, t, **dict(zip(cond, c))) for x, t, *c in parts])
            self.use(weights)
            if own != torch.float32:
                t = (1000 * t).to(own) / 1000  # rounded as the stock pipeline rounds
            net.pos_embed.key = (size, cond["text"].shape[1])
            return net(
                hidden_states=x.to(dtype), timestep=t, guidance=cond["guidance"], img_ids=ids,
                encoder_hidden_states=cond["text"].to(dtype),
                pooled_projections=cond["pooled"].to(dtype),
                txt_ids=ids.new_zeros(cond["text"].shape[1], 3),
            ).sample.float()  # fmt: skip

        return velocity

    def move_gradients(self, student: Tensor, fraction: float) -> None:
        """Add a fraction of the LoRA's gradients to the student's, in float32, and clear them."""
        gradient = fraction * torch.cat([p.grad.flatten() for p in self.params]).float()
        student.grad = gradient if student.grad is None else student.grad + gradient
        for p in self.params:
            p.grad = None

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights in the network's type, under the names that stock diffusers reads."""
        names = [f"{name}.lora_{part}.weight" for part in "AB" for name in self.layers]
        parts = weights.to(self.net.dtype).split([p.numel() for p in self.params])
        return {name: x.view_as(p) for name, x, p in zip(names, parts, self.params, strict=True)}

    @torch.no_grad()
    def relative_change(self, weights: Tensor, scale: float) -> float:
        """Median over layers of |scale B A| / |W|, in Frobenius norms."""
        self.use(weights)
        ratios = []
        for layer in self.layers.values():
            A, B, W = layer.A.float(), layer.B.float(), layer.base.weight.dequantize().float()
            change = ((A @ A.T) * (B.T @ B)).sum().sqrt()  # |B A|, without the large matrix
            ratios.append((scale * change / W.norm()).item())
        return float(np.median(ratios))

    @contextmanager
    def in_float32(self):
        """Layers compute in float32, each converted for its call alone: 24 GB stay 24 GB."""
        narrow = {}

        def widen(module, inputs):
            narrow[module] = dict(module.named_parameters(recurse=False))
            for name, p in narrow[module].items():
                setattr(module, name, torch.nn.Parameter(p.float(), requires_grad=False))

        def restore(module, inputs, output):
            for name, p in narrow.pop(module).items():
                setattr(module, name, p)

        hooks = []
        for module in self.net.modules():
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


# ----------------------------------------------------------------------------------- phase 1: cache


def read_prompts(args: Namespace) -> tuple[list[str], list[str]]:
    """All prompts, and the last --held-out different ones, which are not trained on.

    Blank lines and lines that start with # are no prompts.
    """
    lines, source = PROMPTS.replace("; ", "\n").splitlines(), "the built-in list"
    if args.prompts:
        source = f"--prompts {args.prompts}"
        with explain(f"{source} can't be read as a text file: give one in UTF-8, a prompt a line",
                     OSError, UnicodeDecodeError):  # fmt: skip
            lines = args.prompts.read_text("utf-8-sig").splitlines()
    prompts = []
    for number, line in enumerate(map(tidy, lines), 1):
        if line and not line.startswith("#"):
            refuse_options(line, f"{source}, line {number}")
            prompts.append(line)
    different = len({prompt.casefold() for prompt in prompts})
    needed = args.held_out + (not args.images)
    if different < needed:
        die(f"{source} has {different} different prompts, upper and lower case being the same, and"
            f" --held-out {args.held_out} needs {needed}: give --prompts a longer file, or give a"
            " smaller --held-out")  # fmt: skip
    return prompts, list(dict.fromkeys(prompts))[-args.held_out :]


def tidy(text: str) -> str:
    return " ".join(text.split())


def read_images(args: Namespace) -> list[tuple[Path, str, list]]:
    """Images, captions and prints of the images' files; what can't be used is named and counted."""
    if not args.images.is_dir():
        die(f"--images {args.images} is no folder: give one with images, and captions in NAME.txt")
    pairs, skipped, notes = list_images(args.images)
    checked = check_images(args, pairs)
    skipped += [f"{path.name}: {checked[path].fault}" for path, _ in pairs if checked[path].fault]
    pairs = [(*pair, checked[pair[0]].print) for pair in pairs if not checked[pair[0]].fault]
    flat = [path.name for path, *_ in pairs if checked[path].flat]
    if flat:
        notes.append(f"kept {counted(flat, 'image')} of one value all over ({some(flat)}): remove"
                     " what should not be trained on")  # fmt: skip
    if args.lead and skipped:
        print(f"skipped {len(skipped)}, kept {len(pairs)} images; mend these to use them:")
        print("  " + some(skipped, "\n  "))
    if args.lead and notes:
        print(*notes, sep="\n")
    if not pairs:
        die(f"--images {args.images} has no image with a caption: NAME.png goes with NAME.txt")
    return pairs


def list_images(folder: Path) -> tuple[list[tuple[Path, str]], list[str], list[str]]:
    """Images with their captions, why others are skipped, and notes on all else that lies there.

    Hidden files are ignored, sub-folders are not searched.
    """
    Image.init()
    kinds = Image.registered_extensions()
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in visible if path.is_dir()]
    files = [path for path in visible if not path.is_dir()]
    images = [path for path in files if path.suffix.lower() in kinds]
    captions = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    pairs, skipped, with_options = [], [], []
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
    alone = sorted(captions.keys() - {path.stem for path in images})
    if alone:
        names = some([captions[stem].name for stem in alone])
        notes.append(f"ignored {counted(alone, 'caption')} without an image ({names}): add the"
                     " images if they should be there")  # fmt: skip
    if with_options:
        names = some(with_options)
        notes.append(f"kept {counted(with_options, 'caption')} with options like --ar 16:9, which"
                     f" are trained on as words ({names}): remove them from the text")  # fmt: skip
    if folders:
        inside = [path for path in folder.glob("*/**/*") if path.suffix.lower() in kinds]
        names = some([path.name for path in folders])
        notes.append(f"did not search {counted(folders, 'sub-folder')} with"
                     f" {counted(inside, 'image')} ({names}): move images and captions up to use"
                     " them")  # fmt: skip
    known = {*images, *captions.values()}
    others = [path for path in files if path not in known]
    if others:
        counts = Counter(path.suffix.lower() or "no suffix" for path in others).most_common()
        names = some([f"{number} {suffix}" for suffix, number in counts])
        notes.append(f"ignored {counted(others, 'file')} of other kinds ({names}): convert any"
                     " images among them to PNG")  # fmt: skip
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


def counted(things: list, noun: str) -> str:
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"


def some(names: list[str], separator: str = ", ", most: int = 20) -> str:
    """The first names, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join([*names[:most], *more])


def check_images(args: Namespace, pairs: list[tuple[Path, str]]) -> dict[Path, Namespace]:
    """A print of each file, what is wrong with it, and whether it is flat: of one value all over.

    Only images that --out has no latents of are opened, each by one process.
    """
    checked = {}
    mine = pairs[args.process :: args.processes]
    for path, caption in tqdm(mine, "check images", unit="image", **args.quiet):
        found = checked[path] = Namespace(print=None, fault=None, flat=False)
        try:
            found.print = file_print(path)
            if not latent_file(args, latent_key(args, [caption, *found.print])).exists():
                pixels = open_image(path, 64)
                spread = pixels.amax((2, 3)) - pixels.amin((2, 3))
                found.flat = spread.max().item() < 3 / 255  # one of 255 levels
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            found.fault = str(error) or type(error).__name__
    if args.processes == 1:
        return checked
    shares = [None] * args.processes
    with explain(
        f"process {args.process} lost another one; the same command goes on", RuntimeError
    ):
        dist.all_gather_object(shares, checked)
    return {path: found for share in shares for path, found in share.items()}


def open_image(path: Path, resolution: int) -> Tensor:
    """Image (1, 3, H, W) in [-1, 1], the first frame, cut to the bucket of the nearest shape."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = eight_bits(image)
        image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    shape, buckets = math.log(image.height / image.width), generate_aspect_ratio_buckets(resolution)
    height, width = min(buckets, key=lambda b: abs(math.log(b[0] / b[1]) - shape))
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return VaeImageProcessor(do_resize=False).preprocess(image)


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
    whites, slack = [65535], 0.0
    if image.mode == "I":
        whites = [255, 65535, 2**31 - 1]
    if image.mode == "F":
        whites, slack = [1, 255, 65535], 0.25
    white = next((white for white in whites if high <= (1 + slack) * white), 0)
    if not white or low < -slack * white:
        raise ValueError(f"its values run from {low:g} to {high:g}: save it with 8 or 16 bits")
    return Image.fromarray((255 * (values / white).clip(0, 1)).round().astype(np.uint8))


def make_cache(args: Namespace) -> None:
    """Phase 1: prompt embeddings and latents to --out/cache, a file each; whole ones stay.

    A batch is always made of the same entries: its rounding depends on all of them.
    """
    make = {"text": encode_text, "latent": encode_image if args.images else sample_teacher}
    for kind, keys in args.keys.items():
        starts = range(0, len(keys), args.batch)[args.process :: args.processes]
        made = []
        for start in tqdm(starts, f"cache: {kind}s", unit="batch", **args.quiet):
            rows = range(len(keys))[start : start + args.batch]
            paths = [entry(args, kind, i) for i in rows]
            bad = [p for p, i in zip(paths, rows) if read_metadata(p).get("key") != keys[i]]
            for path in filter(Path.exists, bad):
                tqdm.write(f"{path} is damaged: made anew")
            for path, i, tensors in zip(paths, rows, make[kind](args, rows)) if bad else ():
                if path in bad:
                    write_tensors(path, tensors, {"key": keys[i]})
                    made.append(i)
        if kind == "text" and made:
            name_cut_texts(args, made)
        add_up(args, torch.zeros(1, device=args.device))  # wait for all


def latent_key(args: Namespace, item: list) -> str:
    """Identifies latents by all that they are made from."""
    return digest([args.model_print, args.device, args.resolution, *item])


def latent_file(args: Namespace, key: str) -> Path:
    return args.out / "cache" / f"latent-{key}.safetensors"


def entry(args: Namespace, kind: str, i: int) -> Path:
    """File of the cache; its name tells what it was made from."""
    return args.out / "cache" / f"{kind}-{args.keys[kind][i]}.safetensors"


def read(args: Namespace, kind: str, rows) -> dict[str, Tensor]:
    """Entries of the cache, stacked."""
    paths = [entry(args, kind, i) for i in rows]
    entries = [load_file(path) for path in paths]
    stacked = {n: torch.stack([e[n] for e in entries]).to(args.device) for n in entries[0]}
    for tensors in stacked.values():
        finite = tensors.isfinite().flatten(1).all(1)
        if not finite.all():
            path = paths[finite.int().argmin()]
            die(f"{path} holds NaN or infinity: if its text or image is sound, delete it to make it"
                " again; else leave that pair out")  # fmt: skip
    return stacked


@torch.no_grad()
def encode_text(args: Namespace, rows: range):
    """Embeddings of prompts: text (T, D) of T5, pooled (d,) of CLIP."""
    pipe = load(args, "text")
    length = text_length(args, pipe)
    for i in rows:
        text, pooled, _ = pipe.encode_prompt(*[args.texts[i]] * 2, max_sequence_length=length)
        yield {"text": text[0], "pooled": pooled[0]}


def text_length(args: Namespace, pipe: FluxPipeline) -> int:
    """Tokens of T5 that a text is padded or cut to."""
    most = pipe.tokenizer_2.model_max_length
    if "text_tokens" in args.given and args.text_tokens > most:
        die(f"--text-tokens {args.text_tokens} is more than the {most} of the tokenizer of --model"
            f" {args.model}: give at most {most}")  # fmt: skip
    return min(args.text_tokens, most)


def name_cut_texts(args: Namespace, rows: list[int]) -> None:
    """Say which of these texts are longer than the encoder's input."""
    pipe = load(args, "text")
    length, most = text_length(args, pipe), pipe.tokenizer_2.model_max_length
    texts = [args.texts[i] for i in rows]
    sizes = [len(ids) for ids in pipe.tokenizer_2(texts, truncation=False).input_ids]
    cut = [f"{size} tokens: {text[:60]}" for text, size in zip(texts, sizes) if size > length]
    if cut:
        advice = "shorten them"
        if length < min(most, MOST_TEXT_TOKENS):
            advice += f", or give --text-tokens up to {min(most, MOST_TEXT_TOKENS)}"
        title = f"cut {len(cut)} of {counted(texts, 'text')} to {length} tokens; {advice}:"
        # On stderr: what --sample prints on stdout are paths.
        tqdm.write(some([title, *cut], "\n  ", most=6), file=sys.stderr)


@torch.no_grad()
def encode_image(args: Namespace, rows: range):
    """Latents (rows, columns, channels) of images, normalised and packed."""
    vae = load(args, "image").vae
    for i in rows:
        pixels = open_image(args.pairs[i].file, args.resolution).to(vae.device, vae.dtype)
        x = vae.encode(pixels).latent_dist.mode().float() - vae.config.shift_factor
        packed = FluxPipeline._pack_latents(x * vae.config.scaling_factor, *x.shape)
        yield {"latent": packed.reshape(x.shape[2] // 2, x.shape[3] // 2, -1)}


def sample_teacher(args: Namespace, rows: range):
    """Latents (rows, columns, channels) from the teacher, for a pool without images."""
    cond = read(args, "text", [args.pairs[i].text for i in rows])
    cond["guidance"] = torch.full((len(rows),), POOL_GUIDANCE)
    noise = noises(args, [("pool", i) for i in rows])
    set_shift(pipe := load(args, "image"), sum(args.shift_range) / 2)
    latents = sample(args, pipe, cond, noise, FINE)
    set_shift(pipe, args.shift)
    return [{"latent": x.reshape(*args.size, -1)} for x in latents]


def noises(args: Namespace, keys: list[tuple]) -> Tensor:
    """Noise (B, tokens, channels), a draw for each key."""
    shape = (math.prod(args.size), args.channels)
    draws = [torch.randn(shape, generator=keyed(args.seed, *key)) for key in keys]
    return torch.stack(draws).to(args.device)


def held_out(args: Namespace, texts: list[int], purpose: str) -> tuple[dict[str, Tensor], Tensor]:
    """Conditions of these prompts, each --noises times, and as much noise of their own."""
    rows = [(i, k) for k in range(args.noises) for i in texts]
    cond = read(args, "text", [i for i, _ in rows])
    cond["guidance"] = torch.full((len(rows),), args.guidance, device=args.device)
    return cond, noises(args, [(purpose, *row) for row in rows])


def sample(args: Namespace, pipe, cond: dict, noise: Tensor, steps: int) -> Tensor:
    """Latents (B, tokens, channels) from the stock pipeline, --batch at a time, float32."""
    (height, width), latents = (n * 2 * pipe.vae_scale_factor for n in args.size), []
    for i in range(0, len(noise), args.batch):
        rows = slice(i, i + args.batch)
        latents += pipe(
            prompt_embeds=cond["text"][rows], pooled_prompt_embeds=cond["pooled"][rows],
            height=height, width=width, latents=noise[rows], num_inference_steps=steps,
            guidance_scale=cond["guidance"][0].item(), output_type="latent",
        ).images.float()  # fmt: skip
    return torch.stack(latents)


# ----------------------------------------------------------------------------------- phase 2: train


class Validation:
    """Held-out prompts and noises, on which the teacher's answers are kept."""

    def __init__(self, args: Namespace, adapter: Adapter):
        self.args, self.adapter = args, adapter
        self.cond, self.noise = held_out(args, args.validation, "validation")
        teacher = adapter.velocity(None, args.size)
        self.teachers = {n: remember(teacher) for n in args.steps}  # a memory for each grid
        began = time.perf_counter()
        self.fine = self.end(None, FINE)
        self.coarse = self.end(None, args.student_steps)
        self.coarse.sum().item()  # waits for a GPU
        self.seconds = (time.perf_counter() - began) / (FINE + args.student_steps)  # of a call

    def end(self, weights: Tensor | None, steps: int, scale: float = 1.0) -> Tensor:
        self.adapter.use(weights, scale)
        return sample(self.args, load(self.args, "image"), self.cond, self.noise, steps)

    def lam(self, weights: Tensor, steps: int) -> float:
        times = sc.time_grid(steps, self.args.shift).to(self.args.device)
        student = self.adapter.velocity(weights, self.args.size)
        teacher = self.teachers[steps]
        return sc.optimal_scale(student, teacher, self.noise, times, **self.cond).item()

    def search(self, weights: Tensor, steps: int) -> tuple[float, float]:
        """Least distance to where FINE steps end, and its scale: two searches, from lam* on.

        A wide search that ends at its own border is repeated around it, up to those of SCALES.
        """
        lam, distances = self.lam(weights, steps), {}
        best = min(max(lam, 0.1), 5.0) if math.isfinite(lam) else 1.0

        def look(center: float, spread: float) -> float:
            tries = center * np.linspace(1 - spread, 1 + spread, 5)
            for scale in tries.round(3).clip(*SCALES).tolist():
                if scale not in distances:
                    distance = rms(self.end(weights, steps, scale) - self.fine)
                    distances[scale] = distance if math.isfinite(distance) else math.inf
            return min(distances, key=distances.get)

        best = look(best, 0.4)
        while best in (min(distances), max(distances)) and best not in SCALES:
            best = look(best, 0.4)
        best = look(best, 0.15)
        return distances[best], best

    def report(self, weights: Tensor, name: str) -> dict[str, float]:
        """lam* and distances to where FINE steps of the teacher end, for the log; a picture."""
        args, N, texts = self.args, self.args.student_steps, self.args.validation
        ends = [self.coarse, self.end(weights, N), self.fine]
        pictures = [decode(load(args, "image"), x[: len(texts)], args.size) for x in ends]
        draw(args, pictures, texts, f"validation/{name}.png")
        return self.measure(weights, ends[1], args.steps)

    def measure(self, weights: Tensor, end: Tensor, steps) -> dict[str, float]:
        """lam* for these numbers of steps; how far teacher and student end from FINE steps."""
        lams = {f"lam_{n}": self.lam(weights, n) for n in steps}
        return lams | {"teacher_rmse": rms(self.coarse - self.fine), "rmse": rms(end - self.fine)}


def remember(velocity):
    """The same velocity with a memory by time, for calls that repeat with the same x and cond."""
    answers = {}

    def remembered(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if (key := t[0].item()) not in answers:
            answers[key] = velocity(x, t, **cond).cpu()
        return answers[key].to(x.device)

    return remembered


def diverged(args: Namespace, row: dict[str, float], factor: float = 2.0) -> bool:
    """Whether the student is not finite, or far off: over `factor` times as far as the teacher.

    One that is far off because it overshoots keeps a lam* of about 1 / (1 + factor): a scale mends
    it, and it has not diverged.
    """
    student, lam = row["rmse"], row[f"lam_{args.student_steps}"]
    far = student > factor * row["teacher_rmse"]
    return not math.isfinite(student) or (far and not lam >= 0.1)


def verdict(args: Namespace, row: dict[str, float], scaled: bool = True) -> str:
    """In words, whether the student learned; `scaled`: a scale was found, or may be."""
    N, student, teacher = args.student_steps, row["rmse"], row["teacher_rmse"]
    distances = (f"in {N} steps the student ends {student:.3f} from the teacher's {FINE} steps, the"
                 f" teacher itself {teacher:.3f}")  # fmt: skip
    if not math.isfinite(student):
        distances = f"in {N} steps its latents hold NaN or infinity"
    if diverged(args, row):
        return f"ALARM, diverged student: {distances}; {LOWER}"
    if (lam := row[f"lam_{N}"]) < 0.8 and abs(student / teacher - 1) > 0.02:
        way_out = "use its scale, or train shorter" if scaled else "train shorter"
        return f"ALARM, overshot: lam* is {lam:.2f}; {distances}; {way_out}"
    if not student < 0.98 * teacher:
        return f"ALARM, inert student: {distances}; train longer or with a higher --learning-rate"
    return distances


def draw_batch(args: Namespace, pool: dict, generator: torch.Generator):
    """Latents and noise (B, tokens, channels) of one size, this size, and the conditions."""
    sizes, shares = list(pool), torch.tensor([float(len(pairs)) for pairs in pool.values()])
    size = sizes[torch.multinomial(shares, 1, generator=generator)]
    rows = torch.randint(len(pool[size]), (args.batch,), generator=generator)
    texts, latents = zip(*(pool[size][row] for row in rows))
    x_0, cond = torch.stack(latents), read(args, "text", texts)
    noise = torch.randn(x_0.shape, generator=generator)
    cond["guidance"] = (MAX_GUIDANCE * torch.rand(args.batch, generator=generator)).to(args.device)
    return x_0.to(args.device), noise.to(args.device), size, cond


# What a GPU may get wrong in silence: how far it may be off, relatively, and what to try.
TRY_KERNELS = "try DIFFUSERS_ATTN_BACKEND=_native_math, another version of PyTorch, or no --compile"
CHECKS = {
    "gradient": (0.05, "the student's gradient with the attention kernels in use differs from that"
                 " with PyTorch's plain attention", TRY_KERNELS),
    "teacher": (0.25, "the teacher's velocity differs from the same in float32", TRY_KERNELS),
    "student": (0.25, "the student's velocity differs from the same in float32", TRY_KERNELS),
    "pipeline": (0.03, "the latents of our own sampler differ from those of the stock pipeline",
                 "try another version of diffusers"),
}  # fmt: skip


def check_device(args: Namespace, adapter: Adapter, pair: tuple) -> dict[str, float]:
    """End with a sentence if what this device computes is wrong; else what was found."""
    found = device_errors(args, adapter, pair)
    for name, value in found.items():
        bound, sentence, way_out = CHECKS[name]
        if not value < bound:  # or not a number
            die(f"on this device {sentence} by {value:.2g} of its size (at most {bound:g} is"
                f" rounding): training would go wrong; {way_out}")  # fmt: skip
    return found


def device_errors(args: Namespace, adapter: Adapter, pair: tuple) -> dict[str, float]:
    """Compare what this device computes with what it should, on one row; relative differences.

    All of these errors are silent: finite numbers, and a student that learns something else. The
    LoRA is drawn away from the teacher, so that every weight of it has a gradient.
    """
    text, latent = pair
    latent = latent[:32, :32]  # plain attention takes memory by the square of the tokens
    generator = keyed(args.seed, "check")
    x_0 = latent.flatten(0, 1)[None].to(args.device)
    noise = torch.randn(x_0.shape, generator=generator).to(args.device)
    t = torch.full((1,), 0.5, device=args.device)  # which bfloat16 does not round, times 1000
    x_t = sc.interpolate(x_0, noise, t)
    cond = read(args, "text", [text])
    cond["guidance"] = torch.full((1,), args.guidance, device=args.device)
    weights = adapter.switch.weights.float().clone()
    B = weights[adapter.switch.first_B :]
    B += 0.01 * torch.randn(B.shape, generator=generator).to(B)
    size = tuple(latent.shape[:2])

    def gradient(rows: int) -> Tensor:
        """Of the mean loss of `rows` equal rows: the same for any number of them."""
        inputs = [x.repeat_interleave(rows, 0) for x in (x_t, t, noise - x_0)]
        many = {name: x.repeat_interleave(rows, 0) for name, x in cond.items()}
        v = adapter.velocity(weights, size)(*inputs[:2], **many)
        (v - inputs[2]).square().mean().backward()
        of = torch.empty_like(weights)
        adapter.move_gradients(of, 1.0)
        return of.grad

    def velocities(dtype: torch.dtype | None) -> list[Tensor]:
        return [adapter.velocity(ws, size, dtype)(x_t, t, **cond) for ws in (None, weights)]

    def difference(x: Tensor, reference: Tensor) -> float:
        return ((x - reference).norm() / reference.norm()).item()

    @contextmanager
    def plainly():
        """Eager, and with PyTorch's plain attention, whatever DIFFUSERS_ATTN_BACKEND says."""
        with torch.compiler.set_stance("force_eager"), attention_backend("_native_math"):
            yield

    found = {"gradient": gradient(args.batch)}
    with plainly():
        adapter.recompute(1)
        found["gradient"] = difference(found["gradient"], gradient(1))
        adapter.recompute(args.recompute_every)
    with torch.no_grad():
        ours = velocities(None)
        if not args.quantize:  # int8 has no float32 to be compared with
            with plainly(), adapter.in_float32():
                theirs = velocities(torch.float32)
            for name, v, reference in zip(("teacher", "student"), ours, theirs):
                found[name] = difference(v, reference)
        times = sc.time_grid(args.student_steps, args.shift).to(args.device)
        rows, start = held_out(args, args.validation[:1], "check")
        ours = sc.euler_sample(adapter.velocity(None, args.size), start, times, **rows)
    adapter.use(None)
    stock = sample(args, load(args, "image"), rows, start, args.student_steps)
    found["pipeline"] = difference(ours, stock)
    return found


def train(args: Namespace) -> None:
    """Phase 2: the velocities meet here, as in toy_2d.py, over one frozen transformer."""
    adapter, config, N, rows = Adapter(args), args.config, args.student_steps, []
    decays = {"slow": config.slow_decay} | ({"fast": config.fast_decay} if args.paper else {})
    sets = {name: adapter.switch.weights.float().clone() for name in ("student", *decays)}
    student = sets["student"]
    optimizer = torch.optim.AdamW([student], args.learning_rate, weight_decay=1e-4)
    if args.state.exists():
        rows, done = load_state(args, sets, optimizer)
        if done:
            return
    elif args.lora.exists():
        die(f"{args.lora} is finished, but {args.state} is gone: other settings of calibration and"
            " comparison need it. Give another --out, or delete it to train anew")  # fmt: skip
    check_disk(args, student.numel())
    add_up(args, count := torch.tensor([len(rows)], device=args.device))
    if count.item() != args.processes * len(rows):
        die(f"--out {args.out} is not one folder for all machines: put it on a disk they share")
    pool = {}
    for i, pair in enumerate(args.pairs):
        latent = read(args, "latent", [i])["latent"][0].cpu()
        pool.setdefault(latent.shape[:2], []).append((pair.text, latent.flatten(0, 1)))
        if i == 0 and args.device != "cpu" and args.checks is None:
            args.checks = check_device(args, adapter, (pair.text, latent))
    validation = args.lead and Validation(args, adapter)
    args.validator = validation

    def validate(iteration: int, bar) -> tuple[bool, bool]:
        """Whether training is done, and whether the student is lost."""
        bar.set_description("validate")  # the first takes minutes, later ones seconds
        rows[-1] |= validation.report(student, f"{iteration:06d}")
        bar.set_description("train")
        bar.set_postfix({f"lam*({N})": f"{rows[-1][f'lam_{N}']:.2f}"})
        lost = diverged(args, rows[-1], 5.0)
        alarm = 2 * iteration >= args.iterations and not lost
        if alarm and "ALARM" in verdict(args, rows[-1]):
            tqdm.write(f"iteration {iteration}: {verdict(args, rows[-1])}")
        write_log(args, rows)
        done = iteration == args.iterations or (args.stop_when_matched and matched(args, rows))
        return done, lost

    def due(iteration: int) -> bool:
        return iteration == args.iterations or iteration % args.validate_every == 0

    def finish(iteration: int, bar, asked: list) -> bool:
        """What follows an optimizer step; whether training is done. Stops and failures end it.

        Validations take long, so the step is saved before: a resumed run begins with what is due.
        """
        stops = torch.tensor([len(asked)], device=args.device)
        add_up(args, stops)
        stop = stops.item() > 0  # of any process
        if args.lead and (due(iteration) or stop or iteration % args.checkpoint_every == 0):
            save_state(args, sets, optimizer, rows, False)
            args.costs.save()
        if stop:
            add_up(args, stops)  # wait for the one that saves
            die(f"stopped after iteration {iteration}; the same command goes on from there")
        if not due(iteration):
            return False
        ends = torch.zeros(2, device=args.device)
        if args.lead:
            with on_stop(stop_now):
                ends += torch.tensor(validate(iteration, bar), device=args.device)
        add_up(args, ends)
        done, lost = map(bool, ends.tolist())
        if lost:  # the same command begins with this validation, and comes to the same end
            words = verdict(args, rows[-1]) if args.lead else f"diverged student; {LOWER}"
            die(f"stopped at iteration {iteration}: {words}")
        if args.lead:
            save_state(args, sets, optimizer, rows, done)
            args.costs.save()
        return done

    span, share = range(len(rows) + 1, args.iterations + 1), 1 / (args.accumulate * args.processes)
    third = len(rows) + 3  # from here on, what is to come can be told
    bar = tqdm(span, "train", initial=len(rows), total=args.iterations, **args.quiet)
    with interruptible() as asked:
        # A validation may be missing: it was not waited for, or did not end.
        behind = rows and due(len(rows)) and "rmse" not in rows[-1]
        if behind and finish(len(rows), bar, asked):
            return
        for iteration in bar:
            began = time.perf_counter()
            # --paper: passes share U, evenly spread, with as many teacher rows as a large batch.
            U = torch.rand(1, generator=keyed(args.seed, "share", iteration)).item()
            logged = torch.zeros(4, device=args.device)
            for micro in range(args.process, args.accumulate * args.processes, args.processes):
                generator = keyed(args.seed, "train", iteration, micro)
                x_0, noise, size, cond = draw_batch(args, pool, generator)
                U_micro = (U + micro * share) % 1
                windows = sc.sample_windows(config, args.batch, U=U_micro, generator=generator)
                # Targets first, the student last: its weights must stay for the backward.
                velocities = {name: adapter.velocity(ws, size) for name, ws in sets.items()}
                velocities["teacher"] = adapter.velocity(None, size)
                loss, log = sc.shortcut_loss(config, windows, x_0, noise, **velocities, **cond)
                loss.backward()
                adapter.move_gradients(student, share)
                logged += share * torch.stack([loss.detach(), *log.values()])
            add_up(args, logged, student.grad)
            row = {"iteration": iteration} | dict(zip(("loss", *log), logged.tolist()))
            row = {name: x for name, x in row.items() if name == "loss" or not math.isnan(x)}
            norm = torch.nn.utils.clip_grad_norm_(student, 10.0).item()
            if not math.isfinite(row["loss"] + norm):
                die(f"iteration {iteration}: loss {row['loss']}, gradient norm {norm}. Stopped, the"
                    " last checkpoint is kept; try a lower --learning-rate or a longer --warmup"
                    " in another --out")  # fmt: skip
            rate = args.learning_rate * min(1, iteration / max(1, args.warmup))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            for name, decay in decays.items():
                sc.update_ema([sets[name]], [student], decay, iteration)
            rows.append(row | {"gradient_norm": norm, "learning_rate": rate})
            if args.lead and iteration == third:
                seconds = time.perf_counter() - began
                words = forecast(args, validation, iteration, seconds)
                tqdm.write(f"iteration {iteration}: {words}")
                check_disk(args, student.numel())
            if finish(iteration, bar, asked):
                return


def add_up(args: Namespace, *tensors: Tensor) -> None:
    """Sum each tensor over all processes, in place; none goes on before all are here."""
    if args.processes == 1:
        return
    try:
        for x in tensors:
            dist.all_reduce(x)
        if args.device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        die(f"process {args.process} lost another one ({type(error).__name__}); the same command"
            " goes on from the last checkpoint")  # fmt: skip


@contextmanager
def interruptible():
    """A list that a stop signal fills, instead of ending the process amid an iteration."""
    asked = []

    def ask(*_):
        asked.append(True)
        os.write(2, b"\nstopping after this iteration\n")  # safe amid any other writing

    with on_stop(ask):
        yield asked


def stop_now(*_):
    raise KeyboardInterrupt


@contextmanager
def on_stop(handler):
    """Let stop signals call this. Those that are ignored stay so: nohup wants the run to go on."""
    kinds = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
    before = {kind: signal.getsignal(kind) for kind in kinds}
    before = {kind: old for kind, old in before.items() if old not in (signal.SIG_IGN, None)}
    for kind in before:
        signal.signal(kind, handler)
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def matched(args: Namespace, rows: list[dict]) -> bool:
    """lam* is at most 1.05, or its mean over five validations fell by less than 1 % in five."""
    lams = [lam for row in rows if (lam := row.get(f"lam_{args.student_steps}")) is not None]
    stalled = len(lams) >= 10 and sum(lams[-5:]) > 0.99 * sum(lams[-10:-5])
    learned = rows[-1]["rmse"] < 0.98 * rows[-1]["teacher_rmse"]
    return learned and (0 < lams[-1] <= 1.05 or stalled)


def save_state(args: Namespace, sets: dict, optimizer, rows: list[dict], done: bool) -> None:
    """All that training goes on from, in one file: it is replaced whole or not at all."""
    moments = {name: optimizer.state[sets["student"]][name] for name in MOMENTS}
    metadata = {"settings": args.settings, "rows": rows, "done": done, "checks": args.checks}
    write_tensors(args.state, sets | moments, metadata)


@torch.no_grad()
def load_state(args: Namespace, sets: dict, optimizer) -> tuple[list[dict], bool]:
    """Rows of the log, and whether training is done; weights and optimizer are filled in place."""
    metadata, saved = read_metadata(args.state), load_file(args.state)
    for name, weights in sets.items():
        weights.copy_(saved[name])
    moments = {name: saved[name].to(args.device) for name in MOMENTS}
    steps = torch.tensor(float(len(metadata["rows"])))
    optimizer.state[sets["student"]] = moments | {"step": steps}
    return metadata["rows"], metadata["done"]


def write_log(args: Namespace, rows: list[dict]) -> None:
    """log.csv, and training.png: losses, residual and lam* over the iterations."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    write_text(args.out / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    panels = {"loss": ["teacher_loss", "self_loss"], "|student - target| / |target|": ["residual"]}
    panels["lam* of N steps; 1: matched, less: overshot"] = [f"lam_{n}" for n in args.steps]
    figure = Figure((13, 3.8), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 3), panels.items()):
        for name in names:
            points = [
                (r["iteration"], y) for r in rows if math.isfinite(y := r.get(name, math.nan))
            ]
            if points:
                axis.plot(*zip(*points), ".-" if len(points) < 99 else "-", lw=0.9, label=name)
        axis.set(title=title, xlabel="iteration")
        axis.legend(frameon=False)
    axis.axhline(1, color="black", lw=0.8)
    with atomic(args.out / "training.png") as part:
        figure.savefig(part, format="png", dpi=110)


# -------------------------------------------------------------------- phases 3 and 4: what came out


def calibrate(args: Namespace) -> None:
    """Phase 3: a scale for each number of steps; save the student or its slow average as adapter.

    All on validation prompts and noises. The one that ends nearer to the teacher is saved.
    """
    validation = args.validator or Validation(args, Adapter(args))  # it keeps teacher's answers
    adapter, N, rows = validation.adapter, args.student_steps, read_metadata(args.state)["rows"]
    saved = load_file(args.state)
    sets = {name: saved[name].to(args.device) for name in ("student", "slow")}
    found, measured = {}, {}
    for name, weights in sets.items():
        measured[name] = validation.measure(weights, validation.end(weights, N), [N])
        if not diverged(args, measured[name]):
            found[name] = validation.search(weights, N)
    if not found:
        die(f"nothing is saved: {verdict(args, measured['student'])}")
    name = min(found, key=found.get)
    best = {N: found[name]}
    for n in tqdm([n for n in args.steps if n != N], "calibrate"):
        best[n] = validation.search(sets[name], n)
    scales, uncalibrated = {}, []
    for n, (distance, scale) in sorted(best.items()):
        teacher = rms(validation.end(None, n) - validation.fine)
        scales[n] = scale
        # Where every scale ends where the teacher does, the least distance is rounding.
        if scale in SCALES or not distance < 0.999 * teacher:
            uncalibrated.append(n)
            scales[n] = 1.0
    note = verdict(args, validation.report(sets[name], "saved"), N not in uncalibrated)
    if uncalibrated:
        note += f". {no_scale(uncalibrated)}"
    metadata = {
        "base_model": args.base_model, "student_steps": N, "shift": args.shift,
        "scales": scales, "uncalibrated": uncalibrated,
        "resolution": args.resolution, "guidance": args.guidance, "rank": args.rank,
        "max_sequence_length": validation.cond["text"].shape[1], "iterations": len(rows),
        "weights": {"slow": "slow average of the student"}.get(name, name),
        "note": note,
        "checks": read_metadata(args.state)["checks"],
        "relative_change": adapter.relative_change(sets[name], scales[N]),
        "settings": args.settings, "key": args.key,
    }  # fmt: skip
    adapter.use(sets[name], scales[N])
    check = {"latents": sample(args, load(args, "image"), *held_out(args, [0], "check"), N)}
    if not check["latents"].isfinite().all():
        die(f"nothing is saved: at scale {scales[N]:g} the student's latents hold NaN or infinity;"
            f" {LOWER}")  # fmt: skip
    write_tensors(args.check, check, {"key": args.key})
    FluxPipeline.save_lora_weights(
        args.out, adapter.named(sets[name]),
        save_function=lambda tensors, path: write_tensors(Path(path), tensors, metadata),
    )  # fmt: skip


def no_scale(steps: list[int]) -> str:
    """Says for which numbers of steps the adapter has no scale to recommend."""
    *others, last = map(str, steps)
    counts = f"{', '.join(others)} or {last}" if others else last
    return (f"For {counts} steps no scale from {SCALES[0]:g} to {SCALES[1]:g} was best: 1 stands"
            " in its place and is no recommendation")  # fmt: skip


def read_adapter(args: Namespace) -> dict:
    """What the file of the saved adapter says."""
    if not (adapter := read_metadata(args.lora)):
        die(f"there is no whole {LORA} in --out {args.out}: distil first, without --sample")
    adapter["scales"] = {int(n): scale for n, scale in adapter["scales"].items()}
    return adapter


def follow_adapter(args: Namespace) -> None:
    """Render as the saved adapter was made to, in all that no flag says otherwise."""
    adapter = read_adapter(args)
    adapter["text_tokens"] = adapter["max_sequence_length"]
    for name in {"student_steps", "resolution", "guidance", "shift", "text_tokens"} - args.given:
        setattr(args, name, adapter[name])
    if args.student_steps not in adapter["scales"]:
        *steps, last = map(str, sorted(adapter["scales"]))
        die(f"--student-steps {args.student_steps}: the adapter in --out {args.out} has scales for"
            f" {', '.join(steps)} or {last} steps, give one of these")  # fmt: skip
    if args.student_steps in adapter["uncalibrated"]:
        words = f"{no_scale([args.student_steps])}: give another --student-steps"
        tqdm.write(words, file=sys.stderr)


def load_student(args: Namespace) -> tuple[FluxPipeline, dict]:
    """A stock pipeline with the saved adapter at its calibrated scale, and what its file says."""
    adapter, pipe = read_adapter(args), load(args, "fresh")
    pipe.load_lora_weights(args.out, weight_name=LORA, adapter_name="student")
    pipe.set_adapters("student", adapter["scales"][args.student_steps])
    return pipe, adapter


def compare(args: Namespace) -> dict:
    """Phase 4: a stock pipeline with the saved file against the teacher, on held-out prompts."""
    (pipe, adapter), N = load_student(args), args.student_steps
    expected = load_file(args.check)["latents"].to(args.device)
    check = rms(sample(args, pipe, *held_out(args, [0], "check"), N) - expected) / rms(expected)
    if not check < (3e-2 if args.device == "cuda" else 1e-5):
        die(f"self-check failed: in a fresh pipeline {args.lora} gives other latents than"
            f" in training, by {check:.1e} of their size; do not use it")  # fmt: skip
    cond, noise = held_out(args, args.comparison, "compare")

    def run(steps: int, scale: float) -> tuple[Tensor, Tensor]:
        pipe.set_adapters("student", scale)
        latents = sample(args, pipe, cond, noise, steps)
        return latents, decode(pipe, latents, args.size)

    (fine, pictures), table, shown = run(FINE, 0.0), [], {}
    scales = {"teacher": dict.fromkeys(args.steps, 0.0), "student": dict.fromkeys(args.steps, 1.0)}
    scales["student, scaled"] = adapter["scales"]
    for name, n in tqdm([(name, n) for name in scales for n in args.steps], "compare"):
        latents, pixels = run(n, scales[name][n])
        error = (pixels - pictures).square().mean((1, 2, 3)).clamp(min=1e-10)
        row = {"sampler": name, "steps": n, "scale": scales[name][n], "rmse": rms(latents - fine)}
        if not math.isfinite(row["rmse"]):
            die(f"{args.lora} gives NaN or infinity in {n} steps at scale {row['scale']:g}: do not"
                f" use it, {LOWER}")  # fmt: skip
        table.append(row | {"psnr": -10 * error.log10().mean().item()})
        if n == N:
            shown[name] = pixels
    rows = [shown["teacher"], shown["student, scaled"], pictures]
    draw(args, rows, args.comparison[:8], "comparison.png")
    results = {"table": table, "noises": len(noise), "self_check": check, "adapter": adapter}
    results |= {"seed_to_seed": rms(fine - fine.roll(len(args.comparison), 0))}
    return results


@torch.no_grad()
def decode(pipe: FluxPipeline, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1], one at a time through the VAE."""
    vae, factor, pictures = pipe.vae, pipe.vae_scale_factor, []
    for x in latents.split(1):
        x = pipe._unpack_latents(x, *(n * 2 * factor for n in size), factor)
        x = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pictures.append(vae.decode(x).sample.float().cpu())
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def draw(args: Namespace, rows: list[Tensor], texts: list[int], name: str) -> None:
    """Pictures (B, H, W, 3) of teacher, student, fine teacher; a column for each prompt."""
    steps = args.student_steps
    labels = (f"teacher\n{steps} steps", f"student\n{steps} steps", f"teacher\n{FINE} steps")
    figure = Figure((1.7 * len(texts) + 0.7, 1.7 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(texts), squeeze=False)
    for axes, label, pictures in zip(grid, labels, rows):
        for axis, picture in zip(axes, pictures):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label)
    for axis, i in zip(grid[0], texts):
        axis.set_title(textwrap.fill(args.texts[i][:72], 24), fontsize=8, parse_math=False)
    with atomic(args.out / name) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font need not have every script
        figure.savefig(part, format="png", dpi=110)


def markdown(results: dict) -> str:
    """The table: RMSE of latents / PSNR of pictures."""
    cells = {(row["sampler"], row["steps"]): row for row in results["table"]}
    names, steps = (list(dict.fromkeys(column)) for column in zip(*cells))
    lines = [["Euler steps", *map(str, steps)], ["---"] * (1 + len(steps))]
    for name in names:
        row = [cells[name, n] for n in steps]
        lines.append([name, *(f"{cell['rmse']:.3f} / {cell['psnr']:.1f}" for cell in row)])
    missing = results["adapter"].get("uncalibrated", ())
    scales = ["none found" if cell["steps"] in missing else f"{cell['scale']:.2f}" for cell in row]
    lines.append(["its scale", *scales])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


CARD = """{head}
# {title} in {student_steps} steps

A LoRA of rank {rank}, made by SCFM ([arXiv 2510.17858](https://arxiv.org/abs/2510.17858)). As an
adapter of {title} it inherits that model's licence.
{alarm}
It was made on the base model in {precision}: use the same precision. {layers}

![Teacher in {student_steps} steps, student in {student_steps}, teacher in {fine}](comparison.png)

*Same noise in each column; prompts that were not trained on, not selected.*

## diffusers

```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
{int8}
pipe = FluxPipeline.from_pretrained({base_model!r}, dtype=torch.{dtype}{quantized}).to("{device}")
pipe.load_lora_weights({out!r}, weight_name="{lora}", adapter_name="scfm")
pipe.set_adapters("scfm", {scale})
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
    pipe.scheduler.config, use_dynamic_shifting=False, shift={shift})
image = pipe("PROMPT", num_inference_steps={student_steps}, guidance_scale={guidance},
             max_sequence_length={max_sequence_length},
             height={resolution}, width={resolution}).images[0]
```

With a second LoRA, name both: `pipe.set_adapters(["scfm", "other"], [{scale}, 1.0])`. Loading the
second one alone switches this one off. To fuse, call `pipe.fuse_lora()` after `set_adapters`, and
without `lora_scale`, which would apply the scale twice.

## ComfyUI

Put `{lora}` into `models/loras`.

| node | values |
| --- | --- |
| Load LoRA (`LoraLoaderModelOnly`: model only, not the Bypass variant) | strength {scale} |
| ModelSamplingAuraFlow | shift {shift:g} |
| FluxGuidance | guidance {guidance:g} |
| KSampler | steps {student_steps}, cfg 1, sampler euler, scheduler simple, denoise 1 |

The exact times, for the node ManualSigmas: `{times}`. {no_node}

Not suited: ModelSamplingSD3, ModelSamplingFlux with its defaults below 1024 px, the schedulers
normal and beta, ancestral and lcm samplers.

## Scale and times for each number of steps

{strengths}

RMSE of latents / PSNR of pictures (dB) to {fine} steps of the teacher, {noises} noises, held-out
prompts. Two seeds of the teacher are {seed_to_seed:.3f} apart. Scaled: by the last row.

{table}

## How it was made

Saved: the {weights}, after {iterations} iterations. {verdict} In a fresh diffusers pipeline the
file gives the latents of training, relative difference {self_check:.1g}.

## What it took

{took}

Settings: {list}.
"""
LAYERS = {  # of the LoRA, and which tools take them
    "blocks": """The LoRA is on the linear layers inside the transformer's blocks. The code by which
ComfyUI, InvokeAI, mflux, DiffSynth and sd-scripts map the keys of a LoRA was run on such a file and
found a place for all of them. A LoRA on all layers (`--layers all`) loads whole in diffusers and
ComfyUI alone. On a tiny Flux, where ten of 50 layers lie outside the blocks, it came nearer to the
teacher (by a factor of 1.19, five seeds); in FLUX.1-dev they are ten of 504.""",
    "all": """The LoRA is on all linear layers, which not every tool takes. InvokeAI refuses the
file because of `norm_out.linear`. mflux, DiffSynth and sd-scripts drop the ten layers outside the
blocks (`x_embedder`, `context_embedder`, six of `time_text_embed`, `norm_out`, `proj_out`), which
cost 40 % of the gain when it was tried on a tiny Flux. `--layers blocks` makes a file without
them.""",
}
INT8 = """from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

int8 = PipelineQuantizationConfig(
    quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})"""
FADES = 0.003  # relative change of weights below which bfloat16 rounds much of it away
COMFY_SHIFT = math.exp(1.15)  # of Flux in ComfyUI, where no node sets another


def card(args: Namespace, results: dict) -> str:
    """The model card."""
    adapter = results["adapter"]
    settings, N, shift = adapter["settings"], adapter["student_steps"], adapter["shift"]
    dtype = precision = "bfloat16" if args.device == "cuda" else "float32"
    int8 = settings["quantize"] == "int8"
    if int8:
        precision = f"int8 (the weights of its transformer, by torchao) and {dtype}"
    low, high = settings["shift_range"]
    no_node = f"""Without a model sampling node ComfyUI samples Flux at a shift of
{COMFY_SHIFT:.3f}, which lies in the range that this student was trained on, {low:g} to {high:g}."""
    verdict = f"On the validation prompts, at scale 1: {adapter['note']}."
    missing = adapter.get("uncalibrated", ())
    alarming = "ALARM" in verdict or missing
    rows = ["| steps | scale, or strength | times for ManualSigmas |", "| --- | --- | --- |"]
    for n, scale in adapter["scales"].items():
        scale = "none found" if n in missing else scale
        rows.append(f"| {n} | {scale} | `{times(n, shift)}` |")
    return CARD.format(**results | adapter | {
        "head": card_head(adapter["base_model"]), "title": code(adapter["base_model"]),
        "alarm": f"\n> Warning. {verdict}\n" if alarming else "",
        "verdict": "" if alarming else verdict,
        "precision": precision,
        "int8": INT8 if int8 else "", "quantized": ", quantization_config=int8" if int8 else "",
        "layers": LAYERS[settings["layers"]], "scale": adapter["scales"][N],
        "times": times(N, shift), "no_node": no_node if low <= COMFY_SHIFT <= high else "",
        "strengths": "\n".join(rows), "table": markdown(results), "took": took(results),
        "lora": LORA, "fine": FINE,
        "list": ", ".join(f"{name}: {code(value)}" for name, value in settings.items()),
        "dtype": dtype, "device": args.device, "out": args.out.resolve().name,
    })  # fmt: skip


def took(results: dict) -> str:
    """Seconds and memory of each phase, on what machine, and what was checked there."""
    rows = ["| phase | time | peak GPU memory |", "| --- | --- | --- |"]
    for name, phase in results["phases"].items():
        memory = f"{phase['peak_gib']:.1f} GiB" if phase["peak_gib"] else ""
        rows.append(f"| {name} | {duration(phase['seconds'])} | {memory} |")
    machine = dict(results["machine"])
    versions = ", ".join(f"{name} {number}" for name, number in machine.items() if name != "device")
    words = [f"On one {machine['device']} with {versions}."]
    checks = results["adapter"]["checks"]
    if checks:
        names = {"gradient": "the gradient against PyTorch's plain attention",
                 "teacher": "the teacher's velocity against float32",
                 "student": "the student's against float32",
                 "pipeline": "our sampler against the stock pipeline"}  # fmt: skip
        found = ", ".join(f"{names[name]} {value:.1g}" for name, value in checks.items())
        words.append(f"Relative differences before the first iteration: {found}.")
    change = results["adapter"]["relative_change"]
    words.append(f"The median change of a layer's weights is {change:.2%} of their norm.")
    if change < FADES:
        words.append("Merged into bfloat16 weights much of that is lost to rounding: load the file"
                     " as a LoRA instead.")  # fmt: skip
    return "\n".join([*rows, "", *words])


def card_head(base_model: str) -> str:
    """The card's YAML; the Hub takes a name of its own as base model, and refuses a folder's."""
    dev = "flux.1-dev" in base_model.lower()
    relation = {"base_model": base_model, "base_model_relation": "adapter"}
    data = ModelCardData(
        **(relation if "/" in base_model else {}),
        library_name="diffusers", pipeline_tag="text-to-image", license="other",
        license_name="flux-1-dev-non-commercial-license" if dev else "that-of-the-base-model",
        tags=["flux", "lora", "few-step", "distillation"],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---"


def times(steps: int, shift: float) -> str:
    """Times of a sampler with six significant digits, and without the e of small ones."""
    digits = partial(np.format_float_positional, precision=6, fractional=False, trim="-")
    return ", ".join(map(digits, sc.time_grid(steps, shift).tolist()))


def code(value) -> str:
    """A value as code in Markdown, whatever characters it holds."""
    text = " ".join(str(value).split())
    text = text.encode("utf-8", "replace").decode()  # names of files need not be UTF-8
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def render(args: Namespace) -> None:
    """--sample: images of prompts by the saved adapter, as its card recommends or flags say."""
    args.texts, rows = args.sample, range(len(args.sample))
    texts = list(encode_text(args, rows))
    name_cut_texts(args, rows)
    pipe, _ = load_student(args)
    cond = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
    cond["guidance"] = torch.full((len(rows),), args.guidance)
    noise = noises(args, [("sample", i) for i in rows])
    latents = sample(args, pipe, cond, noise, args.student_steps)
    for i, picture in enumerate(decode(pipe, latents, args.size)):
        name = "".join(c if c.isalnum() else "-" for c in args.sample[i])[:60]
        with atomic(path := args.out / "samples" / f"{i:02d}-{name}.png") as part:
            Image.fromarray((255 * picture).round().byte().numpy()).save(part, "png")
        print(path)


# --------------------------------------------------------------------------------------------- main


def prepare(args: Namespace) -> None:
    """Find model and data, and what identifies them; refuse --out of another run."""
    args.device, args.loaded = "cuda" if torch.cuda.is_available() else "cpu", (None, None)
    args.validator = None  # of train, for calibrate
    args.checks = None  # what check_device found
    args.process, args.processes = (int(os.environ.get(k, d)) for k, d in TORCHRUN)
    args.lead = args.process == 0  # the one that validates and writes
    args.quiet = {} if args.lead else {"disable": True}
    if args.processes > 1:
        if args.device == "cuda":
            torch.cuda.set_device(local_rank())
        engine = "nccl" if args.device == "cuda" else "gloo"
        patience = timedelta(days=1)  # of those that wait while one validates
        dist.init_process_group(engine, timeout=patience)
    args.lora, args.check = args.out / LORA, args.out / "cache/check.safetensors"
    if not args.sample:
        windows = {} if args.paper else dict(student_steps=args.student_steps, teacher_ratio=None)
        args.config = sc.ShortcutConfig(shift_range=args.shift_range, **windows)
    args.costs = Costs(args.out / "costs.json", args.device, args.lead)
    args.state, args.steps = args.out / "checkpoint/state.safetensors", {*STEPS, args.student_steps}
    args.steps = sorted(args.steps)
    args.base_model = args.model  # no path of this machine is written anywhere
    if Path(args.model).is_dir():
        args.base_model = Path(os.path.abspath(args.model)).name
    if not args.sample:
        refuse_others(args)
    args.folder = locate(args)
    files = sorted(args.folder.glob("*/*.json")) + sorted(args.folder.glob("*/*.safetensors"))
    model = args.model_print = digest([[*p.parts[-2:], file_print(p)] for p in files])
    if args.sample:
        if (adapter := read_adapter(args))["settings"]["model"] != model:
            die(
                f"{args.lora} was made for {adapter['base_model']}: --model {args.model} is another"
            )
        return
    prompts, held_out = read_prompts(args)
    pairs = read_images(args) if args.images else [(None, prompt, None) for prompt in prompts]
    secret = {text.casefold() for text in held_out}
    pairs = [p for p in pairs if p[1].casefold() not in secret]
    if args.lead and args.limit > len(pairs) > 0:
        print(f"--limit {args.limit} is more than the {len(pairs)} pairs there are: all are used")
    pairs = pairs[: args.limit or None]
    if not pairs:  # with prompts alone read_prompts has seen to it
        die(f"every caption in --images {args.images} is also one of the {len(held_out)} held-out"
            " prompts: give --prompts a file that ends with other lines")  # fmt: skip
    args.texts = list(dict.fromkeys([*held_out, *(text for _, text, _ in pairs)]))
    places = {text: i for i, text in enumerate(args.texts)}
    args.pairs = [Namespace(file=file, text=places[text]) for file, text, _ in pairs]
    third = max(1, len(held_out) // 3)
    args.validation = list(range(third))
    args.comparison = list(range(third, len(held_out)))
    drawn = [args.seed, args.shift_range, args.quantize, FINE, POOL_GUIDANCE]
    data = [[text, *(mark or (i, *drawn))] for i, (_, text, mark) in enumerate(pairs)]
    args.keys = {
        "text": [digest([model, args.device, args.text_tokens, text]) for text in args.texts],
        "latent": [latent_key(args, item) for item in data],
    }
    names = """resolution text_tokens student_steps paper shift_range iterations batch accumulate
               learning_rate warmup rank layers quantize seed stop_when_matched"""
    settings = {"version": VERSION, "model": model, "data": digest(data)}
    settings |= {name: getattr(args, name) for name in names.split()}
    settings["accumulate"] *= args.processes
    if args.stop_when_matched:  # then these decide when it ends
        settings["stop"] = [args.shift, args.guidance, held_out, args.noises, args.validate_every]
    args.settings = json.loads(json.dumps(settings))  # as it will be read
    args.key = digest([args.settings, args.shift, args.guidance, held_out, args.noises])
    for path in filter(Path.exists, (args.state, args.lora)):
        found = read_metadata(path).get("settings")
        if not found:
            what = "is damaged" if is_ours(path) else "is not a safetensors file"
            die(f"{path} {what}: move it away to make it anew, or give another --out")
        others = [f"{k} {found.get(k)}, now {v}" for k, v in args.settings.items()
                  if found.get(k) != v]  # fmt: skip
        if others:
            die(f"--out {args.out} holds a run of other settings ({'; '.join(others)}): repeat"
                " them, give another --out, or delete it")  # fmt: skip


def distil(args: Namespace) -> dict:
    """The four phases, each skipped when its result is on disk and fits; results.json."""
    results, file = {"adapter": {}}, args.out / "results.json"
    with suppress(FileNotFoundError, ValueError):
        results = json.loads(file.read_text())
    saved = read_metadata(args.lora).get("key") == args.key
    if not saved or results.get("adapter", {}).get("key") != args.key:
        with args.costs.phase("cache", resumes=True):
            make_cache(args)
        saved &= read_metadata(args.check).get("key") == args.key
        if not saved:
            with args.costs.phase("train", resumes=args.state.exists()):
                train(args)
        if not args.lead:
            return results
        if not saved:
            with args.costs.phase("calibrate"):
                calibrate(args)
        with args.costs.phase("compare"):
            results = compare(args)
        results |= {"phases": args.costs.phases, "machine": machine(args.device)}
        write_text(args.out / "README.md", card(args, results))
        write_text(file, json.dumps(results, indent=1) + "\n")
    if args.lead:
        print(f"RMSE of latents / PSNR of pictures to {FINE} teacher steps, held-out prompts:")
        print(markdown(results), results["adapter"]["note"], sep="\n")
        print(f"adapter, model card (README.md), pictures and tables in {args.out}/")
    return results


def in_words(args: Namespace, error: OSError) -> str:
    """What the system refused, and the way out."""
    if error.errno in DISK_FULL:
        return f"the disk of --out {args.out} is full: free some space, the same command goes on"
    file = error.filename or f"--out {args.out}"
    if error.errno == errno.EFBIG:
        return (f"{file} would exceed the size limit for files: raise it (ulimit -f), or give --out"
                " on another disk")  # fmt: skip
    if isinstance(error, PermissionError):
        return (f"you are not allowed to read or write {file}: correct its permissions, then the"
                " same command resumes")  # fmt: skip
    reason = str(error.strerror or error).splitlines()[0]
    return f"{file}: {reason}. Once that is mended, the same command resumes"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        with on_stop(stop_now):
            prepare(args)
            if not args.sample:
                with alone(args):
                    distil(args)
            elif args.lead:
                render(args)
    except KeyboardInterrupt:
        die(f"stopped; what is in --out {args.out} is kept, and the same command resumes")
    except torch.OutOfMemoryError:
        die(f"out of GPU memory; {SMALLER}. What is done is kept")
    except OSError as error:
        die(in_words(args, error))
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        die(f"--compile fails on this machine ({reason}): the same command resumes without it")


if __name__ == "__main__":
    main()
