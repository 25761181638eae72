"""A whole model folder of a few kilobytes, and rows to run it on."""

import json

from conftest import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "Summarize the dialogue into a few short sentences.\n\nDialogue: Ann: hey, did you get the tickets?\nBob: no :("
LISTS = {"answers": ["Bob has no tickets."], "all_classes": None, "length": 12}


def tiny_tokenizer():
    """A byte-level BPE tokenizer with fewer tokens than `random_model` has; `<s>`, as Llama's, comes first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [character for character in pre_tokenizers.ByteLevel.alphabet() if character < "~"] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(vocab_size=190, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_tiny(folder, architecture="llama", **settings):
    """Save a random model with its tokenizer; `silent=True` makes it give the token 0 wherever it may."""
    silent = settings.pop("silent", False)
    model = random_model(architecture, **settings)
    if silent:
        model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_rows(folder, dataset="samsum", count=3, **fields):
    """Write `count` rows of LongBench's format, of different lengths."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"context": TEXT * (index + 2), "input": "Dialogue: Bob: ok\nSummary: ", **LISTS} for index in range(count)
    ]
    content = "".join(json.dumps(row | fields, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{dataset}.jsonl").write_text(content, encoding="utf-8")
    return folder
