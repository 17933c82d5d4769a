"""A low-rank update of one parameter of a module that is no plain layer: experts, attention."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lora_cli.lora.kinds import add_in_float
from lora_cli.lora.layer import AdapterLayer, TransparentLayer
from lora_cli.lora.settings import scale_of


class LoraParameter(TransparentLayer):
    r"""A module one parameter of which gets a trainable low-rank update.

    The module computes with ``W + scale * dW`` in place of W, ``scale = alpha / r``. A parameter of
    two dimensions is a matrix (out, in), and ``dW = B A``. One of three dimensions is a stack of E
    matrices, those of the experts of a mixture, and each has factors of its own::

        dW[e] = B_e A_e        A_e = A[e r : (e + 1) r],  B_e = B[:, e :: E]

    that is, A holds the experts one after the other and B interleaves them, as PEFT's files do
    since 0.19. Where the module says that it is transposed (GPT-OSS), a matrix of the stack is
    (in, out) and gets the transpose.

    The sum is taken for each call, in the dtype of W; nothing of it is kept but what the module's
    own backward saves. Inputs cannot be dropped out, since the module decides what it multiplies.

    Several parameters of a module are adapted by layers around each other. Attributes that a layer
    lacks are those of the module; the parameter is seen with its update.

    Parameters, named as in adapter state after ``base_layer`` is left out:

    =================  ==========  ============================  ========
    name               shape       trained                       dtype
    =================  ==========  ============================  ========
    ``lora_A.weight``  (E r, in)   yes, but not if ``freeze_A``  float32
    ``lora_B.weight``  (out, E r)  yes                           float32
    =================  ==========  ============================  ========

    Args:
        base: The module, or a layer like this one around it. It is kept and frozen in place.
        parameter_name: Name of the parameter within the module.
        r: Rank of the update of each matrix.
        alpha: Strength of the update before it is divided.
        rslora: Divide ``alpha`` by ``sqrt(r)`` (arXiv:2312.03732).
        freeze_A: Train B only (LoRA-FA, arXiv:2308.03303).

    Raises:
        ValueError: If ``r`` is below 1, or the parameter has neither two nor three dimensions.
    """

    def __init__(
        self,
        base: nn.Module,
        parameter_name: str,
        *,
        r: int,
        alpha: float,
        rslora: bool = False,
        freeze_A: bool = False,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, but is {r}.")
        self.parameter_name = parameter_name
        self.base_layer = base.requires_grad_(False)
        weight = self._frozen()
        if weight.ndim not in (2, 3):
            raise ValueError(
                f"{parameter_name} must have two or three dimensions, but has {weight.ndim}."
            )
        self.is_matrix = weight.ndim == 2
        self.num_matrices = 1 if self.is_matrix else weight.shape[0]
        owner, _ = self._owner()
        self.transposed = weight.ndim == 3 and bool(getattr(owner, "is_transposed", 0))
        out_features, in_features = weight.shape[-2:]
        if self.transposed:
            in_features, out_features = out_features, in_features
        kind = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(in_features, r * self.num_matrices, bias=False, **kind)
        self.lora_B = nn.Linear(r * self.num_matrices, out_features, bias=False, **kind)
        self.scale = scale_of(r, alpha, rslora=rslora)
        self.freeze_A = freeze_A
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        """Return what this layer lacks from its module, the adapted parameter with its update."""
        if name == self.__dict__.get("parameter_name"):
            return self.adapted()
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the update in its parameter."""
        _, path = self._owner()
        tensors = {f"{path}{self.parameter_name}": self.adapted()}
        return functional_call(self.base_layer, tensors, args, kwargs, tie_weights=False)

    def adapted(self) -> torch.Tensor:
        """Return the parameter with its update, in its own dtype; gradients reach A and B."""
        weight = self._frozen()
        left, right = (factor.to(weight.dtype) for factor in self._factors())
        add = torch.addmm if weight.ndim == 2 else torch.baddbmm
        with torch.autocast(weight.device.type, enabled=False):
            return add(weight, left, right, alpha=self.scale)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return A and B, or B alone."""
        frozen = self.lora_A.weight if self.freeze_A else None
        return [parameter for parameter in super().trained_parameters() if parameter is not frozen]

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return the update in the shape of the parameter, float32."""
        left, right = self._factors()
        with torch.autocast(left.device.type, enabled=False):
            return left @ right * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the module with the update in its parameter, which alone it does not share."""
        base = self.base_layer
        plain: nn.Module = base.merged() if isinstance(base, AdapterLayer) else base
        weight = add_in_float(self._frozen(), self.delta_weight())
        return with_parameters(plain, {self.parameter_name: weight})

    def _owner(self) -> tuple[nn.Module, str]:
        """The module that has the parameter, and the way to it from `base_layer`."""
        owner, path = self.base_layer, ""
        while isinstance(owner, LoraParameter):
            owner, path = owner.base_layer, f"{path}base_layer."
        return owner, path

    def _frozen(self) -> torch.Tensor:
        owner, _ = self._owner()
        weight: torch.Tensor = getattr(owner, self.parameter_name)
        return weight

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors whose product is the update but for the scale, of the parameter's shape."""
        A, B = self.lora_A.weight, self.lora_B.weight
        if self._frozen().ndim == 2:
            return B, A
        A = A.unflatten(0, (self.num_matrices, -1))
        B = B.unflatten(1, (-1, self.num_matrices)).permute(2, 0, 1)
        return (A.mT, B.mT) if self.transposed else (B, A)


def with_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module like another, sharing all it has, but with other frozen parameters."""
    twin = copy.copy(module)
    # A copy of a module shares these tables with it.
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = dict(module.__dict__[table])
    for name, tensor in tensors.items():
        setattr(twin, name, nn.Parameter(tensor, requires_grad=False))
    return twin
