"""What the benchmarks share: how they measure, whom they compare, what they should reach, and how they tell it."""
