"""A judge: a language model that compares two answers, asked in both orders. What the orders disagree on is a tie.

    judge=folder                              in this process
    judge=http://localhost:8000/v1#model      behind an OpenAI-compatible server: vLLM, SGLang, transformers serve

As a scorer of K answers it gives each the share of its comparisons with the others that it wins, ties as one half.
Every reply is kept on the disk, keyed by all that decides it, so a run that was cut short asks only for the rest.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.score.cache import Cache, cache_folder, json_digest
from prefuse.engine.score.contract import (
    NO_ANSWER,
    Columns,
    NoScore,
    Preferences,
    Scores,
    Text,
    check_lengths,
)
from prefuse.engine.score.rubric import LETTERS, Rubric, read_verdict, rubric_of

LEAST_MASS = 0.1  # of the probability of the two letters together, for them to be a verdict


@dataclass(frozen=True)
class Reply:
    """What the judge said, and the probability of each letter as its first word where that is known."""

    text: str
    letters: dict[str, float] | None = None
    tokens: tuple[int, int] = (0, 0)  # read, written


class Backend(Protocol):
    name: str
    key: str

    def ask(self, questions: Sequence[list[dict]], keep: Sequence[str], cache: Cache) -> dict[str, Reply | NoScore]:
        """{key: reply} of all questions; each reply is put into the cache under its key in `keep` as it comes."""


@dataclass
class Judge:
    backend: Backend
    rubric: Rubric = field(default_factory=Rubric)
    cache: Cache = field(default_factory=lambda: Cache(None, ""))
    least_mass: float = LEAST_MASS
    columns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"judge {self.backend.name}"

    @property
    def key(self) -> str:
        return f"judge {self.backend.key} {json_digest(self.rubric.text, self.rubric.mode)}"

    def compare(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Preferences:
        questions = [
            self.rubric.messages(prompt, *both)
            for prompt, one, other in zip(prompts, first, second, strict=True)
            for both in ((one, other), (other, one))
        ]
        equal = [one.strip() == other.strip() for one, other in zip(first, second, strict=True)]
        replies = self._replies([q for i, q in enumerate(questions) if not equal[i // 2]])
        values, soft, reasons, outcomes, verdicts = [], [], [], Counter(), []
        for p, same in enumerate(equal):
            if same:
                values, soft, reasons = [*values, 0.5], [*soft, 0.5], [*reasons, None]
                outcomes["tie, equal answers"] += 1
                continue
            orders = [self.verdict(replies[json_digest(questions[2 * p + order])]) for order in (0, 1)]
            verdicts += [share for share in orders if not isinstance(share, NoScore)]
            fault = next((share for share in orders if isinstance(share, NoScore)), None)
            value, graded, outcome = (math.nan, math.nan, fault.kind) if fault else both_orders(*orders)
            values, soft, reasons = [*values, value], [*soft, graded], [*reasons, fault]
            outcomes[outcome] += 1
        values = torch.tensor(values, dtype=torch.float64)
        decided = [share for share in verdicts if share != 0.5]
        shown = sum(share > 0.5 for share in decided) / len(decided) if decided else None
        return Preferences(values, torch.tensor(soft, dtype=torch.float64), reasons, outcomes, shown)

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores:
        check_lengths(prompts, answers, columns)
        pairs = [(p, i, j) for p, own in enumerate(answers) for i, j in combinations(range(len(own)), 2)]
        first, second = ([answers[pair[0]][pair[place]] for pair in pairs] for place in (1, 2))
        found = self.compare([prompts[p] for p, _, _ in pairs], list(first), list(second))
        width = max(map(len, answers), default=0)
        wins = torch.zeros(len(prompts), width, dtype=torch.float64)
        reasons: list[list[NoScore | None]] = [
            [NoScore("judge", "it compares: one answer alone has no score") if len(own) == 1 else None] * len(own)
            + [NoScore(NO_ANSWER)] * (width - len(own))
            for own in answers
        ]
        for (p, i, j), value, reason in zip(pairs, found.values.tolist(), found.reasons, strict=True):
            for k, won in ((i, value), (j, 1 - value)):
                wins[p, k] += won / (len(answers[p]) - 1)
                reasons[p][k] = reasons[p][k] or reason
        for p, row in enumerate(reasons):
            for k, reason in enumerate(row):
                if reason is not None:
                    wins[p, k] = math.nan
        return Scores(wins, reasons)

    def spent(self) -> dict[str, float]:
        """What this run has asked of a server: tokens, and USD where prices are known; what the cache had is free."""
        tokens, cost = getattr(self.backend, "tokens", None), getattr(self.backend, "cost", lambda: None)()
        counted = {} if tokens is None else {"judge_tokens_read": tokens[0], "judge_tokens_written": tokens[1]}
        return counted | ({} if cost is None else {"judge_cost": cost})

    def verdict(self, reply: Reply | NoScore) -> float | NoScore:
        """The probability that A is better: of the letters where it is known, else 1, 0 or 0.5 by its words."""
        if isinstance(reply, NoScore):
            return reply
        if reply.letters is not None and self.rubric.mode == "letter":
            mass = sum(reply.letters[letter] for letter in LETTERS)
            if mass >= self.least_mass:
                return reply.letters["A"] / mass
            if not reply.text:
                return NoScore("nonsense", f"A and B together have probability {mass:.2g}")
        said = read_verdict(reply.text)
        return said if isinstance(said, NoScore) else {"A": 1.0, "B": 0.0, "C": 0.5}[said]

    def _replies(self, questions: Sequence[list[dict]]) -> dict[str, Reply | NoScore]:
        """{digest of the question: reply}, each question asked once."""
        own = {json_digest(question): question for question in questions}
        keys = {name: json_digest(self.key, name) for name in own}
        known = {name: self.cache.get(key) for name, key in keys.items()}
        replies: dict[str, Reply | NoScore] = {
            name: Reply(kept["text"], kept["letters"], tuple(kept["tokens"])) for name, kept in known.items() if kept
        }
        rest = [name for name in own if name not in replies]
        if rest:
            asked = self.backend.ask([own[name] for name in rest], [keys[name] for name in rest], self.cache)
            replies |= {name: asked[keys[name]] for name in rest}
        return replies


def both_orders(shown_first: float, shown_second: float) -> tuple[float, float, str]:
    """(verdict, probability, outcome) for the first answer, from P(A better) as it was A and as it was B."""
    graded = (shown_first + 1 - shown_second) / 2
    sides = [_side(shown_first), _side(1 - shown_second)]
    if sides[0] == sides[1]:
        return sides[0], graded, {1.0: "first", 0.0: "second", 0.5: "tie"}[sides[0]]
    return 0.5, graded, "tie, the orders disagree"


def _side(share: float) -> float:
    return 0.5 if share == 0.5 else float(share > 0.5)


def judge_of(argument: str, config: Config, device: torch.device) -> Judge:
    rubric = rubric_of(config.judge_rubric, config.judge_mode)
    if not argument:
        raise UserError("scorer judge= needs a model folder, or URL#MODEL")
    if argument.startswith(("http://", "https://")):
        from prefuse.engine.score.server import server_of

        backend = server_of(argument, config)
    elif "://" in argument:
        raise UserError(f"judge={argument}: expected a folder, or a URL that begins with http:// or https://")
    else:
        from prefuse.engine.score.local import local_of

        backend = local_of(argument, config, device, rubric)
    cache = Cache(cache_folder(config.score_cache), f"judge {backend.key}")
    return Judge(backend, rubric, cache)
