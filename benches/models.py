"""Models of the published sizes with random weights: time and memory do not depend on trained ones."""
import json
import shutil

import torch

from finetune_run import BUCKET

# Heads of 64, blocks, blocks with a second attention, whether queries and keys are normalised.
TRANSFORMERS = {
    "sd3-medium": {"num_attention_heads": 24, "num_layers": 24},
    "sd3.5-medium": {"num_attention_heads": 24, "num_layers": 24, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    "sd3.5-large": {"num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm"},
}


def transformer(name, joint=4096, pooled=2048):
    from diffusers import SD3Transformer2DModel

    sizes = TRANSFORMERS[name]
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, caption_projection_dim=64 * sizes["num_attention_heads"],
        joint_attention_dim=joint, pooled_projection_dim=pooled, pos_embed_max_size=192, **sizes,
    )  # fmt: skip


def save(make, folder):
    """In half precision and one file. Made in half precision at once: a large model in f32 would not fit some hosts."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        made = make()
    torch.set_default_dtype(torch.float32)
    made.half().save_pretrained(folder, max_shard_size="30GB")
    del made
    torch.cuda.empty_cache()


def trained_size(name, folder):
    """The quickstart's model with a transformer of a published width and depth: what the memory of training depends on."""
    if folder.exists():
        return
    shutil.copytree(BUCKET / "models/tiny-sd3", folder)
    shutil.rmtree(folder / "transformer")
    save(lambda: transformer(name, joint=192, pooled=160), folder / "transformer")


def full_size(name, folder):
    """Published sizes in every part, the quickstart's tokenizers and scheduler."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if folder.exists():
        return
    source = BUCKET / "models/tiny-sd3"
    for part in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(source / part, folder / part)
    shutil.copy(source / "model_index.json", folder)
    vocabulary = json.loads((source / "text_encoder/config.json").read_text())
    clip = lambda width, layers, act: CLIPTextConfig(  # noqa: E731
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64, projection_dim=width, hidden_act=act,
        vocab_size=vocabulary["vocab_size"], bos_token_id=vocabulary.get("bos_token_id"), eos_token_id=vocabulary.get("eos_token_id"),
        pad_token_id=vocabulary.get("pad_token_id"),
    )  # fmt: skip
    parts = {
        "transformer": lambda: transformer(name),
        "vae": lambda: AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
        ),
        "text_encoder": lambda: CLIPTextModelWithProjection(clip(768, 12, "quick_gelu")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(clip(1280, 32, "gelu")),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )),
    }  # fmt: skip
    for part, make in parts.items():
        save(make, folder / part)
