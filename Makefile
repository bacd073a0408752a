PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: run test bench lab clean
.DEFAULT_GOAL := run

$(BIN)/ready: requirements.lock pyproject.toml
	@echo "Installing about 200 packages, 6 GB: some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock --editable .
	@touch $@

run: $(BIN)/ready  ## the whole workbook on the embedded default
	$(BIN)/snakemake --cores 2 --quiet rules --rerun-triggers mtime
	@$(BIN)/python -m lib summary runs

test: $(BIN)/ready  ## ruff, then every test, notebooks included
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: $(BIN)/ready  ## how fast it is, against plain loops; figures/91_* are redrawn for this machine
	$(BIN)/python -m lib run 91_measure_speed --folder runs/91_measure_speed --figures figures

lab: $(BIN)/ready  ## explore
	$(BIN)/jupyter lab notebooks

clean:  ## forget runs and cached features; downloads stay
	rm -rf runs data/cache .snakemake
