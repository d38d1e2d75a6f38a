# make demo: text from the embedded model.  make test: the linter and the tests, a process on each core (threads of
# several processes would wait for each other).  Both make .venv first.
PYTHON ?= python3
RUN = .venv/bin/python
INSTALL = $(RUN) -m pip install -q --no-compile  # which takes as long as the rest; Python compiles what it imports
# First, so that all processes end together.
LONGEST = $(patsubst %,tests/test_%.py,tp speculate kernels_cuda bench lifeline compiled engine)
TESTS = $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/test_*.py)))

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

clean:
	rm -rf .venv build bench_out
