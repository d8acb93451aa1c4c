# The chat pipeline, and everything it needs, on one machine. `make` alone prints the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model infra run dev chapter-1 status test test-long test-quick test-page test-chapter test-dynamo test-clients test-hosts soak bench check lock clean

# Tried in turn, by running them: a name on the PATH (a pyenv shim, say) is not yet a Python. Where each is, or nothing.
PYTHON_CANDIDATES ?= $(or $(PYTHON),python3.11 python3.12 python3)
IF_SUPPORTED := import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) and print(sys.executable)
SUPPORTED_PYTHON = $(firstword $(foreach python,$(PYTHON_CANDIDATES),$(shell $(python) -c '$(IF_SUPPORTED)' 2>/dev/null)))

UV := .uv/bin/uv
VENV_PYTHON := .venv/bin/python
MIN_FREE_GB ?= 10

# Many a container sets it. Then each start compiles SGLang anew: an engine's imports take 24 s instead of 10.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo 'Run       (each target first makes what it needs)'
	@echo '  make run              NATS, etcd, engine, processor, frontend; asks them a question; stays up'
	@echo '  make dev              the same, and saving a file restarts the components that import it'
	@echo '  make chapter-1        the chapter taken literally: docs/chapter-1/README.md'
	@echo '  make infra            NATS and etcd only, for scripts in terminals of their own'
	@echo '  make status           what runs; make restart-engine, -processor, -frontend, -router, -nats, -etcd'
	@echo 'Options   (as in MODEL=Qwen/Qwen2.5-0.5B-Instruct make run)'
	@echo '  MODEL  ENGINE_ARGS    a model of the hub or a folder; flags for SGLang: "--context-length 2048"'
	@echo '  ENGINES=2  ROUTER=1   several engines; a router that knows what each of them has cached'
	@echo '  HTTP_PORT  NATS_PORT  ETCD_PORT  NATS_MONITORING_PORT    if 8080, 4222, 2379 or 8222 is taken'
	@echo '  NATS_SERVER  ETCD_ENDPOINTS    servers that run already, instead of own ones'
	@echo '  RUN_ONCE=1  READY_TIMEOUT_S=600    for CI: stop after the answer; how long to wait for it'
	@echo 'Test'
	@echo '  make check            ruff and mypy; make check-exercise-1, to -5: your solution of docs/exercises'
	@echo '  make test             all tests; make test-quick: only those without a model and servers'
	@echo '  make test-page, -hosts, -long    the page in Chromium; several hosts (as root); outages of a minute'
	@echo '  make test-clients     the clients of docs/clients.md; make soak: faults for SOAK_MINUTES=10'
	@echo '  make test-chapter     Dynamo 0.5.1; make test-dynamo VERSION=1.4.2: any other release'
	@echo '  make bench            how fast it is, without a model: ten minutes; BENCH_ARGS="..."'
	@echo 'Environment'
	@echo '  make setup, model     .venv, as pinned in requirements.txt (10 GB); the embedded model'
	@echo '  make lock, clean      pins all requirements again; removes everything that make has made'

setup: .venv/installed

# The uv that requirements.txt pins, by pip: this Python's own, or where it has none, one in an environment for it.
$(UV): requirements.txt
	$(if $(SUPPORTED_PYTHON),,$(error Python 3.11 or 3.12 is needed, and none of $(PYTHON_CANDIDATES) is one: \
	install one, or name it: make PYTHON=/path/to/python3.11))
	@rm -rf .uv && mkdir .uv
	@sed -n '/^uv==/,/[^\]$$/p' $< >.uv/requirement.txt
	@python=$(SUPPORTED_PYTHON); \
	$$python -m pip --version >/dev/null 2>&1 || { $$python -m venv .uv/pip && python=.uv/pip/bin/python; } && \
	PIP_USER=0 $$python -m pip install --quiet --disable-pip-version-check --require-hashes --target .uv \
	-r .uv/requirement.txt
	@touch $@

# A .venv that was finished is brought up to date; what an interrupted setup left is made anew. The project itself is
# installed, though its code stays here, because SGLang finds our CPU platform through an entry point.
.venv/installed: requirements.txt pyproject.toml | $(UV)
	@for folder in . "$$($(UV) cache dir)"; do \
	mkdir -p "$$folder" && free=$$(df -BG --output=avail "$$folder" | tr -dc 0-9) && \
	if [ "$$free" -lt $(MIN_FREE_GB) ]; then echo "setup: the disk that holds $$folder has $$free GB free, and PyTorch" \
	'and SGLang take about 10: free some, or try anyway with `MIN_FREE_GB=0 make setup`' >&2; exit 1; fi; done
	@[ -e $@ ] && [ "$$($(VENV_PYTHON) -c '$(IF_SUPPORTED)')" ] || \
	$(UV) venv --quiet --no-config --clear --python $(SUPPORTED_PYTHON) .venv
	@rm -f $@
	@echo 'setup: installing requirements.txt (8 GB; seconds where uv has it in its cache)'
	@$(UV) pip sync $$([ -t 2 ] || echo --quiet) --python $(VENV_PYTHON) --require-hashes requirements.txt
	@$(UV) pip install --quiet --python $(VENV_PYTHON) --no-deps --no-build-isolation --editable .
	@touch $@

