"""Folders that are committed by all ranks together, whole or not at all, whenever any of them is killed.

::

    FOLDER/
        step-00000400/            committed: its manifest verifies
            ...                   the files of every rank
            MANIFEST.json         written last; name, size and SHA-256 of every file, and a digest of itself
        .step-00000800.partial/   a commit that was cut short: ignored, swept by the next one
        .step-00000200.trash/     retention that was cut short: the same
        damaged-step-...-1/       what was found damaged: kept aside for people, never read
        latest                    the newest name: a hint for people, never trusted

Phase one is every rank's files, phase two is rank 0's manifest and rename; no rank leaves a phase without knowing how the others
fared. All of it is bytes and JSON: nothing here knows of tensors, or of how the ranks speak with each other (`Peers`).

The moments between two changes of the disk are the members of `Boundary`. The protocol calls a hook at each: tests kill there.
"""

from scaletrain.commit.boundary import Boundary, Hook
from scaletrain.commit.files import Entry, File, file_digest, write_file
from scaletrain.commit.finding import Found, find, newest, put_aside, verify
from scaletrain.commit.folder import Retention, commit, discard
from scaletrain.commit.manifest import FORMAT, MANIFEST, VERSION, read, write
from scaletrain.commit.peers import Alone, Peers, phase

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "Alone",
    "Boundary",
    "Entry",
    "File",
    "Found",
    "Hook",
    "Peers",
    "Retention",
    "commit",
    "discard",
    "file_digest",
    "find",
    "newest",
    "phase",
    "put_aside",
    "read",
    "verify",
    "write",
    "write_file",
]
