"""Tokenizers: what is trained, what transformers loads of it, and what the vocabulary says about words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scaletrain.data import tokenizer
from scaletrain.data.tokenizer import ByteLevelConfig, PretrainedConfig, Vocabulary, WordPieceConfig
from scaletrain.errors import TokenizerError

TEXTS = [
    f"The {adjective} cat sat on {number} mats, purring." for adjective in ("black", "blackest", "Bläck") for number in range(30)
]
CONFIGS = {"wordpiece": WordPieceConfig(vocab_size=300), "bpe": ByteLevelConfig(vocab_size=400)}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(kind)
    tokenizer.train(CONFIGS[kind], lambda: TEXTS, max_tokens=126).save_pretrained(made)
    return made


SPECIAL = {
    "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],  # ids as in BERT
    "bpe": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],  # ids as in RoBERTa
}
WRAPPED = {
    "wordpiece": ("[CLS]", "[SEP]", ["[SEP]"], "the black cat sat"),
    "bpe": ("<s>", "</s>", ["</s>", "</s>"], " The black cat sat"),
}


def test_special_tokens_have_the_ids_of_the_model_family(kind: str, folder: Path) -> None:
    vocabulary = Vocabulary.open(folder)
    assert vocabulary.special.tolist() == [0, 1, 2, 3, 4]
    named = {"wordpiece": (2, 3, 0, 4), "bpe": (0, 2, 1, 4)}[kind]
    assert (vocabulary.cls, vocabulary.sep, vocabulary.pad, vocabulary.mask) == named


def test_transformers_loads_the_folder_and_wraps_one_text_or_two(kind: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    first, last, between, text = WRAPPED[kind]
    assert loaded.convert_ids_to_tokens(range(5)) == SPECIAL[kind]
    assert (loaded.cls_token, loaded.sep_token, loaded.model_max_length) == (first, last, 128)
    one = loaded.convert_ids_to_tokens(loaded("The black cat sat")["input_ids"])
    assert (one[0], one[-1]) == (first, last)
    two = loaded.convert_ids_to_tokens(loaded("The", "cat")["input_ids"])
    assert two == [one[0], *loaded.tokenize("The"), *between, *loaded.tokenize("cat"), last]
    assert loaded.decode(loaded("The black cat sat")["input_ids"], skip_special_tokens=True) == text


def test_bulk_encoding_gives_the_same_ids_as_transformers(kind: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded, bulk = AutoTokenizer.from_pretrained(folder), tokenizer.encoder(folder)
    ours = [encoding.ids for encoding in bulk.encode_batch_fast(TEXTS, add_special_tokens=False)]
    assert ours == loaded(TEXTS, add_special_tokens=False)["input_ids"]


def test_special_tokens_written_out_in_a_text_are_text(kind: str, folder: Path) -> None:
    text = " ".join(SPECIAL[kind])
    ids = tokenizer.encoder(folder).encode(text, add_special_tokens=False).ids
    unknown = SPECIAL[kind].index({"wordpiece": "[UNK]", "bpe": "<unk>"}[kind])
    assert not set(ids) & ({0, 1, 2, 3, 4} - {unknown})


def test_training_twice_gives_the_same_tokenizer_whatever_the_alphabet(kind: str, tmp_path: Path) -> None:
    texts = [chr(0x4E00 + number % 400) + chr(0x430 + number % 30) * 3 + f" {number}x" for number in range(600)]
    config = {"wordpiece": WordPieceConfig(vocab_size=500, alphabet=150), "bpe": ByteLevelConfig(vocab_size=500)}[kind]
    digests = set()
    for _ in range(5):
        tokenizer.train(config, lambda: texts, max_tokens=126).save_pretrained(tmp_path)
        digests.add(tokenizer.folder_digest(tmp_path))
    assert len(digests) == 1


def test_the_most_frequent_characters_get_a_token_and_ties_go_by_code_point(tmp_path: Path) -> None:
    texts = ["乙", "甲 甲", "丙", "丁 丁"]
    made = tokenizer.train(WordPieceConfig(vocab_size=256, alphabet=3), lambda: texts, max_tokens=8)
    assert made.convert_ids_to_tokens(range(len(made))) == [*SPECIAL["wordpiece"], "丁", "丙", "甲"]


def test_word_starts_follow_the_marks_of_the_tokenizer(kind: str, folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    starts = tokenizer.word_starts(folder)
    assert len(starts) == len(vocab)
    begins = {token: bool(starts[number]) for token, number in vocab.items() if number > 4}
    if kind == "wordpiece":
        assert begins == {token: not token.startswith("##") for token in begins}
    else:
        assert begins == {token: token.startswith("Ġ") for token in begins}
    assert 20 < sum(begins.values()) < len(begins)
    assert starts[:5].all()


def test_word_starts_group_the_pieces_of_a_sentence_into_its_words(kind: str, folder: Path) -> None:
    ids = tokenizer.encoder(folder).encode("The purring blackest cat", add_special_tokens=False).ids
    assert sum(tokenizer.word_starts(folder)[ids]) == 4


def test_a_sentencepiece_tokenizer_marks_words_by_its_underline(tmp_path: Path) -> None:
    tree = {
        "added_tokens": [{"id": 3, "content": "[MASK]", "special": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Metaspace"}]},
        "model": {"type": "Unigram", "vocab": [["▁the", 0.0], ["s", 0.0], ["▁", 0.0]]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert tokenizer.word_starts(tmp_path).tolist() == [True, False, True, True]


def test_every_token_starts_a_word_where_the_tokenizer_has_no_marks(tmp_path: Path) -> None:
    tree = {"added_tokens": [], "pre_tokenizer": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "##b": 1}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert tokenizer.word_starts(tmp_path).tolist() == [True, True]


def test_the_digest_is_of_the_vocabulary_and_not_of_its_formatting(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tree = json.loads((copy / "tokenizer.json").read_bytes())
    padded = tree | {"padding": {"strategy": "BatchLongest"}, "truncation": {"max_length": 5}}
    (copy / "tokenizer.json").write_text(json.dumps(dict(reversed(padded.items())), indent=7))
    assert tokenizer.folder_digest(copy) == tokenizer.folder_digest(folder)
    tree["model"]["vocab"]["another"] = 999
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    assert tokenizer.folder_digest(copy) != tokenizer.folder_digest(folder)


def test_a_tokenizer_that_made_other_shards_does_not_fit(folder: Path) -> None:
    tokenizer.require_fit(folder, tokenizer.folder_digest(folder))
    with pytest.raises(TokenizerError, match=r"model.tokenizer: got .*the data was tokenised with the tokenizer of digest 1234"):
        tokenizer.require_fit(folder, "1234", "model.tokenizer")


def test_a_vocabulary_too_small_for_the_characters_says_how_many_there_are() -> None:
    texts = [chr(0x4E00 + number) for number in range(300)]
    rule = "the special tokens and the corpus's 300 characters, alone and inside words, take 305"
    with pytest.raises(TokenizerError, match=rf"tokenizer.vocab_size: got 256; {rule}. Raise it"):
        tokenizer.train(WordPieceConfig(vocab_size=256), lambda: texts, max_tokens=126)


def test_a_pretrained_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.path: got '.*nowhere'; cannot be loaded"):
        tokenizer.load(PretrainedConfig(path=str(tmp_path / "nowhere")))


def test_a_pretrained_tokenizer_without_a_mask_token_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.loads((copy / "tokenizer_config.json").read_bytes())
    del settings["mask_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="it has no mask_token"):
        tokenizer.load(PretrainedConfig(path=str(copy)))
    with pytest.raises(TokenizerError, match="got 'no mask_token'"):
        Vocabulary.open(copy)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"got 'no tokenizer.json'"):
        Vocabulary.open(tmp_path)


# ------------------------------------------------------------------------------------------------------------------------ Chinese

CHINESE = ["北京大学的学生，都很好！", "他说：“好。”她问：“好吗？”", "学生说北京很好。"]


def pieces(texts: list[str], config: WordPieceConfig, text: str) -> list[str]:
    return list(tokenizer.train(config, lambda: texts, max_tokens=126).tokenize(text))


def test_each_han_character_and_each_mark_is_a_token_even_where_they_stand_together_often() -> None:
    for text in CHINESE:
        assert pieces(CHINESE * 50, WordPieceConfig(vocab_size=256), text) == list(text)


def test_full_width_forms_are_the_plain_ones_with_nfkc_and_their_own_without() -> None:
    texts = [*CHINESE, "ABC 123, !"] * 50
    wide, plain = "ＡＢＣ　１２３，！", ["abc", "123", ",", "!"]
    assert pieces(texts, WordPieceConfig(vocab_size=256, nfkc=True), wide) == plain
    assert pieces(texts, WordPieceConfig(vocab_size=256), wide) == ["[UNK]", "[UNK]", "，", "！"]
    config = WordPieceConfig(vocab_size=256, nfkc=True)
    assert pieces([text.replace("，", ",") for text in texts], config, "，") == pieces(texts, config, ",") == [","]


def test_characters_of_the_sets_named_are_known_though_the_text_has_none() -> None:
    text = "用 Python3 写 C++，π"
    assert pieces(CHINESE * 50, WordPieceConfig(vocab_size=512), text).count("[UNK]") == 7
    known = pieces(CHINESE * 50, WordPieceConfig(vocab_size=512, character_sets=("ascii",)), text)
    assert known == ["[UNK]", "p", "##y", "##t", "##h", "##o", "##n", "##3", "[UNK]", "c", "+", "+", "，", "[UNK]"]


def test_gb2312_has_the_characters_of_simplified_and_big5_of_traditional_chinese() -> None:
    config = WordPieceConfig(vocab_size=20_000, character_sets=("gb2312",))
    made = tokenizer.train(config, lambda: CHINESE * 50, max_tokens=126)
    assert made.tokenize("龟鑫，語ββ") == ["龟", "鑫", "，", "[UNK]", "β", "##β"]
    # 6,763 Han characters, by the standard's own count (GB 2312-80), each of them once and never inside a word.
    assert sum(len(token) == 1 and 0x4E00 <= ord(token) <= 0x9FFF for token in made.get_vocab()) == 6763
    assert not any(token.startswith("##") and 0x4E00 <= ord(token[2]) <= 0x9FFF for token in made.get_vocab())
    both = WordPieceConfig(vocab_size=30_000, character_sets=("gb2312", "big5"))
    assert pieces(CHINESE * 50, both, "龟語龜") == ["龟", "語", "龜"]


def test_more_characters_than_the_alphabet_has_room_for_leave_the_frequent_ones() -> None:
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    made = pieces([rare, *CHINESE * 5], WordPieceConfig(vocab_size=256, alphabet=40), CHINESE[0] + rare[-3:])
    assert made == [*CHINESE[0], "[UNK]", "[UNK]", "[UNK]"]
