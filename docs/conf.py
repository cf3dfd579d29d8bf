"""Settings of Sphinx: `make docs` builds the pages; no network is needed."""

from __future__ import annotations

import warnings

# ASDL's import warns once; the package keeps this from its users, and Sphinx imports the package.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

from laplace_ws import __version__  # noqa: E402

project = "laplace_ws"
author = "the authors of laplace_ws"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["measured/*.md"]  # tables that benchmarks.md holds too

autodoc_mock_imports = ["lightning", "transformers"]  # which only their callbacks import

html_theme = "furo"
html_title = f"laplace_ws {__version__}"

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes that are properties too are described once
napoleon_use_rtype = False
