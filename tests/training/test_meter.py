from lora_cli.training.events import Progress
from lora_cli.training.meter import Meter


def test_a_window_of_steps() -> None:
    meter = Meter()
    meter.add(6.0, 4, rows=8, seconds=2.0)
    meter.add(3.0, 2, rows=4, seconds=1.0)
    assert (meter.loss(), meter.samples_per_second()) == (1.5, 4.0)
    meter.start_window()
    meter.add(1.0, 4, rows=4, seconds=0.0)
    # A clock that did not move says nothing of speed.
    assert (meter.loss(), meter.samples_per_second()) == (0.25, 0.0)
    meter.start_window()
    meter.add(0.0, 0, rows=4, seconds=1.0)
    assert meter.loss() == 0


def test_a_window_goes_on_in_another_session() -> None:
    first, second = Meter(), Meter()
    first.add(1 / 3, 4, rows=8, seconds=2.0)
    noted = first.noted(Progress(step=5))
    assert (noted.loss_sum, noted.loss_count) == (1 / 3, 4)
    assert second.resume(noted) == Progress(step=5)
    for meter in (first, second):
        meter.add(0.1, 3, rows=2, seconds=4.0)
    assert second.loss() == first.loss() == (1 / 3 + 0.1) / 7
    # Speed is that of the session.
    assert second.samples_per_second() == 0.5
    second.resume(Progress(step=5))
    assert second.loss() == 0
