"""Parts of scripts/study.py."""
