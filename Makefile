# Set-up, build and test. `make help` lists the targets.
#   LIBTORCH=<folder>   a libtorch or torch package to build against; PYTHON=<python> the Python to ask for one
#   CI=true             warnings are errors
SHELL := /bin/bash
.DEFAULT_GOAL := build
.NOTPARALLEL:
.PHONY: setup build demo test lint bench install clean distclean help FORCE

ifeq ($(origin CXX),default)
  CXX := c++
endif
PREFIX ?= /usr/local
BIN := $(DESTDIR)$(PREFIX)/bin
LIB := $(DESTDIR)$(PREFIX)/lib
SHARE := $(DESTDIR)$(PREFIX)/share/chunkgrpo

export PKG_CONFIG_PATH := $(CURDIR)/lib/pkgconfig$(if $(PKG_CONFIG_PATH),:$(PKG_CONFIG_PATH))
WERROR := $(if $(filter true,$(CI)),-Werror)
# lld: the default linker warns about mktemp in the static Foundation at every build.
SWIFT_FLAGS := $(if $(filter true,$(CI)),-Xswiftc -warnings-as-errors) -Xswiftc -use-ld=lld
# Progress for people, only warnings and errors for logs.
QUIET := $(shell [ -t 2 ] || echo --quiet)
# The executable finds libctorch.so relative to itself wherever it is put; the test bundle finds it here.
RELEASE := -c release --static-swift-stdlib $(SWIFT_FLAGS) -Xlinker -rpath -Xlinker '$$ORIGIN/../lib'
DEBUG := $(SWIFT_FLAGS) -Xlinker -rpath -Xlinker '$(CURDIR)/lib'

setup: lib/torch.env ## check the tools, find or install torch
	@. lib/torch.env && echo "setup: ready, torch $$TORCH_VERSION"
lib/torch.env: FORCE
	@Tools/setup.sh

# The inner loops once per instruction set; at run time the best that the processor has is taken.
ifeq ($(shell uname -m),x86_64)
  ISAS := base avx2 avx512
endif
ISAS ?= base
lib/kernels-base.o: ISA :=
lib/kernels-avx2.o: ISA := -march=x86-64-v3
lib/kernels-avx512.o: ISA := -march=x86-64-v4 -mprefer-vector-width=512
lib/kernels-%.o: Sources/CTorch/kernels.cpp Sources/CTorch/kernels.h
	@mkdir -p lib && $(CXX) -O3 -std=c++20 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math \
	  -fno-signed-zeros -fassociative-math -Wall -Wextra $(WERROR) $(CXXFLAGS) -DINSTRUCTIONS=$* $(ISA) -c $< -o $@

