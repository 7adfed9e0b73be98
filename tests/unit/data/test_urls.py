"""What data may be read from: the list of protocols, and everything that hides something else in a URL."""

from __future__ import annotations

import pytest

from scaletrain.data import urls
from scaletrain.errors import ConfigError, CorpusError

PIPE = "pipe:curl -sf https://host/corpus/{file}"


@pytest.mark.parametrize(
    "url",
    ["http://host/corpus", "https://host:8443/a%20b/c/", "s3://bucket/corpus", "gs://b", "memory://corpus", "hdfs:///corpus"],
)
def test_urls_that_are_read(url: str) -> None:
    assert urls.is_remote(url)
    urls.check(url, "data.corpora.0.path")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "given as a path"),
        ("local:///etc", "given as a path"),
        ("simplecache::http://host/corpus", "chained"),
        ("zip://a::http://host/b.zip", "chained"),
        ("http://host/a::file:///etc", "chained"),
        ("reference://host/corpus", "no protocol"),
        ("git://host/corpus", "no protocol"),
        ("ssh://-oProxyCommand=x/corpus", "no protocol"),
        ("HTTP://host/corpus", "no protocol"),
        ("-http://host/corpus", "no protocol"),
        ("http://-host/corpus", "begin with '-'"),
        ("http:///corpus", "names a host"),
        ("http://host/../secret", "no '..'"),
        ("http://host/a/%2e%2e/b", "no '..'"),
        ("http://host/a\\b", "no backslash"),
        ("http://host/*/a", "no pattern"),
        ("http://host/[ab]/a", "no pattern"),
        ("http://[bad/a", "no URL"),
        ("http://host:port/a", "no URL"),
        ("http://host/a\nb", "one line"),
        ("http://host/a\x00b", "one line"),
        ("http://host/a%00b", "no pattern"),
        (PIPE, "no file can permit"),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    assert urls.is_remote(url)
    with pytest.raises(ConfigError, match=said) as caught:
        urls.check(url, "data.corpora.0.path")
    assert "data.corpora.0.path" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host/corpus",
        "http://hunter2@host/corpus",
        "https://host/corpus?sig=hunter2",
        "https://host/corpus#hunter2",
        "s3://key:hunter2@bucket/corpus",
        "ftp://user:hunter2@host/corpus",
        "https://host/a::b?token=hunter2",
    ],
)
def test_secrets_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        urls.check(url, "data.corpora.0.path")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("pipe", "said"),
    [
        ("pipe:", "name of a program"),
        ("pipe:cat corpus", "stands where"),
        ("pipe:{file} x", "name of a program"),
        ("pipe:-x {file}", "name of a program"),
        ("pipe:cat 'a {file}", "told apart"),
        ("pipe:cat {file}\nrm x", "one line"),
    ],
)
def test_pipes_that_are_no_commands(pipe: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        urls.check(pipe, "data.corpora.0.path", allow_pipe=True)


def test_a_pipe_that_is_permitted_is_one_word_per_word() -> None:
    urls.check(PIPE, "data.corpora.0.path", allow_pipe=True)
    assert urls.argv(urls.join(PIPE, "train/000000.tar")) == ["curl", "-sf", "https://host/corpus/train/000000.tar"]
    assert urls.argv(urls.join("pipe:cat '/a b/{file}' $HOME;ls", "0.tar")) == ["cat", "/a b/0.tar", "$HOME;ls"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../x",
        "-x",
        "a/-x",
        "a b",
        "a;b",
        "$(x)",
        "a?b",
        "a#b",
        "a%2e",
        "*.tar",
        "a::b",
        "a\nb",
        "'",
        "{file}",
        "",
    ],
)
@pytest.mark.parametrize("url", ["http://host/corpus", PIPE])
def test_names_that_could_be_more_than_a_file_are_refused(url: str, name: str) -> None:
    with pytest.raises(CorpusError):
        urls.join(url, name)


def test_what_things_are_called() -> None:
    assert urls.label("http://host/some/corpus/") == "corpus"
    assert urls.label("s3://bucket") == "bucket"
    assert urls.label("pipe:/usr/bin/curl -s {file}") == "curl"
    assert urls.shown("http://user:hunter2@host/a?b=hunter2") == "http://***@host/a?***"
    assert (
        urls.shown("pipe:curl -H 'Authorization: hunter2' https://host/0.tar?sig=hunter2") == "pipe:curl … https://host/0.tar?***"
    )
