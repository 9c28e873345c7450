"""The page of attention on summaries: its numbers, and what a browser shows."""

import shutil
from pathlib import Path

import pytest
import torch
from single_process import build_model, random_tokens
from warm import Done, run_script

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.data_tools.tokenizers import write_byte_level
from megatron_ksa.evaluation.summary_attention import summary_attention
from megatron_ksa.evaluation.summary_page import render
from megatron_ksa.huggingface.importer import import_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "ksa_hf_tiny"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TEXT = (
    "The key of the blue door is under the third stone. " * 6
    + "Where is the key of the blue door? <script>alert(1)</script>"
)
PATTERN = "klkf"


@pytest.fixture(scope="module")
def attention():
    ksa = KSAConfig(enabled=True, chunk_size=4, summary_tokens=2, window_chunks="1", layer_pattern=PATTERN)
    model = build_model(ksa).eval()
    model.measure_attention_share(True)
    found = summary_attention(model, ksa.layers(4, 48), random_tokens(1, 48)[0])
    return found, [share.item() for core in model.summary_cores() for share in core.shares]


def test_shares_add_up_to_the_logged_ones(attention):
    """Chunk by chunk and head by head here, by the kernel with values of 0 and 1 there."""
    found, logged = attention
    assert [layer.kind for layer in found] == list(PATTERN)
    assert [layer.summaries is None for layer in found] == [False, True, False, True]
    got = [layer.summaries.sum(-1).mean().item() for layer in found if layer.summaries is not None]
    assert got == pytest.approx(logged, rel=1e-5)
    for layer in (found[0], found[2]):
        chunks = torch.arange(12)
        seen = chunks[:, None] - chunks > 1
        assert (layer.summaries[:, ~seen] == 0).all() and (layer.summaries[:, seen] > 0).all()


def inspect(folder: Path, output: str, *flags: object) -> Done:
    return run_script(
        "tools/inspect_summaries.py", "--load", folder / "megatron", "--text", folder / "text.txt",
        "--tokenizer-model", folder / "tokenizer", "--output", folder / output, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory, megatron_flags) -> Path:
    """The page that the command makes of a released checkpoint."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "megatron").mkdir()
    import_checkpoint(GOLDEN, folder / "megatron")
    write_byte_level(folder / "tokenizer")
    (folder / "text.txt").write_text(TEXT)
    done = inspect(folder, "page.html")
    assert done.returncode == 0, done.stderr
    return folder / "page.html"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "/nowhere.txt"], "--text /nowhere.txt"),
        (["--output", "page.txt"], "an .html file in a folder that exists"),
        (["--max-tokens", "0"], "--max-tokens 0: from 1 to"),
        (["--max-tokens", "32"], "no summary is seen; more than 40 are needed"),
    ],
)
def test_bad_input(flags, message, page):
    folder = page.parent
    done = inspect(folder, "other.html", *flags)
    assert done.returncode == 2 and message in done.stderr and not (folder / "other.html").exists()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to look at the page")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser to look at the page with: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_in_a_browser(browser, page, tmp_path):
    """Offline: choose a chunk, a layer and a head; hover; no errors, no requests, nothing of the text runs."""
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
    tab.on("dialog", lambda dialog: problems.append("dialog"))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    spans = tab.locator("#text span")
    assert "".join(spans.all_text_contents()) == TEXT[: len(TEXT) // 8 * 8]
    last = spans.count() - 1
    assert "chosen" in spans.nth(last).get_attribute("class")
    weights = [
        float(value) for value in tab.eval_on_selector_all("#text span", "all => all.map(s => s.dataset.weight)")
    ]
    # A window of 4 chunks: those are seen as text, all before as summaries.
    assert min(weights[: last - 4]) > 0 and max(weights[last - 4 :]) == 0
    spans.nth(20).click()
    assert "Chunk 21 of" in tab.inner_text("#chosen")
    assert float(spans.nth(30).get_attribute("data-weight")) == 0 and "later" in spans.nth(30).get_attribute("class")
    tab.select_option("#layer", value="3")
    tab.select_option("#head", value="1")
    assert "layer 3, head 2" in tab.inner_text("#chosen")
    tab.locator("#grid button").nth(1).click()
    assert "layer 1, head 2" in tab.inner_text("#chosen")
    spans.nth(3).hover()
    assert "of the attention goes to its summaries" in tab.inner_text("#tip")
    shares = tab.locator(".share").first.locator("span")
    widths = shares.evaluate_all("all => all.map(s => parseFloat(s.style.width))")
    assert sum(widths) == pytest.approx(100, abs=0.01) and min(widths) > 0
    tab.screenshot(path=str(tmp_path / "page.png"))
    assert not problems, problems


def test_the_page_holds_the_numbers(attention, browser, tmp_path):
    """The share that the page shows is the model's, up to its 8 bits."""
    found, _ = attention
    (tmp_path / "page.html").write_text(render("numbers", [f"<{i}>" for i in range(12)], found, []))
    tab = browser.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.select_option("#layer", value="3")
    tab.select_option("#head", value="2")
    tab.locator("#text span").nth(9).click()
    shown = [float(v) for v in tab.eval_on_selector_all("#text span", "all => all.map(s => s.dataset.weight)")]
    assert shown == pytest.approx(found[2].summaries[2, 9].tolist(), abs=0.004)
