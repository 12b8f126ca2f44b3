"""Which configurations of adapters are refused."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig

from lightning_cost import PenaltySearch
from lightning_cost.searches._config import check_config

# Not in every version of PEFT that is supported.
NEWER_FIELDS = [
    (LoraConfig(**{name: value}), f"`adapter` must be a plain LoRA; got {name}=")
    for name, value in {"kasa_config": {"beta": 1}}.items()
    if name in {field.name for field in fields(LoraConfig)}
]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OFTConfig(), r"must be a peft.LoraConfig, peft.LoHaConfig or peft.LoKrConfig; got OFTConfig"),
        (IA3Config(), r"must be a peft.LoraConfig, .* got IA3Config"),
        (VeraConfig(), r"must be a peft.LoraConfig, .* got VeraConfig"),
        ("lora", r"must be a peft.LoraConfig, .* got 'lora'"),
        (LoraConfig(use_dora=True), r"must not use DoRA.*use_dora=False"),
        (LoraConfig(lora_dropout=0.1), r"must not use dropout.*lora_dropout=0.1. Set it to 0"),
        (LoHaConfig(rank_dropout=0.2), r"must not use dropout.*rank_dropout=0.2"),
        (LoKrConfig(module_dropout=0.3), r"must not use dropout.*module_dropout=0.3"),
        (LoraConfig(bias="all"), r"must leave the biases alone; got bias='all'. Set it to 'none'"),
        (LoraConfig(lora_bias=True), r"must leave the biases alone; got lora_bias=True"),
        (LoraConfig(rank_pattern={"0": 3}), r"must have one rank and alpha for all layers; got rank_pattern={'0': 3}"),
        (
            LoHaConfig(alpha_pattern={"0": 3}),
            r"must have one rank and alpha for all layers; got alpha_pattern={'0': 3}",
        ),
        (LoraConfig(init_lora_weights="pissa"), r"must leave the weights .* got init_lora_weights='pissa'"),
        (LoraConfig(init_lora_weights="olora"), r"must leave the weights .* got init_lora_weights='olora'"),
        (LoraConfig(init_lora_weights="pissa_niter_4"), r"must leave the weights .* got .*='pissa_niter_4'"),
        (LoraConfig(modules_to_save=["head"]), r"must only add .* got modules_to_save=\['head'\]"),
        (LoraConfig(target_parameters=["0.weight"]), r"must only add .* got target_parameters=\['0.weight'\]"),
        (LoraConfig(trainable_token_indices=[1]), r"must only add .* got trainable_token_indices=\[1\]"),
        (LoraConfig(layer_replication=[(0, 1)]), r"must only add .* got layer_replication=\[\(0, 1\)\]"),
        (LoraConfig(use_qalora=True), r"must be a plain LoRA; got use_qalora=True"),
        (LoraConfig(layers_to_transform=[0]), r"needs `target_modules`.*layers_to_transform=\[0\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_adapters_that_are_no_plain_weight_change_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`adapter` {message}"):
        check_config(config)
    with pytest.raises(ValueError, match=f"`adapter` {message}"):
        PenaltySearch(adapter=config)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3),
        LoraConfig(r=3, lora_alpha=1, use_rslora=True, target_modules=["0"]),
        LoraConfig(init_lora_weights="gaussian"),
        LoraConfig(init_lora_weights="orthogonal"),
        LoHaConfig(r=3),
        LoKrConfig(r=3, decompose_both=True),
    ],
    ids=lambda config: config.peft_type,
)
def test_plain_adapters_are_accepted(config: PeftConfig) -> None:
    assert check_config(config) is config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=0), "`adapter.r` must be an integer of at least 1; got 0"),
        (LoraConfig(r=2.5), "`adapter.r` must be an integer of at least 1; got 2.5"),
        (LoraConfig(lora_alpha=0), "`adapter.lora_alpha` must be a positive number; got 0"),
        (LoraConfig(lora_alpha=math.nan), "`adapter.lora_alpha` must be a positive number; got nan"),
        (LoHaConfig(alpha="8"), "`adapter.alpha` must be a positive number; got '8'"),
        (LoKrConfig(alpha=-1), "`adapter.alpha` must be a positive number; got -1"),
        (LoraConfig(use_rslora="yes"), "`adapter.use_rslora` must be True or False; got 'yes'"),
        (LoraConfig(target_modules=[]), "`adapter.target_modules` must be a list of names"),
        (LoraConfig(target_modules="["), "`adapter.target_modules` must be .* no regular expression"),
        (LoraConfig(exclude_modules="["), "`adapter.exclude_modules` must be .* no regular expression"),
        *NEWER_FIELDS,
        (LoHaConfig(inference_mode=True), "`adapter.inference_mode=True` has no effect in a teleport. Leave it unset"),
        (LoraConfig(fan_in_fan_out=True), "`adapter.fan_in_fan_out=True` has no effect in a teleport"),
        (LoraConfig(revision="main"), "`adapter.revision='main'` has no effect in a teleport"),
        (LoKrConfig(base_model_name_or_path="gpt2"), "`adapter.base_model_name_or_path='gpt2'` has no effect"),
        (LoraConfig(megatron_config={"a": 1}), "`adapter.megatron_config={'a': 1}` has no effect in a teleport"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_fields_that_are_wrong_or_not_read_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PenaltySearch(adapter=config)
