"""What the benchmarks share: how they measure, whom they compare, what they should reach, and how they tell it."""

import sys
from pathlib import Path

# the package beside them, whether or not one is installed
sys.path.insert(0, str(Path(__file__).parents[2]))
