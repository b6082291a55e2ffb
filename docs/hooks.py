"""Add README, CONTRIBUTING and CHANGELOG to the site, their links rewritten, so that each exists once."""

import re
from pathlib import Path

from mkdocs.structure.files import File

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\(([^)\s:#]+)")


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        text = (root / name).read_text("utf-8")
        text = LINK.sub(lambda match: f"]({PAGES.get(match[1], match[1].removeprefix('docs/'))}", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Links from docs/ to the pages that `on_files` adds."""
    return re.sub(r"\]\(\.\./(\w+\.md)", lambda match: f"]({PAGES[match[1]]}", markdown)
