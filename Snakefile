# The workbook as a graph of papermill runs. A run is a folder; it is done when its metrics.json is there.
#
#   snakemake --cores 2                                             the embedded default
#   snakemake --cores 2 --config dataset=digits out=runs/digits     another data set, in a folder of its own
#   snakemake --profile PROFILE                                     the same graph on SLURM or Kubernetes

from snakemake.exceptions import WorkflowError

PASSED = ("dataset", "datasets", "clip", "aux", "shots", "seeds")  # to every notebook that has a parameter of the name
SETTINGS = ({"datasets": config["dataset"]} if "dataset" in config else {}) | dict(config)  # the benchmark takes several
OUT = str(SETTINGS.pop("out", "runs"))
if mistyped := [name for name in SETTINGS if name not in PASSED]:
    raise WorkflowError(f"--config has no {', '.join(mistyped)}; known: out, {', '.join(PASSED)}")
if SETTINGS and Path(OUT) == Path("runs"):
    raise WorkflowError("runs/ is for the default parameters: give these settings a folder, --config out=runs/NAME")
if set(OUT) & set("{}"):
    raise WorkflowError(f"out={OUT}: braces are snakemake's wildcards")
GIVEN = [word for name, value in SETTINGS.items() for word in ("-p", name, str(value))]
RUN = [sys.executable, "-m", "lib", "run", "--lenient"]
LIBRARY = sorted(map(str, Path("lib").rglob("*.py")))
WORLD = ["data/benchmarks.json", *(f"data/embedded/{name}" for name in ("index.json", "world.py", "draw.py", "render.py"))]
WORLD += sorted(map(str, Path("data/embedded").glob("*.safetensors")))
FIRST, *NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))  # the first fills the feature cache


rule all:
    input:
        [f"{OUT}/{name}/metrics.json" for name in (FIRST, *NOTEBOOKS)],


rule first:
    input:
        f"notebooks/{FIRST}.ipynb",
        LIBRARY,
        WORLD,
    output:
        f"{OUT}/{FIRST}/metrics.json",
    params:
        command=lambda wildcards: [*RUN, FIRST, "--folder", f"{OUT}/{FIRST}", *GIVEN],
    shell:
        "{params.command:q}"


rule notebook:
    input:
        "notebooks/{notebook}.ipynb",
        LIBRARY,
        f"{OUT}/{FIRST}/metrics.json",
        "data/published.csv",
    output:
        f"{OUT}/{{notebook}}/metrics.json",
    wildcard_constraints:
        notebook="|".join(NOTEBOOKS),
    params:
        command=lambda wildcards: [*RUN, wildcards.notebook, "--folder", f"{OUT}/{wildcards.notebook}", *GIVEN],
    shell:
        "{params.command:q}"
