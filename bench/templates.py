"""Every chat template that the installed trl and axolotl ship, through the reader of rows.

    prefuse bench templates                                  # prints the outcomes
    prefuse bench templates --write docs/chat_templates.md   # writes results/templates.json, and the page's table of it

Each template gets a tokenizer made on the spot that has its special tokens, and rows of the kinds below. A row is read
("right"), or refused with a reason and a fix. What is read is checked against transformers' own rendering, by code that
shares nothing with the reader: the prompt's ids are those met at inference, decode(prompt + completion) is the rendered
text up to the stop token, the answer stands in it, and the stop token is last. A row that fails one is "WRONG".
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefuse.bench.figures import with_tables
from prefuse.bench.found import Results
from prefuse.bench.record import RESULTS, environment, write_result, write_text
from prefuse.engine.config.tools import ToolParser

FOLDERS = {"trl": "chat_templates", "axolotl": "utils/chat_templates/templates"}
MARKUP = re.compile(r"<[/|｜]?[A-Za-z_][^<>\s'\"{}]{0,40}>|\[/?[A-Z_]{2,24}\]|\[\|[a-z]+\|\]")
CONTENT_TAGS = {"<think>", "</think>"}  # plain text for most tokenizers

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is six times seven?"}
ANSWER = {"role": "assistant", "content": "The answer is 42."}
THOUGHT = "six sevens"
THINKING = ANSWER | {"content": f"<think>\n{THOUGHT}\n</think>\n\nThe answer is 42."}
REASONING = ANSWER | {"reasoning_content": THOUGHT}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}, "description": "Adds."}
TOOLS = [{"type": "function", "function": ADD}]
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 41}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
COMPACT = CALLING | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"a":41}'}}]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "42"}


@dataclass(frozen=True)
class Kind:
    """Rows of one kind: a prompt and an answer, and what must stand in the answer's text."""

    prompt: list[dict[str, Any]]
    answer: dict[str, Any]
    said: tuple[str, ...]
    tools: list[dict[str, Any]] | None = None


KINDS = {
    "plain": Kind([USER], ANSWER, ("42",)),
    "system": Kind([SYSTEM, USER], ANSWER, ("42",)),
    "third turn": Kind([USER, ANSWER, USER | {"content": "Sure?"}], ANSWER | {"content": "Yes."}, ("Yes.",)),
    "<think>": Kind([USER], THINKING, (THOUGHT, "</think>", "42")),
    "reasoning_content": Kind([USER], REASONING, (THOUGHT, "42")),
    "tool call": Kind([USER], CALLING, ("add", "41"), TOOLS),
    "tool result": Kind([USER, CALLING, RESULT], ANSWER, ("42",), TOOLS),
    "JSON result": Kind([USER, CALLING, RESULT | {"content": '{"sum": 42, "exact": true}'}], ANSWER, ("42",), TOOLS),
    "text arguments": Kind([USER], COMPACT, ("add", "41"), TOOLS),
}


@dataclass(frozen=True)
class RowOutcome:
    word: str  # "right", "refused" or "WRONG"
    why: str = ""


def main() -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="write the result, and the table of this page from it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = {name: results for name, folder in FOLDERS.items() if (results := _of_package(name, folder))}
    for name, results in found.items():
        print(f"{name} {version(name)}: {len(results)} templates")
        for template, row in results.items():
            print(f"  {template:<32} {', '.join(f'{kind} {x.word}' for kind, x in row.items())}")
    if options.write is not None:
        if missing := FOLDERS.keys() - found.keys():
            parser.error(f"a result is of all packages: {', '.join(missing)} is not installed")
        record = write_result(RESULTS / "templates.json", "templates", record_of(found), seed=None)
        text = options.write.read_text(encoding="utf-8")
        write_text(options.write, with_tables(text, Results([record]), options.write.name))
    wrong = sum(o.word == "WRONG" for results in found.values() for row in results.values() for o in row.values())
    print(f"{wrong} rows are read wrong")
    return 1 if wrong or not found else 0


def record_of(found: dict[str, dict[str, dict[str, RowOutcome]]]) -> dict[str, Any]:
    """What stands in the result: every row's outcome, and of which package's version."""
    versions = {name: version(name) for name in found}
    outcomes = {
        name: {template: {kind: dataclasses.asdict(x) for kind, x in row.items()} for template, row in own.items()}
        for name, own in found.items()
    }
    return {"environment": environment(), "settings": {"packages": versions}, "packages": outcomes}


def _of_package(name: str, folder: str) -> dict[str, dict[str, RowOutcome]]:
    spec = importlib.util.find_spec(name)  # found, not imported: axolotl's own imports are many
    if spec is None or not spec.submodule_search_locations:
        print(f"{name} is not installed: pip install --no-deps {name}", file=sys.stderr)
        return {}
    files = sorted((Path(spec.submodule_search_locations[0]) / folder).glob("*.jinja"))
    return {file.stem: outcomes(file.read_text(encoding="utf-8")) for file in files}


def outcomes(template: str) -> dict[str, RowOutcome]:
    """What becomes of one row of each kind."""
    tokenizer = tokenizer_for(template)
    found = {name: outcome(tokenizer, kind) for name, kind in KINDS.items()}
    return found | {"all turns": outcome_of_turns(tokenizer)}


