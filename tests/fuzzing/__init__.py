"""Programs at random: see ../fuzz.py. The kinds of statements register themselves."""

from . import layers, other, params, slices
