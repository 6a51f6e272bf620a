# Sphinx configuration; `make docs` builds with it.
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "celery-alchemy"
author = "The celery-alchemy authors"
copyright = "2026, The celery-alchemy authors"  # noqa: A001 (the name is Sphinx's)
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
# Headings up to this depth can be linked to: an error's section is errors.md#name-in-lower-case.
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "celery-alchemy"


def setup(app: Sphinx) -> None:
    """Let drawings be shown as the text that they are; code hosts and editors draw them."""
    app.add_lexer("mermaid", TextLexer)
