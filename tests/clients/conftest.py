"""Triton's interpreter must be asked for before anything imports Triton, as other software here does."""

import os

os.environ["TRITON_INTERPRET"] = "1"
