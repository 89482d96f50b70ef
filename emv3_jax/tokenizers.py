"""Prompts -> token ids.

The demo's whole language is a short list of words (`WordTokenizer`); umT5 reads any language in pieces of words
(`UMT5Tokenizer`). Both give ids [B, length] and a mask, end every text with a mark, and refuse a text that is too long
instead of cutting it.
"""

import os
import re
from collections.abc import Sequence

import numpy as np

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike

PADDING, END, UNKNOWN = 0, 1, 2
FIRST_WORD = 3

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]|_")  # a word (don't is one), or one mark of punctuation
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'"})


def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks of `text`, in order."""
    return _TOKEN.findall(text.lower().translate(_QUOTES))


class WordTokenizer:
    """Fixed vocabulary, fixed length. A text is lower-cased and cut into words; punctuation is split off and, unless
    the vocabulary holds it, dropped. Ids: 0 padding, 1 end of text, 2 unknown word, then the words in the order given.

    words: distinct, lower-case, each one token of `split_words` (no spaces, no hyphens).
    length: tokens per prompt, the end mark included.
    """

    def __init__(self, words: Sequence[str], length: int):
        bad = [word for word in words if split_words(word) != [word]]
        if bad:
            raise ValueError(f"not single lower-case words: {', '.join(map(repr, bad))}")
        if len(set(words)) != len(words):
            raise ValueError(f"words repeat: {', '.join(sorted({w for w in words if list(words).count(w) > 1}))}")
        if length < 1:
            raise ValueError(f"length must be at least 1, for the end mark; got {length}")
        self.words = tuple(words)
        self.length = length
        self._ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, the three special ones included: the `vocab` a text encoder needs."""
        return FIRST_WORD + len(self.words)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, length] int32 and mask [B, length] float32, 1 at words and at the end mark, 0 at padding.

        An empty text is the end mark alone. Raises UserError for a text with more than `length - 1` words, or one that
        UTF-8 cannot write.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, not one string")
        ids = np.full((len(texts), self.length), PADDING, np.int32)
        mask = np.zeros((len(texts), self.length), np.float32)
        for row, text in enumerate(texts):
            _check_text(text)
            tokens = [self._ids.get(token, UNKNOWN) for token in self._tokens(text)] + [END]
            if len(tokens) > self.length:
                raise UserError(
                    f"the prompt {_shorten(text)!r} has {len(tokens) - 1} words and the model reads "
                    f"{self.length - 1}: shorten it"
                )
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1.0
        return ids, mask

    def notes(self, text: str) -> list[str]:
        """What a user should know of how `text` is read."""
        unknown = self.unknown(text)
        known = ", ".join(self.words)
        return [f"the demo does not know the words {', '.join(unknown)}; it knows {known}"] if unknown else []

    def unknown(self, text: str) -> list[str]:
        """Words of `text` that the vocabulary lacks, each once, in order of appearance."""
        return list(dict.fromkeys(token for token in self._tokens(text) if token not in self._ids))

    def _tokens(self, text: str) -> list[str]:
        """Words, and those punctuation marks that the vocabulary holds."""
        return [token for token in split_words(text) if token in self._ids or token[0].isalnum()]


class UMT5Tokenizer:
    """The SentencePiece tokenizer of umT5, from the folder `google/umt5-xxl` of the released weights (SPEC section 1).

    folder: holds tokenizer.json and tokenizer_config.json.
    length: tokens per prompt, the end mark included.
    Raises UserError where the folder holds no tokenizer.
    """

    def __init__(self, folder: PathLike, length: int):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # tokenizers do not need the torch it misses
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers passes on whatever its readers raise
            reason = str(error).strip().split("\n")[0][:150]
            raise UserError(
                f"{folder} holds no tokenizer that can be read ({reason}): copy google/umt5-xxl of the released weights"
            ) from error
        self.length = length

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, length] int32 and mask [B, length] float32; raises UserError for a text that is too long or
        that UTF-8 cannot write."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, not one string")
        ids = np.full((len(texts), self.length), PADDING, np.int32)
        mask = np.zeros((len(texts), self.length), np.float32)
        for row, text in enumerate(texts):
            _check_text(text)
            tokens = self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
            if len(tokens) > self.length:
                raise UserError(
                    f"the prompt {_shorten(text)!r} has {len(tokens)} tokens and the model reads {self.length}: shorten"
                    " it"
                )
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1.0
        return ids, mask

    def notes(self, text: str) -> list[str]:
        """Nothing: every text can be read."""
        return []


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"the prompt {_shorten(text)!r} is not text in UTF-8: write it anew") from None


def _shorten(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
