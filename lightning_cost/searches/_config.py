"""Which PEFT configurations a search can use."""

from __future__ import annotations

from peft import PeftConfig, PeftType

from lightning_cost._arguments import check_bool, check_integer, check_positive, check_targets

__all__: list[str] = []

# The others change the weights or need data.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
_VARIANTS = (
    "loftq_config",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)
# They say how an adapter is stored, or how a model is run with it.
_UNREAD = (
    "task_type",
    "inference_mode",
    "fan_in_fan_out",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "ensure_weight_tying",
)
_KINDS = (PeftType.LORA, PeftType.LOHA, PeftType.LOKR)


def check_config(config: object) -> PeftConfig:
    """Accept a PEFT configuration whose weight change is a plain, deterministic sum."""
    if not isinstance(config, PeftConfig) or config.peft_type not in _KINDS:
        raise ValueError(
            f"`adapter` must be a peft.LoraConfig, peft.LoHaConfig or peft.LoKrConfig; got {config!r}. Other adapters"
            " do not add a change to the weights."
        )
    if getattr(config, "use_dora", False):
        raise ValueError("`adapter` must not use DoRA, whose change of the weights is not a plain sum: use_dora=False.")
    check_integer("adapter.r", getattr(config, "r", 1), 1)
    for name in ("lora_alpha", "alpha"):
        check_positive(f"adapter.{name}", getattr(config, name, 1))
    check_bool("adapter.use_rslora", getattr(config, "use_rslora", False))
    check_targets("adapter.target_modules", getattr(config, "target_modules", None))
    # An empty list excludes nothing, as None does.
    check_targets("adapter.exclude_modules", getattr(config, "exclude_modules", None) or None)
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise ValueError(f"`adapter` must be a plain LoRA; got {name}={getattr(config, name)!r}. Leave it unset.")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name, None):
            raise ValueError(
                f"`adapter` must have one rank and alpha for all layers; got {name}={getattr(config, name)}."
            )
    for name in ("lora_dropout", "module_dropout", "rank_dropout"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"`adapter` must not use dropout, which would move the losses at random; got"
                f" {name}={getattr(config, name)}. Set it to 0."
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"`adapter` must leave the biases alone; got bias={config.bias!r}. Set it to 'none'.")  # type: ignore[attr-defined]
    if getattr(config, "lora_bias", False):
        raise ValueError("`adapter` must leave the biases alone; got lora_bias=True. Set it to False.")
    initialization = getattr(config, "init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise ValueError(
            "`adapter` must leave the weights as they are when it is initialized; got"
            f" init_lora_weights={initialization!r}. Use one of {list(_INITIALIZATIONS)}."
        )
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, name, None):
            raise ValueError(
                f"`adapter` must only add a change to the weights of layers; got {name}={getattr(config, name)!r}."
                " Leave it unset."
            )
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None and getattr(config, "target_modules", None) is None:
        raise ValueError(f"`adapter` needs `target_modules` as a list to go with layers_to_transform={layers!r}.")
    default = type(config)()
    for name in _UNREAD:
        value = getattr(config, name, None)
        if value != getattr(default, name, None):
            raise ValueError(f"`adapter.{name}={value!r}` has no effect in a teleport. Leave it unset.")
    return config
