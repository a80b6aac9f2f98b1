"""Makes sentencepiece/: a small `spiece.model` with rules of its own for odd characters, and the ids that transformers reads with it.

    pip install -r requirements.txt && python make_sentencepiece.py sentencepiece
"""

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile

import sentencepiece
from transformers import T5Tokenizer

WORDS = (
    "a photo of the red ball on green field robot sad blue man sitting chair window light soft film still painting Robi café naïve "
    "ﬁlm 3 5 2024 don't it's under over street night morning river mountain snow child old woman smiling"
).split()
RULES = {
    "\ufb01": "fi", "\u00a0": " ", "\u3000": " ", "\t": " ", "\n": " ", "\r": " ", "\u2026": "...", "\u2116": "No",
    "\uff21": "A", "\u2462": "3", "e\u0301": "\u00e9", "\u200b": "", "\u200e": " ",
}
CAPTIONS = [
    "", " ", "a red ball", "  a  red   ball  ", "Robi, blue and sad", "café №5", "cafe\u0301 ﬁlm", "a\u00a0red\u3000ball\tnow\nnext\r\nline",
    "don't it's", "日本語のキャプション", "emoji 🤖🎨 end", "👩\u200d👩\u200d👧 family", "<pad> and </s> and <unk>", "a</s>b",
    "<extra_id_0> x <extra_id_99>", "▁already▁marked", "UPPER lower MiXeD", "1234567890 3.5", "…dots…", "zero\u200bwidth\u200e mark",
    "Ａ fullwidth ③", "مرحبا بالعالم", "trailing space ", "\ttab first", "a.b,c;d:e!f?g", "<lora:x:1.0> (red:1.2)", "x" * 300,
    "naïve café — street", "\ufffd \u0000 nul", "ẞ ß İ ı",
]


def main(out):
    out = os.path.abspath(out)
    os.makedirs(out, exist_ok=True)
    random.seed(7)
    # The file names its input: without a folder's name it is the same each time.
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        with open("corpus.txt", "w") as file:
            for _ in range(3000):
                words = random.choices(WORDS, k=random.randint(3, 12))
                file.write(" ".join(words) + random.choice([".", "!", ", ok", "", " - x"]) + "\n")
        with open("rules.tsv", "w") as file:
            for source, target in RULES.items():
                file.write("\t".join(" ".join(f"{ord(c):X}" for c in text) for text in (source, target)) + "\n")
        sentencepiece.SentencePieceTrainer.train(
            input="corpus.txt", model_prefix="spiece", vocab_size=80, model_type="unigram", character_coverage=1.0,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2,
            normalization_rule_tsv="rules.tsv",
        )
        shutil.move("spiece.model", f"{out}/spiece.model")
    tokenizer = T5Tokenizer.from_pretrained(out)
    with open(f"{out}/expected.json", "w") as file:
        json.dump([{"caption": c, "ids": tokenizer(c)["input_ids"]} for c in CAPTIONS], file, indent=0)


if __name__ == "__main__":
    main(sys.argv[1])
