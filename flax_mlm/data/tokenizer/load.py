"""Opening a tokenizer's file."""

import os
from collections.abc import Callable
from pathlib import Path

from etils import epath

from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.data.tokenizer.huggingface import HuggingFaceTokenizer, wordpiece_json
from flax_mlm.data.tokenizer.sentencepiece import SentencePieceTokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import gcs

# By the name of the file that `save` writes.
TOKENIZERS: dict[str, Callable[[bytes, str], Tokenizer]] = {
    kind.filename: kind for kind in (SentencePieceTokenizer, HuggingFaceTokenizer)
}
_NAMES = (*TOKENIZERS, "vocab.txt")


def load_tokenizer(path: str | Path, extra_tokens_file: str | Path = "") -> Tokenizer:
    """Reads a SentencePiece `.model`, a Hugging Face `tokenizer.json` or a WordPiece `vocab.txt`, or that of a folder.

    Args:
      extra_tokens_file: words, one a line; each becomes a token at the end of the vocabulary.

    Raises:
      UserError: the file does not exist, cannot be read, or lacks a special token.
    """
    file = gcs.parse("tokenizer.path", os.fspath(path)) or epath.Path(path).expanduser()
    if file.is_dir():
        folder = file
        file = next((folder / name for name in _NAMES if (folder / name).exists()), folder)
        if file == folder:
            raise UserError(f"{folder} holds no {', no '.join(_NAMES)}")
    if not file.exists():
        raise UserError(f"tokenizer file {file} does not exist; give a SentencePiece .model or a tokenizer.json")
    kind = TOKENIZERS["tokenizer.model" if file.suffix == ".model" else "tokenizer.json"]
    content = wordpiece_json(file) if file.suffix == ".txt" else file.read_bytes()
    tokenizer = kind(content, str(file))
    if extra_tokens_file:
        try:
            lines = epath.Path(extra_tokens_file).expanduser().read_text().split("\n")
        except (OSError, ValueError) as e:
            raise UserError(f"tokenizer.extra_tokens_file: {extra_tokens_file} cannot be read: {e}") from e
        words = [word for word in dict.fromkeys(line.strip() for line in lines) if word]
        tokenizer = kind(tokenizer.extended(words), f"{file} with {extra_tokens_file}")
    return tokenizer
