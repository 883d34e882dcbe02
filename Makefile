# make quickstart   a trained, evaluated, filmed arm policy, with no download beyond packages
# make test         lint, types and tests: what CI runs
PYTHON ?= python3.11
# uv does not read pip's own settings for local wheels; empty is fine.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Small networks are slower on a thread pool than on one thread.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

UV := .uv/bin/uv
BIN := .venv/bin

.PHONY: quickstart test setup clean

quickstart: .venv/.quickstart
	$(BIN)/robopolicy quickstart

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

setup: .venv/.dev

# pyproject says what works, constraints.txt pins what was tested.
define install
	test -x $(UV) || ($(PYTHON) -m venv .uv && .uv/bin/pip install --quiet "uv>=0.9")
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	@echo "installing packages into .venv (once; about a minute) ..."
	$(UV) pip install --quiet --python .venv --compile-bytecode -c constraints.txt -e '.[$(1)]'
	touch $@
endef

.venv/.quickstart: pyproject.toml constraints.txt
	$(call install,mujoco)

.venv/.dev: pyproject.toml constraints.txt
	$(call install,mujoco$(comma)pusht$(comma)robosuite$(comma)dev)
	touch .venv/.quickstart

comma := ,

clean:
	rm -rf .venv .uv outputs .pytest_cache .ruff_cache .mypy_cache
