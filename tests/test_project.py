import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from numpy import cumsum, mean  # as the figures do, so that halves are rounded alike
from packaging.specifiers import SpecifierSet

from vaenb.figures.style import spread
from vaenb.quality import interval
from vaenb.runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


EXPERIMENTS = [path for path in NOTEBOOKS if "01" <= path.stem < "09"]  # the others read, diagnose or play


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


@pytest.fixture(params=EXPERIMENTS, ids=lambda path: path.stem)
def experiment(request):
    return nbformat.read(request.param, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_environment_yml_has_the_packages_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=!~ ]", line)[0] for line in project["dependencies"] + project["optional-dependencies"]["test"]}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [item["pip"] for item in environment if isinstance(item, dict)]
    names = {re.split(r"[<>=]", item)[0] for item in environment if isinstance(item, str)} - {"python", "pip"}
    names |= set(pip) - {"--editable ."}
    assert {{"pytorch": "torch"}.get(name, name) for name in names} == wanted
    (python,) = [match[1] for item in environment if (match := re.fullmatch(r"python=(3\.\d+)", str(item)))]
    assert python in SpecifierSet(project["requires-python"])


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert set(project["dependencies"] + project["optional-dependencies"]["test"]) <= pinned


def test_committed_notebooks_were_executed_top_to_bottom_without_error(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [
        out for cell in code(notebook) for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"
    ]


def test_nbval_has_something_to_compare(experiment):
    compared = [
        cell
        for cell in code(experiment)
        if "nbval-ignore-output" not in cell.metadata.get("tags", [])
        and any(out.get("name") == "stdout" for out in cell.outputs)
    ]
    assert len(compared) >= 2
    assert "holds" in code(experiment)[-1].outputs[0].text.lower()  # the verdicts


def test_notebooks_carry_no_trace_of_one_machine(notebook):
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags", "jupyter"} for cell in notebook.cells)


def test_notebooks_read_well(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    for cell in code(notebook):
        lines = cell.source.splitlines()
        assert len([line for line in lines if line.strip()]) <= 30
        assert all(len(line) <= 125 for line in lines)
        assert not re.search(r"\.backward\(|optimi[sz]er", cell.source)


def test_experiments_say_beforehand_what_could_fail(experiment):
    assert "Predictions that could fail" in experiment.cells[0].source


def test_experiments_say_how_long_they_take(experiment):
    stated = r"\*Time on one core: alone, on digits, \d+ minutes?; in `make figures` on MNIST, .*\d+ minutes?.*\.\*$"
    assert re.search(stated, experiment.cells[0].source)


def test_pictures_have_alt_text(experiment):
    pictures = [out for cell in code(experiment) for out in cell.outputs if "image/png" in out.get("data", {})]
    assert pictures
    assert all(len(out.metadata["image/png"]["alt"]) > 40 for out in pictures)


def test_committed_figures_have_their_numbers_and_are_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    pictures = sorted((ROOT / "figures" / "mnist").glob("*.png"))
    assert len(pictures) >= 7
    for picture in pictures:
        content = json.loads(picture.with_suffix(".json").read_text())
        assert content["alt"]
        assert any(source in content["caption"] for source in ("MNIST", "EuroSAT", "drawn for this figure"))
        assert picture.name in readme


def test_numbers_in_the_readme_are_those_of_the_committed_figures():
    readme = (ROOT / "README.md").read_text()
    numbers = json.loads((ROOT / "figures" / "mnist" / "symptom_bounds.json").read_text())["numbers"]
    for model, bounds in numbers["bounds"].items():
        nats = (bounds[c] for c in ("negative_elbo", "rate", "distortion", "negative_log_likelihood"))
        cells = [_mean_and_deviation(values) for values in nats]
        cells.append(f"{100 * mean(numbers['statistics'][model]['one_stroke_samples']):.0f} %")
        assert f"| {model} | {' | '.join(cells)} |" in readme


def test_frechet_distances_in_the_readme_are_those_of_the_committed_figures():
    readme = (ROOT / "README.md").read_text()
    numbers = json.loads((ROOT / "figures" / "mnist" / "locality_test.json").read_text())["numbers"]["statistics"]
    rows = {
        "dense": "FC-VAE, 20 latents",
        "mixed": "mixed: the 7×7 map and a linear layer on each side",
        "spatial": "FCNN-VAE, 7×7 map",
    }
    for arm, name in rows.items():
        values = numbers[arm]["frechet"]
        low, high = interval(values)
        assert f"| {name} | {mean(values):.0f} | {low:.0f} to {high:.0f} |" in readme


def test_kernels_of_tested_notebooks_use_this_checkout(tmp_path):
    code = """if True:
        import runpy, subprocess, sys
        runpy.run_path(sys.argv[1])
        subprocess.run([sys.executable, "-c", "import vaenb; print(vaenb.__file__)"], check=True)"""
    command = [sys.executable, "-c", code, ROOT / "notebooks" / "conftest.py"]
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, check=True, stdout=subprocess.PIPE, text=True)
    assert Path(done.stdout.strip()) == ROOT / "vaenb" / "__init__.py"


def test_numbers_of_priors_in_the_readme_are_those_of_the_committed_figures():
    readme = (ROOT / "README.md").read_text()
    ladder, joint, likelihood, cold, worth = (
        json.loads((ROOT / "figures" / "mnist" / f"{name}.json").read_text())["numbers"]
        for name in ("prior_ladder", "joint_samples", "prior_likelihood", "prior_temperature", "prior_worth")
    )
    narrow, deep = "FCNN-VAE, 7×7", "FCNN-VAE, 7×7, deep"
    rows = {
        "N(0, I)": ("N(0, I)", f"{narrow}, N(0, I)"),
        "per position": ("a Gaussian for each position", None),
        "full Gaussian": ("one Gaussian for all latents", None),
        "mixture": ("mixture of 150 Gaussians", f"{narrow}, mixture"),
        narrow: ("the mixture, trained jointly (one seed)", f"{narrow}, jointly"),
        deep: ("the same in the deep model", f"{deep}, jointly"),
    }
    for row, (name, bound) in rows.items():
        table = joint["after"][row] if row in joint["after"] else ladder["statistics"][row]
        nll = likelihood[bound]["negative_log_likelihood"] if bound else None
        numbers = [ladder["gains"].get(row), table["to_reconstructions"], table["frechet"]]
        cells = ["" if values is None else _mean_and_deviation(values) for values in (*numbers, nll)]
        cells.insert(3, f"{mean(table['coverage']):.2f}")
        assert re.sub(" +", " ", f"| {name} | {' | '.join(cells)} |") in readme
    for table, name in ((ladder["limits"], "frozen"), (joint["reconstructions"][deep], "deep, jointly")):
        cells = [_mean_and_deviation(table[column]) for column in ("to_reconstructions", "frechet")]
        assert f"({name}) | | {' | '.join(cells)} | {mean(table['coverage']):.2f} | |" in readme
    of_vector = [*worth["points"]["FC-VAE, 20"]["mixture"], likelihood["FC-VAE, 20, mixture"]["negative_log_likelihood"]]
    gain, distance, nll = map(_mean_and_deviation, of_vector)
    assert f"(but for −log p(x): one seed) | {gain} | {distance} | | | {nll} |" in readme
    nearest = {
        name: min((at for t, at in ladder.items() if t != "reconstructions"), key=lambda at: mean(at["frechet"]))
        for name, ladder in cold.items()
    }
    cells = [_mean_and_deviation(cold["FCNN-VAE, deep"]["0.85"][c]) for c in ("to_reconstructions", "frechet")]
    assert f"| … drawn at temperature 0.85 | | {' | '.join(cells)} |" in readme
    best, fc, alike = (nearest[name]["frechet"] for name in ("FCNN-VAE, deep", "FC-VAE", "FC-VAE, 49, deep"))
    assert f"({_mean_and_deviation(best)} against {_mean_and_deviation(fc)}," in readme
    assert f"is nearer still\n({_mean_and_deviation(alike)}, one seed)" in readme
    assert f"({_mean_and_deviation(likelihood['FC-VAE, 20, jointly']['negative_log_likelihood'])}" in readme
    alike = _mean_and_deviation(likelihood["FC-VAE, 49, deep, jointly"]["negative_log_likelihood"])
    assert f"an FC-VAE\nis level with it**: {alike} nats (one seed; the deep model:" in readme
    middle = {rung: f"{distances[0]:.0f}" for rung, (_, distances) in worth["points"]["FCNN-VAE, 14×14"].items()}
    assert f"from {middle['N(0, I)']} under N(0, I) to {middle['mixture']} with\na mixture of fewer Gaussians and" in readme
    assert f"and to {middle['flow matching']} with flow matching, where reconstructions of other images" in readme
    assert f"are at {worth['floors']['FCNN-VAE, 14×14']:.1f} (" in readme
    assert f"with {joint['parameters']['FC-VAE, 49, deep']:,} parameters in encoder and decoder" in readme


def test_numbers_of_land_in_the_readme_are_those_of_the_committed_figures():
    readme = (ROOT / "README.md").read_text()
    numbers = json.loads((ROOT / "figures" / "mnist" / "any_size_statistics.json").read_text())["numbers"]
    rows = {
        "N(0, I)": "N(0, I)",
        "learned prior": "learned stationary prior",
        "reconstructions": "reconstructions of other tiles",
    }
    for kind, name in rows.items():
        table = {column: mean(values) for column, values in numbers[kind].items() if isinstance(values[0], float)}
        distances = [f"{table[c]:.{0 if table[c] > 10 else 1}f}" for c in ("to_reconstructions", "frechet")]
        error = f"{table['two_point_error']:.2f} " if "two_point_error" in table else ""
        assert f"| {name} | {' | '.join(distances)} | {table['coverage']:.2f} | {error}|" in readme


def test_speeds_in_the_readme_are_those_of_the_benchmark():
    readme = (ROOT / "README.md").read_text()
    numbers = json.loads((ROOT / "figures" / "mnist" / "bench_speed.json").read_text())["numbers"]
    for where, arms in numbers["throughput"].items():
        for arm, found in arms.items():
            speeds = {way: f"{found[f'{way}, images a second']:,.0f}" for way in ("ours", "DataLoader", "pythae")}
            others = [f"{speeds[way]} (×{found[f'ours over {way}']:.2f})" for way in ("DataLoader", "pythae")]
            share = f"{100 * found['share of the bound']:.0f} %"
            assert f"| {' | '.join([arm, where, speeds['ours'], *others, share])} |" in readme


def test_times_to_rebuild_in_the_readme_are_those_of_the_benchmark():
    readme = (ROOT / "README.md").read_text()
    numbers = json.loads((ROOT / "figures" / "mnist" / "bench_speed.json").read_text())["numbers"]["rebuild"]
    rows = {
        "cold": "from nothing, without `08_any_size`",
        "08_any_size, cold": "`08_any_size`, from nothing",
        "warm": "again",
        "after an edit of a plot": "after an edit of the plotting code",
    }
    for way, name in rows.items():
        minutes, seconds = divmod(round(numbers[way]["seconds"]), 60)
        time = f"{minutes}:{seconds:02d} minutes" if minutes else f"{numbers[way]['seconds']:.1f} seconds"
        assert f"| {name} | {time} |" in readme
    assert numbers["pictures unlike the committed ones"] == []  # which the readme says


def test_times_to_a_bound_in_the_readme_are_those_of_the_benchmark():
    readme = (ROOT / "README.md").read_text()
    numbers = json.loads((ROOT / "figures" / "mnist" / "bench_speed.json").read_text())["numbers"]
    dense, spatial = numbers["time_to_bound"].values()
    assert f"at {dense['reached']:.0f} nats\nafter {dense['seconds']:.0f} seconds" in readme
    assert f"leave it, after {spatial['seconds']:.0f}." in readme


def _mean_and_deviation(values):
    return f"{mean(values):.1f}" + (f" ± {spread(values, '{:.1f}')}" if len(values) > 1 else "")


@pytest.fixture
def start_make(tmp_path):
    """``make figures`` with an interpreter that does no more than ``instead`` when it is to execute a notebook."""

    def start(instead, *options):
        python = tmp_path / "python"
        python.write_text(
            f"""#!/bin/sh
case "$*" in
*--resolve*) echo parameters.yaml ;;
*--jobs*) echo 2 ;;
*--times*) ;;
*) {instead} ;;
esac
"""
        )
        python.chmod(0o755)
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "figures", f"INTERPRETER={python}", *options]
        return subprocess.Popen(command, cwd=ROOT, env=plain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return start


@pytest.mark.parametrize(("option", "at_once"), [("-j1", 1), ("JOBS=1", 1), ("-j3", 3), ("", 2)])
def test_as_many_notebooks_at_once_as_make_was_told(option, at_once, start_make, tmp_path):
    """Each only notes when it begins and ends; told nothing, make asks how many, and hears 2."""
    log = tmp_path / "log"
    make = start_make(f'echo 1 >> "{log}"; sleep 0.2; echo -1 >> "{log}"', *[option] * bool(option))
    assert make.wait() == 0
    steps = [int(step) for step in log.read_text().split()]
    assert cumsum(steps).max() == at_once
    assert sum(steps) == 0


def test_whoever_ends_make_ends_all_that_it_started(start_make, tmp_path):
    """By ``kill`` of the first process, as schedulers do it; Ctrl-C reaches all of them anyway."""
    log = tmp_path / "log"
    make = start_make(f'echo $$ >> "{log}"; exec sleep 60')
    while len(started := log.read_text().split() if log.exists() else []) < 2:
        assert make.poll() is None
        time.sleep(0.05)
    make.terminate()
    make.wait()
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
