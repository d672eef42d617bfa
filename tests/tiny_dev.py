"""A small FLUX.2-dev with random weights, for tests: a whole Flux2Pipeline.

FLUX.2-dev's tokenizer is a processor of texts and images, which needs torchvision. This one has a
tokenizer with a template of the same kind, so that all else is as it is in FLUX.2-dev.
"""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from make_tiny_flux import CAPTIONS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

MARKS = {"system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "user": ("[INST]", "[/INST]")}
TEMPLATE = (
    "<s>{% for message in messages %}"
    "{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}"
    "{% endfor %}"
)
TEXT_WIDTH = 8


def make_tiny_dev() -> Flux2Pipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    encoder_config = Mistral3Config(
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=31,  # the pipeline takes the states after 10, 20 and 30 of them
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=512,
            initializer_range=0.3,  # large enough that texts have different codes
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        image_token_index=tokenizer.unk_token_id,  # no text has one
    )
    net = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
        timestep_guidance_channels=32,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae.eval(),
        transformer=net.eval(),
        text_encoder=Mistral3ForConditionalGeneration(encoder_config).eval(),
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the captions and of the pipeline's system message."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [mark for both in MARKS.values() for mark in both]
    trainer = trainers.WordLevelTrainer(
        special_tokens=["<unk>", "<pad>", "<s>", *marks], show_progress=False
    )
    words.train_from_iterator([*CAPTIONS, SYSTEM_MESSAGE], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        additional_special_tokens=marks,
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
