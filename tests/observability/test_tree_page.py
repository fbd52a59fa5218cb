"""The page of a search: complete, safe for any text, and alone."""

import re

from tests.tree_of_thoughts.test_picture import a_result
from vishwamai_mp.observability.tree_page import to_html


def test_the_page_stands_alone():
    page = to_html([a_result(), a_result()], "A & B")
    assert "<script>alert" not in page
    assert page.count("<svg") == 2
    assert not re.search(r"(?:src|href)\s*=|url\(|@import", page)
