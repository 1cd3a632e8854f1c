"""The run store: whatever takes long to compute is computed once and found again by what it depends on.

An entry is a folder under ``build/runs`` whose name ends in a hash of its *spec* (a JSON-able description) and of the
source of the modules that compute it. So editing a model makes new entries and editing a plot makes none. An entry
appears under its final name only when it is complete, one process at a time computes it, what an interrupted process
left is handed to the next one, and a folder whose files do not match their checksums is set aside and never used.
"""

import ast
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
# Modules that store, share and show results, and change none.
PLUMBING = ("vaenb.runs", "vaenb.progress", "vaenb.processes", "vaenb.shared")
HELPER = "VAENB_HELPER"  # in a helper's environment (``vaenb.shared``): the lock of whoever makes its notebook's figures
CHECKSUMS = "SHA256SUMS"  # in the format of sha256sum(1), so that anybody can check an entry

# When this module was imported; hidden files are those of editors and file managers.
SOURCES = {path: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("[!.]*.py") if path.is_file()}


class Busy(Exception):
    """Another process is computing the entry."""


class CodeEdited(RuntimeError):
    """The source of this package has changed since this process began."""


class DiskFull(OSError):
    """Nothing is lost: the file that did not fit has been removed, what was complete before is still there."""


def build_folder() -> Path:
    """Where everything that can be made again lives: ``build/`` in the checkout, or ``$VAENB_BUILD``."""
    return Path(os.environ.get("VAENB_BUILD") or ROOT / "build")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: the content goes to a temporary neighbour, to the disk, and then to its name.

    Raises:
        DiskFull: the device or quota has no room; the temporary file is gone and an older ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name when the block ends, and is removed when the block fails.

    Raises:
        DiskFull: see ``write_atomically``.
    """
    temporary = path.with_name(f".{path.name}-{platform.node()}-{os.getpid()}")  # machines may share a folder
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                error.errno,
                f"no space left on the device for {path}: free some space and run the same command again, it goes on from "
                "the last complete file",
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_of(module: ModuleType) -> str:
    """A module's source without comments, docstrings and layout: what can change a result, and nothing else.

    Raises:
        CodeEdited: it is no longer that which this process runs.
    """
    source, path = inspect.getsource(module), Path(inspect.getfile(module))
    if (began := SOURCES.get(path, source)) != source and _code(began) != _code(source):
        raise CodeEdited(
            f"{path} was edited while this process was running, which still computes with the code of before: restart the "
            "kernel or command, so that nothing old is kept under the name of the new"
        )
    return _code(source)


def with_imports(module: ModuleType) -> list[ModuleType]:
    """The module and every module of the package that it imports, directly or not, but for those of ``PLUMBING``."""
    found: dict[str, ModuleType] = {}
    waiting = [module]
    while waiting:
        here = waiting.pop()
        if here.__name__ in found or here.__name__ in PLUMBING:
            continue
        found[here.__name__] = here
        waiting += [sys.modules[name] for name in _imports(inspect.getsource(here)) if name in sys.modules]
    return [found[name] for name in sorted(found)]


def key(spec: Mapping[str, Any], modules: Sequence[ModuleType]) -> str:
    """Hash of what an entry depends on: 16 hexadecimal digits."""
    parts = [json.dumps(spec, sort_keys=True), *(code_of(module) for module in modules)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def entry(
    label: str,
    spec: Mapping[str, Any],
    modules: Sequence[ModuleType],
    make: Callable[[Path], Mapping[str, Any]],
    wait: bool = True,
) -> Path:
    """The folder of a finished entry; computed by ``make`` if it is not in the store yet.

    Args:
        label: what people read at the start of the folder's name.
        spec: everything the content depends on besides source code; JSON-able.
        modules: modules whose source the content depends on.
        make: fills the folder that it is given and returns a JSON-able summary for ``run.json``. It may find there what
            an interrupted call left, and should go on from that. Its files named ``checkpoint-*`` are not kept.
        wait: for another process that computes the same entry, rather than raise ``Busy``.

    Raises:
        Busy: another process computes this entry, and ``wait`` is False or this process is a helper, which never waits.
        DiskFull: no space left; what was complete stays for the next call.
    """
    name = f"{label}-{key(spec, modules)}"
    store = build_folder() / "runs"
    folder, partial = store / name, store / f"{name}.partial"
    if folder.is_dir() and not problem_with(folder, spec):
        return folder
    with exclusive(store / ".locks" / f"{name}.lock", wait and HELPER not in os.environ):
        if folder.exists():
            if not (problem := problem_with(folder, spec)):
                return folder  # another process finished it meanwhile
            aside = _set_aside(folder)
            warnings.warn(f"{folder} is damaged ({problem}): moved to {aside}, computing it again", stacklevel=3)
        partial.mkdir(parents=True, exist_ok=True)
        summary = make(partial)
        run = {"label": label, "spec": spec, "summary": summary, "environment": _environment()}
        write_atomically(partial / "run.json", json.dumps(run, indent=1, sort_keys=True) + "\n")
        for leftover in [*partial.glob(".*"), *partial.glob("checkpoint-*"), partial / CHECKSUMS]:
            if leftover.is_file():
                leftover.unlink()  # what only an interrupted ``make`` needs
        files = sorted(_visible(partial))
        write_atomically(partial / CHECKSUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in files))
        os.replace(partial, folder)
    return folder


def problem_with(folder: Path, spec: Mapping[str, Any]) -> str | None:
    """Why an entry must not be used, in words; None when every file matches its checksum and the spec is the right one."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        present = {path.name for path in _visible(folder)} - {CHECKSUMS}
        if present != set(sums):
            return f"files {sorted(present ^ set(sums))} are missing or were not there when it was finished"
        if damaged := [name for name, digest in sums.items() if sha256(folder / name) != digest]:
            return f"{', '.join(damaged)} no longer matches its checksum"
        if json.loads((folder / "run.json").read_text())["spec"] != json.loads(json.dumps(spec)):
            return "run.json describes another run"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, without what file systems and file managers leave in it."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def read(folder: Path) -> dict[str, Any]:
    """The entry's ``run.json``: label, spec, summary and the environment it was computed in."""
    return json.loads((folder / "run.json").read_text())


def _set_aside(folder: Path) -> Path:
    damaged = folder.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=damaged)) / folder.name
    os.replace(folder, target)
    return target


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file lock, and say so when that means waiting. The system releases it when its holder dies, however.

    Raises:
        Busy: another process holds it, and ``wait`` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise Busy(f"another process computes {path.stem}") from None
        if os.environ.get("VAENB_PROGRESS") != "off":
            print(f"waiting for another process that computes {path.stem}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether another process holds this file lock. Those who ask at the same time do not see each other."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system(), **packages}


@functools.cache  # hundreds of entries depend on the same few modules, and parsing takes long
def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def _imports(source: str) -> tuple[str, ...]:
    """Names of modules of the package that a source may import: ``from vaenb.a import b`` may mean ``vaenb.a.b``, too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vaenb"):
            found += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    return tuple(name for name in found if name != "vaenb")
