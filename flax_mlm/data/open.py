"""Opening the corpora of a run."""

from collections.abc import Callable, Sequence

from flax_mlm.config.schema import Config
from flax_mlm.data.mixture import Mixture
from flax_mlm.data.prepare import prepare
from flax_mlm.data.tokenizer.load import load_tokenizer
from flax_mlm.errors import UserError


def open_corpus(config: Config, log: Callable[[str], None] = print) -> Mixture:
    """Opens the folders of `data.corpus`; without any, the corpus that the rest of the config describes, which is
    prepared first where `data.cache_dir` does not hold it.

    Raises:
      UserError: also when `data.corpus` was made with another tokenizer than `tokenizer.path`.
    """
    if not config.data.corpus:
        corpus = prepare(config, log=log)
        return Mixture({corpus.path.name: corpus})
    mixture = Mixture.open(config.data)
    tokenizer = config.tokenizer
    if tokenizer.path:
        expected = load_tokenizer(tokenizer.path, tokenizer.extra_tokens_file)
        if expected.fingerprint != mixture.tokenizer().fingerprint:
            raise UserError(f"data.corpus: {mixture} was made with another tokenizer than {tokenizer.path}")
    if mixture.seq_len > config.model.max_positions:
        raise UserError(
            f"model.max_positions is {config.model.max_positions}; expected at least {mixture.seq_len}, the row length "
            "of data.corpus"
        )
    return mixture


def open_corpora(configs: Sequence[Config], log: Callable[[str], None] = print) -> list[Mixture]:
    """Opens the corpora of each phase of a run; phases with the same data share one object.

    Raises:
      UserError: as `open_corpus`; or the tokenizers differ.
    """
    mixtures = {data: open_corpus(config, log) for data, config in {config.data: config for config in configs}.items()}
    first, *others = mixtures.values()
    for mixture in others:
        if mixture.tokenizer().fingerprint != first.tokenizer().fingerprint:
            raise UserError(f"train.phases: {mixture} was made with another tokenizer than {first}")
    return [mixtures[config.data] for config in configs]
