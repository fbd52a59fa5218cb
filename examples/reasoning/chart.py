"""A bar chart as SVG."""

import html
from collections.abc import Mapping

_BAR, _GAP, _LEFT, _WIDTH = 22, 12, 190, 420


def bar_chart(bars: Mapping[str, tuple[float, float]], title: str) -> str:
    """Horizontal bars of shares from 0 to 1, each with a spread; the highest is green."""
    height = 60 + len(bars) * (_BAR + _GAP)
    best = max(share for share, _ in bars.values())
    rows = []
    for i, (name, (share, spread)) in enumerate(bars.items()):
        y = 44 + i * (_BAR + _GAP)
        middle, end = y + _BAR / 2, _LEFT + share * _WIDTH
        low, high = end - spread * _WIDTH, end + spread * _WIDTH
        rows.append(
            f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{share * _WIDTH:.1f}" height="{_BAR}" rx="3"'
            f' fill="{"#0b7a4b" if share == best else "#8fa3bf"}"/>'
            f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222" stroke-width="2"/>'
            f'<text x="{high + 8:.1f}" y="{middle + 4}">{share:.2f} ± {spread:.2f}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 110}" height="{height}"'
        f' font-family="system-ui, sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="16" y="26" font-size="15">{html.escape(title)}</text>{"".join(rows)}</svg>\n'
    )
