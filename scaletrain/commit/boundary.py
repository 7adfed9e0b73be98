"""The moments of a commit at which a kill leaves something different on the disk."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Boundary(StrEnum):
    """In the order in which a commit passes them. ``on_all`` says which every rank passes; the others are rank 0's."""

    BEGUN = "begun"
    """Nothing was touched."""
    SWEPT = "swept"
    """What earlier commits left behind is gone."""
    PARTIAL_MADE = "partial folder made"
    ROOM_AGREED = "room agreed"
    """All ranks know that the partial folder is there."""
    FILE_OPENED = "file opened"
    FILE_HALF_WRITTEN = "file half written"
    FILE_WRITTEN = "file written"
    FILE_SYNCED = "file synced"
    FILES_SYNCED = "files synced"
    """All files of this rank, and their names in the folder."""
    REPORTED = "reported"
    """All ranks know the sizes and digests of all files."""
    MANIFEST_WRITTEN = "manifest written"
    """Under its temporary name, and synced."""
    MANIFEST_NAMED = "manifest named"
    MANIFEST_SYNCED = "manifest synced"
    """Its name in the partial folder."""
    FOLDER_NAMED = "folder named"
    """The partial folder has its final name: from here on the commit is found, if the machine does not lose power."""
    FOLDER_SYNCED = "folder synced"
    """From here on it is found in any case."""
    POINTER_WRITTEN = "pointer written"
    TRASH_NAMED = "trash named"
    """Retention has renamed an old one."""
    TRASH_HALF_UNLINKED = "trash half unlinked"
    TRASH_UNLINKED = "trash unlinked"
    PUBLISHED = "published"
    """All ranks know."""

    @property
    def on_all(self) -> bool:
        return self in _ON_ALL


_ON_ALL = {
    Boundary.BEGUN,
    Boundary.ROOM_AGREED,
    Boundary.FILE_OPENED,
    Boundary.FILE_HALF_WRITTEN,
    Boundary.FILE_WRITTEN,
    Boundary.FILE_SYNCED,
    Boundary.FILES_SYNCED,
    Boundary.REPORTED,
    Boundary.PUBLISHED,
}

Hook = Callable[[Boundary], None]
"""Called at every boundary that a rank passes."""


def passed(boundary: Boundary) -> None:
    """The hook of production: nothing happens."""
