r"""AdaLoRA: ranks move to the layers that need them (Zhang et al. 2023, arXiv:2303.10512).

Each update is kept in the form of a singular value decomposition, ``B diag(E) A``. Training starts
at rank `init_r` everywhere; then a budget for the sum of all ranks falls along a cubic, and the
triplets (a row of A, an entry of E, a column of B) of least importance lose their entry of E.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional

from lora_cli.errors import Problem, UserError
from lora_cli.lora.dense import DenseUpdateLayer
from lora_cli.lora.kinds import linear_sizes
from lora_cli.lora.settings import AdaLoraSettings

# Of PEFT's divisor, so that adapters compute the same in both.
_EPSILON = 1e-5
_STD = 0.02


class AdaLoraLinear(DenseUpdateLayer):
    r"""A frozen linear layer plus an update of which single ranks can be switched off.

    Computes ``y = base(x) + scale * B diag(E) A dropout(x)`` with ``scale = alpha / r``. A and B
    start Gaussian with a spread of 0.02, E starts at zero, so a new layer returns exactly
    ``base(x)``. This is equation 3 of the paper; the scale stays that of the first rank while
    ranks are taken away, as in the authors' code.

    Parameters, named as in PEFT's files, all of them trained and float32:

    ==========  =================
    name        shape
    ==========  =================
    ``lora_A``  (r, in_features)
    ``lora_B``  (out_features, r)
    ``lora_E``  (r, 1)
    ==========  =================

    Args:
        base: The layer to adapt, kept and frozen in place.
        r: Rank at the start.
        alpha: Strength of the update before division by ``r``.
        dropout: Chance of zeroing each input element on the adapter path, in training only.

    Raises:
        ValueError: If ``r`` is below 1, or ``dropout`` is outside [0, 1).
    """

    def __init__(self, base: nn.Module, *, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, but is {r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), but is {dropout}.")
        in_features, out_features = linear_sizes(base)
        self.base_layer = base.requires_grad_(False)
        device = self.base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device))
        self.lora_E = nn.Parameter(torch.zeros(r, 1, device=device))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scale = alpha / (r + _EPSILON)
        nn.init.normal_(self.lora_A, std=_STD)
        nn.init.normal_(self.lora_B, std=_STD)
        self.train(base.training)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scale * B diag(E) A dropout(x)``."""
        x = self.dropout(x.to(self.lora_A.dtype))
        inner = functional.linear(x, self.lora_A * self.lora_E)
        return functional.linear(inner, self.lora_B) * self.scale

    @torch.no_grad()
    def dense_update(self) -> torch.Tensor:
        """Return the update as (out_features, in_features), float32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.lora_B @ (self.lora_A * self.lora_E) * self.scale

    def triplets(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the three factors with their names."""
        yield from (("lora_A", self.lora_A), ("lora_B", self.lora_B), ("lora_E", self.lora_E))


