"""Sources: the documents that each kind gives, and what it says about input that it cannot use."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from scaletrain.data import sources
from scaletrain.data.sources import HubConfig, JsonlConfig, ParquetConfig, StdlibConfig, TextConfig, WebdatasetConfig
from scaletrain.errors import CorpusError
from tests.tars import make_special, make_tar


def test_text_gives_lines_paragraphs_or_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\n \n\nthree")
    path = (str(tmp_path / "a.txt"),)
    assert list(TextConfig(paths=path, document="line").documents()) == ["one", "two", "", " ", "", "three"]
    assert list(TextConfig(paths=path, document="paragraph").documents()) == ["one\ntwo", "three"]
    assert list(TextConfig(paths=path, document="file").documents()) == ["one\ntwo\n\n \n\nthree"]


def test_files_globs_and_folders_are_read_once_each_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"z.txt.gz"))
    (tmp_path / "notes.md").write_text("not a corpus")
    paths = (str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(tmp_path))
    assert list(TextConfig(paths=paths).documents()) == ["b.txt", "a.txt", "deep/c.txt", "z.txt.gz"]


@pytest.mark.parametrize("missing", ["nowhere", "*.none", "empty"])
def test_a_path_that_names_nothing_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError) as caught:
        list(TextConfig(paths=(str(tmp_path / missing),)).documents())
    assert (caught.value.field, caught.value.value) == ("source.paths", str(tmp_path / missing))


@pytest.mark.parametrize("path", ["pipe:touch canary", "https://example.org/a.tar", "file:///etc/passwd"])
def test_urls_and_pipes_are_refused(path: str) -> None:
    for config in (TextConfig(paths=(path,)), JsonlConfig(paths=(path,)), WebdatasetConfig(paths=(path,))):
        with pytest.raises(CorpusError, match="no URLs and no pipes"):
            list(config.documents())


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n" * 5000 + b"caf\xe9 au lait\n")
    with pytest.raises(CorpusError, match=r"a.txt, after line \d+: got b'\\xe9 au lai'; text is UTF-8"):
        list(TextConfig(paths=(str(tmp_path),)).documents())


def test_a_gzip_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(3000).hex().encode())[:-500])
    with pytest.raises(CorpusError, match="a whole gzip file"):
        list(TextConfig(paths=(str(tmp_path),)).documents())


def test_jsonl_gives_one_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "x": 1}\n\n{"body": null}\n{"body": "t\\u0077o"}\n')
    assert list(JsonlConfig(paths=(str(tmp_path),), field="body").documents()) == ["one", "", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a.jsonl, line 2: .* a JSON object"),
        ('["text"]', r"a.jsonl, line 2: got 'list'; a JSON object"),
        ('{"title": "a"}', r"a.jsonl, line 2: got \"fields \['title'\]\"; no field 'text'"),
        ('{"text": 7}', r"a.jsonl, line 2: text: got 7; the field holds text"),
    ],
)
def test_a_line_of_json_that_cannot_be_used_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CorpusError, match=message):
        list(JsonlConfig(paths=(str(tmp_path),)).documents())


def make_parquet(file: Path, **columns: list[object]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_gives_one_column(tmp_path: Path) -> None:
    make_parquet(tmp_path / "a.parquet", body=[str(n) for n in range(3000)] + [None], number=list(range(3001)))
    config = ParquetConfig(paths=(str(tmp_path),), column="body")
    assert list(config.documents()) == [*(str(n) for n in range(3000)), ""]


def test_parquet_without_the_column_or_with_other_contents_is_refused(tmp_path: Path) -> None:
    file = str(make_parquet(tmp_path / "a.parquet", body=["x"], number=[1]))
    with pytest.raises(CorpusError, match=r"got \"columns \['body', 'number'\]\"; no column 'text'"):
        list(ParquetConfig(paths=(file,)).documents())
    with pytest.raises(CorpusError, match=r"a.parquet: number: got 'int64'; the column holds text"):
        list(ParquetConfig(paths=(file,), column="number").documents())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(CorpusError, match="a Parquet file that can be read"):
        list(ParquetConfig(paths=(file,)).documents())


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reads_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(HubConfig(path=str(tmp_path / "set"), streaming=streaming).documents()) == ["one", "two"]


def test_hub_reads_a_saved_data_set_and_names_its_splits_and_columns(tmp_path: Path) -> None:
    import datasets

    saved = datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"body": ["one", None], "n": [1, 2]})})
    saved.save_to_disk(tmp_path / "set")
    assert list(HubConfig(path=str(tmp_path / "set"), split="dev", column="body").documents()) == ["one", ""]
    with pytest.raises(CorpusError, match=r"source.split .* got 'train'; it has dev"):
        list(HubConfig(path=str(tmp_path / "set"), column="body").documents())
    with pytest.raises(CorpusError, match=r"got \"columns \['body', 'n'\]\"; no column 'text'"):
        list(HubConfig(path=str(tmp_path / "set"), split="dev").documents())
    with pytest.raises(CorpusError, match=r"row 0: n: got 1; the column holds text"):
        list(HubConfig(path=str(tmp_path / "set"), split="dev", column="n").documents())


def test_hub_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"source.path: got '.*nowhere'; cannot be loaded"):
        list(HubConfig(path=str(tmp_path / "nowhere")).documents())


def test_webdataset_gives_the_members_of_one_suffix(tmp_path: Path) -> None:
    tar = make_tar(
        tmp_path / "a.tar",
        [
            ("d/1.txt", b"one"),
            ("d/1.json", b'{"text": "eins"}'),
            ("d/1.en.txt", b"no"),
            ("2.TXT", b"two"),
            ("2.json", b'{"text": "zwei"}'),
        ],
    )
    assert list(WebdatasetConfig(paths=(str(tar),)).documents()) == ["one", "two"]
    assert list(WebdatasetConfig(paths=(str(tar),), member="json").documents()) == ["eins", "zwei"]


def test_webdataset_names_the_member_that_cannot_be_used(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("1.txt", b"\xff"), ("1.json", b"{}")])
    with pytest.raises(CorpusError, match=r"a.tar: 1.txt: got b'\\xff'; text is UTF-8"):
        list(WebdatasetConfig(paths=(str(tar),)).documents())
    with pytest.raises(CorpusError, match=r"a.tar: 1.json: .* no field 'text'"):
        list(WebdatasetConfig(paths=(str(tar),), member="json").documents())


def test_webdataset_follows_no_link(tmp_path: Path) -> None:
    tar = make_special(tmp_path / "a.tar", type=b"2", linkname="/etc/passwd")
    with pytest.raises(CorpusError, match=r"a symbolic link, 'bad.txt' at byte 512"):
        list(WebdatasetConfig(paths=(str(tar),)).documents())


def test_stdlib_reads_docstrings_of_nested_definitions_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scaletrain.data.sources import stdlib

    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text('"""A test."""')
    for name in ("cgi", "sitecustomize"):  # gone in 3.13; somebody's own
        (tmp_path / f"{name}.py").write_text('"""Not ours."""')
    (tmp_path / "bdb.py").write_text("print('never run')")
    (tmp_path / "ast.py").write_text(
        '"""Module."""\nif True:\n  class A:\n    """Class."""\n    async def f(self):\n      """Method\n\n      of A."""\n'
        'try:\n  pass\nexcept OSError:\n  def g():\n    """Handler."""\n'
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    stdlib.docstrings.cache_clear()
    assert [text for _, text in stdlib.docstrings()] == ["Module.", "Class.", "Method\n\nof A.", "Handler."]
    stdlib.docstrings.cache_clear()


def test_stdlib_is_a_corpus_of_a_million_characters() -> None:
    from pydoc_data.topics import topics

    documents = list(StdlibConfig().documents())
    assert sum(map(len, documents)) > 1_500_000
    assert any(document.startswith("A lexical analyzer class for simple shell-like syntaxes") for document in documents)
    assert documents[-len(topics) :] == [topics[name] for name in sorted(topics)]


def test_importing_the_sources_imports_none_of_their_libraries() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow", "tokenizers")
    code = f"import sys, {sources.__name__}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
