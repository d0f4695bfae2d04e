"""Build script. Metadata and options are in ``pyproject.toml``; only what has to be computed belongs here."""

from setuptools import setup

setup()
