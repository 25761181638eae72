"""The folder of a report: what the command wrote there it may replace, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from squeeze.errors import InputError
from squeeze.storage.files import read_json, remove, unfinished, write_json, write_whole, writing

#: Lists what an earlier report wrote; a folder without it is someone else's.
MARK = "report.json"
MADE_BY = "python -m squeeze.report"


class Mark(TypedDict):
    made_by: str
    files: list[str]


def check_folder(folder: Path) -> list[str]:
    """The files of the earlier report in the folder.

    Raises:
        InputError: the folder holds anything else, or is none.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise InputError(f"--out {folder} is there and is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    known: list[str] = []
    if _is_file(folder / MARK):
        try:
            mark = read_json(folder / MARK, Mark)
        except InputError:
            mark = Mark(made_by="", files=[])
        if mark["made_by"] == MADE_BY:
            known = [*(name for name in mark["files"] if Path(name).name == name), MARK]
    # What an earlier report was writing when it was killed is its own as well, its first file's included.
    cut = {path.name for name in {*known, MARK} for path in unfinished(folder / name) if _is_file(path)}
    foreign = [name for name in names if name not in cut and (name not in known or not _is_file(folder / name))]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"--out {folder} holds {foreign[0]}{more}, which this command did not write: give a new folder"
        )
    return [name for name in known if name in names]


def _is_file(path: Path) -> bool:
    """True for a regular file that is there: a link was not written by this command."""
    return path.is_file() and not path.is_symlink()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a report's files, `index.html` among them, and remove those of an earlier one that are no more.

    Raises:
        InputError: the folder is not the command's own, or cannot be written.
    """
    stale = [name for name in check_folder(folder) if name not in files and name != MARK]
    with writing(f"into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        # Both reports' files, until it is done: a report that is cut short can be made again.
        write_json(folder / MARK, {"made_by": MADE_BY, "files": sorted({*files, *stale})})
        for name, content in files.items():
            write_whole(folder / name, content)
        for name in stale:
            remove(folder / name)
        write_json(folder / MARK, {"made_by": MADE_BY, "files": sorted(files)})
    return folder / "index.html"
