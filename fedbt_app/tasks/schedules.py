"""The paper's two orders of blocks.

Wang et al., "Efficient framework for BERT model training based on federated learning" (Journal of
Software 36(9), 2025), sections on further pre-training and fine-tuning.
"""


def shallow_progressive(num_rounds: int, local_depth: int) -> list[int]:
    """Return the one block trained in each round of further pre-training.

    Half of the remaining rounds go to the present block, then the next deeper one has its turn:
    10 rounds give 0,0,0,0,0,1,1,1,2,3. The block stays below `local_depth`.
    """
    block = 0
    remaining = num_rounds  # when the present block's turn began
    schedule = []
    for index in range(num_rounds):
        if index and index == num_rounds - remaining // 2:
            block = min(block + 1, local_depth - 1)
            remaining = num_rounds - index
        schedule.append(block)
    return schedule


def cyclic_decreasing(num_rounds: int, depth: int) -> list[int]:
    """Return the lowest block trained in each round of fine-tuning; all above it are trained too.

    One step shallower a round and, after a window of depth/2 rounds, back to the deepest block.
    """
    window = max(1, depth // 2)
    deepest = depth - 1
    return [deepest - index % window for index in range(num_rounds)]


def deepest_in_turn(num_rounds: int, depth: int) -> list[tuple[int, ...]]:
    """Return the blocks trained in each round of fine-tuning: the deepest one, two, .. in turn."""
    return [tuple(range(lowest, depth)) for lowest in cyclic_decreasing(num_rounds, depth)]
