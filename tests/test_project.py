"""What must hold of the files as a whole: the lock, the notebooks' form, nothing that points at one machine."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A module may import those before it, and nothing else of lib.
ORDER = [
    "files",
    "features.images",
    "features.sources",
    "features.datasets",
    "features.libraries",
    "features.encoders",
    "features.extraction",
    "features.banks",
    "features.load",
    "features.survey",
    "features",
    "splits",
    "tasks",
    "stress",
    "metrics",
    "statistics",
    "fusion",
    "scores.table",
    "scores.confidence",
    "scores.unknown",
    "scores.estimation",
    "scores",
    "predictors.training",
    "predictors.convex",
    "predictors.base",
    "predictors.heads",
    "predictors.caches",
    "predictors.text",
    "predictors.prompts",
    "predictors.online",
    "predictors.transductive",
    "predictors",
    "saved",
    "methods",
    "advice",
    "predict",
    "figures",
    "runs",
    "records",
    "sweeps",
    "__main__",
]
READ_FIRST = ("tasks", "fusion", "methods", "predictors.base", "predictors.training", "predictors.heads")
TOOLS = {  # run beside the library, imported nowhere; pyarrow: by pandas
    "ipykernel",
    "jupyterlab",
    "pyarrow",
    "snakemake",
    "snakemake-executor-plugin-kubernetes",
    "snakemake-executor-plugin-slurm",
}
TEST_TOOLS = {
    "nbstripout",
    "ruff",
    "pytest-xdist",
    "beartype",
}  # commands, and the checker that conftest names in a string


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


def imported(source: str) -> list[tuple[str, str]]:
    """Return what a source imports anywhere, functions included: module and name, or module and ``."""
    pairs = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            pairs += [(node.module, alias.name) for alias in node.names]
    return pairs


def name_of(path: Path) -> str:
    """Return a module's dotted name inside lib; a package's own is that of its folder."""
    return ".".join(path.relative_to(ROOT / "lib").with_suffix("").parts).removesuffix(".__init__")


LIB = {name_of(path): path for path in sorted((ROOT / "lib").rglob("*.py")) if path != ROOT / "lib" / "__init__.py"}


def test_every_module_has_its_place():
    assert sorted(LIB) == sorted(ORDER)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted(".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "lib").rglob("__init__.py"))


@pytest.mark.parametrize("name", LIB)
def test_imports_point_one_way(name):
    for module, attribute in imported(LIB[name].read_text()):
        if module.split(".")[0] != "lib":
            continue
        inner = f"{module}.{attribute}".removeprefix("lib.").removeprefix("lib")
        target = inner if inner in LIB else module.removeprefix("lib.")
        assert ORDER.index(target) < ORDER.index(name), f"lib.{name} imports lib.{target}"
        assert not (name.startswith("predictors") and target.startswith("features")), "predictors know no files"


def test_lib_imports_no_script_of_data():
    scripts = {path.stem for path in (ROOT / "data").rglob("*.py") if "downloads" not in path.parts}
    assert scripts
    for name, path in LIB.items():
        tops = {module.split(".")[0] for module, _ in imported(path.read_text())}
        assert not tops & scripts, f"lib.{name} imports {tops & scripts}"


def test_lib_stays_thin():
    lines = {name: len(path.read_text().splitlines()) for name, path in LIB.items()}
    assert sum(lines.values()) < 7400
    assert {name: count for name, count in lines.items() if count > 330} == {}
    assert sum(lines[name] for name in READ_FIRST) < 1500


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {Requirement(text).name.lower().replace("_", "-") for text in project["project"]["dependencies"]}
    for_tests = {Requirement(text).name.lower().replace("_", "-") for text in project["dependency-groups"]["test"]}
    providers = {top: {n.lower().replace("_", "-") for n in names} for top, names in packages_distributions().items()}
    mine = {path.stem for name in tracked() if (path := ROOT / name).suffix == ".py"} | {"lib"}

    def needed(sources: Iterable[str]) -> set[str]:
        tops = {module.split(".")[0] for source in sources for module, _ in imported(source)}
        outside = tops - mine - sys.stdlib_module_names
        assert outside <= set(providers), f"not installed: {outside - set(providers)}"
        return {min(providers[top] & (declared | for_tests) or providers[top]) for top in outside}

    paths = [ROOT / name for name in tracked() if name.endswith(".py")]
    by_library = [path.read_text() for path in paths if path.relative_to(ROOT).parts[0] in ("lib", "data", "notebooks")]
    cells = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    used = needed(by_library + [re.sub(r"^[%!].*$", "", cell, flags=re.M) for cell in cells])
    assert used - declared == set(), "imported, not declared"
    assert declared - used == TOOLS, "declared, not imported"
    by_tests = needed(path.read_text() for path in paths if path.relative_to(ROOT).parts[0] == "tests") - declared
    assert by_tests == for_tests - TEST_TOOLS


def snakemake(*config: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", "--cores", "1", "--config", *config]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_settings_reach_the_shell_as_words(tmp_path):
    dataset, out = "folder:a 'b' {c} || touch pwned", str(tmp_path / "it's here")
    done = snakemake(f"dataset={json.dumps(dataset)}", f"out={out}")
    assert done.returncode == 0, done.stderr
    commands = [line.removeprefix("Shell command: ") for line in (done.stdout + done.stderr).splitlines()]
    commands = [shlex.split(line) for line in commands if " -m lib run " in line]
    assert len(commands) == len([path for path in NOTEBOOKS if path.stem < "90"])
    for words in commands:
        given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
        assert given == {"dataset": dataset, "datasets": dataset}
        assert words[words.index("--folder") + 1].startswith(f"{out}/") and "||" not in words
    assert "lib/features/load.py" in done.stdout + done.stderr, "sub-packages are followed"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (["datset=digits", "out=runs/x"], "no datset; known: out, dataset"),
        (["dataset=digits"], "give these settings a folder"),
        (["out=a{b}"], "braces"),
        (["blocks=[{notebook: 05_tune_amu}]"], "give these settings a folder"),
        (["blocks=[{notebook: 05_tune}]", "out=runs/x"], "no notebook '05_tune'; did you mean '05_tune_amu'"),
    ],
)
def test_mistyped_settings_are_refused(config, message):
    done = snakemake(*config)
    assert done.returncode != 0 and message in done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_their_form(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem)
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    assert "?" in book.cells[0].source, "the first cell asks one question"
    assert len(book.cells) <= 30
    assert max(len(line) for cell in book.cells for line in cell.source.splitlines()) <= 120
    tagged = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool) = .+  # .+", line), line
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "outputs are stripped"
            assert len(cell.source.splitlines()) <= (20 if cell in tagged else 15), cell.source
            tree = ast.parse(cell.source)
            assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    codes = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert "answer = display(" in codes[1], "the answer stands above the first section"
    assert any("answer.update(" in source for source in codes[-2:])
    assert "run.record(" in codes[-1]
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


BANNED = {"found", "known", "told", "shown", "said", "given"}  # a variable is named for what it holds


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted((ROOT / "lib").rglob("*.py"))], ids=lambda p: p.stem)
def test_variables_say_what_they_hold(path):
    cells = nbformat.read(path, as_version=4).cells if path.suffix == ".ipynb" else []
    sources = [cell.source for cell in cells if cell.cell_type == "code"] or [path.read_text()]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    assert [node.id for node in nodes if isinstance(node.ctx, ast.Store) and node.id in BANNED] == []


def test_every_notebook_has_a_test_that_executes_it():
    text = (ROOT / "tests" / "test_notebooks.py").read_text()
    assert [p.stem for p in NOTEBOOKS if p.stem not in text] == []
