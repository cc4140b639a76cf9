"""How fast a process group exchanges data: by the links between its ranks, and how many of them it may use at once.

Ranks of a group lie at a stride: tensor parallel ones side by side, replicas as far apart as a model has ranks.
Within a node each GPU has NVLink. Over nodes a collective goes in as many rings as the group has ranks in a node, and
each ring leaves the node through its rank's own adapter, as NCCL builds them: a rank then has as many adapters' speed,
NVLink's at most. Other groups of the node have the other adapters.
"""

from megatron_lrc.estimate.devices import GPUS_PER_NODE, Gpu

#: Share of a link's speed that collectives reach; assumed.
LINK_EFFICIENCY = 0.7
#: Bytes per second and direction between nodes, for each GPU: one 400 Gbit/s adapter. Assumed.
NODE_LINK = 50e9


def ring_speed(num_ranks: int, stride: int, gpu: Gpu) -> float:
    """Bytes per second that each rank of a group sends in a collective. stride: between neighbours, in ranks."""
    if num_ranks * stride <= GPUS_PER_NODE:
        return gpu.nvlink * LINK_EFFICIENCY
    return min(gpu.nvlink, ranks_in_a_node(num_ranks, stride) * NODE_LINK) * LINK_EFFICIENCY


def ranks_in_a_node(num_ranks: int, stride: int) -> int:
    """Of a group, on the node that holds the fewest: the last one may."""
    in_a_node = max(GPUS_PER_NODE // stride, 1)
    return num_ranks % in_a_node or in_a_node


def neighbour_speed(world_size: int, gpu: Gpu) -> float:
    """Of a message to the next pipeline stage: each rank's own, where any of them is on another node."""
    return (gpu.nvlink if world_size <= GPUS_PER_NODE else NODE_LINK) * LINK_EFFICIENCY
