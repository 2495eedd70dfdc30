"""Tokenizers of every kind: made on the spot, and the real ones that the package mistral-common carries."""

import base64
import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny_tokenizer import LINES, tiny_tokenizer

CORPUS = [*LINES, "a question of colour? Yes: no. red blue green sky", "the ant and the apple, 0123456789", "\n\n x\n"]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
STRIP_ONE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def sentencepiece(dummy_prefix):
    """BPE over whole texts with bytes to fall back on, as Llama 2's. `dummy_prefix`: Prepend, first or always."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if dummy_prefix == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=dummy_prefix, split=False)
    tokenizer.decoder = STRIP_ONE
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_bos(tokenizer)


def _with_bos(tokenizer):
    """Only SPECIALS are special (bytes are not), and <s> stands before a text."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIALS]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[bos])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({c for line in CORPUS for c in line} | set("aes ?é字#\n\t🙂"))
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level_with_prefix_space():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MADE = {
    "byte level": tiny_tokenizer,
    "byte level, blank before a text": byte_level_with_prefix_space,
    "SentencePiece, Prepend": lambda: sentencepiece("prepend"),
    "SentencePiece, Metaspace first": lambda: sentencepiece("first"),
    "SentencePiece, Metaspace always": lambda: sentencepiece("always"),
    "unigram": unigram,
    "WordPiece": wordpiece,
}
REAL = {"Mistral v1": "tokenizer.model.v1", "Mistral v3": "mistral_instruct_tokenizer_240323.model.v3"}


@cache
def made(kind):
    return MADE[kind]()


@cache
def real(kind, folder):
    """A tokenizer of mistral-common as transformers converts it; `folder` is written to."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    if kind == "tekken":
        return tekken(json.loads((data / "tekken_240911.json").read_bytes()))
    pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    name, _, legacy = kind.partition(", ")
    (folder / "tokenizer.model").write_bytes((data / REAL[name]).read_bytes())
    return LlamaTokenizer.from_pretrained(folder, legacy=bool(legacy))


def tekken(spec, ranks=24000):
    """Its first ranks, a byte-level BPE themselves; a merge is the best cut of a token in two of lower rank."""
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in spec["vocab"][:ranks]]
    rank = {token: number for number, token in enumerate(tokens)}
    letters = bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in tokens}
    cuts = [
        min(
            ((rank[a], rank[b], a, b) for i in range(1, len(t)) if (a := t[:i]) in rank and (b := t[i:]) in rank),
            key=lambda cut: max(cut[:2]),
            default=None,
        )
        for t in tokens
    ]
    merges = [(written[cut[2]], written[cut[3]]) for cut in cuts if cut]
    tokenizer = Tokenizer(models.BPE({written[token]: rank[token] for token in tokens}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(spec["config"]["pattern"]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
