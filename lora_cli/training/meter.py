"""Loss and speed over a stretch of optimizer steps."""

from dataclasses import replace

from lora_cli.training.events import Progress


class Meter:
    """Adds up steps since the last report."""

    def __init__(self) -> None:
        self.start_window()

    def start_window(self) -> None:
        """Forget the steps so far."""
        self._loss_sum = self._count = self._seconds = 0.0
        self._rows = 0

    def add(self, loss_sum: float, count: float, *, rows: int, seconds: float) -> None:
        """Add one step: its summed loss, the supervised items in it, its rows, its time."""
        self._loss_sum += loss_sum
        self._count += count
        self._rows += rows
        self._seconds += seconds

    def noted(self, progress: Progress) -> Progress:
        """Return progress with what the loss of the next report is made of."""
        return replace(progress, loss_sum=self._loss_sum, loss_count=self._count)

    def resume(self, progress: Progress) -> Progress:
        """Go on from the sums of a checkpoint, and return its progress without them.

        Speed starts afresh, since it is that of this session.
        """
        self.start_window()
        self._loss_sum, self._count = progress.loss_sum, progress.loss_count
        return replace(progress, loss_sum=0.0, loss_count=0.0)

    def loss(self) -> float:
        """Return the mean loss per supervised item; 0 where the rows had none."""
        return self._loss_sum / self._count if self._count else 0.0

    def samples_per_second(self) -> float:
        """Return rows per second."""
        return self._rows / self._seconds if self._seconds else 0.0
