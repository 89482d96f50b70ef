"""Faces that are found against boxes that are given: python -m bench.faces ../shared/media

MEDIA holds pictures NAME.jpg or NAME.png, each with NAME_face.npy. Prints one row a picture: what is found, and its
overlap (intersection over union) with the given box.
"""

import argparse
import pathlib
import sys

from emv3_jax import media
from emv3_jax.errors import UserError


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (y1, y2, x1, x2)."""
    area = lambda box: max(0.0, box[1] - box[0]) * max(0.0, box[3] - box[2])  # noqa: E731
    common = area((max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])))
    return common / (area(a) + area(b) - common)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("media", type=pathlib.Path)
    args = parser.parse_args()
    print("| picture | found | overlap with the given box |\n| --- | --- | --- |")
    for path in sorted(args.media.glob("*_face.npy")):
        picture = next(iter(sorted(args.media.glob(path.name.replace("_face.npy", ".[jp][pn]g")))))
        image, _ = media.load_image(picture)
        given = media.load_face_box(path, *image.shape[:2])
        try:
            found = media.choose_face(media.detect_faces(image), "largest")
            print(f"| {picture.name} | {', '.join(f'{x:.0f}' for x in found)} | {overlap(found, given):.2f} |")
        except UserError as error:
            print(f"| {picture.name} | {error.message} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
