"""The bodies of the routes that load and unload adapters, as in vLLM's API. Unknown fields are ignored. Checks shapes only."""

import msgspec


class LoadAdapterBody(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter to serve."""

    lora_name: str
    """As requests will ask for it."""
    lora_path: str
    """A directory on the server's host, or a Hub repository: OWNER/NAME or OWNER/NAME@REVISION."""
    load_inplace: bool | None = None
    """Replace the one of this name, for requests to come."""


class UnloadAdapterBody(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter to serve no more."""

    lora_name: str
    lora_int_id: int | None = None
    """Has no meaning here: names are enough."""
