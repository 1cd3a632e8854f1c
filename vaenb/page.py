"""The paper as one HTML page that needs no network and no server: ``python -m vaenb.page``.

The write-up is ``notebooks/00_paper.ipynb`` as it is committed; the appendices are the executed notebooks of
``figures/<dataset>/``; the explorer draws with the decoders that ``07_priors`` left there.
"""

import argparse
import base64
import io
import json
import math
import re
import sys
from html import escape
from importlib.resources import files
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, Tag
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from PIL import Image

from vaenb.runs import ROOT, build_folder, write_atomically

WRITE_UP = ROOT / "notebooks" / "00_paper.ipynb"
DIAGNOSIS = ROOT / "notebooks" / "09_diagnosis.ipynb"  # an appendix, too, as it is committed
EXPLORER = "<!-- explorer -->"  # where the write-up wants it
LAYERS = ("from_latent.0", "decoder.1.phases", "decoder.3.phases")  # that it computes
CELLS = """
{%- extends 'classic/base.html.j2' -%}
{% block input_group %}<details><summary>code</summary>
<pre tabindex="0"><code>{{ cell.source | escape }}</code></pre></details>{% endblock %}
{% block markdowncell %}<div>{{ cell.source | markdown2html | strip_files_prefix }}</div>{% endblock %}
"""


class PageError(Exception):
    """What the page is made from is missing or damaged; the message says which command makes it."""


def build(dataset: str = "mnist") -> str:
    """The whole page.

    Args:
        dataset: whose figures and executed notebooks.

    Raises:
        PageError: the write-up, an executed notebook, a picture or the explorer's decoders are missing or damaged.
    """
    folder = ROOT / "figures" / dataset
    paper = _write_up(WRITE_UP)
    executed = sorted(folder.glob("0[1-8]_*.ipynb"), key=lambda path: [int(d) for d in re.findall(r"\d+", path.stem)])
    if not executed:
        raise PageError(f"there are no executed notebooks in {folder}: make them with make figures DATASET={dataset}")
    appendices = [_appendix(path) for path in [*executed, DIAGNOSIS]]
    _show_once([paper, *(body for _, _, body in appendices)])
    for body in [paper, *(body for _, _, body in appendices)]:
        _link(body, [anchor for anchor, _, _ in appendices])
    heading = paper.h1.get_text()
    contents = [(tag["id"], tag.get_text()) for tag in paper.find_all("h2")]
    contents += [("appendices", "Appendices: the notebooks")]
    wanted = EXPLORER in WRITE_UP.read_text(encoding="utf-8")
    decoders = _decoders(folder / "explorer.json", f"make it with make 07_priors DATASET={dataset}") if wanted else ""
    return _fill(
        "page.html.j2",
        title=escape(heading),
        description=escape(paper.find("strong", string="Abstract.").parent.get_text()[:300]),
        css=_asset("page.css"),
        contents=[(anchor, escape(text)) for anchor, text in contents],
        paper=str(paper).replace(escape(EXPLORER), "").replace(EXPLORER, _asset("explorer.html")),
        appendices=[(anchor, escape(heading), str(body)) for anchor, heading, body in appendices],
        explorer=decoders.replace("</", "<\\/"),
        script=_asset("explorer.js"),
    )


def _decoders(path: Path, remedy: str) -> str:
    """What ``explorer.js`` draws with, from ``explorer.export``; every array of it as long as its shape says."""
    if not path.is_file():
        raise PageError(f"there is no {path}: {remedy}")
    try:
        content = path.read_text(encoding="utf-8")
        for model in json.loads(content).values():
            arrays = [model["decoder"][f"{layer}.{kind}"] for layer in LAYERS for kind in ("weight", "bias")]
            arrays += [prior[name] for prior in model["priors"].values() for name in ("weights", "means", "factors")]
            for array in [*arrays, model["examples"]["draws"]]:
                if 4 * math.prod(array["shape"]) != len(base64.b64decode(array["base64"], validate=True)):
                    raise ValueError(f"an array of {array['shape']} single precision numbers has another length")
            if math.prod(model["latent_shape"]) != math.prod(model["examples"]["draws"]["shape"][1:]):
                raise ValueError(f"examples are not of {model['latent_shape']} latents")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PageError(f"{path} is damaged or of another version ({type(error).__name__}: {error}): {remedy}") from None
    return content


