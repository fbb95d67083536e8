.PHONY: setup demo test lint lock help

help:            ## these lines
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup:           ## make .venv (pinned packages, this checkout)
	@tools/setup_environment.sh

demo: setup      ## set up, then train the embedded demo by online DPO on two processes
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/torchrun --nproc-per-node 2 launchers/train.py --config-name online_dpo

test: setup      ## set up, then pass the tests
	@.venv/bin/ruff check . && .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup      ## style only
	@.venv/bin/ruff check .

lock:            ## pin the newest versions that fit together (needs uv)
	@uv pip compile -q --python-version 3.12 --extra test --no-header --no-annotate pyproject.toml -o requirements.lock
