"""Runs PEFT's own tests with DLoR in the place of LoRA, and prints what passed, failed and was skipped.

    python scripts/peft_suite.py                         # the files that run in CI, in some ten minutes on two cores
    python scripts/peft_suite.py --all                   # every file
    python scripts/peft_suite.py --files test_config.py  # some files
    python scripts/peft_suite.py -- -k merge -x          # what follows -- goes to pytest

The tests come from PEFT's source distribution, in the installed version, and stay as they are: what is changed about
them, the pytest plugin in peft_suite_plugin/ changes when they are collected. It needs diffusers, and for some files
more: what is missing is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from peft_suite_plugin import report, runner

CI = {
    "test_auto.py": 14,
    "test_config.py": 108,
    "test_custom_models.py": 5880,
    "test_decoder_models.py": 1395,
    "test_helpers.py": 9,
    "test_hub_features.py": 27,
    "test_initialization.py": 125,
    "test_integrations.py": 6,
    "test_lora_conversion.py": 16,
    "test_low_level_api.py": 46,
    "test_mapping.py": 2,
    "test_mixed.py": 18,
    "test_other.py": 32,
    "test_target_parameters.py": 800,
    "test_token_classification_qa.py": 28,
    "test_trainable_tokens.py": 68,
    "test_tuners_utils.py": 172,
    "test_vision_models.py": 3,
}
"""The files that run in CI -> how many tests must pass: about nine tenths of what does, so that no parametrisation is
lost unseen, while a new PEFT may drop a few."""

# in every other file no method can be put in, or not without an accelerator
BESIDES = (
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_quantization.py",
    "test_seq_classifier.py",
    "test_stablediffusion.py",
    "test_torch_compile.py",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="run every file of the suite")
    which.add_argument("--files", nargs="+", metavar="FILE", help="run these, for example test_config.py")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir()) / "dlor-peft-suite",
        help="where the unpacked source and the stand-in models are kept for the next run (default: %(default)s)",
    )
    parser.add_argument(
        "--numprocesses",
        default="logical" if importlib.util.find_spec("xdist") else "0",
        metavar="N",
        help="processes to run the tests in, by pytest-xdist: one a core, if it is installed (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="print the names of the tests that are left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every outcome here")
    parser.add_argument("pytest_arguments", nargs="*", metavar="-- ...", help="arguments for pytest")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    source = runner.fetch_source(arguments.work)
    files = sorted(path.name for path in (source / "tests").glob("test_*.py"))
    if not arguments.all:
        unknown = sorted(set(arguments.files or CI) - set(files))
        if unknown:
            sys.exit(f"the suite has no {', '.join(unknown)}; it has {', '.join(files)}")
        files = list(arguments.files or CI)
    missing = runner.missing_packages(source / "tests", files)
    if missing:
        for package, needed_by in missing.items():
            print(f"{package} is not installed, and needed by {', '.join(needed_by)}", file=sys.stderr)
        sys.exit(f"pip install {' '.join(missing)}")
    pytest_arguments = list(arguments.pytest_arguments)
    if arguments.numprocesses != "0":
        pytest_arguments[:0] = ["--numprocesses", arguments.numprocesses]
    outcomes = runner.run(source, runner.build_models(arguments.work), files, pytest_arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes, indent=1))
    # of a file besides, something; a choice among the tests may leave a file empty
    least = CI | dict.fromkeys(BESIDES if arguments.all else set(files) - set(CI), 1)
    must_pass = {} if arguments.pytest_arguments else {file: least[file] for file in least if file in files}
    return report.show(outcomes, must_pass, arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
