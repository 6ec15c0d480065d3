"""Every public name has a docstring that names its parameters and fields, and docs/api.md is made of them."""

from api_page import PAGE, render


def test_the_page_is_what_the_docstrings_say():
    assert PAGE.read_text() == render(), "run `python tests/api_page.py`"
