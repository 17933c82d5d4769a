"""Settings of runs in several processes, and what must hold between them and the batch."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Several processes that train one model, each on its share of every batch."""

    num_processes: int = field(default=1, metadata={"min": 1})
    """Processes to start on this machine: usually one for each GPU. 1 starts none."""

    num_nodes: int = field(default=1, metadata={"min": 1})
    """Machines that take part; run the same command on each of them."""

    rendezvous: str | None = field(default=None, metadata={"text": True})
    """HOST:PORT where several machines meet: a free port of one of them, the same on each."""

    rendezvous_id: str = field(default="lora-cli", metadata={"text": True})
    """Name of the meeting, for several at the same place."""

    max_restarts: int = field(default=0, metadata={"min": 0})
    """How often to start all processes again, from the last checkpoint, after one of them died."""

    timeout: float = field(default=1800.0, metadata={"above": 0})
    """Seconds without an answer from another process after which the run ends."""

    shard_base: bool = False
    """Keep in each process a share of the frozen base alone; blocks are gathered as they run."""

    @property
    def world_size(self) -> int:
        """Processes of the run, over all machines."""
        return self.num_processes * self.num_nodes


def check_distributed(
    config: DistributedConfig, user: Collection[str], *, names_run: bool
) -> Iterator[Problem]:
    """Yield what does not go together.

    Args:
        config: The section.
        user: Settings that the user has set.
        names_run: Whether the user names the run directory.
    """
    if config.num_nodes > 1 and config.rendezvous is None:
        yield Problem(
            id="config.missing",
            message="`distributed.rendezvous` must be given for several machines, but is null.",
            key="distributed.rendezvous",
            fix="distributed.rendezvous=HOST:PORT, where HOST is one of the machines",
        )
    if config.num_nodes > 1 and not names_run:
        yield Problem(
            id="config.missing",
            message="`run.dir` must be given for several machines, so that they mean the same"
            " folder, but is null.",
            key="run.dir",
            fix="run.name=NAME",
        )
    host, _, port = (config.rendezvous or "").rpartition(":")
    if config.rendezvous is not None and not (host and port.isdigit() and int(port) < 2**16):
        yield Problem(
            id="config.bad-value",
            message=f'`distributed.rendezvous` must be HOST:PORT, but is "{config.rendezvous}".',
            key="distributed.rendezvous",
            fix="distributed.rendezvous=10.0.0.1:29400",
        )
    needs = {
        "rendezvous": ("distributed.num_nodes", config.num_nodes),
        "rendezvous_id": ("distributed.num_nodes", config.num_nodes),
        "max_restarts": ("distributed.num_processes", config.world_size),
    }
    for name, (other, count) in needs.items():
        if f"distributed.{name}" in user and count == 1 and getattr(config, name):
            yield Problem(
                id="config.not-read",
                message=f"`distributed.{name}` must be left out while `{other}` is 1, which has no"
                " use for it, but is set.",
                key=f"distributed.{name}",
                fix=f"leave it out, or set {other}",
            )


def check_sharding(
    *, strategy: str, quantization: str, trainer: TrainerConfig
) -> Iterator[Problem]:
    """Yield what does not go together with a base that is spread over the processes.

    Args:
        strategy: Its name.
        quantization: `model.quantization`.
        trainer: With what happens when memory runs out.
    """
    key = "distributed.shard_base"
    found = {
        f"with strategy={strategy}, which trains all of the base": (
            strategy in ("full", "lora_then_full"),
            "strategy=lora",
        ),
        f"with model.quantization={quantization}, whose weights cannot be cut": (
            quantization != "none",
            "model.quantization=none",
        ),
        "with trainer.auto_micro_batch=true, since processes that wait for each other's weights"
        " cannot begin a step anew": (
            trainer.auto_micro_batch,
            "trainer.auto_micro_batch=false, and a smaller trainer.micro_batch_size",
        ),
    }
    for rule, (is_wrong, fix) in found.items():
        if is_wrong:
            yield Problem(
                id="distributed.no-sharding",
                message=f"`{key}` must be false {rule}, but is true.",
                key=key,
                fix=f"{fix}; or {key}=false",
            )


def check_shares(trainer: TrainerConfig, world_size: int) -> Iterator[Problem]:
    """Yield why a batch cannot be cut into equal shares, and these into micro-batches.

    Args:
        trainer: With the sizes of batches.
        world_size: Processes of the run.
    """
    whole, micro = trainer.global_batch_size, trainer.micro_batch_size or 1
    if world_size == 1 or whole % (world_size * micro) == 0:
        return
    what = f"{world_size} processes"
    if trainer.micro_batch_size is not None:
        what += f" times a micro-batch of {micro}"
    up = -(-whole // (world_size * micro)) * world_size * micro
    yield Problem(
        id="config.batch-size",
        message=f"`trainer.global_batch_size` must be a multiple of {world_size * micro}, for"
        f" {what}, but is {whole}.",
        key="trainer.global_batch_size",
        allowed=f"a multiple of {world_size * micro}",
        fix=f"trainer.global_batch_size={up}",
    )
