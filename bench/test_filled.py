"""Tables within pages that are written by hand are those of the functions that the pages name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import filled
from bench.learning import wanted

PAGE = """# A page

<!-- made by bench.learning.wanted.table -->

| an older | table |

<!-- until here -->

The end.
"""


def test_a_table_is_made_anew_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "docs" / "spec").mkdir(parents=True)
    (tmp_path / "docs" / "spec" / "page.md").write_text(PAGE)
    (tmp_path / "docs" / "other.md").write_text("# Nothing is made here\n")
    (tmp_path / "README.md").write_text(PAGE)
    made = filled.pages(tmp_path)
    assert [path.name for path in made] == ["README.md", "page.md"] and len(set(made.values())) == 1
    path, text = made.popitem()
    assert text == PAGE.replace("| an older | table |", wanted.table())
    assert filled.filled(path, text) == text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"<!-- until here -->": ""}, "p.md has 1 times '<!-- made by ', but only 0 of them name a function"),
        ({"bench.learning": "os.path"}, "p.md has 1 times '<!-- made by ', but only 0 of them name a function"),
        ({"made by": "made by nothing -->\n\n<!-- made by"}, "p.md has 2 times '<!-- made by ', but only 1"),
        ({"wanted.table": "wanted.tables"}, "p.md names bench.learning.wanted.tables: module 'bench.learning.wanted'"),
        ({"learning.": "lore."}, "p.md names bench.lore.wanted.table: No module named 'bench.lore'"),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_filled_is_named(change: dict[str, str], says: str) -> None:
    [(old, new)] = change.items()
    with pytest.raises(ValueError, match=re.escape(says)):
        filled.filled(Path("p.md"), PAGE.replace(old, new))
