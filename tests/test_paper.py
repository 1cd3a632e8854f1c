import json
import re

import nbformat
import pytest

from vaenb import paper
from vaenb.paper import Quoted, ResultError, Results
from vaenb.runs import ROOT

WRITE_UP = nbformat.read(ROOT / "notebooks" / "00_paper.ipynb", as_version=4)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    folder = tmp_path / "figures" / "mine"
    folder.mkdir(parents=True)
    content = {"alt": "Two bars.", "caption": "", "numbers": {"bars": {"a, <b>": [1.0, 3.0], "name": "x"}}}
    (folder / "chart.json").write_text(json.dumps(content))
    claim = {"id": "E1.1", "claim": "It holds.", "measured": {"per_seed": [-2.0, -4.0]}, "holds": False}
    (folder / "01_demo.claims.json").write_text(json.dumps([claim]))
    return Results("mine")


def text(quoted):
    return re.sub("<[^>]*>", "", quoted)


def test_a_quoted_number_is_the_mean_over_seeds_and_names_its_source(results):
    number = results("chart", "bars", "a, <b>")
    assert f"{number:.1f}" == '<data value="2" title="chart.json: bars / a, &lt;b&gt;">2.0</data>'
    assert text(f"{number:.1f±}") == "2.0 ± 1.4"
    assert text(f"{number:.0f…}") == "−11 to 15"  # 2 ± 12.7: Student's t with one degree of freedom
    assert text(f"{Quoted((0.256,), 'x'):.0%}") == "26 %"
    assert text(f"{results.claim('E1.1', 'per_seed'):.1f}") == "−3.0"
    assert text(f"{number / results.claim('E1.1', 'per_seed'):.2f}") == "−0.67"
    assert "01_demo.claims.json: E1.1" in f"{number - results.claim('E1.1', 'per_seed'):.0f}"
    assert text(results.verdict("E1.1")) == "does not hold"
    assert number.n == 2
    assert text(f"{number.least():.0f}") == "1"
    assert text(f"{Quoted((3.0,), 'x')}") == "3.0"
    with pytest.raises(ResultError, match="one seed"):
        f"{Quoted((1.0,), 'x'):.1f±}"


def test_what_is_not_there_is_named(results):
    for read, says in (
        (lambda: results("none", "bars"), "none.json"),
        (lambda: results("chart", "bars", "c"), "chart.json: bars / c"),
        (lambda: results("chart", "bars", "name"), "chart.json: bars / name"),
        (lambda: results("chart", "bars", "a, <b>", 2), "chart.json: bars / a, <b> / 2"),
        (lambda: results("chart", "bars"), "chart.json: bars"),
        (lambda: results.claim("E1.2", "per_seed"), "claims 'E1.2'"),
        (lambda: results.claim("E1.1", "interval"), "01_demo.claims.json: E1.1: interval"),
        (lambda: results.figure("none", "Nothing."), "none.json"),
    ):
        with pytest.raises(ResultError) as caught:
            read()
        assert says in str(caught.value)


def test_no_measured_number_is_typed_into_the_write_up():
    """What is left when quoted numbers are cut out are names, dates, settings and numbers of sections and references."""
    prose = [cell.source for cell in WRITE_UP.cells if cell.cell_type == "markdown"]
    said = re.findall(r'say\(\s*f?"""(.*?)"""', "\n".join(cell.source for cell in WRITE_UP.cells), flags=re.S)
    assert len(said) >= 10
    body = "\n".join(prose + said).partition("## References")[0] + "\n".join(said)
    body = re.sub(r"\{[^{}]*\}", "", body)
    for allowed in (
        r"\d+×\d+(×\d+)?", r"E\d+\.\d+", r"\bT\d\b", r"`\d\d_\w+`", r"\[\d\d_\w+\]\(\d\d_\w+\.ipynb\)", r"N\(0, I\)",
        r"\[[\d, ]+\]", r"^\d\. ", r"95 %",
        r"with\s100\sdraws", r"64\sfeatures", r"10,000\spictures", r"an\sFC-VAE\swith\s49", r"64\spixels",
        r"lag 0", r"at\sstep\s1", r"steps\s2\sand\s4",
        r"[Ss]ections? \d+", r"^## \d+\.", r"\d+\s(latents|positions|full\sGaussians)", r"square\s+is\s+1",
        r"10 %", r"Δ = 0", r"64, 256 and 1024",
    ):  # fmt: skip
        body = re.sub(allowed, "", body, flags=re.M)
    assert re.findall(r"[^\s]*\d[^\s]*", body) == []


def test_every_number_in_the_write_up_is_the_one_in_its_file():
    shown = "\n".join(
        output.data["text/markdown"]
        for cell in WRITE_UP.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    )
    quoted = re.findall(r'<data value="([^"]+)" title="([\w.]+): ([^"÷−(]+)">', shown)
    assert len(quoted) >= 40
    for value, file, path in quoted:
        content = json.loads((ROOT / "figures" / "mnist" / file).read_text())
        keys = path.split(" / ")
        if file.endswith(".claims.json"):
            name, keys[0] = keys[0].split(": ")
            content = next(claim["measured"] for claim in content if claim["id"] == name)
        else:
            content = content["numbers"]
        for key in keys:
            content = content[key]
        numbers = content if isinstance(content, list) else [content]
        assert float(value) == pytest.approx(sum(numbers) / len(numbers), rel=1e-5)
    for value, visible in re.findall(r'<data value="([^"]+)" title="[^"]*">([−\d.]+)</data>', shown):
        decimals = len(visible.partition(".")[2])
        assert abs(float(visible.replace("−", "-")) - float(value)) <= 0.51 * 10**-decimals


def test_the_write_up_shows_and_cites_what_is_there():
    assert 2000 <= len(_prose()) <= 3000
    source = "\n".join(cell.source for cell in WRITE_UP.cells)
    for name in re.findall(r'results\.figure\(\s*"(\w+)"', source):
        assert (ROOT / "figures" / "mnist" / f"{name}.png").is_file()
    body, _, references = source.partition("## References")
    listed = set(re.findall(r"^\[(\d+)\]", references, flags=re.M))
    cited = {number for group in re.findall(r"\[([\d, ]+)\]", body) for number in group.split(", ")}
    assert listed == cited


def test_nbval_compares_what_the_write_up_says():
    compared = [
        cell
        for cell in WRITE_UP.cells
        if cell.cell_type == "code" and cell.outputs and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]
    assert len([cell for cell in compared if any("text/markdown" in out.get("data", {}) for out in cell.outputs)]) >= 12
    assert len([cell for cell in compared if any(out.get("name") == "stdout" for out in cell.outputs)]) >= 3


def _prose() -> list[str]:
    """The words that a reader of the write-up sees, but for those of tables, captions and references."""
    shown = []
    for cell in WRITE_UP.cells:
        if cell.cell_type == "markdown":
            shown.append(cell.source.partition("## References")[0])
        else:
            shown += [output["data"].get("text/markdown", "") for output in cell.outputs if "data" in output]
    text = re.sub(r"<[^>]+>|!\[.*?\]\(.*?\)|\]\(.*?\)", "", "\n".join(shown), flags=re.S)
    lines = [line for line in text.split("\n") if not re.match(r"\||\*[^*].*\*$", line)]
    return [word for word in " ".join(lines).split() if re.search(r"\w", word)]
