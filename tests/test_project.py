"""What must hold of the files as a whole: the lock, the notebooks' form, nothing that points at one machine."""

import ast
import json
import re
import subprocess
import tomllib

import nbformat
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ORDER = [
    "drawing",
    "world",
    "images",
    "sources",
    "datasets",
    "recipes",
    "backbones",
    "objectives",
    "pretraining",
    "banks",
    "extraction",
    "imports",
    "features",
    "tasks",
    "fusion",
    "training",
    "convex",
    "predictors",
    "solved",
    "caches",
    "peers",
    "transductive",
    "methods",
    "scores",
    "metrics",
    "figures",
    "speed",
    "runs",
    "__main__",
]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_environment_and_lock_say_the_same():
    environment = (ROOT / "environment.yml").read_text()
    assert re.findall(r"^ +- (.*)$", environment, re.M)[-1] == "-r requirements.lock"
    assert "python=3.11" in environment


def test_the_lock_pins_every_direct_dependency():
    locked = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        requirement = Requirement(line.split("#")[0])
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), line
        locked.setdefault(requirement.name.lower().replace("_", "-"), []).append(requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    direct = project["project"]["dependencies"] + project["dependency-groups"]["test"]
    for text in direct:
        wanted = Requirement(text)
        for found in locked[wanted.name.lower().replace("_", "-")]:
            assert wanted.specifier.contains(str(found.specifier)[2:]), f"{text}, locked {found}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_lock_gives_each_platform_one_version_of_each_package(python, system):
    place = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": system}
    place |= {"platform_machine": "x86_64" if system == "linux" else "arm64", "implementation_name": "cpython"}
    seen = set()
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        requirement = Requirement(line.split("#")[0])
        if requirement.marker is None or requirement.marker.evaluate(place):
            assert requirement.name not in seen, line
            seen.add(requirement.name)
    assert {"torch", "open-clip-torch", "papermill", "snakemake", "pytest", "ruff"} <= seen


def test_nothing_names_a_package_index_or_a_path_of_one_machine():
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".png", ".safetensors", ".npz", ".pt") or name == "tests/test_project.py":
            continue
        text = path.read_text()
        assert not re.search(r"/simple\b|pypi\.|whl\.|(?<![\w.])/(work|root|home|tmp)/", text), name


def test_large_and_private_things_stay_out():
    names = tracked()
    assert not [name for name in names if name.startswith(("runs/", "data/cache", "data/downloads", ".venv"))]
    weights = sum((ROOT / name).stat().st_size for name in names if name.startswith("data/embedded/"))
    assert weights <= 16 * 2**20


def test_imports_point_one_way():
    for place, module in enumerate(ORDER):
        path = ROOT / "lib" / f"{module}.py"
        if not path.exists():
            continue
        for node in ast.parse(path.read_text()).body:  # imports at the top; a function may call on a later module
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "lib":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
                names = [node.module.removeprefix("lib.")]
            for name in names:
                assert ORDER.index(name) < place, f"lib/{module}.py imports {name}"
    assert {p.stem for p in (ROOT / "lib").glob("*.py")} <= {*ORDER, "__init__"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_their_form(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem)
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    assert "?" in book.cells[0].source, "the first cell asks one question"
    assert len(book.cells) <= 34
    tagged = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool) = .+  # .+", line), line
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "outputs are stripped"
            assert len(cell.source.splitlines()) <= 18, cell.source
            tree = ast.parse(cell.source)
            assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert "run.record(" in book.cells[-1].source or "run.record(" in book.cells[-2].source
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


def test_every_notebook_has_a_test_that_executes_it():
    text = (ROOT / "tests" / "test_notebooks.py").read_text()
    assert [p.stem for p in NOTEBOOKS if p.stem not in text] == []
