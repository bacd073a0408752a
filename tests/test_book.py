"""The book: what stands on its pages, that they need no network, and that they are no wider than a phone."""

import base64
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import nbformat
import nbformat.v4 as nb
import pytest
from conftest import ROOT

from lib.files import write_json

BOOK = runpy.run_path(str(ROOT / "notebooks" / "book" / "build.py"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PNG = base64.b64encode(bytes.fromhex("89504e470d0a1a0a")).decode()
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="481.9pt" height="172.8pt" viewBox="0 0 481.9 172.8"></svg>'
WIDE = "".join(f"<td>{14 + i}.1 ± 1.0</td>" for i in range(30))
TABLE = f'<div><style scoped>td {{}}</style><table border="1" class="dataframe"><tr>{WIDE}</tr></table></div>'
TEXT = "The bias $b$ of [the next](05_tune_amu.ipynb#x) and [another](06_none.ipynb):\n\n$$ " + "s + " * 60 + "s $$"


def shown(kind: str, data: str) -> nbformat.NotebookNode:
    return nb.new_output("display_data", {kind: data, "text/plain": "?"})


def code(source: str, *outputs: nbformat.NotebookNode, tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    return nb.new_code_cell(source, outputs=list(outputs), execution_count=1, metadata={"tags": list(tags)})


def execute(folder: Path, name: str, title: str, finished: bool = True) -> None:
    """Leave in `folder` what a run of a small notebook leaves."""
    printed = f"{name} -> runs/{name}\n  dataset = 'shapes'\n72 classes & <more>\n"
    answer = "**Answer.** It *helps*." if finished else "*The answer appears here when the notebook has run.*"
    cells = [
        nb.new_markdown_cell(f"# {title}\n\n**Does a bias\nhelp?**\n\nIn this notebook we look."),
        code('dataset: str = "shapes"  # a name', tags=("parameters",)),
        code('dataset = "injected"', tags=("injected-parameters",)),
        code("run = start()", shown("text/markdown", answer), nb.new_output("stream", name="stdout", text=printed)),
        nb.new_markdown_cell(f"## How much?\n\n{TEXT}"),
        code('run.save_figure(fig, "gains")', shown("image/png", PNG), tags=("hide-input",)),
        code("display(table)\n" + "x" * 300, shown("text/html", TABLE)),
    ]
    if not finished:
        cells.insert(0, nb.new_markdown_cell("An exception", metadata={"tags": ["papermill-error-cell-tag"]}))
        cells.append(
            code("1 / 0", nb.new_output("error", ename="E", evalue="?", traceback=["\x1b[31mZeroDivisionError"]))
        )
    (folder / name / "figures").mkdir(parents=True)
    (folder / name / "figures" / f"{name[:2]}_gains.svg").write_text(SVG)
    nbformat.write(nb.new_notebook(cells=cells), folder / name / f"{name}.ipynb")
    record = {"notebook": name, "parameters": {"dataset": "shapes", "test": ""}, "commit": "abcdef0123+"}
    if finished:
        write_json(folder / name / "metrics.json", record | {"seconds": 12.3, "device": "cpu"})


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    execute(folder, "04_fuse", "4. Fuse")
    execute(folder, "05_tune_amu", "5. Tune AMU", finished=False)
    (folder / "gallery").mkdir()
    for stem in ("04_gains", "04_old", "speed"):
        (folder / "gallery" / f"{stem}.svg").write_text(SVG)
    write_json(folder / "gallery" / "index.json", {"speed": {"notebook": "bench", "commit": "fedcba9876"}})
    return BOOK["build"](folder, folder / "book", folder / "gallery").parent


def test_the_first_page_has_each_question_and_answer(book):
    page = (book / "index.html").read_text()
    assert '<a href="04_fuse.html">4. Fuse</a>' in page and "Does a bias help?" in page
    assert "<p>It <em>helps</em>.</p>" in page and "Answer." not in page
    assert "shapes, commit" in page and "12 s" in page
    assert page.count("This run did not finish") == 1 and "appears here" not in page
    log = (book / "05_tune_amu.html").read_text()
    assert (
        "<title>5. Tune AMU</title>" in log and "ZeroDivisionError</span>" in log and "This run did not finish" in log
    )


def test_code_is_folded_and_text_is_not(book):
    page = (book / "04_fuse.html").read_text()
    assert page.count('<details class="code">') == 3 and page.count('<details class="code hide">') == 1
    assert "open>" not in page and "injected" not in page
    assert "72 classes &amp; &lt;more&gt;" in page and "04_fuse -&gt;" not in page
    assert '<a rel="next" href="05_tune_amu.html">5. Tune AMU →</a>' in page and 'rel="prev"' not in page
    assert '<a href="05_tune_amu.html#x">the next</a> and another' in page


def test_figures_are_those_of_the_run_and_lead_to_its_record(book):
    page = (book / "04_fuse.html").read_text()
    assert '<img alt="How much?" height="288" src="figures/04_gains.svg" width="803"/>' in page
    assert (book / "figures" / "04_gains.svg").read_text() == SVG
    assert 'href="#run"' in page and 'title="abcdef0123+">abcdef0+<' in page
    assert "<dt>dataset</dt><dd>shapes</dd>" in page and "<dt>test</dt><dd>–</dd>" in page
    assert 'href="records/04_fuse.json"' in page and (book / "records" / "04_fuse.json").exists()


def test_the_gallery_names_the_notebook_that_draws(book):
    page = (book / "gallery.html").read_text()
    assert "<b>How much?</b><br>\n" in page and '<a href="04_fuse.html#04_gains">04_gains</a>' in page
    assert "<b>old</b>" in page and "<h2>bench</h2>" in page and "fedcba9" in page


def test_tables_scroll_inside_themselves(book):
    page = (book / "04_fuse.html").read_text()
    assert '<div class="scroll" role="region" tabindex="0"><table class="dataframe">' in page
    assert "14.1&nbsp;±&nbsp;1.0" in page and "<style" not in page
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", (book / "book.css").read_text())


def test_no_page_asks_for_anything_outside_the_book(book):
    pages = sorted(book.glob("*.html"))
    assert len(pages) == 4
    for page in pages:
        for address in re.findall(r'\b(?:src|href)="([^"#?]+)', page.read_text()):
            assert address.startswith("data:") or (book / address).is_file(), f"{page.name}: {address}"
    assert not re.search(r"https?:|@import|url\(", (book / "book.css").read_text())


def test_what_is_no_book_is_not_replaced(book, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        BOOK["build"](book.parent, tmp_path)
    with pytest.raises(ValueError, match="no executed notebook"):
        BOOK["build"](tmp_path, tmp_path / "book")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("name", ["index", "04_fuse", "gallery"])
def test_a_phone_needs_no_scrolling_aside(book, name, tmp_path):
    page = (book / f"{name}.html").read_text()
    told = '[innerWidth, document.documentElement.scrollWidth, document.querySelectorAll(".MathJax").length]'
    probe = f"<script>onload = () => MathJax.Hub.Queue(() => parent.postMessage({told}, '*'))</script>"
    path, inner = book / "phone.html", book / "inner.html"  # no window is narrower than 500 pixels, but a frame is
    inner.write_text(page.replace("</body>", f"{probe}</body>"))
    frame = "<iframe style='width: 400px; height: 900px; border: 0' src=inner.html></iframe>"
    path.write_text(f"<title>?</title><script>onmessage = (e) => document.title = e.data</script>{frame}")
    options = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=999,999 --virtual-time-budget=9000"
    command = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, env=environment)
    path.unlink()
    inner.unlink()
    formulas = {"index": 1, "04_fuse": 2, "gallery": 0}[name]
    assert re.findall("<title>(.*)</title>", done.stdout) == [f"400,400,{formulas}"], done.stderr
