"""Distil FLUX.1-dev into a few-step sampler: a LoRA by SCFM (arXiv 2510.17858), see shortcut.py.

    cache      prompt embeddings and latents, so that the encoders can leave memory
    train      one LoRA on a frozen base; the student and its average are float32, outside it
    calibrate  the scale of the LoRA for each number of steps; the student or its slow average
    compare    with the teacher on held-out prompts, from the saved file in a stock pipeline

Each phase is skipped when its result is in --out and fits the settings; after an interruption the
same command goes on. Latents are packed, (B, tokens, channels), as the transformer takes them.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import textwrap
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from argparse import RawDescriptionHelpFormatter as RawFormatter
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # they advise packages that Flux needs not
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import free_memory, generate_aspect_ratio_buckets
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub import errors as hub
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextModel, T5EncoderModel

import shortcut as sc

FLUX = "black-forest-labs/FLUX.1-dev"
LORA = "pytorch_lora_weights.safetensors"
FINE = 32  # steps of the teacher that stand for all of its quality
STEPS = (2, 3, 4, 6, 8)  # watched while training, calibrated and compared; with --student-steps
SCALES = (0.05, 8.0)  # of the LoRA, searched between these; one of them itself is no best scale
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
TEXT_SIDE = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2")
TEXT_TOKENS = 256  # of T5, or fewer where its tokenizer's longest text is shorter
MAX_GUIDANCE, POOL_GUIDANCE = 8.0, 3.5  # training draws it from [0, 8]; for what the teacher draws
TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1))  # what it sets, and what holds without it
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SMALLER = """what helps, in this order: gradient checkpointing (no --no-checkpointing), --batch 4 \
--accumulate 2 (down to --batch 1), --rank 16, --quantize int8, --layers blocks, --resolution 256"""
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


def die(sentence: str):
    raise SystemExit(f"flux_distill.py: {sentence}")


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
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, "utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    text = {name: json.dumps(value) for name, value in metadata.items()} | {"format": "pt"}
    with atomic(path) as part:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, part, text)


def read_metadata(path: Path) -> dict:
    """What write_tensors was given; {} if there is no such file or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            pairs = (file.metadata() or {}).items()
            return {name: json.loads(text) for name, text in pairs if name != "format"}
    except (OSError, ValueError, SafetensorError):
        return {}


