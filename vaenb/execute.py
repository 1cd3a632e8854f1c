"""Executes the notebooks with papermill, all or nothing: ``python -m vaenb.execute 02_latent_maps latent_size=7``.

A notebook runs in a staging folder. If it succeeds, its figures, claims and executed copy move to ``figures/<name of the
parameter file>/``; if it fails, what it got to is kept in ``build/failed`` and no figure changes. What is already made
from the same notebook, parameters, package source and pinned versions is not made again; that is told by content, since
git and clocks set the times of files as they like.
"""

import argparse
import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vaenb import claims
from vaenb.runs import HELPER, ROOT, DiskFull, build_folder, cores, exclusive, is_held, sha256, write_atomically

SOURCE = Path(__file__).resolve().parents[1]  # the kernels must use this checkout, wherever the environment came from
NOTEBOOKS = ROOT / "notebooks"
ON_A_GPU = 4  # processes
CONTROL_GROUP = Path("/sys/fs/cgroup")  # limits of a container, on Linux
PATIENCE = 5.0  # seconds that a helper waits for somebody to begin with its notebook
STARTS = 3  # of a kernel, at most: two that start at the same moment may choose the same port, and one of them dies
ROOM = 2.5 * 2**30  # bytes, a little more than the largest notebook takes


class ExecutionError(Exception):
    """Something that the user can mend; the message says what and how."""


def parameter_file(dataset: str) -> Path:
    """The parameter file of a data set; ``auto`` is MNIST if it is here or can be fetched, else the embedded digits."""
    if dataset == "auto":
        cached = list((build_folder() / "data" / "MNIST" / "raw").glob("*-ubyte.gz"))
        if len(cached) == 4:  # saves loading PyTorch to find out
            dataset = "mnist"
        else:
            from vaenb import data

            try:
                dataset = data.resolve(dataset)
            except data.DataError as error:
                raise ExecutionError(str(error)) from None
    path = NOTEBOOKS / "params" / f"{dataset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in (NOTEBOOKS / "params").glob("*.yaml")))
        raise ExecutionError(
            f"unknown data set {dataset!r}: choose auto or one of {known}, or name your own file with PARAMS="
        )
    return path