model: setup
	@$(VENV_PYTHON) -m launch model

# make runs these itself, without a shell between: an interrupt or a SIGTERM reaches them directly.
infra: setup
	@$(VENV_PYTHON) -m launch infra

run: model
	@$(VENV_PYTHON) -m launch run

dev: model
	@$(VENV_PYTHON) -m launch dev

chapter-1: model
	@$(VENV_PYTHON) -m launch chapter-1

restart-%:
	@$(VENV_PYTHON) -m launch restart $*

status:
	@$(VENV_PYTHON) -m launch status

# Without its output where it passes, and up to the first thing that is missing where it does not.
check-exercise-%: model
	@$(VENV_PYTHON) -m pytest --exitfirst --quiet --no-header --tb=short -rN docs/exercises/check_$*_*.py

# Most tests wait more than they compute: so files run side by side, and after them, alone, the tests that measure time.
TEST_JOBS ?= 2

# $(call pytest,PYTHON,MARKERS,FILES)
pytest = $(1) -m pytest -n $(TEST_JOBS) --dist loadscope --no-loadscope-reorder -m '$(2) and not timed' $(3); \
	status=$$?; $(1) -m pytest -m '$(2) and timed' $(3) && exit $$status

test: model
	@$(call pytest,$(VENV_PYTHON),not long and not clients)

test-long: model
	@$(VENV_PYTHON) -m pytest -m long

test-quick: setup
	@$(VENV_PYTHON) -m pytest -m 'not process and not pipeline and not browser'

test-page: model
	@$(VENV_PYTHON) -m pytest tests/test_live_page.py tests/test_live_page_browser.py

# A small environment of its own: no SGLang and no PyTorch. Made anew when its requirements change, in seconds.
CHAPTER_TESTS := $(addprefix tests/test_,chapter_release.py dynamo_releases.py chat_errors.py streaming.py \
	security.py faults.py)

.venv-chapter/installed: requirements-chapter.txt | setup
	@$(VENV_PYTHON) -m uv venv --quiet --no-config --clear --python $(VENV_PYTHON) .venv-chapter
	@$(VENV_PYTHON) -m uv pip sync --quiet --python .venv-chapter/bin/python --require-hashes $<
	@touch $@

test-chapter: model .venv-chapter/installed
	@$(call pytest,.venv-chapter/bin/python,not pipeline and not long,$(CHAPTER_TESTS))

# Any other release, in an environment like that one, which nothing locks.
VERSION ?= 1.4.2

.venv-dynamo-%/installed: requirements-chapter.in | setup
	@$(VENV_PYTHON) -m uv venv --quiet --no-config --clear --python $(VENV_PYTHON) $(@D)
	@sed 's/^ai-dynamo-runtime==.*/ai-dynamo-runtime==$*/' $< | \
	$(VENV_PYTHON) -m uv pip install --quiet --python $(@D)/bin/python -r -
	@touch $@

test-dynamo: model .venv-dynamo-$(VERSION)/installed
	@$(call pytest,.venv-dynamo-$(VERSION)/bin/python,not pipeline and not long,$(CHAPTER_TESTS))

# PyTorch, which guidellm wants, is the one of .venv: uv links it. Node's packages go beside the others.
.venv-clients/installed: requirements-clients.txt tests/clients/package-lock.json | setup
	@$(VENV_PYTHON) -m uv venv --quiet --no-config --clear --python $(VENV_PYTHON) .venv-clients
	@$(VENV_PYTHON) -m uv pip sync --quiet --python .venv-clients/bin/python --require-hashes $<
	@mkdir -p .venv-clients/node && cp tests/clients/package*.json .venv-clients/node
	@npm ci --prefix .venv-clients/node --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

test-clients: model .venv-clients/installed
	@$(VENV_PYTHON) -m pytest -m clients

test-hosts: model
	@$(VENV_PYTHON) -m pytest -m hosts

check: setup
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

soak: model
	@$(VENV_PYTHON) -m tests.soak

# What it does, and the GPU lane: docs/performance.md.
bench: model
	@$(VENV_PYTHON) -m bench cpu $(BENCH_ARGS)

# Exact pins with hashes for Python 3.11 and 3.12. uv keeps the pins of the old file where it can.
lock: setup
	@$(VENV_PYTHON) -m uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	--quiet --output-file requirements.txt
	@$(VENV_PYTHON) -m uv pip compile requirements-chapter.in --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	--quiet --output-file requirements-chapter.txt
	@$(VENV_PYTHON) -m uv pip compile requirements-clients.in --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	--quiet --output-file requirements-clients.txt
	@echo 'lock: requirements.txt, -chapter.txt and -clients.txt written; `make setup`, `make test-chapter` and `make test-clients` install them'

clean:
	rm -rf .uv .venv .venv-* models .data .hypothesis .mypy_cache .pytest_cache .ruff_cache \
	.schemathesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
