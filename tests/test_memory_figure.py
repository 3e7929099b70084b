"""The memory that a run reports is its own."""

import subprocess
import sys

import numpy as np

from crysldnet.platforms import peak_memory_mb


def test_a_process_does_not_count_what_its_parent_used():
    held = np.ones(60 * 2**20)
    assert peak_memory_mb() > 480
    asked = "from crysldnet.platforms import peak_memory_mb; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < 300
    assert held.nbytes > 0
