"""The tokenizer files of a Hugging Face folder, joined to one tokenizer.json: vocabularies, and the settings beside.

What transformers reads of the settings and what changes ids is done, or refused by name.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from flax_mlm.data.base_tokenizer import SPECIAL_TOKENS, Tokenizer
from flax_mlm.data.json_tokenizer import Spec, components, read_json, to_json
from flax_mlm.errors import UserError, as_user_error

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

SAVE_JSON = "save a tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"

_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")  # classes that take a tokenizer.json as it is
_BERT = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BYTE_LEVEL = ("RobertaTokenizer", "GPT2Tokenizer", "BartTokenizer", "LongformerTokenizer", *_GENERIC)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The order in which transformers adds special tokens that the vocabulary lacks.
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings of BERT's tokenizers that change ids: the key in tokenizer_config.json -> that of BertNormalizer.
_NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
_NORMALIZER["tokenize_chinese_chars"] = "handle_chinese_chars"
_BERT_NORMALIZER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
_BERT_NORMALIZER |= {"lowercase": True}
# Settings that no tokenizer here follows -> the value that asks for nothing.
_UNSUPPORTED = {"do_basic_tokenize": True, "clean_text": True, "wordpieces_prefix": "##"}
_UNSUPPORTED |= {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}


class Settings(NamedTuple):
    """Content of the files beside a vocabulary.

    Attributes:
      folder: where they are.
      config: tokenizer_config.json, with the special tokens of special_tokens_map.json.
      model_type: of config.json.
      roles: role -> special token.
      added: the tokens to add, each with `content`, flags, and `id` where one is stated.
    """

    folder: epath.Path
    config: dict[str, Any]
    model_type: Any
    roles: dict[str, str]
    added: list[dict[str, Any]]

    def flag(self, key: str) -> bool | None:
        """Returns a setting that is true, false or null."""
        value = self.config.get(key)
        if value is not None and type(value) is not bool:
            raise UserError(f"{self.folder / CONFIG}: {key} is {value!r}; expected true or false")
        return value

    def spelled(self, usual: int) -> dict[str, str]:
        """Returns role -> special token, spelled as BERT (0) or RoBERTa (1) spells it where no setting names it."""
        return {role: self.roles.get(role, spellings[usual]) for role, spellings in SPECIAL_TOKENS.items()}

    @property
    def class_name(self) -> str:
        return str(self.config.get("tokenizer_class") or "").removesuffix("Fast")

    def require_class(self, names: tuple[str, ...], file: epath.Path) -> None:
        """Raises UserError unless the tokenizer is of one of some classes."""
        if self.class_name not in ("", *names):
            what = f"tokenizer_class is {self.class_name}; expected one of {', '.join(names)} with {file.name}"
            raise UserError(f"{self.folder}: {what}; or {SAVE_JSON}")


def read_settings(folder: epath.Path) -> Settings:
    """Reads the settings of a folder, which may have none.

    Raises:
      UserError: a file cannot be read, or has a value that cannot be followed; the message names it.
    """
    config = _read(folder / CONFIG)
    if "added_tokens_decoder" not in config:  # then the other files count, as in transformers
        config |= _read(folder / MAP)
    model = _read(folder / "config.json")
    model_type = model.get("model_type")
    default = "BertTokenizer" if model_type in ("bert", "distilbert", "electra") else None
    config["tokenizer_class"] = config.get("tokenizer_class") or model.get("tokenizer_class") or default
    for key, neutral in _UNSUPPORTED.items():
        if (value := config.get(key, neutral)) not in (neutral, None):
            raise UserError(f"{folder / CONFIG}: {key} is {value!r}; expected {neutral!r}, all that is supported here")
    if config.get("never_split"):
        raise UserError(f"{folder / CONFIG}: never_split is {config['never_split']!r}; expected none")
    names = {key: _content(folder, key, config[key]) for key in config if _names_token(key, config[key])}
    roles = {role: names[f"{role}_token"] for role in SPECIAL_TOKENS if f"{role}_token" in names}
    stated = [*_stated_tokens(folder, config, names)]
    special = [names[key] for key in _ORDER if key in names] + [*_extra_special_tokens(folder, config)]
    missing = (token for token in special if token not in {t["content"] for t in stated})
    flags = {names[key]: {f: bool(config[key].get(f)) for f in _FLAGS} for key in names if type(config[key]) is dict}
    plain = dict.fromkeys(_FLAGS, False)
    added = [*stated, *({"content": t, **flags.get(t, plain), "special": True} for t in dict.fromkeys(missing))]
    return Settings(folder, config, model_type, roles, added)


def _names_token(key: str, value: Any) -> bool:
    return key.endswith("_token") and value is not None and type(value) is not bool  # add_bos_token is a flag


def _content(folder: epath.Path, key: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise UserError(f"{folder}: {key} of its tokenizer settings is {token!r}; expected a token")
    return content


def _extra_special_tokens(folder: epath.Path, config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        if not isinstance(tokens, list | dict):
            raise UserError(f"{folder}: {key} of its tokenizer settings is {tokens!r}; expected a list of tokens")
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield _content(folder, key, token)


def _stated_tokens(folder: epath.Path, config: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yields the added tokens that have an id, by id."""
    with as_user_error(f"{folder}: its added tokens cannot be read: ", AttributeError, TypeError, ValueError):
        if "added_tokens_decoder" in config:
            tokens = {int(i): dict(token) for i, token in config["added_tokens_decoder"].items()}
        else:
            special = {*names.values(), *_extra_special_tokens(folder, config)}
            tokens = {
                int(i): {"content": token, "special": token in special, "normalized": token not in special}
                for token, i in _read(folder / ADDED).items()
            }
        for i, token in sorted(tokens.items()):
            flags = {flag: bool(token.get(flag, flag == "normalized")) for flag in _FLAGS}
            yield {"id": i, "content": _content(folder, str(i), token), **flags}


