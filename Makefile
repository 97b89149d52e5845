# The environment lies in .venv; `make env` is quick when it is up to date. To use another one: make VENV=/path test
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Keep the bytecode of imported modules: to compile those of torch and transformers takes ten seconds in every process.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help env test check typecheck format demo docs figures gpu-check release-check clean

help:
	@echo "make env            create or update $(VENV) with the pinned versions"
	@echo "make test           run the tests (ARGS='-k plan' to choose)"
	@echo "make check          formatting, lint and types"
	@echo "make format         format, and fix what the linter can"
	@echo "make demo           run examples/demo.py"
	@echo "make docs           build the manual into site/, strictly"
	@echo "make figures        draw the manual's pictures and graphs anew (after make demo; needs Chromium)"
	@echo "make release-check  build the wheel and the sdist, and use the wheel elsewhere (ARGS='--output dist')"
	@echo "make gpu-check      tests and times on a GPU, within ten minutes (ARGS='--output DIR')"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt vlcache_fx/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# Modules are compiled when they are imported: compiling all of them takes longer than the rest.
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[transformers,tensorrt-rtx,mooncake-cpu,dev,demo,docs]'
	touch $@

# One process per core, one thread each: the tensors of tests are too small to share out. In the order of their names:
# files with few tests are often those that take long, and would come last otherwise.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: env typecheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy knows packages by their folders only, and passes/ and policies/ lie outside vlcache_fx/: show it a folder of
# links in which everything is where it is imported from. Of examples/, packages are checked.
typecheck: env
	rm -rf .typecheck && mkdir -p .typecheck/vlcache_fx
	ln -s $(CURDIR)/vlcache_fx/* $(CURDIR)/passes $(CURDIR)/policies .typecheck/vlcache_fx/
	ln -s $(CURDIR)/examples .typecheck/
	cd .typecheck && $(abspath $(BIN))/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p vlcache_fx \
		-p examples.vs_vllm -p examples.train_photo_vlm -p examples.train_reference_vlm -p examples.train_hybrid_vlm -p examples.serve_load

# As for mypy: links that stand where each package is imported from. NO_MKDOCS_2_WARNING: an advertisement.
docs: env
	rm -rf .docs-tree && mkdir -p .docs-tree/vlcache_fx
	ln -s $(CURDIR)/vlcache_fx/* $(CURDIR)/passes $(CURDIR)/policies .docs-tree/vlcache_fx/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

figures: env
	$(BIN)/python docs/figures/request.py
	$(BIN)/python docs/figures/graphs.py
	$(BIN)/python docs/figures/explain.py

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: env
	$(BIN)/python examples/demo.py

# Uses what is there: a machine with a GPU is lent for minutes, and brings its own torch.
# make gpu-check PYTHON=/path/to/python for another interpreter than that of $(VENV).
gpu-check: CHECK_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu-check:
	$(CHECK_PYTHON) -m vlcache_fx.bench.gpu_check $(ARGS)

release-check: env
	$(BIN)/python .ci/release_check.py $(ARGS)

clean:
	rm -rf build dist site .docs-tree .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
