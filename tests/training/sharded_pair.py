"""One of two processes that compare a spread base with a whole one; `test_sharding.py` starts both.

Each writes what it has seen as JSON: `python sharded_pair.py OUT MODEL DATA`.
"""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from lora_cli.errors import LoraCliError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.state import load_adapter_state
from lora_cli.lora.tokens import input_tokens, put_tokens
from lora_cli.training.evaluation import evaluate_rows
from lora_cli.training.events import CheckpointDue
from lora_cli.training.group import Group, join_group
from lora_cli.training.runtime import Runtime
from lora_cli.training.sharded_merge import merge_sharded, round_trained
from lora_cli.training.sharding import Sharding, is_sharded, local_share, shard_model

_spec = importlib.util.spec_from_file_location(
    "sharded_pair_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)

ADALORA = AdaLoraSettings(init_r=4, total_steps=16, warmup_steps=1, final_steps=2, every=1)
PLAIN = LoraSettings(r=2, alpha=8.0)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": PLAIN, "targets": ("query", "value", "dense")},
    "dora": {"lora": LoraSettings(r=2, alpha=8.0, variant="dora")},
    "lora_fa": {"lora": LoraSettings(r=2, alpha=8.0, variant="lora_fa")},
    "vera": {"lora": LoraSettings(r=2, alpha=8.0, variant="vera", d_initial=0.5)},
    "adalora": {"lora": LoraSettings(r=2, alpha=8.0, variant="adalora", adalora=ADALORA)},
    "lora_bias": {"lora": LoraSettings(r=2, alpha=8.0, lora_bias=True)},
    "embedding": {"lora": PLAIN, "targets": ("word_embeddings", "query")},
    "checkpointing": {"lora": PLAIN, "gradient_checkpointing": True},
    "noise, average": {"lora": PLAIN, "neftune_alpha": 5.0, "ema_decay": 0.9},
    "smoothing": {"lora": PLAIN, "label_smoothing": 0.1},
    "bf16": {"lora": PLAIN, "precision": "bf16"},
}


def build(model: Path, data: Path, *, sharded: bool, **settings: Any) -> Any:
    """Return a trainer of both processes."""
    support.Runtime = partial(Runtime, shard_base=sharded)
    return support.build_trainer(model, data, **settings)


def both(model: Path, data: Path, **settings: Any) -> tuple[Any, Any]:
    """Return a trainer with the base whole, and one with the base spread."""
    whole, spread = (build(model, data, sharded=flag, **settings) for flag in (False, True))
    assert is_sharded(spread._model)
    assert not is_sharded(whole._model)
    return whole, spread


def is_equal(first: Any, second: Any) -> bool:
    """Whether two mappings of tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the gradients by name; where there is none, nothing."""
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def compare_windows(model: Path, data: Path) -> list[str]:
    """Compare loss and gradients of windows that leave a process with fewer passes, or none."""
    wrong = []
    for micro in (None, 2, 1):
        trainers = both(model, data, micro_batch_size=micro, dropout=0.1)
        for rows in (1, 2, 3, 5, 7, 8):
            sums = [trainer._backward(trainer.plan.train[:rows]) for trainer in trainers]
            if sums[0] != sums[1] or not is_equal(*map(gradients, trainers)):
                wrong.append(f"{rows}/{micro}")
    return wrong


def compare_evaluations(model: Path, data: Path) -> list[str]:
    """Compare evaluations of 1 to 9 rows in batches of 1 to 5."""
    trainers = both(model, data)
    wrong = []
    for rows in range(1, 10):
        for size in range(1, 6):
            found = [
                evaluate_rows(
                    trainer.task,
                    trainer._model,
                    trainer.plan.validation[:rows],
                    batch_size=size,
                    device=trainer.runtime.device,
                    group=trainer._group,
                )
                for trainer in trainers
            ]
            if found[0] != found[1]:
                wrong.append(f"{rows}/{size}")
    return wrong


def compare_methods(model: Path, data: Path) -> dict[str, list[bool]]:
    """Compare what three steps come to: the adapter, the moments, and the merged model's words."""
    seen = {}
    for name, settings in METHODS.items():
        trainers = both(model, data, max_steps=3, save_steps=3, dropout=0.0, **settings)
        for trainer in trainers:
            trainer.run()
        states = [trainer.state() for trainer in trainers]
        merge_lora(trainers[0]._plain_model)
        merge_sharded(trainers[1]._plain_model)
        merged = [trainer.evaluate().predictions for trainer in trainers]
        seen[name] = [
            is_equal(states[0].adapter, states[1].adapter),
            is_equal(states[0].optimizer, states[1].optimizer),
            merged[0] == merged[1],
        ]
    return seen


def resume(model: Path, data: Path) -> list[bool]:
    """Go on from a checkpoint of a whole base with a spread one, and the other way round."""
    settings: dict[str, Any] = {"global_batch_size": 10, "epochs": 1, "save_steps": 3}
    states: list[Any] = []
    whole, spread = both(model, data, listeners=[states.append], dropout=0.1, **settings)
    whole.run()
    state = next(event.state for event in states if isinstance(event, CheckpointDue))
    load_adapter_state(spread._plain_model, dict(state.adapter), spread._saved_modules)
    spread.resume(state)
    spread.run()
    return [is_equal(whole.adapter(), spread.adapter())]