def file_print(path: Path) -> list:
    """Tells a file from another: its size and a hash of 16 pieces of it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        pieces = [file.read(2**19) for k in range(16) if file.seek(size * k // 16) >= 0]
    return [size, hashlib.sha256(b"".join(pieces)).hexdigest()]


# -------------------------------------------------------------------- the model, checked and loaded


REFUSALS = (  # the first that fits an error on the way to a model
    (hub.GatedRepoError, "is gated: accept its licence at https://huggingface.co/{0}, run `hf auth"
     " login` (a fine-grained token needs access to gated repositories), and start again"),
    ((hub.RepositoryNotFoundError, hub.HFValidationError),
     "is no folder here and no public model on the Hub (private: `hf auth login`)"),
    ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled),
     "is no folder here and the Hub can't be reached: give a folder, or go online"),
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
        args.resolution = read_adapter(args)["resolution"]
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
    kept = blocks + 45 if args.checkpointing else 28 * blocks  # activations a token, of its width
    tokens = args.batch * (math.prod(args.size) + TEXT_TOKENS)
    base = parameters * (1 if args.quantize else width)
    if args.quantize and not args.checkpointing:
        base += parameters * width  # torchao computes with copies, autograd keeps them
    lists = 6 if args.paper else 5  # student, gradient, two moments, averages, in float32
    need = base + width * tokens * kept * net.inner_dim + lora * (4 * lists + 2 * width)
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    have = torch.cuda.get_device_properties(0).total_memory if gpu else have
    if need > have:
        die(f"training needs about {need / 2**30:.0f} GiB of {have / 2**30:.0f} GiB; {SMALLER}")


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
        with explain(f"--model {args.model} can't be loaded: is it complete?", *kinds):
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
    """Linear layers that get a LoRA: all, or those of --layers blocks."""
    names = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    inside = [name for name in names if "transformer_blocks." in name and "norm" not in name]
    return names if args.layers == "all" else inside


class Adapter:
    """One LoRA on a frozen transformer, in which sets of weights take turns; None: the teacher.

    Weights are lists of float32 tensors. To load some is one copy, next to nothing beside a call.
    """

    def __init__(self, args: Namespace):
        self.net, self.batch, r = load(args, "image").transformer, args.batch, args.rank
        if not getattr(self.net, "peft_config", None):
            torch.manual_seed(args.seed)
            kind = dict(init_lora_weights="gaussian", target_modules=targets(args, self.net))
            self.net.add_adapter(LoraConfig(r=r, lora_alpha=r, **kind))
        self.scale = None  # that is switched on; 0: the teacher
        self.layers = [m for m in self.net.modules() if isinstance(m, LoraLayer)]
        self.params = [p for name, p in self.net.named_parameters() if ".lora_" in name]

    @torch.no_grad()
    def use(self, weights: list[Tensor] | None, scale: float = 1.0) -> None:
        scale = scale if weights else 0.0
        if scale != self.scale:
            self.scale = scale
            for layer in self.layers:  # the network's own methods walk all of its modules
                layer.enable_adapters(scale != 0)
                layer.set_scale("default", scale)
        if scale:
            torch._foreach_copy_(self.params, weights)

    def velocity(self, weights: list[Tensor] | None, size: tuple[int, int]):
        """Velocity of latents (B, tokens, channels), `size` their rows and columns of tokens.

        A call loads its weights. No other may come between the student's call and its backward.
        """
        net, like = self.net, self.params[0]
        ids = FluxPipeline._prepare_latent_image_ids(1, *size, like.device, like.dtype)

        def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            if len(x) > self.batch:  # only where there is no backward
                parts = zip(*(v.split(self.batch) for v in (x, t, *cond.values())))
                return torch.cat([velocity(x, t, **dict(zip(cond, c))) for x, t, *c in parts])
            self.use(weights)
            if like.dtype != torch.float32:
                t = (1000 * t).to(like.dtype) / 1000  # rounded as the stock pipeline rounds
            return net(
                hidden_states=x.to(like.dtype), timestep=t, guidance=cond["guidance"], img_ids=ids,
                encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"],
                txt_ids=ids.new_zeros(cond["text"].shape[1], 3),
            ).sample.float()  # fmt: skip

        return velocity

    def move_gradients(self, student: list[Tensor], share: float) -> None:
        """Add a share of the LoRA's gradients to the student's, in float32, and clear them."""
        for weight, param in zip(student, self.params, strict=True):
            grad = share * param.grad.float()
            weight.grad = grad if weight.grad is None else weight.grad + grad
            param.grad = None


# ----------------------------------------------------------------------------------- phase 1: cache


def read_prompts(args: Namespace) -> tuple[list[str], list[str]]:
    """All prompts, and the last --held-out different ones, which are not trained on."""
    text, unreadable = PROMPTS.replace("; ", "\n"), (OSError, UnicodeDecodeError)
    with explain(f"--prompts {args.prompts} can't be read as a text file", *unreadable):
        text = args.prompts.read_text("utf-8-sig") if args.prompts else text
    lines = [line for line in map(tidy, text.splitlines()) if line]
    held_out = list(dict.fromkeys(lines))[-args.held_out :]
    if len(set(lines)) < args.held_out + (not args.images):
        die(f"--prompts {args.prompts} has {len(set(lines))} different lines: it needs one more"
            f" than --held-out {args.held_out}")  # fmt: skip
    return lines, held_out


def tidy(text: str) -> str:
    return " ".join(text.split())


def read_images(folder: Path) -> list[tuple[Path, str]]:
    """Images and their captions; what can't be used is named, counted and left out."""
    if not folder.is_dir():
        die(f"--images {folder} is no folder")
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    pairs, skipped = [], []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds):
        try:
            open_image(path, 64)
            if not (caption := tidy(path.with_suffix(".txt").read_text("utf-8-sig"))):
                raise ValueError(f"{path.stem}.txt is empty")
            pairs.append((path, caption))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped.append(f"{path.name}, {path.stem}.txt: {error}")
    if skipped:
        print(f"skipped {len(skipped)}, kept {len(pairs)} images:", *skipped, sep="\n  ")
    if not pairs:
        die(f"--images {folder} has no image with a caption: NAME.png goes with NAME.txt")
    return pairs


