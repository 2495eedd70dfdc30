"""`prefuse data`: look at rows, convert them, filter them, split them. No model in it; a tokenizer at most.

    prefuse data inspect rows.jsonl
    prefuse data convert rows.jsonl pairs.jsonl --to pairs
    prefuse data filter pairs.jsonl kept.jsonl --drop_duplicates
    prefuse data split kept.jsonl folder --eval_fraction 0.1

filter and split write rows as they stand in their source; convert writes them under TRL's names. What a row loses is
counted and said.
"""

import argparse
import dataclasses
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefuse.engine.config.rows import RowSettings
from prefuse.engine.config.setting import known
from prefuse.engine.config.tools import ToolParser, number_from
from prefuse.engine.config.values import from_words, literals
from prefuse.engine.data.forms import BadRow, ReadOptions, Record, Skipped
from prefuse.engine.data.forms.read import Reading
from prefuse.engine.data.guess import KINDS, read_as
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.stats import Stats, characters, identity_of, judgement_of, measure_rows, short_digest
from prefuse.engine.data.table import source_row
from prefuse.engine.data.write import TARGETS, LeftOut, check_output, with_turns, write_rows, written_rows
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say

if TYPE_CHECKING:
    from prefuse.engine.report.page.data import Looked

PARTS = {  # of the examples of each kind
    "pair": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion"),
    "sft": ("prompt", "completion"),
}
SHOWN_ROWS = 3  # of a page
CHOICES = ("auto", *KINDS)


def main(words: Sequence[str]) -> int:
    args = parser().parse_args(list(words))
    args.options = _options(args)
    args.run(args)
    return 0


# ---------------------------------------------------------------------------------------------------------
# The four commands


def inspect(args: argparse.Namespace) -> None:
    """Counts, forms, lengths, duplicates, contradictions, balance; with a tokenizer also what its template does."""
    from prefuse.engine.report.data_page import plot_stats, show_stats

    if args.picture:
        _check_picture(Path(args.picture))
    reading, kind = _read(args.source, args)
    examples: list[Record] = []
    stats = measure_rows(_keeping(reading.outcomes, examples), characters)
    unit = "characters"
    _say_form(args.source, reading, kind)
    looked = _looked(args.source, reading, kind, examples)
    if args.tokenizer:
        _measure_tokens(args, kind, stats, looked)
        unit = "tokens"
    show_stats(stats, reading.form.tally.rows, unit)
    if args.html:
        from prefuse.engine.report.page.data import write_data_page

        write_data_page(Path(args.html), looked, stats, unit)
        say(f"{args.html}: a page about these rows")
    if args.picture:
        plot_stats(stats, unit, Path(args.picture))
        say(f"{args.picture}: the lengths as a picture")