class RankAllocator:
    """Decides which ranks live, as a `lora_cli.lora.method.StepMethod`.

    The sensitivity of a parameter is ``I = |w * dL/dw|`` (equation 8), here with the value of w
    after the step, as in the authors' code. Two running means smooth it, ``I' = beta1 I' +
    (1 - beta1) I`` (9) and ``U' = beta2 U' + (1 - beta2) |I - I'|`` (10), and its score is
    ``I' * U'`` (11). A triplet scores its entry of E plus the means of its row and column (7).

    Args:
        model: A model with AdaLoRA layers in place.
        r: Average rank at the end.
        settings: Schedule and decays.
    """

    def __init__(self, model: nn.Module, *, r: int, settings: AdaLoraSettings) -> None:
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, AdaLoraLinear)
        }
        self._settings = settings
        self._start = sum(len(layer.lora_E) for layer in self._layers.values())
        self._goal = min(r * len(self._layers), self._start)
        self._means: dict[str, torch.Tensor] = {}
        self._changes: dict[str, torch.Tensor] = {}
        self._alive: dict[str, torch.Tensor] = {}

    def penalty(self) -> torch.Tensor | None:
        """Return how far the factors are from orthogonal (equation 4), averaged over factors.

        That is ``orthogonal`` times the mean of ``||A A^T - 1||`` and ``||B^T B - 1||``, Frobenius
        norms that are not squared, as in the authors' code.
        """
        if self._settings.orthogonal == 0:
            return None
        norms = []
        for layer in self._layers.values():
            for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
                norms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return self._settings.orthogonal * torch.stack(norms).mean()

    def budget(self, step: int) -> int:
        """Return how many triplets may live after step `step`, counted from 1 (section 3.3)."""
        plan = self._settings
        if step <= plan.warmup_steps:
            return self._start
        last = plan.total_steps - plan.final_steps
        left = max(0.0, 1 - (step - plan.warmup_steps) / (last - plan.warmup_steps))
        return int((self._start - self._goal) * left**3 + self._goal)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the importance of every parameter, and switch triplets off when it is time."""
        plan = self._settings
        last = plan.total_steps - plan.final_steps
        if step < last:
            self._update_importance()
            if step % plan.every == 0:
                self._keep_best(self.budget(step))
            return
        if not self._alive:
            self._alive = self._keep_best(self._goal)
            self._means, self._changes = {}, {}
        for name, layer in self._layers.items():
            layer.lora_E.masked_fill_(~self._alive[name], 0.0)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running means, and the triplets that live once that is settled."""
        parts = {"mean": self._means, "change": self._changes, "alive": self._alive}
        return {
            f"{part}/{name}": tensor.to("cpu", copy=True)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a `state`.

        Raises:
            UserError: If it belongs to other layers.
        """
        shapes = {f"alive/{name}": layer.lora_E.shape for name, layer in self._layers.items()}
        for name, parameter in self._parameters():
            shapes |= {f"{part}/{name}": parameter.shape for part in ("mean", "change")}
        wrong = sorted(key for key in state if state[key].shape != shapes.get(key))
        if wrong:
            raise UserError(
                Problem(
                    id="checkpoint.ranks",
                    message="The importance of ranks must belong to the adapted layers, but "
                    f'"{wrong[0]}" does not ({len(wrong)} such).',
                    fix="resume with the configuration that wrote the checkpoint",
                )
            )
        targets = {"mean": self._means, "change": self._changes, "alive": self._alive}
        for tensors in targets.values():
            tensors.clear()
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            layer = self._layers[name if part == "alive" else name.rpartition(".")[0]]
            targets[part][name] = tensor.to(layer.lora_E.device, copy=True)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self._layers.items():
            for leaf, parameter in layer.triplets():
                yield f"{name}.{leaf}", parameter

    def _update_importance(self) -> None:
        beta1, beta2 = self._settings.beta1, self._settings.beta2
        for name, parameter in self._parameters():
            # No gradient: the layer took no part in the step.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            now = (parameter * gradient).abs()
            zero = torch.zeros_like(now)
            mean = beta1 * self._means.get(name, zero) + (1 - beta1) * now
            change = beta2 * self._changes.get(name, zero) + (1 - beta2) * (now - mean).abs()
            self._means[name], self._changes[name] = mean, change

    def _scores(self, name: str) -> torch.Tensor:
        """Return the score of each triplet of a layer, shape (r, 1)."""
        A, B, E = (
            self._means[f"{name}.{leaf}"] * self._changes[f"{name}.{leaf}"]
            for leaf in ("lora_A", "lora_B", "lora_E")
        )
        return E + (A.mean(1) + B.mean(0)).unsqueeze(1)

    def _keep_best(self, budget: int) -> dict[str, torch.Tensor]:
        """Set the entries of E to zero but for the `budget` best; return which ones live.

        Triplets that score the same as the best of those that have to go, go with it.
        """
        if not self._means:
            # Every step so far was skipped, so that nothing is known of importance.
            return {n: torch.ones_like(m.lora_E, dtype=torch.bool) for n, m in self._layers.items()}
        scores = {name: self._scores(name) for name in self._layers}
        alive = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        gone = self._start - budget
        if gone > 0:
            ranked = torch.cat([score.flatten() for score in scores.values()])
            limit = ranked.kthvalue(gone).values
            alive = {name: score > limit for name, score in scores.items()}
        for name, layer in self._layers.items():
            layer.lora_E.masked_fill_(~alive[name], 0.0)
        return alive
