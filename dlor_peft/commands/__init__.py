"""The verbs of `dlor`, a module each: `add` declares the arguments, `run` does the work and loads what it needs."""