def _check_picture(path: Path) -> None:
    """Before the rows are read."""
    if path.suffix != ".png":
        raise UserError(f"picture {path}: expected a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"picture {path} is in a folder that does not exist: make it first")


def convert(args: argparse.Namespace) -> None:
    """Rows of any form as pairs, labelled answers, scored answers or demonstrations."""
    path = Path(args.output)
    check_output(path)
    reading, _ = _read(args.source, args, TARGETS[args.to])
    left, used = LeftOut(), set()
    count = write_rows(path, _converted(reading, args, left, used))
    _say_form(args.source, reading, TARGETS[args.to])
    if reading.ignored:
        say(f"  columns not kept: {', '.join(reading.ignored)}")
    _say_written(path, count, reading, left, None if reading.form.gather else used)


def filter_rows(args: argparse.Namespace) -> None:
    """Rows that pass every rule, as they stand in their source."""
    path = Path(args.output)
    check_output(path)
    verdicts = _verdicts(args) if args.drop_contradictions else {}
    reading, kind = _read(args.source, args)
    _refuse_gathered(reading)
    dropped = LeftOut()
    kept = _kept(reading, args, verdicts, dropped)
    count = write_rows(path, (row for name, row in _source_rows(args) if name in kept))
    _say_form(args.source, reading, kind)
    _say_written(path, count, reading, dropped)


def split_rows(args: argparse.Namespace) -> None:
    """Two files in a folder, train and test; the rows of one prompt stay together."""
    folder = Path(args.output)
    paths = {name: folder / f"{name}{args.suffix}" for name in ("train", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths.values():
        check_output(path)
    reading, kind = _read(args.source, args)
    _refuse_gathered(reading)
    skipped = LeftOut()
    sides = _sides(reading, args, skipped)
    counts = {}
    for name, path in paths.items():
        rows = _source_rows(args)
        counts[name] = write_rows(path, (row for place, row in rows if sides.get(place) == name))
    _say_form(args.source, reading, kind)
    say(f"{folder}: {counts['train']} rows to train on, {counts['test']} to test on, no prompt in both")
    _say_written(None, sum(counts.values()), reading, skipped)


# ---------------------------------------------------------------------------------------------------------
# Rows


def _keeping(outcomes: Iterable[Record | Skipped], kept: list[Record]) -> Iterator[Record | Skipped]:
    """The outcomes; the first records are kept, to be shown."""
    for outcome in outcomes:
        if isinstance(outcome, Record) and len(kept) < SHOWN_ROWS:
            kept.append(outcome)
        yield outcome


def _looked(source: str, reading: Reading, kind: str, examples: list[Record]) -> "Looked":
    from prefuse.engine.report.page.data import Looked

    form = reading.form
    columns = [("columns", form.roles)] if " -> " in form.roles else []
    columns += [("columns not used", ", ".join(reading.ignored))] if reading.ignored else []
    shown = [
        (record.row, [(part, _as_text(text)) for part, text in (("prompt", record.prompt), *record.sides.items())])
        for record in examples
    ]
    return Looked(source, form.tally.rows, str(form), kind, columns, list(form.tally.lines), shown)


def _as_text(text: Any) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{turn.get('role', '?')}: {turn.get('content') or ''}" for turn in text)


def _read(source: str, args: argparse.Namespace, kind: str | None = None) -> tuple[Reading, str]:
    return read_as(source, kind or getattr(args, "kind", "auto"), args.split, args.options)


def _source_rows(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """As they stand there."""
    return open_source(args.source, args.split, args.options.dataset_config).rows()


def _converted(reading: Reading, args: argparse.Namespace, left: LeftOut, used: set[str]) -> Iterator[dict[str, Any]]:
    """`used`: the source rows that gave something."""
    written: set[bytes] = set()
    for record in _records(reading, left):
        try:
            rows = list(written_rows(with_turns(record) if args.as_turns else record, args.to))
        except BadRow as problem:
            left.add(record.row, str(problem))
            continue
        used.add(source_row(record.row))
        for row in rows:
            if args.to == "scored":  # an answer stands in several pairs
                identity = short_digest(row)
                if identity in written:
                    left.repeated += 1
                    continue
                written.add(identity)
            yield row


def _records(reading: Reading, left: LeftOut) -> Iterator[Record]:
    for outcome in reading.outcomes:
        if isinstance(outcome, Skipped):
            left.add(outcome.row, outcome.reason)
        else:
            yield outcome


def _refuse_gathered(reading: Reading) -> None:
    if reading.form.gather is not None:
        raise UserError(f"a pair of {reading.form} comes from several rows: run `prefuse data convert` first")


def _kept(reading: Reading, args: argparse.Namespace, verdicts: dict[bytes, Any], dropped: LeftOut) -> set[str]:
    """The rows of which every record passes."""
    kept, failed, seen = set(), set(), set()
    for record in _records(reading, dropped):
        reason = _fails(record, args, verdicts)
        identity = identity_of(record)
        if reason is None and args.drop_duplicates and identity in seen:
            reason = "an earlier row equals it"
        seen.add(identity)
        if reason is not None and source_row(record.row) not in failed:
            dropped.add(source_row(record.row), reason)
            failed.add(source_row(record.row))
        kept.add(source_row(record.row))
    return kept - failed


def _fails(record: Record, args: argparse.Namespace, verdicts: dict[bytes, Any]) -> str | None:
    """Why a record does not pass, if it does not."""
    lengths = {side: characters(text) for side, text in record.sides.items()}
    if args.max_prompt_characters is not None and characters(record.prompt) > args.max_prompt_characters:
        return f"its prompt has more than {args.max_prompt_characters} characters"
    if args.min_characters is not None and min(lengths.values(), default=0) < args.min_characters:
        return f"an answer has fewer than {args.min_characters} characters"
    if args.max_characters is not None and max(lengths.values(), default=0) > args.max_characters:
        return f"an answer has more than {args.max_characters} characters"
    if args.max_length_ratio is not None and max(lengths.values()) > args.max_length_ratio * min(lengths.values()):
        return f"one answer is more than {args.max_length_ratio:g} times as long as the other"
    if args.min_score_gap is not None:
        scores = record.scores or {}
        if len(scores) < 2:
            return "it has no two scores"
        if scores["chosen"] - scores["rejected"] < args.min_score_gap:
            return f"the scores differ by less than {args.min_score_gap:g}"
    if len(record.sides) == 2 and len(set(map(short_digest, record.sides.values()))) == 1:
        return "both sides are equal"
    if verdicts.get(judgement_of(record)[0], 0) is None:
        return "another row says the opposite"
    return None


def _verdicts(args: argparse.Namespace) -> dict[bytes, Any]:
    """{what is judged: the judgement, or None where two rows differ}."""
    found: dict[bytes, Any] = {}
    for record in _records(_read(args.source, args)[0], LeftOut()):
        case, verdict = judgement_of(record)
        if verdict is not None:
            found[case] = verdict if found.get(case, verdict) == verdict else None
    return found


def _sides(reading: Reading, args: argparse.Namespace, skipped: LeftOut) -> dict[str, str]:
    """{row: "train" or "test"}, by the digest of its prompt and the seed."""
    prompts = {source_row(record.row): short_digest(record.prompt) for record in _records(reading, skipped)}
    distinct = sorted(set(prompts.values()), key=lambda prompt: hashlib.sha256(b"%d " % args.seed + prompt).digest())
    held = max(1, round(args.eval_fraction * len(distinct)))
    if held >= len(distinct):
        raise UserError(f"{args.source} has {len(distinct)} distinct prompt(s): too few to hold out {held} of them")
    test = set(distinct[:held])
    return {place: "test" if prompt in test else "train" for place, prompt in prompts.items()}


# ---------------------------------------------------------------------------------------------------------
# What is said


def _say_form(source: str, reading: Reading, kind: str) -> None:
    form = reading.form
    say(f"{source}: {form.tally.rows} rows of {form}, read as {kind}")
    if " -> " in form.roles:
        say(f"  columns: {form.roles}")
    for note in form.tally.lines:
        say(f"  {note}")
    if reading.ignored:
        say(f"  columns not used: {', '.join(reading.ignored)}")


def _say_written(
    path: Path | None, count: int, reading: Reading, left: LeftOut, used: set[str] | None = None
) -> None:  # fmt: skip
    """`used`: the rows of the source that gave something, where one may give several."""
    if path is not None:
        rows = f"{len(used or ())} row{'' if len(used or ()) == 1 else 's'}"
        of_rows = "" if used is None or len(used) == count else f", of {rows} of the source"
        say(f"{path}: {count} rows written{of_rows}")
    for line in left.lines(used):
        say(f"  {line}")


def _measure_tokens(args: argparse.Namespace, kind: str, stats: Stats, looked: "Looked") -> None:
    """Lengths in tokens, and the rows that the chat template or max_length refuse, as a run would have them."""
    from prefuse.engine.data.examples import load_examples
    from prefuse.engine.data.pieces import sides_of
    from prefuse.engine.data.stops import describe_unstopped
    from prefuse.engine.model.load import load_tokenizer

    if kind not in PARTS:
        raise UserError(f"rows read as {kind} have no tokens yet: give --kind {', '.join(PARTS)}, or drop --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer)
    options = {name: value for name, value in vars(args.options).items() if name not in ("keep_scores", "needs")}
    data = load_examples(args.source, kind, tokenizer, args.max_length, split=args.split, max_skipped=1.0, **options)
    stats.records = data.rows - len(data.skipped)
    stats.count_skipped(data.skipped)
    stats.lengths = {part: array("q", (len(getattr(row, part)) for row in data.examples)) for part in PARTS[kind]}
    notes = [f"prompts cut to fit {args.max_length} tokens (by truncation_mode): {data.prompts_cut}"] * bool(
        data.prompts_cut
    )
    notes += [told] if (told := describe_unstopped(data.examples, tokenizer, data.completions_cut)) else []
    for note in notes:
        say(f"  {note}")
    looked.notes += notes
    shown = range(min(SHOWN_ROWS, len(data.examples)))
    looked.tokens = [(data.examples.rows[index], sides_of(data.examples, index, tokenizer)) for index in shown]
    looked.examples = []


# ---------------------------------------------------------------------------------------------------------
# Flags


ROW_FIELDS = [field for field in dataclasses.fields(RowSettings) if field.name not in ("datasets", "max_skipped")]


def parser() -> ToolParser:
    parser = ToolParser(prog="prefuse data", description="Look at rows, convert, filter and split them (docs/data.md).")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    one = verbs.add_parser("inspect", help="counts, lengths, duplicates, contradictions, balance")
    one.add_argument("--kind", choices=CHOICES, default="auto", help="what the rows are to be read as")
    one.add_argument("--tokenizer", help="a model: lengths in its tokens, and what its chat template refuses")
    one.add_argument("--max_length", type=number_from(2), default=1024, help="with --tokenizer: most tokens of a row")
    one.add_argument("--picture", help="a PNG of the lengths")
    one.add_argument("--html", help="a page with the same and more: histograms, what to look at first, the first rows")
    one.set_defaults(run=inspect)
    two = verbs.add_parser("convert", help="rows as pairs, labelled, scored or sft")
    two.add_argument("--to", choices=tuple(TARGETS), required=True, help="what the rows become")
    two.add_argument("--as_turns", action="store_true", help="strings, transcripts among them, become turns")
    two.set_defaults(run=convert)
    three = verbs.add_parser("filter", help="rows that pass rules")
    three.add_argument("--kind", choices=CHOICES, default="auto", help="what the rows are to be read as")
    three.add_argument("--min_score_gap", type=number_from(0.0), help="least difference of the scores of both sides")
    three.add_argument("--min_characters", type=number_from(0), help="of each answer")
    three.add_argument("--max_characters", type=number_from(1), help="of each answer")
    three.add_argument("--max_prompt_characters", type=number_from(0), help="of the prompt")
    three.add_argument("--max_length_ratio", type=number_from(1.0), help="of a pair's longer answer to its shorter one")
    three.add_argument("--drop_duplicates", action="store_true", help="keep the first of equal rows")
    three.add_argument("--drop_contradictions", action="store_true", help="drop rows that another contradicts")
    three.set_defaults(run=filter_rows)
    four = verbs.add_parser("split", help="train and test files, by prompt")
    four.add_argument("--kind", choices=CHOICES, default="auto", help="what the rows are to be read as")
    four.add_argument(
        "--eval_fraction", type=number_from(0.0, 1.0), default=0.1, help="share of prompts to test on (0.1)"
    )
    four.add_argument("--seed", type=int, default=42, help="decides which (42)")
    four.add_argument("--suffix", default=".jsonl", help="of the two files: .jsonl, .jsonl.gz or .parquet (.jsonl)")
    four.set_defaults(run=split_rows)
    for verb, output in ((one, None), (two, "the new file"), (three, "the new file"), (four, "the new folder")):
        _add_rows(verb, output)
    return parser


def _add_rows(verb: argparse.ArgumentParser, output: str | None) -> None:
    verb.add_argument("source", help="a file, a folder or a hub name")
    if output:
        verb.add_argument("output", help=output + " (.jsonl, .jsonl.gz, .parquet)" * output.endswith("file"))
    verb.add_argument("--split", default="train", help="of a source with splits (train)")
    for field in ROW_FIELDS:
        verb.add_argument(
            f"--{field.name}", choices=literals(field.name) or None, help=known(field).about.replace("%", "%%")
        )


def _options(args: argparse.Namespace) -> ReadOptions:
    given = {field.name: getattr(args, field.name) for field in ROW_FIELDS}
    values = {name: from_words(name, [value]) for name, value in given.items() if value is not None}
    settings = RowSettings(**values)
    options = {name: getattr(settings, name) for name in given}
    return ReadOptions(**options, seed=getattr(args, "seed", 0))
