"""What can go wrong in a rendezvous, each with a name."""

from __future__ import annotations


class RendezvousError(RuntimeError):
    """Base of all."""


class StaleGeneration(RendezvousError):
    """A newer generation has begun: what was being done for the old one is void."""


class DuplicateRank(RendezvousError):
    """Another process of the same job and generation has this rank."""


class PeerLost(RendezvousError):
    """A connection to a peer broke: the peer died or was replaced."""


class PeerLeft(PeerLost):
    """The peer has left in good order: it had all it needed, so whatever was sent to it has arrived."""


class Unreachable(RendezvousError):
    """A peer could not be reached before the deadline."""


class WrongPeer(RendezvousError):
    """Something else answers at an address: another job, another rank, or no peer of ours at all."""
