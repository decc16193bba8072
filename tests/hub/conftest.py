"""A Hub that remembers what it is sent."""

from pathlib import Path

import huggingface_hub
import pytest


@pytest.fixture
def hub(monkeypatch) -> list[dict]:
    """A Hub without a network: the commits it was sent, each with the texts of its files."""
    commits = []

    def create_repo(self, repo_id, **kwargs):
        assert kwargs.keys() <= {"private", "token", "exist_ok"}
        name = repo_id if "/" in repo_id else f"someone/{repo_id}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def create_commit(self, repo_id, operations, **kwargs):
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        commits.append({"repo_id": repo_id, "files": files, **kwargs})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_branch", lambda self, **kwargs: None)
    monkeypatch.setattr(
        huggingface_hub.ModelCard, "load", lambda *args, **kwargs: huggingface_hub.ModelCard("---\ntags: []\n---\n")
    )
    return commits
