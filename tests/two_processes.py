"""Runs a script in two processes that train together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)

# Threads of native libraries (Arrow, by way of torch and pandas) now and then abort the exit of
# an interpreter whose work is done: huggingface/datasets#7566. A script that fails still says so.
LEAVE = """
import os as _os, sys as _sys
_sys.stdout.flush()
_os._exit(0)
"""


def run_in_two_processes(code, folder, *arguments):
    """What the processes printed; fails with the end of their errors if one fails."""
    return run_in_processes(2, code, folder, *arguments)


def run_in_processes(num, code, folder, *arguments):
    """The same for another number of them."""
    script = folder / "script.py"
    script.write_text(code + LEAVE)
    launch = "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"
    return run_python(*launch, str(script), *arguments)


def run_python(*arguments, given=None):
    """What an interpreter of its own prints, whose standard input is `given`."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
