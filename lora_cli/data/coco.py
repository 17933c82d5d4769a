"""The layout of COCO: one document with lists of images, annotations and categories."""

from typing import Any


def coco_rows(document: Any) -> list[dict[str, Any]] | None:
    """Return one row for each image of a document of COCO, or None if it is none.

    A row has ``image``, the name of the file, ``objects``, see `lora_cli.data.boxes`, and ``id``.
    Crowds (``iscrowd``) are left out.
    """
    try:
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        rows = {
            image["id"]: {
                "image": image["file_name"],
                "objects": {"bbox": [], "category": []},
                "id": image["id"],
            }
            for image in document["images"]
        }
        for entry in document["annotations"]:
            if not entry.get("iscrowd"):
                objects = rows[entry["image_id"]]["objects"]
                objects["bbox"].append(entry["bbox"])
                objects["category"].append(names[entry["category_id"]])
    except (TypeError, KeyError, AttributeError):
        return None
    return list(rows.values())
