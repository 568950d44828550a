# Every target makes .venv by itself. Options of pip go through its environment
# variables, for instance PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

PYTHON ?= python3
ARGS ?=
TORCH := torch==2.13.0
STAMP := .venv/.installed

# NumPy's threads and two test processes would fight for the same cores.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv/bin/pytest -n 2

define CHECK
import sys
name, version = sys.argv[1], "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit("error: %s is Python %s; 3.11 or newer is needed: make PYTHON=/path/to/python3.11" % (name, version))
try:
    import ensurepip, venv
except ImportError as e:
    sys.exit("error: %s has no module %s: install python%s-venv or its like"
             " (Debian, Ubuntu: sudo apt install python%s-venv)" % (name, e.name, version, version))
endef
export CHECK

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint clean

help:
	@echo 'make demo      the sensor network, end to end; report in demo-report/'
	@echo 'make test      the tests, without the slow ones'
	@echo 'make test-all  all tests'
	@echo 'make bench     the benchmarks; results in benchmarks/results/'
	@echo 'make lint      ruff and mypy'
	@echo 'make clean     remove caches, builds and demo-report/ (not .venv/)'
	@echo
	@echo 'Each makes .venv/ first, with PYTHON (python3) and constraints.txt.'
	@echo "ARGS='...' is handed on: make demo ARGS='--seeds 3'"

demo: $(STAMP)
	.venv/bin/repurpose-opt demo --output demo-report $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

bench: $(STAMP)
	.venv/bin/python -m repurpose_opt_benchmarks $(ARGS)

lint: $(STAMP)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy repurpose_opt solvers/repurpose_opt_solvers benchmarks/repurpose_opt_benchmarks

clean:
	rm -rf build dist demo-report .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamp comes last, so that an interrupted installation is taken up again. The package that
# pip was writing at that moment would count as installed; it is the one without INSTALLER.
$(STAMP): pyproject.toml constraints.txt
	@.venv/bin/python -c '' 2>/dev/null || { \
	    command -v "$(PYTHON)" >/dev/null || { \
	        echo 'error: no $(PYTHON) here: install Python 3.11 or newer, or make PYTHON=/path/to/python3.11' >&2; exit 1; }; \
	    "$(PYTHON)" -c "$$CHECK" "$(PYTHON)" && \
	    "$(PYTHON)" -m venv --clear --without-pip .venv; }
	@find .venv/lib -name '*.dist-info' -prune ! -exec test -f '{}/INSTALLER' \; -exec rm -r '{}' +
	@.venv/bin/python -m ensurepip --upgrade --default-pip >/dev/null
	@.venv/bin/python -m pip show -q torch 2>/dev/null || \
	    echo 'Installing PyTorch. On Linux, PyPI has it with CUDA, several GB; README.md tells how to get the CPU build.'
	@.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt '$(TORCH)'
	@echo 'Installing repurpose-opt with everything it can use into .venv'
	@.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
