"""Folders that others may write into as well: what is in a file's place, what is left behind, and what is nobody's."""

import json
import os
from pathlib import Path

import pytest
from crash_points import contents, run_pair
from made_runs import make_run
from test_runs import DATA, SETTINGS, go_on, record

from squeeze import InputError
from squeeze.report import command as report
from squeeze.report import page
from squeeze.runs.folder import Run
from squeeze.storage.files import lock, read_bytes, write_whole


@pytest.fixture
def victim(tmp_path):
    """Somebody's file, which no link may lead to."""
    (tmp_path / "victim").mkdir()
    path = tmp_path / "victim/notes.txt"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


def put(kind, path, victim):
    """Put something else into a file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(victim.parent / "new")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


KINDS = ("link", "dangling link", "pipe", "folder")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".lock", "samsum.partial.jsonl", "samsum.jsonl", "samples/samsum.jsonl"])
def test_what_is_no_file_in_a_runs_file_is_a_sentence(tmp_path, victim, name, kind):
    folder = tmp_path / "run"
    go_on(folder, 2, stop=1)
    path = folder / name
    path.unlink(missing_ok=True)
    put(kind, path, victim)
    before = sorted(contents(folder))
    what = "a symbolic link, which is not followed" if "link" in kind else "not a regular file"
    said = rf"cannot write into .*/run: {path.name} is {what}: move it away|cannot read .*{path.name}: Is a directory"
    for overwrite in (False, True):
        with pytest.raises(InputError, match=said):
            go_on(folder, 2, overwrite=overwrite)
    assert sorted(contents(folder)) == before


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_folder_of_samples_that_is_none_is_a_sentence(tmp_path, victim, kind):
    folder = tmp_path / "run"
    go_on(folder, 2, stop=1)
    put(kind, folder / "samples", victim.parent if kind == "link" else victim)
    with pytest.raises(InputError, match=r"/run: samples is (a symbolic link|not a folder)"):
        go_on(folder, 2)
    with pytest.raises(InputError, match=r"/run: samples is (a symbolic link|not a folder)"):
        go_on(folder, 2, overwrite=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_no_file(tmp_path, victim, kind):
    """It is read without waiting, and replaced without following it."""
    put(kind, tmp_path / "run/run.json", victim)
    if kind == "dangling link":
        go_on(tmp_path / "run", 1)
    else:
        with pytest.raises(InputError, match=r"run\.json"):
            go_on(tmp_path / "run", 1)
    if kind == "folder":
        with pytest.raises(InputError, match=r"cannot write into .*/run: Is a directory"):
            go_on(tmp_path / "run", 1, overwrite=True)
        return
    go_on(tmp_path / "run", 1, overwrite=True)
    assert not (tmp_path / "run/run.json").is_symlink()
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"] == SETTINGS


def test_a_runs_folder_may_be_a_link_of_the_users(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    go_on(tmp_path / "run", 2)
    assert {"run.json", "samsum.jsonl"} <= {path.name for path in (tmp_path / "scratch").iterdir()}


def test_a_file_is_written_whole_and_through_no_link(tmp_path, victim):
    (tmp_path / "file").symlink_to(victim)
    write_whole(tmp_path / "file", "é")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "file").read_bytes() == "é".encode()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_only_what_nobody_writes_any_more_is_swept(tmp_path):
    (tmp_path / ".file.12").write_text("left by a kill")
    (tmp_path / ".file.txt").write_text("mine")
    (tmp_path / ".other.12").write_text("another file's")
    living = lock(tmp_path / ".file.34")
    write_whole(tmp_path / "file", b"")
    names = {".file.txt", ".other.12", ".file.34", "file"}
    assert {path.name for path in tmp_path.iterdir()} == names
    living.close()
    write_whole(tmp_path / "file", b"")
    assert {path.name for path in tmp_path.iterdir()} == names - {".file.34"}


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """A process that had opened the file before must not hold what another one cannot see."""
    first = lock(tmp_path / "lock")
    assert lock(tmp_path / "lock") is None
    original = os.open

    def slow(*given):
        number = original(*given)
        monkeypatch.undo()
        (tmp_path / "lock").unlink()  # by the first, after this process has opened it and before it locks it
        first.close()
        return number

    monkeypatch.setattr(os, "open", slow)
    second = lock(tmp_path / "lock")
    assert second is not None and lock(tmp_path / "lock") is None


def test_leftovers_of_kills_are_swept_by_the_next_start(tmp_path):
    go_on(tmp_path, 2)
    with Run(tmp_path, SETTINGS, {}) as run:
        qmsum = run.open("qmsum", DATA, 2)
        run.start(qmsum)
        qmsum.append([record(0)])
    left = [".run.json.1", ".samsum.jsonl.2", ".result.json.3", ".result_detail.json.4", ".qmsum.partial.jsonl.5"]
    left += ["samples/.samsum.jsonl.6", "samples/.qmsum.jsonl.7"]
    for name in (*left, ".mine.jsonl.8"):
        (tmp_path / name).write_text("half")
    go_on(tmp_path, 3)
    assert [name for name in left if (tmp_path / name).exists()] == []
    assert (tmp_path / ".mine.jsonl.8").exists() and (tmp_path / "qmsum.partial.jsonl").exists()


class Failed(Exception):
    pass


def fail(folder, total, error=Failed, **flags):
    """A start whose first batch fails."""
    with pytest.raises(error), Run(folder, flags.pop("settings", SETTINGS), {"command": "pred"}, **flags) as run:
        run.start(run.open("samsum", DATA, total))
        raise error


@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt])
def test_a_folder_in_which_nothing_was_computed_is_left_as_it_was_found(tmp_path, error):
    root = tmp_path / "pred_Long"
    fail(root / "M/full", 2, error)
    assert not root.exists()
    root.mkdir()
    fail(root / "M/full", 2, error)
    assert list(root.iterdir()) == []
    (root / "M/full").mkdir(parents=True)
    (root / "M/full/mine.txt").write_text("mine")
    fail(root / "M/full", 2, error, overwrite=True)
    assert contents(root) == {"M": None, "M/full": None, "M/full/mine.txt": b"mine"}
    for stop in (1, None):  # also a run that is half done, and one that is finished and scored
        go_on(root / "M/full", 2, stop=stop)
        (root / "M/full/result.json").write_text("{}")
        before = contents(root)
        fail(root / "M/full", 4, error)
        fail(root / "M/full", 2, error, settings=SETTINGS | {"dtype": "bfloat16"}, overwrite=True)
        assert contents(root) == before


@pytest.mark.parametrize("there", [0, 2])
@pytest.mark.parametrize("failing", [0, 1])
def test_two_processes_of_which_one_fails_at_once_leave_what_was_there(tmp_path, failing, there):
    if there:
        go_on(tmp_path / "run", there)
    before = contents(tmp_path)

    def act(ranks):
        with Run(Path("run"), SETTINGS, {}, ranks=ranks) as run:
            samples = run.open("samsum", DATA, 4)
            run.start(samples)
            if ranks.rank == failing:
                raise InputError("out of memory")
            samples.append([record(2 + ranks.rank)])

    found = run_pair(act, tmp_path)
    assert found[failing].said == "InputError: out of memory"
    assert found[1 - failing].said.endswith("another process of the run has ended")
    assert contents(tmp_path) == before


def test_overwrite_drops_what_the_manifest_lists_and_nothing_else(tmp_path, victim):
    folder = tmp_path / "run"
    other = SETTINGS | {"dtype": "bfloat16"}
    go_on(folder, 2)
    with Run(folder, SETTINGS, {}) as run:
        qmsum = run.open("qmsum", DATA, 1)
        run.start(qmsum)
        qmsum.append([record(0)])
    mine = [
        "mine.jsonl",
        "qasper.jsonl",
        "samples/mine.jsonl",
        "samsum.partial-old.jsonl",
        "result.txt",
        "x.partial.jsonl",
    ]
    for name in mine:
        (folder / name).write_text("mine")
    manifest = json.loads((folder / "run.json").read_text())
    for name in ("../victim/notes", str(tmp_path / "victim/notes")):
        manifest["datasets"][name] = manifest["datasets"]["qmsum"]
    (folder / "run.json").write_text(json.dumps(manifest))
    (tmp_path / "victim/notes.jsonl").write_text("mine")
    go_on(folder, 1, settings=other, overwrite=True)
    (tmp_path / "victim/notes.jsonl").unlink()
    assert {name for name, content in contents(folder).items() if content is not None} == {
        *mine,
        *(".lock", "run.json", "samsum.jsonl", "samples/samsum.jsonl"),
    }
    # Where the manifest is damaged, only what is run now is known to be the run's.
    (folder / "run.json").write_text("{")
    go_on(folder, 2, overwrite=True)
    assert all((folder / name).read_text() == "mine" for name in mine)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "pipe") == b""
    reading, writing = os.pipe()  # as in `--requests <(zcat requests.gz)`
    os.write(writing, b"rows")
    os.close(writing)
    assert read_bytes(Path(f"/dev/fd/{reading}")) == b"rows"


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """A report's folder, and the command that makes it again; nothing is drawn."""
    make_run(tmp_path / "run")
    monkeypatch.setattr(page, "files", lambda *_: {"index.html": b"page", "a.svg": b"figure"})
    flags = [str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert report.main(flags) == 0
    return tmp_path / "out", flags


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["index.html", "a.svg", "report.json"])
def test_what_is_no_file_in_a_report_is_somebody_elses(reported, victim, capsys, name, kind):
    out, flags = reported
    (out / name).unlink()
    put(kind, out / name, victim)
    assert report.main(flags) == 2
    assert "which this command did not write: give a new folder" in capsys.readouterr().err
    assert (out / name).is_symlink() or not (out / name).is_file()


def test_what_a_killed_report_left_is_its_own(reported):
    out, flags = reported
    whole = contents(out)
    for name in (".report.json.123", ".a.svg.5"):
        (out / name).write_text("half")
    assert report.main(flags) == 0
    assert contents(out) == whole
    for path in out.iterdir():
        path.unlink()
    (out / ".report.json.123").write_text("half")
    assert report.main(flags) == 0
    assert contents(out) == whole
    (out / ".mine.svg.5").write_text("mine")
    assert report.main(flags) == 2
