"""
What MkDocs does otherwise here: README, CONTRIBUTING and CHANGELOG are pages too; links that leave docs/ lead to the
repository, and pictures outside of it come along.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File


REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)(#[^)]*)?(?=\))")


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / source)))
    for picture in [*REPOSITORY.glob("benchmarks/results/**/*.png"), *REPOSITORY.glob("hub_card/*/results/*.png")]:
        name = str(picture.relative_to(REPOSITORY))
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match) -> str:
        target, heading = match[1], match[2] or ""
        path = PurePosixPath(*_resolved(PurePosixPath(source).parent / target))
        pages = {of: name for name, of in PAGES.items()}
        if str(path) in pages:
            return pages[str(path)] + heading
        if path.parts[0] == "docs":
            return str(PurePosixPath(*path.parts[1:])) + heading
        if path.suffix in PICTURES:
            return str(path)
        kind = "tree" if (REPOSITORY / path).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path}{heading}"

    return LINK.sub(link, markdown)


def on_page_content(html, page, config, files):
    """Docstrings write [`Name`] and (`int`, *optional*) as those of Transformers do, which mean nothing here."""
    html = re.sub(r"\[(<code>[^<]+</code>)\]", r"\1", html)
    return re.sub(r"<code>`[^<]*</code>", lambda match: re.sub(r"[`*]", "", match[0]), html)


def _resolved(path: PurePosixPath) -> list[str]:
    """The parts of a path without `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return parts
