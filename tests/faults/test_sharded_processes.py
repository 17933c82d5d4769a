"""Two processes that keep half of the frozen base each: the same bits, and none hangs for ever."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forked import kill_at
from pairs import First, nothing, only, run_together
from tally import Tally
from together import Setup, check_after, make_setup, metrics, note_texts, signal_at, trained

SHARDED = "distributed.shard_base=true"
BOTH: list[First] = [nothing, nothing]
TIMEOUT = 4.0


@pytest.fixture(scope="module")
def pair_setup(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A run with padding, which is computed along where the base is spread."""
    folder = tmp_path_factory.mktemp("sharded")
    return make_setup(tiny_run, folder, "trainer.padding_free=false")


def results(run: Path) -> dict[str, Any]:
    found = json.loads((run / "result.json").read_bytes())
    return {name: found[name] for name in ("base", "adapter", "merged", "best_step", "steps")}


def as_accelerate_launches(**settings: str) -> First:
    """Return what puts into the environment what `accelerate launch --use_fsdp` does."""

    def begin() -> None:
        from lora_cli.training.sharding import sharding_of_accelerate

        sharding_of_accelerate.cache_clear()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({f"FSDP_{name}": value for name, value in settings.items()})

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("how", ["setting", "accelerate"])
def test_a_run_comes_to_the_same_bits(setup: Setup, how: str) -> None:
    launched = as_accelerate_launches(VERSION="2", RESHARD_AFTER_FORWARD="true")
    firsts, more = (BOTH, [SHARDED]) if how == "setting" else ([launched] * 2, [])
    done = run_together(setup.arguments("a", *more), setup.folder, firsts=firsts, limit=90)
    assert done.codes == [0, 0], done.outputs
    assert "MB of the frozen base over 2 processes" in done.outputs[0]
    assert done.outputs[1] == ""
    run = setup.folder / "a"
    assert trained(run) == setup.expected
    assert metrics(run) == setup.metrics
    assert results(run) == results(setup.folder / "ref")


@pytest.mark.slow
def test_what_is_trained_may_be_anything_but_the_base(setup: Setup) -> None:
    for strategy in ("bitfit", "top", "adapter", "prefix", "head"):
        given = [x for x in setup.settings if not x.startswith(("lora.", "task.max_length"))]
        arguments = ["train", *given, "task.max_length=24", f"strategy={strategy}"]
        runs = []
        for name, more in ((f"{strategy}-whole", []), (f"{strategy}-spread", [SHARDED])):
            line = [*arguments, f"run.dir={name}", *more]
            done = run_together(line, setup.folder, firsts=BOTH, limit=90)
            assert done.codes == [0, 0], done.outputs
            runs.append(setup.folder / name)
        assert trained(runs[0]) == trained(runs[1])
        assert results(runs[0]) == results(runs[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("lora.targets=[query,word_embeddings]", "lora.init=gaussian"),
        ("lora.init=pissa",),
        ("lora.trainable_tokens=[shiny]",),
        ("model.dtype=bfloat16", "trainer.gradient_checkpointing=true"),
        ("adapter=ref",),
        ("adapter=ref", "adapter_mode=merge"),
        ("lora.init=eva",),
        ("trainer.global_batch_size=6", "trainer.micro_batch_size=1"),
    ],
    ids=lambda more: more[-1],
)
def test_other_settings_know_nothing_of_it(setup: Setup, more: tuple[str, ...]) -> None:
    given = dict(x.split("=", 1) for x in (*setup.settings, *more))
    runs = []
    for name, how in (("whole", []), ("spread", [SHARDED])):
        line = ["train", *(f"{key}={value}" for key, value in given.items()), f"run.dir={name}"]
        line += [*how, "--overwrite"]
        done = run_together(line, setup.folder, firsts=BOTH, limit=90)
        assert done.codes == [0, 0], done.outputs
        runs.append(setup.folder / name)
    assert trained(runs[0]) == trained(runs[1])
    assert results(runs[0]) == results(runs[1])


