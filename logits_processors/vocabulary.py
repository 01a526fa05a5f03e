# SPDX-License-Identifier: Apache-2.0
"""The bytes behind every token id.

A constraint speaks about text while a model emits ids; everything between the two needs one table
from ids to bytes in which control tokens have no bytes at all. Decoding the three ways in which
Hugging Face tokenizers write bytes (byte-level, byte-fallback, raw) is left to xgrammar.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Vocabulary:
    """An immutable table of token bytes.

    Args:
        tokens: ``tokens[i]`` are the bytes of token ``i``; empty for control and padding ids, which
            no constraint ever allows.
        eos_ids: the ids that end a text; their bytes are ignored.

    Raises:
        ValueError: no end-of-text id, or one outside the table.
    """

    tokens: tuple[bytes, ...]
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.eos_ids:
            raise ValueError("eos_ids is empty: name at least one token id that ends a text")
        for eos in self.eos_ids:
            if not 0 <= eos < len(self.tokens):
                raise ValueError(
                    f"eos id {eos} is outside the vocabulary of {len(self.tokens)} tokens"
                )

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.tokens)

    @cached_property
    def text_tokens(self) -> tuple[bytes, ...]:
        """``tokens`` with the bytes of the end-of-text ids removed."""
        tokens = list(self.tokens)
        for eos in self.eos_ids:
            tokens[eos] = b""
        return tuple(tokens)

    @cached_property
    def by_bytes(self) -> tuple[tuple[bytes, int], ...]:
        """``(bytes, id)`` of every token with bytes, in byte order.

        A token sorts before all tokens that it is a prefix of, and those follow it without a gap.
        """
        return tuple(sorted((text, token) for token, text in enumerate(self.text_tokens) if text))

    @cached_property
    def digest(self) -> str:
        """Hex digest that names this table in cache keys."""
        state = hashlib.blake2b(repr(self.eos_ids).encode(), digest_size=16)
        for text in self.text_tokens:
            state.update(len(text).to_bytes(4, "little") + text)
        return state.hexdigest()

    def spell(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that ``ids`` spell, end-of-text and control tokens left out."""
        return b"".join(self.text_tokens[i] for i in ids)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, vocab_size: int | None = None, eos_ids: Collection[int] = ()
    ) -> Vocabulary:
        """Read the table from a Hugging Face tokenizer.

        Args:
            tokenizer: a ``PreTrainedTokenizerBase``.
            vocab_size: number of logits of the model, which may be padded beyond the tokenizer.
            eos_ids: end-of-text ids; by default the tokenizer's own.

        Raises:
            ValueError: the tokenizer has no end-of-text id and none was given.
        """
        from xgrammar import TokenizerInfo

        info = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        tokens = list(info.decoded_vocab)
        tokens += [b""] * ((vocab_size or 0) - len(tokens))
        for control in _control_ids(tokenizer):
            if control < len(tokens):
                tokens[control] = b""
        ids = tuple(eos_ids) or tuple(
            i for i in (getattr(tokenizer, "eos_token_id", None),) if i is not None
        )
        return cls(tuple(tokens), ids)


def _control_ids(tokenizer: Any) -> Iterator[int]:
    yield from tokenizer.all_special_ids
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if added.special:
            yield int(token)
