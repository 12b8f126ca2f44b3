"""Other ways to teleport, as searches: earlier ones that are exact on small networks, and a later one."""

from recipes.peers.group_action import GroupActionSearch
from recipes.peers.layers import HiddenLayer, hidden_layers
from recipes.peers.null_space import NullSpaceSearch, free_shares
from recipes.peers.rescaling import RescalingSearch

__all__ = [
    "GroupActionSearch",
    "HiddenLayer",
    "NullSpaceSearch",
    "RescalingSearch",
    "free_shares",
    "hidden_layers",
]
