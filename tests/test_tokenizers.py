import numpy as np
import pytest

from emv3_jax.errors import UserError
from emv3_jax.tokenizers import WordTokenizer, split_words

WORDS = ("the", "puppet", "nods", "waves", "its", "hand", "doesn't", ",")


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(WORDS, length=8)


def test_split_words_lower_cases_and_splits_punctuation():
    text = "The puppet nods, then (slow-zoom) DOESN\u2019T\twave_its hand!"
    expected = "the puppet nods , then ( slow - zoom ) doesn't wave _ its hand !".split()
    assert split_words(text) == expected


def test_encode_ids_and_mask(tokenizer):
    ids, mask = tokenizer.encode(["The puppet nods, smiling.", ""])
    assert ids.dtype == np.int32 and mask.dtype == np.float32
    # "." is not in the vocabulary and is dropped; "smiling" is a word, so it becomes unknown (2).
    np.testing.assert_array_equal(ids, [[3, 4, 5, 10, 2, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids != 0)


def test_ids_stay_below_vocab_size(tokenizer):
    ids, _ = WordTokenizer(WORDS, length=len(WORDS) + 1).encode([" ".join(WORDS)])
    assert tokenizer.vocab_size == len(WORDS) + 3
    assert ids.max() == tokenizer.vocab_size - 1
    assert sorted(ids[0, :-1]) == list(range(3, tokenizer.vocab_size))


def test_encode_of_no_texts(tokenizer):
    ids, mask = tokenizer.encode([])
    assert ids.shape == mask.shape == (0, 8)


def test_unknown_names_each_word_once(tokenizer):
    assert tokenizer.unknown("The robot nods; the ROBOT flies!") == ["robot", "flies"]
    assert tokenizer.unknown("the puppet waves its hand.") == []


def test_longest_prompt_fits_and_one_more_word_is_refused(tokenizer):
    ids, mask = tokenizer.encode(["the " * 7])
    assert ids[0, -1] == 1 and mask.all()
    with pytest.raises(UserError, match=r"has 8 words and the model reads 7: shorten it"):
        tokenizer.encode(["fine", "the " * 8])


def test_a_text_that_utf8_cannot_write_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"the prompt 'caf\\udce9 nods' is not text in UTF-8: write it anew"):
        tokenizer.encode(["fine", "caf\udce9 nods"])


@pytest.mark.parametrize("words", [("slow zoom",), ("half-smile",), ("Nods",), ("",)])
def test_vocabulary_of_single_lower_case_words_only(words):
    with pytest.raises(ValueError, match="not single lower-case words"):
        WordTokenizer(words, length=8)


def test_vocabulary_without_repeats():
    with pytest.raises(ValueError, match="words repeat: nods"):
        WordTokenizer(("nods", "the", "nods"), length=8)


def test_one_string_is_not_a_batch(tokenizer):
    with pytest.raises(TypeError, match="sequence of strings"):
        tokenizer.encode("the puppet nods")