def _write_up(path: Path) -> BeautifulSoup:
    book = _read(path)
    parts = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:  # what it says, not how
            parts += [out.data["text/markdown"] for out in cell.outputs if "text/markdown" in out.get("data", {})]
    return _soup("\n".join(markdown2html(part) for part in parts), "", level=0)


def _appendix(path: Path) -> tuple[str, str, BeautifulSoup]:
    """Anchor, heading and body of an executed notebook."""
    exporter = HTMLExporter(raw_template=CELLS, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(_read(path))
    soup = _soup(body, f"{path.stem}-", level=1)
    heading = soup.find("h2").extract().get_text()
    return path.stem, heading, soup


def _soup(html: str, prefix: str, level: int) -> BeautifulSoup:
    """HTML for a page that holds several documents: anchors with a prefix, headings lower, pictures inside."""
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.find_all(["style", "script"]) + soup.select(".anchor-link"):
        tag.decompose()
    for tag in soup.find_all(re.compile(r"^h[1-4]$")):
        tag["id"] = prefix + re.sub(r"\W+", "-", tag.get_text().lower()).strip("-")
        tag.name = f"h{int(tag.name[1]) + level}"
    for tag in soup.find_all("div", id=True):
        del tag["id"]
    for picture in soup.find_all("img"):
        _inline(soup, picture)
    for table in soup.find_all("table"):
        table.attrs = {}
        table.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0", "role": "group", "aria-label": "table"}))
        for header in table.find_all("th"):
            if not header.get_text(strip=True):
                header.name = "td"
    for block in soup.find_all("pre"):
        block["tabindex"] = "0"
    return soup


def _show_once(bodies: list[BeautifulSoup]) -> None:
    """A picture that stands above already becomes a link to it: the page is a third smaller."""
    seen: dict[str, str] = {}
    for body in bodies:
        for picture in body.find_all("img"):
            if place := seen.get(picture["src"]):
                link = body.new_tag("a", href=f"#{place}")
                link.string = f"Figure above: {picture['alt']}"
                picture.replace_with(link)
            elif (figure := picture.parent).name == "figure":
                seen[picture["src"]] = figure["id"]


def _link(soup: BeautifulSoup, anchors: list[str]) -> None:
    """Links to notebooks lead to their appendices, or nowhere if they have none."""
    for link in soup.find_all("a", href=re.compile(r"^(\.\./)?\w+\.\w+$")):
        stem = link["href"].removesuffix(".ipynb")
        if there := [anchor for anchor in anchors if anchor == stem or anchor.startswith(f"{stem}_")]:
            link["href"] = f"#{there[0]}"
        else:
            link.unwrap()


def _inline(soup: BeautifulSoup, picture: Tag) -> None:
    """The picture itself instead of a reference to it, smaller than a PNG and without loss; figures get captions."""
    source = picture["src"]
    if source.startswith("data:image/png;base64,"):
        png = base64.b64decode(source.partition(",")[2])
    else:
        path = (WRITE_UP.parent / source).resolve()
        if not path.is_file():
            raise PageError(f"{WRITE_UP.name} shows {path}, which is not there: make it with make figures")
        png = path.read_bytes()
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
        packed = io.BytesIO()
        image.convert("RGB").save(packed, "WEBP", lossless=True, method=4)
    name = picture.get("title")
    picture.attrs = {
        "src": f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}",
        "alt": picture.get("alt", ""),
        "width": width,
        "height": height,
        "loading": "lazy",
        "decoding": "async",
    }
    paragraph = picture.parent
    if name and paragraph.name == "p" and (caption := paragraph.find_next_sibling("p")):
        figure = paragraph.wrap(soup.new_tag("figure", id=f"figure-{name}"))
        paragraph.unwrap()
        text = caption.extract()
        text.name = "figcaption"
        figure.append(text)


def _read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except Exception as error:  # nbformat raises whatever it runs into
        raise PageError(f"cannot read {path} ({type(error).__name__}: {error}): make it with make figures") from None


def _asset(name: str) -> str:
    return (files("vaenb") / "web" / name).read_text(encoding="utf-8")


def _fill(name: str, **content: object) -> str:
    from jinja2 import Environment, StrictUndefined

    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_asset(name)).render(**content)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the Makefile."""
    parser = argparse.ArgumentParser(prog="python -m vaenb.page", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=build_folder() / "paper.html")
    options = parser.parse_args(arguments)
    try:
        page = build().encode()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, page)
    except (PageError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {len(page) / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
