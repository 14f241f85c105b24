"""Small tokenizers of every kind, as Hugging Face folders hold them."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
TEXT = ["The baker sold keys and apples to the people of the harbour, and they carried them home."] * 20


def vocabulary(kind: str, special: tuple[str, ...] = BERT) -> tokenizers.Tokenizer:
    """A tokenizer trained on `TEXT`, whose model holds the special tokens.

    Args:
      kind: unigram, wordlevel, wordpiece, bpe (cut at spaces), metaspace or byte_level.
    """
    size = {"vocab_size": 340 if kind == "byte_level" else 90, "special_tokens": list(special), "show_progress": False}
    match kind:
        case "unigram":
            t = tokenizers.Tokenizer(models.Unigram())
            t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(unk_token=special[1], **size)
        case "wordlevel":
            t = tokenizers.Tokenizer(models.WordLevel(unk_token=special[1]))
            t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer = trainers.WordLevelTrainer(**size)
        case "wordpiece":
            t = tokenizers.Tokenizer(models.WordPiece(unk_token=special[1]))
            t.pre_tokenizer, t.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(**size)
        case "byte_level":
            t = tokenizers.Tokenizer(models.BPE())
            t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **size)
        case _:
            t = tokenizers.Tokenizer(models.BPE(unk_token=special[1]))
            t.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "metaspace" else pre_tokenizers.WhitespaceSplit()
            t.decoder = decoders.Metaspace() if kind == "metaspace" else None
            trainer = trainers.BpeTrainer(**size)
    t.train_from_iterator([*TEXT, *special], trainer)
    return t


def bert(lowercase: bool = True) -> tokenizers.Tokenizer:
    """A BERT's tokenizer."""
    t = vocabulary("wordpiece")
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    return t


def folder(path: Path, tokenizer: tokenizers.Tokenizer | dict | None = None, **files: object) -> Path:
    """Writes a tokenizer.json, and JSON files beside it: `tokenizer_config={...}` is tokenizer_config.json."""
    path.mkdir(exist_ok=True)
    if tokenizer is not None:
        content = json.dumps(tokenizer) if isinstance(tokenizer, dict) else tokenizer.to_str()
        (path / "tokenizer.json").write_text(content)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def bert_vocab(path: Path, *tokens: str, **settings: object) -> Path:
    """Writes a BERT's vocab.txt, with tokenizer_config.json beside it."""
    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text("\n".join([*BERT, *tokens]) + "\n")
    return folder(path, tokenizer_config={"tokenizer_class": "BertTokenizer", **settings})
