"""A tokenizer that knows a few words."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "a", "photo", "of", "."]


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One for captions of these words."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *words])}
    known = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8)
