"""Tokenizers: train one on the corpus or load one, and what the rest needs to know about its vocabulary.

A tokenizer is always a folder that ``transformers.AutoTokenizer`` loads offline. Training is done by the ``tokenizers`` library:
WordPiece as in BERT (Devlin et al. 2019) or byte-level BPE as in RoBERTa (Liu et al. 2019; Radford et al. 2019). What masking and
collating need (special ids, which tokens start a word) is read from ``tokenizer.json`` alone, without importing either library.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from scaletrain import outside
from scaletrain.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

_BERT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ROBERTA_TOKENS = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
_NEEDED = ("pad_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class WordPieceConfig:
    """Train WordPiece on the corpus, with BERT's normaliser, special tokens and their ids."""

    name: Literal["wordpiece"] = "wordpiece"
    vocab_size: Annotated[int, Field(ge=256, le=1 << 24)] = 30_000
    """Entries, special tokens included; a small corpus may fill fewer."""
    lowercase: bool = True
    """Fold case and strip accents."""
    nfkc: bool = False
    """Give compatibility forms the tokens of the plain ones, full-width letters, digits and punctuation among them (NFKC)."""
    character_sets: tuple[Literal["ascii", "gb2312", "big5"], ...] = ()
    """Their characters get tokens even where the training text lacks them, so that text read later is not unknown."""
    alphabet: Annotated[int, Field(ge=1)] = 6_000
    """At most so many different characters get a token of their own: the most frequent ones."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """A merge must occur this often."""
    training_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the documents that the vocabulary is learned from, chosen by a hash of their text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteLevelConfig:
    """Train byte-level BPE on the corpus, with RoBERTa's special tokens and their ids."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=300, le=1 << 24)] = 50_000
    """Entries, special tokens and the 256 bytes included; a small corpus may fill fewer."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """A merge must occur this often."""
    training_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the documents that the vocabulary is learned from, chosen by a hash of their text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedConfig:
    """Load a fast tokenizer that exists."""

    name: Literal["pretrained"] = "pretrained"
    path: str
    """A folder, or a name on the Hugging Face hub."""
    revision: str | None = None
    """A commit of the hub repository, which makes the choice repeatable."""


TokenizerConfig = Annotated[WordPieceConfig | ByteLevelConfig | PretrainedConfig, Field(discriminator="name")]


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What masking, collating and models need to know about a tokenizer folder."""

    size: int
    """One more than the largest id: the rows that an embedding needs."""
    digest: str
    cls: int
    sep: int
    pad: int
    mask: int
    special: npt.NDArray[np.int64]
    """Ids of all special tokens, ascending."""
    starts_word: npt.NDArray[np.bool_]
    """Shape [size]: whether a token starts a word; see ``word_starts``."""

    @classmethod
    def open(cls, folder: Path) -> Vocabulary:
        """Read a tokenizer folder. Raises TokenizerError when it is missing or lacks one of the tokens that pretraining needs."""
        tree = _read(folder)
        ids = _ids(tree)
        named = {name: ids.get(text, -1) for name, text in _named_tokens(folder).items()}
        missing = [name for name in _NEEDED if named.get(name, -1) < 0]
        if missing:
            raise TokenizerError(
                str(folder), f"no {missing[0]}", f"pretraining needs {', '.join(_NEEDED)}", "Use another tokenizer"
            )
        return cls(
            size=max(ids.values()) + 1,
            digest=folder_digest(folder),
            cls=named["cls_token"],
            sep=named["sep_token"],
            pad=named["pad_token"],
            mask=named["mask_token"],
            special=special_ids(folder),
            starts_word=word_starts(folder),
        )


