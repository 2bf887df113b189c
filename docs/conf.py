"""The documentation site: `sphinx-build -c docs . build/site`. Its source is the project's root, so that links
work in the repository and in the site alike.
"""

from importlib import metadata

project = "Outpace"
version = release = metadata.version("outpace")
root_doc = "docs/index"
include_patterns = ["docs/*.md", "benchmarks/results/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]

extensions = ["myst_parser"]
myst_heading_anchors = 3
suppress_warnings = ["toc.not_included"]  # pages of result files are reached by links
nitpicky = True

html_theme = "furo"
html_title = f"Outpace {version}"
html_extra_path = ["site"]  # an index.html at the top that leads to docs/index.html
html_copy_source = False
