"""Tests import the files of the repository's root, whichever way pytest is started."""

import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
