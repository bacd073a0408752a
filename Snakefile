# The workbook as a graph of papermill runs. A run is a folder; it is done when its metrics.json is there.
#
#   snakemake --cores 2                                             the embedded default
#   snakemake --cores 2 --config dataset=digits out=runs/digits     another data set, in a folder of its own
#   snakemake --cores 2 --configfile sweeps/encoders.yaml           a sweep: lib/sweeps.py says what the file holds
#   snakemake --profile profiles/slurm ...                          the same graph on a cluster: profiles/README.md

import os

import pandas as pd
from filelock import FileLock, Timeout
from snakemake.exceptions import WorkflowError
from snakemake.utils import Paramspace

from lib import sweeps

PASSED = ("dataset", "datasets", "clip", "aux", "shots", "seeds")  # to every notebook that has a parameter of the name
SWEEP = dict(config) if "blocks" in config else {}
SETTINGS = {} if SWEEP else ({"datasets": config["dataset"]} if "dataset" in config else {}) | dict(config)
OUT = str((SWEEP or SETTINGS).pop("out", "runs"))
if mistyped := [name for name in SETTINGS if name not in PASSED]:
    raise WorkflowError(f"--config has no {', '.join(mistyped)}; known: out, {', '.join(PASSED)}")
if (SETTINGS or SWEEP) and Path(OUT) == Path("runs"):
    raise WorkflowError("runs/ is for the default parameters: give these settings a folder, --config out=runs/NAME")
if set(OUT) & set("{}"):
    raise WorkflowError(f"out={OUT}: braces are snakemake's wildcards")

LIB = [sys.executable, "-m", "lib"]
RUN = [*LIB, "run"]
GIVEN = [word for name, value in SETTINGS.items() for word in ("-p", name, str(value))]
LIBRARY = sorted(map(str, Path("lib").rglob("*.py")))
WORLD = ["data/benchmarks.json", *(f"data/embedded/{name}" for name in ("index.json", "world.py", "draw.py", "render.py"))]
WORLD += sorted(map(str, Path("data/embedded").glob("*.safetensors")))
FIRST, *NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))  # the first fills the feature cache
RUNS = {} if SWEEP else {f"{OUT}/{name}": [name, "--lenient", *GIVEN] for name in (FIRST, *NOTEBOOKS)}
EXTRACTED = {}
try:
    for block in sweeps.blocks(SWEEP) if SWEEP else ():
        space = Paramspace(pd.DataFrame(block.labels), param_sep="=", single_wildcard="run")
        for folder, parameters in zip(space.instance_patterns, block.parameters):
            words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
            if RUNS.setdefault(f"{OUT}/{block.notebook}/{folder}", [block.notebook, *words]) != [block.notebook, *words]:
                raise ValueError(f"two blocks have a run {block.notebook}/{folder}: name what differs in their grids")
    EXTRACTED = sweeps.extractions(SWEEP)
except ValueError as error:
    raise WorkflowError(str(error))
FOLDERS = {Path(folder): command[0] for folder, command in RUNS.items()}

if workflow.is_main_process and workflow.output_settings.dryrun:
    print(sweeps.forecast(FOLDERS), file=sys.stderr)
elif workflow.is_main_process:
    os.environ["LOGIT_BIAS_DRIVER"] = str(os.getpid())  # local runs end with it
    Path(OUT).mkdir(parents=True, exist_ok=True)
    DRIVER = FileLock(f"{OUT}/.driver")  # unlike snakemake's own lock it ends with its process, however that ends
    try:
        DRIVER.acquire(blocking=False)
    except Timeout:
        raise WorkflowError(f"another snakemake works on {OUT}; let it end, or give this one a folder by --config out=")
elif workflow.remote_exec:
    os.environ.pop("LOGIT_BIAS_DRIVER", None)  # of another machine


def command(folder):
    """Return the words that run a notebook into a folder below OUT."""
    return [*RUN, *RUNS[f"{OUT}/{folder}"], "--folder", f"{OUT}/{folder}"]


def outputs(folder, notebook):
    """Return the outputs of one run; `snakemake --report` shows its record and figures under the notebook's name.

    The notebook of a failed run, unfinished.ipynb, is none of them, since snakemake deletes the outputs of failed jobs.
    """
    kinds = {kind: f"notebooks/book/report/{kind}.rst" for kind in ("record", "figure")}
    shown = {kind: {"caption": text, "category": notebook} for kind, text in kinds.items()}
    if folder != notebook:
        shown = {kind: options | {"subcategory": "{run}"} for kind, options in shown.items()}
    return {
        "notebook": f"{OUT}/{folder}/{notebook}.ipynb",
        "record": report(f"{OUT}/{folder}/metrics.json", labels={"kind": "record", "name": "metrics"}, **shown["record"]),
        "figures": report(
            directory(f"{OUT}/{folder}/figures"),
            patterns=["{name}.svg"],
            labels={"kind": "figure", "name": "{name}"},
            **shown["figure"],
        ),
    }


report: "notebooks/book/report/workbook.rst"


onerror:
    print(sweeps.failures(FOLDERS), file=sys.stderr)


wildcard_constraints:
    notebook="|".join(NOTEBOOKS) if not SWEEP else "[^/]+",


rule all:
    input:
        [f"{folder}/{part}" for folder, (name, *_) in RUNS.items() for part in ("metrics.json", f"{name}.ipynb", "figures")],


rule extract:
    output:
        touch(f"{OUT}/extracted/{{job}}"),
    params:
        command=lambda wildcards: [*LIB, *EXTRACTED[wildcards.job]],
    resources:
        runtime=240,
        mem_mb=8000,
    shell:
        "{params.command:q}"


rule first:
    input:
        f"notebooks/{FIRST}.ipynb",
        LIBRARY,
        WORLD,
    output:
        **outputs(FIRST, FIRST),
    params:
        command=lambda wildcards: command(FIRST),
    resources:
        runtime=240,
        mem_mb=8000,
    shell:
        "{params.command:q}"


rule notebook:
    input:
        "notebooks/{notebook}.ipynb",
        LIBRARY,
        f"{OUT}/{FIRST}/metrics.json",
        "data/published.csv",
    output:
        **outputs("{notebook}", "{notebook}"),
    params:
        command=lambda wildcards: command(wildcards.notebook),
    resources:
        runtime=120,
        mem_mb=4000,
    shell:
        "{params.command:q}"


rule sweep:
    input:
        "notebooks/{notebook}.ipynb",
        LIBRARY,
        WORLD,
        "data/published.csv",
        [f"{OUT}/extracted/{job}" for job in EXTRACTED],
    output:
        **outputs("{notebook}/{run}", "{notebook}"),
    params:
        command=lambda wildcards: command(f"{wildcards.notebook}/{wildcards.run}"),
    resources:
        runtime=120,
        mem_mb=4000,
    shell:
        "{params.command:q}"
