"""Sphinx settings of the site. All content is local: no page loads anything from the network."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).parent
MATHJAX = Path(
    find_spec("sphinx-mathjax-offline").submodule_search_locations[0], "static", "mathjax", "tex-svg-full.js"
)

project = html_title = "Vision-transformer papers"
html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # one search field is enough: the sidebar's
    "footer_content_items": [],
    "max_navbar_depth": 1,  # the theme's buttons that unfold a level have no name
}
html_context = {"default_mode": "auto"}  # light or dark by the reader's system setting
exclude_patterns = ["files"]  # downloads
html_static_path = [str(HERE / "static"), str(MATHJAX)]
html_css_files = ["companion.css"]
html_show_copyright = False
html_use_index = html_domain_indices = False  # thousands of signatures, which no phone shows; search finds names
smartquotes = False  # no typographic quotes in claims

# myst_nb brings sphinx.ext.mathjax
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# a name is documented where it is defined; apidoc reads this for packages, and `automodule_options` for modules alone
os.environ["SPHINX_APIDOC_OPTIONS"] = "members,ignore-module-all"
apidoc_modules = [
    {
        "path": str(HERE.parent / "lib" / "companion"),
        "destination": "api",
        "exclude_patterns": [str(HERE.parent / "lib" / "companion" / name) for name in ("toy", "cli.py")],
        "module_first": True,
        "max_depth": 1,
    }
]
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # `forward` would show that of torch.nn.Module
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
add_module_names = False
napoleon_use_ivar = True  # the fields of a tuple are listed once
sd_card_legacy_separators = False
suppress_warnings = [
    "docutils",  # odd indentation in a docstring does not stop the build
    "ref.python",  # several classes have a field `size`
]
mathjax_path = MATHJAX.name  # MathJax as one file with SVG glyphs: loads no fonts and no extensions
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the pages are the executed copies
nb_merge_streams = True
nb_ipywidgets_js = {}  # widgets need a kernel; the output next to them is shown instead


def restructured(app, what, name, obj, options, lines) -> None:
    """Turn a docstring into reStructuredText in place: code between backticks, indented blocks verbatim."""
    parts, literal = [""], False  # prose and literal blocks by turns
    section = re.compile(r"[A-Z]\w+:( .*)?$")
    above = ""  # the last line at the margin
    for before, line in zip(["", *lines], lines, strict=False):
        if line.strip() and literal != (
            line[:4] == "    " and (literal or not before.strip()) and not section.match(above)
        ):
            literal = not literal
            parts.append("::\n\n" if literal else "\n")
        above = line if line[:1].strip() else above
        parts[-1] += line + "\n"
    for i in range(0, len(parts), 2):
        words = re.split(r"(`[^`]+`)", parts[i])  # every second one is code
        words[::2] = [re.sub(r"(?m)(?!^\* )([*|\\]|_\b)", r"\\\1", word) for word in words[::2]]
        words[1::2] = [f"\\ `{word}`\\ " for word in words[1::2]]
        parts[i] = "".join(words)
    lines[:] = "".join(parts).splitlines()


def numbered(app, document) -> None:
    """Several lines with an equation number: Sphinx's `split` admits none."""
    for block in document.findall(nodes.math_block):
        if r"\tag" in block.astext():
            block[:] = [nodes.Text(r"\begin{equation}" + block.astext() + r"\end{equation}")]
            block["no-wrap"] = True


def setup(app) -> None:
    # a page's figures are loaded as the reader comes to them
    app.connect("builder-inited", lambda app: app.env.settings.update(image_loading="lazy"))
    app.connect("doctree-read", numbered)
    app.connect("autodoc-process-docstring", restructured, priority=400)  # before napoleon