# -fopenmp when compiling alone: at run time the calls find the OpenMP that libtorch brought, not a second one.
# torch.env keeps its date while the choice stands, so that the library is made again only when it changes.
lib/libctorch.so: lib/torch.env $(ISAS:%=lib/kernels-%.o) $(wildcard Sources/CTorch/*.cpp Sources/CTorch/*.h)
	@. lib/torch.env && start=$$SECONDS && \
	printf 'build: lib/libctorch.so against torch %s … ' "$$TORCH_VERSION" && \
	cuda=$$([ $$TORCH_CUDA = 0 ] || echo -ltorch_cuda -lc10_cuda) && \
	for part in ctorch fused convolution memory; do \
	  $(CXX) -O2 -std=c++20 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra $(WERROR) $(CXXFLAGS) \
	    -D_GLIBCXX_USE_CXX11_ABI=$$TORCH_CXX11_ABI -isystem "$$TORCH/include" \
	    -isystem "$$TORCH/include/torch/csrc/api/include" -c Sources/CTorch/$$part.cpp -o lib/$$part.o & parts="$$parts $$!"; \
	done; for part in $$parts; do wait $$part || exit 1; done; \
	$(CXX) -shared $(CXXFLAGS) lib/ctorch.o lib/fused.o lib/convolution.o lib/memory.o $(ISAS:%=lib/kernels-%.o) \
	  -L"$$TORCH/lib" -Wl,-rpath,"$$TORCH/lib" -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 $$cuda \
	  $(LDFLAGS) -o $@.new && mv $@.new $@ && echo "$$((SECONDS - start)) s"

lib/pkgconfig/ctorch.pc: FORCE
	@mkdir -p $(@D) && here=$${PWD// /\\ } && \
	printf '%s\n' 'Name: ctorch' 'Description: C ABI over libtorch' 'Version: 1' \
	  "Cflags: -I$$here/Sources/CTorch" "Libs: -L$$here/lib -lctorch" > $@.new && \
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

build: lib/libctorch.so lib/pkgconfig/ctorch.pc ## build bin/chunkgrpo (the default)
	@start=$$SECONDS && swift build $(QUIET) --product chunkgrpo $(RELEASE) && \
	if ! cmp -s .build/release/chunkgrpo bin/chunkgrpo; then \
	  install -D -m 755 .build/release/chunkgrpo bin/chunkgrpo.new && mv bin/chunkgrpo.new bin/chunkgrpo && \
	  echo "build: bin/chunkgrpo ($$((SECONDS - start)) s)"; \
	fi

demo: ## set up, build and run the demo; DEMO_SET="key=value …" changes its configuration
	@start=$$SECONDS; $(MAKE) --no-print-directory build && exec bin/chunkgrpo demo Examples/demo.yaml \
	  $(foreach setting,$(DEMO_SET),--set '$(setting)') --setup-seconds $$((SECONDS - start))

test: build ## run all tests
	@PYTHON="$${PYTHON:-$$(ls .python/bin/python 2> /dev/null || echo python3)}" Tools/fetch-vocabularies.sh || \
	{ [ "$(CI)" != true ] && echo 'test: warning: without tokenizer vocabularies the tests that read them fail'; }
	@[ -n "$(CHUNKGRPO_TEST_PYTHON)" ] || Tools/setup-python-tests.sh || \
	{ [ "$(CI)" != true ] && echo 'test: warning: without .python-tests LoRA files are not compared with diffusers and PEFT'; }
	@python=$${CHUNKGRPO_TEST_PYTHON:-.python-tests/bin/python}; start=$$SECONDS; \
	if "$$python" -c 'import fastapi, pytest, scipy, transformers, uvicorn' 2> /dev/null; then \
	  "$$python" -m pytest -q -p no:cacheprovider RewardServer/tests && echo "test: reward server ($$((SECONDS - start)) s)"; \
	else \
	  echo "test: warning: the reward server is not tested: $$python lacks packages of Tools/reference/requirements.txt"; \
	  [ "$(CI)" != true ]; \
	fi
	@start=$$SECONDS && swift build $(QUIET) --build-tests $(DEBUG) && \
	echo "test: test bundle ($$((SECONDS - start)) s)"
	@swift test --skip-build --disable-xctest $(DEBUG)

lint: ## check the format of Swift and the syntax of scripts and Python
	swift format lint --strict --recursive Benchmarks Examples Sources Tests Package.swift
	@for script in .ci/run Tools/*.sh; do bash -n $$script || exit 1; done
	@if command -v python3 > /dev/null; then python3 -c \
	  'import ast, pathlib; [ast.parse(p.read_text(), str(p)) for p in pathlib.Path("RewardServer").rglob("*.py")]'; fi
	@if command -v shellcheck > /dev/null; then shellcheck .ci/run Tools/*.sh; fi

bench: build ## measure speed against diffusers; BENCH="--only mini.train --rounds 9" chooses
	@[ -n "$(CHUNKGRPO_TEST_PYTHON)" ] || Tools/setup-python-tests.sh
	@swift build $(QUIET) --product bench-runner $(RELEASE) && install -m 755 .build/release/bench-runner bin/bench-runner
	@"$(or $(CHUNKGRPO_TEST_PYTHON),.python-tests/bin/python)" Benchmarks/bench.py $(BENCH)

install: $(if $(wildcard bin/chunkgrpo),,build) ## install under PREFIX (/usr/local); DESTDIR is honoured
	install -d "$(BIN)" "$(LIB)" "$(SHARE)"
	install -m 755 bin/chunkgrpo "$(BIN)/chunkgrpo"
	install -m 755 lib/libctorch.so "$(LIB)/libctorch.so"
	cp -R LICENSE NOTICE Data Examples Models "$(SHARE)/"
	@. lib/torch.env && echo "install: libctorch.so uses the torch in $$TORCH: keep that folder"

clean: ## remove what was built
	rm -rf .build bin lib

distclean: clean ## remove the private Python environments too
	rm -rf .python .python-tests

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r target what; do \
	  printf 'make %-10s %s\n' "$$target" "$$what"; done
