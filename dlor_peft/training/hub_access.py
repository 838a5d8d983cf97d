"""training.push_to_hub: whether a run may, asked before it without making a repository; and the push itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def push_adapter(folder: Path, arguments: TrainingArguments, output_dir: str) -> str:
    """The address of the repository that has the adapter in `folder` now.

    Raises:
        OSError: the Hub refuses; the folder is as it was.
    """
    api, name = HfApi(), _repository(arguments, output_dir)
    try:
        repo = api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True).repo_id
        commit = "Adapter trained with dlor train"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit, revision=arguments.hub_revision)
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise OSError(
            f"the adapter is in {folder}, but could not be pushed: {error} To try again: hf upload {name} {folder}"
        ) from error
    return f"{api.endpoint}/{repo}"


def _repository(arguments: TrainingArguments, output_dir: str) -> str:
    """training.hub_model_id, or the name of the run's folder."""
    return arguments.hub_model_id or Path(output_dir).absolute().name


def check_push(arguments: TrainingArguments, output_dir: str) -> str:
    """The repository that would be pushed to, and who is logged in.

    Raises:
        ValueError: nobody is, or the token or its owner may not write there.
    """
    try:
        me: dict[str, Any] = HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"training.push_to_hub: the Hub does not know you: {error} Log in with `hf auth login`, or drop "
            "training.push_to_hub."
        ) from error
    name = _repository(arguments, output_dir)
    owner, _, _ = name.rpartition("/")
    organisations = {found["name"]: found.get("roleInOrg") for found in me.get("orgs", ())}
    if owner not in ("", me["name"], *organisations):
        raise ValueError(
            f"training.hub_model_id: {me['name']} is no member of {owner!r}, whose repository {name!r} is. Choose one "
            f"of {', '.join([me['name'], *organisations])}."
        )
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if "read" in (role, organisations.get(owner)):
        what = "the token" if role == "read" else f"{me['name']}'s role in {owner}"
        raise ValueError(f"training.push_to_hub: {what} may read only. Use a token and an account that may write.")
    # its scopes are not told in a form that could be checked
    note = ", with a fine-grained token: whether it may write there shows at the push" if role == "fineGrained" else ""
    return f"to {name if owner else me['name'] + '/' + name}, as {me['name']}{note}"
