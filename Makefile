# Each of these does all the set-up on a fresh machine: `make demo`, `make demo-vlm`, `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PROMETHEUS := .prometheus/usr/bin/promtool
TOOLS := .tools
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo demo-vlm test service memory faults faults-full check format bench docs image sbom audit clean

# The lock holds every package with its version, so nothing is left for pip to resolve; the second line adds what torch's CUDA
# build needs besides, where that is the one pip found. pip would compile all of it on one core; some of its files are for other Pythons.
$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --no-deps -r requirements.lock
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	$(BIN)/pip install --quiet --no-build-isolation -c requirements.lock -e .
	touch $@

setup: $(VENV)/installed
	$(BIN)/tuneyard models

# Prometheus and promtool out of Debian's package, which isn't installed: that would start a service.
$(PROMETHEUS):
	mkdir -p .prometheus
	cd .prometheus && (apt-get download -qq prometheus || (apt-get update -qq && apt-get download -qq prometheus))
	dpkg-deb -x .prometheus/prometheus_*.deb .prometheus
	touch $@

demo: setup
	command -v curl >/dev/null || (apt-get update -qq && apt-get install -qq -y curl)
	$(BIN)/python -m examples.demo

demo-vlm: setup
	$(BIN)/python -m examples.demo_vlm

# Two processes a core, up to four: many a test waits, for another process to start or for a limit to pass. The files come in the order
# of tests/conftest.py. Two hundred histories of dispatchers that die anywhere are among the tests.
test: setup $(PROMETHEUS)
	TUNEYARD_MODEL_RUNS=200 $(BIN)/python -m pytest -n $$((2 * $$(nproc))) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Whole jobs on Ray, and the whole service: eighteen minutes.
service: setup $(PROMETHEUS)
	$(BIN)/python -m pytest -m service tests/service

# The memory that plans promise, against what a worker takes, two at once: two minutes and a half.
memory: setup
	$(BIN)/python -m pytest -m service tests/benchmarks/test_memory.py -n 2 --dist load

# Kills every process of a running service at least once, and in every phase of a job: twelve minutes.
faults: setup
	$(BIN)/python -m pytest -m 'faults and not faults_full' tests/faults

# Every process in every phase: most of an hour on two cores.
faults-full: setup
	TUNEYARD_MODEL_RUNS=2000 $(BIN)/python -m pytest tests/serve_app/test_dispatcher_model.py
	$(BIN)/python -m pytest -m faults tests/faults

# The site isn't built --quiet, which would keep warnings from --strict too.
check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/image/Dockerfile
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Our training loop against TRL and a naive loop, in turns: a quarter of an hour on two cores, and nothing else should run.
bench: setup
	$(BIN)/python -m benchmarks.train

# The pages that are made from the code, and the site in build/site.
docs: $(VENV)/installed
	$(BIN)/python -m serve_app.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Where docker or buildah is. TARGET=cuda is the one for GPUs; BUILD_FLAGS are docker's, such as --build-arg and --push.
TARGET ?= cpu
image:
	DOCKER_BUILDKIT=1 $$(command -v docker || command -v buildah) build --file deploy/image/Dockerfile --target $(TARGET) \
		--build-arg REVISION=$$(git rev-parse HEAD) --tag tuneyard:$(TARGET) $(BUILD_FLAGS) .

$(TOOLS)/installed: deploy/supply/tools.lock | $(VENV)/installed
	test -x $(TOOLS)/bin/python || $(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --no-deps -r deploy/supply/tools.lock
	touch $@

# What is installed by the lock, with licences, as CycloneDX in sbom.json.
sbom: $(VENV)/installed $(TOOLS)/installed
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --output-format JSON --output-file sbom.json $(BIN)/python
	$(BIN)/python deploy/supply/covered.py requirements.lock sbom.json

# What the lock names and its authors have withdrawn, which any index knows; and known vulnerabilities. A mirror of PyPI may have no
# advisories: then this fails, for nothing was looked at.
AUDIT ?= pypi
audit: $(TOOLS)/installed
	$(TOOLS)/bin/python deploy/supply/withdrawn.py requirements.lock
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --vulnerability-service $(AUDIT) --requirement requirements.lock

clean:
	rm -rf $(VENV) $(TOOLS) .demo .bench .prometheus sbom.json
