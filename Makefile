# make demo | test | lint | clean: each sets itself up in .venv and needs nothing but make and Python 3.11 or newer.
#
#   PYTHON       the Python that .venv is made with
#   TORCH, TRANSFORMERS
#                what pip installs as such. The lowest versions that are supported:
#                make test VENV=.venv-lowest TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0
#   TORCH_INDEX  index that torch comes from; empty: pip's own. https://download.pytorch.org/whl/cpu has the small
#                CPU build for Linux, where pip's own index has the CUDA one
#   WORKERS      how many tests run at a time
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
TORCH_INDEX ?=
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
RECIPE := recipes/bert_pretraining
DEMO := runs/demo
CONFIG := $(RECIPE)/configs/demo.json
CODE := rannc_hf rannc_hf_autoload.py $(RECIPE)

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is too old: Python 3.11 or newer is needed, e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[test]' '$(TORCH)' '$(TRANSFORMERS)'
	touch $@

# Pretrains a small BERT on Python's own documentation with four CPU processes, then fills masks with it.
demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/python $(RECIPE)/train_tokenizer.py --config $(CONFIG) --source python-docs --output $(DEMO)/tokenizer
	$(BIN)/python $(RECIPE)/prepare.py --config $(CONFIG) --source python-docs --tokenizer $(DEMO)/tokenizer \
		--output $(DEMO)/data
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file $(RECIPE)/configs/demo-rannc.yaml \
		$(RECIPE)/pretrain.py --config $(CONFIG) --data $(DEMO)/data --output $(DEMO)/model
	$(BIN)/python $(RECIPE)/fill_mask.py $(DEMO)/model \
		"Return the [MASK] of the list." "The default [MASK] is None." "Raise an [MASK] if it is not found."

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)
	$(BIN)/mypy recipes/gpt_pretraining  # apart: recipes have programs of the same name

# Tests for CUDA devices run where there are some.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")')"

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
