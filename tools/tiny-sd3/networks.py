"""The parts of the model as diffusers' and transformers' own classes, and one file format for all their weights."""

import dataclasses
import pathlib

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

LARGE, GIANT, T5 = 64, 96, 192
CLIP_LENGTH = 77
SHIFT = 3.0
PARTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, and on what."""

    size: int  # edge of a picture in pixels
    channels: tuple  # of the autoencoder's levels
    groups: int  # of its normalisations
    t5_length: int  # tokens of a caption for T5
    positions: int  # largest grid of patches
    clip_vocabulary: int
    subjects: int | None  # how many are drawn; without a number those of short names
    plain: bool  # subjects on white only


RECIPES = {
    "plain": Recipe(64, (16, 48, 96, 128), 4, 16, 24, 2000, 240, True),
    "broad": Recipe(96, (32, 64, 96, 128), 8, 24, 16, 1900, None, False),
}


def autoencoder(recipe):
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=recipe.channels, layers_per_block=1, latent_channels=16, norm_num_groups=recipe.groups, sample_size=recipe.size,
        scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def clip(width, vocabulary):
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=3, num_attention_heads=width // 32,
        max_position_embeddings=CLIP_LENGTH, hidden_act="quick_gelu" if width == LARGE else "gelu", bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1 if width == LARGE else 0,
    ))  # fmt: skip


def t5(vocabulary):
    return T5EncoderModel(T5Config(
        vocab_size=vocabulary, d_model=T5, d_kv=48, d_ff=384, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
    ))  # fmt: skip


def mmdit(recipe):
    return SD3Transformer2DModel(
        sample_size=recipe.size // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=6, attention_head_dim=64, num_attention_heads=3,
        joint_attention_dim=T5, caption_projection_dim=192, pooled_projection_dim=LARGE + GIANT, pos_embed_max_size=recipe.positions,
    )  # fmt: skip


class Tokens:
    """Token numbers of captions, padded as the pipeline pads them."""

    def __init__(self, folder, recipe):
        folder = pathlib.Path(folder)
        self.clip = CLIPTokenizer.from_pretrained(folder / "tokenizer").backend_tokenizer
        self.clip.no_padding()
        self.clip.enable_truncation(CLIP_LENGTH)
        self.t5 = Tokenizer.from_file(str(folder / "tokenizer_3/tokenizer.json"))
        self.t5_length = recipe.t5_length
        self.t5.enable_truncation(self.t5_length)
        self.clip_vocabulary, self.t5_vocabulary = self.clip.get_vocab_size(), self.t5.get_vocab_size()
        self.giant_pad = self.clip.token_to_id("!")

    def __call__(self, captions):
        """Three tensors: CLIP-L's [n, 77], CLIP-G's [n, 77] and T5's [n, t5_length]."""
        end = self.clip_vocabulary - 1
        large, giant = torch.full((len(captions), CLIP_LENGTH), end), torch.full((len(captions), CLIP_LENGTH), self.giant_pad)
        last = torch.zeros(len(captions), self.t5_length, dtype=torch.long)
        for i, (pairs, words) in enumerate(zip(self.clip.encode_batch(captions), self.t5.encode_batch(captions))):
            large[i, : len(pairs.ids)] = giant[i, : len(pairs.ids)] = torch.tensor(pairs.ids)
            last[i, : len(words.ids)] = torch.tensor(words.ids)
        return large, giant, last


class Model(torch.nn.Module):
    """All parts; their names are the folders of diffusers' layout."""

    def __init__(self, recipe, tokens):
        super().__init__()
        self.vae = autoencoder(recipe)
        self.text_encoder, self.text_encoder_2 = clip(LARGE, tokens.clip_vocabulary), clip(GIANT, tokens.clip_vocabulary)
        self.text_encoder_3 = t5(tokens.t5_vocabulary)
        self.transformer = mmdit(recipe)

    def encode(self, large, giant, last):
        """Embeddings [n, 77 + t5_length, 192] and pooled embeddings [n, 160], as the pipeline makes them."""
        one, two = self.text_encoder(large, output_hidden_states=True), self.text_encoder_2(giant, output_hidden_states=True)
        both = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        third = self.text_encoder_3(last)[0]
        return torch.cat([F.pad(both, (0, T5 - both.shape[-1])), third.to(both.dtype)], 1), torch.cat([one.text_embeds, two.text_embeds], -1)

    def pipeline(self, tokenizers):
        """diffusers' own pipeline of these parts."""
        folder = pathlib.Path(tokenizers)
        return StableDiffusion3Pipeline(
            transformer=self.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=self.vae,
            text_encoder=self.text_encoder, tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder_2=self.text_encoder_2, tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            text_encoder_3=self.text_encoder_3, tokenizer_3=AutoTokenizer.from_pretrained(folder / "tokenizer_3"),
        )  # fmt: skip

    def save(self, folder):
        """All weights in f16 in three files of about the same size, so that each stays small."""
        tensors = {name: value.detach().half().cpu().contiguous() for name, value in self.state_dict().items() if value.is_floating_point()}
        vae = self.vae.config
        tensors["latents"] = torch.tensor([vae.scaling_factor, vae.shift_factor])
        files, sizes = [{}, {}, {}], [0, 0, 0]
        for name, value in sorted(tensors.items(), key=lambda item: -item[1].numel()):
            smallest = sizes.index(min(sizes))
            files[smallest][name] = value
            sizes[smallest] += value.numel()
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(files):
            save_file(file, f"{folder}/weights-{i}.safetensors")

    def restore(self, folder):
        tensors = {}
        for path in sorted(pathlib.Path(folder).glob("weights-*.safetensors")):
            tensors.update(load_file(path))
        scale, shift = tensors.pop("latents").tolist()
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if self.state_dict()[name].is_floating_point()]
        if missing or unexpected:
            raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}")
        self.vae.register_to_config(scaling_factor=scale, shift_factor=shift)
