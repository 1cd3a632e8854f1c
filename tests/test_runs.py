import errno
import fcntl
import json
import os
import pickle
import platform
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

from vaenb import models, runs


def module(source, tmp_path, name="m"):
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    result = types.ModuleType(name)
    result.__file__ = str(path)
    exec(compile(source, path, "exec"), result.__dict__)
    return result


def make(folder):
    (folder / "value.txt").write_text("42")
    return {"answer": 42}


def test_an_entry_is_computed_once_and_reads_back():
    calls = []

    def counted(folder):
        calls.append(folder)
        return make(folder)

    folders = {runs.entry("a", {"x": 1}, [], counted) for _ in range(3)}
    (folder,) = folders
    assert len(calls) == 1
    assert runs.read(folder)["summary"] == {"answer": 42}
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "run.json", "value.txt"]


def test_key_depends_on_spec_and_code_but_not_on_comments_docstrings_or_layout(tmp_path):
    base = '"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n'
    same = '"""Other."""\n\n\ndef f(x):  # why\n    """Longer\n\n    doc."""\n    return (x + 1)\n'
    other = base.replace("+ 1", "+ 2")
    keys = [runs.key({"a": 1}, [module(s, tmp_path, f"m{i}")]) for i, s in enumerate((base, same, other))]
    assert keys[0] == keys[1] != keys[2]
    assert runs.key({"a": 1, "b": 2}, []) == runs.key({"b": 2, "a": 1}, []) != runs.key({"a": 2, "b": 1}, [])


def test_code_that_was_edited_while_it_runs_names_no_entry(monkeypatch):
    path = Path(models.__file__)
    monkeypatch.setitem(runs.SOURCES, path, path.read_text() + "\n# a comment changes nothing\n")
    before = runs.key({}, [models])
    monkeypatch.setitem(runs.SOURCES, path, path.read_text() + "\nBATCH = 7\n")
    with pytest.raises(runs.CodeEdited, match=r"models\.py was edited while this process was running.*restart the kernel"):
        runs.key({}, [models])
    monkeypatch.undo()
    assert runs.key({}, [models]) == before


def test_what_a_file_manager_leaves_in_a_folder_is_no_damage():
    folder = runs.entry("a", {}, [], make)
    (folder / ".DS_Store").write_text("view")
    assert runs.entry("a", {}, [], make) == folder
    assert runs.problem_with(folder, {}) is None


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: _flip(f / "value.txt"),
        lambda f: (f / "value.txt").write_text(""),
        lambda f: (f / "value.txt").unlink(),
        lambda f: (f / "extra").write_text("stray"),
        lambda f: _flip(f / "run.json"),
        lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\x00 not a list"),
        lambda f: (f / "SHA256SUMS").unlink(),
    ],
)
def test_damage_is_detected_set_aside_and_computed_again(damage, build):
    folder = runs.entry("a", {"x": 1}, [], make)
    damage(folder)
    with pytest.warns(UserWarning, match="is damaged"):
        again = runs.entry("a", {"x": 1}, [], make)
    assert again == folder
    assert runs.problem_with(folder, {"x": 1}) is None
    assert len(list((build / "runs" / "damaged").iterdir())) == 1


def test_an_entry_under_anothers_name_is_not_used():
    folder = runs.entry("a", {"x": 1}, [], make)
    os.replace(folder, other := folder.with_name(f"a-{runs.key({'x': 2}, [])}"))
    assert "another run" in runs.problem_with(other, {"x": 2})


def test_what_an_interrupted_call_left_is_handed_to_the_next(build):
    def interrupted(folder):
        (folder / "half").write_text("work")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.entry("a", {}, [], interrupted)
    assert not [p for p in (build / "runs").iterdir() if p.is_dir() and p.suffix != ".partial" and p.name != ".locks"]

    def resumed(folder):
        assert (folder / "half").read_text() == "work"
        (folder / ".value.txt-123").write_text("what a killed write leaves")
        return make(folder)

    folder = runs.entry("a", {}, [], resumed)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(number, tmp_path, monkeypatch):
    path = tmp_path / "file"
    runs.write_atomically(path, "old")

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(runs.DiskFull, match=r"no space left.*free some space"):
        runs.write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def test_busy_instead_of_waiting(tmp_path):
    with runs.exclusive(tmp_path / "x.lock"), pytest.raises(runs.Busy), runs.exclusive(tmp_path / "x.lock", wait=False):
        pass


