"""Small random encoders in the folder format of the libraries: CLIP, T5 and the VAEs of SD 1.5 and SD 3."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from helpers.network_cases import randomize_constants_
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from gesso.data.encoders import hub

MAX_TOKENS = 12
"""maximum length of the CLIP tokenizer"""
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-!"
MARKS = ("<|startoftext|>", "<|endoftext|>")
MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "t h", "th e</w>", "s e", "se v", "sev e", "seve n</w>"]
SD3_SETTINGS = dict(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
VAE_SETTINGS = {4: {}, 16: SD3_SETTINGS}
"""settings by number of latent channels"""


def clip_vocabulary() -> dict[str, int]:
    """Return the token ids: letters, merges and the two marks."""
    letters = [letter + end for end in ("", "</w>") for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]
    names = [*letters, *(merge.replace(" ", "") for merge in MERGES), *MARKS]
    return {name: i for i, name in enumerate(names)}


def write_clip_tokenizer(folder: Path) -> None:
    """Write the files of a CLIP tokenizer of at most MAX_TOKENS tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def clip_config(**settings: object) -> CLIPTextConfig:
    """Return a small CLIP text configuration."""
    ids = clip_vocabulary()
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=10)
    marks = dict(bos_token_id=ids[MARKS[0]], eos_token_id=ids[MARKS[1]], pad_token_id=ids[MARKS[1]])
    return CLIPTextConfig(vocab_size=len(ids), max_position_embeddings=MAX_TOKENS, **shape, **marks | settings)


def save_randomized(model: torch.nn.Module, folder: Path, seed: int = 0) -> Path:
    """Save a model without constant tensors; return the folder."""
    with hub.quiet_logging("transformers"):
        randomize_constants_(model, seed).save_pretrained(folder)
    return folder


def write_clip(folder: Path, kind: type = CLIPTextModel, **settings: object) -> Path:
    """Write a CLIP text encoder with its tokenizer; return the folder."""
    torch.manual_seed(0)
    write_clip_tokenizer(folder)
    return save_randomized(kind(clip_config(initializer_factor=5.0, **settings)), folder)


def write_full_clip(folder: Path) -> Path:
    """Write CLIP with text and image towers; return the folder."""
    torch.manual_seed(1)
    write_clip_tokenizer(folder)
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = clip_config(initializer_factor=5.0).to_dict()
    return save_randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)), folder)


def write_t5_tokenizer(folder: Path) -> None:
    """Write a T5 tokenizer of single letters and a few pieces."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, "▁a", "▁red", "▁the", "▁seven", "se", "ven"]
    fast = Tokenizer(models.Unigram([(piece, -float(i > 3)) for i, piece in enumerate(pieces)], unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=fast, extra_ids=0).save_pretrained(folder)


def write_t5(folder: Path, kind: type = T5EncoderModel) -> Path:
    """Write a T5 encoder with its tokenizer; return the folder."""
    torch.manual_seed(2)
    write_t5_tokenizer(folder)
    shape = dict(vocab_size=64, d_model=14, d_kv=4, d_ff=20, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    return save_randomized(kind(T5Config(**shape, decoder_start_token_id=0)), folder)


def write_vae(folder: Path, channels: int, **settings: object) -> Path:
    """Write a VAE of 4 or 16 latent channels that shrinks by 8; return the folder."""
    torch.manual_seed(channels)
    levels = 4
    model = AutoencoderKL(
        latent_channels=channels, block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        **VAE_SETTINGS[channels] | settings,
    )  # fmt: skip
    randomize_constants_(model).save_pretrained(folder)
    return folder
