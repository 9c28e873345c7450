"""The report: right numbers, nothing from the pool acts as code, and a real browser shows, searches and zooms it."""

import json
import re
import shutil

import numpy as np
import pytest
from tag_pools import random_pool
from work_folder import TOPICS, make_work_folder, record

from megatron_ksa.data_tools.tags import report_page
from megatron_ksa.data_tools.tags.chat_template import EncodingSettings
from megatron_ksa.data_tools.tags.files import read_arrays, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.groups import GroupSettings
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.report import report_step
from megatron_ksa.data_tools.tags.report_data import choose_samples, largest_nodes, node_statistics, preorder
from megatron_ksa.data_tools.tags.report_page import json_block, node_columns
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import sample_step
from megatron_ksa.data_tools.tags.write import write_step

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>{{script}}\u2028$x_{"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def hostile_work_folder(folder):
    """A folder whose names, ids, sources and texts try to be markup, with a selection, a target and a blend."""
    make_work_folder(folder)
    arrays = read_arrays(folder / "tree.npz")
    arrays["name"] = np.array([*arrays["name"][:1], HOSTILE, *arrays["name"][2:]])
    write_arrays(folder / "tree.npz", **arrays)
    hostile = {"id": HOSTILE, "source": HOSTILE, "text": HOSTILE, "quality": None, "difficulty": None, "tags": None}
    write_jsonl(folder / "records.jsonl", (hostile if line % 4 == 0 else record(line) for line in range(400)))
    write_jsonl(folder / "rejected.jsonl", [{"origin": "x:1", "id": None, "reason": HOSTILE, "detail": ""}] * 3)
    write_jsonl(folder / "duplicates.jsonl", [{"id": "a", "kept": "b", "similarity": 0.9}])
    make_work_folder(folder / "target", instances=30, seed=2)
    sample_step(folder, SampleSettings("40"), target=folder / "target", show_progress=False)
    write_step(folder, GroupSettings(), EncodingSettings(str(folder / "tokenizer")), show_progress=False)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = hostile_work_folder(tmp_path_factory.mktemp("work"))
    report_step(folder, target=folder / "target")
    return folder


def test_statistics_are_those_of_a_count_by_hand():
    random = random_pool(4, instances=40, nodes=25)
    quality = np.where(np.arange(40) % 5 == 0, np.nan, np.arange(40.0))
    pool = Pool(random.indptr, random.leaves, quality, quality, random.parent, random.depth)
    chosen = np.array([3, 7, 20, 5])
    found = node_statistics(pool, chosen, pool.shares[30:])

    def below(node):
        return [v for v in range(25) if node in path(v)]

    def path(v):
        return [v] if pool.parent[v] < 0 else [v, *path(pool.parent[v])]

    tags = [random.leaves[random.indptr[i] : random.indptr[i + 1]] for i in range(40)]

    def mass(rows, nodes):
        return sum(np.isin(tags[i], nodes).sum() / len(tags[i]) for i in rows if len(tags[i]))

    covered = np.unique(np.concatenate([tags[i] for i in chosen]))
    for node in range(25):
        inside = below(node)
        having = [i for i in range(40) if np.isin(tags[i], inside).any()]
        assert found.pool[node] == len(having)
        assert found.selected[node] == len(set(having) & set(chosen))
        for share, rows in (
            (found.pool_share, range(40)),
            (found.selected_share, chosen),
            (found.target_share, range(30, 40)),
        ):
            assert share[node] == pytest.approx(mass(rows, inside) / mass(rows, range(25)))
        everything = mass(range(40), inside)
        expected = mass(range(40), np.intersect1d(inside, covered)) / everything if everything else np.nan
        assert found.coverage[node] == pytest.approx(expected, nan_ok=True)
        scores = [quality[i] for i in having if not np.isnan(quality[i])]
        assert found.pool_quality[node] == pytest.approx(np.mean(scores) if scores else np.nan, nan_ok=True)


def test_largest_nodes_keep_what_is_above_and_come_in_preorder(work):
    pool = load_pool(work)
    statistics = node_statistics(pool, np.arange(10))
    kept = largest_nodes(statistics.pool, pool.depth, 9)
    assert kept.sum() == 9 and all(kept[pool.parent[node]] for node in np.flatnonzero(kept) if node)
    order = preorder(pool.parent, kept, statistics.pool_share)
    assert sorted(order) == np.flatnonzero(kept).tolist() and order[0] == 0
    last = {}
    for node in order:
        above = pool.parent[node]
        assert node == 0 or above in last
        assert statistics.pool_share[node] <= last.get(above, np.inf)
        last[above], last[node] = statistics.pool_share[node], np.inf


def test_nodes_left_out_are_counted_where_they_hang(work, monkeypatch):
    monkeypatch.setattr(report_page, "MAX_NODES", 5)
    pool = load_pool(work)
    columns, place = node_columns(pool, node_statistics(pool, np.arange(10)))
    assert len(columns["parent"]) == 5 and place.min() == 0 and place.max() == 4
    assert columns["parent"][0] == -1 and all(0 <= up < i for i, up in enumerate(columns["parent"]) if i)


def test_samples_show_chosen_and_left_out_instances_of_every_tag(work):
    pool = load_pool(work)
    chosen = np.arange(0, 200, 4)
    rows, is_chosen = choose_samples(pool, chosen, 1000)
    np.testing.assert_array_equal(is_chosen, np.isin(rows, chosen))
    for group in (chosen, np.setdiff1d(np.arange(200), chosen)):
        shown = np.unique(pool.shares[np.intersect1d(rows, group)].indices)
        np.testing.assert_array_equal(shown, np.unique(pool.shares[group].indices))
    assert len(choose_samples(pool, chosen, 7)[0]) == 7


def test_summary_counts_everything_left_out(work):
    summary = json.loads((work / "report" / "summary.json").read_text(encoding="utf-8"))
    assert summary["left_out"] == {
        "rejected.jsonl": {HOSTILE: 3}, "duplicates.jsonl": {"near-duplicates": 1}, "blend/unwritten.jsonl": {},
    }  # fmt: skip
    assert [branch["name"] for branch in summary["branches"]][:1] == [HOSTILE]
    assert {branch["name"] for branch in summary["branches"]} == {HOSTILE, *TOPICS[1:]}
    assert sum(branch["selected_share"] for branch in summary["branches"]) == pytest.approx(1)
    assert summary["selection"]["instances"] == 40 and len(summary["blend"]["datasets"]) == 4
    assert (work / "report" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_page_needs_no_network_and_holds_no_foreign_markup(work):
    page = (work / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    own = re.sub(r'(<script type="application/json" id="data">).*?</script>', r"\1", page, flags=re.DOTALL)
    assert len(own) < len(page) and not re.search(r"(?:src|href)\s*=|@import|url\(|fetch\(|innerHTML|https?://", own)
    assert json.loads(json_block({"a": HOSTILE})) == {"a": HOSTILE}
    assert not set("<>&\u2028") & set(json_block({HOSTILE: HOSTILE}))


def test_same_bytes_again(work):
    names = ("index.html", "overview.png", "summary.json")
    before = [(work / "report" / name).read_bytes() for name in names]
    report_step(work, target=work / "target")
    assert [(work / "report" / name).read_bytes() for name in names] == before


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


@pytest.fixture
def open_page(browser):
    """Opens a file, offline, and collects errors and requests; the page must be ready."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, reduced_motion="reduce")

    def load(path):
        page = context.new_page()
        page.errors, page.requests = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=true]")
        return page

    yield load
    context.close()


def test_browser_shows_searches_zooms_and_runs_nothing_of_the_pool(work, open_page):
    page = open_page(work / "report" / "index.html")
    assert "40 of 200 instances" in page.inner_text("#facts") and "nats" in page.inner_text("#facts")
    rows = page.locator("#branches tbody tr")
    assert rows.count() == 4 and rows.nth(0).inner_text().startswith(HOSTILE[:40])
    assert "target" in page.inner_text("#branches thead")
    assert int(page.get_attribute("#icicle", "data-drawn")) == 25
    box = page.locator("#icicle").bounding_box()
    # The second level from the top starts with the largest branch.
    page.mouse.click(box["x"] + 20, box["y"] + box["height"] * 0.5)
    assert page.inner_text("#path button[aria-current]") == HOSTILE
    assert page.locator("#branches tbody tr").count() == 5
    assert page.locator("#samples article").count() > 3
    assert "</script>" in page.inner_text("#samples") and "selected" in page.inner_text("#samples")
    page.focus("#icicle")
    page.keyboard.press("Escape")
    assert page.inner_text("#path button[aria-current]") == "root"
    page.fill("#search", "HISTORY 3")
    assert page.locator("#found li").count() == 1
    page.keyboard.press("Enter")
    assert page.inner_text("#path button[aria-current]") == "history 3"
    articles = page.locator("#samples article")
    assert articles.count() and all("history 3" in text for text in articles.all_inner_texts())
    page.fill("#search", "no such tag")
    assert "no tag has this" in page.inner_text("#found")
    for colour in ("balance", "quality", "coverage"):
        page.select_option("#colour", colour)
    assert "near-duplicates" in page.inner_text("#counts") and "tokens in the loss" in page.inner_text("#counts")
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    assert page.errors == [] and page.requests == [(work / "report" / "index.html").as_uri()]


def test_browser_colours_by_coverage(work, open_page):
    """A branch with nothing chosen is dark, one with everything chosen is light, to the pixel."""
    page = open_page(work / "report" / "index.html")
    columns = node_columns(load_pool(work), _everything_or_nothing(work))[0]
    pixel = "(at) => [...canvas.getContext('2d').getImageData(at[0], at[1], 1, 1).data].slice(0, 3)"
    values = columns["coverage"]
    page.evaluate("(values) => { nodes.coverage = values; draw(); }", values)
    width, height = page.evaluate("[canvas.width, canvas.height]")
    second = columns["pool_share"][1] * width
    assert page.evaluate(pixel, [int(second - 6), int(height * 0.34 + 3)]) == [253, 231, 37]
    assert page.evaluate(pixel, [int(second + 6), int(height * 0.34 + 3)]) == [68, 1, 84]


def _everything_or_nothing(work):
    pool = load_pool(work)
    topic = pool.parent[pool.leaves[pool.indptr[:-1]]]
    return node_statistics(pool, np.flatnonzero(topic == 1))


def test_browser_shows_fifty_thousand_nodes(tmp_path, open_page):
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
        tmp_path / "tree.npz",
        parent=parent.astype(np.int32),
        depth=depth.astype(np.int16),
        name=names,
        tag=tag.astype(np.int32),
        count=np.ones(len(parent), np.int64),
    )
    np.save(tmp_path / "embeddings.npy", generator.normal(size=(60_000, 4)).astype(np.float32))
    leaves = np.sort(first[4] + generator.choice(60_000, 40_000 * 4)).reshape(40_000, 4)
    scores = generator.integers(1, 11, 40_000).astype(float)
    write_arrays(
        tmp_path / "grounding.npz", record=np.arange(40_000),
        indptr=np.arange(0, 160_001, 4), leaves=leaves.ravel().astype(np.int32),
        quality=scores, difficulty=scores, length=np.full(40_000, 9),
    )  # fmt: skip
    write_jsonl(tmp_path / "records.jsonl", ({"id": str(i), "source": "s", "text": f"text {i}"} for i in range(40_000)))
    sample_step(tmp_path, SampleSettings("5%"), show_progress=False)
    assert report_step(tmp_path)["nodes_shown"] == 50_000
    assert (tmp_path / "report" / "index.html").stat().st_size < 20e6
    page = open_page(tmp_path / "report" / "index.html")
    assert "the 50,000 largest of 61,111 nodes" in page.inner_text("#note")
    assert int(page.get_attribute("#icicle", "data-drawn")) > 1000
    page.fill("#search", "tag 57")
    assert page.locator("#found li").count() == 51
    milliseconds = page.evaluate("() => { const start = performance.now(); draw(); return performance.now() - start; }")
    assert milliseconds < 1000
    assert page.errors == []
