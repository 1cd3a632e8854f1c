import json
import re
import shutil

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup

from vaenb import data, explorer, figures, ladder, page
from vaenb.config import Config
from vaenb.runs import ROOT
from vaenb.train import fit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_wanted = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium")
MB = 2**20
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def html():
    return page.build()


@pytest.fixture(scope="module")
def soup(html):
    return BeautifulSoup(html, "html.parser")


def test_the_page_needs_nothing_else(html, soup):
    assert len(html.encode()) < 10 * MB
    for tag in soup.find_all(src=True):
        assert tag["src"].startswith("data:image/webp;base64,")
    assert not soup.find_all("link")
    assert "@import" not in html
    assert "url(" not in soup.style.string


def test_every_picture_says_what_it_shows_and_figures_state_a_finding(soup):
    pictures = soup.find_all("img")
    assert len(pictures) > 30
    assert all(len(picture["alt"]) > 40 for picture in pictures)
    figures = soup.find_all("figure")
    assert len(figures) >= 12
    assert all(len(figure.figcaption.get_text()) > 40 for figure in figures)


def test_anchors_are_unique_and_links_within_the_page_lead_somewhere(soup):
    names = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(names) == len(set(names))
    for link in soup.find_all("a", href=re.compile("^#")):
        assert link["href"][1:] in names
    assert not [a["href"] for a in soup.find_all("a", href=True) if not re.match(r"#|https?://", a["href"])]


def test_all_notebooks_are_appendices_with_their_code_folded(soup):
    appendices = soup.select("details.appendix")
    assert len(appendices) == len(list((ROOT / "figures" / "mnist").glob("0[1-8]_*.ipynb"))) + 1
    for appendix in appendices:
        assert appendix.select("details pre code")
        assert "open" not in appendix.attrs


def test_missing_results_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "ROOT", tmp_path)
    with pytest.raises(page.PageError, match="make figures DATASET=mnist"):
        page.build()
    with pytest.raises(SystemExit, match="make figures"):
        page.main(["--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model["decoder"].pop("decoder.1.phases.bias"), "KeyError"),
        (lambda model: model["decoder"]["from_latent.0.weight"].update(shape=[1]), "another length"),
        (lambda model: model["priors"]["mixture"].update(means=1), "TypeError"),
        (lambda model: model.update(latent_shape=[20]), r"not of \[20\] latents"),
        (lambda model: model.clear(), "KeyError"),
    ],
)
def test_damaged_decoders_are_refused(change, said, tmp_path):
    good = ROOT / "figures" / "mnist" / "explorer.json"
    assert page._decoders(good, "") == good.read_text()
    models = json.loads(good.read_text())
    change(models["FCNN-VAE, 7×7 map"])
    damaged = tmp_path / "explorer.json"
    damaged.write_text(json.dumps(models))
    with pytest.raises(page.PageError, match=f"{said}.*make it"):
        page._decoders(damaged, "make it")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\x00", '{"a": {'])
def test_what_holds_no_decoders_is_refused(content, tmp_path):
    (tmp_path / "explorer.json").write_text(content)
    with pytest.raises(page.PageError, match="make it"):
        page._decoders(tmp_path / "explorer.json", "make it")


