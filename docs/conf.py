"""How Sphinx builds these pages: Markdown through MyST, a theme that Sphinx brings along, nothing from the network."""

project = "VishwamAI-MP"
extensions = ["myst_parser"]
root_doc = "index"
myst_heading_anchors = 3  # links to headings, as GitHub has them
html_theme = "alabaster"
html_theme_options = {"fixed_sidebar": True, "page_width": "1100px", "sidebar_width": "240px"}
html_copy_source = False
html_show_copyright = False