def open_image(path: Path, resolution: int) -> Tensor:
    """Picture (1, 3, H, W) in [-1, 1], cut to the bucket of the nearest shape."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits a pixel
            values = np.asarray(image, np.float32)
            image = Image.fromarray((values / max(values.max(), 65535) * 255).astype(np.uint8))
        image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    shape, buckets = math.log(image.height / image.width), generate_aspect_ratio_buckets(resolution)
    height, width = min(buckets, key=lambda b: abs(math.log(b[0] / b[1]) - shape))
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return VaeImageProcessor(do_resize=False).preprocess(image)


def make_cache(args: Namespace) -> None:
    """Phase 1: prompt embeddings and latents to --out/cache, a file each; whole ones stay.

    A batch is always made of the same entries: its rounding depends on all of them.
    """
    make = {"text": encode_text, "latent": encode_image if args.images else sample_teacher}
    for kind, keys in args.keys.items():
        starts = range(0, len(keys), args.batch)[args.process :: args.processes]
        for start in tqdm(starts, f"cache: {kind}s", unit="batch", **args.quiet):
            rows = range(len(keys))[start : start + args.batch]
            paths = [entry(args, kind, i) for i in rows]
            bad = [p for p, i in zip(paths, rows) if read_metadata(p).get("key") != keys[i]]
            for path in filter(Path.exists, bad):
                tqdm.write(f"{path} is damaged: made anew")
            for path, i, tensors in zip(paths, rows, make[kind](args, rows)) if bad else ():
                if path in bad:
                    write_tensors(path, tensors, {"key": keys[i]})
        add_up(args, torch.zeros(1, device=args.device))  # wait for all


def entry(args: Namespace, kind: str, i: int) -> Path:
    """File of the cache; its name tells what it was made from."""
    return args.out / "cache" / f"{kind}-{args.keys[kind][i]}.safetensors"


def read(args: Namespace, kind: str, rows) -> dict[str, Tensor]:
    """Entries of the cache, stacked."""
    entries = [load_file(entry(args, kind, i)) for i in rows]
    for path, tensors in zip((entry(args, kind, i) for i in rows), entries):
        if not all(x.isfinite().all() for x in tensors.values()):
            die(f"{path} holds NaN or infinity: if its text or image is sound, delete it to make it"
                " anew; else leave that pair out")  # fmt: skip
    return {name: torch.stack([e[name] for e in entries]).to(args.device) for name in entries[0]}


@torch.no_grad()
def encode_text(args: Namespace, rows: range):
    """Embeddings of prompts: text (T, D) of T5, pooled (d,) of CLIP."""
    pipe = load(args, "text")
    length = min(TEXT_TOKENS, pipe.tokenizer_2.model_max_length)
    for i in rows:
        text, pooled, _ = pipe.encode_prompt(*[args.texts[i]] * 2, max_sequence_length=length)
        yield {"text": text[0], "pooled": pooled[0]}


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
        self.fine, self.coarse = (self.end(None, n) for n in (FINE, args.student_steps))

    def end(self, weights: list[Tensor] | None, steps: int, scale: float = 1.0) -> Tensor:
        self.adapter.use(weights, scale)
        return sample(self.args, load(self.args, "image"), self.cond, self.noise, steps)

    def lam(self, weights: list[Tensor], steps: int) -> float:
        times = sc.time_grid(steps, self.args.shift).to(self.args.device)
        student = self.adapter.velocity(weights, self.args.size)
        teacher = self.teachers[steps]
        return sc.optimal_scale(student, teacher, self.noise, times, **self.cond).item()

    def search(self, weights: list[Tensor], steps: int) -> tuple[float, float]:
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

    def report(self, weights: list[Tensor], name: str) -> dict[str, float]:
        """lam* and distances to where FINE steps of the teacher end, for the log; a picture."""
        args, N, texts = self.args, self.args.student_steps, self.args.validation
        ends = [self.coarse, self.end(weights, N), self.fine]
        pictures = [decode(load(args, "image"), x[: len(texts)], args.size) for x in ends]
        draw(args, pictures, texts, f"validation/{name}.png")
        return self.measure(weights, ends[1], args.steps)

    def measure(self, weights: list[Tensor], end: Tensor, steps) -> dict[str, float]:
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


def train(args: Namespace) -> None:
    """Phase 2: the velocities meet here, as in toy_2d.py, over one frozen transformer."""
    adapter, config, N, rows = Adapter(args), args.config, args.student_steps, []
    decays = {"slow": config.slow_decay} | ({"fast": config.fast_decay} if args.paper else {})
    sets = {k: [p.detach().float().clone() for p in adapter.params] for k in ("student", *decays)}
    student = sets["student"]
    optimizer = torch.optim.AdamW(student, args.learning_rate, weight_decay=1e-4, foreach=True)
    free, need = shutil.disk_usage(args.out).free / 1e9, 40e-9 * sum(w.numel() for w in student)
    if args.state.exists():
        rows, done = load_state(args, sets, optimizer)
        if done:
            return
    elif args.lora.exists():
        die(f"{args.lora} is finished, but {args.state} is gone: other settings of calibration and"
            " comparison need it. Give another --out, or delete it to train anew")  # fmt: skip
    elif free < need:  # up to five float32 numbers a weight, in the old and in the new file
        die(f"checkpoints need {need:.1f} GB and --out {args.out} has {free:.1f}: give --out on"
            " another disk, or a smaller --rank")  # fmt: skip
    add_up(args, count := torch.tensor([len(rows)], device=args.device))
    if count.item() != args.processes * len(rows):
        die(f"--out {args.out} is not one folder for all machines: put it on a disk they share")
    if args.checkpointing:
        adapter.net.enable_gradient_checkpointing()
    pool, validation = {}, args.lead and Validation(args, adapter)
    args.validator = validation
    for i, pair in enumerate(args.pairs):
        latent = read(args, "latent", [i])["latent"][0].cpu()
        pool.setdefault(latent.shape[:2], []).append((pair.text, latent.flatten(0, 1)))
    span, share = range(len(rows) + 1, args.iterations + 1), 1 / (args.accumulate * args.processes)
    bar = tqdm(span, "train", initial=len(rows), total=args.iterations, **args.quiet)
    with interruptible() as asked:
        for iteration in bar:
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
            add_up(args, logged, *(w.grad for w in student))
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
                sc.update_ema(sets[name], student, decay, iteration)
            rows.append(row | {"gradient_norm": norm, "learning_rate": rate})
            done, lost = iteration == args.iterations, False
            if args.lead and (done or iteration % args.validate_every == 0):
                bar.set_description("validate")  # the first takes minutes, later ones seconds
                rows[-1] |= validation.report(student, f"{iteration:06d}")
                bar.set_description("train")
                bar.set_postfix({f"lam*({N})": f"{rows[-1][f'lam_{N}']:.2f}"})
                lost = diverged(args, rows[-1], 5.0)
                alarm = 2 * iteration >= args.iterations and not lost
                if alarm and "ALARM" in verdict(args, rows[-1]):
                    tqdm.write(f"iteration {iteration}: {verdict(args, rows[-1])}")
                done |= args.stop_when_matched and matched(args, rows)
                write_log(args, rows)
            add_up(args, ends := torch.tensor([done, len(asked), lost], device=args.device))
            done, stop, lost = map(bool, ends.tolist())  # of any process
            if lost:  # not saved: the same command comes to the same end
                words = verdict(args, rows[-1]) if args.lead else f"diverged student; {LOWER}"
                die(f"stopped at iteration {iteration}: {words}")
            if args.lead and (done or stop or iteration % args.checkpoint_every == 0):
                save_state(args, sets, optimizer, rows, done)
            if done:
                return
            if stop:
                add_up(args, ends)  # wait for the one that saves
                die(f"stopped after iteration {iteration}; the same command goes on from there")


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
    """A list that Ctrl-C or SIGTERM fills, instead of ending the process amid an iteration."""
    asked, kinds = [], (signal.SIGINT, signal.SIGTERM)

    def ask(*_):
        asked.append(True)
        os.write(2, b"\nstopping after this iteration\n")  # safe amid any other writing

    before = [signal.signal(kind, ask) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


def matched(args: Namespace, rows: list[dict]) -> bool:
    """lam* is at most 1.05, or its mean over five validations fell by less than 1 % in five."""
    lams = [lam for row in rows if (lam := row.get(f"lam_{args.student_steps}")) is not None]
    stalled = len(lams) >= 10 and sum(lams[-5:]) > 0.99 * sum(lams[-10:-5])
    learned = rows[-1]["rmse"] < 0.98 * rows[-1]["teacher_rmse"]
    return learned and (0 < lams[-1] <= 1.05 or stalled)


def save_state(args: Namespace, sets: dict, optimizer, rows: list[dict], done: bool) -> None:
    """All that training goes on from, in one file: it is replaced whole or not at all."""
    moments = [optimizer.state[w] for w in sets["student"]]
    lists = sets | {k: [state[k] for state in moments] for k in MOMENTS}
    tensors = {f"{name}.{i}": x for name, xs in lists.items() for i, x in enumerate(xs)}
    write_tensors(args.state, tensors, {"settings": args.settings, "rows": rows, "done": done})


@torch.no_grad()
def load_state(args: Namespace, sets: dict, optimizer) -> tuple[list[dict], bool]:
    """Rows of the log, and whether training is done; weights and optimizer are filled in place."""
    metadata, saved = read_metadata(args.state), load_file(args.state)
    for i, weight in enumerate(sets["student"]):
        for name, weights in sets.items():
            weights[i].copy_(saved[f"{name}.{i}"])
        moments = {name: saved[f"{name}.{i}"].to(args.device) for name in MOMENTS}
        optimizer.state[weight] = moments | {"step": torch.tensor(float(len(metadata["rows"])))}
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
    saved, count = load_file(args.state), range(len(adapter.params))
    sets = {k: [saved[f"{k}.{i}"].to(args.device) for i in count] for k in ("student", "slow")}
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
        "settings": args.settings, "key": args.key,
    }  # fmt: skip
    adapter.use(sets[name], scales[N])
    check = {"latents": sample(args, load(args, "image"), *held_out(args, [0], "check"), N)}
    if not check["latents"].isfinite().all():
        die(f"nothing is saved: at scale {scales[N]:g} the student's latents hold NaN or infinity;"
            f" {LOWER}")  # fmt: skip
    write_tensors(args.check, check, {"key": args.key})
    FluxPipeline.save_lora_weights(
        args.out, get_peft_model_state_dict(adapter.net),
        save_function=lambda tensors, path: write_tensors(Path(path), tensors, metadata),
    )  # fmt: skip


def no_scale(steps: list[int]) -> str:
    """Says for which numbers of steps the adapter has no scale to recommend."""
    counts = " or ".join(map(str, steps))
    return (f"For {counts} steps no scale from {SCALES[0]:g} to {SCALES[1]:g} was best: 1 stands"
            " in its place and is no recommendation. Train longer, or shorter if the student"
            " overshot")  # fmt: skip


def read_adapter(args: Namespace) -> dict:
    """What the file of the saved adapter says."""
    if not (adapter := read_metadata(args.lora)):
        die(f"there is no whole {LORA} in --out {args.out}: distil first, without --sample")
    adapter["scales"] = {int(n): scale for n, scale in adapter["scales"].items()}
    return adapter


def load_student(args: Namespace) -> tuple[FluxPipeline, dict]:
    """A stock pipeline with the saved adapter at its recommended scale, and what its file says."""
    adapter = read_adapter(args)
    args.shift, pipe = adapter["shift"], load(args, "fresh")
    pipe.load_lora_weights(args.out, weight_name=LORA, adapter_name="student")
    pipe.set_adapters("student", adapter["scales"][adapter["student_steps"]])
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
    write_text(args.out / "README.md", card(args, results))
    write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
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

Settings: {list}.
"""
LAYERS = {  # of the LoRA, and which tools take them
    "blocks": """The LoRA is on the linear layers inside the transformer's blocks. The code by which
ComfyUI, InvokeAI, mflux, DiffSynth and sd-scripts map the keys of a LoRA was run on such a file and
found a place for all of them.""",
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
        "strengths": "\n".join(rows), "table": markdown(results), "lora": LORA, "fine": FINE,
        "list": ", ".join(f"{name}: {code(value)}" for name, value in settings.items()),
        "dtype": dtype, "device": args.device, "out": args.out.resolve().name,
    })  # fmt: skip


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
    """--sample: pictures of prompts by the saved adapter, as its card recommends."""
    args.texts, rows = args.sample, range(len(args.sample))
    texts = list(encode_text(args, rows))
    pipe, adapter = load_student(args)
    cond = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
    cond["guidance"] = torch.full((len(rows),), adapter["guidance"])
    noise = noises(args, [("sample", i) for i in rows])
    latents = sample(args, pipe, cond, noise, adapter["student_steps"])
    for i, picture in enumerate(decode(pipe, latents, args.size)):
        name = "".join(c if c.isalnum() else "-" for c in args.sample[i])[:60]
        with atomic(path := args.out / "samples" / f"{i:02d}-{name}.png") as part:
            Image.fromarray((255 * picture).round().byte().numpy()).save(part, "png")
        print(path)


