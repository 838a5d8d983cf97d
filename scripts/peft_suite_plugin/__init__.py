"""What scripts/peft_suite.py does to PEFT's tests so that DLoR runs through them; their files stay as they are.

- `plan` looks at a test's parametrisation and code, and decides whether and how it is run: DLoR takes the place of
  LoRA, the one method that every kind of test has.
- `cases` makes DLoR's rows out of LoRA's in a parametrisation, one for each of several forms of DLoR; `expansions`
  does so for unittest classes.
- `stand_in` is what the name LoraConfig means inside a test: DLoRConfig, made with LoRA's arguments. A test that asks
  for what only LoRA has is left out.
- `lifts` changes what else stands in the way: skips for methods without a feature that DLoR has, and the network.
- `rates` has the learning rates of tests that choose theirs by method, and fails what ends in nan.
- `renaming` puts DLoR's names where a test spells out LoRA's.
- `exceptions` are the tests that are left out by name, each with its reason.
- `models`, with `repos`, `hub`, `diffusion` and `data`, builds what the suite would download.
- `plugin` holds pytest's hooks; `runner` and `report` belong to the command.
"""
