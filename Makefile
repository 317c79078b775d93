# make quickstart   set-up, default corpus, training, sampling, a report: minutes on two CPU cores
# make test         set-up and the whole test suite
# make setup        only the environment in .venv, with the core; make setup-all adds the web app, hub data sets, tests
# make clean        forget the quickstart's data and run

PYTHON ?= python3
PY = .venv/bin/python
DATA = data/quickstart
RUN = checkpoints/quickstart
# OpenMP threads that spin long for each other stall when another program takes a core: 30 times slower, measured; with
# this setting 7 times, and as fast as before on a quiet machine
export GOMP_SPINCOUNT ?= 30000

PROMPTS = मुझे एक अच्छी कहानी सुनाओ||भारत में आज मौसम||mai kal bazaar gaya tha aur||yaar mujhe samajh nahi aa raha

.PHONY: quickstart test setup setup-all clean

setup: .venv/core
setup-all: .venv/dev

.venv/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=python3.11 names one")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/core: requirements.txt | .venv/pip
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/core
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# an interrupted quickstart goes on where it stopped; a finished one only evaluates and samples again
quickstart: .venv/core
	@test -f $(DATA)/meta.json || $(PY) prepare.py --output_dir $(DATA) --vocab_size 2048 --romanized 0.1
	$(PY) train_diffusion.py --preset tiny --max_steps 600 --data_dir $(DATA) --output_dir $(RUN) $(if $(wildcard $(RUN)/*.pt),--resume)
	$(PY) sample_diffusion.py --ckpt $(RUN)/best.pt --prompt "$(PROMPTS)" --temperature 0.6 --no_live
	@$(PY) sample_diffusion.py --ckpt $(RUN)/best.pt --prompt "एक दिन" --temperature 0.6 --html $(RUN)/replay.html --json $(RUN)/replay.json --no_live > /dev/null
	$(PY) evaluate.py --ckpt $(RUN)/best.pt --check; code=$$?; $(PY) plot.py $(RUN) && exit $$code
	@echo
	@echo "Look at $(RUN)/loss.png, and open $(RUN)/replay.html in a browser to see text appear step by step. Next:"
	@echo "  $(PY) sample_diffusion.py --prompt 'पार्वती ने कहा'        # your own prompt, appearing live"
	@echo "  $(PY) sample_diffusion.py --prompt 'देवदास ___ चला गया'              # fill a blank"
	@echo "  $(PY) prepare.py --input my_text_dir && $(PY) train_diffusion.py --plan   # your own text; how long would it take?"

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m pytest -q

clean:
	rm -rf $(DATA) $(RUN)
