"""The experiments of paper.py, one a file: run() measures, draw() and caption() tell it from the numbers alone."""

import sys
from pathlib import Path

# the package beside them, whether or not one is installed
sys.path.insert(0, str(Path(__file__).parents[2]))
