"""What a judge is asked, and how its words are read.

The two answers are named A and B. In `letter` mode the judge says one letter, so that the probabilities of the two
letters are a graded verdict; in `reason` mode it explains itself and ends with [[A]], [[B]] or [[C]] for a tie.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from prefuse.engine.errors import UserError
from prefuse.engine.score.contract import NoScore, Text

DEFAULT = (
    "Judge which answer serves the person better: correct, helpful, honest, to the point. The order of the answers and "
    "their length are no reason."
)
ENDINGS = {
    "letter": "Which answer is better? Reply with one letter, A or B, and nothing else.",
    "reason": "Explain briefly, then end with [[A]] if answer A is better, [[B]] if answer B is, [[C]] for a tie.",
}
LETTERS = ("A", "B")


@dataclass(frozen=True)
class Rubric:
    text: str = DEFAULT
    mode: str = "letter"

    def messages(self, prompt: Text, a: str, b: str) -> list[dict[str, str]]:
        """One user turn: judges without a system role take it too."""
        parts = [self.text, "", "[Prompt]", shown(prompt), "", "[Answer A]", a, "", "[Answer B]", b, "", "[End]"]
        return [{"role": "user", "content": "\n".join([*parts, ENDINGS[self.mode]])}]


def rubric_of(path: str | None, mode: str) -> Rubric:
    if path is None:
        return Rubric(mode=mode)
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read judge_rubric {path}: {error}") from None
    if not text:
        raise UserError(f"judge_rubric {path} is empty: expected the rules that the judge is to follow, as text")
    return Rubric(text, mode)


def shown(prompt: Text) -> str:
    """A conversation as text; a prompt of one user turn as that turn alone."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content") or "")
    return "\n\n".join(f"{turn.get('role', 'user')}: {turn.get('content') or ''}" for turn in prompt)


def read_verdict(text: str) -> str | NoScore:
    """ "A", "B" or "C" (a tie), or why it is none of these."""
    marked = set(re.findall(r"\[\[\s*([ABC])\s*\]\]", text))
    if len(marked) == 1:
        return marked.pop()
    if len(marked) > 1:
        return NoScore("both options", f"{text.strip()[-60:]!r}")
    bare = re.sub(r"[\s.:*()\"'`\[\]]", "", text).upper()
    if bare in ("A", "B", "C"):
        return bare
    if bare in ("TIE", "ATIE", "BOTH", "EQUAL", "NEITHER"):
        return "C"
    pair = re.match(r"\W*([AB])[\s)*\"']*(?:and|or|[,/&+])[\s(*\"']*([AB])\b", text)  # "A and B are both fine"
    if pair and pair[1] != pair[2]:
        return NoScore("both options", f"{text.strip()[:60]!r}")
    said = set(re.findall(r"(?:^|\b(?:answer|verdict|option|choice)\W{1,3})([AB])\b", text.strip(), re.IGNORECASE))
    letters = {letter.upper() for letter in said if letter.isupper()}
    if len(letters) == 1:
        return letters.pop()
    if len(letters) > 1:
        return NoScore("both options", f"{text.strip()[:60]!r}")
    foreign = [c for c in text if c.isalpha() and not c.isascii()]
    if len(foreign) > sum(c.isalpha() for c in text) / 2:
        return NoScore("another language", f"{text.strip()[:60]!r}")
    return NoScore("nonsense" if text.strip() else "nothing said", f"{text.strip()[:60]!r}" if text.strip() else "")
