import errno
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager

import nbformat
import papermill
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from vaenb import claims, data, execute, runs
from vaenb.execute import ExecutionError, main, parameters_for

NOTEBOOKS = sorted(path.stem for path in execute.NOTEBOOKS.glob("*.ipynb"))
WRITES = """
from vaenb.claims import Claim, conclude, figures_folder
from vaenb.runs import write_atomically
write_atomically(figures_folder(dataset) / f"figure_{n}.png", f"picture of {n}")
conclude(f"00_demo_{n}", dataset, [Claim("E0.1", "It holds.", {}, n != 13)])
"""


@pytest.fixture
def project(tmp_path, monkeypatch, build):
    """A checkout of its own with one notebook, and a shell that reads its errors."""
    root = tmp_path / "a chëckout"
    for folder in ("notebooks/params", "vaenb/plots", "vaenb/.ipynb_checkpoints"):
        (root / folder).mkdir(parents=True)
    (root / "constraints.txt").write_text("torch==1\n")
    for module in ("module.py", "plots/plot.py"):
        (root / "vaenb" / module).write_text("x = 1\n")
    (root / "notebooks" / "params" / "digits.yaml").write_text("dataset: digits\n")
    for module, name, value in ((execute, "ROOT", root), (execute, "NOTEBOOKS", root / "notebooks"), (claims, "ROOT", root)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("VAENB_BUILD", str(build))
    monkeypatch.setenv("VAENB_PROGRESS", "off")
    write_notebook(root, WRITES)
    return root


def write_notebook(root, source, name="00_demo"):
    parameters = new_code_cell('dataset = "digits"\nn = 1\n', metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Demo"), parameters, new_code_cell(source)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), root / "notebooks" / f"{name}.ipynb")


def run(*arguments):
    main(["00_demo", *arguments, "--dataset", "digits"])


def fails(*arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str), "expected a message and exit status 1"
    return caught.value.code


def test_figures_appear_and_nothing_is_done_twice(project, build, capsys):
    run("n=3")
    target = project / "figures" / "digits"
    assert sorted(p.name for p in target.iterdir()) == ["00_demo_3.claims.json", "00_demo_3.ipynb", "figure_3.png"]
    capsys.readouterr()
    os.utime(project / "notebooks" / "00_demo.ipynb", (0, 0))  # clocks and touched files mean nothing
    (project / "vaenb/.ipynb_checkpoints/module-checkpoint.py").write_text("x = 2\n")  # nor what JupyterLab leaves
    run("n=3")
    assert capsys.readouterr().err == ""
    book = nbformat.read(target / "00_demo_3.ipynb", as_version=4)
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert [cell.execution_count for cell in book.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert not list((build / "staging").rglob("*.*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "figures/digits/figure_1.png").write_text("damaged"),
        lambda p: (p / "figures/digits/figure_1.png").unlink(),
        lambda p: (p / "vaenb/module.py").write_text("x = 2\n"),
        lambda p: (p / "vaenb/plots/plot.py").write_text("x = 2\n"),
        lambda p: (p / "constraints.txt").write_text("torch==2\n"),
        lambda p: (p / "notebooks/params/digits.yaml").write_text("dataset: digits\nn: 1\n"),
        lambda p: write_notebook(p, WRITES + "# edited"),
        lambda p: next((runs.build_folder() / "stamps").rglob("*.json")).write_text('{"key": '),
    ],
)
def test_what_changed_is_made_again(change, project, capsys):
    run()
    change(project)
    run()
    assert "00_demo: done" in capsys.readouterr().err
    assert (project / "figures/digits/figure_1.png").read_text() == "picture of 1"


def test_a_figure_of_land_is_made_again_when_other_pictures_are_here(project, tmp_path, monkeypatch, capsys):
    write_notebook(project, WRITES + "# resolve_photographs")
    monkeypatch.setenv("VAENB_DATA", str(tmp_path / "data"))
    run()
    for name in ("eurosat/2750/River/River_1.jpg", "scenes/scene.jpg"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"a picture")
        capsys.readouterr()
        run()
        assert "00_demo: done" in capsys.readouterr().err
        run()
        assert capsys.readouterr().err == ""


def test_a_figure_that_is_no_longer_made_does_not_stay(project):
    run()
    write_notebook(project, WRITES.replace("figure_{n}", "renamed_{n}"))
    run()
    assert not (project / "figures/digits/figure_1.png").exists()
    assert (project / "figures/digits/renamed_1.png").exists()


@pytest.mark.parametrize("deaths", [1, 9])
def test_a_kernel_that_dies_at_its_start_is_started_again(deaths, project, monkeypatch):
    """As where two that start at the same moment choose the same port."""
    left, execute_notebook = [deaths], papermill.execute_notebook

    def dies(*arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return execute_notebook(*arguments, **options)

    monkeypatch.setattr(papermill, "execute_notebook", dies)
    if deaths == 1:
        run()
        assert (project / "figures/digits/figure_1.png").exists()
    else:
        assert "no kernel could be started for 00_demo.ipynb" in fails()
        assert not (project / "figures/digits").exists()


def test_what_a_killed_process_had_half_written_does_not_stay(project):
    half, of_others = (project / "figures/digits" / name for name in (".figure_1.png-host-99", ".mine.png-host-99"))
    half.parent.mkdir(parents=True)
    for file in (half, of_others):
        file.write_text("half a pic")
    run()
    assert (project / "figures/digits/figure_1.png").read_text() == "picture of 1"
    assert not half.exists()
    assert of_others.exists()


def test_a_figure_that_another_notebook_makes_now_stays(project):
    run()
    write_notebook(project, WRITES.replace("figure_{n}", "renamed_{n}"))
    write_notebook(project, WRITES.replace("00_demo_{n}", "00_other"), name="00_other")
    main(["00_other", "--dataset", "digits"])
    run()
    assert (project / "figures/digits/figure_1.png").exists()
    assert (project / "figures/digits/renamed_1.png").exists()


JOB = """
from vaenb import runs
runs.entry("job", {"n": n}, [], lambda folder: {})
"""


@contextmanager
def making(build):
    """Somebody makes the figures of the notebook meanwhile."""
    with runs.exclusive(build / "stamps" / "digits" / "00_demo.lock"):
        yield


def test_a_helper_fills_the_store_and_draws_nothing(project, build, monkeypatch):
    write_notebook(project, JOB + WRITES)
    with making(build):
        run("--helper", "1")
    assert list((build / "runs").glob("job-*/SHA256SUMS"))
    assert not (project / "figures").exists()
    assert not list((build / "staging").rglob("*.*"))
    run()
    assert (project / "figures/digits/figure_1.png").exists()
    monkeypatch.setattr(execute, "parameters_for", lambda *_: pytest.fail("it is made: there is nothing to help with"))
    with making(build):
        run("--helper", "1")


def test_a_helper_helps_nobody_where_nobody_makes_figures(project, build, monkeypatch):
    write_notebook(project, JOB)
    monkeypatch.setattr(execute, "PATIENCE", 0.1)
    run("--helper", "1")
    assert not (build / "runs").exists()


def test_a_helper_ends_where_it_would_wait(project, build):
    write_notebook(project, JOB.replace("job", "earlier") + JOB + JOB.replace("job", "later"))
    with making(build), runs.exclusive(build / "runs" / ".locks" / f"job-{runs.key({'n': 1}, [])}.lock"):
        run("--helper", "1")
    assert [path.parent.name.split("-")[0] for path in (build / "runs").glob("*/SHA256SUMS")] == ["earlier"]


def test_a_helper_ends_with_the_process_that_makes_the_figures(project, build):
    write_notebook(project, JOB + "import time\nfrom vaenb import shared\ntime.sleep(300)\n")
    helper = threading.Thread(target=run, args=("--helper", "1"), daemon=True)
    with making(build):
        helper.start()
        while helper.is_alive() and not list((build / "runs").glob("job-*/SHA256SUMS")):
            time.sleep(0.1)
        assert helper.is_alive()
    helper.join(timeout=120)
    assert not helper.is_alive()


@pytest.mark.parametrize("error", [ExecutionError("a cell failed"), RuntimeError("no kernel"), OSError("full")])
def test_a_helper_leaves_errors_to_the_process_that_makes_the_figures(error, project, build, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(execute, "_papermill", fail)
    with making(build):
        run("--helper", "1")
    assert capsys.readouterr().err == ""
    if isinstance(error, ExecutionError):
        assert str(error) in fails()


@pytest.mark.parametrize(
    ("gibibytes", "limits", "expected"),
    [
        (64, {}, 16),
        (16, {}, 6),
        (1, {}, 2),
        (64, {"cpu.max": "max 100000", "memory.max": "max"}, 16),
        (64, {"cpu.max": "450000 100000"}, 4),
        (64, {"memory.max": str(8 * 2**30)}, 3),
        (64, {"nvidia-smi": ""}, 4),
        (64, {"nvidia-smi": "", "control": ""}, 16),  # of NVIDIA's Multi-Process Service
    ],
)
def test_as_many_notebooks_as_a_machine_or_container_has_room_for(
    gibibytes, limits, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**18}.get)
    monkeypatch.setattr(execute, "CONTROL_GROUP", tmp_path)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: "here" if name in limits else None)
    for file, limit in limits.items():
        (tmp_path / file).write_text(f"{limit}\n")
    main(["--jobs"])
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_failing_notebook_is_kept_makes_no_figure_and_is_tried_again(project, build):
    write_notebook(project, WRITES + "raise RuntimeError('the reason')")
    message = fails()
    assert "00_demo.ipynb, cell 3: RuntimeError: the reason" in message
    kept = build / "failed" / "digits" / "00_demo.ipynb"
    assert str(kept) in message
    assert "the reason" in kept.read_text()
    assert not list((project / "figures").rglob("*.*")) if (project / "figures").exists() else True
    assert "the reason" in fails()
    write_notebook(project, WRITES)
    run()
    assert (project / "figures/digits/figure_1.png").exists()


def test_a_lost_claim_fails_and_changes_nothing(project):
    run("n=12")
    target = project / "figures" / "digits"
    (target / "00_demo_12.claims.json").rename(target / "00_demo_13.claims.json")
    before = (target / "00_demo_13.claims.json").read_text()
    message = fails("n=13")
    assert "no longer reproduces" in message
    assert "E0.1 It holds." in message
    assert (target / "00_demo_13.claims.json").read_text() == before
    assert not (target / "figure_13.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dataset: digits\nepoch: 3\n", "no notebook has a parameter 'epoch'"),
        ("dataset: digits\n00_demo: {m: 3}\n", "notebook 00_demo has no parameter 'm'"),
        ("dataset: digits\n01_other: {n: 3}\n", "no notebook has a parameter '01_other'"),
        ("dataset: digits\n00_demo: 5\n", "section 00_demo is 5, expected parameters of that notebook by name"),
        ("- a\n- b\n", "holds a list: expected lines of the form 'name: value'"),
        ("a: [unclosed\n", "cannot read the parameters"),
        ("n: !!python/object/apply:os.system ['touch executed']\n", "cannot read the parameters"),
        (b"\xff\xfe\x00", "cannot read the parameters"),
    ],
)
def test_bad_parameter_files(content, message, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExecutionError, match=message):
        execute.execute("00_demo", path, {})
    assert not (tmp_path / "executed").exists()
    assert not (project / "figures").exists()


def test_ones_own_parameters_go_to_a_folder_of_that_name(project, tmp_path):
    (tmp_path / "quick.yaml").write_text("dataset: digits\nn: 5\n")
    main(["00_demo", "--params", str(tmp_path / "quick.yaml")])
    assert (project / "figures/quick/figure_5.png").exists()


def test_a_file_with_the_name_of_shipped_parameters_must_not_overwrite_their_figures(project, tmp_path):
    (tmp_path / "digits.yaml").write_text("dataset: digits\nn: 5\n")
    with pytest.raises(SystemExit) as caught:
        main(["00_demo", "--params", str(tmp_path / "digits.yaml")])
    assert "give it another name" in str(caught.value.code)
    assert not (project / "figures").exists()


def test_ones_own_parameters_may_conclude_otherwise(project, tmp_path):
    path = tmp_path / "mine.yaml"
    for n in (12, 13):
        path.write_text(f"dataset: digits\nn: {n}\n")
        main(["00_demo", "--params", str(path)])
        (project / "figures/mine" / f"00_demo_{n}.claims.json").replace(project / "figures/mine/00_demo_13.claims.json")


def test_other_mistakes_on_the_command_line(project):
    for arguments, message in (
        (["00_demo", "n", "--dataset", "digits"], "expected name=value"),
        (["00_demo", "m=1", "--dataset", "digits"], "has no parameter 'm'"),
        (["99_none", "--dataset", "digits"], "there is no notebook '99_none'"),
        (["00_demo", "--dataset", "imagenet"], "unknown data set 'imagenet': choose auto or one of digits"),
        (["00_demo", "--params", "none.yaml"], "cannot read none.yaml"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert message in str(caught.value.code)


def test_a_missing_kernel_is_named(project, monkeypatch):
    import jupyter_client.kernelspec as kernels

    def missing(self, name):
        raise kernels.NoSuchKernel(name)

    monkeypatch.setattr(kernels.KernelSpecManager, "get_kernel_spec", missing)
    assert "the Jupyter kernel 'python3' is missing" in fails()


def test_auto_names_the_parameters_of_what_it_finds(build, monkeypatch, capsys):
    raw = build / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.setattr(data, "resolve", lambda name: "digits")
    assert execute.parameter_file("auto").stem == "digits"
    for name in ("a", "b", "c", "d"):
        (raw / f"{name}-ubyte.gz").touch()
    assert execute.parameter_file("auto").stem == "mnist"


def test_more_seeds_change_the_numbers_of_seeds_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(runs.ROOT / "tests" / "bench")
    from rebuild import with_seeds

    shipped = execute.NOTEBOOKS / "params" / "mnist.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(with_seeds(yaml.safe_load(shipped.read_text()), 7)))
    for notebook in NOTEBOOKS:
        theirs, ours = (parameters_for(notebook, path, {}) for path in (shipped, mine))
        assert ours == {name: 7 if name.endswith("seeds") else value for name, value in theirs.items()}


@pytest.mark.parametrize("path", sorted((execute.NOTEBOOKS / "params").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_shipped_parameters_fit_every_notebook(path, notebook):
    assert parameters_for(notebook, path, {})["dataset"] == path.stem


@pytest.mark.parametrize(
    ("notebook", "overrides"),  # quick ones: nbval runs all of them, `make figures DATASET=digits` all through papermill
    [("02_latent_maps", {"latent_size": 14}), ("02_map_sizes", {})],
)
def test_notebooks_run_with_tiny_parameters(notebook, overrides, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(execute, "ROOT", tmp_path)  # figures go there
    base = tmp_path_factory.getbasetemp()  # of a worker, inside that of all
    store = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"
    monkeypatch.setenv("VAENB_BUILD", str(store))  # one for all notebooks, as with make: what one has trained another finds
    (tmp_path / "constraints.txt").touch()
    tiny = {"dataset": "digits", "epochs": 1, "seeds": 2}
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny))
    execute.execute(notebook, tmp_path / "tiny.yaml", overrides)
    made = {path.suffix for path in (tmp_path / "figures" / "tiny").iterdir()}
    assert made == {".png", ".json", ".ipynb"}


def test_a_full_disk_is_named_with_what_to_do(project, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(execute, "execute", full)
    with pytest.raises(SystemExit, match=r"No space left.*build.*run the same command again"):
        execute.main(["00_demo", "--params", str(project / "notebooks" / "params" / "digits.yaml")])


def test_a_notebook_is_executed_by_one_process_at_a_time(project, build, monkeypatch):
    executed = []
    monkeypatch.setattr(execute, "_papermill", lambda *_: executed.append(1))
    with making(build):
        other = threading.Thread(target=run, daemon=True)
        other.start()
        other.join(timeout=1)
        assert not executed
    other.join(timeout=60)
    assert executed


def test_a_notebook_is_refreshed_in_place_or_left_as_it_is(project, monkeypatch):
    looked_for = "a download for a notebook that has its own defaults"
    monkeypatch.setattr(execute, "parameter_file", lambda _: pytest.fail(looked_for))
    path = project / "notebooks" / "00_demo.ipynb"
    main(["00_demo", "--in-place"])
    book = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in book.cells if cell.cell_type == "code"] == [1, 2]
    assert "holds" in book.cells[-1].outputs[0].text
    assert not (project / "figures").exists()
    write_notebook(project, "raise RuntimeError('the reason')")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="the reason"):
        main(["00_demo", "--in-place"])
    assert path.read_bytes() == before
