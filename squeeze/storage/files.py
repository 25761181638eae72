"""Text files that are read with errors naming the line, and written whole or not at all; locks on files."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from squeeze.errors import InputError
from squeeze.storage.schema import NEWLINE, Kind, NotJson, decode

#: A list of numbers in indented JSON; inside a string a newline is written as two characters.
NUMBERS = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]")


def read_bytes(path: Path) -> bytes:
    """A file's bytes; InputError if it cannot be read."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a name with a byte that is zero
        raise InputError(f"cannot read {path!r}: {error}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe that nobody writes into is empty, where `os.open` waits for ever."""
    number = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(number, True)
    return number


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """A file's JSON document, see `decode`; InputError if it cannot be read or is not of that kind."""
    return decode(read_bytes(path), kind, path)


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; InputError, naming the line, if it is none."""
    return read_json(path, dict[str, Any])


def parse_jsonl(data: bytes, source: str | Path, kind: type[Kind]) -> list[tuple[int, Kind]]:
    """Read JSON Lines.

    Lines end at a newline only: text may hold other characters that `str.splitlines` would split at. Blank lines
    are passed over, and so is a byte-order mark.

    Args:
        data: the file's bytes.
        source: the file's name in an error.
        kind: of every line, see `decode`.
    Returns:
        (number counted from 1, content) of each line.
    Raises:
        InputError: a line is not of that kind; there is no line at all.
    """
    lines = data.removeprefix(codecs.BOM_UTF8).split(NEWLINE)
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, decode(line, kind, source, number)))
        except NotJson as error:
            cut = ": the file ends in the middle of a line" if number == len(lines) else ""
            raise InputError(f"{error}{cut}") from None
    if not rows:
        raise InputError(f"{source} has no rows")
    return rows


def read_jsonl(path: Path, kind: type[Kind]) -> list[tuple[int, Kind]]:
    """A file of JSON Lines, see `parse_jsonl`; InputError if it cannot be read."""
    return parse_jsonl(read_bytes(path), path, kind)


def to_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """Write JSON Lines as LongBench does: one object a line, characters as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Open:
    """A regular file of one's own, open for writing; nothing is buffered.

    A folder may be shared: a symbolic link in the file's place is not followed, and a pipe is not waited for.

    Args:
        flags: for `os.open`, beside those that say so.
    Raises:
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, flags: int) -> None:
        try:
            self.number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError:
            check_place(path)
            raise
        if not stat.S_ISREG(os.fstat(self.number).st_mode):
            self.close()
            raise OSError(errno.EINVAL, f"{path.name} is not a regular file: move it away")

    def __enter__(self) -> Open:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Hand all of it to the operating system."""
        left = memoryview(data)
        while left:
            left = left[os.write(self.number, left) :]

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self.number)

    def close(self) -> None:
        """Let go of it, and of its lock."""
        os.close(self.number)


def check_place(path: Path, folder: bool = False) -> None:
    """Check that nothing lies there but a regular file, or a folder where that is wanted; OSError otherwise."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, f"{path.name} is a symbolic link, which is not followed: move it away")
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise OSError(errno.EINVAL, f"{path.name} is not a {'folder' if folder else 'regular file'}: move it away")


def lock(path: Path, flags: int = os.O_CREAT) -> Open | None:
    """Open a file and lock it until it is closed or this process ends; None if another process has locked it.

    Raises:
        OSError: it cannot be opened, or the file system has no locks.
    """
    while True:
        file = Open(path, os.O_RDWR | flags)
        try:
            locked = lock_descriptor(file.number, blocking=False)
            if locked and _is_at(path, file):
                return file
        except OSError:
            file.close()
            raise
        file.close()
        if not locked:
            return None  # else who held it has removed it meanwhile


@contextmanager
def writing(target: object, after: str = "") -> Iterator[None]:
    """Make InputError of what the system refuses: `cannot write {target}: No space left on device{after}`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}{after}") from None


def unfinished(path: Path) -> list[Path]:
    """Files that `write_whole` is writing for `path`, or never finished: `.samsum.jsonl.123` for `samsum.jsonl`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+")
    if not path.parent.is_dir():
        return []
    return [path.with_name(name) for name in sorted(os.listdir(path.parent)) if pattern.fullmatch(name)]


def sweep(path: Path) -> None:
    """Remove what a process that was killed left of writing `path`; a living one has locked what it writes."""
    for leftover in unfinished(path):
        with suppress(OSError):  # where there are no locks, nobody knows who lives
            file = lock(leftover, flags=0)
            if file is not None:
                leftover.unlink()
                file.close()


def remove(path: Path) -> None:
    """Remove a file, if it is there, and leftovers of writing it."""
    path.unlink(missing_ok=True)
    sweep(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, finds the old file or the new one and nothing between.

    Whatever lies there is replaced; a symbolic link is not followed.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    sweep(path)
    temporary, file = _temporary(path)
    with file:
        try:
            file.write(data)
            file.sync()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _temporary(path: Path) -> tuple[Path, Open]:
    """A new file beside `path`, locked, so that `sweep` knows that its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**9)}")
        try:
            file = Open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with suppress(OSError):  # a file system without locks, where `sweep` leaves everything alone
                lock_descriptor(file.number)
        except FileExistsError:
            continue
        except KeyboardInterrupt:
            temporary.unlink(missing_ok=True)
            raise
        if _is_at(temporary, file):
            return temporary, file
        file.close()  # somebody's `sweep` came before the lock


def _is_at(path: Path, file: Open) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.number))
    except FileNotFoundError:
        return False


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document with `write_whole`, each list of numbers on one line."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_whole(path, NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n")
