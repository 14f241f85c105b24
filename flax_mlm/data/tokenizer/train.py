"""Training a SentencePiece model."""

import io
import re
from collections.abc import Iterable, Iterator

from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.data.text import cut
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.data.tokenizer.sentencepiece import SentencePieceTokenizer
from flax_mlm.errors import UserError

_LINE_CHARS = 2000  # SentencePiece drops training lines of more than max_sentence_length bytes


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a SentencePiece model; the same texts and config give the same bytes on any machine.

    Raises:
      UserError: the text does not support a vocabulary of this size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalization,
            byte_fallback=True,
            max_sentence_length=4 * _LINE_CHARS,  # bytes
            # As control symbols, no text can spell them. num_threads is left alone: it is recorded in the model.
            pad_id=0, pad_piece="[PAD]", unk_id=1, unk_piece="[UNK]",
            bos_id=2, bos_piece="[CLS]", eos_id=3, eos_piece="[SEP]", control_symbols=["[MASK]"],
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        if match := re.search(r"value <= (\d+)", str(e)):
            limit = f"at most {match[1]}"
        elif match := re.search(r"(\d+) vs (\d+)", str(e)):
            limit = f"at least {match[2]}"
        else:
            raise UserError(f"no tokenizer can be trained: the training text is empty ({e})") from e
        raise UserError(f"tokenizer.vocab_size is {config.vocab_size}; expected {limit} for this text") from e
    return SentencePieceTokenizer(model.getvalue(), "the trained tokenizer")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            # SentencePiece drops lines with U+2585, which it uses as a mark.
            yield from cut(line.replace("\u2585", " "), _LINE_CHARS)
