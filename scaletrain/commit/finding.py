"""Which committed folders there are, and which of them all ranks can trust."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scaletrain.commit.files import file_digest
from scaletrain.commit.manifest import digest, read
from scaletrain.commit.peers import Peers, phase
from scaletrain.errors import CheckpointError

NAME = re.compile(r"step-\d+")


@dataclass(frozen=True, slots=True)
class Found:
    """A folder whose manifest was read. Its files are not verified yet."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """As the manifest says it: names and times can be wrong."""
        return int(self.manifest["progress"]["step"])

    def sizes_fit(self) -> bool:
        """Whether all files are there in full; a look at the folder, not at what the files hold."""
        return not _absent(self.folder, self.manifest["files"])


def find(folder: Path) -> list[Found]:
    """The steps in ``folder`` whose manifest can be read, newest first. By step, not by time: clocks are wrong."""
    read_here = [(path, read(path)) for path in _steps(folder)]
    whole = [Found(path, manifest) for path, manifest in read_here if manifest is not None]
    return sorted(whole, key=lambda found: -found.step)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks together found in one folder."""

    manifest: dict[str, Any] | None
    """As read on this rank."""
    fault: str
    """What is wrong with it; empty where nothing is."""
    unseen: tuple[int, ...] = ()
    """Ranks that do not see what another one sees: then nothing may be damaged, and still it cannot be used."""


def verify(folder: Path, peers: Peers) -> Verdict:
    """Whether ``folder`` is whole, and the same on every rank. Collective; each rank hashes its share of the files."""
    manifest = read(folder)
    mine: dict[str, Any] = {"manifest": None, "absent": [], "fault": ""}
    if manifest is not None:
        absent = _absent(folder, manifest["files"])
        fault = "" if absent else wrong_digest(folder, manifest["files"][peers.rank :: peers.world])
        mine = {"manifest": digest(manifest), "absent": absent, "fault": fault}
    reports = peers.gather(mine)
    first = next((report["manifest"] for report in reports if report["manifest"] is not None), None)
    if first is None:
        return Verdict(None, "the manifest cannot be read")
    unseen = tuple(rank for rank, report in enumerate(reports) if report["manifest"] != first)
    if unseen:
        return Verdict(manifest, f"its manifest is not seen, or is another one, on the ranks {list(unseen)}", unseen)
    everywhere = set.intersection(*(set(report["absent"]) for report in reports))
    if everywhere:
        return Verdict(manifest, min(everywhere))
    unseen = tuple(rank for rank, report in enumerate(reports) if report["absent"])
    if unseen:
        return Verdict(manifest, f"{reports[unseen[0]]['absent'][0]} on the ranks {list(unseen)}", unseen)
    return Verdict(manifest, next((report["fault"] for report in reports if report["fault"]), ""))


def newest(folder: Path, peers: Peers, *, aside: bool = False) -> Found | None:
    """The newest step that verifies on all ranks, the same on every rank; None in a folder that never had one. Collective.

    Rank 0 says which there are, all ranks confirm. One that is damaged, or that some rank does not see, is named in a warning
    and the one before it is tried. ``aside`` renames the damaged ones, for the run whose folder it is: nothing is deleted.
    Raises CheckpointError where there were steps and none is whole on all ranks: going back to step 0 is for the user to say.
    """
    names: list[str] = peers.gather(_by_step(folder) if peers.rank == 0 else None)[0]
    verdicts: dict[str, Verdict] = {}
    for name in names:
        verdict = verdicts[name] = verify(folder / name, peers)
        if not verdict.fault:
            assert verdict.manifest is not None
            damaged = [name for name, before in verdicts.items() if before.fault and not before.unseen]
            if aside and damaged:
                phase(peers, partial(_put_all_aside, folder, damaged if peers.rank == 0 else []), f"tidying {folder}")
            return Found(folder / name, verdict.manifest)
        if peers.rank == 0:
            state = "is not the same for all ranks" if verdict.unseen else "is damaged"
            warnings.warn(f"checkpoint {folder / name} {state} and was passed over: {verdict.fault}", stacklevel=2)
    seen = peers.gather(bool(_steps(folder)) or (folder / "latest").exists())
    if any(seen):
        unseen = {name: verdict.fault for name, verdict in verdicts.items() if verdict.unseen}
        rule = "it held checkpoints and none of them is whole"
        if unseen or not all(seen):
            blind = [rank for rank, sees in enumerate(seen) if not sees]
            rule += f" on all ranks: {unseen or f'the ranks {blind} see none'}"
        raise CheckpointError(
            str(folder),
            names,
            rule,
            "Mount the same folder on all nodes, restore one from a backup, or start again with --fresh.",
        )
    return None


def put_aside(folder: Path, prefix: str = "damaged-") -> Path:
    """Renames a folder so that nothing reads it any more and people still can."""
    aside = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{prefix}{folder.name}-{n}")).exists())
    folder.rename(aside)
    return aside


def _put_all_aside(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        put_aside(folder / name)


def wrong_digest(folder: Path, entries: Sequence[Mapping[str, Any]]) -> str:
    """The first file of these entries of a manifest that has another digest; empty where there is none."""
    for entry in entries:
        try:
            found = file_digest(folder / entry["name"])
        except OSError as error:  # a sector that cannot be read: another one may be whole, and the other ranks wait
            return f"{entry['name']} cannot be read: {error.strerror}"
        if found != entry["sha256"]:
            return f"{entry['name']} does not have the SHA-256 that the manifest says"
    return ""


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]


def _by_step(folder: Path) -> list[str]:
    """Names, newest first: by the manifest's step, and by the name where the manifest cannot be read."""
    known = {found.folder.name: found.step for found in find(folder)}
    return sorted((path.name for path in _steps(folder)), key=lambda name: -known.get(name, int(name.removeprefix("step-"))))


def _absent(folder: Path, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is missing of these entries of a manifest, or has another size, as this rank sees the folder."""
    found = []
    for entry in entries:
        path = folder / entry["name"]
        if path.is_symlink():  # what it leads to can change without the folder being touched
            found.append(f"{entry['name']} is a link")
        elif not path.is_file():
            found.append(f"{entry['name']} is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            found.append(f"{entry['name']} has {size} bytes where the manifest says {entry['bytes']}")
    return found
