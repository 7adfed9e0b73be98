"""A command whose standard output is a file's bytes, run without a shell."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile

from scaletrain.config import redacted
from scaletrain.data import urls
from scaletrain.errors import ConfigError

_SAID_BYTES_MAX = 300


class CommandError(OSError):
    """A command that ended with an exit status other than 0."""


class Command:
    """A running command of a pipe, the leader of a process group of its own.

    It gets no input. Whatever ends this process ends the command when it writes next, since nobody reads any longer.
    """

    def __init__(self, pipe: str) -> None:
        """Raises ConfigError for a program that cannot be started."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the command
        self._over = False
        try:
            self._process = subprocess.Popen(
                urls.argv(pipe),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._said,
                process_group=0,
                shell=False,
                bufsize=0,
            )
        except OSError as error:
            self._said.close()
            rule = f"its program cannot be started: {error.strerror}"
            raise ConfigError("data.corpora", urls.shown(pipe), rule, "Install it, or give its whole path") from None

    def read(self, count: int, /) -> bytes:
        """At most ``count`` bytes; none at the end."""
        assert self._process.stdout is not None
        return self._process.stdout.read(count) or b""

    def close(self) -> None:
        """Waits for the end. Raises CommandError where the exit status is not 0."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        status = self._process.wait()
        self._over = True
        with self._said as said:
            size = said.seek(0, os.SEEK_END)
            said.seek(max(size - _SAID_BYTES_MAX, 0))
            words = " ".join(said.read().decode(errors="replace").split())
        if status:
            raise CommandError(redacted(f"the command ended with status {status}{': ' if words else ''}{words}"))

    def kill(self) -> None:
        """Ends the command, and all that it has started. The number is still its own: nobody has waited for it."""
        if not self._over:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
