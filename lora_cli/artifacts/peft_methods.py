"""PEFT's methods that we know: the fields of their config files, and what these say of an adapter.

A method is a `peft_type`. LoRA and its variants DoRA and LoRA-FA share one; AdaLoRA and VeRA have
their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.lora.settings import AdaLoraSettings, LoraSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """The fields of one method at the values that PEFT 0.21 gives them.

    Attributes:
        read: Carry what we read.
        ignored: Change nothing about the tensors or the forward pass of layers that we tell by
            class.
        default_only: Belong to features that are not supported: any other value is refused.
    """

    read: Mapping[str, Any]
    ignored: Mapping[str, Any]
    default_only: Mapping[str, Any]


# Fields of every method that are read.
_COMMON: dict[str, Any] = {
    "base_model_name_or_path": None,
    "bias": "none",
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}

_IGNORED: dict[str, Any] = {
    "auto_mapping": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "peft_version": "0.21.0",
}

_FACTORS_ONLY: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

_FACTORS: dict[str, Any] = _COMMON | {
    "exclude_modules": None,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "trainable_token_indices": None,
}

METHODS: dict[str, Method] = {
    "ADALORA": Method(
        read=_FACTORS
        | {
            "beta1": 0.85,
            "beta2": 0.85,
            "deltaT": 1,
            "init_r": 12,
            "orth_reg_weight": 0.5,
            "peft_type": "ADALORA",
            "rank_pattern": None,
            "target_r": 8,
            "tfinal": 0,
            "tinit": 0,
            "total_step": None,
        },
        # PEFT takes the rank from `init_r`.
        ignored=_IGNORED | {"r": 8},
        default_only=_FACTORS_ONLY
        | {
            "alpha_pattern": {},
            "lora_bias": False,
            "target_parameters": None,
            "use_dora": False,
            "use_rslora": False,
        },
    ),
    "LORA": Method(
        read=_FACTORS
        | {
            "alpha_pattern": {},
            "lora_bias": False,
            "peft_type": "LORA",
            "r": 8,
            "rank_pattern": {},
            "target_parameters": None,
            "use_dora": False,
            "use_rslora": False,
        },
        ignored=_IGNORED,
        default_only=_FACTORS_ONLY,
    ),
    "VERA": Method(
        read=_COMMON
        | {
            "d_initial": 0.1,
            "peft_type": "VERA",
            "projection_prng_key": 0,
            "r": 256,
            "vera_dropout": 0.0,
        },
        ignored=_IGNORED | {"init_weights": True},
        # Without the factors in the file they would depend on the version of torch.
        default_only={"save_projection": True},
    ),
}

# What is read of any method, for those that lack the field.
ABSENT: dict[str, Any] = {
    "exclude_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}

_BIAS = {"VERA": {"lora_only": "vera_only"}}


def peft_type(settings: LoraSettings) -> str:
    """Return the method that an adapter is of."""
    return {"adalora": "ADALORA", "vera": "VERA"}.get(settings.variant, "LORA")


def default_config(method: str = "LORA") -> dict[str, Any]:
    """Return every field that PEFT 0.21 writes for a method, at its default in a saved adapter."""
    table = METHODS[method]
    return {**table.default_only, **table.ignored, **table.read}


def method_fields(settings: LoraSettings, adapted: Iterable[str]) -> dict[str, Any]:
    """Return the fields that say what `settings` says.

    Args:
        settings: Of the adapter.
        adapted: Paths of its layers.

    Raises:
        ValueError: If the settings of AdaLoRA lack its schedule.
    """
    method = peft_type(settings)
    bias = {"bias": _BIAS.get(method, {}).get(settings.bias, settings.bias)}
    if method == "VERA":
        return bias | {
            "d_initial": settings.d_initial,
            "projection_prng_key": settings.projection_seed,
            "r": settings.r,
            "vera_dropout": settings.dropout,
        }
    factors = bias | {"lora_alpha": _whole(settings.alpha), "lora_dropout": settings.dropout}
    if method == "ADALORA":
        return factors | _schedule_fields(settings)
    ranks, alphas = _patterns(adapted, settings)
    return factors | {
        "alpha_pattern": alphas,
        "lora_bias": settings.lora_bias,
        "r": settings.r,
        "rank_pattern": ranks,
        "use_dora": settings.variant == "dora",
        "use_rslora": settings.rslora,
    }


def _schedule_fields(settings: LoraSettings) -> dict[str, Any]:
    plan = settings.adalora
    if plan is None:
        raise ValueError("AdaLoRA must have a schedule, but has none.")
    return {
        "beta1": plan.beta1,
        "beta2": plan.beta2,
        "deltaT": plan.every,
        "init_r": plan.init_r,
        "orth_reg_weight": plan.orthogonal,
        "target_r": settings.r,
        "tfinal": plan.final_steps,
        "tinit": plan.warmup_steps,
        "total_step": plan.total_steps,
    }


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Return what a checked config file says of an adapter."""
    method = config["peft_type"]
    names = {theirs: ours for ours, theirs in _BIAS.get(method, {}).items()}
    bias = names.get(config["bias"], config["bias"])
    if method == "VERA":
        return LoraSettings(
            r=config["r"],
            # VeRA has none.
            alpha=1.0,
            dropout=float(config["vera_dropout"]),
            variant="vera",
            bias=bias,
            d_initial=float(config["d_initial"]),
            projection_seed=config["projection_prng_key"],
        )
    alpha, dropout = float(config["lora_alpha"]), float(config["lora_dropout"])
    if method == "ADALORA":
        return LoraSettings(
            r=config["target_r"],
            alpha=alpha,
            dropout=dropout,
            variant="adalora",
            bias=bias,
            adalora=AdaLoraSettings(
                init_r=config["init_r"],
                total_steps=config["total_step"],
                warmup_steps=config["tinit"],
                final_steps=config["tfinal"],
                every=config["deltaT"],
                beta1=float(config["beta1"]),
                beta2=float(config["beta2"]),
                orthogonal=float(config["orth_reg_weight"]),
            ),
        )
    return LoraSettings(
        r=config["r"],
        alpha=alpha,
        dropout=dropout,
        variant="dora" if config["use_dora"] else "lora",
        rslora=config["use_rslora"],
        lora_bias=config["lora_bias"],
        bias=bias,
        rank_pattern=dict(config["rank_pattern"] or {}),
        alpha_pattern={name: float(a) for name, a in (config["alpha_pattern"] or {}).items()},
    )


def _patterns(
    adapted: Iterable[str], settings: LoraSettings
) -> tuple[dict[str, int], dict[str, float]]:
    """Return ranks and strengths other than the usual ones, by exact path.

    PEFT's patterns are regular expressions of its own rules, ours are globs: a path means the same
    in both.
    """
    names = list(adapted)
    ranks = {name: settings.r_of(name) for name in names}
    alphas = {name: settings.alpha_of(name) for name in names}
    return (
        {name: r for name, r in ranks.items() if r != settings.r},
        {name: _whole(alpha) for name, alpha in alphas.items() if alpha != settings.alpha},
    )


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
