"""Uploads of Hugging Face folders to the hub."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.errors import UserError
from flax_mlm.storage import hub

_TIMEOUT = 10  # seconds for the first request
_TOKEN = "set HF_TOKEN to a token that may write there"


class Repository(NamedTuple):
    """A repository of the hub, and the flag that names it."""

    field: str
    name: str
    private: bool

    def push(self, folder: Path) -> str:
        """Uploads a folder in one commit, and makes the repository first if there is none.

        Other files of an existing repository stay as they are.

        Returns:
          `hf:ORG/NAME@COMMIT`.

        Raises:
          UserError: the hub refuses it, or does not answer.
        """
        library = hub.library(f"{self.field} is 'hf:{self.name}', which")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        adds = [library.CommitOperationAdd(file.relative_to(folder).as_posix(), str(file)) for file in files]
        with hub.naming(f"{self.field} is 'hf:{self.name}'"):
            api = library.HfApi()
            api.create_repo(self.name, private=self.private or None, exist_ok=True)
            commit = api.create_commit(self.name, adds, commit_message="Add the model as flax_mlm exports it")
        return f"hf:{self.name}@{commit.oid}"


def open_repository(field: str, path: str, private: bool) -> Repository:
    """Checks whether this user may write to a repository, or make it, as far as can be known. Nothing is changed.

    Args:
      field: the flag that names it, for errors.
      path: `hf:ORG/NAME`.
      private: whether only its owners are to see it.

    Raises:
      UserError: it is no such name; there is no token, or one that may not write there; the repository is there and
        public, though `private` is set; or the hub does not answer.
    """
    if not re.fullmatch(r"hf:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise UserError(f"{field} is '{path}'; expected hf:ORG/NAME, where a token of HF_TOKEN may write")
    what, name = f"{field} is '{path}'", path.removeprefix("hf:")
    library = hub.library(f"{what}, which")
    if hub.is_offline():
        raise UserError(f"{what}, and HF_HUB_OFFLINE is set; unset it to upload")
    if not library.get_token():
        raise UserError(f"{what}, and there is no token; {_TOKEN}, or run: hf auth login")
    with hub.naming(what):
        api = library.HfApi()
        info = _info(name, api, library)  # first, since no other request has a limit of time
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"{what}, and the token of {user['name']} may only read; {_TOKEN}")
        if info is None:
            _check_owner(what, name.partition("/")[0], user)
        elif private and not info.private:
            remedy = "make it private on its page, or name another"
            raise UserError(f"{what}, which is there and public, and --private makes new ones alone; {remedy}")
        else:
            _check_writable(what, name, api, library)
    return Repository(field, name, private)


def _info(name: str, api: Any, library: Any) -> Any:
    """Returns what the hub says of a repository; None where there is none that this user may read."""
    try:
        return api.model_info(name, timeout=_TIMEOUT)
    except library.errors.HfHubHTTPError as e:
        if e.response.status_code not in (401, 404):  # without a valid token, 401 may mean either
            raise
        return None


def _check_owner(what: str, owner: str, user: dict[str, Any]) -> None:
    """Raises UserError where a new repository would belong to others."""
    own = [user["name"], *(each["name"] for each in user.get("orgs", ()))]
    if owner not in own:
        raise UserError(f"{what}, and the token is of {user['name']}, who may write to {', '.join(own)}; {_TOKEN}")


def _check_writable(what: str, name: str, api: Any, library: Any) -> None:
    """Raises UserError where a repository that exists is closed to this token."""
    try:
        api.auth_check(name, write=True)
    except TypeError:  # an older huggingface_hub, which cannot ask
        return
    except library.errors.HfHubHTTPError as e:
        if e.response.status_code not in (401, 403):
            raise
        raise UserError(f"{what}, where the token may read but not write; {_TOKEN}") from None
