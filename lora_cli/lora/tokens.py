"""Training the embeddings of a few tokens, which may be new to the vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_cli.errors import Problem, UserError
from lora_cli.lora.embedding import unsupported
from lora_cli.lora.layer import TransparentLayer
from lora_cli.lora.parameter import with_parameters
from lora_cli.lora.patterns import is_inside
from lora_cli.models.base import silence

KEY = "lora.trainable_tokens"


class TokenRows(nn.Module):
    """Rows of an embedding table that are trained, in the order of their token numbers' list.

    Args:
        rows: Where they start, shape (n, embedding_dim); copied as float32.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows.detach().to(torch.float32, copy=True))


class TokenEmbedding(TransparentLayer):
    r"""A frozen embedding some rows of which are trained.

    Row ``i`` of the table W is ``rows[n]`` where ``i`` is the n-th of `indices`, and ``W[i]`` for
    every other token; the rows start as those of W. They are whole rows, not differences, though
    PEFT's name for them says otherwise.

    Parameters, named as in adapter state after ``base_layer`` is left out:

    ========================================  ===============================  =======  ========
    name                                      shape                            trained  dtype
    ========================================  ===============================  =======  ========
    ``base_layer.weight``                     (num_embeddings, embedding_dim)  no       as given
    ``token_adapter.trainable_tokens_delta``  (n, embedding_dim)               yes      float32
    ========================================  ===============================  =======  ========

    Args:
        base: The embedding. It is kept, not copied, and frozen in place.
        indices: Numbers of the tokens, all different.

    Raises:
        ValueError: If a number is not that of a row or is there twice, or the class does more than
            to look up rows and scale them.

    Example:
        >>> layer = TokenEmbedding(nn.Embedding(10, 6), [7, 2])
        >>> ids = torch.tensor([[1, 2, 7]])
        >>> torch.equal(layer(ids), layer.base_layer(ids))
        True
        >>> layer.own_tensors()["token_adapter.trainable_tokens_delta"].shape
        torch.Size([2, 6])
    """

    indices: torch.Tensor
    places: torch.Tensor

    def __init__(self, base: nn.Embedding, indices: Sequence[int]) -> None:
        super().__init__()
        num_rows = base.weight.shape[0]
        if len(set(indices)) < len(indices) or not all(0 <= i < num_rows for i in indices):
            raise ValueError(f"indices must be different rows of {num_rows}, but are {indices}.")
        fault = unsupported(base)
        if fault:
            raise ValueError(f"An embedding must look up rows of its own weight, but {fault}.")
        device = base.weight.device
        chosen = torch.tensor(list(indices), dtype=torch.long)
        places = torch.full((num_rows,), -1).index_copy(0, chosen, torch.arange(len(indices)))
        self.base_layer = base.requires_grad_(False)
        self.register_buffer("indices", chosen.to(device), persistent=False)
        # For each token of the vocabulary its place among the trained rows, or -1.
        self.register_buffer("places", places.to(device), persistent=False)
        self.token_adapter = TokenRows(base.weight[self.indices])
        self.train(base.training)

    @property
    def rows(self) -> nn.Parameter:
        """The trained rows, (n, embedding_dim)."""
        rows: nn.Parameter = self.token_adapter.trainable_tokens_delta
        return rows

    @property
    def weight(self) -> torch.Tensor:
        """The whole table with the trained rows in it, for code that does not call the layer."""
        base: torch.Tensor = self.base_layer.weight
        return base.index_copy(0, self.indices, self.rows.to(base.dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows with the numbers `ids`, (..., embedding_dim), in the base's dtype."""
        return self.look_up(self.base_layer, ids)

    def look_up(self, table: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return what an embedding layer with this layer's frozen weight gives for `ids`."""
        result: torch.Tensor = table(ids)
        places = self.places[ids]
        own = functional.embedding(places.clamp(min=0), self.rows)
        if (factor := getattr(table, "embed_scale", None)) is not None:
            # The classes that keep it as a tensor round it to the dtype of the table.
            is_tensor = isinstance(factor, torch.Tensor)
            own = own * (factor.to(table.weight.dtype) if is_tensor else factor)
        return torch.where((places >= 0).unsqueeze(-1), own.to(result.dtype), result)

    def project(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Return what a linear layer with this layer's frozen weight gives for `x`."""
        scores: torch.Tensor = layer(x)
        bias = None if layer.bias is None else layer.bias[self.indices]
        own = functional.linear(x, self.rows.to(x.dtype), bias)
        return scores.index_copy(-1, self.indices, own.to(scores.dtype))

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return what merging adds to the table, (num_embeddings, embedding_dim), float32."""
        base: torch.Tensor = self.base_layer.weight.float()
        return base.index_copy(0, self.indices, self.rows.float()) - base

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a frozen embedding of the same class with the trained rows in its table.

        They are rounded once to the dtype of the table. ``self`` is left as it was.
        """
        return with_parameters(self.base_layer, {"weight": self.weight})


class TiedTokens(TransparentLayer):
    """A layer that shares its weight with an embedding, and follows its trained rows.

    It is another embedding (of the decoder, in T5) or the linear layer that scores tokens. It has
    no tensors of its own; those of the embedding get the gradient of both.

    Args:
        base: The layer. It is kept, not copied, and frozen in place.
        source: What it follows; not registered, so that its tensors stay in one place.
    """

    def __init__(self, base: nn.Module, source: TokenEmbedding) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self._sources = [source]
        self.train(base.training)

    @property
    def source(self) -> TokenEmbedding:
        """The embedding whose trained rows these are."""
        return self._sources[0]

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight with the trained rows in it, for code that does not call the layer."""
        return self.source.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows with the numbers `x`, or the scores of all tokens for states `x`."""
        if isinstance(self.base_layer, nn.Embedding):
            return self.source.look_up(self.base_layer, x)
        return self.source.project(self.base_layer, x)

    def delta_weight(self) -> torch.Tensor:
        """Return what merging adds to the weight, float32."""
        return self.source.delta_weight()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a frozen layer with the trained rows in its weight.

        It has a copy of its own; `lora_cli.lora.merge.merge_lora` makes it the embedding's again.
        """
        return with_parameters(self.base_layer, {"weight": self.source.weight})


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Add texts to a tokenizer where they are no token yet, and return the numbers of all.

    Raises:
        UserError: If a text is there twice, or cannot be a token.
    """
    faults = {text: "is there twice" for text in texts if texts.count(text) > 1}
    vocabulary = tokenizer.get_vocab()
    new = [text for text in dict.fromkeys(texts) if text not in vocabulary]
    faults |= {text: "is empty" for text in new if not text.strip()}
    if not faults:
        tokenizer.add_tokens(new)
        vocabulary = tokenizer.get_vocab()
        for text in new:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            if list(found) != [vocabulary.get(text)]:
                faults[text] = f"becomes {len(found)} tokens, even after it was added"
    if faults:
        raise UserError(
            [
                Problem(
                    id="lora.bad-token",
                    message=f'`{KEY}` must hold different texts that can be tokens, but "{text}" '
                    f"{fault}.",
                    key=KEY,
                    fix="leave it out, or write it without blanks around it",
                )
                for text, fault in faults.items()
            ]
        )
    return tuple(vocabulary[text] for text in texts)


def make_room(model: Any, indices: Sequence[int], *, seed: int) -> None:
    """Give the model's embedding, and what is tied to it, rows for new tokens, in place.

    New rows start near the mean of the others (Hewitt 2021): the random part depends on `seed`
    alone. Rows that the model has already, as padding of its vocabulary, stay as they are.
    """
    embedding = model.get_input_embeddings()
    needed = max(indices, default=-1) + 1
    if needed <= embedding.weight.shape[0]:
        return
    with torch.random.fork_rng(devices=[]), silence():
        torch.manual_seed(seed)
        model.resize_token_embeddings(needed, mean_resizing=not embedding.weight.is_meta)


def prepare_tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], *, seed: int
) -> dict[str, tuple[int, ...]]:
    """Add texts to a tokenizer and a model where they are new, in place.

    Args:
        model: The base model, before injection.
        tokenizer: The base model's, if it has one; adding the same texts again changes nothing.
        texts: What to train the embeddings of.
        seed: Decides the start of new rows.

    Returns:
        What `put_tokens` takes.

    Raises:
        UserError: If a text is there twice, or cannot be a token.
    """
    if not texts:
        return {}
    indices = add_tokens(tokenizer, texts)
    make_room(model, indices, seed=seed)
    return input_tokens(model, indices)


def check_tokens(model: Any, adapted: Sequence[str], saved_modules: Sequence[str]) -> list[Problem]:
    """Return problems that keep rows of the model's embedding from being trained by themselves.

    Args:
        model: The base model, before injection.
        adapted: Paths of the layers that get an adapter.
        saved_modules: Paths of the modules that are trained whole.
    """
    path, finding = _embedding_path(model), ""
    if path is None:
        finding = "this one has none"
    else:
        base = model.get_submodule(path)
        names = sharing(model, base.weight)
        targeted = [name for name in names if name in adapted]
        whole = [name for name in names if is_inside(name, saved_modules)]
        if targeted:
            finding = f'"{targeted[0]}" is in `lora.targets` as well'
        elif whole:
            finding = f'"{whole[0]}" is trained whole'
        else:
            finding = unsupported(base) or ""
    if not finding:
        return []
    return [
        Problem(
            id="lora.no-token-rows",
            message=f"`{KEY}` must be for a model with an embedding of tokens that nothing else "
            f"trains, but {finding}.",
            key=KEY,
            fix="leave one of the two out" if path else f"leave out {KEY}",
        )
    ]


def put_tokens(model: Any, tokens: Mapping[str, Sequence[int]]) -> None:
    """Make rows of embeddings trainable, in place, and let tied layers follow.

    Args:
        model: The base model, with room for the tokens.
        tokens: Numbers of tokens by path of the embedding.
    """
    for path, indices in tokens.items():
        base = model.get_submodule(path)
        followers = sharing(model, base.weight)
        layer = TokenEmbedding(base, indices)
        for name, module in followers.items():
            parent, _, last = name.rpartition(".")
            replacement = layer if module is base else TiedTokens(module, layer)
            setattr(model.get_submodule(parent), last, replacement)


def sharing(model: nn.Module, weight: nn.Parameter) -> dict[str, nn.Module]:
    """Return the layers that hold `weight`, by path; a layer with two paths is there twice."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if any(value is weight for value in module.parameters(recurse=False))
    }


def input_tokens(model: Any, indices: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return what `put_tokens` takes, for tokens of the model's input embedding."""
    path = _embedding_path(model) if indices else None
    return {} if path is None else {path: tuple(indices)}


def _embedding_path(model: Any) -> str | None:
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(embedding, nn.Embedding):
        return None
    names = (name for name, module in model.named_modules() if module is embedding)
    return next(names, None)
