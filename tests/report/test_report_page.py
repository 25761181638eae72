"""The page in a browser: it draws, sorts, scrolls in its boxes, and asks for nothing but itself."""

import shutil
from pathlib import Path

import pytest
from made_runs import make_bench, make_grid, make_helm, make_needles

from squeeze.report import command as report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    make_grid(place / "pred_Long/M", ratios=(0.5,), allocations=("squeeze", "squeeze-log"))
    make_helm(place / "pred_xsum/M/full", (30.0, 9.5, 22.0))
    make_helm(place / "pred_xsum/M/0.4/25", (29.0, 9.3, 21.0), ini_size=0.4, KV_class3=0.25)
    make_needles(place / "pred_niah/M/full")
    make_needles(place / "pred_niah/M/0.4/20", found=0.98, ini_size=0.4, KV_class3=0.2)
    make_needles(place / "pred_niah/M/0.4/20/fidelity", kl=0.02, ini_size=0.4, KV_class3=0.2)
    make_bench(place / "bench.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert report.main([".", "--out", "report"]) == 0
    return (place / "report/index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_draws_and_sorts_and_loads_nothing(address, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#runs ~ .table-box table.dataTable")
    images = page.evaluate("[...document.images].map(one => [one.complete, one.naturalWidth, one.clientWidth])")
    assert len(images) == len(list(Path(address.removeprefix("file://")).parent.glob("*.svg"))) > 8
    assert all(complete and natural > 100 and shown > 200 for complete, natural, shown in images), images
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = "[...document.querySelectorAll('.table-box')].map(one => one.getBoundingClientRect().right)"
    assert max(page.evaluate(boxes)) <= width
    page.evaluate("window.scrollTo(1000, 0)")
    assert page.evaluate("window.scrollX") == 0

    shown = page.evaluate("[...document.images].map(one => [one.alt, one.clientWidth])")
    maps = [text for text, width in shown if "needles." in text and width > 200]
    assert len(maps) == 2 and any("Found: 6 of 6 needles." in text for text in maps)
    assert any("KL: 0.0200" in text for text in maps)

    table = page.locator("#runs ~ .table-box table.dataTable")
    column = table.locator("thead th").all_inner_texts().index("ini_size")
    cells = table.locator(f"tbody td:nth-child({column + 1})")
    unsorted = cells.all_inner_texts()
    for order in (1, -1):
        table.locator("thead th", has_text="ini_size").first.click()
        page.wait_for_selector(f'#runs ~ .table-box th[aria-sort="{"ascending" if order > 0 else "descending"}"]')
        values = [-1.0 if text == "-" else float(text) for text in cells.all_inner_texts()]
        assert values == sorted(values, reverse=order < 0)
        assert len(values) == len(unsorted)
    page.locator("#runs ~ .table-box input[type=search]").fill("squeeze-log")
    assert len(cells.all_inner_texts()) < len(unsorted)

    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    page.close()


def test_it_prints_whole(address, browser):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#runs ~ .table-box table.dataTable")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 794, "height": 1123})  # A4
    assert page.evaluate(
        "[...document.querySelectorAll('.table-box')].every(one => one.scrollHeight <= one.clientHeight + 1)"
    )
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.pdf()[:5] == b"%PDF-"
    page.close()