def test_a_pickle_in_the_store_is_refused_before_anything_reads_it(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    folder = runs.entry("a", {}, [], make)
    (folder / "value.txt").write_bytes(pickle.dumps(Trap()))
    assert "no longer matches" in runs.problem_with(folder, {})
    assert not (tmp_path / "executed").exists()


def test_checksums_are_in_the_format_of_sha256sum():
    folder = runs.entry("a", {}, [], make)
    lines = (folder / runs.CHECKSUMS).read_text().splitlines()
    assert lines == [f"{runs.sha256(folder / name)}  {name}" for name in ("run.json", "value.txt")]
    assert json.loads((folder / "run.json").read_text())["environment"]["torch"]


def test_what_a_measurement_depends_on_is_followed_through_imports():
    from vaenb import samples

    names = {module.__name__ for module in runs.with_imports(samples)}
    assert {
        "vaenb.samples",
        "vaenb.quality",
        "vaenb.classifier",
        "vaenb.dependence",
        "vaenb.receptive",
        "vaenb.models",
        "vaenb.pixels",  # which models imports, and samples does not
    } <= names
    assert not names & {"vaenb.runs", "vaenb.progress", "vaenb.train", "vaenb.figures"}


def test_a_lock_is_held_by_its_holder_and_not_by_those_who_ask(tmp_path):
    lock = tmp_path / "notebook.lock"
    assert not runs.is_held(lock)
    with runs.exclusive(lock):
        assert runs.is_held(lock)
    lock.touch()
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another one who asks, at this moment
        assert not runs.is_held(lock)


def test_a_file_is_whole_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("named") or replace(*names))
    runs.write_atomically(tmp_path / "file", b"12345")
    assert events == [5, "named"]


def test_an_entry_that_another_process_computes_is_waited_for_or_busy(build):
    lock = build / "runs" / ".locks" / f"a-{runs.key({}, [])}.lock"
    with runs.exclusive(lock), pytest.raises(runs.Busy):
        runs.entry("a", {}, [], lambda _: pytest.fail("computed by two"), wait=False)


def test_what_another_process_finished_meanwhile_is_used(build, monkeypatch):
    folder = runs.entry("a", {}, [], make)
    parked, real = folder.rename(build / "parked"), runs.exclusive

    @contextmanager
    def meanwhile(path, wait=True):
        parked.rename(folder)
        with real(path, wait):
            yield

    monkeypatch.setattr(runs, "exclusive", meanwhile)
    assert runs.entry("a", {}, [], lambda _: pytest.fail("computed twice")) == folder


def test_checksums_that_an_interrupted_call_left_are_no_part_of_the_entry(build):
    partial = build / "runs" / f"a-{runs.key({}, [])}.partial"
    partial.mkdir(parents=True)
    (partial / runs.CHECKSUMS).write_text("of another time\n")
    assert runs.problem_with(runs.entry("a", {}, [], make), {}) is None


@pytest.mark.parametrize(("module", "name"), [(os, "getpid"), (platform, "node")])
def test_two_processes_that_write_one_file_write_two_whole_ones(module, name, tmp_path, monkeypatch):
    """On one machine, or on two that share a folder."""
    path = tmp_path / "file"
    with runs.atomic(path) as slow:
        slow.write(b"slow")
        with monkeypatch.context() as other:
            other.setattr(module, name, lambda: "another")
            runs.write_atomically(path, b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow"


def test_a_call_at_the_start_of_a_function_is_code(tmp_path):
    calls = [module(f"def f(x):\n    x.append({n})\n    return x\n", tmp_path, f"m{n}") for n in (1, 2)]
    assert runs.key({}, calls[:1]) != runs.key({}, calls[1:])
