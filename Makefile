# Everything here works on a fresh clone: each target first makes .venv if it is not there.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test check campaign gpu k8s proto clean

demo: $(STAMP)  ## answer questions out of a long context that is sharded over two ranks
	$(VENV)/bin/ringspan demo -cp 2 --context-tokens 16384

test: $(STAMP) check  ## static checks, then unit and integration tests
	$(PY) -m pytest -m "not campaign and not gpu" -n 2 --dist loadfile

check: $(STAMP)  ## ruff, mypy and import directions
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

campaign: $(STAMP)  ## the tests that are too long for every day
	$(PY) -m pytest -m campaign --timeout 3600

# A python whose torch has CUDA: nothing is installed for it here. OPTIONS="--only needle", say.
PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
gpu:  ## tests and measurements on CUDA, into benchmarks/results/; without CUDA, what it would do
	$(PYTHON) -m benchmarks.gpu $(OPTIONS)

OVERLAY ?=
k8s: $(STAMP)  ## check the Kubernetes manifests, or those of OVERLAY=DIRECTORY, without a cluster
	$(PY) -m k8s.validate $(OVERLAY)

# The version says which protobuf the result needs at least: see pyproject.toml.
proto: $(STAMP)  ## what is generated from the gRPC service's definition
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt grpcio-tools==1.85.1
	$(PY) -m grpc_tools.protoc -I . --python_out=. cluster/rpc/ringspan_v1.proto

clean:
	rm -rf $(VENV) build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	@echo "ringspan: setting up $(VENV) (a few minutes the first time) ..."
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
	@echo "ringspan: $(VENV) is ready"
