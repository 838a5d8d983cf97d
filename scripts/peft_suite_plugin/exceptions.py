"""Tests that hold whatever they are given to what LoRA alone does, and why DLoR does otherwise."""

_CASTING = "expects an error that needs factors which are modules and multiply their input"
_FREE_RANK = "expects an error for a rank that the groups of a convolution do not divide; DLoR's rank is free"
_DEAD = "expects a change, but the ReLU before the layer is zero on all that the added diagonal reads: no gradient"
_NAMES = "cuts parameter names where LoKr's end"
_MODULES = "looks into LoRA's layers: expects factors that are nn.Linear"
_PARAMETERS = "looks into LoRA's layers: puts parameters among an adapter's modules"
_SHAPES = "looks into LoRA's layers: reads the rank off shapes that in DLoR's are transposed and stacked"
_SPECTRUM = "holds what 90% of the spectrum give to the error that they have with LoKr's"

OTHERWISE = {
    "test_custom_models.py": {
        "test_only_params_are_updated[Conv3d 2 DLoR, additive]": _DEAD,
    },
    "test_helpers.py": {
        "test_no_disable_input_dtype_casting": _CASTING,
        "test_disable_input_dtype_casting_inactive": _CASTING,
        "test_disable_input_dtype_casting_inactive_after_existing_context": _CASTING,
    },
    "test_initialization.py": {
        "test_error_raised_if_rank_not_divisible_by_groups": _FREE_RANK,
        "test_prepare_model_for_compiled_hotswap_conv2d_groups_rank_not_divisible_raises": _FREE_RANK,
        "test_hotswap_missing_key_works": "expects zeros for one missing factor of a layer, whose diagonal would stay",
        "test_prepare_model_for_compiled_hotswap_scalings_are_tensors": "LoRA swaps lora_alpha; DLoR's scale stays",
        "test_prepare_model_for_compiled_hotswap_conv2d_groups_rank_padding_works": _SHAPES,
        "test_prepare_model_for_compiled_hotswap_conv2d_rank_padding_works": _SHAPES,
        "test_prepare_model_for_compiled_hotswap_rank_padding_works": _SHAPES,
        "test_prepare_model_for_compiled_hotswap_same_rank_padding_works": _SHAPES,
        "test_prepare_model_for_compiled_hotswap_with_rank_pattern": _SHAPES,
        "test_lora_with_bias_argument[invalid]": "expects an unknown bias to be accepted until a model is wrapped",
    },
    "test_integrations.py": {
        "test_mixtral_v4_lora_weight_conversion_peft_model_load_adapter": "knows the logits of a real LoRA checkpoint",
    },
    "test_lora_conversion.py": {
        "test_converted_lora_approximates_original_adapter": _SPECTRUM,
        "test_targeted_modules_identical": _NAMES,
        "test_targeted_modules_identical_target_modules_str": _NAMES,
    },
    "test_target_parameters.py": {
        "test_target_parameters_works_with_existing_parametrization": "knows what lora_alpha / r makes of the output",
    },
    "test_tuners_utils.py": {
        "test_add_second_adapter_with_all_linear_works": _MODULES,
        "test_model_requires_grad_model_irregular": _PARAMETERS,
        "test_requires_grad_irregular": _PARAMETERS,
        "test_transformers_model": "knows the number of parameters of the real GPT-2",
    },
}
"""File -> test, or one of its items -> why it is left out."""


def otherwise(file: str, test: str) -> str | None:
    """Why a test is left out; None if it is not."""
    return OTHERWISE.get(file, {}).get(test)
