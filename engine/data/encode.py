"""The texts of a prompt and its completion -> token ids that decode, joined, to both texts.

    decode(encode(prompt) + encode_after(prompt, completion)) == prompt + completion

Many tokenizers read the start of a text otherwise than its middle: SentencePiece puts a blank before it, WordPiece
takes it for a whole word. A completion is therefore encoded behind the end of its prompt, whose tokens are taken off
again. Where prompt and completion share a token ("sk" + "y"), the completion is encoded behind a text that shares
none. The prompt's own ids never change: they are the ids that the model meets at inference.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

TEXTS_PER_CALL = 2048  # bounds what the tokenizer's own encodings hold in memory
TAIL = 48  # characters of the prompt that a completion is encoded behind, and more where a special token is longer
HEAD = 8  # tokens of a completion that are decoded to see whether they say what it says
SENTINELS = ("\n", "a", ".", "0", "字")  # texts to encode behind; the first that keeps its own tokens counts


class Encoder:
    """A tokenizer, with what is found out about it once: whether and how a text's start is read in its own way."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.context_free = is_context_free(tokenizer)
        self.tail = TAIL + max(map(len, tokenizer.get_added_vocab()), default=0)
        self._read = lru_cache(maxsize=256)(self._encoded_and_decoded)
        self.sentinels = [] if self.context_free else [text for text in SENTINELS if self._can_encode(text)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The bare ids of each text, without the special tokens that a tokenizer puts around it."""
        ids: list[list[int]] = []
        bare = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        for start in range(0, len(texts), TEXTS_PER_CALL):
            batch = list(texts[start : start + TEXTS_PER_CALL])
            ids += self.tokenizer(batch, **bare, verbose=False)["input_ids"]
        return ids

    def encode_after(
        self, before: Sequence[str], texts: Sequence[str], written: Sequence[bool] | None = None
    ) -> list[list[int]]:
        """The ids of each text as it stands behind the other.

        `written`: whether the model is to write it. A text that it reads alone has the ids that it meets, also where
        the tokenizer puts a blank before them.
        """
        if self.context_free:
            return self.encode(texts)
        tails = [text[-self.tail :] for text in before]
        try:
            wholes = self.encode([tail + text for tail, text in zip(tails, texts, strict=True)])
        except Exception:  # tokenizers has no class of its own for a text that it cannot read
            return [self._behind_or_alone(*both) for both in zip(before, texts, strict=True)]
        written = [True] * len(texts) if written is None else written
        return [self._behind(*each) for each in zip(tails, texts, wholes, written, strict=True)]

    def _behind_or_alone(self, before: str, text: str) -> list[int]:
        """`_behind`, or the ids of `text` alone if the tokenizer has no token for a word that both texts share."""
        if self._can_encode(before + text):
            return self._behind(before, text, self.encode([before + text])[0])
        return self.encode([text])[0]

    def _can_encode(self, text: str) -> bool:
        try:
            self.encode([text])
        except Exception:  # as above
            return False
        return True

    def _behind(self, tail: str, text: str, whole: list[int], written: bool = True) -> list[int]:
        """The ids of `text` behind `tail`; `whole` has those of both."""
        if not tail or not text:
            return whole if text else []
        first, said = self._read(tail)
        found = [whole[len(first) :]] if whole[: len(first)] == first else []
        if found and not written:
            return found[0]
        blank = tail[len(tail.rstrip()) :]
        dropped = "" if said.endswith(blank) else " "  # WordPiece drops it; its decoder puts a blank between words
        if found and any(self._says(first, said, found[0], before + text) for before in {"", dropped}):
            return found[0]
        tried = len(found)
        found += self._behind_sentinels(text)
        for ids in found[tried:]:
            if self._says(first, said, ids, text):
                return ids
        spelled = self.decode(whole)  # the tokenizer changes text: take ids that decode to its own version of both
        return next((ids for ids in found if self.decode(first + ids) == spelled), found[0])

    def _behind_sentinels(self, text: str) -> list[list[int]]:
        *wholes, alone = self.encode([*(sentinel + text for sentinel in self.sentinels), text])
        firsts = [self._read(sentinel)[0] for sentinel in self.sentinels]
        behind = zip(wholes, firsts, strict=True)
        return [*(ids[len(first) :] for ids, first in behind if ids[: len(first)] == first), alone]

    def _says(self, before: list[int], said: str, ids: list[int], text: str) -> bool:
        """Whether decode(before + ids) is `said` + `text`, compared at the start of `text`, where readings differ."""
        for size in range(HEAD, HEAD + 4):  # a token may end within a character, of at most 4
            both = self.decode(before + ids[:size])
            if not both.startswith(said):
                return False
            if size >= len(ids):
                return both[len(said) :] == text
            if not both.endswith("\ufffd"):
                break
        return both != said and text.startswith(both[len(said) :])

    def _encoded_and_decoded(self, text: str) -> tuple[list[int], str]:
        (ids,) = self.encode([text])
        return ids, self.decode(ids)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# The components that read a text from left to right, byte by byte, and put nothing before it.
PLAIN_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
PLAIN_SPLITTERS = {"Split", "Digits", "Punctuation", "ByteLevel"}


def is_context_free(tokenizer: Any) -> bool:
    """Whether a text has the same ids alone and behind another that shares no token with it (byte-level BPE has)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return False
    if backend.model.continuing_subword_prefix or backend.model.end_of_word_suffix:
        return False
    if any(token.lstrip or token.rstrip or token.single_word for token in tokenizer.added_tokens_decoder.values()):
        return False  # they take blanks from the text beside them
    splitters = list(_parts(backend.pre_tokenizer, "pretokenizers"))
    return (
        all(part["type"] in PLAIN_NORMALIZERS for part in _parts(backend.normalizer, "normalizers"))
        and all(part["type"] in PLAIN_SPLITTERS and part.get("behavior") != "Removed" for part in splitters)
        and [part["add_prefix_space"] for part in splitters if part["type"] == "ByteLevel"] == [False]
        and [part["type"] for part in _parts(backend.decoder, "decoders")] == ["ByteLevel"]
    )


def _parts(component: Any, name: str) -> Iterator[dict[str, Any]]:
    """The settings of a normalizer, pre-tokenizer or decoder, a sequence taken apart."""
    if component is None:
        return
    pending = [json.loads(component.__getstate__())]
    while pending:
        part = pending.pop(0)
        if part["type"] == "Sequence":
            pending = part[name] + pending
        else:
            yield part


def continuation(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text that `answer` adds to `prompt`, special tokens left out: decode(prompt + answer) less decode(prompt)."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, both = decode(prompt), decode([*prompt, *answer])
    while not both.startswith(before):  # a prompt that was cut within a character: the answer completes it
        before = before[:-1]
    return both[len(before) :]