def memory(group: Group, model: Path, data: Path) -> dict[str, Any]:
    """Return the bytes of frozen weights in this process, at rest and while a block runs."""
    whole, spread = both(model, data)
    frozen = [p for p in whole._plain_model.parameters() if not p.requires_grad]
    held: list[int] = []
    storages: list[Any] = []
    # Views of what is gathered, taken while a block runs, show afterwards whether it was let go of.
    for block in spread._plain_model.bert.encoder.layer:
        block.intermediate.register_forward_hook(
            lambda module, *_: storages.append(module.dense.weight.untyped_storage())
        )
    spread.evaluate()
    gathered = [storage.size() for storage in storages]
    for parameter in spread._plain_model.parameters():
        if not parameter.requires_grad:
            share = local_share(parameter)
            held.append(share.numel() * share.element_size())
    return {
        "whole": sum(p.numel() * p.element_size() for p in frozen),
        "here": sum(held),
        "all": int(group.add(torch.tensor(sum(held)))),
        "gathered afterwards": sum(gathered),
        "blocks": len(gathered),
        "trained": is_equal(whole.adapter(), spread.adapter()),
    }


def round_as_bfloat16(model: Path, data: Path) -> bool:
    """Round what is trained to a number format, and look at it."""
    trainer = build(model, data, sharded=True)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    round_trained(trainer._plain_model, dict.fromkeys(before, torch.bfloat16))
    return all(
        torch.equal(p, before[name].bfloat16().float()) for name, p in trainer.parameters.items()
    )


def compare_families(group: Group) -> dict[str, list[bool]]:
    """Compare models of other kinds: tied weights, rows of tokens, an encoder, generation.

    Each process generates another number of tokens from another number of rows.
    """
    small = {"vocab_size": 64, "num_heads": 2, "num_layers": 2}
    t5 = T5Config(d_model=32, d_kv=8, d_ff=48, decoder_start_token_id=0, **small)
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    generator = torch.Generator().manual_seed(group.rank)
    ids = torch.randint(5, 60, (2 + group.rank, 7), generator=generator)
    seen = {}
    for name, kind, config in (
        ("gpt2", GPT2LMHeadModel, gpt2),
        ("t5", T5ForConditionalGeneration, t5),
    ):
        models = []
        for sharded in (False, True):
            torch.manual_seed(0)
            model: Any = kind(config)
            targets = [n for n, _ in model.named_modules() if n.endswith(("c_attn", ".q", ".v"))]
            inject_lora(model, tuple(targets), PLAIN)
            put_tokens(model, input_tokens(model, [5, 6, 7]))
            freeze_base(model, ())
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1)
            if sharded:
                shard_model(model, Sharding(), group=group, device=torch.device("cpu"))
            models.append(model.eval())
        losses = [model(input_ids=ids, labels=ids).loss for model in models]
        for loss in losses:
            loss.backward()
        pairs = zip(*(model.parameters() for model in models), strict=True)
        grown = [
            bool(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6))
            for a, b in pairs
            if a.requires_grad
        ]
        words = [
            model.generate(ids, max_new_tokens=2 + 3 * group.rank, do_sample=False, pad_token_id=0)
            for model in models
        ]
        merge_lora(models[0])
        merge_sharded(models[1])
        merged = [model(input_ids=ids, labels=ids).loss for model in models]
        found = [torch.equal(*losses), all(grown), torch.equal(*words), torch.equal(*merged)]
        seen[name] = [*found, len(grown) > 4]
    return seen


def fail(group: Group, model: Path, data: Path) -> dict[str, Any]:
    """Meet an error in one process alone: in a block going forward, going back, and in the loss."""
    seen = {}
    for place in ("forward", "backward", "loss"):
        trainer = build(model, data, sharded=True)
        block = trainer._plain_model.bert.encoder.layer[1]

        def broken(*_: Any) -> None:
            raise ValueError("only here")

        if group.rank == 1 and place == "forward":
            block.intermediate.register_forward_hook(broken)
        elif group.rank == 1 and place == "backward":
            block.intermediate.register_full_backward_hook(broken)
        elif group.rank == 1:
            object.__setattr__(trainer.task, "forward", broken)
        try:
            trainer._train_step()
        except (LoraCliError, ValueError) as error:
            seen[place] = [type(error).__name__, str(error)]
        # They still understand each other afterwards.
        assert group.add(torch.tensor(1)).item() == 2
    return seen


def main(out: Path, model: Path, data: Path) -> None:
    """Run everything and write it down."""
    torch.set_num_threads(1)
    group = join_group(60.0)
    seen = {
        "windows": compare_windows(model, data),
        "evaluations": compare_evaluations(model, data),
        "methods": compare_methods(model, data),
        "resumed": resume(model, data),
        "memory": memory(group, model, data),
        "rounded": round_as_bfloat16(model, data),
        "families": compare_families(group),
        "failure": fail(group, model, data),
    }
    (out / f"{group.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