def outcome_of_turns(tokenizer: Any) -> RowOutcome:
    """A conversation of which both answers are learned: as one example, or one for each answer."""
    turns = [USER, ANSWER, USER | {"content": "Sure?"}, ANSWER | {"content": "Yes."}]
    examples = read(tokenizer, {"messages": turns})
    if isinstance(examples, str):
        return RowOutcome("refused", examples)
    rendered = []
    for shape in SHAPES:
        with contextlib.suppress(Exception):  # a template refuses the shapes of others
            shaped = [shape(turn) for turn in turns]
            rendered += [tokenizer.apply_chat_template(shaped[:end], tokenize=False) for end in (2, 4)]
    said = ""
    for example in examples:
        if not any(text.startswith(tokenizer.decode(example.prompt + example.completion)) for text in rendered):
            return RowOutcome("WRONG", "decode(prompt + completion) is not the rendered text")
        flags = example.learned or [True] * len(example.completion)
        said += tokenizer.decode([token for token, flag in zip(example.completion, flags, strict=True) if flag])
    if [said.count(word) for word in ("42", "Yes.", "six times seven", "Sure?")] != [1, 1, 0, 0]:
        return RowOutcome("WRONG", "what is learned is not the two answers")
    return RowOutcome("right")


def read(tokenizer: Any, row: dict[str, Any]) -> Any:
    """The examples of a row, or why it is refused."""
    from prefuse.engine.data import DataError, load_examples

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        path.write_text(json.dumps([row]), encoding="utf-8")
        try:
            return load_examples(str(path), "sft", tokenizer, 1 << 20).examples
        except DataError as error:
            return str(error).splitlines()[-1].partition(": ")[2]


def outcome(tokenizer: Any, kind: Kind) -> RowOutcome:
    row = {"prompt": kind.prompt, "completion": [kind.answer]} | ({"tools": kind.tools} if kind.tools else {})
    examples = read(tokenizer, row)
    if isinstance(examples, str):
        return RowOutcome("refused", examples)
    (example,) = examples
    checks = [check(tokenizer, kind, list(example.prompt), list(example.completion), shape) for shape in SHAPES]
    return next((found for found in checks if found.word == "right"), checks[0])


# What templates want: strings, lists of parts (models that see images), arguments as JSON text or as an object.
def as_parts(turn: dict[str, Any]) -> dict[str, Any]:
    return turn | {"content": [{"type": "text", "text": turn["content"]}]}


def with_arguments(turn: dict[str, Any], kind: type, write: Callable) -> dict[str, Any]:
    """The turn with those arguments of its calls that are of this kind written otherwise."""
    if "tool_calls" not in turn:
        return turn
    functions = [call["function"] for call in turn["tool_calls"]]
    functions = [f | {"arguments": write(f["arguments"])} if isinstance(f["arguments"], kind) else f for f in functions]
    return turn | {"tool_calls": [CALL | {"function": function} for function in functions]}


def with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    return with_arguments(turn, dict, json.dumps)


def with_object_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    return with_arguments(turn, str, json.loads)


SHAPES = (dict, as_parts, with_text_arguments, with_object_arguments)


def check(tokenizer: Any, kind: Kind, prompt: list[int], completion: list[int], shape: Callable) -> RowOutcome:
    """Against transformers' rendering and tokenization of messages in that shape."""

    def rendered(messages: list[dict[str, Any]], **options: bool) -> str:
        turns = [shape(turn) for turn in messages]
        try:
            return tokenizer.apply_chat_template(turns, tools=kind.tools, tokenize=False, **options)
        except Exception as error:
            return f"the template refuses it: {error}"

    asked, said = rendered(kind.prompt, add_generation_prompt=True), tokenizer.decode(completion)
    if prompt != tokenizer(asked, add_special_tokens=False)["input_ids"]:
        return RowOutcome("WRONG", "the prompt's ids are not those met at inference")
    whole, read = rendered([*kind.prompt, kind.answer]), tokenizer.decode([*prompt, *completion])
    folded = "".join(t["content"] for t in kind.prompt if t["role"] == "system")
    if not whole.startswith(read) and not (folded and folded in read and folded not in whole):
        return RowOutcome("WRONG", "decode(prompt + completion) is not the rendered text")
    if any(part not in said for part in kind.said):
        return RowOutcome("WRONG", "text of the answer is missing")
    if '\\"a\\"' in said:
        return RowOutcome("WRONG", "arguments of a call stand as JSON text within JSON text")
    if said.count("<think>") + asked.rstrip().endswith("<think>") > 1:
        return RowOutcome("WRONG", "<think> stands twice")
    specials = tokenizer.get_added_vocab()
    rest = tokenizer.decode(completion[-1:])
    if rest in specials:
        return RowOutcome("right")
    behind = whole[len(read) :]
    if any(token in behind for token in specials):
        return RowOutcome("WRONG", "the stop token is not learned")
    return RowOutcome("right", "ends with no stop token")


def tokenizer_for(template: str) -> Any:
    """A byte-level tokenizer with the template's special tokens; the first of the usual ends of turn is its EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    code = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    specials = sorted(set(MARKUP.findall(code)) - CONTENT_TAGS)
    specials += [token for token in ("<s>", "</s>") if token not in specials]
    tokenizer.add_special_tokens(specials)
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<|return|>")
    eos = next((token for token in ends if token in specials), "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = template
    return fast
