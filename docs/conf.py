"""Sphinx configuration; ``make docs`` builds with warnings as errors."""

import sys
from pathlib import Path

from tursi import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "Tursi"
release = version = __version__
copyright = "the Tursi maintainers"  # noqa: A001 - Sphinx's name
extensions = ["http_reference"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Serve AI models on your own machines."}
nitpicky = True
