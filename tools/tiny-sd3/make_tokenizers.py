"""The three tokenizer folders, trained on captions: byte pairs as CLIP's, a unigram model as T5's.

    python make_tokenizers.py subjects.json.xz OUT_DIR RECIPE
"""

import json
import pathlib
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import networks
import pictures
import scenes

T5_VOCABULARY = 1500
# Words of captions that the scenes do not need but a user may.
WORDS = """the with and in on of at to his her its a an small large tall short happy sad surprised angry smiling sleeping sitting standing walking running
jumping flying waving holding wearing looking arms up down left right front side back antenna hat cap scarf glasses bow beard tail wings photo drawing painting
watercolor sketch poster cartoon clay plastic paper glossy soft shiny old new boy girl man woman person child character creature monster dragon knight wizard""".split()
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus(subjects, plain):
    sampler = scenes.Sampler(subjects, 0, plain)
    return [sampler.scene()[1] for _ in range(20000)] + [text for s in subjects for text in (s["label"], *s["tags"]) for _ in range(4)] + WORDS * 40


def byte_pairs(texts, size):
    """The vocabulary and merges of CLIP's layout: 256 bytes, the same at a word's end, the merges, start and end."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet + [symbol + "</w>" for symbol in alphabet])}
    merges = []
    for merge in json.loads(tokenizer.to_str())["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        if left in vocabulary and right in vocabulary and left + right not in vocabulary and len(vocabulary) < size - 2:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    for special in (START, END):
        vocabulary[special] = len(vocabulary)
    return vocabulary, merges


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n")


def write_clip(folder, vocabulary, merges, pad):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special, "do_lower_case": True, "add_prefix_space": False, "errors": "replace"})


def write_t5(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-&")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(vocab_size=T5_VOCABULARY, special_tokens=list(special.values()), unk_token="<unk>", initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **special, "extra_ids": 0})


def main(subjects_path, out, recipe):
    recipe = networks.RECIPES[recipe]
    texts = corpus(pictures.load(subjects_path, recipe.subjects), recipe.plain)
    vocabulary, merges = byte_pairs(texts, recipe.clip_vocabulary)
    write_clip(out / "tokenizer", vocabulary, merges, END)
    write_clip(out / "tokenizer_2", vocabulary, merges, "!")
    write_t5(out / "tokenizer_3", texts)
    print(f"{len(vocabulary)} byte pairs, {T5_VOCABULARY} unigrams from {len(texts)} texts")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