def parameters_for(notebook: str, path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What to inject into a notebook: the file's shared values that it has, its own section, and the overrides.

    Raises:
        ExecutionError: the file is not a YAML mapping, or has a parameter or section that no notebook has.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ExecutionError(f"cannot read the parameters in {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ExecutionError(f"{path} holds a {type(content).__name__}: expected lines of the form 'name: value'")
    has = {source.stem: _parameter_names(source) for source in sorted(NOTEBOOKS.glob("*.ipynb"))}
    sections = {key: value or {} for key, value in content.items() if key in has}
    shared = {key: value for key, value in content.items() if key not in has}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ExecutionError(f"{path}: section {section} is {values!r}, expected parameters of that notebook by name")
    for key in shared:
        if not any(key in names for names in has.values()):
            known = ", ".join(sorted(set().union(*has.values())))
            raise ExecutionError(
                f"{path}: no notebook has a parameter {key!r}; there are {known}, and sections {', '.join(has)}"
            )
    for section, values in [*sections.items(), (notebook, overrides)]:
        for key in values:
            if key not in has[section]:
                raise ExecutionError(
                    f"notebook {section} has no parameter {key!r} (in {path} or on the command line); "
                    f"it has {', '.join(sorted(has[section]))}"
                )
    return {**{k: v for k, v in shared.items() if k in has[notebook]}, **sections.get(notebook, {}), **overrides}


def execute(notebook: str, path: Path, overrides: Mapping[str, Any]) -> bool:
    """Make a notebook's figures if they are not up to date; True if it ran.

    Args:
        notebook: name without suffix.
        path: parameter file; its stem names the folder under ``figures/``.
        overrides: further parameters; their values become part of the name of the executed copy.

    Raises:
        ExecutionError: unknown notebook or parameter, missing kernel, a cell that failed, a claim of the same shipped
            parameters that no longer holds.
    """
    source = NOTEBOOKS / f"{notebook}.ipynb"
    if not source.is_file():
        raise ExecutionError(f"there is no notebook {notebook!r} in {NOTEBOOKS}")
    if (shipped := NOTEBOOKS / "params" / path.name).exists() and path.resolve() != shipped.resolve():
        raise ExecutionError(f"{path} has the name of {shipped}, whose figures it would overwrite: give it another name")
    name = "_".join([notebook, *(re.sub(r"[^\w.-]+", "-", str(value)) for value in overrides.values())])
    target, stamp = ROOT / "figures" / path.stem, build_folder() / "stamps" / path.stem / f"{name}.json"
    with exclusive(stamp.with_suffix(".lock")):
        key = _key(source, path, overrides)
        before = _read_stamp(stamp)
        if _is_made(before, key):
            return False
        parameters = parameters_for(notebook, path, overrides)
        print(f"{name}: running with {parameters}", file=sys.stderr, flush=True)
        started = time.monotonic()
        staging = _empty(build_folder() / "staging" / path.stem / name)
        copy = staging / f"{name}.ipynb"
        try:
            _papermill(source, copy, parameters, staging)
            for concluded in staging.glob("*.claims.json") if path.resolve().parent == NOTEBOOKS / "params" else ():
                try:
                    gone = claims.lost(target / concluded.name, concluded)
                except claims.ClaimsError as error:
                    raise ExecutionError(str(error)) from None
                if gone:
                    raise ExecutionError(
                        f"{name} no longer reproduces what {target / concluded.name} claims: {'; '.join(gone)}. If that is "
                        "right, delete that file and run the same command again"
                    )
        except ExecutionError as error:
            failed = build_folder() / "failed" / path.stem
            failed.mkdir(parents=True, exist_ok=True)
            if copy.exists():
                os.replace(copy, failed / copy.name)
            raise ExecutionError(f"{error}\n{name} was not made; how far it got: {failed / copy.name}") from None
        outputs = {}
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(staging.iterdir()):
            outputs[str((target / file.name).relative_to(ROOT))] = sha256(file)
            for killed in target.glob(f".{glob.escape(file.name)}-*"):  # who wrote it half; this notebook is locked
                killed.unlink(missing_ok=True)
            write_atomically(target / file.name, file.read_bytes())  # build/ may lie on another device
            file.unlink()
        others = (_read_stamp(other).get("outputs", {}) for other in stamp.parent.glob("*.json") if other != stamp)
        orphans = set(before.get("outputs", {})).difference(outputs, *others)  # figures that no notebook makes any longer
        for file in orphans:
            (ROOT / file).unlink(missing_ok=True)
        staging.rmdir()
        seconds = round(time.monotonic() - started, 1)
        made = {"key": key, "seconds": seconds, "memory": _peak_memory(), "outputs": outputs}
        write_atomically(stamp, json.dumps(made, indent=1) + "\n")
        print(f"{name}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
    return True


def help_with(notebook: str, path: Path, number: int) -> None:
    """Execute a notebook beside the process that makes its figures, for what that leaves in the store (``vaenb.shared``).

    It ends where it would have to wait, and with that process. Whatever goes wrong is for that process to report.

    Args:
        notebook, path: see ``execute``.
        number: which of the notebook's helpers this is; there is one of each.
    """
    source, name = NOTEBOOKS / f"{notebook}.ipynb", f"{notebook}+{number}"
    stamp = build_folder() / "stamps" / path.stem / f"{notebook}.json"
    staging = build_folder() / "staging" / path.stem / name
    with suppress(Exception):
        if _is_made(_read_stamp(stamp), _key(source, path, {})):
            return
        parameters = parameters_for(notebook, path, {})
        lock, patience = stamp.with_suffix(".lock"), time.monotonic() + PATIENCE
        while not is_held(lock):
            if time.monotonic() > patience:
                return
            time.sleep(0.5)
        with exclusive(stamp.with_name(f"{name}.lock"), wait=False):
            os.environ[HELPER] = str(lock)
            logging.getLogger("papermill").setLevel(logging.CRITICAL)  # that its kernel ends early is no error
            try:
                _papermill(source, _empty(staging) / source.name, parameters, staging)
            finally:
                del os.environ[HELPER]
                shutil.rmtree(staging)


def refresh(notebook: str) -> None:
    """Execute a notebook in place with its own default parameters, as it is committed."""
    source = NOTEBOOKS / f"{notebook}.ipynb"
    staging = _empty(build_folder() / "staging" / "in-place" / notebook)
    _papermill(source, staging / source.name, {}, staging)
    write_atomically(source, (staging / source.name).read_bytes())  # build/ may lie on another device
    shutil.rmtree(staging)


def times(path: Path) -> str:
    """How long each notebook of a parameter file took when it last ran, and its peak memory."""
    stamps = sorted((build_folder() / "stamps" / path.stem).glob("*.json"))
    rows = [(stamp.stem, _read_stamp(stamp)) for stamp in stamps]
    return "\n".join(f"{row.get('seconds', '?'):>8} s {row.get('memory', '?'):>6} GiB  {name}" for name, row in rows)


def jobs() -> int:
    """How many notebooks to execute side by side here: one for each core, with ``ROOM`` of memory each; at least two.

    With a GPU at most ``ON_A_GPU``, since processes take turns on it, unless NVIDIA's Multi-Process Service has them compute
    at the same time; memory of the GPU, about a GiB each, is not looked at. Of containers, the limits of version 2 control
    groups count.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    together = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps", "control").exists()
    on_a_gpu = ON_A_GPU if shutil.which("nvidia-smi") and not together else math.inf
    return max(2, int(min(cores(), _allowed("cpu.max"), memory / ROOM, _allowed("memory.max") / ROOM, on_a_gpu)))


def _allowed(file: str) -> float:
    """A limit of the container that this runs in, infinite without one: cores of ``cpu.max``, bytes of ``memory.max``."""
    try:
        amount, *period = (CONTROL_GROUP / file).read_text().split()
    except OSError:
        return math.inf
    return math.inf if amount == "max" else int(amount) / int(*period or [1])


def _is_made(stamp: Mapping[str, Any], key: str) -> bool:
    return stamp.get("key") == key and all(_matches(ROOT / file, digest) for file, digest in stamp["outputs"].items())


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _peak_memory() -> float:
    """Of the largest process that this one has started, the kernel, in GiB."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(largest * (1 if sys.platform == "darwin" else 1024) / 2**30, 2)


def _papermill(source: Path, copy: Path, parameters: dict[str, Any], staging: Path) -> None:
    import nbformat
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    os.environ.update(VAENB_FIGURES=str(staging), JUPYTER_PREFER_ENV_PATH="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # notebooks run side by side, each on a core of its own;
        os.environ.setdefault(pool, "1")  # threads that wait for each other on a busy core are far slower than one
    os.environ.setdefault("VAENB_PROGRESS", "bar" if sys.stderr.isatty() else "plain")
    try:
        for left in reversed(range(STARTS)):
            try:
                papermill.execute_notebook(
                    source,
                    copy,
                    parameters,
                    kernel_name="python3",
                    cwd=NOTEBOOKS,
                    progress_bar=False,
                    stderr_file=sys.stderr,
                    extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # no notes on each start and stop
                )
                break
            except RuntimeError as error:  # of jupyter_client, which has no type of its own for it
                if "Kernel died before replying" not in str(error) or not left:
                    raise
    except NoSuchKernel:
        raise ExecutionError(
            "the Jupyter kernel 'python3' is missing from this environment: reinstall it with make clean and make figures"
        ) from None
    except DeadKernelError:
        raise ExecutionError(f"the kernel that ran {source.name} died; perhaps the machine ran out of memory") from None
    except RuntimeError as error:
        raise ExecutionError(f"no kernel could be started for {source.name}: {error}") from None
    except papermill.PapermillExecutionError as error:
        raise ExecutionError(f"{source.name}, cell {error.exec_count}: {error.ename}: {error.evalue}") from None
    book = nbformat.read(copy, as_version=4)
    book.metadata = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in book.cells:
        hidden = {"source_hidden": True} if cell.metadata.get("jupyter", {}).get("source_hidden") else {}
        cell.metadata = {name: kept for name, kept in (("tags", cell.metadata.get("tags")), ("jupyter", hidden)) if kept}
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill's is random
        if cell.cell_type == "code":  # progress is for whoever watches, not for readers
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    write_atomically(copy, nbformat.writes(book) + "\n")


def _parameter_names(source: Path) -> set[str]:
    import papermill

    try:
        return set(papermill.inspect_notebook(source))
    except Exception as error:  # papermill raises whatever it runs into
        raise _damaged(source, error) from None


def _damaged(source: Path, error: Exception) -> ExecutionError:
    reason = " ".join(str(error).split())[:200]
    return ExecutionError(f"{source} is no notebook that can be read ({type(error).__name__}: {reason}): restore it")


def _key(source: Path, path: Path, overrides: Mapping[str, Any]) -> str:
    """Hash of everything that a notebook's output depends on, without loading any of it."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(source, error) from None
    digest = hashlib.sha256(json.dumps([cells, dict(overrides)], sort_keys=True).encode())
    if any("resolve_photographs" in source for _, source in cells):
        digest.update(json.dumps(_photographs()).encode())
    modules = (file for file in (ROOT / "vaenb").rglob("*.py") if not file.parent.name.startswith((".", "__")))  # no caches
    for file in [path, ROOT / "constraints.txt", *sorted(modules)]:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise ExecutionError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()


def _photographs() -> list[tuple[str, int]]:
    """Names and sizes of the pictures of land that are here, which decide what ``auto`` means and what is learned from."""
    given = [Path(os.environ["VAENB_DATA"])] if os.environ.get("VAENB_DATA") else []
    bases = [*given, ROOT.parent / "shared" / "data", build_folder() / "data"]
    patterns = ("eurosat/2750/*/*.jpg", "2750/*/*.jpg", "*/*.jpg")  # see ``photographs``; the last one also has scenes
    found = {
        (str(path.relative_to(base)), path.stat().st_size) for base in bases for each in patterns for path in base.glob(each)
    }
    return sorted(found)


def _read_stamp(stamp: Path) -> dict[str, Any]:
    try:
        content = json.loads(stamp.read_text())
        return content if isinstance(content.get("outputs"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _matches(file: Path, digest: str) -> bool:
    return file.is_file() and sha256(file) == digest


def main(arguments: list[str] | None = None) -> None:
    """Command line of the Makefile."""
    parser = argparse.ArgumentParser(prog="python -m vaenb.execute", description=__doc__.split("\n\n")[0])
    parser.add_argument("notebook", nargs="?", help="name without suffix, such as 02_latent_maps")
    parser.add_argument("parameter", nargs="*", help="name=value, in YAML; with --helper: further notebooks")
    parser.add_argument("--dataset", default="auto", help="which of notebooks/params to use (default: auto)")
    parser.add_argument("--params", type=Path, help="a parameter file of one's own instead")
    parser.add_argument("--helper", type=int, metavar="N", help="only fill the run store, beside those that make them")
    parser.add_argument("--in-place", action="store_true", help="execute the committed notebook itself, with its defaults")
    parser.add_argument("--resolve", action="store_true", help="only print the parameter file that would be used")
    parser.add_argument("--jobs", action="store_true", help="only print how many notebooks to execute side by side")
    parser.add_argument("--times", action="store_true", help="only print how long each notebook took")
    options = parser.parse_args(arguments)
    for folder in {"VAENB_BUILD", "VAENB_DATA"} & set(os.environ):  # kernels run in another folder
        os.environ[folder] = os.environ[folder] and str(Path(os.environ[folder]).absolute())
    try:
        if options.jobs:
            print(jobs())
            return
        if options.in_place and options.notebook:  # with its own parameters: what data there are does not matter
            refresh(options.notebook)
            return
        path = options.params or parameter_file(options.dataset)
        overrides = {}
        for assignment in options.parameter if options.helper is None else ():
            name, equals, value = assignment.partition("=")
            if not equals:
                raise ExecutionError(f"{assignment!r}: expected name=value")
            try:
                overrides[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ExecutionError(f"{assignment!r}: {' '.join(str(error).split())}") from None
        if options.resolve:
            print(path)
        elif options.times:
            print(times(path))
        elif options.notebook is None:
            parser.error("name a notebook")
        elif options.helper is not None:
            for notebook in [options.notebook, *options.parameter]:
                help_with(notebook, path, options.helper)
        else:
            execute(options.notebook, path, overrides)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs and checkpoints are kept, the same command goes on from there")
    except (ExecutionError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC and not isinstance(error, DiskFull)
        more = f" for {build_folder()} or temporary files: free some and run the same command again" if full else ""
        sys.exit(f"error: {error}{more}")


if __name__ == "__main__":
    main()
