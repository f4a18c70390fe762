"""Draws nuclei.png: test images of DSB2018 (CC0), reference, and the predictions of labelled-only and of FixMatch.

semiseg train recipes/dsb2018/fixmatch-mobilenetv2-5.yaml --out RUN
semiseg predict RUN/baseline $SEMISEG_DATA/dsb2018/images/test -o LABELLED_ONLY
semiseg predict RUN $SEMISEG_DATA/dsb2018/images/test -o FIXMATCH
python docs/pictures/nuclei.py LABELLED_ONLY FIXMATCH
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


def main(folders: list[Path]) -> None:
    """Takes every EACH-th part of the test images, in the order of their names: not chosen by how they look."""
    names = sorted(path.stem for path in folders[0].glob("*.png"))
    code = MaskCode(2, values=((0, 0), (1, 1)))
    columns = []
    for name in names[:: len(names) // EACH][:EACH]:
        image = read_image(next((DATA / "images/test").glob(f"{name}.*")), 3)
        masks = [read_mask(folder / f"{name}.png", code) for folder in (DATA / "masks/test", *folders)]
        cells = [image, *(blend(image, np.where(m == 1, 1, 255).astype(np.uint8), PALETTE) for m in masks)]
        columns.append(np.concatenate([np.array(Image.fromarray(c).resize((HEIGHT, HEIGHT))) for c in cells]))
    picture = Image.fromarray(np.concatenate(columns, axis=1)).quantize(128)
    picture.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
