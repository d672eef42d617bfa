"""Make tests/tiny_flux: a small trained FluxPipeline. python tests/make_tiny_flux.py

Renders captioned images ("a red circle"; place, size and the hues of the tiles behind it are free),
trains an AutoencoderKL and a FluxTransformer2DModel on them and saves a directory that stock
diffusers loads, with a list of prompts.

Like FLUX.1-dev the transformer is guidance-distilled. It first learns flow matching with captions
that are sometimes empty, and then, from a frozen copy of itself, the velocity of classifier-free
guidance for any guidance from 0 to 8.

--size tiny: 32 x 32 images, 16 tokens, a transformer of 1.1 million parameters; 50 minutes on one
core. --size medium: 64 x 64 images, 256 tokens, 30 million parameters; meant for minutes on a GPU.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import shortcut as sc


@dataclass(frozen=True)
class Sizes:
    """Sizes of the images, the networks and their training."""

    pixels: int  # of a side
    vae_widths: tuple[int, ...]  # of its blocks; all but the last halve height and width
    double_blocks: int
    single_blocks: int
    heads: int
    head_size: int
    rope_axes: tuple[int, ...]  # they add up to head_size
    vae_iterations: int  # batches of 32 images; the decoder alone gets twice as many more
    images: int  # to train the transformer on
    batch: int
    iterations: int  # of flow matching
    guidance_iterations: int  # of the distillation of guidance
    learning_rate: float


SIZES = {
    "tiny": Sizes(
        pixels=32,
        vae_widths=(16, 32, 32),
        double_blocks=2,
        single_blocks=2,
        heads=4,
        head_size=24,
        rope_axes=(4, 10, 10),
        vae_iterations=1500,
        images=20_000,
        batch=64,
        iterations=20_000,
        guidance_iterations=2_000,
        learning_rate=2e-3,
    ),
    "medium": Sizes(
        pixels=64,
        vae_widths=(32, 64),
        double_blocks=3,
        single_blocks=6,
        heads=6,
        head_size=64,
        rope_axes=(16, 24, 24),
        vae_iterations=800,
        images=30_000,
        batch=128,
        iterations=2_400,
        guidance_iterations=400,
        learning_rate=5e-4,
    ),
}
SIZE = SIZES["tiny"].pixels
TILES = 4  # along a side of an image
TEXT_TOKENS = 8
SHAPES = ("circle", "square", "triangle", "ring", "cross")
Colors = Mapping[str, tuple[float, float, float]]  # red, green and blue, 0 to 1, by name
COLORS: Colors = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.25),
    "blue": (0.20, 0.40, 0.98),
    "orange": (0.98, 0.55, 0.05),
    "purple": (0.65, 0.20, 0.80),
    "white": (0.98, 0.98, 0.98),
}


def captions_of(colors: Iterable[str]) -> list[str]:
    """Every shape in each of these colors."""
    return [f"a {color} {shape}" for color, shape in product(colors, SHAPES)]


CAPTIONS = captions_of(COLORS)
EMPTY = len(CAPTIONS)  # the number of the empty caption
PROMPTS = 300  # lines of prompts.txt
DROPPED = 0.1  # fraction of captions that are replaced by the empty one
PLAIN_GUIDANCE = 1.0  # at which guidance changes nothing
MOST_GUIDANCE = 8.0

# ------------------------------------------------------------------------------------------- images


def render(
    captions: Tensor, generator: torch.Generator, pixels: int = SIZE, colors: Colors = COLORS
) -> Tensor:
    """Images (B, 3, pixels, pixels) in [-1, 1] of captions (B,), by signed distances.

    Captions are numbers in captions_of(colors).
    """
    count = len(captions)
    color = torch.tensor(list(colors.values()))[captions // len(SHAPES)]
    ground = tiles(torch.rand(count, 1, TILES, TILES, generator=generator), pixels)

    line = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    size = 0.36 + 0.16 * torch.rand(count, 1, 1, generator=generator)
    place = (2 * torch.rand(2, count, 1, 1, generator=generator) - 1) * (0.92 - size)
    x = (line.expand(1, pixels, pixels) - place[0]) / size
    y = (line[:, None].expand(1, pixels, pixels) - place[1]) / size
    shape = (captions % len(SHAPES)).reshape(-1, 1, 1, 1).expand(-1, 1, pixels, pixels)
    distance = distances(x, y).gather(1, shape) * size[:, None]
    inside = (0.5 - distance * pixels / 2).clamp(0, 1)
    return 2 * torch.lerp(ground, color[..., None, None], inside) - 1


def tiles(hue: Tensor, pixels: int) -> Tensor:
    """Images (B, 3, pixels, pixels) in [0, 1] of tiles with these hues (B, 1, TILES, TILES)."""
    cell = pixels // TILES
    phase = torch.arange(3).reshape(3, 1, 1) / 3
    tile = 0.29 + 0.22 * torch.cos(2 * torch.pi * (hue - phase))
    tile = tile.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    inner = (torch.arange(pixels) % cell < cell - cell // 8).float()
    return 0.08 + (tile - 0.08) * (inner * inner[:, None])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances (B, len(SHAPES), h, w) to the shapes of size 1, negative inside."""
    radius = (x**2 + y**2).sqrt()
    corner = torch.maximum(x.abs(), y.abs())
    arms = torch.minimum(x.abs(), y.abs())
    shapes = {
        "circle": radius - 1,
        "square": corner - 0.88,
        "triangle": torch.maximum((2 * x.abs() - y - 0.95) / 5**0.5, y - 0.8),
        "ring": (radius - 0.76).abs() - 0.24,
        "cross": torch.maximum(corner - 0.95, arms - 0.3),
    }
    return torch.stack([shapes[name] for name in SHAPES], 1)


