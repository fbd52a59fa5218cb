"""The frame of the HTML pages: colours for light and dark, and text at the pointer. Pages load nothing."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vishwamai_mp.config import UserError
from vishwamai_mp.config.files import write_whole

STYLE = """
:root { --ink: #1c2430; --paper: #fbfaf7; --card: #fff; --line: #d5d8dd; --best: #0b7a4b; --faint: #5f6874;
  --wrong: #b42318; --c0: #1f6feb; --c1: #d9480f; --c2: #0b7a4b; --c3: #8b3fd9; --c4: #a66f00; --c5: #0e7490;
  --c6: #be185d; --c7: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #15181d; --card: #1c2027; --line: #3d444e; --best: #45d394; --faint: #9da6b2;
    --wrong: #ff8a7a; --c0: #6cb6ff; --c1: #ff9d5c; --c2: #45d394; --c3: #c59bff; --c4: #e3b341; --c5: #4fd1e0;
    --c6: #ff7eb6; --c7: #a9b4c0; } }
* { box-sizing: border-box; }
body { margin: 0; font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 1400px; margin: 0 auto; padding: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 28px 0 6px; }
figure { margin: 0; }
.facts, figcaption { color: var(--faint); } p.facts { margin: 0 0 12px; }
#tip { position: fixed; z-index: 9; left: 0; top: 0; pointer-events: none; max-width: min(420px, 90vw);
  padding: 10px 12px; border-radius: 6px; opacity: 0; background: var(--ink); color: var(--paper);
  font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; transition: opacity .1s;
  box-shadow: 0 4px 18px #0004; }
"""
# showTip(x, y, …parts): text or elements, beside a place of the window; hideTip().
_TIP = """
const tip = document.getElementById('tip');
function showTip(x, y, ...parts) {
  tip.replaceChildren(...parts);
  tip.style.opacity = 1;
  tip.style.left = Math.max(4, x + 16 + tip.offsetWidth < innerWidth ? x + 16 : x - 16 - tip.offsetWidth) + 'px';
  tip.style.top = Math.max(4, Math.min(y + 16, innerHeight - tip.offsetHeight - 12)) + 'px';
}
function hideTip() { tip.style.opacity = 0; }
"""


_TEMPLATES = Environment(
    loader=PackageLoader("vishwamai_mp.observability"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: object) -> Markup:
    """A file of `templates/`. Values are escaped unless they are `Markup`."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def page(title: str, body: str, style: str, script: str) -> str:
    """A whole document.

    Args:
        title: text.
        body: HTML.
        style: beside `STYLE`.
        script: may call `showTip` and `hideTip`.
    """
    parts = {"body": body, "style": STYLE + style, "script": _TIP + script}
    return str(render("page.html", title=title, **{name: Markup(part) for name, part in parts.items()}))


def write_page(path: Path, text: str, option: str) -> None:
    """Write a page that appears whole or not at all.

    Args:
        option: of the command line, that named the path.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from None
