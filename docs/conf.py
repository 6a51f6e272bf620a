# Sphinx configuration; `make docs` builds with it.
import importlib.metadata
import urllib.request

from celery import Task
from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

from celery_alchemy import SessionTask

project = "celery-alchemy"
author = "The celery-alchemy authors"
copyright = "2026, The celery-alchemy authors"  # noqa: A001 (the name is Sphinx's)
release = importlib.metadata.version("celery-alchemy")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
myst_enable_extensions = ["deflist"]
# Headings up to this depth can be linked to: an error's section is errors.md#name-in-lower-case.
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "celery-alchemy"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Attributes of a dataclass are described once: by autodoc, which finds them, and not again by the docstring's section.
napoleon_use_ivar = True

SITES = {
    "python": "https://docs.python.org/3/",
    "sqlalchemy": "https://docs.sqlalchemy.org/en/20/",
    "celery": "https://docs.celeryq.dev/en/stable/",
}


def _answers(site: str) -> bool:
    try:
        with urllib.request.urlopen(f"{site}objects.inv", timeout=3):  # noqa: S310 - the addresses above.
            return True
    except OSError:
        return False


# Names of Celery and SQLAlchemy become links where their sites can be reached. Without a network they stay plain text: a build
# that warns fails.
intersphinx_mapping = {name: (site, None) for name, site in SITES.items() if _answers(site)}


def skip_celerys_options(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    """Leave out the options that every task of Celery's has, and whose descriptions only Celery's own site can show."""
    is_celerys = what == "class" and name in vars(Task) and not callable(value) and name not in SessionTask.__annotations__
    return True if is_celerys and not isinstance(value, property) else None


def strip_code(app: Sphinx, document: nodes.document) -> None:
    """Take away the empty lines between the end of what is shown of an example and the comment behind it."""
    for block in document.findall(nodes.literal_block):
        block.rawsource = block.astext().rstrip("\n")
        block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> None:
    """Let drawings be shown as the text that they are; code hosts and editors draw them."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("autodoc-skip-member", skip_celerys_options)
    app.connect("doctree-read", strip_code)
