"""The kernels compile to machine code for GPUs that are not here, and keep a row in registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_kernels.py", str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [line.split() for line in run.stdout.splitlines()]
    assert len(found) >= 10
    for name, registers, stack in found:
        assert int(stack) <= 1024, f"{name} spills {stack} bytes a thread with {registers} registers"
