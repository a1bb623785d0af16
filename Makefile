# Everything a person types. CMake does the work, in build/ (gcc) or build-clang/ (CC=clang); every target first runs
# scripts/setup, which brings what is missing and, when nothing is, only checks (under 3 s, no network).
#   make help

ifeq ($(origin CC),default)
  CC := gcc
endif
ifneq ($(findstring clang,$(notdir $(CC))),)
  CXX := $(subst clang,clang++,$(CC))
  SUFFIX := -clang
else
  ifeq ($(origin CXX),default)
    CXX := $(subst gcc,g++,$(CC))
  endif
  SUFFIX :=
endif

BUILD   ?= build$(SUFFIX)
JOBS    ?= $(shell nproc 2>/dev/null || echo 2)
PREFIX  ?= /usr/local
WERROR  ?= OFF
FUZZ_S  ?= 20
ARGS    ?=

CMAKE_ARGS = -DCMAKE_C_COMPILER=$(CC) -DCMAKE_CXX_COMPILER=$(CXX) -DKVS_WERROR=$(WERROR) -DCMAKE_INSTALL_PREFIX=$(PREFIX)
# $(call build,FOLDER,TARGETS,MORE CMAKE ARGUMENTS): quiet unless something is wrong. A configure run costs half a
# second, and makes sure that the folder is what this call asks for.
define build
	@cmake -S . -B $(1) $(CMAKE_ARGS) $(3) >$(1).log 2>&1 || { mkdir -p $(1); mv $(1).log $(1)/configure.log; \
	    grep -v '^--' $(1)/configure.log | head -n 30 >&2; exit 1; }
	@mv $(1).log $(1)/configure.log
	@start=$$(date +%s); cmake --build $(1) -j $(JOBS) --target $(2) -- --no-print-directory && \
	    echo "built $(2) in $(1) ($$(( $$(date +%s) - start )) s)"
endef

.PHONY: all setup bench methods test test-neon oracle-llama oracle-keep oracle-transformers oracle oracle-kvpress asan tsan lint fuzz \
        bench-kernels compare-speed warnings install \
        clean help $(BUILD)/kvasir

all: setup ## build/kvasir and libkvasir.so
	$(call build,$(BUILD),all,)

setup: ## what every target needs: packages, libllama, the model
	@scripts/setup

$(BUILD)/kvasir: setup
	$(call build,$(BUILD),kvasir,)

# Real dialogues where they are at hand; KVASIR_DATA= asks for the embedded ones.
KVASIR_DATA ?= $(abspath $(wildcard ../shared/data))
export KVASIR_DATA

bench: setup ## the main job: build/kvasir bench --suite demo (more with ARGS="...")
	$(call build,$(BUILD),kvasir,)
	$(BUILD)/kvasir bench --suite demo $(ARGS)

# docs/methods.md from the registry and a run: two shards of one thread, which --resume puts together.
METHODS_OUT ?= kvasir-bench-methods
METHODS = $(BUILD)/kvasir bench --suite methods --out $(METHODS_OUT) --profiles docs/profiles --threads 1
METHODS_ORACLE ?= tests/oracle/kvpress_table.json
methods: setup ## every preset at 10, 20, 50 % of the cache, then docs/methods.md (an hour and a quarter)
	$(call build,$(BUILD),kvasir,)
	$(METHODS) --shard 1/2 $(ARGS) >/dev/null & other=$$!; \
	    $(METHODS) --shard 0/2 $(ARGS) >/dev/null; \
	    first=$$?; wait $$other && exit $$first
	$(METHODS) --resume $(ARGS) >/dev/null
	scripts/methods-doc $(METHODS_OUT) --kvasir $(BUILD)/kvasir $(if $(METHODS_ORACLE),--oracle $(METHODS_ORACLE))

test: setup ## unit tests, no network; the last line is "N passed, N failed"
	$(call build,$(BUILD),unit-tests,)
	@scripts/run-tests $(BUILD) unit -j $(JOBS)

test-neon: setup ## the NEON kernels under qemu (optional: a cross compiler and qemu from Debian)
	@scripts/test-neon $(ARGS) || { [ $$? = 77 ] && echo "skipped"; }

