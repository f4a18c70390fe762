"""Level 5: the verbs, from a folder to a model that predicts, on 24 tiny images; and runs that are interrupted."""

import csv
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from semiseg import api
from semiseg.engine import session
from semiseg.methods import METHODS, describe
from semiseg.methods.fixmatch import FixMatch

Command = Callable[..., "Done"]  # noqa: F821  both in conftest.py


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """A process of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "semiseg", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "SEMISEG_CACHE": str(cwd / ".cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