def folder_digest(folder: Path) -> str:
    """SHA-256 of ``tokenizer.json`` in canonical form, without truncation and padding, which are a session's settings."""
    tree = {key: value for key, value in _read(folder).items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def special_ids(folder: Path) -> npt.NDArray[np.int64]:
    """Ids of all special tokens of a tokenizer folder, ascending."""
    return np.array(sorted(token["id"] for token in _read(folder)["added_tokens"] if token["special"]), np.int64)


def token_texts(folder: Path) -> dict[int, str]:
    """Id -> token as the tokenizer writes it, marks included."""
    return {number: token for token, number in _ids(_read(folder)).items()}


def word_starts(folder: Path) -> npt.NDArray[np.bool_]:
    """Which tokens start a word, shape [vocabulary size]: what whole-word masking groups by.

    WordPiece: those without the continuation prefix ('##'). Byte-level BPE: those with 'Ġ', the mark of a space before;
    SentencePiece kinds: those with '▁'. Any other tokenizer: all. Special and added tokens always start a word. The first token
    of a text starts a word whatever its mark.
    """
    tree = _read(folder)
    ids, starts = _ids(tree), _start_rule(tree)
    marks = np.ones(max(ids.values()) + 1, np.bool_)
    added = {token["id"] for token in tree["added_tokens"]}
    for token, number in ids.items():
        marks[number] = number in added or starts(token)
    return marks


def require_fit(folder: Path, digest: str, field: str = "tokenizer") -> None:
    """Raise TokenizerError unless the tokenizer in ``folder`` is the one with ``digest``."""
    found = folder_digest(folder)
    if found != digest:
        rule = f"the data was tokenised with the tokenizer of digest {digest}"
        raise TokenizerError(
            field, f"{folder} ({found})", rule, "Use the tokenizer/ of the prepared folder, or prepare again with this one"
        )


def train(
    config: WordPieceConfig | ByteLevelConfig, texts: Callable[[], Iterable[str]], *, max_tokens: int
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary; the same texts in the same order give the same tokenizer. ``texts()`` may be read twice.

    Raises TokenizerError when the vocabulary asked for cannot hold the special tokens and the alphabet.
    """
    tokenizer = _train_wordpiece(config, texts) if isinstance(config, WordPieceConfig) else _train_bpe(config, texts())
    names = _BERT_TOKENS if isinstance(config, WordPieceConfig) else _ROBERTA_TOKENS
    boundary = {} if isinstance(config, WordPieceConfig) else {"bos_token": "<s>", "eos_token": "</s>"}
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast  # untyped upstream
    made: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, model_max_length=max_tokens + 2, **names, **boundary)
    return made


def load(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or the hub. Raises TokenizerError when it is missing, slow, or lacks a special token."""
    from transformers import AutoTokenizer

    remedy = "Give a folder with a tokenizer.json, or a hub name that can be reached from here"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(config.path, revision=config.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError("tokenizer.path", config.path, f"cannot be loaded: {reason}", remedy) from error
    if not tokenizer.is_fast:
        raise TokenizerError("tokenizer.path", config.path, "only fast tokenizers (with a tokenizer.json) can be used", remedy)
    missing = [name for name in _NEEDED if getattr(tokenizer, name, None) is None]
    if missing:
        raise TokenizerError(
            "tokenizer.path", config.path, f"pretraining needs {', '.join(_NEEDED)}; it has no {missing[0]}", remedy
        )
    loaded: PreTrainedTokenizerFast = tokenizer
    return loaded


def encoder(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder for bulk encoding: no truncation, no padding, and '[MASK]' in a text is just text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _train_wordpiece(config: WordPieceConfig, texts: Callable[[], Iterable[str]]) -> tokenizers.Tokenizer:
    """WordPiece whose entries are: special tokens, characters, characters inside a word ('##x'), then what was learned, in order.

    The library numbers the '##x' in the order of a hash table that differs from run to run, and breaks ties between merges by
    those numbers. Naming them as special tokens fixes the numbers; the tokenizer is then built anew, with only the real ones.
    """
    from tokenizers import decoders, models, processors

    plain = _bert_tokenizer(config)
    words = collections.Counter(word for text in texts() for word in plain.normalizer.normalize_str(text).split())
    special, known = list(_BERT_TOKENS.values()), _characters(config.character_sets, plain.normalizer)
    alphabet = sorted({*_alphabet(words, config.alphabet), *known})
    inside = _train_on(plain, [*words, *(2 * char for char in known)], alphabet, vocab_size=0, min_frequency=1).get_vocab()
    fixed = [*special, *alphabet, *sorted(token for token in inside if token.startswith("##") and len(token) == 3)]
    if config.vocab_size < len(fixed):
        rule = f"the special tokens and the corpus's {len(alphabet)} characters, alone and inside words, take {len(fixed)}"
        raise TokenizerError("tokenizer.vocab_size", config.vocab_size, rule, "Raise it, or lower tokenizer.alphabet")
    sizes = {"vocab_size": config.vocab_size, "min_frequency": config.min_frequency}
    learned = _train_on(_bert_tokenizer(config), texts(), alphabet, special_tokens=fixed, **sizes).get_vocab()
    tokenizer = _bert_tokenizer(config)
    tokenizer.model = models.WordPiece(vocab=learned, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    return tokenizer


def _bert_tokenizer(config: WordPieceConfig) -> tokenizers.Tokenizer:
    """BERT's normaliser and pre-tokeniser, which make every Han character a word, around an empty vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert = normalizers.BertNormalizer(lowercase=config.lowercase)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), bert]) if config.nfkc else bert
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _train_on(tokenizer: tokenizers.Tokenizer, texts: Iterable[str], alphabet: list[str], **options: Any) -> tokenizers.Tokenizer:
    from tokenizers import trainers

    limits: dict[str, Any] = {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet)}
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(**limits, **options, show_progress=False))
    return tokenizer


def _train_bpe(config: ByteLevelConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # A space before the first word: a word is the same tokens wherever it stands, and carries its mark there too.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(_ROBERTA_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ends)
    return tokenizer


def _characters(sets: Iterable[str], normalizer: Any) -> list[str]:
    """The printable characters of some character sets, as they are once normalised."""
    text = bytearray()
    for code in range(0x21, 0x10000):
        if chr(code).isprintable() and any(chr(code).encode(name, "ignore") for name in sets):
            text += chr(code).encode()
    return sorted(set("".join(normalizer.normalize_str(text.decode()).split())))


def _alphabet(words: Mapping[str, int], limit: int) -> list[str]:
    """The ``limit`` most frequent characters, ties by code point: the library's own choice among ties differs from run to run."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    ranked = sorted((-count, char) for char, count in counts.items())
    return sorted(char for _, char in ranked[:limit])


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    try:
        tree = outside.read_json(file)
    except OSError:
        raise TokenizerError(
            str(folder), "no tokenizer.json", "a tokenizer is a folder with one", "Prepare the data again"
        ) from None
    except ValueError:
        raise TokenizerError(str(file), "not JSON", "a tokenizer.json is JSON in UTF-8", "Prepare the data again") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or not isinstance(tree.get("added_tokens"), list):
        raise TokenizerError(str(file), "no model", "a tokenizer.json has 'model' and 'added_tokens'", "Prepare the data again")
    return tree


def _ids(tree: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id; Unigram models list (token, score) pairs in the order of their ids."""
    vocab = tree["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in tree["added_tokens"]}


def _named_tokens(folder: Path) -> dict[str, str]:
    """``cls_token`` -> '[CLS]' and so on, as the folder's configuration names them."""
    named: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.exists():
            try:
                tree = outside.read_json(file)
            except (OSError, ValueError):
                tree = None
            if not isinstance(tree, dict):
                raise TokenizerError(str(file), "not JSON", "it names the special tokens in JSON", "Prepare the data again")
            for name, token in tree.items():
                if name in _NEEDED and token is not None:
                    named[name] = str(token.get("content")) if isinstance(token, dict) else str(token)
    return named


def _start_rule(tree: Mapping[str, Any]) -> Callable[[str], bool]:
    """How the tokens of this kind of tokenizer show that they start a word."""
    model, kinds = tree["model"], set(_types(tree.get("pre_tokenizer"))) | set(_types(tree.get("decoder")))
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        return lambda token: not token.startswith(prefix)
    if "ByteLevel" in kinds:
        return lambda token: token.startswith("Ġ")
    if "Metaspace" in kinds:
        return lambda token: token.startswith("▁")
    return lambda token: True


def _types(node: Any) -> Iterator[str]:
    """The types of a component and of those inside a sequence of components."""
    if isinstance(node, dict):
        yield str(node.get("type"))
        for value in node.values():
            for inner in value if isinstance(value, list) else ():
                yield from _types(inner)
