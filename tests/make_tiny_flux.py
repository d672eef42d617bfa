"""Make tests/tiny_flux: a small trained FluxPipeline. python tests/make_tiny_flux.py

Renders captioned 32 x 32 pictures ("a red circle"; place, size and the hues of the tiles behind
it are free), trains an AutoencoderKL and a FluxTransformer2DModel on them and saves a directory
that stock diffusers loads, with a list of prompts.
"""

import argparse
import sys
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

SIZE = 32  # pixels
CELL = 8  # pixels from tile to tile
TEXT_TOKENS = 8
SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLORS = {
    "red": (0.90, 0.12, 0.12), "green": (0.10, 0.70, 0.25), "blue": (0.20, 0.40, 0.98),
    "orange": (0.98, 0.55, 0.05), "purple": (0.65, 0.20, 0.80), "white": (0.98, 0.98, 0.98),
}  # fmt: skip
CAPTIONS = [f"a {color} {shape}" for color, shape in product(COLORS, SHAPES)]


def render(caption: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (B, 3, 32, 32) in [-1, 1] of captions (B,), by signed distances."""
    count = len(caption)
    color = torch.tensor(list(COLORS.values()))[caption // len(SHAPES)]
    hue = torch.rand(count, 1, SIZE // CELL, SIZE // CELL, generator=generator)
    tile = 0.29 + 0.22 * torch.cos(2 * torch.pi * (hue - torch.arange(3).reshape(3, 1, 1) / 3))
    inner = (torch.arange(SIZE) % CELL < CELL - 1).float()
    ground = 0.08 + (tile - 0.08).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3) * (
        inner * inner[:, None]
    )
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = line.expand(1, SIZE, SIZE), line[:, None].expand(1, SIZE, SIZE)
    size = 0.36 + 0.16 * torch.rand(count, 1, 1, generator=generator)
    place = (2 * torch.rand(2, count, 1, 1, generator=generator) - 1) * (0.92 - size)
    x, y = (x - place[0]) / size, (y - place[1]) / size
    radius = (x**2 + y**2).sqrt()
    corner = torch.maximum(x.abs(), y.abs())
    arms = torch.minimum(x.abs(), y.abs())
    triangle = torch.maximum((2 * x.abs() - y - 0.95) / 5**0.5, y - 0.8)
    distance = torch.stack(
        [radius - 1, corner - 0.88, triangle, (radius - 0.76).abs() - 0.24,
         torch.maximum(corner - 0.95, arms - 0.3)], 1)  # fmt: skip
    shape = (caption % len(SHAPES)).reshape(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)
    inside = (0.5 - distance.gather(1, shape) * size[:, None] * SIZE / 2).clamp(0, 1)
    return 2 * torch.lerp(ground, color[..., None, None], inside) - 1


def text_side():
    """Tokenizers of the captions' words and letters; small text encoders, random: fixed codes."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz"))
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    clip_tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=77
    )
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=32, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=1, pad_token_id=1))  # fmt: skip
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in words)]
    pieces += [letter for letter in letters]
    t5_tokenizer = T5TokenizerFast(
        vocab=[(piece, 0.0 if i < 3 else -float(i > 4 + len(words)) * 5 - 1)
               for i, piece in enumerate(pieces)],
        extra_ids=0, model_max_length=TEXT_TOKENS)  # fmt: skip
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1))  # fmt: skip
    return clip_tokenizer, clip.eval(), t5_tokenizer, t5.eval()


def train_vae(iterations, generator):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=SIZE, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False)  # fmt: skip
    fit(vae, vae.parameters(), iterations, generator)
    vae.eval().requires_grad_(False)
    latents = encode(vae, render(torch.arange(3000) % len(CAPTIONS), generator))
    vae.register_to_config(scaling_factor=1 / latents.std().item(),
                           shift_factor=latents.mean().item())  # fmt: skip
    return vae


