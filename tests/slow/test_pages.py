"""The pages in a real browser, narrow and wide, light and dark: nothing runs out at the side, and text can be read.

Runs where Chromium and the Python package playwright are there: apt install chromium, pip install playwright. The
screenshots are in pytest's folder.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from crysldnet import cli
from crysldnet.signals import RUN_NAME
from tiny import ENCODER, QUIET, subset

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
CHROMIUM = shutil.which("chromium")
LEGIBLE = 3.0
"""Least contrast of text, as WCAG defines it for large text."""
CONTRAST = """() => {
  const light = (c) => { const s = c / 255; return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; };
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = parts(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('h1, h2, h3, p, td, th, .card')].filter((e) => e.innerText).map((e) => {
    const pair = [luminance(parts(getComputedStyle(e).color)), luminance(behind(e))].sort((a, b) => b - a);
    return [(pair[0] + 0.05) / (pair[1] + 0.05), e.tagName, e.innerText.slice(0, 40)];
  });
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of numbers, one of classes, a comparison, a sweep and a description of data, all of real crystals."""
    folder = tmp_path_factory.mktemp("pages")
    data = subset(folder / "data.parquet", train=48, val=16, test=60)
    table = pq.read_table(data)
    metal = ["metal" if gap == 0 else "gap" for gap in table["band_gap"].to_pylist()]
    pq.write_table(table.append_column("kind", [metal]), data)
    short = [f"data.path={data}", "trainer.accelerator=cpu", "min_steps=0", f"runs={folder}", *QUIET]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in (
            ("numbers", ["data.targets=[formation_energy_per_atom,band_gap]", "ensemble=2"]),
            ("other", ["data.targets=[formation_energy_per_atom,band_gap]", "seed=1"]),
            ("classes", ["data.targets=[kind]", "target_types={kind: classification}"]),
        ):
            patch.delenv(RUN_NAME, raising=False)
            assert cli.run(["finetune", *ENCODER, *short, "epochs=4", f"name={name}", *words]) == 0
        reports = {"numbers": ["numbers"], "classes": ["classes"], "comparison": ["numbers", "other"]}
        for name, runs in reports.items():
            found[name] = folder / f"{name}.html"
            assert cli.run(["report", *(str(folder / "finetune" / run) for run in runs), f"out={found[name]}"]) == 0
        assert cli.run(["data", "describe", str(data), "--html", "data.html"]) == 0
        found["data"] = folder / "data.html"
        args = " ".join([*ENCODER, *short[:3], *QUIET])
        assert cli.run(["sweep", "sweep=finetune", "count=3", "name=s", f"runs={folder}", f"args={args}"]) == 0
        found["sweep"] = folder / "sweep/s/sweep.html"
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium isn't installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["numbers", "classes", "comparison", "data", "sweep"])
def test_a_page_fits_and_can_be_read(
    pages: dict[str, Path], browser: Any, tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    failed: list[str] = []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else failed.append(request.url))
    page.goto(pages[name].as_uri())
    page.screenshot(path=tmp_path / f"{name}_{width}_{scheme}.png", full_page=True)
    assert failed == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(CONTRAST)
    assert len(texts) > 10
    assert [text for text in texts if text[0] < LEGIBLE] == []
    page.close()
