"""Whether the Hugging Face hub lets this machine have a model, asked before anything is loaded or reserved."""

from __future__ import annotations

import os

from dphrl.model_files import check_files, model_folder

# The hub answers in less than a second; its client itself would wait for ever.
TIMEOUT_S = 20.0
WHERE_TOKENS_GO = "HF_TOKEN (Kubernetes: in the Secret of `dphrl render --secret`; Ray: where each node was started)"


def is_offline() -> bool:
    """Whether Hugging Face's libraries were told to ask nobody."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def is_cached(model: str) -> bool:
    """Whether all files of a hub model are on this machine."""
    try:
        check_files(model_folder(model))
    except (OSError, ValueError):
        return False
    return True


def access_obstacle(model: str) -> str | None:
    """Why the model of a hub name cannot be had, as one line with what to do; None if nothing is known against it: the
    hub grants it, everything is on this machine already, the libraries are offline, or a mirror does not say."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if is_offline() or is_cached(model):
        return None
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    has_token = get_token() is not None
    try:
        answer = get_session().get(
            f"{endpoint}/api/models/{model}/auth-check", headers=build_hf_headers(), timeout=TIMEOUT_S
        )
        hf_raise_for_status(answer)
    except GatedRepoError:
        if has_token:
            return (
                f"model.path: {model} is gated, and the token that is here may not read it; ask for access at "
                f"{endpoint}/{model}, or put another token into {WHERE_TOKENS_GO}"
            )
        return (
            f"model.path: {model} is gated, and no token is here; accept its terms at {endpoint}/{model}, and put a "
            f"token into {WHERE_TOKENS_GO}"
        )
    except RepositoryNotFoundError:
        known = "with the token that is here" if has_token else "without a token, and none is here"
        return (
            f"model.path: {model} cannot be read at {endpoint} {known}; correct the name, or for a private model put a "
            f"token that may read it into {WHERE_TOKENS_GO}"
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            return None
        return (
            f"model.path: {endpoint} refuses the token that is here ({error.response.status_code}) when asked for "
            f"{model}; put a valid one into {WHERE_TOKENS_GO}"
        )
    except Exception as error:  # of the HTTP library, which another version of the client replaces by another
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        return (
            f"model.path: {model} is not on this machine, and {endpoint} does not answer ({reason}); see to the "
            "network, set HF_ENDPOINT to a mirror, or bring the model here and set HF_HUB_OFFLINE=1"
        )
    return None