# ------------------------------------------------------------------------------------ the text side


def text_side() -> dict:
    """Tokenizers of the captions' words and letters; small text encoders, random: fixed codes."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    vocabulary += [f"{letter}</w>" for letter in letters]
    clip_tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[],
        model_max_length=77,
    )
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    clip_encoder = CLIPTextModel(clip)

    special = ["<pad>", "</s>", "<unk>"]
    of_words = ["\u2581", *(f"\u2581{word}" for word in words)]
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(piece, -1.0) for piece in of_words]
    pieces += [(letter, -6.0) for letter in letters]  # taken where there is no word
    t5_tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)
    t5 = T5Config(
        vocab_size=len(pieces),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return {
        "tokenizer": clip_tokenizer,
        "text_encoder": clip_encoder.eval(),
        "tokenizer_2": t5_tokenizer,
        "text_encoder_2": T5EncoderModel(t5).eval(),
    }


# ------------------------------------------------------------------------------------------ the VAE


def train_vae(sizes: Sizes, generator: torch.Generator, device: str = "cpu") -> AutoencoderKL:
    """A VAE of these images that normalises its latents."""
    blocks = len(sizes.vae_widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=sizes.vae_widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sizes.pixels,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device)
    fit(vae, vae.parameters(), sizes, sizes.vae_iterations, generator)
    vae.eval().requires_grad_(False)
    captions = torch.arange(min(3000, sizes.images)) % len(CAPTIONS)
    latents = encode(vae, render(captions, generator, sizes.pixels))
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    return vae


def refine_decoder(vae: AutoencoderKL, sizes: Sizes, colors: Colors = COLORS) -> None:
    """More training for the decoder alone: the latents stay as the transformer knows them."""
    weights = vae.decoder.requires_grad_(True).parameters()
    generator = torch.Generator().manual_seed(1)
    fit(vae, weights, sizes, 2 * sizes.vae_iterations, generator, colors)
    vae.requires_grad_(False)


def fit(
    vae: AutoencoderKL,
    weights: Iterable[Tensor],
    sizes: Sizes,
    iterations: int,
    generator: torch.Generator,
    colors: Colors = COLORS,
    batch: int = 32,
) -> None:
    """Train these weights of the VAE to reproduce images with these colors."""
    weights = list(weights)
    count = len(captions_of(colors))
    optimizer = torch.optim.AdamW(weights, 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, iterations, pct_start=0.2)
    for _ in tqdm(range(iterations), "VAE"):
        captions = torch.randint(count, (batch,), generator=generator)
        x = render(captions, generator, sizes.pixels, colors).to(vae.device)
        code = vae.encode(x).latent_dist
        y = vae.decode(code.sample(generator)).sample
        kl = code.kl().mean() / code.mean[0].numel()
        loss = (x - y).abs().mean() + 2 * (x - y).square().mean() + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (B, C, H, W) of images (B, 3, h, w), not normalised."""
    parts = images.to(vae.device).split(500)
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts])


