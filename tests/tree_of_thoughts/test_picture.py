"""The picture of a tree: well-formed, complete, and safe for any text."""

import re
import xml.etree.ElementTree as ElementTree

from vishwamai_mp.tree_of_thoughts import Node, SearchResult
from vishwamai_mp.tree_of_thoughts.picture import to_svg
from vishwamai_mp.tree_of_thoughts.result import Status

_SVG = "{http://www.w3.org/2000/svg}"


def a_result() -> SearchResult:
    nodes = [Node(0, None, 0, [1, 2], status="expanded")]
    rows: tuple[tuple[int, float, Status], ...] = (
        (0, 0.2, "dropped"),
        (0, 0.9, "expanded"),
        (0, 0.00123, "pruned"),
        (2, 0.3, "complete"),
        (2, 0.8, "complete"),
    )
    for parent, score, status in rows:
        nodes.append(Node(len(nodes), parent, nodes[parent].depth + 1, [9], score=score, status=status))
    texts = ["2 & 3?", "a", "b <script>alert(1)</script>", 'c "quoted"', "d", "e" * 99]
    return SearchResult(nodes, best=5, texts=texts)


def test_every_node_is_drawn_once_with_its_text():
    root = ElementTree.fromstring(to_svg(a_result()))
    groups = root.findall(f"{_SVG}g")
    assert len(groups) == 6
    assert len(root.findall(f"{_SVG}path")) == 5
    titles = [group.findtext(f"{_SVG}title") or "" for group in groups]
    assert titles[2].startswith("b <script>alert(1)</script>")
    assert "pruned" in titles[3]
    assert "score 0.800" in titles[5]
    assert "score 0.0012," in titles[3]


def test_the_chosen_path_is_marked():
    root = ElementTree.fromstring(to_svg(a_result()))
    best = [i for i, group in enumerate(root.findall(f"{_SVG}g")) if "best" in group.attrib["class"].split()]
    assert best == a_result().path == [0, 2, 5]
    assert sum("best" in path.attrib["class"].split() for path in root.findall(f"{_SVG}path")) == 2


def test_boxes_do_not_overlap_and_the_best_sibling_is_on_top():
    groups = ElementTree.fromstring(to_svg(a_result())).findall(f"{_SVG}g")
    places = [tuple(map(float, re.findall(r"[\d.]+", group.attrib["transform"]))) for group in groups]
    assert places[2][1] < places[1][1] < places[3][1]
    for i, (x, y) in enumerate(places):
        assert all(x != other_x or abs(y - other_y) >= 40 for other_x, other_y in places[:i])
