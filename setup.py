"""The description on a package index: README.md, in which links to files of the repository would lead nowhere."""

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def describe(readme: str, source: str | None) -> str:
    """README for a page that is not beside the repository's files.

    Args:
        readme: Markdown whose links to files are relative.
        source: address of the repository (`Source` in pyproject.toml's urls), below which GitHub and GitLab show files;
            None: links become their text, and images are left out.
    """

    def absolute(link: re.Match) -> str:
        image, text, target = link.groups()
        if re.match(r"[a-z]+:", target):
            return link[0]
        if source is None:
            return "" if image else text
        folder = "" if target.startswith("#") else f"/{'raw' if image else 'blob'}/HEAD/"
        return f"{image}[{text}]({source.rstrip('/')}{folder}{target})"

    parts = re.split(r"(^```.*?^```$\n?)", readme, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [LINK.sub(absolute, part) for part in parts[::2]]  # what is printed as code stays
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    setup(
        long_description=describe((ROOT / "README.md").read_text("utf-8"), urls.get("Source")),
        long_description_content_type="text/markdown",
    )
