from typing import Any

import pytest

from lora_cli.data.coco import coco_rows

DOCUMENT: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": 9, "bbox": [1, 2, 3, 4], "category_id": 18},
        {"image_id": 9, "bbox": [0, 0, 9, 9], "category_id": 3, "iscrowd": 1},
        {"image_id": 9, "bbox": [5, 6, 7, 8], "category_id": 3, "iscrowd": 0},
    ],
}


def test_each_image_is_a_row_also_without_objects() -> None:
    assert coco_rows(DOCUMENT) == [
        {"image": "a.jpg", "objects": {"bbox": [], "category": []}, "id": 7},
        {
            "image": "b.jpg",
            "objects": {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": ["dog", "cat"]},
            "id": 9,
        },
    ]


@pytest.mark.parametrize("name", list(DOCUMENT))
def test_other_documents_are_none(name: str) -> None:
    assert coco_rows({key: part for key, part in DOCUMENT.items() if key != name}) is None
    assert coco_rows([DOCUMENT]) is None