@pytest.mark.faults
@pytest.mark.parametrize("place", [("forward", 1), ("forward", 6), ("forward", 9), ("commit", 2)])
def test_a_process_dies(setup: Setup, place: Any) -> None:
    tally = Tally("6 processes: death, sharded")
    for rank in (0, 1) if place[0] == "forward" else (0,):
        firsts = only(rank, kill_at(place))
        pair = run_together(setup.arguments("a", SHARDED), setup.folder, firsts=firsts, limit=60)
        note_texts(pair, tally)
        assert pair.codes[rank] == -signal.SIGKILL, pair.outputs
        assert pair.codes[1 - rank] == 1, pair.outputs
        assert pair.seconds < 30
        # It goes on with the base whole.
        check_after(setup, "a", tally)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_hangs(setup: Setup, rank: int) -> None:
    tally = Tally("6 processes: hang, sharded")
    firsts = only(rank, signal_at(signal.SIGSTOP, ("forward", 6)))
    arguments = setup.arguments("a", SHARDED, f"distributed.timeout={TIMEOUT}")
    pair = run_together(arguments, setup.folder, firsts=firsts, limit=60)
    note_texts(pair, tally)
    assert pair.stopped == [rank]
    assert pair.codes[1 - rank] == 1, pair.outputs
    assert pair.seconds < 2 * TIMEOUT + 5
    if rank == 1:
        assert f"but rank 1 did not answer for {TIMEOUT:g} s" in pair.outputs[0]
    check_after(setup, "a", tally)
    tally.check()


@pytest.mark.faults
def test_a_process_is_asked_to_stop(setup: Setup) -> None:
    tally = Tally("6 processes: stop one, sharded")
    firsts = only(1, signal_at(signal.SIGTERM, ("forward", 6)))
    pair = run_together(setup.arguments("a", SHARDED), setup.folder, firsts=firsts, limit=60)
    note_texts(pair, tally)
    assert pair.codes == [75, 75], pair.outputs
    check_after(setup, "a", tally)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_ends_both(setup: Setup, rank: int) -> None:
    """In a block of the model, while the other process goes on to the next one."""

    def begin() -> None:
        from transformers.models.bert.modeling_bert import BertIntermediate

        forward = BertIntermediate.forward

        def limited(self: Any, states: Any) -> Any:
            if self.training:
                raise MemoryError
            return forward(self, states)

        pytest.MonkeyPatch().setattr(BertIntermediate, "forward", limited)

    arguments = setup.arguments("a", SHARDED)
    pair = run_together(arguments, setup.folder, firsts=only(rank, begin), limit=60)
    assert pair.codes == [1, 1], pair.outputs
    assert pair.outputs[0].count("error[train.out-of-memory]") == 1
    assert pair.seconds < 30


@pytest.mark.faults
def test_memory_that_runs_out_while_weights_are_gathered(setup: Setup) -> None:
    """The other process waits in the exchange itself, and is let go by the end of this one."""

    def begin() -> None:
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

        gather, calls = groups.FSDPParamGroup.unshard, []

        def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > 20:
                raise torch.OutOfMemoryError("out of memory")
            return gather(self, *args, **kwargs)

        import torch

        pytest.MonkeyPatch().setattr(groups.FSDPParamGroup, "unshard", limited)

    arguments = setup.arguments("a", SHARDED)
    pair = run_together(arguments, setup.folder, firsts=only(1, begin), limit=60)
    assert pair.codes == [1, 1], pair.outputs
    assert "error[train.out-of-memory]" in pair.outputs[0]
    assert pair.seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("strategy=full", "which trains all of the base"),
        ("strategy=lora_then_full", "which trains all of the base"),
        ("model.quantization=nf4", "whose weights cannot be cut"),
        ("trainer.auto_micro_batch=true", "cannot begin a step anew"),
    ],
)
@pytest.mark.parametrize("how", ["setting", "accelerate"])
def test_what_cannot_be_spread_is_refused_at_once(
    setup: Setup, how: str, more: str, words: str
) -> None:
    given = [x for x in setup.settings if not (more == "strategy=full" and x.startswith("lora."))]
    arguments = ["train", *given, "run.dir=a", more]
    launched = as_accelerate_launches(VERSION="2")
    if how == "setting":
        pair = run_together([*arguments, SHARDED], setup.folder, firsts=BOTH, limit=60)
    else:
        pair = run_together(arguments, setup.folder, firsts=[launched] * 2, limit=60)
    assert pair.codes == [2, 2], pair.outputs
    assert "error[distributed.no-sharding]" in pair.outputs[0]
    assert words in " ".join(pair.outputs[0].split())
    assert not (setup.folder / "a" / "recipe.yaml").exists()


@pytest.mark.slow
def test_one_process_has_nobody_to_share_with(setup: Setup) -> None:
    pair = run_together(setup.arguments("a", SHARDED), setup.folder, firsts=[nothing], limit=60)
    assert pair.codes == [2], pair.outputs
    assert "must be false in a run of one process" in pair.outputs[0]
