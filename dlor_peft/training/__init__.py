"""`dlor train`: a typed YAML recipe in; an adapter, its metrics and the proof that it reloads and merges out."""
