"""The book: the executed notebooks of a run and the gallery, as static pages that read offline.

    python notebooks/book/build.py [RUNS [BOOK]]

RUNS holds a folder per notebook, as `make run` leaves them, or is the folder of one run (default: runs); the book goes
to RUNS/book.
"""

import re
import shutil
import sys
from pathlib import Path

import jupyter_server_mathjax
import nbformat
from nbconvert import HTMLExporter

from lib import runs
from lib.files import ROOT

HERE = Path(__file__).parent
MATHJAX = Path(jupyter_server_mathjax.__file__).parent / "static"
UNUSED = shutil.ignore_patterns("mathmaps", "localization", "SVG", "MathML", "HTML-CSS-images")  # of MathJax's 12 MB
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill wrote
SCALE = 5 / 3  # pixels of a page for a point of paper: a figure of a page's width, 482 points, fills the column


def find(folder: Path) -> list[Path]:
    """Executed notebooks of a folder of runs, or of one run."""
    executed = [path for path in folder.glob("*/*.ipynb") if path.stem == path.parent.name] or folder.glob("*.ipynb")
    if executed := sorted(executed, key=lambda path: path.name):
        return executed
    raise ValueError(f"no executed notebook in {folder}: `make run` first, or name a folder of runs")


def read(path: Path) -> dict:
    """One page as the templates want it: title, question, answer, the cells that remain, figures, and the run's record.

    The answer is the first text shown above the first section, or else the notebook's last. Pictures that the run also
    saved are shown from there.
    """
    book = nbformat.read(path, as_version=4)
    first, *cells = (cell for cell in book.cells if not ADDED.intersection(cell.metadata.get("tags", [])))
    record = runs.read_json(path.with_name("metrics.json")) if path.with_name("metrics.json").exists() else None
    page = {"name": path.stem, "record": record, "intro": first.source, "figures": {}, "answer": ""}
    page["title"] = first.source.splitlines()[0].lstrip("# ")
    page["question"] = " ".join((re.findall(r"\*\*(.+?)\*\*", first.source, re.S) or [""])[0].split())
    heading = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^## (.+)", cell.source, re.M) or [heading])[-1]
            continue
        for output in [*cell.get("outputs", [])]:
            if output.output_type == "stream":  # what runs.start prints stands in the page's record
                output.text = re.sub(rf"^{path.stem} -> .*\n(  \w+ = .*\n)*", "", output.text)
            elif not heading and not page["answer"] and "text/markdown" in output.get("data", {}):
                page["answer"] = output.data["text/markdown"]
                cell.outputs.remove(output)
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        names = re.findall(r'save_figure\(\s*\w+,\s*"(\w+)"', cell.source)
        for name, output in zip(names, pictures, strict=False) if len(names) == len(pictures) else ():
            saved = [*path.parent.glob(f"[fo][iw][gn]*/{path.stem[:2]}_{name}.[sp][vn]g")]
            if saved:  # the svg, where there is one
                output.metadata["book"] = page["figures"][saved[0].stem] = figure(max(saved), heading)
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    texts = [data["text/markdown"] for data in outputs if "text/markdown" in data]
    answer = page["answer"] or (texts or [""])[-1]
    page["answer"] = re.sub(r"^\*\*Answer\.\*\*\s*", "", answer) if record else ""
    book.cells = cells
    return page | {"cells": book}


def figure(path: Path, caption: str) -> dict:
    """A saved figure with its caption and, for an svg, its size in the page's pixels."""
    size = re.findall(rb'(?:width|height)="([\d.]+)pt"', path.read_bytes()[:1000]) if path.suffix == ".svg" else []
    size = [round(SCALE * float(points)) for points in size]
    return {"path": path, "stem": path.stem, "caption": caption, "size": size}


def gallery(folder: Path, pages: list[dict]) -> list[dict]:
    """The gallery's figures, each with its entry of `index.json` and the section of this book that draws it."""
    index = runs.read_json(folder / "index.json") if (folder / "index.json").exists() else {}
    drawings = []
    for path in sorted(folder.glob("*.svg")):
        page = next((page for page in pages if page["name"][:2] == path.stem[:2]), None)
        source = index.get(path.stem, {"notebook": path.stem[:2], "commit": ""})
        drawing = page["figures"].get(path.stem) if page else None
        caption = drawing["caption"] if drawing else re.sub(r"^\d+_", "", path.stem).replace("_", " ")
        about = {"page": page, "group": page["name"] if page else source["notebook"], "commit": source["commit"]}
        drawings.append(figure(path, caption) | about | {"drawn": drawing is not None})
    return drawings


def polish(html: str, names: set[str]) -> str:
    """A page whose tables scroll inside themselves and whose links lead to pages of the book, or are plain words."""
    html = re.sub(r"<style scoped.*?</style>", "", html, flags=re.S).replace('<table border="1" ', "<table ")

    def table(match: re.Match) -> str:  # 14.1 ± 1.0 is one word
        return f'<div class="scroll" role="region" tabindex="0">{match[0].replace(" ± ", "&nbsp;±&nbsp;")}</div>'

    def link(match: re.Match) -> str:
        name, anchor, words = match.groups()
        return f'<a href="{name}.html{anchor}">{words}</a>' if name in names else words

    html = re.sub(r"<table.*?</table>", table, html, flags=re.S)
    return re.sub(r'<a href="(?:[^"]*/)?(\w+)\.ipynb(#[^"]*|)">(.*?)</a>', link, html, flags=re.S)


def build(folder: Path, out: Path, figures: Path = ROOT / "figures") -> Path:
    """Path of the book's first page, made from the runs below `folder`; an older book in `out` is replaced."""
    if out.exists() and any(out.iterdir()) and not (out / "book.css").exists():
        raise ValueError(f"{out} holds something else than a book: name another folder")
    pages = [read(path) for path in find(folder)]
    drawings = gallery(figures, pages)
    shutil.rmtree(out, ignore_errors=True)
    for name in ("figures", "gallery", "records"):
        (out / name).mkdir(parents=True)
    shutil.copytree(MATHJAX, out / "mathjax", ignore=UNUSED)
    shutil.copy(HERE / "book.css", out)
    exporter = HTMLExporter(extra_template_paths=[str(HERE)], template_file="cells.html.j2")
    names = {page["name"] for page in pages}

    def write(name: str, template: str, **values: object) -> Path:
        html = exporter.environment.get_template(template).render(pages=pages, gallery=drawings, here=name, **values)
        (out / f"{name}.html").write_text(polish(html, names), encoding="utf-8")
        return out / f"{name}.html"

    for drawing in drawings:
        shutil.copy(drawing["path"], out / "gallery")
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None], strict=False):
        for drawing in page["figures"].values():
            shutil.copy(drawing["path"], out / "figures")
        if page["record"]:
            runs.write_json(out / "records" / f"{page['name']}.json", page["record"])
        body, _ = exporter.from_notebook_node(page["cells"], resources={"page": page})
        sections = re.findall(r'<h2 id="([^"]*)">(.*?)<a class="anchor-link"', body)
        write(page["name"], "page.html.j2", page=page, body=body, sections=sections, before=before, after=after)
    write("gallery", "gallery.html.j2") if drawings else None
    return write("index", "contents.html.j2")


if __name__ == "__main__":
    folders = [Path(text) for text in sys.argv[1:]] or [Path("runs")]
    try:
        print(f"the book: {build(folders[0], folders[1] if folders[1:] else folders[0] / 'book')}")
    except ValueError as error:
        sys.exit(f"error: {error}")