def with_settings(content: bytes, file: epath.Path, settings: Settings) -> bytes:
    """Returns the content of a tokenizer.json that does what the settings beside it say.

    It is unchanged where they say no more than the file.

    Raises:
      UserError: a setting cannot be followed, or contradicts the file.
    """
    with as_user_error(f"{file} is not a Hugging Face tokenizer.json: ", Exception):
        tokenizer, before = read_json(content)
        spec = json.loads(tokenizer.to_str())
    changes = _settings_changes(spec, settings) | _flag_changes(spec, settings)
    if changes:
        tokenizer, _ = read_json(json.dumps(spec).encode())
    changes |= _add_tokens(tokenizer, spec, file, settings)
    roles = before | _roles(tokenizer, spec, settings)
    return to_json(tokenizer, roles) if changes or roles != before else content


def _settings_changes(spec: Spec, settings: Settings) -> bool:
    """Makes the changes that the class and the settings ask for; returns whether there are any."""
    if settings.class_name in _GENERIC:
        return False
    before, vocab = json.dumps(spec), spec["model"]["vocab"]
    parts = {part["type"]: part for part in components(spec)}
    values = {name: settings.flag(key) for key, name in _NORMALIZER.items() if key in settings.config}
    values = {name: x for name, x in values.items() if x is not None or name == "strip_accents"}
    normalizer = parts.get("BertNormalizer")
    if settings.class_name in _BERT and spec["model"]["type"] == "WordPiece":  # made anew of the vocabulary
        if normalizer and not normalizer["lowercase"] and "lowercase" not in values:
            what = "the vocabulary has upper-case tokens, and no file says whether transformers lower-cases text"
            raise UserError(f'{settings.folder}: {what}; write "do_lower_case": false, or true, in {CONFIG}')
        spec["normalizer"] = _BERT_NORMALIZER | values
        spec["pre_tokenizer"] = {"type": "BertPreTokenizer"}
        spec["model"]["max_input_chars_per_word"] = 100
        ends = {role: token for role, token in settings.spelled(0).items() if role in ("cls", "sep")}
        if _template(spec["post_processor"]) != ends and vocab.keys() >= {*ends.values()}:
            processor = {role: [token, vocab[token]] for role, token in ends.items()}
            spec["post_processor"] = {"type": "BertProcessing", **processor}
    elif normalizer:
        normalizer |= values
    elif settings.class_name == "AlbertTokenizer":
        for key, type_, meant in (("do_lower_case", "Lowercase", True), ("keep_accents", "StripAccents", False)):
            if (value := settings.flag(key)) is not None and (type_ in parts) != (value == meant):
                raise UserError(f"{settings.folder / CONFIG}: {key} is {value}, unlike in tokenizer.json's normalizer")
    if (prefix := settings.flag("add_prefix_space")) is not None:
        if "ByteLevel" in parts:
            parts["ByteLevel"]["add_prefix_space"] = prefix
        elif "Metaspace" in parts and not prefix:
            parts["Metaspace"]["prepend_scheme"] = "never"
    return json.dumps(spec) != before


