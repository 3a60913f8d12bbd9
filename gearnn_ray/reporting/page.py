"""The pages that jobs write: one HTML file each, without scripts or requests, in one style (page.css)."""

import base64
from pathlib import Path

import jinja2


def page_template(path: Path) -> jinja2.Template:
    """The template in a file, in which `style` is the style sheet."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return environment.from_string(path.read_text(encoding="utf-8"))


def image_address(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
