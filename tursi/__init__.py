"""Tursi: deploys, serves and supervises Hugging Face models on your own machines."""

__version__ = "0.1.0"
