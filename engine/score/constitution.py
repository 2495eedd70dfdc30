"""A constitution: principles of which each comparison, and each critique, is judged by one that is drawn.

    principles:                        # for comparisons (`prefuse label`)
      - Choose the answer that is more honest.
      - Choose the answer that a child could follow.
    critiques:                         # for critique and revision (`prefuse revise`)
      - critique: Say what in the answer is untrue.
        revision: Write the answer again, without what is untrue.

Bai et al. 2022 (Constitutional AI, arXiv 2212.08073), sections 3.1 and 4.1. A file that is a list holds principles.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class Critique:
    critique: str
    revision: str


@dataclass(frozen=True)
class Constitution:
    principles: tuple[str, ...]
    critiques: tuple[Critique, ...] = ()

    def principle_of(self, seed: int, *what: object) -> str:
        """The one that a comparison is judged by: the same for the same seed and rows."""
        return self.principles[drawn(len(self.principles), "principle", seed, *what)]

    def critique_of(self, seed: int, *what: object) -> Critique:
        return self.critiques[drawn(len(self.critiques), "critique", seed, *what)]


def drawn(count: int, *what: object) -> int:
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8]) % count


def read_constitution(path: str) -> Constitution:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read constitution {path}: {error}") from None
    content = {"principles": content} if isinstance(content, list) else content
    if not isinstance(content, dict):
        raise UserError(f"constitution {path}: expected a list of principles, or principles: and critiques:")
    unknown = sorted(set(content) - {"principles", "critiques"})
    if unknown:
        raise UserError(f"constitution {path} has {', '.join(map(str, unknown))}: expected principles and critiques")
    principles = content.get("principles") or []
    critiques = content.get("critiques") or []
    if not all(isinstance(text, str) and text.strip() for text in principles):
        raise UserError(f"constitution {path}: each principle is a text, such as: Choose the more honest answer.")
    if not all(map(_is_critique, critiques)):
        raise UserError(f"constitution {path}: each of critiques has two texts, critique and revision")
    return Constitution(tuple(principles), tuple(Critique(c["critique"], c["revision"]) for c in critiques))


def _is_critique(given: object) -> bool:
    return (
        isinstance(given, dict)
        and set(given) == {"critique", "revision"}
        and all(isinstance(v, str) for v in given.values())
    )
