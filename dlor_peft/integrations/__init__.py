"""dlor_peft inside other training frameworks: one file each, loaded by its host, never by the package."""