# ---------------------------------------------------------------------------------- the transformer


@dataclass(frozen=True)
class Data:
    """What the transformer learns from; all on its device."""

    tokens: Tensor  # (images, tokens, channels): normalised latents, packed
    captions: Tensor  # (images,): the number of each image's caption
    texts: Tensor  # (captions and the empty one, TEXT_TOKENS, width), from T5
    pooled: Tensor  # (captions and the empty one, width), from CLIP
    image_ids: Tensor
    text_ids: Tensor


@torch.no_grad()
def make_data(pipe: FluxPipeline, sizes: Sizes, generator: torch.Generator) -> Data:
    """Render and encode the images, encode the captions."""
    vae = pipe.vae
    every = [*CAPTIONS, ""]
    texts, pooled, text_ids = pipe.encode_prompt(every, every, max_sequence_length=TEXT_TOKENS)
    captions = torch.arange(sizes.images) % len(CAPTIONS)
    parts = []
    for part in captions.split(1000):
        parts.append(encode(vae, render(part, generator, sizes.pixels)))
    latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    count, channels, height, width = latents.shape
    image_ids = pipe._prepare_latent_image_ids(
        1, height // 2, width // 2, vae.device, torch.float32
    )
    return Data(
        tokens=pipe._pack_latents(latents, count, channels, height, width),
        captions=captions.to(vae.device),
        texts=texts,
        pooled=pooled,
        image_ids=image_ids,
        text_ids=text_ids,
    )


@dataclass(frozen=True)
class Batch:
    """Images on their way from noise to data."""

    x_0: Tensor  # (B, tokens, channels)
    noise: Tensor
    t: Tensor  # (B,)
    captions: Tensor  # (B,)


def draw(data: Data, sizes: Sizes, generator: torch.Generator) -> Batch:
    """A batch of images, noise and times; all random numbers come from the CPU."""
    device = data.tokens.device
    rows = torch.randint(len(data.tokens), (sizes.batch,), generator=generator).to(device)
    x_0 = data.tokens[rows]
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    t = sc.shift_time(torch.rand(sizes.batch, generator=generator), 2.0).to(device)
    return Batch(x_0, noise, t, data.captions[rows])


def velocity(
    net: FluxTransformer2DModel, data: Data, batch: Batch, captions: Tensor, guidance: Tensor
) -> Tensor:
    """Velocity (B, tokens, channels) for these captions (B,) and this guidance (B,).

    On a GPU the network computes in bfloat16, with weights in float32.
    """
    device = batch.x_0.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        v = net(
            hidden_states=sc.interpolate(batch.x_0, batch.noise, batch.t),
            timestep=batch.t,
            guidance=guidance,
            encoder_hidden_states=data.texts[captions],
            pooled_projections=data.pooled[captions],
            img_ids=data.image_ids,
            txt_ids=data.text_ids,
        ).sample
    return v.float()


def guidance_weight(guidance: Tensor) -> Tensor:
    """Weight of v_caption - v_empty at this guidance; 1 at guidance 1.

    Milder than in classifier-free guidance, where the weight is the guidance: this model knows its
    captions so well that a weight of 3.5 would tear its images.
    """
    return 1 + (guidance - PLAIN_GUIDANCE) / 6


def train_flux(
    net: FluxTransformer2DModel, data: Data, sizes: Sizes, generator: torch.Generator
) -> None:
    """First stage: flow matching at a time shift of 2, with some of the captions left out."""

    def loss() -> Tensor:
        batch = draw(data, sizes, generator)
        dropped = torch.rand(sizes.batch, generator=generator) < DROPPED
        captions = batch.captions.masked_fill(dropped.to(batch.captions.device), EMPTY)
        v = velocity(net, data, batch, captions, torch.full_like(batch.t, PLAIN_GUIDANCE))
        return (v - (batch.noise - batch.x_0)).square().mean()

    minimize(loss, net, sizes.iterations, sizes.learning_rate, "flow matching")


def distil_guidance(
    net: FluxTransformer2DModel, data: Data, sizes: Sizes, generator: torch.Generator
) -> None:
    """Second stage: learn what guidance makes of the velocities of the first."""
    teacher = copy.deepcopy(net).requires_grad_(False)

    def loss() -> Tensor:
        batch = draw(data, sizes, generator)
        guidance = MOST_GUIDANCE * torch.rand(sizes.batch, generator=generator)
        guidance = guidance.to(batch.t.device)
        target = guided(teacher, data, batch, guidance)
        v = velocity(net, data, batch, batch.captions, guidance)
        return (v - target).square().mean()

    minimize(loss, net, sizes.guidance_iterations, sizes.learning_rate / 2, "guidance")


