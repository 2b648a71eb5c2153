"""Other attention kernels, timed beside the project's own: one file each."""

from peers import flash_attention, flashinfer, triton, xformers
from peers.base import Peer

#: By the key that results have in a record. The first is what speed-ups are over.
PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER for module in (flash_attention, triton, flashinfer, xformers)
}
