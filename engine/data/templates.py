"""Messages -> text, by the chat template of the tokenizer.

The template is rendered up to the assistant's turn and to the end; the first text must be a prefix of the second, and
what follows it is the completion. The template writes its special tokens itself.
"""

import logging
from dataclasses import replace
from typing import Any

import jinja2

from prefuse.engine.data.forms import BadRow, Message, Record, Skipped
from prefuse.engine.data.outcomes import each

logger = logging.getLogger(__name__)

# For a tokenizer without a chat template: ChatML, assistant turns ended by EOS so that generation stops.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token else '<|im_end|>' }}"
    "{% endfor %}"
    "{{ '\n<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def render(records: list[Record | Skipped], tokenizer: Any) -> list[Record | Skipped]:
    """Messages as text; strings stay as they are."""
    conversational = any(isinstance(record.prompt, list) for record in records if isinstance(record, Record))
    if conversational and not tokenizer.chat_template:
        logger.warning("the tokenizer has no chat template: messages are rendered with a built-in ChatML")
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # and saved with the model, which learns this format
    return each(records, lambda record: _render(record, tokenizer))


def _render(record: Record, tokenizer: Any) -> Record:
    """Messages as text; strings stay as they are."""
    if isinstance(record.prompt, str):
        return record

    def render(messages: list[Message], **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # how templates refuse a conversation
            raise BadRow(f"the chat template refuses it: {error}") from None

    prompt = render(record.prompt, add_generation_prompt=True)
    sides = {}
    for side, turns in record.sides.items():
        whole = render(record.prompt + turns)
        if not whole.startswith(prompt):
            raise BadRow(f'the chat template renders the prompt otherwise when "{side}" follows: no true prefix')
        sides[side] = whole[len(prompt) :]
        if not all(_contains(sides[side], turn["content"]) for turn in turns):
            raise BadRow(f'the chat template drops or rewrites text of "{side}"')
    return replace(record, prompt=prompt, sides=sides, rendered=True)


def _contains(text: str, content: str) -> bool:
    """Whether `content` is in `text`, but for white space: templates trim it."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())
