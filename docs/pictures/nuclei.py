"""Draws nuclei.png: image, reference and prediction of test images of DSB2018 (CC0).

semiseg predict RUN $SEMISEG_DATA/dsb2018/images/test -o MASKS
python docs/pictures/nuclei.py MASKS
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from semiseg.data.formats import MaskCode, read_image, read_mask
from semiseg.engine.predict import blend

DATA = Path(os.environ["SEMISEG_DATA"]) / "dsb2018"
PALETTE = ((0, 0, 0), (255, 120, 0))
HEIGHT, EACH = 180, 5


def main(masks: Path) -> None:
    """Takes every EACH-th part of the test images, in the order of their names: not chosen by how they look."""
    names = sorted(path.stem for path in masks.glob("*.png"))
    columns = []
    for name in names[:: len(names) // EACH][:EACH]:
        image = read_image(next((DATA / "images/test").glob(f"{name}.*")), 3)
        reference = read_mask(DATA / f"masks/test/{name}.png", MaskCode(2, values=((0, 0), (1, 1))))
        prediction = read_mask(masks / f"{name}.png", MaskCode(2, values=((0, 0), (1, 1))))
        cells = [
            image,
            *(blend(image, np.where(m == 1, 1, 255).astype(np.uint8), PALETTE) for m in (reference, prediction)),
        ]
        columns.append(np.concatenate([np.array(Image.fromarray(c).resize((HEIGHT, HEIGHT))) for c in cells]))
    picture = Image.fromarray(np.concatenate(columns, axis=1)).quantize(128)
    picture.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
