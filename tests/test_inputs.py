"""What users give flux_distill.py and toy_2d.py: images, captions, prompts, flags, environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
from tiny_runs import fd

ROOT = Path(fd.__file__).parent

# ------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("script", ["toy_2d", "flux_distill"])
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_backend_of_a_notebook_does_not_matter(script, backend):
    """They draw without any backend; matplotlib itself stops at one that it can't find."""
    env = os.environ | {"MPLBACKEND": backend}
    code = f"import {script}; import matplotlib.animation"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]
