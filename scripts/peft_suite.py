"""Runs PEFT's own tests with DLoR in the place of LoRA, and prints what passed, failed and was skipped.

    python scripts/peft_suite.py                         # the files that run in CI, in under ten minutes
    python scripts/peft_suite.py --all                   # every file
    python scripts/peft_suite.py --files test_config.py  # some files
    python scripts/peft_suite.py -- -k merge -x          # what follows -- goes to pytest

The tests come from PEFT's source distribution, in the installed version, and stay as they are: what is changed about
them, the pytest plugin in peft_suite_plugin/ changes when they are collected. It needs diffusers, and for some files
more: what is missing is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from peft_suite_plugin import report, runner

CI = (
    "test_auto.py",
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_initialization.py",
    "test_integrations.py",
    "test_lora_conversion.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_mixed.py",
    "test_other.py",
    "test_target_parameters.py",
    "test_token_classification_qa.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
    "test_vision_models.py",
)
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
        "--numprocesses", default="0", metavar="N", help="processes to run the tests in, by pytest-xdist"
    )
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
    pytest_arguments = ["--numprocesses", arguments.numprocesses, *arguments.pytest_arguments]
    outcomes = runner.run(source, runner.build_models(arguments.work), files, pytest_arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes, indent=1))
    # a choice among the tests may leave a file empty
    must_collect = () if arguments.pytest_arguments else [*CI, *BESIDES] if arguments.all else files
    return report.show(outcomes, must_collect)


if __name__ == "__main__":
    sys.exit(main())
