"""Error feedback: what a lossy encoding dropped is added to the next one."""

from fedbt_app.codec.codec import Encoded, decode, encode
from fedbt_app.codec.formats import is_lossless
from fedbt_app.tensors import Tensors


def encode_with_feedback(
    deltas: Tensors,
    residual: Tensors,
    codec: str,
) -> tuple[Encoded, Tensors, Tensors]:
    """Encode deltas plus what earlier encodings dropped.

    This is error feedback (Seide et al. 2014; Karimireddy et al. 2019).

    Returns
    -------
    tuple
        The encoded deltas, what the receiver decodes of them, and the new residual, empty if
        nothing was dropped.
    """
    wanted = dict(deltas)
    for name, dropped in residual.items():
        if name in wanted:
            wanted[name] = wanted[name] + dropped
    encoded = encode(wanted, codec)
    if is_lossless(codec):
        return encoded, wanted, {}
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    received = decode(encoded.arrays, encoded.header, shapes)
    still_missing = {name: value - received[name] for name, value in wanted.items()}
    return encoded, received, still_missing
