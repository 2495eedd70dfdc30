"""A byte-level BPE tokenizer made on the spot: 300 tokens, any text, with or without BOS, EOS and template."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = (
    "the sky is blue and the sea is green",
    "what colour is the sky?",
    "it is blue",
    "hello there, tell me",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, bos=True, eos=True, adds=("bos",), chat_template=None, lines=LINES):
    """`bos` and `eos`: whether it has these tokens. `adds`: which of them it puts around a text by itself."""
    names = {"bos": "<s>"} if bos else {}
    names |= {"eos": "</s>"} if eos else {}
    specials = [*names.values(), "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    added = [names[name] for name in ("bos", "eos") if name in adds and name in names]
    if added:
        left = ["<s>"] if "<s>" in added else []
        right = ["</s>"] if "</s>" in added else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*left, "$A", *right],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in added],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        **{f"{name}_token": token for name, token in names.items()},
    )
