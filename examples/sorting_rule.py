"""The rule of the sorting task, as TRL writes reward functions: --scorer examples/sorting_rule.py:ascending"""


def ascending(prompts: list[str], completions: list[str], **_) -> list[float]:
    """1 for exactly the prompt's letters in ascending order, else 0."""
    letters = [sorted(prompt.removeprefix("sort ").removesuffix(" =>").split()) for prompt in prompts]
    return [float(answer.split() == wanted) for answer, wanted in zip(completions, letters, strict=True)]
