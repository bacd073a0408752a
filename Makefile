PYTHON ?= python3.11
BIN := .venv/bin
SNAKEMAKE = $(BIN)/snakemake --cores 2 --quiet rules --rerun-triggers mtime
export OMP_NUM_THREADS ?= 1

.PHONY: run book test stress figures bench lab clean
.DEFAULT_GOAL := run

$(BIN)/ready: requirements.lock pyproject.toml
	@echo "Installing about 200 packages, 6 GB: some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock --editable .
	@touch $@

run: $(BIN)/ready  ## the whole workbook on the embedded default
	$(SNAKEMAKE)
	@$(BIN)/python -m lib summary runs

book: run  ## that run and the gallery as pages that read offline: runs/book/index.html
	$(BIN)/python notebooks/book/build.py runs

test: $(BIN)/ready  ## ruff, then every test, notebooks included
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

stress: $(BIN)/ready  ## the long proofs: hundreds of runs that are killed, a real SLURM, the ends of the scale
	$(BIN)/python -m pytest -m stress -rs

figures: $(BIN)/ready  ## the gallery: the whole workbook once more at a clean commit, its figures to figures/
	@test -z "$$(git status --porcelain -- . ':!figures/*.*g' ':!figures/*.json')" || { echo "commit first: figures name the code that drew them"; exit 1; }
	$(SNAKEMAKE) --forceall
	$(BIN)/python figures/collect.py runs

bench: $(BIN)/ready  ## how fast it is, against plain loops; about 25 minutes, figure and record in runs/bench
	$(BIN)/python tests/bench.py

lab: $(BIN)/ready  ## explore
	$(BIN)/jupyter lab notebooks

clean:  ## forget runs and cached features; downloads stay
	rm -rf runs data/cache .snakemake
