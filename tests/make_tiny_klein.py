"""Make tests/tiny_klein: a small trained Flux2KleinPipeline. python tests/make_tiny_klein.py

The images are those of tests/tiny_flux in twice as many colors. Like FLUX.2-klein-base the
transformer takes no guidance: it is sampled with classifier-free guidance, two calls a step. Some
captions are left out in training, so that the empty one is known, and some are wrong, as captions
from the web are. So the model alone often shows something else than the caption, and with guidance
it seldom does.

The images have 32 x 32 pixels and 16 tokens, the transformer 1.6 million parameters. 40 minutes on
two cores.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import make_tiny_flux as tiny
import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from make_tiny_flux import DROPPED, TEXT_TOKENS, Sizes
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

import shortcut as sc

TINY = Path(__file__).parent / "tiny_klein"
SIZES = replace(tiny.SIZES["tiny"], head_size=32, rope_axes=(4, 12, 12, 4), iterations=12_000)
COLORS = {
    **tiny.COLORS,
    "yellow": (0.96, 0.90, 0.15),
    "pink": (0.98, 0.62, 0.80),
    "cyan": (0.15, 0.85, 0.90),
    "lime": (0.62, 0.95, 0.25),
    "gray": (0.62, 0.62, 0.62),
    "magenta": (0.92, 0.12, 0.60),
}
CAPTIONS = tiny.captions_of(COLORS)
EMPTY = len(CAPTIONS)  # the number of the empty caption
WRONG = 0.3  # fraction of captions that are replaced by any of them
LATENT_CHANNELS = 4
TEXT_WIDTH = 16  # of the text encoder; the transformer gets three of its layers, side by side

# ------------------------------------------------------------------------------------ the text side


def text_side() -> dict:
    """A tokenizer that knows the captions' words; a small random text encoder: fixed codes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(CAPTIONS, trainer)
    merges = json.loads(learned.to_str())["model"]["merges"]
    vocabulary = learned.get_vocab()
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in merges],
        model_max_length=TEXT_TOKENS,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    )
    end = vocabulary["<|endoftext|>"]
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=28,  # the pipeline takes the states after 9, 18 and 27 of them
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,  # large enough that captions have different codes
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=None,
    )
    return {"tokenizer": tokenizer, "text_encoder": Qwen3ForCausalLM(config).eval()}


# ------------------------------------------------------------------------------------------ the VAE


def train_vae(sizes: Sizes, generator: torch.Generator) -> AutoencoderKLFlux2:
    """A VAE of these images; its batch norm normalises patches of 2 x 2 latents."""
    blocks = len(sizes.vae_widths)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=sizes.vae_widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=sizes.pixels,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tiny.fit(vae, vae.parameters(), sizes, sizes.vae_iterations, generator, COLORS)
    vae.eval().requires_grad_(False)
    captions = torch.arange(min(3000, sizes.images)) % len(CAPTIONS)
    patches = patchified(tiny.encode(vae, render(captions, generator, sizes)))
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))
    return vae


def render(captions: Tensor, generator: torch.Generator, sizes: Sizes) -> Tensor:
    """Images (B, 3, pixels, pixels) in [-1, 1] of captions (B,)."""
    return tiny.render(captions, generator, sizes.pixels, COLORS)


def patchified(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as (B, 4 C, H / 2, W / 2)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2)


# ---------------------------------------------------------------------------------- the transformer


@dataclass(frozen=True)
class Data:
    """What the transformer learns from."""

    tokens: Tensor  # (images, tokens, channels): normalised patches of latents
    captions: Tensor  # (images,): the number of each image's caption
    texts: Tensor  # (captions and the empty one, TEXT_TOKENS, width)
    image_ids: Tensor
    text_ids: Tensor


@torch.no_grad()
def make_data(pipe: Flux2KleinPipeline, sizes: Sizes, generator: torch.Generator) -> Data:
    """Render and encode the images, encode the captions."""
    vae = pipe.vae
    texts, text_ids = pipe.encode_prompt([*CAPTIONS, ""], max_sequence_length=TEXT_TOKENS)
    captions = torch.arange(sizes.images) % len(CAPTIONS)
    parts = []
    for part in captions.split(1000):
        parts.append(tiny.encode(vae, render(part, generator, sizes)))
    patches = patchified(torch.cat(parts))
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    patches = (patches - vae.bn.running_mean[:, None, None]) / deviation[:, None, None]
    return Data(
        tokens=patches.flatten(2).mT.contiguous(),
        captions=captions,
        texts=texts,
        image_ids=pipe._prepare_latent_ids(patches[:1]),
        text_ids=text_ids[:1],
    )


def train_klein(
    net: Flux2Transformer2DModel, data: Data, sizes: Sizes, generator: torch.Generator
) -> None:
    """Flow matching at a time shift of 2, with some captions wrong and some left out."""

    def loss() -> Tensor:
        batch = tiny.draw(data, sizes, generator)
        count = sizes.batch
        wrong = torch.rand(count, generator=generator) < WRONG
        any_caption = torch.randint(len(CAPTIONS), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < DROPPED
        captions = torch.where(wrong, any_caption, batch.captions).masked_fill(dropped, EMPTY)
        v = net(
            hidden_states=sc.interpolate(batch.x_0, batch.noise, batch.t),
            timestep=batch.t,
            encoder_hidden_states=data.texts[captions],
            img_ids=data.image_ids,
            txt_ids=data.text_ids,
        ).sample
        return (v - (batch.noise - batch.x_0)).square().mean()

    tiny.minimize(loss, net, sizes.iterations, sizes.learning_rate, "flow matching")


# ------------------------------------------------------------------------------------- the pipeline


def make_pipeline(sizes: Sizes) -> Flux2KleinPipeline:
    """Train all parts."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    texts = text_side()
    vae = train_vae(sizes, generator)
    net = make_transformer(sizes)
    pipe = Flux2KleinPipeline(scheduler=tiny.scheduler(), vae=vae, transformer=net, **texts)
    sizes_of = f"{tiny.millions(net):.2f} M parameters in the transformer"
    print(f"{sizes_of}, {tiny.millions(vae):.2f} M in the VAE", flush=True)
    train_klein(net, make_data(pipe, sizes, generator), sizes, generator)
    tiny.refine_decoder(vae, sizes, COLORS)
    return pipe


def make_transformer(sizes: Sizes) -> Flux2Transformer2DModel:
    """With random weights."""
    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_size,
        num_attention_heads=sizes.heads,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=sizes.rope_axes,
        guidance_embeds=False,
    )


def save(pipe: Flux2KleinPipeline, out: Path) -> None:
    """The pipeline in float16, and prompts.txt."""
    pipe.to(torch.float16).save_pretrained(out)
    tiny.finish(out, CAPTIONS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=TINY, help="folder (tests/tiny_klein)")
    for name in ("vae_iterations", "images", "batch", "iterations"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=argparse.SUPPRESS, help="see make_tiny_flux.py")
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    save(make_pipeline(replace(SIZES, **given)), out)


if __name__ == "__main__":
    main()
