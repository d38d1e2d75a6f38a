# make demo: generates text with the embedded model.
# make test: runs the linter and all tests, one process per core with one thread each. (With more threads the processes
#            would wait for each other.)
# Both make .venv first.
PYTHON ?= python3
RUN = .venv/bin/python
# Without --no-compile, byte-compiling takes as long as the rest. Python compiles a module when it is first imported.
INSTALL = $(RUN) -m pip install -q --no-compile
# These test files start first, so that all processes end at about the same time.
LONGEST = $(patsubst %,tests/test_%.py,readme serve page tp families speculate experts_cuda lifeline kernels_cuda engine \
	convert prefix vision compiled kernels bench config grammar process quantize lora_run gptq_awq gguf_convert eval)
TESTS = $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/test_*.py)))

# Where it is set, as in many containers, every process compiles what it imports of torch anew, for 1.3 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test clean

demo: .venv/run
	$(RUN) generate.py --compile --seed 5

test: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations 20 $(TESTS)

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@

clean:  # the last is where tests/test_readme.py runs the READMEs' commands
	rm -rf .venv build bench_out $(HOME)/.cache/gpt-brisk/readme-*
