"""Parts of the tiny pipelines, their weights random: tokenizers, text encoders, the images' autoencoder."""

from itertools import chain

from diffusers import AutoencoderKL
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tiny import shapes

TOKENS = 16  # the longest prompt has 10 words


def build_tokenizer(length=TOKENS):
    """A CLIPTokenizer whose words are those of the world of images; any other becomes unknown."""
    start, end, unknown = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
    tokenizer = CLIPTokenizer(
        vocab={start: 0, end: 1, unknown: 2},
        merges=[],
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        model_max_length=length,
    )
    values = chain(*shapes.ATTRIBUTES.values())
    words = ["a", "on", "background", "shape", *values]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def build_t5_tokenizer():
    """A T5Tokenizer whose pieces are the words of the world of videos; any other becomes unknown."""
    values = chain(*shapes.VIDEO.values())
    words = ["a", "on", "background", "shape", "moving", *values]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def build_clip(kind, width, tokenizer, projection=64):
    """A random CLIP text encoder of the class `kind`, two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def build_t5(width, tokenizer, layers=2):
    """A random T5 encoder."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=TOKENS,
    )
    return T5EncoderModel(config)


def build_vae(**config):
    """An autoencoder of images: latents [n, 4, 8, 8]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=shapes.SIDE,
        block_out_channels=(16, 32, 32),
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        scaling_factor=0.5,
        **config,
    )