oracle-llama: setup ## Kvasir's logits against libllama's
	$(call build,$(BUILD),oracle-tests,)
	@scripts/run-tests $(BUILD) oracle -j 1

oracle-transformers: setup ## --arith f32 against transformers in f32 (optional: 3 GB from PyPI, once)
	$(call build,$(BUILD),kvasir,)
	@scripts/oracle-transformers --kvasir $(BUILD)/kvasir $(ARGS) || { [ $$? = 77 ] && echo "skipped"; }

oracle: oracle-kvpress

oracle-kvpress: setup ## keep sets beside those of kvpress (optional: 3 GB from PyPI, once); more with ARGS="--all"
	$(call build,$(BUILD),kvasir,)
	@scripts/oracle-kvpress --kvasir $(BUILD)/kvasir $(ARGS) || { [ $$? = 77 ] && echo "skipped"; }

oracle-keep: setup ## keep sets beside those that kvpress chose once (tests/oracle/kvpress_keep.json)
	$(call build,$(BUILD),kvasir,)
	@scripts/oracle-kvpress --fixture --kvasir $(BUILD)/kvasir $(ARGS) || { [ $$? = 77 ] && echo "skipped"; }

asan: setup ## unit tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call build,$(BUILD)-asan,unit-tests,-DKVS_SANITIZE=address$(comma)undefined)
	@ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    scripts/run-tests $(BUILD)-asan unit -j $(JOBS)

tsan: setup ## unit tests under ThreadSanitizer
	$(call build,$(BUILD)-tsan,unit-tests,-DKVS_SANITIZE=thread)
	@TSAN_OPTIONS=halt_on_error=1 scripts/run-tests $(BUILD)-tsan unit -j $(JOBS)

lint: ## clang-format, clang-tidy, cppcheck, shell syntax
	@scripts/setup --lint
	@scripts/lint $(ARGS)

# clang's fuzzer runtime where there is one; else a driver without coverage feedback (cmake/fuzz_main.c).
FUZZ_CC := $(shell command -v clang >/dev/null 2>&1 && echo clang || echo $(CC))
fuzz: setup ## each tests/fuzz target for FUZZ_S=20 seconds
	$(MAKE) --no-print-directory fuzz-run CC=$(FUZZ_CC) BUILD=build-fuzz
.PHONY: fuzz-run
fuzz-run:
	$(call build,$(BUILD),fuzz-tests,-DKVS_FUZZ=ON -DKVS_SANITIZE=address$(comma)undefined)
	@scripts/run-fuzz $(BUILD) $(FUZZ_S)

bench-kernels: setup ## each instruction set's kernels, then the best beside oneDNN, OpenBLAS, ggml (ARGS="--threads 1")
	@scripts/bench-kernels --setup
	$(call build,$(BUILD),kernel-bench,)
	@found=0; for b in $(BUILD)/bench_*; do [ -x "$$b" ] || continue; found=1; echo "== $${b##*/}"; "$$b" || exit 1; \
	    done; [ $$found = 1 ] || { echo "no tests/bench/bench_*.c" >&2; exit 1; }
	@echo "== beside other libraries"; scripts/bench-kernels --binary $(BUILD)/reference-kernels $(ARGS)

compare-speed: setup ## tokens per second beside llama.cpp and OpenVINO GenAI, same tokens, same minutes
	$(call build,$(BUILD),kvasir,)
	@scripts/compare-speed --kvasir $(BUILD)/kvasir $(ARGS)

warnings: setup ## everything compiled with warnings as errors, by gcc or, with CC=clang, by clang
	$(call build,build-werror$(SUFFIX),all unit-tests oracle-tests kernel-bench,-DKVS_WERROR=ON)

install: all ## into PREFIX=/usr/local (DESTDIR is honoured)
	@DESTDIR=$(DESTDIR) cmake --install $(BUILD) --prefix $(PREFIX)

clean: ## all build folders; what scripts/setup fetched stays
	rm -rf build build-*

help: ## this list
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'
	@echo "  CC=clang builds in build-clang; WERROR=ON as the CI does; KVASIR_PREFIX moves what set-up fetches"

comma := ,
