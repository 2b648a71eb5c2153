"""Other attention kernels, timed next to the project's own: one file each."""

from peers import flash_attention, flashinfer, triton, xformers
from peers.base import Peer

#: Peers by the key of their results in a record. Speed-ups are relative to the first.
PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER for module in (flash_attention, triton, flashinfer, xformers)
}