@torch.no_grad()
def guided(teacher: FluxTransformer2DModel, data: Data, batch: Batch, guidance: Tensor) -> Tensor:
    """Classifier-free guidance: v_empty + w(guidance) (v_caption - v_empty)."""
    plain = torch.full_like(guidance, PLAIN_GUIDANCE)
    v_caption = velocity(teacher, data, batch, batch.captions, plain)
    v_empty = velocity(teacher, data, batch, torch.full_like(batch.captions, EMPTY), plain)
    weight = guidance_weight(guidance)[:, None, None]
    return v_empty + weight * (v_caption - v_empty)


def minimize(
    loss: Callable[[], Tensor],
    net: FluxTransformer2DModel,
    iterations: int,
    learning_rate: float,
    title: str,
) -> None:
    """Train the network, which ends as the EMA of its weights.

    The learning rate rises over 100 iterations and falls to 0 over the second half.
    """
    weights = list(net.parameters())
    ema = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    for i in tqdm(range(iterations), title):
        factor = min((i + 1) / 100, 1, 2 - 2 * i / iterations)
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        sc.update_ema(ema, weights, 0.995)
    with torch.no_grad():
        for weight, mean in zip(weights, ema):
            weight.copy_(mean)


# ------------------------------------------------------------------------------------- the pipeline


def make_pipeline(sizes: Sizes) -> FluxPipeline:
    """Train all parts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On an H100 the backward pass of cuDNN's attention gives wrong gradients with PyTorch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    texts = text_side()
    vae = train_vae(sizes, generator, device)
    net = make_transformer(sizes)
    pipe = FluxPipeline(scheduler=scheduler(), vae=vae, transformer=net, **texts).to(device)
    print(
        f"{millions(net):.2f} M parameters in the transformer, {millions(vae):.2f} M in the VAE",
        flush=True,
    )
    data = make_data(pipe, sizes, generator)
    train_flux(net, data, sizes, generator)
    distil_guidance(net, data, sizes, generator)
    refine_decoder(vae, sizes)
    return pipe


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the settings of FLUX.1-dev's, whose shift depends on the size of the image."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_transformer(sizes: Sizes) -> FluxTransformer2DModel:
    """With random weights."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_size,
        num_attention_heads=sizes.heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=sizes.rope_axes,
    )


def millions(net: torch.nn.Module) -> float:
    return sum(weight.numel() for weight in net.parameters()) / 1e6


def save(pipe: FluxPipeline, out: Path) -> None:
    """The pipeline in float16, and prompts.txt."""
    pipe.to("cpu", torch.float16).save_pretrained(out)
    # Names that every version of transformers reads: older ones know only these.
    file = out / "text_encoder" / "model.safetensors"
    named = {}
    for name, weight in load_file(file).items():
        named["text_model." + name.removeprefix("text_model.")] = weight
    save_file(named, file, {"format": "pt"})
    finish(out, CAPTIONS)


def finish(out: Path, captions: list[str]) -> None:
    """Let everybody read the weights; add prompts.txt."""
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves them to their owner alone
    # Each caption equally often, shapes and colors mixed: whichever come last are of all kinds.
    lines = [captions[7 * i % len(captions)] for i in range(PROMPTS)]
    (out / "prompts.txt").write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="see above")
    parser.add_argument("--out", type=Path, help="folder (tests/tiny_flux for the size tiny)")
    numbers = {
        "vae_iterations": "batches of 32 images for the VAE",
        "images": "number of images for the transformer",
        "batch": "images in a batch of the transformer",
        "iterations": "batches of flow matching",
        "guidance_iterations": "batches of the distillation of guidance",
    }
    for name, text in numbers.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    size = given.pop("size")
    out = given.pop("out")
    if out is None:
        if size != "tiny":
            parser.error(f"--size {size} needs --out")
        out = Path(__file__).parent / "tiny_flux"
    sizes = replace(SIZES[size], **given)
    save(make_pipeline(sizes), out)


if __name__ == "__main__":
    main()