def _flag_changes(spec: Spec, settings: Settings) -> bool:
    """Sets the flags of added tokens to those of `added_tokens_decoder`, which go first in transformers."""
    stated = {t["content"]: t for t in settings.added if "added_tokens_decoder" in settings.config and "id" in t}
    before = json.dumps(spec)
    for token in spec["added_tokens"]:
        token |= {flag: stated.get(token["content"], token)[flag] for flag in _FLAGS}
    return json.dumps(spec) != before


def _add_tokens(tokenizer: Any, spec: Spec, file: epath.Path, settings: Settings) -> bool:
    """Adds the tokens of the settings that the tokenizer lacks; returns whether there are any."""
    from tokenizers import AddedToken

    known = {token["content"] for token in spec["added_tokens"]}
    new = [token for token in settings.added if token["content"] not in known]
    new = [t for t in new if "id" in t or t["lstrip"] or tokenizer.token_to_id(t["content"]) is None]
    for token in new:
        content = token["content"]
        tokenizer.add_tokens([AddedToken(content, **{flag: token[flag] for flag in _FLAGS})])
        if (i := tokenizer.token_to_id(content)) != token.get("id", i):
            what = f"the added token {content!r} has id {token['id']}, and {file.name} leaves it {i}"
            raise UserError(f"{settings.folder}: {what}; save the tokenizer again")
    return bool(new)


def _roles(tokenizer: Any, spec: Spec, settings: Settings) -> dict[str, str]:
    """Returns the roles whose token is not the one that is spelled as usual."""
    template = _template(spec["post_processor"])
    unknown = spec["model"].get("unk_token")
    if unknown is None and (i := spec["model"].get("unk_id")) is not None:
        unknown = spec["model"]["vocab"][i][0]
    usual = {
        role: next((token for token in spellings if tokenizer.token_to_id(token) is not None), None)
        for role, spellings in SPECIAL_TOKENS.items()
    }
    ends = {"cls": settings.config.get("bos_token"), "sep": settings.config.get("eos_token")}
    named = {role: _content(settings.folder, role, token) for role, token in ends.items() if token}
    evidence = {role: token for role, token in usual.items() if token}
    roles = {**named, **evidence, **({"unk": unknown} if unknown else {}), **template, **settings.roles}
    return {role: token for role, token in roles.items() if token != usual[role]}


def _template(processor: Any) -> dict[str, str]:
    """Returns the tokens that a post-processor puts before and after a text, as roles."""
    match processor:
        case {"type": "Sequence", "processors": processors}:
            return {role: token for each in processors for role, token in _template(each).items()}
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [cls, _], "sep": [sep, _]}:
            return {"cls": cls, "sep": sep}
        case {"type": "TemplateProcessing", "single": [first, *_, last]}:
            ends = {"cls": first, "sep": last}
            return {role: end["SpecialToken"]["id"] for role, end in ends.items() if "SpecialToken" in end}
    return {}