# Random numbers that repeat (Steele, Lea & Flood 2014 in 32 bits, "mulberry32" of T. Ettinger)
SEEDED = """let state = 1; Math.random = () => {
  state = (state + 0x6D2B79F5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
};"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "paper.html"
    path.write_text(html)
    return path


def opened(browser, file, size, **options):
    """The page, and what its console complained of."""
    tab = browser.new_page(viewport=size, **options)
    said = []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("requestfailed", lambda request: said.append(request.url))
    tab.add_init_script(SEEDED)
    tab.goto(file.as_uri())
    return tab, said


@browser_wanted
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(chromium, file, size, scheme):
    """What it looks like is kept in build/screenshots."""
    from axe_playwright_python.sync_playwright import Axe

    tab, said = opened(chromium, file, size, color_scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    tab.evaluate("Promise.all([...document.images].map((image) => { image.loading = 'eager'; return image.decode() }))")
    assert tab.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
    tab.screenshot(path=ROOT / "build" / "screenshots" / f"page-{scheme}-{size['width']}.png")
    found = Axe().run(tab).response["violations"]
    assert not "\n".join(f"{v['id']}: {[node['html'][:200] for node in v['nodes'][:3]]}" for v in found)
    assert said == []
    tab.close()


@browser_wanted
def test_a_link_to_an_appendix_unfolds_it(chromium, file):
    tab, said = opened(chromium, file, DESKTOP)
    tab.locator("main a[href='#04_cause']").first.click()
    tab.locator("details#\\30 4_cause[open]").wait_for()  # the page unfolds it in an event after the click
    assert said == []
    tab.close()


@browser_wanted
def test_the_explorer_decodes_what_one_drags(chromium, file):
    tab, said = opened(chromium, file, DESKTOP)
    digit = "document.querySelector('[data-role=digit]').toDataURL()"
    for model in tab.locator("[data-role=models] button").all():
        model.click()
        for source in tab.locator("[data-role=sources] button").all():
            source.click()
            assert source.get_attribute("aria-pressed") == "true"
            before = tab.evaluate(digit)
            box = tab.locator("[data-role=map]").bounding_box()
            tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            tab.mouse.down()
            tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - 70)
            tab.mouse.up()
            assert tab.evaluate(digit) != before
    tab.locator("[data-role=map]").focus()
    tab.keyboard.press("ArrowRight")
    before = tab.evaluate(digit)
    tab.locator("[data-role=slider]").fill("3.5")
    assert tab.evaluate(digit) != before
    assert said == []
    tab.close()


@browser_wanted
def test_the_browser_decodes_and_draws_what_pytorch_does(chromium, file, monkeypatch, tmp_path):
    monkeypatch.setenv("VAENB_FIGURES", str(tmp_path))
    tab, _ = opened(chromium, file, DESKTOP)
    images = data.load("digits")
    kept = {}
    for title, arm in (("map", {}), ("vector", {"arm": "dense", "latents": 20})):
        run = fit(Config("digits", epochs=1, **arm))
        kept[title] = {rung: ladder.repair(run, rung, 3200) for rung in ("full Gaussian", "mixture")}
    content = json.loads(explorer.export("digits", kept, images.test_labels).read_text())
    for title, priors in kept.items():
        model = priors["mixture"].run.model
        z = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.decode(z).mean.flatten(1).numpy()
        decoded = tab.evaluate(
            "([content, title, zs]) => { const model = Explorer.load(content)[title];"
            " return zs.map((z) => [...Explorer.decode(model, Float32Array.from(z))]) }",
            [content, title, z.flatten(1).tolist()],
        )
        np.testing.assert_allclose(decoded, expected, atol=1e-4)
        drawn = tab.evaluate(
            "([content, title]) => { const model = Explorer.load(content)[title];"
            " return Array.from({length: 4000}, () => [...Explorer.sources.gaussian.draw(model)]) }",
            [content, title],
        )
        # The browser's draws have no seed, so errors are in standard errors of a mean and of a Gaussian's covariance.
        prior = priors["full Gaussian"].prior
        whitening = prior.whitening[0].tril().double()
        covariance = torch.linalg.inv(whitening.mT @ whitening).numpy()
        variance = np.diag(covariance)
        error_of_mean = np.sqrt(variance / 4000)
        error_of_covariance = np.sqrt((np.outer(variance, variance) + covariance**2) / 4000)
        assert np.abs((np.mean(drawn, axis=0) - prior.means[0].numpy()) / error_of_mean).max() < 6
        assert np.abs((np.cov(np.transpose(drawn)) - covariance) / error_of_covariance).max() < 7
    tab.close()


def test_examples_for_the_explorer_are_of_every_class(monkeypatch, tmp_path):
    monkeypatch.setenv("VAENB_FIGURES", str(tmp_path))
    images = data.load("digits")
    run = fit(Config("digits", epochs=1))
    path = explorer.export("digits", {"map": {"mixture": ladder.repair(run, "mixture", 1600)}}, images.test_labels)
    content = json.loads(path.read_text())["map"]
    assert content["examples"]["labels"][:10] == list(range(10))
    draws = figures.read_numbers({"numbers": content["examples"]})["draws"]
    assert draws.shape == (len(content["examples"]["labels"]), *run.model.latent_shape)
    with pytest.raises(ValueError, match="StandardNormal"):
        explorer.export("digits", {"map": {"prior": ladder.repair(run, "N(0, I)")}}, images.test_labels)
