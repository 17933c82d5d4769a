"""What is read of images with boxes, and what is made of what a model says."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_scenes import PIXELS, scene
from transformers import YolosImageProcessorPil

from lora_cli.data.media import locate
from lora_cli.metrics.detection import Boxes
from lora_cli.tasks.boxed_images import DetectionReader, relative_boxes, surest_boxes


def test_images_are_mirrored_in_training_alone(tmp_path: Path) -> None:
    scene(random.Random(0))[0].save(tmp_path / "a.png")
    size = {"shortest_edge": PIXELS, "longest_edge": 2 * PIXELS}
    reader = DetectionReader(YolosImageProcessorPil(size=size), {"image": "image"}, flip=0.5)
    places = [locate("a.png", f"{tmp_path}/")]
    plain = reader.process(places, ["a"], seed=None)["pixel_values"]
    for seed in range(8):
        found = reader.process(places, ["a"], seed=seed)["pixel_values"]
        expected = plain.flip(-1) if reader.is_mirrored("a", seed) else plain
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert {reader.is_mirrored("a", seed) for seed in range(8)} == {True, False}
    assert not reader.is_mirrored("a", None)


def test_shares_of_the_image_and_back() -> None:
    corners = np.array([[0, 0, 10, 20], [5, 5, 20, 30]], np.float32)
    boxes = Boxes(corners, np.array([1, 0]), np.ones(2, np.float32))
    target = relative_boxes(boxes, (20, 40))
    expected = [[0.25, 0.25, 0.5, 0.5], [0.625, 0.4375, 0.75, 0.625]]
    assert target["boxes"].tolist() == pytest.approx(np.array(expected))
    logits = torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    found = surest_boxes(torch.cat([logits, torch.zeros(2, 1)], 1), target["boxes"], (20, 40), 2)
    assert found.labels.tolist() == [0, 1]
    assert found.corners == pytest.approx(corners[::-1])


def test_at_most_a_hundred_boxes_of_an_image() -> None:
    torch.manual_seed(0)
    found = surest_boxes(torch.randn(90, 2), torch.rand(90, 4), (10, 10), 2)
    assert len(found.scores) == 100
    assert (found.scores[:-1] >= found.scores[1:]).all()
