"""The thread pool really has the threads that were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from lpsn_tvm.runtime import load_ffi, set_num_threads
for count in (2, 1, 2):
    set_num_threads(count)
    print(load_ffi().get_global_func("runtime.NumThreads")())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_as_many_threads_as_asked_for():
    environment = {k: v for k, v in os.environ.items() if k not in ("TVM_NUM_THREADS", "OMP_NUM_THREADS")}
    root = Path(__file__).resolve().parents[1]
    # A thread pool of an earlier test may have bound this process to one processor: children inherit that.
    unbind = (
        f"import os; os.sched_setaffinity(0, range({os.cpu_count()}))\n" if hasattr(os, "sched_setaffinity") else ""
    )
    done = subprocess.run(
        [sys.executable, "-c", unbind + SCRIPT], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.stdout.split() == ["2", "1", "2"], done.stderr
