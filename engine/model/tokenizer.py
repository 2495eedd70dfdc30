"""What the settings change about a tokenizer, and what a model has to know of it: its template, its stop tokens."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from prefuse.engine.config.text import TextSettings
from prefuse.engine.data.templates import DEFAULT_CHAT_TEMPLATE
from prefuse.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MISTRALS = ("tekken*.json", "tokenizer.model.v*")  # files that mistral-common reads


def apply_settings(tokenizer: "PreTrainedTokenizerBase", settings: TextSettings) -> None:
    """`chat_template` and `eos_token`: they are saved with the tokenizer."""
    if settings.chat_template is not None:
        tokenizer.chat_template = read_template(settings.chat_template)
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token {settings.eos_token} is no token of this tokenizer: give one that it has")
        tokenizer.eos_token = settings.eos_token


def read_template(name: str) -> str:
    """The text of a chat template: of a file, the built-in `chatml`, or one that trl ships."""
    path, shipped = Path(name), shipped_templates()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {name}: {error}") from None
    if name == "chatml":
        return DEFAULT_CHAT_TEMPLATE
    if name in shipped:
        return shipped[name].read_text(encoding="utf-8")
    names = ", ".join(["chatml", *shipped]) if shipped else "chatml (and those of trl, where it is installed)"
    raise UserError(f"chat_template {name}: no such file, and no template of that name; known: {names}")


def shipped_templates() -> dict[str, Path]:
    """The templates of the installed trl, by name; trl itself is not imported."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(next(iter(spec.submodule_search_locations))) / "chat_templates"
    return {file.stem: file for file in sorted(folder.glob("*.jinja"))}


def is_foreign(tokenizer: object) -> bool:
    """mistral-common's own tokenizers take whole requests and render no prompt apart from its answer."""
    return type(tokenizer).__name__.startswith("MistralCommon")


def refuse_foreign(path: str, tokenizer: object = None) -> None:
    """`tokenizer`: what was loaded, None where nothing could be."""
    folder, file = Path(path), None
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        found = sorted(name for pattern in MISTRALS for name in folder.glob(pattern))
        file = found[0].name if found else None
    if not is_foreign(tokenizer) and (tokenizer is not None or file is None):
        return
    if file is None or file.endswith(".json"):
        code = f"AutoTokenizer.from_pretrained('{path}').save_pretrained('FOLDER', save_format='hf')"
        fix = (
            "let transformers write it as one of its own, with a chat template, where a recent mistral-common is "
            f'installed: python -c "from transformers import AutoTokenizer; {code}"; and put its files into {path}'
        )
    else:
        fix = f"rename {file} to tokenizer.model, which transformers reads, and give --chat_template"
    what = f"mistral-common's{f' ({file})' if file else ''}"
    raise UserError(f"the tokenizer of {path} is {what}, which writes no prompt without its answer. Fix: {fix}")


def stop_at(model: nn.Module, tokens: Iterable[int]) -> None:
    """Add the tokens that end trained answers to those at which the model's `generate` stops. It saves them."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = [token for token in known if token is not None]
    added = [token for token in tokens if token not in known]
    if added:
        both = [*known, *added]
        config.eos_token_id = both[0] if len(both) == 1 else both
