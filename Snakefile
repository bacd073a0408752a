# The workbook as a graph of papermill runs. A run is a folder; it is done when its metrics.json is there.
#
#   snakemake --cores 2                                             the embedded default
#   snakemake --cores 2 --config dataset=digits out=runs/digits     another data set, nothing written to figures/
#   snakemake --profile PROFILE                                     the same graph on SLURM or Kubernetes

OUT = config.get("out", "runs")
FIGURES = "--figures figures" if OUT == "runs" else ""
SETTINGS = ({"datasets": config["dataset"]} if "dataset" in config else {}) | dict(config)  # the benchmark takes several
PASSED = ("dataset", "datasets", "clip", "aux", "shots", "seeds")  # to every notebook that has a parameter of the name
GIVEN = " ".join(f"-p {name} {SETTINGS[name]}" for name in PASSED if name in SETTINGS)
LIBRARY = sorted(str(path) for path in Path("lib").glob("*.py") if path.name not in ("pretraining.py", "drawing.py"))
FIRST = "00_extract_features"  # fills the feature cache, so that no two notebooks extract the same images
NOTEBOOKS = [
    "01_state_the_logit_bias",
    "02_compare_logit_features",
    "03_compare_logit_predictors",
    "04_compare_logit_fusions",
    "05_tune_amu",
    "06_benchmark_methods",
]


rule all:
    input:
        expand(f"{OUT}/{{notebook}}/metrics.json", notebook=[FIRST, *NOTEBOOKS]),


rule first:
    input:
        notebook=f"notebooks/{FIRST}.ipynb",
        library=LIBRARY,
        models="data/embedded/index.json",
    output:
        f"{OUT}/{FIRST}/metrics.json",
    shell:
        f"{sys.executable} -m lib run {FIRST} --folder {OUT}/{FIRST} {FIGURES} --lenient {GIVEN}"


rule notebook:
    input:
        notebook="notebooks/{notebook}.ipynb",
        library=LIBRARY,
        features=f"{OUT}/{FIRST}/metrics.json",
        published="data/published.csv",
    output:
        f"{OUT}/{{notebook}}/metrics.json",
    wildcard_constraints:
        notebook="|".join(NOTEBOOKS),
    shell:
        f"{sys.executable} -m lib run {{wildcards.notebook}} --folder {OUT}/{{wildcards.notebook}} {FIGURES} --lenient {GIVEN}"
