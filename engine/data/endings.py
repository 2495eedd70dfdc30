"""How a chat template ends an answer: the token at which generation is to stop, and what is written behind it.

ChatML:  "...it is blue<|im_end|>\\n"                   stop "<|im_end|>", after "\\n"
Phi 3:   "...it is blue<|end|>\\n<|endoftext|>"          stop "<|end|>": an answer that is not the last ends so
GLM 4.5: "...it is blue" and then "<|user|>"            no stop; the next turn's first token could be one
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.records import BadRow
from prefuse.engine.data.rendering import ChatTemplate

QUESTION, ANSWER, NEXT = "first question", "an answer", "next question"  # texts that no template has


@dataclass(frozen=True)
class Ending:
    stop: str | None  # None: the last answer ends with no token
    after: str = ""  # what stands behind the stop token: nothing that a model is to write
    missing: str | None = None  # without a stop: the token that would be one

    def trimmed(self, completion: str, tokens: tuple[str, ...]) -> str:
        """The completion up to its stop token; `tokens`: others that an answer may end with (a tool call's)."""
        if self.stop is not None and completion.endswith(self.stop + self.after):
            return completion[: len(completion) - len(self.after)]
        bare = completion.rstrip()
        return bare if bare.endswith(tokens) else completion


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the added tokens, blanks left out: what a template writes and a text does not hold."""
    return tuple(sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True))


def ending_of(template: ChatTemplate) -> Ending:
    """Found by rendering two conversations. A template that refuses both has no ending."""
    tokens = control_tokens(template.tokenizer)
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT},
    ]
    last = _pieces(_try(template, turns[:2]).rpartition(ANSWER)[2], tokens)
    start, _, rest = _try(template, turns).partition(QUESTION)
    header = _pieces(rest.rpartition(ANSWER)[2].partition(NEXT)[0], tokens)  # the end of the answer, the next header
    closing = header[: len(header) - _shared_end(_pieces(start, tokens), header)]
    inner = [piece for piece in closing if piece in tokens]
    outer = [piece for piece in last if piece in tokens]
    if outer:
        eos = template.tokenizer.eos_token
        stop = next(token for token in (*inner[::-1], eos, outer[0]) if token in outer)
        return Ending(stop, "".join(last[last.index(stop) + 1 :]))
    candidates = [*inner[::-1], *(piece for piece in header if piece in tokens), template.tokenizer.eos_token]
    return Ending(None, missing=next(iter(candidates), None))


def learned_header(template: ChatTemplate) -> str:
    """ "<|im_start|>assistant\\n" where answers begin with it: the template ignores add_generation_prompt; else ""."""
    asked = [{"role": "user", "content": QUESTION}]
    prompt, bare = _try(template, asked, generation_prompt=True), _try(template, asked)
    whole = _try(template, [*asked, {"role": "assistant", "content": ANSWER}])
    header, answer, _ = whole[len(bare) :].partition(ANSWER)
    return header if prompt == bare and whole.startswith(bare) and answer and header.strip() else ""


def _try(template: ChatTemplate, turns: list[dict[str, str]], generation_prompt: bool = False) -> str:
    try:
        return template.text(turns, generation_prompt=generation_prompt)
    except BadRow:
        return ""


def _pieces(text: str, tokens: Iterable[str]) -> list[str]:
    """The text cut into control tokens and what stands between them."""
    cut = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    return [piece for piece in cut if piece]


def _shared_end(one: list[str], other: list[str]) -> int:
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return shared
