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