# --------------------------------------------------------------------------------------------- main


class Help(ArgumentDefaultsHelpFormatter, RawFormatter):
    pass


def at_least(low: float, unit: int = 1):
    """An argparse type: a number of low's kind, finite; integers are multiples of unit."""

    def number(text: str) -> float:
        if not low <= (value := type(low)(text)) < math.inf:
            raise ArgumentTypeError(f"{text} must be at least {low}")
        if type(low) is int and value % unit:
            raise ArgumentTypeError(f"{text} must be a multiple of {unit}")
        return value

    return number


def parse(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    count, number, positive = at_least(1), at_least(0), at_least(1e-9)
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
    add("--out", type=Path, default=Path("flux_out"), help="folder for all that is written")
    add("--sample", nargs="+", metavar="PROMPT", help="only render these, by the adapter in --out")
    add = parser.add_argument_group("method").add_argument
    add("--student-steps", type=count, default=3, metavar="N", help="step count to build for")
    add("--paper", action="store_true", help="the paper's windows and share, whatever N is")
    add("--shift-range", type=float, nargs=2, default=(2.5, 4.5), metavar=("LOW", "HIGH"),
        help="of the time shift in training; its middle is what the windows are matched to")
    add("--shift", type=positive, default=3.0, help="of time in sampling; see --shift-range")
    add("--guidance", type=float, default=3.5, help="of sampling; training draws it from [0, 8]")
    add = parser.add_argument_group("training").add_argument
    add("--iterations", type=count, default=3000, help="optimizer steps")
    add("--batch", type=count, default=8, help="pairs in a pass through the network")
    add("--accumulate", type=count, default=1, metavar="K", help="passes in an optimizer step")
    add("--learning-rate", type=positive, default=2e-5, help="of AdamW")
    add("--warmup", type=number, default=0, metavar="K", help="iterations up to that rate")
    add("--rank", type=count, default=64, help="of the LoRA")
    add("--layers", choices=("all", "blocks"), default="all",
        help="linear layers with a LoRA; blocks: attention and feed-forward")
    add("--no-checkpointing", action="store_false", dest="checkpointing",
        help="keep activations: a fifth faster, several times the memory")
    add("--quantize", choices=("int8",), help="frozen base in int8, half as large; by torchao")
    add("--seed", type=int, default=0, help="of all that is drawn")
    add("--validate-every", type=count, default=100, metavar="K", help="iterations")
    add("--checkpoint-every", type=count, default=100, metavar="K", help="iterations")
    add("--stop-when-matched", action="store_true", help="end at lam* of 1.05, or when it stalls")
    # fmt: on
    args = parser.parse_args(argv)
    windows = {} if args.paper else dict(student_steps=args.student_steps, teacher_ratio=None)
    if args.quantize and not find_spec("torchao"):
        parser.error("--quantize int8 needs torchao: pip install torchao")
    try:
        args.config = sc.ShortcutConfig(shift_range=args.shift_range, **windows)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def prepare(args: Namespace) -> None:
    """Find model and data, and what identifies them; refuse --out of another run."""
    args.device, args.loaded = "cuda" if torch.cuda.is_available() else "cpu", (None, None)
    args.validator = None  # of train, for calibrate
    args.process, args.processes = (int(os.environ.get(k, d)) for k, d in TORCHRUN)
    args.lead = args.process == 0  # the one that validates and writes
    args.quiet = {} if args.lead else {"disable": True}
    if args.processes > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        engine = "nccl" if args.device == "cuda" else "gloo"
        patience = timedelta(days=1)  # of those that wait while one validates
        dist.init_process_group(engine, timeout=patience)
    args.lora, args.check = args.out / LORA, args.out / "cache/check.safetensors"
    args.state, args.steps = args.out / "checkpoint/state.safetensors", {*STEPS, args.student_steps}
    args.steps = sorted(args.steps)
    args.base_model = args.model  # no path of this machine is written anywhere
    if Path(args.model).is_dir():
        args.base_model = Path(os.path.abspath(args.model)).name
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
    pairs = read_images(args.images) if args.images else [(None, prompt) for prompt in prompts]
    secret = {text.casefold() for text in held_out}
    pairs = [p for p in pairs if p[1].casefold() not in secret][: args.limit or None]
    if not pairs:
        die(f"--images {args.images} has only captions that are held-out prompts")
    args.texts = list(dict.fromkeys([*held_out, *(caption for _, caption in pairs)]))
    args.pairs = [Namespace(file=file, text=args.texts.index(text)) for file, text in pairs]
    third = max(1, len(held_out) // 3)
    args.validation = list(range(third))
    args.comparison = list(range(third, len(held_out)))
    drawn = [args.seed, args.shift_range, args.quantize, FINE, POOL_GUIDANCE]
    data = [[text, *(file_print(f) if f else (i, *drawn))] for i, (f, text) in enumerate(pairs)]
    args.keys = {
        "text": [digest([model, args.device, TEXT_TOKENS, text]) for text in args.texts],
        "latent": [digest([model, args.device, args.resolution, *item]) for item in data],
    }
    names = """resolution student_steps paper shift_range iterations batch accumulate learning_rate
               warmup rank layers quantize seed stop_when_matched"""
    settings = {"model": model, "data": digest(data)}
    settings |= {name: getattr(args, name) for name in names.split()}
    settings["accumulate"] *= args.processes
    if args.stop_when_matched:  # then these decide when it ends
        settings["stop"] = [args.shift, args.guidance, held_out, args.noises, args.validate_every]
    args.settings = json.loads(json.dumps(settings))  # as it will be read
    args.key = digest([args.settings, args.shift, args.guidance, held_out, args.noises])
    for path in filter(Path.exists, (args.state, args.lora)):
        if not (found := read_metadata(path).get("settings")):
            die(f"{path} is damaged: delete it to make it anew, or give another --out")
        others = [f"{k} {found.get(k)}, now {v}" for k, v in args.settings.items()
                  if found.get(k) != v]  # fmt: skip
        if others:
            die(f"--out {args.out} holds a run of other settings ({'; '.join(others)}): repeat"
                " them, give another --out, or delete it")  # fmt: skip


def distil(args: Namespace) -> dict:
    """The four phases, each skipped when its result is on disk and fits; results.json."""
    results, file = {"adapter": {}}, args.out / "results.json"
    with suppress(OSError, ValueError):
        results = json.loads(file.read_text())
    saved = read_metadata(args.lora).get("key") == args.key
    if not saved or results["adapter"].get("key") != args.key:
        make_cache(args)
        saved &= read_metadata(args.check).get("key") == args.key
        if not saved:
            train(args)
        if not args.lead:
            return results
        if not saved:
            calibrate(args)
        results = compare(args)
    if args.lead:
        print(f"RMSE of latents / PSNR of pictures to {FINE} teacher steps, held-out prompts:")
        print(markdown(results), results["adapter"]["note"], sep="\n")
        print(f"adapter, model card (README.md), pictures and tables in {args.out}/")
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        prepare(args)
        if not args.sample:
            distil(args)
        elif args.lead:
            render(args)
    except torch.OutOfMemoryError:
        die(f"out of GPU memory; {SMALLER}. What is done is kept")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        die(f"the disk of --out {args.out} is full: free some space, the same command goes on")


if __name__ == "__main__":
    main()