def wordpiece_json(file: epath.Path, settings: Settings) -> bytes:
    """Makes a tokenizer.json of BERT's `vocab.txt`.

    It lower-cases text where tokenizer_config.json says so; without that, where the vocabulary has no upper-case token.

    Raises:
      UserError: the file cannot be read, a special token is missing, or its class is no BERT tokenizer.
    """
    import tokenizers

    settings.require_class((*_BERT, *_GENERIC), file)
    with as_user_error(f"{file} cannot be read: ", OSError, ValueError):
        tokens = file.read_text().rstrip("\n").split("\n")  # not splitlines(): some tokens are odd spaces
    lowercase = settings.flag("do_lower_case")
    if lowercase is None:
        lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
    vocab = {token: i for i, token in enumerate(tokens)}
    names = settings.spelled(0)
    if missing := [names[role] for role in ("unk", "sep", "cls") if names[role] not in vocab]:
        raise UserError(f"{file} has no {missing[0]} token; it is not a BERT vocabulary")
    chinese = settings.flag("tokenize_chinese_chars")
    return tokenizers.BertWordPieceTokenizer(
        vocab,
        lowercase=lowercase,
        strip_accents=settings.flag("strip_accents"),
        handle_chinese_chars=chinese is None or chinese,
        **{f"{role}_token": token for role, token in names.items()},
    ).to_str().encode()  # fmt: skip


def byte_level_json(file: epath.Path, settings: Settings) -> bytes:
    """Makes a tokenizer.json of `vocab.json`, and of `merges.txt` beside it, as RoBERTa and GPT-2 have them.

    Raises:
      UserError: a file cannot be read, or they are no byte-level BPE.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

    settings.require_class(_BYTE_LEVEL, file)
    merges_file = file.parent / "merges.txt"
    with as_user_error(f"{file} and merges.txt beside it are no byte-level BPE: ", Exception):
        vocab = json.loads(file.read_text())
        lines = merges_file.read_text().split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if "Ġ" not in vocab:
            raise ValueError("no token Ġ, which stands for a space")
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    prefix = bool(settings.flag("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    known = {role: token for role, token in settings.spelled(1).items() if token in vocab}
    tokenizer.add_special_tokens([AddedToken(token, lstrip=role == "mask") for role, token in known.items()])
    if {"cls", "sep"} <= known.keys():
        sep, cls = ((known[role], vocab[known[role]]) for role in ("sep", "cls"))
        tokenizer.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=prefix)
    return tokenizer.to_str().encode()


def _read(file: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one where there is no file."""
    with as_user_error(f"{file} cannot be read as JSON: ", OSError, ValueError):
        content = json.loads(file.read_text()) if file.exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def tokenizer_json(file: epath.Path) -> bytes:
    """Returns the content of a tokenizer.json for a file with a vocabulary and the settings beside it.

    Raises:
      UserError: a file cannot be read, or a setting cannot be followed.
    """
    settings = read_settings(file.parent)
    if file.suffix == ".txt":
        content = wordpiece_json(file, settings)
    elif file.name == "vocab.json":
        content = byte_level_json(file, settings)
    else:
        content = file.read_bytes()
    return with_settings(content, file, settings)


def check_model(tokenizer: Tokenizer, file: epath.Path) -> None:
    """Raises UserError where the settings beside a SentencePiece model ask for what the model does not do."""
    settings = read_settings(file.parent)
    problems = [f"{t['content']!r} is an added token" for t in settings.added if t["content"] not in tokenizer.tokens]
    for role, token in settings.roles.items():
        if (own := tokenizer.tokens[getattr(tokenizer, f"{role}_id")]) != token:
            problems.append(f"{role}_token is {token!r}, not {own!r}")
    is_albert = "albert" in (settings.class_name[:6].lower(), settings.model_type)
    plain, upper, accented = (ids.tolist() for ids in tokenizer.encode(["e", "E", "é"]))
    lowercase, keep_accents = settings.flag("do_lower_case"), settings.flag("keep_accents")
    if upper != plain and (is_albert if lowercase is None else lowercase):
        problems.append("do_lower_case is true")
    if accented != plain and is_albert and not keep_accents:
        problems.append("keep_accents is false")
    if problems:
        what = f"by the files beside {file}, {problems[0]}, which a SentencePiece model alone does not do"
        raise UserError(f"{what}; {SAVE_JSON}")
