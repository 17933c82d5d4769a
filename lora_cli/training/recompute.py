"""Gradient checkpointing: less memory, since activations are computed again going back."""

from typing import Any

from lora_cli.errors import Problem, UserError

KEY = "trainer.gradient_checkpointing"


def check_recompute(model: Any) -> None:
    """Check that a model can compute its blocks a second time.

    Raises:
        UserError: If it cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
        raise UserError(
            Problem(
                id="trainer.no-checkpointing",
                message=f"`{KEY}` must be false for {family}, which transformers cannot do that"
                " for, but is true.",
                key=KEY,
                fix="set a smaller trainer.micro_batch_size: the gradient stays the same",
            )
        )


def recompute_blocks(model: Any) -> None:
    """Keep of each block its input alone, in training, and compute the rest again; in place.

    Not by the reentrant way of torch, which gives no gradient to a block whose inputs have none:
    all of them are like that where the embeddings are frozen. Dropout draws the same both times.

    Raises:
        UserError: If the model cannot do that.
    """
    check_recompute(model)
    # The second is the name that it had in earlier versions of transformers.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # It makes frozen embeddings ask for gradients, which the reentrant way alone needs.
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()
