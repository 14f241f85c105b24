"""Tokenizers from files: SentencePiece models and what Hugging Face folders hold, behind one interface."""

import os
from collections.abc import Callable
from pathlib import Path

from etils import epath

from flax_mlm.data import hf_tokenizer_files
from flax_mlm.data.base_tokenizer import Tokenizer, is_special_spelling
from flax_mlm.data.json_tokenizer import HuggingFaceTokenizer
from flax_mlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_mlm.errors import UserError, as_user_error, hub_remedy, refuse_lfs_pointer
from flax_mlm.storage import buckets, hub
from flax_mlm.storage.retry import retrying

# By the name of the file that `save` writes.
TOKENIZERS: dict[str, Callable[[bytes, str], Tokenizer]] = {
    kind.filename: kind for kind in (SentencePieceTokenizer, HuggingFaceTokenizer)
}
_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")  # in a folder, the first one counts


@retrying
def load_tokenizer(path: str | Path, extra_tokens_file: str | Path = "") -> Tokenizer:
    """Reads a SentencePiece `.model`, a Hugging Face `tokenizer.json`, a WordPiece `vocab.txt`, or a byte-level
    `vocab.json` with `merges.txt`, or that of a folder or of a model of the hub (`hf:ORG/NAME`); and the settings of
    Hugging Face beside it.

    Args:
      extra_tokens_file: words, one a line; each becomes a token at the end of the vocabulary.

    Raises:
      UserError: the file does not exist, cannot be read, or lacks a special token; or a word is not found as one token.
    """
    path = hub.local("tokenizer.path", path, weights=False)
    file = buckets.parse("tokenizer.path", path) or epath.Path(path).expanduser()
    with buckets.errors(file):
        return _load(file, path, extra_tokens_file)


def _load(file: epath.Path, path: str | Path, extra_tokens_file: str | Path) -> Tokenizer:
    if file.is_dir():
        folder = file
        file = next((folder / name for name in _NAMES if (folder / name).exists()), folder)
        if file == folder:
            what = f"{folder} holds no {', no '.join(_NAMES)}"
            if others := sorted(file.name for file in folder.glob("*.model")):
                what += f", but {others[0]}; name that file if it is a SentencePiece model as trained"
                what += f", and for a folder of transformers {hf_tokenizer_files.SAVE_JSON}"
            raise UserError(what)
    if not file.exists():
        remedy = hub_remedy(os.fspath(path)) or "give a SentencePiece .model or a tokenizer.json"
        raise UserError(f"tokenizer file {file} does not exist; {remedy}")
    refuse_lfs_pointer(file)
    tokenizer: Tokenizer
    if file.suffix == ".model":
        tokenizer = SentencePieceTokenizer(file.read_bytes(), str(file))
        hf_tokenizer_files.check_model(tokenizer, file)
    else:
        tokenizer = HuggingFaceTokenizer(hf_tokenizer_files.tokenizer_json(file), str(file))
    return _extended(tokenizer, extra_tokens_file) if extra_tokens_file else tokenizer


def _extended(tokenizer: Tokenizer, extra_tokens_file: str | Path) -> Tokenizer:
    """Adds the words of a file to a tokenizer."""
    what = f"tokenizer.extra_tokens_file: {extra_tokens_file}"
    with as_user_error(f"{what} cannot be read: ", OSError, ValueError):
        lines = epath.Path(extra_tokens_file).expanduser().read_text().removeprefix("\ufeff").split("\n")
    words = [word for word in dict.fromkeys(" ".join(line.split()) for line in lines) if word]
    if special := [word for word in words if is_special_spelling(word)]:
        raise UserError(f"{what} has '{special[0]}', which spells a special token; delete it")
    extended = TOKENIZERS[tokenizer.filename](tokenizer.extended(words), what)
    sentences = extended.encode([f"a {word}, {word}." for word in words])
    for word, ids, sentence in zip(words, extended.encode_words(words), sentences, strict=True):
        is_one = len(ids) == 1 and not extended.is_special[ids[0]]
        if not is_one or (ids[0] >= tokenizer.vocab_size and sum(sentence == ids[0]) != 2):
            found = " ".join(extended.tokens[i] for i in (sentence if is_one else ids)) or "no token"
            raise UserError(f"{what} has '{word}', which is not found as one token in text, but as {found}; delete it")
    return extended
