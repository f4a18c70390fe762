"""The lists of labelled images that papers of this field publish, known by what they list.

Two lists of the same length may be of two families whose scores do not compare: all images of U2PL's 1/16 and 1/8 of
Pascal VOC have a mask drawn with care (one of VOC's own 1,464), of the random ones 93 of 662 and 193 of 1,323.

Sources: the repositories of U2PL (Haochen-Wang409/U2PL, Apache-2.0) and UniMatch (LiheYoung/UniMatch, MIT).
"""

import hashlib
from collections.abc import Iterable


def digest(ids: Iterable[str]) -> str:
    """What a list of images is known by: of its ids, whatever their order. An id is the name alone, `2007_000032`."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:8]


LISTS = {
    "124b0aab": "classic list of 92 fine masks",
    "79b959bc": "classic list of 183 fine masks",
    "f0e702c6": "classic list of 366 fine masks",
    "8c23014f": "classic list of 732 fine masks",
    "129f1fe9": "classic list of all 1464 fine masks",
    "feea4692": "U2PL's blender list 1/16, all fine masks",
    "23921931": "U2PL's blender list 1/8, all fine masks",
    "d35f7cd4": "U2PL's blender list 1/4, 1464 fine masks",
    "aacb97f2": "U2PL's blender list 1/2, 1464 fine masks",
    "baa85754": "UniMatch's random list 1/16, 93 fine masks",
    "c9ca45b4": "UniMatch's random list 1/8, 193 fine masks",
    "fd0e8dca": "UniMatch's random list 1/4, 388 fine masks",
    "855dff35": "the whole of train_aug",
    "f20f7c7d": "U2PL's Cityscapes list 1/16",
    "f13edf48": "U2PL's Cityscapes list 1/8",
    "7d0cfd6f": "U2PL's Cityscapes list 1/4",
    "c6122be0": "U2PL's Cityscapes list 1/2",
    "c4164038": "UniMatch's Cityscapes list 1/30",
    "1e5363dd": "UniMatch's Cityscapes list 1/16",
    "6b3b52ba": "UniMatch's Cityscapes list 1/8",
    "6856046a": "UniMatch's Cityscapes list 1/4",
    "2b318362": "UniMatch's Cityscapes list 1/2",
}
"""Digest of a list -> its family in words; fine masks are those of Pascal VOC itself, not SBD's."""
