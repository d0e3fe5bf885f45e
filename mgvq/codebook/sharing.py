"""Which channel slices share a table: a rule that any codebook can offer as its setting `share`."""

from mgvq.errors import UserError
from mgvq.types import ChannelSlice

SHARES = ("layer", "input", "kind")


def check_share(share: str) -> None:
    """Raises UserError for a `codebook.share` that is none of `SHARES`."""
    if share not in SHARES:
        raise UserError(f"codebook.share must be {', '.join(SHARES[:-1])} or {SHARES[-1]}, got {share!r}")


def table_group(channel_slice: ChannelSlice, share: str) -> str:
    """The name of the table group of a channel slice; slices of one name share a table.

    `layer`: each slice has a table of its own. `input`: the slices of one channel group share one over layers that read the same
    activations. `kind`: over layers of one kind (`q_proj`, say) in a tower.
    """
    site = channel_slice.site
    shared = {"layer": site.name, "input": site.reads, "kind": f"{site.tower}.{site.kind}"}[share]
    return f"{shared}/{channel_slice.group}"
