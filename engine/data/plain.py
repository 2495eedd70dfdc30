"""Plain text as blocks to predict: a text file, or the text column of rows."""

from pathlib import Path
from typing import Any

from prefuse.engine.data.forms import DataError
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.table import Demonstration

MOST_TOKENS = 1 << 20  # of a text that perplexity is taken on


def plain_blocks(source: str, tokenizer: Any, max_length: int) -> list[Demonstration]:
    """Texts end to end in blocks of max_length tokens. The first token of a block is given, the rest are predicted."""
    if Path(source).suffix == ".txt":
        try:
            texts = [Path(source).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {source}: {error}") from None
    else:
        rows = [row for _, row in open_source(source).rows() if isinstance(row, dict)]
        texts = [row["text"] for row in rows if isinstance(row.get("text"), str)]
        if not texts:
            raise DataError(f"{source}: expected a .txt file, or rows with a text column")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > MOST_TOKENS:
            break
    ids = ids[:MOST_TOKENS]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = max_length - len(start)
    blocks = [start + ids[at : at + room] for at in range(0, len(ids), room)]
    found = [Demonstration(one[:1], one[1:], f"{source}, block {i}") for i, one in enumerate(blocks) if len(one) > 1]
    if not found:
        raise DataError(f"{source} has no text of two tokens")
    return found
