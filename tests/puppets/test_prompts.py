"""Every sentence of the grammar can be read by the demo's tokenizer, and says what it was made of."""

import itertools

import numpy as np
import pytest

from emv3_jax import conditioning
from emv3_jax.config import DEMO, PUPPET_WORDS
from emv3_jax.puppets import prompts, world
from emv3_jax.tokenizers import split_words

RNG = np.random.default_rng(0)
SENTENCES = {
    (*parts, prompts.make_prompt(*parts, RNG))
    for parts in itertools.product(world.MOTIONS, world.EXPRESSIONS, world.CAMERAS)
    for _ in range(40)
}


def test_the_demo_reads_every_sentence():
    tokenizer = conditioning.tokenizer(DEMO)
    ids, mask = tokenizer.encode([sentence for *_, sentence in SENTENCES])
    assert not [sentence for *_, sentence in SENTENCES if tokenizer.unknown(sentence)]
    assert ids.shape == mask.shape == (len(SENTENCES), DEMO.dit.text_len)
    assert ids.max() < DEMO.text.vocab


def test_the_longest_possible_sentence_fits():
    longest = [
        max((option for options in table.values() for option in options), key=lambda text: len(text.split()))
        for table in (prompts.MOTION_WORDS, prompts.EXPRESSION_WORDS, prompts.CAMERA_WORDS)
    ]
    conditioning.tokenizer(DEMO).encode(["A puppet {} and {}, {}.".format(*longest)])


def test_the_text_encoder_has_a_row_for_every_word_and_no_more():
    assert DEMO.text.vocab == conditioning.tokenizer(DEMO).vocab_size
    said = {word for *_, sentence in SENTENCES for word in split_words(sentence)}
    assert said | {"talks", "speaks"} == set(PUPPET_WORDS)  # the two that the grammar does without


def test_no_sentence_means_two_things():
    meaning = {}
    for *parts, sentence in SENTENCES:
        assert meaning.setdefault(sentence, parts) == parts
    assert len(meaning) > 500


@pytest.mark.parametrize("parts", [("nod", "sad", "zoom"), ("still", "calm", "fixed")])
def test_a_sentence_says_motion_expression_and_camera(parts):
    tables = (prompts.MOTION_WORDS, prompts.EXPRESSION_WORDS, prompts.CAMERA_WORDS)
    for _ in range(20):
        sentence = prompts.make_prompt(*parts, RNG)
        assert sentence[0].isupper() and sentence.endswith(".")
        for part, table in zip(parts, tables, strict=True):
            assert any(words in sentence for words in table[part]), sentence


def test_the_same_generator_says_the_same():
    say = lambda: prompts.make_prompt("nod", "sad", "zoom", np.random.default_rng(3))  # noqa: E731
    assert say() == say()
