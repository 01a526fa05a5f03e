# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logits_processors import bitmask
from logits_processors.vocabulary import Vocabulary


@pytest.fixture
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġa", "ab", "Ã©"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("a", "b"), ("Ã", "©")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return fast


def test_bytes_of_a_byte_level_tokenizer(tokenizer):
    vocabulary = Vocabulary.from_tokenizer(tokenizer, vocab_size=272)
    assert vocabulary.size == 272
    assert vocabulary.eos_ids == (tokenizer.eos_token_id,)
    for text in ("a ab é\n", "日本 ab"):
        assert vocabulary.spell(tokenizer.encode(text)) == text.encode()
    for control in ("<end>", "<tool>"):
        assert vocabulary.tokens[tokenizer.convert_tokens_to_ids(control)] == b""
    assert vocabulary.tokens[-1] == b""
    assert sorted(t for t in vocabulary.tokens if len(t) == 1) == [bytes([i]) for i in range(256)]


@pytest.mark.skipif(
    "VLLM_EXT_TEST_MODEL" not in os.environ, reason="VLLM_EXT_TEST_MODEL is not set"
)
def test_bytes_of_a_real_tokenizer():
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(os.environ["VLLM_EXT_TEST_MODEL"])
    vocabulary = Vocabulary.from_tokenizer(real)
    text = 'naïve {"key": [1, 2.5]}\n\tdef f(): 日本語 🎉'
    assert vocabulary.spell(real.encode(text, add_special_tokens=False)) == text.encode()
    assert not any(vocabulary.tokens[i] for i in real.all_special_ids)


def test_byte_order_keeps_extensions_together():
    vocabulary = Vocabulary((b"b", b"ab", b"a", b"", b"abc", b"ab"), eos_ids=(3,))
    assert [i for _, i in vocabulary.by_bytes] == [2, 1, 5, 4, 0]


def test_digest_tells_tables_apart():
    tables = [((b"a", b"bc", b""), (2,)), ((b"ab", b"c", b""), (2,)), ((b"a", b"bc", b""), (0, 2))]
    assert len({Vocabulary(*table).digest for table in tables}) == 3
    assert Vocabulary(*tables[0]).digest == Vocabulary(*tables[0]).digest


@pytest.mark.parametrize(("eos", "message"), [((), "eos_ids is empty"), ((5,), "eos id 5")])
def test_impossible_ends_are_refused(eos, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary((b"a",), eos_ids=eos)


@given(st.integers(1, 100).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_masks_round_trip(case):
    size, tokens = case
    mask = bitmask.pack(tokens, size)
    assert (mask.dtype, mask.size) == (np.int32, bitmask.num_words(size))
    assert set(np.flatnonzero(bitmask.unpack(mask, size)).tolist()) == tokens
    # The layout of xgrammar: bit i % 32 of word i // 32.
    assert all(((int(mask[i // 32]) >> (i % 32)) & 1) == (i in tokens) for i in range(size))
    copy = bitmask.empty(size)
    for token in tokens:
        bitmask.set_token(copy, token, True)
    np.testing.assert_array_equal(copy, mask)
    for token in tokens:
        bitmask.set_token(copy, token, False)
    assert not copy.any()


def test_logits_beyond_the_mask_are_forbidden():
    assert bitmask.unpack(bitmask.pack([0, 39], 40), 70).sum() == 2