def refine_decoder(vae, iterations):
    """More training for the decoder alone: the latents stay as the transformer knows them."""
    weights = list(vae.decoder.requires_grad_(True).parameters())
    fit(vae, weights, iterations, torch.Generator().manual_seed(1))
    vae.requires_grad_(False)


def fit(vae, weights, iterations, generator, batch=32):
    """Train these weights of the VAE to give back pictures."""
    weights = list(weights)
    optimizer = torch.optim.AdamW(weights, 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, iterations, pct_start=0.2)
    for _ in (bar := tqdm(range(iterations), "vae")):
        x = render(torch.randint(len(CAPTIONS), (batch,), generator=generator), generator)
        code = vae.encode(x).latent_dist
        y = vae.decode(code.sample(generator)).sample
        loss = (x - y).abs().mean() + 2 * (x - y).square().mean() + 1e-4 * code.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{(x - y).square().mean().item():.4f}")


@torch.no_grad()
def encode(vae, pictures):
    return torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(500)])


def train_flux(pipe, iterations, generator, data, batch=64):
    """Plain flow matching at a time shift of 2. Guidance is fed and has no effect."""
    net, vae = pipe.transformer, pipe.vae
    with torch.no_grad():
        texts, pooled, text_ids = pipe.encode_prompt(
            CAPTIONS, CAPTIONS, max_sequence_length=TEXT_TOKENS
        )
    which = torch.arange(data) % len(CAPTIONS)
    latents = torch.cat([encode(vae, render(w, generator)) for w in which.split(1000)])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    side = latents.shape[-1]
    packed = pipe._pack_latents(latents, data, latents.shape[1], side, side)
    ids = pipe._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    average = [w.detach().clone() for w in net.parameters()]
    for i in (bar := tqdm(range(iterations), "flux")):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((i + 1) / 100, 1, 2 - 2 * i / iterations)
        rows = torch.randint(data, (batch,), generator=generator)
        x_0 = packed[rows]
        noise = torch.randn(x_0.shape, generator=generator)
        t = sc.shift_time(torch.rand(batch, generator=generator), 2.0)
        v = net(
            hidden_states=sc.interpolate(x_0, noise, t), timestep=t,
            guidance=8 * torch.rand(batch, generator=generator), img_ids=ids, txt_ids=text_ids,
            encoder_hidden_states=texts[which[rows]], pooled_projections=pooled[which[rows]],
        ).sample  # fmt: skip
        loss = (v - (noise - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        sc.update_ema(average, net.parameters(), 0.995)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        for weight, mean in zip(net.parameters(), average):
            weight.copy_(mean)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_flux")
    parser.add_argument("--vae-iterations", type=int, default=1500, help="batches of 32 pictures")
    parser.add_argument("--iterations", type=int, default=20_000, help="batches of 64 latents")
    parser.add_argument("--pictures", type=int, default=20_000, help="to train it on")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    clip_tokenizer, clip, t5_tokenizer, t5 = text_side()
    vae = train_vae(args.vae_iterations, generator)
    net = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=24,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(4, 10, 10))  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096)  # fmt: skip
    pipe = FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, net)
    print(f"{sum(w.numel() for w in net.parameters()) / 1e6:.2f} M parameters in the transformer,",
          f"{sum(w.numel() for w in vae.parameters()) / 1e6:.2f} M in the VAE")  # fmt: skip
    train_flux(pipe, args.iterations, generator, args.pictures)
    refine_decoder(vae, 2 * args.vae_iterations)
    pipe.to(torch.float16).save_pretrained(args.out)
    # Names that every version of transformers reads: older ones know only these.
    weights = load_file(file := args.out / "text_encoder" / "model.safetensors")
    names = {name: "text_model." + name.removeprefix("text_model.") for name in weights}
    save_file({names[name]: x for name, x in weights.items()}, file, {"format": "pt"})
    # Each caption ten times, shapes and colours mixed: whichever come last are of all kinds.
    lines = [CAPTIONS[7 * i % len(CAPTIONS)] for i in range(10 * len(CAPTIONS))]
    (args.out / "prompts.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
