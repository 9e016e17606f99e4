"""Sphinx settings of the site. Everything it shows is read from disk: no page asks the network for anything."""

from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
MATHJAX = Path(
    find_spec("sphinx-mathjax-offline").submodule_search_locations[0], "static", "mathjax", "tex-svg-full.js"
)

project = html_title = "Ten vision-transformer papers"
html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # one search field is enough: the sidebar's
    "footer_content_items": [],
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system says
html_static_path = [str(HERE / "static"), str(MATHJAX)]
html_css_files = ["companion.css"]
html_show_copyright = False
smartquotes = False  # claims stand as they were written

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]  # myst_nb brings sphinx.ext.mathjax
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # `forward` would show that of torch.nn.Module
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
default_role = "code"  # docstrings put code between single backticks
mathjax_path = MATHJAX.name  # one file with the glyphs as SVG: no fonts and no extensions to load
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the pages are the executed copies
nb_merge_streams = True
nb_ipywidgets_js = {}  # widgets need a kernel; what stands beside them in the output is shown instead
