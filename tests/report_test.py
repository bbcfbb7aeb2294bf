"""What a run leaves to look at: the lines at its end, and a page that needs nothing from outside."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
import tiny

from train import loop, report

METRICS = [
    {"step": 0, "heldout_loss": 3.0, "exact_match": 0.0, "heldout_loss/dev": 4.0},
    {"step": 1, "loss": 2.0, "learning_rate": 0.1, "tokens": 10, "tokens_per_second": 1.0, "input_share": 1.0},
    {"step": 1, "heldout_loss": 0.5, "exact_match": 0.5, "heldout_loss/dev": 2.5},
    {"step": 2, "loss": 1.5, "learning_rate": 0.1, "tokens": 10, "tokens_per_second": 10.0, "input_share": 0.5},
    {"step": 3, "skipped": 1, "learning_rate": 0.1, "tokens": 10, "tokens_per_second": 10.0, "input_share": 0.0},
    {"step": 3, "heldout_loss": 1.0, "exact_match": 0.75, "heldout_loss/dev": 3.0},
]


@pytest.fixture
def folder(tmp_path):
    config = {"steps": 3, "eval": {"best": "heldout_loss", "higher": False, "patience": 2}, "model": "<b>bold</b>"}
    loop.begin(tmp_path, config, "7 targets & <script>alert(1)</script>")
    samples = [
        {"step": step, "question": "1 | 1", "expected": "<i>2</i>", "said": said} for step, said in enumerate("abcd")
    ]
    for name, lines in ((loop.METRICS, METRICS), (loop.SAMPLES, samples)):
        tiny.write_jsonl(tmp_path / name, lines)
    return tmp_path


def test_the_last_lines(folder, capsys):
    report.close(folder, "sums")
    said = capsys.readouterr().out.splitlines()
    assert said[-6:] == [
        "waited for input 25.0% of the time",  # the step that compiles left out
        "1 steps skipped",
        "best held-out loss 0.5000 at step 1, kept in checkpoints/1",
        "held-out loss 3.0000 -> 1.0000",
        "exact match 0.0% -> 75.0%",
        "held-out loss/dev 4.0000 -> 3.0000",
    ]
    text = (folder / "report.md").read_text()
    assert "| 1 \\| 1 | <i>2</i> | a | d |" in text and "exact match 0.0% -> 75.0%" in text
    for name in ("loss.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_an_early_end_is_told(folder, capsys):
    config = json.loads((folder / loop.CONFIG).read_text()) | {"steps": 9}
    (folder / loop.CONFIG).write_text(json.dumps(config))
    report.close(folder, "sums")
    assert "ended at step 3 of 9: 2 evaluations were no better" in capsys.readouterr().out


class Page(html.parser.HTMLParser):
    """Collects what a page is made of, and what it would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.texts, self.open = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open += [tag] if tag not in ("meta", "path", "use") else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.links += [url for _, value in attrs for url in re.findall(r"url\((.*?)\)", value or "")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_refers_to_nothing_outside_and_runs_nothing(folder):
    report.close(folder, "sums <1>")
    source = (folder / report.PAGE).read_text()
    page = Page()
    page.feed(source)
    assert not page.open
    assert page.links and all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object", "b", "i"} & page.tags
    assert not re.search(r"@import|url\((?!#)", source)
    text = " ".join(" ".join(page.texts).split())
    for word in (
        "sums <1>",
        "7 targets & <script>alert(1)</script>",
        "<i>2</i>",
        "<b>bold</b>",
        "exact match 0.0% -> 75.0%",
    ):
        assert word in text
    for title in ("loss", "exact match", "learning rate", "tokens per second", "input share"):
        assert title in page.texts, title  # the panels' titles are text in the picture


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_browser_shows_it(folder, tmp_path):
    report.close(folder, "sums")
    shot, flags = tmp_path / "page.png", ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400"]
    page = f"file://{folder / report.PAGE}"
    subprocess.run(["chromium", *flags, f"--screenshot={shot}", page], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 10_000
    dom = subprocess.run(
        ["chromium", *flags, "--dump-dom", page], check=True, capture_output=True, text=True, timeout=120
    )
    assert "held-out loss 3.0000 -&gt; 1.0000" in dom.stdout and "<svg" in dom.stdout
