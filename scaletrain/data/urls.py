"""Which URLs data is read from, and what they are called where others can read it.

A URL names a folder: ``http://host/corpus``, ``s3://bucket/corpus``. A pipe names a command that writes one file of a folder to
its standard output, with ``{file}`` where the file's name goes: ``pipe:curl -sf https://host/corpus/{file}``.

fsspec would follow more than these: chains (``simplecache::``), archives, files of this machine, scripts that come with a
repository. What a run reads may have been written by somebody else, so only what is listed here is opened.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from scaletrain import outside
from scaletrain.config import redacted
from scaletrain.errors import ConfigError, CorpusError

PACKAGES: Mapping[str, str] = {
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "oci": "ocifs",
    "hf": "huggingface_hub",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "memory": "fsspec",
}
"""Protocol -> the package that fsspec needs for it."""
PIPE = "pipe:"
PLACE = "{file}"
"""In a pipe's command, where the name of the file goes."""
_NAME = re.compile(r"[\w.,=+@/-]+", re.ASCII)
"""Names of files as they are appended to URLs: nothing that a URL, a pattern or a chain gives a meaning to."""
_REMEDY = f"Give a folder of this machine, a URL (one of {', '.join(PACKAGES)}), or pipe:COMMAND with {PLACE} in it"


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a pipe, and no place in the file system."""
    return "://" in path or "::" in path or path.startswith(PIPE)


def check(url: str, field: str, *, allow_pipe: bool = False) -> None:
    """Raises ConfigError for a URL that is not read from, and for a pipe where ``allow_pipe`` does not permit it.

    ``field`` is the setting that holds it. Secrets in the URL are not repeated.
    """
    if not url.isprintable():
        _refuse(field, url, "a URL is one line of printable characters")
    if url.startswith(PIPE):
        _check_pipe(url, field, allow_pipe)
        return
    protocol = url.partition("://")[0]
    if "::" in url:
        _refuse(field, url, "URLs that are chained with '::' are not followed")
    if protocol in ("file", "local"):
        _refuse(field, url, "a place of this machine is given as a path", "Leave out what stands before the path")
    if protocol not in PACKAGES:
        _refuse(field, url, f"{protocol!r} is no protocol that data is read by")
    if "?" in url or "#" in url:
        rule = "a URL ends with its path here: what follows '?' is often a secret, and settings are kept in the run's folder"
        _refuse(field, url, rule, "Keep secrets where the protocol's client looks for them (~/.netrc, ~/.aws)")
    _check_parts(url, field)


def _check_parts(url: str, field: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        _refuse(field, url, "this is no URL (RFC 3986)")
    if parts.password is not None or (parts.username is not None and parts.scheme in ("http", "https")):
        rule = "settings are written into the run's folder and shown in reports, so that a URL may hold no password"
        _refuse(field, url, rule, "Keep it where the protocol's client looks for it (~/.netrc, ~/.aws)")
    path = unquote(parts.path)
    if not host and parts.scheme not in ("hdfs", "memory"):
        _refuse(field, url, "a URL names a host or a bucket")
    if host.startswith("-") or "\\" in path or ".." in path.split("/") or any(letter in path for letter in "*[]\0\n\r"):
        _refuse(field, url, "a host does not begin with '-', and a path has no '..', no pattern and no backslash")


def _check_pipe(url: str, field: str, allow_pipe: bool) -> None:
    if not allow_pipe:
        rule = "a pipe runs a command, which no file can permit"
        _refuse(field, url, rule, "Copy the corpus to a folder, or give --allow-pipe on the command line")
    try:
        words = shlex.split(url.removeprefix(PIPE))
    except ValueError as error:
        _refuse(field, url, f"its words cannot be told apart: {error}")
    if not words or words[0].startswith("-") or PLACE in words[0]:
        _refuse(field, url, "a pipe begins with the name of a program")
    if not any(PLACE in word for word in words[1:]):
        _refuse(field, url, f"{PLACE} stands where the name of the file goes")


def join(url: str, name: str) -> str:
    """The URL, or the pipe, of the file called ``name`` in a folder. Raises CorpusError for a name that could mean more."""
    parts = name.split("/") if outside.is_inside(name) and _NAME.fullmatch(name) else ["-"]
    if any(part.startswith("-") for part in parts):
        remedy = "Name the shards with letters, digits and . , = + @ _ and -, which does not come first, and prepare again"
        raise CorpusError(f"{shown(url)}: manifest.json", name, "this is no name of a file in the folder", remedy)
    return url.replace(PLACE, name) if url.startswith(PIPE) else f"{url.rstrip('/')}/{name}"


def argv(pipe: str) -> list[str]:
    """The words of a pipe's command, as a shell would split them; it is never given to one."""
    return shlex.split(pipe.removeprefix(PIPE))


def label(url: str) -> str:
    """What a folder is called in a run's account: the last part of its URL, or the program of a pipe."""
    last = argv(url)[0] if url.startswith(PIPE) else url
    return re.sub(r"[^\w.-]", "_", last.rstrip("/").rpartition("/")[2]).lstrip(".-") or "corpus"


def shown(url: str) -> str:
    """What a URL is called in messages: without passwords and queries; of a pipe the program and its last word."""
    if not url.startswith(PIPE):
        return re.sub(r"^(https?://)[^/@]*@", r"\1***@", redacted(url))  # a token may stand alone there
    try:
        words = argv(url)
    except ValueError:
        return f"{PIPE}…"
    return redacted(f"{PIPE}{' … '.join(dict.fromkeys([*words[:1], *words[-1:]]))}")


def _refuse(field: str, url: str, rule: str, remedy: str = _REMEDY) -> NoReturn:
    raise ConfigError(field, shown(url), rule, remedy)
