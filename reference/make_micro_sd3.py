"""Writes tests/fixtures/micro-sd3/ (a random Stable Diffusion 3 of a few hundred kilobytes in diffusers layout) and tests/fixtures/dataset/ (six small pictures with captions).

    pip install -r requirements.txt && python make_micro_sd3.py

The model draws nothing: it is for tests of the job around it (checkpoints, fencing, publishing), not of numerics.
"""
import json
import os
import shutil

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "fixtures")
MODEL, DATASET = os.path.join(HERE, "micro-sd3"), os.path.join(HERE, "dataset")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 70), "blue": (50, 80, 220), "black": (20, 20, 20), "orange": (240, 150, 30), "pink": (240, 130, 190)}
SHAPES = ["circle", "square", "triangle"]


def write_json(path, value):
    with open(path, "w") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def rows():
    for i, (name, colour) in enumerate(COLOURS.items()):
        shape = SHAPES[i % 3]
        yield f"{'sub/' if i == 5 else ''}{i:02}-{name}-{shape}.png", f"a {name} {shape}", colour, shape, (36 + 3 * i, 40 - i)


def make_dataset():
    shutil.rmtree(DATASET, ignore_errors=True)
    os.makedirs(os.path.join(DATASET, "sub"))
    with open(os.path.join(DATASET, "metadata.jsonl"), "w") as metadata:
        for file_name, caption, colour, shape, (w, h) in rows():
            image = Image.new("RGB", (w, h), "white")
            draw, box = ImageDraw.Draw(image), (6, 6, w - 7, h - 7)
            if shape == "circle":
                draw.ellipse(box, fill=colour)
            elif shape == "square":
                draw.rectangle(box, fill=colour)
            else:
                draw.polygon([(w // 2, 6), (w - 7, h - 7), (6, h - 7)], fill=colour)
            image.save(os.path.join(DATASET, file_name))
            metadata.write(json.dumps({"file_name": file_name, "caption": caption}) + "\n")


def make_tokenizers():
    corpus = [caption for _, caption, *_ in rows()] * 20
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, kept = {c: i for i, c in enumerate(alphabet + [c + "</w>" for c in alphabet])}, []
    for a, b in merges:
        if a in vocab and b in vocab and a + b not in vocab:
            vocab[a + b] = len(vocab)
            kept.append((a, b))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        folder = os.path.join(MODEL, name)
        os.makedirs(folder)
        write_json(f"{folder}/vocab.json", vocab)
        with open(f"{folder}/merges.txt", "w") as file:
            file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in kept))
        tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
        write_json(f"{folder}/special_tokens_map.json", tokens)
        write_json(f"{folder}/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens, "do_lower_case": True, "add_prefix_space": False, "errors": "replace"})
    t5 = Tokenizer(models.Unigram())
    t5.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    t5.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    t5.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-&")
    t5.train_from_iterator(corpus, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=letters, show_progress=False))
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    folder = os.path.join(MODEL, "tokenizer_3")
    os.makedirs(folder)
    t5.save(f"{folder}/tokenizer.json")
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(f"{folder}/special_tokens_map.json", tokens)
    write_json(f"{folder}/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **tokens, "extra_ids": 0})
    return vocab, t5.get_vocab_size()


def save(model, name):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter[0].numel() ** 0.5)
    model.half().save_pretrained(os.path.join(MODEL, name))


def main():
    torch.manual_seed(1)
    np.random.seed(1)
    shutil.rmtree(MODEL, ignore_errors=True)
    os.makedirs(MODEL)
    vocab, t5_vocab = make_tokenizers()
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    for name, width, act, pad in (("text_encoder", 16, "quick_gelu", end), ("text_encoder_2", 24, "gelu", vocab["!"])):
        save(CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(vocab), hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=2, num_attention_heads=2, hidden_act=act, bos_token_id=start, eos_token_id=end, pad_token_id=pad)), name)
    save(T5EncoderModel(T5Config(vocab_size=t5_vocab, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0.0)), "text_encoder_3")
    save(AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False), "vae")
    save(SD3Transformer2DModel(sample_size=4, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=8), "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(os.path.join(MODEL, "scheduler"))
    classes = {"text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel", "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"}
    index = {"_class_name": "StableDiffusion3Pipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write_json(os.path.join(MODEL, "model_index.json"), index | {k: ["transformers", v] for k, v in classes.items()})
    make_dataset()


if __name__ == "__main__":
    main()
