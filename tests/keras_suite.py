"""Loaded by test_keras_suite.py before Keras's tests are collected: ours in the place of theirs."""

from __future__ import annotations

from types import ModuleType

import keras.src
from keras.src import optimizers
from keras.src.optimizers import adam, adamw

import omniadam.keras

ours = {"Adam": omniadam.keras.Adam, "AdamW": omniadam.keras.AdamW}
adam.Adam, adamw.AdamW = ours["Adam"], ours["AdamW"]

optimizers.ALL_OBJECTS_DICT.update({name.lower(): kind for name, kind in ours.items()})

# The module as tests import it. Keras on PyTorch looks its own classes up in the other one.
shown = ModuleType(optimizers.__name__)
vars(shown).update(vars(optimizers) | ours)
keras.src.optimizers = shown
