import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from megapref.mcore import capabilities, kernels
from megapref.runlog import create_run_dir

SPEC = importlib.util.spec_from_file_location("env_report", Path(__file__).resolve().parents[2] / "tools" / "env_report.py")
env_report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(env_report)


@pytest.fixture
def installed(monkeypatch):
    """Every distribution is installed, and importing any module fails as compiled extensions do."""

    def fail(name: str):
        raise OSError(f"{name}: libcudnn.so.9 is not there")

    monkeypatch.setattr(kernels, "version", lambda name: "2.8.0")
    monkeypatch.setattr(importlib, "import_module", fail)


def test_a_library_that_is_not_there():
    assert kernels.library_state("no-such-distribution", "no_such_module", has_gpu=True) == "not installed"


def test_a_broken_library_is_reported_with_its_error(installed):
    state = kernels.library_state("flash-attn", "flash_attn", has_gpu=True)
    assert state == "2.8.0 does not work: OSError: flash_attn: libcudnn.so.9 is not there"


def test_without_a_gpu_nothing_is_imported(installed):
    assert "there is no GPU" in kernels.library_state("transformer-engine", "transformer_engine.pytorch", has_gpu=False)


def test_a_library_that_works_has_its_version(monkeypatch):
    monkeypatch.setattr(kernels, "version", lambda name: "1.2")
    assert kernels.library_state("json", "json", has_gpu=True) == "1.2"


def test_every_kernel_that_is_not_the_fastest_says_why():
    report = capabilities.kernel_report()
    assert report.keys() > {"layers", "attention, training", "attention, decoding", "norm", "rope", "Adam"}
    assert all(kernel["why"] for kernel in report.values() if "torch" in kernel["used"])


def test_tables_show_everything_in_the_report(capsys):
    assert env_report.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert env_report.main([]) == 0
    tables = capsys.readouterr().out
    for section in ("machine", "versions", "libraries", "device", "kernels"):
        for name in report[section]:
            assert f"| {name} |" in tables, (section, name)
    assert report["device"]["collectives"] in tables


def test_a_run_directory_records_the_device(tmp_path):
    run_dir = create_run_dir(tmp_path / "run", "a\n", resume=False, device=capabilities.report())
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["kernels"] == capabilities.kernel_report()
    assert environment["versions"]["torch"]
