"""The report in headless Chromium: it shows, searches, zooms, runs nothing of the pool, and is fluent at full size."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from report_folder import HOSTILE, hostile_work_folder
from work_folder import make_work_folder

from megatron_ksa.data_tools.tags.files import write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.report import ReportSettings, report_step
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import sample_step

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (800, 1280)
READY = "document.documentElement.dataset.ready === 'true'"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright to look at the report in a browser"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser to look at the report with: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def eventually(page, condition: str) -> None:
    """Wait until a condition holds; the page's policy forbids Playwright's own way, which evaluates text there."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


@pytest.fixture
def open_page(browser):
    """Opens a file, offline, and collects errors and requests; the page must be ready."""
    contexts = []

    def load(path, width=1280):
        context = browser.new_context(
            offline=True, viewport={"width": width, "height": 900}, reduced_motion="reduce", accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.errors, page.requests = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
        page.add_init_script("addEventListener('error', () => { window.failed = true; });")
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        eventually(page, READY + " || window.failed === true")
        assert page.evaluate(READY), page.errors
        return page

    yield load
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = hostile_work_folder(tmp_path_factory.mktemp("work"))
    other = make_work_folder(tmp_path_factory.mktemp("other"))
    sample_step(other, SampleSettings("30", method="top-quality"), show_progress=False)
    # Ids of the same records: the other folder's pool has ids of its own.
    shutil.copy(folder / "records.jsonl", other / "records.jsonl")
    sample_step(other, SampleSettings("30", method="top-quality"), show_progress=False)
    report_step(folder, target=folder / "target", settings=ReportSettings(compare=str(other)))
    return folder


def current(page):
    return page.inner_text("#path button[aria-current]")


def test_it_shows_zooms_and_runs_nothing_of_the_pool(work, open_page):
    page = open_page(work / "report" / "index.html")
    assert "40 of 200 instances" in page.inner_text("#facts") and "nats" in page.inner_text("#facts")
    rows = page.locator("#branches tbody tr")
    assert rows.count() == 4 and HOSTILE[:40] in "".join(rows.all_inner_texts())
    assert "target" in page.inner_text("#branches thead") and "other run" in page.inner_text("#branches thead")
    assert int(page.get_attribute("#icicle", "data-drawn")) == 25
    box = page.locator("#icicle").bounding_box()
    # The second level from the top starts with the largest branch.
    page.mouse.click(box["x"] + 20, box["y"] + box["height"] * 0.5)
    assert current(page) == HOSTILE
    assert page.locator("#branches tbody tr").count() == 5
    assert page.locator("#samples article").count() > 3
    assert "</script>" in page.inner_text("#samples") and "selected" in page.inner_text("#samples")
    for tab in ("tags", "instances", "samples"):
        page.click(f"[data-tab={tab}]")
        assert page.locator(f"#{tab}").is_visible() and page.locator(f"#{tab} *").count() > 3
    page.focus("#icicle")
    page.keyboard.press("Escape")
    assert current(page) == "root"
    for colour in ("balance", "quality", "rate", "coverage"):
        page.select_option("#colour", colour)
    for part in ("counts", "measures", "source-table", "settings-table", "audit-table"):
        assert page.locator(f"#{part}").count() == 1
    # Reasons stood to the right like numbers, cut off.
    assert page.evaluate("getComputedStyle(document.querySelector('#counts td.words')).textAlign") == "left"
    assert "near-duplicates" in page.inner_text("#counts") and "tokens in the loss" in page.inner_text("#counts")
    for i in range(3):
        page.locator("#audit-tabs button").nth(i).click()
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    assert page.errors == [] and page.requests == [(work / "report" / "index.html").as_uri()]


def test_own_counts_are_the_datasets_and_named_apart_from_counts_by_tag(work, open_page):
    page = open_page(work / "report" / "index.html")
    summary = json.loads((work / "report" / "summary.json").read_text(encoding="utf-8"))
    written = {dataset["name"]: dataset["instances"] for dataset in summary["blend"]["datasets"]}
    head = page.locator("#branches th").all_inner_texts()
    assert head[1].startswith("own: pool") and head[3].startswith("with a tag: pool")
    for cells in (row.locator("td").all_inner_texts() for row in page.locator("#branches tbody tr").all()):
        name = next(each for each in written if each.split("\u2028")[0].startswith(cells[0].split("\n")[0][:30]))
        assert int(cells[2]) == written[name]
    assert "dataset" in page.inner_text("#branches-note")


def test_the_search_goes_to_tags_texts_and_ids(work, open_page):
    page = open_page(work / "report" / "index.html")
    page.fill("#search", "HISTORY 3")
    assert page.locator("#found li:not(.heading)").count() == 1
    page.keyboard.press("Enter")
    assert current(page) == "history 3"
    articles = page.locator("#samples article")
    assert articles.count() and all("history 3" in text for text in articles.all_inner_texts())
    page.fill("#search", "Question 6?")
    assert "samples" in page.inner_text("#found .heading")
    page.keyboard.press("Enter")
    first = page.locator("#samples article").first
    assert "found" in first.get_attribute("class") and "Question 6?" in first.inner_text()
    page.fill("#search", "r102")
    page.locator("#found li:not(.heading)").last.click()
    assert current(page) != "history 3"
    page.fill("#search", "no such tag")
    assert "no tag, sample or id has this" in page.inner_text("#found")
    assert page.errors == []


def test_what_only_texts_have_dims_no_tag(work, open_page):
    """The whole tree turned pale, as none of its tags was found, and stayed so after the hit was gone to."""
    page = open_page(work / "report" / "index.html")
    page.fill("#search", "Question 6?")
    assert page.evaluate("matches") is None
    page.fill("#search", "history")
    assert page.evaluate("matches.size") > 1
    assert page.locator("#found li:not(.heading)").first.inner_text().split("\n")[-1].startswith("branch, ")


def test_no_part_of_the_tree_is_blank(work, open_page):
    """Children finer than half a pixel left a gap where a wider one came before them."""
    page = open_page(work / "report" / "index.html")
    blank = page.evaluate("""() => {
      const v = children[0][0], [wide, first, ...rest] = children[v], last = rest[0];
      const share = nodes.pool_share[v], fine = share / 4000;
      for (const v of rest) nodes.pool_share[v] = 0;
      children[v] = [wide, ...Array(1999).fill(first), last];
      nodes.pool_share[wide] = share / 2;
      nodes.pool_share[first] = nodes.pool_share[last] = fine;
      [left[wide], left[first], left[last]] = [left[v], left[v] + share / 2, left[v] + share - fine];
      draw();
      const scale = canvas.width / view.width, row = canvas.height / levels;
      const pixel = (part) => canvas.getContext("2d").getImageData((left[v] + part * share) * scale, 2.2 * row, 1, 1);
      return [0.25, 0.6, 0.75, 0.9].filter((part) => pixel(part).data.slice(0, 3).join() === "255,255,255");
    }""")
    assert blank == []


def test_no_tooltip_stays(work, open_page):
    """The tooltip stayed where the page scrolled away below it."""
    page = open_page(work / "report" / "index.html")

    def hover(canvas):
        page.locator(canvas).scroll_into_view_if_needed()
        box = page.locator(canvas).bounding_box()
        page.mouse.move(box["x"] + 30, box["y"] + 20)
        page.mouse.move(box["x"] + 40, box["y"] + box["height"] * 0.5)
        return page.locator("#tip")

    tip = hover("#icicle")
    assert tip.is_visible() and "instances of this branch selected" in tip.inner_text()
    page.mouse.wheel(0, 300)
    eventually(page, "document.getElementById('tip').hidden")
    for leave in (
        lambda: page.mouse.move(2, 2),
        lambda: page.keyboard.press("Escape"),
        lambda: page.mouse.down() or page.mouse.up(),
    ):
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(50)
        page.mouse.move(3, 3)
        assert hover("#icicle").is_visible()
        leave()
        assert tip.is_hidden()


def test_map_shows_groups_and_a_point_leads_to_its_sample(work, open_page):
    page = open_page(work / "report" / "index.html")
    page.locator("#points").scroll_into_view_if_needed()
    everything = int(page.get_attribute("#points", "data-drawn"))
    assert everything == 200 + 30
    page.uncheck("[data-layer=target]")
    eventually(page, "document.getElementById('points').dataset.drawn === '200'")
    page.uncheck("[data-layer=pool]")
    page.uncheck("[data-layer=other]")
    eventually(page, "document.getElementById('points').dataset.drawn === '40'")
    at = page.evaluate("(() => { const box = mapCanvas.getBoundingClientRect(), [x, y] = onScreen(150);"
                       " return [box.left + x, box.top + y]; })()")  # fmt: skip
    page.mouse.move(at[0] - 60, at[1])
    page.mouse.move(*at)
    name = page.evaluate(f"points.ids[pointAt({{clientX: {at[0]}, clientY: {at[1]}}})]")
    assert name[:20] in page.inner_text("#tip")
    page.mouse.click(*at)
    assert page.evaluate("points.ids[mark]") == name and current(page) != "root"
    before = page.evaluate("transform.k")
    page.locator("#points").hover()
    page.mouse.wheel(0, -400)
    eventually(page, f"transform.k > {before}")
    page.click("#map-reset")
    eventually(page, "transform.k === 1")
    assert page.errors == []


def test_the_list_of_a_branch_is_a_file_of_what_is_in_it(work, open_page):
    page = open_page(work / "report" / "index.html")
    page.fill("#search", "history 3")
    page.keyboard.press("Enter")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "history-3.jsonl"
    rows = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").split("\n") if line]
    assert rows and all("history 3" in row["tags"] for row in rows)
    node = page.evaluate("focus")
    assert len(rows) == page.evaluate(f"nodes.pool[{node}]")
    assert sum(row["selected"] for row in rows) == page.evaluate(f"nodes.selected[{node}]")


@pytest.mark.parametrize("quantity", ["coverage", "rate", "balance", "quality"])
def test_colours_do_not_saturate(quantity, work, open_page):
    """Most of a real tree had one of the two end colours: the scale is spread over the values' quantiles."""
    page = open_page(work / "report" / "index.html")
    skewed = "(values) => { for (const [name, column] of Object.entries(values)) nodes[name] = column; }"
    generator = np.random.default_rng(0)
    count = page.evaluate("total")
    pool = generator.integers(50, 100, count)
    # Nearly everything is nearly covered, and the rates differ by a factor of thousands.
    values = {
        "coverage": (1 - 10.0 ** -generator.uniform(2, 6, count)).tolist(),
        "pool": pool.tolist(), "selected": (pool * 10.0 ** -generator.uniform(0, 4, count)).tolist(),
        "pool_share": (pool / pool.sum()).tolist(),
        "selected_share": (10.0 ** generator.uniform(-6, -1, count)).tolist(),
        "selected_quality": (7 + generator.normal(0, 0.01, count)).tolist(),
    }  # fmt: skip
    page.evaluate(skewed, values)
    page.select_option("#colour", quantity)
    page.evaluate("makeRamp()")
    colours = page.evaluate(
        "Array.from({length: total}, (_, v) => quantity.value(v)).filter((x) => x !== null).map(ramp.colour)"
    )
    commonest = max(colours.count(colour) for colour in set(colours))
    assert len(set(colours)) > len(colours) / 2 and commonest <= max(2, len(colours) / 6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_part_fits_the_width(width, scheme, work, open_page):
    """Nothing sticks out at 800 pixels; SCREENSHOTS=DIR in the environment keeps what was looked at."""
    page = open_page(work / "report" / "index.html", width)
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("tree", "map", "comparison", "spread", "sources", "counts", "audit", "settings"):
        box = page.locator(f"#{part}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 20, part
    # The branches' shares, on the right, were cut off at 1280 pixels.
    scroll = page.evaluate("(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)(branches.parentElement)")
    assert scroll <= 0, scroll
    picture = page.screenshot(full_page=True)
    assert len(picture) > 50_000
    if "SCREENSHOTS" in os.environ:
        (Path(os.environ["SCREENSHOTS"]) / f"report_{width}_{scheme}.png").write_bytes(picture)


def full_size(folder: Path) -> None:
    """A work folder with 61,111 nodes and 200,000 instances, 5 % of them chosen."""
    generator = np.random.default_rng(0)
    sizes = np.array([1, 10, 100, 1000, 60_000])
    first = np.concatenate([[0], np.cumsum(sizes)])
    parent = np.concatenate(
        [[-1], *(first[d - 1] + np.sort(generator.integers(sizes[d - 1], size=sizes[d])) for d in range(1, 5))]
    )
    depth = np.repeat(np.arange(5), sizes)
    tag = np.where(depth == 4, np.arange(first[-1]) - first[4], -1)
    names = np.array([f"tag {v}" for v in range(first[-1])])
    write_arrays(
        folder / "tree.npz", parent=parent.astype(np.int32), depth=depth.astype(np.int16), name=names,
        tag=tag.astype(np.int32), count=np.ones(len(parent), np.int64),
    )  # fmt: skip
    np.save(folder / "embeddings.npy", generator.normal(size=(60_000, 4)).astype(np.float32))
    count = 200_000
    leaves = np.sort(first[4] + generator.integers(60_000, size=count * 4)).reshape(count, 4)
    scores = generator.integers(1, 11, count).astype(float)
    write_arrays(
        folder / "grounding.npz", record=np.arange(count), indptr=np.arange(0, 4 * count + 1, 4),
        leaves=leaves.ravel().astype(np.int32), quality=scores, difficulty=scores, length=np.full(count, 9),
    )  # fmt: skip
    write_jsonl(folder / "records.jsonl", ({"id": f"s/{i}", "source": "s", "text": f"text {i}"} for i in range(count)))
    write_jsonl(folder / "contaminated.jsonl", [])
    sample_step(folder, SampleSettings("5%", method="random"), show_progress=False)


def test_fifty_thousand_nodes_and_two_hundred_thousand_points_are_fluent(tmp_path, open_page):
    full_size(tmp_path)
    summary = report_step(tmp_path)
    assert (summary["nodes_shown"], summary["points_shown"]) == (50_000, 200_000)
    assert (tmp_path / "report" / "index.html").stat().st_size < 30e6
    page = open_page(tmp_path / "report" / "index.html")
    assert "the 50,000 largest of 61,111 nodes" in page.inner_text("#note")
    assert int(page.get_attribute("#icicle", "data-drawn")) > 1000
    assert int(page.get_attribute("#points", "data-drawn")) == 200_000
    page.evaluate("pointAt({clientX: 400, clientY: 400})")  # the index is built once
    timed = (
        "() => Math.min(...Array.from({length: 9}, () => { const start = performance.now(); %s; "
        "return performance.now() - start; }))"
    )
    actions = ("draw()", "drawMap()", "pointAt({clientX: 400, clientY: 400})")
    # The fastest of nine frames, milliseconds: other work on the machine must not decide.
    frame = {action: page.evaluate(timed % action) for action in actions}
    print(frame)
    assert max(frame.values()) < 100, frame
    page.fill("#search", "tag 57")
    assert page.locator("#found li:not(.heading)").count() == 50
    start = page.evaluate("performance.now()")
    page.keyboard.press("Enter")
    assert page.evaluate("performance.now()") - start < 3000
    assert page.errors == []
